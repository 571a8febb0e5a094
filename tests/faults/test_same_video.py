"""What "the same video" means (docs/files.md): the same bits with the same number of threads, else a bound."""

from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import DISTILLED, record
from PIL import Image
from safetensors.torch import load_file

from files.video import write_video
from sample import main


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
    small.resize((64, 64), Image.Resampling.BICUBIC).save("image.png")
    np.save("depth.npy", np.linspace(3, 1, 64, dtype=np.float32)[:, None].repeat(64, 1))
    yield tmp_path
    torch.set_num_threads(1)


def made(name: str, *more: str) -> dict[str, bytes]:
    Path(name).mkdir()
    words = ["--image", "image.png", "--depth", "depth.npy", "--move", "forward 1, yaw 10", "--size", "64x64",
             "--weights", str(DISTILLED), "--out", f"{name}/v.mp4", *more]
    assert main([*words, "--set", "device=cpu", "geometry_pixels=4000", f"latents={name}/x.safetensors"]) == 0
    return {path.name: path.read_bytes() for path in Path(name).iterdir()}


def test_equal_words_give_equal_files(place):
    one, again, other = made("one"), made("again"), made("other", "--set", "seed=1")
    assert one == again and one.keys() == {"v.mp4", "v_warp.mp4", "v_sheet.png", "x.safetensors"}
    assert one["v_warp.mp4"] == other["v_warp.mp4"] and one["v.mp4"] != other["v.mp4"]


@pytest.mark.slow  # on a busy machine two threads wait for each other
def test_another_number_of_threads(place):
    """With given geometry: the same warp, and latents that differ by rounding."""
    one = made("one")
    torch.set_num_threads(2)
    two = made("two")
    assert one["v_warp.mp4"] == two["v_warp.mp4"]
    latents = [load_file(f"{name}/x.safetensors")["latents"] for name in ("one", "two")]
    difference = (latents[0] - latents[1]).abs().max().item()
    record("one thread against two, latents, max", difference, 5e-3, "abs")
    assert difference <= 5e-3


def test_equal_frames_give_equal_files(tmp_path):
    """The encoder's choices don't depend on what was in memory before."""
    rng, files = np.random.default_rng(3), set()
    frames = np.stack([np.asarray(Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).resize((64, 64))) for _ in range(7)])
    frames = (frames * 0.2 + np.asarray(Image.fromarray(frames[0][::8, ::8]).resize((64, 64))) * 0.8).astype(np.uint8)
    for _ in range(8):
        rubbish = [rng.integers(0, 255, rng.integers(100, 60000), np.uint8) for _ in range(400)]
        del rubbish[::2]
        write_video(tmp_path / "v.mp4", frames, 16)
        files.add((tmp_path / "v.mp4").read_bytes())
    assert len(files) == 1
