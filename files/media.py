"""Pictures, depth maps and videos into memory, and the one way back to 8 bit.

What a file is, is told by its content. Pictures come upright, in sRGB, over white, and are cropped and resized with
Pillow, as the official code does it. Videos are read frame by frame.
"""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageCms, ImageOps, ImageSequence
from torch import Tensor

from files.arrays import Arrays
from files.cli import note
from files.video import MAX_PIXELS, check_pixels, decode, film_rate, is_film

try:
    from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
except ImportError:
    pass
else:
    register_heif_opener()

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it, and refuses what is twice as large
warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is said in one line
logging.getLogger("PIL").addHandler(logging.NullHandler())
# What Pillow may read: none that starts another program. A file without a mark of its own, .tga, is tried last.
FORMATS = ["PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "QOI", "DDS",
           "ICO", "PCX", "SGI", "TGA"]
# Names of pictures, for those that can't be read.
PICTURES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".heic", ".heif", ".gif", ".tif", ".tiff", ".bmp",
            ".ppm", ".pgm", ".jp2", ".qoi", ".tga", ".exr", ".svg", ".dng"}
HIDDEN = {"thumbs.db", "desktop.ini"}  # and all that begin with a dot


def natural_order(name: str | Path) -> list[str | int]:
    """The key that sorts names as people count: 2.png before 10.png."""
    parts = re.split("([0-9]{1,300})", str(name).casefold())  # Python refuses to read more digits than 4300
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


# ----------------------------------------------------------------------------------------------------------- pictures


@cache
def readable_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def is_picture(path: Path) -> bool:
    """By its content; one that is damaged by its name."""
    try:
        Image.open(path, formats=readable_formats()).close()
    except Exception:  # Pillow's own are of many kinds
        return path.suffix.lower() in PICTURES
    return True


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture's file, its size checked; what Pillow raises in the block is one clear ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such picture file")
    try:
        with Image.open(path, formats=readable_formats()) as image:
            yield image
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: a picture of more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # as above
        with open(path, "rb") as file:
            heic = re.match(b"....ftyp(hei|hev|mif1|msf1)", file.read(12), re.DOTALL)
        lacking = heic and "HEIF" not in Image.OPEN
        reason = "HEIC is read with the package pillow-heif: pip install pillow-heif" if lacking else error
        raise ValueError(f"{path}: not a readable picture ({reason})") from None


def is_still(path: Path) -> bool:
    """Whether a file is one picture and no animation; ffmpeg would take it for a film."""
    try:
        with opened(path) as image:
            return image.format == "MPO" or getattr(image, "n_frames", 1) == 1
    except ValueError:
        return False


def open_image(path: str | Path) -> Image.Image:
    """The first picture of a file, as it is stored, but upright."""
    with opened(path) as image:
        if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's: a second view, or a small one
            note(f"{path}: has several pictures, the first is used")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image


def open_animation(path: str | Path) -> Iterator[Image.Image]:
    with opened(path) as image:
        for each in ImageSequence.Iterator(image):
            check_pixels(*each.size)
            yield each.copy()


def load_image(path: str | Path) -> Image.Image:
    """A picture as RGB in sRGB, upright, over white; of an animation the first one."""
    return to_rgb(open_image(path), path)


def to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"{path}: a picture of 32-bit floats, expected 8 or 16 bit")
    profile = image.info.get("icc_profile") if image.mode != "LAB" else None  # Pillow itself converts that
    if image.mode.startswith("I"):
        image = to_8_bit(image)
    if image.has_transparency_data:
        image = flatten(image, path)
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    return to_srgb(image, profile, path) if profile else image.convert("RGB")


def to_8_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    strips = np.array_split(levels, 1 + levels.size // 10**6)  # in one piece it would take much memory
    return Image.fromarray(np.concatenate([(strip.clip(0, 65535) / 257).round().astype(np.uint8) for strip in strips]))


def flatten(image: Image.Image, path: str | Path) -> Image.Image:
    """Over white: what lies hidden under transparency is no part of the picture."""
    image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
    if np.asarray(image.getchannel("A")).min() < 255:
        note(f"{path}: has transparency, taken over white")
    ground = Image.new(image.mode[:-1], image.size, "white")
    ground.paste(image, mask=image)
    return ground


def to_srgb(image: Image.Image, profile: bytes, path: str | Path) -> Image.Image:
    """By its ICC profile. sRGB itself is left as it is, to the bit."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return cast(Image.Image, converted)  # None would be that of a change in place
    except (ImageCms.PyCMSError, OSError) as error:
        note(f"{path}: its colour profile can't be used ({error}); the colours are taken for sRGB")
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


def tell_shape(path: Path, image: Image.Image, size: tuple[int, int], crop: bool = True) -> None:
    """A word of a picture that `fit_image` shows less than nine tenths of, or stretches as much."""
    share = min(kept_share(image, size))
    if share < 0.9:
        how = f"{1 - share:.0%} of it is cut off" if crop else f"stretched to {1 / share:.3g} times its shape"
        note(f"{path}: {image.width} wide and {image.height} high; for --size {size[0]}x{size[1]} (height x width)"
             f" {how}")


# ------------------------------------------------------------------------------------------------------------- videos


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order; hidden files are passed over, and others with a word."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    files = [file for file in files if not file.name.startswith(".") and file.name.lower() not in HIDDEN]
    pictures = [file for file in sorted(files, key=natural_order) if is_picture(file)]
    if others := sorted({file.name for file in files} - {file.name for file in pictures}):
        note(f"{folder}: no pictures, and passed over: {', '.join(others[:5])}" + " ..." * (len(others) > 5))
    stems = Counter(re.sub("[-_. ]?mask$", "", file.stem.casefold()) for file in pictures)
    if twins := [stem for stem, count in stems.items() if count > 1]:
        raise ValueError(f"{folder}: {len(twins)} names with more than one picture, the first is {twins[0]!r}; frames"
                         " and masks belong in folders of their own")
    return pictures


def is_video(path: Path) -> bool:
    """A folder of pictures, an array, or a file that is not one picture."""
    return path.is_dir() or path.is_file() and not is_picture(path)


def read_frames(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file, an animation, an .npy file [T,H,W,3] uint8 or a folder of pictures, one by one:
    [H,W,3] uint8."""
    path = Path(path)
    if path.is_dir():
        frames = (np.array(load_image(file)) for file in list_pictures(path))
    elif path.suffix.lower() == ".npy":
        frames = Arrays(path)[""]
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise ValueError(f"{path}: array of shape {frames.shape}, type {frames.dtype}, expected [T,H,W,3] uint8")
    elif path.is_file() and is_picture(path):
        frames = (np.array(to_rgb(image, path)) for image in open_animation(path))
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


def read_rate(path: Path) -> float | None:
    """Frames a second, if the file is a video or an animation that says so; not below 1, and not above 240."""
    if path.is_file() and is_picture(path):
        lasting = [each.info.get("duration", 0) for each in open_animation(path)]  # milliseconds
        rate = 1000 * len(lasting) / sum(lasting) if sum(lasting) and len(lasting) > 1 else 0.0
    else:
        rate = film_rate(path) if is_film(path) else 0.0
    return min(max(rate, 1.0), 240.0) if rate else None


def tell_clip(path: Path, size: tuple[int, int], crop: bool = True) -> None:
    """`tell_shape` of a video, by its first frame."""
    tell_shape(path, Image.fromarray(next(read_frames(path))), size, crop)


def read_mask(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a visibility mask, one by one: [H,W] float32 in 0..1. From a video, a folder of pictures, or an
    .npy [T,H,W] (bool, or numbers in 0..1 or 0..255)."""
    if Path(path).suffix.lower() != ".npy":
        yield from (frame.mean(-1, dtype=np.float32) / 255 for frame in read_frames(path))
        return
    array = Arrays(path)[""]
    if array.ndim != 3 or array.dtype.kind not in "bfiu" or array.size == 0:
        raise ValueError(f"{path}: array of shape {array.shape}, type {array.dtype}, expected a mask [T,H,W]")
    scale = 255 if array.max() > 1 else 1
    if not 0 <= array.min() <= array.max() <= scale:
        raise ValueError(f"{path}: mask values {array.min()} to {array.max()}, expected 0..1 or 0..255")
    yield from (frame.astype(np.float32) / scale for frame in array)


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h,w,3] uint8 at `size` (height, width), with Pillow's bilinear filter."""
    if frame.shape[:2] == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def to_u8(images: Tensor) -> Tensor:
    """Floats in 0..1 to 8 bit."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def quantize(frame: Tensor) -> Tensor:
    """A decoded frame in [-1,1] through 8 bits, before it becomes the source of the next chunk."""
    return (frame / 2 + 0.5).clamp(0, 1).mul(255).round().div(255) * 2 - 1


def to_frames(video: Tensor) -> np.ndarray:
    """[1, 3, T, H, W] in [-1, 1] -> [T, H, W, 3] uint8."""
    return rearrange(to_u8(video[0] / 2 + 0.5), "c t h w -> t h w c").cpu().numpy()


def from_frames(frames: np.ndarray | Tensor) -> Tensor:
    """[T, H, W, 3] uint8 -> [1, 3, T, H, W] in [-1, 1]."""
    return rearrange(torch.as_tensor(frames), "t h w c -> 1 c t h w") / 127.5 - 1
