"""The table of embeddings: parquet that `datasets` reads and from which any index can be rebuilt.

    TableInfo ── table_schema ── to_table ── write_table ── files ── load_table ── EmbeddingTable ── any index

    id         string, unique
    modality   "image" or "text"
    uri        where the item is: a file, a member of a tar file, or a row of a data set
    text       the text itself, or the text of an image; may be null
    ...        metadata: any columns of numbers, strings, booleans and dates
    error      why there is no embedding; null for good rows
    embedding  (dimension,) float32, L2-normalised; null for a row that could not be read

A table is one file or a folder of files. The schema metadata of each file says which model made it (`TableInfo`), so
that it can't be searched with another one by mistake. A table that pandas, DuckDB or Polars wrote again can be read,
without that check. An open table is a memory-mapped Arrow file in the cache of `datasets`: it takes no memory, and
rows are read from disk when they are needed.
"""

import bisect
import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tqdm.auto import tqdm
from transformers.utils import logging

from ..errors import RetrievalError, first_line, unknown_name

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
LEADING_COLUMNS = ("id", "modality", "uri", "text")
RESERVED_COLUMNS = (*LEADING_COLUMNS, "error", "embedding")
MODALITIES = ("image", "text")
METADATA_KEY = b"mome"
ROW_GROUP_ROWS = 16_384  # what reading and writing hold in memory
ARROW_ROWS = 16_384  # rows that lie together in the memory-mapped file: a block of a matrix product
NORM_TOLERANCE = 1e-3
MANY_ROWS = 100_000  # take so long to open that a bar is welcome


@dataclass(frozen=True)
class TableInfo:
    """What made a table.

    Attributes:
        model: folder or Hub id of the model.
        fingerprint: of its weights (`model_fingerprint`).
        dimension: of the embeddings.
        source: what was embedded.
        job: digest of source and settings, by which an interrupted job recognises its own output.
        format_version: of the table.
    """

    model: str
    fingerprint: str
    dimension: int
    source: str = ""
    job: str = ""
    format_version: int = FORMAT_VERSION


def table_schema(info: TableInfo, metadata: datasets.Features | None = None) -> pa.Schema:
    """The Arrow schema of a table; its metadata holds what `datasets` and this module need to know."""
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
        embeddings: (rows, dimension) float32; of rows with an error, anything.
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


# ------------------------------------------------------------------------------------------ files and footers


def read_info(path: Path) -> tuple[TableInfo, pa.Schema]:
    """What made the parquet file `path`, and its schema; reads the footer only.

    Raises:
        RetrievalError: not there, truncated, not a table of embeddings, or of a later format.
    """
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise RetrievalError(f"table {str(path)!r} is not there") from None
    except (pa.ArrowException, OSError) as error:
        raise RetrievalError(f"{path} is truncated or not a parquet file: {first_line(error)}") from None
    missing = [name for name in RESERVED_COLUMNS if name not in schema.names and name != "error"]
    if missing:
        raise RetrievalError(
            f"{path} is not a table of embeddings: it lacks the column {missing[0]!r}; make one with `mome embed`"
        )
    kind = schema.field("embedding").type
    if not _is_list(kind) or not pa.types.is_floating(kind.value_type):
        raise RetrievalError(f"{path}: column 'embedding' is of type {kind}, not a list of floats")
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
            f"table {str(source)!r} is not a file, and can't be downloaded from the Hub: {first_line(error)}"
        ) from None
    return table_files(folder)


def push_table(source: str | Path, repo_id: str, private: bool = False, token: str | None = None) -> CommitInfo:
    """Uploads a table as a data set on the Hub; its files are unchanged, so that they still name their model.

    Returns:
        The commit.

    Raises:
        RetrievalError: no such table. HfHubHTTPError: no permission to write.
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


# ---------------------------------------------------------------------------------------------------- opening


def load_table(
    source: str | Path,
    fingerprint: str | None = None,
    dimension: int | None = None,
    check: bool = True,
    cache_dir: str | Path | None = None,
) -> "EmbeddingTable":
    """Opens a table.

    Args:
        source: parquet file, folder of parquet files, or Hub id of a data set.
        fingerprint: of the model that must have made it; default: any.
        dimension: that its embeddings must have; default: any.
        check: read all rows once and refuse embeddings that are not finite or not of length 1, and duplicate ids.
        cache_dir: where the memory-mapped copy is kept; default: the cache of `datasets`. Where it can't be written,
            there is a warning, and the copy is temporary.

    Raises:
        RetrievalError: no such table, a truncated file, a table of another model, or bad rows; one line.
    """
    files = table_files(source)
    infos = [read_info(path) for path in files]
    info, schema = infos[0]
    for path, (other, other_schema) in zip(files, infos):
        if (other.fingerprint, other.dimension) != (info.fingerprint, info.dimension):
            raise RetrievalError(f"{files[0]} and {path} were made by different models: keep them in separate tables")
        if not other_schema.equals(schema):
            raise RetrievalError(f"{files[0]} and {path} have different columns: keep them in separate tables")
    check_model(str(source), info, fingerprint, dimension)
    count = sum(pq.read_metadata(path).num_rows for path in files)
    if not count:
        raise RetrievalError(f"table {source} has no rows")
    copy, temporary = _arrow_copy(files, count, Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "mome")
    table = EmbeddingTable(datasets.Dataset.from_file(str(copy)), info, str(source))
    if temporary:
        weakref.finalize(table, shutil.rmtree, copy.parent, ignore_errors=True)
    if check:
        table.check()
    return table


def _arrow_copy(files: list[Path], count: int, cache: Path) -> tuple[Path, bool]:
    """All rows of the files as an Arrow file in the cache, to be memory-mapped, and whether it has to be deleted.

    Where the cache can't be written, the copy is temporary.

    Raises:
        RetrievalError: a damaged file, or no place for the copy.
    """
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    copy = cache / f"{hashlib.sha256(repr([ARROW_ROWS, stamps]).encode()).hexdigest()[:32]}.arrow"
    if copy.exists():
        return copy, False
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"{copy.name}.{os.getpid()}-{threading.get_ident()}"
        try:
            _write_arrow(partial, files, count)
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)
        return copy, False
    except OSError as error:
        reason = error.strerror or first_line(error)
    folder = Path(tempfile.mkdtemp(prefix="mome-"))
    logger.warning(f"the cache {cache} can't be written ({reason}): using {folder} until the table is closed")
    try:
        _write_arrow(folder / copy.name, files, count)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = error.strerror or first_line(error)
        raise RetrievalError(f"neither the cache {cache} nor {folder} can be written: {reason}; set HF_HOME") from None
    return folder / copy.name, True


def _write_arrow(path: Path, files: list[Path], count: int):
    """Writes all rows in blocks of `ARROW_ROWS`, whatever the row groups of the files are."""
    with path.open("wb") as sink, tqdm(total=count, desc="opening", unit=" rows", disable=count < MANY_ROWS) as bar:
        writer, waiting, rows = None, [], 0
        for table in (table for file in files for table in read_tables(file)):
            writer = writer or pa.ipc.new_stream(sink, table.schema)
            waiting.append(table)
            rows += len(table)
            if rows >= ARROW_ROWS:
                whole, rows = pa.concat_tables(waiting), rows % ARROW_ROWS
                writer.write_table(whole.slice(0, len(whole) - rows).combine_chunks(), max_chunksize=ARROW_ROWS)
                waiting = [whole.slice(len(whole) - rows)]
            bar.update(len(table))
        writer.write_table(pa.concat_tables(waiting).combine_chunks())
        writer.close()


def check_model(name: str, info: TableInfo, fingerprint: str | None, dimension: int | None):
    """Refuses a table that another model made.

    Raises:
        RetrievalError: its dimension or fingerprint differs from the model's; `None` fits any.
    """
    if dimension is not None and info.dimension != dimension:
        raise RetrievalError(
            f"{name} holds embeddings of {info.dimension} dimensions, the model's have {dimension}: "
            f"search it with {info.model or 'the model that made it'}, or embed the corpus again"
        )
    if fingerprint and info.fingerprint and info.fingerprint != fingerprint:
        raise RetrievalError(
            f"{name} was made by another model ({info.model}, weights {info.fingerprint}, not {fingerprint}): "
            "search it with that one, or embed the corpus again"
        )


class EmbeddingTable:
    """An open table.

    Args:
        rows: all of it, as `datasets` holds it.
        info: what made it.
        name: what error messages call it.
    """

    def __init__(self, rows: datasets.Dataset, info: TableInfo, name: str = "table"):
        self.rows, self.info, self.name = rows, info, name

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dimension(self) -> int:
        return self.info.dimension

    @property
    def metadata_columns(self) -> list[str]:
        return [name for name in self.rows.column_names if name not in RESERVED_COLUMNS]

    def column(self, name: str) -> pa.ChunkedArray:
        """A column, memory-mapped."""
        if name not in self.rows.column_names:
            raise unknown_name(name, self.rows.column_names, f"table {self.name}")
        return self.rows.data.column(name)

    @cached_property
    def valid(self) -> torch.Tensor:
        """(rows,) bool: which rows have an embedding."""
        return torch.from_numpy(self.column("embedding").is_valid().to_numpy().astype(bool))

    @cached_property
    def blocks(self) -> list[tuple[int, torch.Tensor]]:
        """Pairs of a first row and its (rows, dimension) float32 embeddings, not copied; of bad rows, anything."""
        blocks, start = [], 0
        for chunk in self.column("embedding").chunks:
            if len(chunk):
                blocks.append((start, _as_tensor(chunk, self.dimension)))
                start += len(chunk)
        return blocks

    def embeddings(self, rows: Sequence[int]) -> torch.Tensor:
        """The embeddings of some rows, (len(rows), dimension) float32.

        Raises:
            RetrievalError: a row without an embedding.
        """
        bad = next((row for row in rows if not self.valid[row]), None)
        if bad is not None:
            one = self.rows[int(bad)]
            raise RetrievalError(f"row {one['id']!r} has no embedding ({one.get('error')})")
        starts = [start for start, _ in self.blocks]
        blocks = [self.blocks[bisect.bisect_right(starts, row) - 1] for row in rows]
        vectors = [block[row - start] for row, (start, block) in zip(rows, blocks)]
        return torch.stack(vectors) if vectors else torch.zeros(0, self.dimension)

    @cached_property
    def described(self) -> datasets.Dataset:
        """All columns but the embeddings."""
        return self.rows.select_columns([name for name in self.rows.column_names if name != "embedding"])

    def row_of(self, id: str) -> int:
        """The number of the row with this `id`.

        Raises:
            RetrievalError: there is none.
        """
        row = pc.index(self.column("id"), pa.scalar(str(id), self.column("id").type)).as_py()
        if row < 0:
            raise RetrievalError(f"table {self.name} has no row with id {id!r}")
        return row

    def check(self):
        """Refuses embeddings that are not finite or not of length 1, and duplicate ids."""
        for start, block in self.blocks:
            norms = torch.linalg.vector_norm(block, dim=1)
            wrong = ~((norms - 1).abs() <= NORM_TOLERANCE) & self.valid[start : start + len(block)]  # NaN is wrong
            if wrong.any():
                place = int(wrong.int().argmax())
                norm, row = float(norms[place]), start + place
                reason = f"has length {norm:.4g} instead of 1" if np.isfinite(norm) else "is not finite"
                id = self.column("id")[row].as_py()
                raise RetrievalError(
                    f"table {self.name}: the embedding of row {row} (id {id!r}) {reason}; "
                    f"{int(wrong.sum())} such rows in its block: embed the corpus again"
                )
        ids = self.column("id")
        if ids.null_count or pc.count_distinct(ids).as_py() != len(self):
            counts = pc.value_counts(ids.combine_chunks())
            many = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
            shown = f"id {many[0].as_py()!r} occurs twice" if len(many) else "a row has no id"
            raise RetrievalError(f"table {self.name}: {shown}; ids must be unique")

    def __repr__(self) -> str:
        return f"EmbeddingTable({self.name!r}: {len(self)} rows, {self.dimension} dimensions, by {self.info.model!r})"


def _as_tensor(chunk: pa.FixedSizeListArray, dimension: int) -> torch.Tensor:
    """(rows, dimension), the memory that Arrow has mapped; nulls are not skipped."""
    values = chunk.values
    first = (values.offset + chunk.offset * dimension) * 4
    buffer = values.buffers()[1]
    if buffer is None:
        return torch.zeros(len(chunk), dimension)
    array = np.frombuffer(buffer, dtype=np.float32, count=len(chunk) * dimension, offset=first)
    return _read_only_tensor(array).view(len(chunk), dimension)


def _read_only_tensor(array: np.ndarray) -> torch.Tensor:
    """Without torch's warning about memory that must not be written to: nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


__all__ = [
    "MODALITIES",
    "RESERVED_COLUMNS",
    "EmbeddingTable",
    "TableInfo",
    "check_model",
    "load_table",
    "push_table",
    "read_info",
    "read_tables",
    "replacing",
    "table_files",
    "table_schema",
    "to_table",
    "write_table",
]
