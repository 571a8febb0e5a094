"""Cameras: the arithmetic of poses, paths made from words, and the error of one path against another.

A path is a `CameraPath`: camera-to-world matrices [T,4,4] in OpenCV axes (x right, y down, z forward). Its unit is a
tenth of the first frame's median depth, as officially, unless a file or the user says another. Moves such as
"forward 1, yaw -20" turn and travel like the buttons of the official web page, but "up" goes up. Relative poses,
padding and windows are as officially.
"""

import functools
import math
import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 33  # frames a chunk: 9 latent frames
DEPTH = 10  # units in one median depth


@dataclass(frozen=True)
class CameraPath:
    c2w: Tensor  # [T, 4, 4] float32
    fps: float | None = None
    unit: str = "depth"  # of the translations, for `unit_length`
    # Of frame 0 the focal lengths and the principal point (fx, fy, cx, cy), and the width and height of the picture in
    # whose pixels they are; nan is not known
    lens: tuple[float, float, float, float] | None = None
    size: tuple[float, float] | None = None
    zoom: Tensor | None = None  # [T, 2]: fx and fy of each frame over those of frame 0; none: they stay
    names: tuple[str, ...] | None = None  # of the frames

    @property
    def fov_x(self) -> float | None:
        """Horizontal degrees of frame 0, where they are known."""
        width = self.size[0] if self.size else 2 * self.lens[2] if self.lens else math.nan
        degrees = 2 * math.degrees(math.atan2(width, 2 * self.lens[0])) if self.lens else math.nan
        return None if math.isnan(degrees) else degrees


def focal(degrees: float) -> float:
    """Focal length in widths of a view of so many degrees across."""
    return 0.5 / math.tan(math.radians(degrees) / 2)


def square_lens(fov_x: float) -> dict:
    """`lens` and `size` of a CameraPath of which only the horizontal degrees are known."""
    return {"lens": (focal(fov_x), math.nan, math.nan, math.nan), "size": (1.0, math.nan)}


def resolve_lens(path: CameraPath, width: int, height: int,
                 fov: tuple[float, ...] | None = None) -> tuple[tuple[float, float, float, float], str]:
    """Focal lengths and principal point (fx, fy, cx, cy) of a picture in shares of its width and height, and in words
    what it is. `fov` is the user's, horizontal and perhaps vertical degrees; else the path's lens counts, else 55
    degrees. What neither says: pixels are square, the principal point is the middle."""
    if fov is not None or path.lens is None:
        x, *y = map(focal, fov or (55.0,))
        return (x, y[0] if y else x * width / height, 0.5, 0.5), f"field of view {(fov or (55.0,))[0]:g} degrees"
    (fx, fy, cx, cy), aspect, words = path.lens, width / height, ""
    w, h = path.size or (2 * cx, 2 * cy)
    if path.size is None and abs(w / h / aspect - 1) > 0.02 and cx < width and cy < height:
        # not the middle, so it must be the picture's own pixels
        (w, h), words = (width, height), ", principal point off the middle"
    squeeze = fy / fx if fx > 0 and fy > 0 else 1.0  # of pixels that are not square
    fx = fx if fx > 0 else fy
    w, h = (h * aspect if math.isnan(w) else w), (w / aspect if math.isnan(h) else h)
    if abs(w / h / aspect - 1) > 0.02:
        words = f", horizontally: the path's pictures are {w / h:.3g} times as wide as high, this one is {aspect:.3g}"
        h, cy = w / aspect, math.nan
    lens = fx / w, fx * squeeze / h, cx / w, cy / h
    degrees = math.degrees(2 * math.atan(0.5 / lens[0]))
    middle = [0.5 if math.isnan(share) else share for share in lens[2:]]
    if not (1 <= degrees <= 179 and all(0 < share < 1 for share in middle)):
        raise ValueError(f"the path's camera, focal length {fx:g} and principal point {cx:g}, {cy:g} of {w:g}x{h:g},"
                         " is none: expected a view of 1 to 179 degrees")
    return (lens[0], lens[1], *middle), f"field of view {degrees:.4g} degrees{words}"  # pyright: ignore[reportReturnType]


def unit_length(unit: str, median: float) -> float:
    """Of a path's unit in the unit of a geometry whose median depth is `median`. A `unit` is "depth", officially a
    tenth of the median depth, or "0.05depth", another share of it; "same" or "meter", the geometry's own; or a number
    of its units, as "1000" for a path in meters beside a depth map in millimeters."""
    if unit in ("same", "meter"):
        return 1.0
    share = re.fullmatch(r"([0-9.e+-]*)(depth)?", unit)
    try:
        length = float(share[1] or 1 / DEPTH) * (median if share[2] else 1) if share else math.nan
    except ValueError:
        length = math.nan
    if not (0 < length < 1e9 and unit):
        raise ValueError(f"unit {unit!r}: expected depth, meter, same, a number, or a share as in 0.05depth")
    return length


def homogeneous(poses: Tensor) -> Tensor:
    """[T,4,4], [T,3,4], or either with a leading batch of 1 -> [T,4,4]."""
    rows = poses[0] if poses.ndim == 4 and len(poses) == 1 else poses
    if rows.ndim != 3 or rows.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"camera poses: shape {tuple(poses.shape)}, expected [T,4,4] or [T,3,4]")
    last = rows.new_tensor([0, 0, 0, 1]).expand(len(rows), 1, 4)
    return rows if rows.shape[1] == 4 else torch.cat([rows, last], dim=1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products [...,m,k] x [...,k,n], added up term by term: the last bit of the library's product depends on
    the CPU, and one bit decides which of two equally deep points is seen."""
    terms = (column[..., None] * row[..., None, :] for column, row in zip(a.unbind(-1), b.unbind(-2)))
    return functools.reduce(torch.add, terms)


def inverse(poses: Tensor) -> Tensor:
    """Rigid inverse of [...,4,4]; wrong for rotations that are not orthonormal (kept for parity)."""
    result = poses.clone()
    result[..., :3, :3] = rotation = poses[..., :3, :3].mT
    result[..., :3, 3:] = -product(rotation, poses[..., :3, 3:])
    return result


def normalize(poses: Tensor, frames: int) -> Tensor:
    """Poses relative to the first, cut or padded with the last one -> [frames,4,4]."""
    poses = homogeneous(poses)
    index = torch.arange(frames, device=poses.device).clamp(max=len(poses) - 1)
    return product(inverse(poses[:1]), poses)[index]


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
    q = q / q.norm(dim=-1, keepdim=True).clamp(0.99, 1.01)  # files have few digits; `paths.straighten` refuses worse
    eye = torch.eye(3).to(q)[None]
    cross = torch.linalg.cross(q[:, None, 1:], eye).mT  # times a vector: the cross product with it
    rotation = (q * q).sum(-1)[:, None, None] * eye + 2 * q[:, :1, None] * cross + product(2 * cross, cross)
    return homogeneous(torch.cat([rotation, translation[:, :, None]], dim=-1))


def between(path: CameraPath, place: Tensor) -> CameraPath:
    """The path at each `place` [n], counted in its poses: rotations by slerp, the rest linear."""
    c2w, place = path.c2w.double(), place.double()
    index = place.long().clamp(max=len(c2w) - 1)
    share, after = (place - index)[:, None], (index + 1).clamp(max=len(c2w) - 1)
    here = c2w[index]
    step = product(inverse(here), c2w[after])
    q = quaternion(step[:, :3, :3])
    half = share * q[:, :1].clamp(max=1).acos()  # angle
    q = torch.cat([half.cos(), half.sin() * F.normalize(q[:, 1:], dim=-1)], dim=-1)
    zoom = None if path.zoom is None else torch.lerp(path.zoom[index], path.zoom[after], share.to(path.zoom))
    return replace(path, c2w=product(here, rigid(q, share * step[:, :3, 3])).float(), zoom=zoom, names=None)


def resample(path: CameraPath, frames: int) -> CameraPath:
    """The same way in `frames` evenly spaced poses, both ends kept. The frame rate stays, so the camera gets slower or
    faster."""
    if frames < 2:
        raise ValueError(f"a path can't be resampled to {frames} frames, expected at least 2")
    return between(path, torch.linspace(0, len(path.c2w) - 1, frames, dtype=torch.float64))


def retime(path: CameraPath, frames: int | None, fps: float | None, stretch: bool) -> tuple[CameraPath, int, float]:
    """The path, length and frame rate of a video that follows `path`.

    Without `stretch` the path's poses are its frames, whatever their rate: later the path is cut or its last pose held.
    With it the whole path is resampled to `frames`, or, if they are not given, to the rate `fps` at its own speed.
    """
    rate = fps if fps is not None else path.fps if path.fps is not None else 16
    if not 1 <= rate <= 240:
        raise ValueError(f"fps {rate:g}: expected a number from 1 to 240")
    if frames is None:
        if stretch and path.fps is None:
            raise ValueError("resample: the path has no rate of its own (fps, or time stamps); give --frames")
        speed = rate / path.fps if stretch and path.fps is not None else 1
        frames = round((len(path.c2w) - 1) * speed) + 1
    if frames < 1:
        raise ValueError(f"--frames {frames}: expected at least 1")
    return (resample(path, frames) if stretch else path), frames, rate


def describe(path: CameraPath) -> str:
    """How far the path goes and turns, added up from frame to frame."""
    steps, unit = path.c2w.double().diff(dim=0), "meters" if path.unit == "meter" else "units"
    zoom = "" if path.zoom is None else f", zoom {path.zoom.min():.3g} to {path.zoom.max():.3g}"
    turned = turn_degrees(path.c2w[1:, :3, :3].double(), path.c2w[:-1, :3, :3].double()).sum()
    travelled = steps[:, :3, 3].norm(dim=-1).sum()
    return f"{len(path.c2w)} poses, {travelled:.4g} {unit} travelled, {turned:.4g} degrees turned{zoom}"


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


VERBS = {  # verb -> component of (x, y, z, yaw, pitch, roll, orbit, spiral), factor
    "forward": (2, 1), "back": (2, -1), "right": (0, 1), "left": (0, -1),
    "up": (1, -1), "down": (1, 1),  # y points down; the official web page has "rise" as +y, which goes down
    "yaw": (3, 1), "pitch": (4, 1), "roll": (5, 1),  # right, up, clockwise
    "dolly": (2, DEPTH), "truck": (0, DEPTH), "pan": (3, 1), "tilt": (4, 1), "orbit": (6, 1), "spiral": (7, 1),
    "zoom": (8, 1),  # its amount is a factor of the focal length
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
        delta = product(delta, turn)
    return product(start, delta)


def circle(start: Tensor, orbit: Tensor, spiral: Tensor) -> Tensor:
    """Poses [n,4,4] that look without roll at the point one median depth ahead of `start` [4,4], after each `orbit` [n]
    around it to the right and `spiral` [n] around the line to it, from the right clockwise, 2 units wider a turn."""
    orbit, turn, radius = orbit.deg2rad(), spiral.deg2rad(), spiral.abs() / 180
    place = torch.stack([radius * turn.cos() + DEPTH * orbit.sin(), radius * turn.sin(), DEPTH * (1 - orbit.cos())], -1)
    z = F.normalize(place.new_tensor([0, 0, DEPTH]) - place, dim=-1)
    x = F.normalize(torch.linalg.cross(place.new_tensor([[0, 1, 0]]), z), dim=-1)
    return product(start, homogeneous(torch.stack([x, torch.linalg.cross(z, x), z, place], dim=-1)))


def parse_move(text: str) -> Tensor:
    """One chunk's words, "forward 1 + yaw 20" -> the components of `VERBS`."""
    move = torch.zeros(9, dtype=torch.float64)
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
        if verb == "zoom" and not 0.02 <= amount <= 50:
            raise ValueError(f"move {phrase!r}: expected a factor from 0.02 to 50, as in 'zoom 1.5'")
        component, factor = VERBS[verb]
        move[component] += math.log(amount) if verb == "zoom" else factor * amount
    return move


def eased(chunk: int, length: int) -> Tensor:
    """Progress [length] of a chunk's move, smooth at both ends; a later chunk begins after the frame before it."""
    progress = torch.linspace(0 if chunk == 0 else 1 / length, 1, length, dtype=torch.float64)
    return progress**2 * (3 - 2 * progress)


def moves(text: str, length: int = WINDOW) -> CameraPath:
    """Moves such as "forward 1, yaw -20 + up 0.5, hold, zoom 1.5", one chunk of `length` poses each. Lengths are in
    units (a tenth of the first frame's median depth), of dolly and truck in depths, angles in degrees; zoom is a factor
    of the focal length. Every chunk starts and stops smoothly and goes on from the end of the one before. Raises
    ValueError naming the word."""
    poses, zoom, start, before = [], [], torch.eye(4, dtype=torch.float64), 0.0
    for chunk, phrase in enumerate(text.split(",")):
        progress, move = eased(chunk, length), parse_move(phrase)
        poses.append(motion(circle(start, progress * move[6], progress * move[7]), move[:6], progress))
        zoom.append(before + progress * move[8])
        start, before = poses[-1][-1], zoom[-1][-1]
    factors = torch.cat(zoom).exp().float()
    return CameraPath(torch.cat(poses).float(), zoom=factors[:, None].expand(-1, 2) if (factors != 1).any() else None)


def move_path(text: str, length: int = WINDOW) -> Tensor:
    """The poses [length * n, 4, 4] of n `moves`, without their zoom."""
    return moves(text, length).c2w
