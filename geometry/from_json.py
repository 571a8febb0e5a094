"""Camera paths in json files, told by their keys: `JSON` is the table."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from files.checkpoint import read_json_value
from files.cli import note
from geometry.camera import focal
from geometry.recording import Recording, number, numbers, pinhole_of, refuse_lens, rigid_rows

NAN = np.nan
W2C = ("w2c", "extrinsics", "extrinsic")


def matrix_rows(values: list, where: str, key: str | None = None) -> np.ndarray:
    """[T,4,4] from matrices 4x4, 3x4 or their 16 or 12 numbers in a row; or under a `key` of each frame."""
    rows = []
    for index, value in enumerate(values):
        place = f"{where}, frame {index}" + (f": {key!r}" if key else "")
        value = value.get(key) if key else value
        rows.append(numbers(value, place, (3, 4), (4, 4), (16,), (12,)).reshape(-1, 4)[:4])
    return np.stack([np.vstack([each, [0, 0, 0, 1]])[:4] for each in rows])


def frame_list(data: dict, key: str, inner: str, where: str) -> list[dict]:
    """The frames listed under a key, each with the matrix `inner` and no other one."""
    frames = data[key]
    known = {"c2w", "w2c", "transform_matrix", "camera_to_world", "extrinsic"}
    for index, frame in enumerate(frames):
        found = sorted(known.intersection(frame)) if isinstance(frame, dict) else []
        if found != [inner]:
            raise ValueError(f"{where}, frame {index}: expected {inner!r} as the only matrix, found"
                             f" {', '.join(found) or 'none'}")
    return frames


def frame_lens(given: dict, where: str) -> tuple[list[float], tuple[float, float] | None] | None:
    """fx, fy, cx, cy and the picture's size from the keys of a file and one of its frames; None if it has none."""
    width, height = (number(given, key, where, 1, 1e6) if key in given else NAN for key in ("w", "h"))
    lens = [number(given, key, where, 1e-9, 1e6) if key in given else NAN for key in ("fl_x", "fl_y", "cx", "cy")]
    for axis, key in ((0, "camera_angle_x"), (1, "camera_angle_y")):
        if key in given:
            side = (width, height)[axis]
            degrees = np.degrees(number(given, key, where, 0.02, 3.12))
            if np.isnan(side):  # then no pixels are known
                return [focal(degrees) if axis == 0 else NAN, NAN if axis == 0 else focal(degrees), NAN, NAN], (
                    (1.0, NAN) if axis == 0 else (NAN, 1.0))
            lens[axis] = focal(degrees) * side
            break
    if np.isnan(lens[:2]).all():
        return None
    if np.isnan(width) and np.isnan(height):
        if np.isnan(lens[2:]).any():
            number(given, "w", where, 1, 1e6)  # a focal length in pixels needs it
        return lens, None
    return lens, (width, height)


def collect(views: list, where: str) -> tuple[np.ndarray | None, tuple[float, float] | None]:
    """The lenses [T,4] of all frames in the first one's picture; all or none have one."""
    found = [view for view in views if view is not None]
    if not found:
        return None, None
    if len(found) < len(views) or any(size != found[0][1] for _, size in found):
        raise ValueError(f"{where}: frames of several sizes or without a focal length, expected one of each kind")
    return np.array([lens for lens, _ in found]), found[0][1]


def common(data: dict, where: str) -> dict:
    """`fps`, `unit`, and the view of a whole file by `fov_x` or `K` and `size` ([height, width])."""
    found: dict = {}
    if "fps" in data:
        found["fps"] = number(data, "fps", where, 1, 240)
    if "unit" in data:
        found["unit"] = str(data["unit"])
    if "fov_x" in data:
        found |= {"lens": np.array([focal(number(data, "fov_x", where, 1, 179)), NAN, NAN, NAN]), "size": (1.0, NAN)}
    elif "K" in data and "size" in data:
        lens = pinhole_of(data["K"], f"{where}: 'K'")
        height, width = numbers(data["size"], f"{where}: 'size' of 'K'", (2,))
        middle = 2 * lens.reshape(-1, 4)[0, 2:]
        if np.abs(middle - [width, height]).max() > np.abs(middle - [height, width]).max():
            height, width = width, height  # written as width and height: the middle tells
        found |= {"lens": lens, "size": (width, height)}
    elif "K" in data:
        numbers(data.get("size"), f"{where}: 'size' of 'K'", (2,))
    return found


def plain(data: dict, key: str, where: str) -> Recording:
    """Matrices alone, and what stands beside them for all."""
    found = Recording(where, matrix_rows(data[key], where), "w2c" if key in W2C else "c2w", **common(data, where))
    for name in ("intrinsics", "intrinsic"):
        if name in data:
            lens = pinhole_of(data[name], f"{where}: {name!r}")
            return replace(found, lens=lens)
    return found


def transforms(data: dict, key: str, where: str) -> Recording:
    """transforms.json of nerfstudio and instant-ngp: frames in any order, which their `file_path` tells."""
    frames = frame_list(data, key, "transform_matrix", where)
    refuse_lens(data.get("camera_model", data.get("camera_type")), where)
    lens, size = collect([frame_lens(data | frame, f"{where}, frame {index}") for index, frame in enumerate(frames)],
                         where)
    names = [frame.get("file_path") for frame in frames]
    names = names if all(isinstance(name, str) for name in names) else None
    if names is not None and len(set(names)) < len(names):
        note(f"{where}: the same file_path stands in several frames, so their order in the file counts")
        names = None
    view = {"lens": lens, "size": size, "names": names}
    return Recording(where, matrix_rows(frames, where, "transform_matrix"), "opengl",
                     **view | common(data, where))


def viewer(data: dict, key: str, where: str) -> Recording:
    """A camera path of nerfstudio's viewer or its Blender add-on: `fov` is vertical, of render_width x render_height;
    only where these are missing, `aspect` tells the shape."""
    frames = frame_list(data, key, "camera_to_world", where)
    refuse_lens(data.get("camera_type"), where)
    lens = size = None
    if any("fov" in frame for frame in frames):
        lengths = [focal(number(frame, "fov", f"{where}, frame {index}", 1, 179)) for index, frame in enumerate(frames)]
        if "render_width" in data and "render_height" in data:
            size = tuple(number(data, name, where, 1, 1e6) for name in ("render_width", "render_height"))
        else:
            size = number(frames[0], "aspect", where, 0.01, 100), 1.0
        lens = np.array([[length * size[1], length * size[1], NAN, NAN] for length in lengths])
    view = {"lens": lens, "size": size}
    return Recording(where, matrix_rows(frames, where, "camera_to_world"), "opengl",
                     **view | common(data, where))


def worldplay(data: dict, key: str, where: str) -> Recording:
    """HY-WorldPlay and WBench: frames "0", "1", ..., one a latent; `extrinsic` is camera-to-world in spite of its
    name, and `K` is of a picture whose middle is its principal point."""
    listed = {"frames": [data.get(str(index)) for index in range(sum(map(str.isdecimal, data)))]}
    frames = frame_list(listed, "frames", "extrinsic", where)
    lens = size = None
    if any("K" in frame for frame in frames):
        lens = np.stack([pinhole_of(frame.get("K"), f"{where}, frame {index}: 'K'")
                         for index, frame in enumerate(frames)])
        size = tuple(2 * lens[0, 2:]) if lens[0, 2] > 1 else None  # else in shares of the picture
    return Recording(where, matrix_rows(frames, where, "extrinsic"), "c2w", latents=True,
                     **{"lens": lens, "size": size, "fps": 24} | common(data, where))


def open3d(data: dict, key: str, where: str) -> Recording:
    """Open3D's PinholeCameraTrajectory: world-to-camera, all matrices column by column."""
    frames, poses, views = data[key], [], []
    for index, frame in enumerate(frames):
        place = f"{where}, frame {index}"
        poses.append(numbers(frame.get("extrinsic"), f"{place}: 'extrinsic'", (16,)).reshape(4, 4).T)
        inner = frame.get("intrinsic")
        inner = inner if isinstance(inner, dict) else {}
        size = number(inner, "width", place, 1, 1e6), number(inner, "height", place, 1, 1e6)
        K = numbers(inner.get("intrinsic_matrix"), f"{place}: 'intrinsic_matrix'", (9,)).reshape(3, 3).T
        views.append((pinhole_of(K, place) + [0, 0, 0.5, 0.5], size))  # its pixel centres are whole numbers
    lens, size = collect(views, where)
    return Recording(where, np.stack(poses), "w2c", lens, size)


def base_cam(data: dict, key: str, where: str) -> Recording:
    """instant-ngp's base_cam.json: quaternion x y z w, position, vertical `fov`."""
    frames = data[key]
    places = [f"{where}, frame {index}" for index in range(len(frames))]
    q = np.stack([numbers(frame.get("R"), f"{at}: 'R'", (4,)) for frame, at in zip(frames, places)])
    position = np.stack([numbers(frame.get("T"), f"{at}: 'T'", (3,)) for frame, at in zip(frames, places)])
    fov = [focal(number(frame, "fov", at, 1, 179)) for frame, at in zip(frames, places)]
    return Recording(where, rigid_rows(q[:, [3, 0, 1, 2]], position), "c2w",
                     np.array([[NAN, each, NAN, NAN] for each in fov]), (NAN, 1.0))


def poses(data: dict, key: str, where: str) -> Recording:
    """Camera-to-world matrices; or Record3D's metadata.json: quaternion x y z w and position in ARKit's axes, and `K`
    column by column."""
    first = data[key][0]
    if not (isinstance(first, list) and len(first) == 7):
        return plain(data, key, where)
    rows = numbers(data[key], where, (-1, 7))
    lens, size = None, None
    if "K" in data:
        lens = pinhole_of(numbers(data["K"], f"{where}: 'K'", (9,)).reshape(3, 3).T, where)
        size = number(data, "w", where, 1, 1e6), number(data, "h", where, 1, 1e6)
    fps = number(data, "fps", where, 1, 240) if "fps" in data else None
    return Recording(where, rigid_rows(rows[:, [3, 0, 1, 2]], rows[:, 4:]), "opengl", lens, size, fps=fps)


def recammaster(data: dict, key: str, where: str) -> Recording:
    """ReCamMaster's camera_extrinsics.json: row vectors as text, Unreal's axes, centimeters. Of several cameras the
    first counts."""
    poses = []
    for index in count():
        if f"frame{index}" not in data:
            break
        place, frame = f"{where}, frame {index}", data[f"frame{index}"]
        text = frame.get(min(frame)) if isinstance(frame, dict) and frame else None
        words = re.findall(r"[^][\s]+", text) if isinstance(text, str) else []
        try:
            pose = np.array(words, dtype=np.float64).reshape(4, 4).T
        except ValueError:
            raise ValueError(f"{place}: expected 16 numbers as in '[1 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1]'") from None
        pose[:3, 3] /= 100
        poses.append(pose)
    return Recording(where, np.stack(poses), "unreal")


def gaussians(data: list, key: str, where: str) -> Recording:
    """cameras.json of 3D Gaussian Splatting: position and rotation of the camera."""
    poses, views = np.tile(np.eye(4), (len(data), 1, 1)), []
    for index, frame in enumerate(data):
        place = f"{where}, frame {index}"
        poses[index, :3, :3] = numbers(frame.get("rotation"), f"{place}: 'rotation'", (3, 3))
        poses[index, :3, 3] = numbers(frame.get("position"), f"{place}: 'position'", (3,))
        fx, fy, *size = (number(frame, name, place, 1, 1e6) for name in ("fx", "fy", "width", "height"))
        views.append(([fx, fy, NAN, NAN], tuple(size)))
    lens, size = collect(views, where)
    names = [frame.get("img_name") for frame in data]
    return Recording(where, poses, "c2w", lens, size, names if all(isinstance(name, str) for name in names) else None)


def exported(data: list, key: str, where: str) -> Recording:
    """What nerfstudio's ns-export writes: a list of frames with `transform`, in OpenGL's axes."""
    names = [frame.get("file_path") for frame in data]
    return Recording(where, matrix_rows(data, where, "transform"), "opengl",
                     names=names if all(isinstance(name, str) for name in names) else None)


def bare(data: list, key: str, where: str) -> Recording:
    """Nothing but matrices; MotionCtrl's rows of 12 are world-to-camera as RealEstate10K's, others camera-to-world."""
    flat = all(isinstance(row, list) and len(row) == 12 and not isinstance(row[0], list) for row in data)
    return Recording(where, matrix_rows(data, where), "w2c" if flat else "c2w")


def polycam(frames: list[dict], where: str, names: list[str]) -> Recording:
    """A Polycam folder of keyframes, one json file each: ARKit's axes."""
    poses, views = [], []
    for frame, name in zip(frames, names):
        place = f"{where}/{name}.json"
        rows = [[number(frame, f"t_{i}{j}", place, -1e9, 1e9) for j in range(4)] for i in range(3)]
        poses.append([*rows, [0.0, 0.0, 0.0, 1.0]])
        lens = [number(frame, key, place, 1, 1e6) if key in frame else NAN for key in ("fx", "fy", "cx", "cy")]
        size = tuple(number(frame, key, place, 1, 1e6) if key in frame else NAN for key in ("width", "height"))
        views.append(None if np.isnan([lens[0], size[0]]).any() else (lens, size))
    lens, size = collect(views, where)
    return Recording(where, np.array(poses), "opengl", lens, size, names)


Reader = Callable[[dict, str, str], Recording]
JSON: dict[str, Reader] = {  # the key that tells the format -> its reader
    "c2w": plain, "w2c": plain, "extrinsics": plain, "extrinsic": plain,
    "frames": transforms, "camera_path": viewer, "0": worldplay, "parameters": open3d, "path": base_cam,
    "poses": poses, "camera_poses": plain, "frame0": recammaster,
}  # fmt: skip
LISTS: dict[str, Callable[[list, str, str], Recording]] = {"transform": exported, "position": gaussians}


def from_json(file: Path) -> Recording:
    data = read_json_value(file)
    if isinstance(data, list) and data:
        keys = [key for key in LISTS if all(isinstance(row, dict) and key in row for row in data)]
        if all(isinstance(row, list) for row in data):
            return bare(data, "", str(file))
        if keys:
            return LISTS[keys[0]](data, keys[0], str(file))
    table = data if isinstance(data, dict) else {}
    found = [key for key in JSON if key in table]
    if len(found) != 1:
        hint = "; this is one frame: give the folder of all" if "t_00" in table else ""
        raise ValueError(f"{file}: expected exactly one of the key {', '.join(map(repr, JSON))}, found"
                         f" {' and '.join(found) or 'none'}{hint}")
    (key,) = found
    where = str(file) if key in ("0", "frame0") else f"{file}: {key!r}"
    frames = table[key]
    listed = key in ("0", "frame0") or isinstance(frames, list) and frames
    if not listed or key in ("parameters", "path") and not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"{where}: expected a list of at least 2 poses")
    return JSON[key](table, key, where)
