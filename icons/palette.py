"""Colours that have a name: drawn from the middle of what the name means, so that a caption that says it is true."""

import numpy as np

# Name -> hue in degrees, saturation, value: lowest and highest. Between the ranges lie the colours without a name.
RANGES = {
    "black": ((0, 360), (0.0, 0.4), (0.0, 0.14)),
    "white": ((0, 360), (0.0, 0.06), (0.94, 1.0)),
    "gray": ((0, 360), (0.0, 0.1), (0.38, 0.72)),
    "red": ((348, 368), (0.68, 1.0), (0.6, 1.0)),
    "orange": ((22, 36), (0.72, 1.0), (0.85, 1.0)),
    "brown": ((18, 32), (0.5, 0.8), (0.3, 0.55)),
    "yellow": ((47, 60), (0.6, 1.0), (0.85, 1.0)),
    "green": ((95, 145), (0.5, 1.0), (0.4, 0.85)),
    "teal": ((172, 184), (0.6, 1.0), (0.4, 0.7)),
    "blue": ((208, 240), (0.6, 1.0), (0.5, 1.0)),
    "purple": ((266, 286), (0.45, 0.9), (0.45, 0.9)),
    "pink": ((318, 340), (0.3, 0.65), (0.88, 1.0)),
}
NAMES = tuple(RANGES)
CHROMATIC = tuple(NAMES.index(name) for name in NAMES if name not in ("black", "white", "gray"))
_LOW = np.array([[bound[0] for bound in RANGES[name]] for name in NAMES], np.float32)
_HIGH = np.array([[bound[1] for bound in RANGES[name]] for name in NAMES], np.float32)


def sample_colours(names: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws one colour for each index into NAMES.

    Args:
        names: int, (count,).
        rng: source of randomness.

    Returns:
        float32 in [0, 255], (count, 3): red, green, blue.
    """
    draws = rng.random((len(names), 3), dtype=np.float32)
    return hsv_to_rgb(_LOW[names] + draws * (_HIGH[names] - _LOW[names]))


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """Hue (degrees), saturation and value as float32 to red, green and blue in [0, 255], (..., 3) each.

    Smith, "Color gamut transform pairs" (1978), in its form without branches.
    """
    hue, saturation, value = hsv[..., 0:1], hsv[..., 1:2], hsv[..., 2:3]
    shade = (np.array([5.0, 3.0, 1.0], np.float32) + hue / 60) % 6
    return 255 * value * (1 - saturation * np.clip(np.minimum(shade, 4 - shade), 0, 1))


def name_colours(rgb: np.ndarray) -> np.ndarray:
    """Index into NAMES of each colour, -1 for those without a name.

    Args:
        rgb: float32 in [0, 255], (..., 3).
    """
    high, low = rgb.max(axis=-1), rgb.min(axis=-1)
    span = np.maximum(high - low, 1e-6)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(high == red, (green - blue) / span % 6, np.where(high == green, (blue - red) / span + 2, 0))
    hue = 60 * np.where((high != red) & (high != green), (red - green) / span + 4, hue)
    hsv = np.stack([hue, (high - low) / np.maximum(high, 1e-6), high / 255], axis=-1)[..., None, :]
    turned = hsv + np.array([360.0, 0.0, 0.0], np.float32)  # red goes across 360 degrees
    # What rounding to whole numbers moves: the darker a colour, the more its saturation.
    slack = np.stack(np.broadcast_arrays(1.0, 0.01 + 1.5 / np.maximum(high, 1), 0.01), axis=-1)[..., None, :]
    inside = ((hsv >= _LOW - slack) & (hsv <= _HIGH + slack)).all(axis=-1)
    inside |= ((turned >= _LOW - slack) & (turned <= _HIGH + slack)).all(axis=-1)
    return np.where(inside.any(axis=-1), inside.argmax(axis=-1), -1)


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Relative luminance of WCAG 2.2, float32 in [0, 1], (...,), of colours in [0, 255], (..., 3)."""
    linear = (rgb / 255) ** 2.2
    return linear @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def contrast(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Contrast ratio of WCAG 2.2, from 1 to 21, of two arrays of colours, (..., 3)."""
    one, other = luminance(first), luminance(second)
    return (np.maximum(one, other) + 0.05) / (np.minimum(one, other) + 0.05)
