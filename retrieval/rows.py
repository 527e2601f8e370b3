"""Rows of a corpus to rows of a table: what is embedded of each, decoded, embedded, or with a reason why not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from ..data.images import decode_image, pixel_scale, to_pixels
from ..embedder import Embedder
from ..errors import first_line
from .sources import SourceRow
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


def items_of(row: SourceRow, modalities: Sequence[str] = ("image",), several_texts: bool = False) -> list[Item]:
    """What is embedded of one row: its image, then each of its texts.

    Args:
        modalities: what is wanted of it.
        several_texts: whether texts get a number after the id of their row.
    """
    items = []
    if "image" in modalities:
        text = row.texts[0] if row.texts else None
        items.append(Item(row.id, "image", row.uri, text, row.image, row.metadata))
    if "text" in modalities:
        for number, text in enumerate(row.texts):
            id = f"{row.id}#{number}" if several_texts else row.id
            items.append(Item(id, "text", row.uri, text, metadata=row.metadata))
        if not items:
            id = f"{row.id}#0" if several_texts else row.id
            items.append(Item(id, "text", row.uri, metadata=row.metadata, error="no text"))
    return items


def embed_items(items: Sequence[Item], embedder: Embedder, on_cut: Callable[[int], Any] | None = None) -> torch.Tensor:
    """Items → (items, dimension) float32; those that can't be embedded get zeros, and the reason in `error`.

    Images go through the model together, and so do texts; `on_cut` is as in `Embedder.embed_texts`.
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
    if texts:
        embeddings[text_places] = embedder.embed_texts(texts, on_cut=on_cut)
    return embeddings


def embed_rows(
    rows: Sequence[SourceRow],
    embedder: Embedder,
    schema: pa.Schema,
    modalities: Sequence[str] = ("image",),
    several_texts: bool = False,
    on_cut: Callable[[int], Any] | None = None,
) -> pa.Table:
    """Some rows of a corpus as rows of a table, in their order.

    Args:
        rows: of the corpus.
        embedder: of the model.
        schema: of the table, see `table_schema`.
        modalities, several_texts: see `items_of`.
        on_cut: as in `Embedder.embed_texts`.
    """
    items = [item for row in rows for item in items_of(row, modalities, several_texts)]
    embeddings = embed_items(items, embedder, on_cut)
    return to_table(columns_of(items, schema), embeddings, schema)


def columns_of(items: Sequence[Item], schema: pa.Schema) -> dict[str, list]:
    """The columns of `schema` that are no embeddings, for `to_table`."""
    plain = {name: [getattr(item, name) for item in items] for name in ("id", "modality", "uri", "text", "error")}
    metadata = [name for name in schema.names if name not in plain and name != "embedding"]
    return plain | {name: [item.metadata[name] for item in items] for name in metadata}


def read_pixels(value: Any, image_processor: Any) -> tuple[torch.Tensor | None, str | None]:
    """An encoded image as (1, channels, height, width) pixels for `embed_pixels`, or the reason why there are none."""
    try:
        return to_pixels([decode_image(value)], image_processor), None
    except Exception as error:  # Pillow's decoders raise nearly anything
        return None, first_line(error)


def embed_pixels(pixels: torch.Tensor, embedder: Embedder) -> torch.Tensor:
    """(images, channels, height, width) uint8, or float32 pixel values → (images, dimension) float32."""
    scale = pixel_scale(embedder.processor.image_processor)
    return embedder.embed_pixel_values(scale(pixels) if pixels.dtype == torch.uint8 else pixels)


__all__ = ["Item", "columns_of", "embed_items", "embed_rows", "items_of"]
