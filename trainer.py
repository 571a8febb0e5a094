"""One training step of the camera LoRA: history, flow-matching pair, loss and update.

A warp stands in the history as it does in sampling (`wah.Rollout.warp_history`; paper section 4): aligned in time with
the target and without its invisible tokens. Low-rank adapters on all self-attentions learn, over the frozen model, to
follow it, in the first pyramid stage alone. `Recipe` holds every number, with the release's as defaults; draws are from
one CPU stream in the official order, so that losses, gradients and updates are the official ones.
Left out: loss weights by noise level, gradient accumulation, batches, several GPUs.
"""

import math
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camera import WINDOW
from checkpoint import Lora, open_safetensors
from clips import Choices, Condition
from flow import Item, Schedule, interval_levels, shifted_levels, table_levels, training_item
from model import Band, Helios, History
from wah import BANDS, CHUNK, add_noise

TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")  # of every block; nothing else is trained


@dataclass(frozen=True)
class Recipe(Choices):
    """How to train. The defaults are those of the release; --set changes them."""

    steps: int = 1000
    rank: int = 32
    scale: float = 1.0  # alpha / rank
    lr: float = 1e-4
    warmup: int = 20  # steps
    decay: str = "constant"  # or cosine or linear, down to final_lr * lr in the last step
    final_lr: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    checkpointing: bool = True
    keep_attention: bool = True  # or compute it twice: a sixth more work and, at 384x640, 3.6 GiB less memory
    stages: tuple[int, ...] = (0,)  # whose mean loss is trained; in sampling the first alone has the LoRA
    levels: str = "table"  # or shifted (dynamic shifting) or interval (between a sampler's first two points)
    interval_steps: int = 2  # of that sampler
    density: str = "uniform"  # of the noise levels; or logit_normal, or first (the stage's first level alone)
    draws: int = 1  # of noise and its level in a step; more make a steadier gradient where warps cost more than it does
    history: tuple[int, int, int] = BANDS  # latent frames of the long, mid and short band before the target
    warp_noise: bool = True
    warp_sigma: tuple[float, float] = (0.111, 0.135)
    position: str = "target"  # time indices of the warp; or reversed, or before (the target)
    delta: int = 0  # is subtracted from them
    drop: bool = True
    threshold: float = 0.5  # least visible share of a kept token. Kept for parity: sampling keeps more, from 0.1 on
    geometry_pixels: int = 0  # at most, in a frame that Pi3X sees and that warps are rendered at; 0: its own number
    save_every: int = 100
    sample_every: int = 0  # 0: never
    cache: int = 256  # VAE windows of each kind that are kept in host memory, up to 2.4 MB each at 384x640

    def __post_init__(self):
        shares = self.reverse, self.first, self.future, self.threshold, self.final_lr
        low, high = self.future_count
        whole = self.steps, self.rank, self.draws, self.save_every, self.max_history, self.cache
        for names, good, expected in (
            ("steps rank draws save_every max_history cache", min(whole) > 0, "at least 1"),
            ("lr scale clip", min(self.lr, self.scale, self.clip) > 0, "more than 0"),
            ("warmup weight_decay", min(self.warmup, self.weight_decay) >= 0, "at least 0"),
            ("reverse first future threshold final_lr", 0 <= min(shares) <= max(shares) <= 1, "from 0 to 1"),
            ("decay", self.decay in ("constant", "cosine", "linear"), "constant, cosine or linear"),
            ("levels", self.levels in ("table", "shifted", "interval"), "table, shifted or interval"),
            ("interval_steps", self.interval_steps > 1, "at least 2"),
            ("density", self.density in ("uniform", "logit_normal", "first"), "uniform, logit_normal or first"),
            ("position", self.position in ("target", "reversed", "before"), "target, reversed or before"),
            ("future_count", 1 <= low <= high <= WINDOW, f"two numbers from 1 to {WINDOW}, in order"),
            ("forms", 1 <= self.forms <= 12, "from 1 to 12"),
            ("history", min(self.history) >= 0, "no negative numbers"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("geometry_pixels sample_every", min(self.geometry_pixels, self.sample_every) >= 0, "at least 0"),
            ("warp_sigma", 0 <= self.warp_sigma[0] <= self.warp_sigma[1] <= 1, "two numbers from 0 to 1, in order"),
        ):
            if not good:
                found = ", ".join(f"{name} {getattr(self, name)}" for name in names.split())
                raise ValueError(f"--set: {found}: expected {expected}")


def parse_recipe(words: list[str]) -> Recipe:
    """A recipe from words like "rank=16" or "future_count=1,3"."""
    defaults, values = {field.name: field.default for field in fields(Recipe)}, {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in defaults:
            raise ValueError(f"--set {word}: expected NAME=VALUE, where NAME is one of {', '.join(defaults)}")
        default = defaults[name]
        kind = type(default[0] if isinstance(default, tuple) else default)
        read = {"true": True, "false": False}.__getitem__ if kind is bool else kind
        try:
            parts = tuple(read(part) for part in text.split(","))
        except (KeyError, ValueError):
            parts = ()
        fits = len(parts) == (len(default) if isinstance(default, tuple) else 1) or parts and name == "stages"
        if not fits or kind is float and not all(map(math.isfinite, parts)):
            raise ValueError(f"--set {word}: expected a value like {str(default).strip('()')}")
        values[name] = parts if isinstance(default, tuple) else parts[0]
    return Recipe(**values)


# --------------------------------------------------------------------------------------------------- what a step sees


def build_history(condition: Condition, recipe: Recipe, generator: torch.Generator) -> History:
    """What the network sees beside the noisy target: [image, fake, warp] in the short band.

    Kept for parity: earlier latents are never among it, also not for later chunks, whereas sampling has them; they are
    zeros, invisible, and so dropped. The target's position follows from `recipe.history`, which in sampling it doesn't.
    """
    image, warp, total = condition.image, condition.warp, sum(recipe.history)
    if recipe.warp_noise:
        warp = add_noise(warp, recipe.warp_sigma, generator, each_frame=True)
        image = add_noise(image, recipe.warp_sigma, generator, each_frame=False)
    fake = condition.fake if recipe.history[2] else condition.fake[:, :, :0]
    blank = warp.new_zeros(1, warp.shape[1], total - fake.shape[2], *warp.shape[3:])
    window = torch.cat([blank, fake], dim=2)
    visible = torch.cat([torch.zeros_like(blank[:, :1]), torch.ones_like(fake[:, :1])], dim=2)
    time_image, time_window, target = torch.arange(1 + total + CHUNK, device=warp.device).split([1, total, CHUNK])
    time_warp = {"target": target, "reversed": target.flip(0), "before": target - CHUNK}[recipe.position] - recipe.delta

    long, mid, short = window.split(recipe.history, dim=2)
    visible_long, visible_mid, visible_short = visible.split(recipe.history, dim=2)
    time_long, time_mid, time_short = time_window.split(recipe.history)

    def band(latents: Tensor, indices: Tensor, visible: Tensor) -> Band | None:
        return Band(latents, indices, visible if recipe.drop else None) if len(indices) else None

    return History(
        short=band(torch.cat([image, short, warp], dim=2), torch.cat([time_image, time_short, time_warp]),
                   torch.cat([torch.ones_like(image[:, :1]), visible_short, condition.visible], dim=2)),
        mid=band(mid, time_mid, visible_mid), long=band(long, time_long, visible_long),
        indices=target, threshold=recipe.threshold)


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
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        items += [training_item(clean, noise, draw(), schedule, stage, levels) for stage in recipe.stages]
    return items


# ------------------------------------------------------------------------------------------------------------ the LoRA


def new_lora(transformer: Helios, recipe: Recipe, generator: torch.Generator) -> Lora:
    """fp32 adapters as PEFT makes them: A Kaiming-uniform, B zero. Kept for parity: both are drawn before A counts."""
    device, adapters = transformer.proj_out.weight.device, {}
    for name in (f"blocks.{index}.{target}" for index in range(transformer.config.num_layers) for target in TARGETS):
        out, into = transformer.get_submodule(name).weight.shape
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


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.start()

    def start(self) -> None:
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.last
        self.start()


class Trainer:
    """The LoRA, its optimiser and the one stream of random numbers: all that a step changes."""

    def __init__(self, transformer: Helios, schedule: Schedule, recipe: Recipe):
        self.transformer, self.schedule, self.recipe = transformer, schedule, recipe
        self.clock = Clock(transformer.proj_out.weight.device)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.lora = new_lora(transformer, recipe, self.generator)
        transformer.checkpointing, transformer.keep_attention = recipe.checkpointing, recipe.keep_attention
        transformer.set_lora(self.lora)
        self.tensors = {f"{name}.lora_{half}.weight": matrix for name, (down, up, _) in self.lora.adapters.items()
                        for half, matrix in (("A", down), ("B", up))}
        self.optimizer = torch.optim.AdamW(self.tensors.values(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.steps = self.tokens = self.flops = 0  # steps since the beginning, the others since this program's start

    def step(self, history: History, clean: Tensor, text: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One update on clean latents [1, 16, 9, h, w]. Raises ValueError if loss or gradient isn't finite; nothing is
        changed then but the random numbers."""
        recipe, transformer = self.recipe, self.transformer
        items, losses = draw_items(clean, self.schedule, recipe, self.generator), []
        self.optimizer.zero_grad()
        for item in items:
            context = transformer.context(history, item.latents.shape[2:])
            prediction = transformer(item.latents, item.timestep, text, context)
            losses.append(F.mse_loss(prediction, item.target))
            self.clock.lap("forward")
            (losses[-1] / len(items)).backward()
            self.clock.lap("backward")
            self.tokens += context.rope.shape[0]
            self.flops += transformer.flops(context, text[0][0].shape[1], training=True)
        norm = nn.utils.clip_grad_norm_(self.tensors.values(), recipe.clip)
        loss, norm = torch.stack([torch.stack(losses).mean().detach(), norm]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(f"step {self.steps + 1}: loss {loss:g}, gradient norm {norm:g}, expected finite numbers")
        rate = learning_rate(recipe, self.steps)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        self.clock.lap("optimiser")
        return {"step": self.steps, "loss": loss, "grad_norm": norm, "lr": rate,
                "timestep": items[0].timestep.item(), "sigma": items[0].sigma.item()}

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs to go on bit-exactly."""
        moments = {f"{name}.{moment}": self.optimizer.state[matrix][moment] for name, matrix in self.tensors.items()
                   for moment in ("exp_avg", "exp_avg_sq")}
        return {**self.tensors, **moments, "rng": self.generator.get_state()}

    def restore(self, path: Path, steps: int) -> None:
        """Take a state from its file. Raises ValueError naming what does not fit."""
        with open_safetensors(path) as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
        for name, matrix in self.tensors.items():
            moments = [state.get(f"{name}{end}") for end in ("", ".exp_avg", ".exp_avg_sq")]
            for tensor in moments:
                if tensor is None or tensor.shape != matrix.shape:
                    found = "nothing" if tensor is None else list(tensor.shape)
                    raise ValueError(f"{path}: not a state of this model: {name} is {found},"
                                     f" expected {list(matrix.shape)}")
            value, average, square = (tensor.to(matrix.device) for tensor in moments)
            matrix.data.copy_(value)
            self.optimizer.state[matrix] = {
                "step": torch.tensor(float(steps)), "exp_avg": average, "exp_avg_sq": square}
        self.generator.set_state(state["rng"])
        self.steps = steps
