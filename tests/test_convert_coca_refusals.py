"""A CoCa whose config or tokenizer is damaged: one line that names the value, nothing written; and memory."""

import gzip
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from test_coca_checkpoints import GOLDEN, config_of, run, save_clip_tokenizer, write_upstream

from mome.benchmarks.layouts import coca_shapes, random_state
from mome.convert import driver

SIZES = {**GOLDEN, "vocab": 560, "texts": 16}
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_upstream(tmp_path / "coca", SIZES)
    return save_clip_tokenizer(tmp_path / "coca")


def refused(folder, capsys, *options) -> str:
    """The line that says why; nothing else is left."""
    assert run("--checkpoint", folder, "--output", folder.parent / "out", *options) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mome.convert: "), lines
    assert os.listdir(folder.parent) == ["coca"]
    return lines[0]


def say(folder, part: str, **values):
    config = config_of(SIZES)
    config.setdefault("preprocess_cfg", {})
    (config[part] if part in config else config["model_cfg"][part]).update(values)
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "part, values, reason",
    [
        ("vision_cfg", {"head_width": 0}, "vision_cfg has head_width=0, expected a positive number"),
        ("vision_cfg", {"head_width": "16"}, "vision_cfg has head_width='16', expected a positive number"),
        ("text_cfg", {"heads": 2.5}, "text_cfg has heads=2.5, expected a positive number"),
        ("multimodal_cfg", {"heads": True}, "multimodal_cfg has heads=True, expected a positive number"),
        ("multimodal_cfg", {"heads": 5}, "describes an impossible model"),
        ("text_cfg", {"correct_cls_mask": "yes"}, "text_cfg has correct_cls_mask='yes', expected"),
        ("text_cfg", {"pad_id": -1}, "text_cfg has pad_id=-1, expected a positive number"),
        ("multimodal_cfg", {"vocab_size": 9}, "multimodal_cfg has vocab_size=9, the shapes say 560"),
        ("multimodal_cfg", {"context_length": 9}, "multimodal_cfg has context_length=9, the shapes say 16"),
        ("model_cfg", {"embed_dim": 8}, "embed_dim=8, the shapes say 32"),
        ("model_cfg", {"text_cfg": []}, "is not that of an open_clip CoCa"),
        ("preprocess_cfg", {"mean": 0.5}, "preprocess_cfg has mean=0.5, expected 3 numbers"),
        ("preprocess_cfg", {"mean": [0.5, 0.5]}, "preprocess_cfg has mean=[0.5, 0.5], expected 3 numbers"),
        ("preprocess_cfg", {"std": [1, 1, 0]}, "preprocess_cfg has std=[1, 1, 0], expected 3 numbers above 0"),
        ("preprocess_cfg", {"size": 64}, "preprocess_cfg has size=64, the shapes say 32"),
        ("preprocess_cfg", {"resize_mode": "squash"}, "preprocess_cfg has resize_mode='squash', only 'shortest' is"),
        ("preprocess_cfg", {"interpolation": "bilinear"}, "has interpolation='bilinear', only 'bicubic' is supported"),
    ],
)
def test_an_impossible_value_of_the_config_is_named(part, values, reason, folder, capsys):
    say(folder, part, **values)
    assert reason in refused(folder, capsys)


def test_null_is_what_the_config_does_not_say(folder):
    say(folder, "preprocess_cfg", mean=None, std=None, size=[32, 32], resize_mode="shortest", interpolation="bicubic")
    assert run("--checkpoint", folder, "--output", folder.parent / "out") == 0
    processor = json.loads((folder.parent / "out" / "processor_config.json").read_text())["image_processor"]
    assert processor["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    say(folder, "preprocess_cfg", mean=[0.1, 0.2, 0.3])
    assert run("--checkpoint", folder, "--output", folder.parent / "other") == 0
    processor = json.loads((folder.parent / "other" / "processor_config.json").read_text())["image_processor"]
    assert processor["image_mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("merges.txt", b"", "has no merges, it would read letter by letter"),
        ("merges.txt", b"#version: 0.2\na b c\n", "has merges that are not pairs"),
        ("merges.txt", b"#version: 0.2\nq x\n", "vocab.json can't be read: Error while initializing BPE"),
        ("merges.txt", b"\xff\xfe", "vocab.json can't be read"),
        ("vocab.json", b'{"a": "b", "<|startoftext|>": 1, "<|endoftext|>": 2}', "has ids that are not whole numbers"),
        ("vocab.json", b'{"a": 0}', "is not CLIP's, it has no <|startoftext|> and <|endoftext|>"),
        ("vocab.json", b"[1", "vocab.json can't be read"),
        ("tokenizer.json", b"{}", "tokenizer.json can't be read"),
        (
            "tokenizer.json",
            b'{"model": {"vocab": {"<|startoftext|>": 0, "<|endoftext|>": 1}, "merges": []}}',
            "no merges",
        ),
        ("open_clip_config.json", b"{", "open_clip_config.json is not that of an open_clip CoCa"),
        ("open_clip_config.json", b"[]", "open_clip_config.json is not that of an open_clip CoCa"),
    ],
)
def test_a_damaged_file_is_named(name, content, reason, folder, capsys):
    (folder / name).write_bytes(content)
    assert reason in refused(folder, capsys)


def test_damaged_merges_of_open_clip_are_named(folder, capsys):
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    whole = gzip.compress(b"version\n" + b"a b\n" * 99)
    for content, reason in (
        (b"no gzip", "can't be read"),
        (whole[:-30], "can't be read"),
        (gzip.compress(b""), "merges"),
    ):
        path.write_bytes(content)
        assert reason in refused(folder, capsys, "--tokenizer", path)


@pytest.mark.parametrize("old", [False, True])
def test_a_truncated_pickle_is_named(old, folder, capsys):
    state = random_state(coca_shapes(**SIZES))
    (folder / WEIGHTS).unlink()
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    for length in (len(whole) - 1000, len(whole) // 2, 100, 1, 0):
        path.write_bytes(whole[:length])
        message = refused(folder, capsys)
        assert "open_clip_pytorch_model.bin" in message and ("can't be read" in message or "is empty" in message)


MEASURE = """
import resource, sys
from mome.convert.__main__ import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="no resource usage on this platform")
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_memory_stays_near_the_size_of_the_file_and_progress_is_shown(suffix, tmp_path):
    sizes = {"vision_width": 768, "vision_layers": 3, "patch": 32, "width": 512, "layers": 3, "vocab": 20000}
    path, state = tmp_path / f"open_clip_model.{suffix}", random_state(coca_shapes(**sizes))
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    del state
    assert path.stat().st_size > driver.LARGE
    command = ["coca", "--checkpoint", str(path), "--output", str(tmp_path / "out"), "--no-tokenizer"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak = (1024 * int(number) for number in done.stdout.splitlines()[-1].split())
    assert peak - before < 2.2 * path.stat().st_size
    assert "converting" in done.stderr and "100%" in done.stderr
