"""Draws training pictures from stored icons: colours, background, size, place, a small turn, scenes of several icons.

    icon (alpha, or colours and alpha) ─ redraw ─ turn ─ scale, stretch, shift ─ paint on a background ─ picture
    text ─ as it is, or in a sentence with colour and style words, or in a scene's spatial caption ─ text

All pictures of a batch are computed together: scaling and shifting is a product with two matrices, whose rows are the
pixels of the picture and whose columns are those of the icon. Pictures are never mirrored, since arrows and letters
mean something else then.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from .captions import DIRECTIONS, STYLE_ADJECTIVES, kind_of_picture, scene_caption, sentence, split_noun, thing
from .palette import CHROMATIC, NAMES, contrast, name_colours, sample_colours

BLACK, WHITE = NAMES.index("black"), NAMES.index("white")
MIN_CONTRAST = 2.2  # below it an icon is hard to see
TURN_SHARE, TURN_DEGREES = 0.2, 8.0
OUTLINE_SHARE = 0.25  # of the icons that are redrawn
LEFT_OF_INK = 0.5  # share of its ink that an icon with thinner lines must keep
FILLED = 0.5  # an icon is filled if its outline has less than this share of its ink; only such become outlines
COLOUR_SHARE = 0.6  # of the visible pixels: from here on a picture is said to have that colour
FIRM = 0.6  # mean opacity of the ink from which on it has the colour that it is painted in
PLAIN_INK = 24.0


def compose_icons(
    examples: list[dict[str, Any]],
    rng: np.random.Generator,
    *,
    side: int = 64,
    scene_share: float = 0.15,
    sentence_share: float = 0.3,
    name_share: float = 0.0,
    colour_share: float = 1.0,
    redraw_share: float = 0.0,
    stretch: float = 0.0,
    caption_sentences: bool = True,
    plain: bool = False,
) -> list[dict[str, Any]]:
    """Draws a picture for each example and puts its text into words.

    A scene shows the icon beside one or two others of the same list; its caption becomes its `name`. Every word of a
    caption is true of the picture: colours are clear cases of their names, places are those drawn.

    Args:
        examples: dicts with `image` (PIL image of mode LA or RGBA, or uint8 array of 2 or 4 channels, square, all of
            one size), `text`, and where known `name`, `set` and `style`; not changed.
        rng: source of randomness; the same state gives the same pictures and texts.
        side: height and width of the pictures.
        scene_share: share of the examples that become scenes.
        sentence_share: share of the other examples whose text is put into a sentence.
        name_share: share of the examples whose text becomes their `name` before that; icons with many tags are
            otherwise rarely called by their name.
        colour_share: share of the pictures with colours, in the background and in icons of one colour; the others are
            black on white. Shapes are learnt sooner with few colours, so a run may begin with a small share.
        redraw_share: share of the icons of one colour that get thicker or thinner lines, or become an outline.
        stretch: the largest share of its width or height by which an icon is made narrower or lower.
        caption_sentences: whether sentences and scenes are also captions to learn, not only texts to be found by. They
            nearly all begin with "a": a few among the captions make greedy decoding say "a" wherever it is unsure.
        plain: no randomness: a dark icon on white, centred, full size, and the text as it is; for evaluation.

    Returns:
        As many dicts, with `image` as uint8 array (side, side, 3) and `text` final, and `captioned`: whether the text
        is a caption to learn.

    Raises:
        ValueError: if a share is not in [0, 1], or an image has another mode or shape.
    """
    shares = {"scene_share": scene_share, "sentence_share": sentence_share, "name_share": name_share}
    _check_shares(shares | {"colour_share": colour_share, "redraw_share": redraw_share, "stretch": stretch})
    if not examples:
        return []
    icons = Icons([example["image"] for example in examples])
    if plain:
        return [{**example, "image": picture} for example, picture in zip(examples, _plain(icons, side))]
    named = rng.random(len(examples)) < name_share
    examples = [{**one, "text": one.get("name") or one["text"]} if use else one for one, use in zip(examples, named)]
    scenes = _Scenes(examples, rng, scene_share)
    colours = _Colours(icons, scenes, colour_share, rng)
    outlined = icons.redraw(redraw_share, rng)
    examples = [one | {"style": ""} if changed else one for one, changed in zip(examples, outlined)]
    icons.turn(rng)
    pictures = _paint(icons, scenes, colours, side, stretch, rng)
    captions = _captions(examples, icons, scenes, colours, sentence_share, caption_sentences, rng)
    return [{**example, "image": picture, **words} for example, picture, words in zip(examples, pictures, captions)]


def _check_shares(shares: Mapping[str, float]):
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be between 0 and 1")


class Icons:
    """Icons of a batch, float32: `alpha` (count, size, size), alpha * colour as `rgb` (coloured, 3, size, size)."""

    def __init__(self, images: Sequence[Any]):
        arrays = [np.asarray(image) for image in images]
        size = arrays[0].shape[0]
        for place, array in enumerate(arrays):
            if array.ndim != 3 or array.shape[:2] != (size, size) or array.shape[2] not in (2, 4):
                raise ValueError(
                    f"image {place} has shape {array.shape}: expected ({size}, {size}, 2 or 4), mode LA or RGBA"
                )
        self.size = size
        self.coloured = np.array([array.shape[2] == 4 for array in arrays])
        opacity = np.stack([array[..., -1] for array in arrays])
        # Some sets draw everything faint; an icon of one colour is as dark as its darkest part.
        peak = np.where(self.coloured, 255, np.maximum(opacity.max(axis=(1, 2)), 1)).astype(np.float32)
        self.alpha = np.multiply(opacity, 1 / peak[:, None, None], dtype=np.float32)
        squares = np.einsum("nyx,nyx->n", self.alpha, self.alpha)
        self.firm = squares > FIRM * self.alpha.sum(axis=(1, 2))  # most of the ink shows its colour unmixed
        self.row = np.cumsum(self.coloured) - 1  # row of `rgb` of each coloured icon
        colours = [np.moveaxis(array[..., :3], -1, 0) for array in arrays if array.shape[2] == 4]
        self.rgb = np.stack(colours).astype(np.float32) if colours else np.zeros((0, 3, size, size), np.float32)
        self.rgb *= self.alpha[self.coloured, None]

    def redraw(self, share: float, rng: np.random.Generator) -> np.ndarray:
        """Gives some icons of one colour other lines; (icons,) bool, which of them became outlines.

        Of what an icon covers, the pixels beside its edge are added in part, or taken away in part, or they alone are
        kept. Nothing is taken from an icon that would lose most of its ink: its lines are made thicker.
        """
        outlined = np.zeros(len(self.alpha), bool)
        draws = rng.random((3, len(self.alpha)))
        chosen = np.flatnonzero(~self.coloured & (draws[0] < share))
        if not len(chosen):
            return outlined
        before, kind, strength = self.alpha[chosen], draws[1, chosen], draws[2, chosen].astype(np.float32)
        strength = strength[:, None, None]
        eroded = _neighbours(before, np.minimum)
        thin = before - strength * (before - eroded)
        outline = before - _neighbours(eroded, np.minimum)
        ink = before.sum(axis=(1, 2))
        outlines = (kind < OUTLINE_SHARE) & (outline.sum(axis=(1, 2)) < FILLED * ink)
        thinner = ~outlines & (kind < (1 + OUTLINE_SHARE) / 2) & (thin.sum(axis=(1, 2)) > LEFT_OF_INK * ink)
        after = before + strength * (_neighbours(before, np.maximum) - before)
        after[thinner], after[outlines] = thin[thinner], outline[outlines]
        self.alpha[chosen] = after
        outlined[chosen] = outlines
        return outlined

    def turn(self, rng: np.random.Generator) -> None:
        """Turns some icons by a few degrees."""
        chosen = np.flatnonzero(rng.random(len(self.alpha)) < TURN_SHARE)
        for index, angle in zip(chosen, rng.uniform(-TURN_DEGREES, TURN_DEGREES, len(chosen))):
            planes = [self.alpha[index]]
            if self.coloured[index]:
                planes += list(self.rgb[self.row[index]])
            turned = [np.asarray(Image.fromarray(plane).rotate(angle, Image.Resampling.BILINEAR)) for plane in planes]
            self.alpha[index] = turned[0]
            if self.coloured[index]:
                self.rgb[self.row[index]] = turned[1:]

    def mean_colours(self) -> np.ndarray:
        """Mean colour of what is visible of each coloured icon, (coloured, 3), in [0, 255]."""
        weight = self.alpha[self.coloured].sum(axis=(1, 2))[:, None]
        return self.rgb.sum(axis=(2, 3)) / np.maximum(weight, 1e-6)

    def main_colour(self, index: int) -> int:
        """Index of the colour that most of a coloured icon has, -1 if there is none."""
        alpha, rgb = self.alpha[index, ::2, ::2], self.rgb[self.row[index], :, ::2, ::2]
        visible = alpha > 0.5
        names = name_colours((rgb[:, visible] / alpha[visible]).T)
        counts = np.bincount(names[names >= 0], minlength=len(NAMES))
        best = int(counts.argmax())
        return best if counts[best] >= COLOUR_SHARE * max(1, len(names)) else -1


class _Scenes:
    """Which icons stand in which picture: `picture`, `icon`, `place` of each placement; `members` of each picture."""

    def __init__(self, examples: Sequence[dict[str, Any]], rng: np.random.Generator, share: float):
        names = [scene_name(example) for example in examples]
        count = len(examples)
        able = np.array([bool(name) for name in names])
        pool = np.flatnonzero(able)
        self.members: list[list[int]] = [[index] for index in range(count)]
        self.vertical = rng.random(count) < 0.35
        draws = rng.random((count, 3))
        partners = pool[rng.integers(len(pool), size=(count, 2))] if len(pool) else np.zeros((count, 2), int)
        for index in np.flatnonzero(able & (draws[:, 0] < share)):
            members = [int(index)]
            for partner in partners[index][: 2 if draws[index, 1] < 0.2 else 1]:
                if names[partner] not in [names[member] for member in members]:
                    members.append(int(partner))
            rotation = int(draws[index, 2] * len(members))
            self.members[index] = members[rotation:] + members[:rotation]
        self.picture = np.array([index for index, group in enumerate(self.members) for _ in group])
        self.icon = np.array([member for group in self.members for member in group])
        self.place = np.array([place for group in self.members for place in range(len(group))])
        self.total = np.array([len(group) for group in self.members])[self.picture]
        self.first = np.flatnonzero(self.place == 0)  # first placement of each picture


def scene_name(example: dict[str, Any]) -> str:
    """The name under which an icon can stand in a scene; empty for names that speak of directions or are long."""
    name = example.get("name") or example["text"]
    words = name.split()
    return name if len(words) <= 4 and not DIRECTIONS.intersection(words) else ""


class _Colours:
    """Colours of a batch: `ink` (placements, 3) and `ground` (pictures, 3), each with its names (-1: none)."""

    def __init__(self, icons: Icons, scenes: _Scenes, colour_share: float, rng: np.random.Generator):
        pictures = len(scenes.members)
        plain = rng.random(pictures) >= colour_share
        self.ground_name = _choose(rng, pictures, (0.52, 0.13, 0.12), (WHITE, -1, BLACK))
        self.ground_name[plain] = WHITE
        self.ground = sample_colours(np.where(self.ground_name < 0, WHITE, self.ground_name), rng)
        tint = rng.uniform(0.82, 1.0, (pictures, 3)).astype(np.float32)
        self.ground = np.where((self.ground_name < 0)[:, None], self.ground * tint, self.ground)
        self.ink_name = _choose(rng, len(scenes.icon), (0.45, 0.1), (BLACK, WHITE))
        self.ink_name[plain[scenes.picture]] = BLACK
        self.ink = sample_colours(self.ink_name, rng)
        self.mono = ~icons.coloured[scenes.icon]
        means = np.zeros((len(icons.alpha), 3), np.float32)
        means[icons.coloured] = icons.mean_colours()
        seen = np.where(self.mono[:, None], self.ink, means[scenes.icon])
        self._make_visible(scenes, seen, rng)

    def _make_visible(self, scenes: _Scenes, seen: np.ndarray, rng: np.random.Generator) -> None:
        """Where an icon would hardly be seen, the background becomes white or black, then so does the ink."""
        pale = contrast(seen, self.ground[scenes.picture]) < MIN_CONTRAST
        poor = np.zeros(len(self.ground), bool)
        poor[scenes.picture[pale]] = True
        dark = contrast(seen, np.zeros(3, np.float32)) < contrast(seen, np.full(3, 255, np.float32))
        self.ground_name[poor] = np.where(dark[scenes.first], WHITE, BLACK)[poor]
        self.ground[poor] = sample_colours(self.ground_name, rng)[poor]
        still = self.mono & (contrast(seen, self.ground[scenes.picture]) < MIN_CONTRAST)
        bright = contrast(self.ground[scenes.picture], np.zeros(3, np.float32)) > 4.6
        self.ink_name[still] = np.where(bright, BLACK, WHITE)[still]
        self.ink[still] = sample_colours(self.ink_name, rng)[still]


def _choose(rng: np.random.Generator, count: int, shares: Sequence[float], names: Sequence[int]) -> np.ndarray:
    """Draws `names` with their shares, and any colour with a hue for the rest."""
    draw = np.searchsorted(np.cumsum(shares), rng.random(count), side="right")
    hues = np.array(CHROMATIC)[rng.integers(len(CHROMATIC), size=count)]
    return np.where(draw < len(names), np.array([*names, 0])[draw], hues)


def _neighbours(planes: np.ndarray, choose: np.ufunc) -> np.ndarray:
    """The least or greatest of each pixel and the four beside it, (icons, size, size); nothing lies outside."""
    padded = np.pad(planes, ((0, 0), (1, 1), (1, 1)))
    across = choose(padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    along = choose(padded[:, :-2, 1:-1], padded[:, 2:, 1:-1])
    return choose(planes, choose(across, along))


def _paint(
    icons: Icons, scenes: _Scenes, colours: _Colours, side: int, stretch: float, rng: np.random.Generator
) -> np.ndarray:
    """The pictures, uint8, (pictures, side, side, 3)."""
    drawn = np.empty((len(scenes.members), side, side, 3), np.uint8)
    rows = np.tile((colours.ground + 0.5).astype(np.uint8), side)  # a row of pixels of each background
    drawn.reshape(len(drawn), side, -1)[:] = rows[:, None]
    boxes = _placements(scenes, side, stretch, rng).tolist()
    grounds, inks = colours.ground.tolist(), colours.ink.tolist()
    for picture, icon, (left, top, width, height), ink in zip(
        scenes.picture.tolist(), scenes.icon.tolist(), boxes, inks
    ):
        rows_of, columns_of, ground = _kernel(icons.size, height), _kernel(icons.size, width).T, grounds[picture]
        target = drawn[picture, top : top + height, left : left + width]
        alpha = rows_of @ icons.alpha[icon] @ columns_of
        for channel in range(3):  # plane by plane: numpy is slow where the last axis has three entries
            if icons.coloured[icon]:
                colour = rows_of @ icons.rgb[icons.row[icon], channel] @ columns_of
                target[..., channel] = np.minimum(colour + (ground[channel] + 0.5) - alpha * ground[channel], 255)
            else:
                target[..., channel] = alpha * (ink[channel] - ground[channel]) + (ground[channel] + 0.5)
    return drawn


def _placements(scenes: _Scenes, side: int, stretch: float, rng: np.random.Generator) -> np.ndarray:
    """Left edge, upper edge, width and height of each placement in pixels, int, (placements, 4)."""
    along = side / scenes.total  # width of a cell of the row
    whole = scenes.total == 1
    # One picture in four is full, as most files are that users have: a model is at its best where it has seen most.
    share = np.minimum(rng.uniform(np.where(whole, 0.65, 0.8), np.where(whole, 1.12, 0.98)), 1)
    length = np.maximum(4, np.floor(along * share)).astype(int)
    free = rng.random((2, len(scenes.icon)))
    start = np.floor(scenes.place * along + free[0] * (along - length)).astype(int)
    # Beside each other they stand at about one height: left of means left of.
    spread = np.where(whole, 1.0, 0.3)
    other = np.floor((side - length) * (0.5 + spread * (free[1] - 0.5))).astype(int)
    vertical = scenes.vertical[scenes.picture]
    left, top = np.where(vertical, other, start), np.where(vertical, start, other)
    # What is stretched stays in the middle of the square that it had.
    draws = rng.random((2, len(length)))
    shorter = np.floor(length * (1 - stretch * draws[0])).astype(int)
    lower = draws[1] < 0.5
    width, height = np.where(lower, length, shorter), np.where(lower, shorter, length)
    return np.stack([left + (length - width) // 2, top + (length - height) // 2, width, height], axis=1)


@lru_cache(maxsize=512)
def _kernel(size: int, length: int) -> np.ndarray:
    """Weights that bring `size` pixels to `length` pixels, (length, size): a triangle as wide as a new pixel."""
    scale = length / size
    source = (np.arange(length)[:, None] + 0.5) / scale - 0.5
    weights = np.clip(1 - np.abs(source - np.arange(size)) / max(1, 1 / scale), 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _plain(icons: Icons, side: int) -> np.ndarray:
    """Dark icons on white, coloured ones in their colours on white, uint8, (count, side, side, 3)."""
    alpha, rgb = icons.alpha, icons.rgb
    if icons.size != side:
        kernel = _kernel(icons.size, side)
        alpha, rgb = kernel @ alpha @ kernel.T, kernel @ rgb @ kernel.T
    drawn = np.empty((len(alpha), side, side, 3), np.uint8)
    for channel in range(3):
        plane = 255.5 - alpha * (255 - PLAIN_INK)
        plane[icons.coloured] = 255.5 - 255 * alpha[icons.coloured] + rgb[:, channel]
        drawn[..., channel] = np.clip(plane, 0, 255, out=plane)
    return drawn


def _captions(
    examples: Sequence[dict[str, Any]],
    icons: Icons,
    scenes: _Scenes,
    colours: _Colours,
    share: float,
    caption_sentences: bool,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """`text` of every example, whether it is a caption to learn, and `name` of those that became scenes."""
    draws = rng.random((len(examples), 6))
    inks = rng.random(len(scenes.icon))
    words = []
    for index, members in enumerate(scenes.members):
        first = int(scenes.first[index])
        if len(members) > 1:
            phrases = []
            for step, member in enumerate(members):
                said = colours.mono[first + step] and icons.firm[member] and inks[first + step] < 0.4
                colour = NAMES[colours.ink_name[first + step]] if said else ""
                phrases.append(thing(scene_name(examples[member]), colour, _kind(examples[member])))
            text = scene_caption(phrases, bool(scenes.vertical[index]), draws[index, 0])
            words.append({"text": text, "name": text, "captioned": caption_sentences})
        elif draws[index, 1] < share:
            text = _sentence(examples[index], index, icons, colours, first, draws[index])
            words.append({"text": text, "captioned": caption_sentences})
        else:
            words.append({"text": examples[index]["text"], "captioned": True})
    return words


def _sentence(
    example: dict[str, Any], index: int, icons: Icons, colours: _Colours, placement: int, draws: np.ndarray
) -> str:
    name = example["text"] if split_noun(example["text"]) else example.get("name") or example["text"]
    ink = colours.ink_name[placement] if colours.mono[placement] and icons.firm[index] else -1
    if draws[2] < 0.6 and not colours.mono[placement]:
        ink = icons.main_colour(index)
    colour = NAMES[ink] if ink >= 0 and draws[2] < 0.6 else ""
    style = example.get("style") or ""
    style = style if style in STYLE_ADJECTIVES and draws[3] < 0.5 else ""
    ground = colours.ground_name[index]
    background = NAMES[ground] if ground >= 0 and draws[4] < 0.2 else ""
    return sentence(name, _kind(example), colour, style, background, (draws[5], draws[0]))


def _kind(example: dict[str, Any]) -> str:
    return kind_of_picture(example.get("set") or "")
