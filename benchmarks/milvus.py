"""Milvus beside exact search over the same table: what it finds, how fast it is made and answers.

    python -m mome.benchmarks.milvus --table table.parquet --threads 2 --results evaluation/results.csv

The table holds rows of both modalities (images and texts that `mome embed` has put into one table, or a folder with a
file of each). Queries are rows of it: images search among texts, texts among images. Milvus runs inside the process
(Lite) and, in a process of its own, as the server that comes with it; `--server` names another one.

Recall is the share of exact search's top 10 that is found. Rows whose scores are equal, copies of a picture for
example, can stand for each other.
"""

import argparse
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ..evaluation.results import append_rows, environment
from ..retrieval import EmbeddingTable, ExactIndex, Index, RetrievalError, load_table
from ..retrieval.milvus import INDEX_TYPES, MilvusIndex

TOP_K = 10
EQUAL_SCORES = 1e-5
BATCH = 128
DIRECTIONS = {"text → image": ("text", "image"), "image → text": ("image", "text")}


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """`milvus-lite server` on a free port of the loopback interface: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "milvus_lite.cmdline", "server"]
    command += ["--data-dir", str(folder), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        output = []
        for line in process.stdout:
            output.append(line)
            if "listening" in line:
                break
        else:
            raise RetrievalError(f"`milvus-lite server` ended: {' '.join(output)}")
        # Read on, so that the server never waits for somebody to read its log.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def queries_of(table: EmbeddingTable, modality: str, count: int) -> torch.Tensor:
    """(count, dimension): embeddings of rows drawn from those of a modality."""
    column = table.column("modality").to_pylist()
    rows = [row for row, each in enumerate(column) if each == modality and table.valid[row]]
    if not rows:
        raise SystemExit(f"{table.name} has no rows of modality {modality!r}: put images and texts into one table")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    return table.embeddings([rows[place] for place in chosen.tolist()])


def recall(scores: torch.Tensor, rows: torch.Tensor, exact_scores: torch.Tensor) -> float:
    """Scores and row numbers (queries, top_k) as an index gives them → share of the best that it found."""
    last = exact_scores[:, -1:]
    good = (scores >= last - EQUAL_SCORES) & (rows >= 0)
    distinct = sum(len(set(each[mask].tolist())) for each, mask in zip(rows, good))
    return distinct / int((exact_scores > -torch.inf).sum())


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median over the rounds, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def compare(index: Index, exact: ExactIndex, name: str, count: int, rounds: int) -> list[dict]:
    """Rows for the results file: recall in both directions, one query and many."""
    rows = []
    for direction, (asked, found) in DIRECTIONS.items():
        queries = queries_of(exact.table, asked, count)
        options = {"top_k": TOP_K, "where": {"modality": found}}
        expected = exact.search_rows(queries, **options)[0]
        share = recall(*index.search_rows(queries, **options), expected)
        rows.append(_row(f"{name}, recall@{TOP_K}: {direction}", share, 1.0))
    many = queries[:BATCH]
    for metric, some in (("ms for one query, p50", many[:1]), (f"ms for {len(many)} queries", many)):
        ours, theirs = (1000 * seconds(partial(each.search_rows, some, TOP_K), rounds) for each in (index, exact))
        rows.append(_row(f"{name}, {metric}", ours, theirs))
    return rows


def _row(metric: str, value: float, exact: float) -> dict:
    print(f"  {metric}: {value:.4g} (exact {exact:.4g})", flush=True)
    row = {"metric": metric, "value": f"{value:.4g}", "peer": "exact search", "peer_value": f"{exact:.4g}"}
    return row | {"ratio": f"{value / exact:.3f}"}


def run(table: EmbeddingTable, uris: dict[str, str], index_types: list[str], count: int, rounds: int) -> list[dict]:
    """Makes every kind of index, and compares it."""
    rows, exact = [], ExactIndex(table)
    for place, uri in uris.items():
        for kind in index_types:
            name = f"{place}, {kind}"
            start = time.perf_counter()
            with MilvusIndex(table, uri, collection=f"benchmark_{kind}", index_type=kind, rebuild=True) as index:
                speed = int(table.valid.sum()) / (time.perf_counter() - start)
                print(f"{name}: {speed:.4g} rows/s indexed", flush=True)
                rows.append({"metric": f"{name}, rows indexed per second", "value": f"{speed:.4g}"})
                rows += compare(index, exact, name, count, rounds)
                index.client.drop_collection(index.collection)
    data = f"{len(table):,} rows × {table.dimension}"
    return [{"data": data} | row for row in rows]


def main(argv: list[str] | None = None) -> list[dict]:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="table of images and texts")
    parser.add_argument("--server", metavar="URI", help="a Milvus server (default: one of Milvus Lite is started)")
    parser.add_argument("--index-types", default="FLAT,HNSW", metavar="TYPE,...", help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=500, help="in each direction (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="how often a search is timed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, help="append the rows to this CSV file")
    options = parser.parse_args(argv)
    kinds = options.index_types.split(",")
    if unknown := set(kinds) - set(INDEX_TYPES):
        parser.error(f"unknown index type {unknown.pop()!r}: choose from {', '.join(INDEX_TYPES)}")
    torch.set_num_threads(options.threads)
    common = environment() | {"command": shlex.join(["python", "-m", "mome.benchmarks.milvus", *argv])}
    print(common["hardware"])
    table = load_table(options.table)
    with tempfile.TemporaryDirectory() as temporary:
        lite = {"Milvus Lite": str(Path(temporary) / "index.db")}
        rows = run(table, lite, kinds, options.queries, options.rounds)
        if options.server:
            rows += run(table, {"Milvus server": options.server}, kinds, options.queries, options.rounds)
        else:
            with serving(Path(temporary) / "server") as uri:
                rows += run(table, {"milvus-lite server": uri}, kinds, options.queries, options.rounds)
    if options.results:
        append_rows(options.results, [common | row for row in rows])
    return rows


if __name__ == "__main__":
    main()
