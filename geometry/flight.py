"""Paths that a person flies: smooth ones through keyframes, and straight ones to where somebody looks.

Poses are camera-to-world [4, 4] in OpenCV axes, in any unit. Positions follow a cubic spline. Rotations follow one too,
in the tangent space of each keyframe, so that turning is as smooth as travelling; between two keyframes that is slerp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.camera import VERBS, WINDOW, inverse, motion, quaternion, rigid

AMOUNTS = {"forward": 1.0, "back": 1.0, "left": 1.0, "right": 1.0, "up": 1.0, "down": 1.0, "yaw": 10.0, "pitch": 10.0,
           "roll": 10.0}  # of a button: units (tenths of the median depth), degrees


def turn_vector(rotation: Tensor) -> Tensor:
    """Rotations [..., 3, 3] -> axis times angle [..., 3], radians."""
    q = quaternion(rotation)
    length = q[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(length, q[..., :1])
    return q[..., 1:] * torch.where(length > 1e-12, angle / length.clamp(min=1e-12), 2.0)


def turned(vector: Tensor, place: Tensor) -> Tensor:
    """Axis times angle [n, 3] and positions [n, 3] -> poses [n, 4, 4]."""
    half = vector.norm(dim=-1, keepdim=True) / 2
    return rigid(torch.cat([half.cos(), half.sin() * F.normalize(vector, dim=-1)], dim=-1), place)


def end_slope(turn: Tensor, velocity: Tensor) -> Tensor:
    """How fast a turn vector [3] has to grow so that the rotation turns with `velocity` [3] in its own axes."""
    angle = turn.norm().clamp(min=1e-9)
    cross = torch.linalg.cross(turn.expand(3, 3), torch.eye(3, dtype=turn.dtype)).mT
    weight = 1 / angle**2 - (1 + angle.cos()) / (2 * angle * angle.sin().clamp(min=1e-9))
    whole = torch.eye(3, dtype=turn.dtype) + cross / 2 + (weight if angle > 1e-4 else 1 / 12) * cross @ cross
    return whole @ velocity


def hermite(end: Tensor, first: Tensor, last: Tensor, share: Tensor) -> Tensor:
    """The cubic from 0 to `end` [3] with slopes `first` and `last` [3], at shares [n] of the way: [n, 3]."""
    s = share[:, None]
    return s**2 * (3 - 2 * s) * end + s * (1 - s) ** 2 * first - s**2 * (1 - s) * last


def slopes(steps: Tensor, seconds: Tensor) -> Tensor:
    """Velocities at the keys [K, 3] from the steps between them [K - 1, 3]: means of what comes before and after."""
    speed = steps / seconds[:, None]
    return torch.cat([speed[:1], (speed[1:] + speed[:-1]) / 2, speed[-1:]])


def film(keys: Tensor, seconds: list[float], fps: float) -> Tensor:
    """A smooth path [T, 4, 4] float32 through keyframes [K, 4, 4], with `seconds` [K - 1] from each to the next. Raises
    ValueError if there are fewer than two, or a time is not positive."""
    if len(keys) < 2 or len(seconds) != len(keys) - 1 or min(seconds) <= 0:
        raise ValueError(f"{len(keys)} keyframes and {len(seconds)} times between, expected at least two, and times"
                         " above 0")
    c2w, times = keys.cpu().double(), torch.tensor(seconds, dtype=torch.float64)
    ahead = inverse(c2w[:-1]) @ c2w[1:]
    turns, moves = turn_vector(ahead[:, :3, :3]), c2w[1:, :3, 3] - c2w[:-1, :3, 3]
    spin, speed = slopes(turns, times), slopes(moves, times)
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), times.cumsum(0)])
    clock = torch.arange(max(round(ends[-1].item() * fps), 1) + 1, dtype=torch.float64) / fps
    clock = clock * (ends[-1] / clock[-1])  # ends on the last key
    parts = []
    for k, length in enumerate(times):
        inside = clock[(clock >= ends[k]) & ((clock < ends[k + 1]) | (k == len(times) - 1))]
        share = ((inside - ends[k]) / length).clamp(0, 1)
        turn = hermite(turns[k], spin[k] * length, end_slope(turns[k], spin[k + 1]) * length, share)
        move = hermite(moves[k], speed[k] * length, speed[k + 1] * length, share)
        part = turned(turn, torch.zeros_like(move))
        part[:, :3, :3] = c2w[k, :3, :3] @ part[:, :3, :3]
        part[:, :3, 3] = c2w[k, :3, 3] + move
        parts.append(part)
    return torch.cat(parts).float()


def drive(here: Tensor, there: Tensor) -> Tensor:
    """The poses [33, 4, 4] of a chunk on the way from one pose to another, with which the next chunk begins: even
    in time, so that equal ways in a row have no seam."""
    here, there = here.cpu().double(), there.cpu().double()
    share = torch.arange(WINDOW, dtype=torch.float64)[:, None] / WINDOW
    step = inverse(here[None])[0] @ there
    part = turned(share * turn_vector(step[:3, :3]), torch.zeros(WINDOW, 3, dtype=torch.float64))
    part[:, :3, :3] = here[:3, :3] @ part[:, :3, :3]
    part[:, :3, 3] = here[:3, 3] + share * (there[:3, 3] - here[:3, 3])
    return part.float()


def pushed(pose: Tensor, verb: str, amount: float) -> Tensor:
    """The pose [4, 4] after a button: a verb of `--move` and how much of it, in its unit."""
    index, factor = VERBS[verb]
    move = torch.zeros(6)
    move[index] = factor * amount
    return motion(pose.cpu().float(), move, torch.ones(1))[0]
