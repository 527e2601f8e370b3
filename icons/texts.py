"""Further words for an icon: aliases and tags of its own set, emoji keywords, and tags on which sources agree.

Tags of a set describe the drawing of that set, so that they stay there. A tag that two independent sources give to the
same name is a synonym and goes to every icon of that name.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .naming import to_name, to_words

MAX_TEXTS = 16
# Words of catalogues, which say nothing about a picture.
STOP_TAGS = frozenset(
    "brand brands category clip art clipart color contour cpan deprecated design dev emoji etc general how i did it "
    "icon icons image logo misc monochrome new none other others outline png random svg symbol symbols template test "
    "uncategorized unknown unsorted vector various web".split()
) | {"clip art", "how i did it", "line art", "clip-art", "public domain", "web2.0", "signs and symbols"}


@dataclass(frozen=True)
class Emoji:
    """Names of one emoji: its label, the label without a skin tone, its keywords, and whether it shows people."""

    label: str
    base_label: str
    tags: tuple[str, ...]
    toned: bool
    person: bool


def natural_label(label: str) -> str:
    """An emoji's label as words: "flag: Andorra" -> "flag of andorra", "man: beard" -> "man with beard"."""
    head, colon, tail = label.lower().replace("’", "'").partition(": ")
    tail = re.sub(r"\s*,\s*", " and ", tail)
    joint = {"flag": "of", "family": "of", "keycap": "", "kiss": "of", "couple with heart": "of"}.get(head, "with")
    joint = "" if tail.startswith("facing") else joint
    return to_name(f"{head} {joint if colon else ''} {tail}".split())


def load_emoji(emojibase: Path, cldr: Path) -> dict[str, Emoji]:
    """Emoji by code points (`1f436`, variation selectors left out), skin tones included.

    Args:
        emojibase: folder of emojibase-data.
        cldr: folder of cldr-annotations-full.
    """
    annotations = json.loads((cldr / "annotations/en/annotations.json").read_text())["annotations"]["annotations"]
    found = {}
    for entry in json.loads((emojibase / "en/data.json").read_text()):
        base = natural_label(entry["label"])
        country = base.startswith("flag of")  # two letters are its code
        tags = (*entry.get("tags", ()), *annotations.get(entry["emoji"], {}).get("default", ()))
        tags = tuple(tag for tag in tags if not country or len(tag) > 2)
        person = entry.get("group") == 1
        for variant in (entry, *entry.get("skins", ())):
            toned = variant is not entry
            found[emoji_key(variant["hexcode"])] = Emoji(natural_label(variant["label"]), base, tags, toned, person)
    return found


def emoji_key(hexcode: str) -> str:
    """Code points in one spelling: lower case, joined by hyphens, without variation selectors."""
    return "-".join(part for part in hexcode.lower().replace("_", "-").split("-") if part != "fe0f")


def load_tags(folders: Mapping[str, Path]) -> dict[str, dict[str, list[str]]]:
    """Aliases and tags by icon set and identifier, from the sets' own packages.

    Args:
        folders: folder of each source by slug.
    """
    lucide = json.loads((folders["lucide-static"] / "tags.json").read_text())
    tabler = json.loads((folders["tabler-icons"] / "icons.json").read_text())
    material = json.loads((folders["mdi-svg"] / "meta.json").read_text())
    module = (folders["phosphor-icons-core"] / "dist/index.mjs").read_text()
    # The package is JavaScript only: its table of icons is read by its regular shape, name first, then the tags.
    phosphor = re.findall(r'\bname: "([^"]+)",.*?\btags: \[(.*?)\]', module, re.DOTALL)
    return {
        "lucide": lucide,
        "tabler": {name: [str(tag) for tag in entry.get("tags", ())] for name, entry in tabler.items()},
        "mdi": {entry["name"]: entry["aliases"] for entry in material},
        "ph": {name: re.findall(r'"([^"]+)"', tags) for name, tags in phosphor},
    }


def clean_tag(tag: str) -> str:
    """A tag as natural words, or an empty string if it says nothing about a picture."""
    text = "" if tag.strip().isdigit() else to_name(to_words(tag.strip("* ")))
    plain = re.search(r"[a-z]{2}", text) and len(text) <= 32 and len(text.split()) <= 4
    return text if plain and text not in STOP_TAGS else ""


def shared_synonyms(votes: Iterable[tuple[str, str, str]]) -> dict[str, list[str]]:
    """Tags that at least two sources give to the same name.

    Args:
        votes: triples of source, name and tag.

    Returns:
        Synonyms by name, the most agreed on first.
    """
    sources: dict[tuple[str, str], set[str]] = defaultdict(set)
    for source, name, tag in votes:
        sources[name, tag].add(source)
    agreed: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for (name, tag), voters in sources.items():
        if len(voters) > 1:
            agreed[name].append((-len(voters), tag))
    return {name: [tag for _, tag in sorted(tags)] for name, tags in agreed.items()}


def merge_texts(name: str, own: Iterable[str], shared: Iterable[str], forbidden: Iterable[str] = ()) -> list[str]:
    """The texts of one icon: its name, then its own aliases and tags, then shared synonyms, without repetitions."""
    unwanted = set(forbidden)
    texts = dict.fromkeys([name, *own, *shared])
    return [text for text in texts if text == name or (text and text not in unwanted)][:MAX_TEXTS]
