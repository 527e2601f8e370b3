import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from mome.icons import build, render, sources, splits
from mome.icons.assemble import Named
from mome.icons.card import attribution, data_card, training_sheet
from mome.icons.collect import Icon, IconSet
from mome.icons.naming import concept_key

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64" viewBox="0 0 64 64">'
SQUARE = HEAD + '<path d="M10 10h40v40h-40z"/></svg>'


def row(name, icon_set="mdi", raw=None, texts=(), licence="MIT", style=""):
    return Named(f"{icon_set}:{raw or name.replace(' ', '-')}", icon_set, licence, name, style, [name, *texts])


def picture(identifier, pixels):
    """A rendered icon whose alpha is `pixels`, (64, 64)."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., 3] = pixels
    return render._encode(identifier, Image.fromarray(rgba))


def blob(seed):
    """Alpha of a random drawing: big blocks."""
    return np.kron(np.random.default_rng(seed).integers(0, 2, (8, 8)), np.ones((8, 8))).astype(np.uint8) * 255


def test_concepts_are_held_out_in_any_word_order_and_number():
    assert concept_key("arrows left") == concept_key("left arrow") != concept_key("right arrow")
    names = [f"thing {number}" for number in range(4000)]
    assert 0.04 < np.mean([splits.is_held_out(name) for name in names]) < 0.06


def test_no_concept_is_on_two_sides():
    names = [f"thing {number}" for number in range(3000)]
    sides = {split: set() for split in splits.SPLITS}
    for icon_set in ("mdi", "lucide", "healthicons", "streamline-freehand-color"):
        for name in names:
            sides[splits.assign_split(icon_set, name)].add(name)
    assert all(sides.values())
    assert not sides["train"] & (sides["validation"] | sides["test"])
    assert not sides["validation"] & sides["test"]
    assert not sides["healthicons-train"] & (sides["healthicons-test"] | sides["validation"] | sides["test"])
    assert sides["freehand"] == set(names)


def held_out_names(split, count):
    names = (f"thing {number}" for number in range(100_000))
    return [name for name in names if splits.assign_split("mdi", name) == split][:count]


def test_look_alikes_leave_train_and_small_marks_are_no_look_alikes():
    drawing, other, marked = blob(0), blob(1), blob(0)
    marked[24:40, 24:40] = 255 - marked[24:40, 24:40]
    nearly = drawing.copy()
    nearly[0, 0:3] = 255 - nearly[0, 0:3]
    (tested,), (trained, again, different, small) = held_out_names("test", 1), held_out_names("train", 4)
    rows = [row(name) for name in (tested, trained, again, different, small)]
    images = (drawing, drawing, nearly, other, marked)
    pictures = {one.source_id: picture(one.source_id, pixels) for one, pixels in zip(rows, images)}
    kept, kept_splits, dropped = build.split_rows(rows, pictures)
    assert [one.name for one in kept] == [tested, different, small]
    assert kept_splits == ["test", "train", "train"]
    assert dropped == {"repetitions": 0, "look-alikes across splits": 2}


def test_stripes_that_differ_are_no_look_alikes():
    """Nearly all frequencies of stripes are zero, so that their hashes are alike whatever their shades."""
    (tested,), (trained, again) = held_out_names("test", 1), held_out_names("train", 2)
    rows = [row(name) for name in (tested, trained, again)]
    shades = [(255, 120, 60), (255, 40, 60), (255, 120, 60)]
    pictures = {}
    for one, three in zip(rows, shades):
        pixels = np.repeat(np.array(three, np.uint8), [22, 20, 22])[None].repeat(64, axis=0)
        pictures[one.source_id] = picture(one.source_id, pixels)
    first, second, _ = (np.frombuffer(one.hash, np.uint8) for one in pictures.values())
    assert np.bitwise_count(first ^ second).sum() <= splits.SAME_BITS
    kept, _, dropped = build.split_rows(rows, pictures)
    assert [one.name for one in kept] == [tested, trained] and dropped["look-alikes across splits"] == 1


DIGEST = """
import hashlib
import random
import numpy as np
from mome.icons.render import perceptual_hash

digest = hashlib.sha256()
for seed in range(40):
    drawn = np.frombuffer(random.Random(seed).randbytes(16 * 16 * 4), np.uint8).reshape(16, 16, 4)
    pixels = drawn.repeat(4, axis=0).repeat(4, axis=1)
    pixels[..., :3] //= 1 + seed % 3
    for symmetric in (pixels, np.maximum(pixels, pixels[:, ::-1]), np.maximum(pixels, pixels.transpose(1, 0, 2))):
        digest.update(perceptual_hash(symmetric))
print(digest.hexdigest())
"""


@pytest.mark.parametrize("threads, core", [("1", "Prescott"), ("2", "Haswell")])
def test_the_hash_is_the_same_on_every_machine(threads, core):
    """As OpenBLAS computes on two kinds of processors: the products of floating-point numbers differ between them."""
    settings = {"OPENBLAS_NUM_THREADS": threads, "OPENBLAS_CORETYPE": core}
    found = subprocess.run([sys.executable, "-c", DIGEST], env=os.environ | settings, capture_output=True, text=True)
    assert found.stdout.startswith("d8cfdd97ef4360b6"), found.stderr


def test_frequencies_that_are_zero_count_as_zero():
    """A left half that mirrors the right one has no odd frequencies across, so that their bits are all alike."""
    half = np.random.default_rng(0).integers(0, 256, (64, 32), np.uint8)
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 3] = np.concatenate([half, half[:, ::-1]], axis=1)
    bits = np.unpackbits(np.frombuffer(render.perceptual_hash(pixels), np.uint8)).reshape(16, 16)
    assert len(set(bits[:, 1::2].ravel().tolist())) == 1
    assert len(set(bits[:, ::2].ravel().tolist())) == 2


def test_the_same_name_and_picture_counts_once_and_train_never_names_what_is_held_out():
    (tested,), (trained,) = held_out_names("test", 1), held_out_names("train", 1)
    rows = [row(trained, raw="x", texts=[tested, "pet"]), row(trained, raw="y"), row(tested, texts=[trained])]
    pictures = {one.source_id: picture(one.source_id, blob(seed)) for one, seed in zip(rows, (0, 0, 1))}
    kept, _, dropped = build.split_rows(rows, pictures)
    assert [one.texts for one in kept] == [[trained, "pet"], [tested, trained]]
    assert dropped["repetitions"] == 1


def test_a_drawing_is_rendered_centred_in_one_colour_or_in_its_own():
    rows = render.render_chunk(
        [
            Icon("s", "square", SQUARE),
            Icon("s", "red", SQUARE.replace("<path", '<path fill="red"')),
            Icon("s", "blank", HEAD + "</svg>"),
            Icon("s", "broken", "<svg"),
        ]
    )
    assert [one.mode for one in rows] == ["LA", "RGBA", "", ""]
    image = Image.open(io.BytesIO(rows[0].png))
    assert image.size == (64, 64) and image.getchannel("A").getbbox() == (10, 10, 50, 50)


def test_margins_of_a_clipart_are_cropped(tmp_path):
    path = tmp_path / "far.svg"
    path.write_text(HEAD + '<path d="M0 0h8v4h-8z"/></svg>')
    assert render.render(Icon("openclipart", "far", path, crop=True)).getchannel("A").getbbox() == (2, 17, 62, 47)


def test_what_is_rendered_is_not_rendered_again(tmp_path, monkeypatch):
    icons = [Icon("s", str(number), SQUARE) for number in range(3)]
    first = list(render.render_sets(icons, tmp_path, processes=1))
    monkeypatch.setattr(render, "render_chunk", None)  # would fail if it were called
    assert list(render.render_sets(icons, tmp_path, processes=1)) == first
    assert [one.source_id for one in first] == ["s:0", "s:1", "s:2"]


def die_at_two(icons):
    """Stands for a renderer that takes its process down."""
    if any(icon.raw == "2" for icon in icons):
        os._exit(1)
    return render.render_chunk(icons)


def test_a_drawing_that_kills_its_process_costs_only_itself():
    icons = [Icon("s", str(number), SQUARE) for number in range(5)]
    [(chunk, rows)] = render._in_processes(die_at_two, [icons], processes=1)
    assert chunk == icons and [one.mode for one in rows] == ["LA", "LA", "", "LA", "LA"]


def test_an_archive_with_another_hash_is_refused(tmp_path):
    archive = tmp_path / "archives" / "lucide-static-1.62.0.tgz"
    archive.parent.mkdir()
    archive.write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="expected 386f90.*: delete it and run again"):
        sources._download(sources.SOURCES["lucide-static"], archive.parent)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_archive_is_unpacked_into_a_relative_folder(tmp_path, monkeypatch):
    control = tmp_path / "package" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text("Package: words\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: words\n")
    listed = tmp_path / "package" / "usr" / "share" / "words"
    listed.parent.mkdir(parents=True)
    listed.write_text("house")
    subprocess.run(["dpkg-deb", "--build", "package", "words.deb"], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    folder = sources._unpack(sources.SOURCES["wamerican-small"], Path("words.deb"), Path("cache"))
    assert (folder / "words").read_text() == "house"


def test_a_row_less_does_not_move_the_others(tmp_path):
    names = held_out_names("validation", 12)
    rows = [row(name, texts=["pet"]) for name in names]
    pictures = {each.source_id: picture(each.source_id, blob(number)) for number, each in enumerate(rows)}

    def order_of(chosen, folder):
        build.write_splits(tmp_path / folder, chosen, ["validation"] * len(chosen), pictures)
        return pq.read_table(tmp_path / folder / "validation-00000-of-00001.parquet")["name"].to_pylist()

    for folder in ("all", "less"):
        (tmp_path / folder).mkdir()
    whole, less = order_of(rows, "all"), order_of([*rows[:4], *rows[5:]], "less")
    assert less == [name for name in whole if name != names[4]]
    assert whole != names and sorted(whole) == sorted(names)


def test_the_files_load_as_a_hugging_face_data_set(tmp_path):
    names = [*held_out_names("test", 3), *held_out_names("train", 3), *held_out_names("validation", 2)]
    rows = [row(name, texts=["pet"], style="outline") for name in names]
    rows[0].related, rows[0].gloss = ["animal"], "one that lives"
    rows.append(row("syringe", "healthicons"))
    pictures = {one.source_id: picture(one.source_id, blob(seed)) for seed, one in enumerate(rows)}
    labels = [splits.assign_split(one.set, one.name) for one in rows]
    counts = build.write_splits(tmp_path, rows, labels, pictures)
    (tmp_path / "README.md").write_text(data_card(made_up_sets(), rows, labels, {}, {}))
    data = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in data.items()} == {"train": 3, "validation": 2, "test": 3}
    assert sum(counts.values()) == len(rows)
    example = next(each for each in data["test"] if each["name"] == names[0])
    assert example["texts"] == [example["name"], "pet"] and example["license"] == "MIT"
    assert example["related"] == ["animal"] and example["gloss"] == "one that lives"
    assert example["image"].mode == "LA" and example["image"].size == (64, 64)
    build.write_splits(tmp_path, rows[:1], labels[:1], pictures)  # another build replaces it
    assert not list(tmp_path.glob("*.partial"))


def made_up_sets():
    licence = "https://example.org/licence"
    return [
        IconSet("mdi", "Material", "Ann", "https://example.org/ann", "MIT", licence),
        IconSet("healthicons", "Health", "", "https://example.org/health", "CC-BY-4.0"),
        IconSet("unused", "Unused", "Bob", "https://example.org/bob", "MIT"),
    ]


def test_the_attribution_names_every_set_that_is_in_the_data_and_no_other():
    text = attribution(made_up_sets(), [row("dog"), row("cat"), row("syringe", "healthicons", licence="CC-BY-4.0")])
    assert "## MIT" in text and "## CC-BY-4.0" in text
    assert "[Material](https://example.org/ann) by Ann ([licence](https://example.org/licence)): 2 pictures" in text
    assert "[Health](https://example.org/health): 1 picture," in text
    assert "Unused" not in text
    assert all(source.name in text and source.version in text for source in sources.SOURCES.values())
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in text


def test_the_card_counts_and_the_sheet_shows():
    rows = [row(f"thing {number}") for number in range(12)]
    card = data_card(made_up_sets(), rows, ["train"] * 10 + ["test"] * 2, {"x": "logos"}, {"repetitions": 7})
    assert "| train | 10 | 10 |" in card and "| test | 2 | 2 |" in card and "7 repetitions" in card
    images = {one.source_id: picture(one.source_id, blob(seed)).png for seed, one in enumerate(rows)}
    sheet = training_sheet(rows, ["train"] * 12, images, count=12)
    assert sheet.size == (1900, 152) and np.asarray(sheet).std() > 10
