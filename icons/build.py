"""Builds the data set: `python -m mome.icons.build --output DIR [--cache DIR]`.

    sources -> icon sets -> names, texts, relations -> 64 px pictures -> splits without look-alikes -> parquet, card

Everything that was downloaded or rendered stays in the cache: a run that was cut off goes on where it stopped, and
changed rules for names take a minute. The result is read by `datasets.load_dataset(DIR)`.
"""

import argparse
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import missing_package

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import resvg_py  # noqa: F401
    import tqdm  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(missing_package(error, "icons"), name=error.name) from None

from .assemble import Named, name_icons
from .card import write_card
from .collect import SIDE, iter_sets
from .render import Rendered, render_sets
from .sources import fetch_sources
from .splits import SPLITS, assign_split, is_held_out, look_alikes, repetitions
from .wordnet import Nouns, relations

ROWS_PER_FILE = 50_000
FEATURES = {
    "image": {"_type": "Image"},
    "texts": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "related": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    **{
        name: {"dtype": "string", "_type": "Value"}
        for name in ("gloss", "name", "set", "style", "license", "source_id")
    },
}


def build(output: Path, cache: Path, processes: int = 2, docs: Path | None = None) -> dict[str, int]:
    """Builds the data set.

    Args:
        output: folder for the parquet files, the data card, the attribution and the contact sheet.
        cache: folder that keeps downloads and rendered pictures.
        processes: how many render at a time.
        docs: a further folder for card, attribution and contact sheet.

    Returns:
        Number of examples by split.
    """
    folders = fetch_sources(cache)
    skipped: dict[str, str] = {}
    sets = list(iter_sets(folders, skipped))
    total = sum(len(one.icons) for one in sets)
    print(f"{total:,} icons of {len(sets)} sets; {len(skipped)} sets left out", flush=True)
    pictures = {
        picture.source_id: picture
        for picture in render_sets((icon for one in sets for icon in one.icons), cache / "rendered", processes)
    }
    print(f"{total - len(pictures):,} of them are blank or cannot be rendered", flush=True)
    named = [row for row in name_icons(sets, folders) if row.source_id in pictures]
    for row in named:
        if pictures[row.source_id].mode == "RGBA" and row.style in ("", "bold", "filled", "outline", "thin"):
            row.style = "colour"  # what a set calls outline has coloured areas as well
    print(f"{len(named):,} icons with a name and a picture", flush=True)
    add_relations(named, Nouns(folders["wordnet-base"] / "wordnet"))
    rows, splits, dropped = split_rows(named, pictures)
    output.mkdir(parents=True, exist_ok=True)
    counts = write_splits(output, rows, splits, pictures)
    images = {source_id: picture.png for source_id, picture in pictures.items()}
    write_card([output, *([docs] if docs else [])], sets, rows, splits, skipped, dropped, images)
    return counts


def add_relations(rows: Sequence[Named], nouns: Nouns) -> None:
    """Fills in `related` and `gloss`, which are the same for all rows of a name and hold no held-out name."""
    found: dict[str, tuple[list[str], str]] = {}
    for row in rows:
        if row.name not in found:
            found[row.name] = relations(row.name, nouns, is_held_out)
        row.related, row.gloss = found[row.name]


def split_rows(named: Sequence[Named], pictures: dict[str, Rendered]) -> tuple[list[Named], list[str], dict[str, int]]:
    """Assigns splits, drops repetitions and look-alikes, and takes held-out names out of the texts of train.

    Returns:
        The rows that stay, their splits, and how many rows were dropped for which reason.
    """
    again = repetitions(
        (f"{row.name}\0{assign_split(row.set, row.name)}", pictures[row.source_id].png) for row in named
    )
    rows = [row for row, repeated in zip(named, again) if not repeated]
    splits = [assign_split(row.set, row.name) for row in rows]
    hashes = np.stack([np.frombuffer(pictures[row.source_id].hash, np.uint8) for row in rows])

    def ink(indices: np.ndarray) -> np.ndarray:
        return np.stack([darkness(pictures[rows[index].source_id].png) for index in indices])

    alike = look_alikes(splits, hashes, ink)
    for row, split in zip(rows, splits):
        if split in ("train", "healthicons-train"):
            row.texts = [text for text in row.texts if not is_held_out(text)]
    kept = [index for index in range(len(rows)) if not alike[index]]
    dropped = {"repetitions": int(again.sum()), "look-alikes across splits": int(alike.sum())}
    print(", ".join(f"{count:,} {reason} dropped" for reason, count in dropped.items()), flush=True)
    return [rows[index] for index in kept], [splits[index] for index in kept], dropped


def darkness(png: bytes) -> np.ndarray:
    """A picture on white, 0 for white to 255 for black, uint8, (16, 16): what look-alikes are compared by."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return 255 - np.asarray(white.convert("L").reduce(SIDE // 16))


def write_splits(
    output: Path, rows: Sequence[Named], splits: Sequence[str], pictures: dict[str, Rendered]
) -> dict[str, int]:
    """Writes the parquet files of every split, and removes those of an earlier build.

    The order is random but each row's own, so that one row more or less does not move the others.
    """
    order = sorted(range(len(rows)), key=lambda index: hashlib.sha256(rows[index].source_id.encode()).digest())
    counts = {}
    written = set()
    for split in SPLITS:
        chosen = [rows[index] for index in order if splits[index] == split]
        counts[split] = len(chosen)
        files = max(1, -(-len(chosen) // ROWS_PER_FILE))
        for number in range(files):
            path = output / f"{split}-{number:05d}-of-{files:05d}.parquet"
            partial = path.with_suffix(".partial")
            pq.write_table(_table(chosen[number::files], pictures), partial, row_group_size=1000)
            partial.rename(path)
            written.add(path)
    for path in output.glob("*.parquet"):
        if path not in written and path.name.rsplit("-", 3)[0] in SPLITS:
            path.unlink()
    return counts


def _table(rows: Sequence[Named], pictures: dict[str, Rendered]) -> pa.Table:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([{"bytes": pictures[row.source_id].png, "path": None} for row in rows], image),
        "texts": pa.array([row.texts for row in rows], pa.list_(pa.string())),
        "related": pa.array([row.related for row in rows], pa.list_(pa.string())),
        "gloss": pa.array([row.gloss for row in rows], pa.string()),
        "name": pa.array([row.name for row in rows], pa.string()),
        "set": pa.array([row.set for row in rows], pa.string()),
        "style": pa.array([row.style for row in rows], pa.string()),
        "license": pa.array([row.licence for row in rows], pa.string()),
        "source_id": pa.array([row.source_id for row in rows], pa.string()),
    }
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}  # what makes `image` decode to a picture
    return pa.table(columns).replace_schema_metadata(metadata)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(prog="python -m mome.icons.build", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the data set")
    parser.add_argument("--cache", type=Path, help="folder for downloads and renderings (default: OUTPUT/cache)")
    parser.add_argument("--processes", type=int, default=2, help="rendering processes (default: 2)")
    parser.add_argument("--docs", type=Path, help="also write data card, attribution and contact sheet here")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: at least 1 is needed")
    try:
        counts = build(options.output, options.cache or options.output / "cache", options.processes, options.docs)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    print(", ".join(f"{split} {count:,}" for split, count in counts.items()))


if __name__ == "__main__":
    main()
