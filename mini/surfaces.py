"""What the miniature's world is covered with: colours with names, and periodic patterns with several octaves of detail.

A pattern is a square tile of numbers in -1..1, which lead from a texture's one colour to its other one; it repeats
without seams, and smaller averages of it are kept for what is far away, so that fine stripes turn into their mean
instead of into false ones. All patterns lie in one vector, so that a picture's pixels look theirs up in one go.
"""

import colorsys
import math
from dataclasses import dataclass
from functools import cache
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

COLORS = {  # hue, saturation, value
    "red": (0.00, 0.82, 0.82), "orange": (0.07, 0.85, 0.95), "yellow": (0.14, 0.78, 0.95), "green": (0.36, 0.70, 0.62),
    "lime": (0.23, 0.70, 0.80), "teal": (0.49, 0.75, 0.65), "blue": (0.61, 0.78, 0.80), "purple": (0.76, 0.55, 0.68),
    "pink": (0.92, 0.50, 0.92), "brown": (0.07, 0.55, 0.50), "white": (0.12, 0.06, 0.93), "gray": (0.60, 0.08, 0.55),
}  # fmt: skip
TONES = {"": (1.0, 1.0), "pale": (0.42, 1.12), "dark": (1.0, 0.65)}  # factors of saturation and value
PATTERNS = ("", "striped", "checked", "marbled", "wooden", "brick", "leafy", "tiled")
DETAIL = 8  # a tile has 2**8 x 2**8 numbers
TEXELS = (4 ** (DETAIL + 1) - 1) // 3  # of a tile and its averages, the smallest first


@dataclass(frozen=True)
class Texture:
    """A pattern between two colours, middle - width and middle + width, in tiles of `size` meters."""

    words: str
    pattern: str
    size: float
    turn: float  # radians, within its surface
    shift: tuple[float, float]  # tiles
    middle: tuple[float, ...]
    width: tuple[float, ...]


def make_color(rng: Random, name: str, tone: str) -> tuple[float, float, float]:
    hue, saturation, value = COLORS[name]
    hue += rng.uniform(-0.015, 0.015)
    saturation = min(1.0, saturation * TONES[tone][0] * rng.uniform(0.9, 1.1))
    return colorsys.hsv_to_rgb(hue % 1, saturation, min(1.0, value * TONES[tone][1] * rng.uniform(0.92, 1.05)))


def make_texture(rng: Random, name: str, tone: str, pattern: str, size: float, turn: float = 0.0) -> Texture:
    """Patterns are the colour with a lighter, darker or another one."""
    tone = "" if name == "white" else tone  # dark white is gray
    first = make_color(rng, name, tone)
    other = rng.choice((0.5, 0.65)) if max(first) < 0.75 else rng.choice((0.55, 0.7))
    second = tuple(channel * other for channel in first)
    if pattern in ("striped", "checked", "brick") and rng.random() < 0.4:
        second = make_color(rng, rng.choice(("white", "yellow", "gray", name)), rng.choice(("", "pale")))
    contrast = 1.0 if size < 2 else 0.65  # walls and floors are large, and shall not outshine the things
    middle = tuple(0.65 * a + 0.35 * b for a, b in zip(first, second))
    width = tuple(contrast * (a - b) / 2 for a, b in zip(first, second))
    words = " ".join(word for word in (pattern, tone, name) if word)
    return Texture(words, pattern, size, turn, (rng.random(), rng.random()), middle, width)


# ------------------------------------------------------------------------------------------------------------ patterns


def clouds(generator: torch.Generator, slope: float, stretch: float = 1.0) -> Tensor:
    """Noise of all octaves, each 2**-slope times as strong as the one before; `stretch` makes it long in u."""
    count = 2**DETAIL
    frequency = torch.fft.fftfreq(count) * count
    away = (frequency[:, None].square() + (stretch * frequency).square()).sqrt()
    away[0, 0] = torch.inf
    noise = torch.fft.ifft2(torch.fft.fft2(torch.randn(count, count, generator=generator)) * away**-slope).real
    return (noise / noise.std() / 2).clamp(-1, 1)


def blocks(generator: torch.Generator, rows: int, columns: int, shift: Tensor, gap: float) -> Tensor:
    """A wall of blocks, each of its own brightness, every row shifted by a share of a block; -1 between them."""
    place = (torch.arange(2**DETAIL) + 0.5) / 2**DETAIL
    v = place * rows
    u = place[None] * columns + shift[v.long()][:, None]
    tones = 0.6 * torch.rand(rows, columns, generator=generator)
    tone = tones[v.long()[:, None], u.long() % columns]
    edge_v, edge_u = ((0.5 - (x % 1 - 0.5).abs()) / count for x, count in ((v[:, None], rows), (u, columns)))
    inside = (torch.minimum(edge_v, edge_u) * rows / gap - 0.2).clamp(0, 1)
    return inside * (tone + 1) - 1


def leaves(generator: torch.Generator) -> Tensor:
    """Ellipses of random brightness, each over those before it."""
    count = 2**DETAIL
    tile = torch.zeros(count, count)
    grid = torch.arange(count) / count
    for _ in range(300):
        v, u, turn, size, tone = torch.rand(5, generator=generator).tolist()
        y, x = ((grid - place + 0.5) % 1 - 0.5 for place in (v, u))
        cos, sin = math.cos(math.pi * turn), math.sin(math.pi * turn)
        along, across = cos * x[None] + sin * y[:, None], cos * y[:, None] - sin * x[None]
        radius = 0.04 + 0.08 * size
        tile[(along / radius).square() + (across / radius / 0.5).square() < 1] = 2 * tone - 1
    return tile


@cache
def atlas() -> Tensor:
    """All patterns, each as `TEXELS` numbers."""
    generator = torch.Generator().manual_seed(0)
    place = 2 * math.pi * (torch.arange(2**DETAIL) + 0.5) / 2**DETAIL
    bands = (3 * (4 * place).sin()).tanh()[:, None].expand(-1, 2**DETAIL)
    halves = torch.tensor([0.0, 0.5])
    tiles = {
        "": 0.3 * clouds(generator, 2.0),
        "striped": 0.85 * bands + 0.2 * clouds(generator, 1.8),
        "checked": 0.8 * (3 * (2 * place).sin()).tanh() * (3 * (2 * place).sin()).tanh()[:, None]
                   + 0.25 * clouds(generator, 1.8),
        "marbled": 1 - 3 * clouds(generator, 2.3).abs() + 0.2 * clouds(generator, 1.6),
        "wooden": blocks(generator, 8, 1, torch.rand(8, generator=generator), 0.1)
                  + 0.4 * clouds(generator, 1.5, 8.0),
        "brick": blocks(generator, 8, 4, halves.repeat(4), 0.16) + 0.3 * clouds(generator, 1.6),
        "leafy": 0.7 * leaves(generator) + 0.3 * clouds(generator, 1.6),
        "tiled": blocks(generator, 4, 4, torch.zeros(4), 0.06) + 0.35 * clouds(generator, 1.8),
    }
    parts = []
    for pattern in PATTERNS:
        levels = [tiles[pattern].clamp(-1, 1)[None]]
        while levels[0].shape[-1] > 1:
            levels.insert(0, F.avg_pool2d(levels[0], 2))
        parts += [level.flatten() for level in levels]
    return torch.cat(parts)


def level_of(footprint: float) -> int:
    """Which averages to take where neighbouring rays lie `footprint` tiles apart; 0 is a whole tile's mean."""
    return min(max(-math.ceil(math.log2(footprint) + 0.5), 0), DETAIL)


def look_up(start: int | Tensor, u: Tensor, v: Tensor, level: int | Tensor) -> Tensor:
    """The numbers of the patterns that begin at `start`, at u and v (in tiles; both are overwritten)."""
    count = 2**DETAIL
    column, row = (x.mul_(count).floor_().int().bitwise_and_(count - 1) for x in (u, v))
    if isinstance(level, int):
        index = (row >> (DETAIL - level) << level).add_(column >> (DETAIL - level)).add_((4**level - 1) // 3)
    else:
        starts = torch.tensor([(4**each - 1) // 3 for each in range(DETAIL + 1)], dtype=torch.int32)
        coarser = DETAIL - level
        index = (row >> coarser << level).add_(column >> coarser)
        index.add_(starts.index_select(0, level.flatten()).view_as(index))
    return atlas().index_select(0, index.add_(start).flatten()).view_as(u)
