"""Camera paths from files of every kind: `load_path`.

What a file holds tells its format and convention, whatever its suffix: the readers are from_json.py, from_text.py,
from_arrays.py and from_colmap.py. Here is the one way that all of them take then: checks, the frames in their order,
camera-to-world in OpenCV axes, relative positions before single precision, and the rate. Left out: lens distortion.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from files.cli import note
from files.media import is_still, natural_order
from files.video import is_film
from geometry.camera import CameraPath, between, inverse, resample, turn_degrees, unit_length
from geometry.from_arrays import from_arrays
from geometry.from_colmap import from_folder
from geometry.from_json import from_json
from geometry.from_text import KEYS, from_keys, from_text
from geometry.recording import Recording

Name = Callable[[int], str]  # of a frame, for errors
JUMP = 20  # median steps that one step may be
AXES = {  # convention of a camera-to-world matrix -> its world [3,3] and its camera's axes [3,3] in ours
    "opengl": (np.eye(3), np.diag([1.0, -1, -1])),
    "unreal": (np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0.0]]), np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0.0]])),
}  # fmt: skip


def whole(poses: np.ndarray, name: Name) -> tuple[np.ndarray, list[str]]:
    """[T,4,4] with finite numbers and the last row 0 0 0 1; matrices written column by column are turned."""
    if poses.shape[1] == 3:
        last = np.broadcast_to([0.0, 0, 0, 1], (len(poses), 1, 4))
        poses = np.concatenate([poses, last], axis=1)
    for index in np.flatnonzero(~np.isfinite(poses).all(axis=(1, 2))).tolist():
        raise ValueError(f"{name(index)}: a number is not finite")
    off = np.abs(poses[:, 3] - [0, 0, 0, 1]).max(1) > 1e-5
    if off.any() and np.abs(poses[:, :, 3] - [0, 0, 0, 1]).max() <= 1e-5:
        return poses.transpose(0, 2, 1), ["the matrices are written column by column"]
    for index in np.flatnonzero(off).tolist():
        raise ValueError(f"{name(index)}: the last row is not 0 0 0 1")
    return poses, []


def straighten(poses: np.ndarray, convention: str, name: Name) -> tuple[np.ndarray, list[str]]:
    """Rotations without the scale that Blender's cameras may have, and rounded ones made exact."""
    poses, notes = poses.copy(), []
    lengths = np.linalg.norm(poses[:, :3, :3], axis=2 if convention == "w2c" else 1)
    scale = np.median(lengths)
    if abs(scale - 1) > 5e-3 and 1e-6 < scale and np.abs(lengths / scale - 1).max() < 0.01:
        notes.append(f"the camera's axes are {scale:.4g} long: divided out")
        poses[:, :3, : 4 if convention == "w2c" else 3] /= scale
    rotation = poses[:, :3, :3]
    error = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    for index in np.flatnonzero(error > 2e-2).tolist():
        raise ValueError(f"{name(index)}: the rotation is not orthonormal to 0.02")
    for index in np.flatnonzero(np.linalg.det(rotation) < 0).tolist():
        raise ValueError(f"{name(index)}: the rotation is a reflection (determinant -1): a left-handed world?")
    if (rounded := error > 2e-4).any():
        u, _, vt = np.linalg.svd(rotation[rounded])
        poses[rounded, :3, :3] = u @ vt
        notes.append(f"{rounded.sum()} rotations are rounded (off by {error.max():.2g}): the nearest ones are taken")
    return poses, notes


def to_c2w(poses: np.ndarray, convention: str) -> np.ndarray:
    """Poses [T,4,4] of a `Recording`'s convention as camera-to-world in OpenCV axes."""
    if convention == "w2c":
        return inverse(torch.from_numpy(poses)).numpy()
    if convention in AXES:
        world, axes = AXES[convention]
        poses = poses.copy()
        poses[:, :3] = world @ poses[:, :3]
        poses[:, :3, :3] = poses[:, :3, :3] @ axes
    return poses


def order_of(found: Recording) -> np.ndarray:
    """By time, else by name, else as it is."""
    if found.times is not None:
        return found.times.argsort(kind="stable")
    if (names := found.names) is not None:
        return np.array(sorted(range(len(names)), key=lambda index: natural_order(names[index])), dtype=int)
    return np.arange(len(found.poses))


def jump(c2w: Tensor) -> list[str]:
    """A word of a step far larger than the others."""
    steps = c2w.double().diff(dim=0)[:, :3, 3].norm(dim=-1)
    turns = turn_degrees(c2w[1:, :3, :3].double(), c2w[:-1, :3, :3].double())
    for name, sizes, least in (("moves", steps, 0.0), ("turns", turns, 20.0)):
        usual = sizes[sizes > 1e-9 + 1e-6 * sizes.max()]
        if len(usual) > 4 and sizes.max() > max(JUMP * usual.median().item(), least):
            frame = int(sizes.argmax()) + 1
            return [f"frame {frame}: the camera jumps, it {name} {sizes.max() / usual.median():.3g} times as far as"
                    " usual in one step"]
    return []


def keep_time(path: CameraPath, times: np.ndarray, where: str, counted: bool, fill: bool) -> CameraPath:
    """The rate that time stamps tell; frames that are missing between others come back, halfway between neighbours."""
    steps = np.diff(times)
    if not 0 < steps.min() <= steps.max() < np.inf:
        raise ValueError(f"{where}: two frames have the same time, or one has none that is finite")
    step = np.median(steps)
    if fill and steps.max() > 1.5 * step:
        count = round((times[-1] - times[0]) / step) + 1
        if count > 100 * len(times):
            raise ValueError(f"{where}: the time stamps have a gap of {steps.max() / step:.3g} frames")
        even = np.arange(count) * step + times[0]
        place = np.interp(even, times, np.arange(len(times)))
        word = f"{len(even) - len(times)} frames are missing in time and filled in: {len(even)} poses"
        note(f"{where}: {word}")
        path = between(path, torch.from_numpy(place))
    else:
        step = steps.mean()
    told = not counted and path.fps is None and 1 <= 1 / step <= 240
    return replace(path, fps=1 / step) if told else path


def finish(found: Recording, fill: bool) -> CameraPath:
    """A path of what a file says. Raises ValueError naming the frame."""
    if len(found.poses) < 2:
        raise ValueError(f"{found.where}: {len(found.poses)} pose, expected at least 2")

    def name(index: int) -> str:
        return f"{found.where}, frame {index}" + (f" ({found.names[index]})" if found.names else "")

    poses, turned = whole(np.asarray(found.poses, dtype=np.float64), name)
    poses, notes = straighten(poses, found.convention, name)
    order, c2w = order_of(found), to_c2w(poses, found.convention)
    c2w[:, :3, 3] -= c2w[order[0], :3, 3].copy()  # before single precision: the world's origin may be far away
    for index in np.flatnonzero(~(np.abs(c2w) < 1e6).all(axis=(1, 2))).tolist():
        raise ValueError(f"{name(index)}: a number is beyond 1e6")
    lens, zoom = lens_of(found, order)
    names = tuple(found.names[index] for index in order) if found.names else None
    path = CameraPath(torch.from_numpy(c2w[order]).float(), found.fps, found.unit, lens, found.size, zoom, names)
    try:
        unit_length(path.unit, 1.0)
    except ValueError as error:
        raise ValueError(f"{found.where}: {error}") from None
    if found.times is not None:
        path = keep_time(path, found.times[order], found.where, found.counted, fill)
    if found.latents:
        path = resample(path, 4 * len(order) - 3)
    for word in (*turned, *notes, *jump(path.c2w)):
        note(f"{found.where}: {word}")
    return path


def lens_of(found: Recording, order: np.ndarray) -> tuple[tuple[float, float, float, float] | None, Tensor | None]:
    """The first frame's lens, and the zoom of all [T,2], if it changes."""
    if found.lens is None:
        return None, None
    if found.lens.ndim == 2 and len(found.lens) not in (1, len(order)):
        raise ValueError(f"{found.where}: 'intrinsics' of {len(found.lens)} frames for {len(order)} poses")
    lens = np.broadcast_to(found.lens, (len(order), 4))[order]
    if (np.abs(lens[:, 2:] - 0.5) < 0.25).all() and (found.size is None or min(found.size) > 16):
        width, height = found.size or (lens[0, 1] / lens[0, 0], 1)  # in shares of a picture, of square pixels
        lens, found.size = lens * [width, height, width, height], (width, height)
    if found.size is None and not (lens[:, 2:] > 0).all():
        note(f"{found.where}: its camera (focal length {lens[0, 0]:g}, principal point 0) is none and not used")
        return None, None
    known = np.isfinite(lens[0, :2])
    if not known.any() or not (lens[:, :2][:, known] > 0).all():
        raise ValueError(f"{found.where}: focal length {lens[0, 0]:g}, expected a view of 1 to 179 degrees")
    for side, length in zip(found.size or (2 * lens[0, 2], 2 * lens[0, 3]), lens[0, :2]):
        if not (np.isnan(side) or np.isnan(length) or 0.0045 < length / side < 58):
            raise ValueError(f"{found.where}: focal length {length:g} for {side:g} pixels, expected a view of 1 to 179"
                             " degrees")
    moved = np.nan_to_num(np.abs(lens[:, 2:] - lens[0, 2:]).max(0))
    if (moved > 0.005 * np.nanmax(lens[0, :2])).any():
        note(f"{found.where}: the principal point moves by {moved[0]:.3g}, {moved[1]:.3g} pixels, which is not"
             " followed; that of frame 0 is used")
    zoom = lens[:, :2] / lens[0, :2]
    zoom = np.where(known, zoom, zoom[:, known][:, :1])
    changes = np.abs(zoom - 1).max() > 1e-4
    fx, fy, cx, cy = lens[0].tolist()
    found.size = found.size and (float(found.size[0]), float(found.size[1]))
    return (fx, fy, cx, cy), torch.from_numpy(zoom).float() if changes else None


def read(file: Path) -> Recording:
    """By content: a folder, an archive or array of numpy, json, or text."""
    if file.is_dir():
        return from_folder(file)
    with open(file, "rb") as stream:
        begin = stream.read(512)
    damaged = file.suffix.lower() in (".npy", ".npz") and not re.match(rb"\s*[\d#{\[-]", begin)
    if begin[:2] == b"PK" or begin[:6] == b"\x93NUMPY" or damaged:
        return from_arrays(file)
    if is_film(file) and is_still(file):
        raise ValueError(f"{file}: a picture, expected a file of poses or a COLMAP folder (docs/paths.md)")
    if is_film(file):
        raise ValueError(f"{file}: a video, whose camera has to be found first; sample.py --poses does, and saves it")
    text = begin.decode(json.detect_encoding(begin), errors="replace").lstrip()
    return from_json(file) if text[:1] in ("{", "[") else from_text(file)


def path_json(path: CameraPath) -> str:
    """Poses, unit, rate and field of view of a path, as `load_path` reads them."""
    words = {"c2w": path.c2w.tolist(), "unit": path.unit, "fps": path.fps, "fov_x": path.fov_x}
    return json.dumps({name: word for name, word in words.items() if word})


def load_path(file: str | Path, fill: bool = True) -> CameraPath:
    """A path from a file or a folder of any kind, or from keys ("worldplay:w-3,right-1"); missing frames are filled in
    unless `fill` is False. Raises ValueError naming file and frame, OSError if it is missing."""
    keys = str(file).partition(":")[0] in KEYS
    return finish(from_keys(str(file)) if keys else read(Path(file)), fill)
