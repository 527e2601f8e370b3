"""How much it matters how a name is written: pictures of the Space's gallery found by names in other forms.

python -m mome.experiments.query_forms --checkpoint DIR [--results FILE]

The gallery is the two icon sets that no training saw. R@1 is the share of its names that find a picture of that name
first, written plainly, with marks, in other cases, beside an emoji or in a sentence.
"""

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image

from ..embedder import Embedder
from ..errors import MomeError
from ..evaluation.metrics import retrieval_recall
from ..evaluation.results import append_figures
from .arguments import add_results_argument

GALLERY = Path(__file__).parents[1] / "space" / "gallery.parquet"


def pascal_case(name: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in name.split())


def camel_case(name: str) -> str:
    return pascal_case(name)[:1].lower() + pascal_case(name)[1:]


# The first is what the others are compared with.
FORMS: dict[str, Callable[[str], str]] = {
    "name": str,
    "name!": "{}!".format,
    "name,": "{},".format,
    "name.": "{}.".format,
    '"name"': '"{}"'.format,
    "“name”": "“{}”".format,
    "'name'": "'{}'".format,
    "name — with a dash": "{} —".format,
    "NAME": str.upper,
    "snake_case": lambda name: name.replace(" ", "_"),
    "kebab-case": lambda name: name.replace(" ", "-"),
    "PascalCase": pascal_case,
    "camelCase": camel_case,
    "name 🎁": "{} 🎁".format,
    "name🙂✨": "{}🙂✨".format,
    "слово name": "слово {}".format,
    "a photo of a name.": "a photo of a {}.".format,
    "This is a photo of name.": "This is a photo of {}.".format,
}
TEMPLATES = ("a photo of a name.", "This is a photo of name.")  # sentences, which mean more than the name


def read_gallery(path: Path = GALLERY) -> tuple[list[str], list[Image.Image]]:
    """Names and pictures."""
    columns = pq.read_table(path, columns=["name", "png"]).to_pydict()
    return columns["name"], [Image.open(io.BytesIO(png)) for png in columns["png"]]


def query_forms(embedder: Embedder, names: Sequence[str], images: torch.Tensor) -> dict[str, float]:
    """Form → R@1.

    Args:
        embedder: embeds the queries.
        names: of the pictures.
        images: embeddings of the pictures, (pictures, dimension), L2-normalised.
    """
    asked = list(dict.fromkeys(names))
    wanted = torch.tensor([[name == query for name in names] for query in asked])
    figures, embeddings = {}, {}  # the second: token ids → embedding, since most forms have those of the name
    for form, write in FORMS.items():
        texts = [write(name) for name in asked]
        ids = [tuple(row) for row in embedder.processor.tokenizer(texts, verbose=False)["input_ids"]]
        new = {row: text for row, text in zip(ids, texts) if row not in embeddings}
        if new:
            embeddings |= zip(new, embedder.embed_texts(list(new.values()), on_cut=lambda count: None))
        queries = torch.stack([embeddings[row] for row in ids])
        figures[form] = retrieval_recall(queries @ images.T, wanted)[1]
    return figures


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    try:
        embedder = Embedder.load(options.checkpoint, "cpu")
    except MomeError as error:
        raise SystemExit(f"error: {error}") from None
    names, pictures = read_gallery()
    figures = query_forms(embedder, names, embedder.embed_images(pictures, progress=True))
    for form, value in figures.items():
        print(f"{form:30s} {value:8.4f} {value / figures['name']:8.1%}")
    if options.results:
        data = f"gallery of the Space, {options.checkpoint.name}"
        found = {f"R@1 of {form}": value for form, value in figures.items()}
        append_figures(options.results, "mome.experiments.query_forms", data, found, "query forms, ", arguments)
    return figures


if __name__ == "__main__":
    main()
