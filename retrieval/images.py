"""The images of a table again, by their URIs."""

import functools
import tarfile
from pathlib import Path

from PIL import Image

from ..data.images import read_image
from ..errors import RetrievalError, first_line
from ..processing_mome import load_rgb_image
from .reading import READING_ERRORS
from .sources import Source, open_source


def open_image(uri: str) -> Image.Image:
    """The image at a URI of a table, upright 8-bit RGB: a file, a URL, a member of a tar file, a row of a data set.

    Raises:
        ValueError: nothing there, or no image.
    """
    place, separator, inside = uri.rpartition("#")
    if not separator or Path(uri).is_file() or uri.startswith(("http://", "https://")):
        return load_rgb_image(uri)
    try:
        if place.endswith(".tar"):
            with tarfile.open(place) as archive:
                value = {"bytes": archive.extractfile(inside).read()}
        else:
            split, number = inside.rsplit(":", 1)
            source = _opened(place, split)
            value = source.data[int(number)][source.image_column]
        return read_image(value, uri)
    except (KeyError, IndexError, AttributeError, TypeError, *READING_ERRORS) as error:
        raise RetrievalError(f"image {uri!r} can't be read: {first_line(error)}") from None


@functools.lru_cache(maxsize=4)
def _opened(name: str, split: str) -> Source:
    return open_source(name, split)


__all__ = ["open_image"]
