"""Two dozen pictures of held-out concepts, large enough to look at, with their attribution.

python -m mome.icons.samples --output samples [--cache DIR]
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from .collect import Icon, IconSet, iter_sets
from .render import render
from .sources import fetch_sources
from .splits import is_held_out

SIDE = 256
# Name → picture. No model sees these concepts in training; they are not chosen by what a model makes of them.
SAMPLES = {
    "bacon": "twemoji:bacon",
    "barbell": "famicons:barbell",
    "bed": "noto-v1:bed",
    "bee": "openclipart:animals/bugs/bee",
    "candy": "fluent-emoji-flat:candy",
    "charging station": "material-symbols:charging-station-outline",
    "cherry blossom": "fluent-emoji-3d:1f338",
    "compass": "ri:compass-3-fill",
    "dinosaur": "iconmind:dinosaur-outline-bold",
    "dragon": "noto:dragon",
    "eiffel tower": "mdi:eiffel-tower",
    "firefighter": "fluent-emoji-flat:firefighter",
    "gift": "ph:gift-bold",
    "island": "ph:island-fill",
    "music note": "glyphs-poly:music-note",
    "pineapple": "fluent-emoji-flat:pineapple",
    "rain": "mingcute:rain-line",
    "raven": "game-icons:raven",
    "rocket launch": "heroicons:rocket-launch",
    "saturn": "hugeicons:saturn",
    "spiral shell": "emojione:spiral-shell",
    "toolbox": "fluent-emoji-3d:1f9f0",
    "ufo": "tabler:ufo",
    "washing machine": "ph:washing-machine-duotone",
}
HEAD = """# Sample pictures

Pictures of concepts that no weights of this project were trained on, at 256 pixels, painted on white and otherwise
unchanged. Written by `python -m mome.icons.samples`.

| picture | set | author | licence |
| --- | --- | --- | --- |
"""


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


def write(output: Path, cache: Path):
    """Writes the pictures, `metadata.jsonl` as `datasets` reads it, and `ATTRIBUTION.md`."""
    wanted = {source_id.partition(":")[0] for source_id in SAMPLES.values()}
    sets = [one for one in iter_sets(fetch_sources(cache)) if one.prefix in wanted]
    output.mkdir(parents=True, exist_ok=True)
    records, lines = [], []
    for name, source_id in SAMPLES.items():
        if not is_held_out(name):
            raise ValueError(f"{name!r} is not held out: choose another sample")
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
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(".cache/icons/cache"), help="folder of downloads")
    options = parser.parse_args(arguments)
    write(options.output, options.cache)


if __name__ == "__main__":
    main()
