"""Pictures and sentences made on a device: by the rules of `compose_icons` and `captions`, and true."""

import re

import numpy as np
import pytest
import torch

from icon_data import GLOSSES, RELATED, SHAPES, TAGS, rows, tokenizer, words, write_data, write_teacher
from mome.errors import DataError
from mome.icons import phrases as phrasing
from mome.icons.captions import STYLE_ADJECTIVES, sentence
from mome.icons.compose import compose_icons
from mome.icons.drawing import Drawing, Drawn, draw, draw_plain, sample_colours
from mome.icons.palette import NAMES, name_colours
from mome.icons.phrases import Phrases, Phrasing, assemble, bare_texts, captions, descriptions, framed_texts, positives
from mome.icons.splits import SPLITS
from mome.icons.tensors import FILE, KINDS, STYLES, IconTensors, load_icons, normalised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("icons"), {"train": 64, "test": 16, "freehand": 8})
    write_teacher(folder / "teacher", [*SHAPES, *sum(TAGS.values(), []), *sum(RELATED.values(), []), "red", "a"])
    return folder


@pytest.fixture(scope="module")
def icons(folder):
    return load_icons(folder, tokenizer(), folder / "teacher", 16, "cpu")


@pytest.fixture(scope="module")
def phrases():
    return Phrases(tokenizer(), "cpu")


def many(icons, count=4000):
    """Rows of the data set, each many times."""
    torch.manual_seed(0)
    return torch.randint(len(icons), (count,))


def examples(icons, chosen):
    """The same rows as `compose_icons` takes them."""
    made = rows(88)
    pictures = [
        np.concatenate([np.zeros((*each.shape, 1), np.uint8), each[..., None]], axis=2) for each in icons.alpha.numpy()
    ]
    return [
        {
            "image": icons.rgba[icons.place[row]].numpy() if icons.coloured[row] else pictures[icons.place[row]],
            "text": made[row]["name"],
            "name": made[row]["name"],
            "set": made[row]["set"],
            "style": made[row]["style"],
        }
        for row in chosen.tolist()
    ]


# ---------------------------------------------------------------------------------------------------- the tensors


def test_rows_of_the_parquet_files_are_rows_of_the_tensors(icons):
    made = rows(88)
    assert len(icons) == 88 and icons.side == 32
    assert [SPLITS[split] for split in icons.split.tolist()] == ["train"] * 64 + ["test"] * 16 + ["freehand"] * 8
    for row, expected in enumerate(made):
        own = [icons.texts[text] for text in icons.own[row].tolist() if text >= 0]
        name = int(icons.name[row])
        related = [icons.texts[text] for text in icons.related[name].tolist() if text >= 0]
        gloss = icons.texts[icons.gloss[name]] if icons.gloss[name] >= 0 else ""
        assert own == expected["texts"] and icons.texts[name] == expected["name"]
        assert related == expected["related"] and gloss == expected["gloss"]
        assert bool(icons.coloured[row]) == (expected["name"] == "apple")
        style = STYLES[icons.style[row]] if icons.style[row] >= 0 else ""
        assert style == (expected["style"] if expected["style"] in STYLE_ADJECTIVES else "")
        assert KINDS[icons.kind[row]] == ("emoji" if expected["set"] == "noto" else "icon")
    apple = int(icons.coloured.nonzero()[0])
    assert NAMES[icons.main_colour[apple]] == "red" and icons.main_colour[~icons.coloured].eq(-1).all()


def test_the_file_beside_the_parquet_files_is_made_once_and_again_when_they_change(folder, icons, monkeypatch):
    again = load_icons(folder, tokenizer(), folder / "teacher", 16, "cpu")
    for name, tensor in icons._tensors().items():
        assert torch.equal(tensor, getattr(again, name)), name
    assert again.texts == icons.texts
    assert torch.equal(load_icons(folder / FILE, None, None, 0, "cpu").alpha, icons.alpha)
    with pytest.raises(DataError, match="made from other files"):
        IconTensors.load(folder / FILE, source="something else")
    monkeypatch.setattr("mome.icons.tensors._decode", lambda *_: pytest.fail("decoded again"))
    load_icons(folder, tokenizer(), folder / "teacher", 16, "cpu")
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        load_icons(folder, tokenizer(), None, 16, "cpu")


def test_what_is_no_data_set_is_refused_in_a_line(tmp_path, icons):
    with pytest.raises(DataError, match="no parquet files"):
        load_icons(tmp_path, tokenizer(), None, 16, "cpu")
    with pytest.raises(DataError, match="no split 'valid'"):
        icons.rows_of(["valid"])


def test_the_teacher_knows_some_texts_and_words(icons):
    knows = icons.teacher.any(dim=1)
    known = {icons.texts[text] for text in knows.nonzero()[:, 0].tolist()}
    assert {"ball", "sphere", "toy"} <= known and not known & set(GLOSSES.values())
    assert set(icons.known_texts(glosses=False).tolist()) == set(knows.nonzero()[:, 0].tolist())
    width = normalised(icons.teacher, 20)
    assert width.shape[1] == 20 and torch.allclose(width[knows].norm(dim=1), torch.ones(int(knows.sum())), atol=1e-3)
    assert not width[~knows].any()
    pieces = tokenizer().convert_ids_to_tokens(range(len(tokenizer())))
    assert [pieces[row] for row in icons.word_teacher.any(dim=1).nonzero()[:, 0]] == [
        w for w in pieces if w in known | {"a", "red"}
    ]


# --------------------------------------------------------------------------------------------------- the pictures


def test_plain_pictures_equal_those_of_compose_icons(icons):
    chosen = torch.arange(len(icons))
    plain = compose_icons(examples(icons, chosen), np.random.default_rng(0), side=icons.side, plain=True)
    there = np.stack([each["image"] for each in plain]).astype(float)
    here = 255 * draw_plain(icons, chosen).permute(0, 2, 3, 1).numpy()
    assert np.abs(here - there).max() <= 1.01  # whole numbers there


def statistics(pictures, alpha_of_ground):
    """Mean share of ink, its deviation, and mean height and width of what differs from the corner, all in 0…1."""
    different = np.abs(pictures - alpha_of_ground[:, None, None]).sum(axis=-1) > 0.25
    rows_in, columns_in = different.any(axis=2), different.any(axis=1)
    extent = [
        (each.shape[1] - each[:, ::-1].argmax(1) - each.argmax(1)) / each.shape[1] for each in (rows_in, columns_in)
    ]
    ink = different.mean(axis=(1, 2))
    return np.array([ink.mean(), ink.std(), extent[0].mean(), extent[1].mean(), extent[0].std(), extent[1].std()])


def test_ink_and_sizes_are_those_of_compose_icons(icons):
    """Within 3 % of the picture's side and area, over 3,000 pictures each."""
    chosen = many(icons, 3000)
    options = {"redraw_share": 0.3, "stretch": 0.2}
    there = compose_icons(examples(icons, chosen), np.random.default_rng(1), side=icons.side, scene_share=0, **options)
    there = np.stack([each["image"] for each in there]) / 255
    here = draw(icons, chosen, Drawing(redraw=0.3, stretch=0.2)).pictures.permute(0, 2, 3, 1).numpy()
    first, second = (statistics(each, each[:, 0, 0]) for each in (here, there))
    assert np.abs(first - second).max() < 0.03, (first, second)


def colour_shares(pictures, grounds):
    """Share of each named colour, and of none, among grounds and among the colours farthest from them."""
    flat = pictures.reshape(len(pictures), -1, 3)
    distance = np.abs(flat - grounds[:, None]).sum(axis=-1)
    inks = flat[np.arange(len(flat)), distance.argmax(axis=1)]
    counts = [
        np.bincount(name_colours((255 * each).astype(np.float32)) + 1, minlength=len(NAMES) + 1)
        for each in (grounds, inks)
    ]
    return np.stack(counts) / len(pictures)


@pytest.mark.parametrize("colour", [1.0, 0.3])
def test_shares_of_colours_are_those_of_compose_icons(icons, colour):
    """Within 3 points, over 4,000 pictures each."""
    chosen = many(icons)
    chosen = chosen[~icons.coloured[chosen]]
    there = compose_icons(
        examples(icons, chosen), np.random.default_rng(2), side=icons.side, scene_share=0, colour_share=colour
    )
    there = np.stack([each["image"] for each in there]) / 255
    here = draw(icons, chosen, Drawing(colour=colour, turn=0.0)).pictures.permute(0, 2, 3, 1).numpy()
    first, second = (colour_shares(each, each[:, 0, -1]) for each in (here, there))
    assert np.abs(first - second).max() < 0.03, np.abs(first - second).max(axis=1)


FULL = Drawing(1.0, 0.2, 0.3, 0.2, 0.55, 0.3, 12, 0.1, 0.02, 0.2, 0.5)


def test_named_colours_are_true_of_the_pixels(icons):
    """The corner has the ground's colour, and the pixel that differs most from it the ink's."""
    chosen = many(icons, 2000)
    drawn = draw(icons, chosen, FULL)
    pictures = drawn.pictures.permute(0, 2, 3, 1).numpy()
    assert drawn.pictures.min() >= 0 and drawn.pictures.max() <= 1
    corners = np.stack([pictures[:, 0, 0], pictures[:, 0, -1], pictures[:, -1, 0], pictures[:, -1, -1]], axis=1)
    equal = np.ptp(corners, axis=1).max(axis=-1) < 1e-6  # the icon is in none of them
    named = equal & (drawn.ground.numpy() >= 0)
    found = name_colours((255 * corners[:, 0]).astype(np.float32))
    assert named.sum() > 1000 and (found == drawn.ground.numpy())[named].all()
    said = drawn.ink.numpy() >= 0
    flat = pictures.reshape(len(pictures), -1, 3)
    far = np.abs(flat - corners[:, :1]).sum(axis=-1).argmax(axis=1)
    found = name_colours((255 * flat[np.arange(len(flat)), far]).astype(np.float32))
    sure = equal & said
    # Of a thin line that was made smaller and softer even the strongest pixel is mixed a little: one in a hundred.
    assert sure.sum() > 1000 and (found == drawn.ink.numpy())[sure].mean() > 0.99


def test_sampled_colours_have_their_names():
    names = torch.arange(len(NAMES)).repeat(200)
    assert np.array_equal(name_colours((255 * sample_colours(names)).numpy()), names.numpy())


def test_what_changes_an_icons_colour_or_line_leaves_nothing_to_say(icons):
    chosen = many(icons, 2000)
    drawn = draw(icons, chosen, Drawing(recolour=1.0, redraw=1.0))
    assert (drawn.ink[icons.coloured[chosen]] == -1).all() and (drawn.ink[~icons.coloured[chosen]] >= 0).any()
    untouched = draw(icons, chosen, Drawing())
    assert torch.equal(untouched.style, icons.style[chosen].long())
    changed = (drawn.style != icons.style[chosen]) & ~icons.coloured[chosen]
    # A quarter of the filled ones, of which half have a style, become outlines.
    assert 0.03 < changed.float().mean() < 0.12
    coloured = icons.coloured[chosen]
    assert (untouched.ink[coloured] == NAMES.index("red")).all()


def test_every_option_of_a_drawing_changes_the_picture_and_none_at_strength_0(icons):
    chosen = many(icons, 200)

    def pictures(options):
        torch.manual_seed(1)
        return draw(icons, chosen, options).pictures

    base = Drawing(colour=0.0, smallest=1.0, turn=0.0)
    plain = pictures(base)
    changes = {
        "inverted": 1.0,
        "redraw": 1.0,
        "stretch": 0.3,
        "smallest": 0.5,
        "turn": 1.0,
        "warp": 0.05,
        "soften": 1.0,
    }
    changes |= {"recolour": 1.0, "noise": 0.2, "erase": 1.0, "colour": 1.0}
    for name, value in changes.items():
        changed = Drawing(**vars(base) | {name: value})
        assert not torch.equal(pictures(changed), plain), name
        if name not in ("inverted", "smallest", "colour"):
            assert Drawing(**vars(changed)).eased(0.0) == base.eased(0.0), name
    sheared = Drawing(colour=0.0, smallest=1.0, turn=1.0, degrees=0.0, shear=0.2)
    assert not torch.equal(pictures(sheared), plain)
    assert FULL.eased(1.0) == FULL and FULL.eased(0.0).colour == 0.1 and FULL.eased(0.0).smallest == 0.8


# -------------------------------------------------------------------------------------------------- the sentences


def decode(texts):
    found = tokenizer().batch_decode(texts.input_ids, skip_special_tokens=True)
    return [text.replace("hand - drawn", "hand-drawn").replace("two - tone", "two-tone") for text in found]


def every_sentence(name, kind, ink, style, ground):
    """All that `captions.sentence` can say of a picture."""
    colours = {"", NAMES[ink]} if ink >= 0 else {""}
    styles, grounds = {"", style}, {"", NAMES[ground]} if ground >= 0 else {""}
    draws = [(first, second) for first in (0.0, 0.4, 0.7) for second in np.linspace(0, 0.99, 15)]
    return {sentence(name, kind, c, s, g, draw) for c in colours for s in styles for g in grounds for draw in draws}


def test_sentences_are_those_of_captions_and_true(icons, phrases):
    torch.manual_seed(3)
    chosen = many(icons, 1500)
    drawn = draw(icons, chosen, Drawing())
    options = Phrasing(name=0.6, related=0.2, gloss=0.0, sentence=1.0, frame=0.0)
    made = descriptions(icons, phrases, chosen, drawn, options, 16)
    assert not made.bare.any()
    forms = set()
    for index, text in enumerate(decode(made)):
        row = int(chosen[index])
        style = STYLES[drawn.style[index]] if drawn.style[index] >= 0 else ""
        said = icons.texts[made.text[index]]
        can_be = every_sentence(said, KINDS[icons.kind[row]], int(drawn.ink[index]), style, int(drawn.ground[index]))
        assert text in can_be, text
        forms.add(re.sub(rf"\b({'|'.join((said, *NAMES))})\b", "_", text))
    assert len(forms) > 40


def test_all_forms_of_a_sentence_are_said(icons, phrases):
    """For one noun and one other text, every form of `captions.sentence` comes up."""
    for name in ("ball", "upload", "scissors", "apple"):
        row = next(row for row in range(len(icons)) if icons.texts[icons.name[row]] == name)
        count = 3000
        rows_ = torch.full((count,), row)
        one = torch.full((count,), NAMES.index("orange"))
        drawn = Drawn(torch.zeros(count, 1), one, one, torch.full((count,), STYLES.index("outline")))
        options = Phrasing(name=1.0, related=0.0, gloss=0.0, sentence=1.0, frame=0.0)
        said = set(decode(descriptions(icons, phrases, rows_, drawn, options, 24)))
        expected = every_sentence(
            name, KINDS[icons.kind[row]], NAMES.index("orange"), "outline", NAMES.index("orange")
        )
        assert said == expected


def test_frames_and_bare_texts(icons, phrases):
    chosen = many(icons, 800)
    drawn = draw(icons, chosen, Drawing())
    framed = decode(descriptions(icons, phrases, chosen, drawn, Phrasing(gloss=0.0, sentence=1.0, frame=1.0), 16))
    starts = {text.partition(" of ")[0] + " of" for text in framed}
    assert starts == set(phrasing.FRAMES)
    of_apples = {text for text in framed if "icon of" in text and "apple" in text}
    assert of_apples == {"an icon of apple", "an icon of a apple", "an icon of an apple"}  # templates know no grammar
    bare = descriptions(icons, phrases, chosen, drawn, Phrasing(sentence=0.0), 16)
    assert bare.bare.all() and decode(bare) == [icons.texts[text] for text in bare.text.tolist()]
    balls = torch.tensor([icons.texts.index("ball"), icons.texts.index("upload"), icons.texts.index("apple")])
    assert decode(framed_texts(icons, phrases, balls, phrasing.ICON_OF, 16)) == [
        "an icon of a ball",
        "an icon of upload",
        "an icon of an apple",
    ]


def test_shares_of_texts_are_those_asked_for(icons, phrases):
    chosen = many(icons, 6000)
    drawn = draw(icons, chosen, Drawing(colour=0.0))
    options = Phrasing(name=0.5, related=0.2, gloss=0.1, sentence=0.3, frame=0.0)
    made = descriptions(icons, phrases, chosen, drawn, options, 16)
    names = icons.name[chosen].long()
    related = (icons.related[names] == made.text[:, None]).any(dim=1)
    glosses = icons.gloss[names] == made.text
    can_relate, can_gloss = (icons.related[names] >= 0).any(dim=1), icons.gloss[names] >= 0
    assert abs(float(glosses[can_gloss].float().mean()) - 0.1) < 0.02 and made.bare[glosses].all()
    bare = made.bare & can_relate
    assert abs(float(related[bare].float().mean()) - 0.2) < 0.03
    assert abs(float((~made.bare).float().mean()) - 0.3) < 0.03
    assert options.eased(1.0) == options and options.eased(0.0).related == 0.0


def test_captions_are_names_or_other_texts_of_their_picture(icons, phrases):
    chosen = many(icons, 3000)
    made = captions(icons, phrases, chosen, Phrasing(caption_name=0.5), 8)
    own = [set(rows(88)[row]["texts"]) for row in range(88)]
    assert all(text in own[row] for text, row in zip(decode(made), chosen.tolist()))
    several = (icons.own[chosen] >= 0).sum(dim=1) == 2
    other = (made.text != icons.name[chosen])[several].float().mean()
    assert abs(float(other) - 0.25) < 0.04


def test_pieces_are_put_together_between_bos_and_eos_and_cut_before_eos(phrases):
    one = torch.tensor([[7, 8, -1], [-1, -1, -1]])
    two = torch.tensor([[9, -1], [10, 11]])
    ids, mask = assemble(phrases, [one, two], 7)
    assert ids.tolist() == [[1, 7, 8, 9, 2, 0, 0], [1, 10, 11, 2, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    ids, mask = assemble(phrases, [one, two], 4)
    assert ids.tolist() == [[1, 7, 8, 2], [1, 10, 11, 2]] and mask.all()


def test_ids_are_those_of_the_tokenizer(icons, phrases):
    made = bare_texts(icons, phrases, torch.arange(len(icons.texts)), 16)
    expected = tokenizer()(icons.texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    assert torch.equal(made.input_ids, expected["input_ids"])
    assert torch.equal(made.attention_mask, expected["attention_mask"])
    assert tokenizer().unk_token_id not in made.input_ids and len(words()) > 60


def test_a_text_is_a_positive_of_every_picture_that_it_is_true_of(icons):
    chosen = torch.arange(8)  # a picture of each shape
    text = torch.tensor(
        [icons.texts.index(t) for t in ("toy", "ball", "sphere", "food", "fruit", "apple", "cut", "tent")]
    )
    true = {"ball": {"toy", "ball", "sphere"}, "apple": {"food", "fruit", "apple", "plant"}, "scissors": {"cut"}}
    found = positives(icons, chosen, text)
    for row, shape in enumerate(SHAPES):
        for column, number in enumerate(text.tolist()):
            word = icons.texts[number]
            # Text i is the one of picture i, and pictures of one name share their texts.
            assert bool(found[row, column]) == (row == column or word == shape or word in true.get(shape, ())), (
                shape,
                word,
            )
