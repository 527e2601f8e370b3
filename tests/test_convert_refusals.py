"""What can't be converted is refused in one line that names it, nothing of it runs, and nothing is left behind."""

import argparse
import functools
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from models import tiny_captioner
from mome.benchmarks.layouts import beit3_shapes, random_state, vlmo_shapes
from mome.convert import ConversionError, convert
from mome.convert.__main__ import main
from mome.convert.operations import Options
from upstream import BEIT3, VLMO, save_tokenizer


class Code:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def state():
    return random_state(beit3_shapes(**BEIT3))


@pytest.fixture
def folder(tmp_path, state):
    """A folder with a checkpoint and a tokenizer."""
    torch.save({"model": state}, tmp_path / "good.pth")
    save_file(state, tmp_path / "good.safetensors")
    save_tokenizer("beit3", tmp_path / "tokenizer")
    return tmp_path


def refused(
    folder, capsys, *arguments, kind="beit3", checkpoint="good.pth", tokenizer="tokenizer", output="out"
) -> str:
    """The one line; checks that there is nothing else, and that nothing is new in the folder."""
    before = sorted(folder.rglob("*"))
    command = [kind, "--checkpoint", str(folder / checkpoint), "--output", str(folder / output), *arguments]
    command += ["--tokenizer", str(folder / tokenizer)] if tokenizer else []
    command += [] if "--num-attention-heads" in arguments or kind == "mome" else ["--num-attention-heads", "4"]
    assert main(command) == 1
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mome.convert: ") and printed.out == ""
    assert len(lines[0]) < 400
    assert sorted(folder.rglob("*")) == before
    return lines[0]


def test_files_that_cannot_be_read_are_refused(folder, capsys, state):
    for name in ("good.pth", "good.safetensors"):
        content = (folder / name).read_bytes()
        for share in (0.3, 0.9, 0.9999):
            (folder / name).write_bytes(content[: int(len(content) * share)])
            assert f"{name} can't be read, it is truncated" in refused(folder, capsys, checkpoint=name)
    torch.save({"model": state}, folder / "old.pth", _use_new_zipfile_serialization=False)
    content = (folder / "old.pth").read_bytes()
    (folder / "old.pth").write_bytes(content[: len(content) // 2])
    assert "old.pth can't be read" in refused(folder, capsys, checkpoint="old.pth")
    (folder / "empty.pth").write_bytes(b"")
    assert "empty.pth is empty" in refused(folder, capsys, checkpoint="empty.pth")
    (folder / "text.pth").write_text("<html>404 not found</html>")
    assert "text.pth can't be read" in refused(folder, capsys, checkpoint="text.pth")
    assert "nowhere.pth does not exist" in refused(folder, capsys, checkpoint="nowhere.pth")
    assert "tokenizer is a folder" in refused(folder, capsys, checkpoint="tokenizer")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(zipped, folder, capsys, state):
    ran = folder / "ran"
    content = {"model": state, "epoch": Code(ran)}
    torch.save(content, folder / "evil.pth", _use_new_zipfile_serialization=zipped)
    line = refused(folder, capsys, checkpoint="evil.pth")
    assert "evil.pth was refused, not run" in line and f"{os.mkdir.__module__}.mkdir" in line
    assert not ran.exists()
    torch.save({"model": {"weight": functools.partial(print)}}, folder / "partial.pth")
    assert "functools.partial" in refused(folder, capsys, checkpoint="partial.pth")
    torch.load(folder / "evil.pth", weights_only=False)
    assert ran.exists()  # it would have


def test_what_training_scripts_keep_beside_the_weights_is_no_obstacle(folder, state):
    content = {
        "model": state,
        "epoch": 3,
        "args": argparse.Namespace(model="beit3", lr=1e-4),
        "optimizer": {"state": {}},
    }
    torch.save(content, folder / "run.pth")
    options = Options(num_attention_heads=4)
    convert("beit3", folder / "run.pth", folder / "out", tokenizer=folder / "tokenizer", options=options)
    assert (folder / "out" / "model.safetensors").is_file()


def test_checkpoints_of_another_kind_are_named(folder, capsys):
    assert "BEiT-3 checkpoint: convert it with `beit3`" in refused(folder, capsys, kind="vlmo")
    save_file(random_state(vlmo_shapes(**VLMO)), folder / "vlmo.safetensors")
    assert "VLMo checkpoint: convert it with `vlmo`" in refused(folder, capsys, checkpoint="vlmo.safetensors")
    save_file({"encoder.weight": torch.zeros(3)}, folder / "other.safetensors")
    assert "first key is encoder.weight" in refused(folder, capsys, checkpoint="other.safetensors")
    torch.save([1, 2], folder / "list.pth")
    assert "contains a list" in refused(folder, capsys, checkpoint="list.pth")
    torch.save({"model": {"epoch": 3}}, folder / "number.pth")
    assert "'epoch' of type int" in refused(folder, capsys, checkpoint="number.pth")


LAYER = "beit3.encoder.layers.1"


@pytest.mark.parametrize(
    "key, tensor, message",
    [
        (f"{LAYER}.gate.A.weight", torch.zeros(3), f"keys that BEiT-3 does not have: {LAYER}.gate.A.weight"),
        (f"{LAYER}.ffn.A.fc1.weight.extra", torch.zeros(3), f"does not have: {LAYER}.ffn.A.fc1.weight.extra"),
        (f"{LAYER}.self_attn.k_proj.B.bias", None, f"has no {LAYER}.self_attn.k_proj.B.bias"),
        (f"{LAYER}.ffn.A.fc2.weight", None, f"has no {LAYER}.ffn.A.fc2.weight"),
        ("language_head.weight", None, "has no language_head.weight"),
        ("logit_scale", None, "has no logit_scale"),
        ("beit3.text_embed.weight", None, "has no beit3.text_embed.weight"),
        ("beit3.encoder.layers.7.ffn.A.fc2.bias", torch.zeros(32), "layers.7.ffn.A.fc2.bias has no place"),
        (
            f"{LAYER}.self_attn.k_proj.B.weight",
            torch.zeros(31, 32),
            f"{LAYER}.self_attn.k_proj.B.weight of shape (31, 32)",
        ),
        (
            f"{LAYER}.self_attn.v_proj.B.weight",
            torch.zeros(32, 31),
            f"{LAYER}.self_attn.v_proj.B.weight of shape (32, 31)",
        ),
        ("beit3.encoder.layer_norm.A.bias", torch.zeros(30), "beit3.encoder.layer_norm.A.bias of shape (30,)"),
        ("beit3.encoder.embed_positions.A.weight", torch.zeros(9, 32), "embed_positions.A.weight has 9 rows"),
        ("beit3.text_embed.weight", torch.zeros(100), "text_embed.weight has shape (100,), expected 2 dimensions"),
        ("beit3.text_embed.weight", torch.zeros(0, 32), "text_embed.weight has shape (0, 32)"),
        ("vision_head.bias", torch.zeros(32), "vision_head.bias has no place"),
        ("vision_head.weight", torch.full((32, 32), torch.nan), "vision_head.weight contains NaN"),
        ("vision_head.weight", torch.zeros(32, 32, dtype=torch.int64), "weights of type torch.int64"),
    ],
)
def test_unmapped_missing_and_misshapen_keys_stop_the_conversion_and_are_named(
    key, tensor, message, folder, capsys, state
):
    changed = {name: value for name, value in state.items() if name != key}
    save_file(changed if tensor is None else changed | {key: tensor}, folder / "changed.safetensors")
    assert message in refused(folder, capsys, checkpoint="changed.safetensors")


def test_a_tensor_larger_than_its_file_is_refused(folder, capsys, state):
    bomb = state | {"vision_head.weight": torch.zeros(1).expand(1_000_000, 1_000_000)}
    torch.save({"model": bomb}, folder / "bomb.pth")
    assert "vision_head.weight claims" in refused(folder, capsys, checkpoint="bomb.pth")


@pytest.mark.parametrize("what", ["file", "folder", "empty folder", "link to nowhere"])
def test_an_output_that_exists_is_left_alone(what, folder, capsys):
    output = folder / "taken"
    if what == "file":
        output.write_text("mine")
    elif what == "link to nowhere":
        output.symlink_to(folder / "nowhere")
    else:
        output.mkdir()
        if what == "folder":
            (output / "mine.txt").write_text("mine")
    assert "taken exists" in refused(folder, capsys, output="taken")


def test_tokenizers_that_do_not_fit_are_refused(folder, capsys):
    assert "no tokenizer beside" in (line := refused(folder, capsys, tokenizer=None)) and "--tokenizer FILE" in line
    assert "nowhere.spm does not exist" in refused(folder, capsys, tokenizer="nowhere.spm")
    (folder / "broken.spm").write_bytes(b"no sentencepiece")
    assert "broken.spm can't be read" in refused(folder, capsys, tokenizer="broken.spm")
    (folder / "broken.json").write_text("{")
    assert "broken.json can't be read" in refused(folder, capsys, tokenizer="broken.json")
    (folder / "nothing").mkdir()
    assert "nothing can't be read" in refused(folder, capsys, tokenizer="nothing")
    save_tokenizer("beit3", folder / "large", vocab_size=200)
    assert "ids up to 196, the checkpoint 100 words" in refused(folder, capsys, tokenizer="large")


def test_sizes_that_do_not_fit_are_refused(folder, capsys):
    assert "num_attention_heads=5" in refused(folder, capsys, "--num-attention-heads", "5")
    assert "width 32 is not a multiple of 64" in refused(folder, capsys, "--num-attention-heads", "0")
    assert "image_size=20" in refused(folder, capsys, "--image-size", "20")
    assert "--experts-per-token 1" in refused(folder, capsys, "--experts-per-group", "4", "--experts-per-token", "1")
    assert "--experts-per-token 5" in refused(folder, capsys, "--experts-per-group", "4", "--experts-per-token", "5")
    assert "--experts-per-group 1" in refused(folder, capsys, "--experts-per-group", "1")


def test_what_cannot_be_upcycled_is_refused(folder, capsys):
    tiny_captioner("routed").save_pretrained(folder / "routed")
    routing = ("--experts-per-group", "4")
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for checkpoint, message in (
        ("routed", "already has 4 experts"),
        ("nowhere", "not the folder of a MoME checkpoint"),
        ("tokenizer", "not the folder of a MoME checkpoint"),
        ("bert", "is a bert checkpoint"),
    ):
        assert message in refused(folder, capsys, *routing, kind="mome", checkpoint=checkpoint, tokenizer=None)
    tiny_captioner("dense").save_pretrained(folder / "dense")
    weights = folder / "dense" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    assert "truncated" in refused(folder, capsys, *routing, kind="mome", checkpoint="dense", tokenizer=None)
    weights.unlink()
    assert "has no model.safetensors" in refused(
        folder, capsys, *routing, kind="mome", checkpoint="dense", tokenizer=None
    )


def test_a_refusal_is_the_one_line_that_the_command_prints(folder):
    command = [sys.executable, "-m", "mome.convert", "vlmo", "--checkpoint", "good.pth", "--output", "out"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.splitlines() == [
        "mome.convert: checkpoint good.pth has no transformer.patch_embed.proj.weight, it is a BEiT-3 checkpoint: "
        "convert it with `beit3`"
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), SystemExit(143)])
def test_an_interrupted_conversion_leaves_nothing(error, folder, monkeypatch):
    def interrupt(*args, **kwargs):
        raise error

    monkeypatch.setattr("mome.processing_mome.MomeProcessor.save_pretrained", interrupt)
    before = sorted(folder.rglob("*"))
    with pytest.raises(error if isinstance(error, type) else type(error)):
        convert(
            "beit3",
            folder / "good.pth",
            folder / "out",
            tokenizer=folder / "tokenizer",
            options=Options(num_attention_heads=4),
        )
    assert sorted(folder.rglob("*")) == before


def test_an_output_that_appears_meanwhile_is_left_alone(folder, monkeypatch):
    save = "mome.processing_mome.MomeProcessor.save_pretrained"
    monkeypatch.setattr(save, lambda *args, **kwargs: (folder / "out").mkdir())
    with pytest.raises(ConversionError, match="out exists"):
        options = Options(num_attention_heads=4)
        convert("beit3", folder / "good.pth", folder / "out", tokenizer=folder / "tokenizer", options=options)
    assert list((folder / "out").iterdir()) == []
    assert not list(folder.glob(".out.*"))


STALL = """
import sys, time, pathlib
from mome.convert import __main__, driver
def stall(*args, **kwargs):
    pathlib.Path("stalled").touch()
    time.sleep(60)
driver.model_card = stall
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_terminated_conversion_leaves_nothing(folder):
    arguments = ["beit3", "--checkpoint", "good.pth", "--output", "out", "--tokenizer", "tokenizer"]
    command = [sys.executable, "-c", STALL, *arguments, "--num-attention-heads", "4"]
    run = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "stalled").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(folder.glob(".out.*"))
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 143, run.stderr.read()
    assert not list(folder.glob(".out.*")) and not (folder / "out").exists()
