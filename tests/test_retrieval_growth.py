"""Tables that grow with their corpus: what is new is embedded, what is gone is dropped, the rest is taken over."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch

from mome.retrieval import Embedder, RetrievalError, embed_corpus, load_table
from mome.retrieval import items as items_module
from mome.retrieval import job as job_module
from mome.retrieval import table as table_module
from retrieval_corpora import draw, make_pictures, make_table, save_checkpoint

QUIET = {"progress": False, "batch_size": 4, "part_rows": 8}
FORMAT_1 = Path(__file__).parent / "fixtures" / "table-format-1.parquet"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder.load(checkpoint)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture
def embedded(monkeypatch):
    """Ids of the items that went through the model."""
    ids, plain = [], items_module.embed_items

    def noting(items, *arguments, **options):
        ids.extend(item.id for item in items)
        return plain(items, *arguments, **options)

    monkeypatch.setattr("mome.retrieval.embed.embed_items", noting)
    return ids


@pytest.fixture(params=["table.parquet", "table"])
def output(request, tmp_path):
    return tmp_path / request.param


def rows_of(output):
    """Everything in a table but the stamps of files, by id."""
    table = load_table(output)
    assert table.valid.all()
    return {row["id"]: {**row, "file_stamp": None} for row in table.rows}


def assert_same(output, other):
    ours, theirs = rows_of(output), rows_of(other)
    assert list(ours) == list(theirs)
    for id, row in ours.items():
        vectors = torch.tensor([row.pop("embedding"), theirs[id].pop("embedding")])
        assert row == theirs[id] and torch.allclose(vectors[0], vectors[1], atol=1e-6), id


def refused(message, *arguments, **options):
    with pytest.raises(RetrievalError, match=message) as raised:
        embed_corpus(*arguments, **{**QUIET, **options})
    assert "\n" not in str(raised.value)


def make_old(folder, seconds=100):
    """Files whose times are trusted."""
    for path in folder.rglob("*.*"):
        os.utime(path, ns=(1, path.stat().st_mtime_ns - seconds * 10**9))


def test_only_what_is_new_or_changed_is_embedded_and_what_is_gone_is_dropped(tmp_path, output, embedder, embedded):
    folder = tmp_path / "pictures"
    make_pictures(folder, 12)
    embed_corpus(folder, output, embedder, **QUIET)
    embedded.clear()
    (folder / "new.png").write_bytes((folder / "red" / "000.png").read_bytes()[:-8] + b"0" * 8)  # bytes of its own
    draw((1, 2, 3), 77).save(folder / "newer.png")
    draw((9, 8, 7), 78).save(folder / "red" / "004.png")  # changed
    (folder / "green" / "001.png").unlink()
    (folder / "blue" / "002.png").rename(folder / "renamed.png")
    (folder / "yellow").rename(folder / "yellowish")
    (folder / "broken.png").write_bytes(b"no picture")
    report = embed_corpus(folder, output, embedder, **{**QUIET, "batch_size": 3, "part_rows": 5}, workers=2)
    assert sorted(embedded) == ["broken.png", "new.png", "newer.png", "red/004.png"]
    assert (report.rows, report.resumed, report.dropped, report.bad) == (13, 10, 1, 1)
    assert "10 rows were there already; 1 rows dropped that are gone from the corpus" in str(report)
    embed_corpus(folder, tmp_path / "anew.parquet", embedder, **QUIET)
    assert_same(output, tmp_path / "anew.parquet")


def test_settings_that_change_no_embedding_play_no_part(tmp_path, output, embedder, embedded, checkpoint):
    folder = tmp_path / "pictures"
    make_pictures(folder, 9)
    embed_corpus(folder, output, embedder, **QUIET)
    embedded.clear()
    files = sorted(output.rglob("*.parquet")) if output.is_dir() else [output]
    before = [file.read_bytes() for file in files]
    for options in ({"batch_size": 32}, {"part_rows": 3}, {"workers": 3}, {"progress": True}):
        report = embed_corpus(folder, output, embedder, **{**QUIET, **options})
        assert (report.rows, report.resumed) == (9, 9)
    assert not embedded and [file.read_bytes() for file in files] == before
    shutil.copytree(checkpoint, tmp_path / "moved")
    assert embed_corpus(folder, output, tmp_path / "moved", **QUIET).resumed == 9 and not embedded
    assert load_table(output).info.model == str(tmp_path / "moved")  # where the model is now


def test_a_touched_file_is_not_embedded_and_an_untouched_one_not_even_read(tmp_path, output, embedder, embedded):
    folder = tmp_path / "pictures"
    paths = make_pictures(folder, 8)
    patch = pytest.MonkeyPatch()
    patch.setattr(items_module, "SETTLED", 0)
    embed_corpus(folder, output, embedder, **QUIET)
    embedded.clear()
    read, plain = [], open

    def noting(path, *arguments, **options):
        read.append(str(path))
        return plain(path, *arguments, **options)

    patch.setattr(items_module, "open", noting, raising=False)
    os.utime(paths[3])
    assert embed_corpus(folder, output, embedder, **QUIET).resumed == 8
    patch.undo()
    assert read == [str(paths[3])] and not embedded


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps no time of the last change of an inode")
def test_a_change_that_keeps_size_and_time_is_seen(tmp_path, embedder, embedded, monkeypatch):
    monkeypatch.setattr(items_module, "SETTLED", 0)
    folder, output = tmp_path / "pictures", tmp_path / "table.parquet"
    folder.mkdir()
    one, other = draw((255, 0, 0)), draw((0, 0, 255))
    for image, name in ((one, "a.bmp"), (other, "b.bmp")):
        image.save(folder / name)
    state = (folder / "a.bmp").stat()
    embed_corpus(folder, output, embedder, **QUIET)
    embedded.clear()
    draw((0, 255, 0)).save(folder / "a.bmp")
    os.utime(folder / "a.bmp", ns=(state.st_atime_ns, state.st_mtime_ns))
    now = (folder / "a.bmp").stat()
    assert (now.st_size, now.st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    embed_corpus(folder, output, embedder, **QUIET)
    assert embedded == ["a.bmp"]
    table = load_table(output)
    assert torch.allclose(table.embeddings([0]), embedder.embed_images([folder / "a.bmp"]), atol=1e-6)


def test_a_file_that_changed_just_now_is_read_again(tmp_path, embedder):
    folder, output = tmp_path / "pictures", tmp_path / "table.parquet"
    make_pictures(folder, 2)
    embed_corpus(folder, output, embedder, **QUIET)
    assert load_table(output).column("file_stamp").to_pylist() == [None, None]


def test_a_file_that_changes_while_it_is_read_is_not_kept_under_its_old_content(tmp_path, embedder, monkeypatch):
    monkeypatch.setattr(items_module, "KEPT_BYTES", 0)
    folder, output = tmp_path / "pictures", tmp_path / "table.parquet"
    paths = make_pictures(folder, 4)
    plain = items_module.load_bytes

    def changing(item):
        if item.uri == str(paths[1]):
            draw((5, 5, 5), 99).save(paths[1])
        plain(item)

    monkeypatch.setattr(items_module, "load_bytes", changing)
    report = embed_corpus(folder, output, embedder, **QUIET)
    assert (report.rows, report.bad) == (3, 1)
    assert "changed while it was read" in (tmp_path / "table.unreadable.jsonl").read_text()
    monkeypatch.setattr(items_module, "load_bytes", plain)
    assert embed_corpus(folder, output, embedder, **QUIET).resumed == 3
    table = load_table(output)
    assert torch.allclose(
        table.embeddings([table.row_of("green/001.png")]), embedder.embed_images([paths[1]]), atol=1e-6
    )


def test_metadata_that_changed_come_into_the_table_without_the_model(tmp_path, output, embedder, embedded):
    folder = tmp_path / "pictures"
    make_pictures(folder, 4)
    (folder / "metadata.csv").write_text("file_name,year\nred/000.png,1999\n")
    embed_corpus(folder, output, embedder, **QUIET)
    embedded.clear()
    (folder / "metadata.csv").write_text("file_name,year,text\nred/000.png,2001,a red dot\n")
    report = embed_corpus(folder, output, embedder, **QUIET)
    row = rows_of(output)["red/000.png"]
    assert (row["year"], row["text"]) == (2001, "a red dot") and report.resumed == 4 and not embedded
    embed_corpus(folder, output, embedder, **QUIET, metadata_columns=[])
    assert load_table(output).metadata_columns == [] and not embedded


def test_equal_pictures_are_embedded_once(tmp_path, embedder, embedded):
    folder = tmp_path / "pictures"
    make_pictures(folder, 3)
    for number in range(5):
        shutil.copy(folder / "red" / "000.png", folder / f"copy-{number}.png")
    report = embed_corpus(folder, tmp_path / "table.parquet", embedder, **QUIET)
    assert (report.rows, len(embedded)) == (8, 3)
    table = load_table(tmp_path / "table.parquet")
    assert torch.equal(table.embeddings([table.row_of("copy-1.png")]), table.embeddings([table.row_of("red/000.png")]))


# ------------------------------------------------------------------------------------------ corpora of other kinds


def pictures_as_rows(numbers):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": png(number), "path": None} for number in numbers], "text": [f"red {n}" for n in numbers]},
        features=features,
    )


def png(number):
    data = io.BytesIO()
    draw((number, 100, 3), number).save(data, "PNG")
    return data.getvalue()


def write_parquet(path, numbers):
    pictures_as_rows(numbers).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def write_saved(path, numbers):
    shutil.rmtree(path, ignore_errors=True)
    pictures_as_rows(numbers).save_to_disk(path)
    return path


def write_shard(path, numbers):
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for number in numbers:
            for suffix, data in (("png", png(number)), ("txt", f"red {number}".encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path.with_suffix(".tar")


def write_texts(path, numbers):
    path.with_suffix(".txt").write_text("".join(f"red {number}\n" for number in numbers))
    return path.with_suffix(".txt")


def open_rows(path, numbers):
    return pictures_as_rows(numbers)


@pytest.mark.parametrize("write", [write_parquet, write_saved, write_shard, write_texts, open_rows])
def test_corpora_of_every_kind_grow(tmp_path, embedder, embedded, write):
    output = tmp_path / "table.parquet"
    options = {**QUIET, "modalities": "text" if write is write_texts else ("image", "text")}
    each = 1 if write is write_texts else 2
    embed_corpus(write(tmp_path / "corpus", range(10)), output, embedder, **options)
    embedded.clear()
    source = write(tmp_path / "corpus", [50, *range(2, 10), 60])  # two are gone, one is new before all others
    report = embed_corpus(source, output, embedder, **options)
    assert len(embedded) == 2 * each
    assert (report.rows, report.resumed) == (10 * each, 8 * each)
    embed_corpus(source, tmp_path / "anew.parquet", embedder, **options)
    assert_same(output, tmp_path / "anew.parquet")


def test_a_data_set_with_nothing_in_common_does_not_replace_a_table(tmp_path, embedder):
    output = tmp_path / "table.parquet"
    embed_corpus(pictures_as_rows(range(4)), output, embedder, **QUIET)
    refused("no row in common with .*table.parquet", pictures_as_rows(range(30, 35)), output, embedder)
    assert len(load_table(output)) == 4
    assert embed_corpus(pictures_as_rows(range(30, 35)), output, embedder, **QUIET, overwrite=True).rows == 5


def test_a_table_and_an_index_beside_the_pictures_are_not_taken_for_the_corpus(tmp_path, embedder):
    folder = tmp_path / "pictures"
    make_pictures(folder, 4)
    embed_corpus(folder, folder / "table.parquet", embedder, **QUIET)
    (folder / "index.db" / "data").mkdir(parents=True)
    shutil.copy(folder / "table.parquet", folder / "index.db" / "data" / "rows.parquet")
    make_pictures(folder, 5)
    report = embed_corpus(folder, folder / "table.parquet", embedder, **QUIET)
    assert (report.rows, report.resumed) == (5, 4)
    assert report.left_out == {"files of tables and indexes": 2}


# ------------------------------------------------------------------------------------------------ what is refused


def test_what_differs_is_named_with_both_values(tmp_path, embedder, checkpoint):
    folder, output = tmp_path / "pictures", tmp_path / "table.parquet"
    make_pictures(folder, 4)
    (folder / "metadata.csv").write_text("file_name,text,words\nred/000.png,a,b\n")
    options = {"modalities": ("image", "text")}
    embed_corpus(folder, output, embedder, **QUIET, **options)
    other = Embedder.load(save_checkpoint(tmp_path / "other", seed=1))
    rounded = Embedder.load(checkpoint, dtype=torch.bfloat16)
    larger = Embedder.load(checkpoint)
    larger.processor.image_processor.image_mean = [0.4, 0.4, 0.4]
    shorter = Embedder.load(checkpoint)
    shorter.processor.tokenizer.model_max_length = 3
    make_pictures(tmp_path / "elsewhere", 4)
    (tmp_path / "elsewhere" / "metadata.csv").write_text("file_name,text\nred/000.png,a\n")
    for source, model, changed, message in (
        (folder, other, options, f"model_fingerprint='{embedder.fingerprint}', now it is '{other.fingerprint}'"),
        (folder, rounded, options, "dtype='float32', now it is 'bfloat16'"),
        (folder, larger, options, r"image_processor.image_mean=\[.*\], now it is \[0.4, 0.4, 0.4\]"),
        (folder, shorter, options, f"longest_text={embedder.longest_text}, now it is 3"),
        (tmp_path / "elsewhere", embedder, options, f"source='{folder}', now it is '{tmp_path}/elsewhere'"),
        (folder, embedder, {}, r"modalities=\['image', 'text'\], now it is \['image'\]"),
        (folder, embedder, options | {"text_column": "words"}, "text_column='text', now it is 'words'"),
    ):
        refused(f"made with {message}: choose another output, or overwrite it", source, output, model, **changed)
    assert len(load_table(output)) == 5 and not list(tmp_path.glob("*.parts"))


def test_tables_without_digests_are_searched_but_do_not_grow(tmp_path, embedder):
    folder, output = tmp_path / "pictures", tmp_path / "table.parquet"
    make_pictures(folder, 4)
    shutil.copy(FORMAT_1, output)
    refused("written by an earlier mome, without what a table needs to grow", folder, output, embedder)
    assert len(load_table(output)) == 12
    pq.write_table(pq.read_table(make_table(output, rows=3)).replace_schema_metadata(None), output)
    refused("written by other software, without what", folder, output, embedder)
    assert embed_corpus(folder, output, embedder, **QUIET, overwrite=True).rows == 4


def test_a_corpus_of_which_nothing_can_be_read_leaves_the_table_alone(tmp_path, embedder):
    folder, output = tmp_path / "pictures", tmp_path / "table.parquet"
    paths = make_pictures(folder, 4)
    embed_corpus(folder, output, embedder, **QUIET)
    for path in paths:
        path.write_bytes(b"gone")
    refused(r"nothing can be read, for example \w+/\d+.png: not an image", folder, output, embedder)
    assert len(load_table(output)) == 4


def test_damaged_embeddings_are_not_taken_over(tmp_path, embedder):
    folder, output = tmp_path / "pictures", tmp_path / "table.parquet"
    make_pictures(folder, 4)
    embed_corpus(folder, output, embedder, **QUIET)
    rows = pq.read_table(output)
    place = rows.schema.get_field_index("embedding")
    wrong = rows["embedding"].combine_chunks()
    broken = type(wrong).from_arrays(wrong.values.to_numpy() * 3, type=wrong.type)
    pq.write_table(rows.set_column(place, rows.schema.field(place), broken), output)
    make_pictures(folder, 5)
    refused("is not finite or not of length 1", folder, output, embedder)
    assert pq.read_metadata(output).num_rows == 4


# ------------------------------------------------------------------------------------------------------- kill -9

DYING = """
import os, signal, sys
from mome.retrieval import embed_corpus
from mome.retrieval import job, store
source, output, model, place, after = sys.argv[1:]
owner, name = {"part": (store, "write_table"), "table": (job, "write_table"), "rename": (job.os, "replace"),
               "unreadable": (job, "_write_unreadable")}[place]
plain, calls = getattr(owner, name), []

def dying(*arguments, **options):
    if len(calls) == int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(name)
    return plain(*arguments, **options)

setattr(owner, name, dying)
embed_corpus(source, output, model, progress=False, batch_size=4, part_rows=8)
"""


@pytest.mark.parametrize(
    "place, after",
    [("part", 0), ("part", 1), ("table", 0), ("unreadable", 0), *(("rename", after) for after in (0, 2, 5, 6, 8))],
)
def test_a_kill_while_a_table_grows_leaves_a_table_and_what_was_embedded(
    tmp_path, output, embedder, embedded, checkpoint, place, after
):
    folder = tmp_path / "pictures"
    make_pictures(folder, 10)
    embed_corpus(folder, output, embedder, **QUIET)
    earlier = rows_of(output)
    make_pictures(folder, 30)
    (folder / "red" / "000.png").unlink()
    (folder / "broken.png").write_bytes(b"no picture")
    embedded.clear()
    arguments = [str(folder), str(output), str(checkpoint), place, str(after)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", DYING, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    if place != "rename":
        assert done.returncode == -signal.SIGKILL
    else:  # job.json, four parts, what is unreadable, two or more for the table
        assert done.returncode == -signal.SIGKILL or after > 5
    found = rows_of(output)  # readable at any time, and whole: the earlier one or the new one
    assert found == earlier or len(found) == 29
    report = embed_corpus(folder, output, embedder, **QUIET)
    parts = {("part", 0): 0, ("part", 1): 8}.get((place, after))
    if parts is not None:
        assert len(embedded) == 21 - parts  # 20 new pictures and a broken one
    assert (report.rows, report.bad) == (29, 1) and not list(tmp_path.glob("*.parts"))
    embed_corpus(folder, tmp_path / "anew.parquet", embedder, **QUIET)
    assert_same(output, tmp_path / "anew.parquet")


def test_only_one_process_grows_a_table_at_a_time(tmp_path, output, embedder, monkeypatch):
    folder = tmp_path / "pictures"
    make_pictures(folder, 6)
    embed_corpus(folder, output, embedder, **QUIET)
    make_pictures(folder, 9)
    inside, go_on = threading.Event(), threading.Event()
    plain = job_module.TableJob.finish

    def waiting(*arguments):
        inside.set()
        assert go_on.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(job_module.TableJob, "finish", waiting)
    thread = threading.Thread(target=embed_corpus, args=(folder, output, embedder), kwargs=QUIET)
    thread.start()
    assert inside.wait(60)
    refused("another process is writing", folder, output, embedder)
    assert len(load_table(output)) == 6
    go_on.set()
    thread.join()
    assert len(load_table(output)) == 9


# ------------------------------------------------------------------------------------------------- open tables


def test_a_table_that_grew_is_read_anew_and_old_copies_go(tmp_path, embedder):
    folder, output = tmp_path / "pictures", tmp_path / "table.parquet"
    make_pictures(folder, 4)
    cache = tmp_path / "cache"
    embed_corpus(folder, output, embedder, **QUIET)
    before = load_table(output, cache_dir=cache)
    make_pictures(folder, 5)
    embed_corpus(folder, output, embedder, **QUIET)
    after = load_table(output, cache_dir=cache)
    assert (len(before), len(after)) == (4, 5) and len(list((cache / "mome").iterdir())) == 1
    assert torch.isfinite(before.embeddings(range(4))).all()  # who has it open keeps it
    assert table_module.load_table(output, cache_dir=cache).rows.cache_files == after.rows.cache_files


def test_unreadable_files_are_listed_as_json_lines(tmp_path, output, embedder):
    folder = tmp_path / "pictures"
    make_pictures(folder, 2)
    (folder / "größe.png").write_bytes(b"no picture")
    embed_corpus(folder, output, embedder, **QUIET)
    place = output / "unreadable.jsonl" if output.is_dir() else tmp_path / "table.unreadable.jsonl"
    (row,) = map(json.loads, place.read_text().splitlines())
    assert row == {
        "id": "größe.png",
        "modality": "image",
        "uri": str(folder / "größe.png"),
        "error": "not an image that Pillow can read",
    }
