"""What training sees: warps of a video with a known camera, its forms, and how poses and depths are paired with frames."""

import json
import math
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import DISTILLED
from PIL import Image
from training import refused, train_on

import render
from clips import (
    Case,
    Choices,
    Clip,
    Conditions,
    Geometries,
    change_form,
    draw_case,
    known_geometry,
    read_frames,
    render_case,
)
from files import media
from files.checkpoint import load
from files.cli import note
from geometry import surface
from geometry.camera import normalize
from geometry.surface import geometry_size
from helios.vae import VAE
from train import main


def side_scroll(count: int, size: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A camera that moves right along a wall at depth 2, one pixel a frame: frames [T,H,W,3], depths [T,H,W] and poses
    [T,4,4]."""
    y, x = np.mgrid[0:size, 0:size + count]
    wall = np.stack([128 + 90 * np.sin(x / 5) * np.cos(y / 7), 128 + 90 * np.sin(x / 9 + y / 11), 2 * y + 40], axis=-1)
    frames = np.stack([wall[:, t:t + size] for t in range(count)]).round().astype(np.uint8)
    c2w = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
    c2w[:, 0, 3] = np.arange(count) * 2 / size  # a field of view of 53.13 degrees: the focal length is the width
    return frames, np.full((count, size, size), 2, np.float32), c2w


FOV = math.degrees(2 * math.atan(0.5))


@pytest.fixture
def wall(tmp_path, monkeypatch):
    """40 frames of a video with known depth and camera, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    small = lambda height, width, *limit: geometry_size(height, width, 6_000)  # to be fast
    monkeypatch.setattr(surface, "map_size", small)
    frames, depth, c2w = side_scroll(40)
    np.save("wall.npy", frames)
    np.savez("depth.npz", depth)
    Path("poses.json").write_text(json.dumps({"c2w": c2w.tolist(), "fov_x": FOV, "unit": "meter"}))
    return tmp_path


@pytest.mark.parametrize("case", [Case(False, 2, (2,)), Case(True, 2, (2,)), Case(False, 6, (3, 4, 5)),
                                  Case(False, 6, (5, 20)), Case(True, 5, (3, 4, 30))], ids=str)
def test_warps_agree_with_the_video(wall, case):
    """With exact geometry a warp shows the target's frames wherever it is visible, in both directions."""
    frames = read_frames(Path("wall.npy"), (64, 64))
    path = known_geometry(Path("wall.npy"), Path("poses.json"), Path("depth.npz"), frames, wall.joinpath)
    clip = Clip("", frames, Geometries(path, "cpu"), Geometries(path, "cpu", backwards=True))
    warp = render_case(clip, case)
    targets = [case.original(index, len(frames)) for index in case.targets]
    keyframes = [case.original(index, len(frames)) for index in case.keyframes]
    target = clip.pixels(*targets)
    assert warp.frames.shape == target.shape == (1, 3, 33, 64, 64)
    column = torch.tensor(targets)[:, None] + torch.arange(64)  # of the wall, [33, 64]
    near = torch.stack([(column >= keyframe + 1) & (column < keyframe + 63) for keyframe in keyframes]).any(0)
    near = near[None, None, :, None].expand_as(warp.frames)  # elsewhere is the background, which is a guess
    error = (warp.frames - target).abs()[near].mean()
    still = (target[:, :, :1] - target).abs()[near].mean()
    assert error < 0.05 < still / 4, (error, still)
    assert warp.visible.expand_as(near)[near].mean() > 0.95
    for x in (warp.frames / 2 + 0.5, warp.visible):
        assert (x * 255 - (x * 255).round()).abs().max() < 1e-3  # 8 bits


def test_forms(wall):
    """Mirrored or with other colours, target and warp alike; what else is drawn stays the same."""
    video = torch.rand(1, 3, 2, 4, 6)
    forms = [change_form(video, form) for form in range(12)]
    assert torch.equal(forms[0], video) and torch.equal(forms[1], video.flip(-1))
    assert all(not torch.equal(a, b) for a, b in combinations(forms, 2))
    colours = [sorted(form[0, :, 0, 0, [0, 5]].flatten().tolist()) for form in forms]
    assert all(each == colours[0] for each in colours)
    drawn = [draw_case(Choices(forms=12), 40, "row", step) for step in range(1, 100)]
    assert {case.form for case in drawn} == set(range(12))
    assert [replace(case, form=0) for case in drawn] == [draw_case(Choices(), 40, "row", step) for step in range(1, 100)]

    frames = read_frames(Path("wall.npy"), (64, 64))
    path = known_geometry(Path("wall.npy"), Path("poses.json"), Path("depth.npz"), frames, wall.joinpath)
    clip, case = Clip("", frames, Geometries(path, "cpu"), Geometries(path, "cpu", True)), Case(False, 2, (2,), form=7)
    plain, changed = (render_case(clip, each, atlas=False) for each in (replace(case, form=0), case))
    assert not torch.equal(plain.visible, plain.visible.flip(-1))
    assert torch.equal(changed.frames, plain.frames.flip(-1)[:, [1, 2, 0]])
    assert torch.equal(changed.visible, plain.visible.flip(-1))
    conditions = Conditions(load(VAE, DISTILLED / "vae"), [clip], (64, 64), Choices(), 8, "cpu")
    found, expected = conditions(0, case).target, conditions.encode(change_form(clip.pixels(*case.targets), 7), None)
    assert torch.equal(found, expected)
    found, expected = conditions(0, case).image, conditions.encode_image(change_form(clip.pixels(2), 7))[0]
    assert torch.equal(found, expected)


def test_geometry_beside_the_video(wall, capsys):
    """NAME.json and NAME_depth.npz serve as --poses and --depth do, unless --geometry asks for an estimate."""
    words = ["--video", "wall.npy", "--weights", DISTILLED, "--size", "64x64", "--device", "cpu", "--set", "steps=2"]
    words = [str(word) for word in words]
    shutil.copy("poses.json", "wall.json")
    assert main([*words, "--out", "run"]) == 2 and "no geometry" in capsys.readouterr().err
    shutil.copy("depth.npz", "wall_depth.npz")
    assert main([*words, "--out", "run"]) == 0
    assert main([*words, "--poses", "poses.json", "--depth", "depth.npz", "--out", "told"]) == 0
    assert Path("run/metrics.jsonl").read_bytes() == Path("told/metrics.jsonl").read_bytes()
    assert main([*words, "--geometry", "nothing", "--out", "third"]) == 2 and "nothing" in capsys.readouterr().err


def test_another_shape_is_told(wall, capsys):
    note.cache_clear()
    words = ["--video", "wall.npy", "--weights", str(DISTILLED), "--size", "64x128", "--device", "cpu", "--set", "steps=1"]
    assert main([*words, "--poses", "poses.json", "--depth", "depth.npz", "--out", "run"]) == 0
    assert "64x128 (height x width) 50% of it is cut off" in capsys.readouterr().err


def test_first_chunks_without_the_atlas(wall):
    """As sampling renders a first chunk: holes stay holes; a later chunk's warp has its background all the same."""
    frames = read_frames(Path("wall.npy"), (64, 64))
    path = known_geometry(Path("wall.npy"), Path("poses.json"), Path("depth.npz"), frames, wall.joinpath)
    clip = Clip("", frames, Geometries(path, "cpu"), Geometries(path, "cpu", backwards=True))
    first, later = Case(False, 3, (3,)), Case(False, 6, (3, 4, 5))
    filled, bare = (render_case(clip, first, atlas) for atlas in (True, False))
    same, plain = (render_case(clip, later, atlas) for atlas in (True, False))
    sampled = render.render(clip.forward[3], normalize(clip.forward.c2w[first.path], 33), (64, 64))
    torch.testing.assert_close(bare.frames, media.quantize(sampled.frames), rtol=0, atol=1e-5)
    assert torch.equal(same.frames, plain.frames)
    assert bare.visible.mean() < filled.visible.mean() - 0.05


def test_known_camera_and_depth(wall, capsys):
    """No Pi3X; both directions from one file."""
    words = ["--poses", "poses.json", "--depth", "depth.npz", "--out", "run"]
    assert train_on("wall.npy", *words, "--set", "steps=3") == 0
    assert len(list(Path("run").glob("geometry_*"))) == 1
    Path("maps").mkdir()
    for index in range(40):
        Image.fromarray(np.full((64, 64), 2000, np.uint16)).save(f"maps/{index:03d}.png")
    assert train_on("wall.npy", "--poses", "poses.json", "--depth", "maps", "--out", "other", "--set", "steps=1") == 0
    np.save("few.npy", np.ones((39, 8, 8)))
    for depth, parts in (("few.npy", ("39", "40", "few.npy")), ("wall.npy", ("wall.npy", "[T, height, width]"))):
        refused(capsys, "wall.npy", ["--poses", "poses.json", "--depth", depth, "--out", "third"], *parts)
    refused(capsys, "wall.npy", ["--depth", "depth.npz", "--out", "third"], "--poses", "--depth")

    both = ["--video", "wall.npy", "--poses", "poses.json", "--depth", "depth.npz"]
    refused(capsys, "wall.npy", [*both, "--out", "third"], "1 --poses", "2 videos")
    own = ["--poses", "poses.json", "--depth", "maps", "--out", "two", "--set", "steps=1"]
    assert train_on("wall.npy", *both, *own) == 0
    assert len(list(Path("two").glob("geometry_*"))) == 2  # each with its own depths


def test_poses_and_depths_are_paired_with_frames_by_name(tmp_path, monkeypatch):
    """A reconstruction lists its frames in any order, and perhaps more of them; a frame without a pose is named."""
    monkeypatch.chdir(tmp_path)
    c2w = torch.eye(4).repeat(35, 1, 1)
    c2w[:, 0, 3] = torch.arange(35) / 50
    Path("frames").mkdir()
    for index in range(33):
        Image.new("RGB", (96, 64), (7 * index, 0, 0)).save(f"frames/{index}.png")
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    listed = [{"file_path": f"images/{i}.png", "transform_matrix": (c2w[i] @ flip).tolist()} for i in reversed(range(35))]
    Path("transforms.json").write_text(json.dumps({"camera_angle_x": 1.0, "frames": listed}))
    np.savez("depth.npz", depth=np.full((33, 8, 12), 2, np.float32) + np.arange(33)[:, None, None])
    frames = torch.zeros(33, 3, 32, 48, dtype=torch.uint8)
    where = tmp_path.joinpath
    path = known_geometry(Path("frames"), Path("transforms.json"), Path("depth.npz"), frames, where)
    made = Geometries(path, "cpu")
    torch.testing.assert_close(made.c2w, c2w[:33])
    assert (made[7].rgb[..., 0] == 49).all() and torch.allclose(made[7].depth, torch.tensor(9.0))
    Path("transforms.json").write_text(json.dumps({"camera_angle_x": 1.0, "frames": listed[20:]}))
    with pytest.raises(ValueError, match="transforms.json: nothing of that name for 18 frames, the first is 15.png"):
        known_geometry(Path("frames"), Path("transforms.json"), Path("depth.npz"), frames, where)
    listed[0]["fl_x"], listed[0]["w"] = 100, 96
    zoomed = [frame | {"fl_x": 100 + i, "w": 96, "h": 64} for i, frame in enumerate(listed[2:])]
    Path("transforms.json").write_text(json.dumps({"frames": zoomed}))
    with pytest.raises(ValueError, match="the focal length changes on the way"):
        known_geometry(Path("frames"), Path("transforms.json"), Path("depth.npz"), frames, where)
