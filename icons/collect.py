"""Reads the sources into icon sets: identifiers, drawings, licence and author, before any cleaning of names."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import unescape

from .licences import reason_to_skip

SIDE = 64  # pixels of a rendered icon
SVG_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


@dataclass
class Icon:
    """One drawing and what its source says about it.

    Args:
        set: identifier of the icon set, for example `mdi`.
        raw: identifier inside the set.
        drawing: an SVG document, or the path of an SVG or bitmap file.
        aliases: other identifiers or keywords of this drawing.
        emoji: code points (`1f436`) where the set says them.
        stroked: whether it is drawn with lines only.
        crop: whether the file has margins of its own that have to go.
    """

    set: str
    raw: str
    drawing: str | Path
    aliases: tuple[str, ...] = ()
    emoji: str = ""
    stroked: bool = False
    crop: bool = False

    @property
    def source_id(self) -> str:
        """Identifier of the drawing in the whole collection, `set:icon`."""
        return f"{self.set}:{self.raw}"


@dataclass
class IconSet:
    """An icon set with its attribution; `icons` are read on demand.

    Args:
        prefix: identifier, for example `mdi`.
        title: its own name.
        author: who made it.
        url: home page of the set or of its author.
        licence: SPDX identifier.
        licence_url: text of the licence.
        styles: suffixes and prefixes that the set declares as styles, with their names.
        brands: identifiers that the set files under brands or logos.
        topics: words of the set's categories, which some sets put before the name.
    """

    prefix: str
    title: str
    author: str
    url: str
    licence: str
    licence_url: str = ""
    styles: dict[str, str] = field(default_factory=dict)
    brands: frozenset[str] = frozenset()
    topics: frozenset[tuple[str, ...]] = frozenset()
    icons: list[Icon] = field(default_factory=list)


def iter_sets(folders: Mapping[str, Path], skipped: dict[str, str] | None = None) -> Iterator[IconSet]:
    """Every icon set that may be used, one at a time.

    Args:
        folders: folder of each source by slug.
        skipped: filled with the reason of each set that is left out, by its identifier.
    """
    collections = json.loads((folders["iconify-json"] / "collections.json").read_text())
    for prefix, info in sorted(collections.items()):
        reason = reason_to_skip(prefix, info["license"].get("spdx", info["license"]["title"]), info.get("category"))
        if reason is None:
            yield iconify_set(info, json.loads((folders["iconify-json"] / f"json/{prefix}.json").read_text()))
        elif skipped is not None:
            skipped[prefix] = reason
    yield pictogram_set(folders["carbon-pictograms"])
    yield emoji_set(folders["lobehub-fluent-emoji-3d"])
    yield clipart_set(folders["openclipart-svg"] / "openclipart/svg")


def iconify_set(info: Mapping, data: Mapping) -> IconSet:
    """An icon set of the Iconify collection.

    Args:
        info: its entry in `collections.json`.
        data: its own file.
    """
    prefix, author, licence = data["prefix"], info.get("author", {}), info["license"]
    aliases: dict[str, list[str]] = {}
    for name, alias in data.get("aliases", {}).items():
        if not {"rotate", "hFlip", "vFlip"} & set(alias):  # a turned drawing is another drawing
            aliases.setdefault(alias["parent"], []).append(name)
    emoji = {name: code for code, name in data.get("chars", {}).items()} if info.get("category") == "Emoji" else {}
    categories = data.get("categories", {}).items()
    brands = frozenset(
        name for title, names in categories if re.search(r"brand|logo|social media", title, re.I) for name in names
    )
    topics = frozenset(
        tuple(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", t).lower())) for t, _ in categories
    )
    icons = []
    for name, icon in data["icons"].items():
        body = icon["body"]
        lines = re.search(r'stroke="(?!none)', body) is not None and 'fill="none"' in body
        left, top = icon.get("left", data.get("left", 0)), icon.get("top", data.get("top", 0))
        width, height = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
        box = f'{SVG_HEAD} width="{SIDE}" height="{SIDE}" viewBox="{left} {top} {width} {height}">'
        icons.append(
            Icon(
                prefix,
                name,
                f"{box}{body}</svg>",
                tuple(aliases.get(name, ())),
                emoji.get(name, ""),
                lines and 'fill="currentColor"' not in body,
            )
        )
    styles = {**(data.get("suffixes") or {}), **(data.get("prefixes") or {})}
    url, text = author.get("url", licence.get("url", "")), licence.get("url", "")
    spdx = licence.get("spdx", licence["title"])
    return IconSet(prefix, info["name"], author.get("name", ""), url, spdx, text, styles, brands, topics, icons)


def pictogram_set(folder: Path) -> IconSet:
    """IBM's Carbon pictograms, with their aliases."""
    entries = json.loads((folder / "metadata.json").read_text())["icons"]
    icons = [
        Icon("carbon-pictograms", entry["name"], path, tuple(entry.get("aliases", ())), crop=False)
        for entry in entries
        if (path := folder / "svg" / f"{entry['name']}.svg").exists()
    ]
    home = "https://github.com/carbon-design-system/carbon"
    text = f"{home}/blob/main/LICENSE"
    return IconSet("carbon-pictograms", "Carbon Pictograms", "IBM", home, "Apache-2.0", text, icons=icons)


def emoji_set(folder: Path) -> IconSet:
    """Microsoft's Fluent emoji, the three-dimensional rendering; names come from the code points."""
    icons = [
        Icon("fluent-emoji-3d", path.stem, path, emoji=path.stem)
        for path in sorted((folder / "assets").glob("*.webp"))
    ]
    home = "https://github.com/microsoft/fluentui-emoji"
    title = "Fluent Emoji 3D"
    return IconSet(
        "fluent-emoji-3d", title, "Microsoft Corporation", home, "MIT", f"{home}/blob/main/LICENSE", icons=icons
    )


def clipart_set(folder: Path) -> IconSet:
    """The Open Clip Art library as Debian packs it; themes of desktops and generated star polygons are left out."""
    icons = []
    for path in sorted(folder.rglob("*.svg")):
        parts = path.relative_to(folder).parts
        if any(part.endswith("-theme") for part in parts) or parts[0] == "logos" or re.match(r"star_\d+pt", path.name):
            continue
        text = path.read_text(errors="replace")
        icons.append(
            Icon(
                "openclipart", "/".join(parts)[:-4], path, (clipart_name(path.stem, text), *_keywords(text)), crop=True
            )
        )
    home = "https://openclipart.org"
    return IconSet(
        "openclipart", "Open Clip Art Library", "its contributors", home, "public domain", f"{home}/share", icons=icons
    )


def clipart_name(stem: str, svg: str) -> str:
    """The file name without the author's name, which the library cut off somewhere and appended.

    Args:
        stem: file name, for example `bison_leif_lodahl_01`.
        svg: contents, whose metadata name the author.
    """
    name = re.sub(r"[_-]*\d*$", "", stem.lower().rstrip("_.")).rstrip("_-.")
    name = re.sub(r"[_-]+r$", "", name)
    for author in re.findall(r"<dc:title>([^<]*)</dc:title>", svg)[1:]:
        slug = re.sub(r"[^a-z0-9]+", "_", unescape(author).lower()).strip("_")
        for length in range(len(slug), 3, -1):
            if name.endswith("_" + slug[:length].strip("_")):
                return name[: -len(slug[:length].strip("_")) - 1]
    return name


def _keywords(svg: str) -> list[str]:
    bag = re.search(r"<dc:subject>(.*?)</dc:subject>", svg, re.DOTALL)
    words = re.findall(r"<rdf:li>([^<]*)</rdf:li>", bag[1]) if bag else []
    return [unescape(word).strip().lower() for word in words if not word.lower().startswith("hash")]
