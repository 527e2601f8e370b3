"""Draws training pictures on a device, a batch at a time, by the rules of `compose_icons`.

    rows ─ opacity, colours ─ other lines ─ other colours ─ turn, warp ─ size, place ─ paint ─ noise, erase ─ pictures
                                                                                  └ what a caption may say is true

Nothing here waits for the device: every row takes every way, and `where` keeps what it was drawn for. Scaling
and shifting is a product with two matrices a picture, whose rows are the pixels of the picture and whose columns are
those of the icon; planes lie as (rows, y, channel, x) for it. Pictures are never mirrored: arrows would mean something
else.

Scenes of several icons are not drawn here. What `compose_icons` doesn't do and `Drawing` can ask for: shear and warp,
softer edges, exchanged or grey colours of coloured icons, white on black, noise, an erased box.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .compose import BLACK, FILLED, FIRM, LEFT_OF_INK, MIN_CONTRAST, OUTLINE_SHARE, PLAIN_INK, WHITE
from .palette import CHROMATIC, RANGES
from .tensors import IconTensors, where

LARGEST = 1.12  # sizes are drawn up to here and cut to 1: one picture in four is full
SMALLEST_AT_FIRST, COLOUR_AT_FIRST = 0.8, 0.1  # of pictures that are drawn with no strength
GROUNDS, GROUND_NAMES = (0.52, 0.13, 0.12), (WHITE, -1, BLACK)  # white, a tint without a name, black; else a hue
INKS, INK_NAMES = (0.45, 0.1), (BLACK, WHITE)
UNMIXED = 0.98  # opacity from which on a pixel has the colour of its ink
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue, relative luminance of WCAG 2.2
FLARE = 0.05  # that contrast is taken with
BLACK_AS_FAR_AS_WHITE = math.sqrt((1 + FLARE) * FLARE)  # luminance and flare of what contrasts with both alike


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; shares are of the pictures, in 0…1.

    Args:
        colour: share with colours; the others are black on white.
        inverted: share of those others that are white on black.
        redraw: share of the icons of one colour with thicker or thinner lines, or as the outline of what they fill.
        stretch: largest share of width or height by which an icon is made narrower or lower.
        smallest: size from which on icons are drawn, as a share of the picture.
        turn: share that are turned, by up to `degrees`, and sheared by up to `shear`.
        warp: standard deviation of a smooth warp of half of the pictures, as a share of half the picture.
        soften: share with softer edges.
        recolour: share of the coloured icons whose channels are exchanged; half as many become grey.
        noise: largest standard deviation of noise, which three pictures in ten have.
        erase: share with a box erased.
    """

    colour: float = 1.0
    inverted: float = 0.0
    redraw: float = 0.0
    stretch: float = 0.0
    smallest: float = 0.65
    turn: float = 0.2
    degrees: float = 8.0
    shear: float = 0.0
    warp: float = 0.0
    soften: float = 0.0
    recolour: float = 0.0
    noise: float = 0.0
    erase: float = 0.0

    def eased(self, strength: float | torch.Tensor) -> "Drawing":
        """The same at a strength in 0…1: at 0 plain icons nearly of full size, nearly all black on white.

        With a tensor () on the device of the pictures, so are the fields that it changes, and what is done never
        depends on its value; fields that are 0 stay numbers, and what they stand for is never done.
        """
        names = ("redraw", "stretch", "turn", "warp", "soften", "recolour", "noise", "erase")
        names = [name for name in names if getattr(self, name)]
        return replace(
            self,
            colour=_between(min(COLOUR_AT_FIRST, self.colour), self.colour, strength),
            smallest=_between(max(SMALLEST_AT_FIRST, self.smallest), self.smallest, strength),
            **{name: getattr(self, name) * strength for name in names},
        )


def _between(first: float, last: float, strength: float | torch.Tensor) -> float | torch.Tensor:
    return first + (last - first) * strength


def _is_off(share: float | torch.Tensor) -> bool:
    """A number 0; the host can't look at a tensor without a wait."""
    return not isinstance(share, torch.Tensor) and not share


class Drawn(NamedTuple):
    """Pictures and what may be said of them.

    Attributes:
        pictures: (rows, 3, side, side) float in 0…1.
        ink, ground: (rows,) int64, index into `palette.NAMES`, -1 where no colour may be said.
        style: (rows,) int64, index into `STYLES`, -1 where none may be said.
    """

    pictures: torch.Tensor
    ink: torch.Tensor
    ground: torch.Tensor
    style: torch.Tensor


class _Planes(NamedTuple):
    """`alpha` (rows, side, side) and alpha times colour as `rgb` (rows, side, 3, side), in 0…1; `coloured` (rows,)."""

    alpha: torch.Tensor
    rgb: torch.Tensor
    coloured: torch.Tensor


def _planes(icons: IconTensors, rows: torch.Tensor, dtype: torch.dtype) -> _Planes:
    coloured, place = icons.coloured[rows], icons.place[rows].long()
    if not len(icons.rgba):  # none of the data set has colours
        alpha = icons.alpha[place].to(dtype) / 255
        return _Planes(alpha, alpha.new_zeros(len(rows), icons.side, 3, icons.side), coloured)
    pixels = icons.rgba[where(coloured, place, 0)].permute(0, 1, 3, 2).to(dtype) / 255
    colour_alpha = pixels[:, :, 3]
    rgb = where(coloured[:, None, None, None], pixels[:, :, :3] * colour_alpha[:, :, None], 0)
    if not len(icons.alpha):
        return _Planes(colour_alpha, rgb, coloured)
    plain_alpha = icons.alpha[where(coloured, 0, place)].to(dtype) / 255
    return _Planes(where(coloured[:, None, None], colour_alpha, plain_alpha), rgb, coloured)


def draw_plain(icons: IconTensors, rows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Dark icons on white, coloured ones in their colours on white, full size: (rows, 3, side, side) in 0…1."""
    alpha, rgb, coloured = _planes(icons, rows, dtype)
    ink = where(coloured[:, None, None, None], rgb, alpha[:, :, None] * (PLAIN_INK / 255))
    return (1 - alpha[:, :, None] + ink).permute(0, 2, 1, 3)


def draw(icons: IconTensors, rows: torch.Tensor, options: Drawing, dtype: torch.dtype = torch.float32) -> Drawn:
    """Draws a picture of each row.

    Args:
        icons: the data set.
        rows: (rows,) int64, which icons.
        options: how.
        dtype: of the planes; float16 is fine enough for pixels, and twice as fast on an accelerator.
    """
    planes = _planes(icons, rows, dtype)
    planes, outlined = _redraw(planes, options)
    planes, recoloured = _recolour(planes, options)
    colours = _colours(planes, options)
    # (rows, y, channel, x): red, green, blue, opacity
    pixels = torch.cat([planes.rgb, planes.alpha[:, :, None]], dim=2)
    pixels = _soften(_place(_turn(pixels, options), options), options)
    rgb, alpha = pixels[:, :, :3], pixels[:, :, 3:]
    coloured = planes.coloured[:, None, None, None]
    ground = colours.ground[:, None, :, None].to(dtype)
    ink = where(coloured, rgb, alpha * colours.ink[:, None, :, None].to(dtype))
    pictures = _spoil((ground * (1 - alpha) + ink).permute(0, 2, 1, 3), ground.permute(0, 2, 1, 3), options)
    own_colour = where(recoloured, -1, icons.main_colour[rows].long())
    painted = where(icons.firm[rows] & _is_firm(alpha), colours.ink_name, -1)
    style = where(outlined, -1, icons.style[rows].long())
    said = where(planes.coloured, own_colour, painted)
    return Drawn(pictures.clamp(0, 1), said, colours.ground_name, style)


# ---------------------------------------------------------------------------------------------- lines and shape


def _redraw(planes: _Planes, options: Drawing) -> tuple[_Planes, torch.Tensor]:
    """Other lines for some icons of one colour, as `compose.Icons.redraw`; (rows,) bool, which became outlines."""
    alpha, device = planes.alpha, planes.alpha.device
    if _is_off(options.redraw):
        return planes, torch.zeros(len(alpha), dtype=torch.bool, device=device)
    chance, kind, strength = torch.rand(3, len(alpha), device=device)
    chosen = ~planes.coloured & (chance < options.redraw)
    strength = strength[:, None, None].to(alpha.dtype)
    eroded = _neighbours(alpha, torch.minimum)
    thin = alpha - strength * (alpha - eroded)
    outline = alpha - _neighbours(eroded, torch.minimum)
    thick = alpha + strength * (_neighbours(alpha, torch.maximum) - alpha)
    ink, of_outline, of_thin = (each.sum(dim=(1, 2), dtype=torch.float32) for each in (alpha, outline, thin))
    outlined = chosen & (kind < OUTLINE_SHARE) & (of_outline < FILLED * ink)
    thinner = chosen & ~outlined & (kind < (1 + OUTLINE_SHARE) / 2) & (of_thin > LEFT_OF_INK * ink)
    after = where(outlined[:, None, None], outline, where(thinner[:, None, None], thin, thick))
    return planes._replace(alpha=where(chosen[:, None, None], after, alpha)), outlined


def _neighbours(alpha: torch.Tensor, choose) -> torch.Tensor:
    """The least or greatest of each pixel and the four beside it, (rows, side, side); nothing lies outside."""
    padded = F.pad(alpha, (1, 1, 1, 1))
    across = choose(padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    along = choose(padded[:, :-2, 1:-1], padded[:, 2:, 1:-1])
    return choose(alpha, choose(across, along))


def _turn(pixels: torch.Tensor, options: Drawing) -> torch.Tensor:
    """Turns, shears and warps some of the pictures (rows, side, channels, side)."""
    if _is_off(options.turn) and _is_off(options.warp):
        return pixels
    rows, side, device = len(pixels), pixels.shape[1], pixels.device
    chance, angle, shear = torch.rand(3, rows, device=device)
    turned = chance < options.turn
    angle = where(turned, (2 * angle - 1) * math.radians(options.degrees), 0.0)
    shear = where(turned, (2 * shear - 1) * options.shear, 0.0)
    cosine, sine, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([cosine, sine + shear, none, -sine, cosine, none], dim=1).view(rows, 2, 3)
    grid = F.affine_grid(theta, (rows, 1, side, side), align_corners=False)
    if not _is_off(options.warp):
        coarse = torch.randn(rows, 2, 5, 5, device=device) * options.warp
        coarse = where(torch.rand(rows, device=device)[:, None, None, None] < 0.5, coarse, 0.0)
        smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
        grid = grid + smooth.permute(0, 2, 3, 1)
    planes = pixels.permute(0, 2, 1, 3)
    return F.grid_sample(planes, grid.to(planes.dtype), align_corners=False).permute(0, 2, 1, 3)


def _place(pixels: torch.Tensor, options: Drawing) -> torch.Tensor:
    """Draws each icon in some size, somewhere in the picture, as `compose._placements` and `compose._kernel` do."""
    rows, side, channels, _ = pixels.shape
    draws = torch.rand(5, rows, device=pixels.device)
    share = (options.smallest + draws[0] * (LARGEST - options.smallest)).clamp(max=1)
    length = (side * share).floor().clamp(min=4)
    left, top = ((side - length) * draws[1]).floor(), ((side - length) * draws[2]).floor()
    # What is stretched stays in the middle of the square that it had.
    shorter, lower = (length * (1 - options.stretch * draws[3])).floor(), draws[4] < 0.5
    width, height = where(lower, length, shorter), where(lower, shorter, length)
    left, top = left + ((length - width) / 2).floor(), top + ((length - height) / 2).floor()
    kernels = _kernels(torch.cat([top, left]), torch.cat([height, width]), side).to(pixels.dtype)
    down, across = kernels.split(rows)
    moved = down @ pixels.reshape(rows, side, channels * side)  # (rows, side, channels · side)
    moved = moved.reshape(rows, side * channels, side) @ across.transpose(1, 2)
    return moved.view(rows, side, channels, side)


def _kernels(start: torch.Tensor, length: torch.Tensor, side: int) -> torch.Tensor:
    """(rows, side, side): weights that bring an icon's `side` pixels to `length` pixels from `start` on.

    A triangle as wide as a new pixel, or as an old one where an icon keeps its size or grows.
    """
    pixel = torch.arange(side, device=start.device)
    scale = (length / side)[:, None]
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    source = (pixel - start[:, None] + 0.5) / scale - 0.5
    weights = (1 - (source[:, :, None] - pixel).abs() / (1 / scale).clamp(min=1)[:, :, None]).clamp(min=0)
    return weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-6) * inside[:, :, None]


def _soften(pixels: torch.Tensor, options: Drawing) -> torch.Tensor:
    """Mixes some pictures (rows, side, channels, side) with the mean of each pixel and the eight around it."""
    if _is_off(options.soften):
        return pixels
    chance, mix = torch.rand(2, len(pixels), 1, 1, 1, device=pixels.device)
    mix = where(chance < options.soften, 0.6 * mix, 0.0).to(pixels.dtype)
    planes = pixels.permute(0, 2, 1, 3)
    mean = F.avg_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return pixels + mix * (mean.permute(0, 2, 1, 3) - pixels)


def _is_firm(alpha: torch.Tensor) -> torch.Tensor:
    """(rows,) bool: most of the drawn ink (rows, side, 1, side), and its strongest part, has its colour unmixed."""
    squares, total = (each.sum(dim=(1, 2, 3), dtype=torch.float32) for each in (alpha * alpha, alpha))
    return (squares > FIRM * total) & (alpha.amax(dim=(1, 2, 3)) > UNMIXED)


def _spoil(pictures: torch.Tensor, ground: torch.Tensor, options: Drawing) -> torch.Tensor:
    """Noise in some pictures (rows, 3, side, side), and a box of others painted over with their ground."""
    rows, side, device = len(pictures), pictures.shape[-1], pictures.device
    if not _is_off(options.noise):
        chance, size = torch.rand(2, rows, 1, 1, 1, device=device)
        deviation = where(chance < 0.3, options.noise * size, 0.0).to(pictures.dtype)
        pictures = pictures + torch.randn_like(pictures) * deviation
    if not _is_off(options.erase):
        chance, *draws = torch.rand(5, rows, 1, device=device)
        pixel = torch.arange(side, device=device) / side
        inside = [(pixel - draws[i]).abs() < (0.15 + 0.25 * draws[i + 2]) / 2 for i in (0, 1)]
        box = inside[0][:, None, :] & inside[1][:, :, None] & (chance < options.erase)[:, :, None]
        pictures = where(box[:, None], ground, pictures)
    return pictures


# ------------------------------------------------------------------------------------------------------ colours


class _Colours(NamedTuple):
    """`ink` and `ground` (rows, 3) in 0…1, and their names (rows,), -1: none."""

    ink: torch.Tensor
    ground: torch.Tensor
    ink_name: torch.Tensor
    ground_name: torch.Tensor


def _colours(planes: _Planes, options: Drawing) -> _Colours:
    """Colours by the rules of `compose._Colours`: every icon can be seen, and has the colour that its name says."""
    rows, device = len(planes.alpha), planes.alpha.device
    draws = torch.rand(3, rows, device=device)
    plain = draws[0] >= options.colour
    ground_name = where(plain, WHITE, _choose(rows, GROUNDS, GROUND_NAMES, device))
    ground = sample_colours(where(ground_name < 0, WHITE, ground_name))
    tint = 0.82 + 0.18 * torch.rand(rows, 3, device=device)
    ground = where((ground_name < 0)[:, None], ground * tint, ground)
    ink_name = where(plain, BLACK, _choose(rows, INKS, INK_NAMES, device))
    ink = sample_colours(ink_name)
    if options.inverted:
        swapped = plain & ~planes.coloured & (draws[1] < options.inverted)
        ink_name, ground_name = where(swapped, WHITE, ink_name), where(swapped, BLACK, ground_name)
        ink, ground = (where(swapped[:, None], *each) for each in ((ground, ink), (ink, ground)))
    # Where an icon would hardly be seen, the background becomes white or black, then so does the ink.
    total = planes.alpha.sum(dim=(1, 2), dtype=torch.float32)[:, None].clamp(min=1e-6)
    mean = planes.rgb.sum(dim=(1, 3), dtype=torch.float32) / total
    seen = where(planes.coloured[:, None], mean, ink)
    poor = contrast(seen, ground) < MIN_CONTRAST
    dark = _luminance(seen) + FLARE < BLACK_AS_FAR_AS_WHITE
    ground_name = where(poor, where(dark, WHITE, BLACK), ground_name)
    ground = where(poor[:, None], sample_colours(ground_name.clamp(min=0)), ground)
    still = ~planes.coloured & (contrast(seen, ground) < MIN_CONTRAST)
    bright = _luminance(ground) + FLARE > 4.6 * FLARE  # a contrast of 4.6 with black
    ink_name = where(still, where(bright, BLACK, WHITE), ink_name)
    ink = where(still[:, None], sample_colours(ink_name), ink)
    return _Colours(ink, ground, ink_name, ground_name)


def _recolour(planes: _Planes, options: Drawing) -> tuple[_Planes, torch.Tensor]:
    """Exchanges the channels of some coloured icons, makes others grey; (rows,) bool, which."""
    rgb, device = planes.rgb, planes.rgb.device
    if _is_off(options.recolour):
        return planes, torch.zeros(len(rgb), dtype=torch.bool, device=device)
    chance = torch.rand(len(rgb), device=device)
    exchanged = planes.coloured & (chance < options.recolour)
    grey = planes.coloured & ~exchanged & (chance < 1.5 * options.recolour)
    order = torch.rand(len(rgb), 3, device=device).argsort(dim=1)
    other = rgb.gather(2, order[:, None, :, None].expand_as(rgb))
    shade = 0.299 * rgb[:, :, :1] + 0.587 * rgb[:, :, 1:2] + 0.114 * rgb[:, :, 2:]  # luma of ITU-R BT.601
    rgb = where(exchanged[:, None, None, None], other, where(grey[:, None, None, None], shade, rgb))
    return planes._replace(rgb=rgb), exchanged | grey


def _choose(rows: int, shares: tuple[float, ...], names: tuple[int, ...], device) -> torch.Tensor:
    """Draws `names` with their shares, and any colour with a hue for the rest: (rows,) int64."""
    draw = torch.rand(rows, device=device)
    hues = _table(device, "hues")
    chosen = hues[torch.randint(len(hues), (rows,), device=device)]
    bound = 0.0
    bounds = []
    for share in shares:
        bound += share
        bounds.append(bound)
    for name, bound in reversed(list(zip(names, bounds))):
        chosen = where(draw < bound, name, chosen)
    return chosen


def sample_colours(names: torch.Tensor) -> torch.Tensor:
    """Draws one colour for each index into `palette.NAMES`: (count,) int64 → (count, 3) float32 in 0…1."""
    low, high = _table(names.device, "low")[names], _table(names.device, "high")[names]
    hue, saturation, value = (low + torch.rand_like(low) * (high - low)).split(1, dim=1)
    # Smith, "Color gamut transform pairs" (1978), without branches.
    shade = (_table(names.device, "sectors") + hue / 60) % 6
    return value * (1 - saturation * torch.minimum(shade, 4 - shade).clamp(0, 1))


def contrast(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Contrast ratio of WCAG 2.2, from 1 to 21, of colours (count, 3) in 0…1."""
    one, other = (_luminance(torch.stack([first, second])) + FLARE).unbind()
    return torch.maximum(one, other) / torch.minimum(one, other)


def _luminance(rgb: torch.Tensor) -> torch.Tensor:
    """(…, 3) → (…)."""
    return (rgb**2.2 * _table(rgb.device, "luminance")).sum(dim=-1)


@lru_cache(maxsize=32)
def _table(device: torch.device, name: str) -> torch.Tensor:
    """The palette on a device; made once, since a copy to the device is one that the host waits for."""
    tables = {
        "low": [[bound[0] for bound in each] for each in RANGES.values()],
        "high": [[bound[1] for bound in each] for each in RANGES.values()],
        "sectors": [5.0, 3.0, 1.0],
        "luminance": LUMINANCE,
        "hues": list(CHROMATIC),
    }
    return torch.tensor(tables[name], device=device, dtype=torch.int64 if name == "hues" else torch.float32)
