"""Captions and searches of icons of unseen sets, good and bad, to see what the figures mean.

python -m mome.experiments.examples --checkpoint DIR --data DIR [--on DATA ...] [--captions 25] [--searches 10]

Of each set, random images with their greedy captions, and random names with the five nearest of up to 1,000 images.
Nothing is picked by hand: the order is that of `mome.experiments.icons`.
"""

import argparse
from collections.abc import Sequence

import torch

from ..embedder import Embedder
from ..evaluation.evaluator import one_each
from .arguments import add_icons_arguments
from .icons import DATA, evaluation_of

POOL, SHOWN = 1000, 5


def captions_table(names: Sequence[str], captions: Sequence[str], cosines: Sequence[float]) -> str:
    """Markdown: the name of an image, its caption, and the cosine of caption and image."""
    lines = ["| name | caption | cosine of caption and picture |", "|---|---|---|"]
    lines += [f"| {name} | {said} | {cosine:.2f} |" for name, said, cosine in zip(names, captions, cosines)]
    return "\n".join(lines)


def searches_table(queries: Sequence[int], names: Sequence[str], similarity: torch.Tensor) -> str:
    """Markdown: a query, the names of the nearest images, and the rank of the wanted one.

    Args:
        queries: indices of the images that are searched for by their names.
        names: of all images.
        similarity: (queries, images).
    """
    lines = ["| searched | found, nearest first | rank of its picture |", "|---|---|---|"]
    for row, wanted in zip(similarity, queries):
        order = row.argsort(descending=True).tolist()
        found = ", ".join(f"**{names[each]}**" if each == wanted else names[each] for each in order[:SHOWN])
        lines.append(f"| {names[wanted]} | {found} | {order.index(wanted) + 1} |")
    return "\n".join(lines)


def sections(embedder: Embedder, data: str, examples: Sequence[dict], captions: int, searches: int) -> str:
    """Markdown: captions of the first images, and searches by the first names of a pool of 1,000.

    Args:
        data: what the headings call it.
        examples: with `image` and `text`.
        captions, searches: how many.
    """
    pool = one_each(examples)[:POOL]
    names, images = [each["text"] for each in pool], [each["image"] for each in pool]
    embeds, count = embedder.embed_images(images), min(captions, len(pool))
    said = embedder.caption_images(images[:count])
    fit = (embeds[:count] * embedder.embed_texts(said, allow_blank=True)).sum(dim=1).tolist()
    queries = range(min(searches, len(pool)))
    similarity = embedder.embed_texts([names[each] for each in queries]) @ embeds.T
    shown = captions_table(names, said, fit)
    found = searches_table(queries, names, similarity)
    heading = f"## {data}: {len(queries)} searches among {len(pool)} pictures"
    return f"## {data}: {count} captions\n\n{shown}\n\n{heading}\n\n{found}"


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_icons_arguments(parser)
    kinds = {name.split()[-1]: name for name in DATA}
    parser.add_argument("--on", nargs="+", choices=kinds, default=["healthicons", "freehand"], metavar="DATA")
    parser.add_argument("--captions", type=int, default=25)
    parser.add_argument("--searches", type=int, default=10)
    options = parser.parse_args(arguments)
    embedder = Embedder.load(options.checkpoint, "cpu", captions=True)
    parts = []
    for kind in options.on:
        examples = evaluation_of(options.data, kinds[kind]).examples()
        parts.append(sections(embedder, kind, examples, options.captions, options.searches))
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
