"""Search past one machine: the same table and the same `search()` in Milvus (extra `milvus`).

MilvusIndex(table, uri="index.db")                 Milvus Lite, inside this process, kept in the folder index.db
MilvusIndex(table, uri="http://localhost:19530")   a Milvus server or cluster

connection.py   a client for a URI
columns.py      columns as fields, rows as entities, filters as expressions
manifest.py     which table a collection holds
index.py        MilvusIndex: makes, completes and searches a collection
"""

from .index import INDEX_TYPES, MilvusIndex

__all__ = ["INDEX_TYPES", "MilvusIndex"]
