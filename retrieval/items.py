"""From rows of a corpus to rows of a table: each image and text is decoded and embedded, or gets a reason why not.

CorpusRow ── items_of ── Item ── embed_items ── (items, dimension) ── to_table ── rows of the table
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from PIL import UnidentifiedImageError

from ..data.images import decode_image, pixel_scale, to_pixels
from ..embedder import Embedder
from ..errors import first_line
from .corpus import Corpus, CorpusRow
from .table import to_table


@dataclass
class Item:
    """An image or a text that becomes a row of the table.

    Attributes:
        id, modality, uri, text, metadata: see `mome.retrieval.table`.
        image: encoded, as `datasets` holds it.
        error: why it can't be embedded; `None` for a good one.
    """

    id: str
    modality: str
    uri: str | None = None
    text: str | None = None
    image: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def items_of(row: CorpusRow, corpus: Corpus) -> list[Item]:
    """The items of one row of `corpus`: its image, then each of its texts, as `corpus.modalities` says."""
    items = []
    if "image" in corpus.modalities:
        text = row.texts[0] if row.texts else None
        items.append(Item(row.id, "image", row.uri, text, row.image, row.metadata))
    if "text" in corpus.modalities:
        for number, text in enumerate(row.texts):
            id = f"{row.id}#{number}" if corpus.numbers_texts else row.id
            items.append(Item(id, "text", row.uri, text, metadata=row.metadata))
        if not items:
            id = f"{row.id}#0" if corpus.numbers_texts else row.id
            items.append(Item(id, "text", row.uri, metadata=row.metadata, error="no text"))
    return items


def embed_items(items: Sequence[Item], embedder: Embedder, on_cut: Callable[[int], Any] | None = None) -> torch.Tensor:
    """Items → (items, dimension) float32; one that can't be embedded gets zeros, and the reason in its `error`.

    All images go through the model together, and so do all texts; `on_cut` is as in `Embedder.embed_texts`.
    """
    images, image_places, texts, text_places = [], [], [], []
    for place, item in enumerate(items):
        if item.error is not None:
            continue
        if item.modality == "text":
            texts.append(item.text)
            text_places.append(place)
            continue
        pixels, item.error = read_pixels(item.image, embedder.processor.image_processor)
        if item.error is None:
            images.append(pixels)
            image_places.append(place)
    embeddings = torch.zeros(len(items), embedder.dimension)
    if images:
        embeddings[image_places] = embed_pixels(torch.cat(images), embedder)
    for number in reversed(embedder.wordless(texts)):
        items[text_places.pop(number)].error = "no word that the tokenizer knows"
        del texts[number]
    if texts:
        embeddings[text_places] = embedder.embed_texts(texts, on_cut=on_cut)
    return embeddings


def embed_rows(
    rows: Sequence[CorpusRow],
    corpus: Corpus,
    embedder: Embedder,
    schema: pa.Schema,
    on_cut: Callable[[int], Any] | None = None,
) -> pa.Table:
    """Rows of a corpus → rows of a table with `schema`, in the same order; `on_cut` as in `Embedder.embed_texts`."""
    items = [item for row in rows for item in items_of(row, corpus)]
    embeddings = embed_items(items, embedder, on_cut)
    return to_table(columns_of(items, schema), embeddings, schema)


def columns_of(items: Sequence[Item], schema: pa.Schema) -> dict[str, list]:
    """The columns of `schema` without the embeddings, for `to_table`."""
    plain = {name: [getattr(item, name) for item in items] for name in ("id", "modality", "uri", "text", "error")}
    metadata = [name for name in schema.names if name not in plain and name != "embedding"]
    return plain | {name: [item.metadata[name] for item in items] for name in metadata}


def read_pixels(value: Any, image_processor: Any) -> tuple[torch.Tensor | None, str | None]:
    """An encoded image → (1, channels, height, width) pixels for `embed_pixels`, or the reason why there are none."""
    try:
        return to_pixels([decode_image(value)], image_processor), None
    except UnidentifiedImageError:  # its message names an object in memory
        return None, "not an image that Pillow can read"
    except Exception as error:  # Pillow's decoders raise almost anything
        return None, first_line(error)


def embed_pixels(pixels: torch.Tensor, embedder: Embedder) -> torch.Tensor:
    """(images, channels, height, width) uint8, or float32 pixel values → (images, dimension) float32."""
    scale = pixel_scale(embedder.processor.image_processor)
    return embedder.embed_pixel_values(scale(pixels) if pixels.dtype == torch.uint8 else pixels)


__all__ = ["Item", "columns_of", "embed_items", "embed_rows", "items_of", "read_pixels"]
