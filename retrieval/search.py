"""Search: what every index has in common, and a `Searcher` that takes texts, images and ids of rows.

    text, image or id ── Searcher ── queries (n, dimension) ── Index.search ── hits, best first
                         (Embedder)                            ├─ ExactIndex   (exact.py)
                                                               └─ MilvusIndex  (milvus.py)

Every index is made of an `EmbeddingTable`, gives rows of it, and takes the same queries and filters; what can't be
used is refused here, in one line, before any index sees it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..embedder import Embedder
from ..errors import RetrievalError
from .filters import Condition, Where, matching_rows, parse_where
from .loading import EmbeddingTable, check_model, load_table
from .table import MODALITIES, RESERVED_COLUMNS

FILTERS_KEPT = 8


@dataclass(frozen=True)
class Hit:
    """A row that was found.

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
            queries: (queries, dimension) or (dimension,), finite, of any length but zero; normalised here.
            top_k: the number of hits for each query; fewer if fewer rows match.
            where: a filter on columns, see `mome.retrieval.filters`.

        Returns:
            For each query its hits, best first.

        Raises:
            RetrievalError: queries of another dimension or with NaN, a `top_k` or filter that can't be.
        """
        scores, rows = self.search_rows(queries, top_k, where)
        return hits_of(self.table, scores, rows)

    def search_rows(
        self, queries: torch.Tensor, top_k: int = 10, where: Where | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `search`: scores (queries, top_k) float32 and row numbers (queries, top_k) int64.

        Where there are too few rows, the score is -inf and the row -1.
        """
        queries = checked_queries(queries, self.table.dimension)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise RetrievalError(f"top_k={top_k!r} must be an integer of at least 1")
        conditions = parse_where(where, [name for name in self.table.rows.column_names if name != "embedding"])
        if not len(queries):
            return queries.new_zeros(0, top_k), torch.zeros(0, top_k, dtype=torch.int64)
        return self._search(queries, top_k, conditions)

    @abstractmethod
    def _search(
        self, queries: torch.Tensor, top_k: int, conditions: tuple[Condition, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`search_rows` of checked queries (queries, dimension) float32, L2-normalised."""

    def rows_fulfilling(self, conditions: tuple[Condition, ...]) -> torch.Tensor:
        """(rows,) bool: rows that have an embedding and fulfil all conditions; the last few are kept."""
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
        RetrievalError: no floats, another dimension, NaN, infinity, or nothing but zeros.
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
    """Scores and row numbers, (queries, top_k) each, with -1 where there is no row, as hits."""
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


class Searcher:
    """Searches a table by text, by image and by the id of one of its rows.

    ```python
    searcher = Searcher.open("table.parquet")
    searcher.search(text="a red bicycle", modality="image")
    searcher.search(image="bicycle.jpg", top_k=5, where={"license": "CC0-1.0"})
    searcher.search(text=["a cat", "a dog"])               # a list of lists of hits
    searcher.search(id="cats/1.jpg")                       # what is like this row, without the row itself
    ```

    Args:
        index: what is searched.
        embedder: embeds texts and images; has to be of the model that made the table.
    """

    def __init__(self, index: Index, embedder: Embedder):
        info = index.table.info
        check_model(index.table.name, info, embedder.fingerprint, embedder.dimension)
        self.index, self.embedder = index, embedder

    @classmethod
    def open(
        cls,
        table: str | Path | EmbeddingTable,
        model: str | Path | Embedder | None = None,
        index: Any = "exact",
        device: str | torch.device | None = None,
    ) -> "Searcher":
        """Opens a table, the model that made it, and an index.

        Args:
            table: as `load_table` takes it, or one that is open.
            model: folder or Hub id; default: where the table says that its model was.
            index: `"exact"`, an `Index` of this table, or the URI of a Milvus index of it.
            device: of the model.

        Raises:
            RetrievalError: no such table, model or index, or they don't belong together.
        """
        from .opening import open_index  # which knows all kinds of index, each of which imports this module

        table = table if isinstance(table, EmbeddingTable) else load_table(table)
        model = model or table.info.model
        if not model:
            raise RetrievalError(f"table {table.name} doesn't tell which model made it: pass model=...")
        embedder = model if isinstance(model, Embedder) else Embedder.load(model, device=device)
        check_model(table.name, table.info, embedder.fingerprint, embedder.dimension)
        return cls(open_index(table, index), embedder)

    def search(
        self,
        text: str | Sequence[str] | None = None,
        image: Any = None,
        id: str | Sequence[str] | None = None,
        top_k: int = 10,
        where: Where | None = None,
        modality: str | None = None,
    ) -> list:
        """The rows that are most like a text, an image or a row; exactly one of the three.

        Args:
            text: a text, or a list of texts.
            image: path, http(s) URL, PIL image, array or tensor; or a list of those.
            id: of a row, or a list of ids; the row itself is left out of its hits.
            top_k: the number of hits.
            where: a filter on columns.
            modality: `"image"` or `"text"`: only such rows. By default all, and a text is often nearer to other texts
                than to any image.

        Returns:
            For one query a list of `Hit`, best first; for a list of queries a list of those.

        Raises:
            RetrievalError: nothing or too much to search by, an unknown id. ValueError: an image that can't be read.
        """
        given = {name: value for name, value in (("text", text), ("image", image), ("id", id)) if value is not None}
        if len(given) != 1:
            raise RetrievalError(f"pass one of text, image and id, not {' and '.join(given) or 'nothing'}")
        if modality not in (None, *MODALITIES):
            raise RetrievalError(f"modality={modality!r}: choose 'image' or 'text'")
        if modality is not None:
            where = {**(where or {}), "modality": modality}
        ((kind, value),) = given.items()
        single = not isinstance(value, (list, tuple))
        values = [value] if single else list(value)
        if not values:
            return []
        hits = getattr(self, f"_by_{kind}")(values, top_k, where)
        return hits[0] if single else hits

    def _by_text(self, texts: list[str], top_k: int, where: Where | None) -> list[list[Hit]]:
        return self.index.search(self.embedder.embed_texts(texts), top_k, where)

    def _by_image(self, images: list, top_k: int, where: Where | None) -> list[list[Hit]]:
        return self.index.search(self.embedder.embed_images(images), top_k, where)

    def _by_id(self, ids: list[str], top_k: int, where: Where | None) -> list[list[Hit]]:
        rows = [self.index.table.row_of(id) for id in ids]
        found = self.index.search(self.index.table.embeddings(rows), top_k + 1, where)
        return [[hit for hit in hits if hit.row != row][:top_k] for row, hits in zip(rows, found)]


__all__ = ["Hit", "Index", "Searcher", "checked_queries", "hits_of"]
