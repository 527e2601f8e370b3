"""The Space's API: what it answers, and what it refuses in which words."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import requests
import torch
from gradio_client import Client, handle_file
from PIL import Image

from mome.benchmarks import space as load_test
from mome_space import limits, uploads
from mome_space.search import API_HITS
from space_server import SPACE, served, tiny_engine, write_picture

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


def test_search_takes_words_or_a_picture_alone(client, space, tmp_path):
    words = {"query": "a red circle", "image": None, "count": API_HITS}
    everything = client.predict(**words, **EVERYTHING, api_name="/search")
    assert client.predict("a red circle", api_name="/search") == everything
    assert client.predict(query="a red circle", api_name="/search") == everything
    (tmp_path / "icon.png").write_bytes(space.index.gallery.entries[7].png)
    picture = {"image": handle_file(tmp_path / "icon.png")}
    found = client.predict(**picture, api_name="/search")
    assert found == client.predict(query="", count=API_HITS, **picture, **EVERYTHING, api_name="/search")
    assert found != everything


def test_captions_come_with_their_cosine_guided_and_not(client, space, picture):
    (answer,) = client.predict(images=[handle_file(picture)], prompt="a", candidates=2, api_name="/caption")
    image = space.engine.embed_images([Image.open(picture)])[0]
    for kind in ("unguided", "guided"):
        assert len(answer[kind]) == 2
        for caption in answer[kind]:
            assert caption["text"].startswith("a") and -1 <= caption["score"] <= 1
    unguided = space.engine.caption([space.engine.rgb(Image.open(picture))], "a", 2)[0]
    assert [each["text"] for each in answer["unguided"]] == [text for text, _ in unguided]
    for caption in answer["unguided"] + answer["guided"]:
        cosine = float(space.engine.embed_texts([caption["text"]])[0] @ image)
        assert caption["score"] == pytest.approx(cosine, abs=1e-3)


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


def test_the_load_test_asks_over_plain_http_for_the_same(space, client, picture, monkeypatch):
    monkeypatch.setattr(load_test, "WORDS", ["cat", "dog", "a red dot"])  # which the tiny model's tokenizer knows
    plain = load_test.PlainClient(space.url)
    medians = load_test.measure_single(space.url, rounds=1)
    assert set(medians) == set(load_test.MIX) and all(value > 0 for value in medians.values())
    asked = {"query": "", "image": handle_file(picture), "count": 3, **EVERYTHING, "api_name": "/search"}
    for hit in client.predict(**asked):
        assert hit["id"] in plain.predict(**asked)
    with pytest.raises(RuntimeError, match="/search answered"):
        plain.predict(query="", image=None, count=3, **EVERYTHING, api_name="/search")


def test_the_load_test_counts_what_was_answered_and_what_was_not(space, monkeypatch):
    monkeypatch.setattr(load_test, "MIX", {"search": 1, "classify": 1})
    monkeypatch.setattr(load_test, "WORDS", ["cat", "dog", "a red dot"])
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
    "large.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50 * 2**20)), "maximum file size"),
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


def test_a_client_of_its_own_can_not_send_more_than_the_limit(space):
    large = bytes(limits.FILE_BYTES + 2**20)
    response = requests.post(f"{space.url.rstrip('/')}/gradio_api/upload", files={"files": ("large.png", large)})
    assert response.status_code == 413 and "maximum allowed size" in response.text


def test_a_file_of_the_server_is_not_read(space, picture):
    """Beside gradio_client, which would upload the file itself."""
    root = f"{space.url.rstrip('/')}/gradio_api"

    def classified(path: str) -> str:
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "cat\ndog", ""]
        event = requests.post(f"{root}/call/classify", json={"data": data}).json()["event_id"]
        return requests.get(f"{root}/call/classify/{event}", timeout=120).text

    with picture.open("rb") as file:
        (uploaded,) = requests.post(f"{root}/upload", files={"files": file}).json()
    assert "event: complete" in classified(uploaded)
    for path in (str(picture), str(SPACE / "examples" / "1-circus-tent.png"), "/etc/hostname"):
        answer = classified(path)
        assert "event: error" in answer and "score" not in answer


def test_an_uploaded_name_can_not_smuggle_markup(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"")
    with pytest.raises(gr.Error) as caught:
        uploads.read_picture({"path": str(path), "orig_name": "<img src=x onerror=alert(1)>.png"}, drawing=None)
    assert "<img" not in caught.value.message and "&lt;img" in caught.value.message


def test_rotated_transparent_and_large_pictures_are_read(tmp_path):
    engine = tiny_engine()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "turned.jpg", exif=exif)
    turned = engine.rgb(uploads.read_picture(str(tmp_path / "turned.jpg"), engine.rgb))
    assert turned.height > turned.width and max(turned.size) <= uploads.LONGEST_SIDE
    Image.new("LA", (64, 64), (0, 0)).save(tmp_path / "clear.png")
    assert engine.rgb(uploads.read_picture(str(tmp_path / "clear.png"), engine.rgb)).getpixel((5, 5)) == (
        255,
        255,
        255,
    )


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


# ------------------------------------------------------------------------------------------------ where it runs

NAMELESS = """
import os, pwd

def nobody(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

pwd.getpwuid = nobody
import app
from mome_space import TEMP_FOLDER
from mome_space.loading import load_checkpoint

model, processor = load_checkpoint()
from huggingface_hub.constants import HF_HOME
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

default_cache_dir()
print(TEMP_FOLDER, HF_HOME, type(model).__name__)
"""


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users have numbers on POSIX systems alone")
@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_the_space_starts_under_a_user_without_a_name_and_a_home(tmp_path, home):
    gone = {"HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "HF_HOME", "HF_MODULES_CACHE", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(SPACE)} | ({"HOME": home} if home else {})
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", NAMELESS], cwd=tmp_path / "here", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    own = tmp_path / f"mome-space-{os.getuid()}"
    assert done.stdout.split() == [str(own), str(own / "huggingface"), "MomeForConditionalGeneration"]
    assert own.stat().st_mode & 0o077 == 0  # of this user alone
    assert not list((tmp_path / "here").iterdir())  # such as a folder called "~"
