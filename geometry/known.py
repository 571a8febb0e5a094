"""What Pi3X may be told besides its pictures: poses, rays or intrinsics, depth, each for some or all of them.

Lengths are scaled before the network sees them: by the mean depth of a set, or by the mean distance from its first
camera where no depth is given; so their unit does not matter. Reproduced: pi3x.py of yyfz/Pi3, without the random
dropping of its training.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from geometry.camera import inverse

STATIC = 0.02  # cameras that are nearer together than this are not scaled


@dataclass(frozen=True)
class Known:
    """For B sets of N pictures; a mask [B, N] bool says of which pictures a thing is known, None of all.

    Poses are camera-to-world, OpenCV, in any world and unit; they count from two of a set on. Rays are directions of
    any length, and stand before K.
    """

    c2w: Tensor | None = None  # [B, N, 4, 4]
    K: Tensor | None = None  # [B, N, 3, 3] in pixels whose centres are whole numbers
    rays: Tensor | None = None  # [B, N, H, W, 3]
    depth: Tensor | None = None  # [B, N, H, W] z in the unit of the poses, 0 where it is unknown
    has_pose: Tensor | None = None
    has_rays: Tensor | None = None
    has_depth: Tensor | None = None

    def names(self) -> list[str]:
        """Which of the network's conditions these are."""
        there = {"poses": self.c2w, "rays": self.K if self.rays is None else self.rays, "depth": self.depth}
        return [name for name, value in there.items() if value is not None]

    def masks(self, sets: int, count: int, device: torch.device) -> dict[str, Tensor]:
        """[B, N] bool of each condition."""
        named = {"poses": self.has_pose, "rays": self.has_rays, "depth": self.has_depth}
        none = torch.zeros(sets, count, dtype=torch.bool, device=device)
        masks = {name: ~none if mask is None else mask.to(device) for name, mask in named.items()}
        masks = {name: mask if name in self.names() else none for name, mask in masks.items()}
        masks["poses"] = masks["poses"] & (masks["poses"].sum(1, keepdim=True) > 1)  # one pose says nothing
        return masks

    def slopes(self, height: int, width: int) -> Tensor:
        """x / z and y / z of all pixels' rays [B, N, 2, H, W]."""
        if self.rays is not None:
            slopes = self.rays[..., :2] / (self.rays[..., 2:] + 1e-6)  # kept for parity: never quite exact
            return rearrange(slopes, "b n h w c -> b n c h w")
        assert self.K is not None
        rows, columns = (torch.arange(n, device=self.K.device).float() for n in (height, width))
        pixels = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width), torch.ones(height, width)
                              .to(rows)])
        return torch.einsum("bnij,jhw->bnihw", self.K.inverse(), pixels)[:, :, :2]

    def scaled(self, by_depth: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Poses from the first picture's camera, and depths, both of a unit that suits the network; `by_depth` [B] bool
        says which sets have depths that count."""
        unit = torch.ones(len(by_depth), device=by_depth.device)
        if self.depth is not None:
            known = self.depth.where(self.depth > 0, torch.nan).flatten(1)
            unit = known.nanmean(1).nan_to_num(nan=1.0)  # of all pictures, kept for parity, also where it is masked
        depth = None if self.depth is None else self.depth / (unit[:, None, None, None] + 1e-8)
        if self.c2w is None:
            return None, depth
        poses = torch.einsum("bij,bnjk->bnik", inverse(self.c2w[:, 0]), self.c2w)
        poses[..., :3, 3] /= unit[:, None, None]
        distance = poses[:, 1:, :3, 3].norm(dim=-1)
        if distance.shape[1] > 0:
            scaled = ~by_depth & (distance.amax(1) >= STATIC)
            poses[..., :3, 3] /= torch.where(scaled, distance.mean(1) + 1e-8, 1.0)[:, None, None]
        return poses, depth
