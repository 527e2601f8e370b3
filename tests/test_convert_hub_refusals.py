"""What the Hub does not give `python -m mome.convert siglip` and `coca`: one line, and nothing half-written."""

import os
import socket
import time

import huggingface_hub
import pytest
from test_coca_checkpoints import GOLDEN, save_clip_tokenizer, write_upstream
from test_convert_hub import hub, point_to  # noqa: F401

from mome.convert.__main__ import main
from siglip_models import save_siglip

REPO = "ada/photographs"
KINDS = "siglip", "coca"
WEIGHTS = {"siglip": "model.safetensors", "coca": "open_clip_model.safetensors"}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    save_siglip(folder / "siglip")
    write_upstream(folder / "coca", {**GOLDEN, "vocab": 560, "texts": 16})
    save_clip_tokenizer(folder / "coca")
    return folder


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command and returns the line that it prints."""
    here = tmp_path / "here"
    here.mkdir()

    def run(kind: str, *options: str, repo: str = REPO) -> str:
        assert main([kind, "--checkpoint", repo, "--output", str(here / "out"), *options]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("mome.convert: ") and not os.listdir(here), lines
        return lines[0]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_that_is_not_there_or_not_open(kind, upstream, hub, refused, monkeypatch):  # noqa: F811
    hub.add(REPO, upstream / kind, gated=True)
    hub.add("ada/private", upstream / kind, private=True)
    hub.add("ada/open", upstream / kind)
    gated = f"checkpoint {REPO} is gated: accept its terms at {hub.url}/{REPO}"
    for token in (None, "other"):  # 401 and 403
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
        assert gated in refused(kind)
        for repo in ("ada/nobody", "ada/private"):
            assert f"checkpoint {repo} is neither a folder nor a repository" in refused(kind, repo=repo)
    assert "has no revision 'v9'" in refused(kind, "--revision", "v9", repo="ada/open")


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_without_what_it_takes(kind, upstream, hub, refused, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    hub.add(REPO, tmp_path / "empty")
    assert {"siglip": "has no config.json", "coca": "no tokenizer in ada/photographs: pass"}[kind] in refused(kind)
    other = "coca" if kind == "siglip" else "siglip"
    hub.add("ada/other", upstream / other)
    wrong = {"siglip": "has no config.json", "coca": "no tokenizer in ada/other"}
    assert wrong[kind] in refused(kind, repo="ada/other")
    if kind == "coca":
        assert "it is a SigLIP checkpoint: convert it with" in refused(kind, "--no-tokenizer", repo="ada/other")


@pytest.mark.parametrize("kind", KINDS)
def test_a_download_that_fails(kind, upstream, hub, refused, monkeypatch):  # noqa: F811
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries
    hub.add(REPO, upstream / kind)
    hub.fail["GET", f"*/{WEIGHTS[kind]}"] = 99
    assert f"checkpoint {REPO}: the Hub did not send {WEIGHTS[kind]}" in refused(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_no_network_and_offline(kind, upstream, hub, refused, monkeypatch):  # noqa: F811
    hub.add(REPO, upstream / kind)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "is not in the cache, and HF_HUB_OFFLINE is set: check the network, or pass a folder" in refused(kind)
    assert not hub.requests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        assert "is not in the cache, and the Hub can't be reached: check the network" in refused(kind)


def test_a_tokenizer_of_another_repository(upstream, hub, refused):  # noqa: F811
    hub.add(REPO, upstream / "coca", gated=False)
    hub.add("ada/words", upstream / "coca", gated=True)
    assert "checkpoint ada/words is gated" in refused("coca", "--tokenizer", "ada/words")
    assert "checkpoint ada/nobody is neither" in refused("coca", "--tokenizer", "ada/nobody")
    assert not any(path.endswith(WEIGHTS["coca"]) for method, path in hub.requests)  # before gigabytes are fetched
