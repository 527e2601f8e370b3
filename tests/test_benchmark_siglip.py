import csv

from mome.benchmarks.inference import COLUMNS
from mome.benchmarks.siglip import main


def test_converted_weights_are_timed_against_the_same_in_transformers(tmp_path):
    """The benchmark compares the embeddings before it times anything."""
    results = tmp_path / "results.csv"
    rows = main(["--quick", "--no-compile", "--rounds", "1", "--results", str(results)])
    with results.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) and all(list(row) == COLUMNS and all(row.values()) for row in written)
    metrics = {(row["metric"], row["peer"]) for row in written}
    for modality in ("image", "text"):
        for dtype in ("bfloat16", "float32"):
            assert (f"converted SigLIP, {modality} embeddings, {dtype}, per second: MoME", "SiglipModel") in metrics
    assert any("conversion of SigLIP base" in metric and "peak memory" in metric for metric, _ in metrics)
