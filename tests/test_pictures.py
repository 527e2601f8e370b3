"""Pictures as users bring them: of every kind, on the background that their ink needs, without wide margins."""

import base64
import gzip
import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top it demands torchvision

from builders import build_processor
from models import tiny_captioner
from mome import pictures_mome, svg_mome
from mome.configuration_mome import quoted
from mome.data.images import read_image, to_pixel_values
from mome.pictures_mome import MomeImageProcessor, load_rgb_image, trim_margins
from mome.svg_mome import render_svg

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"{}>{}</svg>'
CIRCLE = '<circle cx="12" cy="12" r="9" fill="{}"/>'
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def disc(colour, mode="RGBA", side=64):
    """A disc on transparency."""
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((8, 8, side - 9, side - 9), fill=colour)
    return image.convert(mode)


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def corner_and_centre(image):
    return image.getpixel((0, 0)), image.getpixel((image.width // 2, image.height // 2))


# ------------------------------------------------------------------------------------------------- background


@pytest.mark.parametrize(
    ("ink", "background"),
    [("black", WHITE), ("white", BLACK), ("yellow", BLACK), ("navy", WHITE), ("lightgrey", BLACK), ("crimson", WHITE)],
)
def test_the_background_is_the_one_on_which_the_ink_is_seen(ink, background):
    corner, centre = corner_and_centre(load_rgb_image(disc(ink)))
    assert corner == background and centre == Image.new("RGB", (1, 1), ink).getpixel((0, 0))


def test_an_outline_decides_and_not_what_it_surrounds():
    egg = disc("white")
    ImageDraw.Draw(egg).ellipse((8, 8, 55, 55), outline="black", width=3)
    assert load_rgb_image(egg).getpixel((0, 0)) == WHITE
    ghost = disc("white")
    ImageDraw.Draw(ghost).ellipse((28, 28, 36, 36), fill="black")
    assert load_rgb_image(ghost).getpixel((0, 0)) == BLACK


@pytest.mark.parametrize("kind", ["LA", "PA", "tRNS", "RGB tRNS", "L tRNS", "half", "svg", "array", "La", "RGBa"])
def test_white_ink_is_seen_in_every_mode_that_has_transparency(kind):
    white = disc("white")
    grey = Image.composite(Image.new("L", white.size, 255), Image.new("L", white.size, 7), white.getchannel("A"))
    faint = white.copy()
    faint.putalpha(white.getchannel("A").point(lambda alpha: alpha * 2 // 5))
    kinds = {
        "LA": lambda: white.convert("LA"),
        "PA": lambda: white.convert("PA"),
        "tRNS": lambda: Image.open(io.BytesIO(png(white.quantize(8)))),
        "RGB tRNS": lambda: Image.open(io.BytesIO(png(grey.convert("RGB"), transparency=(7, 7, 7)))),
        "L tRNS": lambda: Image.open(io.BytesIO(png(grey, transparency=7))),
        "half": lambda: faint,
        "svg": lambda: SVG.format("", CIRCLE.format("#fff")),
        "array": lambda: np.asarray(white),
        "La": lambda: white.convert("LA").convert("La"),
        "RGBa": lambda: white.convert("RGBa"),
    }
    corner, centre = corner_and_centre(load_rgb_image(kinds[kind]()))
    assert corner == BLACK and centre[0] >= 100


def test_sixteen_bit_grey_with_a_transparent_value_has_a_background(tmp_path):
    values = np.full((8, 8), 65535, np.uint16)
    values[:, :4] = 300
    image = Image.fromarray(values)
    image.info["transparency"] = 300
    assert load_rgb_image(image).getpixel((0, 0)) == BLACK and load_rgb_image(image).getpixel((6, 0)) == WHITE


def test_opaque_pictures_stay_as_they_are():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    for image in (noise, noise.convert("RGBA")):
        assert load_rgb_image(image).tobytes() == noise.tobytes()


# ---------------------------------------------------------------------------------------------- every entry


def test_every_entry_sees_a_white_icon_as_the_processor_does(tmp_path):
    processor = build_processor()
    processor.save_pretrained(tmp_path / "saved")
    icon = disc("white")
    icon.save(tmp_path / "icon.png")
    expected = processor(images=icon, return_tensors="pt").pixel_values
    assert expected[0, 0, 0, 0] == -1 and expected[0, 0, 16, 16] == 1
    alone = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    remote = get_class_from_dynamic_module("pictures_mome.MomeImageProcessor", tmp_path / "saved")
    assert isinstance(alone, MomeImageProcessor) and remote is not MomeImageProcessor
    for each in (alone, remote.from_pretrained(tmp_path / "saved"), processor.image_processor):
        assert torch.equal(each(icon, return_tensors="pt").pixel_values, expected)
        assert torch.equal(each([str(tmp_path / "icon.png")], return_tensors="pt").pixel_values, expected)
    encoded = {"bytes": png(icon), "path": None}
    assert torch.allclose(to_pixel_values([read_image(encoded)], processor.image_processor), expected)


def test_every_kind_of_input_gives_the_same_picture(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    data = png(image)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    written = io.BytesIO()
    image.save(written, "PNG")  # stands at its end
    text = base64.b64encode(data).decode()
    kinds = [data, bytearray(data), memoryview(data), io.BytesIO(data), written, path.open("rb"), path, str(path)]
    kinds += [path.as_uri(), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"path": str(path)}]
    kinds += [f"data:image/png;base64,{text}", text, "\n".join(text[i : i + 76] for i in range(0, len(text), 76))]
    kinds += [text.replace("+", "-").replace("/", "_").rstrip("="), np.asarray(image), torch.tensor(np.asarray(image))]
    processor = build_processor()
    expected = processor(images=image, return_tensors="pt").pixel_values[0]
    for kind, pixels in zip(kinds, processor(images=kinds, return_tensors="pt").pixel_values, strict=True):
        assert torch.equal(pixels, expected), str(kind)[:60]
    file = io.BytesIO(data)
    assert load_rgb_image(file).tobytes() == load_rgb_image(file).tobytes() == image.tobytes()  # twice the same file


def test_messages_show_no_more_than_eighty_characters_of_a_value():
    long = "x" * 100_000
    for value in (long, f"data:image/png;base64,{long}!", {"path": long}, f"data:image/png;base64,{'A' * 9000}"):
        with pytest.raises(ValueError) as caught:
            load_rgb_image(value)
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    assert len(quoted(long)) == 82 and len(quoted(list(range(999)))) == 80 and quoted("a") == "'a'"


def test_pixels_that_are_not_rescaled_keep_their_scale():
    processor = build_processor()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    shares = np.asarray(image) / 255
    expected = processor(images=image, return_tensors="pt").pixel_values
    for each in (processor, processor.image_processor):
        for picture in (shares, torch.tensor(shares).float(), [shares.astype(np.float32)]):
            found = each(images=picture, do_rescale=False, return_tensors="pt").pixel_values
            assert torch.allclose(found, expected, atol=1e-6)
        plain = each(images=shares, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
        assert 0 <= plain.min() and 0.5 < plain.max() <= 1
        whole = each(images=image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
        assert whole.max() > 200
        with pytest.raises(ValueError, match="values up to 255"):
            each(images=image, do_rescale=False, return_tensors="pt")
    nested = processor(images=shares, images_kwargs={"do_rescale": False}, return_tensors="pt").pixel_values
    assert torch.allclose(nested, expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ blank


def test_blank_pictures_give_one_warning_a_call(caplog):
    processor = build_processor()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    black = disc("black").convert("RGB")  # how stock pipelines lose transparency
    with caplog.at_level(logging.WARNING):
        processor(images=[noise])
        assert not caplog.records
        processor(images=[black, noise, black])
        processor.image_processor(black)
    assert [record.getMessage() for record in caplog.records] == [
        "2 pictures are blank, of one single colour: is their transparency lost?",
        "a picture is blank, of one single colour: is its transparency lost?",
    ]


# ---------------------------------------------------------------------------------------------------- margins


def test_wide_margins_are_trimmed_and_filled_canvases_untouched():
    filled = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(filled).ellipse((4, 4, 59, 59), fill="black")
    assert trim_margins(filled, 0.02) is filled
    for colour in ("white", "gold", "black"):
        drawn = Image.new("RGB", (64, 64), colour)
        ImageDraw.Draw(drawn).ellipse((4, 4, 59, 59), fill="teal")
        wide = Image.new("RGB", (256, 256), colour)
        wide.paste(drawn, (7, 150))
        trimmed = trim_margins(wide, 0.02)
        assert trimmed.size == (58, 58) and trimmed.getpixel((0, 0)) == wide.getpixel((0, 0))
    oblong = Image.new("RGB", (128, 64), "white")
    oblong.paste(filled, (32, 0))
    assert trim_margins(oblong, 0.02).size == (58, 58)
    bar = Image.new("RGB", (200, 200), "white")
    bar.paste("black", (50, 90, 150, 110))
    assert trim_margins(bar, 0.02).size == (104, 104)  # as wide as before, relative to its height
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), np.uint8))
    assert trim_margins(noise, 0.02) is noise
    blank = Image.new("RGB", (30, 60))
    assert trim_margins(blank, 0.02) is blank


def test_the_margin_is_an_option_that_is_saved_and_changes_pixels_everywhere(tmp_path):
    icon = Image.new("RGB", (256, 256), "white")
    icon.paste("black", (100, 100, 150, 150))
    icon.paste("red", (110, 110, 120, 140))
    processor = build_processor()
    plain = processor(images=icon, return_tensors="pt").pixel_values
    once = processor(images=icon, trim_to_margin=0.02, return_tensors="pt").pixel_values
    processor.image_processor.trim_to_margin = 0.02
    assert not torch.allclose(plain, once)
    processor.save_pretrained(tmp_path)
    for each in (processor, processor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert torch.equal(each(images=icon, return_tensors="pt").pixel_values, once)
    assert torch.allclose(to_pixel_values([icon], processor.image_processor), once, atol=1e-6)
    assert build_processor().image_processor.trim_to_margin is None
    for wrong in (-0.1, 1, "wide", True):
        with pytest.raises(ValueError, match="trim_to_margin="):
            MomeImageProcessor(trim_to_margin=wrong)


# -------------------------------------------------------------------------------------------------------- SVG


def test_an_svg_is_accepted_wherever_a_picture_is(tmp_path):
    pytest.importorskip("resvg_py")
    text = SVG.format(' fill="currentColor"', '<path d="M2 2h20v20h-20z"/>')
    (tmp_path / "icon.svg").write_text(text)
    (tmp_path / "icon.svgz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "wrong.png").write_text(text)
    encoded = base64.b64encode(text.encode()).decode()
    kinds = [
        text,
        text.encode(),
        f"\ufeff\n<!-- an icon -->{text}",
        text.encode("utf-16"),
        gzip.compress(text.encode()),
    ]
    kinds += [tmp_path / name for name in ("icon.svg", "icon.svgz", "wrong.png")]
    kinds += [f"data:image/svg+xml;base64,{encoded}", "data:image/svg+xml;utf8," + text.replace("#", "%23")]
    kinds += [{"bytes": text.encode(), "path": None}, io.BytesIO(text.encode()), (tmp_path / "icon.svg").open()]
    for kind in kinds:
        image = load_rgb_image(kind)
        assert image.size == (256, 256) and corner_and_centre(image) == (WHITE, BLACK), str(kind)[:60]
    assert load_rgb_image(SVG.format("", CIRCLE.format("white"))).getpixel((0, 0)) == BLACK


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ('viewBox="0 0 24 48"', (128, 256)),
        ('viewBox="0 0 48 24" width="100%" height="100%"', (256, 128)),
        ('width="1em" height="1em" viewBox="0 0 24 24"', (256, 256)),
        ('width="1000000000" height="1000000000" viewBox="0 0 24 24"', (256, 256)),
        ("", (256, 256)),
    ],
)
def test_the_larger_side_of_an_svg_has_the_pixels(attributes, size):
    pytest.importorskip("resvg_py")
    image = render_svg(f'<svg {attributes}><path d="M0 0h20v20h-20z"/></svg>')
    assert image.size == size and image.getchannel("A").getextrema()[1] == 255


def test_an_svg_opens_nothing_else(tmp_path):
    pytest.importorskip("resvg_py")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    image = '<image {}="{}" width="24" height="24"/>'
    for href in (str(tmp_path / "red.png"), (tmp_path / "red.png").as_uri(), "https://example.org/a.png"):
        for name in ("href", "xlink:href"):
            assert render_svg(SVG.format("", image.format(name, href))).getchannel("A").getextrema() == (0, 0)
    embedded = "data:image/png;base64," + base64.b64encode(png(Image.new("RGB", (9, 9), "red"))).decode()
    assert render_svg(SVG.format("", image.format("href", embedded))).getpixel((9, 9)) == (255, 0, 0, 255)
    with pytest.raises(ValueError, match="entity"):
        render_svg('<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + SVG.format("", "<text>&x;</text>"))


BOMBS = {
    "entities": '<!DOCTYPE svg [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + SVG.format("", "&b;"),
    "depth": SVG.format("", "<g>" * 5000 + "</g>" * 5000),
    "elements": SVG.format("", "<g/>" * 60_000),
    "bytes": SVG.format("", " " * 9_000_000),
    "packed": gzip.compress(SVG.format("", " " * 50_000_000).encode()),
    "uses": SVG.format(
        "", "".join(f'<g id="a{n}">' + f'<use href="#a{n + 1}"/>' * 10 + "</g>" for n in range(9)) + '<g id="a9"/>'
    ),
    "masks": SVG.format(
        "",
        "".join(f'<mask id="m{n}">' + f'<path mask="url(#m{n + 1})" d="M0 0h9"/>' * 10 + "</mask>" for n in range(9))
        + '<mask id="m9"/><path mask="url(#m0)"/>',
    ),
    "time": SVG.format(
        "", '<filter id="f"><feTurbulence numOctaves="1000000"/></filter><path filter="url(#f)" d="M2 2h20v20z"/>'
    ),
    "cut": SVG.format("", "<path d='M2")[:90],
    "html": "<html><body>no picture</body></html>",
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_svg_that_takes_too_much_is_refused_in_one_line(name, monkeypatch):
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(svg_mome, "MOST_SECONDS", 2)
    with pytest.raises(ValueError) as caught:
        load_rgb_image(BOMBS[name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert render_svg(SVG.format("", CIRCLE.format("red"))).getpixel((128, 128)) == (255, 0, 0, 255)  # and goes on


def test_without_resvg_the_error_names_the_fix(monkeypatch):
    monkeypatch.setattr(svg_mome.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match='pip install resvg-py, or "mome\\[svg\\]"'):
        load_rgb_image(SVG.format("", CIRCLE.format("red")))


def test_heic_without_its_plugin_names_the_fix(monkeypatch):
    monkeypatch.setattr(pictures_mome, "can_open_heif", lambda: False)
    with pytest.raises(ValueError, match="pip install pillow-heif"):
        load_rgb_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))


# -------------------------------------------------------------------------------------------------- pipelines


def test_pipelines_warn_once_and_see_transparency(tmp_path, caplog):
    processor = build_processor(image_size=16)
    tiny_captioner(vocab_size=len(processor.tokenizer), max_position_embeddings=16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    folder = str(tmp_path)
    classify = pipeline("open-vocabulary-image-classification", model=folder)
    caption = pipeline("image-captioning", model=folder)
    black = disc("black").convert("RGB")
    for run, options in ((classify, {"candidate_labels": ["red", "dot"]}), (caption, {"max_new_tokens": 2})):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run([black] * 3 + [disc("black")], **options)
            list(run((each for each in [black] * 3), **options))
        blank = [record for record in caplog.records if "blank" in record.getMessage()]
        assert [record.getMessage()[:14] for record in blank] == ["3 pictures are"] * 2
