"""Training: one video (or a few) in, a camera-control LoRA out.

    python train.py --video car-roundabout --prompt "a car driving through a roundabout" --out runs/car

Low-rank adapters on all self-attentions learn, over the frozen model, to follow a warp that is given as in sampling
(`wah.pseudo_history`; paper section 4): in the first pyramid stage alone, by flow matching towards the true video.
`Recipe` holds every number, with the release's as defaults; draws are from one CPU stream in the official order, so
that losses, gradients and updates are the official ones. What a step sees is chosen in clips.py; a run's folder is
files/run.py. Several GPUs share the draws of a step (torchrun; helios/team.py). Left out: loss weights by noise level,
gradient accumulation, batches.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clips import (
    Case,
    Choices,
    Clip,
    Condition,
    Conditions,
    Source,
    draw_case,
    files_beside,
    item_order,
    load_clips,
    read_sources,
)
from files.cli import Parser, deferred_interrupt, existing, run_program
from files.draw import contact_sheet, save_png
from files.machine import Clock, allow_tf32, default_device, describe_machine, peak_memory, send, use_device
from files.media import to_frames
from files.run import Run
from files.settings import parse_settings, require
from files.writing import check_apart, fingerprint
from geometry.camera import WINDOW
from geometry.pi3x import find_pi3x
from helios.flow import Item, Schedule, interval_levels, load_schedule, shifted_levels, table_levels, training_item
from helios.index import ModelIndex, check_weights, read_index
from helios.load import (
    MEMORY,
    NEGATIVE_PROMPT,
    Loader,
    Models,
    Prompts,
    add_trigger,
    default_weights,
    embed_prompts,
    files_read,
    load_models,
)
from helios.lora import Lora
from helios.team import Led, Text, add_gradients, follow, lead, ranks
from helios.vae import VAE
from job import choose_size
from memory import Camera
from model import Helios, History
from render import FILLS
from wah import BANDS, CHUNK, Rollout, add_noise, model_options, pseudo_history

TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")  # of every block; nothing else is trained
# may change when a run goes on
FREE = {"base", "steps", "save_every", "sample_every", "checkpointing", "keep_attention", "cache"}


@dataclass(frozen=True)
class Recipe(Choices):
    """How to train. The defaults are those of the release; --set changes them."""

    steps: int = 1000  # updates, each from one clip
    rank: int = 32  # of the LoRA
    scale: float = 1.0  # alpha / rank
    lr: float = 1e-4  # learning rate
    warmup: int = 20  # steps in which the learning rate rises
    decay: str = "constant"  # or cosine or linear, down to final_lr * lr in the last step
    final_lr: float = 0.0  # share of lr that a falling rate ends with
    weight_decay: float = 0.01  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    checkpointing: bool = True  # blocks are computed again in the backward pass: less memory
    keep_attention: bool = True  # or compute it twice: a sixth more work and, at 384x640, 4.5 GiB less memory
    stages: tuple[int, ...] = (0,)  # whose mean loss is trained; in sampling the first alone has the LoRA
    levels: str = "table"  # or shifted (dynamic shifting) or interval (between a sampler's first two points)
    interval_steps: int = 2  # of that sampler
    density: str = "uniform"  # of the noise levels; or logit_normal, or first (the stage's first level alone)
    draws: int = 1  # of noise and its level in a step; more make a steadier gradient where warps cost more than it does
    history: tuple[int, int, int] = BANDS  # latent frames of the long, mid and short band before the target
    warp_noise: bool = True  # warp and first frame get a little noise
    warp_sigma: tuple[float, float] = (0.111, 0.135)  # its share is drawn from here
    position: str = "target"  # time indices of the warp; or reversed, or before (the target)
    delta: int = 0  # is subtracted from them
    drop: bool = True  # history tokens without a visible source are dropped
    warp_band: str = "short"  # which the warp joins, as in sampling
    threshold: float = 0.5  # least visible share of a kept token. Kept for parity: sampling keeps more, from 0.1 on
    geometry_pixels: int = 0  # at most, in a frame that Pi3X sees and that warps are rendered at; 0: its own number
    save_every: int = 100  # steps
    sample_every: int = 0  # steps between sample_*.png; 0: none
    cache: int = 256  # VAE windows of each kind that are kept in host memory, up to 2.4 MB each at 384x640

    def __post_init__(self):
        shares = self.reverse, self.first, self.future, self.threshold, self.final_lr
        low, high = self.future_count
        whole = self.steps, self.rank, self.draws, self.save_every, self.max_history, self.cache
        require(
            self,
            ("steps rank draws save_every max_history cache", min(whole) > 0, "at least 1"),
            ("steps", self.steps <= 10**7, "at most 10^7"),
            ("rank draws", max(self.rank, self.draws) <= 1024, "at most 1024"),
            ("lr scale clip", min(self.lr, self.scale, self.clip) > 0, "more than 0"),
            ("warmup weight_decay", min(self.warmup, self.weight_decay) >= 0, "at least 0"),
            ("reverse first future threshold final_lr", 0 <= min(shares) <= max(shares) <= 1, "from 0 to 1"),
            ("decay", self.decay in ("constant", "cosine", "linear"), "constant, cosine or linear"),
            ("levels", self.levels in ("table", "shifted", "interval"), "table, shifted or interval"),
            ("interval_steps", self.interval_steps > 1, "at least 2"),
            ("density", self.density in ("uniform", "logit_normal", "first"), "uniform, logit_normal or first"),
            ("position", self.position in ("target", "reversed", "before"), "target, reversed or before"),
            ("future_count", 1 <= low <= high <= WINDOW, f"two numbers from 1 to {WINDOW}, in order"),
            ("warp_band", self.warp_band in ("short", "mid"), "short or mid"),
            ("warp_band history", self.warp_band == "short" or self.history[1] % 2 == 0,
             "an even number of mid frames before a warp in that band"),
            ("warp_fill", self.warp_fill in FILLS, "mean, smooth or black"),
            ("forms", 1 <= self.forms <= 12, "from 1 to 12"),
            ("history", min(self.history) >= 0, "no negative numbers"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("geometry_pixels", self.geometry_pixels == 0 or self.geometry_pixels >= 1000, "0, or at least 1000"),
            ("sample_every", self.sample_every >= 0, "at least 0"),
            ("warp_sigma", 0 <= self.warp_sigma[0] <= self.warp_sigma[1] <= 1, "two numbers from 0 to 1, in order"),
        )


# --------------------------------------------------------------------------------------------------- what a step sees


def build_history(condition: Condition, recipe: Recipe, generator: torch.Generator) -> History:
    """What the network sees beside the noisy target: first frame, fake latent, warp.

    Kept for parity: earlier latents are never among it, also not for later chunks, whereas sampling has them. The
    target's position follows from `recipe.history`, which in sampling it doesn't.
    """
    first, warp = condition.image, condition.warp
    if recipe.warp_noise:
        warp = add_noise(warp, recipe.warp_sigma, generator, each_frame=True)
        first = add_noise(first, recipe.warp_sigma, generator, each_frame=False)
    past = condition.fake if recipe.history[2] else condition.fake[:, :, :0]
    start = 1 + sum(recipe.history)
    target = torch.arange(start, start + CHUNK, device=warp.device)
    time = {"target": target, "reversed": target.flip(0), "before": target - CHUNK}[recipe.position] - recipe.delta
    return pseudo_history(first, past, recipe.history, warp, condition.visible, start=start, warp_time=time,
                          warp_band=recipe.warp_band, drop=recipe.drop, threshold=recipe.threshold)


def draw_items(clean: Tensor, schedule: Schedule, recipe: Recipe, generator: torch.Generator) -> list[Item]:
    """`recipe.draws` times a flow-matching pair for each trained stage, all stages from the same noise."""
    levels = {"table": table_levels, "shifted": shifted_levels,
              "interval": partial(interval_levels, steps=recipe.interval_steps)}[recipe.levels]

    def draw() -> Tensor:
        if recipe.density == "first":
            return torch.zeros(1)
        uniform = recipe.density == "uniform"
        return torch.rand(1, generator=generator) if uniform else torch.randn(1, generator=generator).sigmoid()

    items = []
    for _ in range(recipe.draws):
        noise = send(torch.randn(clean.shape, generator=generator), clean.device)
        items += [training_item(clean, noise, draw(), schedule, stage, levels) for stage in recipe.stages]
    return items


# ------------------------------------------------------------------------------------------------------------ the LoRA


def new_lora(transformer: Helios, recipe: Recipe, generator: torch.Generator) -> Lora:
    """fp32 adapters as PEFT makes them: A Kaiming-uniform, B zero. Kept for parity: both are drawn before A counts."""
    device, adapters = transformer.proj_out.weight.device, {}
    for name in (f"blocks.{index}.{target}" for index in range(transformer.config.num_layers) for target in TARGETS):
        out, into = transformer.get_parameter(f"{name}.weight").shape
        down, up = torch.empty(recipe.rank, into), torch.empty(out, recipe.rank)
        for matrix in (down, up, down):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        down, up = nn.Parameter(down.to(device)), nn.Parameter(torch.zeros_like(up, device=device))
        adapters[name] = (down, up, recipe.scale)
    return Lora("the new LoRA", adapters)


def learning_rate(recipe: Recipe, step: int) -> float:
    progress = step / max(recipe.steps - 1, 1)
    fall = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[recipe.decay]
    return recipe.lr * min(1, (step + 1) / max(recipe.warmup, 1)) * (1 - fall * (1 - recipe.final_lr))


class Trainer:
    """The LoRA, its optimiser and the one stream of random numbers: all that a step changes."""

    def __init__(self, transformer: Helios, schedule: Schedule, recipe: Recipe, led: Led | None = None):
        """led: the transformer of several processes, of which this one's is `transformer`."""
        self.led = led
        self.transformer, self.schedule, self.recipe = transformer, schedule, recipe
        self.clock = Clock(transformer.proj_out.weight.device)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.lora = new_lora(transformer, recipe, self.generator)
        transformer.train().checkpointing, transformer.keep_attention = recipe.checkpointing, recipe.keep_attention
        transformer.set_lora(self.lora)
        self.tensors = {f"{name}.lora_{half}.weight": matrix for name, (down, up, _) in self.lora.adapters.items()
                        for half, matrix in (("A", down), ("B", up))}
        self.optimizer = torch.optim.AdamW(self.tensors.values(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.steps = self.tokens = self.flops = 0  # steps since the beginning, the others since this program's start

    def step(self, history: History, clean: Tensor, text: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One update on clean latents [1, 16, 9, h, w]. Raises ValueError if loss or gradient isn't finite; nothing is
        changed then but the random numbers."""
        recipe, transformer = self.recipe, self.transformer
        items = draw_items(clean, self.schedule, recipe, self.generator)
        self.optimizer.zero_grad()
        context_of = lru_cache(None)(lambda shape: transformer.context(history, shape))  # one a stage
        given = [(item.latents, item.timestep, item.target, context_of(item.latents.shape[2:])) for item in items]
        if self.led is None:
            losses = add_gradients(transformer, text, given, lap=self.clock.lap)
        else:
            losses = self.led.add_gradients(self.lora, cast(Text, text), given, self.clock.lap)
        for _, _, _, context in given:
            self.tokens += context.rope.shape[0]
            self.flops += transformer.flops(context, text[0][0].shape[1], training=True)
        norm = nn.utils.clip_grad_norm_(self.tensors.values(), recipe.clip)
        numbers = losses.mean(), norm, items[0].timestep[0], items[0].sigma[0]
        loss, norm, timestep, sigma = torch.stack(numbers).tolist()  # waits for the device, as the clock does
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(f"step {self.steps + 1}: loss {loss:g}, gradient norm {norm:g}, expected finite numbers")
        rate = learning_rate(recipe, self.steps)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        self.clock.lap("optimiser")
        return {"step": self.steps, "loss": loss, "grad_norm": norm, "lr": rate, "timestep": timestep, "sigma": sigma}

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs to go on bit-exactly."""
        moments = {f"{name}.{moment}": self.optimizer.state[matrix][moment] for name, matrix in self.tensors.items()
                   for moment in ("exp_avg", "exp_avg_sq")}
        return {**self.tensors, **moments, "rng": self.generator.get_state()}

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Take what `state` gave after so many steps."""
        for name, matrix in self.tensors.items():
            ends = "", ".exp_avg", ".exp_avg_sq"
            value, average, square = (state[f"{name}{end}"].to(matrix.device) for end in ends)
            matrix.data.copy_(value)
            self.optimizer.state[matrix] = {
                "step": torch.tensor(float(steps)), "exp_avg": average, "exp_avg_sq": square}
        self.generator.set_state(state["rng"])
        self.steps = steps

    def result(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The LoRA's tensors, and its file's header: settings as diffusers and PEFT read them, and the warp's band."""
        recipe = self.recipe
        settings = {"r": recipe.rank, "lora_alpha": recipe.scale * recipe.rank, "target_modules": list(TARGETS)}
        tensors = {name: matrix.detach() for name, matrix in self.tensors.items()}
        settings = {f"transformer.{key}": value for key, value in settings.items()}
        return tensors, {"lora_adapter_metadata": json.dumps(settings), "wah_warp_band": recipe.warp_band}


# ------------------------------------------------------------------------------------------------------------- program


@dataclass(frozen=True)
class Job:
    """What the words ask for, checked."""

    recipe: Recipe
    size: tuple[int, int]
    sources: list[Source]
    index: ModelIndex


def read_recipe(index: ModelIndex, settings: list[str]) -> Recipe:
    """The official recipe, over it the weights' own, and over both the `settings`."""
    return parse_settings([*index.train, *settings], Recipe())


def check(args: argparse.Namespace) -> Job:
    """What can be said of the words alone."""
    use_device(args.device)
    args.weights = check_weights(args.weights)
    index, schedule = read_index(args.weights), load_schedule(args.weights)
    recipe = read_recipe(index, args.set)
    recipe = replace(recipe, draws=recipe.draws * ranks()[1])  # of all processes: a run is that of one with as many
    sources = read_sources(args.video, args.prompt)
    if args.memory == "stream" and not recipe.checkpointing:
        raise ValueError("--memory stream needs --set checkpointing=true: the backward pass fetches the blocks once"
                         " more")
    size = choose_size(args)
    if not set(recipe.stages) <= set(range(schedule.stages)) or not recipe.stages:
        raise ValueError(f"--set stages={recipe.stages}: {args.weights} has stages 0 to {schedule.stages - 1}")
    if not len(args.poses) == len(args.depth) in (0, len(sources)):
        raise ValueError(f"{len(args.poses)} --poses and {len(args.depth)} --depth: expected one of each for each of"
                         f" the {len(sources)} videos, or none")
    return Job(recipe, size, sources, index)


def describe_run(args: argparse.Namespace, job: Job, clips: list[Clip]) -> dict:
    """What the LoRA depends on; weights and frames by what they hold."""
    data = [{"video": source.video.name, "prompt": source.prompt, "geometry": clip.forward.path.name}
            for source, clip in zip(job.sources, clips)]  # the geometry's name stands for the frames too
    weights = fingerprint(args.weights, files_read(args.weights))
    return {"base": args.weights.resolve().name, "weights": weights, "fp8": args.memory == "fp8", "size": job.size,
            "clips": data, "recipe": asdict(job.recipe)}


def caption(clip: Clip, case: Case) -> str:
    """Of a clip as the case shows it: in other colours its own words would be wrong."""
    return add_trigger("") if case.recoloured else clip.prompt


def draw_sample(models: Models[Helios], prompts: Prompts, trainer: Trainer, clip: Clip, job: Job,
                weights: Path, path: Path) -> None:
    """A contact sheet of what the LoRA makes of the clip's first frame and its own camera, with a fixed seed."""
    generator = torch.Generator().manual_seed(trainer.recipe.seed)
    camera = Camera(clip.forward[0], job.size, unit=1.0)  # the poses are in the geometry's own unit
    options = replace(model_options(weights), warp_band=trainer.recipe.warp_band)  # as the LoRA has learnt it
    rollout = Rollout(models, prompts, job.size, generator, image=clip.pixels(0)[:, :, 0], camera=camera,
                      lora=trainer.lora, options=options)
    models.transformer.eval()
    chunk = rollout.next(poses=clip.forward.c2w[:WINDOW])
    models.transformer.train().set_lora(trainer.lora)
    led = {} if chunk.warp is None else {"warp": chunk.warp.frames}
    rows = {"video": clip.pixels(*range(WINDOW)), **led, f"step {trainer.steps}": chunk.frames}
    save_png(path, contact_sheet({name: to_frames(video) for name, video in rows.items()}))


def report(trainer: Trainer, steps: int, device: str) -> None:
    seconds, total = trainer.clock.seconds, sum(trainer.clock.seconds.values())
    split = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in seconds.items())
    work = trainer.flops / 1e12
    busy = sum(value for name, value in seconds.items() if name in ("forward", "backward"))
    print(f"{total / steps:.3g} s/step ({split}), {trainer.tokens / steps:.0f} tokens/step, {work / busy:.3g} TFLOP/s"
          f" in forward and backward ({work / steps:.3g} TFLOP/step counted in the blocks: forward, recomputation,"
          f" gradients of activations), peak {peak_memory(device)}")


def fit(trainer: Trainer, run: Run, clips: list[Clip], conditions: Conditions,
        text_of: Callable[[str], list[tuple[Tensor, Tensor]]], draw: Callable[[Path], None]) -> None:
    """Steps from where the trainer is to the end, or to Ctrl-C; saves as the recipe says. `text_of` a prompt are its
    keys and values; `draw` writes a sheet of what the LoRA can."""
    recipe, clock = trainer.recipe, trainer.clock
    order = islice(item_order(len(clips), recipe.seed), trainer.steps, recipe.steps)

    def sheet() -> None:
        if recipe.sample_every and trainer.steps and trainer.steps % recipe.sample_every == 0:
            with run.sheet(trainer.steps) as path:
                draw(path)

    if not run.sheet_path(trainer.steps).exists():
        sheet()  # the run ended just before it
    with deferred_interrupt() as stop, tqdm(total=recipe.steps, initial=trainer.steps, unit="step") as bar:
        clock.start()
        for index in order:
            case = draw_case(recipe, len(clips[index].frames), f"online_{index:06d}", trainer.steps + 1)
            condition, text = conditions(index, case), text_of(caption(clips[index], case))
            history = build_history(condition, recipe, trainer.generator)
            clock.lap("data")
            try:
                metrics = trainer.step(history, condition.target, text)
            except ValueError as error:
                raise ValueError(f"{error}; {run.last()}") from None
            run.add({**metrics, "video": index})
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", grad_norm=f"{metrics['grad_norm']:.3f}", refresh=False)
            bar.update()
            if trainer.steps % recipe.save_every == 0 or trainer.steps == recipe.steps or stop.is_set():
                run.save(trainer.steps, trainer.state(), *trainer.result())
            sheet()
            clock.lap("saving")
            if stop.is_set():
                break


def name_inputs(args: argparse.Namespace, job: Job) -> list[Path]:
    """All that the run reads."""
    videos = [source.video for source in job.sources]
    beside = [file for video in videos for file in files_beside(video) or ()]
    table = [Path(video) for video in args.video if video.lower().endswith(".csv")]
    geometry = existing(find_pi3x(args.geometry, args.weights))
    return [*videos, *beside, *table, *args.poses, *args.depth, args.weights, *geometry]


def train(args: argparse.Namespace) -> None:
    job = check(args)
    allow_tf32(True)  # as officially
    check_apart([args.out], name_inputs(args, job))
    with lead(Helios, "draws", args.device) as load, Run(args.out, FREE, args.resume, args.overwrite) as run:
        train_in(run, args, job, load)


def train_in(run: Run, args: argparse.Namespace, job: Job, load: Loader) -> None:
    """Everything once the words are checked and the folder is ours."""
    recipe, known = job.recipe, list(zip(args.poses, args.depth))
    clips = load_clips(job.sources, known, find_pi3x(args.geometry, args.weights), args.geometry is not None, job.size,
                       recipe.geometry_pixels, run.place, args.device)
    about, machine = describe_run(args, job, clips), describe_machine(args.device)
    saved = run.resume(about, machine) if args.resume else None  # or refused before any large network is read
    wanted = {clip.prompt for clip in clips} | {add_trigger("")}
    negative = [NEGATIVE_PROMPT] if model_options(args.weights).guidance > 1 else []
    if recipe.sample_every:
        wanted |= {job.sources[0].prompt, *negative}
    embeddings = embed_prompts(args.weights, wanted, args.device, args.memory)
    models = load_models(Helios, args.weights, args.device, args.memory, "wan", load)
    transformer, led = models.transformer, None
    if isinstance(transformer, Led):
        led, models = transformer, replace(models, transformer=transformer.network)
    trainer = Trainer(models.transformer, models.schedule, recipe, led)
    conditions = Conditions(cast(VAE, models.vae), clips, job.size, recipe, recipe.cache, args.device)
    if saved is None:
        run.begin(about, machine)
    else:
        trainer.restore(*saved)
    began = trainer.steps

    def embedding(prompt: str) -> Tensor:
        return embeddings[prompt].to(args.device)

    text_of = lru_cache(1)(lambda prompt: transformer.text(embedding(prompt)))  # 0.4 GB in the released model

    def draw(path: Path) -> None:
        prompts = Prompts(*map(embedding, (job.sources[0].prompt, clips[0].prompt, *negative)))
        draw_sample(models, prompts, trainer, clips[0], job, args.weights, path)

    fit(trainer, run, clips, conditions, text_of, draw)
    if trainer.steps > began:
        report(trainer, trainer.steps - began, args.device)
    print(f"{trainer.steps} steps; wrote", *run.files)
    if trainer.steps < recipe.steps:
        words = [word for word in args.words if word not in ("--resume", "--overwrite")]
        print("to go on: python train.py", shlex.join([*words, "--resume"]))
        raise KeyboardInterrupt


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser("train.py", "Train a LoRA that makes Helios follow a camera, on one video or a few.", Recipe())
    parser.add_argument("--video", action="append", required=True, help="mp4, folder of frames, or a name in data/;"
                        " repeat it for several, or give a csv with the columns video and prompt")
    parser.add_argument("--prompt", action="append", default=[], help="what a video shows; for each, or once for all")
    parser.add_argument("--weights", type=Path, default=default_weights(),
                        help="folder in the official layout (default as for sample.py)")
    geometry = parser.add_mutually_exclusive_group()
    geometry.add_argument("--geometry", type=Path, help="Pi3X weights (default: Pi3X/model.safetensors in the weights'"
                                                        " folder or beside it)")
    geometry.add_argument("--depth", type=Path, action="append", default=[], help="instead: a video's depths, npy or"
                          " npz [T,h,w] or a folder of 16-bit png, and with them; of several videos in their order")
    parser.add_argument("--poses", type=Path, action="append", default=[],
                        help="its camera, a pose for each frame in the unit of the depths")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"), help="folder of the run")
    parser.add_argument("--size", help="HEIGHTxWIDTH, multiples of 64 (default: the model's own, officially 384x640)")
    going = parser.add_mutually_exclusive_group()
    going.add_argument("--resume", action="store_true", help="go on where the run in --out was saved")
    going.add_argument("--overwrite", action="store_true", help="start anew although --out holds a run")
    parser.add_argument("--memory", choices=MEMORY, default="full", help="how the weights are held, as in sample.py")
    parser.add_argument("--device", default=default_device(), help="cpu, mps, cuda or cuda:N (default: cuda if there"
                                                                   " is one)")
    return argparse.Namespace(**vars(parser.parse_args(words)), words=words)


def main(words: list[str] | None = None) -> int:
    if ranks()[0] > 0:
        return run_program("train.py", lambda _: follow(Helios), argparse.Namespace())
    return run_program("train.py", train, parse(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    sys.exit(main())
