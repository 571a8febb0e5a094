"""SIGKILL at random moments, with the real networks and the real encoder, to the commands as a user runs them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from goldens import DISTILLED
from PIL import Image

import files

ROOT = Path(files.__file__).parents[1]
SAMPLE = ["sample.py", "--weights", str(DISTILLED), "--size", "64x64", "--image", "image.png", "--depth", "depth.npy", "--move",
          "forward 1, yaw 10, hold", "--set", "device=cpu", "latents=o/x.safetensors", "--out", "o/v.mp4"]
TRAIN = ["train.py", "--weights", str(DISTILLED), "--size", "64x64", "--device", "cpu", "--video", "clip.npy", "--poses", "poses.json",
         "--depth", "depths.npz", "--out", "o", "--set", "steps=8", "save_every=2", "rank=4"]


def start(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def made() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("o").rglob("*") if path.is_file() and path.name != "manifest.txt"}


@pytest.mark.slow
@pytest.mark.parametrize("words, word, state", [(SAMPLE, "--continue", "o/v_parts/state.safetensors"),
                                                (TRAIN, "--resume", "o/state.safetensors")], ids=["sampling", "training"])
def test_sigkill(tmp_path, monkeypatch, words, word, state):
    monkeypatch.chdir(tmp_path)
    rng, chance = np.random.default_rng(0), Random(0)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((64, 64)).save("image.png")
    np.save("depth.npy", np.full((64, 64), 2, np.float32))
    np.save("clip.npy", np.stack([np.roll(np.asarray(Image.open("image.png")), shift, 1) for shift in range(36)]))
    np.savez("depths.npz", np.full((36, 64, 64), 2, np.float32))
    c2w = np.tile(np.eye(4), (36, 1, 1))
    c2w[:, 0, 3] = np.arange(36) / 32
    Path("poses.json").write_text(str({"c2w": c2w.tolist()}).replace("'", '"'))
    Path("o").mkdir()
    begin = time.monotonic()
    assert start(words).wait() == 0
    took, expected = time.monotonic() - begin, made()
    kills = 0
    for path in Path("o").iterdir():
        path.unlink()
    for _ in range(12):
        run = start([*words, word] if Path(state).exists() else words)
        try:
            run.wait(chance.uniform(0.5, 1) * took)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            kills += 1
            continue
        assert run.returncode == 0, run.stderr.read()
        break
    else:
        run = start([*words, word] if Path(state).exists() else words)
        assert run.wait() == 0, run.stderr.read()
    assert kills and made() == expected
