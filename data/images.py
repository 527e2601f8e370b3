"""Images to pixels: decoded, resized to what the model takes, and kept as 8-bit integers until it takes them."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..pictures_mome import (
    AVIF_SUFFIXES,
    HEIF_SUFFIXES,
    INSTALL_AVIF,
    INSTALL_HEIF,
    can_open_avif,
    can_open_heif,
    load_rgb_image,
    open_picture,
    trim_margins,
)
from ..svg_mome import INSTALL_RESVG, SVG_SUFFIXES, can_render_svg

NOT_PICTURES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"}  # Pillow lists them, but can't read them


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that may be read as pictures, in lower case, each with its dot."""
    Image.init()
    suffixes = set(Image.registered_extensions()) - NOT_PICTURES
    for kinds, usable, _ in optional_kinds():
        suffixes = suffixes | set(kinds) if usable else suffixes - set(kinds)
    return frozenset(suffixes)


def optional_kinds() -> list[tuple[tuple[str, ...], bool, str]]:
    """Kinds of pictures that need more than Pillow: suffixes, whether they can be read, and what would read them."""
    return [
        (SVG_SUFFIXES, can_render_svg(), INSTALL_RESVG),
        (HEIF_SUFFIXES, can_open_heif(), INSTALL_HEIF),
        (AVIF_SUFFIXES, can_open_avif(), INSTALL_AVIF),
    ]


def images_below(folder: Path) -> list[str]:
    """Paths of all images in a folder and below, sorted, without what is hidden."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if os.path.splitext(path)[1].lower() in image_suffixes())


def is_empty(value: Any) -> bool:
    """Whether a row has no image."""
    return value is None or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None)


def decode_image(value: Any) -> Image.Image:
    """An image that `datasets` holds (`{"bytes": ..., "path": ...}`), or any other, of its own mode, fully read.

    Raises:
        ValueError: there is no image, or none that Pillow can read.
    """
    if isinstance(value, Image.Image):
        return value
    if is_empty(value):
        raise ValueError("no image")
    try:
        image = open_picture(value)
    except UnidentifiedImageError:  # whose text names an object in memory
        raise ValueError("not an image that Pillow can read") from None
    image.load()
    return image


def read_image(value: Any, name: str = "image") -> Image.Image:
    """An image as `load_rgb_image` takes it, as upright 8-bit RGB; of a row without one an error says so.

    Raises:
        ValueError: the image can't be used; one line with `name` and the reason.
    """
    if is_empty(value):
        raise ValueError(f"{name}: no image")
    return load_rgb_image(value, name)


@dataclass(frozen=True)
class PixelScale:
    """What an image processor does to 8-bit pixels: (pixels · rescale_factor − mean) / std."""

    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(images, channels, height, width) uint8 → float32."""
        mean, std = (torch.tensor(each, device=pixels.device).view(-1, 1, 1) for each in (self.mean, self.std))
        return (pixels.float() * self.rescale_factor - mean) / std

    def for_shares(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """The same for pixels as shares of 255, in 0…1, of any floating type; `mean` and `std` are copied once."""
        mean, std = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (self.mean, self.std))
        weight, bias = 255 * self.rescale_factor / std, -mean / std
        return lambda pixels: torch.addcmul(bias.to(pixels.dtype), pixels, weight.to(pixels.dtype))


def pixel_scale(image_processor: Any) -> PixelScale | None:
    """For a processor that only resizes to one size, rescales and normalises; `None` for any other."""
    plain = image_processor.do_resize and image_processor.do_rescale and image_processor.do_normalize
    if not plain or getattr(image_processor, "do_center_crop", False) or _side(image_processor) is None:
        return None
    return PixelScale(
        image_processor.rescale_factor, tuple(image_processor.image_mean), tuple(image_processor.image_std)
    )


def _side(image_processor: Any) -> tuple[int, int] | None:
    size = image_processor.size
    get = size.get if isinstance(size, dict) else lambda key: getattr(size, key, None)
    return (get("height"), get("width")) if get("height") and get("width") else None


def to_pixels(images: list[Any], image_processor: Any) -> torch.Tensor:
    """Images as `image_processor` would have them, kept as uint8 where `PixelScale` can do the rest.

    Args:
        images: PIL images of any mode, or RGB uint8 arrays (height, width, 3).

    Returns:
        (images, 3, height, width) uint8, or float32 pixel values.
    """
    if pixel_scale(image_processor) is None:
        rgb = [load_rgb_image(each) for each in images]
        process = getattr(image_processor, "process", image_processor)  # without a warning for every batch
        return process(rgb, return_tensors="pt")["pixel_values"]
    height, width = _side(image_processor)
    margin = getattr(image_processor, "trim_to_margin", None)
    arrays = []
    for each in images:
        ready = isinstance(each, np.ndarray) and each.shape == (height, width, 3) and each.dtype == np.uint8
        if not ready or margin is not None:
            each = load_rgb_image(each)
            if margin is not None:
                each = trim_margins(each, margin)
            if each.size != (width, height):
                each = each.resize((width, height), resample=image_processor.resample)
        arrays.append(np.asarray(each))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def to_pixel_values(images: list[Any], image_processor: Any) -> torch.Tensor:
    """As `to_pixels`, (images, 3, height, width) float32 in any case."""
    pixels = to_pixels(images, image_processor)
    return pixel_scale(image_processor)(pixels) if pixels.dtype == torch.uint8 else pixels
