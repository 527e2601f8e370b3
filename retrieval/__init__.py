"""Retrieval: a corpus embedded into a table, the table searched by text and by image.

corpus ── embed_corpus ── table (parquet) ── index ── Searcher ── hits
(embed.py, sources.py)    (table.py)         (exact.py)  (search.py)
"""

from .embedder import Embedder
from .errors import RetrievalError
from .exact import ExactIndex
from .search import Hit, Index, Searcher
from .table import EmbeddingTable, TableInfo, load_table, push_table

__all__ = [
    "Embedder",
    "EmbeddingTable",
    "ExactIndex",
    "Hit",
    "Index",
    "RetrievalError",
    "Searcher",
    "TableInfo",
    "load_table",
    "push_table",
]
