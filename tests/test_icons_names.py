import json

import pytest

from mome.icons.assemble import drawing_style, flag_code, keep_person, limit_variants, name_icons
from mome.icons.collect import Icon, clipart_name, iconify_set
from mome.icons.licences import reason_to_skip
from mome.icons.naming import fused_words, strip_style, to_name, to_words
from mome.icons.texts import Emoji, clean_tag, merge_texts, natural_label, shared_synonyms


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


def test_a_set_gives_few_variants_of_one_drawing():
    class Draft:
        def __init__(self, base, raw):
            self.base, self.icon = base, Icon("s", raw, "")

    drafts = [Draft("home", f"home-{number}") for number in range(9)] + [Draft("sun", "sun")]
    kept = limit_variants(drafts, limit=3)
    assert [draft.base for draft in kept] == ["home"] * 3 + ["sun"]
    assert kept == limit_variants(drafts, limit=3)
