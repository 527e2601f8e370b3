"""Milvus, inside the process and as a server: what exact search finds, nothing lost, nothing twice, clear refusals."""

import datetime
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from pymilvus.exceptions import MilvusException

from mome.benchmarks.milvus import serving
from mome.errors import RetrievalError
from mome.retrieval import EmbeddingTable, ExactIndex, TableInfo, load_table
from mome.retrieval.format import table_schema, to_table, write_table
from mome.retrieval.milvus import MilvusIndex, connection
from mome.retrieval.milvus import index as milvus_module
from mome.retrieval.milvus.columns import collection_schema
from mome.retrieval.milvus.manifest import table_digest
from mome.retrieval.search import open_index
from retrieval_corpora import make_table, random_vectors

ROWS = 400
BAD = (3, 77)
FILTERS = [
    {"modality": "text"},
    {"colour": ["red", "blue"]},
    {"year": {">=": 2005, "<": 2010}},
    {"year": {"!=": 2005}},
    {"year": None},
    {"year": {"!=": None}, "colour": "red"},
    {"id": ["4", "8", "no such row"]},
    {"text": "picture 12"},
    {"error": None, "uri": "/pictures/5.png"},
    {"colour": "no such colour"},
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, str(tmp_path_factory.mktemp("cache"))
    yield
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return load_table(make_table(tmp_path_factory.mktemp("table") / "table.parquet", rows=ROWS, bad=BAD))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`milvus-lite server` in a process of its own."""
    with serving(tmp_path_factory.mktemp("server")) as uri:
        yield uri


@pytest.fixture(params=["lite", "server"])
def uri(request, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 60)  # on a busy machine
    return str(tmp_path / "index.db") if request.param == "lite" else request.getfixturevalue("server")


def assert_same_hits(index, exact, **options):
    queries = random_vectors(7, seed=1)
    expected_scores, expected_rows = exact.search_rows(queries, **options)
    scores, rows = index.search_rows(queries, **options)
    found = expected_rows >= 0
    assert torch.equal(rows >= 0, found) and (scores[~found] == -torch.inf).all()
    assert torch.allclose(scores[found], expected_scores[found], atol=1e-5)
    assert (rows != expected_rows).float().mean() < 0.01  # rounding may swap neighbours
    assert all(len(set(each.tolist()) - {-1}) == count for each, count in zip(rows, found.sum(dim=1).tolist()))


def test_milvus_finds_what_exact_search_finds(table, uri):
    exact = ExactIndex(table)
    with MilvusIndex(table, uri, collection="finds", progress=False) as index:
        assert_same_hits(index, exact)
        for top_k in (1, 100, ROWS + 10):
            assert_same_hits(index, exact, top_k=top_k)
        for where in FILTERS:
            assert_same_hits(index, exact, where=where, top_k=20)
        hit, wanted = (each.search(random_vectors(1, seed=1))[0][0].as_dict() for each in (index, exact))
        assert hit.pop("score") == pytest.approx(wanted.pop("score"), abs=1e-6) and hit == wanted
        assert index.search_rows(torch.zeros(0, 16))[1].shape == (0, 10)
    with MilvusIndex(table, uri, collection="finds", progress=False) as index:  # opened again, nothing to write
        assert_same_hits(index, exact)


def test_many_queries_in_batches_give_what_single_ones_give(table, tmp_path, monkeypatch):
    monkeypatch.setattr(milvus_module, "QUERIES_AT_ONCE", 3)
    with MilvusIndex(table, tmp_path / "index.db", progress=False) as index:
        assert_same_hits(index, ExactIndex(table))


def test_hnsw_finds_nearly_all_of_it(table, tmp_path):
    queries = random_vectors(50, seed=2)
    with MilvusIndex(table, tmp_path / "index.db", index_type="HNSW", progress=False) as index:
        for where in (None, {"colour": "red"}):
            found = index.search_rows(queries, where=where)[1]
            expected = ExactIndex(table).search_rows(queries, where=where)[1]
            recall = sum(len(set(f) & set(e)) for f, e in zip(found.tolist(), expected.tolist())) / expected.numel()
            assert recall >= 0.99


def make_odd_table(path: Path) -> EmbeddingTable:
    """Columns and values that are hard to filter by."""
    texts = ['"quoted"', "back\\slash", "line\nbreak\ttab", "größe 火", "", None]
    moments = [None, *(datetime.datetime(2020, 1, day, 12, 30) for day in range(1, 6))]
    columns = {
        "id": [f"{row}" for row in range(6)],
        "modality": ["image"] * 6,
        "uri": [None] * 6,
        "text": ["é" * 40_000, *"abcde"],
        "error": [None] * 6,
        "like": texts,
        "my size": [-5, 0, None, 7, 2**40, -(2**40)],
        "row": [0.1, -1e-7, 1e30, None, 2.5, 3.0],
        "flag": [True, False, None, True, False, None],
        "day": [None if moment is None else moment.date() for moment in moments],
        "moment": moments,
    }
    kinds = dict(zip(list(columns)[5:], "string int64 float32 bool date32 timestamp[us]".split()))
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    schema = table_schema(TableInfo("a-model", "0123", 16), features)
    write_table(path, [to_table(columns, random_vectors(6), schema)], schema)
    return load_table(path)


def test_columns_and_values_of_every_kind_can_be_filtered_by(tmp_path):
    table = make_odd_table(tmp_path / "odd.parquet")
    exact = ExactIndex(table)
    day, moment = datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 12, 30)
    filters = [
        *({"like": text} for text in table.rows["like"]),
        *({"my size": size} for size in (-5, {"<": 0}, {">": 7}, None)),
        *({"row": value} for value in (0.1, {"<": 1e-7}, {">=": 2.5}, [0.1, 3.0])),
        *({"flag": value} for value in (True, False, None, {"!=": True}, [True])),
        *({name: value} for name, at in (("day", day), ("moment", moment)) for value in (at, {">": at}, {"!=": at})),
        {"text": "é" * 40_000},
    ]
    with MilvusIndex(table, tmp_path / "index.db", progress=False) as index:
        for where in filters:
            assert_same_hits(index, exact, where=where)


INDEX = """
import os, signal, sys, threading
import datasets
from mome.retrieval import load_table
from mome.retrieval.milvus import index as milvus
source, uri, cache, writes, delay = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = cache
milvus.BATCH_ROWS = 20
write, done = milvus.MilvusIndex._write, []

def write_and_die(index, rows, vectors):
    if len(done) == int(writes):
        threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
    write(index, rows, vectors)
    done.append(rows)

milvus.MilvusIndex._write = write_and_die
milvus.MilvusIndex(load_table(source), uri, collection="killed", progress=False)
"""


def test_indexing_goes_on_after_kill_9_with_nothing_lost_and_nothing_twice(table, uri, tmp_path, monkeypatch):
    for writes, delay in ((5, 0.003), (4, 0)):  # within a write, and after those that were acknowledged
        command = [sys.executable, "-c", INDEX, table.name, uri, str(tmp_path / "cache"), str(writes), str(delay)]
        process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.returncode == -signal.SIGKILL, process.stderr
    written, write = [], MilvusIndex._write

    def noted(index, rows, vectors):
        written.extend(rows.tolist())
        write(index, rows, vectors)

    monkeypatch.setattr(milvus_module, "BATCH_ROWS", 20)
    monkeypatch.setattr(MilvusIndex, "_write", noted)
    with MilvusIndex(table, uri, collection="killed", progress=False) as index:
        assert 0 < len(written) <= ROWS - 9 * 20  # what was acknowledged stays
        stored = index.client.query("killed", filter="row >= 0", output_fields=["row"], limit=2 * ROWS)
        assert sorted(each["row"] for each in stored) == [row for row in range(ROWS) if row not in BAD]
        assert_same_hits(index, ExactIndex(table), top_k=50)


def test_a_creation_that_was_interrupted_is_made_anew(table, tmp_path):
    uri = str(tmp_path / "index.db")
    client = connection.connect(uri)
    client.create_collection("mome", schema=collection_schema(table, ""))
    connection.disconnect(client, uri)
    with MilvusIndex(table, uri, progress=False) as index:
        assert_same_hits(index, ExactIndex(table))


# ---------------------------------------------------------------------------------------------------- refusals


def refused(message, *arguments, **options):
    with pytest.raises(RetrievalError, match=message) as raised:
        MilvusIndex(*arguments, progress=False, **options).close()
    assert "\n" not in str(raised.value)


def test_a_collection_of_something_else_is_refused_unless_it_may_be_replaced(table, tmp_path):
    uri = tmp_path / "index.db"
    MilvusIndex(table, uri, progress=False).close()
    other_model = load_table(
        make_table(tmp_path / "model.parquet", rows=9, info=TableInfo("b-model", "ffff", 16), dimension=16)
    )
    wider = load_table(make_table(tmp_path / "wider.parquet", rows=9, dimension=8))
    changed = load_table(make_table(tmp_path / "changed.parquet", rows=ROWS, bad=BAD, colour=["red"] * ROWS))
    refused(r"of another model \(a-model, weights 0123456789abcdef, 16 dim.*rebuild=True", other_model, uri)
    refused("of another model", wider, uri)
    refused(r"holds another table \(400 rows by a-model\)", changed, uri)
    refused("index_type='FLAT', not 'HNSW'", table, uri, index_type="HNSW")
    with MilvusIndex(changed, uri, rebuild=True, progress=False) as index:
        assert_same_hits(index, ExactIndex(changed), where={"colour": "red"})
        index.client.create_collection("foreign", dimension=3)
        index.client.insert("foreign", [{"id": 1, "vector": [0.0, 0.0, 1.0]}])
    refused("'foreign' at .* was not made by mome", table, uri, collection="foreign")


def test_places_where_no_index_can_be_are_refused(table, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "old.db").write_bytes(b"SQLite format 3")
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 1)
    refused(f"no Milvus server answers at http://127.0.0.1:{port}", table, f"http://127.0.0.1:{port}")
    monkeypatch.undo()
    refused("old.db' is a file", table, tmp_path / "old.db")
    refused("no folder .*nowhere", table, tmp_path / "nowhere" / "index.db")
    refused("ends in .db", table, tmp_path / "index.sqlite")
    refused("ends in .db", table, "ftp://host")
    refused("index_type='IVF'", table, tmp_path / "index.db", index_type="IVF")
    refused("collection='a b': use letters", table, tmp_path / "index.db", collection="a b")


def test_a_server_that_closed_an_idle_connection_is_asked_once_more(table, server, monkeypatch):
    asked, client = [], connection.MilvusClient

    def failing_once(*arguments, **options):
        asked.append(arguments)
        if len(asked) == 1:
            raise MilvusException(message="Fail connecting to server")
        return client(*arguments, **options)

    monkeypatch.setattr(connection, "CONNECT_SECONDS", 60)
    monkeypatch.setattr(connection, "MilvusClient", failing_once)
    with MilvusIndex(table, server, collection="idle", progress=False) as index:
        assert_same_hits(index, ExactIndex(table))
    assert len(asked) == 2


HOLD = """
import sys
from milvus_lite.db import MilvusLite
database = MilvusLite(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_on_the_same_file_is_refused(table, tmp_path, capfd):
    uri = tmp_path / "index.db"
    command = [sys.executable, "-c", HOLD, str(uri)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        refused("open in another process.*milvus-lite server --data-dir", table, uri)
        process.stdin.close()
    assert "Traceback" not in capfd.readouterr().err
    with MilvusIndex(table, uri, progress=False) as first, MilvusIndex(table, uri, progress=False) as second:
        first.close()
        assert_same_hits(second, ExactIndex(table))  # in one process several may share it


@pytest.mark.parametrize(
    "queries, options, message",
    [
        (torch.ones(2, 8), {}, r"shape \(2, 8\), the table needs \(queries, 16\)"),
        (torch.full((1, 16), torch.nan), {}, "query 0 is not finite"),
        (torch.ones(1, 16), {"top_k": 20_000}, "top_k=20000 is more than Milvus returns"),
        (torch.ones(1, 16), {"where": {"color": "red"}}, "did you mean 'colour'"),
        (torch.ones(1, 16), {"where": {"year": "soon"}}, "filter on 'year' of type int32: 'soon' doesn't fit"),
    ],
)
def test_queries_and_filters_that_make_no_sense_are_refused(small, queries, options, message):
    with pytest.raises(RetrievalError, match=message):
        small.search(queries, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    table = load_table(make_table(folder / "small.parquet", rows=9))
    with MilvusIndex(table, folder / "index.db", progress=False) as index:
        yield index


def test_a_table_too_large_for_milvus_lite_is_said_to_be(tmp_path, monkeypatch, caplog):
    table = load_table(make_table(tmp_path / "small.parquet", rows=9))
    monkeypatch.setattr(milvus_module, "LITE_ROWS", 8)
    monkeypatch.setattr(milvus_module.logger, "propagate", True)
    MilvusIndex(table, tmp_path / "index.db", progress=False).close()
    assert re.search("9 rows in Milvus Lite.*use a Milvus server", caplog.text)


def test_an_index_is_opened_by_its_uri(table, tmp_path):
    with open_index(table, str(tmp_path / "index.db")) as index:
        assert isinstance(index, MilvusIndex)
        assert open_index(table, index) is index
    with pytest.raises(RetrievalError, match="pass 'exact', a path that ends in .db"):
        open_index(table, "faiss")


def test_the_digest_of_a_table_depends_on_its_contents_only(table, tmp_path):
    digest = table_digest(table)
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, part in enumerate((range(0, 150), range(150, ROWS))):
        datasets.Dataset.from_parquet(table.name).select(part).to_parquet(str(folder / f"{number}.parquet"))
    assert table_digest(load_table(folder)) == digest
    vectors = random_vectors(ROWS).clone()
    vectors[10] *= -1
    changes = {"text": [None] * ROWS}, {"embeddings": vectors}, {"embeddings": random_vectors(ROWS).flip(0)}
    for number, change in enumerate(changes):
        path = make_table(tmp_path / f"{number}.parquet", rows=ROWS, bad=BAD, **change)
        assert table_digest(load_table(path)) != digest
    assert table_digest(load_table(make_table(tmp_path / "bad.parquet", rows=ROWS, bad=(3,)))) != digest


def test_an_index_of_a_table_that_grew_is_built_again_and_says_so(tmp_path, uri, caplog, monkeypatch):
    monkeypatch.setattr(milvus_module.logger, "propagate", True)
    info = TableInfo("a-model", "0123456789abcdef", 16, source="/pictures")
    small = load_table(make_table(tmp_path / "table.parquet", rows=30, info=info))
    with MilvusIndex(small, uri, collection="grows", progress=False) as index:
        assert_same_hits(index, ExactIndex(small))
    make_table(tmp_path / "table.parquet", rows=50, prefix="new", info=info)
    large = load_table(tmp_path / "table.parquet")
    with MilvusIndex(large, uri, collection="grows", progress=False) as index:
        assert_same_hits(index, ExactIndex(large))
    assert "holds an earlier state of" in caplog.text and "it is built again" in caplog.text
    elsewhere = TableInfo("a-model", "0123456789abcdef", 16, source="/other")
    other = load_table(make_table(tmp_path / "other.parquet", rows=9, info=elsewhere))
    refused("holds another table", other, uri, collection="grows")


def test_a_searcher_whose_collection_was_built_again_meanwhile_is_told(tmp_path, server):
    info = TableInfo("a-model", "0123456789abcdef", 16, source="/pictures")
    old = load_table(make_table(tmp_path / "old.parquet", rows=30, info=info))
    new = load_table(make_table(tmp_path / "new.parquet", rows=50, prefix="new", info=info))
    with MilvusIndex(old, server, collection="meanwhile", progress=False) as index:
        with MilvusIndex(new, server, collection="meanwhile", progress=False):
            with pytest.raises(RetrievalError, match="built again from another state of .*open the table"):
                index.search(random_vectors(1))
