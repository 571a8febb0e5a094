"""The page in a real browser: points are drawn, a keyframe is set, a chunk appears and can be saved, bad uploads are said."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from goldens import DISTILLED, HELIOS
from PIL import Image

import view
from files.media import load_video
from geometry import surface

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("viser", "playwright") if find_spec(name) is None] + ([] if BROWSER else ["chromium"])
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
ARGUMENTS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS) as browser:
            yield browser


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A function that serves the page with more words: its address."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(surface, "map_size", lambda height, width, *limit: (56, 112))  # to be fast
    with np.load(HELIOS / "pipeline_inputs.npz") as file:
        Image.fromarray(file["image"]).save("image.png")
    servers = []

    def serve(*words: str) -> str:
        made = view.serve(view.parse([
            "--port", "0", *words, "--weights", str(DISTILLED), "--size", "64x128", "--image", "image.png", "--set",
            "device=cpu", "steps=1,1,1", "amplify_first_chunk=false"]))
        servers.append(made)
        return f"http://127.0.0.1:{made[0].get_port()}"

    yield serve
    for server, studio, _ in servers:
        studio.stopping.set()
        studio.worker.shutdown()
        server.stop()


def shot(page) -> np.ndarray:
    """The scene's part of a screenshot, without the panel and the notice of software rendering."""
    page.screenshot(path="shot.png")
    return np.asarray(Image.open("shot.png").convert("RGB"))[200:, :800].astype(int)


def press(page, name: str) -> None:
    page.get_by_text(name, exact=True).first.click()


def test_film(browser, served):
    """From opening the page to a playing mp4, with an upload that fails in between."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page.goto(served())
    page.get_by_text("add keyframe", exact=True).first.wait_for(timeout=60000)
    page.wait_for_function("document.querySelector('canvas') !== null")
    page.wait_for_timeout(3000)
    assert (shot(page) < 200).any(-1).mean() > 0.05  # the picture's points on a white ground
    page.mouse.move(400, 500)
    page.mouse.down()
    page.mouse.move(430, 510, steps=4)
    page.mouse.up()
    page.wait_for_timeout(500)
    press(page, "add keyframe")
    page.locator("input[role=combobox][value='1: after 2 s']").wait_for(timeout=20000)
    film = page.locator("img:not([src*='svg'])").first
    before = film.get_attribute("src")
    press(page, "generate")
    page.get_by_text("33 frames;", exact=False).wait_for(timeout=120000)
    page.wait_for_timeout(1000)
    assert film.get_attribute("src") != before  # it plays
    with open("bad.png", "w") as file:
        file.write("no picture")
    with page.expect_file_chooser() as chooser:
        press(page, "another picture")
    chooser.value.set_files("bad.png")
    page.get_by_text("not a readable picture", exact=False).wait_for(timeout=60000)
    with page.expect_download(timeout=60000) as download:
        press(page, "save mp4")
    download.value.save_as("saved.mp4")
    assert load_video("saved.mp4").shape[1:] == (64, 128, 3)
    page.close()


def test_a_second_browser_sees_the_same_and_a_token_is_asked_for(browser, served):
    address = served("--token", "sesame")
    first, second = (browser.new_page() for _ in range(2))
    for page in (first, second):
        page.goto(address)
        page.get_by_text("enter", exact=True).first.wait_for(timeout=60000)
        assert page.get_by_text("generate", exact=True).count() == 0
    press(first, "enter")
    first.wait_for_timeout(1000)
    assert first.get_by_text("generate", exact=True).count() == 0  # a wrong word
    for page in (first, second):
        page.locator("input:visible").first.fill("sesame")
        page.wait_for_timeout(500)
        press(page, "enter")
        page.get_by_text("generate", exact=True).first.wait_for(timeout=60000)
    press(first, "add keyframe")
    second.locator("input[role=combobox][value='1: after 2 s']").wait_for(timeout=20000)
    second.close()
    press(first, "add keyframe")
    first.locator("input[role=combobox][value='2: after 2 s']").wait_for(timeout=20000)
    first.close()
