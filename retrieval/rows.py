"""Rows of a corpus to rows of a table: decoded, embedded, and with a reason where that can't be done."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from PIL import UnidentifiedImageError

from ..training.pixels import decode_image, pixel_scale, to_pixels
from .embedder import Embedder
from .errors import first_line
from .sources import SourceRow
from .table import to_table


def embed_rows(
    rows: Sequence[SourceRow],
    embedder: Embedder,
    schema: pa.Schema,
    modalities: Sequence[str] = ("image",),
    several_texts: bool = False,
) -> pa.Table:
    """Some rows of a corpus as rows of a table, in their order; images go through the model together, and so do texts.

    Args:
        rows: of the corpus.
        embedder: of the model.
        schema: of the table, see `table_schema`.
        modalities: what is embedded of each row: its image, then each of its texts.
        several_texts: whether texts get a number after the id of their row.
    """
    columns: dict[str, list] = {name: [] for name in schema.names if name != "embedding"}
    images, image_places, texts, text_places = [], [], [], []
    for row in rows:
        if "image" in modalities:
            pixels, error = read_pixels(row.image, embedder.processor.image_processor)
            if error is None:
                images.append(pixels)
                image_places.append(len(columns["id"]))
            _append(columns, row, row.id, "image", row.texts[0] if row.texts else None, error)
        if "text" in modalities:
            for number, text in enumerate(row.texts):
                texts.append(text)
                text_places.append(len(columns["id"]))
                _append(columns, row, f"{row.id}#{number}" if several_texts else row.id, "text", text, None)
            if not row.texts and "image" not in modalities:
                _append(columns, row, f"{row.id}#0" if several_texts else row.id, "text", None, "no text")
    embeddings = torch.zeros(len(columns["id"]), embedder.dimension)
    if images:
        embeddings[image_places] = embed_pixels(torch.cat(images), embedder)
    if texts:
        embeddings[text_places] = embedder.embed_texts(texts)
    return to_table(columns, embeddings, schema)


def read_pixels(value: Any, image_processor: Any) -> tuple[torch.Tensor | None, str | None]:
    """An encoded image as (1, channels, height, width) pixels for `embed_pixels`, or the reason why there are none."""
    try:
        return to_pixels([decode_image(value)], image_processor), None
    except UnidentifiedImageError:  # whose text names an object in memory
        return None, "not an image that Pillow can read"
    except Exception as error:  # Pillow's decoders raise nearly anything
        return None, first_line(error)


def embed_pixels(pixels: torch.Tensor, embedder: Embedder) -> torch.Tensor:
    """(images, channels, height, width) uint8, or float32 pixel values → (images, dimension) float32."""
    scale = pixel_scale(embedder.processor.image_processor)
    return embedder.embed_pixel_values(scale(pixels) if pixels.dtype == torch.uint8 else pixels)


def _append(columns: dict[str, list], row: SourceRow, id: str, modality: str, text: str | None, error: str | None):
    values = row.metadata | {"id": id, "modality": modality, "uri": row.uri, "text": text, "error": error}
    for name, column in columns.items():
        column.append(values[name])


__all__ = ["embed_pixels", "embed_rows", "read_pixels"]
