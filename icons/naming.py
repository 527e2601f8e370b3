"""From an icon's identifier to natural words: `ic:twotone-alarmclock2` becomes "alarm clock", style "two-tone".

Identifiers carry the style of the drawing, its size and a running number beside the name of what is drawn, and they
fuse words. Three steps, each a pure function of the identifier and of the names of its set:

    strip_style    twotone-alarmclock2 -> alarmclock2, "two-tone"
    to_words       alarmclock2         -> alarmclock
    split_fused    alarmclock          -> alarm clock
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

# Word at the end (or the head) of an identifier -> style of the drawing; "" is dropped without saying anything.
STYLE_WORDS = {
    "outline": "outline",
    "outlined": "outline",
    "outlines": "outline",
    "line": "outline",
    "linear": "outline",
    "lined": "outline",
    "stroke": "outline",
    "filled": "filled",
    "fill": "filled",
    "solid": "filled",
    "duotone": "duotone",
    "duo": "duotone",
    "twotone": "two-tone",
    "thin": "thin",
    "light": "thin",
    "bold": "bold",
    "regular": "",
    "round": "",
    "rounded": "",
    "sharp": "",
    "baseline": "",
    "broken": "",
    "remix": "",
    "flat": "",
    "color": "",
    "colored": "",
    "negative": "negative",
    "poly": "",
    "print": "",
    "alt": "",
    "o": "outline",
}
# Words that name no thing: stripped wherever they stand at the end. The others of STYLE_WORDS may be part of a name
# (traffic light, format bold, chart line), and are stripped only if the set has the same name without them.
ALWAYS_STYLE = frozenset({"outline", "outlined", "outlines", "filled", "duotone", "twotone", "baseline", "alt"})
SIZES = frozenset("10 11 12 14 15 16 18 20 24 28 32 48 96 12px 16px 20px 24px 32px 48px 1x1 4x3".split())
# Nearly never part of a name: stripped wherever the set declares them.
PLAIN_STYLE = SIZES | {"fill", "linear", "negative", "regular", "remix", "rounded", "sharp", "solid"}

# A number after one of these is part of what is drawn; after any other word it counts the variants of a drawing.
NUMBERED_WORDS = frozenset(
    "age box boxes clock column columns counter day dice die digit dot dots exposure f filter forward grid hexagon "
    "hour iso layout level looks number numeric octagon page pentagon plus rating replay rewind row rows sim "
    "skip speed square star stars step target timer window x".split()
)
# Words of their own, whatever their halves say side by side.
WHOLE_WORDS = frozenset(
    "headshot homework northeast northwest snowcapped southeast southwest upright wristwatch".split()
)
NUMBERED_TERMS = frozenset("base64 css3 html5 ipv4 ipv6 md5 mp3 mp4 usb2 usb3 utf8 web2 web3".split())
EXPANSIONS = {
    "bg": "background",
    "btn": "button",
    "calc": "calculator",
    "cogs": "gears",
    "cog": "gear",
    "colour": "color",
    "dir": "directory",
    "doc": "document",
    "docs": "documents",
    "hdd": "hard drive",
    "img": "image",
    "mic": "microphone",
    "mics": "microphones",
    "msg": "message",
    "pic": "picture",
    "pics": "pictures",
    "temp": "temperature",
    "trashcan": "trash can",
}
PHRASES = {
    "check mark": "checkmark",
    "e mail": "email",
    "hand writing": "handwriting",
    "head phones": "headphones",
    "mail box": "mailbox",
    "t shirt": "t-shirt",
    "touch pad": "touchpad",
    "un lock": "unlock",
    "wi fi": "wifi",
    "x ray": "x-ray",
}
MEANINGLESS = frozenset("alt alternate alternative copy1 custom icon icons svg v1 v2 v3 variant variation ver".split())


PHRASE_PATTERN = re.compile(r"\b(?:" + "|".join(PHRASES) + r")\b")


def strip_style(raw: str, siblings: Collection[str], declared: Collection[str] = ()) -> tuple[str, tuple[str, ...]]:
    """Takes style and size words off the ends of an identifier.

    Args:
        raw: identifier of the icon, words joined by hyphens.
        siblings: all identifiers of the set: an ambiguous word is a style only if its sibling without it exists.
        declared: suffixes and prefixes that the set itself declares as styles, for example `24-filled`.

    Returns:
        The identifier without them, and the styles that were named, in their order.
    """
    words, styles = raw.replace("two-tone", "twotone").split("-"), []
    single = {word for suffix in declared for word in suffix.split("-") if word}
    while len(words) > 1:
        last, first, rest = words[-1], words[0], "-".join(words[:-1])
        if _is_style(last, rest, siblings, single):
            words.pop()
            styles.insert(0, STYLE_WORDS.get(last, ""))
        elif first in single and first in STYLE_WORDS and first + "-" + "-".join(words[1:]) in siblings:
            words.pop(0)
            styles.insert(0, STYLE_WORDS[first])
        else:
            break
    return "-".join(words), tuple(style for style in styles if style)


def _is_style(word: str, rest: str, siblings: Collection[str], declared: Collection[str]) -> bool:
    if word in ALWAYS_STYLE:
        return True
    if word not in STYLE_WORDS and word not in SIZES:
        return False
    if word in declared and word in PLAIN_STYLE:
        return True
    others = (f"{rest}-{other}" for other in (*STYLE_WORDS, *SIZES) if other != word)
    return rest in siblings or any(other in siblings for other in others)


def to_words(base: str) -> list[str]:
    """Words of an identifier: hyphens, underscores, capitals and running numbers resolved, lower case.

    A number that ends the name counts the variants of a drawing and goes, unless the word before it takes a number
    (`dice-3`, `clock-10`) or the whole name is one.
    """
    base = re.sub(r"(?<=[a-z])(?=[A-Z])|[_\s./+]+", "-", base).lower()
    words = [word for word in re.split(r"-+", base) if word]
    words = [word if word in NUMBERED_TERMS else re.sub(r"^([a-z]{3,}?)0?\d{1,2}$", r"\1", word) for word in words]
    words = [word for word in words if not re.fullmatch(r"0\d", word)] or words
    while len(words) > 1 and re.fullmatch(r"\d{1,3}x?", words[-1]) and words[-2] not in NUMBERED_WORDS:
        words.pop()
    kept = [word for word in words if word not in MEANINGLESS] or words
    return " ".join(EXPANSIONS.get(word, word) for word in kept).split()


def fused_words(names: Iterable[Iterable[str]], ratio: float = 1.5) -> dict[str, str]:
    """Words that other names write as two: `alarmclock` -> "alarm clock".

    Args:
        names: words of every name of the collection.
        ratio: how much more often the two words must stand side by side than the fused one stands.

    Returns:
        The split of every fused word that was found.
    """
    singles: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for name in names:
        words = list(name)
        singles.update(words)
        pairs.update(zip(words, words[1:]))
    splits = {}
    for (first, second), count in pairs.items():
        fused = singles.get(first + second, 0)
        long_enough = len(first) > 1 and len(second) > 2 and first.isalpha() and second.isalpha()
        if fused and long_enough and first + second not in WHOLE_WORDS and count > max(1, ratio * fused):
            splits[first + second] = f"{first} {second}"
    return splits


def to_name(words: Iterable[str], splits: Mapping[str, str] | None = None) -> str:
    """Joins words to a name: fused words split, a single character spelt out ("letter a", "number 7").

    Returns:
        The name, or an empty string if nothing is left that can be read.
    """
    text = " ".join((splits or {}).get(word, word) for word in words)
    text = re.sub(r"[^a-z0-9&'. ]+", " ", _plain(text.lower()))
    text = re.sub(r"\s+", " ", text).strip(" .'")
    text = PHRASE_PATTERN.sub(lambda match: PHRASES[match[0]], text)
    if re.fullmatch(r"[a-z]", text):
        return f"letter {text}"
    if re.fullmatch(r"\d{1,3}", text):
        return f"number {int(text)}"
    return text if re.search(r"[a-z]{2}", text) and len(text) <= 60 and len(text.split()) <= 8 else ""


def _plain(text: str) -> str:
    """Letters without their accents."""
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def concept_key(name: str) -> str:
    """What makes two names one concept for the split: the same words in any order, singular.

    "arrows left" and "left arrow" are held out together.
    """
    return " ".join(sorted(_singular(word) for word in name.split()))


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("ches", "shes", "xes", "sses")) else word[:-1]
