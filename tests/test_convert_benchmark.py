import csv
import subprocess
import sys
from importlib.util import find_spec

import pytest

from mome.benchmarks.conversion import main
from mome.benchmarks.inference import COLUMNS
from mome.benchmarks.table import speed_table

QUICK = ["--quick", "--no-compile", "--rounds", "1"]


def test_conversions_are_measured_and_a_missing_peer_is_named(monkeypatch, capfd, tmp_path):
    monkeypatch.setitem(sys.modules, "torchscale", None)
    results = tmp_path / "results.csv"
    rows = main([*QUICK, "--results", str(results)])
    printed = capfd.readouterr().out
    for section in ("image", "text", "caption"):
        assert f"{section} is left out: " in printed
    with results.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) and all(list(row) == COLUMNS and all(row.values()) for row in written)
    for what in ("seconds", "peak memory in MB"):
        for name in ("BEiT-3 base, retrieval", "VLMo base, pretraining"):
            found = [
                row for row in written if row["metric"].startswith(f"conversion of {name}") and what in row["metric"]
            ]
            assert len(found) == 1 and float(found[0]["value"]) > 0
    assert "conversion" not in speed_table(written)  # a table of rates


@pytest.mark.skipif(find_spec("torchscale") is None, reason="torchscale is a peer of the benchmarks alone")
def test_torchscale_gives_the_same_embeddings_and_captions(tmp_path):
    """The benchmark compares them before it times anything; in a process of its own, for torchscale's imports."""
    results = tmp_path / "results.csv"
    command = [sys.executable, "-m", "mome.benchmarks.conversion", *QUICK, "--only", "image,text,caption"]
    run = subprocess.run([*command, "--results", str(results)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with results.open(newline="") as file:
        compared = {(row["metric"], row["peer"]) for row in csv.DictReader(file)}
    for modality in ("image", "text"):
        assert (f"converted BEiT-3, {modality} embeddings, float32, per second: MoME", "torchscale") in compared
    for peer in ("unilm's loop", "unilm's loop uncached"):
        assert ("converted BEiT-3, captions of 20 tokens, batch 1, float32, per second: MoME", peer) in compared


@pytest.mark.skipif(find_spec("open_clip") is None, reason="open_clip is a peer of the benchmarks alone")
def test_open_clip_gives_the_same_embeddings_and_captions(tmp_path):
    """The benchmark compares them before it times anything."""
    results = tmp_path / "results.csv"
    command = [sys.executable, "-m", "mome.benchmarks.coca", "--quick", "--rounds", "1", "--results", str(results)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with results.open(newline="") as file:
        compared = {row["metric"] for row in csv.DictReader(file) if row["peer"] == "open_clip"}
    captions = "greedy captions of 20 tokens, batch 8", "captions with 6 beams of 20 tokens, batch 1"
    for what in ("image embeddings", *captions):
        assert f"converted CoCa, {what}, float32, per second: CoCa" in compared
