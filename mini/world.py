"""The miniature's world: short clips of procedural scenes with exact depth, cameras and captions.

What the small model is pretrained on instead of real videos: rooms and outdoor squares with boxes and balls, some of
them moving, seen by a smoothly moving camera. Everything of a clip comes from one seed. The conventions are those of
`render.py`: camera-to-world, OpenCV axes (x right, y down, z forward), pixel centres at integers, K in pixels; lengths
are meters, the ground is y = 0. Colours are made for an 8x8-pixel codec: few large things, low-frequency textures, soft
light. Left out: cast shadows beyond a dark spot below each thing, reflections, lens effects. Run as a program
(`python -m mini.world`), it makes the demo files in `data/` again, or clips with depths and poses for train.py.
"""

import argparse
import colorsys
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from files.draw import save_png
from files.video import write_video
from geometry.camera import homogeneous, move_path
from geometry.surface import pinhole

COLORS = {  # hue, saturation, value
    "red": (0.00, 0.82, 0.82), "orange": (0.07, 0.85, 0.95), "yellow": (0.14, 0.78, 0.95), "green": (0.36, 0.70, 0.62),
    "lime": (0.23, 0.70, 0.80), "teal": (0.49, 0.75, 0.65), "blue": (0.61, 0.78, 0.80), "purple": (0.76, 0.55, 0.68),
    "pink": (0.92, 0.50, 0.92), "brown": (0.07, 0.55, 0.50), "white": (0.12, 0.06, 0.93), "gray": (0.60, 0.08, 0.55),
}  # fmt: skip
TONES = {"": (1.0, 1.0), "pale": (0.42, 1.12), "dark": (1.0, 0.65)}  # factors of saturation and value
PATTERNS = ("", "striped", "checked", "marbled")
WALL_PATTERNS = ("", "striped", "striped", "checked", "marbled", "marbled")  # plain walls show little of a motion
FADE = 8.0  # meters at which a floor's pattern has lost half its contrast, before it gets finer than the pixels
SPOT = 1.5  # radius of the dark spot below a thing, in its own
CLEARANCE = 0.4  # meters between the camera and any surface
MOVES = (  # what a camera does in 33 frames: forward, right, up (meters), pan, tilt, roll, orbit (degrees)
    (2.0, 0, 0, 0, 0, 0, 0), (0, 1.5, 0, 0, 0, 0, 0), (0, 0, 0.5, 0, 0, 0, 0), (0, 0, 0, 40, 0, 0, 0),
    (0, 0, 0, 0, 12, 0, 0), (0, 0, 0, 0, 0, 6, 0), (0, 0, 0, 0, 0, 0, 30),
)  # fmt: skip
MOVE_ODDS = 5, 4, 1.5, 5, 1.5, 0.5, 5


@dataclass(frozen=True)
class Texture:
    """A colour that varies through space: middle + width * clamp(product * s1 * s2 + sum * (s1 + s2), -1, 1), with
    s = sin(wave . place + phase). `values` are the first wave (3) and its phase, the second ones, product, sum, the
    middle colour (3) and the width (3): 16 numbers."""

    words: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Motion:
    """How a solid moves: "slide" along `reach` from the place it was put, and back, and to the other side; "bounce"
    along it and back; "circle" around the vertical line through `axis`, turning with it; "turn" around its own."""

    kind: str
    period: float  # frames
    reach: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axis: tuple[float, float] = (0.0, 0.0)  # x, z


@dataclass(frozen=True)
class Solid:
    shape: str  # "box" or "ball"
    center: tuple[float, float, float]
    half: tuple[float, float, float]  # half extents, in its own axes; a ball has three equal ones
    yaw: float  # radians about the vertical
    texture: Texture
    name: str = ""  # for the caption; "": part of the scenery
    motion: Motion | None = None


@dataclass(frozen=True)
class Scene:
    """A room, a box around the origin with `extent`, or a square, an endless ground around it with an open sky."""

    words: str
    room: bool
    extent: tuple[float, float, float]  # half width, height, half depth: of a square, where the camera may be
    surfaces: tuple[Texture, ...]  # of a room: left, right, ceiling, floor, back, front; of a square: ground; discs
    discs: tuple[float, ...]  # radii of round areas on the ground, each painted over those before it
    solids: tuple[Solid, ...]
    sun: tuple[float, float, float]  # unit vector to the light
    sky: tuple[tuple[float, float, float], tuple[float, float, float]]  # colours at the horizon and above


@dataclass(frozen=True)
class Clip:
    frames: Tensor  # [T, H, W, 3] uint8
    depth: Tensor  # [T, H, W] float32, z in meters at the pixel centres, inf in the sky
    c2w: Tensor  # [T, 4, 4] float32
    K: Tensor  # [3, 3] float32
    caption: str


def make_color(rng: Random, name: str, tone: str) -> tuple[float, float, float]:
    hue, saturation, value = COLORS[name]
    hue += rng.uniform(-0.015, 0.015)
    saturation = min(1.0, saturation * TONES[tone][0] * rng.uniform(0.9, 1.1))
    return colorsys.hsv_to_rgb(hue % 1, saturation, min(1.0, value * TONES[tone][1] * rng.uniform(0.92, 1.05)))


def make_texture(rng: Random, name: str, tone: str, pattern: str, period: float) -> Texture:
    """`period` in meters. Patterns are the colour with a lighter, darker or another one."""
    tone = "" if name == "white" else tone  # dark white is gray
    first = make_color(rng, name, tone)
    other = rng.choice((0.55, 0.7, 1.35)) if max(first) < 0.75 else rng.choice((0.6, 0.72, 0.8))
    second = tuple(min(1.0, channel * other) for channel in first)
    if pattern in ("striped", "checked") and rng.random() < 0.4:
        second = make_color(rng, rng.choice(("white", "yellow", "gray", name)), rng.choice(("", "pale")))
    turn, tilt = rng.uniform(-0.5, 0.5), rng.choice((0.0, rng.uniform(-0.4, 0.4)))
    k = 2 * math.pi / (period * rng.uniform(0.8, 1.25))
    if pattern == "marbled":
        waves = [[rng.gauss(0, 1) for _ in range(3)] for _ in range(2)]
        waves = [[k * w / math.hypot(*wave) for w in wave] for wave in waves]
    else:  # seen on walls and floors alike: the stripes run through x + z and y
        waves = [[k * math.cos(turn), k * tilt, k * math.sin(turn)], [-k * math.sin(turn), 0.8 * k, k * math.cos(turn)]]
        waves = waves[::-1] if rng.random() < 0.5 else waves
    phases = [rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)]
    if pattern == "striped":
        waves[1], phases[1] = waves[0], phases[0]
    weights = {"": (0.0, 0.5), "striped": (0.0, 1.25), "checked": (3.0, 0.0), "marbled": (0.0, 0.5)}[pattern]
    middle = [(a + b) / 2 for a, b in zip(first, second)]
    contrast = 1.0 if period < 1 else 0.7  # walls and floors are large, and shall not outshine the things
    width = [contrast * (a - b) / 2 for a, b in zip(first, second)]
    if pattern == "":
        middle, width = first, [0.3 * w for w in width]
    words = " ".join(word for word in (pattern, tone, name) if word)
    return Texture(words, (*waves[0], phases[0], *waves[1], phases[1], *weights, *middle, *width))


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


def make_things(rng: Random, reach: tuple[float, float], moving: int, others: list[str]) -> list[Solid]:
    """Up to 6 boxes and balls on the ground or above it, apart from each other, within `reach` (x, z) of the middle, in
    colours that the `others` around them don't have."""
    solids, taken = [], []
    names = rng.sample(sorted(set(COLORS) - set(others)), 6)
    for index in range(rng.randint(4, 6)):
        shape = rng.choice(("box", "ball"))
        pattern = rng.choice(PATTERNS)
        texture = make_texture(rng, names[index], rng.choice(("", "", "pale", "dark")), pattern, rng.uniform(0.5, 0.9))
        half = (rng.uniform(0.35, 0.75),) * 3
        if shape == "box":
            wide, tall = rng.uniform(0.25, 0.8), rng.choice((rng.uniform(0.2, 0.6), rng.uniform(0.6, 1.05)))
            half = wide, tall, rng.uniform(0.25, 0.8)
        radius = math.hypot(half[0], half[2]) if shape == "box" else half[0]
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
        center, yaw = (place[0], -half[1] - lift, place[1]), rng.uniform(0, math.pi)
        solids.append(Solid(shape, center, half, yaw, texture, f"{texture.words} {shape}", motion))
    return solids


def make_room(rng: Random, moving: int) -> Scene:
    width, height, depth = rng.uniform(2.8, 4.5), rng.uniform(2.9, 4.0), rng.uniform(3.5, 5.5)
    tone = rng.choice(("pale", "pale", "", "dark"))
    names = rng.sample(sorted(COLORS), 4)
    side = make_texture(rng, names[0], tone, rng.choice(WALL_PATTERNS), rng.uniform(1.2, 2.2))
    ends = make_texture(rng, rng.choice(names[:2]), tone, rng.choice(WALL_PATTERNS), rng.uniform(1.2, 2.2))
    floor = make_texture(rng, names[2], rng.choice(tuple(TONES)), rng.choice(PATTERNS[1:]), rng.uniform(1.2, 2.0))
    ceiling = make_texture(rng, rng.choice(("white", names[0])), "pale", "", 3.0)
    solids = make_things(rng, (width - 0.3, depth - 0.3), moving, names)
    for _ in range(rng.randint(1, 4)):  # doors, windows, pictures: flat boxes on the walls
        texture = make_texture(rng, names[3], rng.choice(tuple(TONES)), rng.choice(("", "", "striped")), 0.7)
        tall, wide = rng.uniform(0.4, 1.0), rng.uniform(0.4, 0.9)
        level = -tall if rng.random() < 0.4 else -rng.uniform(tall + 0.2, max(height - tall - 0.2, tall + 0.2))
        wall, sign = rng.choice((0, 2)), rng.choice((-1, 1))
        along = rng.uniform(-0.7, 0.7) * (width if wall == 2 else depth)
        center = (sign * width, level, along) if wall == 0 else (along, level, sign * depth)
        half = (0.06, tall, wide) if wall == 0 else (wide, tall, 0.06)
        solids.append(Solid("box", center, half, 0.0, texture))
    words = f"a {side.words} room with a {floor.words} floor"
    surfaces = side, side, ceiling, floor, ends, ends
    return Scene(words, True, (width, height, depth), surfaces, (), tuple(solids), make_sun(rng), ((0.0,) * 3,) * 2)


def make_sun(rng: Random) -> tuple[float, float, float]:
    turn, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 0.85)
    flat = math.sqrt(1 - height**2)
    return flat * math.cos(turn), -height, flat * math.sin(turn)


def make_square(rng: Random, moving: int) -> Scene:
    names = rng.sample(sorted(COLORS), 4)
    tone = rng.choice(("", "pale", "dark"))
    ground = make_texture(rng, names[0], tone, rng.choice(PATTERNS[1:]), rng.uniform(1.8, 3.0))
    discs, surfaces = (), (ground,)
    if rng.random() < 0.5:
        discs = (rng.uniform(2.5, 5.0),)
        surfaces = ground, make_texture(rng, names[1], rng.choice(tuple(TONES)), rng.choice(PATTERNS), 1.8)
    solids = make_things(rng, (4.5, 4.5), moving, names)
    count = rng.randint(6, 9)
    for index in range(count):
        angle, away = 2 * math.pi * (index + rng.uniform(-0.2, 0.2)) / count, rng.uniform(10, 15)
        half = rng.uniform(2.0, 3.5), rng.uniform(1.5, 4.5), rng.uniform(1.5, 2.5)
        texture = make_texture(rng, rng.choice(names[2:]), rng.choice(("", "pale", "pale")), rng.choice(PATTERNS), 2.4)
        center = away * math.sin(angle), -half[1], away * math.cos(angle)
        solids.append(Solid("box", center, half, angle, texture))
    for _ in range(rng.randint(0, 3)):
        angle, away, crown = rng.uniform(0, 2 * math.pi), rng.uniform(6.5, 8.5), rng.uniform(0.8, 1.3)
        solids += make_tree(rng, away * math.sin(angle), away * math.cos(angle), crown)
    sky = make_color(rng, rng.choice(("blue", "blue", "teal", "pink", "orange")), rng.choice(("pale", "")))
    horizon = tuple(0.35 * channel + 0.65 * rng.uniform(0.85, 0.95) for channel in sky)
    words = f"a square with {ground.words} ground between houses"
    return Scene(words, False, (5.5, 6.0, 5.5), surfaces, discs, tuple(solids), make_sun(rng), (horizon, sky))


def make_tree(rng: Random, x: float, z: float, crown: float) -> list[Solid]:
    bark, leaves = make_texture(rng, "brown", "", "", 1.0), make_texture(rng, "green", "", "marbled", 0.9)
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


def placed(solid: Solid, frames: Tensor) -> Tensor:
    """x, y, z, yaw [T,4] of a solid at the `frames` [T]."""
    place = torch.tensor([*solid.center, solid.yaw], dtype=torch.float64).repeat(len(frames), 1)
    if solid.motion is None:
        return place
    turn = 2 * math.pi * frames / solid.motion.period
    if solid.motion.kind in ("circle", "turn"):
        x, z = place[:, 0] - solid.motion.axis[0], place[:, 2] - solid.motion.axis[1]
        place[:, 0] = solid.motion.axis[0] + x * turn.cos() + z * turn.sin()
        place[:, 2] = solid.motion.axis[1] - x * turn.sin() + z * turn.cos()
        place[:, 3] += turn
    else:
        swing = turn.sin() if solid.motion.kind == "slide" else (turn / 2).sin().abs()
        place[:, :3] += swing[:, None] * torch.tensor(solid.motion.reach, dtype=torch.float64)
    return place


def screen_boxes(places: Tensor, half: Tensor, c2w: Tensor, K: Tensor, size: tuple[int, int]) -> list:
    """Where boxes with `places` [T,n,4] and half extents [n,3] can be seen: rows and columns (top, bottom, left, right)
    [T][n], the ends excluded. Nothing for a box behind the camera; all pixels if it reaches behind it."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    x, y, z = (half[:, None] * signs).unbind(-1)  # [n, 8]
    cos, sin = places[..., 3:].cos(), places[..., 3:].sin()
    corners = torch.stack([cos * x + sin * z, y.expand(len(places), -1, -1), cos * z - sin * x], dim=-1)
    corners = corners + places[..., None, :3] - c2w[:, None, None, :3, 3]
    x, y, z = torch.einsum("tji,tnkj->itnk", c2w[:, :3, :3], corners)
    ends = torch.stack([K[1, 1] * y / z + K[1, 2], K[0, 0] * x / z + K[0, 2]], dim=2)  # [T, n, 2, 8]
    low, high = (ends.amin(-1) - 0.5).ceil(), (ends.amax(-1) + 0.5).floor() + 1
    near = (z < 0.01).any(-1)[..., None]
    limit = torch.tensor(size, dtype=torch.float64)
    low, high = torch.where(near, 0, low).clamp(min=0), torch.where(near, limit, high).minimum(limit)
    high = torch.where((z < 0.01).all(-1)[..., None], 0, high)
    return torch.stack([low[..., 0], high[..., 0], low[..., 1], high[..., 1]], dim=-1).long().tolist()


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b))


@dataclass(frozen=True)
class View:
    """The rays of one frame, or of a rectangle of it: those through (u, v) of the image plane at depth 1, in S places
    of every pixel. A ray's parameter is its z-depth."""

    c2w: tuple[tuple[float, ...], ...]  # 3 rows of 4
    u: Tensor  # [S, 1, W]
    v: Tensor  # [S, H, 1]
    square: Tensor  # [S, H, W] squared length of the ray at depth 1

    def eye(self) -> tuple[float, ...]:
        return tuple(row[3] for row in self.c2w)

    def dot(self, vector: Sequence[float]) -> Tensor:
        """The product of a world vector with all rays at depth 1 [S,H,W]: one pass, for it is linear in u and v."""
        a, b, c, _ = (dot(vector, column) for column in zip(*self.c2w))
        return (self.u * a).add_(c) + self.v * b

    def cut(self, rows: slice, columns: slice) -> "View":
        return View(self.c2w, self.u[..., columns], self.v[:, rows], self.square[:, rows, columns])


def ripple(a: Tensor, b: Tensor, product: Tensor | float, total: Tensor | float) -> Tensor:
    """The factor -1..1 of a texture's width, from the arguments of its two sines, which are overwritten."""
    a, b = a.sin_(), b.sin_()
    return (a * b).mul_(product).add_(a.add_(b).mul_(total)).clamp_(-1, 1)


def walls(scene: Scene, view: View, rays: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Depth of a room's walls, which surface, and its light: darker towards edges and corners."""
    width, height, depth = scene.extent
    bounds = [(low - e, high - e) for low, high, e in zip((-width, -height, -depth), (width, 0.0, depth), view.eye())]
    times = []
    for ray, (low, high) in zip(rays, bounds):
        slowness = ray.reciprocal()
        times.append(torch.maximum(slowness * low, slowness * high))
    tx, ty, tz = times
    t = torch.minimum(torch.minimum(tx, ty), tz)
    x, y, z = (ray > 0 for ray in rays)
    row = torch.where(tx == t, x.long(), torch.where(ty == t, y.long() + 2, z.long() + 4))
    row = discs(scene, view, rays, t, row, floor=3, first=6)
    light = torch.ones_like(t)
    for ray, (low, high) in zip(rays, bounds):
        gap = (ray * t).sub_((low + high) / 2).abs_().sub_((high - low) / 2)  # - distance to the nearer wall
        light.mul_(gap.div_(0.9).add_(1).clamp_(min=0).square_().mul_(-0.28).add_(1))
    return t, row, light


def discs(scene: Scene, view: View, rays: list[Tensor], t: Tensor, row: Tensor, floor: int, first: int) -> Tensor:
    """`row` with the scene's discs, whose surfaces begin at `first`, on the `floor`."""
    if scene.discs:
        away = sum((rays[axis] * t).add_(view.eye()[axis]).square_() for axis in (0, 2))
        for index, radius in enumerate(scene.discs, first):
            row = torch.where(((row == floor) | (row >= first)) & (away < radius**2), index, row)
    return row


def ground(scene: Scene, view: View, rays: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Depth of a square's ground (inf: the sky), which surface, and its light."""
    t = torch.where(rays[1] > 1e-6, -view.eye()[1] / rays[1], torch.inf)
    row = discs(scene, view, rays, t, torch.zeros_like(t, dtype=torch.long), floor=0, first=1)
    return t, row, torch.ones_like(t)


def draw_solid(solid: Solid, place: list[float], sun: tuple[float, ...], view: View, t: Tensor, rgb: Tensor) -> None:
    """Where the solid is nearer than `t` [S,H,W], write its depth and its colours, into `rgb` [3,S,H,W]."""
    cos, sin = math.cos(place[3]), math.sin(place[3])
    offset = [a - b for a, b in zip(view.eye(), place)]
    if solid.shape == "ball":
        radius = solid.half[0]
        b = view.dot(offset)
        rest = b.square().sub_(view.square * (dot(offset, offset) - radius**2))
        near = rest.clamp(min=0).sqrt_().add_(b).div_(view.square).neg_()
        hit = (rest > 0) & (near > 0) & (near < t)
        light = view.dot(sun).mul_(near).add_(dot(sun, offset)).mul_(0.3 / radius).add_(0.78)
    else:
        axes, enters, far = ((cos, 0.0, -sin), (0.0, 1.0, 0.0), (sin, 0.0, cos)), [], t
        for axis, half in zip(axes, solid.half):
            slowness = view.dot(axis).reciprocal_()
            middle, reach = slowness * -dot(axis, offset), slowness.abs_()
            enters.append(middle.sub(reach, alpha=half))
            far = torch.minimum(far, middle.add_(reach, alpha=half))
        near = torch.maximum(torch.maximum(enters[0], enters[1]), enters[2])
        hit = (near < far) & (near > 0)
        x, y, z = (0.78 + math.copysign(0.3, dot(axis, offset)) * dot(axis, sun) for axis in axes)
        light = torch.where(enters[0] == near, x, torch.where(enters[1] == near, y, z))  # the eye's side of each axis
    if not hit.any():
        return
    near.clamp_(0, 100)  # finite where nothing is hit
    light = light * view.dot((0.0, -0.12 / solid.half[1], 0.0)).mul_(near).add_(0.9 - 0.12 * offset[1] / solid.half[1])
    values, phases = solid.texture.values, []
    for wx, wy, wz, phase in (values[:4], values[4:8]):
        wave = wx * cos + wz * sin, wy, wz * cos - wx * sin  # in world axes
        phases.append(view.dot(wave).mul_(near).add_(dot(wave, offset) + phase))
    middle, width = torch.tensor(values[10:]).view(2, 3, 1, 1, 1)
    color = torch.addcmul(middle, ripple(*phases, *values[8:10]), width).mul_(light)
    torch.where(hit, color, rgb, out=rgb)
    torch.where(hit, near, t, out=t)


def darken(light: Tensor, points: list[Tensor], solid: Solid, place: list[float]) -> None:
    """A soft dark spot on the ground below a solid, paler the higher it floats."""
    radius, gap = SPOT * max(solid.half[0], solid.half[2]), -place[1] - solid.half[1]
    away = sum((axis - center).square_() for axis, center in zip(points, (place[0], 0.0, place[2])))
    light.mul_(away.div_(-(radius**2)).add_(1).clamp_(min=0).square_().mul_(-0.5 / (1 + 2 * gap)).add_(1))


def draw(scene: Scene, table: Tensor, view: View, places: list, boxes: list, spots: list) -> tuple[Tensor, Tensor]:
    """One frame: depth [S,H,W] and colours [3,S,H,W]; `places` and screen rectangles are those of the solids."""
    rays = [view.dot(axis) for axis in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]
    t, row, light = (walls if scene.room else ground)(scene, view, rays)
    far = t.clamp(max=40.0)
    points = [(ray * far).add_(e) for ray, e in zip(rays, view.eye())]
    for solid, place, (top, bottom, left, right) in zip(scene.solids, places, spots):
        if solid.name and top < bottom and left < right:
            area = (slice(None), slice(top, bottom), slice(left, right))
            darken(light[area], [axis[area] for axis in points], solid, place)
    values = [column.index_select(0, row.flatten()).view_as(t) for column in table]
    a, b = (sum(w * axis for w, axis in zip(wave[:3], points)).add_(wave[3]) for wave in (values[:4], values[4:8]))
    swing = ripple(a, b, *values[8:10]).div_(far.div_(FADE).square_().add_(1))
    rgb = torch.stack([torch.addcmul(middle, swing, width) for middle, width in zip(values[10:13], values[13:])])
    rgb.mul_(light)
    for solid, place, (top, bottom, left, right) in zip(scene.solids, places, boxes):
        if top < bottom and left < right:
            rows, columns = slice(top, bottom), slice(left, right)
            draw_solid(solid, place, scene.sun, view.cut(rows, columns), t[:, rows, columns], rgb[..., rows, columns])
    if not scene.room:
        haze, up = (t / 40.0).clamp_(max=1).square_(), (rays[1] * -1.6).clamp_(0, 1)
        horizon, zenith = torch.tensor(scene.sky).view(2, 3, 1, 1, 1)
        rgb = torch.lerp(rgb, torch.addcmul(horizon, up, zenith - horizon), haze)
    return t, rgb


def surface_table(scene: Scene) -> Tensor:
    """The values of the surfaces' textures [16, n], colours times the light on a room's walls."""
    x, y, z = scene.sun
    sides = (x, -x, -y, -y, z, -z, *[-y] * len(scene.discs)) if scene.room else (0.5,) * len(scene.surfaces)
    shades = [0.96 + 0.12 * s for s in sides]
    rows = [(*s.values[:10], *(shade * c for c in s.values[10:])) for s, shade in zip(scene.surfaces, shades)]
    return torch.tensor(rows).T.contiguous()


def render(scene: Scene, c2w: Tensor, K: Tensor, size: tuple[int, int], samples: int = 2) -> tuple[Tensor, Tensor]:
    """Frames [T,H,W,3] uint8, the mean of samples x samples rays a pixel, and z-depth [T,H,W] at the pixel centres."""
    offsets = [(i + 0.5) / samples - 0.5 for i in range(samples)]
    dy, dx = torch.tensor([*product(offsets, offsets), (0.0, 0.0)]).T[..., None, None]  # the last ray is for the depth
    u = (torch.arange(size[1]) + dx - K[0, 2]) / K[0, 0]
    v = (torch.arange(size[0])[:, None] + dy - K[1, 2]) / K[1, 1]
    times = torch.arange(len(c2w), dtype=torch.float64)
    places = torch.stack([placed(solid, times) for solid in scene.solids], dim=1)
    half = torch.tensor([solid.half for solid in scene.solids], dtype=torch.float64)
    boxes = screen_boxes(places, half, c2w.double(), K.double(), size)
    below, radii = places * places.new_tensor([1, 0, 1, 0]), SPOT * half[:, ::2].amax(-1, keepdim=True).expand(-1, 3)
    spots = screen_boxes(below, radii, c2w.double(), K.double(), size)
    table, square, frames, depths = surface_table(scene), u.square() + v.square() + 1, [], []
    for pose, *solids in zip(c2w[:, :3].tolist(), places.tolist(), boxes, spots):
        t, rgb = draw(scene, table, View(pose, u, v, square), *solids)
        frames.append(rearrange(rgb[:, :-1].mean(1).mul_(255).round_().clamp_(0, 255).byte(), "c h w -> h w c"))
        depths.append(t[-1])
    return torch.stack(frames), torch.stack(depths)


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
        goal = rng.choice(scene.solids[:4]).center
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


def car_roundabout(frames: int = 99, size: tuple[int, int] = (192, 288)) -> Clip:
    """The demo clip: a toy car drives round a roundabout on the floor of a playroom, seen by a camera that circles it
    more slowly. Large plain things and a small slow car, for it is wrong in every warp: what a LoRA is to learn from
    the clip is that warps are right."""
    rng, lane = Random(7), 1.5

    def paint(name: str, tone: str = "", pattern: str = "", period: float = 0.8) -> Texture:
        return make_texture(rng, name, tone, pattern, period)

    def at(angle: float, away: float) -> tuple[float, float]:
        return away * math.sin(angle), away * math.cos(angle)

    side, ends = paint("yellow", "pale", "striped", 1.8), paint("teal", "pale", "marbled", 1.8)
    surfaces = side, side, paint("white", "pale", "", 3.0), paint("brown", "pale", "checked", 1.6), ends, ends
    surfaces += paint("gray", "dark"), paint("lime", "", "marbled", 1.6)
    solids = make_tree(rng, -0.2, 0.2, 0.42)
    for index, (name, half) in enumerate((("blue", (0.6, 0.55, 0.5)), ("orange", (0.5, 0.8, 0.5)),
                                          ("purple", (0.7, 0.45, 0.45)), ("pink", (0.45, 0.65, 0.6)))):
        x, z = 3.7 * (-1) ** (index // 2), 4.0 * (-1) ** ((index + 1) // 2)  # houses in the corners
        solids.append(Solid("box", (x, -half[1], z), half, 0.4 * index, paint(name, "", PATTERNS[index], 0.8), "house"))
    for x, z in ((4.5, 0.0), (-4.5, 0.6)):
        solids.append(Solid("box", (x, -1.9, z), (0.06, 0.7, 0.9), 0.0, paint("blue", "pale")))
    for x, z in ((0.4, 4.8), (-0.5, -4.8)):
        solids.append(Solid("box", (x, -1.7, z), (0.9, 0.7, 0.06), 0.0, paint("white", "", "striped", 0.7)))
    red, glass, rubber = paint("red"), paint("blue", "pale"), paint("gray", "dark")
    parts = [("box", (0, 0.18, 0), (0.38, 0.10, 0.2), red), ("box", (0.06, 0.36, 0), (0.21, 0.08, 0.17), glass)]
    parts += [("ball", (x, 0.1, z), (0.1,) * 3, rubber) for x in (-0.23, 0.23) for z in (-0.18, 0.18)]
    start, drive = math.radians(80), Motion("circle", -260.0)
    for shape, (along, up, aside), half, texture in parts:
        x, z = at(start, lane + aside)
        center = x + along * math.cos(start), -up, z - along * math.sin(start)
        solids.append(Solid(shape, center, half, start, texture, "red car" if shape == "box" else "", drive))
    sun, sky = (0.5, -0.75, -0.43), ((0.0,) * 3,) * 2
    scene = Scene("", True, (4.5, 3.4, 4.8), surfaces, (2.0, 1.0), tuple(solids), sun, sky)
    progress = torch.linspace(0, 1, frames, dtype=torch.float64)
    angle, away = math.pi + 0.75 - 1.5 * progress, 4.0 - 0.5 * (math.pi * progress).sin()
    position = torch.stack([away * angle.sin(), -1.9 + 0.5 * progress, away * angle.cos()], dim=-1)
    pitch = torch.atan2(position[:, 1] + 0.5, away)
    c2w, K = poses(position, angle + math.pi, pitch, torch.zeros_like(angle)), pinhole(65, *size)
    words = "a red toy car drives round a roundabout between toy houses in a room with a checked floor"
    return Clip(*render(scene, c2w, K, size), c2w, K, words)


STILLS = {  # demo pictures: seeds far from those of the training clips, and moves for `camera.move_path`
    "hall": (1_000_027, "dolly 0.25 + pan 6, orbit -12"),
    "plaza": (1_000_015, "orbit 15, dolly 0.25 + up 0.5"),
    "studio": (1_000_026, "truck 0.15 + pan -8, spiral 360"),
}  # fmt: skip


KNOWN = 1_100_003, 1_100_007, 1_100_008, 1_100_009  # seeds of clips for LoRAs of several videos


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
    """The demo clip and four others, and a csv of all."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"car-roundabout": car_roundabout} | {f"clip-{seed}": partial(make_clip, seed) for seed in KNOWN}
    lines = [f'{name}.mp4,"{write_clip(folder, name, make)}"' for name, make in makers.items()]
    (folder / "clips.csv").write_text("\n".join(["video,prompt", *lines]) + "\n")


def write_demos(folder: Path) -> None:
    """The demo clip; and first frames with their depth (16 bit, millimeters, 0: sky or very far) and a path each."""
    write_clip(folder, "car-roundabout", car_roundabout)
    for name, (seed, move) in STILLS.items():
        rng = Random(seed)
        scene = make_scene(rng)
        c2w, fov_x = make_path(scene, rng, 66)[:1], round(rng.uniform(50, 80), 2)
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
