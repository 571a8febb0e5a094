"""Which past pictures show most of what is to be seen next: their points, thinned, are looked at from the coming views.

Ours, not the paper's, which takes the latest ones (memory.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.camera import inverse, product
from geometry.surface import Geometry, stretch, transform, unproject

STEP = 8  # pixels from one point of a picture to the next, along rows and columns
CELL = 2 * STEP  # pixels of a view that count as one, along each side: a surface twice as near has no holes
HIDDEN = 1.1  # times the depth of the nearest point: what is farther away is behind it


def thin(geometry: Geometry, pose: Tensor) -> Tensor:
    """Points [h,w,3] of every eighth row and column, seen from a camera at `pose` [4,4] in place of the geometry's own;
    nan where nothing is valid."""
    moved = transform(product(pose, inverse(geometry.c2w)), *geometry.points[::STEP, ::STEP].cpu().unbind(-1))
    return torch.stack(moved, dim=-1).where(geometry.valid[::STEP, ::STEP, None].cpu(), torch.nan)


def nearest(points: Tensor, pose: Tensor, K: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth [F,h,w] of the nearest of each picture's points [F,...,3] in each cell of a view of `size` (height, width);
    inf where there is none."""
    height, width = (side // CELL for side in size)
    (fx, _, cx), (_, fy, cy), _ = stretch(K, size, (height, width)).tolist()
    x, y, z = transform(inverse(pose), *points.flatten(1, -2).unbind(-1))
    column, row = (fx * x / z + cx).round(), (fy * y / z + cy).round()
    inside = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    cell = torch.where(inside, row * width + column, height * width).long()
    empty = torch.full((len(points), height * width + 1), torch.inf)
    return empty.scatter_reduce(1, cell, z.where(inside, torch.inf), "amin")[:, :-1].unflatten(1, (height, width))


def guess(points: Tensor, pose: Tensor, K: Tensor, size: tuple[int, int]) -> Tensor:
    """Points [h,w,3] of a picture whose depth is not known yet: that of the other pictures' points [F,h,w,3] from where
    it stands, and their median where there are none."""
    depth = nearest(points, pose, K, size).amin(0)
    depth = torch.where(depth.isfinite(), depth, depth.where(depth.isfinite(), torch.nan).nanmedian())
    shape = points.shape[1], points.shape[2]
    return unproject(F.interpolate(depth[None, None], shape)[0, 0], stretch(K, size, shape), pose)


def choose(points: Tensor, poses: Tensor, Ks: Tensor, size: tuple[int, int], count: int) -> list[int]:
    """Indices, in order, of `count` of the pictures with `points` [F,h,w,3] (`thin`; those of the latest do not count):
    the first, the latest, and one by one that which covers most of what is still uncovered; of equal ones the latest.

    `poses` [1+V,4,4] and `Ks` [1+V,3,3] in pixels of `size`: the latest picture's camera, then the coming views.
    """
    points = torch.cat([points[:-1], guess(points[:-1], poses[0], Ks[0], size)[None]])
    seen = torch.stack([nearest(points, *view, size) for view in zip(poses[1:], Ks[1:])], dim=1)  # [F, V, h, w]
    covers = (seen.isfinite() & (seen <= HIDDEN * seen.amin(0))).flatten(1)
    chosen = [0, len(points) - 1]
    while len(chosen) < min(count, len(points)):
        gains = (covers & ~covers[chosen].any(0)).sum(1).tolist()
        chosen.append(max({*range(len(points))} - {*chosen}, key=lambda index: (gains[index], index)))
    return sorted(chosen)
