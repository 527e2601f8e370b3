"""Searching by text, image and row; the command line; contact sheets."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mome import cli
from mome.retrieval import Embedder, ExactIndex, RetrievalError, Searcher, embed_corpus, load_table
from mome.retrieval.sheet import write_sheet
from retrieval_corpora import make_pictures, save_checkpoint

TEXTS = ("a red dot", "green", "a blue line", "yellow circle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, pictures with texts, and their table of images and texts."""
    folder = tmp_path_factory.mktemp("retrieval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets-cache"))
        save_checkpoint(folder / "model")
        paths = make_pictures(folder / "pictures", 12)
        lines = [
            {"file_name": str(path.relative_to(folder / "pictures")), "text": f"{TEXTS[number % 4]} a"}
            for number, path in enumerate(paths)
        ]
        (folder / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "pictures" / "broken.png").write_bytes(b"no picture")
        embed_corpus(
            folder / "pictures",
            folder / "table.parquet",
            folder / "model",
            modalities=("image", "text"),
            progress=False,
        )
        yield folder


@pytest.fixture(scope="module")
def searcher(folder):
    return Searcher.open(folder / "table.parquet")


def ids(hits):
    return [hit.id for hit in hits]


def test_all_four_directions_give_what_the_embeddings_say(folder, searcher):
    table, embedder = searcher.index.table, searcher.embedder
    picture = folder / "pictures" / "green" / "005.png"
    queries = {"text": embedder.embed_texts(["a blue line"]), "image": embedder.embed_images([picture])}
    values = {"text": "a blue line", "image": str(picture)}
    for kind, query in queries.items():
        for modality in ("image", "text"):
            found = searcher.search(**{kind: values[kind]}, modality=modality, top_k=5)
            assert all(hit.modality == modality for hit in found)
            rows = [row for row in range(len(table)) if table.valid[row] and table.rows[row]["modality"] == modality]
            cosines = (query @ table.embeddings(rows).T)[0]
            best = cosines.topk(5)
            assert torch.allclose(torch.tensor([hit.score for hit in found]), best.values, atol=1e-6)
    assert ids(searcher.search(image=str(picture)))[0] == "green/005.png"
    assert searcher.search(text="a blue line a", modality="text")[0].score == pytest.approx(1, abs=1e-5)


def test_images_of_any_kind_are_queries(folder, searcher):
    path = folder / "pictures" / "blue" / "002.png"
    with Image.open(path) as image:
        forms = [str(path), path, image.copy(), torch.from_numpy(np.array(image)).permute(2, 0, 1)]
    for form in forms:
        assert searcher.search(image=form, modality="image", top_k=1)[0].id == "blue/002.png"


def test_a_batch_gives_what_its_queries_give_one_by_one(searcher):
    together = searcher.search(text=list(TEXTS), top_k=4)
    for text, hits in zip(TEXTS, together):
        alone = searcher.search(text=text, top_k=4)
        assert [hit.score for hit in alone] == pytest.approx([hit.score for hit in hits], abs=1e-6)
    assert searcher.search(text=[]) == []


def test_queries_may_be_columns_and_arrays(folder, searcher):
    """What a notebook has at hand gives what a list of Python's own values gives."""
    words, pictures = list(TEXTS)[:2], [str(folder / "pictures" / "blue" / "002.png")] * 2
    for kind, values in {"text": words, "image": pictures, "id": ["red/000.png", "red/004.png"]}.items():
        expected = [ids(hits) for hits in searcher.search(**{kind: values}, top_k=3)]
        forms = [tuple(values), pd.Series(values, index=[7, 3]), datasets.Dataset.from_dict({"a": values})["a"]]
        forms += [] if kind == "image" else [np.array(values), pa.array(values)]
        for form in forms:
            assert [ids(hits) for hits in searcher.search(**{kind: form}, top_k=np.int64(3))] == expected, type(form)
    one = np.str_(words[0])
    assert ids(searcher.search(text=one, top_k=3)) == ids(searcher.search(text=words[0], top_k=3))
    wanted = ["red/000.png", "red/004.png"]
    for form in (wanted, np.array(wanted), pd.Series(wanted), pa.array(wanted)):
        assert sorted(ids(searcher.search(text="red", where={"id": form}))) == wanted
        assert sorted(ids(searcher.search(text="red", where={"id": {"in": form}}))) == wanted
    for value in (None, [["red/000.png"]], bytearray(b"a")):
        with pytest.raises(RetrievalError, match="can't be compared"):
            searcher.search(text="red", where={"id": {"in": [value]}})


def test_nothing_is_said_of_long_texts_where_none_is(folder, tmp_path, caplog):
    embedder = Embedder.load(folder / "model")  # whose tokenizer has warned of nothing yet
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        embed_corpus(datasets.Dataset.from_dict({"text": ["a cat"]}), tmp_path / "a.parquet", embedder, progress=False)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


def test_a_row_is_left_out_of_what_is_like_it(searcher):
    hits = searcher.search(id="red/000.png", top_k=3)
    assert len(hits) == 3 and "red/000.png" not in ids(hits)
    assert [len(each) for each in searcher.search(id=["red/000.png", "red/004.png"], top_k=2)] == [2, 2]
    assert len(searcher.search(text="red", top_k=1000)) == 24  # all but the broken one


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "pass one of text, image and id, not nothing"),
        ({"text": "red", "id": "red/000.png"}, "not text and id"),
        ({"id": "nobody"}, "no row with id 'nobody'"),
        ({"id": "broken.png"}, "no row with id 'broken.png'"),
        ({"text": " "}, "pass a text of at least one word"),
        ({"text": "red", "modality": "sound"}, "modality='sound'"),
        ({"image": "nowhere.png"}, "no such file"),
    ],
)
def test_searches_that_make_no_sense_are_refused(searcher, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        searcher.search(**options)
    assert "\n" not in str(raised.value)


def test_a_searcher_refuses_another_model_and_another_tables_index(folder, tmp_path, searcher):
    other = Embedder.load(save_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(RetrievalError, match="made by another model"):
        Searcher(ExactIndex(searcher.index.table), other)
    wide = Embedder.load(save_checkpoint(tmp_path / "wide", projection_dim=8))
    with pytest.raises(RetrievalError, match="16 dimensions, the model's have 8"):
        Searcher.open(folder / "table.parquet", model=wide)
    with pytest.raises(RetrievalError, match="index='fastest'"):
        Searcher.open(folder / "table.parquet", index="fastest")


# ------------------------------------------------------------------------------------------------- contact sheets


def test_a_sheet_shows_pictures_texts_and_what_is_gone(tmp_path, searcher):
    hits = searcher.search(text="a red dot", top_k=24)
    gone = [*hits[:3], *(hit for hit in hits if hit.modality == "text")]
    gone[0] = type(gone[0])(0.5, 0, "<gone>", "image", "/nowhere.png", "a & b")
    page = write_sheet(gone, tmp_path / "hits.html", 'red "dot" <1>').read_text()
    assert page.count("<figure>") == len(gone) and "&lt;gone&gt;" in page and "no such file" in page
    assert page.count("data:image/png;base64,") == sum(hit.modality == "image" for hit in gone) - 1
    assert "red &quot;dot&quot; &lt;1&gt;" in page and "<1>" not in page
    with Image.open(write_sheet(hits, tmp_path / "hits.png", "a red dot")) as sheet:
        assert len(sheet.getcolors(sheet.width * sheet.height)) > 20
    with pytest.raises(RetrievalError, match="ends in .html"):
        write_sheet(hits, tmp_path / "hits.pdf")


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets-cache"))

    def invoke(*arguments, status=0):
        result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return invoke


def test_embed_and_search_on_the_command_line(folder, tmp_path, run, monkeypatch):
    make_pictures(tmp_path / "pictures", 6)
    table = tmp_path / "table.parquet"
    done = run("embed", tmp_path / "pictures", "--output", table, "--model", folder / "model", "--batch-size", 4)
    assert "6 images embedded, 0 could not be read" in done.stdout
    again = run("embed", tmp_path / "pictures", "--output", table, "--model", folder / "model", "--batch-size", 4)
    assert "6 rows were there already" in again.stdout

    lines = run("search", table, "a red dot", "--top-k", 4).stdout.splitlines()
    assert len(lines) == 4 and "image" in lines[0]
    picture = tmp_path / "pictures" / "red" / "004.png"
    found = json.loads(run("search", table, "--image", picture, "--json", "--top-k", 2).stdout)
    assert found[0]["id"] == "red/004.png" and found[0]["score"] == pytest.approx(1, abs=1e-5)
    sheet = tmp_path / "hits.html"
    run("search", table, "--id", "red/004.png", "--sheet", sheet)
    assert "data:image/png" in sheet.read_text()
    opened = []
    monkeypatch.setattr(cli.typer, "launch", opened.append)
    run("search", table, "red", "--open")
    assert opened[0].endswith("hits.html") and "<figure>" in Path(opened[0]).read_text()


def test_filters_and_modalities_on_the_command_line(folder, run):
    arguments = ("search", folder / "table.parquet", "red", "--json", "--top-k", 50)
    everything = json.loads(run(*arguments).stdout)
    texts = json.loads(run(*arguments, "--modality", "text").stdout)
    filtered = json.loads(run(*arguments, "--where", "text=green a", "--where", "modality=image").stdout)
    assert len(everything) == 24 and {hit["modality"] for hit in texts} == {"text"} and len(texts) == 12
    assert len(filtered) == 3 and all(hit["id"].startswith("green/") for hit in filtered)


def test_caption_and_classify_on_the_command_line(folder, tmp_path, run):
    paths = [folder / "pictures" / "red" / "000.png", folder / "pictures" / "blue" / "002.png"]
    options = ("--model", folder / "model", "--max-new-tokens", 4)
    lines = run("caption", *paths, *options, "-n", 2, "--json").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["file"] for answer in answers] == [str(path) for path in paths]
    assert all(len(answer["results"]) == 2 and "score" in answer["results"][0] for answer in answers)

    arguments = ("--labels", "red, blue, green", "--model", folder / "model")
    lines = run("classify", paths[0], *arguments, "--json", "--template", "a {} dot").stdout.splitlines()
    (answer,) = map(json.loads, lines)
    assert sum(result["score"] for result in answer["results"]) == pytest.approx(1, abs=1e-5)
    assert {result["label"] for result in answer["results"]} == {"red", "blue", "green"}

    (tmp_path / "broken.png").write_bytes(b"no picture")
    partly = run("classify", tmp_path / "broken.png", paths[0], *arguments, status=1)
    assert str(paths[0]) in partly.stdout and "broken.png" in partly.stderr and len(partly.stderr.splitlines()) == 1


def test_what_fails_is_one_line_and_a_status(folder, tmp_path, run, monkeypatch):
    table, model = folder / "table.parquet", folder / "model"
    monkeypatch.setattr(cli, "DEFAULT_MODEL", tmp_path / "no-model")
    refused = {
        ("search", tmp_path / "none.parquet", "red"): "is not there",
        ("search", table, "--id", "nobody"): "no row with id 'nobody'",
        ("search", table, "--image", tmp_path / "none.png"): "no such file",
        ("search", table, "red", "--where", "colour=red"): "has no 'colour'",
        ("search", table, "red", "--sheet", tmp_path / "hits.pdf"): "ends in .html",
        ("search", table, "red", "--index", "fastest"): "index='fastest'",
        ("embed", tmp_path / "none", "--output", tmp_path / "t.parquet", "--model", model): "is not there",
        ("embed", folder / "pictures", "--output", table, "--model", model): "is there already",
        ("embed", folder / "pictures", "--output", tmp_path / "t.parquet"): "no model: pass --model",
        ("caption", tmp_path / "a.png", "--model", tmp_path / "none"): "none",
        ("classify", tmp_path / "a.png", "--labels", "a,a", "--model", model): "'a' is given twice",
    }
    for arguments, message in refused.items():
        result = run(*arguments, status=1)
        lines = [line for line in result.stderr.splitlines() if line.startswith("mome: ")]
        assert len(lines) == 1 and message in lines[0], (arguments, result.output)
        assert "Traceback" not in result.output and not result.stdout
    assert "one of QUERY" in run("search", table, status=2).stderr
    assert "one of QUERY" in run("search", table, "red", "--id", "red/000.png", status=2).stderr
    run("classify", tmp_path / "a.png", status=2)  # no labels


def test_a_query_without_a_known_word_finds_nothing_and_says_so(folder, run, caplog):
    result = run("search", folder / "table.parquet", "слон", "--json")
    assert json.loads(result.stdout) == [] and "'слон', which has no word that the tokenizer knows" in caplog.text
    searcher = Searcher.open(folder / "table.parquet")
    hits = searcher.search(text=["red", "!!!", "green"], top_k=3)
    alone = [searcher.search(text="red", top_k=3), [], searcher.search(text="green", top_k=3)]
    for found, expected in zip(hits, alone):
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected])
    assert hits[0][0].score != pytest.approx(hits[2][0].score)
    with pytest.raises(ValueError, match="has no word that the tokenizer knows"):
        searcher.embedder.embed_texts(["red", "слон"])


def test_labels_that_are_one_to_the_model_are_named_by_the_command_too(folder, tmp_path, run, caplog):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    run("classify", tmp_path / "red.png", "--labels", "Red,red,green", "--model", folder / "model")
    assert caplog.messages == ["labels with the same tokens share their probability: 'Red' = 'red'"]


def test_the_installed_command_runs(folder):
    command = os.path.join(os.path.dirname(sys.executable), "mome")
    done = subprocess.run([command, "search", "/nowhere/table.parquet", "red"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "mome: table '/nowhere/table.parquet' is not there"


def test_a_table_goes_to_the_hub_and_comes_back_with_its_model(folder, monkeypatch, tmp_path):
    from mome.retrieval import format as format_module
    from mome.retrieval import push_table
    from mome.retrieval import table as table_module

    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            sent["repo"] = repo_id, options

        def create_commit(self, repo_id, operations, **options):
            sent["files"] = operations

    monkeypatch.setattr(table_module, "HfApi", Api)
    push_table(folder / "table.parquet", "me/table")
    assert sent["repo"] == ("me/table", {"repo_type": "dataset", "private": False, "exist_ok": True})
    (operation,) = sent["files"]
    place = tmp_path / "hub" / operation.path_in_repo
    place.parent.mkdir(parents=True)
    place.write_bytes((folder / "table.parquet").read_bytes())
    monkeypatch.setattr(format_module, "snapshot_download", lambda repo_id, **options: str(tmp_path / "hub"))
    table = load_table("me/table")
    assert len(table) == 24 and table.info.model == str(folder / "model")
