"""The image-captioning pipeline: equals generate(), loses nothing on bad input, and is saved whole."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import Dataset
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

import mome
from builders import build_processor
from models import tiny_captioner

SHORT = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = build_processor(image_size=16)
    tiny_captioner(vocab_size=len(processor.tokenizer), max_position_embeddings=16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def caption(checkpoint):
    return pipeline("image-captioning", model=str(checkpoint))


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.mark.parametrize("guidance", [None, "rerank", "classifier-free", ["contrastive", "rerank"]])
@pytest.mark.parametrize("prompt", ["", "a photo of"])
@torch.no_grad()
def test_captions_and_scores_equal_generate_and_the_embeddings(caption, images, guidance, prompt):
    model, processor = caption.model, caption.processor
    results = caption(images[0], guidance=guidance, prompt=prompt, num_captions=2, **SHORT)
    inputs = processor(images=images[:1], text=[prompt], caption_prompt=True, return_tensors="pt")
    options = mome.guidance_mome.guidance_options(guidance)
    options |= {} if "rerank_weight" in options else {"num_beams": 2}
    sequences = model.generate(**inputs, **options, num_return_sequences=2, **SHORT)
    assert [each["generated_text"] for each in results] == processor.post_process_image_text_to_text(sequences)
    assert all(each["generated_text"].startswith(prompt) for each in results)
    image = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    for row, result in zip(sequences.tolist(), results):
        words = row[: row.index(2)] if 2 in row else row
        text = model.get_text_features(torch.tensor([[*words, 2]])).pooler_output[0]
        assert_close(torch.tensor(result["score"]), image @ text, atol=1e-5, rtol=0)


class Pictures(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_every_kind_of_input_gives_the_same(caption, images, tmp_path):
    expected = [caption(image, **SHORT) for image in images]
    paths = [tmp_path / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images):
        image.save(path)
    for inputs in (
        images,
        tuple(images),
        [str(path) for path in paths],
        paths,
        [np.asarray(image) for image in images],
        [{"image": image, "id": 7} for image in images],
    ):
        for batch_size in (1, 2, 8):
            _same(caption(inputs, batch_size=batch_size, **SHORT), expected)
    _same(list(caption((image for image in images), batch_size=2, **SHORT)), expected)
    streamed = caption(Pictures([{"image": image} for image in images]), batch_size=2, **SHORT)
    assert not isinstance(streamed, list)
    _same(list(streamed), expected)
    _same(caption(inputs=images, **SHORT), expected)
    assert caption([]) == []


def _same(actual, expected):
    assert len(actual) == len(expected)
    for some, others in zip(actual, expected):
        assert [each["generated_text"] for each in some] == [each["generated_text"] for each in others]
        scores = [torch.tensor([each["score"] for each in result]) for result in (some, others)]
        assert_close(*scores, atol=1e-5, rtol=0)


def test_an_unreadable_image_is_named_and_can_be_skipped(caption, images, tmp_path, caplog):
    paths = [tmp_path / f"{index}.png" for index in range(100)]
    for index, path in enumerate(paths):
        images[index % 5].save(path)
    paths[57].write_bytes(paths[57].read_bytes()[:40])
    with pytest.raises(ValueError, match=r"images\[57\] \('.*57.png'\)") as error:
        caption(paths, batch_size=10, **SHORT)
    assert "\n" not in str(error.value)
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    results = caption(paths, batch_size=10, on_error="skip", **SHORT)
    whole = caption(paths[:57] + paths[58:], batch_size=10, **SHORT)
    _same(results[:57] + results[58:], whole)
    assert results[57][0]["generated_text"] is None and results[57][0]["score"] is None
    assert "57.png" in results[57][0]["error"]
    assert caption(paths[57], on_error="skip")[0]["error"].startswith("image (")
    assert len(caption([paths[57]] * 3, batch_size=2, on_error="skip")) == 3  # batches with nothing to caption


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "rerang"}, "unknown guidance 'rerang': did you mean 'rerank'"),
        ({"guidance": {"rerank_weight": 3}}, "rerank_weight=3 must be a number from 0 to 1"),
        ({"num_captions": 0}, "num_captions=0 must be an integer of at least 1"),
        ({"prompt": 7}, "prompt=7 is of type int"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"num_beams": 3}, "unknown option 'num_beams' of image-captioning.*generate_kwargs"),
        ({"generate_kwargs": {"num_beans": 3}}, "num_beans"),
        ({"generate_kwargs": 3}, "generate_kwargs=3: pass options"),
        ({"generate_kwargs": {"pixel_values": torch.zeros(1, 3, 16, 16)}}, "generate_kwargs has pixel_values"),
        ({"guidance": 3}, "guidance=3: pass a name"),
        ({"max_new_tokens": "3"}, "max_new_tokens='3' must be an integer of at least 1"),
    ],
)
def test_an_option_that_cannot_be_is_named(caption, images, options, message):
    with pytest.raises(ValueError, match=message):
        caption(images[0], **options)
    with pytest.raises(ValueError, match="images=None"):
        caption()


def test_a_model_that_writes_no_captions_is_refused(checkpoint):
    options = {"model": AutoModel.from_pretrained(checkpoint), "processor": AutoProcessor.from_pretrained(checkpoint)}
    with pytest.raises(ValueError, match="a MomeModel writes no captions"):
        pipeline("image-captioning", **options)


def test_options_of_the_pipeline_and_of_a_call_go_together(checkpoint, images):
    guided = pipeline("image-captioning", model=str(checkpoint), guidance="classifier-free", num_captions=2)
    calls = []
    guided.model.generate = lambda generate=guided.model.generate, **options: (
        calls.append(options) or generate(**options)
    )
    assert len(guided(images[0], **SHORT)) == 2
    assert calls[-1]["guidance_scale"] == 2.0 and calls[-1]["max_new_tokens"] == 5 and calls[-1]["num_beams"] == 2
    guided(images[0], guidance="none", num_captions=1, generate_kwargs={"do_sample": True})
    assert calls[-1]["guidance_scale"] == 1.0 and calls[-1]["do_sample"] and "num_beams" not in calls[-1]


@torch.no_grad()
def test_classification_averages_templates_and_embeds_labels_once(checkpoint, images):
    classify = pipeline("open-vocabulary-image-classification", model=str(checkpoint))
    model, processor = classify.model, classify.processor
    labels, templates = ["red circle", "blue square", "dog", "line"], ["the {}", "a photo of {}"]
    texts, embed = [], model.get_text_features
    model.get_text_features = lambda **inputs: texts.append(len(inputs["input_ids"])) or embed(**inputs)
    classify.label_batch_size = 3
    options = {"candidate_labels": labels, "templates": templates, "top_k": 3}
    results = classify(images, batch_size=2, **options)
    assert texts == [3, 1, 3, 1]
    _same_labels(classify(images[0], **options), results[0])
    assert texts == [3, 1, 3, 1]  # kept from the call before
    image = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    text = sum(
        embed(**processor(text=[template.format(label) for label in labels], return_tensors="pt")).pooler_output
        for template in templates
    )
    expected = (image @ torch.nn.functional.normalize(text, dim=-1).T * model.logit_scale.exp()).softmax(dim=1)
    for row, result in zip(expected, results):
        assert [each["label"] for each in result] == [labels[index] for index in row.topk(3).indices]
        assert_close(torch.tensor([each["score"] for each in result]), row.topk(3).values, atol=1e-5, rtol=0)
    for number in range(12):
        classify(images[0], candidate_labels=["dog", "dot"], templates=f"{number} {{}}")
    assert len(classify.label_embeds) == classify.label_sets_kept


def _same_labels(actual, expected):
    assert [each["label"] for each in actual] == [each["label"] for each in expected]


def test_one_template_gives_what_the_stock_pipeline_gives(checkpoint, images):
    labels = ["red circle", "blue square", "dog"]
    stock = pipeline("zero-shot-image-classification", model=str(checkpoint))
    ours = pipeline("open-vocabulary-image-classification", model=str(checkpoint))
    expected = stock(images[0], candidate_labels=labels, hypothesis_template="the photo of {}")
    actual = ours(images[0], candidate_labels=labels, templates="the photo of {}")
    _same_labels(actual, expected)
    scores = [torch.tensor([each["score"] for each in result]) for result in (actual, expected)]
    assert_close(*scores, atol=1e-5, rtol=0)


def test_labels_with_the_same_tokens_are_named_once(checkpoint, images, caplog):
    classify = pipeline("open-vocabulary-image-classification", model=str(checkpoint))
    long = "dog " * 20
    labels = ["cat", "Cat", "dog", long + "red", long + "blue"]  # the last two differ behind what the model reads
    for _ in range(2):
        scores = {each["label"]: each["score"] for each in classify(images[0], candidate_labels=labels)}
    assert scores["cat"] == pytest.approx(scores["Cat"]) and scores["cat"] < 1 / 2
    said = [message for message in caplog.messages if "share their probability" in message]
    assert len(said) == 1 and "'cat' = 'Cat'; 'dog dog" in said[0]
    with pytest.raises(ValueError, match="label 1 is '!!!', which has no word"):
        classify(images[0], candidate_labels=["cat", "!!!"], templates="a photo of {}")


def test_hypothesis_template_is_another_name_for_templates(checkpoint, images):
    classify = pipeline("open-vocabulary-image-classification", model=str(checkpoint), candidate_labels=["cat", "dog"])
    expected = classify(images[0], templates="a photo of {}")
    assert classify(images[0], hypothesis_template="a photo of {}") == expected
    assert expected != classify(images[0])


def test_classification_names_what_is_wrong(checkpoint, images, tmp_path):
    classify = pipeline("open-vocabulary-image-classification", model=str(checkpoint), candidate_labels=["dog", "dot"])
    for options, message in (
        ({"candidate_labels": []}, "candidate_labels is empty"),
        ({"candidate_labels": ["dog", "dog"]}, "label 'dog' is given twice"),
        ({"candidate_labels": ["dog", 3]}, "label 3 is no text"),
        ({"candidate_labels": 3}, "candidate_labels=3: pass texts"),
        ({"candidate_labels": ["dog \ud800"]}, r"'dog \\ud800'.* is no character"),
        ({"templates": ["a photo"]}, "template 'a photo' has no {}"),
        ({"templates": []}, "templates is empty"),
        ({"templates": 3}, "template 3 has no {}"),
        ({"top_k": 0}, "top_k=0"),
        ({"tokenizer_kwargs": {}}, "unknown option 'tokenizer_kwargs'"),
        ({"hypothesis_template": "{}", "templates": "a {}"}, "are the same option"),
        ({"on_error": "x"}, "on_error='x'"),
    ):
        with pytest.raises(ValueError, match=message):
            classify(images[0], **options)
    with pytest.raises(ValueError, match="pass the labels"):
        pipeline("open-vocabulary-image-classification", model=str(checkpoint))(images[0])
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    results = classify([images[0], bad, images[1]], batch_size=2, on_error="skip")
    assert [result[0]["label"] is None for result in results] == [False, True, False]
    assert "bad.png" in results[1][0]["error"] and len(results[0]) == 2


def test_a_long_value_is_cut_in_an_error(checkpoint, caption, images):
    classify, long = pipeline("open-vocabulary-image-classification", model=str(checkpoint)), "dog " * 5000
    for wrong in (
        lambda: classify(images[0], candidate_labels=[long, long]),
        lambda: classify(images[0], candidate_labels=["dog", "cat"], templates=long),
        lambda: caption(images[0], on_error=long),
        lambda: caption(long),
        lambda: caption(f"data:image/png;base64,{'A' * 9000}"),
    ):
        with pytest.raises(ValueError) as raised:
            wrong()
        assert 0 < len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_a_saved_pipeline_has_its_processor_and_every_task(checkpoint, caption, images, tmp_path):
    caption.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["custom_pipelines"] == mome.configuration_mome.CUSTOM_PIPELINES
    assert config["auto_map"] == mome.configuration_mome.AUTO_MAP
    AutoProcessor.from_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "pipeline_mome.py").read_bytes() == (checkpoint / "pipeline_mome.py").read_bytes()
    again = pipeline("image-captioning", model=str(tmp_path / "saved"))
    _same(again(images, **SHORT), caption(images, **SHORT))
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "saved"))
    assert classify(images[0], candidate_labels=["red", "blue"])


REMOTE = """
import sys
from transformers import AutoModel, AutoModelForImageTextToText, pipeline
folder, again, image = sys.argv[1:]
assert "mome" not in sys.modules
caption = pipeline("image-captioning", model=folder, trust_remote_code=True)
print(caption(image, max_new_tokens=5, guidance="rerank"))
assert type(caption.model.generation_config).__name__ == "MomeGenerationConfig"
assert caption.model.generation_config.rerank_scale == 7.0
caption.save_pretrained(again + "/pipeline")
for name, auto_class in (("captioner", AutoModelForImageTextToText), ("model", AutoModel)):
    auto_class.from_pretrained(folder, trust_remote_code=True).save_pretrained(f"{again}/{name}")
caption = pipeline("image-captioning", model=again + "/pipeline", trust_remote_code=True)
print(caption(image, max_new_tokens=5, guidance="rerank"))
assert "mome" not in sys.modules
"""


def test_a_folder_brings_its_pipeline_along(checkpoint, images, tmp_path):
    folder = tmp_path / "folder"
    captioner = AutoModelForImageTextToText.from_pretrained(checkpoint)
    captioner.generation_config.rerank_scale = 7.0
    captioner.save_pretrained(folder)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    images[0].save(tmp_path / "image.png")
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-S", "-c", REMOTE, str(folder), str(tmp_path), str(tmp_path / "image.png")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = pipeline("image-captioning", model=str(folder))(images[0], guidance="rerank", **SHORT)
    first, second = run.stdout.strip().splitlines()
    assert first == second == str(expected)
    files = {path.name for path in folder.glob("*.py")}
    for name, left_out in (
        ("pipeline", set()),
        ("captioner", {"processing_mome.py"}),
        ("model", {"processing_mome.py"}),
    ):
        assert {path.name for path in (tmp_path / name).glob("*.py")} == files - left_out  # it comes with a processor
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["custom_pipelines"] == mome.configuration_mome.CUSTOM_PIPELINES
    assert "pipeline_mome.py" in files
