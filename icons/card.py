"""Data card, attribution and contact sheet: written by the build, so that they cannot disagree with the data."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.sheet import Cell, Grid, Line, contact_sheet
from .assemble import Named
from .collect import IconSet
from .compose import compose_icons
from .rules import ICON_SENSES
from .sources import SOURCES
from .splits import SPLITS

LICENCE_URLS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "BSD-3-Clause": "https://opensource.org/license/bsd-3-clause",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "ISC": "https://opensource.org/license/isc-license-txt",
    "MIT": "https://opensource.org/license/mit",
    "Unlicense": "https://unlicense.org",
    "public domain": "https://creativecommons.org/publicdomain/mark/1.0/",
}
SPLIT_NOTES = {
    "train": "what models learn from",
    "validation": "held-out concepts, to choose on",
    "test": "held-out concepts, to report on",
    "healthicons-train": "an unseen set, to adapt to",
    "healthicons-test": "the other concepts of that set",
    "freehand": "an unseen hand-drawn set",
}
# To appear on all copies of the database.
WORDNET_LICENCE = """\
> This software and database is being provided to you, the LICENSEE, by Princeton University under the following
> license. By obtaining, using and/or copying this software and database, you agree that you have read, understood, and
> will comply with these terms and conditions.:
>
> Permission to use, copy, modify and distribute this software and database and its documentation for any purpose and
> without fee or royalty is hereby granted, provided that you agree to comply with the following copyright notice and
> statements, including the disclaimer, and that the same appear on ALL copies of the software, database and
> documentation, including modifications that you make for internal use or for distribution.
>
> WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.
>
> THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES,
> EXPRESS OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR
> WARRANTIES OF MERCHANT- ABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE,
> DATABASE OR DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.
>
> The name of Princeton University or Princeton may not be used in advertising or publicity pertaining to distribution
> of the software and/or database. Title to copyright in this software, database and any associated documentation shall
> at all times remain with Princeton University and LICENSEE agrees to preserve same.
"""


def write_card(
    folders: Sequence[Path],
    sets: Sequence[IconSet],
    rows: Sequence[Named],
    splits: Sequence[str],
    skipped: Mapping[str, str],
    dropped: Mapping[str, int],
    images: Mapping[str, bytes],
) -> None:
    """Writes `README.md`, `ATTRIBUTION.md` and `contact-sheet.png`.

    Args:
        folders: where to write them.
        sets: the icon sets that were used.
        rows: examples of the data set.
        splits: split of each example.
        skipped: reason of each set that was left out.
        dropped: how many examples were dropped for which reason.
        images: PNG of each example by `source_id`.
    """
    sheet = training_sheet(rows, splits, images)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(data_card(sets, rows, splits, skipped, dropped))
        (folder / "ATTRIBUTION.md").write_text(attribution(sets, rows))
        sheet.save(folder / "contact-sheet.png", optimize=True)


def attribution(sets: Sequence[IconSet], rows: Sequence[Named]) -> str:
    """The attribution of every set that is in the data, licence by licence, and of the sources of the texts."""
    counts = Counter(row.set for row in rows)
    used = [one for one in sets if counts[one.prefix]]
    lines = [
        "# Attribution",
        "",
        "The pictures of mome-icons are renderings, at 64 x 64 pixels, of drawings of the sets below; the names were",
        "put into plain words. Nothing else was changed. Trademarks belong to their owners; logos were left out.",
    ]
    for licence in sorted({one.licence for one in used}):
        lines += ["", f"## {licence}", "", f"<{LICENCE_URLS[licence]}>", ""]
        for one in sorted((one for one in used if one.licence == licence), key=lambda one: one.title.lower()):
            author = f" by {one.author}" if one.author else ""
            text = f" ([licence]({one.licence_url}))" if one.licence_url else ""
            home = f"[{one.title}]({one.url})" if one.url else one.title
            lines.append(f"- {home}{author}{text}: {_pictures(counts[one.prefix])}, `{one.prefix}`")
    lines += ["", "## Packages that they and their texts came from", "", "| package | version | licence | gave |"]
    lines += ["|---|---|---|---|"]
    lines += [f"| {one.name} | {one.version} | {one.licence} | {one.holds} |" for one in SOURCES.values()]
    lines += [
        "",
        "## WordNet",
        "",
        "The columns `related` and `gloss` are taken from WordNet, and the list of countable",
    ]
    lines += ["nouns in captions was chosen with its help. Its licence:", "", *WORDNET_LICENCE.splitlines()]
    return "\n".join(lines) + "\n"


def _pictures(count: int) -> str:
    return f"{count:,} picture{'' if count == 1 else 's'}"


def data_card(
    sets: Sequence[IconSet],
    rows: Sequence[Named],
    splits: Sequence[str],
    skipped: Mapping[str, str],
    dropped: Mapping[str, int],
) -> str:
    """The data card, filled in with the numbers of this build."""
    by_split, names = Counter(splits), {split: set() for split in SPLITS}
    for row, split in zip(rows, splits):
        names[split].add(row.name)
    licences, styles = Counter(row.licence for row in rows), Counter(row.style or "not said" for row in rows)
    by_set, reasons = Counter(row.set for row in rows), Counter(skipped.values())
    template = (Path(__file__).parent / "card.md").read_text()
    texts = sum(len(row.texts) for row in rows)
    return template.format(
        total=f"{len(rows):,}",
        concepts=f"{len({row.name for row in rows}):,}",
        sets=len(by_set),
        texts=f"{texts / len(rows):.1f}",
        related=f"{len({row.name for row in rows if row.related}):,}",
        glosses=f"{len({row.name for row in rows if row.gloss}):,}",
        senses=len(ICON_SENSES),
        splits=_table(
            ("split", "pictures", "names", "for"),
            [(split, f"{by_split[split]:,}", f"{len(names[split]):,}", SPLIT_NOTES[split]) for split in SPLITS],
        ),
        licences=_table(("licence", "pictures"), [(name, f"{count:,}") for name, count in licences.most_common()]),
        styles=_table(("style", "pictures"), [(name, f"{count:,}") for name, count in styles.most_common()]),
        dropped=", ".join(f"{count:,} {reason}" for reason, count in dropped.items()),
        skipped=_table(("left out because", "sets"), [(name, str(count)) for name, count in reasons.most_common()]),
        by_set=_table(
            ("set", "licence", "pictures"),
            [(f"`{one.prefix}`", one.licence, f"{by_set[one.prefix]:,}") for one in sets if by_set[one.prefix]],
        ),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def training_sheet(
    rows: Sequence[Named], splits: Sequence[str], images: Mapping[str, bytes], count: int = 100, seed: int = 0
) -> Image.Image:
    """Composed training pictures with their captions, more scenes and sentences among them than training draws."""
    rng = np.random.default_rng(seed)
    train = [row for row, split in zip(rows, splits) if split == "train"]
    chosen = [train[index] for index in rng.permutation(len(train))[:count]]
    examples = [
        {"image": Image.open(io.BytesIO(images[row.source_id])), "text": row.name, "name": row.name, "set": row.set,
         "style": row.style}
        for row in chosen
    ]  # fmt: skip
    composed = compose_icons(examples, rng, scene_share=0.3, sentence_share=0.8)
    cells = [Cell(each["image"], [Line(each["text"], size=10, most=5)]) for each in composed]
    return contact_sheet([Grid(cells, columns=10, side=64, width=190, beside=True)])
