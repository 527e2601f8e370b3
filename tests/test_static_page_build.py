"""How the static page is made: pinned packages, sizes, headers, and what the page could not imitate is refused."""

import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tarfile
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import build_page
import serve_page
import static_page
import vendor_packages
from models import tiny_captioner
from static_page import PAGE, needs_onnx, needs_packages
from vendor_packages import PACKAGES, Package

MEGABYTE = 10**6


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """An `npm` that packs a file of its own instead of what was asked for."""
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
        info = tarfile.TarInfo("package/dist/tokenizers.min.mjs")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"bad"))
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{tmp_path}/other.tgz" "$last"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_a_package_with_another_hash_is_refused(fake_npm, tmp_path):
    with pytest.raises(RuntimeError, match=r"onnxruntime-web@1\.\d+\.\d+ has the SHA-512 .*, not the pinned "):
        vendor_packages.vendor(PACKAGES[0], tmp_path)
    assert not (tmp_path / "ort.wasm.min.mjs").exists()


def test_a_failing_download_is_one_line(tmp_path):
    package = Package("@mome/../no-such-package", "0.0.0", "", {})
    with pytest.raises(RuntimeError, match=r"npm (pack .* failed: .+|is needed)"):
        vendor_packages.vendor(package, tmp_path)


def test_every_package_is_pinned_by_version_and_hash():
    for package in PACKAGES:
        assert re.fullmatch(r"\d+\.\d+\.\d+", package.version) and len(package.integrity) == 88


def test_a_space_sends_the_headers_that_we_test_with():
    front_matter = yaml.safe_load((PAGE / "README.md").read_text().split("---")[1])
    assert front_matter["sdk"] == "static"
    assert front_matter["custom_headers"] == {name.lower(): value for name, value in serve_page.HEADERS.items()}


@needs_packages
@needs_onnx
def test_the_page_keeps_to_its_sizes():
    static_page.build()
    manifest = json.loads((PAGE / "data" / "manifest.json").read_text())
    files = manifest["files"]
    for file in files.values():
        assert (PAGE / file["path"]).stat().st_size == file["bytes"]
    later = files["decoder_model_merged"]["bytes"]  # where a visitor asks for captions
    large = sum(file["bytes"] for name, file in files.items() if name != "runtime") - later
    code = files["runtime"]["bytes"] + sum(path.stat().st_size for path in build_page.page_files())
    assert large <= 30 * MEGABYTE and code <= 5 * MEGABYTE and later <= 16 * MEGABYTE


def test_only_a_captioner_gets_captions(tmp_path):
    assert build_page.writes_captions(static_page.CHECKPOINT)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MomeModel"]}))
    assert not build_page.writes_captions(tmp_path)


@pytest.mark.parametrize("ends, expected", [(None, []), (2, [2]), ([2, 7], [2, 7])])
def test_captions_end_where_the_checkpoints_do(ends, expected):
    model = tiny_captioner()
    model.generation_config.eos_token_id = ends
    settings = {"bos": model.config.bos_token_id, "ends": expected, "most_tokens": 16}
    assert build_page.caption_settings(model) == settings


def test_embeddings_survive_their_eight_bits():
    embeddings = np.random.default_rng(0).standard_normal((50, 256))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    data = build_page.quantized(embeddings)
    scales, values = np.frombuffer(data[:200], "<f4"), np.frombuffer(data[200:], np.int8).reshape(50, 256)
    restored = scales[:, None] * values
    restored /= np.linalg.norm(restored, axis=1, keepdims=True)
    assert (restored * embeddings).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"resample": 2}, "resample=2"),
        ({"do_center_crop": True}, "do_center_crop=True"),
        ({"size": {"shortest_edge": 64}}, "size="),
    ],
)
def test_a_processor_that_the_page_cannot_imitate_is_refused(changed, named):
    settings = {
        "resample": 3,
        "size": {"height": 64, "width": 64},
        "do_center_crop": False,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
    }
    processor = SimpleNamespace(image_processor=SimpleNamespace(to_dict=lambda: settings | changed))
    with pytest.raises(ValueError, match=re.escape(named)):
        build_page.image_settings(processor)


def test_without_packages_the_build_says_what_to_do(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'space-static'); import vendor_packages, pathlib\n"
        f"vendor_packages.STAMP = pathlib.Path({str(tmp_path)!r}) / 'none'\n"
        "import build_page; sys.argv = ['build_page.py']; build_page.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PAGE.parent, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("python space-static/vendor_packages.py")


def test_a_browser_that_leaves_in_the_middle_of_a_download_is_no_error(tmp_path, capfd):
    (tmp_path / "large").write_bytes(bytes(50 * MEGABYTE))
    with static_page.served(tmp_path) as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                client.sendall(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
                assert client.recv(1000).startswith(b"HTTP/1.0 200 OK")
        time.sleep(0.5)
        with urllib.request.urlopen(f"{url}large") as answer:  # and the server goes on
            assert len(answer.read()) == 50 * MEGABYTE
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_or_none_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(serve_page, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["serve_page.py"])
    with pytest.raises(SystemExit, match="^the page has no data yet: python space-static/build_page.py$"):
        serve_page.main()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    with static_page.served(tmp_path) as url:
        for port in (url.rstrip("/").rpartition(":")[2], "70000"):
            monkeypatch.setattr(sys, "argv", ["serve_page.py", "--port", port])
            with pytest.raises(SystemExit, match=rf"^port {port} can't be used, choose another --port: [^\n]+$"):
                serve_page.main()


@pytest.mark.parametrize("changed", [{"suppress_tokens": [7]}, {"min_length": 3}, {"guidance_scale": 1.5}])
def test_rules_of_captions_that_the_page_does_not_keep_to_are_refused(changed):
    model = tiny_captioner()
    build_page.caption_settings(model)
    model.generation_config.update(**changed)
    ((name, value),) = changed.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} of generation_config.json")):
        build_page.caption_settings(model)
