"""sample.py --list: many videos with the networks loaded once; what is finished, what fails, parts, bad lists."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import DISTILLED
from PIL import Image
from pretend import Card
from safetensors.torch import load_file

import sample
from helios.load import encode_each
from wah import Rollout

LIST = """image,move,prompt,seed,out,steps,latents
image.png,,a street,1,a.mp4,"1,1,1",a.safetensors
image.png,,"a car, red | at night",2,b.mp4,"2,1,1",
none.png,,a street,3,c.mp4,"1,1,1",
,,a wall,4,d.mp4,"1,1,1",d.safetensors
image.png,,,5,e.mp4,"1,1,1",
image.png,,a street,6,f.mp4,"1,1,1",
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save("image.png")
    Path("jobs.csv").write_text(LIST)
    return tmp_path


@pytest.fixture
def loaded(monkeypatch):
    """How often each thing was loaded."""
    seen = {"load_models": 0, "embed_prompts": 0}

    def counting(name):
        original = getattr(sample, name)

        def call(*words):
            seen[name] += 1
            return original(*words)
        monkeypatch.setattr(sample, name, call)

    for name in seen:
        counting(name)
    return seen


def run(*words: str) -> int:
    return sample.main(["--weights", str(DISTILLED), "--size", "64x64", "--frames", "2", "--set", "device=cpu", *words])


def videos() -> list[str]:
    return sorted(path.name for path in Path().glob("*.mp4"))


def test_six_rows_one_of_them_bad(place, capsys, loaded):
    """All others are made, as they are by themselves; a second call makes the one that failed, and nothing else."""
    assert run("--list", "jobs.csv") == 2
    said = capsys.readouterr()
    assert "6 rows, 5 made, 0 were there, 1 failed" in said.out
    assert "1 of 6 rows failed: row 3 (none.png" in said.err.splitlines()[-1]
    assert videos() == ["a.mp4", "b.mp4", "d.mp4", "e.mp4", "f.mp4"] and loaded == {"load_models": 1, "embed_prompts": 1}
    assert run("--prompt", "a wall", "--set", "seed=4", "steps=1,1,1", "latents=alone.safetensors", "--out", "alone.mp4") == 0
    assert np.array_equal(load_file("alone.safetensors")["latents"], load_file("d.safetensors")["latents"])
    before = {name: Path(name).stat().st_mtime_ns for name in videos()}
    shutil.copy("image.png", "none.png")
    assert run("--list", "jobs.csv") == 0
    assert "6 rows, 1 made, 5 were there, 0 failed" in capsys.readouterr().out and Path("c.mp4").is_file()
    assert all(Path(name).stat().st_mtime_ns == time for name, time in before.items())


def test_parts(place, capsys):
    """Every second row from the first, from the second: together all of them, none twice."""
    assert run("--list", "jobs.csv", "--set", "part=2/2") == 0
    assert videos() == ["b.mp4", "d.mp4", "f.mp4"]
    assert run("--list", "jobs.csv", "--set", "part=1/2") == 2
    assert videos() == ["a.mp4", "b.mp4", "d.mp4", "e.mp4", "f.mp4"]
    assert "3 rows, 2 made, 0 were there, 1 failed" in capsys.readouterr().out


def test_stopped_lists_go_on(place, capsys, monkeypatch):
    """Ctrl-C in the second chunk of the second row: the first row stays, the second goes on after its first chunk."""
    original, count = Rollout.next, []

    def next_chunk(self, *control):
        count.append(self.chunk)
        if len(count) == 4:  # after two chunks of the first row and one of the second
            raise KeyboardInterrupt
        return original(self, *control)

    monkeypatch.setattr(Rollout, "next", next_chunk)
    words = ["--list", "jobs.csv", "--frames", "40", "--set", "part=1/3"]  # rows 1 and 4
    assert run(*words) == 130
    assert "the same words go on" in capsys.readouterr().err and Path("d_parts").is_dir()
    count.clear()
    monkeypatch.setattr(Rollout, "next", original)
    assert run(*words) == 0
    assert "2 rows, 1 made, 1 were there" in capsys.readouterr().out and not Path("d_parts").exists()


def test_ctrl_c_in_a_first_chunk_tells_of_the_rows_before_it(place, capsys, monkeypatch):
    original = Rollout.next

    def next_chunk(self, *control):
        if Path("a.mp4").is_file():
            raise KeyboardInterrupt
        return original(self, *control)

    monkeypatch.setattr(Rollout, "next", next_chunk)
    assert run("--list", "jobs.csv", "--set", "part=1/3") == 130
    assert "after 1 videos" in capsys.readouterr().err


def test_only_what_a_list_needs_is_embedded(place, monkeypatch):
    """Both prompts of a row at once, with and without a LoRA's word; that of guidance if a row may be guided."""
    seen = []
    monkeypatch.setattr(sample, "embed_prompts", lambda weights, prompts, *more: seen.append({*prompts}) or 1 / 0)
    for text in ("out,prompt\na.mp4,a | b\n", "out,prompt,guidance\na.mp4,a,1\n"):
        Path("jobs.csv").write_text(text)
        with pytest.raises(ZeroDivisionError):
            run("--list", "jobs.csv")
    assert {"a", "b"} < seen[0] and len(seen[0]) == 4 and seen[1] - seen[0] == {sample.NEGATIVE_PROMPT}


def test_prompts_wait_on_the_host(monkeypatch):
    """Those of a thousand rows would fill a card: a video has its own there, and no others."""
    monkeypatch.setattr("helios.load.encode_prompt", lambda *_: torch.empty(1, 512, 8, device="meta"))
    networks = sample.Networks(lambda *_: None, map(str, range(20)))
    with Card() as card:
        (mine,) = encode_each(DISTILLED, ["3"], True, False, "meta", "full", networks.embed)
    assert mine.plain.is_meta and mine.trigger.is_meta and len(networks.embedded) == 40
    assert card.peak == mine.plain.nbytes + mine.trigger.nbytes


def test_rows_do_not_share_a_file(place, capsys):
    Path("jobs.csv").write_text("out\na.mp4\nb.mp4\n")
    assert run("--list", "jobs.csv", "--set", "latents=x.safetensors") == 2
    assert "rows 1 and 2 could both write x.safetensors" in capsys.readouterr().err and not videos()
    for names, shared in (("w.mp4 w_warp.mp4", "w_warp.mp4"), ("u.mp4 u.MP4", "u.mp4"), ("a.mp4 ./a.mp4", "a.mp4")):
        Path("jobs.csv").write_text("\n".join(["out", *names.split()]))
        assert run("--list", "jobs.csv") == 2
        assert f"rows 1 and 2 could both write {shared}" in capsys.readouterr().err and not videos()


@pytest.mark.parametrize("text, parts", [
    ("image,prompt\nimage.png,a\n", ["expected out"]), ("out,colour\na.mp4,red\n", ["colour", "seed"]), ("out\na.mp4\n./a.mp4\n", ["rows 1 and 2", "a.mp4"]),
    ("out,seed\n", ["at least one row"]), ("out,device\na.mp4,cpu\n", ["device"]), ("out,list\na.mp4,jobs.csv\n", ["list"]),
])
def test_bad_lists_are_refused_before_any_work(place, capsys, loaded, text, parts):
    Path("jobs.csv").write_text(text)
    assert run("--list", "jobs.csv") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sample.py: error: jobs.csv") and all(part in error for part in parts), error
    assert not videos() and not any(loaded.values())


@pytest.mark.parametrize("row, reason", [
    ("a.mp4,1,2", "3 fields, expected 2"), ("a.mp4", "1 fields, expected 2"), (",1", "no out"), ("a.mp4,one", "--set seed=one"),
    ("a.txt,1", ".mp4"), ("a.mp4,-1", "seed is -1"),
])
def test_bad_rows_are_named(place, capsys, row, reason):
    Path("jobs.csv").write_text(f"out,seed\n{row}\nb.mp4,1\n")
    assert run("--list", "jobs.csv", "--set", "steps=1,1,1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 2 rows failed: row 1" in error and reason in error, error
    assert videos() == ["b.mp4"]


def test_the_list_is_no_output(place, capsys):
    Path("jobs.csv").write_text("out,latents\na.mp4,list.safetensors\n")
    Path("list.safetensors").hardlink_to("jobs.csv")
    assert run("--list", "jobs.csv") == 2
    assert "would overwrite" in capsys.readouterr().err and Path("jobs.csv").read_text().startswith("out,")
