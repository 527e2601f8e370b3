"""Pictures of any kind to pixels: opened, made upright 8-bit RGB, freed of wide margins, scaled for the model.

    path, URL, bytes, file, data URI, dict, array, PIL, SVG ── open_picture ── load_rgb_image ── upright RGB
                                                                transparent: on the background that its ink needs
    upright RGB ── trim_margins ── resize, rescale, normalise (MomeImageProcessor) ── pixel_values

- dark ink on transparency is laid over white, light ink over black: white icons would vanish on white;
- a picture of one single colour is reported, once a call: mostly its transparency was lost on the way;
- what cannot be used is refused in one line that names the value.
"""

import base64
import binascii
import io
import os
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from .configuration_mome import quoted, shortened
from .inputs_mome import pictures_of
from .svg_mome import SVG_SIDE, looks_like_svg, render_svg

logger = logging.get_logger(__name__)

URL_TIMEOUT_SECONDS = 30
HEAD_BYTES, LONGEST_HEAD = 1024, 2**20  # of a file that is looked at before it is opened
LEAST_CONTRAST = 3.0  # of graphics with their background: WCAG 2.2, success criterion 1.4.11
INK_SIDE = 256  # pixels at which ink is looked at
SAME_COLOUR = 16  # two 8-bit values that differ by no more are the same margin: JPEG is not exact
# A picture fills its canvas if it takes this share of the side: half of the side and less is a margin. Size has a
# meaning too ("star small" beside "star medium"): on a canvas that need not be scaled down, margins cost no pixel, and
# only a picture of less than the second share is enlarged.
FILLED, FILLED_SMALL = 0.55, 0.4

HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
AVIF_SUFFIXES = (".avif", ".avifs")
INSTALL_HEIF = "HEIC needs pillow-heif: pip install pillow-heif"
INSTALL_AVIF = "AVIF needs a Pillow that was built with it: pip install --upgrade pillow"


# ---------------------------------------------------------------------------------------------------- opening


def can_open_heif() -> bool:
    """Whether HEIC files can be opened; registers pillow-heif with Pillow where it is installed."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return False
        register_heif_opener()
    return True


def can_open_avif() -> bool:
    """Whether Pillow, or a plugin that is registered with it, opens AVIF files."""
    Image.init()
    own = sys.modules.get("PIL.AvifImagePlugin")  # there since Pillow 11.3, whether it was built with AVIF or not
    return "pillow_avif" in sys.modules or ("AVIF" in Image.OPEN and getattr(own, "SUPPORTED", True))


def open_picture(source: Any, svg_side: int = SVG_SIDE) -> Image.Image:
    """Opens a picture of any kind, as `load_rgb_image` takes it, in its own mode.

    Raises:
        FileNotFoundError, UnidentifiedImageError, ValueError, OSError: the picture can't be used.
    """
    if isinstance(source, dict):
        source = _of_dict(source)
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _image_from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), svg_side)
    if isinstance(source, str):
        return _from_text(source, svg_side)
    if isinstance(source, os.PathLike):
        return _from_file(source, svg_side)
    if hasattr(source, "read"):
        return _from_text(data, svg_side) if isinstance(data := _read(source), str) else _from_bytes(data, svg_side)
    if hasattr(source, "__array__"):
        return _image_from_array(np.asarray(source))
    raise ValueError("pass a path, URL, bytes, open file, data URI, PIL image, numpy array or torch tensor")


def _of_dict(source: dict) -> Any:
    """What a dict of `datasets` holds, `{"bytes": ..., "path": ...}`, a row or a message."""
    for key in ("bytes", "path", "image", "url"):
        if (found := source.get(key)) is not None:
            return _of_dict(found) if isinstance(found, dict) else found
    raise ValueError("no image: a dict needs 'bytes', 'path', 'image' or 'url'")


def _read(file: Any) -> bytes | str:
    """The rest of an open file, or all of one that was read to its end or just written."""
    data = file.read()
    if not data and hasattr(file, "seek"):
        file.seek(0)
        data = file.read()
    return data


def _from_text(text: str, svg_side: int) -> Image.Image:
    start = text[:16].lower()
    if start.startswith(("http://", "https://")):
        response = get_session().get(text, follow_redirects=True, timeout=URL_TIMEOUT_SECONDS)
        return _from_bytes(response.raise_for_status().content, svg_side)
    if start.startswith("data:"):
        return _from_bytes(_of_data_uri(text), svg_side)
    if start.startswith("file://"):
        return _from_file(urllib.request.url2pathname(urllib.parse.urlsplit(text).path), svg_side)
    if text.lstrip("\ufeff \t\r\n").startswith("<"):
        return render_svg(text.lstrip("\ufeff \t\r\n"), svg_side)
    try:
        return _from_file(text, svg_side)
    except (OSError, ValueError) as error:
        if isinstance(error, UnidentifiedImageError) or os.path.exists(text[:4096].replace("\0", "")):
            raise
    try:  # no file: perhaps base64 alone, as transformers' load_image takes it
        return _from_bytes(_of_base64(text), svg_side)
    except (ValueError, OSError):
        raise FileNotFoundError from None


def _of_data_uri(uri: str) -> bytes:
    header, comma, content = uri.partition(",")
    if not comma:
        raise ValueError("a data URI without a comma")
    if header.lower().rstrip().endswith(";base64"):
        return _of_base64(urllib.parse.unquote(content))
    return urllib.parse.unquote_to_bytes(content)


def _of_base64(text: str) -> bytes:
    text = re.sub(r"\s+", "", text).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("broken base64") from None


def _from_bytes(data: bytes, svg_side: int) -> Image.Image:
    if data[:1] in (b"<", b" ", b"\n", b"\r", b"\t", b"\xef", b"\xff", b"\xfe", b"\x1f") and looks_like_svg(
        data[:LONGEST_HEAD]
    ):
        return render_svg(data, svg_side)
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        return _with_plugin(data)


def _from_file(path: str | os.PathLike, svg_side: int) -> Image.Image:
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        if head[:2] == b"\x1f\x8b" or head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0")[:1] == b"<":
            return _from_bytes(head + file.read(LONGEST_HEAD * 16), svg_side)
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            return _with_plugin(file.read())


def _with_plugin(data: bytes) -> Image.Image:
    """A picture that Pillow does not know: HEIC, if its plugin is installed."""
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        if not can_open_heif():
            raise ValueError(INSTALL_HEIF)
        return Image.open(io.BytesIO(data))
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        raise ValueError(INSTALL_AVIF)
    raise UnidentifiedImageError


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Pixel values of any range as 0…255: floats and integers wider than 8 bits are scaled, never clipped."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "biufO":
        raise ValueError(f"pixel values of type {values.dtype}: pass integers 0 to 255 or floats 0 to 1")
    values, kind, bits = values.astype(np.float64), values.dtype.kind, 8 * values.dtype.itemsize
    ceilings = {"b": [1], "f": [1, 2**8 - 1, 2**16 - 1]}.get(kind, [2**8 - 1, 2**16 - 1, 2**31 - 1])
    if kind == "u" and bits == 16:
        ceilings = [2**16 - 1]  # the type tells the range, even if the picture is dark
    ceiling = next((ceiling for ceiling in ceilings if values.max() <= ceiling), None)
    if ceiling is None or not values.min() >= 0:  # `not >=` also catches NaN
        raise ValueError(
            f"pixel values from {values.min():g} to {values.max():g}: pass integers 0 to 255 or floats 0 to 1"
        )
    return (values * (255 / ceiling)).round().astype(np.uint8)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _image_from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    axes = (2, 0)  # where both ends could be the channels, numpy has them last and torch first
    if isinstance(array, torch.Tensor):
        axes = (0, 2)
        array = _as_numpy(array)
    readings = [(axis, counts) for counts in ((3, 4), (1,)) for axis in axes]
    axis = next((axis for axis, counts in readings if array.ndim == 3 and array.shape[axis] in counts), None)
    if array.size == 0 or (axis is None and array.ndim != 2):
        raise ValueError(
            f"shape {array.shape} is no picture: pass (height, width) or 1, 3 or 4 channels, first or last"
        )
    if axis is not None:
        array = np.moveaxis(array, axis, 2)
        array = array[:, :, 0] if array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array)))


# ------------------------------------------------------------------------------------------------------ to RGB


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # before the EXIF look-up, so that a truncated file is reported and not taken for broken EXIF
    if 0 in image.size:
        raise ValueError("{} × {} pixels: there is nothing to see".format(*image.size))
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF raises nearly anything; the pixels are still good
        pass
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values, clear = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(_to_uint8(values))
        if isinstance(clear, int) and (values == clear).any():
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.mode == "La":  # which becomes no other mode directly
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            return Image.alpha_composite(Image.new("RGBA", image.size, background_of(image)), image).convert("RGB")
    return image.convert("RGB")


def background_of(image: Image.Image) -> str:
    """The background that the ink of a transparent picture needs: "white", or "black" for light ink.

    Ink counts by its opacity, and where it borders on transparency, since there it is seen or not: a white egg with a
    black outline is as good on white. On white stays what has a contrast of at least 3 for the most part; below that
    black has the better one, 7 or more.

    Args:
        image: of mode RGBA.
    """
    factor = max(1, max(image.size) // INK_SIDE)
    pixels = np.asarray(image.convert("RGBa").reduce(factor), dtype=np.float32) / 255  # colours times opacity
    opacity = pixels[..., 3]
    if opacity.max() == 0:
        return "white"
    ink = opacity >= opacity.max() / 2
    clear = np.pad(~ink, 1)
    border = ink & (clear[:-2, 1:-1] | clear[2:, 1:-1] | clear[1:-1, :-2] | clear[1:-1, 2:])
    chosen = border if border.any() else ink
    weights = opacity[chosen]
    contrast = 1.05 / (_luminance(pixels[chosen][:, :3] / weights[:, None]) + 0.05)  # with white, as WCAG 2.2 has it
    return "white" if weights[contrast >= LEAST_CONTRAST].sum() >= weights.sum() / 2 else "black"


def _luminance(colours: np.ndarray) -> np.ndarray:
    """Relative luminance (colours,) of sRGB colours (colours, 3) in 0…1, as WCAG 2.2 defines it."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((np.clip(colours, 0, 1) + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


def load_rgb_image(image: Any, name: str = "image", svg_side: int = SVG_SIDE) -> Image.Image:
    """Reads one image and makes it upright 8-bit RGB.

    EXIF orientation is applied, transparency laid over white, or over black where the ink is light, 16-bit and float
    pixels scaled to 8 bits; of an animated file the first frame is taken.

    Args:
        image: path, http(s) URL, bytes, open file, data URI, base64, SVG as text, a dict with `bytes` or `path` as
            `datasets` has them or with `image` or `url`, PIL image of any mode, or an array or tensor of integers or
            of floats 0…1, of shape (height, width), (height, width, channels) or (channels, height, width) with 1, 3
            or 4 channels.
        name: what error messages call the image.
        svg_side: pixels of the larger side of an SVG drawing.

    Raises:
        ValueError: the image cannot be used; one line with `name`, the file and the reason.
    """
    try:
        return _to_rgb(open_picture(image, svg_side))
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        reason = "not an image that Pillow can read"
    except Exception as error:  # Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        reason = reason.splitlines()[0]
    source = image.get("path") if isinstance(image, dict) else image
    source = source if isinstance(source, (str, os.PathLike)) else getattr(source, "filename", None)
    if isinstance(source, (str, os.PathLike)) and source:
        name = f"{name} ({quoted(source)})"
    elif not isinstance(image, dict):
        name = f"{name} ({type(image)})"
    raise ValueError(f"{name}: {shortened(reason, 200)}")


def given_images(images: Any) -> Any:
    """Several images in whatever form `pictures_of` takes them as a list; a single one, or a 4-d array, as it is."""
    several = None if getattr(images, "ndim", None) == 4 else pictures_of(images)
    return images if several is None else list(several)


def load_images(images: Any, svg_side: int = SVG_SIDE) -> list[Image.Image]:
    """One image or several, as `load_rgb_image` takes them.

    Args:
        images: an image; several in a list, a data set, a column of one, an array of paths or a generator; or a batch
            as a 4-d array or tensor, whose values have one range.

    Raises:
        ValueError: there is none, or one that cannot be used, with its number.
    """
    images = given_images(images)
    if not isinstance(images, list) and getattr(images, "ndim", None) != 4:
        return [load_rgb_image(images, svg_side=svg_side)]
    if len(images) == 0:
        raise ValueError("images is empty: pass at least one image")
    if not isinstance(images, list):
        images = _scaled_batch(images)
    return [load_rgb_image(image, f"images[{index}]", svg_side) for index, image in enumerate(images)]


def _scaled_batch(images: np.ndarray | torch.Tensor) -> Iterable:
    """A batch as 8-bit integers by the range of all its values: a dark picture alone could be taken for shares."""
    if not isinstance(images, torch.Tensor):
        return _to_uint8(np.asarray(images))
    return torch.from_numpy(_to_uint8(_as_numpy(images)))


# ----------------------------------------------------------------------------------------------------- margins


def trim_margins(image: Image.Image, margin: float, side: int = 0) -> Image.Image:
    """Without its wide margins of one colour: what is left, centred on a square of that colour.

    A picture that fills its square canvas, or whose corners have different colours, is returned as it is: to resample
    it for little would blur it.

    Args:
        image: of mode RGB.
        margin: width of the new margin, as a share of the larger side of what is in the picture.
        side: pixels of a side that the model sees; 0: fewer than the canvas has.
    """
    width, height = image.size
    colour = image.getpixel((0, 0))
    corners = [image.getpixel(place) for place in ((width - 1, 0), (0, height - 1), (width - 1, height - 1))]
    if any(abs(value - own) > SAME_COLOUR for corner in corners for value, own in zip(corner, colour)):
        return image
    boxes = []
    for band, own in zip(image.split(), colour):
        differs = band.point([255 * (abs(value - own) > SAME_COLOUR) for value in range(256)])
        boxes.append(differs.getbbox())
    boxes = [box for box in boxes if box]
    if not boxes or (0, 0, width, height) in boxes:
        return image
    left, top = (min(box[side] for box in boxes) for side in (0, 1))
    right, bottom = (max(box[side] for box in boxes) for side in (2, 3))
    larger = max(right - left, bottom - top)
    filled = (FILLED if width > side else FILLED_SMALL) * width
    if (right - left, bottom - top) == image.size or (width == height and larger >= filled):
        return image
    side = larger + 2 * max(1, round(margin * larger))
    square = Image.new("RGB", (side, side), colour)
    square.paste(image.crop((left, top, right, bottom)), ((side - (right - left)) // 2, (side - (bottom - top)) // 2))
    return square


# ------------------------------------------------------------------------------------------------------- blank


def count_blank(pictures: Iterable[Any]) -> int:
    """How many pictures, arrays or tensors (channels, height, width), have one single colour."""
    if not isinstance(pictures, torch.Tensor):
        return sum(count_blank(torch.from_numpy(np.asarray(each))[None]) for each in pictures)
    values = pictures.flatten(2)
    return int((values.amax(dim=2) == values.amin(dim=2)).all(dim=1).sum())


def warn_of_blank(count: int, name: str = "picture"):
    """One warning for all pictures of one single colour in a call."""
    if count:
        them = f"a {name} is" if count == 1 else f"{count:,} {name}s are"
        lost = "is its transparency lost?" if count == 1 else "is their transparency lost?"
        logger.warning(f"{them} blank, of one single colour: {lost}")


# -------------------------------------------------------------------------------------------- image processor


class MomeImagesKwargs(ImagesKwargs, total=False):
    """Options of `MomeImageProcessor` beside those that all image processors have.

    trim_to_margin (`float` or `int`, *optional*):
        Trim margins of one colour until they have this share of what is left; `None` keeps pictures as they are.
    """

    trim_to_margin: float | int | None


class MomeImageProcessor(PilBackend):
    """Pictures of any kind to `pixel_values`, by CLIP's steps: resize, crop, rescale, normalise.

    Args:
        trim_to_margin: trim margins of one colour to this share of what they surround, in 0…1; `None` keeps them. See
            `trim_margins`.
        kwargs: those of transformers' image processors: `size`, `resample`, `image_mean`, `image_std`, ...
    """

    valid_kwargs = MomeImagesKwargs
    model_input_names = ["pixel_values"]

    resample = Image.Resampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 224, "width": 224}
    crop_size = {"height": 224, "width": 224}
    default_to_square = False
    do_resize = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    trim_to_margin = None

    def __init__(self, **kwargs: Unpack[MomeImagesKwargs]):
        super().__init__(**kwargs)
        _check_margin(self.trim_to_margin)

    @classmethod
    def like(cls, image_processor: Any) -> "MomeImageProcessor":
        """One with the settings of CLIP's."""
        settings = image_processor.to_dict()
        return cls(**{key: value for key, value in settings.items() if key != "image_processor_type"})

    @property
    def svg_side(self) -> int:
        """Pixels of the larger side at which SVG drawings are rendered: enough for the model's size."""
        return max(SVG_SIDE, 2 * self.seen_side())

    def seen_side(self, size: Any = None) -> int:
        """Pixels of the larger side that the model sees, by this or its own `size`."""
        sizes = {"side": size} if isinstance(size, int) else dict(size or self.size)
        return max((side for side in sizes.values() if isinstance(side, int)), default=0)

    def fetch_images(self, images: Any) -> Any:
        """Pictures are opened by `preprocess`."""
        return images

    def preprocess(self, images: Any, *args, **kwargs: Unpack[MomeImagesKwargs]) -> BatchFeature:
        """Pictures to pixel values.

        Args:
            images: one image or several, as `load_images` takes them.
            kwargs: settings for this call. With `do_rescale=False` values keep the scale that they come in: floats
                0…1 stay such.

        Returns:
            `pixel_values` (images, channels, height, width) float32.

        Raises:
            ValueError: an image that cannot be read; 8-bit values that would be normalised without being rescaled.
        """
        inputs = self.process(images, *args, **kwargs)
        warn_of_blank(count_blank(inputs["pixel_values"]))
        return inputs

    def process(self, images: Any, *args, **kwargs: Unpack[MomeImagesKwargs]) -> BatchFeature:
        """As `preprocess`, without a warning: for those who count over many calls."""
        margin = kwargs.get("trim_to_margin", self.trim_to_margin)
        _check_margin(margin)
        images = given_images(images)
        kwargs |= rescaling(self, images, kwargs)
        pictures = load_images(images, self.svg_side)
        if margin is not None:
            pictures = [trim_margins(each, margin, self.seen_side(kwargs.get("size"))) for each in pictures]
        return super().preprocess(pictures, *args, **kwargs)


def _check_margin(margin: Any):
    number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if margin is not None and not (number and 0 <= margin < 1):
        raise ValueError(f"trim_to_margin={quoted(margin)} must be a number from 0 to below 1, or None")


def rescaling(image_processor: Any, images: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What `do_rescale=False` means for images that are made 8-bit RGB first: options that keep their scale.

    Args:
        image_processor: whose settings hold where `options` has none.
        images: as they were given.
        options: of this call.

    Raises:
        ValueError: 8-bit values that would be normalised as if they were in 0…1.
    """

    def setting(name: str) -> Any:
        value = options.get(name)
        return getattr(image_processor, name, None) if value is None else value

    if setting("do_rescale") is not False:
        return {}
    several = isinstance(images, (list, tuple))
    shares = {_is_of_shares(image) for image in (images if several else [images])}
    mean = setting("image_mean")
    of_shares = max(mean if isinstance(mean, (list, tuple)) else [mean or 0]) <= 1
    if shares == {True} and (of_shares or not setting("do_normalize")):
        return {"do_rescale": True, "rescale_factor": 1 / 255}
    if len(shares) > 1:
        raise ValueError("do_rescale=False for images of different scales: pass floats 0 to 1, all of them")
    if setting("do_normalize") and of_shares:
        raise ValueError("do_rescale=False, but the images have values up to 255: leave it out, or pass floats 0 to 1")
    return {}


def _is_of_shares(image: Any) -> bool:
    """Whether an image is an array or tensor of floats in 0…1."""
    if isinstance(image, torch.Tensor):
        return image.is_floating_point() and image.numel() > 0 and bool(image.max() <= 1)
    return isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.size > 0 and bool(image.max() <= 1)


# `save_pretrained` then copies this module and writes its `auto_map`, whether it was imported or loaded from the Hub.
MomeImageProcessor.register_for_auto_class()

__all__ = [
    "AVIF_SUFFIXES",
    "HEIF_SUFFIXES",
    "INSTALL_AVIF",
    "INSTALL_HEIF",
    "MomeImageProcessor",
    "background_of",
    "can_open_avif",
    "can_open_heif",
    "count_blank",
    "given_images",
    "load_images",
    "load_rgb_image",
    "open_picture",
    "rescaling",
    "trim_margins",
    "warn_of_blank",
]
