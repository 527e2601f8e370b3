import csv

import datasets
import pytest
import torch

from mome.benchmarks.milvus import main, recall
from retrieval_corpora import make_table


def test_the_benchmark_holds_milvus_lite_and_its_server_against_exact_search(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = make_table(tmp_path / "table.parquet", rows=300, bad=(3,))
    results = tmp_path / "results.csv"
    rows = main(["--table", str(path), "--queries", "9", "--rounds", "2", "--results", str(results)])
    values = {row["metric"]: float(row["value"]) for row in rows}
    for place in ("Milvus Lite", "milvus-lite server"):
        for kind in ("FLAT", "HNSW"):
            for direction in ("text → image", "image → text"):
                assert values[f"{place}, {kind}, recall@10: {direction}"] >= 0.99
            assert values[f"{place}, {kind}, ms for one query, p50"] > 0
            assert values[f"{place}, {kind}, rows indexed per second"] > 0
    with results.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


@pytest.mark.parametrize(
    "scores, rows, expected",
    [
        ([[0.9, 0.8]], [[4, 2]], 1.0),
        ([[0.9, 0.8]], [[4, 7]], 1.0),  # another row with the same score
        ([[0.9, 0.7]], [[4, 2]], 0.5),
        ([[0.9, 0.9]], [[4, 4]], 0.5),  # the same row twice
        ([[0.9, float("-inf")]], [[4, -1]], 0.5),
    ],
)
def test_recall_counts_rows_that_are_as_good(scores, rows, expected):
    assert recall(torch.tensor(scores), torch.tensor(rows), torch.tensor([[0.9, 0.8]])) == expected
