"""A table in a Milvus collection, which is made, completed and searched here.

    connect ── collection of this table? ── write the rows that it lacks ── search
               manifest.py                  columns.py

Opening an index writes the rows that its collection lacks: a job that was interrupted, even by `kill -9`, resumes
where it stopped, and a complete index opens at once. The primary key is the row's number in the table and every write
is an upsert, so no row is stored twice. A collection of an earlier state of the table, from the same corpus and model,
is built again, with a line that says so; one of another table or model is refused.

Milvus Lite suits tables of up to about 200,000 rows: it searches in Python, and only one process can open it. Beyond
that, `ExactIndex` is faster on one machine, and a Milvus server scales.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import torch
from pymilvus.exceptions import MilvusException
from transformers.utils import logging as transformers_logging

from ...configuration_mome import quoted
from ...errors import RetrievalError
from ..filters import Condition
from ..index import Index
from ..table import EmbeddingTable
from .columns import PRIMARY_KEY, VECTOR, collection_schema, cut, entities, expression_for
from .connection import checked_collection, checked_uri, connect, disconnect, is_lite, quiet_logs, reason_of
from .manifest import check_manifest, is_manifest, make_manifest

MANIFEST = "mome.manifest"
BATCH_BYTES = 4 << 20  # of embeddings in one write; Milvus refuses messages of more than 64 MiB
BATCH_ROWS = 2_000
QUERIES_AT_ONCE = 128
MAX_TOP_K = 16_384  # Milvus' own limit
LITE_ROWS = 200_000

# How each type of index is built: FLAT misses nothing, HNSW (arXiv:1603.09320) less than one percent.
INDEX_TYPES: dict[str, dict[str, int]] = {"FLAT": {}, "HNSW": {"M": 32, "efConstruction": 400}}
HNSW_LEAST_EF = 512

logger = transformers_logging.get_logger(__name__)


class MilvusIndex(Index):
    """Searches a table in a Milvus collection, which it creates, completes or opens.

    ```python
    index = MilvusIndex(load_table("table.parquet"), uri="index.db")
    index.search(queries, top_k=10, where={"modality": "image"})
    ```

    Hits with the same score come in the order of their rows, among those that Milvus has found.

    Args:
        table: what is searched.
        uri: a path that ends in `.db` for Milvus Lite, or `http://host:port` or `https://...` of a server.
        collection: its name; letters, digits and underscores.
        index_type: `"FLAT"` compares with every row; `"HNSW"` is a graph, much faster to search in large tables.
        rebuild: delete the collection and create it again.
        token: `user:password` or API key of a server.
        timeout: in seconds, of a single request.
        progress: show a bar while rows are written.

    Raises:
        RetrievalError: no such server, an index that another process has open, or a collection of another table or
            model; one line.
    """

    def __init__(
        self,
        table: EmbeddingTable,
        uri: str | Path = "index.db",
        collection: str = "mome",
        index_type: str = "FLAT",
        rebuild: bool = False,
        token: str | None = None,
        timeout: float = 60.0,
        progress: bool = True,
    ):
        super().__init__(table)
        if index_type not in INDEX_TYPES:
            raise RetrievalError(f"index_type={quoted(index_type)}: choose {' or '.join(INDEX_TYPES)}")
        self.uri, self.collection = checked_uri(uri), checked_collection(collection)
        self.index_type, self.timeout = index_type, timeout
        self.manifest = make_manifest(table, index_type)
        if is_lite(self.uri) and len(table) > LITE_ROWS:
            logger.warning(
                f"{len(table):,} rows in Milvus Lite: it is slow beyond {LITE_ROWS:,}, use a Milvus server, or exact "
                "search on one machine"
            )
        self.client, self._closed = connect(self.uri, token), False
        try:
            with self._plain_errors():
                self._open(rebuild)
                self._fill(progress)
        except BaseException:
            self.close()
            raise

    def close(self):
        """Closes the connection; another process can then open a Milvus Lite index."""
        if not self._closed:
            self._closed = True
            disconnect(self.client, self.uri)

    def __enter__(self) -> "MilvusIndex":
        return self

    def __exit__(self, *_: Any):
        self.close()

    # ------------------------------------------------------------------------------------------------ searching

    def _search(
        self, queries: torch.Tensor, top_k: int, conditions: tuple[Condition, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if top_k > MAX_TOP_K:
            raise RetrievalError(f"top_k={top_k} is more than Milvus returns, {MAX_TOP_K}: use index='exact'")
        expression = expression_for(conditions, self.table)
        scores = torch.full((len(queries), top_k), -torch.inf)
        rows = torch.full((len(queries), top_k), -1)
        with self._plain_errors():
            for start in range(0, len(queries), QUERIES_AT_ONCE):
                found = self._ask(queries[start : start + QUERIES_AT_ONCE], top_k, expression)
                for number, hits in enumerate(found, start):
                    if hits:
                        self._check_ids(hits)
                        best = sorted((-hit["distance"], hit[PRIMARY_KEY]) for hit in hits)
                        scores[number, : len(best)] = torch.tensor([-distance for distance, _ in best])
                        rows[number, : len(best)] = torch.tensor([row for _, row in best])
        return scores, rows

    def _ask(self, queries: torch.Tensor, top_k: int, expression: str) -> list[list[dict[str, Any]]]:
        params = {"ef": max(HNSW_LEAST_EF, 2 * top_k)} if self.index_type == "HNSW" else {}
        return self.client.search(
            self.collection,
            data=list(queries.numpy()),
            anns_field=VECTOR,
            limit=top_k,
            filter=expression,
            output_fields=[PRIMARY_KEY, "id"],  # if none are named, Milvus Lite sends all
            search_params={"metric_type": "IP", "params": params},
            consistency_level="Strong",
            timeout=self.timeout,
        )

    def _check_ids(self, hits: list[dict[str, Any]]):
        """Refuses rows of another state of the table: somebody may have built the collection again meanwhile."""
        rows = [hit[PRIMARY_KEY] for hit in hits]
        known = [row for row in rows if row < len(self.table)]
        ids = self.table.column("id").take(pa.array(known, pa.int64())).to_pylist()
        if len(known) < len(rows) or any(cut(id) != hit["entity"]["id"] for id, hit in zip(ids, hits)):
            raise RetrievalError(
                f"collection {quoted(self.collection)} at {self.uri} was built again from another state of "
                f"{self.table.name}: open the table and the index again"
            )

    # ------------------------------------------------------------------------------------- making the collection

    def _open(self, rebuild: bool):
        """Creates the collection if it does not exist, and loads it."""
        client, name, timeout = self.client, self.collection, self.timeout
        if client.has_collection(name, timeout=timeout):
            if rebuild or not self._is_ours():
                client.drop_collection(name, timeout=timeout)
        if not client.has_collection(name, timeout=timeout):
            schema = collection_schema(self.table, self.manifest)
            client.create_collection(name, schema=schema, consistency_level="Strong", timeout=timeout)
            if self._stored_manifest() is None:  # Milvus Lite drops descriptions, but keeps properties
                client.alter_collection_properties(name, properties={MANIFEST: self.manifest}, timeout=timeout)
        if not client.list_indexes(name, field_name=VECTOR):
            index = client.prepare_index_params()
            index.add_index(VECTOR, index_type=self.index_type, metric_type="IP", params=INDEX_TYPES[self.index_type])
            client.create_index(name, index, timeout=timeout)
        client.load_collection(name, timeout=timeout)

    def _stored_manifest(self) -> str | None:
        described = self.client.describe_collection(self.collection, timeout=self.timeout)
        return described.get("properties", {}).get(MANIFEST) or described.get("description") or None

    def _is_ours(self) -> bool:
        """Whether the collection holds this table; `False` if it has to be made again: it holds an earlier state of
        the table, or its making was interrupted before it held anything.

        Raises:
            RetrievalError: it holds something else.
        """
        where = f"collection {quoted(self.collection)} at {self.uri}"
        fix = "pass rebuild=True to replace it, or another collection"
        stored = self._stored_manifest()
        if is_manifest(stored):
            if check_manifest(stored, self.manifest, where, fix):
                return True
            logger.warning(f"{where} holds an earlier state of {self.table.name}: it is built again")
            return False
        if self._is_unfinished():
            return False
        raise RetrievalError(f"{where} was not made by mome: {fix}")

    def _is_unfinished(self) -> bool:
        """Whether the creation of the collection was interrupted before its manifest was written."""
        described = self.client.describe_collection(self.collection, timeout=self.timeout)
        rows = self.client.get_collection_stats(self.collection, timeout=self.timeout)["row_count"]
        return not int(rows) and {PRIMARY_KEY, VECTOR} <= {field["name"] for field in described["fields"]}

    def _fill(self, progress: bool):
        """Writes the rows that are missing."""
        expected, stored = int(self.table.valid.sum()), self._count()
        if stored == expected:
            if is_lite(self.uri):  # in case the job was killed just before its end
                self.client.flush(self.collection, timeout=self.timeout)
            return
        with transformers_logging.tqdm(total=expected, desc="indexing", unit="rows", disable=not progress) as bar:
            for rows, vectors in self._batches():
                between = f"{PRIMARY_KEY} >= {int(rows[0])} and {PRIMARY_KEY} <= {int(rows[-1])}"
                if not stored or self._count(between) != len(rows):
                    self._write(rows, vectors)
                bar.update(len(rows))
        self.client.flush(self.collection, timeout=self.timeout)  # rows not flushed are slow to search
        stored = self._count()
        if stored != expected:
            raise RetrievalError(
                f"collection {quoted(self.collection)} at {self.uri} holds {stored} rows, the table has {expected} "
                "embeddings: something else writes to it; pass rebuild=True, or another collection"
            )

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Row numbers (rows,) and embeddings (rows, dimension) of each write."""
        size = max(1, min(BATCH_ROWS, BATCH_BYTES // (4 * self.table.dimension)))
        for start, block in self.table.blocks:
            valid = self.table.valid[start : start + len(block)].nonzero().flatten()
            for places in valid.split(size):
                if len(places):
                    yield places + start, block[places]

    def _write(self, rows: torch.Tensor, vectors: torch.Tensor):
        self.client.upsert(self.collection, entities(self.table, rows, vectors), timeout=self.timeout)

    def _count(self, expression: str = f"{PRIMARY_KEY} >= 0") -> int:
        answer = self.client.query(
            self.collection,
            filter=expression,
            output_fields=["count(*)"],
            consistency_level="Strong",
            timeout=self.timeout,
        )
        return int(answer[0]["count(*)"])

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            with quiet_logs():
                yield
        except (MilvusException, grpc.RpcError) as error:
            where = f"Milvus at {self.uri}, collection {quoted(self.collection)}"
            raise RetrievalError(f"{where}: {reason_of(error)}") from None


__all__ = ["MilvusIndex"]
