"""The static page with the shipped weights, built once, served on this machine; and inputs to try it with."""

import base64
import contextlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect

import serve_page
from test_space_browser import CHROMIUM, TIMEOUT
from vendor_packages import is_vendored

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "space-static"
CHECKPOINT = ROOT / "checkpoints" / "mome-icons"
ONNX = ("onnx", "onnxscript", "onnxruntime")

needs_packages = pytest.mark.skipif(
    not is_vendored(), reason="no JavaScript packages: python space-static/vendor_packages.py downloads them"
)
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ONNX)), reason="onnx, onnxscript and onnxruntime are not installed"
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path fill="currentColor" '
    'd="M12 2a9 9 0 0 1 9 9h-8v8a2.5 2.5 0 0 1-5 0h1.6a.9.9 0 0 0 1.8 0v-8H3a9 9 0 0 1 9-9z"/></svg>'
)  # an umbrella
WORDS = "bee|house|heartAttack|circusTent|arrowUpLeft|camera5G|PhoneCallIncoming|user-plus|Wi-Fi|snake_case|iPhone"
ODD = (
    "HelloWorld|XMLHttpRequest|naïve café|Zürich|crème brûlée|ñandú|Łódź|Øre|İstanbul|ß|ẞ|ﬁsh|e\u0301|o\u0308|Å|½|x²"
    "|①|Ⅳ|㎏|"
    "😀 cat|a 👩‍👩‍👧 family|❤️ heart|👍🏽|🇩🇪 flag|1️⃣|rocket🚀ship"
    "|☎️ phone|🏳️‍🌈|don't|don’t|it's 5 o'clock|“quoted”|a — b|… wait|"
    "C++|c#|50%|$5|foo/bar|foo(bar)|a.b|@home|#tag|a`b|~x|&amp;|R&B|tab\tnew\nline|  spaces  |UPPER CASE|a1b2|v2.0|"
    "3D|HTML5Parser|PDFFile|t-shirt|T shirt|x ray|e mail|wi fi|[BOS] bee|<image> cat|[MASK]"
    "|日本語|Привет|عربى|हिन्दी|한국어|"
    "a\u200bb|a\u00a0b|a\ufe0fb|the red|black and white|" + "a very long text " * 9
)


def texts() -> list[str]:
    """Two hundred texts and more: plain, odd, in all cases."""
    words = WORDS.split("|")
    made = [
        f"{start} {word}" for start in ("a", "an icon of", "three RED", "🚀", "très", "in the", "my") for word in words
    ]
    made += [word.upper() for word in words] + [word.lower() for word in words] + [word * 3 for word in words]
    made += [f"{one} {other}" for one, other in zip(words, words[1:])]
    return [*words, *ODD.split("|"), *made]


def build() -> None:
    """Makes vendor/'s companion, data/, unless it is there; the workers of pytest-xdist wait for each other."""
    (ROOT / ".cache").mkdir(exist_ok=True)
    with FileLock(ROOT / ".cache" / "static-page.lock"):
        command = [sys.executable, "space-static/build_page.py"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@contextlib.contextmanager
def served(folder: Path = PAGE) -> Iterator[str]:
    """The address of the page."""
    server = serve_page.server(0, folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wait_until_loaded(page: Page):
    expect(page.locator("#place")).to_have_text("Works offline", timeout=TIMEOUT)


def search(page: Page, words: str):
    page.locator("#words").fill(words)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text(f"for “{words}”", timeout=TIMEOUT)


def drop(page: Page, name: str, data: bytes):
    """Lets a file fall on the page, as from a visitor's folder."""
    transfer = page.evaluate_handle(
        """({name, data}) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
          return transfer;
        }""",
        {"name": name, "data": encoded(data)},
    )
    for event in ("dragover", "drop"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_pictures(folder: Path) -> dict[str, Path]:
    """Pictures of every kind that is prepared in its own way: name → file."""
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 255, (90, 130, 3), dtype=np.uint8))
    photo = noise.resize((700, 450), Image.Resampling.BICUBIC)
    pictures = {
        "photo": photo,
        "small": photo.resize((33, 20)),
        "large": photo.resize((2000, 1500)),
        "exact": photo.resize((64, 64)),
        "grey": photo.convert("L"),
        "palette": photo.quantize(16),
        "dark-ink": drawn((20, 20, 60, 255)),
        "light-ink": drawn((250, 250, 240, 255)),
        "large-light-ink": drawn((250, 250, 240, 255), side=900),
        "faint-ink": drawn((0, 0, 0, 90)),
        "light-with-outline": drawn((250, 250, 240, 255), outline=(0, 0, 0, 255)),
        "margins": drawn((200, 30, 30, 255), ground=(255, 255, 255, 255), box=(0.4, 0.45, 0.65, 0.6)),
        "margins-of-colour": drawn((0, 0, 0, 255), ground=(90, 160, 220, 255), box=(0.1, 0.2, 0.3, 0.7), side=250),
        "framed-hole": framed(),
        "nothing": Image.new("RGBA", (80, 80), (0, 0, 0, 0)),
    }
    paths = {}
    for name, picture in pictures.items():
        paths[name] = folder / f"{name}.png"
        picture.save(paths[name])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    paths["turned"] = folder / "turned.jpg"
    photo.save(paths["turned"], quality=95, subsampling=0, exif=exif)
    return paths


def drawn(ink, ground=(0, 0, 0, 0), box=(0.1, 0.15, 0.9, 0.8), side: int = 200, outline=None) -> Image.Image:
    """A shape with a hole on a ground, `box` in shares of the side."""
    picture = Image.new("RGBA", (side, side), ground)
    left, top, right, bottom = (round(share * side) for share in box)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((left, top, right, bottom), fill=ink, outline=outline, width=side // 20)
    middle = ((left + right) / 2, (top + bottom) / 2)
    draw.polygon([middle, (right, bottom), (left, bottom)], fill=ground if outline is None else outline)
    return picture


def framed(side: int = 200) -> Image.Image:
    """Light ink around a hole, within a dark frame that borders on nothing but the picture's edge."""
    picture = Image.new("RGBA", (side, side), (20, 20, 60, 255))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((30, 30, side - 31, side - 31), fill=(250, 250, 240, 255))
    draw.ellipse((60, 60, side - 61, side - 61), fill=(0, 0, 0, 0))
    return picture
