"""Scenes of the miniature's world that training never saw, with all that is known of them: the true later frames, exact
warps, and the camera of a result, which is where the known scene would look most like it.

Warps are exact (by the true depth of both frames, with occlusion), or made as `sample.py` does, from geometry that the
small Pi3X sees in the first frame. Their holes are black; what fills them is an option of the rollout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from files.media import from_frames
from geometry.camera import WINDOW, inverse, turn_degrees
from geometry.pi3x import Pi3X
from geometry.surface import ensure_valid, estimate, median_depth, transform, unproject
from mini import world
from mini.world import Clip, make_clip
from render import RenderSettings, Warp, render

NUDGE = torch.tensor([0.02, 0.02, 0.02, 0.06, 0.06, 0.06])  # radians and meters, for derivatives


@dataclass(frozen=True)
class Scene:
    """A chunk's clip of the world, beside what may lead it."""

    clip: Clip
    video: Tensor  # [1, 3, 33, H, W] in [-1, 1], the truth
    warp: Warp  # exact
    estimated: Warp | None  # by a geometry network


def exact_warp(clip: Clip, other: Clip | None = None) -> Warp:
    """Every frame's points looked up in the first frame, or in the frame of the same time of an `other` clip of the
    scene, if that sees them; elsewhere the first frame's mean colour."""
    shown = clip if other is None else other
    video = rearrange(shown.frames, "t h w c -> t c h w") / 127.5 - 1
    mean = video[0].mean((1, 2))[:, None, None]
    height, width = video.shape[-2:]
    frames, masks = [], []
    for time, (depth, c2w) in enumerate(zip(clip.depth, clip.c2w)):
        at = slice(1) if other is None else slice(time, time + 1)
        far = depth.isinf()
        points = unproject(torch.where(far, torch.full_like(depth, 1e4), depth), clip.K, c2w)  # [H, W, 3] world
        x, y, z = transform(inverse(shown.c2w[at])[0], *points.unbind(-1))  # in the camera that sees them
        u, v = clip.K[0, 0] * x / z + clip.K[0, 2], clip.K[1, 1] * y / z + clip.K[1, 2]
        grid = torch.stack([2 * u / (width - 1) - 1, 2 * v / (height - 1) - 1], -1)[None]
        source = F.grid_sample(shown.depth[at, None].clamp(max=1e4), grid, mode="nearest", padding_mode="border",
                               align_corners=True)
        inside = (z > 0) & (u + 0.5 >= 0) & (u + 0.5 <= width) & (v + 0.5 >= 0) & (v + 0.5 <= height)
        mask = inside & ((source[0, 0] / z - 1).abs() < 0.04)
        color = F.grid_sample(video[at], grid, padding_mode="border", align_corners=True)[0]
        frames.append(torch.where(mask, color, mean))
        masks.append(mask)
    return Warp(torch.stack(frames, 1)[None], torch.stack(masks)[None, None].float())


def suits(seed: int, size: tuple[int, int]) -> bool:
    """Whether a scene's camera moves, shows enough of the first frame to the end, and nothing else moves."""
    clip = make_clip(seed, WINDOW, size)
    return ";" not in clip.caption and 0.3 < exact_warp(clip).visible[0, 0, -1].mean().item() < 0.85


def scene_of(clip: Clip, pi3x: Pi3X | None = None, settings: RenderSettings = RenderSettings()) -> Scene:
    """A clip with its exact warp, and that of the geometry which `pi3x` estimates."""
    video = from_frames(clip.frames)
    estimated = None if pi3x is None else estimated_warp(clip, video, pi3x, settings)
    return Scene(clip, video, exact_warp(clip), estimated)


def estimated_warp(clip: Clip, video: Tensor, pi3x: Pi3X, settings: RenderSettings) -> Warp:
    geometry = ensure_valid(estimate(pi3x, [video[:, :, 0]])[0])
    known = clip.depth[0][clip.depth[0].isfinite()].median()
    poses = inverse(clip.c2w[:1]) @ clip.c2w
    poses[:, :3, 3] *= median_depth(geometry) / known  # the path in units of depth, as users give it
    return render(geometry, poses, (video.shape[-2], video.shape[-1]), settings)


def ghost(frames: np.ndarray, first: np.ndarray, visible: np.ndarray) -> float:
    """The share of what is not `visible` [T, H, W] in `frames` [T, H, W, 3] uint8 that is near the mean colour of the
    first frame, which officially fills holes."""
    near = (np.abs(frames - first.astype(np.float32).mean((0, 1))) < 15.3).all(-1)
    return float(near[~visible].mean())


def twist(motion: Tensor) -> Tensor:
    """Small motions [..., 6] (turns in radians, then shifts) as matrices [..., 4, 4]."""
    x, y, z = motion[..., :3].unbind(-1)
    zero = torch.zeros_like(x)
    turn = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    return torch.linalg.matrix_exp(F.pad(torch.cat([turn, motion[..., 3:, None]], -1), (0, 0, 0, 1)))


def find_camera(picture: Tensor, starts: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """The pose [4,4] from which `draw` (poses [N,4,4] -> pictures [N, ...]) gives most nearly `picture`: damped, robust
    Gauss-Newton from each of `starts` [S,4,4], best result."""
    best = []
    for pose in starts:
        shown, damping = draw(pose[None])[0], 1e-3
        error = (picture - shown).abs().mean()
        for _ in range(10):
            slopes = (draw(pose @ twist(torch.diag(NUDGE))) - shown).flatten(1) / NUDGE[:, None]  # [6, P]
            wrong = (picture - shown).flatten()
            weighted = slopes / (wrong.abs() + 0.05)  # what cannot be explained counts less
            normal = weighted @ slopes.T
            step = torch.linalg.solve(normal + damping * normal.diag().diag() + 1e-6 * torch.eye(6), weighted @ wrong)
            tried = pose @ twist(step)
            seen = draw(tried[None])[0]
            left = (picture - seen).abs().mean()
            if left > 0.999 * error and damping > 0.1:
                break
            if left < error:
                pose, shown, error, damping = tried, seen, left, damping / 4
            else:
                damping *= 16
        best.append((error.item(), pose))
    return min(best, key=lambda each: each[0])[1]


def camera_error(frames: Tensor, scene: world.Scene, clip: Clip, at: list[int]) -> dict[str, float]:
    """Of frames [1, 3, T, H, W] in [-1, 1]: degrees (`turn`) and meters (`shift`) between the camera of the true `clip`
    and the one from which the scene would look like them, means of the frames `at`; searched from the true one, the
    first frame's, and between."""
    height, width = frames.shape[-2:]

    def soft(pictures: Tensor) -> Tensor:  # blurred, so that slopes reach further
        return F.avg_pool2d(pictures, 5, 2, 2, count_include_pad=False)

    def draw(poses: Tensor) -> Tensor:
        pictures = world.render(scene, poses, clip.K, (height, width), 1)[0]
        return soft(rearrange(pictures, "n h w c -> n c h w") / 127.5 - 1)

    turns, shifts = [], []
    for index in at:
        true, first = clip.c2w[index], clip.c2w[0]
        way = torch.linalg.inv(first) @ true
        half = first @ twist(0.5 * torch.stack([way[2, 1], way[0, 2], way[1, 0], *way[:3, 3]]))
        found = find_camera(soft(frames[:, :, index])[0], torch.stack([true, half, first]), draw)
        turns.append(turn_degrees(true[None, :3, :3], found[None, :3, :3]).item())
        shifts.append((found - true)[:3, 3].norm().item())
    return {"turn": float(np.mean(turns)), "shift": float(np.mean(shifts))}
