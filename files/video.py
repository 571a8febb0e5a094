"""mp4 files: decoding, and encoding that notices when a file is not whole. ffmpeg does the work."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np

from files.writing import temporary


def decode(path: Path) -> Iterator[np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    try:
        with imageio.get_reader(path, format="FFMPEG") as reader:
            yield from reader
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a readable video ({message[-1]})") from None


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
        entries = (f"file {part.name}\nduration {count / fps:.6f}\n" for part, count in zip(parts, counts))
        playlist.write_text("".join(entries))
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        command = [ffmpeg, "-v", "quiet", "-f", "concat", "-i", playlist, "-c", "copy", "-y", out]
        subprocess.run(command, stdin=subprocess.DEVNULL)
    finally:
        playlist.unlink(missing_ok=True)
    if count_frames(out) != sum(counts):
        raise cut_short(out)
