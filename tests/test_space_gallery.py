"""The Space's gallery, what its tabs show, and the folder that is pushed."""

import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from gradio_client import Client, handle_file
from PIL import Image

from mome_space import zero_gpu
from mome_space.engine import Engine, RoutedTokens
from mome_space.explained import EDGE, GROUND, INSIDE, explain, patch_kinds, shared_information
from mome_space.gallery import GALLERY_FILE, Embeddings, Gallery, Index
from mome_space.loading import HUB_CHECKPOINT, checkpoint_source, load_checkpoint
from mome_space.routing import HARD, Routing
from mome_space.search import Search
from space_server import SPACE, small_gallery, tiny_engine, tiny_index, write_picture

ROOT = SPACE.parent
EVERYTHING = {"sets": [], "styles": []}


# ------------------------------------------------------------------------------------------ gallery and embeddings


def test_names_without_a_known_word_are_embedded_but_not_counted():
    engine, pictures = tiny_engine(), [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    embeds, of_image, of_text = engine.embed_pairs(pictures, ["a cat", "xyzzy"])
    one, one_image, one_text = engine.embed_pairs(pictures[:1], ["a cat"])
    assert len(embeds) == 2 and np.allclose(embeds[:1], one, atol=1e-5)
    assert np.array_equal(of_text, one_text) and of_image.sum() == 2 * one_image.sum()


def test_embeddings_of_the_same_weights_are_read_and_of_others_made_anew(tmp_path):
    engine = tiny_engine()
    gallery = small_gallery(tmp_path)
    made = tiny_index(tmp_path, engine)
    made.embeddings.save(tmp_path / "shipped.npz", made.fingerprint)
    same = Index(engine, gallery, shipped=tmp_path / "shipped.npz", cache=tmp_path / "other")
    assert same.ready
    np.testing.assert_allclose(same.embeddings.images, made.embeddings.images, atol=1e-3)
    np.testing.assert_allclose(same.embeddings.image_shares, made.embeddings.image_shares)
    with torch.no_grad():
        engine.model.model.image_projection.weight[0, 0] += 1
    changed = Index(engine, gallery, shipped=tmp_path / "shipped.npz", cache=tmp_path / "other")
    assert not changed.ready and changed.fingerprint != made.fingerprint
    changed.build()
    kept = Index(engine, gallery, shipped=tmp_path / "shipped.npz", cache=tmp_path / "other")
    assert kept.ready and not np.allclose(kept.embeddings.images, made.embeddings.images, atol=1e-3)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive"])
def test_a_damaged_embeddings_file_counts_as_none(damage, tmp_path):
    (tmp_path / "broken.npz").write_bytes(damage)
    assert Embeddings.load(tmp_path / "broken.npz", "any") is None


def test_search_waits_for_the_gallery_and_tells_how_far_it_is(tmp_path):
    index = Index(tiny_engine(), small_gallery(tmp_path), shipped=tmp_path / "no.npz", cache=tmp_path / "cache")
    told = []
    threading.Timer(0.8, index.build).start()
    index.wait(lambda share, desc: told.append((share, desc)))
    assert index.ready and told[0] == (0, f"Embedding the gallery, once: 0 of {len(index.gallery)} pictures")


def test_a_gallery_that_can_not_be_embedded_is_an_error_in_words(tmp_path, monkeypatch):
    index = Index(tiny_engine(), small_gallery(tmp_path), shipped=tmp_path / "no.npz", cache=tmp_path / "cache")
    monkeypatch.setattr(index.engine, "embed_pairs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.build()
    with pytest.raises(gr.Error, match="nothing to search"):
        index.wait()


def test_the_shares_of_the_gallery_are_those_of_its_pictures(tmp_path):
    engine = tiny_engine()
    index = tiny_index(tmp_path, engine)
    known = [
        bool(set(entry.name.split()) & set(engine.processor.tokenizer.get_vocab())) for entry in index.gallery.entries
    ]
    routed = [engine.route(entry.open(), entry.name * own) for own, entry in zip(known, index.gallery.entries)]
    image = np.mean([each.shares(4) for each, _ in routed], axis=0)  # as many patches in each picture
    np.testing.assert_allclose(index.embeddings.image_shares, image, atol=1e-5)
    tokens = np.concatenate(
        [each.experts.reshape(len(each.experts), -1) for own, (_, each) in zip(known, routed) if own], axis=1
    )
    text = np.stack([np.bincount(layer, minlength=4) / len(layer) for layer in tokens])
    np.testing.assert_allclose(index.embeddings.text_shares, text, atol=1e-5)


def test_a_hit_that_is_searched_by_is_shown_with_its_licence_and_not_among_the_hits(tmp_path):
    search = Search(tiny_index(tmp_path, tiny_engine()))
    query = search.of_hit(3)
    entry = search.gallery.entries[3]
    hits = search.find(query, [], [], 12)
    assert len(hits) == 12 and entry not in [hit for hit, _ in hits]
    shown = search.render(query, hits)
    detail = shown[: shown.index("mome-hits")]
    assert entry.license in detail and entry.author.split()[0] in detail and entry.set in detail
    with pytest.raises(gr.Error):
        search.of_hit(10**6)


def test_every_set_of_the_gallery_is_credited():
    gallery = Gallery(GALLERY_FILE)
    credited = (SPACE / "ATTRIBUTION.md").read_text()
    assert len(gallery) >= 3000 and set(gallery.sets) == {"Freehand color icons", "Health Icons"}
    assert not [entry.set for entry in gallery.entries if entry.set not in credited]
    assert all(entry.license and entry.author and entry.id for entry in gallery.entries)
    assert all(url == "" or url.startswith("http") for entry in gallery.entries for url in (entry.set_url,))


def test_the_embeddings_that_come_with_it_are_of_the_shipped_weights_so_that_it_starts_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("MOME_CHECKPOINT", raising=False)
    index = Index(Engine(*load_checkpoint()), Gallery(GALLERY_FILE), cache=tmp_path)
    assert index.ready and index.embeddings.images.shape == (len(index.gallery), index.engine.config.projection_dim)
    assert index.embeddings.image_shares.shape == (index.engine.config.num_hidden_layers, 4)
    entry = index.gallery.entries[100]
    np.testing.assert_allclose(index.engine.embed_images([entry.open()])[0], index.embeddings.images[100], atol=2e-3)
    assert f"{len(index.gallery):,} openly licensed icons" in (SPACE / "README.md").read_text()
    assert f"{len(index.gallery):,} icons" in (ROOT / "README.md").read_text()


# --------------------------------------------------------------------------------------------------- what is shown


def test_routing_of_a_dense_model_says_that_the_modality_alone_decides(tmp_path):
    engine = tiny_engine(experts_per_group=1, experts_per_token=1, expert_intermediate_size=None)
    routing = Routing(engine, tiny_index(tmp_path, engine))
    routed = routing.routed(str(write_picture(tmp_path / "a.png")), "a dog")
    assert (routed.image.experts == 0).all() and (routed.text.weights == 1).all()
    shown = routing.render(routed, 2)
    assert "16 to image" in shown and "(gallery" not in shown and "modality alone decides" in HARD
    assert "image 2" not in shown and ">image 1<" not in shown
    with pytest.raises(gr.Error):
        routing.render(routed, 3)


def test_patches_are_told_apart_as_ground_edges_and_insides():
    picture = Image.new("RGB", (80, 80), (250, 250, 250))
    picture.paste((20, 20, 200), (20, 20, 60, 60))  # of 4 × 4 patches, the four in the middle
    picture.paste((20, 20, 200), (10, 0, 11, 80))  # a thin line through the first column
    kinds = patch_kinds(picture, 4).reshape(4, 4)
    assert (kinds[1:3, 1:3] == INSIDE).all() and (kinds[:, 0] == EDGE).all() and (kinds[[0, 3], 1:] == GROUND).all()
    dark = Image.eval(picture, lambda value: 255 - value)
    assert (patch_kinds(dark, 4).reshape(4, 4) == kinds).all()
    assert (patch_kinds(Image.new("RGB", (9, 9), "red"), 4) == GROUND).all()


def test_a_line_says_who_takes_what_and_where_it_is_clearest():
    kinds = np.array([GROUND, GROUND, GROUND, EDGE, EDGE, INSIDE])
    #         [CLS], then the patches: the first layer tells nothing apart, the second all kinds but one patch
    experts = np.array([[0, 1, 1, 1, 1, 1, 1], [0, 2, 2, 0, 1, 1, 3]])[..., None]
    image = RoutedTokens("image", list("cabcdef"), experts, np.ones(experts.shape))
    text = RoutedTokens(
        "text", ["[BOS]", "a", "tent", "a"], np.array([[2, 0, 3, 0], [2, 1, 1, 1]])[..., None], np.ones((2, 4, 1))
    )
    told = explain(image, text, kinds, 0, lambda group, expert: f"{group} {expert + 1}")
    assert told[0] == (
        "Plain ground: all to image 2 (3 of 3 patches); edges and lines: all to image 2 (2 of 2 patches); "
        "plain insides: all to image 2 (1 of 1 patches)."
    )
    assert told[1:] == [
        "The experts tell these kinds of patch apart best in layer 2.",
        "Text 1 takes “a”; text 4 takes “tent”.",
    ]
    told = explain(image, text, kinds, 1, lambda group, expert: f"{group} {expert + 1}")
    assert told[0].startswith("Plain ground: mostly to image 3 (2 of 3 patches); edges and lines: all to image 2")
    assert told[1].endswith("best in this layer.") and told[2] == "Text 2 takes “a”, “tent”."
    assert shared_information(kinds, experts[0, 1:, 0]) == pytest.approx(0, abs=1e-9)
    assert shared_information(kinds[:4], np.array([0, 0, 1, 1])) == pytest.approx(0.311278, abs=1e-5)


def test_data_is_escaped_where_it_is_shown(tmp_path):
    engine = tiny_engine()
    routing = Routing(engine, tiny_index(tmp_path, engine))
    routed = routing.routed(str(write_picture(tmp_path / "a.png")), "dog")
    routed.text.tokens[1] = "<b>${alert(1)}</b>"
    shown = routing.render(routed, 1)
    assert "<b>" not in shown and "${" not in shown


def test_every_model_call_of_a_visitor_runs_on_the_lent_gpu(tmp_path, monkeypatch):
    calls = []

    def lend(duration):
        def decorate(function):
            def call(*args, **kwargs):
                calls.append(function.__name__)
                return function(*args, **kwargs)

            return call

        return decorate

    monkeypatch.setattr(zero_gpu, "spaces", SimpleNamespace(GPU=lend))
    engine = tiny_engine()
    index = tiny_index(tmp_path, engine)
    Search(index).of_words("cat")
    Routing(engine, index).routed(str(write_picture(tmp_path / "a.png")), "")
    assert calls == ["embed_texts", "caption", "route"]


# ------------------------------------------------------------------------------------------------------- the folder


def test_the_pins_of_the_space_are_those_that_the_tests_run_with():
    constraints = set((ROOT / "constraints.txt").read_text().splitlines())
    pinned = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if "==" in line]
    assert len(pinned) > 6 and not [line for line in pinned if line not in constraints]
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert f"gradio=={front['sdk_version']}" in pinned
    assert front["models"] == [HUB_CHECKPOINT.partition("@")[0]] and "@" in HUB_CHECKPOINT
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).exists()
    assert {"title", "python_version", "models", "license"} <= set(front)


@pytest.mark.parametrize("given", ["nowhere", "owner/name", "a/b/c@main", "/no/such/folder"])
def test_a_checkpoint_that_is_no_folder_needs_a_revision(given, monkeypatch):
    monkeypatch.setenv("MOME_CHECKPOINT", given)
    with pytest.raises(ValueError, match=f"MOME_CHECKPOINT='{given}' is no folder"):
        checkpoint_source()


def test_a_checkpoint_is_a_folder_or_a_revision_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("MOME_CHECKPOINT", str(tmp_path))
    assert checkpoint_source() == (str(tmp_path), None)
    monkeypatch.setenv("MOME_CHECKPOINT", "owner/name@abc123")
    assert checkpoint_source() == ("owner/name", "abc123")


def test_it_needs_nothing_of_the_repository_and_writes_only_to_its_temp_folder(tmp_path):
    """The folder alone, started as on the Hub, with a checkpoint whose code lies beside its weights."""
    engine = tiny_engine()
    engine.model.save_pretrained(tmp_path / "checkpoint")
    engine.processor.save_pretrained(tmp_path / "checkpoint")
    copy, home, temp = tmp_path / "space", tmp_path / "home", tmp_path / "temp"
    home.mkdir(), temp.mkdir()
    subprocess.run(["cp", "-r", SPACE, copy], check=True)
    small_gallery(copy)
    before = sorted(path for path in copy.rglob("*") if "__pycache__" not in path.parts)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "GRADIO_"))}
    environment |= {"HOME": str(home), "TMPDIR": str(temp), "MOME_CHECKPOINT": str(tmp_path / "checkpoint")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.modules['mome'] = None; import app; app.main()"],
        cwd=copy,
        env=environment,
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        url = _wait_for_url(tmp_path / "log", process)
        assert urllib.request.urlopen(url).status == 200
        client = Client(url, verbose=False, download_files=False)
        hits = client.predict(query="cat", image=None, count=5, **EVERYTHING, api_name="/search")
        file = handle_file(write_picture(tmp_path / "picture.png"))
        client.predict(image=file, labels="cat\ndog", templates="", api_name="/classify")
    finally:
        process.terminate()
        process.wait(30)
    assert len(hits) == 5
    assert not list(home.rglob("*")), "written to the home folder"
    assert sorted(path for path in copy.rglob("*") if "__pycache__" not in path.parts) == before
    assert list(temp.glob("mome-space-*/embeddings/*.npz")) and list(temp.glob("mome-space-*/modules/*"))


def _wait_for_url(log: Path, process: subprocess.Popen, seconds: float = 600) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"http://[\d.]+:\d+", log.read_text())
        if found:
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"the Space did not start:\n{log.read_text()}")
