"""Rows of image–text data sets, from anything that `datasets` reads, with images still encoded."""

from pathlib import Path
from typing import Any

import datasets

from ..configuration_mome import did_you_mean
from ..errors import DataError


def load_rows(
    dataset: str,
    split: str,
    options: dict[str, Any] | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    text_column: str = "text",
    further_columns: tuple[str | None, ...] = (),
) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """A split whose images are still encoded, and the name of its image column.

    Raises:
        DataError: no such data set, split or column; a column without images; no rows.
    """
    rows = _read(dataset, split, dict(options or {}), streaming)
    columns = rows.features
    if columns is None:  # a stream tells its columns only with its first row
        rows = rows._resolve_features()
        columns = rows.features
    if image_column is None:
        images = [name for name, feature in columns.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise DataError(f"{dataset!r} has no column of type Image among {', '.join(columns)}: set image_column")
        image_column = images[0]
    for name in (image_column, text_column, *further_columns):
        if name is not None and name not in columns:
            hint = did_you_mean(name, columns, f"it has {', '.join(columns)}")
            raise DataError(f"{dataset!r} (split {split!r}) has no column {name!r}: {hint}")
    if isinstance(rows, datasets.Dataset) and not len(rows):
        raise DataError(f"{dataset!r} has no rows in split {split!r}")
    try:
        return rows.cast_column(image_column, datasets.Image(decode=False)), image_column
    except (TypeError, ValueError, NotImplementedError, datasets.table.CastError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"column {image_column!r} of {dataset!r} holds no images: {reason}") from None


def _read(dataset: str, split: str, options: dict[str, Any], streaming: bool):
    path = Path(dataset)
    try:
        if path.is_dir() and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(dataset)
            rows = saved if isinstance(saved, datasets.Dataset) else _split_of(saved, split, dataset)
            return rows.to_iterable_dataset() if streaming else rows
        kinds = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json", ".arrow": "arrow"}
        if path.suffix in kinds and not path.is_dir():
            options = {"data_files": {split: dataset}} | options
            dataset = kinds[path.suffix]
        return datasets.load_dataset(dataset, split=split, streaming=streaming, **options)
    except FileNotFoundError as error:
        raise DataError(f"data set {dataset!r} is not there: {str(error).splitlines()[0]}") from None
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"data set {dataset!r} is not there: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise DataError(f"data set {dataset!r}, split {split!r}: {str(error).splitlines()[0]}") from None
    except datasets.exceptions.DatasetGenerationError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"data set {dataset!r} can't be read: {reason}") from None


def _split_of(saved, split: str, dataset: str):
    if split not in saved:
        raise DataError(f"{dataset!r} has no split {split!r}: it has {', '.join(saved)}")
    return saved[split]


def texts_of(value: Any) -> list[str]:
    """The texts of a row that are not blank."""
    values = [value] if isinstance(value, str) else [] if value is None else value
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]
