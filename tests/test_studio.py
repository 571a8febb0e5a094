"""What the page drives, without a browser: films equal sample.py's videos, drives have no seam, errors are said and survived."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from goldens import DISTILLED, GEOMETRY, HELIOS, INPUTS
from known import load_video
from PIL import Image
from safetensors.torch import load_file, save_file

import job
import view
from files.media import read_rate
from files.video import write_video
from geometry.camera import motion, move_path
from geometry.flight import pushed
from geometry.paths import load_path
from helios.load import encode_prompts
from helios.stream import load_streamed
from helios.text import UMT5Encoder
from sample import DEMO
from sample import main as sample_main
from studio import Studio
from wah import stage_steps

AGAIN = ["--weights", str(DISTILLED), "--size", "64x128", "--image", "image.png", "--prompt", "a car", "--set",
         "device=cpu", "steps=1,1,1", "amplify_first_chunk=false"]  # the words of the page, for sample.py


def pose(*move: float) -> torch.Tensor:
    return motion(torch.eye(4), torch.tensor(move), torch.ones(1))[0]


@pytest.fixture
def studio(page_words):
    made = Studio(view.parse(page_words))
    yield made
    made.worker.shutdown()


def wait(studio: Studio) -> None:
    """Until the worker has done all that it was given."""
    studio.worker.submit(lambda: None).result(timeout=120)


def test_a_film_is_the_video_of_its_path(studio):
    """The saved path, given to sample.py with the same words and seed, makes the same frames."""
    studio.keys.append(pose(1, 0, 1, 10, 0, 0))
    studio.seconds.append(2.5)
    studio.seed = 3
    studio.submit(studio.generate)
    wait(studio)
    assert len(studio.frames) == len(studio.path) == 41 and "s a chunk" in studio.message
    Path("path.json").write_bytes(studio.saved("json"))
    assert sample_main([*AGAIN, "seed=3", "--poses", "path.json"]) == 0
    Path("film.mp4").write_bytes(studio.saved("mp4"))
    ours, theirs = (load_video(name).astype(int) for name in ("film.mp4", "out.mp4"))
    assert ours.shape == theirs.shape and abs(ours - theirs).mean() < 1  # joined from two parts, so coded differently
    assert json.loads(studio.saved("json"))["fps"] == 16 and studio.saved("ply").startswith(b"ply")


def test_rate_and_compilation_are_those_of_the_words(page_words, monkeypatch):
    """A film's seconds have as many frames as the rate says, and its files say it too."""
    compiled = []
    monkeypatch.setattr("model.Helios.compile_blocks", lambda self: compiled.append(self))
    studio = Studio(view.parse([*page_words, "fps=24", "compile=true"]))
    studio.keys.append(pose(1, 0, 1, 10, 0, 0))
    studio.seconds.append(0.5)
    studio.preview()
    Path("film.mp4").write_bytes(studio.saved("mp4"))
    assert compiled == [studio.models.transformer] and len(studio.frames) == 13
    assert json.loads(studio.saved("json"))["fps"] == read_rate(Path("film.mp4")) == 24


def test_a_drive_goes_on_without_a_seam(studio):
    """Three times the same button: a step over the border of two chunks is as long as one inside."""
    for _ in range(3):
        studio.submit(lambda: studio.drive(lambda: pushed(studio.here, "forward", 1.0), chunks=1))
    wait(studio)
    assert len(studio.frames) == 99
    steps = studio.path[:, 2, 3].diff()
    assert (steps - 1 / 33).abs().max() < 1e-5


def test_a_drive_goes_on_where_a_film_ends(studio):
    studio.keys.append(pose(1, 0, 1, 10, 0, 0))
    studio.seconds.append(0.5)
    studio.submit(studio.generate)
    studio.submit(lambda: studio.drive(lambda: pushed(studio.here, "forward", 1.0), chunks=1))
    wait(studio)
    assert len(studio.frames) == len(studio.path) == 66 and not torch.equal(studio.path[8], torch.eye(4))
    torch.testing.assert_close(studio.path[9:34], studio.path[8].repeat(25, 1, 1))  # the rest of the film's chunk
    Path("path.json").write_bytes(studio.saved("json"))
    assert sample_main([*AGAIN, "--poses", "path.json"]) == 0
    Path("film.mp4").write_bytes(studio.saved("mp4"))
    assert abs(load_video("film.mp4").astype(int) - load_video("out.mp4")).mean() < 1


def test_following_goes_where_one_looks_until_stopped(studio):
    seen = []

    def target() -> torch.Tensor:
        seen.append(len(studio.frames))
        if len(seen) == 2:
            studio.stopping.set()
        return pose(0, 0, len(seen), 0, 0, 0)

    studio.submit(lambda: studio.drive(target))
    wait(studio)
    assert seen == [0, 33] and len(studio.frames) == 66 and torch.equal(studio.here, pose(0, 0, 2, 0, 0, 0))


def test_following_ends_when_nobody_looks_any_more(studio):
    """As after a browser was closed."""
    looks = iter([pose(0, 0, 1, 0, 0, 0), None])
    studio.submit(lambda: studio.drive(lambda: next(looks)))
    wait(studio)
    assert len(studio.frames) == 33 and next(looks, "all asked for") == "all asked for"


def test_stop_also_ends_what_waits(studio):
    """Of films that wait none begins; other work is done."""
    asked = []

    def target() -> torch.Tensor:
        asked.append(len(studio.frames))
        for _ in range(2):
            studio.submit(lambda: studio.drive(target, chunks=1), film=True)
        studio.submit(lambda: studio.tell("no film"))
        studio.stop()
        return pose(0, 0, 1, 0, 0, 0)

    studio.submit(lambda: studio.drive(target, chunks=5), film=True)
    wait(studio)
    wait(studio)
    assert asked == [0] and len(studio.frames) == 33 and studio.message == "no film"
    studio.submit(lambda: studio.drive(lambda: pose(0, 0, 2, 0, 0, 0), chunks=1), film=True)
    wait(studio)
    assert len(studio.frames) == 66


def test_stop_counts_while_a_film_gets_ready(studio):
    studio.keys.append(pose(1, 0, 1, 10, 0, 0))
    studio.seconds.append(2.5)
    studio.changed.append(lambda: studio.stop() if studio.message == "getting ready ..." else None)
    studio.submit(studio.generate, film=True)
    wait(studio)
    assert not studio.frames


def test_a_preview_is_told_and_can_be_stopped(studio):
    studio.keys.append(pose(1, 0, 1, 10, 0, 0))
    studio.seconds.append(4.0)
    told = []
    studio.changed.append(lambda: told.append((studio.message, studio.progress)))
    studio.replace_film(studio.preview)
    wait(studio)
    assert [message for message, _ in told] == [
        "rendering the path ...", "rendering the path: 33 of 65 frames", "rendering the path: 65 of 65 frames",
        *["preview: the warp of 65 frames"] * 2]
    assert [progress for _, progress in told] == [0, 33 / 65, 1, 1, 0]
    studio.changed.append(lambda: studio.stop() if "33 of 65" in studio.message else None)
    studio.replace_film(studio.preview)
    wait(studio)
    assert len(studio.frames) == len(studio.path) == 33 and studio.message == "preview: the warp of 33 frames"


@pytest.mark.parametrize("kind", ["preview", "generate"])
def test_a_film_under_way_is_not_replaced(studio, kind):
    """Unless it was stopped: then the next one begins after its chunk."""
    studio.keys.append(pose(1, 0, 1, 10, 0, 0))
    studio.seconds.append(0.5)
    kept = []

    def target() -> torch.Tensor:
        with pytest.raises(ValueError, match="a film is under way"):
            studio.replace_film(getattr(studio, kind))
        kept.append(len(studio.frames))
        if len(kept) == 2:
            studio.stop()
            studio.replace_film(getattr(studio, kind))
        return pose(0, 0, len(kept), 0, 0, 0)

    studio.submit(lambda: studio.submit(lambda: studio.drive(target, chunks=3), film=True))  # known before it begins
    for _ in range(3):
        wait(studio)
    assert kept == [0, 33] and len(studio.frames) == 9


def test_another_picture_forgets_the_world(studio):
    studio.submit(lambda: studio.drive(lambda: pushed(studio.here, "up", 1.0), chunks=1))
    Image.new("RGB", (128, 64), "teal").save("teal.png")
    studio.submit(lambda: studio.open(studio.check(Path("teal.png"))))
    wait(studio)
    assert not studio.frames and len(studio.keys) == 1 and torch.equal(studio.here, torch.eye(4))
    assert abs(studio.picture.astype(int) - [0, 128, 128]).max() < 3


def test_a_picture_that_was_sent_can_be_filmed(studio):
    Path("teal.webp").touch()
    Image.new("RGB", (128, 64), "teal").save("teal.webp")
    studio.receive("mine.webp", Path("teal.webp").read_bytes())
    studio.submit(lambda: studio.drive(lambda: pushed(studio.here, "up", 1.0), chunks=1))
    wait(studio)
    assert len(studio.frames) == 33 and abs(studio.picture.astype(int) - [0, 128, 128]).max() < 3
    for name in ("again.png", "more.png"):
        studio.receive(name, Path("image.png").read_bytes())
    wait(studio)
    assert len([*Path(studio.folder.name).iterdir()]) == 1 and studio.message.startswith("more.png")


@pytest.mark.parametrize("content, said", [(b"no picture", "bad.png: not a"), (bytes(51 * 2**20), "expected at most")])
def test_a_bad_upload_does_not_end_the_film(studio, content, said):
    sent = []

    def target() -> torch.Tensor:
        with pytest.raises(ValueError, match=said):
            studio.receive("bad.png", content)
        sent.append(studio.stopping.is_set())
        return pose(0, 0, len(sent), 0, 0, 0)

    studio.submit(lambda: studio.drive(target, chunks=2), film=True)
    wait(studio)
    assert sent == [False, False] and len(studio.frames) == 66 and not [*Path(studio.folder.name).iterdir()]


def test_a_good_upload_ends_the_film(studio):
    def target() -> torch.Tensor:
        studio.receive("mine.png", Path("image.png").read_bytes())
        return pose(0, 0, 1, 0, 0, 0)

    studio.submit(lambda: studio.drive(target), film=True)
    wait(studio)
    wait(studio)
    assert studio.message == "mine.png is the picture now" and not studio.frames


@pytest.mark.parametrize("shown, words", [
    (["--image", "image.png", "--depth", "depth.npy"], ["inverse_depth=true"]), (["--video", "clip.mp4"], ["relative=first"])])
def test_settings_of_the_first_picture_do_not_refuse_another_one(page_words, shown, words):
    """They say nothing of it; what the user has set besides still holds."""
    np.save("depth.npy", np.full((64, 128), 0.5, np.float32))
    write_video(Path("clip.mp4"), INPUTS["warp"][:40], 12)
    page_words[page_words.index("--image"):page_words.index("--prompt")] = shown
    studio = Studio(view.parse([*page_words, *words, "fov=70"]))
    K = studio.geometry.K
    studio.receive("mine.png", Path("image.png").read_bytes())
    wait(studio)
    assert studio.message == "mine.png is the picture now" and torch.equal(studio.geometry.K, K)


def test_another_preset(studio):
    studio.submit(lambda: studio.prefer("realtime"))
    studio.submit(lambda: studio.drive(lambda: pushed(studio.here, "up", 1.0), chunks=1))
    wait(studio)
    assert studio.settings.warp_band == "mid" and studio.settings.samples == 2 and len(studio.frames) == 33
    assert studio.camera.settings.samples == 2 and studio.worlds == 2
    studio.submit(lambda: studio.prefer("none"))
    wait(studio)
    assert "preset" in studio.message and studio.preset == "realtime" and len(studio.frames) == 33
    studio.prefer("official")
    assert studio.preset == "official" and len(studio.frames) == 33 and studio.rollout is None  # kept, not gone on with


def test_the_text_encoder_is_streamed_past_the_transformer(studio, monkeypatch):
    """With --memory full too: both at once would take the memory of both."""
    streamed = []
    monkeypatch.setattr("helios.load.load_streamed", lambda network, *rest: streamed.append(network)
                        or load_streamed(network, *rest))
    plain = studio.embedded().plain
    assert studio.args.memory == "full" and streamed == [UMT5Encoder]
    assert torch.equal(plain, encode_prompts(DISTILLED, "a car", False, False, "cpu").plain)


def test_a_preset_may_bring_a_lora(page_words):
    """The prompt, which was embedded before, then gets its trigger."""
    shutil.copytree(DISTILLED, "model")
    save_file(load_file(HELIOS / "lora_noprefix.safetensors"), "model/lora.safetensors", {"wah_warp_band": "mid"})
    studio = Studio(view.parse([*page_words, "--weights", "model"]))
    assert studio.begin().lora is None
    studio.prefer("realtime")
    assert studio.begin().lora is not None


PI3X = f"geometry={GEOMETRY / 'pi3x_weights.safetensors'}"


@pytest.mark.parametrize("shown, words", [
    (["--image", "image.png"], []), (["--image", "image.png"], [PI3X, "keyframes=3"]), (["--video", "clip.mp4"], [])],
    ids=["plane", "Pi3X", "clip"])  # fmt: skip
def test_each_film_has_the_same_camera(page_words, monkeypatch, shown, words):
    """The geometry is found once, and a film that follows others sees the same warps as the first one."""
    write_video(Path("clip.mp4"), INPUTS["warp"][:40], 12)
    page_words[page_words.index("--image"):page_words.index("--prompt")] = shown
    starts, start = [], job.start_path
    monkeypatch.setattr("job.start_path", lambda *rest: starts.append(rest) or start(*rest))
    studio = Studio(view.parse([*page_words, *words]))
    studio.keys, studio.seconds = [torch.eye(4), pose(0, 0, 1, 0, 0, 0)], [3.0]

    def film(camera) -> list[torch.Tensor]:
        found = []
        for poses in move_path("right 1, yaw 5, forward 1").split(33):
            warp = camera.warp(poses)
            camera.remember(warp.frames[:, :, -1])
            found += [warp.frames, warp.visible]
        return found

    expected = film(start(*starts[0]).camera)
    for _ in range(2):
        assert all(map(torch.equal, film(studio.begin().camera), expected))
        studio.preview()
    assert len(starts) == 1


def test_the_bar_goes_evenly_to_the_end(page_words):
    """In the first chunk too, where the few-step sampler takes twice the steps."""
    studio, seen = Studio(view.parse([*page_words, "amplify_first_chunk=true", "steps=1,2,1"])), []
    studio.changed.append(lambda: seen.append(studio.progress) if studio.progress else None)
    studio.drive(lambda: pushed(studio.here, "forward", 1.0), chunks=2)
    assert [*dict.fromkeys(seen)] == [step / 9 for step in range(1, 9)] + [step / 5 for step in range(1, 5)]
    assert stage_steps(studio.settings, replace(studio.models.schedule, sampler="euler"), 0) == (1, 2, 1)


def test_the_worker_uses_the_device_that_is_named(page_words, monkeypatch):
    """A thread's current card is its own."""
    told = []
    monkeypatch.setattr("studio.use_device", lambda device: told.append((device, threading.get_ident())))
    studio = Studio(view.parse(page_words))
    worker = studio.worker.submit(threading.get_ident).result()
    assert told == [("cpu", worker)] and worker != threading.get_ident()


def test_errors_are_said_and_the_studio_lives_on(studio):
    before = studio.picture.copy()
    studio.submit(lambda: studio.open(studio.check(Path("none.png"))))
    wait(studio)
    assert "none.png" in studio.message and (studio.picture == before).all()
    studio.submit(studio.generate)  # one keyframe is no path
    wait(studio)
    assert "error" in studio.message and "add a keyframe first" in studio.message
    with pytest.raises(ValueError, match="nothing has been filmed"):
        studio.saved("mp4")
    studio.keys.append(pose(0, 0, 1, 0, 0, 0))
    studio.seconds.append(0.5)
    studio.prompt = "a car | a boat"
    studio.submit(studio.generate)
    wait(studio)
    assert "'a car | a boat': one for each chunk" in studio.message
    studio.submit(studio.preview)
    wait(studio)
    assert len(studio.frames) == 9


def test_other_words_from_the_next_chunk_on(studio):
    """Another prompt changes the next chunk; the same one does not."""
    made = []
    for words in ("a car", "a boat"):
        studio.prompt = "a car"
        studio.forget()
        studio.submit(lambda: studio.drive(lambda: pushed(studio.here, "up", 1.0), chunks=1))
        wait(studio)
        studio.prompt = words
        studio.submit(lambda: studio.drive(lambda: pushed(studio.here, "up", 1.0), chunks=1))
        wait(studio)
        made.append(np.stack(studio.frames))
    assert (made[0][:33] == made[1][:33]).all() and (made[0][33:] != made[1][33:]).any()


@pytest.mark.parametrize("early", [True, False], ids=["while its page is built", "later"])
def test_a_browser_that_leaves(studio, early):
    """Its page hears of nothing any more, and its thread ends."""
    client, pages, others = MagicMock(client_id=3), {}, {*threading.enumerate()}
    if early:
        client.gui.configure_theme.side_effect = lambda **_: view.leave(client, pages)
    view.admit(client, studio, None, pages)
    if not early:
        assert len(studio.changed) == 1 and pages[3] is not None
        view.leave(client, pages)
    for thread in {*threading.enumerate()} - others:
        thread.join(5)
        assert not thread.is_alive()
    assert studio.changed == [] and pages == {3: None}


def test_a_token_is_asked_for(studio):
    """A wrong one is said to be wrong; a double click makes one page."""
    client, pages = MagicMock(client_id=3), {}
    view.admit(client, studio, "sesame", pages)
    asked, answer = client.gui.add_text.return_value, client.gui.add_markdown.return_value
    (press,), _ = client.gui.add_button.return_value.on_click.call_args
    asked.value = "sesam"
    press(None)
    assert "not the token" in answer.content and not pages
    asked.value = "sesame"
    for _ in range(2):
        press(None)
    view.leave(client, pages)
    assert client.gui.add_tab_group.call_count == 1 and studio.changed == []


@pytest.fixture
def page(studio):
    """A page whose browser holds still: its widgets keep what they are given, and its camera stands in the picture."""
    client = MagicMock(client_id=3)
    client.gui.add_dropdown.side_effect = lambda label, options, **_: MagicMock(options=options, value=options[0])
    client.gui.add_number.side_effect = lambda label, value, **_: MagicMock(value=value)
    client.gui.add_slider.side_effect = lambda label, least, most, step, value, **_: MagicMock(value=value)
    client.camera.position, client.camera.wxyz = np.zeros(3), np.array([1.0, 0, 0, 0])
    made = view.Page(client, studio)
    yield made
    made.close()


def test_keyframes_are_told(page, studio):
    """So that an error does not stay, and with the seconds of the one that is chosen."""
    page.attempt(page.move_key)
    assert studio.message.startswith("**error**: the first keyframe")
    for seconds in (2.0, 3.0):
        page.gap.value = seconds
        page.attempt(page.add_key)
    assert studio.message == "keyframe 2 added" and page.keys.options[2] == "2: after 3 s"
    page.keys.value = page.keys.options[1]
    page.choose_key()
    assert page.gap.value == 2
    page.gap.value = 4.5
    for change, said in ((page.move_key, "keyframe 1 moved here"), (page.time_key, "keyframe 1 comes after 4.5 s"),
                         (page.remove_key, "keyframe 1 removed")):
        page.attempt(change)
        assert studio.message == said
    assert studio.seconds == [3.0] and len(studio.keys) == 2


def test_a_button_takes_the_viewer_along(page, studio):
    """Each goes the way that it says: y points down, and z is where the camera looks."""
    pressed = {name: step for row in view.STEPS for name, step in row.items()}
    for name, axis, way in (("rise", 1, -1), ("sink", 1, 1), ("left", 0, -1), ("right", 0, 1)):
        page.push(*pressed[name])
        wait(studio)
        moved = studio.path[-1, :3, 3] - studio.path[-33, :3, 3]
        assert moved.abs().argmax() == axis and moved[axis] * way > 0.9
        np.testing.assert_allclose(page.client.camera.position, studio.here[:3, 3], atol=1e-6)
    for name, column, axis, way in (("turn left", 2, 0, -1), ("turn right", 2, 0, 1), ("look up", 2, 1, -1),
                                    ("look down", 2, 1, 1), ("roll left", 0, 1, -1), ("roll right", 0, 1, 1)):
        studio.rewind()
        page.push(*pressed[name])
        wait(studio)
        assert studio.here[axis, column] * way == pytest.approx(np.sin(np.radians(10)), abs=1e-4)
        torch.testing.assert_close(page.pose, studio.here, atol=1e-5, rtol=0)


def test_stop_ends_following_that_waits(page, studio):
    page.follow.value = True
    studio.submit(lambda: (page.drive(), studio.stop()))
    wait(studio)
    wait(studio)
    assert page.follow.value is False and not studio.frames


def test_an_upload_takes_the_demos_prompt_away(page, studio):
    """The user's own words stay."""
    file = SimpleNamespace(name="mine.png", content=Path("image.png").read_bytes())
    for before, after in (("a car", "a car"), (DEMO["prompt"], "")):
        studio.prompt = before
        page.upload(file)
        wait(studio)
        assert studio.prompt == after


@pytest.mark.parametrize("words, said", [
    (["--host", "0.0.0.0"], "--token"), (["--image", "none.png"], "none.png"), (["--port", "99999"], "0 to 65535"),
    (["--image", "image.png", "--move", "yaw 20"], "--move: not of the page"), (["--out=a.mp4"], "--out=a.mp4: not of"),
    (["--depth", "d.png"], "--depth needs"), (["--set", "device=cuda:99"], "device cuda:99"),
    (["--set", "steps=3"], "steps: 1 numbers"), (["--check"], "--set check=true: not of the page"),
    (["--latents", "x.safetensors"], "latents=x.safetensors"), (["--resample"], "resample=true: not of"),
    (["--set", "prompt_blend=3"], "prompt_blend=3: not of"), (["--host", "192.0.2.1", "--token", "a"], "nothing can listen"),
    (["--host", "none.invalid", "--token", "a"], "none.invalid: nothing can listen"), (["--prompt", "a car | a boat"], "a car | a boat"),
])  # fmt: skip
def test_bad_words(capsys, page_words, words, said):
    """One line, before the weights are read."""
    try:
        status = view.main([*words, "--weights", str(DISTILLED)])
    except SystemExit as error:
        status = error.code
    assert status == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("view.py: error: ") and said in error


def test_the_demo_keeps_the_users_words(page_words):
    assert view.parse(["--prompt", "a car"]).prompt == "a car" and "square" in view.parse([]).prompt


def test_the_saved_path_has_the_unit_of_the_words(page_words):
    studio = Studio(view.parse([*page_words, "unit=0.5depth"]))
    studio.keys.append(pose(0, 0, 1, 0, 0, 0))
    studio.seconds.append(0.5)
    Path("path.json").write_bytes(studio.saved("json"))
    assert load_path("path.json").unit == "0.5depth"


def test_the_demo_has_its_own_lens(page_words):
    """The saved path says it too; a picture that is sent has another one, and the user's counts before all."""
    def degrees(studio: Studio) -> float:
        return 2 * np.degrees(np.arctan(studio.geometry.depth.shape[1] / 2 / studio.geometry.K[0, 0].item()))

    at = page_words.index("--image")
    words = page_words[:at] + page_words[page_words.index("--prompt"):]
    studio, expected = Studio(view.parse(words)), load_path(DEMO["poses"]).fov_x
    assert degrees(studio) == pytest.approx(expected, abs=1e-3)
    studio.keys.append(pose(0, 0, 1, 0, 0, 0))
    studio.seconds.append(0.5)
    Path("path.json").write_bytes(studio.saved("json"))
    assert load_path("path.json").fov_x == pytest.approx(expected)
    studio.receive("mine.png", Path("image.png").read_bytes())
    wait(studio)
    assert degrees(studio) == pytest.approx(55, abs=1e-3) and not studio.lens
    assert degrees(Studio(view.parse([*words, "fov=70"]))) == pytest.approx(70, abs=1e-3)


def test_the_address_can_be_opened(page_words, monkeypatch, capsys):
    """One of IPv6 takes brackets."""
    viser = pytest.importorskip("viser")
    monkeypatch.setattr(viser, "ViserServer", MagicMock())
    viser.ViserServer.return_value.get_port.return_value = 8080
    monkeypatch.setattr("socket.create_server", MagicMock())
    for host, shown in (("::1", "http://[::1]:8080 "), ("127.0.0.1", "http://127.0.0.1:8080 ")):
        view.serve(view.parse(["--host", host, *page_words]))
        assert shown in capsys.readouterr().out
