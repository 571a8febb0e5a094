"""The training data of one LoRA: videos, the geometry of their frames, and the choice of what a step trains on.

A step takes 33 frames of a clip, forward or reversed, and a warp of them from keyframes: the first of the 33 alone (a
first chunk), or some frames before them and perhaps some from among them (a later chunk). Decisions, renderings and
latents are those of the official trainer (paper section 4), which makes all of them anew in every step: here geometry
is estimated once and kept in a file, and the VAE's latents are kept in memory.
Left out: videos that bring their own warps.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache, partial
from itertools import permutations
from pathlib import Path
from typing import cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from files import media
from files.arrays import Arrays
from files.checkpoint import open_safetensors
from files.depth import known_depth, load_depth
from files.machine import network_dtype
from files.media import quantize, to_u8
from files.table import check_row, read_table
from files.writing import replacing
from geometry.camera import WINDOW, CameraPath, describe, normalize, resolve_lens
from geometry.paths import load_path
from geometry.pi3x import Pi3X, load_pi3x
from geometry.surface import PIXEL_LIMIT, Geometry, ensure_valid, estimate, place, transform
from helios.load import add_trigger
from helios.taehv import TAEHV
from helios.vae import VAE
from memory import render_keyframes, smooth_focals
from render import Warp, collect, fill_warp, render_frames
from wah import CHUNK, mask_latents


@dataclass(frozen=True)
class Choices:
    """How cases are drawn. The defaults are those of the release."""

    seed: int = 42  # of all draws
    reverse: float = 0.5  # share of reversed clips
    first: float = 0.5  # share of clips that are a first chunk
    max_history: int = 19  # keyframes before a later chunk
    future: float = 0.5  # share of later chunks that also have keyframes from among the target's frames
    future_count: tuple[int, int] = (1, 2)  # of those: at least, at most
    forms: int = 1  # of every clip, up to 12: also mirrored and with its colours exchanged. Officially it is 1
    warp_fill: str = "mean"  # of what a warp does not show; where sampling fills it, mean keeps this from being copied
    atlas: bool = True  # also a first chunk's holes show the far background. Kept for parity: in sampling they don't


@dataclass(frozen=True)
class Case:
    """Which frames a step uses, counted in the reversed clip if `reverse`."""

    reverse: bool
    start: int  # first of the 33 target frames
    keyframes: tuple[int, ...]  # the warp is rendered from them, as seen from the latest one's camera
    form: int = 0  # of the clip, for `change_form`

    @property
    def later(self) -> bool:
        return self.keyframes[0] < self.start

    @property
    def recoloured(self) -> bool:
        return self.form // 2 > 0

    @property
    def condition(self) -> int:
        """The frame that the network is given: a first chunk's own first one, or the one before a later chunk."""
        return self.start - 1 if self.later else self.start

    @property
    def targets(self) -> list[int]:
        return list(range(self.start, self.start + WINDOW))

    @property
    def path(self) -> list[int]:
        """Frames whose cameras the warp is rendered from; the first is that of the latest keyframe."""
        return [self.keyframes[-1], *self.targets] if self.later else self.targets

    def original(self, index: int, frames: int) -> int:
        """A frame's index in the clip as it is."""
        return frames - 1 - index if self.reverse else index


def draw_case(choices: Choices, frames: int, row: str, index: int) -> Case:
    """The official choice for the `index`th step (from 1) on a clip named `row` of `frames` frames."""
    name = f"{choices.seed}|online_warp_training|{row}|{index}".encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    rng, form = random.Random(int.from_bytes(digest, "little") % (2**63 - 1)), digest[0] % choices.forms
    reverse = choices.reverse > 0 and rng.random() < choices.reverse
    if rng.random() < choices.first or frames <= WINDOW:
        start = rng.randint(0, frames - WINDOW)
        return Case(reverse, start, (start,), form)
    start = rng.randint(1, frames - WINDOW)
    history = rng.randint(1, min(choices.max_history, start))
    keyframes = range(start - history, start)
    if rng.random() < choices.future:
        count = rng.randint(*choices.future_count)
        keyframes = [*keyframes, *sorted(rng.sample(range(start, start + WINDOW), count))]
    return Case(reverse, start, tuple(keyframes), form)


def item_order(count: int, seed: int) -> Iterator[int]:
    """Clips in the official order: shuffled anew in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def change_form(video: Tensor, form: int) -> Tensor:
    """A form of a video [B, C, T, H, W]: 0 is the video itself, odd ones are mirrored; colours are exchanged, if
    any."""
    orders = list(permutations(range(3)))
    video = video[:, orders[form // 2]] if video.shape[1] == 3 else video
    return video.flip(-1) if form % 2 else video


@dataclass(frozen=True)
class Source:
    video: Path
    prompt: str


def find_video(name: str) -> Path:
    """A path, or a name in data/."""
    data = Path(__file__).parent / "data"
    for path in (Path(name), data / f"{name}.mp4", data / name) if name else ():
        if path.exists():
            return path
    raise ValueError(f"--video {name}: no such file or folder, and no {name}.mp4 or {name}/ in {data}; the paper's"
                     " clips are in DAVIS 2017 (https://davischallenge.org), as folders JPEGImages/480p/NAME")


def read_sources(videos: list[str], prompts: list[str]) -> list[Source]:
    """Videos and what they show: as given, one prompt for each or one for all, or from a csv file."""
    if len(videos) == 1 and videos[0].lower().endswith(".csv"):
        if prompts:
            raise ValueError(f"--prompt: the prompts are in {videos[0]}")
        return read_csv(Path(videos[0]))
    prompts = prompts or [""]
    prompts = prompts * len(videos) if len(prompts) == 1 else prompts
    if len(prompts) != len(videos):
        raise ValueError(f"--prompt is given {len(prompts)} times, expected once, or {len(videos)} times as --video")
    return [Source(find_video(video), prompt) for video, prompt in zip(videos, prompts)]


def read_csv(path: Path) -> list[Source]:
    """Columns `video` (a path beside the file, or as for --video) and `prompt`; others are ignored."""

    def read(row: dict) -> Source:
        check_row(row)
        if not row["video"]:
            raise ValueError(f"video {row['video']!r}, expected a name")
        near = path.parent / row["video"]
        return Source(near if near.exists() else find_video(row["video"]), row["prompt"])

    return read_table(path, ("video", "prompt"), read)


def read_frames(path: Path, size: tuple[int, int]) -> Tensor:
    """All frames of a video, centre-cropped to `size`: [T, 3, H, W] uint8. ValueError if there are fewer than 33."""
    frames = [to_u8(media.fit_image(Image.fromarray(frame), size) / 2 + 0.5) for frame in media.read_frames(path)]
    if len(frames) < WINDOW:
        raise ValueError(f"{path}: {len(frames)} frames, expected at least {WINDOW}")
    return torch.cat(frames)


Where = Callable[[str], Path]  # where a file of that name is, or is to be made


def geometry_file(where: Where, *parts: bytes) -> Path:
    """Where to keep a geometry: the name tells what it depends on."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(hashlib.blake2b(part).digest())
    return where(f"geometry_{digest.hexdigest()}.safetensors")


def keep(path: Path, geometries: list[Geometry]) -> None:
    """Write the geometries of T frames, each field of them as one tensor [T, ...]."""
    names = [field.name for field in fields(Geometry)]
    tensors = {name: torch.stack([getattr(each, name).cpu() for each in geometries]) for name in names}
    with replacing({"file": path}) as files:
        files["file"].write_bytes(save(tensors))


def estimate_clip(weights: Path, network: Callable[[], Pi3X], frames: Tensor, pixels: int, where: Where) -> Path:
    """The geometry of all frames [T, 3, H, W] jointly, by Pi3X, as a file; from an earlier run if it is there.

    `network` is called if it is needed; for the file's name, the size and end of its `weights` stand for them. A frame
    has at most `pixels`, 0 for the network's own number.
    """
    with open(weights, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 2**20, 0))
        numbers = str((*frames.shape, pixels, size)).encode()
        path = geometry_file(where, frames.numpy().tobytes(), numbers, file.read())
    if not path.is_file():
        images = [frame[None].to(network().image_mean.device) / 255 * 2 - 1 for frame in frames]
        keep(path, [ensure_valid(each) for each in smooth_focals(estimate(network(), images, pixels or None))])
    return path


def read_depths(path: Path, inverse: bool = False) -> tuple[list[Tensor], tuple[str, ...] | None]:
    """A depth map [h, w] of each frame, from .npy or .npz [T, h, w] or a folder of 16-bit pictures, whose names come
    with them. With `inverse` they hold 1 / z."""
    if path.is_dir():
        files = media.list_pictures(path)
        return [load_depth(file, inverse) for file in files], tuple(file.name for file in files)
    arrays = Arrays(path)
    if len(arrays) != 1 and "depth" not in arrays:
        raise ValueError(f"{path}: arrays {', '.join(sorted(arrays))}, expected one, or one named 'depth'")
    depth = arrays["depth"] if "depth" in arrays else next(iter(arrays.values()))
    if depth.ndim != 3 or depth.dtype.kind not in "fiu":
        raise ValueError(f"{path}: array of {depth.shape}, type {depth.dtype}, expected numbers [T, height, width]")
    maps = torch.from_numpy(depth.astype(np.float32))
    return [known_depth(each, f"{path}, map {index}", inverse, least=0) for index, each in enumerate(maps)], None


def pair(names: tuple[str, ...] | None, frames: list[str], count: int, where: Path) -> list[int]:
    """Which of `count` poses or maps belongs to each frame: by their names, without folders and suffix, where both have
    names that fit, else in order. Raises ValueError naming the first frame that has none."""
    stems = [Path(name).stem for name in names or ()]
    wanted = [Path(name).stem for name in frames]
    if len(set(stems)) == len(stems) and set(stems) & set(wanted):
        missing = [name for name, stem in zip(frames, wanted) if stem not in stems]
        if missing:
            raise ValueError(f"{where}: nothing of that name for {len(missing)} frames, the first is {missing[0]}")
        return [stems.index(stem) for stem in wanted]
    if count != len(frames):
        raise ValueError(f"{where} has {count}, expected {len(frames)}, one for each frame")
    return list(range(count))


def files_beside(video: Path) -> tuple[Path, Path] | None:
    """Poses and depths of a video whose geometry is known, NAME.json and NAME_depth.npz in its folder."""
    files = video.with_suffix(".json"), video.with_name(f"{video.stem}_depth.npz")
    return files if all(file.is_file() for file in files) else None


def steady_path(poses: Path) -> CameraPath:
    """The camera of a clip, one pose a frame, with one lens."""
    camera = load_path(poses, fill=False)
    if camera.zoom is not None and (camera.zoom - 1).abs().max() > 0.01:
        raise ValueError(f"{poses}: the focal length changes on the way, expected one that stays")
    return camera


def given_geometry(video: Path, camera: CameraPath, poses: Path | None, depth: Path | None, count: int,
                   size: tuple[int, int], inverse: bool = False, fov: tuple[float, ...] | None = None,
                   limit: int = PIXEL_LIMIT) -> Iterator[Geometry]:
    """Frame by frame, of a video of `count` frames at `size`: from its `camera`, of the file `poses`, and its depths,
    in one unit; without any it is a plane at depth 1. Names of frames tell what belongs together, where there are
    any."""
    depths, names = ([torch.ones(1, 1)] * count, None) if depth is None else read_depths(depth, inverse)
    listed = [file.name for file in media.list_pictures(video)] if video.is_dir() else [""] * count
    camera_of = pair(camera.names, listed, len(camera.c2w), poses or video)
    depth_of = pair(names, listed, len(depths), depth or video)
    for picture, at, map_at in zip(media.read_frames(video), camera_of, depth_of):
        pose, image = camera.c2w[at], Image.fromarray(picture)
        lens, _ = resolve_lens(camera, image.width, image.height, fov)
        try:
            _, geometry = place(image, depths[map_at], lens, size, limit=limit)
        except ValueError as error:
            raise ValueError(f"{depth}: {error}") from None
        points = torch.stack(transform(pose, *geometry.points.unbind(-1)), dim=-1)
        yield replace(geometry, points=points, c2w=pose)


def known_geometry(video: Path, poses: Path, depth: Path, frames: Tensor, where: Where) -> Path:
    """The geometry of a clip whose camera and depths are known, in one unit, as a file."""
    height, width = frames.shape[2:]
    geometries = list(given_geometry(video, steady_path(poses), poses, depth, len(frames), (height, width)))
    digests = [torch.cat([each.points.flatten(), each.c2w.flatten()]).numpy().tobytes() for each in geometries]
    path = geometry_file(where, frames.numpy().tobytes(), *digests)
    if not path.is_file():
        keep(path, geometries)
    return path


class Geometries:
    """The geometry of every frame of a clip, in a file: what is needed is read when it is."""

    def __init__(self, path: Path, device: str, backwards: bool = False):
        with open_safetensors(path) as file:
            self.c2w = file.get_tensor("c2w")  # [T, 4, 4]
        self.c2w = self.c2w.flip(0) if backwards else self.c2w
        self.path, self.device, self.backwards = path, device, backwards

    def __getitem__(self, index: int) -> Geometry:
        index = len(self.c2w) - 1 - index if self.backwards else index
        with open_safetensors(self.path) as file:
            maps = {field.name: file.get_slice(field.name)[index] for field in fields(Geometry)}
        return Geometry(**maps).to(self.device)


@dataclass(frozen=True)
class Clip:
    prompt: str  # with the trigger
    frames: Tensor  # [T, 3, H, W] uint8
    forward: Geometries
    reverse: Geometries

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.frames.shape[2:]
        return height, width

    def pixels(self, *index: int) -> Tensor:
        """Frames [1, 3, len(index), H, W] in [-1, 1]."""
        return rearrange(self.frames[list(index)], "t c h w -> 1 c t h w") / 255 * 2 - 1


def render_case(clip: Clip, case: Case, atlas: bool = True, fill: str = "mean") -> Warp:
    """A case's warp; without `atlas` that of a first chunk is rendered as in sampling, from its first frame alone."""
    geometries = clip.reverse if case.reverse else clip.forward
    poses = normalize(geometries.c2w[case.path], len(case.path))
    keyframes = [geometries[index] for index in case.keyframes]
    frames = render_keyframes(keyframes, poses) if atlas or case.later else render_frames(keyframes[0], poses)
    warp = collect(frames, clip.size)
    frames, visible = warp.frames[:, :, -WINDOW:], warp.visible[:, :, -WINDOW:]  # a later one begins with the keyframe
    frames, visible = (change_form(each, case.form) for each in (frames, visible))
    warp = fill_warp(Warp(frames, visible), fill)
    return Warp(quantize(warp.frames), (visible * 255).round() / 255)


@dataclass(frozen=True)
class Condition:
    """Normalised latents of a case, [1, 16, frames, h, w]."""

    target: Tensor  # 9 frames
    image: Tensor  # 1
    fake: Tensor  # 1: the image as a standing video's end
    warp: Tensor  # 9
    visible: Tensor  # [1, 1, 9, h, w]


class Conditions:
    """Latents of the clips' windows. Each is made once and kept in host memory, `limit` of a kind, and the longest
    unused go first; that is possible because officially every posterior sample is drawn from the same seed."""

    def __init__(self, vae: VAE | TAEHV, clips: list[Clip], size: tuple[int, int], choices: Choices, limit: int,
                 device: str):
        self.vae, self.clips, self.choices, self.device = vae, clips, choices, device
        generator = torch.Generator().manual_seed(choices.seed)
        shape = size[0] // vae.space_factor, size[1] // vae.space_factor
        self.image_noise, self.fake_noise, _, self.warp_noise = (  # the third, unused: kept for parity
            torch.randn(1, vae.channels, count, *shape, generator=generator) for count in (1, CHUNK, 1, CHUNK))
        self.image = lru_cache(limit)(self.make_image)
        self.target = lru_cache(limit)(self.make_target)
        self.warp = lru_cache(limit)(self.make_warp)

    def encode(self, video: Tensor, noise: Tensor | None) -> Tensor:
        """Of a video [1, 3, 1 + 4k, H, W] the posterior's sample, or without noise its mode."""
        mean, logvar = self.vae.encode(video.to(self.device))
        latents = mean if noise is None else self.vae.sample(mean, logvar, noise.to(self.device))
        return self.vae.normalize(latents).cpu()

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image [1, 3, 1, H, W] -> its latent and the fake latent."""
        still = image.expand(-1, -1, WINDOW, -1, -1)
        fake = self.encode(still, self.fake_noise)[:, :, -1:]
        return self.encode(image, self.image_noise), fake.clone()  # frees the other frames

    def encode_warp(self, warp: Warp) -> tuple[Tensor, Tensor]:
        return self.encode(warp.frames, self.warp_noise), mask_latents(warp.visible).cpu()

    def make_image(self, clip: int, index: int, form: int) -> tuple[Tensor, Tensor]:
        return self.encode_image(change_form(self.clips[clip].pixels(index), form))

    def make_target(self, clip: int, index: tuple[int, ...], form: int) -> Tensor:
        return self.encode(change_form(self.clips[clip].pixels(*index), form), None)

    def make_warp(self, clip: int, case: Case) -> tuple[Tensor, Tensor]:
        return self.encode_warp(render_case(self.clips[clip], case, self.choices.atlas, self.choices.warp_fill))

    def __call__(self, clip: int, case: Case) -> Condition:
        count = len(self.clips[clip].frames)
        targets = tuple(case.original(index, count) for index in case.targets)
        image = self.image(clip, case.original(case.condition, count), case.form)
        latents = self.target(clip, targets, case.form), *image, *self.warp(clip, case)
        return Condition(*(each.to(self.device) for each in latents))


def load_clips(sources: list[Source], known: list[tuple[Path, Path]], pi3x: Path | None, estimate_all: bool,
               size: tuple[int, int], pixels: int, where: Where, device: str) -> list[Clip]:
    """The videos with their geometry, in files that are `where` it says: from the `known` poses and depths, one pair a
    video, from files beside the video unless `estimate_all`, or by the network in the file `pi3x`."""
    given = known or [None if estimate_all else files_beside(source.video) for source in sources]
    if None in given and pi3x is None:
        raise ValueError("no geometry: give the Pi3X weights (--geometry FILE; weights/README.md says where they are),"
                         " or the clip's own --poses and --depth")
    frames = [read_frames(source.video, size) for source in sources]
    for source in sources:  # after all are read, so that a bad one is one line
        media.tell_clip(source.video, size)
    weights = cast(Path, pi3x)  # or, without any, each clip brings its own geometry
    network = cache(partial(load_pi3x, weights, device, network_dtype(device)))
    clips = []
    for source, each, files in zip(sources, frames, given):
        if files is not None:
            path = known_geometry(source.video, *files, each, where)
            forward, reverse = Geometries(path, device), Geometries(path, device, backwards=True)
        else:
            estimated = partial(estimate_clip, weights, network, pixels=pixels, where=where)
            forward, reverse = (Geometries(estimated(images), device) for images in (each, each.flip(0)))
        clips.append(Clip(add_trigger(source.prompt), each, forward, reverse))
        print(f"{source.video}: {len(each)} frames, prompt {clips[-1].prompt!r}, geometry {forward.path.name},"
              f" camera: {describe(CameraPath(forward.c2w))}")
    return clips
