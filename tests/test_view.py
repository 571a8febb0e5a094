"""The page in a real browser: points are drawn, a keyframe is set, a chunk appears and can be saved, bad uploads are said."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from known import load_video
from PIL import Image

import view
from studio import Studio

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
def served(page_words):
    """A function that serves the page with more words: its address, and the studio behind it."""
    servers = []

    def serve(*words: str) -> tuple[str, Studio]:
        made = view.serve(view.parse(["--port", "0", *words, *page_words]))
        servers.append(made)
        return f"http://127.0.0.1:{made[0].get_port()}", made[1]

    yield serve
    for server, studio, _ in servers:
        studio.stopping.set()
        studio.worker.shutdown()
        server.stop()


def shot(page) -> np.ndarray:
    """The scene's part of a screenshot, without the panel and the notice of software rendering."""
    page.screenshot(path="shot.png")
    return np.asarray(Image.open("shot.png").convert("RGB"))[200:, :800].astype(int)


def drag(page, right: int, down: int) -> None:
    """Turn the viewer's camera with the mouse."""
    page.mouse.move(400, 500)
    page.mouse.down()
    page.mouse.move(400 + right, 500 + down, steps=4)
    page.mouse.up()
    page.wait_for_timeout(500)


def press(page, name: str) -> None:
    page.get_by_text(name, exact=True).first.click()


def test_film(browser, served):
    """From opening the page to a playing mp4, with an upload that fails in between."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page.goto(served()[0])
    page.get_by_text("add keyframe", exact=True).first.wait_for(timeout=60000)
    page.wait_for_function("document.querySelector('canvas') !== null")
    page.wait_for_timeout(3000)
    assert (shot(page) < 200).any(-1).mean() > 0.05  # the picture's points on a white ground
    drag(page, 30, 10)
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


def wait_for_frames(page, studio, count: int) -> None:
    for _ in range(600):
        if len(studio.frames) >= count:
            return
        page.wait_for_timeout(200)
    raise TimeoutError(f"{len(studio.frames)} frames, expected {count}")


def test_the_drive_follows_the_viewer(browser, served):
    """While "follow me" is on, chunk after chunk goes to where the mouse has brought the viewer, evenly and without a stop
    between two of them; it ends when it is off or the browser is closed, and the film stays."""
    address, studio = served()
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    press(page, "Drive")
    page.wait_for_timeout(2000)
    drag(page, 40, 0)
    follow = page.get_by_role("checkbox").first
    follow.check()
    wait_for_frames(page, studio, 66)
    drag(page, 80, 20)
    wait_for_frames(page, studio, len(studio.frames) + 99)
    follow.uncheck()
    studio.worker.submit(lambda: None).result(timeout=60)
    places, chunks = studio.path[:, :3, 3], len(studio.path) // 33
    assert len(studio.frames) == len(places) == 33 * chunks >= 165
    steps = places.diff(dim=0).norm(dim=1)
    for chunk in range(chunks):  # with the step over the border to the next one
        own = steps[33 * chunk:33 * (chunk + 1)]
        assert (own - own[0]).abs().max() < 1e-4 * max(own[0], 1)
    ways = [places[33 * chunk:33 * chunk + 33] for chunk in range(chunks)]
    moved = [chunk for chunk, way in enumerate(ways) if (way[-1] - way[0]).norm() > 0.1]
    assert moved[0] == 0 and len(moved) > 1  # to where the first drag led, and on to where the second did
    follow.check()
    wait_for_frames(page, studio, len(studio.frames) + 33)
    page.close()
    studio.worker.submit(lambda: None).result(timeout=60)


def test_a_button_takes_the_viewer_along(browser, served):
    """So following begins where the film is, with a roll too."""
    address, studio = served()
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    press(page, "Drive")
    page.wait_for_timeout(2000)
    for count, name in enumerate(("rise", "rise", "roll left", "turn right"), 1):
        press(page, name)
        wait_for_frames(page, studio, 33 * count)
    page.wait_for_timeout(1000)
    page.get_by_role("checkbox").first.check()
    wait_for_frames(page, studio, 165)
    press(page, "stop")
    studio.worker.submit(lambda: None).result(timeout=60)
    there, followed = studio.path[131], studio.path[-1]
    assert there[1, 3] < -1.5 and there[1, 0] < -0.1  # it rose, and rolled to the left
    assert (followed - there).abs().max() < 0.06
    page.close()


def test_a_second_browser_sees_the_same_and_a_token_is_asked_for(browser, served):
    address, _ = served("--token", "sesame")
    first, second = (browser.new_page() for _ in range(2))
    for page in (first, second):
        page.goto(address)
        page.get_by_text("enter", exact=True).first.wait_for(timeout=60000)
        assert page.get_by_text("generate", exact=True).count() == 0
    press(first, "enter")
    first.get_by_text("this is not the token", exact=False).wait_for(timeout=20000)
    assert first.get_by_text("generate", exact=True).count() == 0
    for page in (first, second):
        page.locator("input:visible").first.fill("sesame")
        page.wait_for_timeout(500)
        press(page, "enter")
        page.get_by_text("generate", exact=True).first.wait_for(timeout=60000)
    press(first, "add keyframe")
    second.locator("input[role=combobox][value='0: the picture']").click()  # what is chosen is each page's own
    second.get_by_role("option", name="1: after 2 s").wait_for(timeout=20000)
    assert second.locator("input[role=combobox][value='0: the picture']").count() == 1
    first.locator("input[value='a car']").fill("a boat")
    second.locator("input[value='a boat']").wait_for(timeout=20000)
    second.close()
    press(first, "add keyframe")
    first.locator("input[role=combobox][value='2: after 2 s']").wait_for(timeout=20000)
    first.close()
