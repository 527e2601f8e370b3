import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top it demands torchvision
from transformers.utils import logging

from builders import build_processor, build_tokenizer
from mome import pictures_mome
from mome.pictures_mome import load_images, load_rgb_image
from mome.processing_mome import MomeProcessor
from mome.texts_mome import tokenize_texts

PAD, BOS, EOS = 0, 1, 2
COLOUR = (200, 100, 50)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def picture(size=(8, 6)):
    return Image.new("RGB", size, COLOUR)


def mean_colour(image):
    return np.asarray(image, dtype=float).mean(axis=(0, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_pillow_mode_becomes_rgb_of_the_same_brightness(mode):
    white = Image.new("RGB", (8, 6), "white")
    image = white.convert("L").convert(mode) if mode in ("LA", "I", "F") else white.convert(mode)
    converted = load_rgb_image(image)
    assert converted.mode == "RGB" and converted.size == (8, 6)
    assert np.allclose(mean_colour(converted), 255, atol=2)


@pytest.mark.parametrize("file", ["rgba.png", "palette.png", "grey.png", "rgba.gif", "rgba.webp"])
def test_transparency_is_laid_over_white(tmp_path, file):
    image = Image.new("RGBA", (8, 6), (*COLOUR, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 6))
    kinds = {"palette.png": image.quantize(8), "grey.png": image.convert("LA")}
    kinds.get(file, image).save(tmp_path / file, **({"lossless": True} if file.endswith("webp") else {}))
    converted = load_rgb_image(tmp_path / file)
    assert converted.getpixel((1, 3)) == (255, 255, 255)
    opaque = image.convert("L").convert("RGB") if file == "grey.png" else image.convert("RGB")
    assert np.allclose(converted.getpixel((6, 3)), opaque.getpixel((6, 3)), atol=4)


def test_sixteen_bit_images_are_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(ramp).save(tmp_path / "deep.tiff")
    for image in (tmp_path / "deep.png", tmp_path / "deep.tiff", Image.fromarray(ramp.astype(np.int32)), ramp):
        assert np.abs(np.asarray(load_rgb_image(image))[0, :, 0] - np.arange(256.0)).max() <= 1
    assert np.asarray(load_rgb_image(Image.fromarray(ramp // 300))).max() <= 1  # dark stays dark


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture((8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_rgb_image(tmp_path / "turned.jpg").size == (4, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_metadata_does_not_hide_the_picture(tmp_path):
    picture().save(tmp_path / "broken.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert load_rgb_image(tmp_path / "broken.jpg").size == (8, 6)
    picture().save(tmp_path / "plain.png")
    data = (tmp_path / "plain.png").read_bytes()
    chunk = b"iCCPprofile\0\0 not compressed"
    profile = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "profile.png").write_bytes(data[:33] + profile + data[33:])
    assert np.allclose(mean_colour(load_rgb_image(tmp_path / "profile.png")), COLOUR)


@pytest.mark.parametrize("file", ["moving.gif", "moving.webp"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, file):
    picture().save(tmp_path / file, save_all=True, append_images=[Image.new("RGB", (8, 6), "black")], duration=50)
    assert np.allclose(mean_colour(load_rgb_image(tmp_path / file)), COLOUR, atol=8)


def test_extreme_shapes_give_square_pixel_values(processor):
    images = [picture((1, 1)), picture((1, 2000)), picture((2000, 1))]
    assert processor(images=images, return_tensors="pt").pixel_values.shape == (3, 3, 32, 32)


def test_arrays_tensors_and_paths_equal_the_picture(tmp_path, processor):
    picture().save(tmp_path / "image.png")
    last = np.asarray(picture())
    first = np.ascontiguousarray(last.transpose(2, 0, 1))
    opaque = np.dstack([last, np.full((6, 8), 255, np.uint8)])
    same = [last, first, last / 255, (first / 255).astype(np.float32), last.astype(np.int64), opaque]
    same += [torch.tensor(first), torch.tensor(last), torch.tensor(first) / 255]
    same += [tmp_path / "image.png", str(tmp_path / "image.png")]
    expected = processor(images=picture(), return_tensors="pt").pixel_values
    assert expected.dtype == torch.float32
    for image in same:
        assert torch.equal(processor(images=image, return_tensors="pt").pixel_values, expected)
    batch = processor(images=same, return_tensors="pt").pixel_values
    assert torch.equal(batch, expected.expand(len(same), -1, -1, -1))
    assert torch.equal(processor(images=np.stack([last] * 2), return_tensors="pt").pixel_values, batch[:2])


def test_one_channel_and_bool_arrays_are_grey():
    for array in (np.full((6, 8), 255, np.uint8), np.ones((6, 8), bool), np.ones((6, 8, 1)), torch.ones(1, 6, 8)):
        assert load_rgb_image(array).size == (8, 6)
        assert np.allclose(mean_colour(load_rgb_image(array)), 255)
    assert load_rgb_image(torch.ones(3, 6, 8, dtype=torch.bfloat16)).size == (8, 6)


def test_urls_are_fetched(tmp_path, monkeypatch):
    picture().save(tmp_path / "image.png")
    response = SimpleNamespace(content=(tmp_path / "image.png").read_bytes(), raise_for_status=lambda: response)
    session = SimpleNamespace(get=lambda url, **kwargs: response)
    monkeypatch.setattr(pictures_mome, "get_session", lambda: session)
    assert np.allclose(mean_colour(load_rgb_image("https://example.org/image.png")), COLOUR)


def test_unreadable_images_are_refused_in_one_line_with_name_and_index(tmp_path, processor, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    cases = {"cut.png": "truncated", "words.png": "not an image", "empty.jpg": "not an image", "none.png": "no such"}
    for file, reason in cases.items():
        with pytest.raises(ValueError, match=reason) as caught:
            processor(images=[picture(), str(tmp_path / file)])
        assert file in str(caught.value) and "images[1]" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cut.png.*truncated"):
        processor(images=Image.open(tmp_path / "cut.png"))
    with pytest.raises(ValueError, match="NoneType"):
        processor(images=[None])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="whole.png.*decompression bomb"):
        processor(images=tmp_path / "whole.png")


@pytest.mark.parametrize("shape", [(6, 8, 2), (5, 6, 8), (7,), (0, 8, 3), (2, 2, 6, 8, 3)])
def test_arrays_of_no_picture_shape_are_refused_with_the_shape(processor, shape):
    with pytest.raises(ValueError) as caught:
        processor(images=np.zeros(shape, np.uint8))
    assert str(shape) in str(caught.value)


def test_pixel_values_out_of_range_are_refused():
    for value in (-1.0, float("nan"), 1e12):
        with pytest.raises(ValueError, match="pixel values from"):
            load_rgb_image(np.full((6, 8, 3), value))


def test_pixel_values_that_are_no_real_numbers_are_refused():
    with pytest.raises(ValueError, match="pixel values of type complex128"):
        load_rgb_image(np.full((6, 8, 3), 1j))


@pytest.mark.parametrize("of", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(("bright", "dark"), [(60_000, 200), (255.0, 1.0)])
def test_the_values_of_a_batch_have_one_range(of, bright, dark):
    batch = np.stack([np.full((6, 8, 3), value) for value in (bright, dark)])
    ceiling = 65535 if bright > 255 else 255
    means = [np.asarray(image).mean() for image in load_images(of(batch))]
    assert np.allclose(means, np.round(np.array([bright, dark]) / ceiling * 255))


def test_a_picture_without_pixels_is_refused(processor):
    for size in ((0, 0), (0, 5)):
        with pytest.raises(ValueError, match=rf"images\[0\] .*: {size[0]} × {size[1]} pixels"):
            processor(images=[Image.new("RGB", size)])


def test_images_and_texts_may_differ_in_number(processor):
    inputs = processor(images=[picture()] * 2, text=["a red circle", "a dot", "the cat"], return_tensors="pt")
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    assert inputs.pixel_values.shape[0] == 2 and inputs.input_ids.shape == (3, 5)
    assert inputs.input_ids[1].tolist() == [BOS, *processor.tokenizer.convert_tokens_to_ids(["a", "dot"]), EOS, PAD]
    assert inputs.attention_mask[1].tolist() == [1, 1, 1, 1, 0]
    assert set(processor(text="a")) == {"input_ids", "attention_mask"}
    assert set(processor(images=picture())) == {"pixel_values"}
    assert processor.model_input_names == ["pixel_values", "input_ids", "attention_mask"]


@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_caption_prompts_begin_with_bos_have_no_eos_and_are_padded_on_the_left(processor, tensors):
    words = processor.tokenizer.convert_tokens_to_ids(["a", "photo", "of"])
    prompts = ["a photo of", "a"]
    inputs = processor(images=[picture()] * 2, text=prompts, caption_prompt=True, return_tensors=tensors)
    assert np.asarray(inputs["input_ids"]).tolist() == [[BOS, *words], [PAD, PAD, BOS, words[0]]]
    assert np.asarray(inputs["attention_mask"]).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert processor(text=prompts)["input_ids"] == [[BOS, *words, EOS], [BOS, words[0], EOS, PAD, PAD]]


def test_a_caption_prompt_without_words_is_bos_for_each_image(processor):
    for text in (None, "", ["", ""]):
        inputs = processor(images=[picture()] * 2, text=text, caption_prompt=True, return_tensors="pt")
        assert inputs.input_ids.tolist() == [[BOS], [BOS]]
    # what the image-text-to-text pipeline passes for text=""
    assert processor(images=picture(), text="", return_tensors="pt").input_ids.tolist() == [[BOS]]
    assert processor(text="", return_tensors="pt").input_ids.tolist() == [[BOS, EOS]]
    assert len(processor(images=[picture()] * 3, text="a", text_kwargs={"caption_prompt": True})["input_ids"]) == 3
    with pytest.raises(ValueError, match="2 caption prompts for 3 images"):
        processor(images=[picture()] * 3, text=["a", "a"], caption_prompt=True)


def test_a_tokenizer_that_writes_no_eos_keeps_the_last_word_of_a_prompt():
    processor = build_processor()
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = type(backend.post_processor)(single="[BOS] $A", special_tokens=[("[BOS]", BOS)])
    prompt = processor(text="a photo", caption_prompt=True)["input_ids"]
    assert prompt == [[BOS, *processor.tokenizer.convert_tokens_to_ids(["a", "photo"])]]


def test_long_texts_are_cut_with_eos_and_one_warning_that_names_the_limit(processor, caplog):
    long, just = " ".join(["red"] * 20), " ".join(["red"] * 14)
    expected = [1, *[processor.tokenizer.convert_tokens_to_ids("red")] * 14, EOS]
    assert processor(text=["a", long, just])["input_ids"][1:] == [expected, expected]
    assert [record.message for record in caplog.records] == [
        "1 text has more than 16 tokens, the most that the model reads: the rest is cut off"
    ]
    assert processor(text=long, caption_prompt=True)["input_ids"] == [expected[:-1]]
    caplog.clear()
    logging.get_logger("mome.processing_mome").warning_once.cache_clear()
    for _ in range(3):  # sentence-transformers asks for it, batch after batch
        assert processor(text=[long, just], truncation=True)["input_ids"] == [expected, expected]
    assert [record.message for record in caplog.records] == [
        "texts of more than 16 tokens, the most that the model reads, are cut"
    ]
    with pytest.raises(ValueError, match=r"text 1 \('red red.*model_max_length = 16 tokens.*truncation=False"):
        processor(text=["a", long], truncation=False)
    assert len(processor(text=long, truncation=True, max_length=5)["input_ids"][0]) == 5
    free = MomeProcessor(processor.image_processor, build_tokenizer(max_length=int(1e30)))
    assert len(free(text=long)["input_ids"][0]) == 22


def test_a_text_without_a_known_word_is_refused_and_a_prompt_of_that_kind_warned_of(processor, caplog):
    for text in ("слон", "!!!", "[UNK]"):
        with pytest.raises(ValueError, match=r"text 1 is .* has no word that the tokenizer knows"):
            processor(text=["a", text])
    assert processor(text="[MASK]")["input_ids"] == [[BOS, 5, EOS]]
    assert not caplog.records
    processor(images=picture(), text="слон", caption_prompt=True)
    assert "prompt 0 is 'слон'" in caplog.text


def test_one_processor_serves_many_threads(processor):
    """At the default switch interval; without a lock, one call in forty gave wrong ids or an error."""
    texts = ["a red dot", "a", " ".join(["red"] * 20)]
    calls = (
        lambda: processor(text=texts[:2], return_tensors="pt"),
        lambda: processor(images=picture(), text="a red", caption_prompt=True, return_tensors="pt"),
        lambda: processor(text=texts, truncation=True, return_tensors="pt"),
        lambda: tokenize_texts(processor.tokenizer, texts, 5)[0],
    )
    expected = [call()["input_ids"].tolist() for call in calls]

    def work(number: int) -> list[int]:
        """The numbers of the calls that went wrong."""
        turns = [(number + turn) % len(calls) for turn in range(400)]
        return [turn for turn in turns if calls[turn]()["input_ids"].tolist() != expected[turn]]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [[]] * 4


def test_unusable_inputs_are_refused(processor):
    unusable = {"neither images nor text": {}, "images is empty": {"images": []}, "text is \\[\\]": {"text": []}}
    unusable |= {"type int": {"text": 7}, "text\\[1\\] is of type int": {"text": ["a", 7]}}
    unusable |= {"type set": {"text": {"a red"}}, "type dict": {"text": {"a": "red"}}, "type bytes": {"text": b"red"}}
    unusable |= {
        "class 'set'": {"images": {"a.png"}},
        "text 1 is 'a \\\\ud800'.*no character": {"text": ["a", "a \ud800"]},
    }
    for message, inputs in unusable.items():
        with pytest.raises(ValueError, match=message):
            processor(**inputs)


def test_generated_ids_decode_to_stripped_texts(processor):
    ids = processor(text=["a red dot", "a cat"], return_tensors="pt").input_ids
    images = torch.full((2, 2), processor.tokenizer.convert_tokens_to_ids("<image>"))
    generated = torch.cat([images, ids], dim=1)
    assert processor.post_process_image_text_to_text(generated) == ["a red dot", "a cat"]
    assert processor.post_process_image_text_to_text(generated[0]) == ["a red dot"]
    assert processor.post_process_image_text_to_text(ids[1:], skip_special_tokens=False)[0].startswith("[BOS] a cat")
    assert processor.batch_decode(generated, skip_special_tokens=True) == ["a red dot", "a cat"]


def test_saved_loaded_and_saved_again_the_files_are_the_same(tmp_path):
    processor = build_processor()
    folders = [tmp_path / name for name in ("built", "remote", "package", "again")]
    call = {"images": picture(), "text": "a red dot", "caption_prompt": True, "truncation": True}
    expected = processor(**call, return_tensors="pt")
    processor.save_pretrained(folders[0])
    for folder, previous in zip(folders[1:], folders[:-1], strict=True):
        remote = get_class_from_dynamic_module("processing_mome.MomeProcessor", previous)
        assert remote is not MomeProcessor
        processor = (MomeProcessor if folder.name == "package" else remote).from_pretrained(previous)
        inputs = processor(**call, return_tensors="pt")
        assert all(torch.equal(inputs[key], expected[key]) for key in expected)
        assert processor.tokenizer.padding_side == "right"
        processor.save_pretrained(folder)
        names = {
            "processor_config.json",
            "processing_mome.py",
            "texts_mome.py",
            "tokenizer.json",
            "tokenizer_config.json",
            "pictures_mome.py",
            "svg_mome.py",
            "inputs_mome.py",
            "compatibility_mome.py",
            "configuration_mome.py",
        }
        names |= {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
        assert {path.name for path in folder.iterdir()} == names
        for name in names:
            assert (folder / name).read_bytes() == (folders[0] / name).read_bytes(), name


def test_the_saved_parts_load_alone_without_code_of_ours(tmp_path):
    processor = build_processor()
    processor.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a red dot") == processor.tokenizer("a red dot")
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), type(processor.image_processor))
    assert '"AutoProcessor": "processing_mome.MomeProcessor"' in (tmp_path / "processor_config.json").read_text()
