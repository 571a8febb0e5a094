"""Poses: the arithmetic, moves, resampling and the error of a path, against the official numbers and by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import GEOMETRY, check, config, prefixed, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from known import C2W, rotations, turned

from geometry import camera
from geometry.camera import WINDOW, CameraPath, describe, move_path, resample
from job import pose_chunks

# ---- the arithmetic


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


@settings(max_examples=30, deadline=None)
@given(rotations.filter(lambda turn: abs(turn[3]) < 179), st.integers(2, 40))
def test_resample_is_slerp(turn, frames):
    """Between two poses lies a part of the turn that parts them, about the same axis, and a straight way."""
    ends = np.tile(np.eye(4), (2, 1, 1))
    ends[:, :3, :3] = turned((3, 1, 2), 100), turned((3, 1, 2), 100) @ turned(turn[:3], turn[3])
    ends[:, :3, 3] = (1, 2, 3), (4, -2, 3)
    zoom = torch.tensor([[1.0, 1.0], [3.0, 2.0]])
    path = resample(CameraPath(torch.from_numpy(ends).float(), 24, "meter", zoom=zoom), frames)
    assert (path.fps, path.unit) == (24, "meter") and path.c2w.dtype == torch.float32
    check("Resampled path", path.zoom[:, 0], torch.linspace(1, 3, frames), 1e-6)
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
    with pytest.raises(ValueError, match="no rate of its own .*give --frames"):
        camera.retime(replace(path, fps=None), None, 24.0, True)
    for frames, fps in ((0, None), (None, 0.5), (None, 1000.0)):
        with pytest.raises(ValueError, match="--frames 0" if frames == 0 else "fps"):
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


# ---- poses against the goldens


@pytest.fixture(scope="module")
def poses():
    return tensors(GEOMETRY / "poses.safetensors")


def test_pose_normalisation(poses):
    given = poses["roll/poses"]
    factors, scaled = next((name, value) for name, value in prefixed(poses, "roll/scaled_").items() if "x" in name)
    for name, value in [("exact4x4", given), ("pad4x4", given), ("trunc4x4", given), ("from3x4", given[:, :3]),
                        ("batch", given[None]), ("nonorthonormal_out", poses["roll/nonorthonormal_in"]),
                        ("scaled_then_rel", scaled)]:  # fmt: skip
        expected = poses[f"roll/{name}"]
        check("Poses", camera.normalize(value, len(expected)), expected, 1e-6)
    check("Poses", camera.inverse(given), poses["roll/se3_inverse"], 1e-6)
    check("Poses", camera.scale_translation(given, math.prod(map(float, factors.split("x")))), scaled, 1e-6)
    for shape in ((2, 5, 4, 4), (4, 4), (5, 4, 3)):
        with pytest.raises(ValueError, match="expected"):
            camera.homogeneous(torch.zeros(shape))


def window(path, chunk):
    """What sample.py feeds and the cameras make of it: 33 poses, after chunk 0 with the one before in front."""
    chunks = [camera.hold(control.poses) for control in pose_chunks(path, WINDOW * (chunk + 1))]
    return torch.cat([chunks[chunk - 1][-1:], chunks[chunk]]) if chunk else chunks[0]


def test_windows(poses):
    path, expected = poses["auto/poses_in"], config(GEOMETRY / "poses.safetensors")
    for length, chunks in expected["windows_33"].items():
        for chunk, indices in enumerate(chunks):
            assert window(torch.arange(int(length)), chunk).tolist() == indices
    for chunk, recorded in prefixed(poses, "auto/chunk").items():
        check("Pose windows", window(path, int(chunk)), recorded, 0)
    for name, recorded in prefixed(poses, "auto/short").items():
        left, chunk = map(int, name.split("_chunk"))
        check("Pose windows", window(path[:chunk * WINDOW + left], chunk), recorded, 0)
    for chunk, recorded in prefixed(poses, "auto/rollout").items():
        scaled = camera.scale_translation(window(path, int(chunk)), expected["effective_scale_used"])
        check("Poses", camera.normalize(scaled, len(scaled)), recorded, 1e-6)


def test_web_page_moves(poses):
    axes = {"strafe_right": (0, 1), "strafe_left": (0, -1), "rise": (1, 1), "descend": (1, -1), "forward": (2, 1),
            "backward": (2, -1), "yaw_right": (3, 1), "yaw_left": (3, -1), "pitch_up": (4, 1), "pitch_down": (4, -1),
            "roll_right": (5, 1), "roll_left": (5, -1)}  # fmt: skip
    for index, case in enumerate(config(GEOMETRY / "poses.safetensors")["web"]):
        move = torch.zeros(6)
        for button in case["buttons"]:
            component, sign = axes[button]
            move[component] += sign
        move[:3] /= max(move[:3].norm(), 1e-9)
        move[3:] *= case["rotation_degrees"]
        progress = torch.linspace(0 if case["include_start"] else 1 / case["window"], 1, case["window"])
        path = camera.motion(poses[f"web/{index}/start"], move, progress)
        check("Web page moves", path, poses[f"web/{index}/poses"], 1e-6)
        check("Web page moves", path[-1], poses[f"web/{index}/end"], 1e-6)


# ---- moves


def test_moves_end_where_they_say():
    path = move_path("forward 1, yaw 90, forward 2 + up 1, hold")
    assert path.shape == (132, 4, 4)
    assert torch.equal(path[0], torch.eye(4))
    ends = path[32::33, :3, 3]
    check("Moves", ends, torch.tensor([[0, 0, 1], [0, 0, 1], [2, -1, 1], [2, -1, 1.0]]), 1e-6)  # right of z is x; up -y
    check("Moves", path[65, :3, 2], torch.tensor([1.0, 0, 0]), 1e-6)  # yawed right: z looks along x
    check("Moves", move_path("pitch 90")[-1, :3, 2], torch.tensor([0, -1.0, 0]), 1e-6)
    check("Moves", move_path("roll 90")[-1, :3, 0], torch.tensor([0, 1.0, 0]), 1e-6)  # clockwise: x turns to down
    assert torch.equal(move_path("left 1.5"), move_path("right -1.5"))
    steps = (path[1:, :3, 3] - path[:-1, :3, 3]).norm(dim=-1)
    assert steps[0] < 0.01 < 0.04 < steps[16] < 0.06  # slow at the ends, fast in the middle
    assert steps.max() < 0.12


@pytest.mark.parametrize("text, message", [
    ("forward 1, fly 2", "unknown verb 'fly', expected forward, back"), ("forward", "one number below 10000"
                                                                                    " after 'forward'"),
    ("yaw left", "one number below 10000 after 'yaw'"), ("", "unknown verb ''"), ("forward 1,", "unknown verb"),
    ("forward 1 2", "one number"), ("yaw nan", "one number"), ("hold 3", "hold alone"),
])  # fmt: skip
def test_bad_moves(text, message):
    with pytest.raises(ValueError, match=message):
        move_path(text)


def test_zoom_in_words():
    """A factor of the focal length, reached smoothly, that the next chunk goes on from."""
    path = camera.moves("forward 1 + zoom 1.5, hold, zoom 2")
    check("Zoom", path.zoom[[0, 32, 65, 98], 0], torch.tensor([1, 1.5, 1.5, 3]), 1e-5)
    assert torch.equal(path.c2w, move_path("forward 1, hold, hold")) and (path.zoom.diff(dim=0) >= 0).all()
    assert camera.moves("forward 1").zoom is None
    for text in ("zoom 0", "zoom -1", "zoom 100"):
        with pytest.raises(ValueError, match="expected a factor from 0.02 to 50"):
            camera.moves(text)
