"""What a conversion makes: a complete checkpoint that every call takes, without taking more memory than it must."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_saving import REMOTE
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

import mome
from mome.benchmarks.layouts import beit3_shapes, random_state, vlmo_shapes
from mome.convert import convert, driver
from mome.convert.operations import Options
from upstream import BEIT3, VLMO, golden, run, under

# The contract.


@pytest.mark.parametrize("kind, name", [("beit3", "retrieval_sd/"), ("beit3", "caption_sd/"), ("vlmo", "relpos/sd/")])
def test_a_converted_folder_works_without_the_package(kind, name, tmp_path):
    folder = run(kind, under(name, golden(kind)), tmp_path)
    Image.new("RGB", (20, 30), "red").save(folder / "red.png")
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-S", "-c", REMOTE, str(folder), str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = {path.name for path in (tmp_path / "again").iterdir()} | {"README.md", "red.png"}
    assert {path.name for path in folder.iterdir()} == again
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "processor_config.json",
    ):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def mask_of_new_files() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_every_call_of_the_contract_takes_a_converted_folder(tmp_path):
    folder = str(run("beit3", under("retrieval_sd/", golden("beit3")), tmp_path))
    processor = AutoProcessor.from_pretrained(folder)
    images = [Image.new("RGB", (50, 40), colour) for colour in ("red", "white")]
    inputs = processor(text=["w20 w21", "w30"], images=images, return_tensors="pt")
    model, captioner = AutoModel.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    assert model(**inputs, return_loss=True).logits_per_image.shape == (2, 2)
    assert captioner(**inputs, labels=inputs["input_ids"]).loss.isfinite()
    pixels = processor(images=images, return_tensors="pt")
    assert captioner.generate(**pixels, num_beams=2, max_new_tokens=4).shape[0] == 2
    classify = pipeline("zero-shot-image-classification", model=folder)
    assert len(classify(images[0], candidate_labels=["w20", "w30"])) == 2
    describe = pipeline("image-text-to-text", model=folder)
    assert isinstance(describe(images[0], text="", max_new_tokens=3)[0]["generated_text"], str)
    assert len(pipeline("feature-extraction", model=folder)("w20")[0]) == 32
    assert len(pipeline("image-feature-extraction", model=folder)(images[0])[0]) == 32
    assert {path.stat().st_mode & 0o777 for path in Path(folder).iterdir()} == {0o666 & ~mask_of_new_files()}
    config, generation = captioner.config, captioner.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(generation, name) == getattr(processor.tokenizer, name)
    assert config.mask_token_id == processor.tokenizer.mask_token_id
    assert config.image_token_id not in processor.tokenizer.get_vocab().values()


def test_the_model_card_cites_the_paper_and_the_licence(tmp_path, capsys):
    state = random_state(beit3_shapes(**BEIT3, kind="vqa"))
    card = (run("beit3", state, tmp_path / "vqa") / "README.md").read_text()
    assert "\nlicense: mit\n" in card.split("---")[1] and "2208.10442" in card and "@inproceedings{beit3" in card
    assert "visual question answering" in card and "`head.0`, `head.1`, `head.3`, `pooler.norm`" in card
    printed = capsys.readouterr().out
    assert "not taken over: head.0, head.1, head.3, pooler.norm, pooler.dense" in printed
    assert "the file has no trained projection" in printed and "no trained projection" in card
    card = (run("vlmo", random_state(vlmo_shapes(**VLMO)), tmp_path / "vlmo") / "README.md").read_text()
    assert "2111.02358" in card and "@inproceedings{vlmo" in card and "pretraining" in card


def test_a_folder_without_tokenizer_embeds_images(tmp_path):
    state = under("relpos/sd/", golden("vlmo"))
    save_file(state, tmp_path / "upstream.safetensors")
    done = convert("vlmo", tmp_path / "upstream.safetensors", tmp_path / "guessed", with_tokenizer=False)
    assert any("mask_token_id 99 are guesses" in note for note in done.notes)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "guessed")
    state = random_state(beit3_shapes(**BEIT3 | {"vocab": 64010}))
    save_file(state, tmp_path / "upstream.safetensors")
    options = Options(num_attention_heads=4)
    convert("beit3", tmp_path / "upstream.safetensors", tmp_path / "out", with_tokenizer=False, options=options)
    features = pipeline("image-feature-extraction", model=str(tmp_path / "out"))(Image.new("RGB", (9, 9)))
    assert len(features[0]) == 32
    config = mome.MomeConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id, config.mask_token_id) == (0, 1, 2, 64001)


def test_caption_gives_a_file_without_a_caption_head_one_of_its_own(tmp_path):
    state = random_state(beit3_shapes(**BEIT3))
    tied = AutoModelForImageTextToText.from_pretrained(run("beit3", state, tmp_path / "tied"))
    own = AutoModelForImageTextToText.from_pretrained(run("beit3", state, tmp_path / "own", "--caption"))
    words = state["beit3.text_embed.weight"]
    assert torch.equal(own.lm_head.decoder.weight, words) and torch.equal(tied.lm_head.decoder.weight, words)
    with torch.no_grad():
        tied.lm_head.decoder.weight.add_(1)
        own.lm_head.decoder.weight.add_(1)
    assert torch.equal(tied.get_input_embeddings().weight, words + 1)
    assert torch.equal(own.get_input_embeddings().weight, words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_resizes(dtype, tmp_path):
    state = {key: tensor.to(dtype) for key, tensor in random_state(beit3_shapes(**BEIT3)).items()}
    state["logit_scale"] = state["logit_scale"].float()
    folder = run("beit3", state, tmp_path, "--image-size", "32")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    assert AutoModel.from_pretrained(folder).dtype == dtype


# Memory and progress.


MEASURE = """
import resource, sys
from mome.convert.__main__ import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="no resource usage on this platform")
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_memory_stays_near_the_size_of_the_file_and_progress_is_shown(suffix, tmp_path):
    state = random_state(beit3_shapes(width=512, inner=2048, layers=6, vocab=64010))
    path = tmp_path / f"upstream.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"model": state}, path)
    del state
    assert path.stat().st_size > driver.LARGE
    arguments = ["beit3", "--checkpoint", str(path), "--output", str(tmp_path / "out"), "--no-tokenizer"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak = (1024 * int(number) for number in done.stdout.splitlines()[-1].split())
    assert peak - before < 2.2 * path.stat().st_size
    assert "converting" in done.stderr and "100%" in done.stderr
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 512 and file.keys()
