"""How the miniature's world is drawn: exact rays, surfaces with patterns, soft light and shadows, on a CPU.

A picture is a few dozen passes over all rays in plain torch: a room's walls or a ground at first, then every solid in
the rectangle where it can be seen. Depth is exact. Light is a sun's without colour: faces are brighter that look at it,
balls may be glossy, and solids cast shadows on the ground, the softer the thinner. Left out: shadows on anything but
the ground, reflections, lens effects.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

from mini.surfaces import DETAIL, PATTERNS, TEXELS, Texture, level_of, look_up

SHADE = 0.5  # how dark a shadow is
SOFT = 0.4  # meters of a solid that a sunray must cross for a full shadow


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
    half: tuple[float, ...]  # three half extents, in its own axes; a ball has three equal ones
    yaw: float  # radians about the vertical
    texture: Texture
    name: str = ""  # for the caption; "": part of the scenery
    motion: Motion | None = None
    gloss: float = 0.0  # brightness of a ball's highlight
    casts: bool = True  # a shadow


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
    sky: tuple[tuple[float, ...], ...]  # colours at the horizon and above


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
    apart: float  # neighbouring rays at depth 1

    def eye(self) -> tuple[float, ...]:
        return tuple(row[3] for row in self.c2w)

    def dot(self, vector: Sequence[float]) -> Tensor:
        """The product of a world vector with all rays at depth 1 [S,H,W]: one pass, for it is linear in u and v."""
        a, b, c, _ = (dot(vector, column) for column in zip(*self.c2w))
        return (self.u * a).add_(c) + self.v * b

    def cut(self, rows: slice, columns: slice) -> "View":
        return View(self.c2w, self.u[..., columns], self.v[:, rows], self.square[:, rows, columns], self.apart)


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


def patterned(texture: Texture, u: Tensor, v: Tensor, apart: float, light: Tensor) -> Tensor:
    """Colours [3,S,H,W] at u and v (meters along a surface) of rays that lie `apart` meters apart."""
    cos, sin = (turn(texture.turn) / texture.size for turn in (math.cos, math.sin))
    along, across = (u * cos).add_(v, alpha=sin), (v * cos).sub_(u, alpha=sin)
    start = PATTERNS.index(texture.pattern) * TEXELS
    tone = look_up(start, along.add_(texture.shift[0]), across.add_(texture.shift[1]), level_of(apart / texture.size))
    middle, width = torch.tensor([texture.middle, texture.width])[..., None, None, None]
    return torch.addcmul(middle, tone, width).mul_(light)


def draw_ball(solid: Solid, place: list[float], sun: tuple[float, ...], view: View, t: Tensor) -> tuple:
    """Where a ball is nearer than `t` [S,H,W], its depth, and its colours [3,S,H,W]."""
    cos, sin, radius = math.cos(place[3]), math.sin(place[3]), solid.half[0]
    offset = [a - b for a, b in zip(view.eye(), place)]
    b = view.dot(offset)
    rest = b.square().sub_(view.square * (dot(offset, offset) - radius**2))
    near = rest.clamp(min=0).sqrt_().add_(b).div_(view.square).neg_()
    hit = (rest > 0) & (near > 0) & (near < t)
    near.clamp_(0, 100)  # finite where nothing is hit

    def local(vector: Sequence[float]) -> Tensor:
        return view.dot(vector).mul_(near).add_(dot(vector, offset))

    light = local(sun).mul_(0.3 / radius).add_(0.78) * local((0.0, 1.0, 0.0)).mul_(-0.12 / radius).add_(0.9)
    around = max(1, round(2 * math.pi * radius / solid.texture.size)) * solid.texture.size / (2 * math.pi)  # no seam
    u = torch.atan2(local((cos, 0.0, -sin)), local((sin, 0.0, cos))).mul_(around)
    away = math.hypot(*offset)
    color = patterned(solid.texture, u, local((0.0, 1.0, 0.0)), away * view.apart, light)
    if solid.gloss:
        between = [s + o / away for s, o in zip(sun, offset)]  # the normal that mirrors the sun to the eye
        shine = local(between).mul_(1 / (radius * math.hypot(*between))).clamp_(0, 1)
        for _ in range(5):
            shine.square_()
        color.add_(shine, alpha=solid.gloss)
    return hit, near, color


def draw_box(solid: Solid, place: list[float], sun: tuple[float, ...], view: View, t: Tensor) -> tuple:
    """Where a box is nearer than `t` [S,H,W], its depth, and its colours [3,S,H,W]."""
    cos, sin, enters, far = math.cos(place[3]), math.sin(place[3]), [], t
    offset = [a - b for a, b in zip(view.eye(), place)]
    axes = (cos, 0.0, -sin), (0.0, 1.0, 0.0), (sin, 0.0, cos)
    rays = [view.dot(axis) for axis in axes]
    for ray, axis, half in zip(rays, axes, solid.half):
        slowness = ray.reciprocal()
        middle, reach = slowness * -dot(axis, offset), slowness.abs_()
        enters.append(middle.sub(reach, alpha=half))
        far = torch.minimum(far, middle.add_(reach, alpha=half))
    near = torch.maximum(torch.maximum(enters[0], enters[1]), enters[2])
    hit = (near < far) & (near > 0)
    side, top = enters[0] == near, enters[1] == near
    x, y, z = (0.78 + math.copysign(0.3, dot(axis, offset)) * dot(axis, sun) for axis in axes)
    light = torch.where(side, x, torch.where(top, y, z))  # the eye's side of each axis
    near.clamp_(0, 100)
    x, y, z = (ray.mul_(near).add_(dot(axis, offset)) for ray, axis in zip(rays, axes))
    light = light * y.mul(-0.12 / solid.half[1]).add_(0.9)  # darker below
    u, v = torch.where(side, z, x), torch.where(top, z, y)
    return hit, near, patterned(solid.texture, u, v, math.hypot(*offset) * view.apart, light)


def cast_shadow(light: Tensor, points: list[Tensor], solid: Solid, place: list[float], sun: tuple[float, ...]) -> None:
    """Darken `light` at those `points` of the ground from which the sun is behind the solid."""
    x, z, height = points[0] - place[0], points[2] - place[2], -place[1]
    if solid.shape == "ball":
        along = (x * sun[0]).add_(z, alpha=sun[2]).add_(height * sun[1])
        away = x.square_().add_(z.square_()).sub_(along.square_()).add_(height**2)
        share = away.div_(-(solid.half[0] ** 2)).add_(1).mul_(1.5)
    else:
        cos, sin = math.cos(place[3]), math.sin(place[3])
        enters, leaves = [], []  # meters along the ray to the sun
        for a, b, half in ((cos, -sin, solid.half[0]), (sin, cos, solid.half[2])):
            slowness = 1 / (a * sun[0] + b * sun[2] + 1e-6)
            middle = (x * (-a * slowness)).sub_(z, alpha=b * slowness)
            enters.append(middle - abs(half * slowness))
            leaves.append(middle.add_(abs(half * slowness)))
        enter = torch.maximum(*enters).clamp_(min=(solid.half[1] - height) / sun[1])
        leave = torch.minimum(*leaves).clamp_(max=(-solid.half[1] - height) / sun[1])
        share = leave.sub_(enter).div_(min(SOFT, 2 * min(solid.half)))
    share.clamp_(0, 1).mul_(points[1] > -0.01)
    light.mul_(share.mul_(-SHADE).add_(1))


def draw(scene: Scene, view: View, places: list, boxes: list, shadows: list) -> tuple[Tensor, Tensor]:
    """One frame: depth [S,H,W] and colours [3,S,H,W]; `places` and screen rectangles are those of the solids."""
    rays = [view.dot(axis) for axis in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]
    t, row, light = (walls if scene.room else ground)(scene, view, rays)
    far = t.clamp(max=40.0)
    points = [(ray * far).add_(e) for ray, e in zip(rays, view.eye())]
    for solid, place, (top, bottom, left, right) in zip(scene.solids, places, shadows):
        if solid.casts and top < bottom and left < right:
            area = (slice(None), slice(top, bottom), slice(left, right))
            cast_shadow(light[area], [axis[area] for axis in points], solid, place, scene.sun)
    values = [column.index_select(0, row.flatten()).view_as(t) for column in surface_table(scene, view)]
    u, v = (reduce(torch.add, (w * axis for w, axis in zip(wave, points))).add_(wave[3])
            for wave in (values[:4], values[4:8]))
    level = far.log2().mul_(-1.5).add_(values[8]).clamp_(0, DETAIL).int()
    tone = look_up(values[9].int(), u, v, level)
    rgb = torch.stack([torch.addcmul(middle, tone, width) for middle, width in zip(values[10:13], values[13:])])
    rgb.mul_(light)
    for solid, place, (top, bottom, left, right) in zip(scene.solids, places, boxes):
        if top < bottom and left < right:
            area = slice(None), slice(top, bottom), slice(left, right)
            hit, near, color = (draw_ball if solid.shape == "ball" else draw_box)(
                solid, place, scene.sun, view.cut(*area[1:]), t[area])
            torch.where(hit, color, rgb[(slice(None), *area)], out=rgb[(slice(None), *area)])
            torch.where(hit, near, t[area], out=t[area])
    if not scene.room:
        haze, up = (t / 40.0).clamp_(max=1).square_(), (rays[1] * -1.6).clamp_(0, 1)
        horizon, zenith = torch.tensor(scene.sky).view(2, 3, 1, 1, 1)
        rgb = torch.lerp(rgb, torch.addcmul(horizon, up, zenith - horizon), haze)
    return t, rgb


def surface_table(scene: Scene, view: View) -> Tensor:
    """Columns [16, n] of the surfaces: how u and v (tiles) come from places (3 + 1 each), where the pattern begins, the
    level of detail at depth 1, and colours times the light on a room's walls. The level falls by 1.5 when the depth
    doubles: a ray's distance from its neighbour grows by 1, and its footprint's length, on a plane, by 2."""
    (x, y, z), eye, floors = scene.sun, view.eye(), len(scene.discs)
    width, height, depth = scene.extent
    if scene.room:
        sides = (x, -x, -y, -y, z, -z, *[-y] * floors)
        flat = (2, 1), (2, 1), (0, 2), (0, 2), (0, 1), (0, 1), *[(0, 2)] * floors
        away = (eye[0] + width, width - eye[0], eye[1] + height, -eye[1], eye[2] + depth, depth - eye[2],
                *[-eye[1]] * floors)
    else:
        sides, flat, away = (0.5,) * (1 + floors), ((0, 2),) * (1 + floors), (-eye[1],) * (1 + floors)
    rows = []
    for surface, side, axes, distance in zip(scene.surfaces, sides, flat, away):
        cos, sin = (turn(surface.turn) / surface.size for turn in (math.cos, math.sin))
        waves = [0.0] * 8
        waves[axes[0]], waves[axes[1]], waves[3], waves[4 + axes[0]], waves[4 + axes[1]], waves[7] = (
            cos, sin, surface.shift[0], -sin, cos, surface.shift[1])
        level = -0.5 + 0.5 * math.log2(max(distance, 0.1)) - math.log2(view.apart / surface.size)
        colors = [(0.96 + 0.12 * side) * channel for channel in (*surface.middle, *surface.width)]
        rows.append((*waves, level, PATTERNS.index(surface.pattern) * TEXELS, *colors))
    return torch.tensor(rows).T.contiguous()


def shadow_boxes(scene: Scene, places: Tensor, half: Tensor, c2w: Tensor, K: Tensor, size: tuple[int, int]) -> list:
    """As `screen_boxes`, of the solids' shadows on the ground."""
    x, y, z = scene.sun
    way = torch.tensor([x / y, 0.0, z / y], dtype=torch.float64)
    ground = places * places.new_tensor([1, 0, 1, 0])
    ground[..., :3] -= places[..., 1:2] * way
    reach = half[:, ::2].norm(dim=1, keepdim=True) * half.new_tensor([1, 0, 1]) + half[:, 1:2] * way.abs()
    return screen_boxes(ground, reach, c2w, K, size)


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
    shadows = shadow_boxes(scene, places, half, c2w.double(), K.double(), size)
    square, apart, frames, depths = u.square() + v.square() + 1, 1 / (K[0, 0].item() * samples), [], []
    for pose, *solids in zip(c2w[:, :3].tolist(), places.tolist(), boxes, shadows):
        t, rgb = draw(scene, View(pose, u, v, square, apart), *solids)
        frames.append(rearrange(rgb[:, :-1].mean(1).mul_(255).round_().clamp_(0, 255).byte(), "c h w -> h w c"))
        depths.append(t[-1])
    return torch.stack(frames), torch.stack(depths)
