"""Reads image–text data: from anything that `datasets` reads to rows, and from a row to an image with its texts.

    files, folders, Hub id ─ load_rows ─ rows, images still encoded ─┬─ read_pair ── one row as a `Pair`
                                                                     └─ pairs_of ─── all rows that can be used
    parquet files ───────────────────────── load_pairs ─────────────────────────── the first so many

Training, evaluation and the experiments read by these functions alone; corpora that are searched have a reader of
their own, which takes texts without images as well, and both share what a cell holds (`texts_of`, `encoded_images`).
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..configuration_mome import did_you_mean, listed, quoted
from ..errors import DataError, first_line
from .images import decode_image

Rows = datasets.Dataset | datasets.IterableDataset
# What a file is read with, by its ending.
BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".tar": "webdataset",
}


@dataclass(frozen=True)
class Pair:
    """A row with an image and at least one text.

    Attributes:
        image: encoded, as `datasets` holds it.
        texts: those that are not blank.
        row: all of its columns.
    """

    image: Any
    texts: list[str]
    row: dict[str, Any]

    def open(self) -> Image.Image:
        """The image in its own mode, fully read."""
        return decode_image(self.image)


def read_pair(row: dict[str, Any], image_column: str, text_column: str) -> Pair:
    """A row as a pair; its image isn't decoded.

    Raises:
        ValueError: no text or no image; one line.
    """
    texts = texts_of(row[text_column])
    if not texts:
        raise ValueError("no text")
    if not row[image_column]:
        raise ValueError("no image")
    return Pair(row[image_column], texts, row)


def pairs_of(rows: Iterable[dict[str, Any]], image_column: str, text_column: str) -> Iterator[Pair]:
    """The rows with an image and a text, in their order; the others are left out."""
    for row in rows:
        try:
            yield read_pair(row, image_column, text_column)
        except ValueError:
            continue


def load_pairs(
    files: Iterable[str | Path], image_column: str, text_column: str, limit: int | None = None
) -> list[Pair]:
    """The first pairs of parquet files, in their order; nothing is copied to the cache of `datasets`.

    Raises:
        DataError: a file or column that isn't there, or no row with an image and a text.
    """
    files = [str(path) for path in files]
    options = {"data_files": {"train": files}}
    try:
        rows, _ = load_rows("parquet", "train", options, True, image_column, text_column)
    except DataError as error:
        raise DataError(f"{listed(files, 3)}: {error}") from None
    pairs = list(itertools.islice(pairs_of(rows, image_column, text_column), limit))
    if not pairs:
        raise DataError(f"no image with a text in {listed(files, 3)}")
    return pairs


def texts_of(value: Any) -> list[str]:
    """The texts of a cell, one or a list of them, that are not blank."""
    values = [value] if isinstance(value, str) else [] if value is None else value
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def load_rows(
    dataset: str,
    split: str,
    options: dict[str, Any] | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    text_column: str = "text",
    further_columns: tuple[str | None, ...] = (),
) -> tuple[Rows, str]:
    """A split whose images are still encoded, and the name of its image column.

    Args:
        dataset: a file, a folder, or the Hub id or builder of a data set.
        split: of the data set.
        options: of `datasets.load_dataset`.
        streaming: read a stream, without a copy of the data on the disk.
        image_column: default: the first of type Image.
        text_column: a text, or a list of texts.
        further_columns: have to be there as well.

    Raises:
        DataError: no such data set, split or column; a column without images; no rows.
    """
    rows = with_columns(_read(dataset, split, dict(options or {}), streaming))
    columns = rows.features
    if image_column is None:
        images = [name for name, feature in columns.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise DataError(f"{quoted(dataset)} has no column of type Image among {listed(columns)}: set image_column")
        image_column = images[0]
    for name in (image_column, text_column, *further_columns):
        if name is not None and name not in columns:
            hint = did_you_mean(name, columns, f"it has {listed(columns)}")
            raise DataError(f"{quoted(dataset)} (split {quoted(split)}) has no column {quoted(name)}: {hint}")
    if isinstance(rows, datasets.Dataset) and not len(rows):
        raise DataError(f"{quoted(dataset)} has no rows in split {quoted(split)}")
    return encoded_images(rows, image_column, quoted(dataset)), image_column


def with_columns(rows: Rows) -> Rows:
    """The rows with their columns known: a stream tells them only with its first row."""
    return rows._resolve_features() if rows.features is None else rows


def encoded_images(rows: Rows, column: str, where: str) -> Rows:
    """The rows with the images of a column left as they are stored.

    Args:
        where: what an error calls the data.

    Raises:
        DataError: the column holds no images.
    """
    try:
        return rows.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError, datasets.table.CastError) as error:
        raise DataError(f"column {quoted(column)} of {where} holds no images: {first_line(error)}") from None


def _read(dataset: str, split: str, options: dict[str, Any], streaming: bool) -> Rows:
    path = Path(dataset)
    try:
        if os.path.isdir(path) and any(
            os.path.exists(path / name) for name in ("dataset_info.json", "dataset_dict.json")
        ):
            saved = datasets.load_from_disk(dataset)
            rows = saved if isinstance(saved, datasets.Dataset) else _split_of(saved, split, dataset)
            return rows.to_iterable_dataset() if streaming else rows
        if path.suffix in BUILDERS and not os.path.isdir(path):
            options = {"data_files": {split: dataset}} | options
            dataset = BUILDERS[path.suffix]
        return datasets.load_dataset(dataset, split=split, streaming=streaming, **options)
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(f"data set {quoted(dataset)} is not there: {first_line(error)}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"data set {quoted(dataset)}, split {quoted(split)}: {first_line(error)}") from None
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(f"data set {quoted(dataset)} can't be read: {first_line(error.__cause__ or error)}") from None


def _split_of(saved: datasets.DatasetDict, split: str, dataset: str) -> datasets.Dataset:
    if split not in saved:
        raise DataError(f"{quoted(dataset)} has no split {quoted(split)}: it has {listed(saved)}")
    return saved[split]


__all__ = [
    "BUILDERS",
    "Pair",
    "Rows",
    "encoded_images",
    "load_pairs",
    "load_rows",
    "pairs_of",
    "read_pair",
    "texts_of",
    "with_columns",
]
