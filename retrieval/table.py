"""An open table of embeddings: memory-mapped, checked, the source of any index.

    files ── load_table ── EmbeddingTable ── any index

An open table is an Arrow file in the cache of `datasets`: it takes no memory, and rows are read from disk when they
are needed. `mome.retrieval.format` says what is in the files.
"""

import bisect
import hashlib
import os
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from tqdm.auto import tqdm
from transformers.utils import logging

from ..configuration_mome import quoted, shortened
from ..errors import RetrievalError, first_line, unknown_name
from .format import RESERVED_COLUMNS, TableInfo, read_info, read_tables, table_files

logger = logging.get_logger(__name__)

ARROW_ROWS = 16_384  # rows that lie together in the memory-mapped file: a block of a matrix product
NORM_TOLERANCE = 1e-3
MANY_ROWS = 100_000  # take so long to open that a bar is welcome


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
        raise RetrievalError(f"table {shortened(source)} has no rows")
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
    states = [path.stat() for path in files]
    places = _digest([str(path.resolve()) for path in files])
    stamps = [(state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino) for state in states]
    copy = cache / f"{places}-{_digest([ARROW_ROWS, stamps])}.arrow"
    if os.path.exists(copy):
        return copy, False
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"{copy.name}.{os.getpid()}-{threading.get_ident()}"
        try:
            _write_arrow(partial, files, count)
            os.replace(partial, copy)
            _remove_others(copy, places)
        finally:
            partial.unlink(missing_ok=True)
        return copy, False
    except OSError as error:
        reason = error.strerror or first_line(error)
    folder = Path(tempfile.mkdtemp(prefix="mome-"))
    logger.warning(
        f"the cache {shortened(cache)} can't be written ({reason}): using {folder} until the table is closed"
    )
    try:
        _write_arrow(folder / copy.name, files, count)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = error.strerror or first_line(error)
        raise RetrievalError(
            f"neither the cache {shortened(cache)} nor {folder} can be written: {reason}; set HF_HOME"
        ) from None
    return folder / copy.name, True


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:20]


def _remove_others(copy: Path, places: str):
    """Deletes copies of earlier states of the same files; who has one open keeps it."""
    for other in copy.parent.glob(f"{places}-*.arrow"):
        if other != copy:
            with suppress(OSError):  # an open file can't be deleted on Windows
                other.unlink()


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
            f"{name} was made by another model ({info.model}, weights {info.fingerprint}, not "
            f"{shortened(fingerprint)}): search it with that one, or embed the corpus again"
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
            raise RetrievalError(f"row {quoted(one['id'])} has no embedding ({one.get('error')})")
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
            raise RetrievalError(f"table {self.name} has no row with id {quoted(id)}")
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
                    f"table {self.name}: the embedding of row {row} (id {quoted(id)}) {reason}; "
                    f"{int(wrong.sum())} such rows in its block: embed the corpus again"
                )
        ids = self.column("id")
        if ids.null_count or pc.count_distinct(ids).as_py() != len(self):
            counts = pc.value_counts(ids.combine_chunks())
            many = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
            shown = f"id {quoted(many[0].as_py())} occurs twice" if len(many) else "a row has no id"
            raise RetrievalError(f"table {self.name}: {shown}; ids must be unique")

    def __repr__(self) -> str:
        size = f"{len(self)} rows, {self.dimension} dimensions"
        return f"EmbeddingTable({quoted(self.name)}: {size}, by {quoted(self.info.model)})"


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


__all__ = ["NORM_TOLERANCE", "EmbeddingTable", "check_model", "load_table", "push_table"]
