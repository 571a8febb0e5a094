"""What a run of sample.py is asked for, read and checked: settings, picture, camera, chunk by chunk what leads it.

`prepare` reads everything but the networks, so that whatever is wrong is said in one line before the first work.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from clips import files_beside, find_video, given_geometry, steady_path
from files.checkpoint import build, count_numbers, weight_files
from files.cli import check_frames, parse_size
from files.machine import default_device, network_dtype, use_device
from files.media import (
    fit_image,
    is_still,
    is_video,
    load_image,
    read_frames,
    read_mask,
    read_rate,
    resize_frame,
    tell_clip,
    tell_shape,
)
from files.settings import parse_settings, require
from files.video import is_film
from geometry.camera import WINDOW, CameraPath, describe, hold, resolve_lens, retime
from geometry.pi3x import Pi3X, find_pi3x, load_pi3x, pi3x_source
from geometry.scene import choose_unit, given_scene, known_lens, read_path
from geometry.surface import PIXEL_LIMIT
from helios.flow import load_schedule
from helios.index import check_weights, read_index
from helios.load import VAES, check_parts, find_lora, size_multiple
from helios.lora import Lora, load_lora
from helios.taehv import find_taehv
from helios.team import SPLITS, ranks
from memory import CHOICES, Camera, Memory
from model import Helios
from render import RenderSettings, Warp, make_warp
from reshoot import RELATIVE, Reshoot, estimate_frames, filmed_path
from wah import Options, model_options

PRESETS = {"official": {}, "realtime": {
    "warp_band": "mid", "amplify_first_chunk": False, "threshold": 0.6, "warp_fill": "smooth", "samples": 2,
    "geometry_pixels": 130_000}}  # and one step a stage
OF_PI3X = "keyframes", "keyframe_choice", "known_poses"  # settings of a run whose geometry it finds


@dataclass(frozen=True)
class Settings(Options):
    """What --set reaches: how to sample, and what a run seldom needs otherwise."""

    seed: int = 0  # of all random numbers
    prompt_blend: int = 1  # chunks that a switch of the prompt takes ("a street | a street at night"); Helios takes 3
    preset: str = "official"  # or realtime: one word for the settings of `PRESETS`, each of which can still be set
    samples: int = 4  # of the surface, along each side of its quads
    geometry_pixels: int | None = None  # at most, in the maps of a picture's geometry; none: the official 255,000
    geometry: Path | None = None  # Pi3X weights; none: Pi3X/model.safetensors in the weights' folder or beside it
    # pictures that Pi3X sees at once, of the first one and the last frames of all chunks; none: 8, or the weights' own
    keyframes: int | None = None
    # if there are more: those that show most of what comes next (docs/paths.md), or the first and the latest
    keyframe_choice: str = "covering"
    known_poses: bool = False  # Pi3X is told where its pictures stand on the path, if its file has the tensors for that
    # the picture's horizontal degrees, or 60,38 with the vertical ones; none: the path file's, Pi3X's, or 55
    fov: tuple[float, ...] | None = None
    unit: str | None = None  # of the path: depth, 0.2depth, same, meter or a number (docs/paths.md); none: the file's
    inverse_depth: bool = False  # --depth holds 1 / z, as relative depth networks give it
    relative: str = "clip"  # --video: poses are relative to the clip's camera at the same time; or first: in frame 0
    poses_of_clip: Path | None = None  # --video with --depth: where the clip's camera is; none: it stands
    fps: float | None = None  # frame rate of the video; none: the clip's, the warp's or the path file's, or 16
    resample: bool = False  # stretches or squeezes the path to --frames or fps, instead of cutting or holding it
    check: bool = False  # measures seams, drift and, with Pi3X, the camera of the video: out_check.json
    latents: Path | None = None  # also writes the latents (.safetensors, key `latents`)
    vae: str = "wan"  # or taehv, a tiny one that makes another video of a seed; or taehv-decode, where it only decodes
    compile: bool = False  # torch.compile the transformer: slow to begin, faster then
    split: str = "weights"  # what torchrun's processes share, for memory; or tokens, for speed (docs/parallel.md)
    part: str = "1/1"  # of --list: i/N takes every N-th row from the i-th on
    tf32: bool = True  # on CUDA convolutions in fp32 (the VAE's) may round to 10 bits, as officially; docs/memory.md
    device: str = default_device()  # cpu, mps, cuda or cuda:N; none given: cuda if there is one

    def __post_init__(self):
        super().__post_init__()
        latents = self.latents
        require(
            self,
            ("preset", self.preset in PRESETS, " or ".join(PRESETS)),
            ("vae", self.vae in VAES, ", ".join(VAES)),
            ("prompt_blend", 1 <= self.prompt_blend <= 100, "from 1 to 100"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("split", self.split in SPLITS, " or ".join(SPLITS)),
            ("samples", 1 <= self.samples <= 16, "from 1 to 16"),
            ("geometry_pixels", 1000 <= (self.geometry_pixels or 1000) <= 10**7, "from 1000 to 10000000"),
            ("keyframes", self.keyframes is None or self.keyframes >= 1, "at least 1"),
            ("keyframe_choice", self.keyframe_choice in CHOICES, " or ".join(CHOICES)),
            ("fov", self.fov is None or len(self.fov) < 3 and all(1 <= each <= 179 for each in self.fov),
             "degrees from 1 to 179"),
            ("relative", self.relative in RELATIVE, " or ".join(RELATIVE)),
            ("fps", 1 <= (self.fps or 1) <= 240 and self.fps != 0, "from 1 to 240"),
            ("unit", self.unit != "", "depth, 0.2depth, same, meter or a number"),
            ("latents", latents is None or latents.suffix == ".safetensors", "a file name that ends in .safetensors"),
        )


@dataclass(frozen=True)
class Control:
    """What leads a chunk: its poses [T, 4, 4], perhaps with their zoom [T, 2], or its warp, or nothing."""

    poses: Tensor | None = None
    warp: Warp | None = None
    zoom: Tensor | None = None


@dataclass(frozen=True)
class Start:
    """What a rollout starts from: an image [1, 3, H, W], with a camera or not, or a video [1, 3, T, H, W] uint8, or
    nothing."""

    image: Tensor | None = None
    video: Tensor | None = None
    camera: Camera | Memory | None = None


@dataclass(frozen=True)
class Job:
    """A run's inputs, all of them checked; the networks are still to come."""

    settings: Settings
    size: tuple[int, int]
    frames: int
    fps: float
    start: Start
    controls: Iterator[Control]  # chunk by chunk
    led: bool  # by a warp, rendered or given
    lora: Lora | None
    path: CameraPath | None  # of the result's camera
    filmed: CameraPath | None  # the path that was found in a clip
    pi3x_file: Path | None  # whose geometry leads, or checks the result
    pi3x: Callable[[], Pi3X] | None

    @property
    def chunks(self) -> int:
        return -(-self.frames // WINDOW)


def pose_chunks(c2w: Tensor, frames: int, zoom: Tensor | None = None) -> Iterator[Control]:
    """Poses by the chunk; the last pose holds to the end."""
    for start in range(0, frames, WINDOW):
        first = min(start, len(c2w) - 1)
        yield Control(c2w[first:][:WINDOW], zoom=None if zoom is None else zoom[first:][:WINDOW])


def warp_chunks(warp: Path, mask: Path | None, frames: int, size: tuple[int, int]) -> Iterator[Control]:
    """Warps by the chunk, read as they are needed; the last frame holds to the end of the last chunk."""
    pictures = (resize_frame(frame, size) for frame in read_frames(warp))  # at once: 33 of a large size are gigabytes
    masks = None if mask is None else read_mask(mask)

    def take(stream: Iterator[np.ndarray]) -> np.ndarray:
        taken = list(islice(stream, WINDOW))  # also beyond `frames`, which cut the output alone
        return np.stack(taken + taken[-1:] * (WINDOW - len(taken)))

    for _ in range(0, frames, WINDOW):
        yield Control(warp=make_warp(take(pictures), None if masks is None else take(masks), size))


def count_frames(video: Path, asked: int | None, mask: Path | None = None) -> int:
    """Frames to make from a warp or a clip; it and its mask are read once to be sure that all are there."""
    there = sum(1 for _ in read_frames(video))
    masked = there if mask is None else sum(1 for _ in read_mask(mask))
    if masked != there:
        raise ValueError(f"{mask} has {masked} frames, expected {there} as {video}")
    if asked is not None and there < asked:
        raise ValueError(f"{video} has {there} frames, expected at least {asked} (--frames)")
    return there if asked is None else asked


def check(args: argparse.Namespace, settings: Settings) -> None:
    """What can be said of the words alone."""
    check_frames(args.frames)
    if args.warp is not None and len(args.warp) > 2:
        raise ValueError(f"--warp: {len(args.warp)} files, expected a warp, or a warp and its mask")
    path = args.poses is not None or args.move is not None
    if args.depth is not None and not path:
        raise ValueError("--depth needs a camera path: --poses or --move")
    if args.image is None and (path and args.video is None or args.warp is not None):
        raise ValueError("a camera needs --image: the picture that it moves through" + " (or --video)" * path)
    if args.image is not None and is_video(args.image):
        raise ValueError(f"--image {args.image}: not a picture; a video is given as --video {args.image}")
    if args.poses is not None and is_film(args.poses) and is_still(args.poses):
        raise ValueError(f"--poses {args.poses}: a picture, expected a file of poses, a COLMAP folder or a clip"
                         " (docs/paths.md)")
    check_settings(args, settings, path)
    stages = load_schedule(args.weights).stages
    if len(settings.steps) != stages:
        raise ValueError(f"--set steps: {len(settings.steps)} numbers, expected {stages}, one for each stage")
    use_device(settings.device)


def check_settings(args: argparse.Namespace, settings: Settings, path: bool) -> None:
    """Settings that would do nothing in this run are refused."""
    set_here = {word.partition("=")[0] for word in args.set}
    alone, keyframes = path and args.image is not None, seen_together(args, settings)
    needs = ({name: (path, "a camera path: --poses or --move") for name in
              ("geometry", "keyframes", "fov", "unit", "resample", "samples", "geometry_pixels")}
             | {"inverse_depth": (args.depth is not None, "--depth"), "part": (args.list is not None, "--list"),
                "split": (ranks()[1] > 1, "several processes: torchrun --nproc-per-node N sample.py ..."),
                "poses_of_clip": (args.video is not None and args.depth is not None, "--video and --depth"),
                "image_noise": (args.image is not None or path, "a picture: --image"),
                "image_sigma": (settings.image_noise or args.video is not None and not path and settings.video_noise,
                                "image_noise=true, or a clip that is continued"),
                "relative": (path and args.video is not None, "--video and a camera path: --poses or --move"),
                "zero_star": (settings.guidance > 1, "guidance above 1"),
                "zero_steps": (settings.guidance > 1 and settings.zero_star, "guidance above 1 and zero_star=true"),
                "amplify_first_chunk": (load_schedule(args.weights).sampler == "dmd", "the dmd sampler"),
                "known_poses": (alone and keyframes > 1, "--image, a camera path and keyframes=2 or more"),
                "keyframe_choice": (alone and keyframes > 2, "--image, a camera path and keyframes=3 or more")}
             | {name: (args.video is not None and not path, "a clip that is continued: --video and no camera path")
                for name in ("video_noise", "restart")}
             | {name: (path or args.warp is not None, "a camera: --poses, --move or --warp") for name in
                ("align", "drop", "threshold", "warp_noise", "warp_sigma", "warp_band", "warp_fill", "previous",
                 "mask_lag")})
    for name in sorted(set_here & needs.keys()):
        met, need = needs[name]
        if not met:
            raise ValueError(f"--set {name}: needs {need}")
    if settings.compile and ranks()[1] > 1:
        raise ValueError("--set compile=true: not with several processes")
    beside = "--depth" if args.depth is not None else (clip_files(args, settings) or (None, None))[1]
    unused = {"geometry", *OF_PI3X}  # but for a clip's camera, or the result's
    unused -= {"geometry", "keyframes"} if settings.check or is_filmed(args) else set()
    if path and (beside or find_pi3x(settings.geometry, args.weights) is None):
        for name in sorted(set_here & unused):
            raise ValueError(f"--set {name}: " + (f"Pi3X is not used beside {beside}" if beside else
                                                  "there is no Pi3X here"))


def load_settings(args: argparse.Namespace) -> Settings:
    """The words of --set over the official numbers for the weights."""
    args.weights = check_weights(args.weights)
    if args.video is not None:
        args.video = find_video(str(args.video))
    defaults = model_options(args.weights, Settings(samples=read_index(args.weights).samples))
    named = [word.partition("=")[2] for word in args.set if word.startswith("preset=")]
    if named and named[-1] == "realtime":
        defaults = replace(defaults, steps=(1,) * len(defaults.steps), **PRESETS["realtime"])
    settings = parse_settings(args.set, defaults)
    if settings.vae != "wan":
        find_taehv(args.weights)  # an early word if it is not there
    return settings


def choose_lora(args: argparse.Namespace, settings: Settings, led: bool = True) -> Lora | None:
    """The run's LoRA, if any; ValueError if it or the networks' configs do not go together, before weights are read."""
    file = find_lora(args.lora, args.weights, led, settings.warp_band)
    lora = None if file is None else load_lora(file, settings.device, network_dtype(settings.device))
    if lora is not None and lora.warp_band != settings.warp_band:
        raise ValueError(f"--lora {file}: trained with the warp in the {lora.warp_band} band, this run has it in the"
                         f" {settings.warp_band} band (--set warp_band={lora.warp_band})")
    network = build(Helios, args.weights / "transformer")  # what does not fit is refused before weights are read
    network.set_lora(lora)
    check_parts(args.weights, network.config.in_channels, network.config.text_dim)
    return lora


def choose_size(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width, asked for or the model's own. Raises ValueError if its schedule cannot have them."""
    own = read_index(args.weights).size
    size = own if args.size is None else parse_size(args.size)
    multiple = size_multiple(load_schedule(args.weights))
    if any(side % multiple for side in size):
        raise ValueError(f"--size {size[0]}x{size[1]}: height and width must be multiples of {multiple}")
    if size != own:
        print(f"--size {size[0]}x{size[1]}: the model was made for {own[0]}x{own[1]}, other sizes may look worse")
    return size


def seen_together(args: argparse.Namespace, settings: Settings) -> int:
    """Pictures that the geometry network is given at once. One that gets a single one, as the miniature's, does not
    know how two cameras stand to each other."""
    return settings.keyframes or read_index(args.weights).keyframes


def led_by_pi3x(args: argparse.Namespace, settings: Settings) -> bool:
    """Whether geometry, or the path of a clip's camera, is what Pi3X sees."""
    return is_filmed(args) or args.depth is None and clip_files(args, settings) is None


def open_pi3x(args: argparse.Namespace, settings: Settings,
              frames: int) -> tuple[Path | None, Callable[[], Pi3X] | None]:
    """The geometry network of a run along a path, where it is needed and there is one."""
    file = find_pi3x(settings.geometry, args.weights)
    if file is None or not (led_by_pi3x(args, settings) or settings.check):
        return None, None
    often = args.image is not None and args.depth is None and frames > WINDOW and args.memory != "stream"
    beside = count_numbers(weight_files(args.weights / "transformer"))
    beside *= 1 if args.memory == "fp8" else network_dtype(settings.device).itemsize
    return file, pi3x_source(file, settings.device, beside, often, ("poses",) * settings.known_poses)


def is_filmed(args: argparse.Namespace) -> bool:
    """Whether the path is that of a clip's camera."""
    return args.poses is not None and is_film(args.poses)


def film(args: argparse.Namespace, settings: Settings, file: Path | None) -> CameraPath:
    """The path of a clip's camera, by Pi3X; says how sure it is."""
    if file is None or seen_together(args, settings) == 1:
        why = "there is no Pi3X here" if file is None else f"{file} does not know how cameras stand to each other"
        raise ValueError(f"--poses {args.poses}: the path of a clip's camera takes Pi3X, and {why}; --set geometry=FILE"
                         " keyframes=8 gives one that does (weights/README.md)")
    network = load_pi3x(file, settings.device, network_dtype(settings.device))
    path, sure = filmed_path(network, args.poses, settings.geometry_pixels)
    print(f"{args.poses}: the camera by {file}, {describe(path)}, mean confidence {sure:.2f} of 1")
    return path


def clip_files(args: argparse.Namespace, settings: Settings) -> tuple[Path | None, Path] | None:
    """Poses, if any, and depths of a clip that is shot again, where they are given or lie beside it."""
    if args.video is None or args.poses is None and args.move is None:
        return None
    if args.depth is not None:
        return settings.poses_of_clip, args.depth
    return files_beside(args.video) if settings.geometry is None else None


def start_clip(args: argparse.Namespace, settings: Settings, size: tuple[int, int], path: CameraPath, frames: int,
               file: Path | None, pi3x: Callable[[], Pi3X] | None) -> Start:
    """The first of a clip's `frames`, and the camera in the geometry of all; says where that comes from."""
    first, limit = Image.fromarray(next(read_frames(args.video))), settings.geometry_pixels
    tell_shape(args.video, first, size)
    poses, depth = clip_files(args, settings) or (None, None)
    if depth is None and pi3x is not None:
        together = seen_together(args, settings) > 1
        K, words = known_lens(first, path, size, settings.fov)
        pictures = islice(read_frames(args.video), frames)
        images = [fit_image(Image.fromarray(picture), size) for picture in pictures]
        geometries = estimate_frames(pi3x(), images, together, limit, K)
        words = f"Pi3X of {file}, {'all frames together' if together else 'each frame by itself'}{words}"
        camera = "found by it" if together else "taken to stand"
    else:
        count = sum(1 for _ in read_frames(args.video))
        known = CameraPath(torch.eye(4).repeat(count, 1, 1)) if poses is None else steady_path(poses)
        known = replace(known, lens=path.lens, size=path.size) if known.lens is None else known
        geometries = list(islice(given_geometry(args.video, known, poses, depth, count, size, settings.inverse_depth,
                                                settings.fov, limit or PIXEL_LIMIT), frames))
        lens = resolve_lens(known, first.width, first.height, settings.fov)[1]
        words = f"{depth or 'neither Pi3X nor depths, so the clip stands on a plane at depth 1'}, {lens}"
        camera = poses or "taken to stand"
    unit = choose_unit(settings.unit or path.unit, geometries[0])
    print(f"geometry: {words}; the clip's camera: {camera}\ncamera: {describe(path)}, relative to the clip's"
          f" {'at the same time' if settings.relative == 'clip' else 'first one'}; one unit of it is {unit:.4g} of the"
          " geometry's")
    shot = Reshoot(geometries, size, unit, RenderSettings(settings.samples), settings.relative, settings.device)
    return Start(image=fit_image(first, size).to(settings.device), camera=shot)


def start_path(args: argparse.Namespace, settings: Settings, size: tuple[int, int], path: CameraPath, file: Path | None,
               pi3x: Callable[[], Pi3X] | None, frames: int = WINDOW) -> Start:
    """The picture, or the first of a clip's `frames`, and the camera in the geometry; says where that comes from."""
    if args.video is not None:
        return start_clip(args, settings, size, path, frames, file, pi3x)
    picture = load_image(args.image)
    tell_shape(args.image, picture, size)
    rendering, limit = RenderSettings(settings.samples), settings.geometry_pixels
    if args.depth is None and pi3x is not None:
        image = fit_image(picture, size).to(settings.device)
        K, words = known_lens(picture, path, size, settings.fov)
        camera = Memory(pi3x, image, size, rendering, keyframes=seen_together(args, settings), limit=limit, K=K,
                        known_poses=settings.known_poses, choice=settings.keyframe_choice)
        camera.unit = choose_unit(settings.unit or path.unit, camera.reference)
        source = f"Pi3X of {file}{words}"
    else:
        image, geometry, unit, source = given_scene(picture, path, args.depth, size, settings.fov,
                                                    settings.inverse_depth, settings.unit, settings.device,
                                                    limit or PIXEL_LIMIT)
        camera = Camera(geometry, size, unit, rendering)
    print(f"geometry: {source}\ncamera: {describe(path)}; one unit of it is {camera.unit:.4g} of the geometry's")
    return Start(image=image, camera=camera)


def start_video(path: Path, size: tuple[int, int]) -> Start:
    """Frames are resized as they are read: a long video of a large size would not fit in memory."""
    frames = np.stack([resize_frame(frame, size) for frame in read_frames(path)])
    if len(frames) < WINDOW:
        raise ValueError(f"{path}: {len(frames)} frames, expected at least {WINDOW} of a video to be continued")
    return Start(video=rearrange(torch.from_numpy(frames), "t h w c -> 1 c t h w"))


def but(words: list[str]) -> str:
    """What the words of --set change in a preset, the last one of each name."""
    last = {name: value for name, _, value in (word.partition("=") for word in words)}
    changed = [f"{name}={last[name]}" for name in ("steps", *PRESETS["realtime"]) if name in last]
    return f" but {' '.join(changed)}" if changed else ""


def prepare(args: argparse.Namespace, settings: Settings) -> Job:
    """Read and check all inputs but the networks; raises ValueError or OSError with one line."""
    size = choose_size(args)
    along = args.poses is not None or args.move is not None
    led, filmed = along or args.warp is not None, None
    path = read_path(args.poses, args.move) if along and not is_filmed(args) else None
    lora = choose_lora(args, settings, led)
    precision = str(network_dtype(settings.device)).removeprefix("torch.")
    print(f"weights {args.weights}, LoRA {lora.source if lora else 'none'}, {settings.device} in {precision},"
          f" seed {settings.seed}, preset {settings.preset}{but(args.set)}")
    clip = args.video if args.warp is None else args.warp[0]
    rate = settings.fps or (None if clip is None else read_rate(clip))
    frames, fps, file, pi3x = args.frames or WINDOW, rate or 16, None, None
    start, controls = Start(), iter([])
    if along:
        if path is None:
            path = filmed = film(args, settings, find_pi3x(settings.geometry, args.weights))
        length = args.frames if args.video is None else count_frames(args.video, args.frames)
        path, frames, fps = retime(path, length, rate, settings.resample)
        file, pi3x = open_pi3x(args, settings, frames)
        controls = pose_chunks(path.c2w, frames, path.zoom)
        start = start_path(args, settings, size, path, file, pi3x, frames)
        if isinstance(start.camera, Reshoot):
            path = replace(path, c2w=start.camera.world(hold(path.c2w, frames)))
    elif args.warp is not None:
        mask = args.warp[1] if len(args.warp) > 1 else None
        frames = count_frames(args.warp[0], args.frames, mask)
        controls = warp_chunks(args.warp[0], mask, frames, size)
    elif args.video is not None:
        start = start_video(args.video, size)
    if args.image is not None and not along:
        picture = load_image(args.image)
        tell_shape(args.image, picture, size, crop=False)
        start = Start(fit_image(picture, size, crop=False))
    if clip is not None and not along:  # last, so that bad input is one line
        tell_clip(clip, size, crop=False)
    if not led:
        controls = (Control() for _ in range(-(-frames // WINDOW)))
    return Job(settings, size, frames, fps, start, controls, led, lora, path, filmed, file, pi3x)
