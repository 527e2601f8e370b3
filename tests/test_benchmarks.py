import csv
import sys

from mome.benchmarks.inference import main
from mome.evaluation.results import COLUMNS


def test_the_benchmark_holds_mome_against_each_installed_peer_and_names_a_missing_one(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torchscale", None)
    results = tmp_path / "evaluation" / "results.csv"
    smoke = ["--quick", "--no-compile", "--rounds", "2", "--results", str(results), "--only"]
    rows = main([*smoke, "image,text,caption,routed"])
    assert "BEiT-3 is left out" in capsys.readouterr().out

    compared = {(row["metric"], row["peer"]) for row in rows}
    for modality in ("image", "text"):
        for dtype in ("bfloat16", "float32"):
            for peer in ("CLIP", "SigLIP"):
                assert (f"{modality} embeddings, {dtype}, per second: MoME", peer) in compared
    for batch in (1, 8):
        assert (f"captions of 20 tokens, batch {batch}, bfloat16, per second: MoME", "BLIP") in compared
    for what in ("image pass", "training step"):
        assert (f"routed, {what}, bfloat16, per second: routed", "dense") in compared

    more = main([*smoke, "text"])  # appends
    with results.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) + len(more)
    assert all(list(row) == COLUMNS and all(row.values()) for row in written)
