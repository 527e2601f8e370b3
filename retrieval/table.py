"""The table of embeddings: parquet that `datasets` reads, from which every index can be made anew.

    id         string, unique
    modality   "image" or "text"
    uri        where the item is: a file, a member of a tar file, or a row of a data set
    text       the text itself, or what comes with an image; may be null
    ...        metadata: any columns of numbers, strings, truth values and dates
    error      why there is no embedding; null for good rows
    embedding  (dimension,) float32, L2-normalised; null for a row that could not be read

A table is one file or a folder of files. The metadata of each file's schema tells which model made it (`TableInfo`),
so that it can't be searched with another by mistake. It is read through `datasets`, which keeps it as a memory-mapped
Arrow file: opening costs no memory, and rows are read from disk as they are touched.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import RetrievalError, first_line

FORMAT_VERSION = 1
LEADING_COLUMNS = ("id", "modality", "uri", "text")
RESERVED_COLUMNS = (*LEADING_COLUMNS, "error", "embedding")
MODALITIES = ("image", "text")
METADATA_KEY = b"mome"
ROW_GROUP_ROWS = 16_384  # what reading and writing hold in memory


@dataclass(frozen=True)
class TableInfo:
    """What made a table.

    Attributes:
        model: folder or Hub id of the model.
        fingerprint: of its weights (`model_fingerprint`).
        dimension: of the embeddings.
        source: what was embedded.
        job: fingerprint of source and settings, by which an interrupted job knows its own output.
        format_version: of the table.
    """

    model: str
    fingerprint: str
    dimension: int
    source: str = ""
    job: str = ""
    format_version: int = FORMAT_VERSION


def table_schema(info: TableInfo, metadata: datasets.Features | None = None) -> pa.Schema:
    """The Arrow schema of a table, with what `datasets` and this module need to know in its metadata."""
    metadata = metadata or datasets.Features()
    if taken := set(metadata) & set(RESERVED_COLUMNS):
        raise RetrievalError(f"metadata column {min(taken)!r} has the name of a column of the table: rename it")
    string = datasets.Value("string")
    features = datasets.Features(
        {
            **dict.fromkeys(LEADING_COLUMNS, string),
            **metadata,
            "error": string,
            "embedding": datasets.List(datasets.Value("float32"), length=info.dimension),
        }
    )
    schema = features.arrow_schema
    return schema.with_metadata({**schema.metadata, METADATA_KEY: json.dumps(asdict(info)).encode()})


def to_table(columns: dict[str, Sequence], embeddings: torch.Tensor, schema: pa.Schema) -> pa.Table:
    """Rows of a table.

    Args:
        columns: all columns but `embedding`; a row with an `error` gets a null embedding.
        embeddings: (rows, dimension) float32; those of rows with an error don't matter.
        schema: `table_schema`'s.
    """
    bad = np.array([error is not None for error in columns["error"]], dtype=bool)
    values = embeddings.detach().to("cpu", torch.float32).contiguous().numpy()
    values = np.where(bad[:, None], np.float32(0), values)
    kind = schema.field("embedding").type
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind, mask=pa.array(bad))
    arrays = [
        vectors if name == "embedding" else pa.array(columns[name], schema.field(name).type) for name in schema.names
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` in one step when all is written and on disk."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_table(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Writes a parquet file that is whole or not there; returns its number of rows.

    Small tables are gathered into row groups of `ROW_GROUP_ROWS`, so that memory stays bounded.
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


# ---------------------------------------------------------------------------------------------------- reading


def read_info(path: Path) -> tuple[TableInfo, pa.Schema]:
    """What made the parquet file `path`, and its schema; reads its footer only.

    Raises:
        RetrievalError: not there, truncated, no table of embeddings, or of a later format.
    """
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise RetrievalError(f"table {str(path)!r} is not there") from None
    except (pa.ArrowException, OSError) as error:
        raise RetrievalError(f"{path} is truncated or no parquet file: {first_line(error)}") from None
    missing = [name for name in RESERVED_COLUMNS if name not in schema.names and name != "error"]
    if missing:
        raise RetrievalError(
            f"{path} is no table of embeddings: it lacks the column {missing[0]!r}; make one with `mome embed`"
        )
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32():
        raise RetrievalError(f"{path}: column 'embedding' is of type {kind}, not a fixed-size list of float32")
    return _info_of(path, schema, kind.list_size), schema


def _info_of(path: Path, schema: pa.Schema, dimension: int) -> TableInfo:
    written = (schema.metadata or {}).get(METADATA_KEY)
    if written is None:  # rewritten by other software: everything but the origin is there
        return TableInfo(model="", fingerprint="", dimension=dimension)
    given = json.loads(written)
    if given.get("format_version", 0) > FORMAT_VERSION:
        version = given["format_version"]
        raise RetrievalError(f"{path} has format version {version}, this mome reads {FORMAT_VERSION}: update mome")
    known = {each.name for each in fields(TableInfo)}
    info = TableInfo(**{key: value for key, value in given.items() if key in known})
    if info.dimension != dimension:
        raise RetrievalError(f"{path}: embeddings have {dimension} dimensions, its metadata say {info.dimension}")
    return info


def table_files(source: str | Path) -> list[Path]:
    """The parquet files of a table: a file, a folder, or a data set on the Hub.

    Raises:
        RetrievalError: there is no such table.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise RetrievalError(f"folder {str(path)!r} holds no parquet files: make a table with `mome embed`")
        return files
    if path.suffix == ".parquet" or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        hint = ""
        if path.with_name(path.name + ".parts").is_dir():
            hint = ": its job is not finished, run the same `mome embed` again"
        raise RetrievalError(f"table {str(source)!r} is not there{hint}")
    try:
        folder = snapshot_download(str(source), repo_type="dataset", allow_patterns="*.parquet")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RetrievalError(
            f"table {str(source)!r} is no file, and can't be had from the Hub: {first_line(error)}"
        ) from None
    return table_files(folder)


def push_table(source: str | Path, repo_id: str, private: bool = False, token: str | None = None) -> CommitInfo:
    """Uploads a table as a data set on the Hub, file by file as it is, so that it still tells its model.

    Returns:
        The commit.

    Raises:
        RetrievalError: no such table. HfHubHTTPError: no right to write.
    """
    files = table_files(source)
    operations = []
    for number, path in enumerate(files):
        read_info(path)
        name = f"data/train-{number:05d}-of-{len(files):05d}.parquet"
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path))
    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    return api.create_commit(repo_id, operations, commit_message="Embeddings", repo_type="dataset")


__all__ = [
    "MODALITIES",
    "TableInfo",
    "push_table",
    "read_info",
    "table_files",
    "table_schema",
    "to_table",
    "write_table",
]
