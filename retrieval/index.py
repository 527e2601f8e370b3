"""What every index has in common: queries and filters checked, rows turned into hits.

    queries (n, dimension) ── Index.search ── hits, best first
                              ├─ ExactIndex    exact.py
                              └─ MilvusIndex   milvus/

An index is made of an `EmbeddingTable` and finds rows of it. What can't be used is refused here, in one line, before
any index sees it.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..configuration_mome import quoted
from ..errors import RetrievalError
from ..inputs_mome import is_count
from .filters import Condition, Where, matching_rows, parse_where
from .format import RESERVED_COLUMNS
from .table import EmbeddingTable

FILTERS_KEPT = 8


@dataclass(frozen=True)
class Hit:
    """A row that a search found.

    Attributes:
        score: cosine of query and row, -1 to 1.
        row: its number in the table.
        id, modality, uri, text: its columns.
        metadata: its other columns.
    """

    score: float
    row: int
    id: str
    modality: str
    uri: str | None = None
    text: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


class Index(ABC):
    """Finds the rows of a table whose embeddings have the largest cosine with a query.

    Args:
        table: what is searched.
    """

    def __init__(self, table: EmbeddingTable):
        self.table = table
        self._masks: dict[tuple[Condition, ...], torch.Tensor] = {}

    def search(self, queries: torch.Tensor, top_k: int = 10, where: Where | None = None) -> list[list[Hit]]:
        """The best rows for each query.

        Args:
            queries: (queries, dimension) or (dimension,) floats, finite and not zero; normalised here.
            top_k: the number of hits for each query; fewer if fewer rows match.
            where: a filter on columns, see `mome.retrieval.filters`.

        Returns:
            For each query its hits, best first.

        Raises:
            RetrievalError: queries that are not finite or of another dimension, or a bad `top_k` or filter.
        """
        scores, rows = self.search_rows(queries, top_k, where)
        return hits_of(self.table, scores, rows)

    def search_rows(
        self, queries: torch.Tensor, top_k: int = 10, where: Where | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `search`: scores (queries, top_k) float32 and row numbers (queries, top_k) int64.

        Where fewer rows match, the score is -inf and the row -1.
        """
        queries = checked_queries(queries, self.table.dimension)
        if not is_count(top_k):
            raise RetrievalError(f"top_k={quoted(top_k)} must be an integer of at least 1")
        top_k, conditions = (
            int(top_k),
            parse_where(where, [name for name in self.table.rows.column_names if name != "embedding"]),
        )
        if not len(queries):
            return queries.new_zeros(0, top_k), torch.zeros(0, top_k, dtype=torch.int64)
        return self._search(queries, top_k, conditions)

    @abstractmethod
    def _search(
        self, queries: torch.Tensor, top_k: int, conditions: tuple[Condition, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`search_rows` for checked queries: (queries, dimension) float32, L2-normalised."""

    def rows_meeting(self, conditions: tuple[Condition, ...]) -> torch.Tensor:
        """(rows,) bool: which rows have an embedding and meet all conditions; the last few masks are kept."""
        if not conditions:
            return self.table.valid
        if conditions not in self._masks:
            mask = torch.from_numpy(matching_rows(conditions, self.table.rows.data)) & self.table.valid
            while len(self._masks) >= FILTERS_KEPT:
                del self._masks[next(iter(self._masks))]
            self._masks[conditions] = mask
        return self._masks[conditions]


def checked_queries(queries: torch.Tensor, dimension: int) -> torch.Tensor:
    """(queries, dimension) float32, L2-normalised, on the CPU.

    Raises:
        RetrievalError: not floats, another dimension, NaN, infinity, or nothing but zeros.
    """
    if not isinstance(queries, torch.Tensor):
        try:
            queries = torch.as_tensor(queries, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise RetrievalError(f"queries of type {type(queries).__name__}: pass a tensor of floats") from None
    if not queries.is_floating_point():
        raise RetrievalError(f"queries are of type {queries.dtype}: pass floats")
    queries = queries.detach().to("cpu", torch.float32)
    queries = queries[None] if queries.ndim == 1 else queries
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise RetrievalError(f"queries have shape {tuple(queries.shape)}, the table needs (queries, {dimension})")
    norms = torch.linalg.vector_norm(queries, dim=1)
    wrong = ~(norms.isfinite() & (norms > 0))
    if wrong.any():
        place = int(wrong.int().argmax())
        reason = "is zero" if norms[place] == 0 else "is not finite"
        raise RetrievalError(f"query {place} {reason}: it can't be compared with anything")
    return queries / norms[:, None]


def hits_of(table: EmbeddingTable, scores: torch.Tensor, rows: torch.Tensor) -> list[list[Hit]]:
    """Scores and row numbers, (queries, top_k) each with row -1 where there is none → hits."""
    wanted = sorted({row for each in rows.tolist() for row in each if row >= 0})
    values = table.described[wanted] if wanted else {}
    found = {row: dict(zip(values, each)) for row, each in zip(wanted, zip(*values.values()))}
    return [
        [_hit(score, row, found[row]) for score, row in zip(*pair) if row >= 0]
        for pair in zip(scores.tolist(), rows.tolist())
    ]


def _hit(score: float, row: int, columns: dict[str, Any]) -> Hit:
    own = {name: columns[name] for name in ("id", "modality", "uri", "text")}
    metadata = {name: value for name, value in columns.items() if name not in RESERVED_COLUMNS}
    return Hit(score=score, row=row, **own, metadata=metadata)


__all__ = ["Hit", "Index", "checked_queries", "hits_of"]
