"""Checkpoints of the Hub: downloaded file by file through huggingface_hub, against a Hub on the loopback interface."""

import json
import socket
import time

import huggingface_hub
import pytest

from loopback_hub import LoopbackHub
from mome.convert.hub import CheckpointFiles, HubFiles, checkpoint_files
from mome.errors import ConversionError

REPO = "ada/model"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB


def point_to(url: str, monkeypatch):
    """What environment variables set before an import; here the import is long done."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LoopbackHub({"right": "ada", "other": "bob"}) as hub:
        point_to(hub.url, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "some"}))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def error_of(call) -> str:
    with pytest.raises(ConversionError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_are_downloaded_only_when_they_are_asked_for(hub, folder):
    hub.add(REPO, folder)
    files = checkpoint_files(REPO)
    assert isinstance(files, HubFiles) and not hub.requests
    assert files.json(files.need("config.json")) == {"model_type": "some"}
    assert files.find("tokenizer.json") is None and files.find("tokenizer.json", "config.json").name == "config.json"
    assert not any("safetensors" in path for method, path in hub.requests if method == "GET")
    assert files.weights()[0].read_bytes() == WEIGHTS
    assert "no preprocessor_config.json: gone" in error_of(lambda: files.need("preprocessor_config.json", hint="gone"))


def test_all_files_come_from_one_commit_and_a_revision_can_be_pinned(hub, folder):
    first = hub.add(REPO, folder)
    files = checkpoint_files(REPO)
    files.need("config.json")
    assert files.revision == first
    (folder / "model.safetensors").write_bytes(b"another")
    second = hub.add(REPO, folder)
    assert files.weights()[0].read_bytes() == WEIGHTS  # main has moved on in the meantime
    assert checkpoint_files(REPO).weights()[0].read_bytes() == b"another"
    assert checkpoint_files(REPO, first).weights()[0].read_bytes() == WEIGHTS and first != second


def test_a_download_that_breaks_off_is_resumed(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.add(REPO, folder)
    hub.cut["*/model.safetensors"] = 400_000
    assert checkpoint_files(REPO).weights()[0].read_bytes() == WEIGHTS
    downloads = [path for method, path in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert len(downloads) == 2 and hub.ranges == ["bytes=400000-"]


def test_what_was_downloaded_is_there_without_a_network(hub, folder, monkeypatch):
    hub.add(REPO, folder)
    for name in ("config.json", "model.safetensors"):
        checkpoint_files(REPO).need(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    files = checkpoint_files(REPO)
    assert files.need("config.json") and files.weights()[0].read_bytes() == WEIGHTS
    assert files.find("tokenizer.json") is None and len(hub.requests) == asked
    assert "not in the cache, and HF_HUB_OFFLINE is set" in error_of(
        lambda: checkpoint_files("ada/new").need("a.json")
    )
    assert "in the cache, and HF_HUB_OFFLINE is set: lost" in error_of(lambda: files.need("spiece.model", hint="lost"))


def test_a_private_repository_takes_a_token(hub, folder, monkeypatch):
    hub.add(REPO, folder, private=True)
    message = error_of(lambda: checkpoint_files(REPO).need("config.json"))
    assert "neither a folder nor a repository on the Hub that you can read" in message and "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "right")
    assert checkpoint_files(REPO).need("config.json")


def test_what_the_hub_refuses_is_one_line(hub, folder, monkeypatch):
    message = error_of(lambda: checkpoint_files("ada/nobody").need("config.json"))
    assert "checkpoint ada/nobody is neither a folder nor a repository" in message
    hub.add(REPO, folder, gated=True)
    message = error_of(lambda: checkpoint_files(REPO).need("config.json"))
    assert f"checkpoint {REPO} is gated: accept its terms at {hub.url}/{REPO}" in message
    hub.add("ada/open", folder)
    message = error_of(lambda: checkpoint_files("ada/open", "v9").need("config.json"))
    assert "checkpoint ada/open has no revision 'v9'" in message
    monkeypatch.setenv("HF_TOKEN", "right")
    hub.fail["GET", "*/config.json"] = 9
    message = error_of(lambda: checkpoint_files(REPO).need("config.json"))
    assert f"checkpoint {REPO}: the Hub did not send config.json" in message and "500" in message


def test_no_network_is_one_line(hub, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries
        message = error_of(lambda: checkpoint_files(REPO).need("config.json"))
    assert (
        f"checkpoint {REPO}: config.json is not in the cache, and the Hub can't be reached: check the network"
        in message
    )


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "what is this", "owner/..name"])
def test_what_can_be_no_id_is_not_looked_up(name, hub):
    assert f"checkpoint {name} does not exist: pass a folder" in error_of(lambda: checkpoint_files(name))
    assert not hub.requests


def test_a_folder_gives_its_files_parts_of_weights_included(folder):
    files = checkpoint_files(folder)
    assert type(files) is CheckpointFiles and files.weights() == [folder / "model.safetensors"]
    assert "is a folder, which has no revisions" in error_of(lambda: checkpoint_files(folder, "main"))
    assert "is a file: pass a folder" in error_of(lambda: checkpoint_files(folder / "config.json"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "no weights: expected model.safetensors or" in error_of(files.weights)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no model-00002-of-00002.safetensors: model.safetensors.index.json names it" in error_of(files.weights)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"part")
    assert [path.name for path in files.weights()] == sorted(index["weight_map"].values())
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "model.safetensors.index.json is no index" in error_of(files.weights)
    (folder / "config.json").write_text("{")
    assert "config.json can't be read" in error_of(lambda: files.json(files.need("config.json")))
    (folder / "config.json").write_text("[]")
    assert "config.json holds no JSON object" in error_of(lambda: files.json(files.need("config.json")))
