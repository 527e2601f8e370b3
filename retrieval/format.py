"""The files of a table: what is in them, how they are written and read, where they lie.

    TableInfo ── table_schema ── to_table ── write_table ── files ── read_tables

    id              string, unique
    modality        "image" or "text"
    uri             where the item is: a file, a member of a tar file, or a row of a data set
    text            the text itself, or the text of an image; may be null
    ...             metadata: any columns of numbers, strings, booleans and dates
    content_digest  32 hexadecimal digits of the encoded image or the text: equal ones have equal embeddings
    file_stamp      size and times of an image file when it was read; null for anything else
    embedding       (dimension,) float32, L2-normalised

Every row has an embedding. What can't be read is listed in a file beside the table (`unreadable_file`); in tables of
format 1 it is a row with a null embedding and the reason in a column `error`, and those are still read.

A table is one file or a folder of files. The schema metadata of each file says what made it (`TableInfo`), so that it
can't be searched with another model by mistake. A table that pandas, DuckDB or Polars wrote again can be read, without
that check.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..configuration_mome import quoted, shortened
from ..errors import RetrievalError, first_line

FORMAT_VERSION = 2
LEADING_COLUMNS = ("id", "modality", "uri", "text")
ORIGIN_COLUMNS = ("content_digest", "file_stamp")
RESERVED_COLUMNS = (*LEADING_COLUMNS, *ORIGIN_COLUMNS, "error", "embedding")
MODALITIES = ("image", "text")
METADATA_KEY = b"mome"
FINISHED = "finished"  # folder of a job's parts: a table that waits to be renamed
ROW_GROUP_ROWS = 16_384  # what reading and writing hold in memory


@dataclass(frozen=True)
class TableInfo:
    """What made a table.

    Attributes:
        model: folder or Hub id of the model.
        fingerprint: of its weights (`model_fingerprint`).
        dimension: of the embeddings.
        source: what was embedded.
        settings: everything else that the table depends on, as JSON has it; a table grows with the same ones only.
        format_version: of the table.
    """

    model: str
    fingerprint: str
    dimension: int
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def table_schema(info: TableInfo, metadata: datasets.Features | None = None) -> pa.Schema:
    """The Arrow schema of a table; its metadata holds what `datasets` and this module need to know."""
    metadata = metadata or datasets.Features()
    if taken := set(metadata) & set(RESERVED_COLUMNS):
        raise RetrievalError(f"metadata column {quoted(min(taken))} has the name of a column of the table: rename it")
    string = datasets.Value("string")
    features = datasets.Features(
        {
            **dict.fromkeys(LEADING_COLUMNS, string),
            **metadata,
            **dict.fromkeys(ORIGIN_COLUMNS, string),
            "embedding": datasets.List(datasets.Value("float32"), length=info.dimension),
        }
    )
    schema = features.arrow_schema
    return schema.with_metadata({**schema.metadata, METADATA_KEY: json.dumps(asdict(info)).encode()})


def to_table(columns: dict[str, Sequence], embeddings: torch.Tensor, schema: pa.Schema) -> pa.Table:
    """Rows of a table.

    Args:
        columns: all columns but `embedding`; those of `ORIGIN_COLUMNS` may be missing.
        embeddings: (rows, dimension) float32.
        schema: `table_schema`'s.
    """
    values = embeddings.detach().to("cpu", torch.float32).contiguous().numpy()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=schema.field("embedding").type)
    unknown = dict.fromkeys(ORIGIN_COLUMNS, [None] * len(values))
    columns = {**unknown, **columns}
    arrays = [
        vectors if name == "embedding" else pa.array(columns[name], schema.field(name).type) for name in schema.names
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` in one step once everything is on disk."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_table(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Writes a parquet file that is either whole or not there; returns its number of rows.

    Small tables are collected into row groups of `ROW_GROUP_ROWS`, so that memory stays bounded.
    """
    others = [name for name in schema.names if name != "embedding"]
    compression = dict.fromkeys(others, "zstd") | {"embedding.list.element": "none"}  # random bits don't compress
    count, waiting, rows = 0, [], 0
    with replacing(path) as partial:
        with pq.ParquetWriter(partial, schema, compression=compression, use_dictionary=others) as writer:
            for table in tables:
                waiting.append(table)
                rows += len(table)
                if rows >= ROW_GROUP_ROWS:
                    writer.write_table(pa.concat_tables(waiting), row_group_size=ROW_GROUP_ROWS)
                    count, waiting, rows = count + rows, [], 0
            writer.write_table(pa.concat_tables([*waiting, schema.empty_table()]), row_group_size=ROW_GROUP_ROWS)
    return count + rows


# ----------------------------------------------------------------------------------------------------- reading


def read_info(path: Path) -> tuple[TableInfo, pa.Schema]:
    """What made the parquet file `path`, and its schema; reads the footer only.

    Raises:
        RetrievalError: not there, truncated, not a table of embeddings, or of a later format.
    """
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise RetrievalError(f"table {quoted(path)} is not there") from None
    except (pa.ArrowException, OSError) as error:
        raise RetrievalError(f"{path} is truncated or not a parquet file: {first_line(error)}") from None
    missing = [name for name in (*LEADING_COLUMNS, "embedding") if name not in schema.names]
    if missing:
        raise RetrievalError(
            f"{path} is not a table of embeddings: it lacks the column {missing[0]!r}; make one with `mome embed`"
        )
    kind = schema.field("embedding").type
    if not _is_list(kind) or not pa.types.is_floating(kind.value_type):
        raise RetrievalError(f"{path}: column 'embedding' is of type {shortened(str(kind))}, not a list of floats")
    return _info_of(path, schema), schema


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _info_of(path: Path, schema: pa.Schema) -> TableInfo:
    kind = schema.field("embedding").type
    dimension = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    written = (schema.metadata or {}).get(METADATA_KEY)
    if written is None:  # rewritten by other software: everything but the origin is there
        return TableInfo(model="", fingerprint="", dimension=dimension or _first_length(path))
    given = json.loads(written)
    if given.get("format_version", 0) > FORMAT_VERSION:
        version = given["format_version"]
        raise RetrievalError(f"{path} has format version {version}, this mome reads {FORMAT_VERSION}: update mome")
    known = {each.name for each in fields(TableInfo)}
    info = TableInfo(**{key: value for key, value in given.items() if key in known})
    if dimension not in (None, info.dimension):
        raise RetrievalError(f"{path}: embeddings have {dimension} dimensions, its metadata says {info.dimension}")
    return info


def _first_length(path: Path) -> int:
    """The length of the first embedding in a file of lists of any length.

    Raises:
        RetrievalError: there is none, or the file is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["embedding"], batch_size=64):
                if lengths := pc.list_value_length(batch.column(0)).drop_null().to_pylist():
                    return lengths[0]
    except (pa.ArrowException, OSError) as error:
        raise RetrievalError(f"{path} can't be read, it may be damaged: {first_line(error)}") from None
    raise RetrievalError(f"{path} holds no embeddings: embed the corpus again")


def read_tables(path: Path) -> Iterator[pa.Table]:
    """The rows of a parquet file, a row group at a time, their embeddings as fixed-size lists of float32.

    Other software writes embeddings as lists of any length, and pyarrow before 26 can't read a null among fixed-size
    lists (apache/arrow#35692). So embeddings are always read as lists of any length, which is what the footer says of
    them without Arrow's own schema.

    Raises:
        RetrievalError: the file is damaged, or its embeddings differ in length.
    """
    info, schema = read_info(path)
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32():
        kind = pa.list_(pa.float32(), info.dimension)
    others = [name for name in schema.names if name != "embedding"]
    place = schema.names.index("embedding")
    try:
        with pq.ParquetFile(path) as file, pq.ParquetFile(path, metadata=_plain_footer(path)) as plain:
            for group in range(file.num_row_groups):
                vectors = plain.read_row_group(group, columns=["embedding"])["embedding"]
                rows = file.read_row_group(group, columns=others)
                yield rows.add_column(place, pa.field("embedding", kind), _fixed_size(vectors, kind, path))
    except (pa.ArrowException, OSError) as error:
        raise RetrievalError(f"{path} can't be read, it may be damaged: {first_line(error)}") from None


def _plain_footer(path: Path) -> pq.FileMetaData:
    """The footer of a parquet file without the Arrow schema: its key, of the same length, is unknown to pyarrow."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        footer = file.read(length).replace(b"ARROW:schema", b"arrow-schema")
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer + length.to_bytes(4, "little") + b"PAR1"))


def _fixed_size(vectors: pa.ChunkedArray, kind: pa.FixedSizeListType, path: Path) -> pa.FixedSizeListArray:
    """(rows,) lists of floats, some null → lists of the size and type that `kind` has."""
    lengths = pc.list_value_length(vectors).to_numpy()  # NaN for null
    valid = vectors.is_valid().to_numpy().astype(bool)
    if (wrong := valid & (lengths != kind.list_size)).any():
        length = int(lengths[wrong.argmax()])
        raise RetrievalError(f"{path}: an embedding has {length} values, not {kind.list_size}: embed the corpus again")
    values = np.zeros((len(vectors), kind.list_size), np.float32)
    parts = [part.flatten().to_numpy(zero_copy_only=False) for part in vectors.chunks]  # without those of nulls
    values[valid] = np.concatenate([np.zeros(0, np.float32), *parts]).reshape(-1, kind.list_size)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind, mask=pa.array(~valid))


def parts_folder(output: Path) -> Path:
    """Where a job keeps its work until the table is whole."""
    return output.with_name(output.name + ".parts")


def unreadable_file(output: Path) -> Path:
    """The file beside a table that lists what could not be read: JSON lines of `id`, `modality`, `uri`, `error`."""
    if output.suffix == ".parquet" and not os.path.isdir(output):
        return output.with_suffix(".unreadable.jsonl")
    return output / "unreadable.jsonl"


def is_table(path: str | Path) -> bool:
    """Whether a parquet file is a table or part of one, not data to embed."""
    try:
        schema = pq.read_schema(path)
        return METADATA_KEY in (schema.metadata or {}) or {*LEADING_COLUMNS, "embedding"} <= set(schema.names)
    except (pa.ArrowException, OSError):
        return False


def table_files(source: str | Path) -> list[Path]:
    """The parquet files of a table: a file, a folder, or a data set on the Hub.

    Raises:
        RetrievalError: there is no such table.
    """
    path = Path(source)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = ((file, file.relative_to(path).parents) for file in path.rglob("*.parquet"))
        files = sorted(file for file, above in found if not any(each.suffix == ".parts" for each in above))
        if not files:
            raise RetrievalError(f"folder {quoted(path)} holds no parquet files: make a table with `mome embed`")
        return files
    if path.suffix == ".parquet" or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        hint = ""
        if os.path.isdir(parts := parts_folder(path)):
            if (parts / FINISHED).is_dir():  # a kill between two renames
                return table_files(parts / FINISHED)
            hint = ": its job is not finished, run the same `mome embed` again"
        raise RetrievalError(f"table {quoted(source)} is not there{hint}")
    try:
        folder = snapshot_download(str(source), repo_type="dataset", allow_patterns="*.parquet")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RetrievalError(
            f"table {quoted(source)} is not a file, and can't be downloaded from the Hub: {first_line(error)}"
        ) from None
    return table_files(folder)


__all__ = [
    "FINISHED",
    "FORMAT_VERSION",
    "LEADING_COLUMNS",
    "METADATA_KEY",
    "MODALITIES",
    "ORIGIN_COLUMNS",
    "RESERVED_COLUMNS",
    "ROW_GROUP_ROWS",
    "TableInfo",
    "is_table",
    "parts_folder",
    "read_info",
    "read_tables",
    "replacing",
    "table_files",
    "table_schema",
    "to_table",
    "unreadable_file",
    "write_table",
]
