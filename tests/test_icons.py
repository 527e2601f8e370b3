import io
import json
import os

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from mome.training.icons import build, render, sources, splits
from mome.training.icons.assemble import Named, drawing_style, flag_code, keep_person, limit_variants, name_icons
from mome.training.icons.card import attribution, contact_sheet, data_card
from mome.training.icons.collect import Icon, IconSet, clipart_name, iconify_set
from mome.training.icons.licences import reason_to_skip
from mome.training.icons.naming import concept_key, fused_words, strip_style, to_name, to_words
from mome.training.icons.texts import Emoji, clean_tag, merge_texts, natural_label, shared_synonyms

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


@pytest.mark.parametrize(
    "raw, siblings, declared, base, styles",
    [
        ("account-outline", ["account"], [], "account", ("outline",)),
        ("twotone-alarm", ["twotone-alarm"], ["twotone"], "alarm", ("two-tone",)),
        ("shield-sharp-two-tone", [], ["sharp", "two-tone"], "shield", ("two-tone",)),
        ("home-24-filled", [], ["24-filled"], "home", ("filled",)),
        ("subway-line", ["subway-fill"], ["line", "fill"], "subway", ("outline",)),
        ("chart-line", ["chart-line"], [], "chart-line", ()),
        ("traffic-light", ["traffic-light", "traffic-light-outline"], [], "traffic-light", ()),
        ("format-bold", ["format-italic"], [], "format-bold", ()),
        ("outline", ["outline"], [], "outline", ()),
    ],
)
def test_a_style_is_taken_off_only_where_it_is_no_part_of_the_name(raw, siblings, declared, base, styles):
    assert strip_style(raw, siblings, declared) == (base, styles)


@pytest.mark.parametrize(
    "base, name",
    [
        ("credit-card-2", "credit card"),
        ("dice-3", "dice 3"),
        ("user-02", "user"),
        ("ArrowLeft", "arrow left"),
        ("t-shirt", "t-shirt"),
        ("wi-fi", "wifi"),
        ("image_file", "image file"),
        ("a", "letter a"),
        ("7", "number 7"),
        ("arrowleft2", "arrowleft"),
        ("mp3", "mp3"),
        ("cog", "gear"),
        ("côte-d’ivoire", "cote d ivoire"),
        ("10k", ""),
        ("?", ""),
    ],
)
def test_identifiers_become_words(base, name):
    assert to_name(to_words(base)) == name


def test_fused_words_are_split_as_other_names_write_them():
    names = [
        ["alarmclock"],
        ["alarm", "clock"],
        ["alarm", "clock", "off"],
        ["keyboard"],
        ["keyboard"],
        ["key", "board"],
    ]
    splits_found = fused_words(names)
    assert splits_found == {"alarmclock": "alarm clock"}
    assert to_name(["alarmclock", "off"], splits_found) == "alarm clock off"


@pytest.mark.parametrize(
    "label, name",
    [
        ("flag: Peru", "flag of peru"),
        ("man: beard", "man with beard"),
        ("family: man, woman, boy", "family of man and woman and boy"),
        ("person in manual wheelchair: facing right", "person in manual wheelchair facing right"),
        ("dog face", "dog face"),
    ],
)
def test_emoji_labels_read_naturally(label, name):
    assert natural_label(label) == name


def test_a_country_code_is_the_flag_of_the_country():
    assert flag_code("ad-4x3") == flag_code("ad") == "1f1e6-1f1e9"
    assert flag_code("gb-eng").startswith("1f3f4-")
    assert flag_code("jolly-roger") == ""


def test_clipart_is_named_by_its_file_without_the_author():
    svg = "<dc:title>x</dc:title><dc:title>Leif Lodahl</dc:title>"
    assert clipart_name("bison_leif_lodahl_01", svg) == clipart_name("bison_leif_lod", svg) == "bison"
    assert clipart_name("pop_can", svg) == "pop_can"


def test_tags_that_two_sources_give_are_shared_and_catalogue_words_are_not_tags():
    votes = [("mdi", "dog", "pet"), ("ph", "dog", "pet"), ("mdi", "dog", "puppy"), ("mdi", "dog", "puppy")]
    assert shared_synonyms(votes) == {"dog": ["pet"]}
    assert [clean_tag(tag) for tag in ("*new*", "143", "clip art", "Heart-Rate monitor")] == [
        "", "", "", "heart rate monitor",
    ]  # fmt: skip
    assert merge_texts("dog", ["pet", "pet", "dog"], ["animal", "pet"]) == ["dog", "pet", "animal"]


@pytest.mark.parametrize(
    "licence", ["CC-BY-NC-4.0", "CC-BY-SA-4.0", "GPL-3.0", "GPL-2.0-or-later", "OFL-1.1", "MPL-2.0", "something new"]
)
def test_only_permissive_licences_get_in(licence):
    assert licence in reason_to_skip("any", licence, "UI 24px")
    assert reason_to_skip("any", "MIT", "UI 24px") is None


def test_brands_and_the_twin_of_a_held_out_set_stay_out():
    assert reason_to_skip("simple-icons", "CC0-1.0", "Logos") == reason_to_skip("devicon", "MIT", "Programming")
    assert "held-out" in reason_to_skip("streamline-freehand", "CC-BY-4.0", None)
    assert reason_to_skip("streamline-freehand-color", "CC-BY-4.0", None) is None


def test_skin_tones_and_persons_are_subsampled_and_things_are_not():
    person = Emoji("man running", "man running", (), False, True)
    toned = Emoji("man running with dark skin tone", "man running", (), True, True)
    kept = {
        kind: sum(keep_person(f"set:{number}", entry, "x") for number in range(2000)) / 2000
        for kind, entry in (("thing", None), ("person", person), ("toned", toned))
    }
    assert kept["thing"] == 1 and 0.45 < kept["person"] < 0.55 and 0.08 < kept["toned"] < 0.12


def test_the_set_says_the_style():
    siblings = {"home", "home-fill", "star", "star-outline"}
    assert drawing_style(Icon("s", "home", ""), "home", (), siblings, {}) == "outline"
    assert drawing_style(Icon("s", "star", ""), "star", (), siblings, {}) == "filled"
    assert drawing_style(Icon("s", "home-fill", ""), "home", ("filled",), siblings, {}) == "filled"
    assert drawing_style(Icon("s", "moon", ""), "moon", (), siblings, {}) == ""


def test_naming_joins_aliases_tags_and_drops_brands(tmp_path):
    folders = made_up_sources(tmp_path)
    info = {"name": "Lucide", "license": {"spdx": "ISC", "title": "ISC"}, "author": {"name": "L", "url": "u"}}
    icons = {
        name: {"body": '<path fill="none" stroke="red"/>'} for name in ("activity", "brand-acme", "acme", "sun-2")
    }
    data = {"prefix": "lucide", "icons": icons, "aliases": {"pulse-line": {"parent": "activity"}}}
    named = {one.source_id: one for one in name_icons([iconify_set(info, data)], folders)}
    assert named["lucide:activity"].texts == ["activity", "pulse line", "heart rate"]
    assert named["lucide:activity"].style == "outline" and named["lucide:activity"].licence == "ISC"
    assert named["lucide:sun-2"].name == "sun"
    assert not any("acme" in identifier for identifier in named)


def made_up_sources(folder):
    """Folders with the few files that naming reads."""
    files = {
        "iconify-json/json/bxl.json": {"icons": {"acme": {}}},
        "lucide-static/tags.json": {"activity": ["heart-rate"]},
        "tabler-icons/icons.json": {},
        "mdi-svg/meta.json": [],
        "emojibase-data/en/data.json": [],
        "cldr-annotations-full/annotations/en/annotations.json": {"annotations": {"annotations": {}}},
    }
    for brands in ("simple-icons", "logos", "fa7-brands", "cib", "thesvg", "devicon"):
        files[f"iconify-json/json/{brands}.json"] = {"icons": {"acme": {}}}
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    (folder / "phosphor-icons-core/dist").mkdir(parents=True)
    (folder / "phosphor-icons-core/dist/index.mjs").write_text('const n = [{name: "acorn", c: [1], tags: ["nut"]}];')
    return {path.name: path for path in folder.iterdir()}


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


def test_the_same_name_and_picture_counts_once_and_train_never_names_what_is_held_out():
    (tested,), (trained,) = held_out_names("test", 1), held_out_names("train", 1)
    rows = [row(trained, raw="x", texts=[tested, "pet"]), row(trained, raw="y"), row(tested, texts=[trained])]
    pictures = {one.source_id: picture(one.source_id, blob(seed)) for one, seed in zip(rows, (0, 0, 1))}
    kept, _, dropped = build.split_rows(rows, pictures)
    assert [one.texts for one in kept] == [[trained, "pet"], [tested, trained]]
    assert dropped["repetitions"] == 1


def test_a_set_gives_few_variants_of_one_drawing(tmp_path):
    class Draft:
        def __init__(self, base, raw):
            self.base, self.icon = base, Icon("s", raw, "")

    drafts = [Draft("home", f"home-{number}") for number in range(9)] + [Draft("sun", "sun")]
    kept = limit_variants(drafts, limit=3)
    assert [draft.base for draft in kept] == ["home"] * 3 + ["sun"]
    assert kept == limit_variants(drafts, limit=3)


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


def test_the_files_load_as_a_hugging_face_data_set(tmp_path):
    names = [*held_out_names("test", 3), *held_out_names("train", 3), *held_out_names("validation", 2)]
    rows = [row(name, texts=["pet"], style="outline") for name in names]
    rows.append(row("syringe", "healthicons"))
    pictures = {one.source_id: picture(one.source_id, blob(seed)) for seed, one in enumerate(rows)}
    labels = [splits.assign_split(one.set, one.name) for one in rows]
    counts = build.write_splits(tmp_path, rows, labels, pictures)
    (tmp_path / "README.md").write_text(data_card(made_up_sets(), rows, labels, {}, {}))
    data = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in data.items()} == {"train": 3, "validation": 2, "test": 3}
    assert sum(counts.values()) == len(rows)
    example = data["test"][0]
    assert example["texts"] == [example["name"], "pet"] and example["license"] == "MIT"
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


def test_the_card_counts_and_the_sheet_shows():
    rows = [row(f"thing {number}") for number in range(12)]
    card = data_card(made_up_sets(), rows, ["train"] * 10 + ["test"] * 2, {"x": "logos"}, {"repetitions": 7})
    assert "| train | 10 | 10 |" in card and "| test | 2 | 2 |" in card and "7 repetitions" in card
    images = {one.source_id: picture(one.source_id, blob(seed)).png for seed, one in enumerate(rows)}
    sheet = contact_sheet(rows, ["train"] * 12, images, count=12)
    assert sheet.size == (1900, 152) and np.asarray(sheet).std() > 10
