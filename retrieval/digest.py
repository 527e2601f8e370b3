"""A digest of a table's contents, by which an index that is kept elsewhere knows its table."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from .loading import EmbeddingTable

EMBEDDINGS_HASHED = 4096


def table_digest(table: EmbeddingTable) -> str:
    """16 hexadecimal digits of all that a table holds, however its rows lie in files."""
    digest = hashlib.sha256(f"{len(table)} {table.dimension}".encode())
    for name in table.rows.column_names:
        if name != "embedding":
            digest.update(f"{name} {table.column(name).type}".encode())
            for part in _column_bytes(table.column(name)):
                digest.update(part)
    total = torch.zeros((), dtype=torch.int64)
    for start, block in table.blocks:
        total += block[table.valid[start : start + len(block)]].view(torch.int32).sum(dtype=torch.int64)
    some = np.linspace(0, len(table) - 1, min(len(table), EMBEDDINGS_HASHED)).astype(int)
    rows = [row for row in some.tolist() if table.valid[row]]
    digest.update(total.numpy().tobytes())
    if rows:
        digest.update(table.embeddings(rows).numpy().tobytes())
    return digest.hexdigest()[:16]


def _column_bytes(column: pa.ChunkedArray, rows: int = 65_536) -> Iterator[bytes]:
    """A column as bytes that depend on its values only."""
    for start in range(0, len(column), rows):
        array = column.slice(start, rows).combine_chunks()
        yield array.is_null().to_numpy(zero_copy_only=False).tobytes()
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            texts = pc.fill_null(array.cast(pa.large_string()), "")
            yield pc.binary_length(texts).to_numpy().tobytes()
            yield "".join(texts.to_pylist()).encode()
        else:
            yield repr(array.to_pylist()).encode()


__all__ = ["table_digest"]
