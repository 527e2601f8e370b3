"""Captions and searches of held-out icons, good and bad, to see what the figures mean.

python -m mome.experiments.examples --checkpoint DIR --data DIR [--captions 50] [--searches 20] > examples.md

Fifty random images of the test half with their greedy captions, and twenty random names with the five nearest of 1,000
images. Nothing is picked by hand: the order is that of `mome.experiments.icons`.
"""

import argparse
from collections.abc import Sequence

import torch

from ..embedder import Embedder
from ..evaluation.evaluator import one_each
from .arguments import add_icons_arguments
from .icons import evaluation_of

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


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_icons_arguments(parser)
    parser.add_argument("--captions", type=int, default=50)
    parser.add_argument("--searches", type=int, default=20)
    options = parser.parse_args(arguments)
    embedder = Embedder.load(options.checkpoint, "cpu", captions=True)
    examples = evaluation_of(options.data, "unseen concepts").examples()
    chosen = examples[: options.captions]
    images = [each["image"] for each in chosen]
    captions = embedder.caption_images(images)
    fit = embedder.embed_images(images) * embedder.embed_texts(captions, allow_blank=True)
    first = captions_table([each["text"] for each in chosen], captions, fit.sum(dim=1).tolist())
    pool = one_each(examples)[:POOL]
    queries, names = range(min(options.searches, len(pool))), [each["text"] for each in pool]
    pictures = embedder.embed_images([each["image"] for each in pool])
    similarity = embedder.embed_texts([names[each] for each in queries]) @ pictures.T
    second = searches_table(queries, names, similarity)
    text = f"## {len(chosen)} captions\n\n{first}\n\n## {len(queries)} searches among {len(pool)} pictures\n\n{second}"
    print(text)
    return text


if __name__ == "__main__":
    main()
