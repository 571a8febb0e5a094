"""Camera files: one known path in every format, its frames in their order and in time."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import check
from hypothesis import given, settings
from hypothesis import strategies as st
from known import C2W, Q, rotations, turned
from path_files import (
    FOCAL,
    FOV,
    HEIGHT,
    PATHS,
    TABLE,
    W2C,
    WIDTH,
    K,
    colmap,
    gl,
    lines_of,
    refused,
    same,
    save,
    transforms,
    words,
    write,
)

from geometry import camera
from geometry.camera import move_path
from geometry.paths import load_path

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


def test_json_in_utf_16(tmp_path):
    (tmp_path / "path.json").write_bytes(json.dumps(JSON["nerfstudio"]).encode("utf-16"))
    same(load_path(tmp_path / "path.json"), FOV)


@pytest.mark.parametrize("name", TABLE)
def test_text(tmp_path, name):
    """Blank lines, commas, carriage returns and a byte order mark change nothing."""
    for lines in (TABLE[name], [line.replace(" ", ", ") + " " for line in TABLE[name]]):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
        same(load_path(tmp_path / name), *FILES[name])


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


@pytest.mark.parametrize("arrays, fov_x", [
    ({"camera_poses": C2W[None].astype(np.float32)}, None), ({"camera_poses": C2W[:, :3]}, None),
    ({"w2c": W2C, "intrinsics": np.array([K] * 12)}, FOV), ({"w2c": W2C, "intrinsics": np.array(K)}, FOV),
    ({"w2c": W2C}, None), ({"extrinsics": W2C[:, :3], "depth": np.ones((12, 384, 640)), "intrinsics": np.array([K] * 12)}, FOV),
    ({"poses": C2W, "intrinsics": np.array([FOCAL / WIDTH, FOCAL / HEIGHT, 0.5, 0.5])}, FOV),  # in shares
    ({"c2w": C2W, "intrinsics": np.eye(3)}, None),  # no camera: said, and not used
    ({"data": C2W[::-1], "inds": np.arange(12)[::-1] * 2}, None), ({"arr_0": C2W}, None),
])  # fmt: skip
def test_npz(tmp_path, arrays, fov_x):
    np.savez(tmp_path / "poses.npz", **arrays)
    same(load_path(tmp_path / "poses.npz"), fov_x)


def test_the_rate_of_an_npz(tmp_path):
    np.savez(tmp_path / "poses.npz", camera_poses=C2W, fps=24)
    same(load_path(tmp_path / "poses.npz"), None, 24)
    np.savez(tmp_path / "poses.npz", camera_poses=C2W, fps=1000)
    refused(tmp_path / "poses.npz", "fps is 1000, expected a number from 1 to 240")


def test_official_path_file(tmp_path):
    path = move_path("forward 1")
    np.savez(tmp_path / "camera_poses.npz", camera_poses=path.numpy())
    loaded = load_path(tmp_path / "camera_poses.npz")
    assert torch.equal(loaded.c2w, path) and (loaded.fps, loaded.lens, loaded.unit) == (None, None, "depth")


def test_colmap(tmp_path):
    same(load_path(colmap(tmp_path, cameras=False)), None)
    same(load_path(colmap(tmp_path)))


def test_colmap_names_without_zeros_and_blank_lines(tmp_path):
    file = colmap(tmp_path) / "images.txt"
    file.write_text(re.sub(r"my frame0*(\d+)", r"\1", file.read_text()) + "\n\n")
    same(load_path(tmp_path))


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


def test_frames_are_in_the_order_of_their_names(tmp_path):
    """1, 2, 10: as people count; a file of the same name twice tells no order."""
    names = [f"images/{index}.png" for index in range(12)]
    shuffled = sorted(range(12), key=lambda index: index * 7 % 12)
    same(load_path(save(tmp_path, transforms(C2W[shuffled], [names[index] for index in shuffled]))), None)
    path = load_path(save(tmp_path, transforms(C2W, ["x.png"] * 12)))
    same(path, None)
    assert path.names is None


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


def test_what_stands_twice_is_said(tmp_path, capsys):
    """The same time or name in several frames: nothing tells their order but the file."""
    lines = lines_of(np.arange(12) / 30)
    assert load_path(write(tmp_path, [lines[0], *lines])).fps is None
    assert "the same time stands in several lines" in capsys.readouterr().err
    twice = JSON["nerfstudio"]["frames"] * 2
    assert len(load_path(save(tmp_path, {**JSON["nerfstudio"], "frames": twice})).c2w) == 24
    assert "the same file_path stands in several frames" in capsys.readouterr().err


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
