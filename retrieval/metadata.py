"""What metadata files say of the pictures beside them: columns of numbers, words, booleans and dates.

    metadata.jsonl    an object a line; values have the types that JSON gives them
    metadata.csv      separated by commas, semicolons or tabs, whichever makes `file_name` a column
    metadata.tsv      separated by tabs

Each row has a `file_name`, relative to its file. A cell of CSV has no type, so a column gets one: whole numbers,
numbers, booleans, dates or times if all of its cells are such, else words; codes such as `007` are words. Of two rows
for one picture the last counts, and files further down come last.
"""

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers.utils import logging

from ..configuration_mome import listed, quoted
from ..errors import RetrievalError, first_line

logger = logging.get_logger(__name__)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
UNMATCHED = "rows of metadata without their picture"
REPEATED = "rows of metadata for a picture that has another"
NAMES_SHOWN = 3
NOT_COLUMNS = ("file_name", "image")
# What stands for a missing number, boolean or date; among words only the empty cell does.
MISSING = frozenset(("", "-", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None"))


class Cell(str):
    """A cell of a CSV file, whose type is not known."""


def _time(text: str) -> datetime:
    """Without its zone, in UTC; a text without a zone is left as it is."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is None else moment.astimezone(UTC)


INTEGER = r"(?a)[+-]?(0|[1-9]\d*)"
NUMBER = r"(?a)[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?"
DATE = r"(?a)\d{4}-\d\d-\d\d"
# Pattern, type, and what reads a cell, from the narrowest on.
KINDS = (
    (re.compile(INTEGER), pa.int64(), int),
    (re.compile(NUMBER), pa.float64(), float),
    (re.compile("true|false", re.IGNORECASE), pa.bool_(), lambda text: text.lower() == "true"),
    (re.compile(DATE), pa.date32(), date.fromisoformat),
    (re.compile(DATE + r"[T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?"), pa.timestamp("us"), _time),
    (re.compile(DATE + r"[T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:?\d\d)"), pa.timestamp("us", "UTC"), _time),
)


def is_number(text: str) -> bool:
    """Whether a word is written like a number; `007` is not."""
    return re.fullmatch(NUMBER, text.strip()) is not None


def typed(cells: list[str | None]) -> pa.Array:
    """Cells of a column in CSV as an array of the narrowest type that all of them have."""
    stripped = [None if cell is None or cell.strip() in MISSING else cell.strip() for cell in cells]
    present = [cell for cell in stripped if cell is not None]
    for pattern, kind, read in KINDS if present else ():
        if all(map(pattern.fullmatch, present)):
            try:
                return pa.array([None if cell is None else read(cell) for cell in stripped], kind)
            except (ValueError, OverflowError, pa.ArrowException):  # the 31st of February, or more than 64 bits
                break
    return pa.array([cell or None for cell in cells], pa.string())


class Pictures:
    """Finds the picture that a metadata row means.

    Args:
        paths: of all pictures.
    """

    def __init__(self, paths: list[str]):
        self.places = {path: place for place, path in enumerate(paths)}

    @cached_property
    def _by_other_names(self) -> dict[str, int]:
        """By the file that a link leads to, and in one form of Unicode: file systems differ in theirs."""
        real = {os.path.realpath(path): place for path, place in self.places.items()}
        return real | {unicodedata.normalize("NFC", path): place for path, place in self.places.items()}

    def find(self, folder: Path, name: str) -> int | None:
        """The number of a picture; Windows' backslashes are slashes where no file has that very name."""
        paths = [os.path.normpath(os.path.join(folder, each)) for each in (name, name.replace("\\", "/"))]
        for path in paths:
            if path in self.places:
                return self.places[path]
        for path in paths:
            for other in (unicodedata.normalize("NFC", path), os.path.realpath(path)):
                if other in self._by_other_names:
                    return self._by_other_names[other]
        return None


def read_metadata(files: list[Path], images: list[str]) -> tuple[dict[str, pa.Array], Counter[str]]:
    """What metadata files say of pictures.

    Args:
        files: metadata files.
        images: paths of pictures.

    Returns:
        Name → column, with a value or null for each picture; how many rows were left out, by reason.

    Raises:
        RetrievalError: a file that can't be read, or a column that mixes types.
    """
    pictures, rows, left_out = Pictures(images), {}, Counter()
    for file in sorted(files, key=lambda file: (len(file.parts), file)):
        lost = []
        for row in _rows_of(file):
            place = pictures.find(file.parent, row["file_name"])
            if place is None:
                lost.append(row["file_name"])
                continue
            left_out[REPEATED] += place in rows
            rows[place] = row
        left_out[UNMATCHED] += len(lost)
        if lost:
            shown = ", ".join(quoted(str(name)) for name in lost[:NAMES_SHOWN])
            more = f" and {len(lost) - NAMES_SHOWN} more" if len(lost) > NAMES_SHOWN else ""
            logger.warning(f"{file}: there is no picture {shown}{more}")
    names = dict.fromkeys(name for row in rows.values() for name in row if name not in NOT_COLUMNS)
    columns = {}
    for name in names:
        columns[name] = _column(name, [rows.get(place, {}).get(name) for place in range(len(images))])
    return columns, +left_out


def _column(name: str, values: list[Any]) -> pa.Array:
    cells = [isinstance(value, Cell) for value in values]
    others = [value for value, is_cell in zip(values, cells) if value is not None and not is_cell]
    try:
        if not others:
            return typed(values)
        if any(cells) and not all(isinstance(value, str) for value in others):
            guessed = typed([value if is_cell else None for value, is_cell in zip(values, cells)]).to_pylist()
            values = [guess if is_cell else value for guess, value, is_cell in zip(guessed, values, cells)]
        return pa.array(values)
    except pa.ArrowException as error:
        raise RetrievalError(f"metadata column {quoted(name)} mixes several types: {first_line(error)}") from None


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file; each has a `file_name`.

    Raises:
        RetrievalError: not UTF-8, not in its format, a row without a `file_name`.
    """
    text = _text_of(file)
    rows = _json_rows(text) if file.suffix == ".jsonl" else _csv_rows(text, DELIMITERS[file.suffix])
    try:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"].strip():
                raise ValueError(f"row {number} has none")
            yield {**row, "file_name": row["file_name"].strip()}
    except (ValueError, csv.Error) as error:
        raise RetrievalError(f"{file} can't be read, each row needs a file_name: {first_line(error)}") from None


def _text_of(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RetrievalError(f"{file} can't be read: {error.strerror}") from None
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as spreadsheets write "Unicode text"
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RetrievalError(f"{file} can't be read: save it as UTF-8 ({error})") from None


def _json_rows(text: str) -> Iterator[Any]:
    return (json.loads(line) for line in text.split("\n") if line.strip())


def _csv_rows(text: str, delimiters: str) -> Iterator[dict[str, Any]]:
    for delimiter in delimiters:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header, *rows = [row for row in lines if row] or [[]]
        header = [name.strip() for name in header]
        if "file_name" in header:
            break
    else:
        raise ValueError(f"the columns are {listed(header)}" if header else "the file is empty")
    if len(set(header)) < len(header):
        raise ValueError(f"column {quoted(Counter(header).most_common(1)[0][0])} occurs twice")
    for number, row in enumerate(rows, 1):
        if len(row) > len(header):
            raise ValueError(
                f"row {number} has {len(row)} cells for {len(header)} columns, quote a cell that holds a comma"
            )
        yield {name: Cell(cell) for name, cell in zip(header, row)}


__all__ = ["METADATA_FILES", "REPEATED", "UNMATCHED", "is_number", "read_metadata", "typed"]
