"""Camera files that are bad: one line that names file, frame and what was expected."""

import math

import numpy as np
import pytest
import torch
from goldens import check
from known import C2W, Q
from path_files import (
    FOCAL,
    HEIGHT,
    PATHS,
    Q_W2C,
    TABLE,
    W2C,
    WIDTH,
    K,
    colmap,
    gl,
    refused,
    save,
    transforms,
    words,
    write,
)

from geometry.paths import load_path


def with_frame(index, **changes):
    frames = transforms(C2W)["frames"]
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
    (with_frame(4, transform_matrix=gl(C2W[4] * math.nan)), "frame 4: a number is not finite"),
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
    ({"c2w": C2W.tolist(), "unit": "feet"}, "unit 'feet': expected depth, meter, same"),
    ({"c2w": C2W.tolist(), "K": (np.array(K) * 1e-3).tolist(), "size": [HEIGHT, WIDTH]}, "view of 1 to 179 degrees"),
    ({"camera_path": [{"camera_to_world": gl(p), "fov": 50} for p in C2W]}, "aspect is None, expected"),
    ({"camera_path": [{"camera_to_world": gl(p), "fov": "50"} for p in C2W]}, "fov is '50', expected"),
    ({**with_frame(0), "camera_angle_x": 55}, "camera_angle_x is 55"), ({**with_frame(0), "fl_x": 55}, "w is None"),
    ({"c2w": with_pose(2, lambda p: p + 1e7 * np.eye(4, k=3)).tolist()}, "frame 2: a number is beyond 1e6"),
    ({"c2w": [[1, 2], [3]]}, "frame 0: expected a list"), ({"c2w": [10**400]}, "frame 0: expected a list"),
    ({"c2w": []}, "expected a list of at least 2"), ({"poses": []}, "'poses': expected a list of at least 2"),
    ([], "exactly one of the key 'c2w'"), ({"c2w": C2W.tolist(), "fov_x": 180}, "fov_x is 180, expected"),
    *(({"c2w": C2W.tolist(), "fps": fps}, f"fps is {fps!r}, expected") for fps in (-1, 0, "fast")),
])  # fmt: skip
def test_bad_json(tmp_path, content, message):
    refused(save(tmp_path, content), message)


def edited(name, line, column, value):
    """A copy of the table with one word changed, or the line's end cut at the column."""
    lines = list(TABLE[name])
    words = lines[line].split()
    words[column:] = [value, *words[column + 1:]] if value is not None else []
    return [*lines[:line], " ".join(words), *lines[line + 1:]]


@pytest.mark.parametrize("lines, message", [
    ([], "no line of numbers, expected 8 columns"), (["https://x"], "no line of numbers"), (["1 2 3"] * 4, "3 columns, expected 8"),
    (TABLE["kitti.txt"][:1], "1 pose"), ([*TABLE["kitti.txt"], TABLE["tum.txt"][1]], "line 13: 8 columns, expected 12"),
    (edited("re10k.txt", 5, 14, None), "line 6: 14 columns, expected 19"),
    (edited("tum.txt", 4, 3, "abc"), "line 5: could not convert string to float: 'abc'"),
    (edited("tum.txt", 4, 3, "nan"), "frame 3: a number is not finite"), (edited("tum.txt", 4, 5, "inf"), "frame 3"),
    (edited("tum.txt", 4, 7, "3"), "frame 3: the rotation is not orthonormal"),
    ([*TABLE["tum.txt"], "9 1 2 3 0 0 0 0"], "frame 12: the rotation is not orthonormal"),  # a lost frame
    (edited("kitti.txt", 4, 0, "3"), "frame 4: the rotation is not orthonormal"),
    (edited("re10k.txt", 1, 1, "-1"), "a view of 1 to 179"), (edited("re10k.txt", 1, 1, "nan"), "a view of 1 to 179"),
    (["frame,x,y,z,yaw,pitch,roll", *(f"{i},0,0,{i},0,0,0" for i in range(4))], "yaw, pitch, roll, expected a quat"),
])  # fmt: skip
def test_bad_text(tmp_path, lines, message):
    (tmp_path / "poses.txt").write_text("\n".join(lines))
    refused(tmp_path / "poses.txt", message)


def test_binary_text(tmp_path):
    (tmp_path / "poses.txt").write_bytes(bytes(range(256)))
    refused(tmp_path / "poses.txt", "float|columns|no line")


@pytest.mark.parametrize("arrays, message", [
    ({"camera_poses": C2W, "data": C2W, "inds": np.arange(12)}, "more than one layout"),
    ({"words": W2C}, "no array of poses, found words; expected one of camera_poses"),
    ({"camera_poses": np.array(["x"])}, "numbers"), ({"w2c": W2C, "intrinsics": np.eye(4)}, "'intrinsics'"),
    ({"w2c": W2C, "intrinsics": [[-FOCAL, 0, 320], *K[1:]]}, "179"), ({"data": C2W, "inds": np.arange(5)}, "'inds': expected"),
    ({"data": C2W, "inds": np.full(12, 3.0)}, "the same time"), ({"data": C2W, "inds": [*range(11), np.inf]}, "finite"),
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
                          (whole.replace(str(Q_W2C[2, 0]), "5"), "my frame002.jpg.: the rotation is not orthonormal")):
        file.write_text(text)
        refused(tmp_path, f"images.txt.*{message}")
    file.write_text(whole)
    (tmp_path / "cameras.txt").write_text("7 PINHOLE wide 384 500 500 320 192\n")
    refused(tmp_path, "cameras.txt, line 1: .*'wide'")


def test_unreadable_path_files(tmp_path):
    (tmp_path / "p.json").write_text("{")
    (tmp_path / "p.npz").write_bytes(b"nothing")
    (tmp_path / "p.obj").write_text("v 1 2 3\n")
    np.savez(tmp_path / "other.npz", c2w=np.eye(4))
    np.savez(tmp_path / "pickle.npz", camera_poses=np.array([{}], dtype=object))
    for name, message in (("p.json", "not valid JSON"), ("p.npz", "not a readable numpy file"),
                          ("p.obj", "columns"), ("other.npz", r"'c2w': shape .4, 4., expected"),
                          ("pickle.npz", "plain numbers")):
        with pytest.raises(ValueError, match=message):
            load_path(tmp_path / name)
    with pytest.raises(OSError):
        load_path(tmp_path / "missing.json")


def test_a_rig_is_refused(tmp_path):
    file = colmap(tmp_path) / "images.txt"
    file.write_text(file.read_text().replace("my frame005", "left/005"))
    refused(tmp_path, "several cameras, in , left")


@pytest.mark.parametrize("content", [
    transforms(C2W, camera_model="EQUIRECTANGULAR"), transforms(C2W, camera_model="OPENCV_FISHEYE"),
    {"camera_type": "omnidirectional", "camera_path": [{"camera_to_world": gl(p)} for p in C2W]},
])  # fmt: skip
def test_cameras_that_are_no_pinholes(tmp_path, content):
    refused(save(tmp_path, content), "a camera of type .*, expected a pinhole")


def test_colmap_cameras(tmp_path):
    file = colmap(tmp_path) / "cameras.txt"
    whole = file.read_text()
    file.write_text(whole.replace("7 OPENCV", "7 OPENCV_FISHEYE"))
    refused(tmp_path, "OPENCV_FISHEYE, expected a pinhole")
    file.write_text(whole.replace("7 OPENCV", "8 OPENCV"))
    refused(tmp_path, "camera 7 is not in cameras.txt")


def test_damaged_colmap_binary(tmp_path):
    for name in ("cameras.bin", "images.bin"):
        for other in ("cameras.bin", "images.bin"):
            (tmp_path / other).write_bytes((PATHS / "project/sparse/0" / other).read_bytes())
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
        refused(tmp_path, f"{name}: not a readable COLMAP file")


def test_w_first(tmp_path):
    """The order of a quaternion: as a header says, and asked for where the numbers make it likely."""
    poses = [(np.eye(4), [1.0, 0, 0, 0]), *zip(C2W, Q)]
    lines = [words(i / 30, *c2w[:3, 3], *q) for i, (c2w, q) in enumerate(poses)]
    refused(write(tmp_path, lines), "first quaternion is 1 0 0 0.*say so in a line above: # timestamp tx ty tz qw")
    path = load_path(write(tmp_path, ["# timestamp tx ty tz qw qx qy qz", *lines]))
    check("Pose files", path.c2w[1:, :3, :3], torch.from_numpy(C2W[:, :3, :3]), 1e-5)


@pytest.mark.parametrize("rows", [["0 2 40", "0 0 0", "0 0 -0.3"], ["0 1 2 3 4 5 6 7", "0 1 2 3 4 5 6 7", "0 0 0 0 0 0 0 -0.3"]])
def test_angles_are_named(tmp_path, rows):
    """Three lines, phi, theta and r, are no poses, however many numbers they have."""
    with pytest.raises(ValueError, match="ViewCrafter"):
        load_path(write(tmp_path, rows))
