"""What visitors bring to the static page, and how: pictures of odd kinds, drops, the clipboard, the keyboard alone."""

import io
import struct
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

import static_page
from mome.embedder import Embedder
from static_page import (
    CHECKPOINT,
    SVG,
    drawn,
    drop,
    encoded,
    needs_chromium,
    needs_onnx,
    needs_packages,
    search,
    wait_until_loaded,
)
from test_space_browser import CHROMIUM, FLAGS, TIMEOUT, Visit

pytestmark = [needs_packages, needs_onnx, needs_chromium]
LEAST_COSINE = 0.999

# In the page: a file of its bytes → its size as it was read, and its embedding.
EMBED = """async ({name, data}) => {
  const [{readPicture}, {engine}] = await Promise.all(["pictures", "app"].map((module) => import(`./${module}.js`)));
  const picture = await readPicture(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
  const size = [picture.width, picture.height];
  return {size, embedding: Array.from((await engine.embedImage(picture)).embedding)};
}"""
# In the page: an event with data of other programs, {type: text}, and files → whether the page took it.
GIVE = """({event, selector, texts, files}) => {
  const data = new DataTransfer();
  for (const [type, text] of Object.entries(texts)) data.setData(type, text);
  for (const {name, type, data: bytes} of files) {
    data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, {type}));
  }
  const made = event === "paste"
    ? new ClipboardEvent(event, {clipboardData: data, bubbles: true, cancelable: true})
    : new DragEvent(event, {dataTransfer: data, bubbles: true, cancelable: true});
  return !document.querySelector(selector).dispatchEvent(made);
}"""


@pytest.fixture(scope="module")
def url():
    static_page.build()
    with static_page.served() as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=TIMEOUT)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visit(browser, url):
    visit = Visit(browser, url, viewport={"width": 1280, "height": 900})
    wait_until_loaded(visit.page)
    yield visit
    visit.context.close()


@pytest.fixture
def page(visit) -> Page:
    visit.page.keyboard.press("Escape")
    search(visit.page, "syringe")
    return visit.page


def give(page: Page, event: str, selector: str = "body", texts=None, files=()) -> bool:
    """Hands data to the page as another program would; whether the page, not the browser, deals with it."""
    given = [{"name": name, "type": kind, "data": encoded(data)} for name, kind, data in files]
    return page.evaluate(GIVE, {"event": event, "selector": selector, "texts": texts or {}, "files": given})


def is_like_a_picture(page: Page, words: str = "like your picture"):
    expect(page.locator("#status")).to_contain_text(words, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def png() -> bytes:
    return packed(drawn((200, 30, 30, 255)), "PNG")


def packed(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------- odd pictures


@cache
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((700, 450), Image.Resampling.BICUBIC)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def of_16_bits(*channels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write in colour."""
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[len(channels)]
    values = np.stack(channels, -1).astype(">u2")
    height, width = values.shape[:2]
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in values)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )


@cache
def odd_pictures() -> dict[str, bytes]:
    wide = photo().resize((250, 200))
    values = np.asarray(wide, dtype=np.uint16) * 257
    red, green, blue = values[..., 0], values[..., 1], values[..., 2]
    frames = [drawn((20, 20, 60, 255)), drawn((200, 20, 60, 255), box=(0.2, 0.2, 0.5, 0.5))]
    moving = {"save_all": True, "append_images": frames[1:], "duration": 50}
    return {
        "wide.png": packed(photo().resize((10000, 20)), "PNG"),
        "wider-than-a-canvas.png": packed(photo().resize((70000, 3)), "PNG"),
        "taller-than-a-canvas.png": packed(photo().resize((3, 70000)), "PNG"),
        "one-pixel.png": packed(Image.new("RGB", (1, 1), "red"), "PNG"),
        "many-pixels.jpg": packed(photo().resize((5200, 4000)), "JPEG", quality=80),
        "cmyk.jpg": packed(photo().convert("CMYK"), "JPEG", quality=95),
        **{f"turned-{each}.jpg": packed(photo(), "JPEG", quality=95, exif=turned(each)) for each in range(2, 9)},
        "turned.png": packed(photo(), "PNG", exif=turned(6)),
        "grey-16.png": of_16_bits(red),
        "grey-alpha-16.png": of_16_bits(red, (green > 30000) * 65535),
        "colour-16.png": of_16_bits(red, green, blue),
        "colour-alpha-16.png": of_16_bits(red // 4, green // 4, blue // 4, (green > 30000) * 65535),
        "moving.gif": packed(frames[0], "GIF", disposal=2, **moving),
        "moving.webp": packed(frames[0], "WEBP", lossless=True, **moving),
        "moving.png": packed(frames[0], "PNG", **moving),
        "utf-16.svg": ("<?xml version='1.0' encoding='utf-16'?>" + SVG).encode("utf-16"),
        "a-picture-called.svg": packed(photo(), "PNG"),
        "a-drawing-called.png": SVG.encode(),
    }


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.load(CHECKPOINT, "cpu")


@pytest.mark.parametrize("name", odd_pictures())
def test_an_odd_picture_is_embedded_as_in_python(visit, embedder, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(odd_pictures()[name])
    found = visit.page.evaluate(EMBED, {"name": name, "data": encoded(path.read_bytes())})
    ours, theirs = embedder.embed_images([str(path)])[0].numpy(), np.array(found["embedding"])
    assert theirs @ ours / np.linalg.norm(theirs) >= LEAST_COSINE, found["size"]


@pytest.mark.parametrize(
    "name, data",
    [
        ("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(2000)),
        ("empty.png", b""),
        ("cut.jpg", odd_pictures()["cmyk.jpg"][:9000]),
        ("page.html", b"<html><body>a bee</body></html>"),
        ("packed.svgz", b"\x1f\x8b\x08 and no more"),
    ],
)
def test_what_cannot_be_read_is_told_by_name_and_nothing_else_changes(page, visit, name, data):
    before = page.locator("#hits .name").all_inner_texts()
    drop(page, name, data)
    expect(page.locator("#status")).to_contain_text(f"“{name}” is", timeout=TIMEOUT)
    assert page.locator("#hits .name").all_inner_texts() == before
    assert visit.wrong == []


@pytest.mark.parametrize("name", ["a-drawing-called.png", "utf-16.svg", "cmyk.jpg", "wider-than-a-canvas.png"])
def test_what_is_shown_of_a_picture_is_what_was_read(page, name):
    drop(page, name, odd_pictures()[name])
    is_like_a_picture(page)
    shown = page.locator("#asked canvas")
    expect(shown).to_be_visible()
    drawn_on = "(c) => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert shown.evaluate(drawn_on) > 1


# ------------------------------------------------------------------------------------- drops and the clipboard


def test_of_several_files_the_first_picture_is_searched_by(page, png):
    files = [("notes.txt", "text/plain", b"a bee"), ("mine.png", "image/png", png), ("other.png", "image/png", png)]
    assert give(page, "drop", files=files)
    is_like_a_picture(page, "like your picture, one of 3 files")
    expect(page.locator("#asked")).to_contain_text("mine.png")


def test_a_dropped_folder_is_told(page, visit, tmp_path):
    (tmp_path / "icons").mkdir()
    (tmp_path / "icons" / "one.png").write_bytes(b"")
    session = visit.context.new_cdp_session(page)
    data = {"items": [], "files": [str(tmp_path / "icons")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})
    expect(page.locator("#status")).to_contain_text("is a folder", timeout=TIMEOUT)
    expect(page.locator("#drop")).to_be_hidden()


def test_dropped_words_are_searched_for_and_a_dropped_link_does_not_leave_the_page(page):
    assert give(page, "drop", texts={"text/plain": "umbrella"})
    expect(page.locator("#status")).to_contain_text("for “umbrella”", timeout=TIMEOUT)
    link = {"text/uri-list": "http://127.0.0.1:9/bee.png", "text/plain": "http://127.0.0.1:9/bee.png"}
    assert give(page, "dragover", texts=link) and give(page, "drop", texts=link)
    expect(page.locator("#status")).to_contain_text("opens no links", timeout=TIMEOUT)
    assert not give(page, "drop", "#words", {"text/plain": "umbrella"})  # there the browser puts the words


def test_a_pasted_picture_is_searched_by_but_not_the_picture_of_pasted_words(page, png):
    picture = [("image.png", "image/png", png)]
    assert give(page, "paste", "#words", {"text/html": "<img>"}, picture)  # a picture of another page
    is_like_a_picture(page)
    search(page, "syringe")
    words = {"text/html": "<b>bee</b>", "text/plain": "bee"}
    assert not give(page, "paste", "#words", words, picture)  # of an office program, which adds a picture
    assert not give(page, "paste", "#words", {"text/plain": "bee"})
    page.locator("#hits button").first.click()
    assert give(page, "paste", "#detail", {}, picture)
    is_like_a_picture(page)
    expect(page.locator("#detail")).to_be_hidden()


def test_a_picture_that_is_read_late_does_not_replace_what_was_asked_for_since(page, png):
    page.evaluate(
        """() => {
          const read = window.createImageBitmap;
          const wait = new Promise((resolve) => (window.letRead = resolve));
          window.createImageBitmap = async (...given) => {
            window.createImageBitmap = read;
            await wait;
            return read(...given);
          };
        }"""
    )
    drop(page, "slow.png", png)
    page.wait_for_function("() => !String(window.createImageBitmap).includes('wait')")
    search(page, "umbrella")
    page.evaluate("() => window.letRead()")
    drop(page, "broken.png", b"\x89PNG")  # is read behind it
    expect(page.locator("#status")).to_contain_text("“broken.png” is", timeout=TIMEOUT)
    assert page.locator("#asked").is_hidden() and page.locator("#words").input_value() == "umbrella"


# ----------------------------------------------------------------------------------------------------- keyboard


def test_the_focus_stays_where_one_is(page):
    cards, focused = page.locator("#hits button"), "() => document.activeElement.closest('#hits, #words, #more')?.id"
    cards.nth(2).focus()
    page.keyboard.press("Enter")
    page.locator("#detail").get_by_role("button", name="Find similar").press("Enter")
    expect(page.locator("#status")).to_contain_text("like “", timeout=TIMEOUT)
    expect(cards.first).to_be_focused()
    page.locator("#more").press("Enter")
    expect(cards).to_have_count(120)
    expect(cards.nth(60)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(cards.nth(61)).to_be_focused()
    assert page.locator("#hits button[tabindex='0']").count() == 1
    page.get_by_role("button", name="Clear").press("Enter")
    expect(page.locator("#words")).to_be_focused()
    search(page, "umbrella")
    assert page.evaluate(focused) == "words"


def test_every_control_has_a_name_and_no_icon_is_read_out(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a")]
          .filter((each) => each.checkVisibility())
          .filter((each) => !(each.textContent.trim() || each.ariaLabel || each.title || each.labels?.length))
          .map((each) => each.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("svg").count() and page.locator("svg:not([aria-hidden='true'])").count() == 0


def test_what_is_typed_while_it_loads_is_embedded_once(browser, url):
    context = browser.new_context(service_workers="block")
    page = context.new_page()
    waiting = []
    page.route("**/text_model*", lambda route: waiting.append(route))
    page.goto(url)
    page.evaluate(
        """async () => {
          const {engine} = await import("./app.js");
          const embed = engine.embedText.bind(engine);
          window.embedded = [];
          engine.embedText = (text) => (window.embedded.push(text), embed(text));
        }"""
    )
    expect(page.locator("#status")).to_contain_text("3,219 icons", timeout=TIMEOUT)
    for words in ("um", "umbr", "umbrella"):
        page.locator("#words").fill(words)
        page.keyboard.press("Enter")
    page.wait_for_timeout(300)  # the pause after which what was typed is searched for
    assert waiting
    waiting[0].continue_()
    expect(page.locator("#status")).to_contain_text("for “umbrella”", timeout=TIMEOUT)
    assert page.evaluate("() => window.embedded")[-1] == "umbrella"
    assert set(page.evaluate("() => window.embedded")) == {"umbrella"}
    context.close()


def test_a_long_word_does_not_widen_the_page(page):
    word = "x" * 190
    page.set_viewport_size({"width": 390, "height": 844})
    try:
        page.goto(page.url.partition("#")[0] + f"#q={word}")
        expect(page.locator("#status")).to_contain_text("xxx", timeout=TIMEOUT)
        drop(page, f"{word}.png", b"no picture")
        expect(page.locator("#status")).to_contain_text("is not a picture", timeout=TIMEOUT)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    finally:
        page.set_viewport_size({"width": 1280, "height": 900})
