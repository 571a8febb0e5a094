"""Pictures, depth maps, videos and masks: reading what users have, writing mp4 files and contact sheets.

Pictures are fitted to the video size as the official code does it (Pillow, Lanczos, centre crop or stretch), which is
why that is not done in torch. Videos are read frame by frame, so that a long one never has to fit in memory, and are
written under temporary names that become the real ones when all of a program's files are complete. Arrays are never
unpickled.
What can't be read is a ValueError of one line naming the file. Left out: sound, 10-bit video, and EXIF rotation, which
the official code ignores too.
"""

import os
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".npy"}


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


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or of an .npy file (memory-mapped) under the name ''."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if Path(path).suffix.lower() == ".npy":
            arrays = {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
        arrays = {}
    if not arrays or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError(f"{path}: not a readable numpy file of plain numbers")
    return arrays


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
        frames = (np.array(load_image(file)) for file in sorted(path.iterdir()) if file.suffix.lower() in PICTURES)
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


def decode(path: Path) -> Iterator[np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    try:
        with imageio.get_reader(path, format="FFMPEG") as reader:
            yield from reader
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a readable video ({message[-1]})") from None


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


def beside(out: Path, **endings: str) -> dict[str, Path]:
    """Names of a program's outputs: `out`, which must be an .mp4, as "video", and others beside it: its stem + ending."""
    if out.suffix.lower() != ".mp4" or out.stem.startswith("."):
        raise ValueError(f"--out {str(out)!r}: expected a file name that ends in .mp4")
    return {"video": out} | {name: out.with_name(out.stem + ending) for name, ending in endings.items()}


def temporary(path: Path) -> Path:
    """The name under which an output is written until it is complete."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def check_outputs(outputs: dict[str, Path], inputs: Iterable[Path]) -> None:
    """Raises ValueError or OSError for what would overwrite an input or another output, or can't be written."""
    taken = {path.resolve() for path in inputs}
    for path in outputs.values():
        if path.resolve() in taken:
            raise ValueError(f"{path}: this output would overwrite an input or another output")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: expected the name of a file, this is something else")
        taken.add(path.resolve())
        try:
            temporary(path).touch()
            temporary(path).unlink()
        except OSError as error:
            raise OSError(f"{path}: can't be written ({error.strerror})") from None


@contextmanager
def replacing(outputs: dict[str, Path], inputs: Iterable[Path]) -> Iterator[dict[str, Path]]:
    """Temporary names for `outputs`. They become the real ones, all of them, when the block ends without an error, and
    are gone otherwise. What can't be written, or would overwrite an input or another output, is an error at once."""
    check_outputs(outputs, inputs)
    partials = {name: temporary(path) for name, path in outputs.items()}
    try:
        yield partials
        for name, path in outputs.items():
            os.replace(partials[name], path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


class VideoWriter:
    """`with VideoWriter(path, fps, (height, width)) as video: video.write(frame)`: streams uint8 frames into an mp4.

    Raises OSError when the encoder stops or the finished file does not hold every frame, as on a full disk.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]):
        self.path, self.size, self.count = path, size, 0
        self.encoder = imageio.get_writer(
            path, format="FFMPEG", fps=fps, codec="libx264", pixelformat="yuv420p", quality=None,
            macro_block_size=1, output_params=["-crf", "17"], ffmpeg_log_level="quiet",
        )
        self.failure = cut_short(path)

    def write(self, frame: np.ndarray) -> None:
        """One frame [H,W,3] or [H,W] uint8."""
        if frame.shape[:2] != self.size or frame.dtype != np.uint8:
            raise ValueError(f"{self.path}: frame of {frame.shape} {frame.dtype}, expected uint8 of size {self.size}")
        try:
            self.encoder.append_data(frame if frame.ndim == 3 else np.repeat(frame[..., None], 3, axis=-1))
        except OSError:
            raise self.failure from None
        self.count += 1

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self.encoder.close()
        if error_type is None and count_frames(self.path) != self.count:  # a failed encoder says nothing when it closes
            raise self.failure


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """All of `frames` [T,H,W,3] or [T,H,W] uint8 as an mp4."""
    with VideoWriter(path, fps, frames.shape[1:3]) as video:
        for frame in frames:
            video.write(frame)


def cut_short(path: Path) -> OSError:
    return OSError(f"{path.parent}: a video could not be written whole; is there room on the disk?")


def count_frames(video: Path) -> int:
    """Frames of a video file; 0 if it can't be read."""
    try:
        with imageio.get_reader(video, format="FFMPEG") as reader:
            return reader.count_frames()
    except (OSError, ValueError, RuntimeError, IndexError):
        return 0


def join_videos(parts: list[Path], counts: list[int], fps: float, out: Path) -> None:
    """One mp4 of several that `VideoWriter` made, all in one folder, without encoding anything anew. `counts` are their
    frames. Raises OSError if the result does not hold them all."""
    playlist = temporary(parts[0].with_suffix(".txt"))
    try:
        # Durations are rounded in the files, which would shift what comes after a joint.
        playlist.write_text("".join(f"file {part.name}\nduration {count / fps:.6f}\n" for part, count in zip(parts, counts)))
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-f", "concat", "-i", playlist, "-c", "copy", "-y", out]
        subprocess.run(command, stdin=subprocess.DEVNULL)
    finally:
        playlist.unlink(missing_ok=True)
    if count_frames(out) != sum(counts):
        raise cut_short(out)


def save_png(path: Path, image: np.ndarray) -> None:
    """[H,W,3] or [H,W] uint8."""
    Image.fromarray(image).save(path, format="PNG")


def evenly_spaced(count: int, columns: int) -> list[int]:
    """At most `columns` of the indices below `count`, first and last included."""
    return np.linspace(0, count - 1, min(count, columns)).round().astype(int).tolist()


def contact_sheet(rows: dict[str, np.ndarray], columns: int = 8, tile_width: int = 256) -> np.ndarray:
    """A picture [H,W,3] uint8 of evenly spaced frames: one labelled row for each video [T,H,W,3] or [T,H,W] uint8."""
    gap, label = 4, 14
    first = next(iter(rows.values()))
    picks = evenly_spaced(len(first), columns)
    height = round(tile_width * first.shape[1] / first.shape[2])
    sheet = Image.new("RGB", (gap + len(picks) * (tile_width + gap), gap + len(rows) * (label + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, frames) in enumerate(rows.items()):
        top = gap + row * (label + height + gap)
        draw.text((gap, top), name, fill="black")
        for column, index in enumerate(picks):
            tile = Image.fromarray(frames[index]).resize((tile_width, height), Image.Resampling.LANCZOS)
            sheet.paste(tile, (gap + column * (tile_width + gap), top + label))
    return np.array(sheet)


def plan(points: np.ndarray, colors: np.ndarray, track: np.ndarray, heading: np.ndarray,
         axes: tuple[str, str]) -> np.ndarray:
    """A picture [640,640,3] uint8 of a scene and a camera path along two axes, named in `axes`: to the right and up.

    `points` [N,2] and their `colors` [N,3] uint8; camera places `track` [T,2] and viewing directions `heading` [T,2].
    """
    low, high = np.quantile(points, 0.02, axis=0), np.quantile(points, 0.9, axis=0)  # the sky would shrink everything
    low, high = np.minimum(low, track.min(0)), np.maximum(high, track.max(0))
    side, margin = 640, 40
    scale = (side - 2 * margin) / max((high - low).max(), 1e-9)
    flip = np.array([1, -1]) * scale
    origin = np.array([margin, side - margin]) - low * flip
    canvas = np.full((side, side, 3), 255, np.uint8)
    x, y = (points * flip + origin).clip(-1, side).round().astype(int).T
    shown = (x > margin) & (x < side - margin) & (y > margin) & (y < side - margin)
    canvas[y[shown], x[shown]] = colors[shown] // 2 + 128  # pale, so that the path stands out
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    places, ahead = track * flip + origin, track * flip + origin + heading * np.array([28, -28])
    for index in evenly_spaced(len(track), 13):
        draw.line([*places[index], *ahead[index]], fill="blue")
    draw.line(places.flatten().tolist(), fill="black", width=2)
    marks = ("start", places[0], "green", -8, "ra"), ("end", places[-1], "red", 8, "la")
    for name, (x, y), color, shift, anchor in marks:
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=color)
        draw.text((x + shift, y + 4), name, fill=color, anchor=anchor)
    draw.line([(margin, margin), (margin, side - margin), (side - margin, side - margin)], fill="gray")
    right, up = axes
    ends = low + (side - 2 * margin) / scale
    draw.text((margin, side - margin + 6), f"{right} {low[0]:.4g}, {up} {low[1]:.4g}", fill="black")
    draw.text((side - margin, side - margin + 6), f"{right} {ends[0]:.4g}", fill="black", anchor="rt")
    draw.text((margin, margin - 14), f"{up} {ends[1]:.4g}", fill="black")
    return np.array(image)


def save_ply(path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    """A point cloud [N,3] with colours [N,3] uint8, as a binary .ply that MeshLab and Blender open."""
    vertices = np.empty(len(points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertices["xyz"], vertices["rgb"] = points, colors
    properties = [f"property float {axis}" for axis in "xyz"]
    properties += [f"property uchar {color}" for color in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header", ""]
    path.write_bytes("\n".join(header).encode() + vertices.tobytes())
