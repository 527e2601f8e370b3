"""Makes what the Space comes with: the gallery, its embeddings, the examples and their attribution.

    python space/build_gallery.py --icons .cache/icons      # all of it, from the data set mome-icons
    python space/build_gallery.py                           # the embeddings alone, after a change of the weights

The gallery is the two sets that mome-icons holds out whole: no model trained on it has seen a picture of them. The
checkpoint is the one that the Space would load (`MOME_CHECKPOINT` names another).
"""

import argparse
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mome_space.gallery import EMBEDDINGS_FILE, FOLDER, GALLERY_FILE, UNLABELLED, Gallery, Index, embed_gallery
from mome_space.loading import load_engine

# "- [Name](url) by Author ([licence](url)): 1,234 pictures, `prefix`"; both links may be missing.
ATTRIBUTION_LINE = re.compile(
    r"- (?:\[(?P<linked>[^\]]+)\]\((?P<url>[^)]+)\)|(?P<plain>.+?)) by (?P<author>.+?)"
    r"(?: \(\[licence\]\((?P<licence>[^)]+)\)\))?: [\d,]+ pictures?, `(?P<prefix>[^`]+)`$"
)
FILES = ("freehand-*.parquet", "healthicons-*.parquet")  # of the held-out sets
EXAMPLE_SIDE = 256
# Pictures that the tabs offer to try: their id in the gallery, and the file they become.
EXAMPLES = {
    "1-circus-tent": "streamline-freehand-color:circus-tent",
    "2-typewriter": "streamline-freehand-color:content-typewriter",
    "3-eye": "healthicons:eye",
    "4-headphones": "streamline-freehand-color:headphones-1",
    "5-hospital": "healthicons:hospital",
    "6-camera": "streamline-freehand-color:camera-tripod",
}


def read_attribution(path: Path) -> dict[str, dict[str, str]]:
    """ATTRIBUTION.md of mome-icons → per set its title, author and links."""
    sets = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        found = ATTRIBUTION_LINE.match(line)
        if found:
            sets[found["prefix"]] = {
                "set": found["linked"] or found["plain"],
                "author": found["author"],
                "set_url": found["url"] or "",
                "license_url": found["licence"] or "",
            }
    return sets


def build_gallery(icons: Path) -> pa.Table:
    """The held-out sets of mome-icons as the Space's table, in the order of their ids.

    Raises:
        FileNotFoundError: `icons` holds no such data set.
        KeyError: a set without attribution.
    """
    files = [file for pattern in FILES for file in sorted(icons.glob(pattern))]
    if len(files) < len(FILES):
        raise FileNotFoundError(f"no {' or '.join(FILES)} in {icons}: python -m mome.icons.build --output {icons}")
    sets = read_attribution(icons / "ATTRIBUTION.md")
    rows = []
    for row in sorted(pa.concat_tables(map(pq.read_table, files)).to_pylist(), key=lambda row: row["source_id"]):
        rows.append(
            {
                "png": row["image"]["bytes"],
                "name": row["name"],
                "texts": row["texts"],
                "style": row["style"] or UNLABELLED,
                "id": row["source_id"],
                "license": row["license"],
                **sets[row["set"]],
            }
        )
    return pa.Table.from_pylist(rows)


def write_examples(gallery: Gallery, folder: Path):
    """The example pictures, enlarged and over white, as visitors would drop them."""
    by_id = {entry.id: entry for entry in gallery.entries}
    folder.mkdir(exist_ok=True)
    for name, id in EXAMPLES.items():
        icon = by_id[id].open().convert("RGBA").resize((EXAMPLE_SIDE, EXAMPLE_SIDE), Image.Resampling.LANCZOS)
        picture = Image.alpha_composite(Image.new("RGBA", icon.size, "white"), icon).convert("RGB")
        picture.quantize(64).save(folder / f"{name}.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, help="folder of mome-icons; without it, only embeddings are made")
    arguments = parser.parse_args()
    if arguments.icons is not None:
        pq.write_table(build_gallery(arguments.icons), GALLERY_FILE, compression="zstd")
        shutil.copyfile(arguments.icons / "ATTRIBUTION.md", FOLDER / "ATTRIBUTION.md")
        write_examples(Gallery(), FOLDER / "examples")
    gallery = Gallery()
    engine = load_engine()
    fingerprint = Index(engine, gallery).fingerprint
    embed_gallery(engine, gallery).save(EMBEDDINGS_FILE, fingerprint)
    print(f"{len(gallery):,} pictures of {len(gallery.sets)} sets; embeddings in {EMBEDDINGS_FILE}")


if __name__ == "__main__":
    main()
