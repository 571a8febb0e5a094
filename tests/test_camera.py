"""Camera paths: one known path in every file format, bad files, resampling, presets, properties of the arithmetic."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import check
from hypothesis import given, settings
from hypothesis import strategies as st

from geometry import camera
from geometry.camera import CameraPath, describe, move_path, resample
from geometry.paths import load_path

FOV, WIDTH, HEIGHT = 62.0, 640, 384
FOCAL = WIDTH / 2 / math.tan(math.radians(FOV) / 2)
K = [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]
FLIP = np.diag([1.0, -1, -1, 1])  # OpenCV to OpenGL axes of the camera
NAN = math.nan


def turned(axis, degrees):
    """Rodrigues' formula, in double precision."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = math.radians(degrees)
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def known_path():
    """Twelve poses, each turned by 15 degrees more about the axis (1, 2, -3), and their quaternions (w x y z)."""
    poses, quaternions = [], []
    for frame in range(12):
        pose, half = np.eye(4), math.radians(7.5 * (frame + 1))
        pose[:3, :3] = turned((1, 2, -3), 15 * (frame + 1))
        pose[:3, 3] = math.sin(frame), 0.3 * frame, 4 - 0.1 * frame**2
        poses.append(pose)
        quaternions.append([math.cos(half), *math.sin(half) * np.array([1, 2, -3]) / math.sqrt(14)])
    return np.stack(poses), np.array(quaternions)


C2W, Q = known_path()
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
    same(load_path(Path(__file__).parent / "paths" / name), fov_x, fps)


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
    ({"camera_poses": np.array(["x"])}, "expected numbers"), ({"w2c": W2C, "intrinsics": np.eye(4)}, "'intrinsics'"),
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


# ---- the arithmetic


rotations = st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.1, 1), st.floats(-180, 180))


@settings(max_examples=60, deadline=None)
@given(rotations, st.lists(st.floats(-9, 9), min_size=3, max_size=3))
def test_quaternion_and_inverse(turn, place):
    rotation = torch.from_numpy(turned(turn[:3], turn[3]))[None]
    q = camera.quaternion(rotation)
    assert q[0, 0] >= 0
    check("Quaternions", q.norm(dim=-1), torch.ones(1), 1e-12)
    pose = camera.rigid(q, torch.tensor([place], dtype=torch.float64))
    check("Quaternions", pose[:, :3, :3], rotation, 1e-12)
    axis = np.array(turn[:3]) / np.linalg.norm(turn[:3])
    half = math.radians(turn[3]) / 2
    expected = torch.tensor([math.cos(half), *(math.sin(half) * axis)])  # cos >= 0 up to 180 degrees
    if abs(turn[3]) < 179.9:
        check("Quaternions", q[0], expected, 1e-6)
    check("Pose inverse", camera.inverse(pose) @ pose, torch.eye(4)[None], 1e-9)
    check("Pose inverse", camera.inverse(camera.inverse(pose)), pose, 1e-9)


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
@given(rotations.filter(lambda turn: abs(turn[3]) < 179), st.integers(2, 40))
def test_resample_is_slerp(turn, frames):
    """Between two poses lies a part of the turn that parts them, about the same axis, and a straight way."""
    ends = np.tile(np.eye(4), (2, 1, 1))
    ends[:, :3, :3] = turned((3, 1, 2), 100), turned((3, 1, 2), 100) @ turned(turn[:3], turn[3])
    ends[:, :3, 3] = (1, 2, 3), (4, -2, 3)
    path = resample(CameraPath(torch.from_numpy(ends).float(), 24, 50, "meter"), frames)
    assert (path.fps, path.fov_x, path.unit) == (24, 50, "meter") and path.c2w.dtype == torch.float32
    expected = np.tile(np.eye(4), (frames, 1, 1))
    for pose, share in zip(expected, np.linspace(0, 1, frames)):
        pose[:3, :3] = ends[0, :3, :3] @ turned(turn[:3], share * turn[3])
        pose[:3, 3] = (1 + 3 * share, 2 - 4 * share, 3)
    check("Resampled path", path.c2w, torch.from_numpy(expected), 1e-5)
    assert torch.equal(path.c2w[[0, -1]], torch.from_numpy(ends).float())


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5))
def test_resample_keeps_the_given_poses(length, factor):
    path = CameraPath(torch.from_numpy(C2W[:length]).float())
    finer = resample(path, factor * (length - 1) + 1)
    check("Resampled path", finer.c2w[::factor], path.c2w, 1e-6)
    check("Resampled path", resample(finer, length).c2w, path.c2w, 1e-5)


def test_resample_refuses_one_frame():
    with pytest.raises(ValueError, match="at least 2"):
        resample(CameraPath(torch.from_numpy(C2W).float()), 1)


def test_describe():
    assert describe(CameraPath(move_path("forward 3, yaw -90, back 1"))) == "99 poses, 4 units travelled, 90 degrees turned"
    assert describe(CameraPath(move_path("hold"))) == "33 poses, 0 units travelled, 0 degrees turned"
    assert describe(CameraPath(torch.from_numpy(C2W).float())).endswith("165 degrees turned")


# ---- presets


@pytest.mark.parametrize("preset, verbs", [
    ("dolly 0.5", "forward 5"), ("dolly -1", "back 10"), ("truck 0.3", "right 3"), ("pan 20", "yaw 20"),
    ("tilt 9", "pitch 9"),
])  # fmt: skip
def test_presets_that_are_verbs(preset, verbs):
    assert torch.equal(move_path(preset), move_path(verbs))


@pytest.mark.parametrize("degrees", [30, -90, 360])
def test_orbit(degrees):
    path = move_path(f"orbit {degrees}").double()
    angle = math.radians(degrees)
    end = torch.tensor([10 * math.sin(angle), 0, 10 - 10 * math.cos(angle)])
    check("Presets", path[-1, :3, 3], end, 1e-5)
    check("Presets", path[-1, :3, :3], torch.from_numpy(turned((0, 1, 0), -degrees)), 1e-6)
    looks_at_the_middle(path)
    check("Presets", (path[:, :3, 3] - torch.tensor([0, 0, 10])).norm(dim=-1), torch.full((33,), 10.0), 1e-5)


def looks_at_the_middle(path):
    ahead = torch.tensor([0, 0, 10.0]) - path[:, :3, 3]
    check("Presets", path[:, :3, 2], ahead / ahead.norm(dim=-1, keepdim=True), 1e-6)
    check("Presets", path[:, 1, 0], torch.zeros(len(path)), 1e-6)  # the horizon stays level
    assert torch.equal(path[0], torch.eye(4))
    check("Presets", path[:, :3, :3] @ path[:, :3, :3].mT, torch.eye(3).expand(len(path), 3, 3), 1e-6)


@pytest.mark.parametrize("degrees, end", [(360, [2, 0, 0]), (720, [4, 0, 0]), (90, [0, 0.5, 0]), (-90, [0, -0.5, 0])])
def test_spiral(degrees, end):
    path = move_path(f"spiral {degrees}")
    check("Presets", path[-1, :3, 3], torch.tensor(end), 1e-6)
    looks_at_the_middle(path)


def test_presets_join_and_chain():
    path = move_path("orbit 90 + forward 4, truck 1, orbit -90")
    check("Presets", path[32, :3, 3], torch.tensor([6.0, 0, 10]), 1e-5)  # on the right of the middle, 4 nearer
    check("Presets", path[65, :3, 3], torch.tensor([6.0, 0, 20]), 1e-5)  # its right is the first view's depth
    check("Presets", path[98, :3, :3], torch.eye(3), 1e-6)
    assert (path[1:] - path[:-1]).abs().max() < 1  # no jumps between chunks


def test_retime():
    path = replace(CameraPath(move_path("forward 4")), fps=10.0)
    assert camera.retime(path, None, None, False) == (path, 33, 10.0)
    assert camera.retime(path, 50, 24.0, False) == (path, 50, 24.0)  # the last pose will hold
    assert camera.retime(replace(path, fps=None), None, None, False)[2] == 16
    for frames, fps, expected in ((None, 20.0, 65), (None, 5.0, 17), (20, 5.0, 20)):
        timed, count, rate = camera.retime(path, frames, fps, True)
        assert (len(timed.c2w), count, rate) == (expected, expected, fps)
        assert torch.equal(timed.c2w[[0, -1]], path.c2w[[0, -1]])
    for frames, fps in ((0, None), (None, 0.5), (None, 1000.0)):
        with pytest.raises(ValueError, match="--frames 0" if frames == 0 else "--fps"):
            camera.retime(path, frames, fps, False)


def test_path_error_of_known_poses():
    """A path in another frame and unit is the same path; a turn and a shift are measured in degrees and units."""
    wanted = move_path("forward 4 + yaw 30 + up 1")
    frame = torch.eye(4)
    frame[:3, :3], frame[:3, 3] = move_path("yaw 50 + roll 20")[-1, :3, :3], torch.tensor([1.0, 2, 3])
    other = frame @ camera.scale_translation(wanted, 7)
    error = camera.path_error(other, wanted)
    assert error["frames"] == 33 and abs(error["scale"] - 1 / 7) < 1e-5
    assert error["rotation_degrees"] < 1e-3 and error["translation"] < 1e-4 and error["translation_share"] < 1e-4
    turned = wanted.clone()
    turned[1:] = turned[1:] @ move_path("yaw 3")[-1]
    assert abs(camera.path_error(turned, wanted)["rotation_degrees"] - 3) < 1e-3
    line, shifted = move_path("forward 4"), move_path("forward 4")
    shifted[1:, 0, 3] += 0.5  # beside the line: no scale can mend it
    error = camera.path_error(shifted, line)
    assert abs(error["translation"] - 0.5) < 0.05 and abs(error["translation_share"] - 0.125) < 0.0125
    still = camera.path_error(move_path("hold"), move_path("hold"))
    assert still["translation"] == still["translation_share"] == still["rotation_degrees"] == 0
