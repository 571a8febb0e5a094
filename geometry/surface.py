"""What one picture shows of a scene: `Geometry`, from Pi3X or a depth map, and where its surface breaks.

Conventions: camera-to-world, OpenCV axes (x right, y down, z forward), pixel centres at integers, K in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor

from files.media import fit_image, kept_share, to_u8
from geometry.camera import focal
from geometry.known import Known
from geometry.pi3x import Pi3X

PATCH, PIXEL_LIMIT = 14, 255_000  # geometry maps have the input size of Pi3X
MIN_CONFIDENCE = 0.1
Lens = tuple[float, float, float, float]  # fx, fy, cx, cy


class NoSurface(ValueError):
    """A geometry from which nothing can be rendered."""


@dataclass(frozen=True)
class Geometry:
    """What is known of one picture's scene; all maps at `geometry_size`, which is not the video size."""

    points: Tensor  # [H, W, 3] world
    depth: Tensor  # [H, W] z in the camera
    confidence: Tensor  # [H, W] 0..1
    valid: Tensor  # [H, W] bool: confident, finite, and not on a depth edge
    K: Tensor  # [3, 3]
    c2w: Tensor  # [4, 4]
    rgb: Tensor  # [H, W, 3] uint8

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.depth.shape
        return height, width

    def has_depth(self) -> Tensor:
        return self.depth.isfinite() & (self.depth > 0)

    def to(self, device: torch.device | str) -> "Geometry":
        """Its maps on a device; the camera stays on the CPU, where the renderer wants it."""
        maps = {name: each.to(device) for name, each in vars(self).items() if name not in ("K", "c2w")}
        return replace(self, **maps)


def geometry_size(height: int, width: int, limit: int = PIXEL_LIMIT) -> tuple[int, int]:
    """Multiples of 14 near the aspect ratio with at most `limit` pixels (Pi3X input size) -> height, width."""
    scale = math.sqrt(limit / (height * width))
    rows, columns = round(height * scale / PATCH), round(width * scale / PATCH)
    while rows * columns * PATCH**2 > limit:
        if columns / max(rows, 1) > (width * scale) / max(height * scale, 1):
            columns -= 1
        else:
            rows -= 1
    return PATCH * max(rows, 1), PATCH * max(columns, 1)


def map_size(height: int, width: int, limit: int = PIXEL_LIMIT) -> tuple[int, int]:
    """`geometry_size` where nothing official decides: a thumbnail gets 16 points a pixel, a small picture 4, which is
    as good as more."""
    return geometry_size(height, width, min(limit, 16 * height * width, max(98_304, 4 * height * width)))


def fused(total: Tensor, x: Tensor, factor: float | Tensor) -> Tensor:
    """total + factor x, rounded once. Accelerators have it; CPUs have it or not, which double precision makes equal."""
    if total.device.type == "cpu":
        return x.double().mul_(factor).add_(total).float()
    return total.addcmul(x, factor) if isinstance(factor, Tensor) else total.add(x, alpha=factor)


def resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """[B,C,h,w] -> [B,C,H,W], bilinear without antialiasing: what torch's `interpolate` gives on a CPU with fused
    multiply-add, on every CPU."""
    old = images.shape[-2:]
    if images.device.type != "cpu" or old == size:
        return F.interpolate(images, size, mode="bilinear", align_corners=False)
    if len(images) > 1:
        return torch.cat([resize(image, size) for image in images.split(1)])
    step = torch.tensor(old) / torch.tensor(size)  # in single precision, as the places
    y, x = (((torch.arange(n).double() + 0.5) * s - 0.5).clamp(min=0).float() for n, s in zip(size, step.tolist()))
    rows, columns = y.long(), x.long()
    v, u = (y - rows)[:, None], x - columns
    lower, right = (rows + 1).clamp(max=old[0] - 1), (columns + 1).clamp(max=old[1] - 1)
    top, bottom = images.index_select(2, rows), images.index_select(2, lower)
    total = top.index_select(3, right) * ((1 - v) * u)  # the order decides the last bit
    total = fused(total, top.index_select(3, columns), (1 - v) * (1 - u))
    total = fused(total, bottom.index_select(3, columns), v * (1 - u))
    return fused(total, bottom.index_select(3, right), v * u)


def look_up(picture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Colours [3,n] of a picture [3,H,W] between its pixels, at `x` and `y` [n]; bilinear, as by `grid_sample`."""
    height, width = picture.shape[1:]
    x, y = ((((at / (n - 1) * 2 - 1) + 1) * ((n - 1) / 2)).clamp(0, n - 1) for at, n in ((x, width), (y, height)))
    column, row = x.long(), y.long()
    u, v = x - column, y - row
    right, down = (column < width - 1).long(), (row < height - 1).long() * width
    corner, flat = row * width + column, picture.flatten(1)
    total = flat[:, corner] * ((1 - v) * (1 - u))
    for offset, weight in ((right, (1 - v) * u), (down, v * (1 - u)), (right + down, v * u)):
        total = fused(total, flat[:, corner + offset], weight)
    return total


def pinhole(fov_x: float, height: int, width: int) -> Tensor:
    """[3,3] of a centred camera with square pixels and the horizontal field of view `fov_x` in degrees."""
    focal = width / 2 / math.tan(math.radians(fov_x) / 2)
    return torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def zoomed(K: Tensor, count: int, zoom: Tensor | None = None) -> Tensor:
    """`K` [3,3] for each of `count` frames, with focal lengths `zoom` [count,2] times as long: [count,3,3]."""
    result = K.cpu().repeat(count, 1, 1)
    if zoom is not None:
        result[:, [0, 1], [0, 1]] *= zoom
    return result


def stretch(K: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """`K` [...,3,3] of a picture of the `old` size (H, W) after it was resized to the `new` one."""
    factors = torch.tensor([new[1] / old[1], new[0] / old[0], 1.0])
    K = factors[:, None] * K
    K[..., :2, 2] += (factors[:2] - 1) / 2  # pixel centres are integers, so the corner is at -1/2
    return K


def unproject(depth: Tensor, K: Tensor, c2w: Tensor) -> Tensor:
    """World points [H,W,3] of a depth map [H,W]."""
    rows, columns = (torch.arange(n, device=depth.device, dtype=depth.dtype) for n in depth.shape)
    (fx, _, cx), (_, fy, cy), _ = K.tolist()
    x, y = (columns - cx) / fx * depth, (rows[:, None] - cy) / fy * depth
    return torch.stack(transform(c2w, x, y, depth), dim=-1)


def transform(pose: Tensor, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """Points through a pose. Not a matmul, which may use TF32 on CUDA and differs from CPU to CPU, but a chain of fused
    multiply-adds: so rounds the official matrix product, which decides between equally deep samples."""
    return [fused(fused(a * x, y, b), z, c).add_(t) for a, b, c, t in pose[:3].tolist()]


def focal_from_rays(local_points: Tensor) -> Tensor:
    """Points or rays per pixel in the camera [..., H, W, 3] -> pinhole intrinsics [..., 3, 3] in pixels.

    The principal point is the picture's centre; the two focal lengths are those of least squares over all pixels. Left
    out: a free principal point.
    """
    height, width = local_points.shape[-3:-1]
    cx, cy = (width - 1) / 2, (height - 1) / 2
    rays = F.normalize(local_points, dim=-1)
    slopes = rays[..., :2] / (rays[..., 2:].abs() + 1e-10)  # kept for parity: what is behind counts as in front
    u, v = torch.arange(width, device=rays.device) - cx, torch.arange(height, device=rays.device) - cy
    offsets = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)  # [H, W, 2]
    focal = (slopes * offsets).sum(dim=(-3, -2)) / slopes.square().sum(dim=(-3, -2))
    intrinsics = torch.diag_embed(F.pad(focal, (0, 1), value=1.0))
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = cx, cy
    return intrinsics


def with_lens(geometry: Geometry, K: Tensor) -> Geometry:
    """The same depths, seen by a camera that is known to have another K, in pixels of the geometry's maps."""
    return replace(geometry, K=K, points=unproject(geometry.depth, K, geometry.c2w))


def geometry_from_depth(image: Tensor, depth: Tensor, K: Tensor, sharp: Tensor | None = None,
                        limit: int = PIXEL_LIMIT) -> Geometry:
    """From `image` [1,3,H,W] in [-1,1], its `depth` [h,w] (unknown: not finite or not positive), `K` in its pixels. The
    colours are those of a larger copy of the image, if given: edges in them and in the depth then fall together."""
    height, width = image.shape[-2:]
    size = map_size(height, width, limit)
    known = depth.isfinite() & (depth > 0)
    weight = resize(known.float()[None, None], size)[0, 0]
    depth = resize(torch.where(known, depth, 0)[None, None], size)[0, 0] / weight  # unknown neighbours don't count
    K = stretch(K.cpu(), (height, width), size)
    c2w = torch.eye(4)
    valid = weight >= 0.5
    depth = torch.where(valid, depth, 0)
    points = unproject(depth, K, c2w)
    valid = valid & ~mesh_break(points, depth, valid)
    colors = (image if sharp is None else sharp) / 2 + 0.5
    rgb = rearrange(to_u8(resize(colors.clamp(0, 1), size)), "1 c h w -> h w c")
    return ensure_valid(Geometry(points, depth, torch.ones_like(depth), valid, K, c2w, rgb))


def crop_lens(lens: float | Lens, picture: Image, size: tuple[int, int]) -> Tensor:
    """K [3,3] at the video `size` of a picture centre-cropped to it, from its own `lens`: horizontal degrees, or fx,
    fy, cx, cy in shares of its width and height."""
    (rows, columns), (height, width) = kept_share(picture, size), size
    if not isinstance(lens, tuple):
        x = focal(lens)
        lens = x, x * picture.width / picture.height, 0.5, 0.5
    fx, fy, cx, cy = lens
    cx, cy = (cx - 0.5) / columns + 0.5, (cy - 0.5) / rows + 0.5
    return torch.tensor([[fx / columns * width, 0, cx * width - 0.5], [0, fy / rows * height, cy * height - 0.5],
                         [0, 0, 1]])


def place(picture: Image, depth: Tensor | None, lens: float | Lens, size: tuple[int, int],
          device: torch.device | str = "cpu", limit: int = PIXEL_LIMIT) -> tuple[Tensor, Geometry]:
    """A picture centre-cropped to the video `size`, [1,3,H,W] in [-1,1], and its geometry.

    `depth` [h,w] (None: a plane at depth 1) and `lens`, as for `crop_lens`, are those of the whole picture. Raises
    ValueError if the map has another shape, but for rounding to the blocks of a network.
    """
    image = fit_image(picture, size).to(device)
    rows, columns = kept_share(picture, size)
    depth = torch.ones(1, 1) if depth is None else depth
    if depth.numel() > 1 and not 0.9 < depth.shape[1] / depth.shape[0] * picture.height / picture.width < 1.11:
        raise ValueError(f"a depth map of {depth.shape[1]}x{depth.shape[0]} for a picture of {picture.width}x"
                         f"{picture.height}: expected the same shape, upright, not padded and not cropped")
    top, left = (min(round(n * (1 - share) / 2), (n - 1) // 2) for n, share in zip(depth.shape, (rows, columns)))
    depth = depth[top : len(depth) - top, left : depth.shape[1] - left].to(device)
    factor = max(1, round(map_size(*size, limit)[0] / size[0]))  # 1 but for thumbnails
    sharp = fit_image(picture, (factor * size[0], factor * size[1])).to(device)
    return image, geometry_from_depth(image, depth, crop_lens(lens, picture, size), sharp, limit)


@torch.no_grad()
def estimate(network: Pi3X, images: Sequence[Tensor], limit: int | None = None,
             known: Known | None = None) -> list[Geometry]:
    """One joint run over `images`, each [1,3,H,W] in [-1,1], of which the network may be told what is `known` -> a
    geometry each, in one world, on the network's device.

    The maps have at most `limit` pixels (None: the official number) and the aspect of the latest image. A network that
    was made for fewer sees these, and its maps are enlarged: on coarse ones every floor is a depth edge. `valid` may
    come out empty: `ensure_valid` is left to the caller, because the scale is aligned before it.
    """

    def show(size: tuple[int, int]) -> Tensor:
        pictures = torch.cat([resize((image / 2 + 0.5).clamp(0, 1), size) for image in images])
        return pictures.to(network.image_mean.device)

    height, width = images[-1].shape[-2:]
    most = PIXEL_LIMIT if limit is None else limit
    size = seen = geometry_size(height, width, most)
    if network.config.pixels < min(most, PIXEL_LIMIT):
        size, seen = map_size(height, width, most), geometry_size(height, width, network.config.pixels)
    prediction = network(show(seen)[None], known)
    if not all(x.isfinite().any() for x in (prediction.points, prediction.confidence, prediction.c2w)):
        raise ValueError("Pi3X: its geometry is not finite; are its weights damaged?")
    colors = rearrange(to_u8(show(size)), "n c h w -> n h w c")
    all_points, all_local, confidences = prediction.points[0], prediction.local_points[0], prediction.confidence[0]
    intrinsics, poses, confidences = focal_from_rays(all_local).cpu(), prediction.c2w[0].cpu(), confidences.sigmoid()
    if seen != size:
        intrinsics = stretch(intrinsics, seen, size)
        depths, confidences = (resize(x[:, None], size)[:, 0] for x in (all_local[..., 2], confidences))
        all_points, all_local = (torch.stack([unproject(*each) for each in zip(depths, intrinsics, cameras)])
                                 for cameras in (poses, torch.eye(4).expand_as(poses)))
    geometries = []
    for points, local, confidence, K, c2w, rgb in zip(all_points, all_local, confidences, intrinsics, poses, colors):
        depth = local[..., 2]
        valid = (confidence > MIN_CONFIDENCE) & local.isfinite().all(-1) & (depth > 0)
        valid = valid & ~mesh_break(points, depth, valid)
        geometries.append(Geometry(points, depth, confidence, valid, K, c2w, rgb))
    return geometries


def keep_confident(geometry: Geometry, percent: float) -> Geometry:
    """`valid` becomes the most confident `percent` of the pixels with a depth (and all that tie with the last of them);
    their confidence is raised to pass the threshold."""
    candidates = geometry.has_depth() & geometry.points.isfinite().all(-1) & geometry.confidence.isfinite()
    if not candidates.any():
        candidates = geometry.has_depth()
    scores = torch.where(candidates, geometry.confidence.nan_to_num(nan=-torch.inf), -torch.inf)
    keep = max(1, math.ceil(candidates.sum().item() * percent / 100))
    valid = candidates & (scores >= scores.flatten().sort(descending=True).values[keep - 1])
    confidence = torch.where(valid, scores.clamp(min=MIN_CONFIDENCE + 0.001), geometry.confidence)
    return replace(geometry, valid=valid, confidence=confidence)


def ensure_valid(geometry: Geometry) -> Geometry:
    """The geometry itself, or with the most confident 5 % valid if nothing valid has a depth."""
    return geometry if (geometry.valid & geometry.has_depth()).any() else keep_confident(geometry, 5)


def median_depth(geometry: Geometry) -> float:
    """Of the valid pixels with a depth; of all with a depth if there are none; 1 without any depth."""
    mask = geometry.valid & geometry.has_depth()
    values = geometry.depth[mask if mask.any() else geometry.has_depth()].sort().values
    return ((values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2).item() if len(values) else 1.0


def max_pool(x: Tensor, size: int) -> Tensor:
    """Maximum over a size x size window of [H,W], ignoring the outside."""
    rows = F.max_pool2d(x[None, None], (size, 1), 1, (size // 2, 0))
    return F.max_pool2d(rows, (1, size), 1, (0, size // 2))[0, 0]


def shift(x: Tensor, dy: int, dx: int) -> Tensor:
    """The neighbour at (y + dy, x + dx) of every pixel of [...,H,W]; 0 outside."""
    height, width = x.shape[-2:]
    return F.pad(x, (1, 1, 1, 1))[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]


def unit(x: Tensor) -> Tensor:
    """Vectors [3,H,W] of length 1; 0 stays. By hand: torch's norm over the first dimension takes 100 times as long."""
    return x / (x.square().sum(0).sqrt() + 1e-12)


def surface_normals(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normals [3,H,W] from the four triangles around each pixel, and where there is one [H,W]; elsewhere 0."""
    center = rearrange(points, "h w c -> c h w")
    usable = valid & points.isfinite().all(-1)
    around = [(-1, 0), (0, -1), (1, 0), (0, 1), (-1, 0)]  # up, left, down, right, up
    arms = [(shift(center, *step) - center, shift(usable, *step) & usable) for step in around]
    total, known = torch.zeros_like(center), torch.zeros_like(usable)
    for (first, first_usable), (second, second_usable) in pairwise(arms):
        triangle = first_usable & second_usable
        total += torch.where(triangle, unit(torch.linalg.cross(first, second, dim=0)), 0)
        known |= triangle
    return unit(total), known


def depth_edges(depth: Tensor, valid: Tensor, rtol: float) -> Tensor:
    """Where the depth varies by more than `rtol` of the centre within 3x3 valid pixels."""
    known = valid & ~depth.isnan()
    spread = max_pool(torch.where(known, depth, -torch.inf), 3) + max_pool(torch.where(known, -depth, -torch.inf), 3)
    return valid & (spread / depth > rtol)


def normal_edges(normals: Tensor, known: Tensor, degrees: float) -> Tensor:
    """Where, within 3x3 pixels, one's normal turns by more than `degrees` to a 3x3 neighbour's.

    Kept for parity: a pixel without a normal has the zero vector, at 90 degrees to every neighbour that has one.
    """
    cosine = torch.ones_like(normals[0])
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            dot = (normals * shift(normals, dy, dx)).sum(0)
            cosine = torch.where(shift(known, dy, dx), torch.minimum(cosine, dot), cosine)
    angle = max_pool(cosine.clamp(-1, 1).arccos(), 3)
    return known & (angle > math.radians(degrees))


def mesh_break(points: Tensor, depth: Tensor, valid: Tensor, rtol: float = 0.03, degrees: float = 5.0) -> Tensor:
    """Valid pixels on a depth edge that is also a normal edge: the surface is torn there. [H,W] bool."""
    normals, known = surface_normals(points, valid)
    return depth_edges(depth, valid, rtol) & normal_edges(normals, known, degrees)
