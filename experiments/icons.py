"""What a model for icons is worth, on pictures that no training saw; every figure of the card and of the README.

python -m mome.experiments.icons --checkpoint DIR --data DIR [--results FILE] [--only PART ...]

- `retrieval`: text to image and image to text among 1,000 names, zero-shot among 100, greedy captions: unseen concepts
  (the test half of the held-out names), unseen sets (`healthicons`, `streamline-freehand-color`), and pictures that
  training had, for comparison; `--template "an icon of a {}"` puts the names into a sentence;
- `words`: find a picture by a word that is not in its name. Name match, BM25 over names and tags, and MiniLM over
  names read what people wrote; MoME sees pixels only;
- `speed`: embeddings and captions per second, from decoded pictures on, and the size of the weights.

What is chosen by figures is chosen by those of the other half, `--half validation`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..embedder import Embedder
from ..evaluation.evaluator import Evaluation, one_each
from ..evaluation.metrics import retrieval_recall, words_of
from ..evaluation.results import append_figures
from ..icons import text_embeddings as teacher
from .arguments import add_icons_arguments, add_results_argument

PARTS = ("retrieval", "words", "speed")
DATA = {
    "unseen concepts": "{half}-*.parquet",
    "unseen set healthicons": "healthicons-*.parquet",
    "unseen set freehand": "freehand-*.parquet",
    "seen pictures": "train-*.parquet",
}
SEEN_SAMPLES = 3000  # enough for 1,000 distinct names


def evaluation_of(
    folder: Path, name: str, samples: int | None = None, half: str = "test", template: str = "{}"
) -> Evaluation:
    """The evaluation of one of `DATA`: pictures black on white or in their own colours, no randomness."""
    files = folder / DATA[name].format(half=half)
    return Evaluation(
        dataset="parquet",
        dataset_options={"data_files": {"validation": str(files)}},
        text_column="texts",
        max_samples=samples,
        captions=1000,
        template=template,
        augmentations=[{"name": "mome.icons.compose:compose_icons", "plain": True}],
    )


def retrieval(embedder: Embedder, folder: Path, half: str = "test", template: str = "{}") -> dict[str, float]:
    """All figures of all data; by the validation half no figures of the unseen sets, by which nothing is chosen."""
    figures = {}
    for name in DATA:
        if half == "validation" and name.startswith("unseen set"):
            continue
        samples = SEEN_SAMPLES if name == "seen pictures" else None
        found = evaluation_of(folder, name, samples, half, template).run(embedder)
        figures |= {f"{name}: {metric}": value for metric, value in found.items()}
    return figures


# ------------------------------------------------------------------------------------------ by another word


def other_words(name: str, texts: Sequence[str]) -> list[str]:
    """Texts that share no word with the name, in any of its forms that one is the beginning of."""
    own = words_of(name)

    def related(word: str) -> bool:
        return any(word.startswith(each) or each.startswith(word) for each in own)

    return [text for text in texts if words_of(text) and not any(map(related, words_of(text)))]


def words(embedder: Embedder, folder: Path, half: str = "test", pool: int = 1000) -> dict[str, float]:
    """Recall of searching one picture for each of `pool` names by words that are not in the name."""
    examples = one_each(evaluation_of(folder, "unseen concepts", half=half).examples())[:pool]
    names, texts = [each["text"] for each in examples], [each["references"] for each in examples]
    queries = list(dict.fromkeys(word for name, own in zip(names, texts) for word in other_words(name, own)))
    # An icon that has the query in its name is no test of finding by another word, nor a wrong hit.
    wanted = torch.tensor([[query in other_words(*each) for each in zip(names, texts)] for query in queries])
    named = torch.tensor(
        [[query in own and not hit for own, hit in zip(texts, row)] for query, row in zip(queries, wanted.tolist())]
    )
    images = [each["image"] for each in examples]
    scores = {
        "MoME over pixels": embedder.embed_texts(queries) @ embedder.embed_images(images).T,
        "name match": name_match(queries, names),
        "BM25 over names and tags, the query's tag taken out": bm25(queries, texts, wanted, leave_out=True),
        "BM25 over names and all tags": bm25(queries, texts, wanted, leave_out=False),
        "MiniLM over names": minilm(queries, names),
    }
    figures: dict[str, float] = {"queries": len(queries), "pictures": len(names)}
    for name, similarity in scores.items():
        recall = retrieval_recall(similarity.float().masked_fill(named, -torch.inf), wanted)
        figures |= {f"{name}: R@{k}": value for k, value in recall.items()}
    return figures


def name_match(queries: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """(queries, names): share of the query's words that the name has."""
    own = [set(words_of(name)) for name in names]
    rows = [[sum(word in each for word in asked) / len(asked) for each in own] for asked in map(words_of, queries)]
    return torch.tensor(rows)


def bm25(
    queries: Sequence[str], texts: Sequence[Sequence[str]], wanted: torch.Tensor, leave_out: bool
) -> torch.Tensor:
    """(queries, documents) of BM25 (Robertson and Zaragoza, 2009); a document is all texts of a picture.

    Args:
        leave_out: take the query itself out of the documents that are wanted, or BM25 has been told the answer.
    """
    from rank_bm25 import BM25Okapi

    documents = [[word for text in own for word in words_of(text)] for own in texts]
    whole, rows = BM25Okapi(documents), []
    for query, hits in zip(tqdm(queries, desc="BM25", leave=False), wanted):
        index = whole
        if leave_out:
            without = list(documents)
            for place in hits.nonzero().flatten().tolist():
                left = [text for text in texts[place] if text != query]
                without[place] = [word for text in left for word in words_of(text)]
            index = BM25Okapi(without)
        rows.append(torch.tensor(index.get_scores(words_of(query))))
    return torch.stack(rows)


def minilm(queries: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """(queries, names): cosines of all-MiniLM-L6-v2."""
    folder = teacher.teacher_folder()
    return teacher.embed(list(queries), folder) @ teacher.embed(list(names), folder).T


# ----------------------------------------------------------------------------------------------------- speed


def per_second(work: Callable[[], object], items: int, seconds: float = 5.0) -> float:
    """Items per second of repeated work, after one round that isn't counted."""
    work()
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        rounds += 1
    return items * rounds / (time.perf_counter() - start)


def speed(embedder: Embedder, folder: Path, checkpoint: Path) -> dict[str, float]:
    """Pictures and names to embeddings and pictures to captions, at batch 1 and 32."""
    examples = evaluation_of(folder, "unseen concepts", 64).examples()[:32]
    images, names = [each["image"] for each in examples], [each["text"] for each in examples]
    figures = {}
    for batch in (1, 32):
        few, said = images[:batch], names[:batch]
        jobs = {
            "image embeddings": lambda few=few: embedder.embed_images(few),
            "text embeddings": lambda said=said: embedder.embed_texts(said),
            "greedy captions": lambda few=few: embedder.caption_images(few),
        }
        for job, work in jobs.items():
            figures[f"{job} per second at batch {batch}"] = per_second(work, batch)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return figures | {"weights in MB": size / 1e6, "parameters in millions": embedder.model.num_parameters() / 1e6}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_icons_arguments(parser)
    add_results_argument(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--half", choices=("test", "validation"), default="test", help="of the held-out concepts")
    parser.add_argument("--template", default="{}", help="what names are put into to be found by (default: {})")
    options = parser.parse_args(arguments)
    if "{}" not in options.template:
        parser.error(f"--template {options.template!r} has no {{}} where the name goes")
    embedder = Embedder.load(options.checkpoint, "cpu", captions=True)
    figures: dict[str, float] = {}
    if "retrieval" in options.only:
        figures |= retrieval(embedder, options.data, options.half, options.template)
    if "words" in options.only:
        found = words(embedder, options.data, options.half)
        figures |= {f"by another word, {key}": value for key, value in found.items()}
    if "speed" in options.only:
        figures |= speed(embedder, options.data, options.checkpoint)
    for name, value in figures.items():
        print(f"{name:75s} {value:10.4g}")
    if options.results:
        data = f"mome-icons {options.half}, {options.checkpoint.name}"
        append_figures(options.results, "mome.experiments.icons", data, figures, "icons, ", arguments)
    return figures


if __name__ == "__main__":
    main()
