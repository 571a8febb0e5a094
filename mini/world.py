"""The miniature's world: short clips of procedural scenes with exact depth, cameras and captions.

What the small model is pretrained on instead of real videos: rooms and outdoor squares with boxes, balls, tables and
lamps, some of them moving, seen by a smoothly moving camera. Everything of a clip comes from one seed. The conventions
are those of `render.py`: camera-to-world, OpenCV axes (x right, y down, z forward), pixel centres at integers, K in
pixels; lengths are meters, the ground is y = 0. What things are covered with is in surfaces.py, how they are drawn in
draw.py. Run as a program (`python -m mini.world`), it makes the demo files in `data/` again, or clips with depths and
poses for train.py.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from files.draw import save_png
from files.video import write_video
from geometry.camera import homogeneous, move_path
from geometry.surface import pinhole
from mini.draw import Motion, Scene, Solid, placed, render
from mini.surfaces import COLORS, PATTERNS, TONES, Texture, make_color, make_texture

WALLS = ("", "striped", "checked", "marbled", "wooden", "brick", "brick", "tiled")
FLOORS = ("checked", "marbled", "wooden", "wooden", "brick", "tiled", "leafy")
PANELS = "", "striped", "wooden", "tiled"  # doors, windows, pictures
GLOSS = 0.0, 0.0, 0.35, 0.7
CLEARANCE = 0.4  # meters between the camera and any surface
MOVES = (  # what a camera does in 33 frames: forward, right, up (meters), pan, tilt, roll, orbit (degrees)
    (2.0, 0, 0, 0, 0, 0, 0), (0, 1.5, 0, 0, 0, 0, 0), (0, 0, 0.5, 0, 0, 0, 0), (0, 0, 0, 40, 0, 0, 0),
    (0, 0, 0, 0, 12, 0, 0), (0, 0, 0, 0, 0, 6, 0), (0, 0, 0, 0, 0, 0, 30),
)  # fmt: skip
MOVE_ODDS = 5, 4, 1.5, 5, 1.5, 0.5, 5


@dataclass(frozen=True)
class Clip:
    frames: Tensor  # [T, H, W, 3] uint8
    depth: Tensor  # [T, H, W] float32, z in meters at the pixel centres, inf in the sky
    c2w: Tensor  # [T, 4, 4] float32
    K: Tensor  # [3, 3] float32
    caption: str


def make_motion(rng: Random, x: float, z: float, size: float) -> tuple[Motion, float, tuple[float, float]]:
    """A motion in the surroundings of (x, z) of a thing of radius `size`, the radius that it needs, and its place."""
    kind, period = rng.choice(("slide", "circle", "bounce", "turn")), rng.choice((-1, 1)) * rng.uniform(50, 110)
    angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.1)
    east, north = reach * math.cos(angle), reach * math.sin(angle)
    if kind == "slide":
        return Motion(kind, period, (east, 0.0, north)), size + reach, (x, z)
    if kind == "circle":
        return Motion(kind, period, axis=(x, z)), size + reach, (x + east, z + north)
    if kind == "bounce":
        return Motion(kind, rng.uniform(30, 60), (0.0, -rng.uniform(0.4, 0.8), 0.0)), size, (x, z)
    return Motion(kind, period, axis=(x, z)), size, (x, z)


def make_parts(shape: str, center: tuple[float, float], half: tuple[float, ...], lift: float, yaw: float,
               texture: Texture, motion: Motion | None, gloss: float) -> list[Solid]:
    """A thing on the ground or `lift` above it, of one or several solids; the first one has its name."""
    (x, z), (wide, tall, deep), name = center, half, f"{texture.words} {shape}"
    if shape in ("box", "ball"):
        return [Solid(shape, (x, -tall - lift, z), half, yaw, texture, name, motion, gloss)]
    if shape == "lamp":
        pole = Solid("box", (x, -tall, z), (0.035, tall, 0.035), yaw, texture)
        return [Solid("ball", (x, -2 * tall - 0.2, z), (0.24,) * 3, yaw, texture, name, gloss=gloss), pole]
    solids = [Solid("box", (x, -2 * tall, z), (wide, 0.04, deep), yaw, texture, name)]
    for a, b in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        east, north = a * (wide - 0.06), b * (deep - 0.06)
        foot = x + math.cos(yaw) * east + math.sin(yaw) * north, z + math.cos(yaw) * north - math.sin(yaw) * east
        solids.append(Solid("box", (foot[0], -tall, foot[1]), (0.035, tall, 0.035), yaw, texture))
    return solids


def make_things(rng: Random, reach: tuple[float, float], moving: int, others: list[str]) -> list[Solid]:
    """Up to 6 things, apart from each other, within `reach` (x, z) of the middle, in colours that the `others` around
    them don't have; the first `moving` ones move."""
    solids, taken = [], []
    names = rng.sample(sorted(set(COLORS) - set(others)), 6)
    for index in range(rng.randint(4, 6)):
        shape = rng.choice(("box", "ball") if index < moving else ("box", "box", "ball", "ball", "table", "lamp"))
        tone, pattern = rng.choice(("", "", "pale", "dark")), rng.choice(PATTERNS)
        texture = make_texture(rng, names[index], tone, pattern, rng.uniform(1.2, 1.8), rng.choice((0, math.pi / 2)))
        half = (rng.uniform(0.35, 0.75),) * 3
        if shape != "ball":
            wide, tall = rng.uniform(0.25, 0.8), rng.choice((rng.uniform(0.2, 0.6), rng.uniform(0.6, 1.05)))
            tall = {"box": tall, "table": rng.uniform(0.3, 0.45), "lamp": rng.uniform(0.5, 0.9)}[shape]
            half = wide, tall, rng.uniform(0.25, 0.8)
        radius = {"ball": half[0], "lamp": 0.24}.get(shape, math.hypot(half[0], half[2]))
        for _ in range(40):
            x, z = (rng.uniform(-1, 1) * (limit - radius) for limit in reach)
            motion, space, place = make_motion(rng, x, z, radius) if index < moving else (None, radius, (x, z))
            inside = abs(x) + space < reach[0] and abs(z) + space < reach[1]
            if inside and all(math.hypot(x - a, z - b) > space + c + 0.25 for a, b, c in taken):
                break
        else:
            continue
        taken.append((x, z, space))
        lift = rng.uniform(0.3, 0.7) if motion is None and rng.random() < 0.15 else 0.0
        solids += make_parts(shape, place, half, lift, rng.uniform(0, math.pi), texture, motion, rng.choice(GLOSS))
    return solids


def make_wall(rng: Random, name: str, tone: str) -> Texture:
    return make_texture(rng, name, tone, rng.choice(WALLS), rng.uniform(3.0, 4.5), rng.choice((0, 0, math.pi / 2)))


def make_ground(rng: Random, name: str, tone: str, size: float) -> Texture:
    return make_texture(rng, name, tone, rng.choice(FLOORS), size, rng.choice((0, math.pi / 2, rng.uniform(0, 3))))


def make_room(rng: Random, moving: int) -> Scene:
    width, height, depth = rng.uniform(2.8, 4.5), rng.uniform(2.9, 4.0), rng.uniform(3.5, 5.5)
    tone = rng.choice(("pale", "pale", "", "dark"))
    names = rng.sample(sorted(COLORS), 4)
    side = make_wall(rng, names[0], tone)
    ends = make_wall(rng, rng.choice(names[:2]), tone)
    floor = make_ground(rng, names[2], rng.choice(tuple(TONES)), rng.uniform(3.0, 4.0))
    ceiling = make_texture(rng, rng.choice(("white", names[0])), "pale", "", 4.0)
    solids = make_things(rng, (width - 0.3, depth - 0.3), moving, names)
    for _ in range(rng.randint(1, 4)):  # doors, windows, pictures: flat boxes on the walls
        texture = make_texture(rng, names[3], rng.choice(tuple(TONES)), rng.choice(PANELS), 1.4)
        tall, wide = rng.uniform(0.4, 1.0), rng.uniform(0.4, 0.9)
        level = -tall if rng.random() < 0.4 else -rng.uniform(tall + 0.2, max(height - tall - 0.2, tall + 0.2))
        wall, sign = rng.choice((0, 2)), rng.choice((-1, 1))
        along = rng.uniform(-0.7, 0.7) * (width if wall == 2 else depth)
        center = (sign * width, level, along) if wall == 0 else (along, level, sign * depth)
        half = (0.06, tall, wide) if wall == 0 else (wide, tall, 0.06)
        solids.append(Solid("box", center, half, 0.0, texture, casts=False))
    words = f"a {side.words} room with a {floor.words} floor"
    surfaces = side, side, ceiling, floor, ends, ends
    return Scene(words, True, (width, height, depth), surfaces, (), tuple(solids), make_sun(rng), ((0.0,) * 3,) * 2)


def make_sun(rng: Random) -> tuple[float, float, float]:
    turn, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.7, 0.92)
    flat = math.sqrt(1 - height**2)
    return flat * math.cos(turn), -height, flat * math.sin(turn)


def make_square(rng: Random, moving: int) -> Scene:
    names = rng.sample(sorted(COLORS), 4)
    tone = rng.choice(("", "pale", "dark"))
    ground = make_ground(rng, names[0], tone, rng.uniform(3.5, 5.0))
    discs, surfaces = (), (ground,)
    if rng.random() < 0.5:
        discs = (rng.uniform(2.5, 5.0),)
        surfaces = ground, make_ground(rng, names[1], rng.choice(tuple(TONES)), 3.5)
    solids = make_things(rng, (4.5, 4.5), moving, names)
    count = rng.randint(6, 9)
    for index in range(count):
        angle, away = 2 * math.pi * (index + rng.uniform(-0.2, 0.2)) / count, rng.uniform(10, 15)
        half = rng.uniform(2.0, 3.5), rng.uniform(1.5, 4.5), rng.uniform(1.5, 2.5)
        texture = make_wall(rng, rng.choice(names[2:]), rng.choice(("", "pale", "pale")))
        center = away * math.sin(angle), -half[1], away * math.cos(angle)
        solids.append(Solid("box", center, half, angle, texture, casts=False))
    for _ in range(rng.randint(0, 3)):
        angle, away, crown = rng.uniform(0, 2 * math.pi), rng.uniform(6.5, 8.5), rng.uniform(0.8, 1.3)
        solids += make_tree(rng, away * math.sin(angle), away * math.cos(angle), crown)
    sky = make_color(rng, rng.choice(("blue", "blue", "teal", "pink", "orange")), rng.choice(("pale", "")))
    horizon = tuple(0.35 * channel + 0.65 * rng.uniform(0.85, 0.95) for channel in sky)
    words = f"a square with {ground.words} ground between houses"
    return Scene(words, False, (5.5, 6.0, 5.5), surfaces, discs, tuple(solids), make_sun(rng), (horizon, sky))


def make_tree(rng: Random, x: float, z: float, crown: float) -> list[Solid]:
    bark, leaves = make_texture(rng, "brown", "", "wooden", 1.0), make_texture(rng, "green", "", "leafy", 1.2)
    trunk = Solid("box", (x, -0.6 * crown, z), (0.16 * crown, 0.6 * crown, 0.16 * crown), 0.3, bark)
    return [trunk, Solid("ball", (x, -2.0 * crown, z), (crown,) * 3, 0.0, leaves)]


def make_scene(rng: Random) -> Scene:
    """A random room (60 %) or square; a fifth of them have one or two moving things."""
    moving = rng.choice((1, 2)) if rng.random() < 0.2 else 0
    return make_room(rng, moving) if rng.random() < 0.6 else make_square(rng, moving)


def caption(scene: Scene) -> str:
    """Plain words for what is there and how it moves, not for what the camera does."""
    things = [solid for solid in scene.solids if solid.name]
    verbs = {"slide": "slides to and fro", "bounce": "bounces", "circle": "goes in a circle", "turn": "turns"}
    moving = [f"the {solid.name} {verbs[solid.motion.kind]}" for solid in things if solid.motion is not None]
    words = "; ".join([", ".join([scene.words, *(f"a {solid.name}" for solid in things)]), *moving])
    return words.replace("a orange", "an orange")


def clearance(scene: Scene, position: Tensor) -> Tensor:
    """Meters [T] from the camera's positions [T,3] to the nearest surface; negative inside."""
    (x, y, z), (width, height, depth) = position.double().unbind(-1), scene.extent
    nearest = torch.stack([width - x.abs(), y + height, -y, depth - z.abs()]).amin(0)
    for solid in scene.solids:
        place = placed(solid, torch.arange(len(position), dtype=torch.float64))
        ox, oy, oz = x - place[:, 0], y - place[:, 1], z - place[:, 2]
        if solid.shape == "ball":
            away = (ox**2 + oy**2 + oz**2).sqrt() - solid.half[0]
        else:
            cos, sin = place[:, 3].cos(), place[:, 3].sin()
            gaps = torch.stack([cos * ox - sin * oz, oy, sin * ox + cos * oz]).abs() - torch.tensor(solid.half)[:, None]
            away = gaps.clamp(min=0).norm(dim=0) + gaps.amax(0).clamp(max=0)
        nearest = torch.minimum(nearest, away)
    return nearest


def make_speeds(rng: Random, frames: int, size: float) -> Tensor:
    """Speeds [T,7] per frame in the units of `MOVES`: a new move every 25 to 50 frames, with soft passages."""
    kind = rng.choices(("moves", "back", "hold", "static"), (0.65, 0.2, 0.1, 0.05))[0]
    length = frames if kind != "back" else (frames + 1) // 2
    speeds, start = torch.zeros(length, 7, dtype=torch.float64), rng.randint(8, 25) if kind == "hold" else 0
    while start < length and kind != "static":
        end = min(start + rng.randint(25, 50), length)
        amount = size * math.exp(rng.uniform(math.log(0.3), math.log(1.4)))
        style = rng.choices(("one", "two", "zigzag", "spiral"), (0.5, 0.3, 0.1, 0.1))[0]
        time = torch.arange(end - start, dtype=torch.float64)[:, None]
        for move in rng.choices(MOVES, MOVE_ODDS, k=2 if style == "two" else 1):
            move = torch.tensor(move, dtype=torch.float64) * rng.choice((-1, 1)) * amount / 33
            to_and_fro = torch.cos(2 * math.pi * time / rng.uniform(24, 40)) if style == "zigzag" else 1
            speeds[start:end] += move * to_and_fro
        if style == "spiral":
            angle, around = 2 * math.pi * time[:, 0] / rng.uniform(30, 45), 1.6 * amount / 33
            speeds[start:end, 1] += around * angle.cos()
            speeds[start:end, 2] += 0.6 * around * angle.sin()
        start = end
    if kind == "back":  # the same way back: a revisit
        speeds = torch.cat([speeds, -speeds.flip(0)])[:frames]
    window = torch.hann_window(15, periodic=False, dtype=torch.float64)[None, None] / 7
    return F.conv1d(F.pad(speeds.T[:, None], (7, 7), mode="replicate"), window)[:, 0].T


def follow(speeds: Tensor, start: tuple[float, ...], distance: float) -> Tensor:
    """Poses [T,4,4] from `start` (x, y, z, yaw, pitch in radians) with `speeds` [T,7]; orbits are around a point
    `distance` meters ahead."""
    forward, right, up, pan, tilt, roll, orbit = speeds.unbind(-1)
    yaw = start[3] + (pan - orbit).deg2rad().cumsum(0)
    pitch, roll = start[4] + tilt.deg2rad().cumsum(0), roll.deg2rad().cumsum(0)
    right = right + distance * orbit.deg2rad()
    x = start[0] + (forward * yaw.sin() + right * yaw.cos()).cumsum(0)
    y = start[1] - up.cumsum(0)
    z = start[2] + (forward * yaw.cos() - right * yaw.sin()).cumsum(0)
    return poses(torch.stack([x, y, z], -1), yaw, pitch, roll)


def poses(position: Tensor, yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """[T,4,4] float32 from positions [T,3] and angles [T] in radians: right, up, clockwise."""
    (a, b), (c, d), (e, f) = ((angle.sin(), angle.cos()) for angle in (yaw, pitch, roll))
    right = torch.stack([b * f + a * c * e, d * e, b * c * e - a * f], dim=-1)
    down = torch.stack([a * c * f - b * e, d * f, a * e + b * c * f], dim=-1)
    ahead = torch.stack([a * d, -c, b * d], dim=-1)
    return homogeneous(torch.stack([right, down, ahead, position], dim=-1)).float()


def make_path(scene: Scene, rng: Random, frames: int) -> Tensor:
    """A random camera path [T,4,4] that keeps away from surfaces and looks at something."""
    K, enough = pinhole(60, 8, 12), 1.8 if scene.room else 2.5
    for attempt in range(1000):
        speeds = make_speeds(rng, frames, 0.995**attempt)  # slower and slower, so that one fits in the end
        x, z = (rng.uniform(-0.85, 0.85) * limit for limit in scene.extent[::2])
        y = -rng.uniform(0.9, min(2.2, scene.extent[1] - 0.6))
        goal = rng.choice(scene.solids[:6]).center
        across, along = goal[0] - x, goal[2] - z
        if math.hypot(across, along) < 2:
            continue
        start = x, y, z, math.atan2(across, along) + rng.gauss(0, 0.25), rng.uniform(-0.25, 0.05)
        c2w = follow(speeds, start, rng.uniform(2.5, 4.5))
        pitch_sine, roll_sine = -c2w[:, 1, 2], c2w[:, 1, 0]
        tilted = pitch_sine.min() < -0.5 or pitch_sine.max() > 0.2 or roll_sine.abs().max() > 0.17
        if tilted or clearance(scene, c2w[:, :3, 3]).min() < CLEARANCE:
            continue
        _, depth = render(scene, c2w[::8], K, (8, 12), 1)
        depth = depth.flatten(1).sort().values
        if depth[:, 28].min() > 1 and depth[:, 48].min() > enough:  # of 96 pixels
            return c2w
    raise RuntimeError("no camera path found")


def make_clip(seed: int, frames: int, size: tuple[int, int] = (64, 96)) -> Clip:
    """The clip of a seed: `frames` frames of `size` (height, width)."""
    rng = Random(seed)
    scene = make_scene(rng)
    c2w, K = make_path(scene, rng, frames), pinhole(rng.uniform(50, 80), *size)
    return Clip(*render(scene, c2w, K, size), c2w, K, caption(scene))


def car_roundabout(frames: int, size: tuple[int, int]) -> Clip:
    """The demo clip: a toy car drives round a roundabout on the floor of a playroom, seen by a camera that circles it
    more slowly. Large plain things and a small slow car, for it is wrong in every warp: what a LoRA is to learn from
    the clip is that warps are right."""
    rng, lane = Random(7), 1.5

    def paint(name: str, tone: str = "", pattern: str = "", size: float = 1.2) -> Texture:
        return make_texture(rng, name, tone, pattern, size)

    def at(angle: float, away: float) -> tuple[float, float]:
        return away * math.sin(angle), away * math.cos(angle)

    side, ends = paint("yellow", "pale", "brick", 2.8), paint("teal", "pale", "wooden", 2.8)
    surfaces = side, side, paint("white", "pale", "", 4.0), paint("brown", "pale", "checked", 2.8), ends, ends
    surfaces += paint("gray", "dark"), paint("lime", "", "leafy", 2.4)
    solids = make_tree(rng, -0.2, 0.2, 0.42)
    for index, (name, half) in enumerate((("blue", (0.6, 0.55, 0.5)), ("orange", (0.5, 0.8, 0.5)),
                                          ("purple", (0.7, 0.45, 0.45)), ("pink", (0.45, 0.65, 0.6)))):
        x, z = 3.7 * (-1) ** (index // 2), 4.0 * (-1) ** ((index + 1) // 2)  # houses in the corners
        solids.append(Solid("box", (x, -half[1], z), half, 0.4 * index, paint(name, "", PATTERNS[index]), "house"))
    for x, z in ((4.5, 0.0), (-4.5, 0.6)):
        solids.append(Solid("box", (x, -1.9, z), (0.06, 0.7, 0.9), 0.0, paint("blue", "pale"), casts=False))
    for x, z in ((0.4, 4.8), (-0.5, -4.8)):
        solids.append(Solid("box", (x, -1.7, z), (0.9, 0.7, 0.06), 0.0, paint("white", "", "striped"), casts=False))
    red, glass, rubber = paint("red"), paint("blue", "pale"), paint("gray", "dark")
    parts = [("box", (0, 0.18, 0), (0.38, 0.10, 0.2), red), ("box", (0.06, 0.36, 0), (0.21, 0.08, 0.17), glass)]
    parts += [("ball", (x, 0.1, z), (0.1,) * 3, rubber) for x in (-0.23, 0.23) for z in (-0.18, 0.18)]
    start, drive = math.radians(80), Motion("circle", -260.0)
    for shape, (along, up, aside), half, texture in parts:
        x, z = at(start, lane + aside)
        center = x + along * math.cos(start), -up, z - along * math.sin(start)
        name = "red car" if shape == "box" else ""
        solids.append(Solid(shape, center, half, start, texture, name, drive, casts=bool(name)))
    sun, black = (0.5, -0.75, -0.43), ((0.0,) * 3,) * 2
    scene = Scene("", True, (4.5, 3.4, 4.8), surfaces, (2.0, 1.0), tuple(solids), sun, black)
    progress = torch.linspace(0, 1, frames, dtype=torch.float64)
    angle, away = math.pi + 0.75 - 1.5 * progress, 4.0 - 0.5 * (math.pi * progress).sin()
    position = torch.stack([away * angle.sin(), -1.9 + 0.5 * progress, away * angle.cos()], dim=-1)
    pitch = torch.atan2(position[:, 1] + 0.5, away)
    c2w, K = poses(position, angle + math.pi, pitch, torch.zeros_like(angle)), pinhole(65, *size)
    words = "a red toy car drives round a roundabout between toy houses in a room with a checked floor"
    return Clip(*render(scene, c2w, K, size), c2w, K, words)


STILLS = {  # demo pictures: seeds far from those of the training clips, and moves for `camera.move_path`
    "hall": (1_000_032, "dolly 0.25 + pan 6, orbit -12"),
    "plaza": (1_000_054, "orbit 15, dolly 0.25 + up 0.5"),
    "studio": (1_000_014, "truck 0.15 + pan -8, spiral 360"),
}  # fmt: skip
KNOWN = 1_100_003, 1_100_007, 1_100_008, 1_100_009, 1_100_010, 1_100_012  # seeds of clips for LoRAs of several videos


def make_still(name: str) -> tuple[Scene, Tensor, float]:
    """A demo picture's scene, its camera [1,4,4], and its horizontal field of view in degrees."""
    rng = Random(STILLS[name][0])
    scene = make_scene(rng)
    return scene, make_path(scene, rng, 66)[:1], round(rng.uniform(50, 80), 2)


def write_path(path: Path, fov_x: float, c2w: Tensor) -> None:
    rows = [[[round(value, 6) + 0.0 for value in row] for row in pose[:3]] for pose in c2w.tolist()]
    matrices = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{{"fps": 16, "fov_x": {fov_x}, "c2w": [\n{matrices}]}}\n')


def write_clip(folder: Path, name: str, make: Callable[[int, tuple[int, int]], Clip]) -> str:
    """A video, and its poses and depths (0: sky) as train.py finds them beside it; returns what it shows."""
    clip, depth = make(99, (192, 288)), make(99, (96, 144)).depth  # a quarter of the pixels: less to download
    depth = (depth.where(depth.isfinite(), 0) * 64).round() / 64  # compresses well, and thumbnails need no more
    write_video(folder / f"{name}.mp4", clip.frames.numpy(), 16)
    np.savez_compressed(folder / f"{name}_depth.npz", depth.half().numpy())
    write_path(folder / f"{name}.json", math.degrees(2 * math.atan(clip.frames.shape[2] / 2 / clip.K[0, 0])), clip.c2w)
    return clip.caption


def write_known(folder: Path) -> None:
    """The demo clip and six others, and a csv of all."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"car-roundabout": car_roundabout} | {f"clip-{seed}": partial(make_clip, seed) for seed in KNOWN}
    lines = [f'{name}.mp4,"{write_clip(folder, name, make)}"' for name, make in makers.items()]
    (folder / "clips.csv").write_text("\n".join(["video,prompt", *lines]) + "\n")


def write_demos(folder: Path) -> None:
    """The demo clip; and first frames with their depth (16 bit, millimeters, 0: sky or very far) and a path each."""
    write_clip(folder, "car-roundabout", car_roundabout)
    for name, (_, move) in STILLS.items():
        scene, c2w, fov_x = make_still(name)
        frames, depth = render(scene, c2w, pinhole(fov_x, 256, 384), (256, 384), samples=4)
        save_png(folder / f"{name}.png", frames[0].numpy())
        millimeters = torch.where(depth[0] < 65.5, depth[0] * 1000, 0).round().numpy().astype(np.uint16)
        Image.fromarray(millimeters).save(folder / f"{name}_depth.png")
        write_path(folder / f"{name}.json", fov_x, move_path(move))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo files in data/ again.")
    parser.add_argument("--known", type=Path, metavar="FOLDER", help="instead: clips, depths and poses for train.py")
    args = parser.parse_args()
    if args.known is not None:
        write_known(args.known)
    else:
        write_demos(Path(__file__).parent.parent / "data")


if __name__ == "__main__":
    main()
