"""Camera files: one known path in every format, and bad files."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import check
from hypothesis import given, settings
from hypothesis import strategies as st
from known import C2W, Q, rotations, turned

from geometry import camera
from geometry.camera import CameraPath, describe, move_path
from geometry.paths import load_path

FOV, WIDTH, HEIGHT = 62.0, 640, 384
FOCAL = WIDTH / 2 / math.tan(math.radians(FOV) / 2)
K = [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]
FLIP = np.diag([1.0, -1, -1, 1])  # OpenCV to OpenGL axes of the camera
NAN = math.nan
W2C = np.linalg.inv(C2W)
Q_W2C = Q * [1, -1, -1, -1]


def words(*values):
    return " ".join(f"{value:.9f}" for value in values)


TABLE = {  # name of the file -> lines
    "re10k.txt": ["https://www.youtube.com/watch?v=0",
                  *(f"{i * 33366} " + words(FOCAL / WIDTH, FOCAL / HEIGHT, 0.5, 0.5, 0, 0, *w2c[:3].ravel())
                    for i, w2c in enumerate(W2C))],
    "tum.txt": ["# timestamp tx ty tz qx qy qz qw",
                *(words(i / 30, *c2w[:3, 3], *q[1:], q[0]) for i, (c2w, q) in enumerate(zip(C2W, Q)))],
    "kitti.txt": [words(*c2w[:3].ravel()) for c2w in C2W],
}  # fmt: skip


def gl(pose):
    return (pose @ FLIP).tolist()


JSON = {
    "c2w": {"c2w": C2W.tolist(), "fov_x": FOV, "fps": 24},
    "3x4": {"c2w": C2W[:, :3].tolist(), "K": K, "size": [HEIGHT, WIDTH]},
    "w2c": {"w2c": W2C.tolist(), "K": K, "size": [HEIGHT, WIDTH]},
    "nerfstudio": {"camera_model": "OPENCV", "fl_x": FOCAL, "fl_y": FOCAL, "w": WIDTH, "h": HEIGHT, "k1": 0.1,
                   "applied_transform": np.eye(4)[:3].tolist(), "ply_file_path": "x.ply",
                   "frames": [{"file_path": f"{9 - i}.png", "transform_matrix": gl(p)} for i, p in enumerate(C2W)]},
    "nerfstudio, intrinsics in the frames": {"w": 99, "frames": [{"fl_x": FOCAL, "w": WIDTH, "transform_matrix": gl(p)}
                                                                 for p in C2W]},
    "instant-ngp": {"camera_angle_x": math.radians(FOV), "fl_x": FOCAL, "w": WIDTH, "aabb_scale": 16,
                    "frames": [{"file_path": "x", "sharpness": 3.5, "transform_matrix": gl(p)} for p in C2W]},
    "viewer": {"camera_type": "perspective", "fps": 24, "seconds": 0.5, "keyframes": [], "render_height": HEIGHT,
               "camera_path": [{"camera_to_world": np.ravel(gl(p)).tolist(), "aspect": WIDTH / HEIGHT,
                                "fov": math.degrees(2 * math.atan(HEIGHT / 2 / FOCAL))} for p in C2W]},
    "viewer, nested": {"camera_path": [{"camera_to_world": gl(p)} for p in C2W]},
    "worldplay": {str(i): {"extrinsic": p.tolist(), "K": K} for i, p in reversed(list(enumerate(C2W)))},
}  # fmt: skip


def save(folder, content):
    (folder / "poses.json").write_text(json.dumps(content))
    return folder / "poses.json"


def same(path, fov_x=FOV, fps=None):
    check("Pose files", path.c2w, torch.from_numpy(C2W), 1e-5)
    assert path.c2w.dtype == torch.float32 and path.fps == fps and path.unit == "depth"
    if fov_x is None:
        assert path.fov_x is None
    else:
        check("Pose files, field of view", path.fov_x, fov_x, 1e-5)


@pytest.mark.parametrize("name, fov_x, fps", [
    ("c2w.json", FOV, 24), ("w2c.json", FOV, None), ("transforms_nerfstudio.json", FOV, None), ("transforms_ngp.json", FOV, None),
    ("nerfstudio_viewer.json", FOV, 24), ("hy_worldplay.json", FOV, None), ("official.npz", None, None), ("gen3c.npz", FOV, None),
    ("vipe.npz", None, None), ("re10k.txt", FOV, None), ("tum.txt", None, None), ("kitti.txt", None, None), ("colmap", FOV, None),
])
def test_sample_files(name, fov_x, fps):
    """The files in tests/paths, one of each format, hold the same path."""
    same(load_path(Path(__file__).parents[1] / "paths" / name), fov_x, fps)


@pytest.mark.parametrize("name", JSON)
def test_json(tmp_path, name):
    same(load_path(save(tmp_path, JSON[name])), None if name == "viewer, nested" else FOV, JSON[name].get("fps"))


@pytest.mark.parametrize("name, fov_x", [("re10k.txt", FOV), ("tum.txt", None), ("kitti.txt", None)])
def test_text(tmp_path, name, fov_x):
    (tmp_path / name).write_text("\n".join(TABLE[name]) + "\n\n")
    same(load_path(tmp_path / name), fov_x)


@pytest.mark.parametrize("arrays, fov_x", [
    ({"camera_poses": C2W[None].astype(np.float32)}, None), ({"camera_poses": C2W[:, :3]}, None),
    ({"w2c": W2C, "intrinsics": np.array([K] * 12)}, FOV), ({"w2c": W2C, "intrinsics": np.array(K)}, FOV),
    ({"data": C2W[::-1], "inds": np.arange(12)[::-1] * 2}, None),
])  # fmt: skip
def test_npz(tmp_path, arrays, fov_x):
    np.savez(tmp_path / "poses.npz", **arrays)
    same(load_path(tmp_path / "poses.npz"), fov_x)


def colmap(folder, cameras=True):
    """The first image has points, the others an empty line; the order in the file isn't that of the names."""
    lines = ["# Image list with two lines of data per image:"]
    for i, (q, w2c) in reversed(list(enumerate(zip(Q_W2C, W2C)))):
        row = [str(40 - i), *map(str, q), *map(str, w2c[:3, 3]), "7", f"my frame{i:03}.jpg"]
        lines += [" ".join(row), "1.5 2.5 -1 3 4 17" if i == 11 else ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    if cameras:
        lines = ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]", "1 SIMPLE_PINHOLE 64 64 64 32 32",
                 f"7 OPENCV {WIDTH} {HEIGHT} {FOCAL} {FOCAL} 320 192 0.1 0 0 0", "70 PINHOLE 9 9 9 9 4 4"]
        (folder / "cameras.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_colmap(tmp_path):
    same(load_path(colmap(tmp_path, cameras=False)), None)
    same(load_path(colmap(tmp_path)))


def test_unit(tmp_path):
    path = load_path(save(tmp_path, {"c2w": C2W.tolist(), "unit": "meter"}))
    assert path.unit == "meter" and "meters" in describe(path)
    assert CameraPath(path.c2w).unit == "depth"


# ---- bad input: one line that names file, frame and what was expected


def with_frame(index, **changes):
    frames = [{"transform_matrix": gl(p)} for p in C2W]
    frames[index] |= changes
    return {"frames": [{key: value for key, value in frame.items() if value is not None} for frame in frames]}


def with_pose(index, change):
    poses = C2W.copy()
    poses[index] = change(poses[index])
    return poses


@pytest.mark.parametrize("content, message", [
    ({"c2w": C2W.tolist(), "w2c": W2C.tolist()}, "exactly one of .*found c2w and w2c"),
    ({"c2w": C2W.tolist(), **with_frame(0)}, "exactly one of .*found c2w and frames"), ({}, "exactly one .*found none"),
    (with_frame(3, transform_matrix=None), "frame 3: expected 'transform_matrix'.*found none"),
    (with_frame(3, c2w=C2W[3].tolist()), "frame 3: .*'transform_matrix' as the only.*found c2w, transform_matrix"),
    (with_frame(2, transform_matrix=[[1, 2], [3]]), "frame 2: 'transform_matrix': expected a list"),
    (with_frame(2, transform_matrix=[["1"] * 4] * 4), "frame 2: 'transform_matrix': expected a list"),
    (with_frame(4, transform_matrix=gl(C2W[4] * NAN)), "frame 4: a number is not finite"),
    (with_frame(5, transform_matrix=gl(C2W[5] @ np.diag([1, 1, -1, 1]))), "frame 5: .*reflection"),
    (with_frame(5, transform_matrix=gl(C2W[5] @ np.diag([2, 2, 2, 1]))), "frame 5: .*not orthonormal"),
    ({"frames": []}, "'frames': expected a list of at least 2"), ({"frames": {}}, "'frames': expected a list"),
    ({"frames": ["x", "y"]}, "frame 0: expected 'transform_matrix'"),
    ({"frames": with_frame(0)["frames"][:1]}, "1 pose, expected at least 2"),
    ({"w2c": with_pose(6, lambda p: p + math.inf).tolist()}, "frame 6: a number is not finite"),
    ({"w2c": with_pose(7, lambda p: np.diag([1, 1, 1, 2]) @ p).tolist()}, "frame 7: the last row"),
    ({"0": {"extrinsic": C2W[0].tolist()}, "2": {"extrinsic": C2W[0].tolist()}}, "frame 1: expected 'extrinsic'"),
    ({"0": {"extrinsic": C2W[0].tolist(), "K": [1, 2]}, "1": {"extrinsic": C2W[0].tolist()}}, "'K': expected a list"),
    ({"c2w": C2W.tolist(), "K": K}, "'size' of 'K': expected"),
    ({"c2w": C2W.tolist(), "unit": "feet"}, "unit is 'feet', expected 'depth' or 'meter'"),
    ({"c2w": C2W.tolist(), "K": (np.array(K) * 1e-3).tolist(), "size": [HEIGHT, WIDTH]}, "view of 1 to 179 degrees"),
    ({"camera_path": [{"camera_to_world": gl(p), "fov": 50} for p in C2W]}, "aspect is None, expected"),
    ({"camera_path": [{"camera_to_world": gl(p), "fov": "50"} for p in C2W]}, "fov is '50', expected"),
    ({**with_frame(0), "camera_angle_x": 55}, "camera_angle_x is 55"), ({**with_frame(0), "fl_x": 55}, "w is None"),
])  # fmt: skip
def test_bad_json(tmp_path, content, message):
    refused(save(tmp_path, content), message)


def refused(file, message):
    with pytest.raises(ValueError) as error:
        load_path(file)
    text = str(error.value)
    assert re.search(message, text) and str(file) in text and len(text.splitlines()) == 1


def edited(name, line, column, value):
    """A copy of the table with one word changed, or the line's end cut at the column."""
    lines = list(TABLE[name])
    words = lines[line].split()
    words[column:] = [value, *words[column + 1:]] if value is not None else []
    return [*lines[:line], " ".join(words), *lines[line + 1:]]


@pytest.mark.parametrize("lines, message", [
    ([], "0 columns, expected 8"), (["https://x"], "0 columns"), (["1 2 3"] * 4, "3 columns, expected 8"),
    (TABLE["kitti.txt"][:1], "1 pose"), ([*TABLE["kitti.txt"], TABLE["tum.txt"][1]], "line 13: 8 columns, expected 12"),
    (edited("re10k.txt", 5, 14, None), "line 6: 14 columns, expected 19"),
    (edited("tum.txt", 4, 3, "abc"), "line 5: could not convert string to float: 'abc'"),
    (edited("tum.txt", 4, 3, "nan"), "frame 3: a number is not finite"), (edited("tum.txt", 4, 5, "inf"), "frame 3"),
    (edited("tum.txt", 4, 7, "3"), "frame 3: the rotation is not orthonormal"),
    ([*TABLE["tum.txt"], "9 1 2 3 0 0 0 0"], "frame 12: the rotation is not orthonormal"),  # a lost frame
    (edited("kitti.txt", 4, 0, "3"), "frame 4: the rotation is not orthonormal"),
    (edited("re10k.txt", 1, 1, "-1"), "a view of 1 to 179"), (edited("re10k.txt", 1, 1, "nan"), "a view of 1 to 179"),
])  # fmt: skip
def test_bad_text(tmp_path, lines, message):
    (tmp_path / "poses.txt").write_text("\n".join(lines))
    refused(tmp_path / "poses.txt", message)


def test_binary_text(tmp_path):
    (tmp_path / "poses.txt").write_bytes(bytes(range(256)))
    refused(tmp_path / "poses.txt", "float|columns")


@pytest.mark.parametrize("arrays, message", [
    ({"camera_poses": C2W, "data": C2W, "inds": np.arange(12)}, "more than one layout"),
    ({"w2c": W2C}, "expected one of camera_poses, w2c . intrinsics"),
    ({"camera_poses": np.array(["x"])}, "numbers"), ({"w2c": W2C, "intrinsics": np.eye(4)}, "'intrinsics'"),
    ({"w2c": W2C, "intrinsics": np.zeros((3, 3))}, "179"), ({"data": C2W, "inds": np.arange(5)}, "'inds': expected"),
    ({"data": np.ones((12, 4)), "inds": np.arange(12)}, "T,4,4"),
    ({"camera_poses": with_pose(3, lambda p: p * 1.2)}, "frame 3"), ({"camera_poses": np.float32(1)}, "T,4,4"),
])  # fmt: skip
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "poses.npz", **arrays)
    refused(tmp_path / "poses.npz", message)


def test_bad_folders(tmp_path):
    refused(tmp_path, "without images.txt")
    file = colmap(tmp_path) / "images.txt"
    whole = file.read_text()
    for text, message in (("", "0 pose"), (whole.replace("\n\n", "\n"), "line 4: expected ID, .*next"),
                          (whole.replace(str(Q_W2C[2, 0]), "x"), "line .*'x'"),
                          (whole.replace(str(Q_W2C[2, 0]), "5"), "frame 2: the rotation is not orthonormal")):
        file.write_text(text)
        refused(tmp_path, f"images.txt.*{message}")
    file.write_text(whole)
    (tmp_path / "cameras.txt").write_text("7 PINHOLE wide 384 500 500 320 192\n")
    refused(tmp_path, "cameras.txt, line 1: .*'wide'")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(rotations, st.floats(-50, 50)), min_size=2, max_size=6))
def test_every_convention_gives_the_same_path(tmp_path_factory, frames):
    poses = np.tile(np.eye(4), (len(frames), 1, 1))
    for pose, (turn, distance) in zip(poses, frames):
        pose[:3, :3], pose[:3, 3] = turned(turn[:3], turn[3]), (distance, 1, -distance)
    for content in ({"c2w": poses.tolist()}, {"w2c": np.linalg.inv(poses).tolist()},
                    {"frames": [{"transform_matrix": gl(pose)} for pose in poses]}):
        loaded = load_path(save(tmp_path_factory.mktemp("path"), content))
        check("Pose files", loaded.c2w, torch.from_numpy(poses), 1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_inverse_and_file_round_trip(tmp_path_factory, move):
    move = torch.tensor(move) * torch.tensor([1, 1, 1, 60, 60, 60.0])
    path = camera.motion(torch.eye(4), move, torch.linspace(0, 1, 5))
    check("Pose round trip", camera.inverse(camera.inverse(path)), path, 1e-5)
    check("Pose round trip", camera.inverse(path) @ path, torch.eye(4).expand(5, 4, 4), 1e-5)
    file = tmp_path_factory.mktemp("path") / "poses.json"
    file.write_text(json.dumps({"c2w": path[:, :3].tolist(), "fps": 24, "fov_x": 60.5}))
    loaded = load_path(file)
    assert torch.equal(loaded.c2w, path) and (loaded.fps, loaded.fov_x) == (24, 60.5)


def test_official_path_file(tmp_path):
    path = move_path("forward 1")
    np.savez(tmp_path / "camera_poses.npz", camera_poses=path.numpy())
    loaded = load_path(tmp_path / "camera_poses.npz")
    assert torch.equal(loaded.c2w, path) and loaded == CameraPath(loaded.c2w, None, None)


STILL = move_path("hold").tolist()


def broken(frame, change):
    path = move_path("forward 1").clone()
    path[frame] = change(path[frame])
    return path.tolist()


@pytest.mark.parametrize("content, message", [
    ({"c2w": broken(3, lambda p: p * math.nan)}, "frame 3: a number is not finite"),
    ({"c2w": broken(4, lambda p: p + torch.eye(4) * 0.01)}, "frame 4: the last row"),
    ({"c2w": broken(5, lambda p: torch.diag(torch.tensor([1, 1.1, 1, 1])) @ p)}, "frame 5: .* orthonormal"),
    ({"c2w": broken(6, lambda p: torch.diag(torch.tensor([1, -1.0, 1, 1])) @ p)}, "frame 6: .* reflection"),
    ({"c2w": move_path("hold")[:1].tolist()}, "1 pose"), ({"c2w": [[1, 2], [3]]}, "expected a list"),
    ({"c2w": [[1, 2], [3, 4]]}, "expected"), ({"poses": []}, "the key 'c2w'"), ([], "the key 'c2w'"), ({"c2w": [[["1"]]]}, "expected"),
    ({"c2w": broken(2, lambda p: p + 1e7 * torch.eye(4).roll(-1, 1))}, "frame 2: .*1e6"), ({"c2w": [10**400]}, "expected"),
    ({"c2w": STILL, "fps": -1}, "fps"), ({"c2w": STILL, "fps": 0}, "fps"), ({"c2w": STILL, "fov_x": 180}, "fov_x"),
    ({"c2w": STILL, "fps": "fast"}, "fps is 'fast'"), ({"c2w": []}, "expected"),
])  # fmt: skip
def test_bad_path_files(tmp_path, content, message):
    file = tmp_path / "poses.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"(?s)poses.json.*{message}"):
        load_path(file)


def test_unreadable_path_files(tmp_path):
    (tmp_path / "p.json").write_text("{")
    (tmp_path / "p.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "other.npz", c2w=np.eye(4))
    np.savez(tmp_path / "pickle.npz", camera_poses=np.array([{}], dtype=object))
    for name, message in (("p.json", "not valid JSON"), ("p.npz", "not a readable numpy file"),
                          ("p.obj", "unknown camera"), ("other.npz", "no array 'camera_poses', found c2w"),
                          ("pickle.npz", "plain numbers")):
        with pytest.raises(ValueError, match=message):
            load_path(tmp_path / name)
    with pytest.raises(OSError):
        load_path(tmp_path / "missing.json")
