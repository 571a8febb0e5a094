"""Warp-as-History: a camera path as pseudo-history of a frozen video model, and the chunk-by-chunk rollout.

The method (paper section 3) is `pseudo_history`: the warp of the first frame along the path is encoded like any history
and appended to a band of it; its rotary time indices are those of the target latents; its tokens without a visible
source are dropped. Only the first pyramid stage sees it, and only there are the LoRA and the trigger word active;
later stages are plain Helios, and without a warp the whole run is (text, image or video to video).

A chunk is 9 latent frames = 33 video frames. Latents are [1, C, T, H/8, W/8], normalised; all randomness comes from one
CPU generator in the official order, so that a seed means the same video everywhere. Reproduced: the official pipeline's
results and its quirks where marked; not its repeated normalisation of the warp, and not its drifting LoRA weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from files.machine import send
from files.settings import require
from geometry.camera import WINDOW
from helios.flow import Schedule, Velocity, guide, load_schedule, sample
from helios.index import read_index
from helios.load import Models, Prompts, size_multiple
from helios.lora import Lora
from memory import Camera, Memory
from model import Band, Helios, History
from render import FILLS, Warp, fill_warp, resize_volume

CHUNK = 9  # latent frames
BANDS = (16, 2, 1)  # native history: latent frames of the long, mid and short band
FIRST_TARGET = 1 + sum(BANDS)  # time index of a chunk's first latent; 0 is the prefix (the first frame)


# ---------------------------------------------------------------------------------------------------------- the method


def pseudo_history(first: Tensor, previous: Tensor, bands: tuple[int, int, int] = BANDS, warp: Tensor | None = None,
                   visible: Tensor | None = None, *, start: int = FIRST_TARGET, target: Tensor | None = None,
                   warp_time: Tensor | None = None, warp_band: str = "short", drop: bool = True,
                   threshold: float = 0.1) -> History:
    """What the network sees beside the noisy target: first frame, past latents and, as if it were past, the warp.

    first [B, C, 1, h, w]; previous [B, C, n, h, w], the latest n latents (n at most the sum of `bands`, the latent
    frames of the long, mid and short band); warp [B, C, 9, h, w] and its visibility [1, 1, 9, h, w], or neither: native
    history. `start` is the time index that follows the past; `target` are the target's indices [9], by default from
    there on; `warp_time` those of the warp [9], by default the target's, which is what aligns them.
    """
    device, total = first.device, sum(bands)
    target = torch.arange(start, start + CHUNK, device=device) if target is None else target

    # (1) History patchification: the past, right-aligned after zeros, lies in the three bands of the native model, each
    # with its own patch embedding. The first frame and the warp join a band, and go through what the band goes through.
    blank = previous.new_zeros(*previous.shape[:2], total - previous.shape[2], *previous.shape[3:])
    past = torch.cat([blank, previous], dim=2)

    # (2) Target-aligned indices: the first frame has time 0, the past precedes the target, the warp has its time.
    past_time = torch.arange(start - total, start, device=device)
    first_time = torch.zeros(1, dtype=torch.long, device=device)

    # (3) Visible-token selection: blanks, and what the warp does not show, are invisible; such tokens are dropped.
    past_seen = torch.cat([torch.zeros_like(blank[:1, :1]), torch.ones_like(previous[:1, :1])], dim=2)
    first_seen = torch.ones_like(first[:1, :1])

    pieces = zip(past.split(bands, dim=2), past_time.split(bands), past_seen.split(bands, dim=2))
    parts = {name: [piece] for name, piece in zip(("long", "mid", "short"), pieces)}
    parts["short"].insert(0, (first, first_time, first_seen))
    if warp is not None and visible is not None:
        parts[warp_band].append((warp, target if warp_time is None else warp_time, visible))
    joined = {name: join_bands(band, drop) for name, band in parts.items()}
    return History(**joined, indices=target, threshold=threshold)


def join_bands(parts: list[tuple[Tensor, Tensor, Tensor]], drop: bool) -> Band | None:
    """A band of latents, their time indices and visibility, one part after another; without `drop` all is visible."""
    latents, time, seen = (torch.cat(each, dim) for each, dim in zip(zip(*parts), (2, 0, 2)))
    return Band(latents, time, seen if drop else None) if len(time) else None


def mask_latents(visible: Tensor) -> Tensor:
    """Visibility [1, 1, T, H, W] of a chunk on the latent grid: of every fourth frame, [1, 1, 9, H/8, W/8]."""
    index = torch.arange(0, 4 * CHUNK, 4, device=visible.device).clamp(max=visible.shape[2] - 1)
    height, width = visible.shape[3:]
    return resize_volume(visible[:, :, index], torch.Size((CHUNK, height // 8, width // 8))).clamp(0, 1)


def add_noise(latents: Tensor, sigma: tuple[float, float], generator: torch.Generator, each_frame: bool) -> Tensor:
    """Latents [B, C, T, h, w] with a share of noise drawn from the range `sigma`, one for all frames or one each."""
    low, high = sigma
    share = torch.rand(latents.shape[2] if each_frame else 1, generator=generator) * (high - low) + low
    noise = send(torch.randn(latents.shape, generator=generator), latents.device)
    share = send(share, latents.device).view(1, 1, -1, 1, 1)
    return share * noise + (1 - share) * latents


# ------------------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class Options:
    """How to sample. The defaults are the official ones of a distilled checkpoint."""

    steps: tuple[int, ...] = (2, 2, 2)  # one number a stage
    guidance: float = 1.0  # above 1 every step costs a second call, with the negative prompt
    zero_star: bool = False  # CFG-Zero*: the negative prompt's prediction is first fitted to the other
    zero_steps: int | None = 1  # with zero_star the first zero_steps + 1 steps predict zero; none: no step does
    amplify_first_chunk: bool = True  # the first chunk takes twice the steps (dmd sampler only)
    align: bool = True  # the warp has the target's time indices; off: it precedes the target
    warp_fill: str = "mean"  # of what the warp does not show; or smooth (from around it), or black
    warp_band: str = "short"  # which the warp joins; or mid: a quarter of the tokens, the realtime recipe
    drop: bool = True  # history tokens without a visible source are dropped
    threshold: float = 0.1  # least visible share of a kept token
    warp_noise: bool = True  # warp and prefix get a little noise, as history had in training
    warp_sigma: tuple[float, float] = (0.111, 0.135)  # its share is drawn from here
    image_noise: bool = False  # the latents of an image get noise before all stages, not the warp's alone
    image_sigma: tuple[float, float] = (0.111, 0.135)  # its share, and that of a video
    video_noise: bool = True  # the latents of a video that is continued get noise
    previous: tuple[int, int, int] = BANDS  # latent frames of earlier chunks beside the warp: long, mid, short
    mask_lag: bool = True  # kept for parity: after chunk 0 an official mask is that of one frame earlier than its warp
    # the first latent that continues a video is overwritten with the video's first, as officially
    restart: bool = False

    def __post_init__(self):
        sigmas = self.warp_sigma, self.image_sigma
        require(
            self,
            ("steps", 1 <= min(self.steps, default=0) <= max(self.steps) <= 1000, "numbers from 1 to 1000"),
            ("guidance", 0 <= self.guidance <= 1000, "from 0 to 1000"),
            ("zero_steps", self.zero_steps is None or self.zero_steps >= 0, "at least 0, or none"),
            ("threshold", 0 <= self.threshold <= 1, "from 0 to 1"),
            ("warp_sigma image_sigma", all(0 <= low <= high <= 1 for low, high in sigmas),
             "two numbers from 0 to 1, in order"),
            ("previous", min(self.previous) >= 0, "no negative numbers"),
            ("warp_fill", self.warp_fill in FILLS, "mean, smooth or black"),
            ("warp_band", self.warp_band in ("short", "mid"), "short or mid"),
            ("warp_band previous", self.warp_band == "short" or self.previous[1] % 2 == 0,
             "an even number of mid frames before a warp in that band, else a pair would mix both"),
        )


Some = TypeVar("Some", bound=Options)


def model_options(weights: Path, defaults: Some = Options()) -> Some:
    """The `defaults` with the official settings of the kind of checkpoint in `weights`, or a small model's own."""
    index, stages = read_index(weights), load_schedule(weights).stages
    steps = index.num_inference_steps or (2 if index.is_distilled else 20 if stages > 1 else 50)
    guidance = index.guidance_scale
    if guidance is None:
        guidance = 1.0 if index.is_distilled else 5.0
    zero_star = index.is_cfg_zero_star and not index.is_distilled
    return replace(defaults, steps=(steps,) * stages, guidance=guidance, zero_star=zero_star,
                   warp_fill=index.warp_fill)


def stage_steps(options: Options, schedule: Schedule, chunk: int) -> tuple[int, ...]:
    """The steps of a chunk, counted from 0, one number a stage: so often `Rollout` tells of one."""
    twice = schedule.sampler == "dmd" and options.amplify_first_chunk and chunk == 0
    return tuple(steps * (2 if twice else 1) for steps in options.steps)


# ------------------------------------------------------------------------------------------------------------- rollout


@dataclass(frozen=True)
class Chunk:
    frames: Tensor  # [1, 3, 33, H, W] in [-1, 1]
    latents: Tensor  # [1, C, 9, H/8, W/8]
    warp: Warp | None  # what led it


CARRIED = ("given", "first_frame", "prefix", "noisy_prefix", "native", "earlier")  # latents of a rollout's state


class Rollout:
    """One video, made chunk by chunk: each `next` takes the chunk's poses, or its warp, or nothing, and returns it.

    Memory does not grow with the number of chunks, but for a picture each that a `Memory` may keep. `given` holds the
    latents that precede the first chunk (the official latent output puts them in front): the fake latent of an image,
    or those of a video.
    """

    def __init__(self, models: Models[Helios], prompts: Prompts, size: tuple[int, int], generator: torch.Generator,
                 image: Tensor | None = None, video: Tensor | None = None, camera: Camera | Memory | None = None,
                 lora: Lora | None = None, options: Options = Options(),
                 on_step: Callable[[int, int, int], None] | None = None):
        """image [1, 3, H, W] or video [1, 3, T, H, W] (at least 33 frames) in [-1, 1], the video also as uint8;
        `generator` on the CPU; `on_step` is told (chunk, stage, step) before each step. Raises ValueError for what does
        not go together: size or steps and the schedule, a camera that was used, a LoRA and the model or the prompts."""
        multiple = size_multiple(models.schedule)
        if any(side % multiple or side <= 0 for side in size):
            raise ValueError(f"size {size[0]}x{size[1]}: height and width must be multiples of {multiple}")
        if len(options.steps) != models.schedule.stages:
            raise ValueError(f"steps {options.steps}: expected {models.schedule.stages} numbers, one a stage")
        if camera is not None and camera.begun:
            raise ValueError("this camera has been used: each rollout needs its own")
        models.transformer.set_lora(lora)  # a LoRA of another model is refused here, before any work
        models.transformer.set_lora(None)
        self.models, self.camera, self.lora, self.options = models, camera, lora, options
        self.prompts = self.fitting(prompts)
        self.generator = generator
        self.on_step = on_step or (lambda chunk, stage, step: None)
        self.device = models.transformer.proj_out.weight.device
        self.size = size
        self.latent_shape = models.transformer.config.in_channels, size[0] // 8, size[1] // 8
        self.chunk = 0
        self.flops = 0  # of the transformer, so far
        self.first_frame: Tensor | None = None  # clean latent that replaces the first one generated
        self.prefix: Tensor | None = None  # what stands at time index 0
        self.noisy_prefix: Tensor | None = None  # the same for the warp's stage
        self.given = self.zeros(0)
        self.earlier = self.zeros(0)  # generated latents, as many as the warp's stage may look at
        self.text_cache: dict[tuple[str, bool], list] = {}
        if image is not None:
            self.start_from_image(image.to(self.device))
        elif video is not None:
            self.start_from_video(video)
        self.native = torch.cat([self.zeros(sum(BANDS)), self.given], dim=2)[:, :, -sum(BANDS):]

    # ---- random draws, all on the CPU and in the official order

    def normal(self, frames: int) -> Tensor:
        channels, height, width = self.latent_shape
        return send(torch.randn(1, channels, frames, height, width, generator=self.generator), self.device)

    def noised(self, latents: Tensor, sigma: tuple[float, float], each_frame: bool = False) -> Tensor:
        return add_noise(latents, sigma, self.generator, each_frame)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised posterior sample of a video [1, 3, 1 + 4k, H, W]: [1, C, 1 + k, h, w]."""
        if tuple(video.shape[-2:]) != self.size:
            raise ValueError(f"frames of {video.shape[-2]}x{video.shape[-1]}, expected {self.size[0]}x{self.size[1]}")
        vae = self.models.vae
        video = video.to(self.device)
        mean, logvar = vae.encode(video / 255 * 2 - 1 if video.dtype == torch.uint8 else video)
        latents = vae.normalize(vae.sample(mean, logvar, self.normal(mean.shape[2])))
        return self.finite(latents, "encoded pictures")

    def finite(self, x: Tensor, what: str) -> Tensor:
        if not x.isfinite().all():
            raise ValueError(f"chunk {self.chunk + 1}: {what} are not finite; are the VAE's weights damaged?")
        return x

    def zeros(self, frames: int) -> Tensor:
        channels, height, width = self.latent_shape
        return torch.zeros(1, channels, frames, height, width, device=self.device)

    # ---- before the first chunk

    def start_from_image(self, image: Tensor) -> None:
        """The image is the first frame, and as a standing video's end the latent before it."""
        options = self.options
        self.first_frame = self.prefix = self.encode(image[:, :, None])
        fake = self.encode(image[:, :, None].expand(-1, -1, WINDOW, -1, -1))[:, :, -1:]
        if options.image_noise:
            self.prefix = self.noised(self.prefix, options.image_sigma)
            fake = self.noised(fake, options.image_sigma)
        self.given = fake

    def start_from_video(self, video: Tensor) -> None:
        """The last whole chunks of a video become its history."""
        count = video.shape[2] // WINDOW
        if count == 0:
            raise ValueError(f"a video to continue needs at least {WINDOW} frames, this one has {video.shape[2]}")
        self.prefix = first = self.encode(video[:, :, :1])
        self.first_frame = first if self.options.restart else None
        chunks = [self.encode(chunk) for chunk in video[:, :, -count * WINDOW:].split(WINDOW, dim=2)]
        if self.options.video_noise:
            self.prefix = self.noised(self.prefix, self.options.image_sigma)
            chunks = [self.noised(chunk, self.options.image_sigma, each_frame=True) for chunk in chunks]
        self.given = torch.cat(chunks, dim=2)

    # ---- prompts

    def fitting(self, prompts: Prompts) -> Prompts:
        """The prompts, if all are there that this rollout needs."""
        if self.lora is not None and prompts.trigger is None:
            raise ValueError("a LoRA needs the prompt with its trigger")
        if self.options.guidance > 1 and prompts.negative is None:
            raise ValueError("guidance needs the negative prompt")
        return prompts

    # ---- histories

    def native_history(self) -> History:
        """What plain Helios sees: the first frame and the last 19 latents, all of their tokens."""
        first = self.zeros(1) if self.prefix is None else self.prefix
        return pseudo_history(first, self.native, drop=False)

    def warp_latents(self, warp: Warp) -> tuple[Tensor, Tensor]:
        """Latents and latent visibility of a chunk's warp of 33 frames, or of 34 whose first is the frame before."""
        frames = warp.frames.shape[2]
        if frames not in (WINDOW, WINDOW + 1):
            raise ValueError(f"a chunk's warp has {WINDOW} frames (or {WINDOW + 1} with the one before), this"
                             f" has {frames}")
        self.normal(1)  # kept for parity: the official code encodes the first frame alone and does not use it
        latents = self.encode(warp.frames[:, :, -WINDOW:])
        if self.options.warp_noise:
            latents = self.noised(latents, self.options.warp_sigma, each_frame=True)
        visible = warp.visible if self.options.mask_lag else warp.visible[:, :, -WINDOW:]
        return latents, mask_latents(visible.to(self.device))

    def warp_history(self, warp: Warp) -> History:
        """First frame, latents generated so far, and the warp, as `pseudo_history` under the options.

        Kept for parity: in chunk 0 the fake latent is the past, which later chunks do not see (the native history
        does).
        """
        options = self.options
        if self.prefix is None:
            raise ValueError("a warp needs the image (or video) that it was made from")
        if options.warp_noise and not options.image_noise and self.noisy_prefix is None:
            self.noisy_prefix = self.noised(self.prefix, options.warp_sigma)  # drawn once, for all chunks
        first = self.prefix if self.noisy_prefix is None else self.noisy_prefix
        latents, visible = self.warp_latents(warp)
        previous = self.native[:, :, -1:] if self.chunk == 0 and options.previous[2] else self.earlier
        time = torch.arange(FIRST_TARGET, FIRST_TARGET + CHUNK, device=self.device)
        return pseudo_history(first, previous, options.previous, latents, visible, warp_time=time,
                              target=time if options.align else time + CHUNK, warp_band=options.warp_band,
                              drop=options.drop, threshold=options.threshold)

    # ---- a chunk

    def text(self, name: str, lora: bool) -> list:
        """Keys and values of a prompt, computed when first needed and kept for all chunks: with a LoRA on the layers
        that make them they are others, so they are kept apart."""
        if (name, lora) not in self.text_cache:
            self.text_cache[name, lora] = self.models.transformer.text(getattr(self.prompts, name))
        return self.text_cache[name, lora]

    def velocity_for(self, stage: int, shape: torch.Size, led: History | None, native: History) -> Velocity:
        """The guided model of one stage, with all that stays the same over its steps prepared: led by the warp in the
        first one, where alone the LoRA and its prompt are active."""
        options, transformer = self.options, self.models.transformer
        history = native if stage > 0 or led is None else led
        lora = None if history is native else self.lora
        transformer.set_lora(lora)
        text = self.text("plain" if lora is None else "trigger", lora is not None)
        negative = self.text("negative", lora is not None) if options.guidance > 1 else None
        context = transformer.context(history, shape[2:])
        cost = transformer.flops(context, text[0][0].shape[1]) * (1 if negative is None else 2)
        zeroed = options.zero_steps + 1 if options.zero_star and options.zero_steps is not None and stage == 0 else 0

        def velocity(latents: Tensor, timestep: float, step: int) -> Tensor:
            self.on_step(self.chunk, stage, step)
            if negative is not None and step < zeroed:
                return torch.zeros_like(latents)
            time = torch.full((1,), timestep, device=self.device)  # written there: nothing is copied in a step
            self.flops += cost
            guided = transformer(latents, time, text, context)
            if negative is None:
                return guided
            return guide(guided, transformer(latents, time, negative, context), options.guidance, options.zero_star)

        return velocity

    @torch.no_grad()
    def next(self, poses: Tensor | None = None, warp: Warp | None = None, prompts: Prompts | None = None,
             zoom: Tensor | None = None) -> Chunk:
        """Generate 33 frames: along `poses` [T, 4, 4] (needs the camera; the last one holds if there are fewer than
        33), with focal lengths `zoom` [T, 2] times the picture's, led by a `warp` that was made elsewhere ([1, 3, 33 or
        34, H, W]), or, with neither, as plain Helios continues.

        After an error the rollout is as it was before, so that a second try gives what the first would have."""
        before, words = self.state(), (self.prompts, self.text_cache)
        if prompts is not None and prompts is not self.prompts:
            self.prompts, self.text_cache = self.fitting(prompts), {}
        try:
            if poses is not None:
                if self.camera is None or warp is not None:
                    raise ValueError("poses need a camera, and no warp beside them")
                warp = self.camera.warp(poses, zoom)
            warp = None if warp is None else fill_warp(warp, self.options.warp_fill)
            noise = self.normal(CHUNK)
            native = self.native_history()
            led = None if warp is None else self.warp_history(warp)
            amplify = self.options.amplify_first_chunk and self.chunk == 0
            latents = sample(lambda stage, shape: self.velocity_for(stage, shape, led, native), noise,
                             self.models.schedule, self.options.steps, self.generator, amplify,
                             where=f"chunk {self.chunk + 1}: ")
            return self.finish(latents, warp)
        except BaseException:
            self.restore(before)
            self.prompts, self.text_cache = words
            raise
        finally:
            self.models.transformer.set_lora(None)

    def finish(self, latents: Tensor, warp: Warp | None) -> Chunk:
        """Book the chunk's latents into both histories and decode them by themselves."""
        if self.chunk == 0 and self.first_frame is not None:
            latents = torch.cat([self.first_frame, latents[:, :, 1:]], dim=2)
        elif self.prefix is None:
            self.prefix = latents[:, :, :1]
        self.native = torch.cat([self.native, latents], dim=2)[:, :, -sum(BANDS):]
        earlier = torch.cat([self.earlier, latents], dim=2)
        self.earlier = earlier[:, :, max(earlier.shape[2] - sum(self.options.previous), 0):]
        vae = self.models.decoder or self.models.vae
        frames = self.finite(vae.decode(vae.denormalize(latents)), "decoded frames")
        self.chunk += 1
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
