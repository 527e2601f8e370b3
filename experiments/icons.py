"""Evaluates a model for icons on images held out from training; the card's and the README's figures come from here.

python -m mome.experiments.icons --checkpoint DIR --data DIR [--results FILE] [--only PART ...] [--on DATA ...]

- `retrieval`: text to image and image to text among 1,000 names, zero-shot among 100, greedy captions: unseen concepts
  (the test half of the held-out names), unseen sets (`healthicons`, `streamline-freehand-color`), and training
  images for comparison; `--template "an icon of a {}"` puts the names into a sentence;
- `words`: find a picture by a word that is not in its name. Name match, BM25 over names and tags, and MiniLM over
  names read what people wrote; MoME sees pixels only;
- `broader`, `templates`, `glosses`: find pictures by a broader word, by a sentence, by a definition;
- `padded`: find pictures with wide margins, as they are and trimmed;
- `speed`: embeddings and captions per second, from decoded pictures on, and the size of the weights.

`mome-icons` was trained on the held-out names in its last stage: what it does on unseen concepts is measured on the
weights that were saved before that (`mome-icons-research` in the results file).

Figures are printed, and written to FILE, as they are found. What is chosen by figures is chosen by those of the
other half, `--half validation`.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from ..configuration_mome import quoted
from ..embedder import Embedder
from ..errors import DataError, MomeError
from ..evaluation.evaluator import Evaluation, one_each
from ..evaluation.metrics import retrieval_recall, words_of
from ..evaluation.results import append_figures
from ..icons import text_embeddings as teacher
from ..onnx_embedder import OnnxEmbedder, load_embedder
from . import icon_measures
from .arguments import add_icons_arguments, add_results_argument
from .icon_measures import Pool

PARTS = ("retrieval", "broader", "templates", "glosses", "padded", "words", "speed")
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
    """The evaluation on one entry of `DATA`: images black on white or in their own colours, nothing random."""
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


def data_of(half: str, chosen: Sequence[str] | None = None) -> list[str]:
    """Names of the data that are measured on: with the validation half no unseen set, by which nothing is chosen.

    Args:
        half: of the held-out concepts.
        chosen: last words of the names, `healthicons`; default: all.
    """
    names = [name for name in DATA if chosen is None or name.split()[-1] in chosen]
    return [name for name in names if half != "validation" or not name.startswith("unseen set")]


def files_of(folder: Path, names: Sequence[str], half: str) -> list[Path]:
    """The parquet files of data, all of which must be there.

    Raises:
        DataError: if some are not.
    """
    files = []
    for name in names:
        pattern = DATA[name].format(half=half)
        found = sorted(folder.glob(pattern))
        if not found:
            raise DataError(f"{folder} has no {pattern}: python -m mome.icons.build --output {folder} writes it")
        files += found
    return files


def retrieval(
    embedder: Embedder, folder: Path, names: Sequence[str], half: str = "test", template: str = "{}"
) -> Iterator[dict[str, float]]:
    """All figures of each of the data of these names."""
    for name in names:
        samples = SEEN_SAMPLES if name == "seen pictures" else None
        found = evaluation_of(folder, name, samples, half, template).run(embedder)
        yield {f"{name}: {metric}": value for metric, value in found.items()}


def pools_of(embedder: Embedder, folder: Path, names: Sequence[str], half: str) -> dict[str, Pool]:
    """A pool of at most 1,000 pictures for each of the data that training did not see."""
    pools = {}
    for name in names:
        if name != "seen pictures":
            examples = one_each(evaluation_of(folder, name, half=half).examples())[:1000]
            images = [each["image"] for each in examples]
            pools[name] = Pool(examples, embedder.embed_images(images, progress=True))
    return pools


# ------------------------------------------------------------------------------------------ by another word


def other_words(name: str, texts: Sequence[str]) -> list[str]:
    """Texts that share no word with the name; words of which one begins with the other count as the same."""
    own = words_of(name)

    def related(word: str) -> bool:
        return any(word.startswith(each) or each.startswith(word) for each in own)

    return [text for text in texts if words_of(text) and not any(map(related, words_of(text)))]


def words(embedder: Embedder, folder: Path, half: str = "test", pool: int = 1000) -> dict[str, float]:
    """Recall when `pool` images are searched for by words that are not in their names."""
    examples = one_each(evaluation_of(folder, "unseen concepts", half=half).examples())[:pool]
    names, texts = [each["text"] for each in examples], [each["references"] for each in examples]
    queries = list(dict.fromkeys(word for name, own in zip(names, texts) for word in other_words(name, own)))
    # An icon with the query in its name neither tests finding by another word nor counts as a wrong hit.
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
    """(queries, names): share of the query's words that are in the name."""
    own = [set(words_of(name)) for name in names]
    rows = [[sum(word in each for word in asked) / len(asked) for each in own] for asked in map(words_of, queries)]
    return torch.tensor(rows)


def bm25(
    queries: Sequence[str], texts: Sequence[Sequence[str]], wanted: torch.Tensor, leave_out: bool
) -> torch.Tensor:
    """(queries, documents) of BM25 (Robertson and Zaragoza, 2009); a document holds all texts of an image.

    Args:
        leave_out: take the query itself out of the wanted documents; otherwise BM25 is told the answer.
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
    """Items per second over repeated rounds of `work`; the first round is a warm-up."""
    work()
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        rounds += 1
    return items * rounds / (time.perf_counter() - start)


def speed(embedder: Embedder, folder: Path, checkpoint: Path) -> dict[str, float]:
    """Image embeddings, text embeddings and captions per second at batch sizes 1 and 32."""
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
    if isinstance(embedder, OnnxEmbedder):
        return figures | {"weights in MB": embedder.file_bytes / 1e6}
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return figures | {"weights in MB": size / 1e6, "parameters in millions": embedder.model.num_parameters() / 1e6}


def run_part(
    part: str, embedder: Embedder, names: Sequence[str], options: argparse.Namespace, pools: dict[str, Pool]
) -> Iterator[dict[str, float]]:
    """The figures of one of `PARTS`, as they are found; `pools` is filled by the first part that needs them."""
    if part == "retrieval":
        yield from retrieval(embedder, options.data, names, options.half, options.template)
    elif part == "words":
        found = words(embedder, options.data, options.half)
        yield {f"by another word, {key}": value for key, value in found.items()}
    elif part == "speed":
        yield speed(embedder, options.data, options.checkpoint)
    else:
        if not pools:
            pools |= pools_of(embedder, options.data, names, options.half)
        measure = getattr(icon_measures, part)
        for name, pool in pools.items():
            yield {f"{name}: {part}, {key}": value for key, value in measure(embedder, pool).items()}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_icons_arguments(parser)
    add_results_argument(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    kinds = [name.split()[-1] for name in DATA]
    parser.add_argument("--on", nargs="+", choices=kinds, metavar="DATA", help=f"{', '.join(kinds)} (default: all)")
    parser.add_argument("--half", choices=("test", "validation"), default="test", help="of the held-out concepts")
    parser.add_argument("--template", default="{}", help="a sentence to put the names into (default: {})")
    parser.add_argument("--experts-per-token", type=int, metavar="K", help="of a routed model (default: its own)")
    parser.add_argument("--backend", help="onnx, onnx-q8 or onnx-fp16, for an export")
    options = parser.parse_args(arguments)
    if "{}" not in options.template:
        parser.error(f"--template {quoted(options.template)} has no {{}} where the name goes")
    names = data_of(options.half, options.on)
    try:
        read = {*names, "unseen concepts"} if {"words", "speed"} & set(options.only) else names
        icon_measures.check_parts(options.only, files_of(options.data, [*read], options.half))
        chosen = {} if options.experts_per_token is None else {"experts_per_token": options.experts_per_token}
        if chosen:
            embedder = Embedder.load(options.checkpoint, "cpu", captions=True, **chosen)
        else:
            embedder = load_embedder(options.checkpoint, options.backend, "cpu", captions=True)
    except MomeError as error:
        raise SystemExit(f"error: {error}") from None
    figures: dict[str, float] = {}
    pools: dict[str, Pool] = {}
    parts = [part for part in PARTS if part in options.only]
    for found in chain.from_iterable(run_part(part, embedder, names, options, pools) for part in parts):
        for name, value in found.items():
            print(f"{name:85s} {value:10.4g}", flush=True)
        if options.results:
            data = f"mome-icons {options.half}, {options.checkpoint.name}"
            data += "" if options.backend is None else f", {options.backend}"
            data += "" if not chosen else f", {options.experts_per_token} experts a token"
            append_figures(options.results, "mome.experiments.icons", data, found, "icons, ", arguments)
        figures |= found
    return figures


if __name__ == "__main__":
    main()
