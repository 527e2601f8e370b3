"""Corpora: anything that holds images and texts, as a sequence of `CorpusRow` that can be entered at any row.

    folder of images ─────── listed by folder.py, with its metadata.jsonl or metadata.csv ─┐
    parquet, json lines, csv, text lines, save_to_disk, Hub id ─ datasets ─────────────────┼─ Corpus.rows(start)
    WebDataset shards ────── datasets, as a stream ────────────────────────────────────────┘

Nothing is decoded here. Each row has an id that is the same in every run, and a URI from which `open_image` gets the
image again.
"""

import functools
import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from PIL import Image
from transformers.utils import logging

from ..configuration_mome import listed, quoted, shortened
from ..data.images import read_image
from ..data.pairs import BUILDERS, Rows, texts_of
from ..errors import RetrievalError, first_line, unknown_name
from ..processing_mome import load_rgb_image
from .folder import image_folder, list_folder
from .format import MODALITIES, RESERVED_COLUMNS, is_table

logger = logging.get_logger(__name__)

TEXT_COLUMNS = ("text", "texts", "caption", "captions", "txt")
ROWS_AT_ONCE = 256
# What reading a damaged file raises, in the libraries that read.
READING_ERRORS = (OSError, EOFError, tarfile.TarError, pa.ArrowException, datasets.exceptions.DatasetsError)


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is read: the keywords of `open_source`, `embed_corpus` and `embed_with_daft`.

    Attributes:
        split: of a data set.
        modalities: what is embedded: `("image",)`, `("text",)` or both; default: images if there are any, else texts.
            With both, each text of a row gets a row of its own in the table: `ID#0`, `ID#1` and so on.
        image_column: default: the first of type Image.
        text_column: texts or lists of texts; default: the first of `TEXT_COLUMNS` that is there.
        id_column: unique values; default: the path within a folder or tar file, or the number of the row.
        metadata_columns: those to keep; default: every column of numbers, strings, booleans or dates.
        streaming: read a data set as a stream, without a copy on the disk.
    """

    split: str = "train"
    modalities: Sequence[str] | None = None
    image_column: str | None = None
    text_column: str | None = None
    id_column: str | None = None
    metadata_columns: Sequence[str] | None = None
    streaming: bool = False


def records_of(options: dict[str, Any], what: str, *kinds: type) -> list[Any]:
    """Keywords as one record of each dataclass in `kinds`, whose fields they are.

    Raises:
        RetrievalError: a keyword that is a field of none; `what` has no such option.
    """
    owners = {each.name: kind for kind in kinds for each in fields(kind)}
    for name in options:
        if name not in owners:
            raise unknown_name(name, owners, what)
    return [kind(**{name: value for name, value in options.items() if owners[name] is kind}) for kind in kinds]


def digest_of(*parts: Any) -> str:
    """16 hexadecimal digits of anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


@dataclass
class CorpusRow:
    """One row of a corpus.

    Attributes:
        id: unique, the same in every run.
        uri: where the image is, or else the row.
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
class Corpus:
    """A corpus that is open.

    Attributes:
        name: path, pattern or Hub id; empty for a data set that was passed in.
        data: its rows, images still encoded.
        options: with the columns of images and texts that were found; `None` where there are none.
        metadata: names and types of the metadata columns.
        left_out: reason → number of files and links in a folder that are not rows.
    """

    name: str
    data: Rows
    options: CorpusOptions
    metadata: datasets.Features
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What error messages call it."""
        return shortened(self.name) or "the data set"

    @property
    def split(self) -> str:
        """The split that is read; a data set that was passed in knows its own."""
        own = None if self.name else getattr(self.data, "split", None)
        return self.options.split if own is None else str(own)

    @property
    def count(self) -> int | None:
        """The number of rows; `None` for a stream."""
        return len(self.data) if isinstance(self.data, datasets.Dataset) else None

    @cached_property
    def columns(self) -> datasets.Features:
        """Names and types of the columns; `datasets` copies them at every look."""
        return self.data.features

    @cached_property
    def is_folder(self) -> bool:
        return self.name != "" and os.path.isdir(self.name)

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """What is embedded, images before texts.

        Raises:
            RetrievalError: no such modality, or none of it in the corpus.
        """
        columns = {"image": self.options.image_column, "text": self.options.text_column}
        wanted = self.options.modalities
        if wanted is None:
            wanted = [name for name in MODALITIES if columns[name]][:1]
            if not wanted:
                raise RetrievalError(f"{self.title} has no images and no texts: set image_column or text_column")
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in wanted:
            if name not in MODALITIES:
                raise RetrievalError(f"modality {quoted(name)}: choose from {', '.join(MODALITIES)}")
            if columns[name] is None:
                raise RetrievalError(f"{self.title} has no column of {name}s: set {name}_column")
        if not wanted:
            raise RetrievalError("modalities is empty: choose 'image', 'text' or both")
        return tuple(name for name in MODALITIES if name in wanted)

    @cached_property
    def numbers_texts(self) -> bool:
        """Whether the ids of texts get a number, since a row may become several rows of the table."""
        kind = self.columns.get(self.options.text_column) if self.options.text_column else None
        several = kind is not None and not isinstance(kind, datasets.Value)
        return several or len(self.modalities) > 1

    def check(self):
        """Refuses modalities that are not there, and ids that occur twice where all of them can be seen beforehand.

        Raises:
            RetrievalError: one of these.
        """
        self.modalities  # noqa: B018
        column = self.options.id_column
        if column and isinstance(self.data, datasets.Dataset):
            seen = set()
            for id in self.data[column]:
                if str(id) in seen:
                    raise RetrievalError(f"{self.title}: {quoted(id)} occurs twice in id_column={quoted(column)}")
                seen.add(str(id))

    def empty(self) -> RetrievalError:
        """The error for a corpus without rows."""
        return RetrievalError(f"{self.title} has no rows in split {quoted(self.options.split)}")

    def rows(self, start: int = 0) -> Iterator[CorpusRow]:
        """The rows from number `start` on.

        Raises:
            RetrievalError: the corpus is damaged at this place, or a row lacks its id.
        """
        number = start
        try:
            for number, columns in enumerate(self._columns(start), start):
                yield self._row(number, columns)
        except READING_ERRORS as error:
            raise RetrievalError(f"{self.title} can't be read after row {number}: {first_line(error)}") from None

    def image(self, number: int) -> Any:
        """The encoded image of row `number`; not for a stream."""
        return self.data[number][self.options.image_column]

    def _columns(self, start: int) -> Iterator[dict[str, Any]]:
        if not isinstance(self.data, datasets.Dataset):
            yield from self.data.skip(start) if start else self.data
            return
        for first in range(start, len(self.data), ROWS_AT_ONCE):
            values = self.data[first : first + ROWS_AT_ONCE]
            for each in zip(*values.values()):
                yield dict(zip(values, each))

    def _row(self, number: int, columns: dict[str, Any]) -> CorpusRow:
        options = self.options
        image = columns.get(options.image_column) if options.image_column else None
        texts = columns.get(options.text_column) if options.text_column else None
        id, uri = self._place(number, columns, image)
        if options.id_column:
            id = columns[options.id_column]
            if id is None or id == "":
                raise RetrievalError(f"{self.title}: row {number} has no id in {quoted(options.id_column)}")
        metadata = {name: self._plain(name, columns.get(name)) for name in self.metadata}
        return CorpusRow(str(id), uri, image, texts_of(texts), metadata)

    def _place(self, number: int, columns: dict[str, Any], image: Any) -> tuple[str, str | None]:
        """Id and URI: a member of a tar file, a file, or a row of a data set."""
        if "__key__" in columns and columns.get("__url__"):
            url, key = columns["__url__"], columns["__key__"]
            return f"{Path(url).name}/{key}", f"{url}#{key}.{self.options.image_column or self.options.text_column}"
        path = image.get("path") if isinstance(image, dict) else None
        if path and image.get("bytes") is None:
            inside = os.path.relpath(path, self.name) if self.is_folder else ".."
            return path if inside.startswith("..") else Path(inside).as_posix(), path
        split = self.options.split
        return f"{split}/{number}", f"{self.name}#{split}:{number}" if self.name else None

    def _plain(self, name: str, value: Any) -> Any:
        kind = self.columns[name]
        return kind.int2str(value) if isinstance(kind, datasets.ClassLabel) and value is not None else value


# ---------------------------------------------------------------------------------------------------- opening


def open_source(source: str | Path | Rows, split: str = "train", **options: Any) -> Corpus:
    """Opens a corpus.

    Args:
        source: a folder of images; a file or folder of parquet, json lines, csv or text lines; WebDataset shards (a
            `.tar` file, a pattern or a folder of them); a folder written by `save_to_disk`; the Hub id of a data set;
            or a data set that is open.
        split: of a data set.
        options: the other fields of `CorpusOptions`.

    Raises:
        RetrievalError: no such corpus, split, column or option; nothing in it.
    """
    (checked,) = records_of({"split": split, **options}, "open_source", CorpusOptions)
    return open_corpus(source, checked)


def open_corpus(source: str | Path | Rows, options: CorpusOptions) -> Corpus:
    """As `open_source`, by its options."""
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise RetrievalError(f"source is a dict of splits, {listed(source)}: pass one of them")
    name, left_out = "", {}
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        data = source
    elif not isinstance(source, (str, os.PathLike)):
        raise RetrievalError(
            f"source={quoted(source)} is of type {type(source).__name__}: pass a folder, a file, a Hub id or a data "
            "set, such as datasets.Dataset.from_dict(...)"
        )
    else:
        name = str(Path(source).resolve()) if os.path.exists(source) else str(source)
        data, left_out = _read(name, options.split, options.streaming)
    if data.features is None:  # a stream tells its columns only with its first row
        data = data._resolve_features()
    where = quoted(name) if name else "the data set"
    options = _with_columns(options, data.features, where)
    metadata = _metadata_features(data.features, options)
    if options.image_column:
        data = _encoded(data, options.image_column, where)
    corpus = Corpus(name, data, options, metadata, left_out)
    if corpus.count == 0:
        raise corpus.empty()
    return corpus


def _with_columns(options: CorpusOptions, features: datasets.Features, where: str) -> CorpusOptions:
    """The options with the columns of images and texts that there are.

    Raises:
        RetrievalError: a column that is not there, or one of texts that holds none.
    """
    named = (options.image_column, options.text_column, options.id_column, *(options.metadata_columns or ()))
    for column in named:
        if column is not None and column not in features:
            raise unknown_name(column, features, where)
    images = (name for name, kind in features.items() if isinstance(kind, datasets.Image))
    texts = (name for name in TEXT_COLUMNS if _is_text(features.get(name)))
    found = replace(
        options,
        image_column=options.image_column or next(images, None),
        text_column=options.text_column or next(texts, None),
    )
    if found.text_column and not _is_text(features[found.text_column]):
        raise RetrievalError(
            f"column {quoted(found.text_column)} of {where} holds no texts: {shortened(features[found.text_column])}"
        )
    return found


def _is_text(kind: Any) -> bool:
    kind = getattr(kind, "feature", kind)
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")


def _encoded(data: Rows, column: str, where: str) -> Rows:
    try:
        return data.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError, datasets.table.CastError) as error:
        raise RetrievalError(f"column {quoted(column)} of {where} holds no images: {first_line(error)}") from None


def _metadata_features(features: datasets.Features, options: CorpusOptions) -> datasets.Features:
    """Which columns go into the table; class labels by their names."""
    wanted, used = options.metadata_columns, {options.image_column, options.text_column, options.id_column}
    found = datasets.Features()
    for name, kind in features.items():
        if (wanted is None and (name in used or name.startswith("__"))) or (wanted is not None and name not in wanted):
            continue
        label = isinstance(kind, datasets.ClassLabel)
        plain = label or (
            isinstance(kind, datasets.Value) and not kind.dtype.startswith(("null", "binary", "large_b"))
        )
        if wanted is not None and (not plain or name in RESERVED_COLUMNS):
            reason = (
                "is a column that every table has" if name in RESERVED_COLUMNS else f"is of type {shortened(kind)}"
            )
            raise RetrievalError(f"metadata column {quoted(name)} {reason}: leave it out or rename it")
        if plain and name in RESERVED_COLUMNS:
            logger.warning(
                f"column {quoted(name)} is left out: every table has one of this name; rename it to keep it"
            )
        elif plain:
            found[name] = datasets.Value("string") if label else kind
    return found


# ---------------------------------------------------------------------------------------------------- reading


def _read(name: str, split: str, streaming: bool) -> tuple[Rows, dict[str, int]]:
    """The rows of a corpus by its name, and how much was left out of it, by reason.

    Raises:
        RetrievalError: no such corpus or split, a damaged file.
    """
    path = Path(name)
    try:
        if os.path.isdir(path):
            return _read_folder(path, split, streaming)
        if path.suffix in BUILDERS:
            return _read_files(sorted(glob.glob(name)) or [name], BUILDERS[path.suffix], split, streaming)
        if os.path.isfile(path):
            kinds = ", ".join(BUILDERS)
            raise RetrievalError(f"{shortened(name)} is of no kind that can be read: {kinds}, or a folder of images")
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise RetrievalError(f"{quoted(name)} is not there")
        return datasets.load_dataset(name, split=split, streaming=streaming), {}
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise _cache_error(error) or RetrievalError(f"{quoted(name)} is not there: {first_line(error)}") from None
    except datasets.exceptions.DatasetGenerationError as error:
        raise RetrievalError(f"{shortened(name)} can't be read: {first_line(error.__cause__ or error)}") from None
    except RetrievalError:
        raise
    except (ValueError, *READING_ERRORS) as error:
        raise _cache_error(error) or RetrievalError(f"{shortened(name)} can't be read: {first_line(error)}") from None


def _cache_error(error: Exception) -> RetrievalError | None:
    """What to say of an error that is one of the cache of `datasets`, not of a corpus."""
    cache, place = Path(datasets.config.HF_DATASETS_CACHE), getattr(error, "filename", None)
    if place is None or not (cache.is_relative_to(place) or Path(place).is_relative_to(cache)):
        return None
    return RetrievalError(
        f"the cache {cache} can't be written ({error.strerror}): set HF_HOME to a folder that can be written"
    )


def _read_folder(path: Path, split: str, streaming: bool) -> tuple[Rows, dict[str, int]]:
    if (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise unknown_name(split, saved, f"{shortened(path)}, among its splits,")
        return saved[split], {}
    if (path / "dataset_info.json").exists():
        return datasets.load_from_disk(str(path)), {}
    listing = list_folder(path)
    tables = [file for file in listing.containers.get(".parquet", ()) if is_table(file) or _is_in_index(file, path)]
    if tables:  # made from what is here
        listing.left_out["files of tables and indexes"] += len(tables)
    shards = [file for file in listing.containers.get(".parquet", ()) if file not in set(tables)]
    if shards and tables:
        data_files = {split: shards}
        return datasets.load_dataset("parquet", data_files=data_files, split=split, streaming=streaming), {}
    if shards:
        return datasets.load_dataset(str(path), split=split, streaming=streaming), {}
    if listing.containers.get(".tar"):
        return _read_files(listing.containers[".tar"], "webdataset", split, True)
    if not listing.images:
        others = ", ".join(f"{count:,} {reason}" for reason, count in listing.left_out.items())
        only = f", only {others}" if others else ""
        raise RetrievalError(f"folder {quoted(path)} holds no images, parquet or WebDataset files{only}")
    rows = image_folder(path, listing)  # which counts more that is left out
    return rows, dict(listing.left_out)


def _is_in_index(file: str, folder: Path) -> bool:
    """Whether a file belongs to a Milvus Lite index, which is a folder."""
    return any(above.suffix == ".db" for above in Path(file).relative_to(folder).parents)


def _read_files(files: list[str], builder: str, split: str, streaming: bool) -> tuple[Rows, dict[str, int]]:
    for file in files:
        if os.path.islink(file) and not os.path.exists(file):
            raise RetrievalError(f"{quoted(file)} is a dead link: remove it, or put back the file that it leads to")
    streaming = streaming or builder == "webdataset"  # or a copy of all shards would be made
    data_files = {split: [str(Path(file).resolve()) for file in files]}
    return datasets.load_dataset(builder, data_files=data_files, split=split, streaming=streaming), {}


# ----------------------------------------------------------------------------------------------- images by URI


def open_image(uri: str) -> Image.Image:
    """The image at a URI of a table, upright 8-bit RGB: a file, a URL, a member of a tar file, a row of a data set.

    Raises:
        ValueError: nothing there, or no image.
    """
    place, separator, inside = uri.rpartition("#")
    if not separator or os.path.isfile(uri) or uri.startswith(("http://", "https://")):
        return load_rgb_image(uri)
    try:
        if place.endswith(".tar"):
            with tarfile.open(place) as archive:
                value = {"bytes": archive.extractfile(inside).read()}
        else:
            split, number = inside.rsplit(":", 1)
            value = _opened(place, split).image(int(number))
        return read_image(value, uri)
    except RetrievalError:
        raise
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, *READING_ERRORS) as error:
        raise RetrievalError(f"image {quoted(uri)} can't be read: {first_line(error)}") from None


@functools.lru_cache(maxsize=4)
def _opened(name: str, split: str) -> Corpus:
    return open_source(name, split)


__all__ = [
    "Corpus",
    "CorpusOptions",
    "CorpusRow",
    "digest_of",
    "open_corpus",
    "open_image",
    "open_source",
    "records_of",
]
