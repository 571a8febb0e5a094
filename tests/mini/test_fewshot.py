"""The curve over the number of clips: trained, stopped, gone on with, measured, drawn."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from files.draw import draw_means
from mini import fewshot, judge, world
from mini.pretrain import HELD_OUT
from mini.world import make_clip

WEIGHTS = Path(__file__).parents[2] / "weights" / "mini"


def two_clips(folder):
    """Small ones in place of the known ones."""
    folder.mkdir(parents=True)
    for name, seed in (("one", 5), ("two", 6)):
        world.write_clip(folder, name, lambda frames, size, seed=seed: make_clip(seed, 33, (64, 96)))
    (folder / "clips.csv").write_text("video,prompt\none.mp4,a room\ntwo.mp4,a square\n")


def test_the_curve(tmp_path, monkeypatch, capsys):
    small = tmp_path / "small"
    shutil.copytree(WEIGHTS, small)
    index = json.loads((small / "model_index.json").read_text())
    (small / "model_index.json").write_text(json.dumps(index | {"height": 64, "width": 96}))
    monkeypatch.setattr(fewshot, "write_known", two_clips)
    monkeypatch.setattr(evaluate, "held_out", lambda scenes, size: [HELD_OUT + 2000 + each for each in range(scenes)])
    trained, once = [], fewshot.train.main

    def count(words, code=None):
        trained.append((sum(word == "--video" for word in words), "--resume" in words))
        return code or once(words)

    out = tmp_path / "curve.md"
    words = ["--few-shot", "2", "0", "1", "--weights", str(small), "--scenes", "1", "--seeds", "1", "--processes", "1",
             "--out", str(out), "--set", "steps=3", "rank=4", "draws=1", "warmup=0", "save_every=1", "lr=0.02"]
    monkeypatch.setattr(fewshot.train, "main", partial(count, code=2))
    assert evaluate.main(words) == 2 and "the LoRA of 1 clips was not made" in capsys.readouterr().err
    monkeypatch.setattr(fewshot.train, "main", partial(count, code=130))  # Ctrl-C: what was learned so far is not it
    assert evaluate.main(words) == 2 and not list(tmp_path.glob("curve/*-clips.safetensors"))
    monkeypatch.setattr(fewshot.train, "main", count)
    assert evaluate.main(words) == 0
    assert trained == [(1, False), (1, False), (1, False), (2, False)]
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [*rows] == ["0 clips", "1 clips", "2 clips"]
    found = [row[f"scene-{HELD_OUT + 2000}"]["psnr"] for row in rows.values()]
    assert len({*found}) == 3, found
    estimated = json.loads(out.with_suffix(".json").read_text())["estimated"]
    assert [*estimated] == [*rows] and estimated["1 clips"] != rows["1 clips"]
    assert out.read_text().count("difference from 0 clips") == 2
    assert "difference from 0 clips" in out.read_text() and "steps=3" in out.read_text()
    assert Image.open(out.with_suffix(".png")).size == (640, 360)
    monkeypatch.setattr(judge, "judge", None)
    assert evaluate.main(words) == 0 and len(trained) == 4
    assert evaluate.main([*words, "lr=0.03"]) == 2 and "differs in lr;" in capsys.readouterr().err
    (small / "scheduler" / "scheduler_config.json").write_text("{}")
    assert evaluate.main(words) == 2 and "differs in weights;" in capsys.readouterr().err
    assert len(trained) == 4


@pytest.mark.parametrize("more, message", [
    (("--set", "stepz=3"), "--set stepz=3: expected"), (("--seeds", "0"), "--seeds 0: expected"),
    (("--part", "2/1"), "--part '2/1'"),
])
def test_bad_words_leave_nothing(more, message, capsys, tmp_path):
    assert evaluate.main(["--few-shot", "0", "1", *more, "--out", str(tmp_path / "x.md")]) == 2
    assert message in capsys.readouterr().err and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("words, said", [(["--mini"], "stopped, before the table; the same words go on"),
                                         (["--few-shot", "0", "1"], "the same words go on"), (["x"], "nothing written")])
def test_stopped(words, said, monkeypatch, capsys, tmp_path):
    """What was made stays, where the program makes anything."""
    def stop(args):
        raise KeyboardInterrupt

    for task, (_, options) in list(evaluate.TASKS.items()):
        monkeypatch.setitem(evaluate.TASKS, task, (stop, options))
    assert evaluate.main([*words, "--out", str(tmp_path / "x.md")]) == 130
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("counts", [["1"], ["0", "99"], ["-1", "1"]])
def test_numbers_of_clips(counts, capsys, tmp_path):
    assert evaluate.main(["--few-shot", *counts, "--out", str(tmp_path / "x.md")]) == 2
    assert "--few-shot" in capsys.readouterr().err


def test_the_plot():
    """A mean stands where its number is on the scale, and an error reaches above and below it."""
    plot = draw_means([0.0, 4.0], {"a": [(1.0, 0.5), (3.0, float("nan"))]}, "clips").astype(int)
    blue = (np.abs(plot - [0, 0, 139]).sum(-1) < 60)
    first, last = np.nonzero(blue[30:320, 56])[0] + 30, np.nonzero(blue[30:320, 610])[0] + 30
    assert last.max() < first.min() and len(first) > 3 * len(last)
