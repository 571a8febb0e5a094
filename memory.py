"""The camera of a rollout: geometry that is given and stays (`Camera`), or keyframes estimated anew (`Memory`).

The first chunk's warp is the first frame's alone (render.py). Before a later chunk Pi3X sees the first frame and the
last one of every chunk so far together (or as many of them as `keyframes` says). Their focal lengths are smoothed, the
scale is aligned with the first estimate and all are splatted into the new views, the latest densely; behind them lies a
panorama of the keyframes' far pixels.
Both classes are the state of one rollout, the rest are plain functions. Reproduced: the official pipeline's memory,
also switched off (`keyframes=1`). Beyond it: a known lens, and zoom (officially target intrinsics are ignored with
keyframes); where the keyframes stand, told to Pi3X; and keyframes chosen by what the coming views will see.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from files.media import quantize, to_u8
from geometry import coverage
from geometry.camera import hold, normalize, scale_translation
from geometry.known import Known
from geometry.pi3x import Pi3X
from geometry.surface import (
    MIN_CONFIDENCE,
    Geometry,
    NoSurface,
    ensure_valid,
    estimate,
    median_depth,
    resize,
    stretch,
    transform,
    unproject,
    with_lens,
    zoomed,
)
from render import RenderSettings, Samples, Warp, collect, render, render_samples, surface_samples

ATLAS = (384, 768)  # rows from straight up to straight down, columns all around
CHOICES = ("latest", "covering")  # which keyframes are kept
AHEAD = [16, 32]  # frames of the coming chunk that the covering ones are chosen for
NOWHERE = torch.full((4, 4), torch.nan)  # where a camera stands that nobody knows


def smooth_focals(geometries: list[Geometry], zooms: list[Tensor] | None = None) -> list[Geometry]:
    """Focal lengths kept near the first keyframe's and averaged over time, the principal point in the centre; but for
    the `zooms` [2] that the path gives them.

    Kept for parity: the points stay, so that the latest keyframe seen from its own camera is not quite itself.
    """
    first = [max(abs(geometries[0].K[axis, axis].item()), 1e-6) for axis in (0, 1)]
    smooth, result = None, []
    for geometry, (x, y) in zip(geometries, torch.stack(zooms).tolist() if zooms else [[1, 1]] * len(geometries)):
        height, width = geometry.depth.shape
        ratios = [abs(geometry.K[axis, axis].item()) / first[axis] / zoom for axis, zoom in ((0, x), (1, y))]
        clamped = [min(max(ratio, 0.65), 1.35) * reference for ratio, reference in zip(ratios, first)]
        smooth = [0.5 * new + 0.5 * old for new, old in zip(clamped, smooth)] if smooth else clamped
        K = torch.tensor([[smooth[0] * x, 0, (width - 1) / 2], [0, smooth[1] * y, (height - 1) / 2], [0, 0, 1]])
        result.append(replace(geometry, K=K))
    return result


def depth_ratio(geometry: Geometry, reference: Geometry) -> float:
    """How much deeper `reference` is, another estimate of the same picture: a trimmed median, 1 without overlap."""
    size = geometry.size
    if reference.size != size:
        valid = F.interpolate(reference.valid[None, None].float(), size)[0, 0] > 0.5
        reference = replace(reference, depth=resize(reference.depth[None, None], size)[0, 0], valid=valid)
    known = geometry.valid & geometry.has_depth() & reference.valid & reference.has_depth()
    ratios = reference.depth[known].cpu().double() / geometry.depth[known].cpu()  # not every device has doubles
    if len(ratios) == 0:
        return 1.0
    if len(ratios) >= 32:
        low, high = ratios.quantile(ratios.new_tensor([0.1, 0.9]))
        ratios = ratios[(ratios >= low) & (ratios <= high)]
    return min(max(ratios.quantile(0.5).item(), 0.1), 10.0)


def align_scale(geometries: list[Geometry], reference: Geometry) -> list[Geometry]:
    """All keyframes in the unit of `reference`, an earlier estimate of the first one."""
    scale = depth_ratio(geometries[0], reference)
    return [replace(geometry, points=geometry.points * scale, depth=geometry.depth * scale,
                    c2w=scale_translation(geometry.c2w[None], scale)[0]) for geometry in geometries]


@dataclass(frozen=True)
class Atlas:
    """A panorama at infinity: rows are pitch, columns yaw."""

    rgb: Tensor  # [H, W, 3] uint8
    known: Tensor  # [H, W] bool


def background_mask(geometry: Geometry) -> Tensor:
    """[H,W] bool: what is unknown, uncertain or far; the whole picture if that is less than a tenth of it.

    Kept for parity: outlines of the foreground, which the edge filter made invalid, count as background.
    """
    known = geometry.valid & geometry.has_depth()
    mask = ~geometry.valid | (geometry.confidence < MIN_CONFIDENCE)
    depths = geometry.depth[known]
    if len(depths) >= 128:
        mask = mask | (known & (geometry.depth >= depths.quantile(0.65)))
    enough = mask.sum() >= max(1, int(0.1 * mask.numel()))
    return mask | ~enough


def pixel_rays(c2w: Tensor, K: Tensor, size: tuple[int, int], device: torch.device) -> Tensor:
    """Unit directions in the world [H,W,3] of all pixels of a camera."""
    turn = torch.eye(4)
    local = F.normalize(unproject(torch.ones(size, device=device), K, turn), dim=-1)
    turn[:3, :3] = c2w[:3, :3]
    return F.normalize(torch.stack(transform(turn, *local.unbind(-1)), dim=-1), dim=-1)


def texels(rays: Tensor) -> Tensor:
    """Flat indices [...] into an atlas of unit directions [..., 3]."""
    x, y, z = rays.unbind(-1)
    height, width = ATLAS
    yaw, pitch = torch.atan2(x, z), torch.atan2(y, (x * x + z * z).sqrt())
    columns = ((yaw + math.pi) * (width / (2 * math.pi))).floor().long() % width
    rows = ((pitch + math.pi / 2) * (height / math.pi)).floor().long().clamp(0, height - 1)
    return rows * width + columns


def atlas_colors(geometries: list[Geometry]) -> Atlas:
    """Mean colour of all keyframes' background pixels in each texel."""
    total = torch.zeros(math.prod(ATLAS), 4, dtype=torch.int32, device=geometries[0].depth.device)  # r, g, b, count
    for geometry in geometries:
        mask = background_mask(geometry)
        rays = pixel_rays(geometry.c2w, geometry.K, geometry.size, mask.device)
        values = F.pad(geometry.rgb[mask].int(), (0, 1), value=1)
        total.index_add_(0, texels(rays[mask]), values)  # whole numbers: exact in every order
    rgb, count = total.cpu().double().view(*ATLAS, 4).split([3, 1], dim=-1)
    colors = (rgb / count.clamp(min=1)).round().to(torch.uint8)
    return Atlas(colors.to(total.device), (count[..., 0] > 0).to(total.device))


def fill_rows(atlas: Atlas) -> Atlas:
    """Unknown texels take the nearest known one in their row, at most 3 away, also around the back; the left one of two
    as near."""
    rgb, known = atlas.rgb, atlas.known
    for step in (step for distance in (1, 2, 3) for step in (distance, -distance)):
        take = atlas.known.roll(step, dims=1) & ~known
        rgb = torch.where(take[..., None], atlas.rgb.roll(step, dims=1), rgb)
        known = known | take
    return Atlas(rgb, known)


def look_up(atlas: Atlas, c2w: Tensor, K: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What a camera sees of the atlas, wherever it stands: rgb [H,W,3] uint8 and where it is known [H,W] bool."""
    index = texels(pixel_rays(c2w, K, size, atlas.rgb.device))
    return atlas.rgb.flatten(0, 1)[index], atlas.known.flatten()[index]


def keyframe_samples(geometries: list[Geometry], settings: RenderSettings) -> Samples:
    """Surface samples of all keyframes, oldest first: one a quad, of the latest as many as the settings say.

    An earlier keyframe without any surface is skipped; the latest raises NoSurface. Kept for parity: the mesh is torn
    again at edges of what `valid` left, and holes are later filled as if all source positions were the latest's.
    """
    sparse, parts = replace(settings, samples=1), []
    for geometry in geometries[:-1]:
        try:
            parts.append(surface_samples(geometry, sparse, top_fill=False))
        except NoSurface:
            continue
    parts.append(surface_samples(geometries[-1], settings, top_fill=False))
    return Samples(torch.cat([part.xyz for part in parts], dim=1), torch.cat([part.rgb for part in parts]),
                   torch.cat([part.xy for part in parts]))


def render_keyframes(geometries: list[Geometry], poses: Tensor, settings: RenderSettings = RenderSettings(),
                     zoom: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Frame by frame, as `render_frames`: rgb [H,W,3] uint8 and visible [H,W] bool.

    `poses` [T,4,4] are relative to the latest keyframe, whose picture is frame 0 and whose K is used throughout, but
    for a `zoom` [T,2] of its focal lengths. Kept for parity: what only the atlas shows, a guess at infinity, counts as
    visible.
    """
    latest, atlas = geometries[-1], fill_rows(atlas_colors(geometries))
    intrinsics = zoomed(latest.K, len(poses), zoom)
    return render_samples(keyframe_samples(geometries, settings), latest, poses, settings, intrinsics,
                          lambda c2w, K: look_up(atlas, c2w, K, latest.size))


class Camera:
    """The camera of one rollout, whose geometry is given and stays: the first frame's, for all chunks.

    `Memory` is the other kind, which estimates geometry anew from what has been generated.
    """

    def __init__(self, geometry: Geometry, size: tuple[int, int], unit: float | None = None,
                 settings: RenderSettings = RenderSettings()):
        """unit: length of a path's unit in the geometry's; officially a tenth of the first frame's median depth."""
        self.geometry, self.size, self.settings = geometry, size, settings
        self.unit = 0.1 * median_depth(geometry) if unit is None else unit
        self.first: Tensor | None = None  # pose of the picture's own camera: the first of all

    @property
    def begun(self) -> bool:
        return self.first is not None

    def warp(self, poses: Tensor, zoom: Tensor | None = None) -> Warp:
        """The chunk's views from `poses` [33, 4, 4], camera-to-world, with focal lengths that are `zoom` [33, 2] times
        the picture's own; if there are fewer, the last one holds."""
        poses, zoom = scale_translation(hold(poses), self.unit), None if zoom is None else hold(zoom)
        later = self.first is not None
        if self.first is None:
            self.first = poses[:1]
        else:  # the renderer's first frame is always the picture itself: it is put in front and taken off again
            poses = torch.cat([self.first, poses])
            zoom = None if zoom is None else torch.cat([torch.ones(1, 2), zoom])
        intrinsics = None if zoom is None else zoomed(self.geometry.K, len(poses), zoom)
        warp = render(self.geometry, normalize(poses, len(poses)), self.size, self.settings, intrinsics)
        return Warp(warp.frames[:, :, later:], warp.visible[:, :, later:])

    def remember(self, frame: Tensor) -> None:
        """The last frame of a chunk teaches nothing."""

    def state(self) -> dict[str, Tensor]:
        return {} if self.first is None else {"first": self.first}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`, with the same geometry."""
        self.first = state.get("first")


class Memory:
    """The camera of one rollout. For each chunk: `warp` along its poses, then `remember` the last frame made of it."""

    def __init__(self, load: Callable[[], Pi3X], image: Tensor, size: tuple[int, int],
                 settings: RenderSettings = RenderSettings(), keyframes: int | None = None, unit: float | None = None,
                 limit: int | None = None, K: Tensor | None = None, known_poses: bool = False,
                 choice: str = "covering"):
        """Estimates the geometry of `image` [1,3,H,W] in [-1,1]. Warps have the video `size` (H, W).

        load: gives the network, whenever it is needed, and may read it anew: nothing here holds on to it.
        keyframes: how many pictures are estimated together. None is the official memory, which grows with every chunk;
            1 is its "off", the latest picture alone, whose scale nothing aligns.
        unit: metres in a unit of the poses; officially a tenth of the image's median depth.
        limit: most pixels of a picture that the network sees, as in `estimate`.
        K: of the camera [3,3] at the video size, if it is known; else the network estimates it.
        known_poses: the network, which must have the tensors for it, is told where the keyframes stand on the path.
        choice: which ones, if there are more: the first and the "latest"; or, "covering", the first, the latest and of
            all others, which are kept, those that cover most of the coming views.
        """
        if keyframes is not None and keyframes < 1:
            raise ValueError(f"keyframes {keyframes}: expected at least 1, or None for all")
        self.load, self.size, self.settings = load, size, settings
        self.keyframes, self.limit, self.K = keyframes, limit, K
        self.known_poses, self.covering = known_poses, choice == "covering" and (keyframes or 0) > 2
        self.images, self.zooms = [image], [torch.ones(2)]  # zooms: focal lengths over the first picture's
        self.poses = [NOWHERE]  # of the pictures, on the path and in its unit
        self.unit = 1.0 if unit is None else unit
        self.reference = ensure_valid(self.look([0])[0])
        self.points = [coverage.thin(self.reference, NOWHERE)]  # of the pictures, from where they stand; nan: not known
        if unit is None:
            self.unit = 0.1 * median_depth(self.reference)
        self.chunk = 0
        self.ends: Tensor | None = None  # of the latest warp: poses of the picture that it begins with, and of its last
        self.end_zoom = torch.ones(2)

    @property
    def begun(self) -> bool:
        return self.chunk > 0 or self.ends is not None

    def stand(self, chosen: list[int]) -> Known | None:
        """What the network is told of the chosen keyframes' cameras, if it is told: in the unit of `reference`."""
        if not self.known_poses:
            return None
        c2w = torch.stack([self.poses[index] for index in chosen])
        there = ~c2w.isnan().any(2).any(1)
        some = next(iter(c2w[there]), torch.eye(4))  # stands for what is not known, and is masked
        c2w = scale_translation(c2w.where(there[:, None, None], some), self.unit)
        return Known(c2w=c2w[None].to(self.images[0].device), has_pose=there[None])

    def look(self, chosen: list[int]) -> list[Geometry]:
        """The chosen keyframes, estimated together, with the known camera if there is one."""
        geometries = estimate(self.load(), [self.images[index] for index in chosen], self.limit, self.stand(chosen))
        if self.K is None:
            return geometries
        Ks = [stretch(zoomed(self.K, 1, self.zooms[index][None])[0], self.size, geometry.size)
              for geometry, index in zip(geometries, chosen)]
        return [with_lens(geometry, K) for geometry, K in zip(geometries, Ks)]

    def choose(self, begin: Tensor, poses: Tensor, zoom: Tensor | None) -> list[int]:
        """The keyframes to be estimated for the coming views `poses` [33,4,4]; the latest one stands at `begin`."""
        if self.keyframes is None or len(self.images) <= self.keyframes:
            return [*range(len(self.images))]
        views = scale_translation(torch.stack([begin, *poses[AHEAD]]), self.unit)
        latest = self.zooms[-1]
        zooms = torch.stack([latest, *(latest.expand(len(AHEAD), 2) if zoom is None else zoom[AHEAD])])
        Ks = zoomed(self.reference.K, len(views), zooms)
        return coverage.choose(torch.stack(self.points), views, Ks, self.reference.size, self.keyframes)

    def warp(self, poses: Tensor, zoom: Tensor | None = None) -> Warp:
        """The chunk's views from `poses` [33,4,4], camera-to-world, with focal lengths that are `zoom` [33,2] times the
        first picture's; if there are fewer, the last one holds.

        33 frames at first; later 34, which begin with the latest picture, at the pose where the last warp ended.
        Raises ValueError if the latest picture has no surface.
        """
        poses, zoom = hold(poses), None if zoom is None else hold(zoom)
        latest, known = self.zooms[-1], not self.poses[-1].isnan().any()
        self.end_zoom = latest if zoom is None else zoom[-1]
        self.ends = torch.stack([self.poses[-1] if known else poses[0], poses[-1]])
        chosen = self.choose(self.ends[0], poses, zoom)
        if known:
            poses = torch.cat([self.ends[:1], poses])
            zoom = None if zoom is None else torch.cat([latest[None], zoom])
        poses = normalize(scale_translation(poses, self.unit), len(poses))
        zoom = None if zoom is None else zoom / latest
        geometries = [self.reference] if self.chunk == 0 else self.look(chosen)
        if self.chunk == 0 or self.keyframes == 1:
            alone = ensure_valid(geometries[0])
            intrinsics = None if zoom is None else zoomed(alone.K, len(poses), zoom)
            return render(alone, poses, self.size, self.settings, intrinsics)
        zooms = [self.zooms[index] for index in chosen]
        geometries = smooth_focals(geometries, zooms) if self.K is None else geometries
        geometries = [ensure_valid(geometry) for geometry in align_scale(geometries, self.reference)]
        self.chart(chosen, geometries)
        return collect(render_keyframes(geometries, poses, self.settings, zoom), self.size)

    def chart(self, chosen: list[int], geometries: list[Geometry]) -> None:
        """Keep some points of the chosen keyframes, as they are now seen, for later choices."""
        if self.covering and self.ends is not None:
            poses = scale_translation(torch.stack([*self.poses[:-1], self.ends[0]]), self.unit)
            for index, geometry in zip(chosen, geometries):
                self.points[index] = coverage.thin(geometry, poses[index])

    def remember(self, frame: Tensor) -> None:
        """A chunk is decoded: its last `frame` [1,3,H,W] in [-1,1] is the latest keyframe now, rounded to 8 bits. After
        a chunk without a warp the camera is still where the last warp ended, and how it came there is not known."""
        if self.ends is None:
            latest, self.poses = self.poses[-1], [NOWHERE] * len(self.poses)
            self.points = [torch.full_like(points, torch.nan) for points in self.points]
        else:
            self.poses[-1], latest = self.ends
        self.poses.append(latest)
        self.images.append(quantize(frame.to(self.images[0].device)))
        self.zooms.append(self.end_zoom)
        self.points.append(torch.full_like(self.points[0], torch.nan))
        if self.keyframes is not None and len(self.images) > self.keyframes and not self.covering:
            oldest = min(1, self.keyframes - 1)  # but the first, which goes if only one may stay
            for kept in (self.images, self.zooms, self.poses, self.points):
                del kept[oldest]
        self.ends = None
        self.chunk += 1

    def state(self) -> dict[str, Tensor]:
        """All that the next chunks depend on."""
        reference = {f"reference.{name}": value for name, value in vars(self.reference).items()}
        images = {f"image.{index}": to_u8(image / 2 + 0.5) if index else image  # all but the first have 8 bits anyway
                  for index, image in enumerate(self.images)}
        numbers = {"unit": torch.tensor(self.unit, dtype=torch.float64), "chunk": torch.tensor(self.chunk)}
        kept = {"zooms": torch.stack([*self.zooms, self.end_zoom]), "poses": torch.stack(self.poses),
                "points": torch.stack(self.points)}
        return reference | images | numbers | kept | ({} if self.ends is None else {"ends": self.ends})

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`; the next warps are equal to those of the Memory that it was."""
        device = self.images[0].device
        self.reference = Geometry(**{name: state[f"reference.{name}"].to(value.device)
                                     for name, value in vars(self.reference).items()})
        count = sum(key.startswith("image.") for key in state)
        images = [state[f"image.{index}"].to(device) for index in range(count)]
        self.images = [image if image.is_floating_point() else image / 255 * 2 - 1 for image in images]
        self.unit, self.chunk, self.ends = state["unit"].item(), int(state["chunk"]), state.get("ends")
        self.poses, self.points = [*state["poses"]], [*state["points"]]
        *self.zooms, self.end_zoom = state["zooms"].unbind()
