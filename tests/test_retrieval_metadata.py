"""Metadata beside pictures: typed, matched, and nothing lost silently."""

import datetime
import json
import unicodedata

import datasets
import pyarrow as pa
import pytest

from mome.retrieval import ExactIndex, RetrievalError, load_table, open_source
from mome.retrieval.filters import parse_expressions
from mome.retrieval.metadata import typed
from retrieval_corpora import draw, make_pictures, make_table, random_vectors


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.mark.parametrize(
    "cells, kind, values",
    [
        (["999", "1000", ""], pa.int64(), [999, 1000, None]),
        ([" 5", "-3", "+0", "NA"], pa.int64(), [5, -3, 0, None]),
        (["1", "2.5", "1e3", ".5", "NaN"], pa.float64(), [1, 2.5, 1000, 0.5, None]),
        (["true", "False", None], pa.bool_(), [True, False, None]),
        (["2020-01-31", "1999-12-01"], pa.date32(), [datetime.date(2020, 1, 31), datetime.date(1999, 12, 1)]),
        (["2020-01-31T10:20:30", "-"], pa.timestamp("us"), [datetime.datetime(2020, 1, 31, 10, 20, 30), None]),
        (["007", "012"], pa.string(), ["007", "012"]),
        (["7", "007"], pa.string(), ["7", "007"]),
        (["NA", "DE", ""], pa.string(), ["NA", "DE", None]),
        (["12345678901234567890123", "1"], pa.string(), ["12345678901234567890123", "1"]),
        (["2021-02-31", "2021-02-01"], pa.string(), ["2021-02-31", "2021-02-01"]),
        (["1,000", "2"], pa.string(), ["1,000", "2"]),
        (["", None], pa.string(), [None, None]),
        (["1٣", "1"], pa.string(), ["1٣", "1"]),
    ],
)
def test_a_column_of_csv_has_the_narrowest_type_that_fits_all_cells(cells, kind, values):
    column = typed(cells)
    assert column.type == kind and column.to_pylist() == values


def test_times_with_a_zone_are_in_utc():
    (moment,) = typed(["2020-01-31 10:20+02:00"]).to_pylist()
    assert moment == datetime.datetime(2020, 1, 31, 8, 20, tzinfo=datetime.UTC)


def columns(folder):
    corpus = open_source(folder)
    rows = {row.id: {**row.metadata, "text": row.texts[0] if row.texts else None} for row in corpus.rows()}
    return rows, corpus.left_out


FORMS = {
    "comma": ("metadata.csv", ",", "utf-8"),
    "mark": ("metadata.csv", ",", "utf-8-sig"),
    "semicolon": ("metadata.csv", ";", "utf-8-sig"),
    "tab in csv": ("metadata.csv", "\t", "utf-8"),
    "tsv": ("metadata.tsv", "\t", "utf-8"),
    "spreadsheet": ("metadata.csv", "\t", "utf-16"),
}


@pytest.mark.parametrize("form", FORMS)
def test_metadata_in_every_form_are_the_same(tmp_path, form):
    name, delimiter, encoding = FORMS[form]
    make_pictures(tmp_path, 4)
    lines = [
        ["file_name", "year", "code", "text", "share"],
        ["red\\000.png", "999", "007", '"a ""red""\ndot"', "0.5"],
        ["./green/001.png", "1000", "010", "größe", ""],
        ["blue/../blue/002.png", "", "100", "", "1"],
    ]
    text = "\r\n".join(delimiter.join(line) for line in lines) + "\r\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    rows, left_out = columns(tmp_path)
    assert rows == {
        "red/000.png": {"year": 999, "code": "007", "text": 'a "red"\ndot', "share": 0.5},
        "green/001.png": {"year": 1000, "code": "010", "text": "größe", "share": None},
        "blue/002.png": {"year": None, "code": "100", "text": None, "share": 1.0},
        "yellow/003.png": {"year": None, "code": None, "text": None, "share": None},
    }
    assert not left_out


def test_json_lines_may_begin_with_a_mark_and_have_backslashes(tmp_path):
    make_pictures(tmp_path, 2)
    lines = [
        {"file_name": "red\\000.png", "year": 999, "text": "a\u2028b"},
        {"file_name": "green/001.png", "year": None},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode("utf-8-sig"))
    rows, _ = columns(tmp_path)
    assert rows["red/000.png"] == {"year": 999, "text": "a\u2028b"} and rows["green/001.png"]["year"] is None


def test_rows_without_a_picture_and_second_rows_are_counted_and_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("mome.retrieval.metadata.logger.propagate", True)
    make_pictures(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text(
        "file_name,year\nred/000.png,1\nnowhere.png,2\nred/000.png,3\n" + "".join(f"gone{n}.png,4\n" for n in range(4))
    )
    (tmp_path / "red" / "metadata.csv").write_text("file_name,year\n000.png,5\n")
    rows, left_out = columns(tmp_path)
    assert rows["red/000.png"]["year"] == 5  # the file beside it comes last
    assert left_out == {
        "rows of metadata for a picture that has another": 2,
        "rows of metadata without their picture": 5,
    }
    assert "there is no picture 'nowhere.png', 'gone0.png', 'gone1.png' and 2 more" in caplog.text


def test_names_match_in_any_form_of_unicode_and_through_links(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw((1, 2, 3)).save(folder / unicodedata.normalize("NFD", "größe.png"))
    draw((4, 5, 6)).save(folder / "real.png")
    (folder / "link.png").symlink_to(folder / "real.png")
    names = [unicodedata.normalize("NFC", "größe.png"), "link.png"]
    (folder / "metadata.csv").write_text(
        "file_name,year\n" + "".join(f"{name},{2000 + n}\n" for n, name in enumerate(names))
    )
    rows, left_out = columns(folder)
    assert sorted(row["year"] for row in rows.values()) == [2000, 2001]
    assert left_out == {"links to what is listed already": 1}


def test_columns_of_several_files_have_one_type(tmp_path):
    make_pictures(tmp_path, 4)
    (tmp_path / "red" / "metadata.csv").write_text("file_name,year,code\n000.png,1999,7\n")
    (tmp_path / "green" / "metadata.tsv").write_text("file_name\tyear\tcode\n001.png\t2000.5\t007\n")
    (tmp_path / "blue" / "metadata.jsonl").write_text('{"file_name": "002.png", "year": 3}')
    rows, _ = columns(tmp_path)
    assert [rows[id]["year"] for id in ("red/000.png", "green/001.png", "blue/002.png")] == [1999.0, 2000.5, 3.0]
    assert rows["red/000.png"]["code"] == "7" and rows["green/001.png"]["code"] == "007"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", b"file_name,text\na.png,one, two\n", "row 1 has 3 cells for 2 columns"),
        ("metadata.csv", b"name,text\na.png,one\n", "each row needs a file_name: the columns are name"),
        ("metadata.csv", b"", "the file is empty"),
        ("metadata.csv", "file_name,text\na.png,größe\n".encode("cp1252"), "save it as UTF-8"),
        ("metadata.csv", b"file_name,a,a\na.png,1,2\n", "column 'a' occurs twice"),
        ("metadata.csv", b"file_name,a\n,1\n", "row 1 has none"),
        ("metadata.jsonl", b'{"file_name": 3}', "row 1 has none"),
        ("metadata.jsonl", b"[1]", "row 1 has none"),
        ("metadata.jsonl", b"{", "can't be read"),
        (
            "metadata.jsonl",
            b'{"file_name": "red/000.png", "a": 1}\n{"file_name": "green/001.png", "a": "b"}',
            "metadata column 'a' mixes several types",
        ),
    ],
)
def test_metadata_that_cannot_be_read_are_refused_in_one_line(tmp_path, name, content, message):
    make_pictures(tmp_path, 2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RetrievalError, match=message) as raised:
        open_source(tmp_path)
    assert "\n" not in str(raised.value)


def test_words_are_not_compared_with_numbers_by_size(tmp_path):
    table = load_table(make_table(tmp_path / "table.parquet", rows=4, colour=["999", "1000", "007", "red"]))
    index, query = ExactIndex(table), random_vectors(1)
    for value in (1000, 10.5, "1000"):
        with pytest.raises(RetrievalError, match="'colour': the column holds words, of which >= 10"):
            index.search(query, where={"colour": {">=": value}})
    assert [hit.row for hit in index.search(query, where={"colour": {">=": "red"}})[0]] == [3]
    assert [hit.row for hit in index.search(query, where={"colour": "1000"})[0]] == [1]
    where = parse_expressions(["colour>=1000"], {"colour": pa.string()})
    with pytest.raises(RetrievalError, match="holds words"):
        index.search(query, where=where)
