"""Folders with pictures that need more than Pillow, and with what is none."""

import pytest
from PIL import Image

from mome import svg_mome
from mome.data.images import image_suffixes
from mome.retrieval.folder import list_folder


def test_every_file_of_a_mixed_folder_is_embedded_named_or_counted(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    folder = tmp_path / "icons"
    folder.mkdir()
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M1 1h{}v7z"/></svg>'
    for number in range(300):
        kind, picture = number % 6, Image.new("RGB", (9, 9), (number % 256, 90, 7))
        if kind == 0:
            (folder / f"{number}.svg").write_text(drawing.format(1 + number / 60))
        elif kind == 1:
            picture.save(folder / f"{number}.png")
        elif kind == 2:
            picture.save(folder / f"{number}.webp")
        elif kind == 3:
            (folder / f"{number}.png").write_bytes(b"\x89PNG broken")
        elif kind == 4:
            (folder / f"{number}.png").symlink_to(folder / f"{number - 4}.svg" if number % 4 else tmp_path / "gone")
        else:
            (folder / (f"{number}.txt" if number % 2 else f"{number}")).write_text("words")
    listing = list_folder(folder)
    assert len(listing.images) + sum(listing.left_out.values()) == 300
    assert listing.left_out[".txt files"] == 50
    monkeypatch.setattr(svg_mome.importlib.util, "find_spec", lambda name: None)
    image_suffixes.cache_clear()
    without = list_folder(folder)
    image_suffixes.cache_clear()
    assert without.left_out['.svg files (SVG needs resvg-py: pip install resvg-py, or "mome[svg]")'] == 50
