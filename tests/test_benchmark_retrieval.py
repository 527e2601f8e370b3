import pytest

from mome.benchmarks.retrieval import main
from mome.evaluation.results import COLUMNS


def test_the_benchmark_holds_the_job_against_the_loop_and_search_against_faiss(tmp_path):
    results = tmp_path / "results.csv"
    rows = main(["--quick", "--rounds", "1", "--only", "embed,search", "--results", str(results)])
    compared = {(row["metric"], row["peer"]) for row in rows}
    assert ("images of a corpus embedded, float32, per second: embed_corpus", "bare model loop") in compared
    assert results.read_text().splitlines()[0] == ",".join(COLUMNS)
    pytest.importorskip("faiss", reason="needs benchmarks/requirements.txt")
    for queries in ("one query", "128 queries"):
        assert (f"exact search of 5,000 × 256, top 10, {queries}, per second: MoME", "faiss") in compared
