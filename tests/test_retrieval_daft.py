"""Embedding with Daft gives the table of `embed_corpus`, on one machine and on Ray."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import torch

from mome.retrieval import RetrievalError, embed_corpus, load_table
from retrieval_corpora import draw, make_pictures, save_checkpoint

daft = pytest.importorskip("daft", reason="needs the extra daft")

NOT_COMPARED = {"embedding": None, "file_stamp": None}
QUIET = {"OMP_NUM_THREADS": "1", "DAFT_PROGRESS_BAR": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
QUIET |= {"RAY_raylet_start_wait_time_s": "300"}  # on a busy machine
SCRIPT = """
import sys
from mome.retrieval.embed_daft import embed_with_daft
if __name__ == "__main__":
    source, output, model, runner = sys.argv[1:]
    print(embed_with_daft(source, output, model, runner=runner, modalities=("image", "text"), batch_size=4))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("daft")
    save_checkpoint(folder / "model")
    paths = make_pictures(folder / "pictures", 14)
    names = [path.relative_to(folder / "pictures").as_posix() for path in paths[:9]]
    lines = [{"file_name": name, "text": f"a {name.split('/')[0]} dot", "year": 2000 + len(name)} for name in names]
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "pictures" / "broken.png").write_bytes(b"no picture")
    options = {"modalities": ("image", "text"), "batch_size": 4, "progress": False}
    embed_corpus(folder / "pictures", folder / "plain.parquet", folder / "model", **options)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.mark.parametrize("runner", ["native", "ray"])
def test_daft_gives_row_for_row_the_table_of_embed_corpus(folder, tmp_path, runner):
    if runner == "ray":
        pytest.importorskip("ray", reason="needs the extra daft with ray")
    output = tmp_path / "table.parquet"
    (tmp_path / "job.py").write_text(SCRIPT)  # a process of its own: there is one runner in a process
    arguments = [folder / "pictures", output, folder / "model", runner]
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py", *map(str, arguments)],
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "14 images and 9 texts embedded, 1 could not be read" in done.stdout
    plain, ours = load_table(folder / "plain.parquet"), load_table(output)
    assert ours.info.fingerprint == plain.info.fingerprint and ours.rows.features == plain.rows.features
    for left, right in zip(ours.rows, plain.rows, strict=True):
        assert left | NOT_COMPARED == right | NOT_COMPARED
    good = plain.valid.nonzero().flatten().tolist()
    assert torch.equal(ours.valid, plain.valid)
    assert torch.allclose(ours.embeddings(good), plain.embeddings(good), atol=1e-6)
    assert not list(tmp_path.glob("table.parquet.*"))  # nothing in between is left


def test_what_daft_cannot_do_is_refused_in_one_line(folder, tmp_path):
    from mome.retrieval.embed_daft import embed_with_daft

    for options, message in (
        ({"runner": "spark"}, "runner='spark'"),
        ({"ray_address": "auto"}, "only with runner='ray'"),
        ({"modalities": "sound"}, "modality 'sound'"),
    ):
        with pytest.raises(RetrievalError, match=message) as raised:
            embed_with_daft(folder / "pictures", tmp_path / "table.parquet", folder / "model", **options)
        assert "\n" not in str(raised.value)
    with pytest.raises(RetrievalError, match=r"is there already, made with .*modalities=\['image', 'text'\], now"):
        embed_with_daft(folder / "pictures", folder / "plain.parquet", folder / "model", text_column="text")
    assert not list(tmp_path.iterdir()) and not list(folder.glob("*.parts"))


GROWTH = """
import sys
from mome.retrieval import items
from mome.retrieval.embed_daft import embed_with_daft
from mome.retrieval import embed_daft
if __name__ == "__main__":
    source, output, model, block = sys.argv[1:]
    embed_daft.BLOCK_ROWS = int(block)
    written, plain = [], embed_daft.write_items
    def noting(items, folder):
        count, unread = plain(items, folder)
        written.append(count)
        return count, unread
    embed_daft.write_items = noting
    report = embed_with_daft(source, output, model, runner="native", batch_size=4)
    print(written, report.rows, report.resumed, report.dropped, report.bad)
"""


@pytest.mark.parametrize("name", ["table.parquet", "table"])
def test_a_table_grows_with_daft_and_by_either_way(folder, tmp_path, name):
    pictures, output = tmp_path / "pictures", tmp_path / name
    paths = make_pictures(pictures, 9)
    (tmp_path / "job.py").write_text(GROWTH)
    arguments = [str(pictures), str(output), str(folder / "model")]

    def run(block):
        command = [sys.executable, tmp_path / "job.py", *arguments, str(block)]
        done = subprocess.run(command, env={**os.environ, **QUIET}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()[-1]

    assert run(4) == "[4, 4, 1, 0] 9 0 0 0"  # in blocks
    os.utime(paths[0])
    paths[1].unlink()
    paths[2].rename(pictures / "renamed.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    draw((1, 2, 3), 99).save(pictures / "new.png")
    assert run(100) == "[2, 0] 9 8 1 1"
    report = embed_corpus(*arguments, progress=False)
    assert (report.rows, report.resumed, report.bad) == (9, 9, 1)
    embed_corpus(arguments[0], tmp_path / "anew.parquet", arguments[2], progress=False)
    for left, right in zip(load_table(output).rows, load_table(tmp_path / "anew.parquet").rows, strict=True):
        vectors = left.pop("embedding"), right.pop("embedding")
        assert left | NOT_COMPARED == right | NOT_COMPARED
        assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)
