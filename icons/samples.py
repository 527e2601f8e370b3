"""Two dozen pictures of the sets that are held out whole, large enough to look at, with their attribution.

    python -m mome.icons.samples --data .cache/icons --output samples

Which ones is a rule, and nobody's eye: of each of the two sets, the drawings whose name WordNet defines (so that
everybody can tell what is meant), in the order of the SHA-256 of `set:icon`, the first twelve with different names.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from .collect import Icon, IconSet, iter_sets
from .render import render
from .sources import fetch_sources

SIDE, OF_EACH = 256, 12
FILES = ("freehand-*.parquet", "healthicons-*.parquet")  # a pattern for each of the sets
HEAD = """# Sample pictures

Pictures of the two icon sets that are held out whole: the shipped weights have seen other drawings of these things,
but none of these sets. Of each set, these are the first twelve different names by the SHA-256 of `set:icon`, among
those that WordNet defines; nobody chose them. At 256 pixels, painted on white and otherwise unchanged. Written by
`python -m mome.icons.samples`.

| picture | set | author | licence |
| --- | --- | --- | --- |
"""


def order(source_id: str) -> str:
    """What drawings are sorted by: as good as chance, and the same everywhere."""
    return hashlib.sha256(source_id.encode()).hexdigest()


def choose(rows: Sequence[dict], known: Sequence[str] = (), count: int = OF_EACH) -> dict[str, str]:
    """Name → `set:icon` of the samples of a set.

    Args:
        rows: with `name`, `gloss` and `source_id`; those without a definition are passed over.
        known: names that are taken.
        count: how many.
    """
    found: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: order(row["source_id"])):
        if row["gloss"] and row["name"] not in known and len(found) < count:
            found.setdefault(row["name"], row["source_id"])
    return found


def chosen(data: Path) -> dict[str, str]:
    """Name → `set:icon` of all samples, by name.

    Raises:
        FileNotFoundError: `data` does not hold the data set.
    """
    found: dict[str, str] = {}
    for pattern in FILES:
        files = sorted(data.glob(pattern))
        if not files:
            raise FileNotFoundError(f"no {pattern} in {data}: python -m mome.icons.build --output {data}")
        columns = ["name", "gloss", "source_id"]
        rows = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
        found |= choose(rows, [*found])
    return dict(sorted(found.items()))


def find(sets: list[IconSet], source_id: str) -> tuple[IconSet, Icon]:
    """The set and the drawing of an identifier `set:icon`.

    Raises:
        LookupError: if no set has it.
    """
    for one in sets:
        for icon in one.icons:
            if icon.source_id == source_id:
                return one, icon
    raise LookupError(f"no drawing {source_id!r} in the sources")


def write(output: Path, data: Path, cache: Path):
    """Writes the pictures, `metadata.jsonl` as `datasets` reads it, and `ATTRIBUTION.md`."""
    samples = chosen(data)
    wanted = {source_id.partition(":")[0] for source_id in samples.values()}
    sets = [one for one in iter_sets(fetch_sources(cache)) if one.prefix in wanted]
    output.mkdir(parents=True, exist_ok=True)
    records, lines = [], []
    for name, source_id in samples.items():
        own, icon = find(sets, source_id)
        picture, file = Image.new("RGBA", (SIDE, SIDE), "white"), f"{name.replace(' ', '-')}.png"
        picture.alpha_composite(render(icon, SIDE))
        picture.convert("RGB").quantize(128).save(output / file, optimize=True)
        records.append({"file_name": file, "text": name, "source": source_id, "license": own.licence})
        lines.append(f"| {file} | [{own.title}]({own.url}) | {own.author} | {own.licence} |")
    (output / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (output / "ATTRIBUTION.md").write_text(HEAD + "\n".join(lines) + "\n")


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".cache/icons"), help="folder of the data set")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder of downloads (default: `cache` in --data)")
    options = parser.parse_args(arguments)
    write(options.output, options.data, options.cache or options.data / "cache")


if __name__ == "__main__":
    main()
