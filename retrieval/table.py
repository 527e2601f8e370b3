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
that it can't be searched with another one by mistake. `datasets` keeps an open table as a memory-mapped Arrow file:
opening it takes no memory, and rows are read from disk when they are needed.
"""

import bisect
import json
import os
import warnings
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

from ..errors import RetrievalError, first_line, unknown_name

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
        raise RetrievalError(f"{path}: embeddings have {dimension} dimensions, its metadata says {info.dimension}")
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
        cache_dir: where `datasets` keeps the memory-mapped copy; default: its usual place.

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
    try:
        with _quiet_datasets(bars=count > MANY_ROWS):
            rows = datasets.load_dataset(
                "parquet",
                data_files={"train": [str(path) for path in files]},
                split="train",
                cache_dir=None if cache_dir is None else str(cache_dir),
                writer_batch_size=ARROW_ROWS,
            )
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError, ValueError) as error:
        reason = first_line(error.__cause__ or error)
        raise RetrievalError(f"{source} can't be read, it may be damaged: {reason}") from None
    table = EmbeddingTable(rows, info, str(source))
    if check:
        table.check()
    return table


@contextmanager
def _quiet_datasets(bars: bool) -> Iterator[None]:
    """No log lines for errors that are raised anyway; bars only where there is something to wait for."""
    verbosity, shown = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


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
    "replacing",
    "table_files",
    "table_schema",
    "to_table",
    "write_table",
]
