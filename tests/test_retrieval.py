"""Tables of embeddings and exact search."""

import gc
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mome.retrieval import ExactIndex, RetrievalError, TableInfo, load_table
from mome.retrieval import exact as exact_module
from mome.retrieval import format as format_module
from mome.retrieval import table as table_module
from mome.retrieval.filters import parse_expressions, parse_where
from retrieval_corpora import make_table, random_vectors


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture
def table(tmp_path):
    return load_table(make_table(tmp_path / "table.parquet", bad=(3, 500)))


def expected(queries, embeddings, wanted, top_k):
    """Row numbers and cosines, worked out one by one in float64."""
    scores = queries.double() @ embeddings.double().T
    scores[:, ~wanted] = -torch.inf
    best = scores.topk(top_k, dim=1)
    return best.values.float(), best.indices


def test_a_table_is_read_as_it_was_written(table):
    assert len(table) == 1000 and table.dimension == 16 and table.info.model == "a-model"
    assert table.metadata_columns == ["year", "colour"]
    assert torch.equal(torch.cat([block for _, block in table.blocks])[table.valid], random_vectors(1000)[table.valid])
    assert (~table.valid).nonzero().flatten().tolist() == [3, 500]
    assert table.rows[3]["embedding"] is None and table.rows[3]["error"] == "not an image"
    assert table.rows[4]["colour"] == "red" and table.rows[4]["year"] == 2004 and table.rows[7]["year"] is None
    assert table.row_of("17") == 17
    assert torch.equal(table.embeddings([5, 2]), random_vectors(1000)[[5, 2]])


def test_plain_datasets_reads_a_table_with_its_columns(tmp_path):
    path = make_table(tmp_path / "table.parquet", rows=10)
    rows = datasets.Dataset.from_parquet(str(path))
    assert rows.features["embedding"] == datasets.List(datasets.Value("float32"), length=16)
    assert torch.equal(torch.tensor(rows["embedding"][:]), random_vectors(10))


def test_a_folder_of_files_is_one_table(tmp_path):
    folder = tmp_path / "table"
    folder.mkdir()
    make_table(folder / "part-0.parquet", rows=30, prefix="a")
    make_table(folder / "part-1.parquet", rows=20, prefix="b")
    table = load_table(folder)
    assert len(table) == 50 and table.row_of("b0") == 30


@pytest.mark.parametrize("top_k", [1, 10, 400])
@pytest.mark.parametrize("queries", [1, 7, 200])
def test_exact_search_finds_what_comparing_one_by_one_finds(table, monkeypatch, top_k, queries):
    monkeypatch.setattr(exact_module, "GROUP_ROWS", 4)
    queries = random_vectors(queries, seed=1)
    scores, rows = ExactIndex(table).search_rows(queries, top_k)
    best, best_rows = expected(queries, random_vectors(1000), table.valid, top_k)
    assert torch.equal(rows, best_rows)
    assert torch.allclose(scores, best, atol=1e-6)


def test_many_blocks_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr("mome.retrieval.table.ARROW_ROWS", 64)
    monkeypatch.setattr(exact_module, "GROUP_ROWS", 2)
    table = load_table(make_table(tmp_path / "table.parquet", bad=(3, 500)))
    assert len(table.blocks) > 10
    queries = random_vectors(5, seed=1)
    for where, top_k in ((None, 10), ({"colour": "blue"}, 10), ({"year": 2003}, 200)):
        wanted = table.valid & torch.tensor([True if where is None else _fulfils(row, where) for row in table.rows])
        best, best_rows = expected(queries, random_vectors(1000), wanted, min(top_k, int(wanted.sum())))
        scores, rows = ExactIndex(table).search_rows(queries, top_k, where)
        found = best.shape[1]
        assert torch.equal(rows[:, :found], best_rows) and torch.allclose(scores[:, :found], best, atol=1e-6)
        assert (rows[:, found:] == -1).all() and (scores[:, found:] == -torch.inf).all()


def _fulfils(row, where):
    return all(row[column] == value for column, value in where.items())


@pytest.mark.parametrize(
    "where, fulfils",
    [
        ({"modality": "text"}, lambda row: row["modality"] == "text"),
        ({"colour": ["red", "blue"]}, lambda row: row["colour"] in ("red", "blue")),
        ({"year": {">=": 2005, "<": 2010}}, lambda row: row["year"] is not None and 2005 <= row["year"] < 2010),
        ({"year": {"!=": 2005}}, lambda row: row["year"] is not None and row["year"] != 2005),
        ({"year": None}, lambda row: row["year"] is None),
        ({"year": {"!=": None}, "colour": "red"}, lambda row: row["year"] is not None and row["colour"] == "red"),
        ({"id": ["4", "8", "no such row"]}, lambda row: row["id"] in ("4", "8")),
    ],
)
def test_filters_leave_the_rows_that_fulfil_them(table, where, fulfils):
    hits = ExactIndex(table).search(random_vectors(1, seed=1), top_k=1000, where=where)[0]
    wanted = [number for number, row in enumerate(table.rows) if fulfils(row) and row["embedding"] is not None]
    assert sorted(hit.row for hit in hits) == wanted and wanted
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_hit_has_its_row_and_a_row_finds_itself(table):
    hit = ExactIndex(table).search(3 * random_vectors(1000)[42])[0][0]
    assert hit.score == pytest.approx(1, abs=1e-5)
    assert (hit.row, hit.id, hit.modality, hit.uri) == (42, "42", "image", "/pictures/42.png")
    assert hit.text == "picture 42" and hit.metadata == {"year": None, "colour": "blue"}
    assert hit.as_dict()["metadata"]["colour"] == "blue"


def test_filters_typed_on_a_command_line_mean_the_same(table):
    types = {name: table.column(name).type for name in ("year", "colour")}
    assert parse_expressions(["colour=red, blue", "year>=2005", "year<2010"], types) == {
        "colour": {"in": ["red", "blue"]},
        "year": {">=": 2005, "<": 2010},
    }
    with pytest.raises(RetrievalError, match="'soon' is not of its type, int32"):
        parse_expressions(["year=soon"], types)
    with pytest.raises(RetrievalError, match="did you mean 'colour'"):
        parse_expressions(["color=red"], types)
    with pytest.raises(RetrievalError, match="write COLUMN=VALUE"):
        parse_expressions(["red"], types)


# ------------------------------------------------------------------------------ tables that other software wrote


def rows_of(path):
    return pa.concat_tables(format_module.read_tables(Path(path)))


def embedding_as(kind):
    return lambda table: table.set_column(
        table.schema.get_field_index("embedding"), "embedding", pa.array(table["embedding"].to_pylist(), kind)
    )


REWRITTEN = {
    "as lists": lambda table, path: pq.write_table(embedding_as(pa.list_(pa.float32()))(table), path),
    "as large lists of doubles": lambda table, path: pq.write_table(
        embedding_as(pa.large_list(pa.float64()))(table).replace_schema_metadata(None), path, row_group_size=170
    ),
    "by pandas": lambda table, path: table.to_pandas().to_parquet(path),
}


@pytest.mark.parametrize("writer", REWRITTEN)
def test_a_table_written_again_has_the_same_rows_and_hits(table, tmp_path, writer):
    REWRITTEN[writer](rows_of(table.name), tmp_path / "again.parquet")
    assert pq.read_schema(tmp_path / "again.parquet").field("embedding").type != pa.list_(pa.float32(), 16)
    again = load_table(tmp_path / "again.parquet", dimension=16)
    assert torch.equal(again.valid, table.valid)
    assert [row["id"] for row in again.rows] == [row["id"] for row in table.rows]
    assert again.rows.features["embedding"] == datasets.List(datasets.Value("float32"), length=16)
    good = table.valid.nonzero().flatten().tolist()
    assert torch.equal(again.embeddings(good), table.embeddings(good))
    queries = random_vectors(3, seed=1)
    for where in (None, {"colour": "red"}, {"year": {">": 2005}}):
        ours, theirs = ExactIndex(again).search(queries, where=where), ExactIndex(table).search(queries, where=where)
        assert [[hit.id for hit in hits] for hits in ours] == [[hit.id for hit in hits] for hits in theirs]


def test_a_table_written_again_as_fixed_size_lists_of_doubles_is_the_same(tmp_path):
    rows = rows_of(make_table(tmp_path / "table.parquet", rows=50))  # pyarrow before 20 can't write nulls among them
    rows = embedding_as(pa.list_(pa.float64(), 16))(rows).replace_schema_metadata(None)
    pq.write_table(rows, tmp_path / "again.parquet")
    assert torch.equal(load_table(tmp_path / "again.parquet").embeddings(range(50)), random_vectors(50))


FORMAT_1 = Path(__file__).parent / "fixtures" / "table-format-1.parquet"  # 12 rows; 3 and 7 have no embedding


def test_a_table_of_the_first_format_is_searched_as_it_was():
    table = load_table(FORMAT_1, fingerprint="0123456789abcdef", dimension=16)
    assert table.info.format_version == 1 and (~table.valid).nonzero().flatten().tolist() == [3, 7]
    good = table.valid.nonzero().flatten().tolist()
    assert torch.equal(table.embeddings(good), random_vectors(12)[good])
    assert table.metadata_columns == ["year", "colour"] and table.rows[3]["error"] == "not an image"
    hits = ExactIndex(table).search(random_vectors(12)[5], top_k=12)[0]
    assert hits[0].row == 5 and len(hits) == 10


def test_embeddings_are_read_in_a_form_in_which_any_pyarrow_reads_nulls():
    path = FORMAT_1
    assert pq.read_schema(path).field("embedding").type == pa.list_(pa.float32(), 16)
    with pq.ParquetFile(path, metadata=format_module._plain_footer(path)) as plain:
        kind = plain.schema_arrow.field("embedding").type
        assert pa.types.is_list(kind) and kind.value_type == pa.float32()
    (rows,) = format_module.read_tables(path)
    assert rows.schema.field("embedding").type == pa.list_(pa.float32(), 16) and rows["embedding"].null_count == 2
    assert rows.drop_columns("embedding").equals(
        pq.read_table(path, columns=rows.drop_columns("embedding").column_names)
    )


def test_embeddings_of_several_lengths_or_of_none_are_refused(table, tmp_path):
    rows = embedding_as(pa.list_(pa.float32()))(rows_of(table.name)).replace_schema_metadata(None)
    vectors = rows["embedding"].to_pylist()
    vectors[9] = vectors[9][:5]
    place = rows.schema.get_field_index("embedding")
    for name, values in {"ragged": vectors, "none": [None] * len(vectors), "words": [["a"]] * len(vectors)}.items():
        kind = pa.list_(pa.string() if name == "words" else pa.float32())
        pq.write_table(rows.set_column(place, "embedding", pa.array(values, kind)), tmp_path / f"{name}.parquet")
    one_line(tmp_path / "ragged.parquet", "an embedding has 5 values, not 16")
    one_line(tmp_path / "none.parquet", "holds no embeddings")
    one_line(tmp_path / "words.parquet", "not a list of floats")


def test_a_cache_that_cannot_be_written_is_named_and_replaced(table, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(table_module.logger, "propagate", True)
    monkeypatch.setattr(table_module.tempfile, "tempdir", str(tmp_path / "temporary"))
    opened = load_table(table.name, cache_dir=tmp_path / "file" / "cache")
    assert f"the cache {tmp_path}/file/cache/mome can't be written (Not a directory)" in caplog.text
    assert ExactIndex(opened).search(random_vectors(1000)[42])[0][0].id == "42"
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del opened
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())  # nothing is left when the table is closed

    monkeypatch.setattr(table_module, "_write_arrow", lambda path, *_: (path.parent / "x" / "y").touch())
    with pytest.raises(RetrievalError, match="neither the cache .*file/cache/mome nor .* can be written.*set HF_HOME"):
        load_table(table.name, cache_dir=tmp_path / "file" / "cache")


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "queries, message",
    [
        (torch.ones(2, 8), r"shape \(2, 8\), the table needs \(queries, 16\)"),
        (torch.full((1, 16), torch.nan), "query 0 is not finite"),
        (torch.zeros(1, 16), "query 0 is zero"),
        (torch.ones(1, 16, dtype=torch.int64), "pass floats"),
        ("red", "queries of type str"),
    ],
)
def test_queries_that_cannot_be_compared_are_refused(table, queries, message):
    with pytest.raises(RetrievalError, match=message):
        ExactIndex(table).search(queries)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "top_k=0 must be"),
        ({"top_k": 2.5}, "top_k=2.5 must be"),
        ({"where": {"color": "red"}}, "has no 'color': did you mean 'colour'"),
        ({"where": {"year": {"~": 1}}}, "operator '~' is not one of"),
        ({"where": {"year": "soon"}}, "filter on 'year' of type int32: 'soon' doesn't fit"),
        ({"where": {"year": {"<": None}}}, "None can't be compared"),
        ({"where": {"year": []}}, "is not a list of values"),
        ({"where": "red"}, "pass a dict"),
    ],
)
def test_options_that_make_no_sense_are_refused(table, options, message):
    with pytest.raises(RetrievalError, match=message) as raised:
        ExactIndex(table).search(random_vectors(1), **options)
    assert "\n" not in str(raised.value)


def test_the_same_filter_in_any_form_is_one_condition():
    assert parse_where({"a": {"b", "c"}}, ["a"]) == parse_where({"a": ["b", "c"]}, ["a"])
    assert hash(parse_where({"a": ["b"]}, ["a"]))


def one_line(path, message, **options):
    with pytest.raises(RetrievalError, match=message) as raised:
        load_table(path, **options)
    assert "\n" not in str(raised.value)


def test_another_models_table_is_refused(tmp_path):
    path = make_table(tmp_path / "table.parquet", rows=10)
    one_line(path, "made by another model .a-model, weights 0123456789abcdef, not fedc", fingerprint="fedc")
    one_line(path, "16 dimensions, the model's have 512", dimension=512)
    load_table(path, fingerprint="0123456789abcdef", dimension=16)
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy(path, folder / "a.parquet")
    make_table(folder / "b.parquet", rows=10, prefix="b", info=TableInfo("b-model", "ffff", 16))
    one_line(folder, "made by different models")


def test_rows_that_are_no_embeddings_are_refused(tmp_path):
    vectors = random_vectors(10).clone()
    vectors[4, 2] = torch.nan
    one_line(make_table(tmp_path / "nan.parquet", rows=10, embeddings=vectors), r"row 4 .id '4'. is not finite")
    vectors = random_vectors(10).clone()
    vectors[5] *= 2
    long = make_table(tmp_path / "long.parquet", rows=10, embeddings=vectors)
    one_line(long, "row 5 .id '5'. has length 2 instead of 1")
    assert len(load_table(long, check=False)) == 10
    twice = make_table(tmp_path / "twice.parquet", rows=3, id=["a", "b", "a"])
    one_line(twice, "id 'a' occurs twice")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = make_table(tmp_path / "table.parquet", rows=1000)
    data = path.read_bytes()
    (tmp_path / "short.parquet").write_bytes(data[: len(data) // 2])
    one_line(tmp_path / "short.parquet", "short.parquet is truncated or not a parquet file")
    middle = bytearray(data)
    middle[100:400] = bytes(300)
    (tmp_path / "middle.parquet").write_bytes(middle)
    one_line(tmp_path / "middle.parquet", "can't be read, it may be damaged|not finite|instead of 1|twice|no id")
    (tmp_path / "empty.parquet").write_bytes(b"")
    one_line(tmp_path / "empty.parquet", "truncated or not a parquet file")
    pq.write_table(pa.table({"id": ["a"], "embedding": [[1.0]]}), tmp_path / "other.parquet")
    one_line(tmp_path / "other.parquet", "lacks the column 'modality'")
    one_line(tmp_path / "none.parquet", "is not there")
    (tmp_path / "folder").mkdir()
    one_line(tmp_path / "folder", "holds no parquet files")
    one_line(make_table(tmp_path / "no-rows.parquet", rows=0), "has no rows")


def test_a_later_format_is_refused_and_a_table_without_origin_is_read(tmp_path):
    later = TableInfo("a-model", "00", 16, format_version=3)
    one_line(make_table(tmp_path / "later.parquet", rows=3, info=later), "format version 3")
    path = make_table(tmp_path / "table.parquet", rows=3)
    datasets.Dataset.from_parquet(str(path)).to_parquet(str(tmp_path / "rewritten.parquet"))
    table = load_table(tmp_path / "rewritten.parquet", fingerprint="any", dimension=16)
    assert table.info.model == "" and np.allclose(table.embeddings([0]), random_vectors(3)[:1])
