"""Held-out images with what people said of them, from parquet files: what the evaluations of this folder run over."""

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from ..processing_mome import load_rgb_image

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """An image, as bytes of a file, and what people said of it."""

    image: bytes
    name: str
    references: list[str]

    def open(self) -> Image.Image:
        return load_rgb_image(Image.open(io.BytesIO(self.image)), self.name)


def load_pairs(files: Sequence[Path], image_column: str, text_column: str, limit: int | None = None) -> list[Pair]:
    """Reads pairs from parquet files, in their order.

    Args:
        image_column: bytes, or a struct with `bytes`, as `datasets` writes images.
        text_column: a text, or a list of texts, all of them references.
        limit: take the first so many.

    Raises:
        ValueError: a column is missing, or nothing is left; with the names that there are.
    """
    pairs: list[Pair] = []
    for path in files:
        table = pq.ParquetFile(path)
        for column in (image_column, text_column):
            if column not in table.schema_arrow.names:
                raise ValueError(f"{path} has no column {column!r}: it has {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(batch_size=256, columns=[image_column, text_column]):
            for row in batch.to_pylist():
                image, texts = row[image_column], row[text_column]
                texts = [texts] if isinstance(texts, str) else [text for text in texts or [] if text and text.strip()]
                if texts and image:
                    image = image["bytes"] if isinstance(image, dict) else image
                    pairs.append(Pair(image, f"{path.name}, pair {len(pairs)}", texts))
                if len(pairs) == limit:
                    return pairs
    if not pairs:
        raise ValueError(f"no image with a text in {', '.join(str(path) for path in files)}")
    return pairs


def batches_of(items: Sequence[T], size: int, what: str) -> Iterator[Sequence[T]]:
    """`size` items at a time, the last time what is left, under a progress bar called `what`."""
    for start in tqdm(range(0, len(items), size), desc=what, unit="batch"):
        yield items[start : start + size]


def add_pair_arguments(parser: argparse.ArgumentParser):
    """Arguments that say which pairs; `pairs_of` reads them."""
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="PARQUET")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--text-column", default="texts", help="a text or a list of texts (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=1000, help="take the first so many (default: %(default)s)")


def pairs_of(options: argparse.Namespace) -> list[Pair]:
    """See `load_pairs`."""
    return load_pairs(options.data, options.image_column, options.text_column, options.limit)


def described(options: argparse.Namespace, pairs: Sequence[Pair]) -> str:
    """For the results file: which files, how many pairs."""
    return f"{' '.join(path.name for path in options.data)}, {len(pairs)} images"
