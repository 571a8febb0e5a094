"""Runs of sample.py that were stopped, killed or changed, and go on."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import DISTILLED, HELIOS
from PIL import Image
from safetensors.torch import load_file, save_file
from sampling import PI3X, SIZED, read, refused, sample, stop_in_chunk

import files
from files.checkpoint import open_safetensors
from files.output import Output
from sample import main
from wah import Rollout


def test_a_chunk_is_announced_when_it_can_be_played(place, capsys, monkeypatch):
    """While others are under way: each line names a whole video."""
    told = []

    def say(*words, **how):
        if "frames: " in words[0]:
            count, path = words[0].split(": ")
            told.append((count, len(read(path))))

    monkeypatch.setattr("sample.print", say, raising=False)
    assert sample("--image", "image.png", "--warp", "warp.npy") == 0
    assert told == [("33 of 99 frames", 33), ("66 of 99 frames", 33)]


def test_stopping_keeps_what_is_done(place, capsys, monkeypatch):
    """Ctrl-C in the third chunk leaves two whole ones, and says how to go on; in the first, nothing."""
    stop_in_chunk(monkeypatch, 3)
    words = ["--image", "image.png", "--warp", "warp.npy"]
    assert sample(*words) == 130
    assert len(read("out.mp4")) == 66 and len(read("out_warp.mp4")) == 66
    said = capsys.readouterr().out
    assert "66 frames" in said and "--image image.png --warp warp.npy --continue" in said
    refused(capsys, place, words, "out_parts", "--continue")  # it would be lost
    assert sample(*words, "--continue") == 0
    assert len(read("out.mp4")) == 99 and not (place / "out_parts").exists()
    stop_in_chunk(monkeypatch, 1)
    before = sorted(path.name for path in place.iterdir())
    assert sample(*words, "--out", "other.mp4") == 130
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_stopped_run_replaces_nothing(place, capsys, monkeypatch):
    """A video that was there stays until the new one is whole."""
    words = ["--image", "image.png", "--frames"]
    assert sample(*words, "3") == 0
    before = (place / "out.mp4").read_bytes()
    stop_in_chunk(monkeypatch, 2)
    assert sample(*words, "40") == 130 and (place / "out.mp4").read_bytes() == before
    assert "out.mp4, out_sheet.png: of an earlier run, kept until the video is whole" in capsys.readouterr().out
    assert sample(*words, "40", "--continue") == 0 and len(read("out.mp4")) == 40
    words[-1:] = ["--out", "other.mp4", "--frames", "80"]
    for chunk, more in ((2, []), (3, ["--continue"])):  # its own short film grows
        stop_in_chunk(monkeypatch, chunk)
        assert sample(*words, *more) == 130 and len(read("other.mp4")) == 33 * (chunk - 1)


def test_stopping_as_the_state_is_written(place, monkeypatch):
    """A chunk whose state is in place is never removed."""
    stopped = Output.add

    def add(self, *rest):
        stopped(self, *rest)
        self.counts = []  # as if the program had not come to count it
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "add", add)
    assert sample("--image", "image.png", "--frames", "40") == 130
    monkeypatch.setattr(Output, "add", stopped)
    assert sample("--image", "image.png", "--frames", "40", "--continue") == 0 and len(read("out.mp4")) == 40


WAYS = {
    "Pi3X": ["--image", "image.png", "--move", "forward 1, right 1, up 1", "--frames", "80", "--set", "keyframes=2", *PI3X],
    "depth": ["--image", "image.png", "--poses", "poses.json", "--depth", "depth.npy", "--frames", "80"],
    "warp": ["--image", "image.png", "--warp", "warp.npy", "mask.npy", "--frames", "80"],
    "image": ["--image", "image.png", "--frames", "80"],
    "text": ["--frames", "80"],
    "video": ["--video", "warp.npy", "--frames", "80"],
}


@pytest.mark.parametrize("way", WAYS)
def test_continued_equals_uninterrupted(place, monkeypatch, way):
    """Everything that is left of a run: video, warp, sheet and latents, after a failure in the second and the third chunk."""

    def run(name: str, *more: str) -> int:
        (place / name).mkdir(exist_ok=True)
        return sample(*WAYS[way], "--out", f"{name}/out.mp4", "--set", f"latents={name}/x.safetensors", *more)

    assert run("whole") == 0
    for chunk in (2, 3):
        stop_in_chunk(monkeypatch, chunk, RuntimeError)
        with pytest.raises(RuntimeError):
            run("parts", *(["--continue"] if chunk == 3 else []))
        assert [path.name for path in (place / "parts").iterdir()] == ["out_parts"]
    assert run("parts", "--continue", "--memory", "stream") == 0
    made = {path.name: path.read_bytes() for path in (place / "whole").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (place / "parts").iterdir()}
    assert {"out.mp4", "out_sheet.png", "x.safetensors"} <= made.keys() and len(read("parts/out.mp4")) == 80


@pytest.mark.parametrize("first, then", [((), ("--check",)), (("--check",), ())])
def test_a_check_comes_and_goes(place, monkeypatch, first, then):
    """It takes Pi3X, which the video itself does not depend on beside a depth map."""
    weights = place / "weights" / "model"
    shutil.copytree(DISTILLED, weights)
    (weights.parent / "Pi3X").mkdir()
    shutil.copy(PI3X[1].removeprefix("geometry="), weights.parent / "Pi3X" / "model.safetensors")
    stop_in_chunk(monkeypatch, 2)
    assert sample(*WAYS["depth"], *first, weights=weights) == 130
    assert sample(*WAYS["depth"], *then, "--continue", weights=weights) == 0
    assert len(read("out.mp4")) == 80 and Path("out_check.json").exists()


def test_stopping_before_a_new_chunk_is_whole(place, capsys, monkeypatch):
    """What was there already is kept; nothing is said of the visible share of what was not written."""
    words = ["--image", "image.png", "--warp", "warp.npy"]
    stop_in_chunk(monkeypatch, 2)
    assert sample(*words) == 130
    add = Output.add

    def stop(self, *given):
        monkeypatch.setattr(Output, "add", add)
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "add", stop)
    capsys.readouterr()
    assert sample(*words, "--continue") == 130
    assert "keeping the 33 frames" in capsys.readouterr().out and len(read("out.mp4")) == 33


def test_a_picture_that_goes_during_the_run(place, monkeypatch):
    finish = Rollout.finish
    monkeypatch.setattr(Rollout, "finish", lambda *given: (Path("image.png").unlink(), finish(*given))[1])
    assert sample("--image", "image.png", "--warp", "warp.npy", "--frames", "3") == 0
    assert len(read("out.mp4")) == 3


def test_a_killed_run_goes_on(place):
    """The system ends a run at once, wherever it is; nothing is lost but the chunk that was being made."""
    words = ["--weights", str(DISTILLED), "--size", SIZED, "--set", "device=cpu", "--image", "image.png", "--warp", "warp.npy"]
    run = subprocess.Popen([sys.executable, Path(files.__file__).parents[1] / "sample.py", *words], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    state = place / "out_parts" / "state.safetensors"
    while run.poll() is None and not state.exists():
        time.sleep(0.01)
    run.kill()
    run.wait()
    done = json.loads(open_safetensors(state).metadata()["counts"])
    assert 0 < len(done) < 3 and not (place / "out.mp4").exists()
    assert main([*words, "--continue", "--set", "latents=x.safetensors"]) == 0 and not state.parent.exists()
    assert main([*words, "--set", "latents=y.safetensors", "--out", "whole.mp4"]) == 0
    assert torch.equal(load_file("x.safetensors")["latents"], load_file("y.safetensors")["latents"])
    assert np.array_equal(read("out.mp4"), read("whole.mp4"))


def test_another_video_is_not_continued(capsys, place, monkeypatch):
    """What made the first chunks has to be the same, by content; what only says how to compute may change."""
    words = ["--image", "image.png", "--move", "forward 1, up 1", "--depth", "depth.npy"]
    refused(capsys, place, [*words, "--continue"], "out_parts/state.safetensors", "no such file")
    stop_in_chunk(monkeypatch, 2)
    assert sample(*words) == 130
    np.save("depth2.npy", np.load("depth.npy") + 1)
    Image.open("image.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("flipped.png")
    weights = place / "weights"
    shutil.copytree(DISTILLED, weights)
    capsys.readouterr()

    def differs(name: str, *more: str, weights=DISTILLED):
        refused(capsys, place, [*words, *more, "--continue"], "state.safetensors", f": {name} was ", weights=weights)

    differs("seed", "--set", "seed=1")
    differs("prompt", "--prompt", "a car")
    differs("image", "--image", "flipped.png")
    differs("depth", "--depth", "depth2.npy")
    differs("move", "--move", "forward 2, up 1")
    differs("frames", "--frames", "60")
    differs("size", "--size", "64x64")
    differs("fp8", "--memory", "fp8")
    differs("lora", "--lora", str(HELIOS / "lora_prefix.safetensors"))
    edited = load_file(weights / "vae" / "diffusion_pytorch_model.safetensors")
    edited["decoder.conv_out.bias"] += 0.1
    save_file(edited, weights / "vae" / "diffusion_pytorch_model.safetensors")
    differs("weights", weights=weights)
    state = place / "out_parts" / "state.safetensors"
    whole = state.read_bytes()
    save_file({"x": torch.zeros(1)}, state)
    refused(capsys, place, [*words, "--continue"], "not a state")
    state.write_bytes(whole[:-9])
    refused(capsys, place, [*words, "--continue"], "not a complete")
    state.write_bytes(whole)
    shutil.move("image.png", "moved.png")
    assert sample(*words, "--image", "moved.png", "--continue", "--set", "latents=x.safetensors") == 0


def test_settings_beside_a_lora_are_part_of_it(capsys, place, monkeypatch):
    """PEFT's adapter_config.json scales the LoRA: a run that it changed under is not continued."""
    shutil.copyfile(HELIOS / "lora_noprefix.safetensors", "adapter_model.safetensors")
    with open("adapter_config.json", "w") as file:
        json.dump({"r": 4, "lora_alpha": 4}, file)
    words = ["--image", "image.png", "--move", "forward 1, up 1", "--depth", "depth.npy", "--lora", "adapter_model.safetensors"]
    stop_in_chunk(monkeypatch, 2)
    assert sample(*words) == 130
    with open("adapter_config.json", "w") as file:
        json.dump({"r": 4, "lora_alpha": 8}, file)
    capsys.readouterr()
    refused(capsys, place, [*words, "--continue"], "state.safetensors", ": lora was ")


def test_joining_alone_needs_no_networks(place, monkeypatch):
    """A run that died after its last chunk is finished without loading any."""
    words = ["--image", "image.png", "--move", "forward 1", "--depth", "depth.npy"]
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(Output, "join", lambda *arguments: [][0])
        sample(*words, "--set", "latents=x.safetensors")
    with monkeypatch.context() as patch:
        for name in ("load_models", "encode_each"):
            patch.setattr(f"sample.{name}", lambda *arguments: pytest.fail("loaded"))
        assert sample(*words, "--set", "latents=x.safetensors", "--continue") == 0
    assert sample(*words, "--set", "latents=y.safetensors", "--out", "whole.mp4") == 0
    assert np.array_equal(read("out.mp4"), read("whole.mp4"))
    assert torch.equal(load_file("x.safetensors")["latents"], load_file("y.safetensors")["latents"])
