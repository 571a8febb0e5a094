"""Pyramid flow matching as Helios samples and trains it: stages, the three samplers and their loop, training pairs.

A chunk starts as noise on the coarsest grid; each stage integrates one segment of the flow, and the next continues at
twice the size after noise that is anti-correlated within 2x2 blocks has undone the correlation that upsampling left
(Pyramidal Flow Matching, arXiv 2410.05954). Samplers: DMD few-step (the distilled model), Euler, UniPC (2302.04867);
guidance plain or CFG-Zero* (2503.18886). A training pair is a point of one stage's segment and the velocity along it.
Reproduces the official HeliosScheduler and HeliosDMDScheduler without their state, and the flow-matching items of the
official trainer; schedule numbers are float64, latents float32. Left out: other predictions, solvers, loss weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from files.checkpoint import read_config, read_json
from files.machine import send

Velocity = Callable[[Tensor, float, int], Tensor]  # (latents, timestep, step in the stage) -> noise - data, any dtype


@dataclass(frozen=True)
class Schedule:
    """scheduler_config.json, as far as it matters here; the defaults are those of the official HeliosScheduler."""
    sampler: str = "unipc"  # scheduler_type in the file
    num_train_timesteps: int = 1000
    shift: float = 1.0
    stages: int = 3
    stage_range: tuple[float, ...] = (0, 1 / 3, 2 / 3, 1)
    gamma: float = 1 / 3  # block noise: covariance -gamma between neighbours; at 1/3, the limit, blocks sum to zero
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    solver_order: int = 2  # this and those below are for unipc
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()

    def __post_init__(self):
        cuts = self.stage_range
        for key, good, expected in (
            ("sampler", self.sampler in ("dmd", "euler", "unipc"), "dmd, euler or unipc (scheduler_type in the file)"),
            ("num_train_timesteps", self.num_train_timesteps > 1, "at least 2"),
            ("shift", self.shift == 1 or self.shift > 0 and not self.use_dynamic_shifting,
             "1, or any positive number without use_dynamic_shifting"),
            ("stage_range", {*map(type, cuts)} <= {int, float} and [*cuts] == sorted({0, *cuts, 1}), "from 0 up to 1"),
            ("stage_range", len(cuts) == self.stages + 1, f"{self.stages + 1} numbers, as stages is {self.stages}"),
            ("gamma", self.stages == 1 or 0 < self.gamma <= 1 / 3, "more than 0 and at most 1/3"),
            ("time_shift_type", self.time_shift_type in ("linear", "exponential"), "linear or exponential"),
            ("solver_order", self.solver_order > 0, "at least 1"),
            ("solver_type", self.solver_type in ("bh1", "bh2"), "bh1 or bh2"),
        ):
            if not good:
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected {expected}")


def load_schedule(folder: Path) -> Schedule:
    """A checkpoint folder's schedule; missing keys take official defaults. OSError or ValueError if it's unusable."""
    index_path, path = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    entry, config = read_json(index_path).get("scheduler"), read_json(path)
    if not isinstance(entry, list) or entry[1:] not in (["HeliosScheduler"], ["HeliosDMDScheduler"]):
        raise ValueError(f"{index_path}: scheduler is {repr(entry)[:100]}, expected [..., HeliosScheduler or"
                         " HeliosDMDScheduler]")
    for key, expected in {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "predict_x0": True,
                          "thresholding": False, "solver_p": None}.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"{path}: {key} is {repr(config[key])[:100]}, expected {expected!r}")
    is_dmd = "HeliosDMDScheduler" in (entry[1], config.get("_class_name"))  # this class has no scheduler_type
    return read_config(Schedule, path, {
        "sampler": "dmd" if is_dmd else config.get("scheduler_type", "unipc"),
        "time_shift_type": config.get("time_shift_type", "linear" if is_dmd else "exponential"),
        **({"stage_range": [0, 1]} if config.get("stages") == 1 else {}),  # whatever it says, as officially
    })


@dataclass(frozen=True)
class Stage:
    """One segment of the flow: `start`, `end` are noise levels of the whole flow, `sigmas` the segment's own clock."""
    start: float  # after renoising
    end: float
    ori_start: float  # before renoising: where the stage before ended
    ratios: tuple[float, float]  # begin and end as fractions of all timesteps
    alpha: float  # entering the stage: x <- alpha upsampled(x) + beta block noise; 1 and 0 in stage 0
    beta: float
    timesteps: Tensor  # [num_train_timesteps] float64, decreasing
    sigmas: Tensor  # [num_train_timesteps] float64, 0.999 to almost 0


def stage_tables(schedule: Schedule) -> tuple[Stage, ...]:
    """What sampling and training share: each stage's noise levels, timesteps and local sigmas, in float64."""
    n, shift, gamma = schedule.num_train_timesteps, schedule.shift, schedule.gamma
    even = torch.linspace(1 - 1 / n, 0, n + 1, dtype=torch.float64)
    levels = (shift * even / (1 + (shift - 1) * even)).tolist()
    cuts = [int(fraction * n) for fraction in schedule.stage_range]
    ori_starts, ends = [levels[cut] for cut in cuts[:-1]], [levels[cut] for cut in cuts[1:]]
    # alpha and beta make upsampled noise white: alpha^2 ori_start^2 + beta^2 cov = start^2 on, 0 off the diagonal
    alphas = [1.0] + [1 / (math.sqrt(1 + 1 / gamma) * level + 1 - level) for level in ori_starts[1:]]
    betas = [0.0] + [alpha * level / math.sqrt(gamma) for alpha, level in zip(alphas[1:], ori_starts[1:])]
    starts = [1 - alpha * (1 - level) for alpha, level in zip(alphas, ori_starts)]
    spans = [start - end for start, end in zip(starts, ends)]
    stages = []
    for i in range(schedule.stages):
        ratios = sum(spans[:i]) / sum(spans), sum(spans[:i + 1]) / sum(spans)
        first = min(n * levels[int(ratios[0] * n)], 999)  # kept for parity: 999 whatever n is
        last = n * levels[min(int(ratios[1] * n), n - 1)]
        stages.append(Stage(starts[i], ends[i], ori_starts[i], ratios, alphas[i], betas[i],
                            timesteps=torch.linspace(first, last, n + 1, dtype=torch.float64)[:-1],
                            sigmas=torch.linspace(0.999, 0, n + 1, dtype=torch.float64)[:-1]))
    return tuple(stages)


def shift_mu(shape: torch.Size) -> float:
    """Dynamic shifting's mu for a stage's latents [B, C, T, h, w]: linear in tokens, 0.5 at 256 and 1.15 at 4096."""
    return 0.5 + (1.15 - 0.5) / (4096 - 256) * (math.prod(shape[2:]) / 4 - 256)  # a token is 1x2x2 latents


def shift_sigmas(sigmas: Tensor, weight: float) -> Tensor:
    return weight * sigmas / (weight * sigmas + 1 - sigmas)


def timesteps(schedule: Schedule, stage: int, steps: int, mu: float, amplify: bool = False) -> tuple[list, list]:
    """The stage's timesteps, untruncated, and local sigmas with a final 0. `amplify` doubles the steps of dmd only."""
    n, dmd_steps = schedule.num_train_timesteps, schedule.sampler == "dmd"
    steps = 2 * steps if dmd_steps and amplify else steps
    if schedule.stages == 1:
        high, low = n, 0
        sigmas = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)[:steps]
        times = n * sigmas
    else:
        table = stage_tables(schedule)[stage]
        high, low = table.timesteps[[0, -1]].tolist()
        points = steps + 1 if dmd_steps else steps  # kept for parity: only dmd leaves the stage's last point out
        start, end = table.sigmas[[0, -1]].tolist()
        sigmas = torch.linspace(start, end, points, dtype=torch.float64)[:steps]
        times = torch.linspace(high, low, points, dtype=torch.float64)[:steps]
    if schedule.use_dynamic_shifting:
        sigmas = shift_sigmas(sigmas, mu if schedule.time_shift_type == "linear" else math.exp(mu))
        times = low + sigmas * (high - low)
    return times.tolist(), [*sigmas.tolist(), 0.0]


def dmd(velocity: Velocity, x: Tensor, times: list[float], sigmas: list[float]) -> Tensor:
    """Jump to the predicted data, then back up to the next sigma with the stage's start in place of noise."""
    start = x
    for k, t in enumerate(times):
        x0 = x.sub(velocity(x, t, k), alpha=sigmas[k])
        x = (1 - sigmas[k + 1]) * x0 + sigmas[k + 1] * start
    return x


def euler(velocity: Velocity, x: Tensor, times: list[float], sigmas: list[float]) -> Tensor:
    for k, t in enumerate(times):
        x = x.add(velocity(x, t, k), alpha=sigmas[k + 1] - sigmas[k])
    return x


def unipc(velocity: Velocity, x: Tensor, times: list[float], sigmas: list[float],
          schedule: Schedule = Schedule()) -> Tensor:
    """Each prediction of the data first corrects the step that led to it, unless `disable_corrector` has its index."""
    sigmas = [max(sigma, 1e-8) for sigma in sigmas]  # the log-SNR of 0 is infinite
    known, before, used = [], x, 0  # (sigma, x0) of the last steps; where the last predictor began, and its order
    for k, t in enumerate(times):
        new = sigmas[k], x.sub(velocity(x, t, k), alpha=sigmas[k])
        if k > 0 and k - 1 not in schedule.disable_corrector:
            x = _unipc_step(before, known[-1], sigmas[k], [*known[-used:-1], new], schedule.solver_type)
        known = [*known, new][-schedule.solver_order:]
        used = min(len(known), len(times) - k) if schedule.lower_order_final else len(known)
        before, x = x, _unipc_step(x, new, sigmas[k + 1], known[-used:-1], schedule.solver_type)
    return x


def _unipc_step(x: Tensor, now: tuple, target: float, others: list[tuple], solver_type: str) -> Tensor:
    """x from the sigma of `now` to `target`; data predictions (sigma, x0) are interpolated over log-SNR."""
    sigma, x0 = now
    odds = sigma / (1 - sigma)
    h = math.log((1 - target) / target * odds)  # gain in log-SNR
    nodes = [math.log((1 - other) / other * odds) / h for other, _ in others]  # of the other points, in units of h
    x = target / sigma * x - (1 - target) * math.expm1(-h) * x0
    for weight, node, (_, other_x0) in zip(_unipc_weights(nodes, h, solver_type), nodes, others):
        x = x - (1 - target) * weight / node * (other_x0 - x0)
    return x


def _unipc_weights(nodes: list[float], h: float, solver_type: str) -> list[float]:
    """w with sum_j w_j node_j^i = b_i for i < len(nodes), where b_i = -h (i + 1)! phi_(i+2)(-h)."""
    if len(nodes) == 1:  # an approximation of b_0, and all that bh1 and bh2 differ in
        return [(math.expm1(-h) if solver_type == "bh2" else -h) / 2]
    powers = torch.tensor(nodes, dtype=torch.float64) ** torch.arange(len(nodes))[:, None]
    phi, b = -math.expm1(-h) / h - 1, []  # -h phi_2(-h), then -h phi_3(-h), ...
    for i in range(1, len(nodes) + 1):
        b.append(phi * math.factorial(i))
        phi = -phi / h - 1 / math.factorial(i + 1)
    return torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist()


def halve(x: Tensor, times: int) -> Tensor:
    """[B, C, T, h, w] halved `times` times, bilinear per frame."""
    if any(side % 2**times for side in x.shape[-2:]):
        raise ValueError(f"latents are {list(x.shape)}, expected height and width to be multiples of {2**times}")
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    for _ in range(times):
        frames = F.interpolate(frames, scale_factor=0.5, mode="bilinear")
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(x))


def double(x: Tensor) -> Tensor:
    """[B, C, T, h, w] -> [B, C, T, 2h, 2w], nearest."""
    return repeat(x, "b c t h w -> b c t (h 2) (w 2)")


def downsample_noise(noise: Tensor, times: int) -> Tensor:
    """[B, C, T, h, w] halved `times` times, and times 2 each, so that white noise keeps its variance."""
    return 2**times * halve(noise, times)


def block_noise(shape: torch.Size, gamma: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Normal float32 noise [B, C, T, H, W], H and W even, with covariance -gamma within each 2x2 block of a frame."""
    b, c, t, h, w = shape
    covariance = (1 + gamma + 1e-8) * torch.eye(4, dtype=torch.float64) - gamma
    # float64, as float32 would lose the ridge: there the official factorisation fails on CPU at gamma = 1/3
    factor = torch.linalg.cholesky(covariance).to(generator.device, torch.float32)
    noise = torch.randn(b * c * t * h * w // 4, 4, generator=generator, device=generator.device) @ factor.T
    return rearrange(send(noise, device), "(b c t h w) (p q) -> b c t (h p) (w q)", b=b, c=c, t=t, h=h // 2, p=2)


def renoise(x: Tensor, schedule: Schedule, stage: int, generator: torch.Generator) -> Tensor:
    """The end of `stage` - 1, [B, C, T, h, w], to the start of `stage`, [B, C, T, 2h, 2w]."""
    table = stage_tables(schedule)[stage]
    x = double(x)
    return table.alpha * x + table.beta * block_noise(x.shape, schedule.gamma, generator, x.device)


def sample(velocity_for: Callable[[int, torch.Size], Velocity], noise: Tensor, schedule: Schedule, steps: Sequence[int],
           generator: torch.Generator, amplify: bool = False, where: str = "") -> Tensor:
    """One chunk of latents from full-size float32 noise, both [1, C, T, h, w], in `steps[i]` steps at stage i.

    `velocity_for(stage, shape)` is called once as a stage begins. ValueError if `steps` or the size doesn't fit,
    and, beginning with `where`, if a stage ends with numbers that are not finite."""
    if len(steps) != schedule.stages or min(steps) < 1:
        raise ValueError(f"steps per stage are {steps}, expected {schedule.stages} numbers of at least 1")
    sampler = {"dmd": dmd, "euler": euler, "unipc": partial(unipc, schedule=schedule)}[schedule.sampler]
    x, finite, counts = downsample_noise(noise, schedule.stages - 1), [], []
    for stage, count in enumerate(steps):
        mu = shift_mu(x.shape)  # kept for parity: later stages take it from the size that they have before upsampling
        if stage > 0:
            x = renoise(x, schedule, stage, generator)
        times, sigmas = timesteps(schedule, stage, count, mu, amplify)
        if schedule.stages > 1:  # kept for parity: the pyramid hands the network whole timesteps, one stage doesn't
            times = [float(int(t)) for t in times]
        x = sampler(velocity_for(stage, x.shape), x, times, sigmas)
        finite.append(x.isfinite().all())
        counts.append(len(times))
    if False in (each := torch.stack(finite).tolist()):  # asked once, as the host waits for the device here
        stage = each.index(False)
        raise ValueError(f"{where}after stage {stage + 1} of {schedule.stages} ({counts[stage]} steps) the latents are"
                         " not finite; are the weights or the LoRA damaged?")
    return x


def guide(cond: Tensor, uncond: Tensor, scale: float, zero_star: bool) -> Tensor:
    """Classifier-free guidance u + scale (c - u); CFG-Zero* first projects c on u, per sample, and takes that for u."""
    if zero_star:
        c, u = cond.float().flatten(1), uncond.float().flatten(1)
        fit = (c * u).sum(1) / (u.square().sum(1) + 1e-8)
        uncond = rearrange(fit, "b -> b 1 1 1 1") * uncond
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Item:
    """A training pair: from `latents` at `timestep` the network is to predict `target`."""
    latents: Tensor  # [B, C, T, h, w] at the stage's size: sigma start + (1 - sigma) end
    target: Tensor  # [B, C, T, h, w] velocity, start - end
    timestep: Tensor  # [B] float32, what the network is told, fractional
    sigma: Tensor  # [B] float32 on the stage's own clock


Levels = Callable[[Tensor, Schedule, int, torch.Size], tuple[Tensor, Tensor]]  # u [B], schedule, stage, latents' shape


def table_levels(u: Tensor, schedule: Schedule, stage: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Timesteps and sigmas [B] for u in 0..1, which counts from the noisy end: entries of the stage's table, so u = 0
    is its first. How u is distributed is the caller's: uniform, or logit-normal (`torch.randn(...).sigmoid()`)."""
    table, n = stage_tables(schedule)[stage], schedule.num_train_timesteps
    index = (u * n).long().clamp(max=n - 1)
    return table.timesteps[index], table.sigmas[index].float()


def shifted_levels(u: Tensor, schedule: Schedule, stage: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """`table_levels` with dynamic shifting: more noise for more tokens. Kept for parity: at most sevenfold, unlike in
    sampling, if it is exponential."""
    times, sigmas = table_levels(u, schedule, stage, shape)
    mu = shift_mu(shape)
    sigmas = shift_sigmas(sigmas, mu if schedule.time_shift_type == "linear" else math.exp(min(mu, math.log(7))))
    high, low = stage_tables(schedule)[stage].timesteps[[0, -1]].tolist()
    return low + sigmas * (high - low), sigmas


def interval_levels(u: Tensor, schedule: Schedule, stage: int, shape: torch.Size, steps: int) -> tuple[Tensor, Tensor]:
    """Between the first (u = 0) and the second of the `steps` points that a sampler visits."""
    points = timesteps(schedule, stage, steps, shift_mu(shape))
    if len(points[0]) < 2:
        raise ValueError(f"{steps} steps at stage {stage}: expected at least 2, to train between first and second")
    times, sigmas = (first + u * (second - first) for first, second, *_ in points)
    return times, sigmas


def endpoints(clean: Tensor, noise: Tensor, schedule: Schedule, stage: int) -> tuple[Tensor, Tensor]:
    """Where a stage's segment of the flow starts and ends, [B, C, T, h, w], given full-size clean latents and noise."""
    table, later = stage_tables(schedule)[stage], schedule.stages - 1 - stage
    noise, end = downsample_noise(noise, later), halve(clean, later)
    start = noise if stage == 0 else table.start * noise + (1 - table.start) * double(halve(end, 1))
    return start, end if later == 0 else table.end * noise + (1 - table.end) * end


def training_item(clean: Tensor, noise: Tensor, u: Tensor, schedule: Schedule, stage: int,
                  levels: Levels = table_levels) -> Item:
    """What to train on at `stage`; full-size `clean` latents and `noise` are [B, C, T, h, w], `u` is [B] on the CPU."""
    start, end = endpoints(clean, noise, schedule, stage)
    timestep, sigma = (send(level.float(), clean.device) for level in levels(u, schedule, stage, start.shape))
    share = rearrange(sigma, "b -> b 1 1 1 1")
    return Item(share * start + (1 - share) * end, start - end, timestep, sigma)
