"""The first ten minutes with a card: what bench.py measures there, ours alone, at full size with random weights.

    python bench.py --device cuda

Ceilings first (copies inside the card, products of matrices), then calls of the transformer, warps and chunks, VAE,
Pi3X, a training step, fp8 and compiled calls. Memory is what a call takes beyond what was held; a row of a chunk or of
the training also has the peak, and what the counted table says of it (files/machine.py). On a CPU the same lines run at
any small size, which proves them and no more.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import peers
import torch
from torch import Tensor

import bench
from files.checkpoint import quantize
from files.machine import GIB, multiplies_float8, needed
from geometry.camera import move_path
from geometry.pi3x import Branch, Pi3X, Pi3XConfig
from geometry.surface import geometry_from_depth, pinhole
from helios.load import Models, Prompts
from helios.vae import VAE
from job import PRESETS
from memory import Camera
from model import Helios, Linear
from render import RenderSettings
from train import Recipe, Trainer
from wah import CHUNK, WINDOW, Options, Rollout

VISIBLE = {"86 %": 0.035, "47 %": 0.1325}  # of a warp: the columns that leave it in each latent frame
PATH = "forward 2, yaw 20"


def copies(setup: bench.Setup) -> Iterator[bench.Row]:
    """A large tensor to another place of the same memory: each byte is read and written."""
    numbers = 2**30 if setup.device.type == "cuda" else 2**22
    source = torch.zeros(numbers, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    row = bench.race(setup, "", lambda: target.copy_(source))
    yield replace(row, what=f"copy of {numbers / GIB:.3g} GiB on the device: {2 * numbers / row.seconds[0] / 1e9:.0f} GB/s")


def calls(setup: bench.Setup, model: Helios, text: list) -> Iterator[bench.Row]:
    timestep = torch.tensor([700.0], device=setup.device)

    def row(what: str, grid: tuple, history, network: Callable = model) -> bench.Row:
        latents, context = setup.scale.normal(1, 16, *grid), model.context(history, grid)
        network(latents, timestep, text, context)  # kernels are chosen, and perhaps compiled, in the first call
        return bench.race(setup, what, lambda: network(latents, timestep, text, context), tokens=len(context.rope),
                          flop=model.flops(context, bench.ROWS))

    for share, leaving in VISIBLE.items():
        yield row(f"DiT call, stage 0, {share} of the warp visible",
                  *peers.cases(model, setup.size, bench.SCHEDULE, leaving)["stage 0, warp"])
    later = {name: case for name, case in peers.cases(model, setup.size, bench.SCHEDULE).items() if name[-1] in "12"}
    for name, case in later.items():
        yield row(f"DiT call, {name}", *case)


def in_float8(model: Helios) -> list[tuple[Linear, torch.nn.Parameter]]:
    """As `--memory fp8` loads it; returns the weights that it had."""
    layers = [(layer, layer.weight) for layer in model.eval().modules() if isinstance(layer, Linear)]
    for layer, weight in layers:
        float8, layer.scale = quantize(weight, model.dtype)
        layer.weight = torch.nn.Parameter(float8, requires_grad=False)
        layer.in_float8 = multiplies_float8(float8.device)
    return layers


def eighths(setup: bench.Setup, model: Helios, text: list) -> Iterator[bench.Row]:
    """Stage 2 in fp8, and how far its output is from before."""
    stage = f"stage {bench.SCHEDULE.stages - 1}"
    grid, history = peers.cases(model, setup.size, bench.SCHEDULE)[stage]
    latents, timestep = setup.scale.normal(1, 16, *grid), torch.tensor([700.0], device=setup.device)
    context = model.context(history, grid)
    before = model(latents, timestep, text, context)
    layers = in_float8(model)
    after = model(latents, timestep, text, context)
    how = "float8 times float8" if model.blocks[0].attn1.to_q.in_float8 else "cast back"
    row = bench.race(setup, f"DiT call, {stage}, --memory fp8, {how}", lambda: model(latents, timestep, text, context),
                     tokens=len(context.rope), flop=model.flops(context, bench.ROWS))
    yield replace(row, difference=((after - before).norm() / before.norm()).item())
    for layer, weight in layers:
        layer.weight, layer.scale = weight, None


def chunks(setup: bench.Setup, models: Models, words: Tensor, preset: str) -> Iterator[bench.Row]:
    """Of a path along a slanted wall: the warp, and all of a chunk after the first, from poses to frames."""
    size, settings = setup.size, PRESETS[preset]
    options = Options(**{name: value for name, value in settings.items() if hasattr(Options, name)},
                      steps=(1 if settings else 2,) * bench.SCHEDULE.stages)
    image = setup.scale.normal(1, 3, *size).clamp(-1, 1).float()
    depth = torch.linspace(2, 4, size[1], device=setup.device).expand(size)
    limit = {"limit": settings["geometry_pixels"]} if settings else {}
    geometry = geometry_from_depth(image, depth, pinhole(60, *size), **limit)
    camera = Camera(geometry, size, settings=RenderSettings(samples=settings.get("samples", 4)))
    rollout = Rollout(models, Prompts(words), size, torch.Generator().manual_seed(0), image=image, camera=camera,
                      options=options)
    first, poses = move_path(PATH).split(WINDOW)
    rollout.next(first)
    state, before = rollout.state(), rollout.flops
    rollout.next(poses)
    work = rollout.flops - before

    def again() -> Tensor:
        rollout.restore(state)
        return rollout.next(poses).frames

    yield bench.race(setup, f"warp, preset {preset}", lambda: camera.warp(poses).frames)
    row = bench.race(setup, f"chunk, preset {preset}", again, flop=work)
    yield with_peak(replace(row, what=f"{row.what}: {WINDOW / row.seconds[0]:.3g} frames/s"), setup, "sample.py")


def with_peak(row: bench.Row, setup: bench.Setup, program: str) -> bench.Row:
    device, counted = setup.device, needed(program, "--memory full", setup.size)
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else float("nan")
    return replace(row, what=f"{row.what}; all in all at most {peak:.1f} GiB (the released model, counted: {counted:.1f})")


def pi3x(setup: bench.Setup) -> Iterator[bench.Row]:
    tiny = Branch(64, 1, 64, 64)
    small = Pi3XConfig(64, grid=4, encoder_blocks=1, encoder_hidden=64, decoder_blocks=2, decoder_hidden=64, point=tiny,
                       conf=tiny, camera=tiny, metric=tiny, point_head=((32, 1),), conf_head=((32, 1),))
    network = peers.randomize(Pi3X(Pi3XConfig() if setup.scale.width == 5120 else small), setup.device, setup.scale.dtype)
    size = [max(14, side // 14 * 14) for side in setup.size]
    for pictures in (1, 8):
        images = setup.scale.normal(1, pictures, 3, *size).sigmoid()
        yield bench.race(setup, f"Pi3X, {pictures} pictures of {size[0]}x{size[1]}", lambda: network(images).points)


def training(setup: bench.Setup, model: Helios, text: list) -> Iterator[bench.Row]:
    grid, history = peers.cases(model, setup.size, bench.SCHEDULE)["stage 0, warp"]
    clean = setup.scale.normal(1, 16, CHUNK, *(side // 8 for side in setup.size))
    trainer = Trainer(model, bench.SCHEDULE, Recipe(warmup=0))
    context = model.context(history, grid)

    def step() -> Tensor:
        return torch.tensor(trainer.step(history, clean, text)["loss"])

    row = bench.race(setup, "training step, stage 0, warp", step, tokens=len(context.rope),
                     flop=model.flops(context, bench.ROWS, training=True))
    yield with_peak(row, setup, "train.py")
    model.set_lora(None)
    model.checkpointing = model.keep_attention = False


def vae_rows(setup: bench.Setup, vae: VAE) -> Iterator[bench.Row]:
    video = setup.scale.normal(1, 3, WINDOW, *setup.size).clamp(-1, 1)
    latents, where = vae.encode(video)[0], f"{WINDOW} frames of {setup.size[0]}x{setup.size[1]}"
    yield bench.race(setup, f"VAE encode, {where}", lambda: vae.encode(video)[0])
    yield bench.race(setup, f"VAE decode, {where}", lambda: vae.decode(latents))


def rows(setup: bench.Setup) -> Iterator[bench.Row]:
    """Everything, in the order in which it matters if the time is short."""
    yield from copies(setup)
    model = setup.scale.transformer()
    words = setup.scale.normal(1, bench.ROWS, model.config.text_dim).to(setup.scale.dtype)
    with torch.no_grad():
        text, vae = model.text(words), setup.scale.vae(setup.vae_dim)
        models = Models(model, vae, bench.SCHEDULE)
        yield from calls(setup, model, text)
        for preset in PRESETS:
            yield from chunks(setup, models, words, preset)
        yield from vae_rows(setup, vae)
        yield from pi3x(setup)
    yield from training(setup, model, text)
    with torch.no_grad():
        yield from eighths(setup, model, text)
        model.compile_blocks()  # the last of all, as it needs a compiler
        yield from (replace(row, what=f"compiled: {row.what}") for row in calls(setup, model, text))
