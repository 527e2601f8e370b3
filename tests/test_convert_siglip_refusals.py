"""What of SigLIP can't be converted: one line that names it, before anything heavy, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_publish import run
from transformers import AutoModel

import mome
from loopback_hub import LoopbackHub
from mome.convert.__main__ import main
from siglip_models import save_siglip, write_tokenizer

REPO = "ada/siglip-tiny"
PATHS = [str(Path(mome.__file__).parents[1]), *(path for path in sys.path if path.endswith("-packages"))]
WITH_PACKAGE = {"package": True, "PYTHONPATH": os.pathsep.join(PATHS)}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream") / "siglip"
    save_siglip(folder)
    return folder


@pytest.fixture
def folder(upstream, tmp_path):
    return shutil.copytree(upstream, tmp_path / "siglip")


def refused(folder, capsys, *options: str) -> str:
    """The line that says why; nothing else is left."""
    output = folder.parent / "out"
    before = sorted(path.name for path in folder.parent.iterdir())
    assert main(["siglip", "--checkpoint", str(folder), "--output", str(output), *options]) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed and printed.startswith("mome.convert: ")
    return printed.removeprefix("mome.convert: ")


def change_config(folder, tower: str | None = None, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if tower is None else config[tower]).update(fields)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "tower, fields, reason",
    [
        (None, {"model_type": "clip"}, "is of type 'clip', not 'siglip'"),
        (None, {"model_type": "mome"}, "is of type 'mome', not 'siglip'"),
        (None, {"model_type": "siglip2"}, "is a NaFlex SigLIP 2: its images have any number of patches"),
        (None, {"model_type": "siglip_vision_model"}, "holds one tower of a SigLIP"),
        (
            "vision_config",
            {"hidden_size": 1536, "num_attention_heads": 16},
            "its image tower is 1536 wide, its text tower 32",
        ),
        ("text_config", {"num_hidden_layers": 3}, "num_hidden_layers is 2 for images, 3 for texts"),
        ("text_config", {"intermediate_size": 99}, "intermediate_size is 64 for images, 99 for texts"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is gelu_pytorch_tanh for images, gelu for texts"),
        ("text_config", {"projection_size": 16}, "projects texts to 16 dimensions, its images have 32"),
        ("vision_config", {"vision_use_head": False}, "has no attention pooling"),
        ("vision_config", {"image_size": [32, 16]}, "image_size="),
        ("vision_config", {"patch_size": 0}, "patch_size=0, expected one positive number"),
        ("text_config", {"vocab_size": "many"}, "config.json describes no SigLIP"),
    ],
)
def test_another_model_is_refused_by_its_config_before_the_weights_are_looked_for(
    tower, fields, reason, folder, capsys
):
    change_config(folder, tower, **fields)
    (folder / "model.safetensors").unlink()
    assert reason in refused(folder, capsys)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("config.json", "has no config.json"),
        ("preprocessor_config.json", "has no preprocessor_config.json and no processor_config.json"),
        ("spiece.model", "has no spiece.model and no tokenizer.json: pass --tokenizer FILE or --no-tokenizer"),
        ("model.safetensors", "has no weights: expected model.safetensors or"),
    ],
)
def test_a_missing_file_is_named(name, reason, folder, capsys):
    (folder / name).unlink()
    message = refused(folder, capsys)
    assert reason in message and str(folder) in message


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"do_rescale": "x"}, "do_rescale='x', expected true or false"),
        ({"do_resize": False}, "makes no pixels of 32 × 32 of an image"),
        ({"image_mean": "x"}, "prepares no image"),
        ({"image_mean": [0.5, 0.5]}, "prepares no image"),
        ({"image_std": [0.5, 0.5, 0]}, "makes no pixels of 32 × 32 of an image"),
        ({"resample": 99}, "prepares no image"),
        ({"rescale_factor": "x"}, "prepares no image"),
    ],
)
def test_a_preparation_that_gives_no_pixels_is_named_before_the_weights_are_looked_for(fields, reason, folder, capsys):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    (folder / "model.safetensors").unlink()
    message = refused(folder, capsys)
    assert reason in message and "preprocessor_config.json" in message


def test_damaged_files_are_named(folder, capsys):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors can't be read, it is truncated" in refused(folder, capsys)
    (folder / "model.safetensors").write_bytes(weights)
    for name, content in (("config.json", "{"), ("preprocessor_config.json", "[]"), ("tokenizer.json", "{}")):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_text(content)
        options = ["--tokenizer", str(folder / name)] if name == "tokenizer.json" else []
        assert name in refused(folder, capsys, *options)
        (folder / name).unlink() if kept is None else (folder / name).write_bytes(kept)
    (folder / "spiece.model").write_bytes(b"no model at all")
    assert "spiece.model can't be read" in refused(folder, capsys)


class Harmful:
    def __reduce__(self):
        return print, ("it ran",)


def test_a_pickle_is_read_as_plain_tensors_or_not_at_all(folder, capsys):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert main(["siglip", "--checkpoint", str(folder), "--output", str(folder.parent / "fine")]) == 0
    assert AutoModel.from_pretrained(folder.parent / "fine").config.hidden_size == 32
    capsys.readouterr()
    torch.save({"logit_scale": Harmful()}, folder / "pytorch_model.bin")
    message = refused(folder, capsys)
    assert "pytorch_model.bin was refused, not run" in message and "it ran" not in message


def test_weights_that_are_not_those_of_the_config_are_named(folder, capsys):
    state = load_file(folder / "model.safetensors")

    def write(**changed):
        tensors = {key: tensor for key, tensor in (state | changed).items() if tensor is not None}
        save_file(tensors, folder / "model.safetensors")

    write(**{"vision_model.head.probe": None})
    assert "has no vision_model.head.probe" in refused(folder, capsys)
    write(**{"text_model.head.bias": None})
    assert "has no text_model.head.bias: it is incomplete" in refused(folder, capsys)
    write(classifier=torch.ones(3))
    assert "has keys that SigLIP does not have: classifier" in refused(folder, capsys)
    write(**{"text_model.encoder.layers.1.mlp.fc1.bias": torch.full((64,), float("nan"))})
    assert "contains NaN or infinity" in refused(folder, capsys)
    write()
    change_config(folder, "text_config", intermediate_size=65)
    change_config(folder, "vision_config", intermediate_size=65)
    assert "of shape (64, 32) does not fit" in refused(folder, capsys)


def test_other_parts_that_do_not_fit_are_named(folder, tmp_path, capsys):
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    other = json.dumps(preprocessor | {"size": {"height": 64, "width": 64}})
    (folder / "preprocessor_config.json").write_text(other)
    assert "makes images of size {'height': 64, 'width': 64}, config.json has 32 × 32" in refused(folder, capsys)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    write_tokenizer(folder, version=2)
    assert "the tokenizer has ids up to" in refused(folder, capsys, "--tokenizer", str(folder / "tokenizer.json"))
    assert "tokenizer /none does not exist" in refused(folder, capsys, "--tokenizer", "/none")
    assert "is a file: pass a folder" in refused(folder / "config.json", capsys)


def test_without_a_tokenizer_images_are_embedded(folder, capsys):
    output = folder.parent / "out"
    (folder / "spiece.model").unlink()
    command = ["siglip", "--checkpoint", str(folder), "--output", str(output), "--no-tokenizer"]
    assert main(command) == 0
    assert "guesses" not in capsys.readouterr().out  # config.json has the special tokens
    model = AutoModel.from_pretrained(output)
    assert model.get_image_features(torch.zeros(1, 3, 32, 32)).pooler_output.shape == (1, 32)
    assert "pipeline_tag: image-feature-extraction" in (output / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------- on the Hub

LOAD = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
repo, options = sys.argv[1], {"trust_remote_code": True}
image = Image.new("RGB", (20, 30), "red")
processor = AutoProcessor.from_pretrained(repo, **options)
inputs = processor(text=["a red circle", "a cat"], images=[image], return_tensors="pt")
with torch.no_grad():
    logits = AutoModel.from_pretrained(repo, **options)(**inputs).logits_per_image[0]
captioner = AutoModelForImageTextToText.from_pretrained(repo, **options)
stock = pipeline("zero-shot-image-classification", model=repo, **options)
answers = stock(image, candidate_labels=["a red circle", "a cat"], hypothesis_template="{}")
scores = {each["label"]: each["score"] for each in answers}
assert abs(scores["a cat"] - logits.sigmoid()[1].item()) < 1e-5
caption = pipeline("image-captioning", model=repo, **options)(image, max_new_tokens=4)
describe = pipeline("image-text-to-text", model=repo, **options)(image, text="", max_new_tokens=4)
assert caption[0]["generated_text"] == describe[0]["generated_text"]
assert "mome" not in sys.modules
print(json.dumps({"logits": logits.tolist(), "caption": caption}))
"""


def test_from_the_hub_and_back_to_it(upstream, tmp_path):
    """Convert from an id, publish, load elsewhere with the published code alone."""
    with LoopbackHub({"right": "ada"}) as hub:
        first = hub.add(REPO, upstream)
        command = [
            "-m",
            "mome.convert",
            "siglip",
            "--checkpoint",
            REPO,
            "--revision",
            first,
            "--output",
            "out",
            "--caption",
        ]
        done = run(hub, tmp_path / "here", *command, "--revision", first, **WITH_PACKAGE)
        assert done.returncode == 0 and "wrote out" in done.stdout, done.stderr
        command = ["-m", "mome.publish", "out", "--repo-id", "ada/mome-siglip"]
        done = run(hub, tmp_path / "here", *command, token="right", **WITH_PACKAGE)
        assert done.returncode == 0, done.stderr
        done = run(hub, tmp_path / "there", "-c", LOAD, "ada/mome-siglip")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        here = AutoModel.from_pretrained(tmp_path / "here" / "out")
        assert len(found["logits"]) == 2 and here.config.caption_experts
        # Again without a network: everything is in the cache.
        command = ["-m", "mome.convert", "siglip", "--checkpoint", REPO, "--output", "again"]
        done = run(
            hub, tmp_path / "here", *command, **WITH_PACKAGE, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9"
        )
        assert done.returncode == 1 and "not in the cache, and HF_HUB_OFFLINE is set" in done.stderr  # of main
        done = run(hub, tmp_path / "here", *command, "--revision", first, **WITH_PACKAGE, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr


def test_what_the_hub_does_not_give_is_one_line(upstream, tmp_path):
    with LoopbackHub({"right": "ada"}) as hub:
        hub.add(REPO, upstream, gated=True)
        for name, reason in (
            ("ada/nobody", "neither a folder nor a repository"),
            (REPO, "is gated: accept its terms"),
        ):
            command = ["-m", "mome.convert", "siglip", "--checkpoint", name, "--output", "out"]
            done = run(hub, tmp_path / "here", *command, **WITH_PACKAGE)
            assert done.returncode == 1 and reason in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
            assert not any(path.name.startswith((".out", "out")) for path in (tmp_path / "here").iterdir())


def test_the_command_lists_its_options():
    done = subprocess.run([sys.executable, "-m", "mome.convert", "siglip", "--help"], capture_output=True, text=True)
    for option in ("--revision", "--strip-punctuation", "--caption", "--image-size", "--experts-per-group"):
        assert option in done.stdout
