"""Camera files: one known path in every format, and bad files."""

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
from known import C2W, Q, rotations, turned

from geometry import camera
from geometry.camera import CameraPath, describe, move_path, normalize, resolve_lens, unit_length
from geometry.paths import load_path

FOV, WIDTH, HEIGHT = 62.0, 640, 384
FOCAL = WIDTH / 2 / math.tan(math.radians(FOV) / 2)
K = [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]
FLIP = np.diag([1.0, -1, -1, 1])  # OpenCV to OpenGL axes of the camera
NAN = math.nan
W2C = np.linalg.inv(C2W)
Q_W2C = Q * [1, -1, -1, -1]
PATHS = Path(__file__).parents[1] / "paths"


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
                   "frames": [{"file_path": f"{i}.png", "transform_matrix": gl(p)}
                              for i, p in reversed(list(enumerate(C2W)))]},
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
    """The known path, in any world; its field of view is that of a picture of the known size."""
    wanted = torch.from_numpy(C2W)
    check("Pose files", normalize(path.c2w.double(), len(path.c2w)), normalize(wanted, 12), 1e-5)
    assert path.c2w.dtype == torch.float32 and path.unit == "depth" and path.zoom is None
    assert path.c2w[0, :3, 3].abs().max() == 0
    assert path.fps == fps if fps is None else abs(path.fps / fps - 1) < 1e-6
    assert (path.lens is None) == (fov_x is None)
    if fov_x is not None:
        (fx, fy, cx, cy), _ = resolve_lens(path, WIDTH, HEIGHT)
        check("Pose files, field of view", 2 * math.degrees(math.atan(0.5 / fx)), fov_x, 1e-5)
        assert abs(fx * WIDTH / (fy * HEIGHT) - 1) < 1e-6 and abs(cx - 0.5) < 1e-6 and abs(cy - 0.5) < 1e-6


FILES = {  # in tests/paths -> field of view and rate that they tell
    "c2w.json": (FOV, 24), "w2c.json": (FOV, None), "list.json": (None, None), "columns.json": (None, None),
    "extrinsics.json": (FOV, None), "transforms_nerfstudio.json": (FOV, None), "transforms_ngp.json": (FOV, None),
    "blender.json": (FOV, None), "nerfstudio_viewer.json": (FOV, 24), "ns_export.json": (None, None),
    "ngp_base_cam.json": (FOV, None), "open3d.json": (FOV, None), "gaussians.json": (FOV, None),
    "record3d.json": (FOV, 30), "recammaster.json": (None, None), "official.npz": (None, None), "gen3c.npz": (FOV, None),
    "vipe.npz": (None, None), "vggt.npz": (FOV, None), "megasam.npz": (FOV, None), "poses.npy": (None, None),
    "sana/poses.npy": (FOV, None), "poses_bounds.npy": (FOV, None), "re10k.txt": (FOV, 1e6 / 33366),
    "videoxfun18.txt": (FOV, None), "tum.txt": (None, 30), "w_first.tum": (None, 20), "euroc.csv": (None, 20),
    "kitti.txt": (None, None), "kitti360.txt": (None, None), "replica.txt": (None, None), "blocks.txt": (None, None),
    "open3d.log": (None, None), "arkitscenes.traj": (None, 10), "colmap": (FOV, None), "project": (FOV, None),
    "polycam": (FOV, None), "sevenscenes": (None, None), "scannet": (None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_sample_files(name):
    """The files in tests/paths, one of each format, hold the same path; hy_worldplay.json has a test of its own."""
    same(load_path(PATHS / name), *FILES[name])


def test_every_sample_file_is_tested():
    told = {name.split("/")[0] for name in FILES} | {"hy_worldplay.json"}
    assert {file.name for file in PATHS.iterdir()} == told


@pytest.mark.parametrize("name", ["w2c.json", "tum.txt", "vggt.npz", "poses_bounds.npy"])
def test_the_suffix_says_nothing(tmp_path, name):
    (tmp_path / "path.dat").write_bytes((PATHS / name).read_bytes())
    same(load_path(tmp_path / "path.dat"), *FILES[name])


def test_a_pose_a_latent_is_four_frames(tmp_path):
    """Of HY-WorldPlay's and WBench's files: 4 n - 3 frames at 24 a second, every fourth of them a pose."""
    for file in (PATHS / "hy_worldplay.json", save(tmp_path, JSON["worldplay"])):
        path = load_path(file)
        assert len(path.c2w) == 45
        same(replace(path, c2w=path.c2w[::4]), FOV, 24)


@pytest.mark.parametrize("name", [name for name in JSON if name != "worldplay"])
def test_json(tmp_path, name):
    same(load_path(save(tmp_path, JSON[name])), None if name == "viewer, nested" else FOV, JSON[name].get("fps"))


@pytest.mark.parametrize("name", TABLE)
def test_text(tmp_path, name):
    """Blank lines, commas, carriage returns and a byte order mark change nothing."""
    for lines in (TABLE[name], [line.replace(" ", ", ") + " " for line in TABLE[name]]):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
        same(load_path(tmp_path / name), *FILES[name])


@pytest.mark.parametrize("arrays, fov_x", [
    ({"camera_poses": C2W[None].astype(np.float32)}, None), ({"camera_poses": C2W[:, :3]}, None),
    ({"w2c": W2C, "intrinsics": np.array([K] * 12)}, FOV), ({"w2c": W2C, "intrinsics": np.array(K)}, FOV),
    ({"w2c": W2C}, None), ({"extrinsics": W2C[:, :3], "depth": np.ones((12, 384, 640)), "intrinsics": np.array([K] * 12)}, FOV),
    ({"poses": C2W, "intrinsics": np.array([FOCAL / WIDTH, FOCAL / HEIGHT, 0.5, 0.5])}, FOV),  # in shares
    ({"c2w": C2W, "intrinsics": np.eye(3)}, None),  # no camera: said, and not used
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
    ({"c2w": C2W.tolist(), "unit": "feet"}, "unit 'feet': expected depth, meter, same"),
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


@pytest.mark.parametrize("name", ["tum.txt", "kitti.txt", "re10k.txt"])
def test_a_spreadsheets_text(tmp_path, name):
    """Semicolons between the numbers, decimal commas with them or with blanks, quotes, and Windows' UTF-16."""
    lines = [line.replace("#", "") for line in TABLE[name]]
    for rows in ([line.replace(" ", ";") for line in lines], [line.replace(".", ",") for line in lines],
                 [line.replace(" ", ";").replace(".", ",") for line in lines],
                 ['"' + line.replace(" ", '","') + '"' for line in lines]):
        for encoding in ("utf-8", "utf-16"):
            (tmp_path / name).write_bytes("\r\n".join(rows).encode(encoding))
            same(load_path(tmp_path / name), *FILES[name])


def test_json_in_utf_16(tmp_path):
    (tmp_path / "path.json").write_bytes(json.dumps(JSON["nerfstudio"]).encode("utf-16"))
    same(load_path(tmp_path / "path.json"), FOV)


@pytest.mark.parametrize("arrays, message", [
    ({"camera_poses": C2W, "data": C2W, "inds": np.arange(12)}, "more than one layout"),
    ({"words": W2C}, "no array of poses, found words; expected one of camera_poses"),
    ({"camera_poses": np.array(["x"])}, "numbers"), ({"w2c": W2C, "intrinsics": np.eye(4)}, "'intrinsics'"),
    ({"w2c": W2C, "intrinsics": [[-FOCAL, 0, 320], *K[1:]]}, "179"), ({"data": C2W, "inds": np.arange(5)}, "'inds': expected"),
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


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(rotations, st.floats(-50, 50)), min_size=2, max_size=6))
def test_every_convention_gives_the_same_path(tmp_path_factory, frames):
    poses = np.tile(np.eye(4), (len(frames), 1, 1))
    for pose, (turn, distance) in zip(poses, frames):
        pose[:3, :3], pose[:3, 3] = turned(turn[:3], turn[3]), (distance, 1, -distance)
    for content in ({"c2w": poses.tolist()}, {"w2c": np.linalg.inv(poses).tolist()},
                    {"frames": [{"transform_matrix": gl(pose)} for pose in poses]}):
        loaded = load_path(save(tmp_path_factory.mktemp("path"), content))
        wanted = torch.from_numpy(poses)
        wanted[:, :3, 3] -= wanted[0, :3, 3].clone()
        check("Pose files", loaded.c2w, wanted, 1e-5)


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
    assert torch.equal(loaded.c2w, path) and loaded.fps == 24 and abs(loaded.fov_x - 60.5) < 1e-9


def test_official_path_file(tmp_path):
    path = move_path("forward 1")
    np.savez(tmp_path / "camera_poses.npz", camera_poses=path.numpy())
    loaded = load_path(tmp_path / "camera_poses.npz")
    assert torch.equal(loaded.c2w, path) and (loaded.fps, loaded.lens, loaded.unit) == (None, None, "depth")


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
    ({"c2w": [[1, 2], [3, 4]]}, "expected"), ({"poses": []}, "'poses': expected a list"), ([], "the key 'c2w'"), ({"c2w": [[["1"]]]}, "expected"),
    ({"c2w": broken(2, lambda p: p + 1e7 * torch.tensor([[0, 0, 0, 1.0], [0] * 4, [0] * 4, [0] * 4]))}, "frame 2: .*1e6"), ({"c2w": [10**400]}, "expected"),
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


# ---- what people's files have


def transforms(poses, names=None, **keys):
    frames = [{"transform_matrix": gl(pose)} | ({"file_path": names[i]} if names else {}) for i, pose in enumerate(poses)]
    return {"frames": frames, **keys}


def test_frames_are_in_the_order_of_their_names(tmp_path):
    """1, 2, 10: as people count; a file of the same name twice tells no order."""
    names = [f"images/{index}.png" for index in range(12)]
    shuffled = sorted(range(12), key=lambda index: index * 7 % 12)
    same(load_path(save(tmp_path, transforms(C2W[shuffled], [names[index] for index in shuffled]))), None)
    path = load_path(save(tmp_path, transforms(C2W, ["x.png"] * 12)))
    same(path, None)
    assert path.names is None


def test_colmap_names_without_zeros_and_blank_lines(tmp_path):
    file = colmap(tmp_path) / "images.txt"
    file.write_text(re.sub(r"my frame0*(\d+)", r"\1", file.read_text()) + "\n\n")
    same(load_path(tmp_path))


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


def lines_of(times, **row):
    return [words(time, *c2w[:3, 3], *q[1:], q[0]) for time, c2w, q in zip(times, C2W, Q)]


def write(folder, lines):
    (folder / "poses.txt").write_text("\n".join(lines))
    return folder / "poses.txt"


def test_lines_are_in_the_order_of_time(tmp_path):
    lines = lines_of(np.arange(12) / 30)
    same(load_path(write(tmp_path, lines[6:] + lines[:6])), None, 30)


@pytest.mark.parametrize("stamps, fps", [
    (np.arange(12) / 25, 25), (np.arange(12.0), None), (np.zeros(12), None), (1e9 + np.arange(12) / 8, 8),
    (np.arange(12) * 40_000.0, 25), (1.5e18 + np.arange(12) * 50_000_000, 20),
])  # fmt: skip
def test_time_stamps_tell_the_rate(tmp_path, stamps, fps):
    """In seconds, micro- or nanoseconds; whole numbers from frame to frame, or none at all, tell none."""
    same(load_path(write(tmp_path, lines_of(stamps))), None, fps)


def test_missing_frames_come_back(tmp_path, capsys):
    lines = lines_of(np.arange(12) / 30)
    path = load_path(write(tmp_path, lines[:4] + lines[7:]))
    assert len(path.c2w) == 12 and abs(path.fps - 30) < 1e-3
    assert "3 frames are missing in time and filled in: 12 poses" in capsys.readouterr().err
    wanted = torch.from_numpy(C2W)
    wanted[:, :3, 3] -= wanted[0, :3, 3].clone()
    kept = [0, 1, 2, 3, 7, 8, 9, 10, 11]
    check("Pose files", path.c2w[kept], wanted[kept], 1e-5)
    check("Pose files", path.c2w[5, :3, 3], (wanted[3, :3, 3] + wanted[7, :3, 3]) / 2, 1e-5)
    assert len(load_path(tmp_path / "poses.txt", fill=False).c2w) == 9
    np.savez(tmp_path / "poses.npz", data=C2W[kept], inds=np.array(kept) * 2)
    assert len(load_path(tmp_path / "poses.npz").c2w) == 12


def test_w_first(tmp_path):
    """The order of a quaternion: as a header says, and asked for where the numbers make it likely."""
    poses = [(np.eye(4), [1.0, 0, 0, 0]), *zip(C2W, Q)]
    lines = [words(i / 30, *c2w[:3, 3], *q) for i, (c2w, q) in enumerate(poses)]
    refused(write(tmp_path, lines), "first quaternion is 1 0 0 0.*say so in a line above: # timestamp tx ty tz qw")
    path = load_path(write(tmp_path, ["# timestamp tx ty tz qw qx qy qz", *lines]))
    check("Pose files", path.c2w[1:, :3, :3], torch.from_numpy(C2W[:, :3, :3]), 1e-5)


@pytest.mark.parametrize("header, columns", [
    ("x,y,z,qw,qx,qy,qz", [0, 1, 2, 3, 4, 5, 6]), ('"qw","qx","qy","qz","px","py","pz"', [3, 4, 5, 6, 0, 1, 2]),
    ("pos_x;pos_y;pos_z;rot_x;rot_y;rot_z;rot_w", [0, 1, 2, 4, 5, 6, 3]),
    ("# .position.x .position.y .position.z .orientation.w .orientation.x .orientation.y .orientation.z", range(7)),
])  # fmt: skip
def test_a_header_names_the_columns(tmp_path, header, columns):
    """With a column of times and without, whatever letters stand before x, y, z and w."""
    rows = np.concatenate([C2W[:, :3, 3], Q], axis=1)[:, columns]
    for first in (0, 1):
        head = header.replace("# ", "# t ") if header[0] == "#" else "t" + (";" if ";" in header else ",") + header
        lines = [words(*[i / 30][:first], *row) for i, row in enumerate(rows)]
        same(load_path(write(tmp_path, [head if first else header, *lines])), None, 30 if first else None)
    poses = [words(0, 0, 0, 1, 0, 0, 0), *(words(*c2w[:3, 3], *q) for c2w, q in zip(C2W, Q))]
    refused(write(tmp_path, poses), "first quaternion is 1 0 0 0.*a line above: # tx ty tz qw")


def test_what_stands_twice_is_said(tmp_path, capsys):
    """The same time or name in several frames: nothing tells their order but the file."""
    lines = lines_of(np.arange(12) / 30)
    assert load_path(write(tmp_path, [lines[0], *lines])).fps is None
    assert "the same time stands in several lines" in capsys.readouterr().err
    twice = JSON["nerfstudio"]["frames"] * 2
    assert len(load_path(save(tmp_path, {**JSON["nerfstudio"], "frames": twice})).c2w) == 24
    assert "the same file_path stands in several frames" in capsys.readouterr().err


def test_far_away_worlds(tmp_path):
    """Centimeters at coordinates of millions are steps of centimeters, not of the grid of single precision."""
    far = np.tile(np.eye(4), (5, 1, 1))
    far[:, :3, 3] = [512345.678, 4431234.567, 87.5]
    far[:, 1, 3] += 0.01 * np.arange(5)
    for content in ({"c2w": far.tolist()}, transforms(far), {"w2c": np.linalg.inv(far).tolist()}):
        path = load_path(save(tmp_path, content))
        check("Pose files", path.c2w[:, :3, 3], torch.tensor([[0, 0.01 * i, 0] for i in range(5)]), 1e-8)


@pytest.mark.parametrize("digits", [3, 2])
def test_rounded_rotations(tmp_path, capsys, digits):
    path = load_path(save(tmp_path, {"c2w": C2W.round(digits).tolist()}))
    rotation = path.c2w[:, :3, :3].double()
    check("Rounded rotations", rotation @ rotation.mT, torch.eye(3).expand(12, 3, 3), 1e-6)
    check("Rounded rotations", rotation, torch.from_numpy(C2W[:, :3, :3]), 10.0**-digits)
    assert "rotations are rounded" in capsys.readouterr().err


def test_jumps_are_named(tmp_path, capsys):
    poses = np.tile(np.eye(4), (33, 1, 1))
    poses[:, 2, 3] = np.arange(33) * 0.1
    load_path(save(tmp_path, {"c2w": poses.tolist()}))
    assert capsys.readouterr().err == ""
    poses[16, 0, 3] = 50
    load_path(save(tmp_path, {"c2w": poses.tolist(), "fps": 24}))
    assert "frame 16: the camera jumps, it moves 500 times as far" in capsys.readouterr().err


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


@pytest.mark.parametrize("rows", [["0 2 40", "0 0 0", "0 0 -0.3"], ["0 1 2 3 4 5 6 7", "0 1 2 3 4 5 6 7", "0 0 0 0 0 0 0 -0.3"]])
def test_angles_are_named(tmp_path, rows):
    """Three lines, phi, theta and r, are no poses, however many numbers they have."""
    with pytest.raises(ValueError, match="ViewCrafter"):
        load_path(write(tmp_path, rows))


@pytest.mark.parametrize("keys, picture, expected", [
    ({"fl_x": 256, "fl_y": 512, "w": 256, "h": 256}, (256, 256), (1, 2, 0.5, 0.5)),  # pixels that are not square
    ({"fl_x": 320, "w": 640, "h": 384, "cx": 200, "cy": 192}, (640, 384), (0.5, 0.5 / 0.6, 200 / 640, 0.5)),
    ({"fl_y": 192, "w": 640, "h": 384}, (640, 384), (0.3, 0.5, 0.5, 0.5)),
    ({"camera_angle_y": math.pi / 2, "w": 640, "h": 384}, (640, 384), (0.3, 0.5, 0.5, 0.5)),
    ({"camera_angle_y": math.pi / 2}, (640, 384), (0.3, 0.5, 0.5, 0.5)),
    ({"fl_x": 320, "cx": 320, "cy": 192}, (1280, 768), (0.5, 0.5 / 0.6, 0.5, 0.5)),  # no size: the middle tells
    ({"fl_x": 320, "cx": 100, "cy": 192}, (640, 384), (0.5, 0.5 / 0.6, 100 / 640, 0.5)),  # off it: the picture's pixels
    ({"fl_x": 960, "fl_y": 960, "w": 1920, "h": 1080}, (500, 500), (0.5, 0.5, 0.5, 0.5)),  # another shape: horizontally
    ({}, (640, 384), (0.9605, 1.6008, 0.5, 0.5)),  # nothing said: 55 degrees
])  # fmt: skip
def test_views(tmp_path, keys, picture, expected):
    lens, said = resolve_lens(load_path(save(tmp_path, transforms(C2W, **keys))), *picture)
    check("Pose files, views", torch.tensor(lens), torch.tensor(expected), 1e-4)
    assert ("middle" in said) == (keys.get("cx") == 100 and "w" not in keys)
    assert ("1.78 times as wide as high, this one is 1" in said) == (keys.get("w") == 1920)


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


def test_key_strings():
    path = load_path("worldplay:w-3, right-1, wup-2")
    assert len(path.c2w) == 25 and path.fps == 24  # 7 latents
    check("Key strings", path.c2w[12, :3, 3], torch.tensor([0, 0, 0.24]), 1e-6)
    check("Key strings", path.c2w[16, :3, :3], torch.from_numpy(turned((0, 1, 0), 3)), 1e-6)
    assert path.c2w[24, 1, 3] < -0.001  # forward after looking up
    path = load_path("sana:w-80,dw-40,none-3,j-4,i-10")
    assert len(path.c2w) == 138 and path.fps == 16
    check("Key strings", path.c2w[80, :3, 3], torch.tensor([0, 0, 2.0]), 1e-6)
    check("Key strings", path.c2w[120, :3, :3], torch.from_numpy(turned((0, 1, 0), 24)), 1e-6)
    check("Key strings", path.c2w[127, :3, 3] - path.c2w[123, :3, 3], -0.1 * path.c2w[120, :3, 0], 1e-6)
    assert path.c2w[-1, 1, 2] < -0.1  # looks up
    for text, message in (("worldplay:x-3", "'x-3', expected keys"), ("sana:w", "'w', expected"), ("sana:w-0", "'w-0'")):
        with pytest.raises(ValueError, match=message):
            load_path(text)


def test_the_rate_of_an_npz(tmp_path):
    np.savez(tmp_path / "poses.npz", camera_poses=C2W, fps=24)
    same(load_path(tmp_path / "poses.npz"), None, 24)
    np.savez(tmp_path / "poses.npz", camera_poses=C2W, fps=1000)
    refused(tmp_path / "poses.npz", "fps is 1000, expected a number from 1 to 240")
