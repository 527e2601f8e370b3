"""The static page as a visitor sees it, in headless Chromium, and its model beside the one in Python.

With MOME_SCREENSHOTS=folder, the page is also drawn, at desktop and phone width, light and dark.
"""

import gzip
import json
import platform
import re
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from playwright.sync_api import Page, expect, sync_playwright

import static_page
from models import tiny_captioner
from mome.embedder import Embedder
from mome.export.modules import CaptionStep, ImageTower, TextTower
from static_page import (
    CHECKPOINT,
    PAGE,
    SVG,
    drop,
    encoded,
    needs_chromium,
    needs_onnx,
    needs_packages,
    search,
    wait_until_loaded,
)
from test_space_browser import CHROMIUM, FLAGS, TIMEOUT, Visit

pytestmark = [needs_packages, needs_onnx]
LEAST_COSINE = 0.999
WITHOUT_SIMD = "--js-flags=--no-enable-sse4-1"  # what it needs on x86
IDENTICAL = 0.99999
GALLERY = PAGE.parent / "space" / "gallery.parquet"
TOWERS = {"text": "text", "image": "vision"}
FIRST_ICONS = {
    "syringe": "syringe",
    "umbrella": "umbrella",
    "fingerprint": "fingerprint",
    "circus tent": "circus tent",
}

# In the page: a file of its bytes → what becomes of it.
PREPARE = """async ({name, data}) => {
  const [{readPicture}, {toPixelValues}, {engine}] = await Promise.all(
    ["pictures", "pixels", "app"].map((module) => import(`./${module}.js`)));
  const {images} = await (await fetch("data/manifest.json")).json();
  const picture = await readPicture(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
  return {
    pixels: Array.from(toPixelValues(picture.data, picture.width, picture.height, images)),
    embedding: Array.from((await engine.embedImage(picture)).embedding),
  };
}"""
READ = """async (texts) => {
  const {engine} = await import("./app.js");
  const read = [];
  for (const text of texts) {
    try {
      const {ids, cut, embedding} = await engine.embedText(text);
      read.push({ids, cut, embedding: Array.from(embedding)});
    } catch (error) {
      read.push({refused: error.message});
    }
  }
  return read;
}"""
RUN = r"""async ({text, image, decoder, rows, pixels, side, captions}) => {
  const [runtime, {Captioner, ImageTower, prepareRuntime, TextTower}, {isGzipped, unpack}] = await Promise.all(
    ["vendor/ort.wasm.min.mjs", "model.js", "download.js"].map((module) => import(`./${module}`)));
  const bytes = async (source) => {
    const file = /^(data|vendor)\//.test(source)
      ? new Uint8Array(await (await fetch(source)).arrayBuffer())
      : Uint8Array.from(atob(source), (c) => c.charCodeAt(0));
    return isGzipped(file) ? unpack(file) : file;
  };
  prepareRuntime(runtime, await bytes("vendor/ort-wasm-simd-threaded.wasm.gz"), 1);
  const texts = await TextTower.load(runtime, await bytes(text), null, {});
  const images = await ImageTower.load(runtime, await bytes(image), {width: side, height: side});
  const answer = {texts: [], images: []};
  for (const each of rows) answer.texts.push(Array.from((await texts.run(each)).data));
  for (const each of pixels) {
    const values = Float32Array.from(each);
    answer.images.push(Array.from((await images.run(values, values.length / (3 * side * side))).data));
  }
  if (captions) {
    const captioner = await Captioner.load(runtime, await bytes(decoder), images, null, captions);
    answer.captions = [];
    for (let from = 0; from < pixels[1].length; from += 3 * side * side) {
      const values = Float32Array.from(pixels[1].slice(from, from + 3 * side * side));
      answer.captions.push(await captioner.write(values));
    }
  }
  return answer;
}"""


@cache
def embedder() -> Embedder:
    return Embedder.load(CHECKPOINT)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=TIMEOUT)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url():
    static_page.build()
    with static_page.served() as url:
        yield url


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return static_page.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def visit(browser, url):
    started = time.perf_counter()
    visit = Visit(browser, url, viewport={"width": 1280, "height": 900})
    visit.context.on("request", lambda request: visit._check(request.url, url))
    expect(visit.page.locator("#status")).to_contain_text("3,219 icons", timeout=TIMEOUT)
    shown = time.perf_counter() - started
    search(visit.page, "syringe")
    print(f"icons after {shown:.1f} s, the first hits after {time.perf_counter() - started:.1f} s")
    wait_until_loaded(visit.page)
    yield visit
    visit.context.close()


def names(page: Page) -> list[str]:
    return page.locator("#hits .name").all_inner_texts()


def cosines(one, other) -> np.ndarray:
    one, other = (np.asarray(each, dtype=np.float64) for each in (one, other))
    return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


# ------------------------------------------------------------------------------------------------------- search


@needs_chromium
def test_words_find_the_icons_that_have_them_for_a_name(visit):
    for words, name in FIRST_ICONS.items():
        search(visit.page, words)
        assert names(visit.page)[0] == name
    milliseconds = re.search(r"([\d,]+) ms", visit.page.locator("#status").inner_text())
    print(f"a search takes {milliseconds[1]} ms")


@needs_chromium
def test_what_is_typed_is_searched_for_without_enter(visit):
    visit.page.locator("#words").fill("fingerprint")
    expect(visit.page.locator("#status")).to_contain_text("for “fingerprint”", timeout=TIMEOUT)


@needs_chromium
def test_words_that_the_model_does_not_know_are_refused_and_long_ones_cut(visit):
    visit.page.locator("#words").fill("слон")
    expect(visit.page.locator("#status")).to_contain_text("knows no word of “слон”", timeout=TIMEOUT)
    assert names(visit.page) == []
    visit.page.locator("#words").fill("a red and green and blue and black and white bird on a house of stone and wood")
    expect(visit.page.locator("#status")).to_contain_text("only the beginning was read", timeout=TIMEOUT)


@needs_chromium
def test_a_dropped_picture_and_a_dropped_drawing_find_icons_like_them(visit):
    page = visit.page
    gallery_icon = (PAGE.parent / "space" / "examples" / "2-typewriter.png").read_bytes()
    drop(page, "mine.png", gallery_icon)
    expect(page.locator("#status")).to_contain_text("like your picture", timeout=TIMEOUT)
    expect(page.locator("#asked")).to_contain_text("mine.png")
    assert names(page)[0] == "typewriter"
    search(page, "syringe")
    drop(page, "mine.svg", SVG.encode())
    expect(page.locator("#status")).to_contain_text("like your picture", timeout=TIMEOUT)
    assert "umbrella" in names(page)[:3]
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#status")).to_have_text("3,219 icons")


@needs_chromium
def test_what_is_no_picture_is_refused_in_words(visit):
    page = visit.page
    whole = (PAGE.parent / "space" / "examples" / "3-eye.png").read_bytes()
    for name, data in (("cut.png", whole[:50]), ("notes.txt", b"a bee"), ("broken.svg", b"<svg><path></svg>")):
        drop(page, name, data)
        expect(page.locator("#status")).to_contain_text(f"“{name}” is", timeout=TIMEOUT)
    drop(page, "sizeless.svg", b'<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0h9v9z"/></svg>')
    expect(page.locator("#status")).to_contain_text("does not say how large it is", timeout=TIMEOUT)


@needs_chromium
def test_styles_narrow_what_is_shown(visit):
    page = visit.page
    search(page, "syringe")
    page.locator("#style").select_option(label="hand-drawn")
    expect(page.locator("#hits .name").first).not_to_have_text("syringe", timeout=TIMEOUT)  # a set of other styles
    page.locator("#hits button").first.click()
    expect(page.locator("#detail")).to_contain_text("hand-drawn")
    page.keyboard.press("Escape")
    page.locator("#style").select_option(label="any")
    expect(page.locator("#hits .name").first).to_have_text("syringe", timeout=TIMEOUT)


@needs_chromium
def test_it_can_be_used_by_the_keyboard_alone(visit):
    page = visit.page
    page.locator("#style").focus()
    page.keyboard.press("/")
    expect(page.locator("#words")).to_be_focused()
    search(page, "wheelchair")
    cards = page.locator("#hits button")
    cards.first.focus()
    page.keyboard.press("ArrowRight")
    expect(cards.nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    expect(cards.first).to_be_focused()
    page.keyboard.press("Enter")
    detail = page.locator("#detail")
    expect(detail.get_by_role("heading")).to_have_text(names(page)[0])
    for fact in ("Resolve to Save Lives", "MIT", "Health Icons"):
        expect(detail).to_contain_text(fact)
    detail.get_by_role("button", name="Copy name").press("Enter")
    expect(detail.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == names(page)[0]
    with page.expect_download() as download:
        detail.get_by_role("link", name="Save PNG").press("Enter")
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    visit.draw("static-detail")
    page.keyboard.press("Escape")
    expect(cards.first).to_be_focused()
    page.keyboard.press("Enter")
    detail.get_by_role("button", name="Find similar").click()
    expect(page.locator("#status")).to_contain_text("like “wheelchair”", timeout=TIMEOUT)


# ------------------------------------------------------------------------------------------- the same as in Python


@needs_chromium
def test_ids_and_embeddings_of_texts_are_those_of_python(visit):
    texts = static_page.texts()
    assert len(texts) >= 200
    tokenizer = embedder().processor.tokenizer
    limit, wordless = embedder().longest_text, {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    expected = [tokenizer(text, max_length=limit, truncation=True)["input_ids"] for text in texts]
    read = visit.page.evaluate(READ, texts)
    for text, ids, found in zip(texts, expected, read):
        if set(ids) <= wordless:
            assert "knows no word" in found["refused"], text
        else:
            assert found["ids"] == ids, text
    known = [(text, found) for text, found in zip(texts, read) if "ids" in found]
    assert any(found["cut"] for _, found in known) and len(known) >= 200
    ours = embedder().embed_texts([text for text, _ in known]).numpy()
    assert cosines([found["embedding"] for _, found in known], ours).mean() >= LEAST_COSINE


@needs_chromium
def test_pixels_and_embeddings_of_pictures_are_those_of_python(visit, pictures):
    processor, found = embedder().processor.image_processor, {}
    for name, path in pictures.items():
        answer = visit.page.evaluate(PREPARE, {"name": path.name, "data": encoded(path.read_bytes())})
        ours = processor(str(path), return_tensors="np")["pixel_values"].ravel()
        # Levels of 255; a browser keeps colours times opacity, and has a decoder of its own for JPEG.
        apart = np.abs(np.array(answer["pixels"]) - ours).max() * 127.5
        assert apart <= (2.5 if name in ("faint-ink", "turned") else 0.01), (name, apart)
        found[name] = answer["embedding"]
    ours = embedder().embed_images([str(path) for path in pictures.values()]).numpy()
    similar = dict(zip(pictures, cosines(list(found.values()), ours)))
    assert np.mean(list(similar.values())) >= LEAST_COSINE, similar


@needs_chromium
def test_a_drawing_is_embedded_as_in_python(visit, tmp_path):
    path = tmp_path / "umbrella.svg"
    path.write_text(SVG)
    styled = SVG.replace("<path ", '<style>.ink { fill: #000 }</style><path style="stroke: none" class="ink" ')
    sized = SVG.replace("<svg ", '<svg width="10mm" height="15mm" ').replace(' xmlns="http://www.w3.org/2000/svg"', "")
    wide = SVG.replace("<svg ", '<svg width="100%" height="12" ')
    for data in (SVG, "\ufeff" + SVG, styled, sized, wide, gzip.compress(SVG.encode())):
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        answer = visit.page.evaluate(PREPARE, {"name": path.name, "data": encoded(path.read_bytes())})
        assert cosines(answer["embedding"], embedder().embed_images([str(path)]).numpy()[0]) >= LEAST_COSINE, data


class Batches:
    """Batches of 1, 3 and 32 texts of two lengths, and of as many pictures; what torch makes of them.

    With a captioner, also a caption for each picture of the second batch.
    """

    def __init__(self, model, files: dict[str, Path], side: int, captioner=None):
        entries = pq.read_table(GALLERY, columns=["name", "png"]).to_pylist()
        ids = embedder().processor.tokenizer(sorted({entry["name"] for entry in entries}))["input_ids"]
        rows = [
            torch.tensor([row for row in ids if len(row) == tokens][:count]) % model.config.vocab_size
            for count in (1, 3, 32)
            for tokens in (4, 6)
        ]
        pixels = [
            self.pixels([entry["png"] for entry in entries[7 : 7 + 50 * count : 50]], side) for count in (1, 3, 32)
        ]
        with torch.no_grad():
            self.expected = {
                "texts": [model.get_text_features(each, torch.ones_like(each)).pooler_output for each in rows],
                "images": [model.get_image_features(each).pooler_output for each in pixels],
            }
        self.files = files
        self.request = {
            "rows": [each.tolist() for each in rows],
            "pixels": [each.flatten().tolist() for each in pixels],
            "side": side,
        }
        self.captions = None
        if captioner is not None:
            config, tokens = captioner.config, captioner.config.max_position_embeddings - 1
            settings = {"bos": config.bos_token_id, "ends": [config.eos_token_id], "most_tokens": tokens}
            self.request["captions"] = settings
            self.captions = [
                captioner.generate(pixel_values=each[None], do_sample=False, max_new_tokens=tokens)[0].tolist()
                for each in pixels[1]
            ]

    @staticmethod
    def pixels(files: list[bytes], side: int) -> torch.Tensor:
        """Icons (icons, 3, side, side), by the shipped processor."""
        size = {"height": side, "width": side}
        return embedder().processor.image_processor(files, size=size, return_tensors="pt")["pixel_values"]

    def check(self, answer: dict, least: float):
        for kind, batches in self.expected.items():
            for found, ours in zip(answer[kind], batches, strict=True):
                assert len(found) == ours.numel()
            similar = cosines(
                np.concatenate(answer[kind]).reshape(-1, batches[0].shape[1]), torch.cat(batches).numpy()
            )
            assert similar.mean() >= least, (kind, similar)
        assert answer.get("captions") == self.captions


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Batches:
    """A routed model of random weights in float32."""
    from mome.export.graphs import graph_of, save

    captioner, folder = tiny_captioner("routed"), tmp_path_factory.mktemp("tiny")
    model = captioner.model
    modules = {
        "text": TextTower(model),
        "image": ImageTower(model, key_values=True),
        "decoder": CaptionStep(captioner),
    }
    for name, module in modules.items():
        save(graph_of(module), folder / f"{name}.onnx")
    files = {name: folder / f"{name}.onnx" for name in modules}
    return Batches(model, files, model.config.image_size, captioner)


@pytest.fixture(scope="module")
def shipped(url) -> Batches:
    """The weights of the page, in int8."""
    files = {kind: PAGE / "data" / f"{tower}_model_quantized.onnx.gz" for kind, tower in TOWERS.items()}
    return Batches(embedder().model, files, embedder().config.image_size)


@pytest.mark.parametrize("which, least", [("tiny", IDENTICAL), ("shipped", LEAST_COSINE)])
def test_towers_give_in_node_what_torch_gives(url, request, which, least):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node on this machine")
    batches = request.getfixturevalue(which)
    asked = batches.request | {kind: str(path) for kind, path in batches.files.items()} | {"page": str(PAGE)}
    command = [node, str(Path(__file__).with_name("towers.mjs"))]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    batches.check(json.loads(done.stdout), least)


@needs_chromium
@pytest.mark.parametrize("which, least", [("tiny", IDENTICAL), ("shipped", LEAST_COSINE)])
def test_towers_give_in_the_browser_what_torch_gives(visit, request, which, least):
    batches = request.getfixturevalue(which)
    files = {
        kind: path.relative_to(PAGE).as_posix() if path.is_relative_to(PAGE) else encoded(path.read_bytes())
        for kind, path in batches.files.items()
    }
    batches.check(visit.page.evaluate(RUN, batches.request | files), least)


# ----------------------------------------------------------------------------------------------- whatever happens


@needs_chromium
def test_it_works_offline_after_the_first_visit(visit):
    page = visit.page
    visit.context.set_offline(True)
    try:
        page.reload()
        search(page, "umbrella")
        wait_until_loaded(page)
        assert names(page)[0] == "umbrella"
        drop(page, "mine.svg", SVG.encode())
        expect(page.locator("#status")).to_contain_text("like your picture", timeout=TIMEOUT)
    finally:
        visit.context.set_offline(False)


@needs_chromium
def test_nothing_went_wrong_and_no_request_left_the_machine(visit):
    assert visit.wrong == []
    assert visit.page.evaluate("() => crossOriginIsolated")  # without it there is only one thread
    refused = visit.page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    assert refused == "refused"
    assert any("Content Security Policy" in each for each in visit.wrong)
    visit.wrong.clear()


@needs_chromium
def test_a_browser_without_simd_is_told_so(browser, url):
    old = browser.browser_type.launch(executable_path=CHROMIUM, args=[*FLAGS, WITHOUT_SIMD], timeout=TIMEOUT)
    page = old.new_page()
    if platform.machine() not in ("x86_64", "AMD64"):
        page.add_init_script("WebAssembly.validate = () => false")
    page.goto(url)
    expect(page.locator("#problem")).to_contain_text("It has no WebAssembly SIMD", timeout=TIMEOUT)
    expect(page.locator("#loading")).to_be_hidden()
    old.close()


@needs_chromium
@pytest.mark.parametrize(
    "fault, told",
    [
        ({"status": 404}, "the server answers 404"),
        ({"body": b"\x1f\x8b short"}, "is cut off: 8 of"),
        ("abort", "could not be downloaded"),
    ],
    ids=["missing", "cut off", "no network"],
)
def test_a_failed_download_is_told(browser, url, fault, told):
    context = browser.new_context(service_workers="block")
    context.add_init_script("Object.defineProperty(navigator, 'hardwareConcurrency', {value: 3})")  # for two threads
    page = context.new_page()
    pattern = "**/text_model*"
    page.route(pattern, lambda route: route.abort() if fault == "abort" else route.fulfill(**fault))
    page.goto(url)
    problem = page.locator("#problem")
    expect(problem).to_contain_text("text_model_quantized.onnx", timeout=TIMEOUT)
    expect(problem).to_contain_text(told)
    if fault == "abort":
        page.unroute(pattern)
        with page.expect_navigation():
            problem.get_by_role("button", name="Try again").click()
        search(page, "umbrella")
        assert names(page)[0] == "umbrella"
        expect(problem).to_be_hidden()
        assert len(page.workers) == 2  # and the second thread
    context.close()


@needs_chromium
def test_a_file_with_other_content_is_not_run(browser, url):
    context = browser.new_context(service_workers="block")
    page = context.new_page()
    size = json.loads((PAGE / "data" / "manifest.json").read_text())["files"]["tokenizer"]["bytes"]
    page.route("**/tokenizer.json*", lambda route: route.fulfill(body=bytes(size)))
    page.goto(url)
    expect(page.locator("#problem")).to_contain_text("is not the file that belongs to this page", timeout=TIMEOUT)
    context.close()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device, width, height", [("phone", 390, 844), ("desktop", 1280, 900)])
def test_it_fits_every_screen_in_light_and_dark(visit, device, width, height, scheme):
    page, name = visit.page, f"static-{device}-{scheme}"
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)
    search(page, "farm animal")
    visit.draw(f"{name}-hits")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.locator("#hits button").first.click()
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
    visit.draw(f"{name}-detail")
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) / 3 < 100) == (scheme == "dark")
    page.locator("#detail").evaluate("(dialog) => dialog.close()")
    assert visit.wrong == []
