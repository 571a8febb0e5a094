"""What a path's file says of its camera's lens and of its unit."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import check
from known import C2W
from path_files import FOCAL, HEIGHT, W2C, WIDTH, K, colmap, gl, same, save, transforms, words, write

from geometry.camera import CameraPath, describe, resolve_lens, unit_length
from geometry.paths import load_path

ZOOM = 1 + np.arange(12) / 10


@pytest.mark.parametrize("name", ["viewer", "transforms", "npz", "re10k", "colmap"])
def test_zoom(tmp_path, name):
    """The focal length of each frame, in every format that has it."""
    focal = FOCAL * ZOOM
    fov_y = np.degrees(2 * np.arctan(HEIGHT / 2 / focal))
    if name == "viewer":
        frames = [{"camera_to_world": gl(p), "fov": fov} for p, fov in zip(C2W, fov_y)]
        file = save(tmp_path, {"camera_path": frames, "render_width": WIDTH, "render_height": HEIGHT})
    elif name == "transforms":
        content = transforms(C2W, w=WIDTH, h=HEIGHT)
        for frame, length in zip(content["frames"], focal):
            frame |= {"fl_x": length, "fl_y": length}
        file = save(tmp_path, content)
    elif name == "npz":
        lenses = np.array([[[f, 0, WIDTH / 2], [0, f, HEIGHT / 2], [0, 0, 1]] for f in focal])
        file = tmp_path / "poses.npz"
        np.savez(file, w2c=W2C, intrinsics=lenses)
    elif name == "re10k":
        file = write(tmp_path, [f"{i} " + words(f / WIDTH, f / HEIGHT, 0.5, 0.5, 0, 0, *w2c[:3].ravel())
                                for i, (f, w2c) in enumerate(zip(focal, W2C))])
    else:
        file = colmap(tmp_path)
        cameras = [f"{i} PINHOLE {WIDTH} {HEIGHT} {f} {f} 320 192" for i, f in enumerate(focal)]
        (file / "cameras.txt").write_text("\n".join(cameras))
        text = (file / "images.txt").read_text()
        (file / "images.txt").write_text(re.sub(r"7 my frame0*(\d+)", r"\1 my frame\1", text))
    path = load_path(file)
    check("Zoom", path.zoom, torch.from_numpy(np.stack([ZOOM, ZOOM], 1)), 1e-5)
    same(replace(path, zoom=None), fps=path.fps)
    assert "zoom 1 to 2.1" in describe(path)


def test_a_moving_principal_point_is_named(tmp_path, capsys):
    """A lens per frame is followed in its focal length alone; less than half a percent is rounding."""
    for shift, said in ((10, "principal point moves by 10, 0 pixels"), (0.5, "")):
        content = transforms(C2W, w=WIDTH, h=HEIGHT)
        for index, frame in enumerate(content["frames"]):
            frame |= {"fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2 + shift * (index > 3), "cy": HEIGHT / 2}
        path = load_path(save(tmp_path, content))
        error = capsys.readouterr().err
        assert path.lens[2] == WIDTH / 2 and path.zoom is None and (said in error if said else not error)


@pytest.mark.parametrize("keys, picture, expected", [
    ({"fl_x": 256, "fl_y": 512, "w": 256, "h": 256}, (256, 256), (1, 2, 0.5, 0.5)),  # pixels that are not square
    ({"fl_x": 320, "w": 640, "h": 384, "cx": 200, "cy": 192}, (640, 384), (0.5, 0.5 / 0.6, 200 / 640, 0.5)),
    ({"fl_y": 192, "w": 640, "h": 384}, (640, 384), (0.3, 0.5, 0.5, 0.5)),
    ({"camera_angle_y": math.pi / 2, "w": 640, "h": 384}, (640, 384), (0.3, 0.5, 0.5, 0.5)),
    ({"camera_angle_y": math.pi / 2}, (640, 384), (0.3, 0.5, 0.5, 0.5)),
    ({"fl_x": 320, "cx": 320, "cy": 192}, (1280, 768), (0.5, 0.5 / 0.6, 0.5, 0.5)),  # no size: the middle tells
    ({"fl_x": 320, "cx": 100, "cy": 192}, (640, 384), (0.5, 0.5 / 0.6, 100 / 640, 0.5)),  # off it: the picture's pixels
    ({"fl_x": 960, "cx": 960, "cy": 540}, (500, 500), (0.5, 0.5, 0.5, 0.5)),  # outside of the picture: another one's
    ({"fl_x": 960, "fl_y": 960, "w": 1920, "h": 1080}, (500, 500), (0.5, 0.5, 0.5, 0.5)),  # another shape: horizontally
    ({}, (640, 384), (0.9605, 1.6008, 0.5, 0.5)),  # nothing said: 55 degrees
])  # fmt: skip
def test_views(tmp_path, keys, picture, expected):
    lens, said = resolve_lens(load_path(save(tmp_path, transforms(C2W, **keys))), *picture)
    check("Pose files, views", torch.tensor(lens), torch.tensor(expected), 1e-4)
    assert ("middle" in said) == (keys.get("cx") == 100 and "w" not in keys)
    assert ("1.78 times as wide as high, this one is 1" in said) == (keys.get("fl_x") == 960)


@pytest.mark.parametrize("shares", [False, True])
def test_the_view_of_a_pose_a_latent(tmp_path, shares):
    """HY-WorldPlay's K: its principal point is the middle of a picture of any shape, or it is in shares of yours."""
    view = [[0.5, 0, 0.5], [0, 0.5 / 9 * 16, 0.5], [0, 0, 1]] if shares else [[960, 0, 960], [0, 960, 540], [0, 0, 1]]
    path = load_path(save(tmp_path, {str(i): {"extrinsic": c2w.tolist(), "K": view} for i, c2w in enumerate(C2W)}))
    for width, height in ((1920, 1080), (320, 240), (2000, 2000)):
        lens, said = resolve_lens(path, width, height)
        check("Pose files, views", torch.tensor(lens), torch.tensor([0.5, 0.5 * width / height, 0.5, 0.5]), 1e-4)
        assert ("1.78 times" in said) == (width != 1920)


def test_the_users_view_counts():
    path = CameraPath(torch.eye(4).repeat(2, 1, 1), lens=(1.0, 1.0, 0.5, 0.5), size=(1.0, 1.0))
    check("Pose files, views", torch.tensor(resolve_lens(path, 200, 100, (90.0,))[0]), torch.tensor([0.5, 1, 0.5, 0.5]), 1e-6)
    both = resolve_lens(path, 200, 100, (90.0, 90.0))[0]
    check("Pose files, views", torch.tensor(both), torch.tensor([0.5, 0.5, 0.5, 0.5]), 1e-6)


def test_width_and_height_the_wrong_way_round(tmp_path):
    same(load_path(save(tmp_path, {"w2c": W2C.tolist(), "K": K, "size": [WIDTH, HEIGHT]})))


def test_viewer_files_have_their_own_shape(tmp_path):
    """nerfstudio's Blender add-on always writes aspect 1: the size of the rendering counts."""
    frames = [{"camera_to_world": gl(p), "fov": math.degrees(2 * math.atan(HEIGHT / 2 / FOCAL)), "aspect": 1} for p in C2W]
    content = {"camera_path": frames, "render_width": WIDTH, "render_height": HEIGHT}
    same(load_path(save(tmp_path, content)))
    for frame in frames:
        del frame["aspect"]
    same(load_path(save(tmp_path, content)))


def test_unit(tmp_path):
    path = load_path(save(tmp_path, {"c2w": C2W.tolist(), "unit": "meter"}))
    assert path.unit == "meter" and "meters" in describe(path)
    assert CameraPath(path.c2w).unit == "depth"


@pytest.mark.parametrize("unit, length", [
    ("depth", 0.4), ("0.05depth", 0.2), ("same", 1), ("meter", 1), ("1000", 1000), ("1e-3", 0.001),
])  # fmt: skip
def test_units(tmp_path, unit, length):
    assert abs(unit_length(unit, 4.0) - length) < 1e-12
    number = float(unit) if unit[0] == "1" else unit
    path = load_path(save(tmp_path, {"c2w": C2W.tolist(), "unit": number}))
    assert abs(unit_length(path.unit, 4.0) - length) < 1e-12


@pytest.mark.parametrize("unit", ["", "feet", "-1", "0", "nan", "depthdepth", "inf", "1m"])
def test_bad_units(unit):
    with pytest.raises(ValueError, match="expected depth, meter, same, a number"):
        unit_length(unit, 4.0)
