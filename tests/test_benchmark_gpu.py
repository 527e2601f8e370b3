import csv
import signal
import subprocess
import sys
import time

import pytest
import torch

from mome.benchmarks import gpu
from mome.benchmarks.table import speed_table
from mome.evaluation.results import COLUMNS

QUICK = ["--quick", "--rounds", "1", "--threads", "1", "--only"]


def compared(rows: list[dict]) -> set[tuple[str, str]]:
    return {(row["metric"], row["peer"]) for row in rows}


def test_mome_is_held_against_each_peer_and_every_row_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    results = tmp_path / "results.csv"
    rows = gpu.main([*QUICK, "image,text-compiled,training,routed,caption", "--results", str(results)])
    printed = capsys.readouterr().out
    assert "CoCa is left out: " in printed and "failed" not in printed and printed.count("is left out") == 1
    found = compared(rows)
    for batch in (1, 3):
        for ours in ("MoME eager", "MoME sdpa"):
            metric = f"GPU, image embeddings, batch {batch}, bfloat16, per second: {ours}"
            assert {peer.split()[0] for name, peer in found if name == metric} == {"CLIP", "SigLIP"}
        assert (f"GPU, captions of 20 tokens, batch {batch}, bfloat16, per second: MoME", "BLIP") in found
        for variant in ("sdpa", "compiled"):
            metric = f"GPU, text embeddings, batch {batch}, bfloat16, TFLOP/s: MoME {variant}"
            assert (metric, "matrix product") in found
    for peer in ("CLIP sdpa", "SigLIP sdpa"):
        assert ("GPU, training step, 3 pairs, bfloat16 autocast, per second: MoME sdpa", peer) in found
    for way in gpu.IMPLEMENTATIONS:
        for what in ("image pass", "training step"):
            assert (f"GPU, routed, {what}, batch 3, bfloat16, per second: routed {way}", "dense") in found
    with results.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["metric"], row["value"]) for row in written] == [(row["metric"], row["value"]) for row in rows]
    assert all(list(row) == COLUMNS and all(row.values()) for row in written)

    assert "captions of 20 tokens, batch 3, bfloat16" in speed_table(written, gpu=True)
    assert "captions" not in speed_table(written)


@pytest.fixture
def race() -> gpu.Race:
    rows = []
    race = gpu.Race(torch.device("cpu"), gpu.TINY, 3, rows.append, peak=1e9)
    race.rows = rows
    return race


def test_rates_ratios_and_shares_are_those_of_the_calls(race, monkeypatch):
    """With a clock that we set: 4 items in 0.5 s are 8 a second; at 10 FLOPs each that is 80 of 1,000 FLOP/s."""
    race.peak = 1000.0
    durations = {"ours": 0.5, "slow": 2.0, "quick": 0.25}
    monkeypatch.setattr(gpu.Race, "seconds", lambda self, run, calls: durations[run()])
    entries = [("MoME", "", "ours"), ("CLIP", "eager", "slow"), ("CLIP", "sdpa", "quick")]
    race.run("a title", [gpu.Competitor(model, variant, lambda k=k: k, 4, 10.0) for model, variant, k in entries])
    rows = {(row["metric"], row["peer"]): row for row in race.rows}
    row = rows["GPU, a title, per second: MoME", "CLIP sdpa"]
    assert (row["value"], row["peer_value"], row["ratio"]) == ("8", "16", "0.500")
    assert ("GPU, a title, per second: MoME", "CLIP eager") not in rows, "a peer's fastest variant counts"
    row = rows["GPU, a title, TFLOP/s: MoME", "matrix product"]
    assert (row["value"], row["peer_value"], row["ratio"]) == ("8e-11", "1e-09", "0.080")


def test_flops_of_a_linear_layer_are_counted_by_hand(race):
    layer, inputs = torch.nn.Linear(5, 7, bias=False), torch.randn(3, 5)
    assert race.flops(lambda: layer(inputs), items=3) == 2 * 5 * 7


def test_what_fails_is_named_and_the_rest_goes_on(monkeypatch, capsys, race):
    def fail():
        raise RuntimeError("out of memory\nand a long story")

    well = gpu.Competitor("CLIP", "sdpa", lambda: None, 1, 1.0)
    race.run("a title", [gpu.Competitor("MoME", "sdpa", fail, 1, 1.0), well])
    assert "GPU, a title: MoME sdpa is left out: RuntimeError: out of memory\n" in capsys.readouterr().out
    assert [row["metric"] for row in race.rows] == ["GPU, a title, TFLOP/s: CLIP sdpa"]
    race.run("nobody", [])
    monkeypatch.setitem(gpu.SECTIONS, "image", lambda race: fail())
    monkeypatch.setitem(gpu.SECTIONS, "text", lambda race: race.run("texts", [well]))
    gpu.run_sections(race, ["image", "text"], seconds=0)
    assert "image failed: RuntimeError: out of memory\n" in capsys.readouterr().out
    assert race.rows[-1]["metric"] == "GPU, texts, TFLOP/s: CLIP sdpa"


def test_when_the_time_is_up_the_rest_is_skipped_and_finished_rows_stay(monkeypatch, capsys, race):
    def ring_in_the_middle(race):
        try:
            signal.raise_signal(signal.SIGALRM)
        except Exception:
            raise AssertionError("the alarm must not be taken for an error") from None

    well = gpu.Competitor("CLIP", "sdpa", lambda: None, 1, 1.0)
    monkeypatch.setitem(gpu.SECTIONS, "image", lambda race: race.run("images", [well]))
    monkeypatch.setitem(gpu.SECTIONS, "text", ring_in_the_middle)
    gpu.run_sections(race, ["image", "text", "caption"], seconds=600)
    assert "600 seconds are up; not finished: text, caption" in capsys.readouterr().out
    assert [row["metric"] for row in race.rows] == ["GPU, images, TFLOP/s: CLIP sdpa"]


def test_the_alarm_rings_in_time_and_only_inside_its_block():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(gpu.TimeUp), gpu.alarm(0.05):
        time.sleep(60)
    with gpu.alarm(600):
        pass
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_layers_are_compiled_once_for_each_shape():
    from torch._dynamo.utils import counters

    model = gpu.with_compiled_layers(gpu.mome(gpu.QUICK | {"num_hidden_layers": 4}), "aot_eager").eval()
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        for batch in (2, 3, 2):
            model.get_image_features(torch.randn(batch, 3, 32, 32))
    assert counters["stats"]["unique_graphs"] == 2


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--only", "image"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_it_needs_nothing_but_torch_and_transformers():
    code = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import mome.benchmarks.gpu"
    without = ["accelerate", "datasets", "open_clip", "pandas", "peft", "pyarrow", "torchvision"]
    subprocess.run([sys.executable, "-c", code, *without], check=True)
