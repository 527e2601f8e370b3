"""Opens tables: checked when they are opened, memory-mapped, their embeddings as tensors without a copy."""

import bisect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..errors import RetrievalError, first_line, unknown_name
from .table import RESERVED_COLUMNS, TableInfo, read_info, table_files

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
        fingerprint: of the model that it has to be of.
        dimension: that its embeddings have to have.
        check: reads all rows once and refuses embeddings that are not finite or not of length 1, and ids that are
            there twice.
        cache_dir: where `datasets` keeps the memory-mapped copy; default: its usual place.

    Raises:
        RetrievalError: no such table, a truncated file, another model's, or bad rows; one line.
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
    """Without a log line for an error that is raised as well; bars only where there is something to wait for."""
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
    """Refuses a table that another model made."""
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
    """A table that is open.

    Args:
        rows: all of it, as `datasets` has it.
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
        """The embeddings as (first row, (rows, dimension) float32) without a copy; rows without one hold anything."""
        blocks, start = [], 0
        for chunk in self.column("embedding").chunks:
            if len(chunk):
                blocks.append((start, _as_tensor(chunk, self.dimension)))
                start += len(chunk)
        return blocks

    def embeddings(self, rows: Sequence[int]) -> torch.Tensor:
        """(len(rows), dimension) float32 of rows that have one.

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
        """Refuses embeddings that are not finite or not of length 1, and ids that are there twice."""
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
            shown = f"id {many[0].as_py()!r} is there twice" if len(many) else "a row has no id"
            raise RetrievalError(f"table {self.name}: {shown}; ids have to be unique")

    def __repr__(self) -> str:
        return f"EmbeddingTable({self.name!r}: {len(self)} rows, {self.dimension} dimensions, by {self.info.model!r})"


def _as_tensor(chunk: pa.FixedSizeListArray, dimension: int) -> torch.Tensor:
    """(rows, dimension), the memory that Arrow has mapped; nulls are not looked at."""
    values = chunk.values
    first = (values.offset + chunk.offset * dimension) * 4
    buffer = values.buffers()[1]
    if buffer is None:
        return torch.zeros(len(chunk), dimension)
    array = np.frombuffer(buffer, dtype=np.float32, count=len(chunk) * dimension, offset=first)
    return _read_only_tensor(array).view(len(chunk), dimension)


def _read_only_tensor(array: np.ndarray) -> torch.Tensor:
    """Without torch's warning that the memory must not be written to: nothing here does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


__all__ = ["EmbeddingTable", "check_model", "load_table"]
