"""Searches a table by text, by image, or by one of its rows.

text, image or id ── Searcher ── queries (n, dimension) ── Index.search ── hits, best first
                     (Embedder)                            (open_index)
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..configuration_mome import quoted
from ..embedder import Embedder
from ..errors import RetrievalError, missing_package
from ..inputs_mome import pictures_of
from ..onnx_embedder import load_embedder
from ..texts_mome import no_words
from .exact import ExactIndex
from .filters import Where, plain_values
from .format import MODALITIES
from .index import Hit, Index
from .table import EmbeddingTable, check_model, load_table

logger = logging.get_logger(__name__)


def open_index(table: EmbeddingTable, index: Any = "exact") -> Index:
    """An index of `table`.

    Args:
        table: what is searched.
        index: `"exact"`, an open `Index`, or the URI of a Milvus index: a path that ends in `.db`, or
            `http://host:port`. Rows that a Milvus index lacks are written to it.

    Raises:
        RetrievalError: no such index, or one of another table; Milvus is not installed.
    """
    if isinstance(index, Index):
        if index.table.dimension != table.dimension or len(index.table) != len(table):
            raise RetrievalError(f"the index is one of {index.table}, not of {table}")
        return index
    if index == "exact":
        return ExactIndex(table)
    if isinstance(index, Path) or isinstance(index, str) and (index.endswith(".db") or "://" in index):
        return _open_milvus(table, index)
    raise RetrievalError(
        f"index={quoted(index)}: pass 'exact', a path that ends in .db, http://host:port of Milvus, or an open index"
    )


def _open_milvus(table: EmbeddingTable, uri: str | Path) -> Index:
    try:
        from .milvus import MilvusIndex
    except ModuleNotFoundError as error:
        raise RetrievalError(f"index={quoted(uri)}: {missing_package(error, 'milvus')}") from None
    return MilvusIndex(table, uri)


def _several(value: Any) -> Any:
    """Texts or ids in whatever form they come, or `None` if it is a single one."""
    value = value if isinstance(value, str) else plain_values(value)
    return None if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable) else value


class Searcher:
    """Searches a table by text, by image and by the id of one of its rows.

    ```python
    searcher = Searcher.open("table.parquet")
    searcher.search(text="a red bicycle", modality="image")
    searcher.search(image="bicycle.jpg", top_k=5, where={"license": "CC0-1.0"})
    searcher.search(text=["a cat", "a dog"])               # a list of lists of hits
    searcher.search(id="cats/1.jpg")                       # what is similar to this row, without the row itself
    ```

    Args:
        index: what is searched.
        embedder: embeds texts and images with the model that made the table.

    Raises:
        RetrievalError: the embedder is of another model.
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
        backend: str | None = None,
    ) -> "Searcher":
        """Opens a table, the model that made it, and an index.

        Args:
            table: as `load_table` takes it, or one that is open.
            model: folder or Hub id of a checkpoint or of an export, or an `Embedder`; default: the model that the
                table names.
            index: see `open_index`.
            device: of the model; default: a GPU if there is one.
            backend: what runs the model: see `load_embedder`.

        Raises:
            RetrievalError: no such table or index, or table, model and index don't belong together. MomeError: the
                model can't be loaded.
        """
        table = table if isinstance(table, EmbeddingTable) else load_table(table)
        model = model or table.info.model
        if not model:
            raise RetrievalError(f"table {table.name} doesn't say which model made it: pass model=...")
        embedder = model if isinstance(model, Embedder) else load_embedder(model, backend, device)
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
        """The rows that are most similar to a text, an image or a row; give exactly one of the three.

        Args:
            text: a text, or several in a list, an array or a column; one without a word that the tokenizer knows has
                no hits, and a warning.
            image: path, http(s) URL, PIL image, array or tensor; or several, as `Embedder.embed_images` takes them.
            id: of a row, or several ids; the row itself is left out of its hits.
            top_k: the number of hits.
            where: a filter on columns.
            modality: `"image"` or `"text"`: only such rows; default: both. A text is often closer to other texts than
                to any image.

        Returns:
            For one query a list of `Hit`, best first; for a list of queries a list of those.

        Raises:
            RetrievalError: none or several of the three, or an unknown id. ValueError: an image that can't be read.
        """
        given = {name: value for name, value in (("text", text), ("image", image), ("id", id)) if value is not None}
        if len(given) != 1:
            raise RetrievalError(f"pass one of text, image and id, not {' and '.join(given) or 'nothing'}")
        if modality not in (None, *MODALITIES):
            raise RetrievalError(f"modality={quoted(modality)}: choose 'image' or 'text'")
        if modality is not None:
            where = {**(where or {}), "modality": modality}
        ((kind, value),) = given.items()
        several = pictures_of(value) if kind == "image" else _several(value)
        single, values = several is None, [value] if several is None else list(several)
        if not values:
            return []
        hits = getattr(self, f"_by_{kind}")(values, top_k, where)
        return hits[0] if single else hits

    def _by_text(self, texts: list[str], top_k: int, where: Where | None) -> list[list[Hit]]:
        wordless = set(self.embedder.wordless([text if isinstance(text, str) else "" for text in texts]))
        wordless = {number for number in wordless if isinstance(texts[number], str) and texts[number].strip()}
        for number in sorted(wordless):
            logger.warning(no_words(texts[number], "the text" if len(texts) == 1 else f"text {number}"))
        asked = [text for number, text in enumerate(texts) if number not in wordless]
        found = iter(self.index.search(self.embedder.embed_texts(asked), top_k, where) if asked else [])
        return [[] if number in wordless else next(found) for number in range(len(texts))]

    def _by_image(self, images: list, top_k: int, where: Where | None) -> list[list[Hit]]:
        return self.index.search(self.embedder.embed_images(images), top_k, where)

    def _by_id(self, ids: list[str], top_k: int, where: Where | None) -> list[list[Hit]]:
        rows = [self.index.table.row_of(id) for id in ids]
        found = self.index.search(self.index.table.embeddings(rows), top_k + 1, where)
        return [[hit for hit in hits if hit.row != row][:top_k] for row, hits in zip(rows, found)]


__all__ = ["Searcher", "open_index"]
