"""Warp-as-History: a camera path as pseudo-history of a frozen video model, and the chunk-by-chunk rollout.

The method (paper section 3) is `Rollout.warp_history`: the warp of the first frame along the path is encoded like any
history and appended to the short band; its rotary time indices are those of the target latents; its tokens without a visible
source are dropped. Only the first pyramid stage sees it, and only there are the LoRA and the trigger word active; later
stages are plain Helios, and without a warp the whole run is (text, image or video to video).

A chunk is 9 latent frames = 33 video frames. Latents are [1, 16, T, H/8, W/8], normalised; all randomness comes from one
CPU generator in the official order, so that a seed means the same video everywhere. Reproduced: the official pipeline's
results and its quirks where marked; not its repeated normalisation of the warp, and not its drifting LoRA weights.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import media
from camera import WINDOW, hold, normalize, scale_translation
from checkpoint import Lora, load, network_dtype, read_json
from flow import Schedule, Velocity, guide, load_schedule, sample
from memory import Memory
from model import Band, Helios, History
from render import Geometry, Warp, median_depth, render
from stream import load_streamed
from text import Tokenizer, UMT5Encoder, encode_prompt
from vae import VAE

CHUNK = 9  # latent frames
BANDS = (16, 2, 1)  # native history: latent frames of the long, mid and short band
FIRST_TARGET = 1 + sum(BANDS)  # time index of a chunk's first latent; 0 is the prefix (the first frame)
TRIGGER = "camctl23x."
NEGATIVE_PROMPT = (  # of the guided models; the one that Wan and Helios were tuned with
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall gray,"
    " worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, poorly"
    " drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three legs, many"
    " people in the background, walking backwards")


@dataclass(frozen=True)
class Options:
    """How to sample. The defaults are the official ones of a distilled checkpoint."""

    steps: tuple[int, ...] = (2, 2, 2)  # one number a stage
    guidance: float = 1.0  # above 1 every step costs a second call, with the negative prompt
    zero_star: bool = False  # CFG-zero-star
    zero_steps: int | None = 1  # with zero_star the first zero_steps + 1 steps predict zero; None: none of them
    amplify_first_chunk: bool = True  # the first chunk takes twice the steps (dmd sampler only)
    align: bool = True  # the warp has the target's time indices; off: it precedes the target
    drop: bool = True  # history tokens without a visible source are dropped
    threshold: float = 0.1  # least visible share of a kept token
    warp_noise: bool = True  # warp and prefix get a little noise, as history had in training
    warp_sigma: tuple[float, float] = (0.111, 0.135)
    image_noise: bool = False
    image_sigma: tuple[float, float] = (0.111, 0.135)
    video_noise: bool = True
    previous: tuple[int, int, int] = BANDS  # latent frames of earlier chunks beside the warp: long, mid, short
    mask_lag: bool = True  # kept for parity: after chunk 0 an official mask runs one frame ahead of its warp


@dataclass(frozen=True)
class Models:
    transformer: Helios
    vae: VAE
    schedule: Schedule


@dataclass(frozen=True)
class Prompts:
    """Embeddings [1, 512, text_dim] (fewer rows if the model was made for fewer)."""

    plain: Tensor
    trigger: Tensor | None = None  # for the LoRA's stage
    negative: Tensor | None = None  # for guidance above 1


def load_options(weights: Path) -> Options:
    """The official settings of the kind of checkpoint that model_index.json describes; a small model's may also say
    `num_inference_steps` (a stage) and `guidance_scale` (and more, see weights/README.md)."""
    index, stages = read_json(weights / "model_index.json"), load_schedule(weights).stages
    distilled = index.get("is_distilled", False)
    steps = index.get("num_inference_steps", 2 if distilled else 20 if stages > 1 else 50)
    return Options(steps=(steps,) * stages, guidance=index.get("guidance_scale", 1.0 if distilled else 5.0),
                   zero_star=not distilled and index.get("is_cfg_zero_star", False))


def native_size(weights: Path) -> tuple[int, int]:
    """Height and width that a model was made for."""
    index = read_json(weights / "model_index.json")
    return index.get("height", 384), index.get("width", 640)


MEMORY = ("full", "fp8", "stream")  # how weights are held


def load_text_encoder(weights: Path, device: torch.device | str, memory: str = "full") -> UMT5Encoder:
    """The text encoder in the device's network dtype; it streams with the transformer, and else is never quantized."""
    place = weights / "text_encoder", device, network_dtype(device)
    return load_streamed(UMT5Encoder, *place, blocks="encoder.block") if memory == "stream" else load(UMT5Encoder, *place)


def load_models(weights: Path, device: torch.device | str, memory: str = "full") -> Models:
    """Transformer in the device's network dtype, VAE in fp32. In the transformer's blocks lies all but 4 % of the memory that
    weights need: "full" holds them, "fp8" holds them quantized (`checkpoint.quantize`), "stream" fetches them (stream.py)."""
    schedule = load_schedule(weights)
    vae = load(VAE, weights / "vae", device)
    place = weights / "transformer", device, network_dtype(device)
    if memory == "stream":
        transformer = load_streamed(Helios, *place, blocks="blocks", entries=("attn2.to_k",))  # for `Helios.text`
    else:
        transformer = load(Helios, *place, fp8=Helios.fp8 if memory == "fp8" else ())
    return Models(transformer, vae, schedule)


def add_trigger(prompt: str) -> str:
    """The prompt of the LoRA's stage; one that has the trigger already stays."""
    prompt = prompt.strip()
    return prompt if prompt.startswith(TRIGGER) else f"{TRIGGER} {prompt}".strip()


def embed_prompts(weights: Path, prompts: Iterable[str], device: torch.device | str,
                  memory: str = "full") -> dict[str, Tensor]:
    """Load the text encoder, embed every prompt, and let it go again, before anything else needs the memory."""
    tokenizer = Tokenizer(weights / "tokenizer")
    encoder = load_text_encoder(weights, device, memory)
    rows = read_json(weights / "model_index.json").get("max_sequence_length", 512)
    return {prompt: encode_prompt(tokenizer, encoder, prompt, rows) for prompt in prompts}


def encode_prompts(weights: Path, prompt: str, lora: bool, guided: bool, device: torch.device | str,
                   memory: str = "full", negative: str = NEGATIVE_PROMPT) -> Prompts:
    """What one run needs of the text encoder."""
    wanted = prompt, add_trigger(prompt) if lora else None, negative if guided else None
    embedded = embed_prompts(weights, filter(lambda each: each is not None, wanted), device, memory)
    return Prompts(*map(embedded.get, wanted))


def size_multiple(schedule: Schedule) -> int:
    """Height and width must be multiples of this: the first stage's latents have to fill whole patches of 2."""
    return 8 * 2 * 2 ** (schedule.stages - 1)


# -------------------------------------------------------------------------------------------------------------- warps


def make_warp(frames: np.ndarray, mask: np.ndarray | None, size: tuple[int, int]) -> Warp:
    """A warp from pictures: `frames` [T, h, w, 3] uint8; `mask` [T', h', w'] in 0..1, None for all visible. Resized as the
    official code does it: frames with Pillow's bilinear filter, the mask trilinearly, so also in time."""
    video = rearrange(torch.from_numpy(media.resize_frames(frames, size)), "t h w c -> 1 c t h w") / 255 * 2 - 1
    if mask is None:
        return Warp(video, torch.ones_like(video[:, :1]))
    return Warp(video, resize_volume(torch.from_numpy(mask).float()[None, None], video.shape[2:]))


def resize_volume(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="trilinear", align_corners=False)


def mask_latents(visible: Tensor, frames: int = CHUNK) -> Tensor:
    """Visibility [1, 1, T, H, W] of a chunk on the latent grid: that of every fourth frame, [1, 1, frames, H/8, W/8]."""
    index = torch.arange(0, 4 * frames, 4, device=visible.device).clamp(max=visible.shape[2] - 1)
    height, width = visible.shape[3:]
    return resize_volume(visible[:, :, index], torch.Size((frames, height // 8, width // 8))).clamp(0, 1)


def add_noise(latents: Tensor, sigma: tuple[float, float], generator: torch.Generator, each_frame: bool) -> Tensor:
    """Latents [B, C, T, h, w] with a share of noise drawn from the range `sigma`, one for all frames or one each."""
    low, high = sigma
    share = torch.rand(latents.shape[2] if each_frame else 1, generator=generator) * (high - low) + low
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    share = share.to(latents.device).view(1, 1, -1, 1, 1)
    return share * noise + (1 - share) * latents


class Camera:
    """The camera of one rollout, whose geometry is given and stays: the first frame's, for all chunks.

    `memory.Memory` is the other kind, which estimates geometry anew from what has been generated.
    """

    def __init__(self, geometry: Geometry, size: tuple[int, int], unit: float | None = None):
        """unit: length of a path's unit in the geometry's; officially a tenth of the first frame's median depth."""
        self.geometry, self.size = geometry, size
        self.unit = 0.1 * median_depth(geometry) if unit is None else unit
        self.first: Tensor | None = None  # pose of the picture's own camera: the first of all

    @property
    def begun(self) -> bool:
        return self.first is not None

    def warp(self, poses: Tensor) -> Warp:
        """The chunk's views from `poses` [33, 4, 4], camera-to-world; if there are fewer, the last one holds."""
        poses = scale_translation(hold(poses), self.unit)
        if self.first is None:
            self.first = poses[:1]
            return render(self.geometry, normalize(poses, WINDOW), self.size)
        # The renderer's first frame is always the picture itself: it is put in front and taken off again.
        warp = render(self.geometry, normalize(torch.cat([self.first, poses]), WINDOW + 1), self.size)
        return Warp(warp.frames[:, :, 1:], warp.visible[:, :, 1:])

    def remember(self, frame: Tensor) -> None:
        """The last frame of a chunk teaches nothing."""

    def state(self) -> dict[str, Tensor]:
        return {} if self.first is None else {"first": self.first}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`, with the same geometry."""
        self.first = state.get("first")


# ------------------------------------------------------------------------------------------------------------ rollout


@dataclass(frozen=True)
class Chunk:
    frames: Tensor  # [1, 3, 33, H, W] in [-1, 1]
    latents: Tensor  # [1, 16, 9, H/8, W/8]
    warp: Warp | None  # what led it


CARRIED = ("given", "first_frame", "prefix", "noisy_prefix", "native", "earlier")  # latents of a rollout's state


class Rollout:
    """One video, made chunk by chunk: each `next` takes the chunk's poses, or its warp, or nothing, and returns a Chunk.

    Memory does not grow with the number of chunks. `given` holds the latents that precede the first chunk (the official
    latent output puts them in front): the fake latent of an image, or those of a video.
    """

    def __init__(self, models: Models, prompts: Prompts, size: tuple[int, int], generator: torch.Generator,
                 image: Tensor | None = None, video: Tensor | None = None, camera: Camera | Memory | None = None,
                 lora: Lora | None = None, options: Options = Options(),
                 on_step: Callable[[int, int, int], None] | None = None):
        """image [1, 3, H, W] or video [1, 3, T, H, W] (at least 33 frames) in [-1, 1]; `generator` on the CPU; `on_step` is
        told (chunk, stage, step) before each step. Raises ValueError if the size does not suit the schedule."""
        multiple = size_multiple(models.schedule)
        if any(side % multiple or side <= 0 for side in size):
            raise ValueError(f"size {size[0]}x{size[1]}: height and width must be multiples of {multiple}")
        if len(options.steps) != models.schedule.stages or min(options.steps) < 1:
            raise ValueError(f"steps {options.steps}: expected {models.schedule.stages} numbers of at least 1, one a stage")
        if camera is not None and camera.begun:
            raise ValueError("this camera has been used: each rollout needs its own")
        if lora is not None and prompts.trigger is None:
            raise ValueError("a LoRA needs the prompt with its trigger")
        models.transformer.set_lora(lora)  # a LoRA of another model is refused here, before any work
        models.transformer.set_lora(None)
        self.models, self.prompts, self.camera, self.lora, self.options = models, prompts, camera, lora, options
        self.generator, self.on_step = generator, on_step or (lambda chunk, stage, step: None)
        self.device = models.transformer.proj_out.weight.device
        self.size, self.latent_size = size, (size[0] // 8, size[1] // 8)
        self.chunk = 0
        self.flops = 0  # of the transformer, so far
        self.first_frame: Tensor | None = None  # clean latent that replaces the first one generated
        self.prefix: Tensor | None = None  # what stands at time index 0
        self.noisy_prefix: Tensor | None = None  # the same for the warp's stage
        self.given = self.zeros(0)
        self.earlier = self.zeros(0)  # generated latents, as many as the warp's stage may look at
        self.text_cache: dict[str, list] = {}
        if image is not None:
            self.start_from_image(image.to(self.device))
        elif video is not None:
            self.start_from_video(video)
        self.native = torch.cat([self.zeros(sum(BANDS)), self.given], dim=2)[:, :, -sum(BANDS):]

    # ---- random draws, all on the CPU and in the official order

    def normal(self, frames: int) -> Tensor:
        return torch.randn(1, 16, frames, *self.latent_size, generator=self.generator).to(self.device)

    def noised(self, latents: Tensor, sigma: tuple[float, float], each_frame: bool = False) -> Tensor:
        return add_noise(latents, sigma, self.generator, each_frame)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised posterior sample of a video [1, 3, 1 + 4k, H, W]: [1, 16, 1 + k, h, w]."""
        if tuple(video.shape[-2:]) != self.size:
            raise ValueError(f"frames of {video.shape[-2]}x{video.shape[-1]}, expected {self.size[0]}x{self.size[1]}")
        vae = self.models.vae
        mean, logvar = vae.encode(video.to(self.device))
        return vae.normalize(vae.sample(mean, logvar, self.normal(mean.shape[2])))

    def zeros(self, frames: int) -> Tensor:
        return torch.zeros(1, 16, frames, *self.latent_size, device=self.device)

    # ---- before the first chunk

    def start_from_image(self, image: Tensor) -> None:
        options = self.options
        self.first_frame = self.prefix = self.encode(image[:, :, None])
        fake = self.encode(image[:, :, None].expand(-1, -1, WINDOW, -1, -1))[:, :, -1:]  # the image as a standing video's end
        if options.image_noise:
            self.prefix = self.noised(self.prefix, options.image_sigma)
            fake = self.noised(fake, options.image_sigma)
        self.given = fake

    def start_from_video(self, video: Tensor) -> None:
        """The last whole chunks of a video become its history."""
        count = video.shape[2] // WINDOW
        if count == 0:
            raise ValueError(f"a video to continue needs at least {WINDOW} frames, this one has {video.shape[2]}")
        self.first_frame = self.prefix = self.encode(video[:, :, :1])
        chunks = [self.encode(chunk) for chunk in video[:, :, -count * WINDOW:].split(WINDOW, dim=2)]
        if self.options.video_noise:
            self.prefix = self.noised(self.prefix, self.options.image_sigma)
            chunks = [self.noised(chunk, self.options.image_sigma, each_frame=True) for chunk in chunks]
        self.given = torch.cat(chunks, dim=2)

    # ---- histories

    def indices(self, start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, device=self.device)

    def native_history(self) -> History:
        """What plain Helios sees: the first frame and the last 19 latents, without gaps in time."""
        long, mid, short = self.native.split(BANDS, dim=2)
        prefix = self.zeros(1) if self.prefix is None else self.prefix
        time_long, time_mid, time_short, target = self.indices(1, sum(BANDS) + CHUNK).split([*BANDS, CHUNK])
        return History(short=Band(torch.cat([prefix, short], dim=2), torch.cat([self.indices(0, 1), time_short])),
                       mid=Band(mid, time_mid), long=Band(long, time_long), indices=target)

    def warp_latents(self, warp: Warp) -> tuple[Tensor, Tensor]:
        """Latents and latent visibility of a chunk's warp of 33 frames, or of 34 whose first is the frame before."""
        frames = warp.frames.shape[2]
        if frames not in (WINDOW, WINDOW + 1):
            raise ValueError(f"a chunk's warp has {WINDOW} frames (or {WINDOW + 1} with the one before), this has {frames}")
        self.normal(1)  # kept for parity: the official code encodes the first frame alone and does not use it
        latents = self.encode(warp.frames[:, :, -WINDOW:])
        if self.options.warp_noise:
            latents = self.noised(latents, self.options.warp_sigma, each_frame=True)
        visible = warp.visible if self.options.mask_lag else warp.visible[:, :, -WINDOW:]
        return latents, mask_latents(visible.to(self.device))

    def previous_window(self) -> tuple[Tensor, Tensor]:
        """Latents [1, 16, n, h, w] just before the target and their visibility [1, 1, n, h, w]: what has been generated,
        right-aligned after zeros that count as invisible.

        Kept for parity: in chunk 0 it ends with the fake latent, which later chunks do not see (the native history does).
        """
        total, short = sum(self.options.previous), self.options.previous[2]
        seen = self.native[:, :, -1:] if self.chunk == 0 and short else self.earlier
        blank = self.zeros(total - seen.shape[2])
        visible = torch.cat([blank[:, :1], torch.ones_like(seen[:, :1])], dim=2)
        return torch.cat([blank, seen], dim=2), visible

    def warp_history(self, warp: Warp) -> History:
        """The method: [first frame, previous latents, warp] as history, aligned with the target and without holes."""
        options = self.options
        if self.prefix is None:
            raise ValueError("a warp needs the image (or video) that it was made from")
        if options.warp_noise and not options.image_noise and self.noisy_prefix is None:
            self.noisy_prefix = self.noised(self.prefix, options.warp_sigma)  # drawn once, for all chunks
        prefix = self.prefix if self.noisy_prefix is None else self.noisy_prefix
        warp_latents, warp_visible = self.warp_latents(warp)

        window, visible = self.previous_window()
        long, mid, short = window.split(options.previous, dim=2)
        visible_long, visible_mid, visible_short = visible.split(options.previous, dim=2)
        total = window.shape[2]
        time_long, time_mid, time_short = self.indices(FIRST_TARGET - total, total).split(options.previous)
        time_target = self.indices(FIRST_TARGET, CHUNK)

        def band(latents: Tensor, indices: Tensor, visible: Tensor) -> Band | None:
            return Band(latents, indices, visible if options.drop else None) if len(indices) else None

        return History(
            short=band(torch.cat([prefix, short, warp_latents], dim=2),
                       torch.cat([self.indices(0, 1), time_short, time_target]),
                       torch.cat([torch.ones_like(warp_visible[:, :, :1]), visible_short, warp_visible], dim=2)),
            mid=band(mid, time_mid, visible_mid), long=band(long, time_long, visible_long),
            indices=time_target if options.align else time_target + CHUNK, threshold=options.threshold)

    # ---- a chunk

    def text(self, name: str) -> list:
        """Keys and values of a prompt, computed when first needed and kept for all chunks."""
        if name not in self.text_cache:
            self.text_cache[name] = self.models.transformer.text(getattr(self.prompts, name))
        return self.text_cache[name]

    def velocity_for(self, stage: int, shape: torch.Size, history: History, text: list) -> Velocity:
        """The guided model of one stage, with all that stays the same over its steps prepared."""
        options, transformer = self.options, self.models.transformer
        context = transformer.context(history, shape[2:])
        negative = self.text("negative") if options.guidance > 1 else None
        cost = transformer.flops(context, text[0][0].shape[1]) * (1 if negative is None else 2)
        zeroed = options.zero_steps + 1 if options.zero_star and options.zero_steps is not None and stage == 0 else 0

        def velocity(latents: Tensor, timestep: float, step: int) -> Tensor:
            self.on_step(self.chunk, stage, step)
            if negative is not None and step < zeroed:
                return torch.zeros_like(latents)
            time = torch.tensor([timestep], device=self.device)
            self.flops += cost
            guided = transformer(latents, time, text, context)
            if negative is None:
                return guided
            return guide(guided, transformer(latents, time, negative, context), options.guidance, options.zero_star)

        return velocity

    @torch.no_grad()
    def next(self, poses: Tensor | None = None, warp: Warp | None = None) -> Chunk:
        """Generate 33 frames: along `poses` [T, 4, 4] (needs the camera; the last one holds if there are fewer than 33), led
        by a `warp` that was made elsewhere ([1, 3, 33 or 34, H, W]), or, with neither, as plain Helios continues."""
        if poses is not None:
            if self.camera is None or warp is not None:
                raise ValueError("poses need a camera, and no warp beside them")
            warp = self.camera.warp(poses)
        noise = self.normal(CHUNK)
        native = self.native_history()
        led = self.warp_history(warp) if warp is not None else None
        transformer = self.models.transformer

        def velocity_for(stage: int, shape: torch.Size) -> Velocity:
            if stage > 0 or led is None:
                transformer.set_lora(None)
                return self.velocity_for(stage, shape, native, self.text("plain"))
            transformer.set_lora(self.lora)
            return self.velocity_for(stage, shape, led, self.text("plain" if self.lora is None else "trigger"))

        amplify = self.options.amplify_first_chunk and self.chunk == 0
        latents = sample(velocity_for, noise, self.models.schedule, self.options.steps, self.generator, amplify)
        transformer.set_lora(None)
        return self.finish(latents, warp)

    def finish(self, latents: Tensor, warp: Warp | None) -> Chunk:
        """Book the chunk's latents into both histories and decode them by themselves."""
        if self.chunk == 0 and self.first_frame is not None:
            latents = torch.cat([self.first_frame, latents[:, :, 1:]], dim=2)
        elif self.chunk == 0:
            self.prefix = latents[:, :, :1]
        self.native = torch.cat([self.native, latents], dim=2)[:, :, -sum(BANDS):]
        earlier = torch.cat([self.earlier, latents], dim=2)
        self.earlier = earlier[:, :, max(earlier.shape[2] - sum(self.options.previous), 0):]
        self.chunk += 1
        vae = self.models.vae
        frames = vae.decode(vae.denormalize(latents))
        if self.camera is not None:
            self.camera.remember(frames[:, :, -1])
        return Chunk(frames, latents, warp)

    # ---- going on later

    def state(self) -> dict[str, Tensor]:
        """All that the next chunks depend on besides what this rollout was made with."""
        latents = {name: getattr(self, name) for name in CARRIED if getattr(self, name) is not None}
        camera = {} if self.camera is None else self.camera.state()
        return {"rng": self.generator.get_state(), "chunk": torch.tensor(self.chunk), **latents,
                **{f"camera.{name}": value for name, value in camera.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from the `state` of a rollout that was made with the same; the next chunks are equal to its own."""
        self.generator.set_state(state["rng"])
        self.chunk = int(state["chunk"])
        for name in CARRIED:
            setattr(self, name, state[name].to(self.device) if name in state else None)
        if self.camera is not None:
            self.camera.restore({name.removeprefix("camera."): value for name, value in state.items()
                                 if name.startswith("camera.")})
