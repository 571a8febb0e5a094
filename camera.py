"""Camera paths: poses read from files or made from words, and the arithmetic on them.

A path is a `CameraPath`: camera-to-world matrices [T, 4, 4] in OpenCV axes (x right, y down, z forward). Its unit of length
is free: the first frame's geometry gives it one (officially a tenth of the median depth). Read are the project's own
poses.json and the official .npz; made are moves such as "forward 1, yaw -20", which turn and travel like the buttons of the
official web page, except that "up" goes up. Relative poses, padding and windows of chunks are as in the official pipeline.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import media

WINDOW = 33  # frames a chunk: 9 latent frames


@dataclass(frozen=True)
class CameraPath:
    c2w: Tensor  # [T, 4, 4] float32
    fps: float | None = None
    fov_x: float | None = None  # horizontal field of view, degrees


def homogeneous(poses: Tensor) -> Tensor:
    """[T,4,4], [T,3,4], or either with a leading batch of 1 -> [T,4,4]."""
    rows = poses[0] if poses.ndim == 4 and len(poses) == 1 else poses
    if rows.ndim != 3 or rows.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"camera poses have shape {tuple(poses.shape)}, expected [T,4,4] or [T,3,4]")
    last = rows.new_tensor([0, 0, 0, 1]).expand(len(rows), 1, 4)
    return rows if rows.shape[1] == 4 else torch.cat([rows, last], dim=1)


def inverse(poses: Tensor) -> Tensor:
    """Rigid inverse of [...,4,4]; wrong for rotations that are not orthonormal (kept for parity)."""
    result = poses.clone()
    result[..., :3, :3] = rotation = poses[..., :3, :3].mT
    result[..., :3, 3:] = -rotation @ poses[..., :3, 3:]
    return result


def normalize(poses: Tensor, frames: int) -> Tensor:
    """Poses relative to the first, cut or padded with the last one -> [frames,4,4]."""
    poses = homogeneous(poses)
    index = torch.arange(frames, device=poses.device).clamp(max=len(poses) - 1)
    return (inverse(poses[:1]) @ poses)[index]


def scale_translation(poses: Tensor, scale: float) -> Tensor:
    """[T,4,4] with translations times `scale`; comes before `normalize`."""
    poses = poses.clone()
    poses[:, :3, 3] *= scale
    return poses


def window(path: Tensor, chunk: int, length: int = WINDOW) -> Tensor:
    """The entries (poses, intrinsics) of one chunk: `length` of them, in later chunks after the last one before; the
    path's last entry is repeated where it is too short."""
    start = length * chunk - min(chunk, 1)
    index = torch.arange(start, length * (chunk + 1), device=path.device)
    return path[index.clamp(max=len(path) - 1)]


def check_poses(poses: np.ndarray, where: str) -> Tensor:
    """Validated float32 [T,4,4]. Raises ValueError naming `where` and the frame."""
    if poses.dtype.kind not in "fiu":
        raise ValueError(f"{where}: type {poses.dtype}, expected numbers")
    try:
        c2w = homogeneous(torch.from_numpy(poses.clip(-1e9, 1e9).astype(np.float32)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if len(c2w) < 2:
        raise ValueError(f"{where}: {len(c2w)} pose, expected at least 2")
    rotation = c2w[:, :3, :3].double().nan_to_num()
    tests = {
        "a number is not finite or beyond 1e6": ~(c2w.abs() < 1e6).all(-1).all(-1) | ~c2w.isfinite().all(-1).all(-1),
        "the last row is not 0 0 0 1": ((c2w[:, 3] - c2w.new_tensor([0, 0, 0, 1])).abs() > 1e-5).any(-1),
        "the rotation is not orthonormal to 1e-3": (rotation @ rotation.mT - torch.eye(3)).abs().amax((1, 2)) > 1e-3,
        "the rotation is a reflection (determinant -1)": torch.linalg.det(rotation) < 0,
    }
    for problem, failed in tests.items():
        if failed.any():
            raise ValueError(f"{where}, frame {failed.nonzero()[0].item()}: {problem}")
    return homogeneous(c2w[:, :3])


def read_json_path(file: Path) -> CameraPath:
    """`{"c2w": [[[...]]], "fps": 16, "fov_x": 55}`; only c2w is needed."""
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(data, dict) or "c2w" not in data:
        raise ValueError(f"{file}: expected an object with the key 'c2w'")
    try:
        poses = np.array(data["c2w"], dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{file}: 'c2w': expected a list of 3x4 or 4x4 matrices of numbers") from None
    for key, low, high in (("fps", 1, 240), ("fov_x", 1, 179)):
        if key in data and not (type(data[key]) in (int, float) and low <= data[key] <= high):
            raise ValueError(f"{file}: {key} is {data[key]!r}, expected a number from {low} to {high}")
    return CameraPath(check_poses(poses, f"{file}: 'c2w'"), data.get("fps"), data.get("fov_x"))


def read_npz_path(file: Path) -> CameraPath:
    """The official format: one array `camera_poses`."""
    arrays = media.read_arrays(file)
    if "camera_poses" not in arrays:
        raise ValueError(f"{file}: no array 'camera_poses', found {', '.join(sorted(arrays)) or 'nothing'}")
    return CameraPath(check_poses(arrays["camera_poses"], f"{file}: 'camera_poses'"))


def load_path(file: str | Path) -> CameraPath:
    """Read a camera path, by suffix. Raises ValueError naming file and frame, OSError for a missing file."""
    readers = {".json": read_json_path, ".npz": read_npz_path}
    suffix = Path(file).suffix.lower()
    if suffix not in readers:
        raise ValueError(f"{file}: unknown camera path format {suffix!r}, expected {' or '.join(readers)}")
    return readers[suffix](Path(file))


VERBS = {  # verb -> component of (x, y, z, yaw, pitch, roll), sign
    "forward": (2, 1), "back": (2, -1), "right": (0, 1), "left": (0, -1),
    "up": (1, -1), "down": (1, 1),  # y points down; the official web page has "rise" as +y, which goes down
    "yaw": (3, 1), "pitch": (4, 1), "roll": (5, 1),  # right, up, clockwise
}


def motion(start: Tensor, move: Tensor, progress: Tensor) -> Tensor:
    """Poses [n,4,4] from `start` [4,4] at each `progress` [n] of `move` = (x, y, z, yaw, pitch, roll), degrees, in the
    axes of the start. The rotation is Rz(roll) Ry(yaw) Rx(pitch), as in the official web page."""
    delta = torch.eye(4, dtype=start.dtype).repeat(len(progress), 1, 1)
    delta[:, :3, 3] = progress[:, None] * move[:3]
    for (a, b), degrees in zip(((0, 1), (2, 0), (1, 2)), move[[5, 3, 4]].tolist()):  # planes of Rz, Ry, Rx
        angle = progress * math.radians(degrees)
        turn = torch.eye(4, dtype=start.dtype).repeat(len(progress), 1, 1)
        turn[:, a, a], turn[:, a, b] = angle.cos(), -angle.sin()
        turn[:, b, a], turn[:, b, b] = angle.sin(), angle.cos()
        delta = delta @ turn
    return start @ delta


def parse_move(text: str) -> Tensor:
    """One chunk's words, "forward 1 + yaw 20" -> (x, y, z, yaw, pitch, roll)."""
    move = torch.zeros(6, dtype=torch.float64)
    for phrase in map(str.strip, text.split("+")):
        verb, *numbers = phrase.split() or [""]
        if phrase == "hold":
            continue
        if verb not in VERBS:
            raise ValueError(f"move {phrase!r}: unknown verb {verb!r}, expected {', '.join(VERBS)}, or hold alone")
        try:
            (amount,) = map(float, numbers)
        except ValueError:
            amount = math.nan
        if not abs(amount) < 1e4:
            raise ValueError(f"move {phrase!r}: expected one number below 10000 after {verb!r}, as in '{verb} 1'")
        component, sign = VERBS[verb]
        move[component] += sign * amount
    return move


def move_path(text: str, length: int = WINDOW) -> Tensor:
    """Moves such as "forward 1, yaw -20 + up 0.5, hold", one chunk each -> [length * n, 4, 4].

    Translations are in pose units (1 = a tenth of the first frame's median depth), angles in degrees. Every chunk
    starts and stops smoothly and goes on from the end of the one before. Raises ValueError naming the word.
    """
    poses, start = [], torch.eye(4, dtype=torch.float64)
    for chunk, phrase in enumerate(text.split(",")):
        progress = torch.linspace(0 if chunk == 0 else 1 / length, 1, length, dtype=torch.float64)
        poses.append(motion(start, parse_move(phrase), progress**2 * (3 - 2 * progress)))
        start = poses[-1][-1]
    return torch.cat(poses).float()
