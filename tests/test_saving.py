"""Save → load → save, from the package and from a folder with only its files; the stock pipelines; golden captions."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForZeroShotImageClassification, pipeline

import mome
from builders import build_processor
from models import VARIANTS, random_batch, tiny_captioner

GOLDEN = Path(__file__).parent / "fixtures" / "golden"


def save_checkpoint(folder: Path, variant: str = "dense") -> Path:
    processor = build_processor(image_size=16)
    captioner = tiny_captioner(variant, vocab_size=len(processor.tokenizer), max_position_embeddings=16)
    captioner.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_load_save_is_bit_equal(variant, tmp_path):
    captioner = tiny_captioner(variant)
    captioner.save_pretrained(tmp_path / "first")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    names = sorted(os.listdir(tmp_path / "first"))
    assert names == sorted(os.listdir(tmp_path / "second")) and "model.safetensors" in names
    assert filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_checkpoint_serves_every_auto_class(variant, tmp_path):
    captioner = tiny_captioner(variant)
    captioner.save_pretrained(tmp_path)
    batch = random_batch(captioner.config)
    expected = captioner.model(**batch).logits_per_image
    for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
        model = auto_class.from_pretrained(tmp_path)
        assert type(model) is mome.MomeModel
        assert torch.equal(model(**batch).logits_per_image, expected)


REMOTE = """
import sys, torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers import AutoModelForZeroShotImageClassification
folder, again = sys.argv[1:]
assert "mome" not in sys.modules
options = {"trust_remote_code": True}
captioner = AutoModelForImageTextToText.from_pretrained(folder, **options)
processor = AutoProcessor.from_pretrained(folder, **options)
for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
    assert type(auto_class.from_pretrained(folder, **options)).__name__ == "MomeModel"
captioner.save_pretrained(again)
processor.save_pretrained(again)
options["model"] = folder
image = folder + "/red.png"
print(pipeline("zero-shot-image-classification", **options)(image, candidate_labels=["red", "blue dot"])[0]["label"])
print(len(pipeline("image-feature-extraction", **options)(image)[0]))
print(len(pipeline("feature-extraction", **options)("red")[0]))
print(pipeline("image-text-to-text", **options)(image, text="", max_new_tokens=4))
print("tokens", captioner.generate(**processor(images=[image], return_tensors="pt"), max_new_tokens=4).tolist())
assert "mome" not in sys.modules
"""


def test_a_folder_with_only_its_files_works_without_the_package(tmp_path):
    folder = save_checkpoint(tmp_path / "first", "routed")
    Image.new("RGB", (20, 30), "red").save(folder / "red.png")
    # -S keeps the site packages' .pth files out, and with them an editable install of the package.
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-S", "-c", REMOTE, str(folder), str(tmp_path / "second")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder / "red.png").unlink()
    names = sorted(os.listdir(folder))
    assert names == sorted(os.listdir(tmp_path / "second"))
    assert filecmp.cmpfiles(folder, tmp_path / "second", names, shallow=False) == (names, [], [])
    processor = mome.MomeProcessor.from_pretrained(folder)
    captioner = mome.MomeForConditionalGeneration.from_pretrained(folder)
    inputs = processor(images=[Image.new("RGB", (20, 30), "red")], return_tensors="pt")
    assert f"tokens {captioner.generate(**inputs, max_new_tokens=4).tolist()}" in run.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def image():
    return Image.new("RGB", (20, 30), "red")


def test_zero_shot_classification_pipeline_equals_the_model(checkpoint, image):
    classify = pipeline("zero-shot-image-classification", model=str(checkpoint))
    labels = ["red circle", "a blue square", "dog"]
    results = classify([image, image], candidate_labels=labels, hypothesis_template="the photo of {}")
    processor = mome.MomeProcessor.from_pretrained(checkpoint)
    texts = [f"the photo of {label}" for label in labels]
    inputs = processor(text=texts, images=[image], return_tensors="pt")
    expected = mome.MomeModel.from_pretrained(checkpoint)(**inputs).logits_per_image[0].softmax(-1)
    for result in results:
        scores = {each["label"]: each["score"] for each in result}
        assert_close(torch.tensor([scores[label] for label in labels]), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="16"):
        classify(image, candidate_labels=["red " * 30])


def test_feature_extraction_pipelines_return_embeddings(checkpoint, image):
    model = mome.MomeModel.from_pretrained(checkpoint)
    processor = mome.MomeProcessor.from_pretrained(checkpoint)
    features = torch.tensor(pipeline("image-feature-extraction", model=str(checkpoint))(image))
    expected = model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output
    assert_close(features, expected, atol=1e-5, rtol=0)
    features = torch.tensor(pipeline("feature-extraction", model=str(checkpoint))("a red dot"))
    expected = model.get_text_features(**processor(text="a red dot", return_tensors="pt")).pooler_output
    assert_close(features, expected, atol=1e-5, rtol=0)


def test_captioning_pipeline_equals_generate(checkpoint, image):
    caption = pipeline("image-text-to-text", model=str(checkpoint))
    captioner = mome.MomeForConditionalGeneration.from_pretrained(checkpoint)
    processor = mome.MomeProcessor.from_pretrained(checkpoint)
    for prompt in ("", "the photo of"):
        inputs = processor(images=image, text=prompt, caption_prompt=True, return_tensors="pt")
        expected = processor.batch_decode(captioner.generate(**inputs, max_new_tokens=5), skip_special_tokens=True)
        assert caption(image, text=prompt, max_new_tokens=5)[0]["generated_text"].strip() == expected[0].strip()
    assert len(caption([image, image], text=["", "a red"], max_new_tokens=5)) == 2


@pytest.mark.parametrize("problem", ["missing", "unexpected"])
def test_a_checkpoint_that_does_not_fit_is_refused(problem, tmp_path):
    tiny_captioner().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if problem == "missing":
        del weights["model.image_projection.weight"]
        name = "model.image_projection.weight"
    else:
        weights["model.flux_capacitor"] = torch.zeros(1)
        name = "flux_capacitor"
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{problem} weights .*{name}") as error:
        mome.MomeForConditionalGeneration.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    model, info = mome.MomeForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert [key for key in info[f"{problem}_keys"] if name in key]


def test_embeddings_alone_are_no_captioner(tmp_path):
    tiny_captioner().model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is mome.MomeModel
    with pytest.raises(ValueError, match="missing weights lm_head.decoder.bias"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_golden_logits_and_captions_are_reproduced():
    """`python tests/test_saving.py` makes the fixture anew."""
    captioner = mome.MomeForConditionalGeneration.from_pretrained(GOLDEN)
    golden = load_file(GOLDEN / "outputs.safetensors")
    captions = json.loads((GOLDEN / "captions.json").read_text())
    for name, actual in golden_outputs(captioner).items():
        assert_close(actual, golden[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert golden_captions(captioner) == captions


def golden_outputs(captioner) -> dict[str, torch.Tensor]:
    batch = random_batch(captioner.config)
    with torch.no_grad():
        joint = captioner(**batch, labels=batch["input_ids"])
        pair = captioner.model(**batch)
        fused = captioner.model.get_multimodal_features(**batch)
    outputs = {"logits": joint.logits, "loss": joint.loss, "logits_per_image": pair.logits_per_image}
    outputs |= {"image_embeds": pair.image_embeds, "text_embeds": pair.text_embeds, "fused": fused.last_hidden_state}
    return {name: tensor.contiguous() for name, tensor in outputs.items()}


def golden_captions(captioner) -> dict[str, list[list[int]]]:
    processor = build_processor(image_size=16)
    images = processor(images=[Image.new("RGB", (16, 16), colour) for colour in ("red", "white")], return_tensors="pt")
    options = {"greedy": {"do_sample": False}, "beams": {"num_beams": 3, "do_sample": False}}
    return {
        name: captioner.generate(**images, max_new_tokens=8, **option).tolist() for name, option in options.items()
    }


if __name__ == "__main__":
    model = tiny_captioner("routed", seed=7)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(GOLDEN)
    for code in GOLDEN.glob("*.py"):
        code.unlink()
    save_file(golden_outputs(model), GOLDEN / "outputs.safetensors")
    (GOLDEN / "captions.json").write_text(json.dumps(golden_captions(model)) + "\n")
