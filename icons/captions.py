"""Words around a name: articles, colour, style, place. Whatever a caption says here is known to be true."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

NOUNS = frozenset((Path(__file__).parent / "nouns.txt").read_text().split())
# At the end of a compound these are marks on a thing ("calendar heart"), not the thing itself.
MARKS = frozenset(
    "arrow arrows badge bars bell book box bug camera card circle clock cloud cross dollar dot dots eye filter flag "
    "folder gear graph heart hexagon image key letter lock mark octagon page pen pencil person pin plug plus "
    "rectangle search shield square star sun switch tag triangle user users wave x".split()
)
DIRECTIONS = frozenset(
    "above back below bottom center down east first front forward horizontal in last left lower middle next north out "
    "over previous right south top under up upper vertical west".split()
)
LINKS = frozenset("and at behind for from in inside making of on over to under with without".split())
# What ends a singular: bus, glass, iris, lens, gas, atlas, canvas.
SINGULAR_ENDS = ("us", "ss", "is", "lens", "gas", "atlas", "canvas")
# Words that begin with the sound of a vowel: most vowels, a silent h, initials such as "svg".
AN = re.compile(
    r"(?:[aeio](?!ne\b|nce\b|u(?:ro|cal|gen))|u(?!biq|fo|k|ni(?!n)|r[ln]|s[abeu]|til)|hon(?:o|est)|hour(?!i)|heir"
    r"|[fhlmnrsx]\b|[fhlmnrsx][bcdfghjklmnpqrstvwxz]{1,4}\d?\b|hdmi\b|mfa\b|mri\b|x-)"
)
EMOJI_SETS = frozenset("emojione emojione-monotone fxemoji noto noto-v1 streamline-emojis twemoji".split())
STYLE_ADJECTIVES = {
    "outline": ("outline", "outlined", "line"),
    "filled": ("filled", "solid"),
    "duotone": ("duotone",),
    "two-tone": ("two-tone",),
    "thin": ("thin", "thin outline"),
    "bold": ("bold",),
    "pixel": ("pixel art",),
    "hand-drawn": ("hand-drawn",),
    "3d": ("3d",),
}


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if AN.match(words) else 'a'} {words}"


@lru_cache(maxsize=200_000)
def split_noun(name: str) -> tuple[str, str] | None:
    """Article and name if the name is that of a thing, else None.

    "bicycle" gives ("a", "bicycle"), "scissors" ("", "scissors"), "flag of peru" ("the", ...); "upload" gives None.
    """
    words = name.split()
    if re.match(r"(flag of|letter|number)\b", name):
        return "the", name
    ends = [place for place, word in enumerate(words) if place and word in LINKS]
    head = words[(ends[0] if ends else len(words)) - 1]
    singular = head[:-1] if head.endswith("s") and not head.endswith(SINGULAR_ENDS) else head
    if head not in NOUNS and singular not in NOUNS or len(words) > 5 and not ends:
        return None
    if head in MARKS and len(words) > 1 and not ends and (words[0] in NOUNS or words[-2] in NOUNS):
        return None
    if DIRECTIONS.difference(LINKS).intersection(words):  # "arrow in up right circle" is no phrase
        return None
    return ("", name) if singular != head else (article(name).split()[0], name)


def kind_of_picture(icon_set: str) -> str:
    """What one calls a picture of a set: emoji, drawing, pictogram or icon."""
    if "emoji" in icon_set or icon_set in EMOJI_SETS:
        return "emoji"
    return {"openclipart": "drawing", "carbon-pictograms": "pictogram"}.get(icon_set, "icon")


def thing(name: str, adjective: str, kind: str) -> str:
    """A phrase for what is shown: "a red bicycle", "scissors", "an upload icon"."""
    noun = split_noun(name)
    if noun is None:
        return article(" ".join(filter(None, (adjective, name, kind))))
    if not adjective:
        return " ".join(filter(None, noun))
    words = f"{adjective} {name}"
    return words if not noun[0] else article(words) if noun[0] != "the" else f"the {name} in {adjective}"


def sentence(name: str, kind: str, colour: str, style: str, background: str, draws: Sequence[float]) -> str:
    """A caption of one icon.

    Args:
        name: what is shown.
        kind: icon, emoji, drawing or pictogram.
        colour: name of its colour, or empty if it has none or none shall be said.
        style: style of the drawing as in STYLE_ADJECTIVES, or empty.
        background: name of the background's colour, or empty.
        draws: two numbers in [0, 1) that choose the words.
    """
    adjectives = STYLE_ADJECTIVES.get(style, ("",))
    adjective = adjectives[int(draws[0] * len(adjectives))]
    look = " ".join(filter(None, (colour, adjective, kind)))
    noun = split_noun(name)
    place = f" on {article(background)} background" if background else ""
    if noun is None:
        forms = (
            f"{article(f'{colour} {adjective} {name} {kind}'.strip())}{place}",
            f"{' '.join(filter(None, (colour, adjective, name, kind)))}{place}",
            f"{article(look)} for {name}{place}",
            f"the {look} stands for {name}",
        )
    else:
        shown = " ".join(filter(None, noun))
        forms = (
            f"{article(look)} of {shown}{place}",
            f"{article(look)} of {shown}{place}",
            f"{thing(name, colour, kind)}{place}",
            f"{shown} in {colour}{place}" if colour and kind != "emoji" else f"{shown}{place}",
            f"{article(f'{colour} {adjective} {name} {kind}'.strip())}{place}",
            f"the {look} shows {shown}",
            f"{shown}{place}",
        )
    return re.sub(r"\s+", " ", forms[int(draws[1] * len(forms))]).replace(" a a ", " a ")


def scene_caption(things: Sequence[str], vertical: bool, draw: float) -> str:
    """A caption of two or three icons in a row, or in a column from top to bottom.

    Args:
        things: phrases for the icons, from left to right or from top to bottom.
        vertical: whether they stand in a column.
        draw: a number in [0, 1) that chooses the words.
    """
    first, second = things[0], things[1]
    if len(things) == 3:
        order = "from top to bottom" if vertical else "from left to right"
        forms = [
            f"{first}, {second} and {things[2]} {order}",
            f"{second} between {first} and {things[2]}",
            f"{first}, {second} and {things[2]}",
        ]
    elif vertical:
        forms = [
            f"{first} above {second}",
            f"{second} below {first}",
            f"{second} under {first}",
            f"{first} at the top and {second} at the bottom",
            f"{first} and {second}",
        ]
    else:
        forms = [
            f"{first} left of {second}",
            f"{first} to the left of {second}",
            f"{second} right of {first}",
            f"{second} to the right of {first}",
            f"{first} on the left and {second} on the right",
            f"{first} next to {second}",
            f"{first} and {second}",
        ]
    return forms[int(draw * len(forms))]
