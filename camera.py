"""Camera paths: poses read from files or made from words, and the arithmetic on them.

A path is a `CameraPath`: camera-to-world matrices [T,4,4] in OpenCV axes (x right, y down, z forward). Its unit is a
tenth of the first frame's median depth, as officially, unless a file says "meter". Read are json, npz, text files and
COLMAP folders, official and others': the key or the layout tells the convention, `check_poses` converts and checks.
Made are moves such as "forward 1, yaw -20", which turn and travel like the buttons of the official web page, but "up"
goes up. Relative poses, padding and windows are as officially. Left out: timestamps (frames are evenly spaced), lens
distortion, focal lengths that change on the way (the first frame's counts), COLMAP's binary models.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import media

WINDOW = 33  # frames a chunk: 9 latent frames
DEPTH = 10  # units in one median depth


@dataclass(frozen=True)
class CameraPath:
    c2w: Tensor  # [T, 4, 4] float32
    fps: float | None = None
    fov_x: float | None = None  # horizontal field of view, degrees
    unit: str = "depth"  # of the translations: "depth" (a tenth of the first frame's median depth) or "meter"


def homogeneous(poses: Tensor, where: str = "camera poses") -> Tensor:
    """[T,4,4], [T,3,4], or either with a leading batch of 1 -> [T,4,4]."""
    rows = poses[0] if poses.ndim == 4 and len(poses) == 1 else poses
    if rows.ndim != 3 or rows.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"{where}: shape {tuple(poses.shape)}, expected [T,4,4] or [T,3,4]")
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


def hold(poses: Tensor, length: int = WINDOW) -> Tensor:
    """The poses [T,4,4] of a chunk; the last one holds if there are fewer than `length`, as officially."""
    return poses[torch.arange(length).clamp(max=len(poses) - 1)]


def quaternion(rotation: Tensor) -> Tensor:
    """[...,3,3] -> unit quaternions [...,4], w first, w >= 0."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = rotation.flatten(-2).unbind(-1)
    outer = torch.stack([  # 4 q q^T: every row is q times one of its entries, and the largest entry divides best
        1 + xx + yy + zz, zy - yz, xz - zx, yx - xy,
        zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx,
        xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy,
        yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz,
    ], dim=-1).unflatten(-1, (4, 4))  # fmt: skip
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1, keepdim=True)
    q = F.normalize(outer.take_along_dim(best[..., None], dim=-2).squeeze(-2), dim=-1)
    return torch.where(q[..., :1] < 0, -q, q)


def rigid(q: Tensor, translation: Tensor) -> Tensor:
    """Unit quaternions [n,4], w first, and translations [n,3] -> poses [n,4,4]."""
    q = q / q.norm(dim=-1, keepdim=True).clamp(0.99, 1.01)  # files have few digits; `check_poses` refuses worse
    eye = torch.eye(3).to(q)[None]
    cross = torch.linalg.cross(q[:, None, 1:], eye).mT  # times a vector: the cross product with it
    rotation = (q * q).sum(-1)[:, None, None] * eye + 2 * q[:, :1, None] * cross + 2 * cross @ cross
    return homogeneous(torch.cat([rotation, translation[:, :, None]], dim=-1))


def resample(path: CameraPath, frames: int) -> CameraPath:
    """The same way in `frames` evenly spaced poses: rotations by slerp, translations linear, both ends kept. The frame
    rate stays, so the camera gets slower or faster."""
    if frames < 2:
        raise ValueError(f"a path can't be resampled to {frames} frames, expected at least 2")
    c2w, last = path.c2w.double(), len(path.c2w) - 1
    place = torch.linspace(0, last, frames, dtype=torch.float64, device=c2w.device)
    index = place.long()
    share = (place - index)[:, None]
    here = c2w[index]
    step = inverse(here) @ c2w[(index + 1).clamp(max=last)]
    q = quaternion(step[:, :3, :3])
    half = share * q[:, :1].clamp(max=1).acos()  # angle
    q = torch.cat([half.cos(), half.sin() * F.normalize(q[:, 1:], dim=-1)], dim=-1)
    return replace(path, c2w=(here @ rigid(q, share * step[:, :3, 3])).float())


def retime(path: CameraPath, frames: int | None, fps: float | None, stretch: bool) -> tuple[CameraPath, int, float]:
    """The path, length and frame rate of a video that follows `path`.

    Without `stretch` the path's poses are its frames, whatever their rate: later the path is cut or its last pose held.
    With it the whole path is resampled to `frames`, or, if they are not given, to the rate `fps` at its own speed.
    """
    rate = fps if fps is not None else path.fps if path.fps is not None else 16
    if not 1 <= rate <= 240:
        raise ValueError(f"--fps {rate:g}: expected a number from 1 to 240")
    if frames is None:
        speed = rate / path.fps if stretch and path.fps is not None else 1
        frames = round((len(path.c2w) - 1) * speed) + 1
    if frames < 1:
        raise ValueError(f"--frames {frames}: expected at least 1")
    return (resample(path, frames) if stretch else path), frames, rate


def describe(path: CameraPath) -> str:
    """How far the path goes and turns, added up from frame to frame."""
    steps, unit = path.c2w.double().diff(dim=0), "meters" if path.unit == "meter" else "units"
    turned = turn_degrees(path.c2w[1:, :3, :3].double(), path.c2w[:-1, :3, :3].double()).sum()
    travelled = steps[:, :3, 3].norm(dim=-1).sum()
    return f"{len(path.c2w)} poses, {travelled:.4g} {unit} travelled, {turned:.4g} degrees turned"


def turn_degrees(a: Tensor, b: Tensor) -> Tensor:
    """Angles [T] between rotations [T,3,3]; exact for small ones too, where the cosine is not."""
    return 2 * ((a - b).norm(dim=(1, 2)) / math.sqrt(8)).clamp(max=1).asin().rad2deg()


def path_error(estimated: Tensor, wanted: Tensor) -> dict[str, float]:
    """How far a camera path is from the one wanted; both [T,4,4] camera-to-world, each of any origin and unit.

    Both are made relative to their first pose, and the estimated translations are multiplied by the `scale`, not
    below 0, that fits them best. Averages over the frames after the first: `rotation_degrees`, the angle between the
    rotations; `translation`, the distance between the positions in the wanted path's unit; `translation_share`, that
    distance over the wanted path's largest distance from its start (0 if it stays in place).
    """
    estimated, wanted = (normalize(path.cpu().double(), len(path)) for path in (estimated, wanted))
    there, goal = estimated[1:, :3, 3], wanted[1:, :3, 3]
    scale = max(((there * goal).sum() / there.square().sum().clamp(min=1e-30)).item(), 0.0)
    distance, reach = (scale * there - goal).norm(dim=-1).mean().item(), goal.norm(dim=-1).max().item()
    turned = turn_degrees(estimated[1:, :3, :3], wanted[1:, :3, :3]).mean().item()
    return {"frames": len(wanted), "rotation_degrees": turned, "translation": distance,
            "translation_share": distance / reach if reach else 0.0, "scale": scale}


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
    arrays = media.read_arrays(file)
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


VERBS = {  # verb -> component of (x, y, z, yaw, pitch, roll, orbit, spiral), factor
    "forward": (2, 1), "back": (2, -1), "right": (0, 1), "left": (0, -1),
    "up": (1, -1), "down": (1, 1),  # y points down; the official web page has "rise" as +y, which goes down
    "yaw": (3, 1), "pitch": (4, 1), "roll": (5, 1),  # right, up, clockwise
    "dolly": (2, DEPTH), "truck": (0, DEPTH), "pan": (3, 1), "tilt": (4, 1), "orbit": (6, 1), "spiral": (7, 1),
}


def motion(start: Tensor, move: Tensor, progress: Tensor) -> Tensor:
    """Poses [n,4,4] from `start` ([4,4] or [n,4,4]) at each `progress` [n] of `move` = (x, y, z, yaw, pitch, roll),
    degrees, in the axes of the start. The rotation is Rz(roll) Ry(yaw) Rx(pitch), as in the official web page."""
    delta = torch.eye(4, dtype=start.dtype).repeat(len(progress), 1, 1)
    delta[:, :3, 3] = progress[:, None] * move[:3]
    for (a, b), degrees in zip(((0, 1), (2, 0), (1, 2)), move[[5, 3, 4]].tolist()):  # planes of Rz, Ry, Rx
        angle = progress * math.radians(degrees)
        turn = torch.eye(4, dtype=start.dtype).repeat(len(progress), 1, 1)
        turn[:, a, a], turn[:, a, b] = angle.cos(), -angle.sin()
        turn[:, b, a], turn[:, b, b] = angle.sin(), angle.cos()
        delta = delta @ turn
    return start @ delta


def circle(start: Tensor, orbit: Tensor, spiral: Tensor) -> Tensor:
    """Poses [n,4,4] that look without roll at the point one median depth ahead of `start` [4,4], after each `orbit` [n]
    around it to the right and `spiral` [n] around the line to it, from the right clockwise, 2 units wider a turn."""
    orbit, turn, radius = orbit.deg2rad(), spiral.deg2rad(), spiral.abs() / 180
    place = torch.stack([radius * turn.cos() + DEPTH * orbit.sin(), radius * turn.sin(), DEPTH * (1 - orbit.cos())], -1)
    z = F.normalize(place.new_tensor([0, 0, DEPTH]) - place, dim=-1)
    x = F.normalize(torch.linalg.cross(place.new_tensor([[0, 1, 0]]), z), dim=-1)
    return start @ homogeneous(torch.stack([x, torch.linalg.cross(z, x), z, place], dim=-1))


def parse_move(text: str) -> Tensor:
    """One chunk's words, "forward 1 + yaw 20" -> the components of `VERBS`."""
    move = torch.zeros(8, dtype=torch.float64)
    for phrase in map(str.strip, text.split("+")):
        verb, *words = phrase.split() or [""]
        if phrase == "hold":
            continue
        if verb not in VERBS:
            raise ValueError(f"move {phrase!r}: unknown verb {verb!r}, expected {', '.join(VERBS)}, or hold alone")
        try:
            (amount,) = map(float, words)
        except ValueError:
            amount = math.nan
        if not abs(amount) < 1e4:
            raise ValueError(f"move {phrase!r}: expected one number below 10000 after {verb!r}, as in '{verb} 1'")
        component, factor = VERBS[verb]
        move[component] += factor * amount
    return move


def move_path(text: str, length: int = WINDOW) -> Tensor:
    """Moves such as "forward 1, yaw -20 + up 0.5, hold", one chunk each -> [length * n, 4, 4]. Lengths are in units (a
    tenth of the first frame's median depth), of dolly and truck in depths, angles in degrees. Every chunk starts and
    stops smoothly and goes on from the end of the one before. Raises ValueError naming the word."""
    poses, start = [], torch.eye(4, dtype=torch.float64)
    for chunk, phrase in enumerate(text.split(",")):
        progress = torch.linspace(0 if chunk == 0 else 1 / length, 1, length, dtype=torch.float64)
        progress, move = progress**2 * (3 - 2 * progress), parse_move(phrase)
        poses.append(motion(circle(start, progress * move[6], progress * move[7]), move[:6], progress))
        start = poses[-1][-1]
    return torch.cat(poses).float()
