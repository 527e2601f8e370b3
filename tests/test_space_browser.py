"""The Space as a visitor sees it, in headless Chromium: every tab's main action, nothing from elsewhere, no errors.

With MOME_SCREENSHOTS=folder, every tab is also drawn, at desktop and phone width, light and dark.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from space_server import served, write_picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EXPECTED_SKIPS = {"test_*": "no Chromium on this machine"}
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# Without these, Chromium itself looks for updates and safe-browsing lists.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
TIMEOUT = 120_000  # milliseconds; a busy machine


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    with served(tmp_path_factory.mktemp("space")) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=TIMEOUT)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [str(write_picture(folder / f"{seed}.png", seed)) for seed in (1, 2)]


class Visit:
    """A page, and what went wrong on it."""

    def __init__(self, browser: Browser, url: str, **options):
        self.context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        self.page, self.wrong = self.context.new_page(), []
        self.page.set_default_timeout(TIMEOUT)
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.wrong.append(f"page error: {error}"))
        self.page.on("request", lambda request: self._check(request.url, url))
        self.page.goto(url)

    def _note(self, message):
        if message.type == "error":
            self.wrong.append(f"console: {message.text}")

    def _check(self, requested: str, url: str):
        if not requested.startswith((url, "data:", "blob:")):
            self.wrong.append(f"request to {requested}")

    def draw(self, name: str):
        folder = os.environ.get("MOME_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def open(self, name: str):
        """A tab, which on a narrow screen may be in the menu of those that have no room."""
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():
            self.page.locator(".overflow-menu button").first.click()
            tab = self.page.locator(".overflow-dropdown button", has_text=name)
        tab.click()


@pytest.fixture(scope="module")
def visit(browser, space):
    visit = Visit(browser, space.url, viewport={"width": 1280, "height": 900})
    yield visit
    visit.context.close()


def upload(page: Page, component: str, files: str | list[str]):
    """Puts files into a component, in place of what it holds, and waits until it shows them."""
    clear = page.locator(f"#{component}").get_by_role("button", name="Clear")
    if clear.is_visible():
        clear.click()
    page.set_input_files(f"#{component} input[type=file]", files)
    expect(page.locator(f"#{component} img").first).to_be_visible(timeout=TIMEOUT)


def test_searching_by_words_then_by_a_hit_shows_its_licence_and_copies_its_name(visit, space):
    page = visit.page
    page.get_by_label("What do you look for?").fill("a red circle")
    page.keyboard.press("Enter")
    expect(page.locator("#search-results .mome-hit")).to_have_count(30, timeout=TIMEOUT)
    scores = [float(text) for text in page.locator("#search-results .mome-score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    first = page.locator("#search-results .mome-hit").first
    name = first.locator(".mome-name").inner_text()
    first.get_by_role("button", name="Copy the name").click()
    expect(first.locator(".copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == name
    with page.expect_download() as download:
        first.get_by_role("link").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    first.get_by_role("button", name="find pictures like it").press("Enter")  # with the keyboard
    detail = page.locator("#search-results .mome-detail")
    expect(detail.get_by_role("heading")).to_have_text(name, timeout=TIMEOUT)
    entry = next(entry for entry in space.index.gallery.entries if entry.name == name)
    expect(detail).to_contain_text(entry.license)
    expect(detail).to_contain_text(entry.author)
    visit.draw("desktop-search")


def test_an_example_is_searched_for_at_once(visit):
    visit.page.locator("#search-try").get_by_role("button", name="circus tent").click()
    among = visit.page.locator("#search-results .mome-status")
    expect(among).to_contain_text("circus tent", timeout=TIMEOUT)
    expect(visit.page.get_by_label("What do you look for?")).to_have_value("circus tent")


def test_filters_narrow_what_was_found(visit, space):
    page, entry = visit.page, space.index.gallery.entries[0]
    page.get_by_text("Filters", exact=True).click()
    page.locator("#search-styles input").click()
    page.get_by_role("option", name=entry.style, exact=True).click()
    of_style = sum(each.style == entry.style for each in space.index.gallery.entries)
    among = page.locator("#search-results .mome-status")
    expect(among).to_contain_text(re.compile(rf"^({of_style}|{of_style - 1}) of"), timeout=TIMEOUT)


def test_searching_by_a_dropped_picture(visit, pictures):
    upload(visit.page, "search-picture", pictures[0])
    expect(visit.page.locator("#search-results .mome-status")).to_contain_text("your picture", timeout=TIMEOUT)


def test_captions_of_several_pictures_guided_beside_unguided(visit, pictures):
    visit.open("Caption")
    upload(visit.page, "caption-pictures", pictures)
    visit.page.get_by_role("button", name="Caption", exact=True).click()
    captioned = visit.page.locator("#caption-results .mome-captioned")
    expect(captioned).to_have_count(2, timeout=TIMEOUT)
    expect(captioned.first.get_by_role("list", name="Unguided captions").locator("li")).to_have_count(3)
    expect(captioned.first.get_by_role("list", name="Guided captions", exact=True).locator("li")).to_have_count(3)
    visit.draw("desktop-caption")
    captioned.last.get_by_role("button", name="Copy the caption").first.click()
    copied = visit.page.evaluate("navigator.clipboard.readText()")
    assert copied == captioned.last.locator(".mome-text").first.inner_text().replace("(empty)", "")


def test_classification_draws_a_bar_for_every_label(visit, pictures):
    visit.open("Classify")
    upload(visit.page, "classify-picture", pictures[0])
    visit.page.locator("#classify-labels textarea").fill("cat\ndog\nred square")
    visit.page.get_by_role("button", name="Classify", exact=True).click()
    chart = visit.page.locator("#classify-results")
    for label in ("cat", "dog", "red square"):
        expect(chart).to_contain_text(label, timeout=TIMEOUT)
    visit.draw("desktop-classify")
    percents = [int(number) for number in re.findall(r"(\d+)%", chart.inner_text())]
    assert len(percents) >= 3 and 97 <= sum(percents[-3:]) <= 103


def test_routing_colours_patches_and_the_slider_moves_through_the_layers(visit, space, pictures):
    visit.open("Routing")
    page = visit.page
    results, words = (
        page.locator("#routing-results"),
        page.locator("#routing-caption textarea, #routing-caption input"),
    )
    expect(results.locator(".mome-patches rect")).to_have_count(16, timeout=TIMEOUT)  # before anything is uploaded
    expect(words).to_have_value("an icon of a circus tent")
    expect(results.locator(".mome-explained")).to_contain_text(re.compile(r"(mostly|all|the most) to image \d"))
    page.locator("#routing-try").get_by_role("row").nth(2).click()
    expect(words).to_have_value("an icon of a typewriter", timeout=TIMEOUT)
    upload(page, "routing-picture", pictures[0])
    words.fill("a red dot")
    words.press("Enter")
    expect(results.get_by_role("list", name="Tokens of the caption").locator("li")).to_have_count(5)
    first = results.locator(".mome-patches").get_attribute("aria-label")
    assert first.startswith("Layer 1")
    slider = page.locator("#routing-layer input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    expect(results.locator(".mome-status")).to_have_text("Layer 2 of 2", timeout=TIMEOUT)
    colours = results.locator(".mome-patches rect").evaluate_all("all => all.map(each => each.getAttribute('fill'))")
    assert len(set(colours)) > 1
    visit.draw("desktop-routing")


def test_a_broken_picture_is_an_error_that_a_visitor_understands(visit, tmp_path):
    visit.open("Classify")
    broken = tmp_path / "broken.png"
    broken.write_bytes(write_picture(tmp_path / "whole.png", side=300).read_bytes()[:5000])
    visit.page.set_input_files("#classify-picture input[type=file]", [])
    upload(visit.page, "classify-picture", str(broken))
    visit.page.get_by_role("button", name="Classify", exact=True).click()
    expect(visit.page.get_by_test_id("toast-body")).to_contain_text("broken or cut off", timeout=TIMEOUT)


def test_nothing_went_wrong_and_no_request_left_the_machine(visit):
    assert visit.wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser, space, pictures, scheme):
    phone = Visit(browser, space.url, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = phone.page
    page.get_by_label("What do you look for?").fill("cat")
    page.keyboard.press("Enter")
    expect(page.locator("#search-results .mome-hit").first).to_be_visible(timeout=TIMEOUT)
    phone.open("Routing")
    upload(page, "routing-picture", pictures[0])
    page.get_by_role("button", name="Show the experts").click()
    expect(page.locator("#routing-results .mome-patches")).to_be_visible(timeout=TIMEOUT)
    for tab in ("Search", "Caption", "Classify", "Routing", "About"):
        phone.open(tab)
        phone.draw(f"phone-{scheme}-{tab.lower()}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"{tab} is wider than the screen"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness < 100) == (scheme == "dark")
    assert phone.wrong == []
    phone.context.close()
