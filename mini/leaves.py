"""Moving "dead leaves": random overlapping shapes with random surfaces, so that the VAE learns more than the world.

Sizes of shapes follow the power law that makes such pictures have the statistics of photographs (Lee, Mumford and
Huang, 2001). A clip is three such pictures over each other, of which the nearer ones have holes, each with a smooth
motion of its own.
"""

import colorsys
import math
from random import Random

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mini.surfaces import DETAIL, PATTERNS, TEXELS, look_up

SHAPES = 140  # of a picture
SIZES = 6.0, 110.0  # pixels: radii of shapes
LAYERS = 3
COVERED = 0.5, 0.9  # share of the shapes that a nearer layer leaves out


def shape(rng: Random, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Whether places (x, y), in pixels from a shape's middle, lie in it: an ellipse, a box or a polygon."""
    turn, aspect = rng.uniform(0, math.pi), rng.uniform(0.35, 1)
    cos, sin = math.cos(turn), math.sin(turn)
    along, across = cos * x + sin * y, (cos * y - sin * x) / aspect
    kind = rng.choice(("ellipse", "box", "polygon"))
    if kind == "ellipse":
        return along.square() + across.square() < radius**2
    if kind == "box":
        return torch.maximum(along.abs(), across.abs()) < 0.8 * radius
    sides = [rng.uniform(0, 2 * math.pi) for _ in range(4)]
    return torch.stack([along * math.cos(side) + across * math.sin(side) for side in sides]).amax(0) < 0.6 * radius


def paint(rng: Random, x: Tensor, y: Tensor) -> Tensor:
    """Colours [3, ...] of a shape's surface: a pattern, or none, between two colours, in a soft light from one side."""
    first, second = (torch.tensor(colorsys.hsv_to_rgb(rng.random(), rng.random() ** 2, rng.random())) for _ in "ab")
    second = torch.lerp(first, second, rng.random() ** 2)
    size, turn, light = math.exp(rng.uniform(3.5, 6)), rng.uniform(0, math.pi), rng.gauss(0, 0.004)
    cos, sin, level = math.cos(turn), math.sin(turn), max(2, min(DETAIL, math.floor(math.log2(size))))
    u, v = ((cos * x + sin * y) / size + rng.random(), (cos * y - sin * x) / size + rng.random())
    shade = 1 + light * (x * sin - y * cos)
    tone = look_up(rng.randrange(len(PATTERNS)) * TEXELS, u, v, level)
    return (first[:, None, None] + (second - first)[:, None, None] * (tone / 2 + 0.5)) * shade


def picture(rng: Random, size: tuple[int, int], left_out: float) -> Tensor:
    """[4, H, W]: colours in 0..1 and coverage, far shapes first."""
    canvas = torch.zeros(4, *size)
    if not left_out:
        canvas[:3], canvas[3] = rng.random(), 1
    low, high = (radius**-2 for radius in SIZES)
    for _ in range(SHAPES):
        radius = (high + (low - high) * rng.random()) ** -0.5  # density ~ radius**-3
        row, column = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        reach = 2 * radius
        top, bottom = max(0, int(row - reach)), min(size[0], int(row + reach) + 1)
        left, right = max(0, int(column - reach)), min(size[1], int(column + reach) + 1)
        y, x = torch.arange(top, bottom)[:, None] - row, torch.arange(left, right)[None] - column
        x, y = x.expand(len(y), -1), y.expand(-1, x.shape[1])
        inside, part = shape(rng, x, y, radius), canvas[:, top:bottom, left:right]
        if rng.random() >= left_out:
            color = torch.cat([paint(rng, x, y), torch.ones(1, *x.shape)])
            part.copy_(torch.where(inside, color, part))
    return canvas


def make_leaves(seed: int, frames: int, size: tuple[int, int]) -> Tensor:
    """A clip [T, H, W, 3] uint8."""
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    time = torch.linspace(-0.5, 0.5, frames)
    video = torch.zeros(frames, 3, *size)
    for layer in range(LAYERS):
        canvas = picture(rng, (size[0] * 5 // 4, size[1] * 5 // 4), rng.uniform(*COVERED) if layer else 0.0)
        speed = 0.0 if rng.random() < 0.15 else math.exp(rng.uniform(-3, 0))
        angle, zoom = (speed * rng.gauss(0, 0.15) * time for _ in "ab")
        scale = 0.8 * (1 + zoom)
        theta = torch.zeros(frames, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = scale * angle.cos()
        theta[:, 0, 1], theta[:, 1, 0] = -scale * angle.sin(), scale * angle.sin()
        theta[:, 0, 2], theta[:, 1, 2] = (speed * rng.gauss(0, 0.3) * time for _ in "ab")
        grid = F.affine_grid(theta, [frames, 4, *size], align_corners=False)
        moved = F.grid_sample(canvas.expand(frames, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
        video = torch.lerp(video, moved[:, :3] / moved[:, 3:].clamp(min=1e-3), moved[:, 3:])
    video = video * rng.uniform(0.6, 1.2) + rng.uniform(-0.1, 0.1)
    video += rng.choice((0.0, 0.0, 0.01)) * torch.randn(video.shape, generator=generator)
    return rearrange(video.clamp(0, 1) * 255, "t c h w -> t h w c").round().byte()
