"""Corpora embedded into tables: of every kind, with bad files, killed and started again."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from mome.errors import MomeError
from mome.retrieval import Embedder, RetrievalError, embed_corpus, load_table, open_image, open_source
from mome.retrieval.format import unreadable_file
from retrieval_corpora import COLOURS, draw, make_pictures, make_table, save_checkpoint

NOT_COMPARED = {"embedding": None, "file_stamp": None}
QUIET = {"progress": False, "batch_size": 4, "part_rows": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder.load(checkpoint)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def interrupted(*_):
    raise KeyboardInterrupt


def same_rows(one, other):
    assert one.rows.column_names == other.rows.column_names
    for left, right in zip(one.rows, other.rows, strict=True):
        assert left | NOT_COMPARED == right | NOT_COMPARED
    assert torch.equal(one.valid, other.valid)
    rows = one.valid.nonzero().flatten().tolist()
    assert torch.equal(one.embeddings(rows), other.embeddings(rows))


def unreadable(output):
    return [json.loads(line) for line in unreadable_file(output).read_text().splitlines()]


def refused(message, *arguments, **options):
    with pytest.raises(RetrievalError, match=message) as raised:
        embed_corpus(*arguments, **{**QUIET, **options})
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------- corpora of every kind


def test_a_folder_becomes_a_table_whose_rows_are_what_the_model_says(tmp_path, embedder):
    paths = make_pictures(tmp_path / "pictures", 11)
    report = embed_corpus(tmp_path / "pictures", tmp_path / "table.parquet", embedder, **QUIET)
    assert (report.rows, report.images, report.bad, report.resumed) == (11, 11, 0, 0)
    table = load_table(tmp_path / "table.parquet", embedder.fingerprint, embedder.dimension)
    assert table.info.model == embedder.name and table.info.source == str(tmp_path / "pictures")
    for path in paths:
        row = table.row_of(path.relative_to(tmp_path / "pictures").as_posix())
        assert table.rows[row]["uri"] == str(path) and table.rows[row]["modality"] == "image"
        assert torch.allclose(table.embeddings([row]), embedder.embed_images([path]), atol=1e-6)
        assert open_image(table.rows[row]["uri"]).tobytes() == Image.open(path).tobytes()
    assert sorted(file.name for file in tmp_path.glob("table*")) == ["table.parquet"]  # nothing else is left


def test_images_that_cannot_be_read_are_counted_and_say_why(tmp_path, embedder):
    folder = tmp_path / "pictures"
    good = make_pictures(folder, 5)
    (folder / "text.png").write_text("no picture")
    (folder / "nothing.jpg").write_bytes(b"")
    (folder / "half.png").write_bytes(good[0].read_bytes()[:60])
    (folder / "notes.md").write_text("not counted")
    report = embed_corpus(folder, tmp_path / "table.parquet", embedder, **QUIET)
    assert (report.rows, report.images, report.bad) == (5, 5, 3)
    assert f"5 images embedded, 3 could not be read (see {tmp_path}/table.unreadable.jsonl)" in str(report)
    assert load_table(tmp_path / "table.parquet").valid.all()
    bad = unreadable(tmp_path / "table.parquet")
    assert [row["id"] for row in bad] == ["half.png", "nothing.jpg", "text.png"]
    assert [row["uri"] for row in bad] == [str(folder / row["id"]) for row in bad]
    assert all(row["modality"] == "image" and row["error"] and "\n" not in row["error"] for row in bad)
    for row in bad:
        draw((9, 9, 9)).save(folder / row["id"])
    assert embed_corpus(folder, tmp_path / "table.parquet", embedder, **QUIET).bad == 0
    assert not (tmp_path / "table.unreadable.jsonl").exists()


def test_links_lead_to_each_file_once_and_dead_ones_are_counted(tmp_path, embedder):
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    make_pictures(folder, 5)
    make_pictures(elsewhere, 2)
    (folder / "a-first").symlink_to(folder / "red")  # before "red", whose own path is the one that counts
    (folder / "red" / "again").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "copy.png").symlink_to(folder / "red" / "000.png")
    (folder / "linked.png").symlink_to(elsewhere / "red" / "000.png")
    (folder / "linked-again.png").symlink_to(elsewhere / "red" / "000.png")
    (folder / "other").symlink_to(elsewhere / "green")
    (folder / "dead.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "dead-folder").symlink_to(tmp_path / "nowhere")
    (folder / "dead.md").symlink_to(tmp_path / "nowhere.md")
    report = embed_corpus(folder, tmp_path / "table.parquet", embedder, **QUIET)
    table = load_table(tmp_path / "table.parquet")
    own = ["blue/002.png", "green/001.png", "red/000.png", "red/004.png", "yellow/003.png"]
    dead = ["dead-folder", "dead.png", "self.png"]
    assert sorted(table.column("id").to_pylist()) == sorted([*own, "linked-again.png", "other/001.png"])
    bad = unreadable(tmp_path / "table.parquet")
    assert [row["id"] for row in bad] == dead and "No such file" in bad[1]["error"]
    assert (report.images, report.bad) == (7, 3)
    assert "7 images embedded, 3 could not be read" in str(report)
    assert report.left_out == {"links to what is listed already": 5, ".md files": 1}
    assert "; left out: 5 links to what is listed already" in str(report) and "1 .md files" in str(report)
    (folder / "dead.png").unlink()
    report = embed_corpus(folder, tmp_path / "table.parquet", embedder, **QUIET)
    assert (report.images, report.bad, report.resumed, report.dropped) == (7, 2, 7, 0)


def test_a_shard_or_a_metadata_file_behind_a_dead_link_is_named(tmp_path, embedder):
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "pictures" / "metadata.csv").symlink_to(tmp_path / "nowhere.csv")
    refused("metadata.csv can't be read: No such file", tmp_path / "pictures", tmp_path / "t.parquet", embedder)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").symlink_to(tmp_path / "nowhere.tar")
    refused("0.tar' is a dead link", tmp_path / "shards", tmp_path / "t.parquet", embedder)


def test_metadata_in_a_linked_folder_counts(tmp_path, embedder):
    make_pictures(tmp_path / "elsewhere", 1)
    (tmp_path / "elsewhere" / "metadata.csv").write_text("file_name,artist\nred/000.png,somebody\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "linked").symlink_to(tmp_path / "elsewhere")
    embed_corpus(tmp_path / "pictures", tmp_path / "table.parquet", embedder, **QUIET)
    row = load_table(tmp_path / "table.parquet").rows[0]
    assert (row["id"], row["artist"]) == ("linked/red/000.png", "somebody")


def test_transparent_pictures_are_seen_on_white_and_turned_ones_upright(tmp_path, embedder):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (16, 16), "white").save(folder / "white.png")
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(folder / "rgba.png")
    Image.new("LA", (16, 16), (0, 0)).save(folder / "la.png")
    embed_corpus(folder, tmp_path / "table.parquet", embedder, **QUIET)
    table = load_table(tmp_path / "table.parquet")
    assert torch.allclose(table.embeddings([0, 1]), table.embeddings([2, 2]), atol=1e-6)


def test_metadata_beside_the_pictures_become_columns(tmp_path, embedder):
    folder = tmp_path / "pictures"
    paths = make_pictures(folder, 4)
    lines = [
        {"file_name": path.relative_to(folder).as_posix(), "text": path.parent.name, "year": 2000 + number}
        for number, path in enumerate(paths[:3])
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = embed_corpus(folder, tmp_path / "table.parquet", embedder, modalities=("image", "text"), **QUIET)
    assert (report.images, report.texts, report.bad) == (4, 3, 0)
    table = load_table(tmp_path / "table.parquet")
    assert table.metadata_columns == ["year"]
    image, text = table.rows[table.row_of("red/000.png")], table.rows[table.row_of("red/000.png#0")]
    assert (image["text"], image["year"], image["modality"]) == ("red", 2000, "image")
    assert (text["text"], text["year"], text["modality"], text["uri"]) == ("red", 2000, "text", image["uri"])
    assert table.rows[table.row_of("yellow/003.png")]["year"] is None
    (folder / "metadata.jsonl").write_text('{"text": "no name"}')
    refused("each row needs a file_name", folder, tmp_path / "other.parquet", embedder)


@pytest.fixture
def rows():
    """Pictures, lists of texts, metadata of several kinds."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "texts": datasets.List(datasets.Value("string")),
            "kind": datasets.ClassLabel(names=["icon", "photo"]),
            "weight": datasets.Value("float32"),
            "boxes": datasets.List(datasets.Value("int32")),
            "key": datasets.Value("string"),
        }
    )
    columns = {
        "image": [
            {"bytes": png(draw(colour, number)), "path": None} for number, colour in enumerate(COLOURS.values())
        ],
        "texts": [["red", "a red dot"], ["green"], [], ["yellow"]],
        "kind": [0, 1, 0, None],
        "weight": [0.5, None, 1.0, 2.0],
        "boxes": [[1], [], [2, 3], []],
        "key": ["a", "b", "c", "d"],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_data_set_keeps_its_columns_and_each_text_gets_a_row(tmp_path, rows, embedder):
    report = embed_corpus(
        rows, tmp_path / "table.parquet", embedder, modalities=["text", "image"], id_column="key", **QUIET
    )
    assert (report.images, report.texts) == (4, 4)
    table = load_table(tmp_path / "table.parquet")
    assert table.column("id").to_pylist() == ["a", "a#0", "a#1", "b", "b#0", "c", "d", "d#0"]
    assert table.column("kind").to_pylist() == ["icon"] * 3 + ["photo"] * 2 + ["icon", None, None]
    assert table.metadata_columns == ["kind", "weight"]
    text = table.embeddings([table.row_of("a#1")])
    assert torch.allclose(text, embedder.embed_texts(["a red dot"]), atol=1e-6)


def test_parquet_json_lines_disk_and_shards_give_the_same_embeddings(tmp_path, rows, embedder):
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for number, image in enumerate(rows.cast_column("image", datasets.Image(decode=False))["image"]):
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = len(image["bytes"])
            archive.addfile(member, io.BytesIO(image["bytes"]))
    wanted = embedder.embed_images(list(rows["image"]))
    for name in ("rows.parquet", "saved", "shard-0.tar", "shard-*.tar"):
        output = tmp_path / "tables" / f"of-{name.replace('*', 'all')}.parquet"
        embed_corpus(tmp_path / name, output, embedder, modalities="image", **QUIET)
        table = load_table(output)
        assert torch.allclose(table.embeddings(range(4)), wanted, atol=1e-6), name
        pixels = [open_image(uri).tobytes() for uri in table.column("uri").to_pylist()]
        assert pixels == [image.convert("RGB").tobytes() for image in rows["image"]], name


def test_texts_alone_are_a_corpus_and_a_row_without_text_is_counted(tmp_path, embedder):
    (tmp_path / "texts.txt").write_text("a red dot\n\na blue line\n" + "red " * 50 + "\n")
    report = embed_corpus(tmp_path / "texts.txt", tmp_path / "table.parquet", embedder, **QUIET)
    assert (report.images, report.texts, report.bad) == (0, 3, 1)
    table = load_table(tmp_path / "table.parquet")
    assert table.column("id").to_pylist() == ["train/0", "train/2", "train/3"]
    assert table.rows[0]["text"] == "a red dot"
    (bad,) = unreadable(tmp_path / "table.parquet")
    assert (bad["id"], bad["modality"], bad["error"]) == ("train/1", "text", "no text")


# ------------------------------------------------------------------------------------------ interruption, repetition


def test_batches_parts_and_workers_change_nothing_but_rounding(tmp_path, embedder):
    make_pictures(tmp_path / "pictures", 13)
    tables = []
    for number, options in enumerate(({"workers": 1}, {"workers": 3}, {"batch_size": 5, "part_rows": 1})):
        output = tmp_path / f"{number}.parquet"
        embed_corpus(tmp_path / "pictures", output, embedder, **{**QUIET, **options})
        tables.append(load_table(output))
    same_rows(tables[0], tables[1])
    assert torch.allclose(tables[0].embeddings(range(13)), tables[2].embeddings(range(13)), atol=1e-6)


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import mome.retrieval.store as job
from mome.retrieval import embed_corpus
plain = job.write_table
def slow(path, tables, schema):
    rows = plain(path, tables, schema)
    print(path.name, flush=True)
    sys.stdin.readline()
    return rows
job.write_table = slow
embed_corpus({source!r}, {output!r}, {model!r}, progress=False, batch_size=4, part_rows=8)
"""


@pytest.mark.parametrize("name", ["table.parquet", "table"])
def test_a_killed_job_goes_on_and_loses_and_repeats_nothing(tmp_path, checkpoint, embedder, name):
    folder, output = tmp_path / "pictures", tmp_path / name
    make_pictures(folder, 30)
    (folder / "red" / "broken.png").write_bytes(b"no picture")
    embed_corpus(folder, tmp_path / "uninterrupted.parquet", embedder, **QUIET)
    script = WORKER.format(
        tests=str(Path(__file__).parent), source=str(folder), output=str(output), model=str(checkpoint)
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline() == "part-000000.parquet\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "part-000001.parquet\n"
    refused("another process is writing", folder, output, embedder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert not output.exists()
    parts = tmp_path / f"{name}.parts"
    (parts / "part-000002.parquet.partial").write_bytes(b"half of a part")
    with pytest.raises(RetrievalError, match="run the same `mome embed` again|is not there"):
        load_table(output)

    report = embed_corpus(folder, output, embedder, **QUIET)
    assert (report.rows, report.resumed, report.bad) == (30, 16, 1)
    same_rows(load_table(output), load_table(tmp_path / "uninterrupted.parquet"))
    assert not parts.exists()
    before = os.stat(output).st_mtime_ns
    assert embed_corpus(folder, output, embedder, **QUIET).resumed == 30  # again: nothing to do
    assert os.stat(output).st_mtime_ns == before


def test_a_stream_goes_on_where_it_was(tmp_path, embedder):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for number in range(20):
            data = b"no picture" if number == 9 else png(draw((number, 0, 0), number))
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    embed_corpus(tmp_path / "shard.tar", tmp_path / "whole.parquet", embedder, **QUIET)
    source = open_source(tmp_path / "shard.tar")
    assert [row.id for row in source.rows(18)] == ["shard.tar/018", "shard.tar/019"]

    import mome.retrieval.store as job

    class Stop(Exception):
        pass

    def stopping(path, tables, schema, write=job.write_table):
        if path.name == "part-000001.parquet":
            raise Stop
        return write(path, tables, schema)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(job, "write_table", stopping)
        embed_corpus(tmp_path / "shard.tar", tmp_path / "table.parquet", embedder, **QUIET)
    report = embed_corpus(tmp_path / "shard.tar", tmp_path / "table.parquet", embedder, **QUIET)
    assert (report.rows, report.resumed, report.bad) == (19, 8, 1)
    same_rows(load_table(tmp_path / "table.parquet"), load_table(tmp_path / "whole.parquet"))


def test_a_damaged_part_is_made_again(tmp_path, embedder):
    make_pictures(tmp_path / "pictures", 20)
    output = tmp_path / "table.parquet"
    import mome.retrieval.job as job

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job.TableJob, "finish", interrupted)
        embed_corpus(tmp_path / "pictures", output, embedder, **QUIET)
    part = tmp_path / "table.parquet.parts" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    report = embed_corpus(tmp_path / "pictures", output, embedder, **QUIET)
    assert (report.rows, report.resumed) == (20, 12)  # the other parts count
    assert len(load_table(output)) == 20


def test_a_finished_or_unfinished_table_is_not_overwritten_by_another_job(tmp_path, checkpoint, embedder):
    make_pictures(tmp_path / "pictures", 9)
    output = tmp_path / "table.parquet"
    embed_corpus(tmp_path / "pictures", output, embedder, **QUIET)
    other = Embedder.load(save_checkpoint(tmp_path / "other", seed=1))
    assert other.fingerprint != embedder.fingerprint
    fingerprints = f"model_fingerprint='{embedder.fingerprint}', now it is '{other.fingerprint}'"
    refused(f"is there already, made with {fingerprints}", tmp_path / "pictures", output, other)
    make_pictures(tmp_path / "pictures", 10)
    assert embed_corpus(tmp_path / "pictures", output, other, overwrite=True, **QUIET).rows == 10
    assert load_table(output).info.fingerprint == other.fingerprint

    parts = tmp_path / "new.parquet.parts"
    parts.mkdir()
    (parts / "job.json").write_text(
        json.dumps({"settings": {**load_table(output).info.settings, "source": "elsewhere"}, "overwrite": False})
    )
    refused(
        f"unfinished job with source='elsewhere', now it is '{tmp_path}/pictures'",
        tmp_path / "pictures",
        tmp_path / "new.parquet",
        embedder,
    )
    parts.mkdir()
    (parts / "job.json").write_text(json.dumps({"source": "elsewhere"}))  # of an earlier version
    refused(
        "unfinished job with format_version=None, now it is 2",
        tmp_path / "pictures",
        tmp_path / "new.parquet",
        embedder,
    )
    assert embed_corpus(tmp_path / "pictures", tmp_path / "new.parquet", embedder, overwrite=True, **QUIET).rows == 10

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diary.txt").write_text("mine")
    refused("holds 'diary.txt'", tmp_path / "pictures", tmp_path / "folder", embedder)
    refused("holds 'diary.txt'", tmp_path / "pictures", tmp_path / "folder", embedder, overwrite=True)
    assert (tmp_path / "folder" / "diary.txt").read_text() == "mine"


def test_an_old_table_stays_until_the_new_one_is_whole(tmp_path, embedder):
    import mome.retrieval.job as job

    make_pictures(tmp_path / "pictures", 9)
    output = tmp_path / "table.parquet"
    embed_corpus(tmp_path / "pictures", output, embedder, **QUIET)
    make_pictures(tmp_path / "pictures", 18)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job.TableJob, "finish", interrupted)
        embed_corpus(tmp_path / "pictures", output, embedder, overwrite=True, **QUIET)
    assert len(load_table(output)) == 9
    report = embed_corpus(tmp_path / "pictures", output, embedder, overwrite=True, **QUIET)
    assert (report.rows, report.resumed) == (18, 18) and len(load_table(output)) == 18


# ---------------------------------------------------------------------------------------------------- bad input


def test_corpora_and_columns_that_are_not_there_are_named(tmp_path, rows, embedder):
    output = tmp_path / "table.parquet"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.xyz").write_text("")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    refused("is not there", tmp_path / "nowhere", output, embedder)
    refused("holds no images, parquet or WebDataset files", tmp_path / "empty", output, embedder)
    refused("file.xyz is of no kind that can be read", tmp_path / "file.xyz", output, embedder)
    refused("broken.parquet can't be read", tmp_path / "broken.parquet", output, embedder)
    refused("has no 'pictures'", rows, output, embedder, image_column="pictures")
    refused("did you mean 'kind'", rows, output, embedder, metadata_columns=["kinds"])
    refused("metadata column 'boxes' is of type", rows, output, embedder, metadata_columns=["boxes"])
    refused("column 'weight' of the data set holds no images", rows, output, embedder, image_column="weight")
    refused("column 'weight' of the data set holds no texts", rows, output, embedder, text_column="weight")
    refused("modality 'sound'", rows, output, embedder, modalities=["sound"])
    refused("has no column of texts", rows.remove_columns("texts"), output, embedder, modalities="text")
    refused("batch_size=0 must be", rows, output, embedder, batch_size=0)
    refused("embed_corpus has no 'modality': did you mean 'modalities'", rows, output, embedder, modality="image")
    twice = rows.remove_columns("key").add_column("key", ["a", "b", "a", "c"])
    refused("'a' occurs twice in id_column='key'", twice, output, embedder, id_column="key")
    refused("dict of splits, train", datasets.DatasetDict(train=rows), output, embedder)
    assert not output.exists() and not list(tmp_path.glob("*.parts"))
    with pytest.raises(RetrievalError, match="open_source has no 'colour'"):
        open_source(rows, colour="red")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, rows, embedder, monkeypatch):
    rows.to_parquet(tmp_path / "rows.parquet")
    make_pictures(tmp_path / "pictures", 3)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    refused(
        "the cache .*file/cache can't be written.*set HF_HOME", tmp_path / "rows.parquet", tmp_path / "t", embedder
    )
    report = embed_corpus(tmp_path / "pictures", tmp_path / "table.parquet", embedder, **QUIET)  # needs no cache
    assert report.images == 3 and len(load_table(tmp_path / "table.parquet")) == 3


def test_models_that_do_not_load_are_named_in_one_line(tmp_path, checkpoint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    bare = save_checkpoint(tmp_path / "bare")
    for name in bare.glob("*token*"):
        name.unlink()
    (bare / "processor_config.json").unlink()
    for name, message in (("empty", "can't be loaded"), ("other", "of type 'bert'"), ("bare", "can't be loaded")):
        with pytest.raises(MomeError, match=message) as raised:
            Embedder.load(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_a_fingerprint_tells_weights_apart_and_nothing_else(tmp_path, checkpoint, embedder):
    assert Embedder.load(checkpoint, dtype=torch.bfloat16).fingerprint == embedder.fingerprint
    embedder.model.save_pretrained(tmp_path / "alone", max_shard_size="10KB")
    embedder.processor.save_pretrained(tmp_path / "alone")
    again = Embedder.load(tmp_path / "alone")
    assert again.fingerprint == embedder.fingerprint
    with torch.no_grad():
        next(again.model.parameters()).mul_(1.01)
    assert Embedder(again.model, again.processor).fingerprint != embedder.fingerprint


def test_a_table_of_another_model_is_refused_before_any_search(tmp_path, embedder):
    from mome.retrieval import Searcher

    path = make_table(tmp_path / "table.parquet", rows=10)
    with pytest.raises(RetrievalError, match="made by another model .a-model"):
        Searcher.open(path, model=embedder)
    with pytest.raises(MomeError, match="model 'a-model' can't be loaded"):
        Searcher.open(path)
