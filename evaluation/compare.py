"""Videos beside the true ones: found by name, brought to the same frames and size, measured.

A folder holds videos, or folders of frames, one for each name; NAME_warp.mp4, which sample.py leaves beside NAME.mp4,
is its warp. A file, or a folder of frames, is one video, whose name does not count if it meets one other.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from evaluation.navigation import navigation
from evaluation.quality import Perceptual, measure, steady
from files.cli import note
from files.media import fit_image, is_picture, natural_order, read_frames, read_mask, to_frames
from geometry.camera import normalize, path_error
from geometry.paths import load_path
from geometry.pi3x import Pi3X
from geometry.scene import see

STRIDE = 4  # cameras are those of every fourth frame, as in the paper
VIDEOS = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif", ".npy"}


@dataclass(frozen=True)
class Protocol:
    """What of a video is measured."""

    frames: int = 33  # the first ones
    size: tuple[int, int] | None = None  # none: that of the first results
    crop: bool = True  # to the shape of `size`, around the middle; or stretched

    def __str__(self) -> str:
        size = "the size of the first results" if self.size is None else "x".join(map(str, self.size))
        which = "all frames" if self.frames > 10**4 else f"the first {self.frames} frames"
        return f"{which}, {'cropped around the middle' if self.crop else 'stretched'} to {size}"


def find_videos(path: Path, files: set[str] = VIDEOS) -> dict[str, Path]:
    """Name -> video, or what else has such a file name. Raises ValueError if there is none."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        return {path.stem: path}
    inside = sorted(path.iterdir(), key=natural_order)
    found = {each.stem if each.is_file() else each.name: each for each in inside
             if not each.name.startswith(".") and (each.is_dir() or each.suffix.lower() in files)}
    found = {name: each for name, each in found.items() if name.removesuffix("_warp") not in found.keys() - {name}}
    if not found and any(each.is_file() and is_picture(each) for each in inside):
        return {path.name: path}
    if not found:
        raise ValueError(f"{path}: no videos, and no folders of frames")
    return found


def match(results: Path, wanted: list[str], what: str, files: set[str] = VIDEOS) -> dict[str, Path]:
    """Those of the `wanted` names that are in a folder, told if some are not, or others are; one alone is meant
    whatever its name."""
    found = find_videos(results, files)
    if len(found) == len(wanted) == 1:
        return {wanted[0]: next(iter(found.values()))}
    missing = [name for name in wanted if name not in found]
    if len(missing) == len(wanted):
        raise ValueError(f"{results}: none of the names of {what}, which has {', '.join(wanted[:3])}, is here; here"
                         f" are {', '.join([*found][:3])}")
    if missing:
        note(f"{results}: {len(missing)} of {len(wanted)} videos of {what} are not here: {', '.join(missing[:5])}")
    if more := [name for name in found if name not in wanted]:
        note(f"{results}: {len(more)} that {what} has not are left out: {', '.join(more[:5])}")
    return {name: found[name] for name in wanted if name in found}


def fit(frame: np.ndarray, size: tuple[int, int], crop: bool) -> np.ndarray:
    """[h, w, 3] uint8 at `size`, Lanczos; as it is if it has it."""
    if frame.shape[:2] == size:
        return frame
    return to_frames(fit_image(Image.fromarray(frame), size, crop)[:, :, None])[0]


def read_video(path: Path, protocol: Protocol, size: tuple[int, int] | None = None) -> np.ndarray:
    """[T, H, W, 3] uint8, at most as many frames as the protocol says."""
    size = protocol.size or size
    frames = list(islice(read_frames(path), protocol.frames))
    return np.stack([frame if size is None else fit(frame, size, protocol.crop) for frame in frames])


def read_visible(path: Path, protocol: Protocol, size: tuple[int, int]) -> np.ndarray:
    """A mask [T, H, W] bool."""
    gray = [(255 * each).round().astype(np.uint8)[..., None].repeat(3, -1)
            for each in islice(read_mask(path), protocol.frames)]
    return np.stack([fit(each, size, protocol.crop)[..., 0] > 127 for each in gray])


def cameras(pi3x: Pi3X, frames: np.ndarray) -> Tensor:
    """Camera-to-world [T / 4, 4, 4] of every fourth frame, seen together."""
    return see(pi3x, frames[::STRIDE]).c2w


def camera_numbers(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """R-Err in degrees, and T-Err after the scale is aligned, as a share of how far the wanted path goes."""
    error = path_error(found, wanted)
    return {"R-Err": error["rotation_degrees"], "T-Err": error["translation_share"]}


@dataclass(frozen=True)
class Pair:
    """A result and what it is measured against."""

    result: Path
    truth: Path | None
    protocol: Protocol
    size: tuple[int, int] | None = None  # of the first results
    poses: Path | None = None
    mask: Path | None = None
    actions: tuple[str, ...] = ()  # WBench's turns
    perspective: str = ""

    @cached_property
    def frames(self) -> np.ndarray:
        return read_video(self.result, self.protocol, self.size)

    @cached_property
    def true_frames(self) -> np.ndarray | None:
        if self.truth is None:
            return None
        return self.as_long(self.truth, read_video(self.truth, self.protocol, self.frames.shape[1:3]))

    @cached_property
    def visible(self) -> np.ndarray | None:
        if self.mask is None:
            return None
        return self.as_long(self.mask, read_visible(self.mask, self.protocol, self.frames.shape[1:3]))

    def as_long(self, path: Path, found: np.ndarray) -> np.ndarray:
        """As many as there are of the result."""
        if len(found) < len(self.frames):
            raise ValueError(f"{path}: {len(found)} frames, expected at least the {len(self.frames)} of {self.result}")
        if len(found) > len(self.frames):
            note(f"{self.result}: {len(self.frames)} frames, and no more of the {len(found)} of {path} count")
        return found[: len(self.frames)]

    def numbers(self, perceptual: Perceptual | None, pi3x: Callable[[], Pi3X] | None) -> dict[str, float]:
        """All that can be measured: beside the truth, of the camera if there is a Pi3X, and of the result alone."""
        self, found = replace(self), {}  # what a copy has read goes with it: all pairs together would fill the memory
        if self.true_frames is not None:
            found |= measure(self.frames, self.true_frames, self.visible, perceptual)
        if pi3x is not None and len(self.frames) > STRIDE and (self.poses or self.true_frames is not None):
            seen = cameras(pi3x(), self.frames)
            found |= camera_numbers(seen, self.wanted(pi3x))
            found |= navigation(seen, [*self.actions], self.perspective) if self.actions else {}
        return found | steady(self.frames)

    def wanted(self, pi3x: Callable[[], Pi3X]) -> Tensor:
        """The known path at every fourth frame, whose last pose holds, or that of the truth."""
        if self.poses is not None:
            return normalize(load_path(self.poses).c2w, len(self.frames))[::STRIDE]
        assert self.true_frames is not None
        return cameras(pi3x(), self.true_frames)

    @property
    def warp(self) -> Path | None:
        path = self.result.with_name(f"{self.result.stem}_warp.mp4")
        return path if path.is_file() else None
