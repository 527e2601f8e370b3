"""Embeddings by content: what a job need not compute again.

    table of an earlier run ─┐
    part-000000.parquet ...  ┴─ Store ── digest of an image or a text → its embedding, or why it has none
    (this run and killed ones)

A part is whole or not there. Digests are kept in memory, about 200 bytes for each row; embeddings stay on the disk.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..errors import RetrievalError, first_line
from .format import read_tables, write_table
from .items import Item

PART_COLUMNS = ("uri", "file_stamp", "content_digest", "error")


class Store:
    """Embeddings of a table and of a job's parts, and those that are added.

    Args:
        folder: of the parts.
        dimension: of the embeddings.
        origin: schema metadata that marks the parts as ours.
        part_rows: the least rows of a part.
    """

    def __init__(self, folder: Path, dimension: int, origin: dict[bytes, bytes], part_rows: int):
        self.folder, self.dimension, self.part_rows = folder, dimension, part_rows
        kinds = {**dict.fromkeys(PART_COLUMNS, datasets.Value("string"))}
        kinds["embedding"] = datasets.List(datasets.Value("float32"), length=dimension)
        self.schema = datasets.Features(kinds).arrow_schema.with_metadata(origin)
        self.files: list[Path] = []
        self.places: dict[bytes, int] = {}  # digest → row, counted over all files
        self.errors: dict[bytes, str] = {}  # digest → why there is no embedding
        self.stamps: dict[bytes, bytes] = {}  # digest of uri and stamp of a file → digest of its content
        self.expected: set[bytes] = set()  # digests of what is being embedded
        self.rows = 0
        self.waiting: list[pa.Table] = []
        self.parts = 0

    # ------------------------------------------------------------------------------------------------- reading

    def read_table(self, files: Sequence[Path]):
        """Takes the rows of a table of an earlier run."""
        for file in files:
            self._read(file, ["uri", "file_stamp", "content_digest"])

    def read_parts(self):
        """Takes the parts that killed runs left; a damaged one is deleted."""
        for file in sorted(self.folder.glob("part-*.parquet")):
            self.parts = int(file.stem.removeprefix("part-")) + 1
            try:
                self._read(file, list(PART_COLUMNS))
            except (pa.ArrowException, OSError, KeyError):
                file.unlink()

    def _read(self, file: Path, columns: list[str]):
        self._note(pq.read_table(file, columns=columns))
        self.files.append(file)

    def _note(self, rows: pa.Table):
        columns = rows.to_pydict()
        errors = columns.get("error") or [None] * len(rows)
        names = ("uri", "file_stamp", "content_digest")
        for row, (uri, stamp, digest, error) in enumerate(zip(*map(columns.get, names), errors), self.rows):
            if digest is None:
                continue
            key = bytes.fromhex(digest)
            if error is None:
                self.places.setdefault(key, row)
            else:
                self.errors[key] = error
            if stamp is not None:
                self.stamps[stamp_key(uri, stamp)] = key
        self.rows += len(rows)

    def digest_of_file(self, uri: str, stamp: str | None) -> str | None:
        """The digest of an image file that is as it was when it was read; `None` if it has to be read."""
        key = self.stamps.get(stamp_key(uri, stamp)) if stamp else None
        return key.hex() if key is not None else None

    def lacks(self, digest: str) -> bool:
        """Whether a content has to be embedded; true once for each content."""
        key = bytes.fromhex(digest)
        if key in self.places or key in self.errors or key in self.expected:
            return False
        self.expected.add(key)
        return True

    def error_of(self, digest: str) -> str | None:
        return self.errors.get(bytes.fromhex(digest))

    def place_of(self, digest: str) -> int:
        return self.places[bytes.fromhex(digest)]

    # ------------------------------------------------------------------------------------------------- adding

    def add(self, items: Sequence[Item], embeddings: torch.Tensor):
        """Takes items and their embeddings, (items, dimension) float32; those with an `error` have none."""
        columns = {
            "uri": [item.uri for item in items],
            "file_stamp": [item.stamp for item in items],
            "content_digest": [item.digest for item in items],
            "error": [item.error for item in items],
        }
        values = pa.array(embeddings.to("cpu", torch.float32).contiguous().numpy().reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(values, type=self.schema.field("embedding").type)
        arrays = [pa.array(columns[name], pa.string()) for name in PART_COLUMNS]
        self.waiting.append(pa.Table.from_arrays([*arrays, vectors], schema=self.schema))
        if sum(map(len, self.waiting)) >= self.part_rows:
            self.flush()

    def flush(self):
        """Writes what waits as a part."""
        if not self.waiting:
            return
        file = self.folder / f"part-{self.parts:06d}.parquet"
        write_table(file, self.waiting, self.schema)
        self.parts += 1
        self.files.append(file)
        for table in self.waiting:
            self._note(table.select(list(PART_COLUMNS)))
        self.waiting = []

    # --------------------------------------------------------------------------------------------- embeddings

    def embeddings(self, scratch: Path) -> np.ndarray:
        """(rows, dimension) float32: all embeddings, memory-mapped in the file `scratch`; those of errors are zeros.

        Raises:
            RetrievalError: a damaged file.
        """
        with scratch.open("wb") as file:
            for rows in self._vectors():
                rows.tofile(file)
        if not self.rows:
            return np.zeros((0, self.dimension), np.float32)
        return np.memmap(scratch, np.float32, "r", shape=(self.rows, self.dimension))

    def _vectors(self) -> Iterator[np.ndarray]:
        for file in self.files:
            tables: Iterable[pa.Table] = read_tables(file) if self.folder not in file.parents else _groups_of(file)
            for table in tables:
                for chunk in table["embedding"].chunks:
                    yield chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), self.dimension)


def _groups_of(file: Path) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(file) as parts:
            for group in range(parts.num_row_groups):
                yield parts.read_row_group(group, columns=["embedding"])
    except (pa.ArrowException, OSError) as error:
        raise RetrievalError(f"{file} can't be read, it may be damaged: {first_line(error)}; delete it") from None


def stamp_key(uri: str | None, stamp: str) -> bytes:
    return hashlib.blake2b(f"{uri}\0{stamp}".encode(errors="surrogateescape"), digest_size=16).digest()


__all__ = ["Store"]
