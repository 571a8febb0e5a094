"""Killed, or out of room, at every single moment at which a run touches the disk: it goes on, and what is left in the
end is the same, byte for byte, and nothing else."""

import shutil

import numpy as np
import pytest
from dying import Killed, Moments, stand_in_for_sampling, stand_in_for_training
from goldens import DISTILLED
from PIL import Image

import sample
import train

SMALL = ["--weights", str(DISTILLED), "--size", "64x64"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save("image.png")
    np.save("clip.npy", np.zeros((40, 64, 64, 3), np.uint8))
    return tmp_path


def sampling(*more: str) -> int:
    return sample.main([*SMALL, "--image", "image.png", "--frames", "40", "--out", "o/v.mp4", "--set", "device=cpu",
                        "latents=o/x.safetensors", *more])


def training(*more: str) -> int:
    return train.main([*SMALL, "--video", "clip.npy", "--out", "o/run", "--device", "cpu", "--geometry", "image.png",
                       "--set", "steps=3", "save_every=2", "sample_every=2", *more])


RUNS = {"sampling": (sampling, stand_in_for_sampling, "--continue"),
        "training": (training, stand_in_for_training, "--resume")}


def made(folder) -> dict[str, bytes]:
    """What is in a folder; a run's own list of it has process numbers in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "manifest.txt"} | {
            str(path.relative_to(folder)): b"" for path in folder.rglob("*") if path.is_dir()}


def go_on(run, word: str) -> int:
    """As the user does: with the word, or, if nothing was saved, the same words again."""
    return 0 if run(word) == 0 else run()


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("how", ["kill", "full"])
def test_every_moment(place, kind, how, capsys, monkeypatch):
    run, stand_in, word = RUNS[kind]
    stand_in(monkeypatch)
    out = place / "o"
    out.mkdir()
    with monkeypatch.context() as patch:
        whole = Moments(patch)
        assert run() == 0
    expected = made(out)
    assert len(expected) == (3 if kind == "sampling" else 7)
    for at, what in enumerate(whole.seen):
        shutil.rmtree(out)
        out.mkdir()
        capsys.readouterr()
        with monkeypatch.context() as patch:
            moments = Moments(patch, at, how)
            try:
                status = run()
            except Killed:
                status = None
        assert len(moments.seen) == at + 1 or how == "full", what
        if how == "full" and status != 0:
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert status == 2 and ("no room" in error and "o/" in error), (what, error)
            assert not [name for name in made(out) if "/." in f"/{name}"], what  # nothing half is left
        with monkeypatch.context() as patch:
            Moments(patch)
            status = 0 if made(out) == expected else go_on(run, word)
        assert status == 0, (what, capsys.readouterr().err)
        assert made(out) == expected, (what, made(out).keys() ^ expected.keys())
    assert len(whole.seen) >= 60
    print(len(whole.seen), "moments")
