"""Camera paths from files: json, npz, text and COLMAP folders, official and others'.

The key or the layout of a file tells its convention; `check_poses` converts to camera-to-world in OpenCV axes and
checks. Left out: timestamps (frames are evenly spaced), lens distortion, focal lengths that change on the way (the
first frame's counts), COLMAP's binary models.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from files.arrays import read_arrays
from geometry.camera import CameraPath, homogeneous, inverse, rigid


def check_poses(poses: Tensor, convention: str, where: str) -> Tensor:
    """A file's poses [T,4,4] or [T,3,4] as float32 camera-to-world [T,4,4] in OpenCV axes. Their `convention` is "c2w"
    or "w2c", both OpenCV, or "opengl": c2w with y up and z backward. Raises ValueError naming `where` and the frame."""
    c2w = homogeneous(poses.double().clamp(-1e9, 1e9), where)
    if len(c2w) < 2:
        raise ValueError(f"{where}: {len(c2w)} pose, expected at least 2")
    if convention == "w2c":
        c2w = inverse(c2w)
    elif convention == "opengl":
        c2w = c2w * c2w.new_tensor([1, -1, -1, 1])  # the columns are the camera's axes
    rotation = c2w[:, :3, :3].nan_to_num()
    tests = {
        "a number is not finite or beyond 1e6": ~(c2w.abs() < 1e6).all(-1).all(-1),
        "the last row is not 0 0 0 1": ((c2w[:, 3] - c2w.new_tensor([0, 0, 0, 1])).abs() > 1e-5).any(-1),
        "the rotation is not orthonormal to 1e-3": (rotation @ rotation.mT - torch.eye(3)).abs().amax((1, 2)) > 1e-3,
        "the rotation is a reflection (determinant -1)": torch.linalg.det(rotation) < 0,
    }
    for problem, failed in tests.items():
        if failed.any():
            raise ValueError(f"{where}, frame {failed.nonzero()[0].item()}: {problem}")
    return homogeneous(c2w[:, :3].float())


def field_of_view(width: float, focal: float, where: str) -> float:
    """Degrees that `width` spans at distance `focal`."""
    degrees = 2 * math.degrees(math.atan2(width, 2 * focal))
    if not 1 <= degrees <= 179:
        raise ValueError(f"{where}: focal length {focal:g} for width {width:g}, expected a view of 1 to 179 degrees")
    return degrees


def numbers(value: object, where: str, *shapes: tuple[int, ...]) -> np.ndarray:
    """A file's value as an array of one of the `shapes`."""
    try:
        array = np.array(value)
    except ValueError:  # rows of unequal length
        array = np.array(None)
    if array.dtype.kind not in "fiu" or array.shape not in shapes:
        raise ValueError(f"{where}: expected a list of numbers of shape {' or '.join(map(str, shapes))}")
    return array.astype(np.float64)


def number(data: dict, key: str, where: str, low: float, high: float) -> float:
    value = data.get(key)
    if not (type(value) in (int, float) and low <= value <= high):
        raise ValueError(f"{where}: {key} is {value!r}, expected a number from {low} to {high}")
    return value


LAYOUTS = {  # key of a json file -> key of the matrix in each frame, convention
    "c2w": (None, "c2w"), "w2c": (None, "w2c"),
    "frames": ("transform_matrix", "opengl"),  # transforms.json of nerfstudio and instant-ngp
    "camera_path": ("camera_to_world", "opengl"),  # export of the nerfstudio viewer
    "0": ("extrinsic", "c2w"),  # HY-WorldPlay, frames "0", "1", ...: camera-to-world in spite of the name
}  # fmt: skip


def frame_matrix(frame: object, key: str | None, where: str) -> np.ndarray:
    """[4,4] of one frame of a json file, which is the matrix itself or an object with the `key`."""
    if key is not None:
        known = {"c2w", "w2c"} | {name for name, _ in LAYOUTS.values()}
        found = sorted(known.intersection(frame)) if isinstance(frame, dict) else []
        if found != [key]:
            raise ValueError(f"{where}: expected {key!r} as the only matrix, found {', '.join(found) or 'none'}")
        frame, where = frame[key], f"{where}: {key!r}"
    return np.vstack([numbers(frame, where, (3, 4), (4, 4), (16,)).reshape(-1, 4), [0, 0, 0, 1]])[:4]


def json_fov(given: dict, layout: str, where: str) -> float | None:
    """Horizontal degrees from the keys of the file and its first frame, None if there are no such keys."""
    if "fov_x" in given:
        return number(given, "fov_x", where, 1, 179)
    if layout == "frames" and "camera_angle_x" in given:
        return math.degrees(number(given, "camera_angle_x", where, 0.02, 3.12))
    if layout == "frames" and "fl_x" in given:
        return field_of_view(number(given, "w", where, 1, 1e6), number(given, "fl_x", where, 1, 1e6), where)
    if layout == "camera_path" and "fov" in given:  # vertical, as in three.js
        slope = math.tan(math.radians(number(given, "fov", where, 1, 179)) / 2)
        return field_of_view(slope * number(given, "aspect", where, 0.01, 100), 0.5, where)
    if "K" in given:  # HY-WorldPlay knows no size: the principal point is the middle of the picture
        K = numbers(given["K"], f"{where}: 'K'", (3, 3))
        width = 2 * K[0, 2] if layout == "0" else numbers(given.get("size"), f"{where}: 'size' of 'K'", (2,))[1]
        return field_of_view(width, K[0, 0], where)
    return None


def read_json(file: Path) -> CameraPath:
    """One of `LAYOUTS`; beside it may be `fov_x` (degrees) or `K` and `size` ([height, width]), `fps` and `unit`."""
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    found = [key for key in LAYOUTS if key in data] if isinstance(data, dict) else []
    if len(found) != 1:
        expected = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"{file}: expected exactly one of the key {expected}, found {' and '.join(found) or 'none'}")
    (layout,), where = found, f"{file}: {found[0]!r}"
    frames, (key, convention) = data[layout], LAYOUTS[layout]
    if layout == "0":
        frames, where = [data.get(str(index)) for index in range(sum(map(str.isdecimal, data)))], str(file)
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{where}: expected a list of at least 2 poses")
    matrices = [frame_matrix(frame, key, f"{where}, frame {index}") for index, frame in enumerate(frames)]
    fov_x = json_fov(data if key is None else {**data, **frames[0]}, layout, str(file))
    fps = number(data, "fps", str(file), 1, 240) if "fps" in data else None
    unit = data.get("unit", "depth")
    if unit not in ("depth", "meter"):
        raise ValueError(f"{file}: unit is {unit!r}, expected 'depth' or 'meter'")
    return CameraPath(check_poses(torch.from_numpy(np.stack(matrices)), convention, where), fps, fov_x, unit)


def read_npz(file: Path) -> CameraPath:
    """The official `camera_poses`, GEN3C's `w2c` with `intrinsics`, or ViPE's `data` (camera-to-world) with `inds`."""
    arrays = read_arrays(file)
    found = [keys for keys in (("camera_poses",), ("w2c", "intrinsics"), ("data", "inds")) if {*keys} <= {*arrays}]
    if len(found) != 1:
        problem = "more than one layout" if found else "no array 'camera_poses'"
        raise ValueError(f"{file}: {problem}, found {', '.join(sorted(arrays))}; expected one of"
                         " camera_poses, w2c + intrinsics (GEN3C), data + inds (ViPE)")
    name = found[0][0]
    if arrays[name].dtype.kind not in "fiu":
        raise ValueError(f"{file}: {name!r} has type {arrays[name].dtype}, expected numbers")
    poses = torch.from_numpy(arrays[name].astype(np.float64))
    c2w = check_poses(poses, "w2c" if name == "w2c" else "c2w", f"{file}: {name!r}")
    if name == "data":
        c2w = c2w[numbers(arrays["inds"], f"{file}: 'inds'", (len(c2w),)).argsort()]
    if name != "w2c":
        return CameraPath(c2w)
    where = f"{file}: 'intrinsics'"  # no size there either: the principal point is the middle of the picture
    K = numbers(arrays["intrinsics"], where, (len(c2w), 3, 3), (3, 3)).reshape(-1, 3, 3)[0]
    return CameraPath(c2w, fov_x=field_of_view(2 * K[0, 2], K[0, 0], where))


def read_lines(file: Path) -> list[tuple[str, list[str]]]:
    """The words of all lines but comments, each line with its place."""
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()  # what is no text is no number either
    return [(f"{file}, line {index}", line.split()) for index, line in enumerate(lines, 1) if not line.startswith("#")]


def floats(words: list[str], where: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_txt(file: Path) -> CameraPath:
    """One pose a line, of 19 columns: RealEstate10K and CameraCtrl (time, fx fy cx cy in picture sizes, 0 0, 3x4 w2c;
    the video's address may come first); of 12: KITTI (3x4 c2w); of 8: TUM (time, position, quaternion x y z w; c2w)."""
    lines = [(where, words) for where, words in read_lines(file) if words]
    lines = lines[1:] if lines and len(lines[0][1]) == 1 else lines  # the address
    columns = len(lines[0][1]) if lines else 0
    if columns not in (8, 12, 19):
        raise ValueError(f"{file}: {columns} columns, expected 8 (TUM), 12 (KITTI) or 19 (RealEstate10K)")
    for where, words in lines:
        if len(words) != columns:
            raise ValueError(f"{where}: {len(words)} columns, expected {columns} as in the first pose")
    rows, where = torch.tensor([floats(words, where) for where, words in lines], dtype=torch.float64), str(file)
    if columns == 19:
        c2w = check_poses(rows[:, 7:].reshape(-1, 3, 4), "w2c", where)
        return CameraPath(c2w, fov_x=field_of_view(1, rows[0, 1].item(), where))
    poses = rows.reshape(-1, 3, 4) if columns == 12 else rigid(rows[:, [7, 4, 5, 6]], rows[:, 1:4])
    return CameraPath(check_poses(poses, "c2w", where))


def read_colmap(folder: Path) -> CameraPath:
    """A COLMAP text model: images.txt (world-to-camera, quaternion w x y z, two lines an image) in the order of the
    names, and the field of view of the first image's camera if there is a cameras.txt with it."""
    file, cameras, images, fov_x = folder / "images.txt", folder / "cameras.txt", [], None
    if not file.is_file():
        raise ValueError(f"{folder}: a folder without images.txt, expected COLMAP's text format")
    lines = read_lines(file)
    for (where, words), (_, points) in zip(lines[::2], [*lines[1::2], ("", [])]):  # the last line may be missing
        if len(words) < 10 or len(points) % 3:
            raise ValueError(f"{where}: expected ID, quaternion, translation, camera, NAME, and a line of points next")
        images.append((" ".join(words[9:]), words[8], floats(words[1:8], where)))
    images.sort()
    rows = torch.tensor([row for *_, row in images], dtype=torch.float64).reshape(-1, 7)
    c2w = check_poses(rigid(rows[:, :4], rows[:, 4:]), "w2c", f"{file} (sorted by name)")
    for where, words in read_lines(cameras) if cameras.is_file() else []:
        if words[:1] == [images[0][1]] and len(words) > 4:
            width, _, focal = floats(words[2:5], where)  # the (x) focal length is every model's first parameter
            fov_x = field_of_view(width, focal, where)
    return CameraPath(c2w, fov_x=fov_x)


def load_path(file: str | Path) -> CameraPath:
    """A path by its suffix; a folder is a COLMAP model. Raises ValueError naming file and frame, OSError if missing."""
    file = Path(file)
    readers = {".json": read_json, ".npz": read_npz, ".txt": read_txt, "a folder": read_colmap}
    kind = "a folder" if file.is_dir() else file.suffix.lower()
    if kind not in readers:
        raise ValueError(f"{file}: unknown camera path format {kind!r}, expected {', '.join(readers)}")
    return readers[kind](file)
