"""WBench's navigation score (arXiv 2605.25874) of camera poses: does the camera do what each turn's keys say?

Reproduced: the way that a turn should have gone is fitted to how far the camera went, so that no speed is asked for: a
straight line as long as its way, or a turn by its own angle, in third person around a subject. Accuracy is
1 - (nATE_t + nATE_r) / 2, mean distances from that way over the length of the whole path. Consistency is the same
between turns of equal or mirrored keys. The original takes poses from MegaSaM; here they are whoever's.

Keys: W S A D move, left right up down turn, joined by "+". Poses are camera-to-world [T, 4, 4] in OpenCV axes.
"""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from geometry.camera import CameraPath, between, inverse, motion, product, turn_degrees

KEYS = {  # -> right, forward; right turn, up turn
    "W": (0, 1, 0, 0), "S": (0, -1, 0, 0), "A": (-1, 0, 0, 0), "D": (1, 0, 0, 0),
    "left": (0, 0, -1, 0), "right": (0, 0, 1, 0), "up": (0, 0, 0, 1), "down": (0, 0, 0, -1),
}  # fmt: skip
ALIASES = {"←": "left", "→": "right", "↑": "up", "↓": "down", "forward": "W", "backward": "S"}
SAMPLES = 20  # of a turn, evenly along its way
LEAST_PATH, LEAST_TURN = 0.5, 10.0  # what errors are divided by at least: units, degrees
STILL, STEADY = 0.1, 3.0  # a camera that goes or turns less does not move
DEFAULT = {"step": 1.0, "degrees": 30.0, "radius": 1.0}  # what is asked of one that does not


def read_keys(action: str) -> Tensor | None:
    """"W+left" -> right, forward, right turn, up turn [4]; None if it is no navigation."""
    words = [ALIASES.get(word.strip(), word.strip()) for word in action.replace(",", "+").split("+")]
    words = [word.upper() if word in ("w", "a", "s", "d") else word for word in words]
    return torch.tensor([KEYS[word] for word in words], dtype=torch.float64).sum(0) if {*words} <= KEYS.keys() else None


def ideal(keys: Tensor, count: int, third: bool, step: float, degrees: float, radius: float) -> Tensor:
    """The way of a turn from the origin on, [count, 4, 4]: `step` long, by `degrees`, in third person around a subject
    at the distance `radius`."""
    share, start = torch.linspace(0, 1, count, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    move = torch.stack([keys[0], keys.new_zeros(()), keys[1]])
    move = step * move / move.norm().clamp(min=1)
    poses = motion(start, torch.cat([keys.new_zeros(3), degrees * keys[2:], keys.new_zeros(1)]), share)
    if third and keys[2:].any():  # the subject goes straight on, the camera looks at it
        back = torch.tensor([0, 0, -radius], dtype=torch.float64)
        poses[:, :3, 3] = share[:, None] * move - back + poses[:, :3, :3] @ back
    elif keys[2:].any():  # each step goes where the camera looks then
        steps = poses[1:, :3, :3] @ move / max(count - 1, 1)
        poses[1:, :3, 3] = steps.cumsum(0)
    else:
        poses[:, :3, 3] = share[:, None] * move
    return poses


def wanted_path(actions: list[str], third: bool, turn: int, step: float, degrees: float, radius: float) -> Tensor:
    """The poses of a video whose turns are `turn` frames each, and end with their last frame."""
    parts = []
    for action in actions:
        keys = read_keys(action)
        keys = torch.zeros(4, dtype=torch.float64) if keys is None else keys
        later = bool(parts)
        way = ideal(keys, turn + later, third, step, degrees, radius)
        parts.append(product(parts[-1][-1], way[1:]) if later else way)
    return torch.cat(parts).float()


# ------------------------------------------------------------------------------------------------------------ measure


def turned(poses: Tensor) -> float:
    """Degrees, added up from frame to frame."""
    return turn_degrees(poses[1:, :3, :3], poses[:-1, :3, :3]).sum().item()


def travelled(poses: Tensor) -> float:
    return poses[:, :3, 3].diff(dim=0).norm(dim=-1).sum().item()


def along(poses: Tensor) -> Tensor:
    """`SAMPLES` poses, evenly along the way; of one that stays in place evenly in time."""
    arc = np.concatenate([[0.0], poses[:, :3, 3].diff(dim=0).norm(dim=-1).cumsum(0).numpy()])
    arc = arc if arc[-1] > 1e-8 else np.arange(len(poses), dtype=float)
    place = np.interp(np.linspace(0, arc[-1], SAMPLES), arc, np.arange(len(poses)))
    return between(CameraPath(poses), torch.from_numpy(place)).c2w.double()


def fitted(poses: Tensor, keys: Tensor, third: bool, heading: Tensor) -> Tensor:
    """The way that a measured turn should have gone, from its own first position on."""
    start, count = poses[0, :3, 3], len(poses)
    distance = (poses[-1, :3, 3] - start).norm().item()
    if not keys[2:].any():
        way = ideal(keys, count, third, **DEFAULT | {"step": distance if distance > STILL else DEFAULT["step"]})
        frame, scale = heading, 1.0
    else:
        angle, half = turned(poses), np.radians(turned(poses)) / 2
        sizes = DEFAULT | {"step": 2.0}
        if angle >= 5 and np.sin(half) > 1e-6:
            radius = distance / (2 * np.sin(half))
            sizes |= {"degrees": max(angle, DEFAULT["degrees"]), "radius": max(radius, 1.0) if third else radius}
        way = ideal(keys, count, third, **sizes)
        frame = poses[0, :3, :3] @ way[0, :3, :3].T
        reach, goal = ((path[:, :3, 3] - path[0, :3, 3]).norm(dim=-1).mean().item() for path in (poses, way))
        scale = reach / (goal + 1e-12) if angle >= STEADY and reach >= STILL else 1.0
    result = way.clone()
    result[:, :3, :3] = frame @ way[:, :3, :3]
    result[:, :3, 3] = scale * (way[:, :3, 3] - way[0, :3, 3]) @ frame.T + start
    return result


def apart(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Mean distance and mean angle of poses."""
    distance = (found[:, :3, 3] - wanted[:, :3, 3]).norm(dim=-1).mean().item()
    return distance, turn_degrees(found[:, :3, :3], wanted[:, :3, :3]).mean().item()


def score(error: tuple[float, float], path: float, turn: float) -> float:
    """1 for no error, 0 for one as large as the path and the turn."""
    return 1 - (min(error[0] / max(path, LEAST_PATH), 1) + min(error[1] / max(turn, LEAST_TURN), 1)) / 2


def mirrored(a: Tensor, b: Tensor) -> Tensor | None:
    """Signs of the axes [3] that make turns of the keys `b` comparable to those of `a`; None if they are not."""
    if not torch.equal(a.abs(), b.abs()):
        return None
    flipped = a != b
    axes = torch.stack([flipped[0] | flipped[2], flipped[3], flipped[1]])
    return 1 - 2 * axes.double()


def consistency(turns: list[tuple[Tensor, Tensor]]) -> float | None:
    """Between all turns (poses, keys) of equal or mirrored keys; None if there are no two."""
    scores = []
    for (a, keys), (b, others) in combinations(turns, 2):
        signs = mirrored(keys, others)
        if signs is None:
            continue
        a, b = (product(inverse(poses[:1]), poses)[: min(len(a), len(b))] for poses in (a, b))
        b = b.clone()
        b[:, :3, 3] = b[:, :3, 3] * signs
        b[:, :3, :3] = signs[:, None] * b[:, :3, :3] * signs
        errors = apart(a, b)
        scores.append((errors, (travelled(a) + travelled(b)) / 2, (turned(a) + turned(b)) / 2))
    return float(np.mean([score(*each) for each in scores])) if scores else None


def navigation(poses: Tensor, actions: list[str], perspective: str) -> dict[str, float]:
    """Accuracy, and consistency and their mean where there are turns to compare, of a video whose turns are equally
    long. Turns that are no navigation are left out; ValueError if all are."""
    poses, third, count = poses.double(), perspective != "first_person", max(len(actions), 1)
    edges = [round(index * len(poses) / count) for index in range(count + 1)]  # of every fourth frame, 8 or 9 a turn
    there = {index: keys for index, action in enumerate(actions) if (keys := read_keys(action)) is not None}
    turns = [(poses[edges[index]:edges[index + 1]], keys) for index, keys in there.items()]
    if not turns or len(poses) < 2 * count:
        raise ValueError(f"{len(poses)} poses for the turns {actions}: expected two or more for each, and keys such as"
                         " W+left")
    heading, place, found, wanted = turns[0][0][0, :3, :3], turns[0][0][0, :3, 3], [], []
    for measured, keys in turns:
        way = fitted(measured, keys, third, heading)
        way[:, :3, 3] += place - way[0, :3, 3]
        place = way[-1, :3, 3]
        heading = way[-1, :3, :3] if keys[2:].any() else heading
        found.append(along(measured))
        wanted.append(along(way))
    path = poses[edges[min(there)]:edges[max(there) + 1]]
    accuracy = score(apart(torch.cat(found), torch.cat(wanted)), travelled(path), turned(path))
    again = consistency(turns)
    return {"accuracy": accuracy} | ({} if again is None else {
        "consistency": again, "NavScore": (accuracy + again) / 2})
