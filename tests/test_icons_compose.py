import re

import numpy as np
import pytest
from PIL import Image

from mome.icons.captions import article, scene_caption, sentence, split_noun, thing
from mome.icons.compose import compose_icons
from mome.icons.palette import NAMES, contrast, hsv_to_rgb, name_colours, sample_colours

THINGS = "bicycle house tree dog cat car key ball clock lamp".split()


def icon(size=64, box=(16, 16, 48, 48), colour=None):
    """A square in one colour, or black with alpha only."""
    left, top, right, bottom = box
    pixels = np.zeros((size, size, 2 if colour is None else 4), np.uint8)
    pixels[top:bottom, left:right, -1] = 255
    if colour is not None:
        pixels[top:bottom, left:right, :3] = colour
    return pixels


def examples(count=64, **columns):
    return [
        {"image": icon(), "text": THINGS[place % 10], "name": THINGS[place % 10], "set": "mdi", "style": "", **columns}
        for place in range(count)
    ]


def compose(items, seed=0, **options):
    return compose_icons(items, np.random.default_rng(seed), **options)


def ink(picture):
    """Where a picture differs from its background, (side, side)."""
    ground = picture[0, 0].astype(int)
    return np.abs(picture.astype(int) - ground).sum(axis=-1) > 60


def test_pictures_and_texts_depend_on_the_generator_alone():
    items = examples()
    before = [{**item, "image": item["image"].copy()} for item in items]
    first, second, third = compose(items), compose(items), compose(items, seed=1)
    assert all(np.array_equal(a["image"], b["image"]) and a["text"] == b["text"] for a, b in zip(first, second))
    assert any(not np.array_equal(a["image"], b["image"]) for a, b in zip(first, third))
    for item, old in zip(items, before):  # the examples are not changed
        assert np.array_equal(item.pop("image"), old.pop("image")) and item == old


@pytest.mark.parametrize("side", [32, 64, 96])
def test_every_example_gives_one_picture_of_the_asked_size(side):
    items = [*examples(5), {"image": Image.fromarray(icon(colour=(200, 30, 30))), "text": "apple"}]
    made = compose(items, side=side, scene_share=0.5)
    assert len(made) == 6
    assert all(item["image"].shape == (side, side, 3) and item["image"].dtype == np.uint8 for item in made)
    assert all(ink(item["image"]).any() for item in made)
    assert made[0]["set"] == "mdi" and compose([]) == []


def test_plain_pictures_are_dark_on_white_and_their_texts_untouched():
    items = [*examples(3), {"image": icon(colour=(200, 30, 30)), "text": "apple"}]
    made = compose(items, plain=True)
    assert [item["text"] for item in made] == [item["text"] for item in items]
    for item, colour in zip(made, [(24, 24, 24)] * 3 + [(200, 30, 30)]):
        assert item["image"][0, 0].tolist() == [255, 255, 255]
        assert np.abs(item["image"][32, 32].astype(int) - colour).max() <= 1
    assert np.array_equal(made[0]["image"], compose(items, seed=9, plain=True)[0]["image"])
    small = compose(items, plain=True, side=32)[3]["image"]
    assert small[0, 0].tolist() == [255, 255, 255] and np.abs(small[16, 16].astype(int) - (200, 30, 30)).max() <= 1


def test_a_colour_that_a_caption_names_is_that_of_the_icon():
    said = 0
    for item in compose(examples(400), scene_share=0, sentence_share=1):
        before_ground = re.sub(r"on an? \w+ background", "", item["text"])
        for name in set(before_ground.split()) & set(NAMES):
            said += 1
            pixels = item["image"][ink(item["image"])].astype(np.float32)
            assert NAMES[int(name_colours(np.median(pixels, axis=0)))] == name, item["text"]
    assert said > 100


def test_faint_icons_are_seen_and_mixed_ones_have_no_colour_word():
    faint, mixed = icon(), icon(box=(8, 8, 56, 56))
    faint[..., -1] //= 5
    mixed[10:56, 8:56, -1] = 70  # a firm edge, pale inside
    assert compose([{"image": faint, "text": "x"}], plain=True)[0]["image"].min() == 24
    items = [{"image": mixed, "text": "ball", "name": "ball"}] * 100
    for item in compose(items, scene_share=0, sentence_share=1):
        assert not set(re.sub(r"on an? \w+ background", "", item["text"]).split()) & set(NAMES)


def test_a_background_that_a_caption_names_is_that_of_the_picture():
    said = 0
    for item in compose(examples(400), scene_share=0, sentence_share=1):
        if match := re.search(r"on an? (\w+) background", item["text"]):
            said += 1
            assert NAMES[int(name_colours(item["image"][0, 0].astype(np.float32)))] == match[1]
    assert said > 10


def test_a_coloured_icon_keeps_its_colours_and_is_called_by_its_main_one():
    red, mixed = icon(colour=(220, 20, 20)), icon(colour=(220, 20, 20))
    mixed[16:48, 16:32, :3] = (20, 60, 230)
    items = [{"image": red, "text": "apple", "name": "apple"}] * 80 + [{"image": mixed, "text": "box"}] * 80
    made = compose(items, scene_share=0, sentence_share=1)
    words = [set(re.sub(r"on an? \w+ background", "", item["text"]).split()) & set(NAMES) for item in made]
    assert {"red"} in words[:80] and all(found <= {"red"} for found in words[:80])
    assert all(not found for found in words[80:])
    middle = [np.median(item["image"][ink(item["image"])], axis=0) for item in made[:80]]
    assert np.abs(np.array(middle) - (220, 20, 20)).max() <= 3


def test_left_right_above_and_below_are_where_the_caption_says():
    colours = {"house": (220, 20, 20), "tree": (20, 160, 40), "dog": (30, 60, 230)}
    items = [{"image": icon(colour=colours[name]), "text": name, "name": name} for name in colours] * 250
    seen = set()
    for item in compose(items, scene_share=1):
        named = re.findall(r"house|tree|dog", item["text"])
        if len(named) < 2:
            continue
        distance = {name: np.abs(item["image"].astype(int) - colours[name]).sum(axis=-1) < 40 for name in named}
        middle = {name: np.argwhere(near).mean(axis=0) for name, near in distance.items()}  # row, column
        for words, axis, sign in (
            (" left of ", 1, 1),
            (" to the left of ", 1, 1),
            (" right of ", 1, -1),
            (" above ", 0, 1),
            (" below ", 0, -1),
            (" under ", 0, -1),
            ("from left to right", 1, 1),
            ("from top to bottom", 0, 1),
            ("on the left and", 1, 1),
            ("at the top and", 0, 1),
        ):
            if words in item["text"]:
                seen.add(words)
                assert all(sign * (middle[b][axis] - middle[a][axis]) > 3 for a, b in zip(named, named[1:])), item[
                    "text"
                ]
        if " between " in item["text"]:
            seen.add("between")
            low, high = sorted((middle[named[1]].sum(), middle[named[2]].sum()))
            assert low < middle[named[0]].sum() < high
    assert len(seen) >= 10


def test_a_scene_has_a_name_of_its_own_and_never_two_of_a_kind():
    scenes = [item for item in compose(examples(300), scene_share=1) if item["name"] not in THINGS]
    assert len(scenes) > 200
    for item in scenes:
        assert item["name"] == item["text"]
        named = [word for word in re.findall(r"\w+", item["text"]) if word in THINGS]
        assert 2 <= len(named) == len(set(named)) <= 3
    assert all(item["name"] in THINGS for item in compose(examples(), scene_share=0))


def test_names_that_speak_of_directions_stay_out_of_scenes():
    items = examples(20) + [{"image": icon(), "text": "arrow left", "name": "arrow left"}] * 20
    assert not any("arrow left" in item["text"] for item in compose(items, scene_share=1, sentence_share=0)[:20])
    assert all(item["text"] == "arrow left" for item in compose(items, scene_share=1, sentence_share=0)[20:])


def test_pictures_are_never_mirrored_or_turned_far():
    flag = icon(box=(8, 8, 24, 56))
    flag[8:24, 24:56, -1] = 255  # heavy at the left and at the top
    items = [{"image": flag, "text": "flag", "name": "flag"}] * 200
    for item in compose(items, scene_share=0):
        rows, columns = np.nonzero(ink(item["image"]))
        centre = np.array([rows.min() + rows.max(), columns.min() + columns.max()]) / 2
        assert rows.mean() < centre[0] and columns.mean() < centre[1]


def test_every_icon_can_be_seen():
    shades = [icon(colour=(level, level, level)) for level in (0, 60, 120, 180, 255)]
    items = [{"image": shades[place % 5], "text": THINGS[place % 10]} for place in range(200)] + examples(200)
    for item in compose(items):
        ground = item["image"][0, 0].astype(np.float32)
        pixels = item["image"].reshape(-1, 3).astype(np.float32)
        assert contrast(pixels, ground).max() > 1.8, item["text"]


def test_sentences_and_scenes_are_no_captions_where_that_is_asked_for():
    for sentences_too in (True, False):
        made = compose(examples(300), scene_share=0.2, sentence_share=0.5, caption_sentences=sentences_too)
        assert {item["captioned"] for item in made if item["text"] in THINGS} == {True}
        assert {item["captioned"] for item in made if item["text"] not in THINGS} == {sentences_too}


def test_shares_are_kept_and_bad_input_is_named():
    plain_texts = [item["text"] in THINGS for item in compose(examples(600), scene_share=0.2, sentence_share=0.5)]
    assert 0.3 < np.mean(plain_texts) < 0.5
    assert all(item["text"] in THINGS for item in compose(examples(), scene_share=0, sentence_share=0))
    tagged = [{**item, "text": "tag"} for item in examples(600)]
    called = [item["text"] != "tag" for item in compose(tagged, scene_share=0, sentence_share=0, name_share=0.7)]
    assert 0.6 < np.mean(called) < 0.8
    with pytest.raises(ValueError, match="scene_share=2 must be between 0 and 1"):
        compose(examples(), scene_share=2)
    with pytest.raises(ValueError, match=r"image 1 has shape \(64, 64, 3\)"):
        compose([*examples(1), {"image": np.zeros((64, 64, 3), np.uint8), "text": "x"}])


def test_colours_are_what_their_names_say():
    names = np.repeat(np.arange(len(NAMES)), 300)
    assert np.array_equal(name_colours(sample_colours(names, np.random.default_rng(0))), names)
    assert NAMES[int(name_colours(np.array([255.0, 0, 0])))] == "red"
    assert int(name_colours(np.array([128.0, 160, 60]))) == -1  # between yellow and green
    assert np.allclose(hsv_to_rgb(np.array([[120.0, 1, 1], [0, 0, 0.5]])), [[0, 255, 0], [127.5, 127.5, 127.5]])


@pytest.mark.parametrize(
    "name, phrase",
    [
        ("bicycle", "a bicycle"),
        ("umbrella", "an umbrella"),
        ("user", "a user"),
        ("hourglass", "an hourglass"),
        ("scissors", "scissors"),
        ("trolleybus", "a trolleybus"),
        ("upload", "an upload icon"),
        ("x-ray", "an x-ray icon"),
        ("flag of peru", "the flag of peru"),
        ("letter a", "the letter a"),
        ("face with tears of joy", "a face with tears of joy"),
        ("calendar heart", "a calendar heart icon"),
        ("arrow in up right circle", "an arrow in up right circle icon"),
        ("man in tuxedo", "a man in tuxedo"),
    ],
)
def test_names_get_the_article_that_english_gives_them(name, phrase):
    assert thing(name, "", "icon") == phrase


def test_sentences_read_naturally():
    texts = {sentence("bicycle", "icon", "red", "outline", "", (0.0, draw / 7)) for draw in range(7)}
    assert "a red outline icon of a bicycle" in texts and "a red bicycle" in texts and "a bicycle in red" in texts
    assert thing("glasses", "blue", "icon") == "blue glasses" and split_noun("upload") is None
    assert article("hour") == "an hour" and article("unicorn") == "a unicorn"
    assert scene_caption(["a house", "a tree"], False, 0.0) == "a house left of a tree"
    assert scene_caption(["a house", "a tree"], True, 0.0) == "a house above a tree"


def test_a_redrawn_icon_has_thicker_or_thinner_lines_or_its_outline_alone():
    items = [item | {"style": "filled"} for item in examples(200)]
    thin_lined = [item | {"image": icon(box=(30, 8, 32, 56))} for item in items]
    options = {"scene_share": 0, "sentence_share": 1, "colour_share": 0, "redraw_share": 1}
    hollow = thick = thin = 0
    for item in compose(items, **options):
        height, width = (np.flatnonzero(ink(item["image"]).any(axis=axis)) for axis in (1, 0))
        centre = item["image"][(height[0] + height[-1]) // 2, (width[0] + width[-1]) // 2]
        if centre.min() > 200:  # the background's white
            hollow += 1
            assert "filled" not in item["text"]
    assert 30 < hollow < 80
    for before, after in zip(compose(thin_lined, **options | {"redraw_share": 0}), compose(thin_lined, **options)):
        dark, darker = ((255 - each["image"].astype(int)).sum() for each in (before, after))
        thick, thin = thick + (darker > dark), thin + (darker < dark)
        assert darker > 0.45 * dark  # nothing thin is lost
    assert thick > thin > 0
    coloured = [item | {"image": icon(colour=(200, 30, 30))} for item in items]
    for before, after in zip(compose(coloured, **options | {"redraw_share": 0}), compose(coloured, **options)):
        assert np.array_equal(before["image"], after["image"])


def test_a_stretched_icon_is_narrower_or_lower_and_in_the_picture():
    shapes = []
    for item in compose(examples(200), scene_share=0, colour_share=0, stretch=0.3):
        seen = ink(item["image"])
        shapes.append(seen.any(axis=0).sum() / seen.any(axis=1).sum())
    assert min(shapes) < 0.8 and max(shapes) > 1.2 and 0.65 < min(shapes) and max(shapes) < 1 / 0.65
    for item in compose(examples(200), scene_share=0, colour_share=0):
        seen = ink(item["image"])
        assert abs(int(seen.any(axis=0).sum()) - int(seen.any(axis=1).sum())) <= 3


@pytest.mark.parametrize("option", ["redraw_share", "stretch"])
def test_shares_of_changes_beyond_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option}=1.5"):
        compose(examples(2), **{option: 1.5})
