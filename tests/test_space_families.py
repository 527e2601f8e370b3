"""The Space with a converted SigLIP or CoCa: every tab works or is not there."""

import contextlib

import numpy as np
import pytest
from gradio_client import Client, handle_file
from test_coca_checkpoints import GOLDEN, save_clip_tokenizer, write_upstream

from app import build_demo, launch
from mome.convert.__main__ import main as convert
from mome_space.loading import has_learnt_captions, load_engine
from mome_space.routing import Routing
from siglip_models import save_siglip
from space_server import Served, tiny_index, write_picture

SEARCH = {"query": "a red square", "image": None, "count": 3, "sets": [], "styles": []}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    save_siglip(folder / "upstream-siglip")
    write_upstream(folder / "upstream-coca", {**GOLDEN, "vocab": 560, "texts": 16})
    save_clip_tokenizer(folder / "upstream-coca")
    for kind in ("siglip", "coca"):
        command = [kind, "--checkpoint", str(folder / f"upstream-{kind}"), "--output", str(folder / kind)]
        assert convert(command) == 0
    return folder


@contextlib.contextmanager
def serve(engine, folder):
    index = tiny_index(folder, engine)
    demo = build_demo(engine.model, engine.processor, index)
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        yield Served(url, engine, index), demo
    finally:
        demo.close(verbose=False)


def engine_of(folder, monkeypatch):
    monkeypatch.setenv("MOME_CHECKPOINT", str(folder))
    return load_engine()


def tabs_of(demo) -> list[str]:
    parts = demo.get_config_file()["components"]
    return [part["props"]["id"] for part in parts if part["type"] == "tabitem"]


def text_of(demo) -> str:
    parts = demo.get_config_file()["components"]
    return "\n".join(part["props"]["value"] for part in parts if part["type"] == "markdown")


def check_search_and_labels(client, space, picture):
    hits = client.predict(**SEARCH, api_name="/search")
    cosines = space.index.embeddings.images @ space.engine.embed_texts([SEARCH["query"]])[0]
    best = np.argsort(-cosines)[:3]
    assert [hit["id"] for hit in hits] == [space.index.gallery.entries[number].id for number in best]
    assert client.predict(query="", image=handle_file(picture), count=3, sets=[], styles=[], api_name="/search")
    answer = client.predict(image=handle_file(picture), labels="red\nsquare", templates="{}", api_name="/classify")
    assert {each["label"] for each in answer} == {"red", "square"}


def test_a_coca_captions_and_has_no_routing(checkpoints, tmp_path, monkeypatch):
    picture = write_picture(tmp_path / "picture.png")
    with serve(engine_of(checkpoints / "coca", monkeypatch), tmp_path) as (space, demo):
        assert tabs_of(demo) == ["search", "caption", "classify", "about"]
        assert "A contrastive captioner" in text_of(demo) and "routing" not in text_of(demo)
        client = Client(space.url, verbose=False)
        assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/search", "/caption", "/classify"}
        check_search_and_labels(client, space, picture)
        guidance = {"rerank_weight": 0.5, "contrastive_weight": 1.0}
        asked = {"images": [handle_file(picture)], "prompt": "a", "candidates": 2, "api_name": "/caption"}
        (answer,) = client.predict(**asked, guidance_scale=1, **guidance)
        assert len(answer["unguided"]) == len(answer["guided"]) == 2
        with pytest.raises(Exception, match="no caption without a picture, so that classifier-free γ must be 1"):
            client.predict(**asked, guidance_scale=2, **guidance)
        sliders = {part["props"].get("elem_id"): part["props"] for part in demo.get_config_file()["components"]}
        assert not sliders["caption-guidance_scale"]["visible"] and sliders["caption-rerank_weight"]["visible"]


def test_a_siglip_shows_its_experts_and_has_no_captions(checkpoints, tmp_path, monkeypatch):
    picture = write_picture(tmp_path / "picture.png")
    with serve(engine_of(checkpoints / "siglip", monkeypatch), tmp_path) as (space, demo):
        assert tabs_of(demo) == ["search", "classify", "routing", "about"]
        assert "is a SigLIP as" in text_of(demo) and "caption" not in text_of(demo).split("```")[0]
        client = Client(space.url, verbose=False)
        assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/search", "/classify", "/routing"}
        check_search_and_labels(client, space, picture)
        asked = {"image": handle_file(picture), "api_name": "/routing"}
        answer = client.predict(**asked, caption="a red square")
        patches = space.engine.config.grid_size**2
        assert len(answer["image"]["tokens"]) == patches  # no [CLS]
        with pytest.raises(Exception, match="The caption is empty: type a few words"):
            client.predict(**asked, caption="")
        shown = Routing(space.engine, space.index).show({"path": str(picture)}, "a red square", 2)[1]
        assert shown.count("<rect") == patches and f"row {space.engine.config.grid_size}, column" in shown


def test_a_routed_siglip_explains_every_patch(checkpoints, tmp_path, monkeypatch):
    routed = tmp_path / "routed"
    command = ["mome", "--checkpoint", str(checkpoints / "siglip"), "--experts-per-group", "3"]
    assert convert([*command, "--output", str(routed)]) == 0
    engine = engine_of(routed, monkeypatch)
    index, patches = tiny_index(tmp_path, engine), engine.config.grid_size**2
    routing = Routing(engine, index)
    picture = write_picture(tmp_path / "picture.png")
    shown = routing.show({"path": str(picture)}, "a red square", 1)[1]
    assert shown.count("<rect") == patches and f"of {patches} patches" in shown


def test_the_card_tells_whether_captions_were_learnt(checkpoints, tmp_path, monkeypatch):
    for name, expected in (("siglip", False), ("coca", True)):
        monkeypatch.setenv("MOME_CHECKPOINT", str(checkpoints / name))
        assert has_learnt_captions() is expected
    for text, expected in (("no front matter", True), ("---\npipeline_tag: image-feature-extraction\n---\n", False)):
        (tmp_path / "README.md").write_text(text)
        monkeypatch.setenv("MOME_CHECKPOINT", str(tmp_path))
        assert has_learnt_captions() is expected
    (tmp_path / "README.md").unlink()
    assert has_learnt_captions()
