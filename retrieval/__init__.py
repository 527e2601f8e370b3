"""Retrieval: a corpus embedded into a table, the table searched by text and by image.

    corpus ── embed_corpus ─────── table (parquet) ── index ──────── Searcher ── hits
              embed.py, job.py     table.py           exact.py       search.py
              distributed.py       loading.py         milvus.py

- the table is the source of truth: plain parquet that `datasets` reads, from which every index can be made anew;
- `embed_corpus` goes on after any interruption and counts what can't be read; `distributed.py` makes the same table
  with Daft, on one machine or on Ray (extra `daft`);
- `ExactIndex` compares with every row, without a server; `milvus.py` is for more than one machine (extra `milvus`).
"""

from ..embedder import Embedder
from ..errors import RetrievalError
from .embed import EmbeddingReport, embed_corpus
from .exact import ExactIndex
from .images import open_image
from .loading import EmbeddingTable, load_table
from .search import Hit, Index, Searcher
from .sources import open_source
from .table import TableInfo, push_table

__all__ = [
    "Embedder",
    "EmbeddingReport",
    "EmbeddingTable",
    "ExactIndex",
    "Hit",
    "Index",
    "RetrievalError",
    "Searcher",
    "TableInfo",
    "embed_corpus",
    "load_table",
    "open_image",
    "open_source",
    "push_table",
]
