"""Opens an index by its name: `"exact"`, or the URI of a Milvus index."""

from typing import Any

from .errors import RetrievalError
from .exact import ExactIndex
from .loading import EmbeddingTable
from .search import Index


def open_index(table: EmbeddingTable, index: Any = "exact") -> Index:
    """An index of `table`.

    Args:
        table: what is searched.
        index: `"exact"`, or an `Index` that is open.

    Raises:
        RetrievalError: no such index, or one of another table.
    """
    if isinstance(index, Index):
        if index.table.dimension != table.dimension or len(index.table) != len(table):
            raise RetrievalError(f"the index is one of {index.table!r}, not of {table!r}")
        return index
    if index == "exact":
        return ExactIndex(table)
    raise RetrievalError(f"index={index!r}: pass 'exact' or an index that is open")


__all__ = ["open_index"]
