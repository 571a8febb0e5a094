"""Pictures, depth maps and videos into memory, and the one way back to 8 bit.

Pictures are cropped and resized with Pillow, as the official code does it. Videos are read frame by frame.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from files.arrays import read_arrays
from files.video import decode

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".npy"}


def natural_order(name: str | Path) -> list[str | int]:
    """The key that sorts names as people count: 2.png before 10.png."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split("([0-9]+)", str(name)))]


def open_image(path: str | Path) -> Image.Image:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such picture file")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from None


def load_image(path: str | Path) -> Image.Image:
    """An RGB picture; transparency is dropped, 16-bit gray scaled to 8 bit."""
    image = open_image(path)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError(f"{path}: a picture of 32-bit floats, expected 8 or 16 bit")
    return image.convert("RGB")


def fit_image(image: Image.Image, size: tuple[int, int], crop: bool = True) -> Tensor:
    """An RGB picture at `size` (height, width), Lanczos, as [1,3,H,W] in [-1,1]; centre-cropped to the aspect ratio,
    as for rendering from camera poses, or stretched, as for a ready-made warp video."""
    height, width = size
    if crop:
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    else:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image))
    return rearrange(pixels, "h w c -> 1 c h w") / 255 * 2 - 1


def kept_share(image: Image.Image, size: tuple[int, int]) -> tuple[float, float]:
    """How much of a picture's height and width the centre crop to the aspect ratio of `size` keeps."""
    ratio = (size[1] / size[0]) / (image.width / image.height)
    return min(1.0, 1 / ratio), min(1.0, ratio)


def load_depth(path: str | Path) -> Tensor:
    """A depth map [h,w] float32, z in any unit: .npy, .npz (its only array, or `depth`) or a 16-bit picture."""
    if Path(path).suffix.lower() in PICTURES:
        image = open_image(path)
        if not image.mode.startswith(("I", "F")):
            raise ValueError(f"{path}: a picture of mode {image.mode}, expected 16-bit gray depth")
        depth = np.asarray(image)
    else:
        arrays = read_arrays(path)
        if len(arrays) != 1 and "depth" not in arrays:
            raise ValueError(f"{path}: arrays {', '.join(sorted(arrays))}, expected one, or one named 'depth'")
        depth = arrays["depth"] if "depth" in arrays else next(iter(arrays.values()))
    if depth.ndim != 2 or depth.dtype.kind not in "fiu":
        raise ValueError(f"{path}: array of shape {depth.shape}, type {depth.dtype}, expected numbers [height, width]")
    depth = torch.from_numpy(depth.astype(np.float32))
    if not (depth.isfinite() & (depth > 0)).any():
        raise ValueError(f"{path}: no depth is finite and positive")
    return depth


def read_frames(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file, an .npy file [T,H,W,3] uint8 or a folder of pictures, one by one: [H,W,3] uint8."""
    path = Path(path)
    if path.is_dir():
        frames = (np.array(load_image(file)) for file in sorted(path.iterdir(), key=natural_order)
                  if file.suffix.lower() in PICTURES)
    elif path.suffix.lower() == ".npy":
        frames = read_arrays(path)[""]
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise ValueError(f"{path}: array of shape {frames.shape}, type {frames.dtype}, expected [T,H,W,3] uint8")
    else:
        frames = decode(path)
    shape = None
    for index, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape:
            raise ValueError(f"{path}, frame {index}: size {frame.shape[:2]}, expected {shape[:2]} as before")
        yield frame
    if shape is None:
        raise ValueError(f"{path}: no frames")


def load_video(path: str | Path) -> np.ndarray:
    """All of `read_frames`: uint8 [T,H,W,3]."""
    return np.stack(list(read_frames(path)))


def read_mask(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a visibility mask, one by one: [H,W] float32 in 0..1. From a video, a folder of pictures, or an
    .npy [T,H,W] (bool, or numbers in 0..1 or 0..255)."""
    if Path(path).suffix.lower() != ".npy":
        yield from (frame.mean(-1, dtype=np.float32) / 255 for frame in read_frames(path))
        return
    array = read_arrays(path)[""]
    if array.ndim != 3 or array.dtype.kind not in "bfiu" or array.size == 0:
        raise ValueError(f"{path}: array of shape {array.shape}, type {array.dtype}, expected a mask [T,H,W]")
    scale = 255 if array.max() > 1 else 1
    if not 0 <= array.min() <= array.max() <= scale:
        raise ValueError(f"{path}: mask values {array.min()} to {array.max()}, expected 0..1 or 0..255")
    yield from (frame.astype(np.float32) / scale for frame in array)


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[T,h,w,3] uint8 at `size` (height, width), with Pillow's bilinear filter."""
    if frames.shape[1:3] == size:
        return frames
    resized = (Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR) for frame in frames)
    return np.stack([np.asarray(frame) for frame in resized])


def to_u8(images: Tensor) -> Tensor:
    """Floats in 0..1 to 8 bit."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def quantize(frame: Tensor) -> Tensor:
    """A decoded frame in [-1,1] through 8 bits, before it becomes the source of the next chunk."""
    return (frame / 2 + 0.5).clamp(0, 1).mul(255).round().div(255) * 2 - 1


def to_frames(video: Tensor) -> np.ndarray:
    """[1, C, T, H, W] in 0..1 -> [T, H, W, 3] uint8, gray repeated."""
    return rearrange(to_u8(video[0]).expand(3, -1, -1, -1), "c t h w -> t h w c").cpu().numpy()
