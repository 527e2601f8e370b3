"""Opens an index by its name: `"exact"`, or the URI of a Milvus index."""

from pathlib import Path
from typing import Any

from ..errors import RetrievalError
from .exact import ExactIndex
from .loading import EmbeddingTable
from .search import Index


def open_index(table: EmbeddingTable, index: Any = "exact") -> Index:
    """An index of `table`.

    Args:
        table: what is searched.
        index: `"exact"`, an `Index` that is open, or the URI of a Milvus index: a path that ends in `.db`, or
            `http://host:port`. What a Milvus index lacks of the table is written to it.

    Raises:
        RetrievalError: no such index, or one of another table; Milvus is not installed.
    """
    if isinstance(index, Index):
        if index.table.dimension != table.dimension or len(index.table) != len(table):
            raise RetrievalError(f"the index is one of {index.table!r}, not of {table!r}")
        return index
    if index == "exact":
        return ExactIndex(table)
    if isinstance(index, Path) or isinstance(index, str) and (index.endswith(".db") or "://" in index):
        return _open_milvus(table, index)
    raise RetrievalError(
        f"index={index!r}: pass 'exact', a path that ends in .db, http://host:port of Milvus, or an open index"
    )


def _open_milvus(table: EmbeddingTable, uri: str | Path) -> Index:
    try:
        from .milvus import MilvusIndex
    except ModuleNotFoundError as error:
        raise RetrievalError(f"index={str(uri)!r} needs {error.name}: pip install 'mome[milvus]'") from None
    return MilvusIndex(table, uri)


__all__ = ["open_index"]
