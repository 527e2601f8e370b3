import csv
import sys

import torch

from mome.benchmarks.captioning import BeamBookkeeping, main


def test_captions_are_held_against_each_installed_peer_and_guidance_against_its_base(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    results = tmp_path / "results.csv"
    rows = main(["--quick", "--rounds", "2", "--only", "greedy,guided", "--results", str(results)])
    assert "CoCa is left out" in capsys.readouterr().out
    compared = {(row["metric"].split(", bfloat16, per second: ")[-1], row["peer"]) for row in rows}
    expected = {
        ("MoME", "BLIP"),
        ("re-ranked", "beam 4"),
        ("classifier-free", "unguided"),
        ("contrastive", "unguided"),
    }
    assert expected <= compared
    for batch in (1, 8):
        assert any(f"greedy captions of 20 tokens, batch {batch}" in row["metric"] for row in rows)
    with results.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_the_stand_in_for_the_beam_scorer_goes_on_with_the_best():
    scorer = BeamBookkeeping(batch_size=2, num_beams=2, device=torch.device("cpu"))
    scores = torch.tensor([[4.0, 3, 2, 1], [8.0, 7, 6, 5]])
    tokens, indices = torch.arange(8).view(2, 4), torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1]])
    chosen = scorer.process(torch.zeros(4, 1), scores, tokens, indices)
    assert chosen["next_beam_scores"].tolist() == [4, 3, 8, 7]
    assert chosen["next_beam_tokens"].tolist() == [0, 1, 4, 5]
    assert chosen["next_beam_indices"].tolist() == [1, 0, 2, 2]
    assert scorer.finalize(torch.arange(8).view(4, 2))["sequences"].tolist() == [[0, 1], [4, 5]]
