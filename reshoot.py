"""A clip shot again along another path: what its frames show, not one picture, is what the warps show.

Frame t of a warp is frame t of the clip on its own geometry, seen from where the path then is, so that what moves in
the clip moves in the result. All else is as for a picture (wah.py). Ours, not the paper's. Also here: the path that a
clip's own camera goes, found by Pi3X.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from files.media import read_frames, read_rate, resize_frame
from geometry.camera import WINDOW, CameraPath, hold, inverse, normalize, product, scale_translation
from geometry.pi3x import Pi3X
from geometry.scene import see
from geometry.surface import (
    PIXEL_LIMIT,
    Geometry,
    ensure_valid,
    estimate,
    geometry_size,
    stretch,
    with_lens,
    zoomed,
)
from memory import Camera
from render import RenderSettings, Warp, collect, render_frames

RELATIVE = ("clip", "first")


class Reshoot(Camera):
    """The camera of one rollout through a clip, whose geometry is known in every frame; the last one stays."""

    def __init__(self, geometries: Sequence[Geometry], size: tuple[int, int], unit: float | None = None,
                 settings: RenderSettings = RenderSettings(), relative: str = "clip",
                 device: torch.device | str = "cpu"):
        """relative: poses are relative to the clip's own camera at the same time ("clip"), or to that of its first
        frame ("first"). The geometries may lie elsewhere; they are rendered on `device`, one by one."""
        super().__init__(geometries[0], size, unit, settings)
        self.geometries, self.relative, self.device = geometries, relative, device
        self.c2w = torch.stack([geometry.c2w.cpu() for geometry in geometries])
        self.frame = 0  # of the clip, with which the next chunk begins

    def own(self, path: Tensor, start: int) -> tuple[list[int], Tensor]:
        """Which frames of the clip a path [T,4,4] in the geometry's unit shows from `start` on, and the poses relative
        to their own cameras."""
        index = torch.arange(start, start + len(path)).clamp(max=len(self.geometries) - 1)
        if self.relative == "first":
            path = product(inverse(self.c2w[index]), product(self.c2w[:1], path))
        return index.tolist(), path

    def world(self, poses: Tensor) -> Tensor:
        """Where the result's camera is, if it follows `poses` [T,4,4] from the first frame on, in their unit."""
        index, path = self.own(normalize(scale_translation(poses, self.unit), len(poses)), 0)
        return scale_translation(product(self.c2w[index], path), 1 / self.unit)

    def warp(self, poses: Tensor, zoom: Tensor | None = None) -> Warp:
        """The chunk's views from `poses` [33,4,4], with focal lengths that are `zoom` [33,2] times the clip's; if there
        are fewer, the last one holds."""
        poses, zoom = scale_translation(hold(poses), self.unit), torch.ones(1, 2) if zoom is None else zoom
        self.first = poses[:1] if self.first is None else self.first
        path = normalize(torch.cat([self.first, poses]), 1 + WINDOW)[1:]
        frames = []
        for index, pose, factors in zip(*self.own(path, self.frame), hold(zoom)):
            geometry = self.geometries[index].to(self.device)
            views = torch.stack([torch.eye(4), pose])[: 1 + (self.frame + len(frames) > 0)]  # the first is the picture
            lenses = zoomed(geometry.K, len(views), torch.stack([torch.ones(2), factors])[: len(views)])
            *_, shown = render_frames(geometry, views, self.settings, lenses)
            frames.append(shown)
        return collect(iter(frames), self.size)

    def remember(self, frame: Tensor) -> None:
        self.frame += WINDOW

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"frame": torch.tensor(self.frame)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.frame = int(state.get("frame", 0))


def estimate_frames(network: Pi3X, images: Sequence[Tensor], together: bool, limit: int | None = None,
                    K: Tensor | None = None) -> list[Geometry]:
    """The geometry of each of `images` [1,3,H,W] in [-1,1], on the CPU, with one lens for all: K [3,3] at their size,
    or the mean of what the network finds. Not `together` is for a network that does not know how cameras stand to each
    other: each picture by itself, and the camera is taken to stand."""
    if together:
        geometries = estimate(network, images, limit)
    else:
        alone = [estimate(network, [image], limit)[0] for image in images]
        geometries = [replace(geometry, c2w=torch.eye(4)) for geometry in alone]
    height, width = images[0].shape[-2:]
    mean = torch.stack([geometry.K for geometry in geometries]).mean(0)
    lens = mean if K is None else stretch(K, (height, width), geometries[0].size)
    return [ensure_valid(with_lens(geometry, lens)).to("cpu") for geometry in geometries]


def filmed_path(network: Pi3X, clip: Path, limit: int | None = None) -> tuple[CameraPath, float]:
    """The path of a clip's camera (`Seen.path`), and the mean confidence, 0 to 1."""
    frames = [resize_frame(frame, geometry_size(frame.shape[0], frame.shape[1], limit or PIXEL_LIMIT))
              for frame in read_frames(clip)]  # small at once: those of a large clip would not fit in memory
    if len(frames) < 2:
        raise ValueError(f"{clip}: 1 frame, expected at least 2 of a clip whose camera is a path")
    seen = see(network, np.stack(frames), limit)
    return CameraPath(seen.path(), read_rate(clip)), seen.sure
