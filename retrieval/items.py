"""From rows of a corpus to rows of a table: each image and text is identified, decoded and embedded, or gets a reason
why not.

CorpusRow ── items_of ── Item ── identify ── embed_items ── (items, dimension) ── to_table ── rows of the table

An item is known by its content: a digest of the encoded image, or of the text. A file is not read again while its size
and times are the same; the time of the last change of its inode is one of them, which no program can set, so a file
that is rewritten at the same size and given its old time is read nonetheless. (Windows has no such time.)
"""

import hashlib
import os
import stat
import time
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
from .format import LEADING_COLUMNS

READING = 1  # raise it when the same file or text gives other pixels or tokens: tables then don't mix the two
KEPT_BYTES = 1 << 18  # a larger file is read again when its turn comes: many wait at the same time
SETTLED = 2_000_000_000  # ns without a change before a stamp counts: file systems round times


@dataclass
class Item:
    """An image or a text that becomes a row of the table.

    Attributes:
        id, modality, uri, text, metadata: see `mome.retrieval.table`.
        image: encoded, as `datasets` holds it.
        error: why it can't be embedded; `None` for a good one.
        digest: of the content, 32 hexadecimal digits; `None` until `identify` has seen it.
        stamp: of a file, see `stamp_of`.
    """

    id: str
    modality: str
    uri: str | None = None
    text: str | None = None
    image: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    digest: str | None = None
    stamp: str | None = None


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
    images, image_places, text_places = [], [], []
    for place, item in enumerate(items):
        if item.error is not None:
            continue
        if item.modality == "text":
            text_places.append(place)
            continue
        pixels, item.error = _pixels_of(item, embedder)
        if item.error is None:
            images.append(pixels)
            image_places.append(place)
    embeddings = torch.zeros(len(items), embedder.dimension)
    if images:
        embeddings[image_places] = embed_pixels(torch.cat(images), embedder)
    if text_places:
        _embed_texts([items[place] for place in text_places], text_places, embeddings, embedder, on_cut)
    return embeddings


def _embed_texts(
    items: Sequence[Item],
    places: Sequence[int],
    embeddings: torch.Tensor,
    embedder: Embedder,
    on_cut: Callable[[int], Any] | None,
):
    """Writes embeddings of texts to their places; one without a known word gets an `error`, and keeps its zeros."""
    start = 0
    for inputs in embedder.token_batches([item.text for item in items], on_cut=on_cut):
        rows = inputs["input_ids"].tolist()
        embedded = embedder.embed_tokens(inputs)
        wordless = set(embedder.wordless_rows(rows))
        for number, place in enumerate(places[start : start + len(rows)]):
            if number in wordless:
                items[start + number].error = "no word that the tokenizer knows"
            else:
                embeddings[place] = embedded[number]
        start += len(rows)


def columns_of(items: Sequence[Item], schema: pa.Schema) -> dict[str, list]:
    """The columns of `schema` without the embeddings, for `to_table`; and the errors."""
    plain = {name: [getattr(item, name) for item in items] for name in (*LEADING_COLUMNS, "error")}
    plain |= {"content_digest": [item.digest for item in items], "file_stamp": [item.stamp for item in items]}
    metadata = [name for name in schema.names if name not in plain and name != "embedding"]
    return plain | {name: [item.metadata[name] for item in items] for name in metadata}


def identify(item: Item, digest_of_file: Callable[[str, str | None], str | None] = lambda *_: None):
    """Gives an item its digest; a file that has to be read for that is then held as bytes.

    Args:
        item: one that can't be read gets an `error`.
        digest_of_file: URI and stamp of a file → its digest, if that is known.
    """
    if item.error is not None:
        return
    if item.modality == "text":
        item.digest = _digest("text", item.text.encode(errors="surrogatepass"))
        return
    image = item.image if isinstance(item.image, dict) else {}
    data, path = image.get("bytes"), image.get("path")
    if data is None and path is None:
        item.error = "no image"
        return
    try:
        if data is None:
            item.stamp = stamp_of(path)
            item.digest = digest_of_file(item.uri, item.stamp)
            if item.digest is not None:
                return
            with open(path, "rb") as file:
                data = file.read()
            if len(data) <= KEPT_BYTES:
                item.image = {"bytes": data, "path": path}
    except (OSError, ValueError) as error:
        item.error = first_line(error)
        return
    item.digest = _digest("image", data)


def _digest(kind: str, content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16, person=kind.encode()).hexdigest()


def stamp_of(path: str) -> str | None:
    """Size and times of a file; `None` if it changed just now, so that a further change might not show in its times.

    Raises:
        OSError: no such file. ValueError: a pipe, a device or a folder.
    """
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("not a regular file")
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) < SETTLED:
        return None
    return f"{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}"


def _pixels_of(item: Item, embedder: Embedder) -> tuple[torch.Tensor | None, str | None]:
    """`read_pixels` of an item, of the very content that its digest is of."""
    load_bytes(item)
    if item.error is not None:
        return None, item.error
    return read_pixels(item.image, embedder.processor.image_processor)


def load_bytes(item: Item):
    """Reads the file of an image that was identified and is not held as bytes; its `error` says if that failed."""
    if item.digest is None or item.image.get("bytes") is not None:
        return
    try:
        with open(item.image["path"], "rb") as file:
            data = file.read()
    except OSError as error:
        item.error = first_line(error)
        return
    if _digest("image", data) != item.digest:
        item.error = "changed while it was read"
        return
    item.image = {**item.image, "bytes": data}


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


__all__ = [
    "READING",
    "Item",
    "columns_of",
    "embed_items",
    "identify",
    "items_of",
    "load_bytes",
    "read_pixels",
    "stamp_of",
]
