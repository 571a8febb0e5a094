"""Video files in and out, by PyAV: ffmpeg's libraries in this process, so there is no program to be found or to hang.

In: the frames that a file has, whatever their times, upright, with square pixels and in sRGB; HDR is tone-mapped.
Out: H.264 in mp4 with its index in front and its colours tagged, and several of them joined without encoding anew.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import cast

import av
import av.container
import av.logging
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from files.cli import note, what_to_do
from files.writing import lasting

MAX_PIXELS = 8192**2  # of one picture or frame: a small file never takes more than 1 GiB
PQ, HLG, BT709 = 16, 18, 1  # numbers of ITU-T H.273
logging.getLogger("libav").addHandler(logging.NullHandler())  # what ffmpeg says comes with its errors
TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])  # BT.2087


# ------------------------------------------------------------------------------------------------------------------ in


@contextmanager
def opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A video file, and its first stream of pictures. Raises ValueError, OSError or FFmpegError if there is none."""
    with open(path, "rb") as file, av.open(file, "r", options={"protocol_whitelist": "none"}) as container:
        streams = [each for each in container.streams.video
                   if each.codec_context is not None and not each.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError("there is none in it, or none of a known codec")
        yield container, streams[0]


def is_film(path: Path) -> bool:
    """Whether a file is a video, by its content; ffmpeg takes some texts for one, which have no zeros."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        if b"\0" not in (begin := file.read(512)) or begin[:2] == b"PK" or begin[:6] == b"\x93NUMPY":
            return False
    try:
        with opened(path):
            return True
    except (FFmpegError, ValueError, OSError):
        return False


def film_rate(path: Path) -> float:
    """Frames a second of a video file, 0 if it does not say."""
    with opened(path) as (_, stream):
        return float(stream.average_rate or 0)


def decode(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video file one by one, [H,W,3] uint8. A line on stderr says what a damaged file has lost."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    try:
        with opened(path) as (container, stream):
            check_pixels(stream.codec_context.width, stream.codec_context.height)
            yield from decode_stream(path, container, stream)
    except (FFmpegError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable video ({getattr(error, 'strerror', None) or error})") from None


def decode_stream(path: Path, container, stream) -> Iterator[np.ndarray]:
    stream.thread_type = "AUTO"
    length, index = path.stat().st_size, list(stream.index_entries)
    missing = sum(entry.pos + entry.size > length for entry in index)  # an edit list leaves frames out rightly
    packets = damaged = 0
    for packet in container.demux(stream):
        packets += packet.size > 0
        try:
            frames = packet.decode()
        except FFmpegError:
            frames, damaged = [], damaged + 1
        for frame in frames:
            damaged += frame.is_corrupt
            check_pixels(frame.width, frame.height)
            yield to_rgb(frame, path, stream.sample_aspect_ratio, stream.codec_context.color_trc)
    if missing or damaged:
        note(f"{path}: cut off or damaged, {missing} of its {max(len(index), packets)} frames are missing and {damaged}"
             " damaged")


def check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, expected at most {MAX_PIXELS:,}; make it smaller")


def to_rgb(frame: av.VideoFrame, path: Path, pixel_aspect: Fraction | None, transfer: int) -> np.ndarray:
    """A decoded frame [H,W,3] uint8, upright, in sRGB and over white."""
    deep, clear = transfer in (PQ, HLG), any(component.is_alpha for component in frame.format.components)
    width = round(frame.width * (pixel_aspect or 1))
    layout = "rgb48le" if deep else "rgba" if clear else "rgb24"
    pixels = frame.reformat(width=width, format=layout, interpolation=Interpolation.BICUBIC).to_ndarray()
    if deep:
        pixels = tone_map(pixels, transfer)
    elif clear and pixels[..., 3].min() < 255:
        note(f"{path}: has transparency, taken over white")
        opaque = pixels[..., 3:] / np.float32(255)
        pixels = (pixels[..., :3] * opaque + 255 * (1 - opaque) + 0.5).astype(np.uint8)
    pixels = pixels[..., :3]
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


@cache
def light(transfer: int) -> np.ndarray:
    """Of every 16-bit signal its linear light: PQ in nits, HLG as the scene's, both SMPTE ST 2084 and BT.2100."""
    signal = np.linspace(0, 1, 2**16)
    if transfer == PQ:
        power = signal ** (1 / 78.84375)
        return 10000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)


def tone_map(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """HDR [H,W,3] uint16 with the primaries of BT.2020 -> sRGB uint8. Up to half of reference white (203 nits, BT.2408)
    brightness stays as it is; what is above, up to the brightest, is pressed into the other half."""
    linear = light(transfer)[pixels]
    if transfer == HLG:  # the scene's light as a display of 1000 nits shows it
        luminance = linear @ (0.2627, 0.6780, 0.0593)
        linear *= 1000 * np.maximum(luminance, 1e-9)[..., None] ** 0.2
    linear = (linear / 203) @ TO_BT709.T
    top = np.maximum(linear.max(-1, keepdims=True), 1e-9)
    pressed = np.where(top > 0.5, 1 - 0.5 * np.exp(1 - 2 * top), top)
    linear = (linear * pressed / top).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (encoded * 255 + 0.5).astype(np.uint8)


def count_frames(video: Path) -> int:
    """Pictures that a video file holds, without decoding them."""
    with open(video, "rb") as file, av.open(file, "r") as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


# ----------------------------------------------------------------------------------------------------------------- out


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """ffmpeg's errors as an OSError with the file's name and, if ffmpeg has any, its own words."""
    av.logging.set_level(av.logging.ERROR)
    try:
        yield
    except (FFmpegError, OSError) as error:
        known = error if isinstance(error, OSError) else OSError(error.errno, error.strerror)
        words = getattr(error, "log", None)
        words = words[2].strip() if words else error.strerror
        raise OSError(f"{lasting(path)}: the video could not be written ({words}); {what_to_do(known)}") from None
    finally:
        av.logging.set_level(None)


def frame_rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def open_mp4(path: Path, fps: float) -> av.container.OutputContainer:
    # Under its plain name a path may be taken for a protocol (12:30.mp4) or an address (#, ?). With a time scale of
    # thousandths, the usual one, the lengths of parts would be rounded.
    options = {"movflags": "+faststart", "movie_timescale": str(frame_rate(fps).numerator)}
    return av.open(f"file:{path}", "w", format="mp4", options=options)


def add_encoder(container: av.container.OutputContainer, fps: float, size: tuple[int, int]) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=frame_rate(fps))
    stream.height, stream.width = size
    stream.pix_fmt, stream.options = "yuv420p", {"crf": "17", "x264-params": "mbtree=0"}
    context = stream.codec_context
    # The same frames give the same bits: more threads give others, and x264's macroblock tree reads memory that nobody
    # wrote where a row of macroblocks is short, so that two files of a small video differ.
    context.thread_count = 1
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = ColorRange.MPEG
    context.open()
    return stream


def try_encoder(fps: float, size: tuple[int, int]) -> None:
    """Raises OSError if videos can't be written, so that it is known before any work."""
    if "libx264" not in av.codecs_available:
        raise OSError("the installed PyAV can't write videos: it has no encoder libx264; pip install av brings one")
    with named("--out"), av.open(BytesIO(), "w", format="mp4") as container:
        add_encoder(container, fps, size)


class VideoWriter:
    """`with VideoWriter(path, fps, (height, width)) as video: video.write(frame)`: streams uint8 frames into an mp4.

    Raises OSError when the encoder stops or the finished file does not hold every frame, as on a full disk.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]):
        self.path, self.size, self.count = path, size, 0
        with named(path):
            self.container = open_mp4(path, fps)
            self.stream = add_encoder(self.container, fps, size)

    def write(self, frame: np.ndarray) -> None:
        """One frame [H,W,3] or [H,W] uint8."""
        if frame.shape[:2] != self.size or frame.dtype != np.uint8:
            raise ValueError(f"{self.path}: frame of {frame.shape} {frame.dtype}, expected uint8 of size {self.size}")
        frame = np.ascontiguousarray(frame if frame.ndim == 3 else np.repeat(frame[..., None], 3, axis=-1))
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.AREA)
        picture.pts, picture.time_base = self.count, 1 / self.stream.codec_context.framerate
        self.encode(picture)
        self.count += 1

    def encode(self, picture: av.VideoFrame | None) -> None:
        """None: what the encoder still holds back."""
        with named(self.path):
            for packet in self.stream.encode(picture):
                packet.duration = 1
                self.container.mux(packet)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is not None:
            with suppress(FFmpegError):  # the first error is the one to be told
                self.container.close()
            return
        self.encode(None)
        with named(self.path):
            self.container.close()
            check_whole(self.path, self.count)


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """All of `frames` [T,H,W,3] or [T,H,W] uint8 as an mp4."""
    with VideoWriter(path, fps, frames.shape[1:3]) as video:
        for frame in frames:
            video.write(frame)


def check_whole(path: Path, count: int) -> None:
    there = count_frames(path)
    if there != count:
        raise OSError(0, f"it has {there} frames, expected {count}")


def join_videos(parts: list[Path], counts: list[int], fps: float, out: Path) -> None:
    """One mp4 of several that `VideoWriter` made with the same `fps`, without encoding anything anew. `counts` are
    their frames. Raises OSError if the result does not hold them all."""
    rate, begin, index, lead = frame_rate(fps), 0, 0, 0
    with named(out):
        with open_mp4(out, fps) as joined:
            target = None
            for part, count in zip(parts, counts):
                with open(part, "rb") as file, av.open(file, "r") as container:
                    source = container.streams.video[0]
                    target = target or joined.add_stream_from_template(source)
                    tick = round(1 / rate / cast(Fraction, source.time_base))
                    for packet in filter(attrgetter("size"), container.demux(source)):
                        lead = packet.dts if index == 0 else lead
                        packet.pts, packet.dts = packet.pts + begin * tick, lead + index * tick
                        packet.duration, packet.stream, index = tick, target, index + 1
                        joined.mux(packet)
                begin += count
        check_whole(out, begin)
