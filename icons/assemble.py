"""Gives every icon its name, its further texts and its style; drops what has no readable or no usable name."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from .collect import Icon, IconSet
from .naming import fused_words, strip_style, to_name, to_words
from .rules import BRAND_LISTS, BROAD, FLAG_SETS, GENERIC_BRANDS, NATIONS, SET_RULES, SET_STYLES
from .texts import Emoji, clean_tag, emoji_key, load_emoji, load_tags, merge_texts, natural_label, shared_synonyms

TONED_SHARE, PERSON_SHARE = 0.1, 0.5
MAX_VARIANTS = 4
TONE = re.compile(r"[-_ ](medium-)?(light|dark|medium)?-?skin-tone(-\d)?|[-_]tone\d")


@dataclass
class Named:
    """What an icon is called: `texts[0]` is `name`, the others are aliases and tags.

    `related` and `gloss` are what WordNet says about the name.
    """

    source_id: str
    set: str
    licence: str
    name: str
    style: str
    texts: list[str]
    related: list[str] = field(default_factory=list)
    gloss: str = ""


def name_icons(sets: Sequence[IconSet], folders: Mapping[str, Path]) -> list[Named]:
    """Names all icons of all sets; the rules look at the whole collection, so that they need it whole.

    Args:
        sets: icon sets in a fixed order.
        folders: folder of each source by slug.
    """
    emoji = load_emoji(folders["emojibase-data"], folders["cldr-annotations-full"])
    names = _Names(emoji, load_tags(folders), brand_slugs(folders, emoji))
    drafts = [draft for icon_set in sets for draft in limit_variants(names.draft_set(icon_set))]
    splits = fused_words(draft.words for draft in drafts)
    vocabulary = Counter(word for draft in drafts if draft.icon.set != "openclipart" for word in draft.words)
    vocabulary.update(word for entry in emoji.values() for word in " ".join((entry.label, *entry.tags)).split())
    named = [(draft, _finish(draft, splits, vocabulary)) for draft in drafts]
    named = [(draft, row) for draft, row in named if row is not None]
    votes = ((row.set, row.name, text) for _, row in named for text in row.texts[1:])
    shared = shared_synonyms((_vote_source(source), name, text) for source, name, text in votes)
    for _, row in named:
        row.texts = merge_texts(row.name, row.texts[1:], shared.get(row.name, ()))
    return [row for _, row in named]


@dataclass
class _Draft:
    icon: Icon
    base: str
    licence: str
    words: list[str]
    style: str
    aliases: list[list[str]]
    tags: list[str]


def limit_variants(drafts: Sequence[_Draft], limit: int = MAX_VARIANTS) -> list[_Draft]:
    """At most a few of the weights, sizes and styles in which a set draws one thing, by hash of the identifier."""
    groups: dict[str, list[_Draft]] = {}
    for draft in drafts:
        groups.setdefault(draft.base, []).append(draft)
    chosen = {
        draft.icon.source_id
        for group in groups.values()
        for draft in sorted(group, key=lambda draft: sha256(draft.icon.source_id.encode()).digest())[:limit]
    }
    return [draft for draft in drafts if draft.icon.source_id in chosen]


class _Names:
    """The tables that naming looks into."""

    def __init__(self, emoji: dict[str, Emoji], tags: dict[str, dict[str, list[str]]], brands: set[str]):
        self.emoji, self.tags, self.brands = emoji, tags, brands
        self.codes = {entry.label: code for code, entry in emoji.items()}

    def draft_set(self, icon_set: IconSet) -> list[_Draft]:
        """Drafts of the icons of one set that have a usable name."""
        siblings = {icon.raw for icon in icon_set.icons}
        drafts = (self._draft(icon, icon_set, siblings) for icon in icon_set.icons)
        return [draft for draft in drafts if draft is not None]

    def _draft(self, icon: Icon, icon_set: IconSet, siblings: Collection[str]) -> _Draft | None:
        if icon.set == "openclipart":
            base, words = icon.raw, to_words(icon.aliases[0])
            if "/flags/" in icon.raw and "flag" not in words:
                words = ["flag", "of", *words]
            tags = [*icon.aliases[1:], *reversed(icon.raw.split("/")[:-1])]
            return _Draft(icon, base, icon_set.licence, words, "clipart", [], tags)
        plain = plain_identifier(icon.set, icon.raw)
        base, styles = strip_style(plain, siblings, icon_set.styles)
        entry = self._emoji(icon, base, to_words(base))
        if not keep_person(icon.source_id, entry, icon.raw):
            return None
        if entry is None and (icon.set in FLAG_SETS or icon.set == "fluent-emoji-3d"):
            return None
        words = entry.base_label.split() if entry else _without_topic(to_words(base), icon_set)
        if icon.set.startswith("streamline") and len(words) > 5:  # lists of keywords rather than names
            return None
        if not words or icon.raw in icon_set.brands or self._is_brand(base, words):
            return None
        style = SET_STYLES.get(icon.set, "")
        if not style and entry is None and "emoji" not in icon.set:
            style = drawing_style(icon, base, styles, siblings, icon_set.styles)
        aliases = [plain_identifier(icon.set, alias) for alias in icon.aliases]
        aliases = [to_words(strip_style(alias, siblings, icon_set.styles)[0]) for alias in aliases]
        if entry and icon.set not in FLAG_SETS | {"fluent-emoji-3d"}:  # whose identifiers are codes
            aliases.append(entry.label.split() if entry.toned else to_words(base))
        tags = [*self.tags.get(icon.set, {}).get(base, ()), *(entry.tags if entry else ())]
        return _Draft(icon, base, icon_set.licence, words, style, aliases, tags)

    def _emoji(self, icon: Icon, base: str, words: list[str]) -> Emoji | None:
        if icon.set in FLAG_SETS:
            return self.emoji.get(flag_code(base))
        if icon.emoji:
            return self.emoji.get(emoji_key(icon.emoji))
        if "emoji" in icon.set:
            return self.emoji.get(self.codes.get(natural_label(" ".join(words)), ""))
        return None

    def _is_brand(self, base: str, words: list[str]) -> bool:
        bare = words[1:] if words[0] == "social" and len(words) > 1 else words
        marked = re.search(r"^(brand|logo)-|-(logo|brand)$", base)
        return bool(marked or {"".join(bare), bare[0]} & self.brands)


def _without_topic(words: list[str], icon_set: IconSet) -> list[str]:
    """Words without the category that some sets put before the name: "nature fire" -> "fire"."""
    if not icon_set.prefix.startswith(("streamline", "covid")):
        return words
    lengths = [n for n in range(1, len(words)) if tuple(words[:n]) in icon_set.topics]
    return words[max(lengths, default=0) :]


def plain_identifier(prefix: str, raw: str) -> str:
    """An identifier without what its set adds to it, and without the skin tone."""
    plain = TONE.sub("", raw)
    for pattern, replacement in SET_RULES.get(prefix, ()):
        plain = re.sub(pattern, replacement, plain)
    return plain


def flag_code(raw: str) -> str:
    """Code points of the flag emoji of a country code: `ad` -> `1f1e6-1f1e9`."""
    code = raw.split("-1x1")[0].split("-4x3")[0]
    if re.fullmatch(r"[a-z]{2}", code):
        return "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in code)
    return NATIONS.get(code.removeprefix("gb-"), "")


def keep_person(source_id: str, entry: Emoji | None, raw: str) -> bool:
    """Whether an emoji stays: of skin tones one in ten, of the other people one in two, by hash of the identifier."""
    draw = int.from_bytes(sha256(f"keep:{source_id}".encode()).digest()[:4], "big") / 2**32
    if TONE.search(raw) or (entry and entry.toned):
        return draw < TONED_SHARE
    return not (entry and entry.person) or draw < PERSON_SHARE


def brand_slugs(folders: Mapping[str, Path], emoji: Mapping[str, Emoji]) -> set[str]:
    """Names of brands, written together: those of two collections of logos, unless they are words for things."""
    counts: Counter[str] = Counter()
    for prefix in BRAND_LISTS:
        path = folders["iconify-json"] / f"json/{prefix}.json"
        names = json.loads(path.read_text())["icons"]
        counts.update({re.sub(r"-(icon|logo|wordmark)$", "", name).replace("-", "") for name in names})
    words = {word for entry in emoji.values() for text in (entry.label, *entry.tags) for word in (*text.split(), text)}
    return {
        slug for slug, count in counts.items() if count > 1 and slug not in words | GENERIC_BRANDS and len(slug) > 2
    }


def drawing_style(
    icon: Icon, base: str, styles: Sequence[str], siblings: Collection[str], declared: Mapping[str, str]
) -> str:
    """The style of a drawing as far as its set says it: outline, filled, duotone, thin, bold, ... or nothing."""
    named = list(dict.fromkeys(styles))
    if "filled" in named or "duotone" in named or "two-tone" in named:
        return next(style for style in named if style in ("duotone", "two-tone", "filled"))
    if named:
        return named[-1] if icon.stroked or named[-1] != "bold" else "bold"
    default = declared.get("", "").lower()
    for word, style in (("fill", "filled"), ("outline", "outline"), ("line", "outline"), ("stroke", "outline")):
        if word in default:
            return style
    stems = (f"{base}-", icon.raw.removesuffix("regular")) if icon.raw.endswith("-regular") else (f"{base}-",)
    if icon.stroked or any(stem + word in siblings for stem in stems for word in ("fill", "filled", "solid")):
        return "outline"
    return "filled" if f"{base}-outline" in siblings or f"outline-{base}" in siblings else ""


def _finish(draft: _Draft, splits: Mapping[str, str], vocabulary: Mapping[str, int]) -> Named | None:
    icon = draft.icon
    tags = list(filter(None, map(clean_tag, draft.tags)))
    if icon.set == "openclipart":
        draft.words, tags = _clipart_words(draft.words, tags, vocabulary)
    name = to_name(draft.words, splits)
    if not name:
        return None
    aliases = [to_name(words, splits) for words in draft.aliases]
    own = [text for text in (*aliases, *tags) if text]
    return Named(icon.source_id, icon.set, draft.licence, name, draft.style, merge_texts(name, own, ()))


def _clipart_words(words: list[str], tags: list[str], vocabulary: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The file name of a clipart if all of it is English, else its first keyword; nothing if there is neither."""

    def known(text: str) -> bool:
        return all(vocabulary.get(word, 0) > 2 for word in text.split())

    tags = [tag for tag in tags if known(tag)]
    text = " ".join(words)
    if known(text) and text not in BROAD and all(len(word) > 1 or word == "a" for word in words) and len(text) > 2:
        return words, tags
    narrow = [tag for tag in tags if tag not in BROAD]
    return (narrow[0].split() if narrow else []), tags


def _vote_source(prefix: str) -> str:
    """Sets of one family are one voice: fa6-solid and fa7-regular, the emoji sets (all named by CLDR)."""
    if "emoji" in prefix or prefix in FLAG_SETS or prefix in ("noto", "noto-v1", "fxemoji"):
        return "emoji"
    return re.split(r"[-\d]", prefix)[0]
