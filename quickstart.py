"""The quickstart: captions, labels and searches pictures with the weights that come with the project.

    make quickstart                   the pictures of samples/, of two icon sets of which training saw no picture
    make quickstart IMAGES=folder     your own
    python -m mome.quickstart --help  other sentences, labels, weights

Prints the results and writes them to a contact sheet. The weights know icons, emoji, pictograms and cliparts, not
photographs.

    pictures ─┬─ image-captioning ─────────────────── caption, cosine ─────┐
              ├─ open-vocabulary-image-classification ─ label, probability ┼─ printed, contact sheet
              └─ image embeddings · sentence embeddings ─ hits, cosine ────┘
"""

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import pipeline

from .configuration_mome import quoted
from .data.images import image_suffixes
from .data.sheet import GREY, Cell, Grid, Line, Row, contact_sheet
from .embedder import Embedder
from .modeling_mome import MomeForConditionalGeneration
from .processing_mome import MomeProcessor, load_rgb_image

ROOT = Path(__file__).resolve().parent
CHECKPOINT = ROOT / "checkpoints" / "mome-icons"
SAMPLES = ROOT / "samples"
LABELS = ROOT / "icons" / "nouns.txt"
SENTENCES = ("a part of the body", "a building", "listening to music", "something to write with", "medicine")
HITS = 5


@dataclass
class Result:
    """What the model says about one picture.

    Attributes:
        name: the file's name, or what the picture is known to show.
        image: RGB.
        caption, cosine: greedy caption, and how well it fits the picture, from -1 to 1.
        labels: the best labels with their probabilities.
    """

    name: str
    image: Image.Image
    caption: str
    cosine: float
    labels: list[tuple[str, float]]


def read_images(folder: Path) -> list[tuple[str, Image.Image]]:
    """Name and RGB picture of every image file in a folder; unreadable ones are named and skipped.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {quoted(folder)}: name one with images")
    images = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in image_suffixes():
            continue
        try:
            images.append((path.name, load_rgb_image(str(path))))
        except ValueError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not images:
        raise FileNotFoundError(f"no image in {quoted(folder)}: PNG, JPEG, WebP, GIF and the like are read")
    return images


def known_names(folder: Path) -> dict[str, str]:
    """File name → what the picture shows, as far as the folder's `metadata.jsonl` says."""
    path = folder / "metadata.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {record["file_name"]: record["text"] for record in records}


def label_set(names: Iterable[str] = ()) -> list[str]:
    """The nouns of `LABELS`, those that often occur in names of icons, and further names."""
    return list(dict.fromkeys([*LABELS.read_text().split(), *names]))


def search(
    embedder: Embedder, images: list[Image.Image], sentences: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best pictures for each sentence: cosines and indices, (sentences, hits) each."""
    similarity = embedder.embed_texts(sentences) @ embedder.embed_images(images).T
    return tuple(similarity.topk(min(HITS, len(images)), dim=1))


def draw(results: list[Result], sentences: Sequence[str], hits: torch.Tensor) -> Image.Image:
    """All pictures with caption and labels, below them the hits of every sentence."""
    cells = []
    for result in results:
        lines = [Line(result.caption or "(no words)", size=14), Line(f"cosine {result.cosine:.2f}", GREY, size=12)]
        labels = [Line(f"{label} {score:.0%}", "#1d5fa8", size=12) for label, score in result.labels[:2]]
        cells.append(Cell(result.image, lines + labels))
    rows = [
        Row([Line(sentence, size=14, most=2)], [results[index].image for index in own])
        for sentence, own in zip(sentences, hits.tolist())
    ]
    return contact_sheet(
        [
            Grid(cells, HITS + 1, side=110, width=190, frame=True),
            Line("Found for each sentence, best first", GREY),
            *rows,
        ]
    )


def run(
    folder: Path = SAMPLES,
    checkpoint: Path = CHECKPOINT,
    sentences: Sequence[str] = SENTENCES,
    labels: Sequence[str] | None = None,
    sheet: Path = Path("quickstart.png"),
) -> list[Result]:
    """Captions, labels and searches the pictures of a folder, prints it and writes the sheet.

    Raises:
        FileNotFoundError: no pictures or no weights there.
    """
    start = time.perf_counter()
    named = read_images(folder)
    if not os.path.exists(checkpoint / "config.json"):
        raise FileNotFoundError(f"no weights in {quoted(checkpoint)}: name a checkpoint folder")
    processor = MomeProcessor.from_pretrained(checkpoint)
    model = MomeForConditionalGeneration.from_pretrained(checkpoint).eval()
    known, images = known_names(folder), [image for _, image in named]
    names = [known.get(file, file) for file, _ in named]
    labels = label_set(known.values()) if labels is None else list(labels)
    print(f"{len(images)} pictures, {model.num_parameters():,} parameters, {len(labels)} labels to choose from\n")
    caption = pipeline("image-captioning", model=model, processor=processor)
    classify = pipeline("open-vocabulary-image-classification", model=model, processor=processor)
    captions = caption(images, batch_size=16)
    chosen = classify(images, candidate_labels=labels, batch_size=16, top_k=3)
    results = [
        Result(name, image, best[0]["generated_text"], best[0]["score"], [(e["label"], e["score"]) for e in own])
        for name, image, best, own in zip(names, images, captions, chosen)
    ]
    scores, hits = search(Embedder(model, processor), images, sentences)
    report(results, sentences, scores, hits)
    draw(results, sentences, hits).save(sheet)
    print(f"\ncontact sheet: {sheet} ({time.perf_counter() - start:.0f} s)")
    return results


def report(results: list[Result], sentences: Sequence[str], scores: torch.Tensor, hits: torch.Tensor):
    print(f"{'picture':24s}{'caption':28s}{'cosine':>7s}   labels")
    for each in results:
        labels = ", ".join(f"{label} {score:.0%}" for label, score in each.labels)
        name, caption = (textwrap.shorten(text, 26, placeholder="…") for text in (each.name, each.caption or "–"))
        print(f"{name:24s}{caption:28s}{each.cosine:7.2f}   {labels}")
    print()
    for sentence, own_scores, own in zip(sentences, scores.tolist(), hits.tolist()):
        print(f"{sentence!r}: " + ", ".join(f"{results[i].name} {s:.2f}" for i, s in zip(own, own_scores)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mome.quickstart", description="Caption, label and search pictures.")
    parser.add_argument("images", nargs="?", type=Path, default=SAMPLES, help="folder of images (default: samples)")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder of the weights")
    parser.add_argument("--search", nargs="+", default=SENTENCES, metavar="SENTENCE", help="what to look for")
    parser.add_argument("--labels", nargs="+", help="labels to choose from (default: common nouns)")
    parser.add_argument("--sheet", type=Path, default=Path("quickstart.png"), help="contact sheet to write")
    options = parser.parse_args(arguments)
    try:
        run(options.images, options.checkpoint, options.search, options.labels, options.sheet)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
