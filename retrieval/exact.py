"""Exact search: the cosine of each query with every row, by matrix products over the memory-mapped table.

    for each block of rows (some MiB, as they lie in the file):
        scores = queries · blockᵀ                 one pass over the table for all queries together
        the best of the block → the best so far

There is no index to build or to keep up to date, and nothing is missed. A query reads all embeddings once, so memory
bandwidth is the limit; many queries share one read.
"""

import torch

from .filters import Condition
from .index import Index

QUERIES_AT_ONCE = 128  # times a block's rows, this bounds the memory that scores take
GROUP_ROWS = 64  # of a block, whose maximum is found before its members are looked at
SPARSE_SHARE = 8  # where a filter leaves less than an eighth of a block, those rows are copied out


class ExactIndex(Index):
    """Searches a table by matrix products: no server, nothing to build, recall 1.

    ```python
    index = ExactIndex(load_table("table.parquet"))
    index.search(queries, top_k=10, where={"modality": "image"})
    ```

    Hits with the same score come in the order of their rows.
    """

    def _search(
        self, queries: torch.Tensor, top_k: int, conditions: tuple[Condition, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = self.rows_meeting(conditions)
        parts = [self._search_some(some, top_k, wanted) for some in queries.split(QUERIES_AT_ONCE)]
        scores, rows = (torch.cat(each) for each in zip(*parts))
        return scores, rows

    def _search_some(
        self, queries: torch.Tensor, top_k: int, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(queries, dimension), (table rows,) bool → scores, rows (queries, top_k)."""
        best = queries.new_full((len(queries), top_k), -torch.inf)
        best_rows = torch.full((len(queries), top_k), -1)
        for start, block in self.table.blocks:
            inside = wanted[start : start + len(block)]
            count = int(inside.sum())
            if not count:
                continue
            numbers = None
            if count * SPARSE_SHARE < len(block):
                numbers = inside.nonzero().squeeze(1)
                block, inside, count = block[numbers], inside[numbers], len(numbers)
            scores = _products(queries, block)
            if count < len(block):
                scores.masked_fill_(~inside, -torch.inf)  # also over the NaN of a row without an embedding
            best, best_rows = _merge(best, best_rows, scores, start, numbers)
        return best, best_rows


def _products(queries: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """(queries, dimension), (rows, dimension) → (queries, rows)."""
    if len(queries) == 1:
        return torch.mv(block, queries[0])[None]
    return queries @ block.T


def _merge(
    best: torch.Tensor, best_rows: torch.Tensor, scores: torch.Tensor, start: int, numbers: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best so far, (queries, top_k), and the scores of a block, (queries, rows) → the best of both.

    `numbers`: (rows,) which rows of the block the scores are of; default: all.
    """
    if not (scores.amax(dim=1) > best[:, -1]).any():  # usual after a few blocks
        return best, best_rows
    top_k = best.shape[1]
    values, places = _top(scores, min(top_k, scores.shape[1]))
    rows = (places if numbers is None else numbers[places]) + start
    rows = rows.masked_fill(values == -torch.inf, -1)
    # The best so far come first and the sort is stable: equal scores stay in the order of their rows.
    values, order = torch.cat([best, values], dim=1).sort(dim=1, descending=True, stable=True)
    rows = torch.cat([best_rows, rows], dim=1).gather(1, order)
    return values[:, :top_k], rows[:, :top_k]


def _top(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk` of (queries, rows), equal scores in their order; looks at the best groups of rows only.

    The `top_k` largest lie in the `top_k` groups with the largest maxima: any other group holds none that is larger
    than all of those maxima.
    """
    groups = scores.shape[1] // GROUP_ROWS
    if groups <= 2 * top_k:
        return _ordered(*scores.topk(top_k, dim=1))
    body = scores[:, : groups * GROUP_ROWS].view(len(scores), GROUP_ROWS, groups)  # group: rows ≡ its number
    chosen = body.amax(dim=1).topk(top_k, dim=1).indices  # (queries, top_k)
    members = torch.arange(GROUP_ROWS)[:, None] * groups + chosen[:, None, :]  # (queries, GROUP_ROWS, top_k)
    tail = torch.arange(groups * GROUP_ROWS, scores.shape[1]).expand(len(scores), -1)
    places = torch.cat([members.flatten(1), tail], dim=1)
    values, order = scores.gather(1, places).topk(top_k, dim=1)
    return _ordered(values, places.gather(1, order))


def _ordered(values: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best first; of equal values the smallest place first."""
    places, order = places.sort(dim=1)
    values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, best)


__all__ = ["ExactIndex"]
