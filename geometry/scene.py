"""A picture and a path brought together: the path from files, words or a clip, the picture's lens, the path's unit.

What the user says counts before what the path's file says, and that before what the depth's file says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from files.arrays import Arrays
from files.depth import load_depth
from files.media import from_frames
from geometry.camera import CameraPath, moves, normalize, resolve_lens, scale_translation, square_lens, unit_length
from geometry.from_text import KEYS
from geometry.paths import load_path
from geometry.pi3x import Pi3X
from geometry.recording import pinhole_of
from geometry.surface import PIXEL_LIMIT, Geometry, crop_lens, ensure_valid, estimate, median_depth, place


def read_path(poses: Path | None, words: str | None) -> CameraPath:
    """From a file or a folder, or from words: moves, or keys in another program's dialect ("sana:w-80")."""
    if words is None and poses is not None:
        return load_path(poses)
    dialect, colon, _ = str(words).partition(":")
    if colon and dialect not in KEYS:
        raise ValueError(f"--move {words!r}: keys of {dialect!r}, expected moves as in 'forward 1', or keys of"
                         f" {' or '.join(KEYS)}")
    return load_path(str(words)) if colon else moves(str(words))


@dataclass(frozen=True)
class Seen:
    """The camera of a clip as Pi3X sees it."""

    c2w: Tensor  # [T, 4, 4] in the network's world and unit
    depth: float  # median of the first frame
    sure: float  # mean confidence, 0 to 1

    def path(self) -> Tensor:
        """From the first frame on, in tenths of its median depth."""
        return scale_translation(normalize(self.c2w, len(self.c2w)), 1 / unit_length("depth", self.depth))


def see(network: Pi3X, frames: np.ndarray, limit: int | None = None) -> Seen:
    """The camera of frames [T,H,W,3] uint8, all of them seen together; `limit` as for `estimate`."""
    geometries = estimate(network, from_frames(frames).unbind(2), limit)
    sure = torch.stack([geometry.confidence.mean() for geometry in geometries]).mean().item()
    c2w = torch.stack([geometry.c2w for geometry in geometries])
    return Seen(c2w, median_depth(ensure_valid(geometries[0])), sure)


def known_lens(picture: Image, path: CameraPath, size: tuple[int, int],
               fov: tuple[float, ...] | None) -> tuple[Tensor | None, str]:
    """K [3,3] at the video `size` if the user or the path says it, and in words."""
    if fov is None and path.lens is None:
        return None, ""
    lens, words = resolve_lens(path, picture.width, picture.height, fov)
    return crop_lens(lens, picture, size), f", {words}"


def depth_lens(path: Path, size: tuple[int, int]) -> dict:
    """`lens` and `size` of a CameraPath, where an archive states them beside its depth: `fov` (horizontal degrees),
    `focallength_px` of the map's `size` [h,w], or `intrinsics` in its pixels or in shares."""
    with open(path, "rb") as file:
        arrays = Arrays(path) if file.read(2) == b"PK" else {}
    height, width = size
    if "fov" in arrays and arrays["fov"].size == 1:
        return square_lens(arrays["fov"].item())
    if "focallength_px" in arrays:
        focal = float(arrays["focallength_px"].flat[0])
        return {"lens": (focal, focal, np.nan, np.nan), "size": (width, height)}
    if "intrinsics" in arrays:
        fx, fy, cx, cy = pinhole_of(arrays["intrinsics"], str(path)).reshape(-1, 4)[0].tolist()
        if 0 < cx < 1 and 0 < cy < 1:
            fx, fy, cx, cy = fx * width, fy * height, cx * width, cy * height
        if min(fx, fy, cx, cy) > 1:
            return {"lens": (fx, fy, cx, cy), "size": (width, height)}
    return {}


def given_scene(picture: Image, path: CameraPath, depth: Path | None, size: tuple[int, int],
                fov: tuple[float, ...] | None = None, inverse: bool = False, unit: str | None = None,
                device: torch.device | str = "cpu", limit: int = PIXEL_LIMIT) -> tuple[Tensor, Geometry, float, str]:
    """A picture on its depth map, or without one on a plane: the image [1,3,H,W], its geometry, the length of the
    path's unit, and in words where it all comes from. Raises ValueError naming what doesn't fit."""
    values = None if depth is None else load_depth(depth, inverse)
    if path.lens is None and depth is not None and values is not None:
        path = replace(path, **depth_lens(depth, (values.shape[0], values.shape[1])))
    lens, words = resolve_lens(path, picture.width, picture.height, fov)
    try:
        image, geometry = place(picture, values, lens, size, device, limit)
    except ValueError as error:
        raise ValueError(f"{depth}: {error}") from None
    source = depth or "neither Pi3X nor --depth, so the picture stands on a plane at depth 1"
    return image, geometry, choose_unit(unit or path.unit, geometry, values), f"{source}, {words}"


def choose_unit(unit: str, geometry: Geometry, depth: Tensor | None = None) -> float:
    """Length of a path's unit in the geometry's. Meters are refused beside a depth map of large whole numbers."""
    median = median_depth(geometry)
    if unit == "meter" and depth is not None and median > 200 and bool((depth == depth.round()).all()):
        raise ValueError(f"unit meter: the depth map has whole numbers around {median:.4g}, which are no meters; for"
                         " millimeters the unit is 1000")
    return unit_length(unit, median)


def describe_visible(shares: Sequence[float], start: int = 0) -> str:
    """How much of the frames, counted from `start`, shows what the picture knows."""
    least = min(range(len(shares)), key=shares.__getitem__)
    nothing = sum(share < 0.01 for share in shares)
    words = f"visible: {100 * sum(shares) / len(shares):.3g} % of the pixels, least {100 * shares[least]:.3g} % in"
    return f"{words} frame {start + least}" + (f"; {nothing} of {len(shares)} frames show nothing" if nothing else "")
