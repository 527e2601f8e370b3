"""Retrieval: a corpus is embedded into a table, and the table is searched by text and by image.

    corpus ────── embed_corpus ─── table (parquet) ─── index ───────── Searcher ─── hits
    corpus.py     embed.py         format.py           exact.py        search.py    sheet.py
    folder.py     embed_daft.py    table.py            milvus/
    metadata.py   job.py store.py

- the table is the source of truth: plain parquet that `datasets` reads and from which any index can be rebuilt;
- `embed_corpus` resumes after any interruption and brings a table up to date when its corpus has changed;
- what can't be read is listed beside the table, each with its reason;
- `embed_daft.py` makes the same table with Daft, on one machine or on Ray (extra `daft`);
- `ExactIndex` compares with every row, without a server; `milvus/` is for more than one machine (extra `milvus`).
"""

from ..embedder import Embedder
from ..errors import RetrievalError
from .corpus import CorpusOptions, open_image, open_source
from .embed import EmbeddingReport, embed_corpus
from .exact import ExactIndex
from .format import TableInfo
from .index import Hit, Index
from .search import Searcher
from .table import EmbeddingTable, load_table, push_table

__all__ = [
    "CorpusOptions",
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
