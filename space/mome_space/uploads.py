"""Pictures from visitors: looked at before they are unpacked, refused in words when they can't be used."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from .limits import FILE_BYTES, PICTURES, PIXELS, quoted, refuse

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
LONGEST_SIDE = 1024  # of what is kept of a picture
SNIFFED_BYTES = 1024


Drawing = Callable[[str], Image.Image]  # the path of an SVG file → its picture


def read_picture(upload: dict[str, Any] | str | None, drawing: Drawing, required: bool = True) -> Image.Image | None:
    """An upload as Gradio hands it over unprocessed → a picture in memory, its longer side at most 1,024 pixels.

    Components would open the file themselves, and their errors are not for visitors; the events therefore set
    `preprocess=False`.

    Args:
        drawing: renders an SVG file, whose scripts and links do nothing.

    Raises:
        gr.Error: nothing was uploaded, or what was uploaded is no picture, broken or too large.
    """
    path = upload.get("path") if isinstance(upload, dict) else upload
    if not path:
        if required:
            raise refuse("There is no picture yet: drop one, paste one or choose an example.")
        return None
    name = (upload.get("orig_name") if isinstance(upload, dict) else None) or os.path.basename(path)
    if _check_file(Path(path), quoted(name)):
        return _draw(path, quoted(name), drawing)
    return _decode(path, quoted(name))


def read_pictures(uploads: list[dict[str, Any]] | None, drawing: Drawing) -> list[tuple[str, Image.Image]]:
    """Uploads of a gallery or of a list of files → names and pictures."""
    uploads = uploads or []
    if not uploads:
        raise refuse("There is no picture yet: drop one or several, or choose an example.")
    if len(uploads) > PICTURES:
        raise refuse(f"{len(uploads)} pictures are too many at once: choose at most {PICTURES}.")
    pictures = []
    for upload in uploads:
        if isinstance(upload, dict) and upload.get("video"):
            raise refuse("Videos can't be captioned: choose a PNG, JPEG, WebP, GIF, BMP or SVG picture.")
        file = upload.get("image", upload) if isinstance(upload, dict) else upload
        picture = read_picture(file, drawing)
        named = (file.get("orig_name") or file["path"]) if isinstance(file, dict) else file
        pictures.append((os.path.basename(named), picture))
    return pictures


def _check_file(path: Path, name: str) -> bool:
    """Refuses what is too large or gone; whether it is an SVG drawing."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(SNIFFED_BYTES)
    except OSError:
        raise refuse(f"{name} is no longer on the server: upload it again.") from None
    if size == 0:
        raise refuse(f"{name} is empty: the file has 0 bytes.")
    if size > FILE_BYTES:
        raise refuse(f"{name} has {size / 2**20:.0f} MB, at most {FILE_BYTES // 2**20} MB are taken: make it smaller.")
    packed = path.suffix.lower() == ".svgz" and head[:2] == b"\x1f\x8b"
    return packed or b"<svg" in head.lower() or b"<?xml" in head.lower()


def _draw(path: str, name: str, drawing: Drawing) -> Image.Image:
    try:
        picture = drawing(path)
    except ValueError as error:
        reason = str(error).rpartition("): ")[2] or "it is broken"
        raise refuse(f"{name}, an SVG drawing, can't be drawn: {reason}.") from None
    if all(low == high for low, high in picture.getextrema()):
        raise refuse(f"{name} is an SVG drawing in which nothing can be seen: choose another.")
    return picture


def _decode(path: str, name: str) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > PIXELS:
                raise Image.DecompressionBombError
            image.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))  # a JPEG is unpacked at a fraction of its size
            image.load()
            if max(image.size) > LONGEST_SIDE and image.mode in ("1", "P", "L", "LA", "RGB", "RGBA", "CMYK"):
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
                image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            return image.copy()  # EXIF comes along, so that the processor can turn it upright
    except Image.DecompressionBombError:
        raise refuse(f"{name} has more than {PIXELS // 10**6} million pixels: make it smaller.") from None
    except Image.UnidentifiedImageError:
        raise refuse(f"{name} is no picture that can be read: choose PNG, JPEG, WebP, GIF, BMP or SVG.") from None
    except Exception:  # Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise refuse(f"{name} is broken or cut off: it starts like a picture but can't be unpacked.") from None


# A truncated file is an error for this Space, whatever another library of the process has set.
ImageFile.LOAD_TRUNCATED_IMAGES = False
