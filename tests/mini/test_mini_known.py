"""Held-out scenes of the miniature's world: exact warps, the camera search, and the table of all ways."""

import json
import shutil
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

import evaluate
from evaluation.quality import measure
from files.media import from_frames, to_frames
from geometry.camera import WINDOW
from geometry.surface import geometry_from_depth
from mini import judge, known
from mini.pretrain import HELD_OUT
from mini.world import make_clip, make_scene
from render import RenderSettings

SMALL = 64, 96
WEIGHTS = Path(__file__).parents[2] / "weights" / "mini"


@cache
def suited(seed):
    """The first seed from there on that suits."""
    return next(each for each in range(seed, seed + 40) if known.suits(each, SMALL))


@cache
def make_scene_of(seed):
    return known.scene_of(make_clip(suited(seed), WINDOW, SMALL))


def test_an_estimated_warp_is_rendered_as_set(monkeypatch):
    clip, seen = make_clip(HELD_OUT + 2000, WINDOW, SMALL), []
    geometry = geometry_from_depth(from_frames(clip.frames)[:, :, 0], clip.depth[0].clamp(max=50), clip.K)
    monkeypatch.setattr(known, "estimate", lambda *_: [geometry])
    monkeypatch.setattr(known, "render", lambda *words: seen.append(words[3]))
    known.scene_of(clip, object(), RenderSettings(2))
    assert seen == [RenderSettings(2)]


def shown(scene):
    return scene.warp.visible[0, 0].numpy() > 0


def test_exact_warps_show_the_truth():
    scene = make_scene_of(HELD_OUT + 2000)
    visible = shown(scene)
    assert visible[0].all()
    torch.testing.assert_close(scene.warp.frames[:, :, 0], scene.video[:, :, 0], rtol=0, atol=1e-3)
    measured = measure(to_frames(scene.warp.frames), scene.clip.frames.numpy(), visible)
    assert measured["psnr visible"] > 28 and measured["ssim visible"] > 0.65 and measured["psnr not visible"] < 20
    hole = scene.warp.frames[:, :, -1][:, :, ~torch.from_numpy(visible[-1])]
    torch.testing.assert_close(hole[0, :, 0], scene.video[0, :, 0].mean((1, 2)))


def test_cameras_are_found():
    """In the truth, in a noisy copy of it, and in a video that stands still, whose camera lags by a known motion."""
    scene, shown = make_scene_of(HELD_OUT + 2017), make_scene(Random(suited(HELD_OUT + 2017)))
    noise = 0.1 * torch.randn(scene.video.shape, generator=torch.Generator().manual_seed(0))
    for video, worst in ((scene.video, (0.05, 0.005)), (scene.video + noise, (0.3, 0.05))):
        error = known.camera_error(video, shown, scene.clip, [20])
        assert error["turn"] < worst[0] and error["shift"] < worst[1]
    still = known.camera_error(scene.video[:, :, :1].expand_as(scene.video), shown, scene.clip, [16, 32])
    c2w = scene.clip.c2w.double()
    apart = torch.linalg.inv(c2w[[16, 32]]) @ c2w[0]
    angles = ((apart[:, 0, 0] + apart[:, 1, 1] + apart[:, 2, 2] - 1) / 2).acos().rad2deg()
    assert still["turn"] == pytest.approx(angles.mean().item(), abs=0.05) and angles.mean() > 5
    assert still["shift"] == pytest.approx(apart[:, :3, 3].norm(dim=1).mean().item(), abs=0.005)


def test_ghosts_are_counted_where_nothing_is_visible():
    scene = make_scene_of(HELD_OUT + 2000)
    truth, visible = scene.clip.frames.numpy(), shown(scene)
    assert known.ghost(to_frames(scene.warp.frames), truth[0], visible) == 1
    assert known.ghost(np.zeros_like(truth), truth[0], visible) == 0
    assert known.ghost(truth, truth[0], visible) < 0.3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The shipped weights at a quarter of their size."""
    folder = tmp_path_factory.mktemp("weights") / "small"
    shutil.copytree(WEIGHTS, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"height": SMALL[0], "width": SMALL[1]}))
    return folder


def test_the_table(small, tmp_path, monkeypatch, capsys):
    """Parts fill it scene by scene, what is there is not made again, and other weights are refused."""
    searched = []
    monkeypatch.setattr(judge, "camera_error", lambda video, scene, clip, at: searched.append(at) or {"turn": 1.5})
    monkeypatch.setattr(judge, "WALK", 1)
    monkeypatch.setattr(evaluate, "held_out", lambda scenes, size: [HELD_OUT + 2000 + each for each in range(scenes)])
    out = tmp_path / "mini.md"
    words = ["--mini", "--weights", str(small), "--scenes", "2", "--seeds", "1", "--processes", "1", "--found", "16"]
    assert evaluate.main([*words, "--out", str(out), "--part", "2/2"]) == 0
    assert "1 of 2 scenes are there" in capsys.readouterr().out and not out.exists()
    assert evaluate.main([*words, "--out", str(out)]) == 0
    table = out.read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    rows = names[2 : names.index("difference from full, smooth filling")]
    assert rows[:7] == ["the truth", "the truth, through the VAE", "the smooth filling alone",
                        "the smooth filling alone, through the VAE", "the mean filling alone",
                        "the mean filling alone, through the VAE", "no camera"]
    assert rows[7:] == [f"{idea}, {fill} filling" for fill in ("smooth", "mean") for idea in
                        ("not aligned", "no drop", "full", "full, estimated geometry")][:-1]
    assert searched == [[16]] * (2 * len(rows)) and "PSNR chunk 1" in table and "camera turn" in table
    numbers = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert all(len(videos) == 2 for videos in numbers.values()) and set(numbers) == set(rows)
    assert all(each["psnr"] == 100 for each in numbers["the truth"].values())
    assert evaluate.main([*words, "--out", str(out)]) == 0 and len(searched) == 2 * len(rows)
    assert out.read_text() == table
    words[words.index("--seeds") + 1] = "2"
    assert evaluate.main([*words, "--out", str(out)]) == 2
    assert "measured with other weights, LoRAs or seeds" in capsys.readouterr().err
