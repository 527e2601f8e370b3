"""The Space: what its API answers, what it refuses and in which words, and what it leaves behind."""

import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from gradio_client import Client, handle_file
from PIL import Image

from mome.benchmarks import space as load_test
from mome_space import limits, uploads, zero_gpu
from mome_space.gallery import GALLERY_FILE, Embeddings, Gallery, Index
from mome_space.routing import HARD, Routing
from mome_space.search import Search
from space_server import SPACE, served, small_gallery, tiny_engine, tiny_index, write_picture

ROOT = SPACE.parent
EVERYTHING = {"sets": [], "styles": []}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    with served(tmp_path_factory.mktemp("space")) as running:
        yield running


@pytest.fixture(scope="module")
def client(space):
    return Client(space.url, verbose=False)


@pytest.fixture
def picture(tmp_path):
    return write_picture(tmp_path / "picture.png")


# ------------------------------------------------------------------------------------------------ endpoints


def test_search_by_words_returns_the_nearest_pictures_in_order(client, space):
    hits = client.predict(query="a red circle", image=None, count=10, **EVERYTHING, api_name="/search")
    cosines = space.index.embeddings.images @ space.engine.embed_texts(["a red circle"])[0]
    best = np.argsort(-cosines)[:10]
    assert [hit["id"] for hit in hits] == [space.index.gallery.entries[number].id for number in best]
    np.testing.assert_allclose([hit["score"] for hit in hits], cosines[best], atol=1e-3)
    assert all(hit["license"] and hit["author"] and hit["image"].startswith("data:image/png;base64,") for hit in hits)


def test_search_by_a_picture_of_the_gallery_finds_it_first(client, space, tmp_path):
    entry = space.index.gallery.entries[7]
    (tmp_path / "icon.png").write_bytes(entry.png)
    hits = client.predict(
        query="", image=handle_file(tmp_path / "icon.png"), count=3, **EVERYTHING, api_name="/search"
    )
    assert hits[0]["score"] == pytest.approx(1, abs=1e-2)
    assert space.index.gallery.entries[7].id in [hit["id"] for hit in hits]


def test_filters_leave_only_their_sets_and_styles(client, space):
    entry = space.index.gallery.entries[0]
    asked = {"query": "dot", "image": None, "count": 90}
    of_set = client.predict(**asked, sets=[entry.set], styles=[], api_name="/search")
    assert {hit["set"] for hit in of_set} == {entry.set}
    of_style = client.predict(**asked, sets=[], styles=[entry.style], api_name="/search")
    assert {hit["style"] for hit in of_style} == {entry.style}
    assert len(client.predict(**asked, **EVERYTHING, api_name="/search")) == len(space.index.gallery)


def test_captions_come_with_their_cosine_guided_and_not(client, space, picture):
    (answer,) = client.predict(images=[handle_file(picture)], prompt="a", candidates=2, api_name="/caption")
    image = space.engine.embed_images([Image.open(picture)])[0]
    for kind in ("unguided", "guided"):
        assert len(answer[kind]) == 2
        for caption in answer[kind]:
            assert caption["text"].startswith("a") and -1 <= caption["score"] <= 1
    unguided = space.engine.caption([space.engine.rgb(Image.open(picture))], "a", 2)[0]
    assert [each["text"] for each in answer["unguided"]] == [text for text, _ in unguided]
    words = [text for text, _ in unguided if "[UNK]" not in text]
    for text, score in unguided:
        if text in words:
            assert score == pytest.approx(float(space.engine.embed_texts([text])[0] @ image), abs=0.02)


def test_without_guidance_only_unguided_captions_come(client, picture):
    neutral = {"rerank_weight": 0, "guidance_scale": 1, "contrastive_weight": 0}
    pictures = [handle_file(picture)] * 2
    answers = client.predict(images=pictures, candidates=1, **neutral, api_name="/caption")
    assert len(answers) == 2 and all(answer["guided"] is None for answer in answers)


def test_classification_gives_every_label_its_probability(client, space, picture):
    labels = ["cat", "dog", "red square"]
    answer = client.predict(
        image=handle_file(picture), labels="\n".join(labels), templates="{}\na {}", api_name="/classify"
    )
    scores = {each["label"]: each["score"] for each in answer}
    assert set(scores) == set(labels) and sum(scores.values()) == pytest.approx(1)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    embeds = sum(space.engine.embed_texts([template.format(label) for label in labels]) for template in ("{}", "a {}"))
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    cosines = torch.tensor(embeds @ space.engine.embed_images([Image.open(picture)])[0])
    expected = (cosines * space.engine.model.model.logit_scale.exp().item()).softmax(dim=0).tolist()
    assert [scores[label] for label in labels] == pytest.approx(expected, abs=1e-4)


def test_routing_tells_the_experts_that_the_model_chose(client, space, picture):
    answer = client.predict(image=handle_file(picture), caption="a red dot", api_name="/routing")
    inputs = space.engine.prepare(images=[Image.open(picture)], text=["a red dot"])
    with torch.no_grad():
        outputs = space.engine.model(**inputs, output_router_logits=True)
    assert answer["experts_per_group"] == 4 and answer["text"]["tokens"] == ["[BOS]", "a", "red", "dot", "[EOS]"]
    for layer, logits in enumerate(outputs.router_logits):
        for group in ("image", "text"):
            chosen = logits[group][0].topk(2).indices
            assert answer[group]["experts"][layer] == chosen.tolist()
            shares = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
            assert answer[group]["shares"][layer] == pytest.approx(shares.tolist(), abs=1e-3)
            weights = np.array(answer[group]["weights"][layer])
            assert weights.shape == (len(answer[group]["tokens"]), 2) and np.allclose(
                weights.sum(axis=1), 1, atol=1e-3
            )


def test_a_picture_without_a_caption_is_routed_with_the_model_s_own(client, space, picture):
    answer = client.predict(image=handle_file(picture), caption="", api_name="/routing")
    own = space.engine.caption([space.engine.rgb(Image.open(picture))], candidates=1)[0][0][0]
    assert answer["caption"] == own and len(answer["image"]["tokens"]) == 17


def test_many_clients_at_a_time_get_the_answers_of_one(client, space, picture):
    def ask(number: int):
        words = ["red", "blue dog", "a photo of the green line", "cat"][number % 4]
        found = client.predict(query=words, image=None, count=3, **EVERYTHING, api_name="/search")
        return words, [hit["id"] for hit in found]

    alone = dict(ask(number) for number in range(4))
    with ThreadPoolExecutor(8) as pool:
        for words, found in pool.map(ask, range(24)):
            assert found == alone[words]


def test_the_load_test_counts_what_was_answered_and_what_was_not(space, monkeypatch):
    monkeypatch.setattr(load_test, "MIX", {"search": 1, "classify": 1})
    load = load_test.Load(space.url, clients=2, seconds=2)
    assert abs(load.run(os.getpid())) < 10_000
    assert not load.failures and min(load.times["search"] + load.times["classify"]) > 0
    refused = {kind: lambda client, n: client.predict(query="", api_name="/search") for kind in ("search", "classify")}
    monkeypatch.setattr(load_test, "requests", lambda: refused)
    load.run(os.getpid())
    assert load.failures["search"]


# ----------------------------------------------------------------------------------------------- hostile uploads


def _bomb(path: Path):
    Image.new("1", (30_000, 30_000)).save(path)


def _truncated(path: Path):
    whole = write_picture(path, side=300).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


HOSTILE = {
    "truncated.png": (_truncated, "broken or cut off"),
    "bomb.png": (_bomb, "million pixels"),
    "script.svg": (
        lambda path: path.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
        "SVG",
    ),
    "svg.png": (lambda path: path.write_text('<?xml version="1.0"?><svg onload="alert(1)"/>'), "SVG"),
    "empty.png": (lambda path: path.write_bytes(b""), "empty"),
    "text.png": (lambda path: path.write_text("not a picture at all"), "no picture that can be read"),
    "large.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50 * 2**20)), "maximum allowed size"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_in_words_and_the_server_serves_on(name, client, picture, tmp_path):
    make, words = HOSTILE[name]
    make(tmp_path / name)
    calls = {
        "/classify": {"image": handle_file(tmp_path / name), "labels": "cat\ndog", "templates": ""},
        "/caption": {"images": [handle_file(tmp_path / name)]},
        "/search": {"query": "", "image": handle_file(tmp_path / name), "count": 3, **EVERYTHING},
        "/routing": {"image": handle_file(tmp_path / name), "caption": "cat"},
    }
    for endpoint, arguments in calls.items():
        with pytest.raises(Exception, match=words):
            client.predict(**arguments, api_name=endpoint)
        if "maximum" in words:
            break  # it never came past the upload, which all endpoints share
    assert client.predict(image=handle_file(picture), labels="cat\ndog", templates="", api_name="/classify")


def test_a_file_of_the_server_is_not_read(client, space):
    stolen = {"path": str(SPACE / "examples" / "1-pineapple.png"), "meta": {"_type": "gradio.FileData"}}
    outside = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    for file in (stolen, outside):
        with pytest.raises(Exception, match="exception|not uploaded"):
            client.predict(image=file, labels="cat\ndog", templates="", api_name="/classify")


def test_an_uploaded_name_can_not_smuggle_markup(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"")
    with pytest.raises(gr.Error) as caught:
        uploads.read_picture({"path": str(path), "orig_name": "<img src=x onerror=alert(1)>.png"})
    assert "<img" not in caught.value.message and "&lt;img" in caught.value.message


def test_rotated_transparent_and_large_pictures_are_read(tmp_path):
    engine = tiny_engine()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "turned.jpg", exif=exif)
    turned = engine.rgb(uploads.read_picture(str(tmp_path / "turned.jpg")))
    assert turned.height > turned.width and max(turned.size) <= uploads.LONGEST_SIDE
    Image.new("LA", (64, 64), (0, 0)).save(tmp_path / "clear.png")
    assert engine.rgb(uploads.read_picture(str(tmp_path / "clear.png"))).getpixel((5, 5)) == (255, 255, 255)


# ------------------------------------------------------------------------------------------------- other refusals

SEARCH = {"query": "cat", "image": None, "sets": [], "styles": [], "count": 3}
CLASSIFY = {"labels": "cat\ndog", "templates": ""}


@pytest.mark.parametrize(
    ("endpoint", "arguments", "words"),
    [
        ("/search", SEARCH | {"query": " "}, "is empty"),
        ("/search", SEARCH | {"query": "a" * 201}, "201 characters"),
        ("/search", SEARCH | {"sets": ["nowhere"]}, "nowhere"),
        ("/search", SEARCH | {"count": 10_000}, "10000"),
        ("/search", SEARCH | {"count": None}, "choose from 1"),
        ("/caption", {"images": []}, "no picture"),
        ("/caption", {"images": ["picture"] * 9}, "9 pictures are too many"),
        ("/caption", {"images": ["picture"], "candidates": 50}, "50"),
        ("/caption", {"images": ["picture"], "rerank_weight": -1}, "rerank weight"),
        ("/caption", {"images": ["picture"], "prompt": "a " * 30}, "tokens"),
        ("/classify", CLASSIFY | {"image": None}, "no picture"),
        ("/classify", CLASSIFY | {"image": "picture", "labels": "cat"}, "at least two labels"),
        ("/classify", CLASSIFY | {"image": "picture", "templates": "a photo"}, "has no"),
        ("/classify", CLASSIFY | {"image": "picture", "labels": "\n".join(map(str, range(101)))}, "101 labels"),
        ("/classify", CLASSIFY | {"image": "picture", "labels": "cat\n" + "a " * 30}, "tokens"),
        ("/routing", {"image": "picture", "caption": "a " * 30}, "tokens"),
    ],
)
def test_what_is_beyond_the_limits_is_refused_in_words(endpoint, arguments, words, client, picture):
    def given(value):
        if isinstance(value, list):
            return [given(each) for each in value]
        return handle_file(picture) if value == "picture" else value

    with pytest.raises(Exception, match=re.escape(words)):
        client.predict(**{name: given(value) for name, value in arguments.items()}, api_name=endpoint)


def test_limits_are_set_where_gradio_reads_them(space, client):
    config = client.config
    assert config["max_file_size"] == limits.FILE_BYTES
    assert config["analytics_enabled"] is False
    assert {each["api_name"] for each in config["dependencies"] if each["api_visibility"] == "public"} == {
        "search",
        "caption",
        "classify",
        "routing",
    }


# ------------------------------------------------------------------------------------------ gallery and embeddings


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
    routed = [engine.route(entry.open(), entry.name) for entry in index.gallery.entries]
    image = np.mean([each.shares(4) for each, _ in routed], axis=0)  # as many patches in each picture
    np.testing.assert_allclose(index.embeddings.image_shares, image, atol=1e-5)
    tokens = np.concatenate([each.experts.reshape(len(each.experts), -1) for _, each in routed], axis=1)
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
    assert len(gallery) >= 5000
    assert not [entry.set for entry in gallery.entries if entry.set not in credited]
    assert all(entry.license and entry.author and entry.id for entry in gallery.entries)
    assert all(url == "" or url.startswith("http") for entry in gallery.entries for url in (entry.set_url,))


# --------------------------------------------------------------------------------------------------- what is shown


def test_routing_of_a_dense_model_says_that_the_modality_alone_decides(tmp_path):
    engine = tiny_engine(experts_per_group=1, experts_per_token=1, expert_intermediate_size=None)
    routing = Routing(engine, tiny_index(tmp_path, engine))
    routed = routing.routed(str(write_picture(tmp_path / "a.png")), "a dog")
    assert (routed.image.experts == 0).all() and (routed.text.weights == 1).all()
    shown = routing.render(routed, 2)
    assert "16 to image" in shown and "image 1" not in shown and "modality alone decides" in HARD
    with pytest.raises(gr.Error):
        routing.render(routed, 3)


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
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).exists()
    assert {"title", "python_version", "models", "license"} <= set(front)


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


def _wait_for_url(log: Path, process: subprocess.Popen, seconds: float = 240) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"http://[\d.]+:\d+", log.read_text())
        if found:
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"the Space did not start:\n{log.read_text()}")
