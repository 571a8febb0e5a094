"""Side by side with the peers: our networks against diffusers, transformers and peft in time, memory and numbers.

    python bench.py [dit vae text chunk train load] [--width 1024 --layers 8 --size 384x640 --rounds 5 --threads N]
    python bench.py --meta

The released models, scaled in width and depth, with random weights that both sides share. A row runs ours, the peer,
ours, the peer, ... in one process, so that a drift of the machine hits both, and takes medians; outputs of the first
round are compared, and the program stops if they differ. TFLOP are those of our matrix products; a peer may do more.
`--meta` counts the released models and runs nothing. CUDA takes the same lines in bf16 (the VAE in fp32), untested.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import wah
from checkpoint import kept_dtype, load, network_dtype
from flow import Schedule
from model import Helios, HeliosConfig, History, pool
from render import parse_size, run_program
from text import Tokenizer, UMT5Config, UMT5Encoder, encode_prompt
from trainer import TARGETS, Recipe, Trainer, draw_items
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent
TOKENIZER = ROOT / "tests" / "golden" / "helios" / "distilled" / "tokenizer"
PROMPT = "A red car drives through a roundabout in the evening, trees and houses behind it, long shadows on the street."
ROWS = 512  # of a prompt's embeddings
SCHEDULE, STEPS = Schedule(sampler="dmd"), (2, 2, 2)  # of the distilled model, after the first chunk
GAMMA = 0.33  # of the block noise; at the released 1/3 the peer's factorisation fails on the CPU
LEAVING = 0.08  # of a warp's columns, in each latent frame: a camera that turns away


@dataclass(frozen=True)
class Setup:
    width: int
    layers: int
    size: tuple[int, int]
    rounds: int
    vae_dim: int
    vae_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype == torch.float32 else 0.05

    @property
    def helios(self) -> HeliosConfig:
        """Proportions of the 14B, but text as wide as the transformer."""
        hidden = -(-self.width * 27 // 1280) * 128
        return HeliosConfig(self.width // 128, num_layers=self.layers, ffn_dim=hidden, text_dim=self.width)

    @property
    def umt5(self) -> UMT5Config:
        width = self.width
        return UMT5Config(1000, width, d_ff=width * 5 // 2, num_layers=self.layers, num_heads=width // 64)

    @property
    def chunk_vae(self) -> VAEConfig:
        """As much narrower than the released VAE as the transformer is than the 14B."""
        return VAEConfig(base_dim=max(8, 96 * self.width // 5120 // 8 * 8))


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Sample:
    """What a run gave and took; `memory` is in bytes, beyond what was held before, None if unknown."""

    output: Tensor
    seconds: dict[str, float]  # by row
    memory: int | None


@dataclass(frozen=True)
class Row:
    what: str
    seconds: list[float]  # ours, peer
    difference: float | None = None  # largest one of the outputs, relative to the largest number
    memory: tuple[int | None, ...] = ()  # of ours and the peer, at most
    tokens: int | None = None
    flop: int | None = None


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def host_memory(key: str) -> int | None:
    """Of this process: VmRSS, now; VmHWM, at most; RssAnon, now, without files. None if this is not Linux."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def measure(what: str, device: torch.device, call: Callable[[], Tensor]) -> Sample:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = torch.cuda.memory_allocated(device), partial(torch.cuda.max_memory_allocated, device)
    else:
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else a call would find its memory in what earlier ones gave back
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, peak = host_memory("VmRSS"), partial(host_memory, "VmHWM")
    begin = now(device)
    output = call()
    return Sample(output, {what: now(device) - begin}, None if before is None else peak() - before)


def compare(what: str, ours: Tensor, peer: Tensor, tolerance: float) -> float:
    ours, peer = ours.double().cpu(), peer.double().cpu()
    if ours.shape != peer.shape:
        raise ValueError(f"{what}: our output is {list(ours.shape)}, the peer's {list(peer.shape)}")
    difference = ((ours - peer).abs().max() / peer.abs().max()).item()
    if not difference <= tolerance:  # so that nan is caught too
        raise ValueError(f"{what}: our output differs from the peer's by {difference:.2g}, allowed is {tolerance:g}")
    return difference


def race(setup: Setup, *sides: Callable[[], Sample], tokens: int | None = None, flop: int | None = None,
         tolerance: float | None = None) -> list[Row]:
    """Ours, the peer, ours, the peer, ...; a row for each entry of `Sample.seconds`, the last one with all figures. A
    single side is measured alone. ValueError if the first outputs differ."""
    samples, difference = [], None
    for index in range(setup.rounds):
        samples.append([side() for side in sides])
        if index == 0 and len(sides) == 2:
            ours, peer = samples[0]
            difference = compare([*ours.seconds][-1], ours.output, peer.output, tolerance or setup.tolerance)
    rows = [Row(what, [statistics.median(each[side].seconds[what] for each in samples) for side in range(len(sides))])
            for what in samples[0][0].seconds]
    needs = [[each[side].memory for each in samples] for side in range(len(sides))]
    memory = tuple(None if None in each else max(each) for each in needs)
    return [*rows[:-1], replace(rows[-1], difference=difference, memory=memory, tokens=tokens, flop=flop)]


def race_calls(setup: Setup, what: str, *calls: Callable[[], Tensor], tokens: int | None = None,
               flop: int | None = None) -> list[Row]:
    return race(setup, *(partial(measure, what, setup.device, call) for call in calls), tokens=tokens, flop=flop)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best of five, as others may use the machine."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(measure("", device, lambda: a @ b).seconds[""] for _ in range(5))


def count_flop(network: type[nn.Module], config: object, call: Callable[[nn.Module], object]) -> int:
    """As torch counts them on the meta device, where nothing is computed."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(network(config))
    return counter.get_total_flops()


def vae_flop(config: VAEConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Of encoding and decoding a chunk's frames."""
    video = torch.empty(1, 3, wah.WINDOW, *size, device="meta")
    latents = torch.empty(1, config.z_dim, wah.CHUNK, size[0] // 8, size[1] // 8, device="meta")
    calls = (lambda vae: vae.encode(video)), (lambda vae: vae.decode(latents))
    return tuple(count_flop(VAE, config, call) for call in calls)


# -------------------------------------------------------------------------------------------------- what both are given


def random(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def pair(ours: nn.Module, peer: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Both networks with the same random weights, in memory once, such that activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in ours.named_parameters():
        vector = parameter.numel() == max(parameter.shape)
        mean, deviation = float(vector and not name.endswith("bias")), 0.05 if vector else parameter[0].numel() ** -0.5
        value = mean + deviation * torch.randn(parameter.shape, generator=generator)
        parameter.data = value.to(device, kept_dtype(ours, name, dtype))
    state = ours.state_dict()
    state = {name: state[ours.aliases.get(name, name)] for name in peer.state_dict()}
    peer.to(device).load_state_dict(state, assign=True)
    return ours.requires_grad_(False).eval(), peer.requires_grad_(False).eval()


def helios_pair(setup: Setup) -> tuple[nn.Module, nn.Module]:
    from diffusers import HeliosTransformer3DModel

    return pair(Helios(setup.helios), HeliosTransformer3DModel(**vars(setup.helios)), setup.device, setup.dtype)


def vae_pair(config: VAEConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
    from diffusers import AutoencoderKLWan

    return pair(VAE(config), AutoencoderKLWan(base_dim=config.base_dim), device, torch.float32)


def umt5_pair(setup: Setup) -> tuple[nn.Module, nn.Module]:
    from transformers import UMT5Config as PeerConfig
    from transformers import UMT5EncoderModel

    return pair(UMT5Encoder(setup.umt5), UMT5EncoderModel(PeerConfig(**vars(setup.umt5))), setup.device, setup.dtype)


def histories(transformer: Helios, size: tuple[int, int]) -> tuple[History, History]:
    """The native history of a later chunk, and its first stage's when a warp leads, as `wah.Rollout` makes them."""
    rollout = wah.Rollout(wah.Models(transformer, None, SCHEDULE), None, size, torch.Generator().manual_seed(0))
    rollout.chunk, rollout.prefix = 1, rollout.normal(1)
    rollout.native = rollout.earlier = rollout.normal(sum(wah.BANDS))
    height, width = rollout.latent_size
    shown = torch.arange(width) < width * (1 - LEAVING * torch.arange(wah.CHUNK))[:, None]
    visible = shown.float().view(1, 1, wah.CHUNK, 1, width).repeat(1, 1, 1, height, 1).to(rollout.device)
    rollout.warp_latents = lambda warp: (rollout.normal(wah.CHUNK), visible)  # in place of the VAE
    return rollout.native_history(), rollout.warp_history(None)


def cases(transformer: Helios, size: tuple[int, int]) -> list[tuple[int, History, str]]:
    """What is called in a chunk: stage, history, name."""
    native, led = histories(transformer, size)
    return [(0, native, ""), (0, led, ", warp"), *((stage, native, "") for stage in range(1, SCHEDULE.stages))]


def stage_grid(size: tuple[int, int], stage: int) -> list[int]:
    return [side // 8 >> (SCHEDULE.stages - 1 - stage) for side in size]


def peer_inputs(history: History, dtype: torch.dtype) -> dict[str, Tensor]:
    bands = {name: getattr(history, name) for name in ("short", "mid", "long")}
    return {"indices_hidden_states": history.indices[None], "return_dict": False,
            **{f"latents_history_{name}": band.latents.to(dtype) for name, band in bands.items()},
            **{f"indices_latents_history_{name}": band.indices[None] for name, band in bands.items()}}


def drop_tokens(peer: nn.Module, history: History, target: int) -> list:
    """Hooks that give diffusers' transformer what it lacks: invisible tokens are dropped before the first block."""
    masks = [pool(band.visible, kernel).flatten() >= history.threshold for band, kernel in
             ((history.long, (4, 8, 8)), (history.mid, (2, 4, 4)), (history.short, (1, 2, 2)))]
    keep = torch.cat([*masks, masks[0].new_ones(target)]).nonzero().flatten()
    kept = {}

    def before(block: nn.Module, inputs: tuple) -> tuple:
        hidden, text, time, rope, count = inputs
        if block is peer.blocks[0]:
            hidden, kept["time"], kept["rope"] = hidden[:, keep], time[:, keep], rope[:, keep]
        return hidden, text, kept["time"], kept["rope"], count

    return [block.register_forward_pre_hook(before) for block in peer.blocks]


# ---------------------------------------------------------------------------------------------------------------- parts


@torch.inference_mode()
def bench_dit(setup: Setup) -> Iterator[Row]:
    """Calls; what ours prepares once a stage or prompt, and the peer in every call, has rows of its own."""
    ours, peer = helios_pair(setup)
    embeddings = random(1, ROWS, setup.width, device=setup.device, dtype=setup.dtype)
    text, time = ours.text(embeddings), torch.tensor([700.0], device=setup.device)
    for stage, history, name in cases(ours, setup.size):
        latents = random(1, 16, wah.CHUNK, *stage_grid(setup.size, stage), device=setup.device, dtype=setup.dtype)
        context, given = ours.context(history, latents.shape[2:]), peer_inputs(history, setup.dtype)
        tokens = len(context.rope)
        hooks = drop_tokens(peer, history, tokens - context.tokens.shape[1]) if name else []
        yield from race_calls(setup, f"DiT call, stage {stage}{name}", lambda: ours(latents, time, text, context),
                              lambda: peer(latents, time, embeddings, **given)[0],
                              tokens=tokens, flop=ours.flops(context, ROWS))
        for hook in hooks:
            hook.remove()
        yield from race_calls(setup, "its history, once a stage", lambda: ours.context(history, latents.shape[2:]))
    yield from race_calls(setup, "keys and values of the text, once a prompt", lambda: ours.text(embeddings))


@torch.inference_mode()
def bench_vae(setup: Setup) -> Iterator[Row]:
    config, (height, width) = VAEConfig(base_dim=setup.vae_dim), setup.vae_size
    ours, peer = vae_pair(config, setup.device)
    video = random(1, 3, wah.WINDOW, height, width, device=setup.device).clamp(-1, 1)
    latents, where = ours.encode(video)[0], f"{wah.WINDOW} frames of {height}x{width}, base_dim {setup.vae_dim}"
    encode, decode = vae_flop(config, setup.vae_size)
    yield from race_calls(setup, f"VAE encode, {where}", lambda: torch.cat(ours.encode(video), dim=1),
                          lambda: peer.encode(video).latent_dist.parameters, flop=encode)
    yield from race_calls(setup, f"VAE decode, {where}", lambda: ours.decode(latents),
                          lambda: peer.decode(latents).sample, flop=decode)


@torch.inference_mode()
def bench_text(setup: Setup) -> Iterator[Row]:
    ours, peer = umt5_pair(setup)
    words = 60
    ids = torch.arange(2, 2 + words, device=setup.device)[None]
    padded = F.pad(ids, (0, ROWS - words))
    yield from race_calls(
        setup, f"text encoder, {words} words (peer: {ROWS} rows)", lambda: ours(ids),
        lambda: peer(padded, attention_mask=(padded > 0).long()).last_hidden_state[:, :words],
        tokens=words, flop=count_flop(UMT5Encoder, setup.umt5, lambda encoder: encoder(ids.to("meta"))))


class Split:
    """Seconds by part of one side's chunk: methods are replaced by ones that count; the rest is denoising."""

    def __init__(self, device: torch.device, encoder: nn.Module, vae: nn.Module):
        self.device, self.seconds = device, {}
        for part, owner, name in (("text", encoder, "forward"), ("encode", vae, "encode"), ("decode", vae, "decode")):
            setattr(owner, name, partial(self.count, part, getattr(owner, name)))

    def count(self, part: str, method: Callable, *arguments, **named) -> object:
        begin = now(self.device)
        result = method(*arguments, **named)
        self.seconds[part] = self.seconds.get(part, 0.0) + now(self.device) - begin
        self.given = arguments  # in the end to `decode`
        return result

    def chunk(self, call: Callable[[], object]) -> Sample:
        """The output is the chunk's latents but the first frame: ours, as the official Warp-as-History, replaces it."""
        self.seconds = {}
        sample = measure("whole", self.device, call)
        seconds = self.seconds | {"denoise": sample.seconds["whole"] - sum(self.seconds.values())} | sample.seconds
        seconds = {f"chunk: {part}": seconds[part] for part in ("text", "encode", "denoise", "decode", "whole")}
        return Sample(self.given[0][:, :, 1:], seconds, sample.memory)


def save_pipeline(setup: Setup, folder: Path) -> object:
    """A checkpoint folder of random weights in the official layout, and diffusers' pipeline, which wrote it."""
    from diffusers import HeliosDMDScheduler, HeliosPyramidPipeline
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    scheduler = HeliosDMDScheduler(gamma=GAMMA, use_dynamic_shifting=True)
    pipeline = HeliosPyramidPipeline(AutoTokenizer.from_pretrained(TOKENIZER), umt5_pair(setup)[1],
                                     vae_pair(setup.chunk_vae, setup.device)[1], scheduler, helios_pair(setup)[1],
                                     is_distilled=True)
    pipeline.save_pretrained(folder)
    shutil.copy(TOKENIZER / "spiece.model", folder / "tokenizer")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def bench_chunk(setup: Setup) -> Iterator[Row]:
    """Image to video: one native chunk of 33 frames."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline, tokenizer = save_pipeline(setup, folder), Tokenizer(folder / "tokenizer")
        models, encoder = wah.load_models(folder, setup.device), wah.load_text_encoder(folder, setup.device)
    image, options = random(1, 3, *setup.size).sigmoid(), wah.Options(STEPS, amplify_first_chunk=False)

    def ours() -> None:
        prompts = wah.Prompts(encode_prompt(tokenizer, encoder, PROMPT, ROWS))
        generator = torch.Generator().manual_seed(1)
        wah.Rollout(models, prompts, setup.size, generator, image=2 * image - 1, options=options).next()

    def peer() -> None:
        pipeline(PROMPT, None, *setup.size, wah.WINDOW, guidance_scale=1.0, generator=torch.Generator().manual_seed(1),
                 image=image, add_noise_to_image_latents=False, pyramid_num_inference_steps_list=list(STEPS))

    splits = Split(setup.device, encoder, models.vae), Split(setup.device, pipeline.text_encoder, pipeline.vae)
    yield from race(setup, partial(splits[0].chunk, ours), partial(splits[1].chunk, peer),
                    tolerance=10 * setup.tolerance)


def bench_train(setup: Setup) -> Iterator[Row]:
    """Forward, backward with gradient checkpointing and AdamW, led by a warp; losses and gradient norms compared."""
    from peft import LoraConfig, inject_adapter_in_model

    recipe, generator = Recipe(warmup=0), torch.Generator()
    model, peer = helios_pair(setup)
    history = histories(model, setup.size)[1]
    trainer = Trainer(model, SCHEDULE, recipe)
    generator.set_state(trainer.generator.get_state())
    inject_adapter_in_model(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=list(TARGETS)), peer)
    peer.train().enable_gradient_checkpointing()
    adapters = {name.replace(".default", ""): x for name, x in peer.named_parameters() if x.requires_grad}
    for name, matrix in trainer.tensors.items():
        adapters[name].data = matrix.detach().clone()
    optimizer = torch.optim.AdamW(adapters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    clean = random(1, 16, wah.CHUNK, *(side // 8 for side in setup.size), device=setup.device)
    embeddings = random(1, ROWS, setup.width, device=setup.device, dtype=setup.dtype)
    text, given = model.text(embeddings), peer_inputs(history, setup.dtype)
    context = model.context(history, (wah.CHUNK, *stage_grid(setup.size, 0)))
    drop_tokens(peer, history, len(context.rope) - context.tokens.shape[1])

    def ours_step() -> Tensor:
        metrics = trainer.step(history, clean, text)
        return torch.tensor([metrics["loss"], metrics["grad_norm"]])

    def peer_step() -> Tensor:
        item = draw_items(clean, SCHEDULE, recipe, generator)[0]
        optimizer.zero_grad()
        prediction = peer(item.latents.to(setup.dtype), item.timestep, embeddings, **given)[0]
        loss = F.mse_loss(prediction.float(), item.target)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(adapters.values(), recipe.clip)
        optimizer.step()
        return torch.stack([loss.detach(), norm])

    yield from race_calls(setup, "training step, stage 0, warp", ours_step, peer_step, tokens=len(context.rope),
                          flop=model.flops(context, ROWS, training=True))


def load_once(side: str, folder: str, device: str) -> None:
    """What `bench_load` runs in a process of its own; prints seconds, peak private memory, sums of weights."""
    from diffusers import HeliosTransformer3DModel

    peaks, done, dtype = [host_memory("RssAnon")], threading.Event(), network_dtype(device)

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(host_memory("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    begin = now(torch.device(device))
    if side == "ours":
        model = load(Helios, folder, device, dtype)
    else:
        model = HeliosTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).to(device)
    sums = [weight.float().sum().item() for _, weight in sorted(model.named_parameters()) if weight.ndim > 1]
    seconds = now(torch.device(device)) - begin
    done.set()
    thread.join()
    print(json.dumps([seconds, None if None in peaks else max(peaks) - peaks[0], sums]))


def bench_load(setup: Setup) -> Iterator[Row]:
    """The transformer from a file that the system has just written, so that no disk is measured."""

    def side(name: str) -> Sample:
        code = f"import bench; bench.load_once({name!r}, {folder!r}, {str(setup.device)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"load, {name}: {done.stderr.strip().splitlines()[-1]}")
        seconds, memory, sums = json.loads(done.stdout.splitlines()[-1])
        what = "load the transformer, read each weight once; private memory of the host"
        return Sample(torch.tensor(sums), {what: seconds}, memory)

    with tempfile.TemporaryDirectory() as folder:
        helios_pair(setup)[1].save_pretrained(folder)
        yield from race(setup, partial(side, "ours"), partial(side, "peer"))


# --------------------------------------------------------------------------------------------------------------- tables


PARTS = {"dit": bench_dit, "vae": bench_vae, "text": bench_text, "chunk": bench_chunk, "train": bench_train,
         "load": bench_load}
HEADER = ("what", "tokens", "ours, s", "peer, s", "ratio", "largest difference", "TFLOP", "TFLOP/s", "of matmul",
          "ours, GiB", "peer, GiB")


def cells(row: Row, rate: float) -> list[str]:
    """A row of the table; empty where there is nothing to say."""

    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    ours, peer = (*row.seconds, None)[:2]
    speed = None if row.flop is None else row.flop / ours
    memory = [None if each is None else each / 2**30 for each in (*row.memory, None, None)[:2]]
    return [row.what, show(row.tokens, "d"), show(ours, ".3g"), show(peer, ".3g"), show(peer and ours / peer, ".2f"),
            show(row.difference, ".1e"), show(row.flop and row.flop / 1e12, ".3g"), show(speed and speed / 1e12, ".3g"),
            show(speed and speed / rate, ".0%"), *(show(each, ".2f") for each in memory)]


def print_table(header: tuple[str, ...], lines: Iterable[list[str]]) -> None:
    for line in chain([header, ["---"] * len(header)], lines):
        print("| " + " | ".join(line) + " |", flush=True)


def count_released(size: tuple[int, int]) -> list[list[str]]:
    """Parameters, work and bytes of the released models, none of which is run."""
    networks = {"DiT": (Helios, HeliosConfig()), "VAE": (VAE, VAEConfig()), "text encoder": (UMT5Encoder, UMT5Config())}
    with torch.device("meta"):
        networks = {name: network(config) for name, (network, config) in networks.items()}
    model, lines = networks["DiT"], []
    for name, network in networks.items():
        lines.append([f"parameters: {name}", f"{sum(x.numel() for x in network.parameters()) / 1e9:.3f} G"])
    with torch.no_grad():
        small, work = Helios(HeliosConfig(1, num_layers=1)), {}  # as many tokens, which do not depend on the width
        for stage, history, name in cases(small, size):
            context = small.context(history, (wah.CHUNK, *stage_grid(size, stage)))
            work[stage, name] = model.flops(context, ROWS) / 1e12
            what = f"DiT call, stage {stage}{name}: {len(context.rope)} tokens"
            lines.append([what, f"{work[stage, name]:.1f} TFLOP"])
    encode, decode = (count / 1e12 for count in vae_flop(VAEConfig(), size))
    plain = sum(count * work[stage, ""] for stage, count in enumerate(STEPS)) + decode
    led = plain + STEPS[0] * (work[0, ", warp"] - work[0, ""]) + encode
    blocks = sum(x.numel() * kept_dtype(model, f"blocks.0.{name}", torch.bfloat16).itemsize
                 for name, x in model.blocks[0].named_parameters())
    full = sum(x.numel() * kept_dtype(model, name, torch.bfloat16).itemsize for name, x in model.named_parameters())
    fp8 = full - sum(x.numel() - 2 * len(x) for name, x in model.named_parameters() if name.endswith(Helios.fp8))
    stream = full - (len(model.blocks) - 2) * blocks
    return lines + [
        [f"VAE encode, {wah.WINDOW} frames", f"{encode:.1f} TFLOP"],
        [f"VAE decode, {wah.WINDOW} frames", f"{decode:.1f} TFLOP"],
        [f"chunk of {STEPS} steps, decoded", f"{plain:.0f} TFLOP"],
        ["chunk with a warp, encoded too", f"{led:.0f} TFLOP"],
        *([f"DiT weights, --memory {mode}", f"{count / 2**30:.2f} GiB"]
          for mode, count in (("full", full), ("fp8", fp8), ("stream", stream)))]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench.py", description="Time and memory beside diffusers, transformers and peft.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--width", type=int, default=1024, help="of transformer and text encoder: a multiple of 128")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--size", default="384x640", help="of dit, chunk and train: HEIGHTxWIDTH, multiples of 64")
    parser.add_argument("--vae-dim", type=int, default=96, help="base_dim in the part vae; 96 is the released one")
    parser.add_argument("--vae-size", default="128x192", help="of the part vae, whose time is in proportion to it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--meta", action="store_true", help="count the released models at --size; nothing is run")
    return argparse.Namespace(**vars(parser.parse_args(argv)), words=argv)


def run(args: argparse.Namespace) -> None:
    size, vae_size = parse_size(args.size), parse_size(args.vae_size)
    multiple = wah.size_multiple(SCHEDULE)
    for name, good, expected in (("width", args.width > 0 and args.width % 128 == 0, "a multiple of 128"),
                                 ("layers", args.layers > 0, "at least 1"), ("rounds", args.rounds > 0, "at least 1"),
                                 ("vae_dim", args.vae_dim > 0, "at least 1"),
                                 ("threads", args.threads is None or args.threads > 0, "at least 1"),
                                 ("size", not any(side % multiple for side in size), f"multiples of {multiple}"),
                                 ("vae_size", not any(side % 8 for side in vae_size), "multiples of 8"),
                                 ("parts", set(args.parts) <= set(PARTS), f"some of {', '.join(PARTS)}")):
        if not good:
            raise ValueError(f"{name.replace('_', '-')} is {getattr(args, name)}, expected {expected}")
    print(f"python bench.py {shlex.join(args.words)}\n")
    if args.meta:
        return print_table(("released models, counted", "numbers"), count_released(size))
    for package in ("diffusers", "transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: the peers come with pip install '.[test]'")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = network_dtype(device)
    setup = Setup(args.width, args.layers, size, args.rounds, args.vae_dim, vae_size, device, dtype)
    rate = matmul_rate(device, dtype)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads,"
        f" {os.cpu_count()} cores")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    print(f"{machine}; {versions}; {str(dtype).removeprefix('torch.')}, matmul {rate / 1e12:.3g} TFLOP/s;"
          f" width {setup.width}, {setup.layers} layers, medians of {setup.rounds}\n")
    print_table(HEADER, (cells(row, rate) for part in args.parts or PARTS for row in PARTS[part](setup)))


def main(argv: list[str] | None = None) -> int:
    return run_program("bench.py", run, parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
