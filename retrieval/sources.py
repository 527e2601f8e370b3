"""Corpora: whatever holds images and texts, as a sequence of `SourceRow` that can be entered at any place.

    folder of images ─────── listed, with metadata.jsonl or metadata.csv if there ─┐
    parquet, json lines, csv, text lines, save_to_disk, Hub id ─ datasets ─────────┼─ Source.rows(start)
    WebDataset shards ────── datasets, as a stream ────────────────────────────────┘

Nothing is decoded here. Each row has an id that is the same in every run, and a URI under which `open_image` finds it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from ..data.pairs import encoded_images, texts_of, with_columns
from ..errors import DataError, RetrievalError, first_line, unknown_name
from .reading import READING_ERRORS, Rows, digest_of, read_corpus
from .table import RESERVED_COLUMNS

logger = logging.get_logger(__name__)

TEXT_COLUMNS = ("text", "texts", "caption", "captions", "txt")
ROWS_AT_ONCE = 256


@dataclass
class SourceRow:
    """One row of a corpus.

    Attributes:
        id: unique, the same in every run.
        uri: where the image, or else the row, is.
        image: encoded, as `datasets` holds it (`{"bytes": ..., "path": ...}`); `None` if there is none.
        texts: those that are not blank.
        metadata: columns that go into the table as they are.
    """

    id: str
    uri: str | None
    image: Any = None
    texts: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Source:
    """A corpus that is open.

    Attributes:
        name: path, pattern or Hub id.
        data: its rows, images still encoded.
        split: of a data set.
        metadata: names and types of the metadata columns.
        image_column, text_column, id_column: where they are; `None` if there are none.
        digest: changes when the corpus does.
    """

    name: str
    data: Rows
    split: str
    metadata: datasets.Features
    image_column: str | None
    text_column: str | None
    id_column: str | None
    digest: str

    @property
    def count(self) -> int | None:
        """The number of rows; `None` of a stream."""
        return len(self.data) if isinstance(self.data, datasets.Dataset) else None

    @cached_property
    def columns(self) -> datasets.Features:
        """Names and types of the columns; `datasets` copies them at every look."""
        return self.data.features

    @cached_property
    def is_folder(self) -> bool:
        return self.name != "" and Path(self.name).is_dir()

    @property
    def several_texts(self) -> bool:
        """Whether a row may have more than one text."""
        kind = self.data.features.get(self.text_column) if self.text_column else None
        return kind is not None and not isinstance(kind, datasets.Value)

    def rows(self, start: int = 0) -> Iterator[SourceRow]:
        """The rows from number `start` on.

        Raises:
            RetrievalError: the corpus is damaged at this place.
        """
        number = start
        try:
            for number, columns in enumerate(self._columns(start), start):
                yield self._row(number, columns)
        except READING_ERRORS as error:
            raise RetrievalError(f"{self.name} can't be read after row {number}: {first_line(error)}") from None

    def _columns(self, start: int) -> Iterator[dict[str, Any]]:
        if not isinstance(self.data, datasets.Dataset):
            yield from self.data.skip(start) if start else self.data
            return
        for first in range(start, len(self.data), ROWS_AT_ONCE):
            values = self.data[first : first + ROWS_AT_ONCE]
            for each in zip(*values.values()):
                yield dict(zip(values, each))

    def _row(self, number: int, columns: dict[str, Any]) -> SourceRow:
        image = columns.get(self.image_column) if self.image_column else None
        texts = columns.get(self.text_column) if self.text_column else None
        id, uri = self._place(number, columns, image)
        if self.id_column:
            id = columns[self.id_column]
            if id is None or id == "":
                raise RetrievalError(f"{self.name}: row {number} has no {self.id_column!r} to be its id")
        metadata = {name: self._plain(name, columns.get(name)) for name in self.metadata}
        return SourceRow(str(id), uri, image, texts_of(texts), metadata)

    def _place(self, number: int, columns: dict[str, Any], image: Any) -> tuple[str, str | None]:
        """Id and URI: a member of a tar file, a file, or a row of a data set."""
        if "__key__" in columns and columns.get("__url__"):
            url, key = columns["__url__"], columns["__key__"]
            return f"{Path(url).name}/{key}", f"{url}#{key}.{self.image_column or self.text_column}"
        path = image.get("path") if isinstance(image, dict) else None
        if path and image.get("bytes") is None:
            inside = os.path.relpath(path, self.name) if self.is_folder else ".."
            return path if inside.startswith("..") else Path(inside).as_posix(), path
        return f"{self.split}/{number}", f"{self.name}#{self.split}:{number}" if self.name else None

    def _plain(self, name: str, value: Any) -> Any:
        kind = self.columns[name]
        return kind.int2str(value) if isinstance(kind, datasets.ClassLabel) and value is not None else value

    def check_ids(self):
        """Refuses ids that are there twice, where all of them can be seen beforehand."""
        if self.id_column and isinstance(self.data, datasets.Dataset):
            seen = set()
            for id in self.data[self.id_column]:
                if str(id) in seen:
                    raise RetrievalError(f"{self.name}: {id!r} is twice in id_column={self.id_column!r}")
                seen.add(str(id))


# ---------------------------------------------------------------------------------------------------- opening


def open_source(
    source: str | Path | Rows,
    split: str = "train",
    image_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    metadata_columns: Sequence[str] | None = None,
    streaming: bool = False,
) -> Source:
    """Opens a corpus.

    Args:
        source: a folder of images; a file or folder of parquet, json lines, csv or text lines; WebDataset shards (a
            `.tar` file, a pattern or a folder of them); a folder written by `save_to_disk`; the Hub id of a data set;
            or a data set that is open.
        split: of a data set.
        image_column: default: the first of type Image.
        text_column: texts or lists of texts; default: the first of `TEXT_COLUMNS` that is there.
        id_column: unique values; default: the path within a folder or tar file, or the number of the row.
        metadata_columns: those to keep; default: all of numbers, strings, truth values and dates.
        streaming: read a data set as a stream, without a copy of it on the disk.

    Raises:
        RetrievalError: no such corpus, split or column; nothing in it.
    """
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise RetrievalError(f"source is a dict of splits, {', '.join(source)}: pass one of them")
    name, digest = "", ""
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        data = source
    else:
        name = str(Path(source).resolve()) if Path(source).exists() else str(source)
        data, digest = read_corpus(name, split, streaming)
    data = with_columns(data)
    if isinstance(data, datasets.Dataset) and not len(data):
        raise RetrievalError(f"{name or 'the data set'} has no rows in split {split!r}")
    where = repr(name) if name else "the data set"
    for column in (image_column, text_column, id_column, *(metadata_columns or ())):
        if column is not None and column not in data.features:
            raise unknown_name(column, data.features, where)
    image_column = image_column or _first(data.features, lambda _, kind: isinstance(kind, datasets.Image))
    text_column = text_column or next((name for name in TEXT_COLUMNS if _is_text(data.features.get(name))), None)
    if text_column and not _is_text(data.features[text_column]):
        raise RetrievalError(f"column {text_column!r} of {where} holds no texts: {data.features[text_column]}")
    if image_column:
        data = _encoded(data, image_column, where)
    metadata = _metadata_features(data.features, metadata_columns, {image_column, text_column, id_column})
    digest = digest_of(digest, getattr(data, "_fingerprint", "") if isinstance(data, datasets.Dataset) else "")
    return Source(name, data, split, metadata, image_column, text_column, id_column, digest)


def _first(features: datasets.Features, fits) -> str | None:
    return next((name for name, kind in features.items() if fits(name, kind)), None)


def _is_text(kind: Any) -> bool:
    kind = getattr(kind, "feature", kind)
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")


def _encoded(data: Rows, column: str, where: str) -> Rows:
    try:
        return encoded_images(data, column, where)
    except DataError as error:
        raise RetrievalError(str(error)) from None


def _metadata_features(features: datasets.Features, wanted: Sequence[str] | None, used: set) -> datasets.Features:
    """Which columns go into the table; class labels by their names."""
    found = datasets.Features()
    for name, kind in features.items():
        if (wanted is None and (name in used or name.startswith("__"))) or (wanted is not None and name not in wanted):
            continue
        label = isinstance(kind, datasets.ClassLabel)
        plain = label or (
            isinstance(kind, datasets.Value) and not kind.dtype.startswith(("null", "binary", "large_b"))
        )
        if wanted is not None and (not plain or name in RESERVED_COLUMNS):
            reason = "is a column that every table has" if name in RESERVED_COLUMNS else f"is of type {kind}"
            raise RetrievalError(f"metadata column {name!r} {reason}: leave it out or rename it")
        if plain and name in RESERVED_COLUMNS:
            logger.warning(f"column {name!r} is left out: every table has one of this name; rename it to keep it")
        elif plain:
            found[name] = datasets.Value("string") if label else kind
    return found


__all__ = ["Source", "SourceRow", "open_source"]
