"""Augmentation as data: a recipe lists what happens to the examples of a batch, and in which order.

    augmentations:
      - {name: random_crop, scale: [0.7, 1.0]}
      - {name: "mome.icons.compose:compose_icons", scene_share: 0.15}

An augmentation takes the examples of a batch and a random generator, and returns as many examples. An example is a
dict with `image` (PIL image, or uint8 array (height, width, 3)), `text` (the one drawn for this epoch) and the other
columns of its row. It may change the text along with the image, so that a caption stays true, and may look at the
other examples of the batch. An example with `captioned: False` has a text to be found by that is no caption to learn.
The same generator gives the same examples.
"""

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from ..configuration_mome import did_you_mean, quoted
from ..errors import DataError, first_line
from ..processing_mome import load_rgb_image

Example = dict[str, Any]
Augmentation = Callable[[list[Example], np.random.Generator], list[Example]]

SIDES = re.compile(r"\b(left|right)(?:most|ward|wards)?\b", re.IGNORECASE)


def _on_images(change: Callable[..., Image.Image], examples: list[Example], rng, **keywords) -> list[Example]:
    return [each | {"image": change(load_rgb_image(each["image"]), rng, **keywords)} for each in examples]


def random_crop(
    examples: list[Example],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.8, 1.0),
    ratio: tuple[float, float] = (0.8, 1.25),
) -> list[Example]:
    """A part of the image with an area of `scale` and a change of aspect of `ratio`, both as shares of the whole."""

    def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        area, aspect = rng.uniform(*scale), math.exp(rng.uniform(*np.log(ratio)))
        width = min(max(round(image.width * math.sqrt(area * aspect)), 1), image.width)
        height = min(max(round(image.height * math.sqrt(area / aspect)), 1), image.height)
        left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        return image.crop((left, top, left + width, top + height))

    return _on_images(crop, examples, rng)


def colour_jitter(
    examples: list[Example],
    rng: np.random.Generator,
    *,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
) -> list[Example]:
    """Each of the three is multiplied by a factor of 1 ± its strength."""

    def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        strengths = ((ImageEnhance.Brightness, brightness), (ImageEnhance.Contrast, contrast))
        for enhance, strength in (*strengths, (ImageEnhance.Color, saturation)):
            image = enhance(image).enhance(1 + rng.uniform(-strength, strength))
        return image

    return _on_images(jitter, examples, rng)


def horizontal_flip(examples: list[Example], rng: np.random.Generator, *, share: float = 0.5) -> list[Example]:
    """Mirrors a share of the images, except where the text says left or right."""
    flipped = []
    for each in examples:
        draw = rng.random()  # drawn for every example, so that a text does not shift the others' luck
        if draw < share and not SIDES.search(each["text"]):
            image = load_rgb_image(each["image"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            each = each | {"image": image}
        flipped.append(each)
    return flipped


def text_template(
    examples: list[Example], rng: np.random.Generator, *, templates: list[str], share: float = 0.5
) -> list[Example]:
    """Puts a share of the texts into a template drawn from `templates`, each with `{}` where the text goes."""
    for template in templates:
        if "{}" not in template:
            raise DataError(f"template {quoted(template)} has no {{}} for the text")
    draws, chosen = rng.random(len(examples)), rng.integers(len(templates), size=len(examples))
    return [
        each | {"text": templates[index].replace("{}", each["text"])} if draw < share else each
        for each, draw, index in zip(examples, draws, chosen)
    ]


AUGMENTATIONS: dict[str, Callable[..., list[Example]]] = {
    each.__name__: each for each in (colour_jitter, horizontal_flip, random_crop, text_template)
}


def build_augmentations(entries: list[dict[str, Any]]) -> list[Augmentation]:
    """The functions that a recipe's entries name, with their keywords bound.

    Raises:
        DataError: an unknown name or keyword.
    """
    return [_build(dict(entry)) for entry in entries]


def _build(entry: dict[str, Any]) -> Augmentation:
    if "name" not in entry:
        raise DataError(f"augmentation {entry} has no name")
    name = entry.pop("name")
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise DataError(f"augmentation {quoted(name)} can't be loaded: {first_line(error)}") from None
    elif name in AUGMENTATIONS:
        function = AUGMENTATIONS[name]
    else:
        hint = did_you_mean(name, AUGMENTATIONS, f"there are {', '.join(AUGMENTATIONS)} and module:function")
        raise DataError(f"unknown augmentation {quoted(name)}: {hint}")
    try:
        inspect.signature(function).bind([], None, **entry)
    except TypeError as error:
        raise DataError(f"augmentation {quoted(name)}: {first_line(error)}") from None
    return functools.partial(function, **entry)
