"""Nothing of the user's is lost: foreign files, inputs under every name, links, two runs at once, what dead runs left."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dying import Frames, Killed, Moments, Steps, stand_in_for_sampling, stand_in_for_training
from goldens import DISTILLED, HELIOS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_kills import SMALL, made

import render
import sample
import train
from files import folder, state, writing
from files.output import Output


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Pictures, a clip, weights, and both programs with a small stand-in for their networks."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("frames").mkdir()
    for index in range(36):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(f"frames/sample_{index:06d}.png")
    shutil.copy("frames/sample_000000.png", "image.png")
    np.save("clip.npy", np.zeros((40, 64, 64, 3), np.uint8))
    shutil.copytree(DISTILLED, "weights")
    shutil.copy(HELIOS / "lora_noprefix.safetensors", "weights/lora.safetensors")
    Path("poses.json").write_text(json.dumps({"c2w": [np.eye(4).tolist()] * 2}))
    stand_in_for_sampling(monkeypatch)
    stand_in_for_training(monkeypatch)
    return tmp_path


def sampling(*words: str) -> int:
    return sample.main(["--weights", "weights", "--size", "64x64", "--frames", "40", "--set", "device=cpu", *words])


def training(*words: str) -> int:
    start = [] if "--video" in words else ["--video", "clip.npy"]
    return train.main(["--weights", "weights", "--size", "64x64", "--device", "cpu", "--geometry", "image.png", *start, *words,
                       "--set", "steps=2"])


def refused(capsys, run, words: list[str], *parts: str) -> None:
    """Exit status 2, one line with `parts`, and everything is as it was."""
    before = made(Path.cwd())
    capsys.readouterr()
    assert run(*words) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and all(part in error for part in parts), error
    assert made(Path.cwd()) == before


# ------------------------------------------------------------------------------------------- what is not the run's own


FOREIGN = ("sample_vacation.png", "lora.safetensors", "loss.png", "state.safetensors", "0000_video.mp4", "notes.txt",
           "2019_holiday_video.mp4", "my_state_dict.safetensors", "00001-of-00002.safetensors", ".0secret.txt")


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_folder_is_refused(place, capsys, name):
    for path in (place / "out_parts", place / "run"):
        path.mkdir()
        (path / name).write_text("mine")
    refused(capsys, sampling, [], "out_parts", "manifest.txt", "choose another --out")
    refused(capsys, sampling, ["--continue"], "out_parts", "did not make")
    for words in ([], ["--overwrite"], ["--resume"]):
        refused(capsys, training, ["--out", "run", *words], "run", "did not make")


def test_foreign_files_in_a_marked_folder_stay(place, capsys, monkeypatch):
    """Beside the run's own they are neither removed nor replaced; one in the way of a new file stops the run."""
    assert training("--out", "run") == 0
    (place / "run" / "sample_vacation.png").write_text("mine")
    assert training("--out", "run", "--overwrite") == 0
    assert (place / "run" / "sample_vacation.png").read_text() == "mine"
    (place / "run" / "sample_000001.png").write_text("mine")
    capsys.readouterr()
    assert training("--out", "run", "--overwrite", "--set", "sample_every=1") == 2
    assert "sample_000001.png: not made by train.py" in capsys.readouterr().err
    assert (place / "run" / "sample_000001.png").read_text() == "mine"
    stop(monkeypatch)
    assert sampling() == 130
    (place / "out_parts" / "notes.txt").write_text("mine")
    assert sampling("--continue") == 0
    assert [path.name for path in (place / "out_parts").iterdir() if path.name != "manifest.txt"] == ["notes.txt"]
    assert sampling() == 0 and (place / "out_parts" / "notes.txt").read_text() == "mine"


def test_a_list_that_was_tampered_with_reaches_nothing_outside(place):
    with folder.Folder(place / "run", "train.py") as own:
        own.claim("mine.txt").write_text("")
    victim = place / "image.png"
    with open(place / "run" / "manifest.txt", "a") as file:
        file.write(f"file ../image.png\nfile {victim}\nfile ..\nfile .\nfile \nfile a/../../image.png\nfile cut")
    with folder.Folder(place / "run", "train.py") as own:
        assert own.names == ["mine.txt"]
        own.clear()
    assert victim.is_file() and not list((place / "run").iterdir())


@pytest.mark.parametrize("name", ["out_parts", "run"])
def test_links_are_not_followed(place, capsys, name):
    (place / "models").mkdir()
    (place / name).symlink_to(place / "models")
    run, words = (sampling, []) if name == "out_parts" else (training, ["--out", "run", "--overwrite"])
    refused(capsys, run, words, name, "a link")
    (place / name).unlink()
    (place / name).mkdir()
    (place / "mark").write_bytes(folder.Folder(place, "sample.py" if run is sampling else "train.py").header)
    os.link(place / "mark", place / name / "manifest.txt")
    refused(capsys, run, words, "manifest.txt", "hard link")


# ------------------------------------------------------------------------------------------------------ inputs are safe


@pytest.mark.parametrize("out", ["frames", "frames/new", "weights", "weights/vae", "weights/new/deep", "."])
def test_training_into_what_it_reads(place, capsys, out):
    """The frames of the clip, the weights, what lies in them, and what holds them."""
    for more in ([], ["--overwrite"]):
        refused(capsys, training, ["--video", "frames", "--out", out, *more], out, "which the run reads")


@pytest.mark.parametrize("words, culprit", [
    (["--set", "latents=weights/lora.safetensors"], "weights/lora.safetensors"),
    (["--set", "latents=weights/new.safetensors"], "weights/new.safetensors"),
    (["--set", "latents=weights/transformer/diffusion_pytorch_model-00001-of-00002.safetensors"], "weights/"),
    (["--image", "image.png", "--move", "hold", "--lora", "my.safetensors", "--set", "latents=my.safetensors"], "my.saf"),
    (["--image", "image.png", "--move", "hold", "--lora", "my.safetensors", "--set", "latents=./x/../my.safetensors"], "my.saf"),
    (["--image", "image.png", "--move", "hold", "--lora", "my.safetensors", "--set", "latents=soft.safetensors"], "soft.saf"),
    (["--image", "image.png", "--move", "hold", "--lora", "my.safetensors", "--set", "latents=hard.safetensors"], "hard.saf"),
    (["--set", "latents=shard.safetensors"], "shard.safetensors"),
    (["--video", "frames", "--out", "frames/o.mp4"], "frames/o.mp4"),
    (["--video", "frames", "--out", "frames/o.mp4", "--continue"], "frames/o.mp4"),
    (["--video", "frames", "--out", "linked/o.mp4"], "linked/o.mp4"),
    (["--out", "weights/o.mp4"], "weights/o"),
    (["--video", "clip.mp4", "--out", "clip.mp4"], "clip.mp4"),
    (["--image", "out_parts/image.png"], "out_parts"),
    (["--image", "image.png", "--poses", "colmap", "--out", "colmap/o.mp4"], "colmap/o"),
    (["--image", "image.png", "--move", "hold", "--set", "geometry=g.safetensors", "latents=g.safetensors"], "g.saf"),
])
def test_outputs_over_inputs(place, capsys, words, culprit):
    for name in ("my.safetensors", "g.safetensors", "clip.mp4"):
        shutil.copy("weights/lora.safetensors", name)
    os.link("my.safetensors", "hard.safetensors")
    Path("x").mkdir()
    Path("soft.safetensors").symlink_to("my.safetensors")
    Path("linked").symlink_to("frames")
    os.link(next(Path("weights/transformer").glob("*.safetensors")), "shard.safetensors")
    for name in ("colmap", "out_parts"):
        Path(name).mkdir()
        shutil.copy("image.png", name)
    refused(capsys, sampling, words, culprit, "which the run reads")


def test_a_preview_spares_its_inputs(place, capsys):
    shutil.copy("poses.json", "poses.mp4")
    Path("warp_mask.mp4").symlink_to("image.png")
    words = ["--image", "image.png", "--size", "64x64"]
    refused(capsys, lambda *more: render.main([*words, *more]), ["--move", "hold"], "warp_mask.mp4", "image.png")
    refused(capsys, lambda *more: render.main([*words, *more]), ["--poses", "poses.mp4", "--out", "poses.mp4"], "poses.mp4")


def test_latents_in_the_run_folder(place, capsys, monkeypatch):
    """They would be gone with it."""
    stop(monkeypatch)
    assert sampling() == 130
    refused(capsys, sampling, ["--continue", "--set", "latents=out_parts/0000.safetensors"], "out_parts/0000.safetensors")


# ---------------------------------------------------------------------------------------------------------- two at once


HOLD = """
import sys, time
from pathlib import Path
from files.folder import Folder
with Folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    folder.claim("x").write_text("")
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_runs_at_once(place, capsys):
    """The second is told at once which process is there; when that one is killed the folder is free again."""
    for name, program, run, words in (("out_parts", "sample.py", sampling, []), ("run", "train.py", training, ["--out", "run"])):
        other = subprocess.Popen([sys.executable, "-c", HOLD, name, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 env=os.environ | {"PYTHONPATH": str(Path(sample.__file__).parent)})
        try:
            assert other.stdout.readline() == b"locked\n"
            refused(capsys, run, words, name, f"process {other.pid} is at work there")
        finally:
            other.kill()
            other.communicate()
        assert run(*words) == 0


def test_a_lock_that_went_with_its_folder_counts_for_nothing(place, monkeypatch):
    """Between opening the list and locking it, the run before ended and took it away."""
    lock, calls = folder.lock, []

    def late(file):
        calls.append(file)
        if len(calls) == 1:
            shutil.rmtree("run")
        return lock(file)

    monkeypatch.setattr(folder, "lock", late)
    with folder.Folder(place / "run", "train.py") as own:
        own.claim("x").write_text("")
        assert folder.same_file(own.file, place / "run" / "manifest.txt") and len(calls) == 2
    assert sorted(path.name for path in (place / "run").iterdir()) == ["manifest.txt", "x"]


def test_without_locks(place, capsys, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert training("--out", "run") == 0 and "no locks on this file system" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what dead runs leave


def test_temporaries_of_the_dead_are_swept(place):
    """Only of this output, only under names that a process of ours writes, only if that process is gone."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = f".out.{dead.pid}-0123abcd.mp4", f".out_sheet.{dead.pid}-0123abcd.png", f".out.{os.getpid()}-0123abcd.mp4"
    stay = (f".out.{os.getppid()}-0123abcd.mp4", f".other.{dead.pid}-0123abcd.mp4", f".out.{dead.pid}.mp4", ".out.mp4",
            f".out.{dead.pid}-0123abcd.txt", f"out.{dead.pid}-0123abcd.mp4", f".out.{dead.pid}-0123ABCD.mp4")
    for name in (*gone, *stay):
        (place / name).write_text("")
    assert sampling() == 0
    left = {path.name for path in place.iterdir()}
    assert not left & set(gone) and left >= set(stay)
    assert training("--out", "run") == 0
    mine, foreign = place / "run" / f".state.{dead.pid}-0123abcd.safetensors", place / "run" / f".x.{dead.pid}-0123abcd.png"
    for path in (mine, foreign):
        path.write_text("")
    assert training("--out", "run", "--overwrite") == 0
    assert not mine.exists() and foreign.exists()


@pytest.mark.parametrize("after", ["0000_video", "state", "done"])
def test_killed_while_it_cleans_up(place, capsys, monkeypatch, after):
    """--continue says that the video is whole, and takes away what is left; the same words make it anew."""
    seen = {"0000_video": "after unlink out_parts/0000_video.mp4", "state": "after unlink out_parts/state.safetensors",
            "done": "in write out_parts/manifest.txt"}[after]
    with monkeypatch.context() as patch:
        moments = Moments(patch)
        assert sampling() == 0
    at = len(moments.seen) - 1 - moments.seen[::-1].index(seen)
    expected = made(place)
    for words in (["--continue"], []):
        with monkeypatch.context() as patch:
            Moments(patch, at)
            with pytest.raises(Killed):
                sampling()
        assert (place / "out_parts").exists()
        capsys.readouterr()
        if after == "done" and not words:  # the list ends in half a word: nothing is known to be done
            refused(capsys, sampling, [], "unfinished video", "--continue")
        else:
            assert sampling(*words) == 0
            assert words == [] or after == "done" or "whole" in capsys.readouterr().out
            assert made(place) == expected


def test_nothing_to_continue(place, capsys):
    refused(capsys, sampling, ["--continue"], "--continue", "out_parts/state.safetensors", "no chunk is there")
    assert sampling() == 0
    refused(capsys, sampling, ["--continue"], "out.mp4 is there, and nothing is left to be done")


def stop(monkeypatch, chunk: int = 2, error: type[BaseException] = KeyboardInterrupt, where=Frames, name="next") -> None:
    """Raise an error when something is called for the nth time."""
    original, calls = getattr(where, name), []

    def call(*arguments):
        calls.append(0)
        if len(calls) == chunk:
            monkeypatch.setattr(where, name, original)
            raise error
        return original(*arguments)

    monkeypatch.setattr(where, name, call)


def test_ctrl_c_says_what_is_kept(place, capsys, monkeypatch):
    """Before the first chunk nothing; while the video is joined, and when it is pressed twice, the chunks; in training
    the last step that was saved."""
    stop(monkeypatch, 1)
    before = made(place)
    assert sampling() == 130 and "stopped, nothing written" in capsys.readouterr().err and made(place) == before
    stop(monkeypatch, 1, where=Output, name="join")
    assert sampling() == 130
    error = capsys.readouterr().err
    assert "what is done is kept in out_parts" in error and "--continue" in error and "nothing" not in error
    refused(capsys, sampling, [], "--continue goes on")
    assert sampling("--continue") == 0
    stop(monkeypatch, 2, where=Steps, name="step")
    assert training("--out", "run", "--set", "save_every=1") == 130
    assert "run: step 1 is safe there" in capsys.readouterr().err
    stop(monkeypatch, 1, where=folder.Folder, name="finish")
    assert sampling("--out", "b.mp4") == 130 and "kept in b_parts" in capsys.readouterr().err


def test_training_that_stopped_before_it_saved(place, capsys, monkeypatch):
    """The same words begin; --resume says so."""
    stop(monkeypatch, 2, RuntimeError, Steps, "step")
    with pytest.raises(RuntimeError):
        training("--out", "run")
    assert (place / "run" / "metrics.jsonl").is_file()
    refused(capsys, training, ["--out", "run", "--resume"], "run/state.safetensors", "the same words without --resume")
    assert training("--out", "run") == 0
    refused(capsys, training, ["--out", "run"], "run", "--resume goes on", "--overwrite")


def test_bad_input_leaves_no_folder(place, capsys, monkeypatch):
    def bad(*_):
        raise ValueError("depth.npz: bad")

    monkeypatch.setattr("train.load_clips", bad)
    refused(capsys, training, ["--out", "new/deep/run"], "depth.npz")
    monkeypatch.setattr("sample.prepare", bad)
    refused(capsys, sampling, [], "depth.npz")
    (place / "mine").mkdir()
    refused(capsys, training, ["--out", "mine"], "depth.npz")  # an empty folder of the user's stays


# -------------------------------------------------------------------------------------------------- names and consoles


@pytest.mark.parametrize("name", ["a:b.mp4", "12:30.mp4", "#x.mp4", "C#/o.mp4", "takes #2/o?.mp4", "file:x.mp4", "pipe:1.mp4",
                                  "concat:x.mp4", "-x.mp4", "a'b\"c.mp4", "a\nb.mp4", "%d.mp4", "[a]*.mp4", "$(x).mp4",
                                  "\u00e9" * 100 + ".mp4", "a\udcff.mp4"])
def test_names_of_outputs(tmp_path, monkeypatch, name):
    """With the real encoder: the files are there under their names, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sample.Rollout", Frames)
    monkeypatch.setattr("sample.load_models", stand_in_models)
    monkeypatch.setattr("sample.encode_each", lambda *_: [None])
    Path(name).parent.mkdir(exist_ok=True)
    assert sample.main([*SMALL, f"--out={name}", "--frames", "34", "--set", "device=cpu"]) == 0
    stem = Path(name).stem
    assert {path.name for path in Path(name).parent.iterdir()} == {f"{stem}.mp4", f"{stem}_sheet.png"}


def stand_in_models(*_):
    from types import SimpleNamespace as Some

    return Some(schedule=Some(sampler=""))


def test_a_console_with_few_letters(place, monkeypatch):
    """The last print is no reason to fail."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert sampling("--out", "\u00e9\udcff.mp4") == 0
    assert b"wrote 40 frames: \\xe9\\udcff.mp4" in (sys.stdout.flush(), sys.stdout.buffer.getvalue())[1]
    assert sampling("--out", "\u00e9.txt") == 2
    monkeypatch.setattr(sys, "stdout", None)
    assert sampling("--out", "b.mp4") == 0


def test_read_only_folders(place, capsys, monkeypatch):
    """The system's own places where nobody may write, and a file system that has become read-only."""
    for out, part in (("/proc/o.mp4", "/proc/o.mp4: "), ("/sys/o.mp4", "/sys/o.mp4: ")):
        refused(capsys, sampling, ["--out", out], part)
    touch = Path.touch

    def read_only(path, *_, **__):
        if "locked" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        touch(path)

    Path("locked").mkdir()
    monkeypatch.setattr(Path, "touch", read_only)
    refused(capsys, sampling, ["--out", "locked/o.mp4"], "locked/o.mp4: nothing can be written there; choose another place")


# --------------------------------------------------------------------------------------------------- states and results


def test_equal_runs_give_equal_files(place):
    """Every byte of what two equal trainings leave, the order of a header's words too."""
    for name in ("one", "two"):
        assert training("--out", name) == 0
    assert made(place / "one") == made(place / "two")
    tensors, words = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.bfloat16)}, {f"key{n}": "\u00e9\"" for n in range(9)}
    (place / "x.safetensors").write_bytes(state.pack(tensors, words))
    with safe_open(place / "x.safetensors", "pt") as file:
        assert file.metadata() == words and list(file.metadata()) and torch.equal(file.get_tensor("a"), tensors["a"])
    assert torch.equal(load_file(place / "x.safetensors")["b"], tensors["b"])


@pytest.mark.parametrize("change", ["tensor", "word", "name", "piece", "gone", "json"])
def test_changed_states_and_pieces(place, capsys, monkeypatch, change):
    """Whatever is changed in a state, or in a chunk's files, its file is named and nothing is lost."""
    stop(monkeypatch)
    assert sampling() == 130
    path = place / "out_parts" / "state.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        words = file.metadata()
    if change == "tensor":
        tensors["rng"] = tensors["rng"][:-1]
    elif change == "word":
        words["counts"] = "5"
    elif change == "name":
        tensors["more"] = torch.zeros(1)
    elif change == "json":
        words["about"] = "[" * 100000
    culprit = path
    if change in ("piece", "gone"):
        culprit = place / "out_parts" / "0000_video.mp4"
        culprit.write_bytes(b"other") if change == "piece" else culprit.unlink()
    else:
        path.write_bytes(state.pack(tensors, words))
    refused(capsys, sampling, ["--continue"], str(culprit.relative_to(place)), "changed since it was written")


def test_another_number_of_threads_is_said(place, capsys, monkeypatch):
    stop(monkeypatch)
    assert sampling() == 130
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    assert sampling("--continue") == 0
    assert "going on with torch" in (out := capsys.readouterr().out) and "63 threads, begun with" in out
    assert training("--out", "run", "--set", "steps=1") == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 62)
    assert training("--out", "run", "--resume", "--set", "steps=2") == 0
    assert "62 threads, begun with" in capsys.readouterr().out


def test_a_process_that_runs():
    assert writing.alive(os.getpid()) and writing.alive(1)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert not writing.alive(dead.pid)
