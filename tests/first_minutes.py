"""The first ten minutes with a card: what bench.py measures there, ours alone, at full size with random weights.

    python bench.py --device cuda

Ceilings first (copies inside the card, products of matrices), then calls of the transformer, compiled ones, fp8, chunks,
VAE, Pi3X and a training step. Memory is what a call takes beyond what was held; a chunk's row also has what the counted
table says of it (files/machine.py). On a CPU the same lines run at any small size, which proves them and no more.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import peers
import torch
from torch import Tensor

import bench
from files.checkpoint import quantize
from files.machine import GIB, multiplies_float8, needed
from geometry.pi3x import Branch, Pi3X, Pi3XConfig
from helios.load import Models, Prompts
from helios.vae import VAE
from model import Helios, Linear
from render import Warp
from train import Recipe, Trainer
from wah import CHUNK, WINDOW, Options, Rollout

VISIBLE = {"86 %": 0.035, "47 %": 0.1325}  # of a warp: the columns that leave it in each latent frame
REALTIME = Options(steps=(1, 1, 1), amplify_first_chunk=False, warp_band="mid", threshold=0.6, warp_fill="smooth")


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


def in_float8(model: Helios) -> None:
    """As `--memory fp8` loads it."""
    for layer in model.eval().modules():
        if isinstance(layer, Linear):
            float8, layer.scale = quantize(layer.weight, model.dtype)
            layer.weight = torch.nn.Parameter(float8, requires_grad=False)
            layer.in_float8 = multiplies_float8(layer.weight.device)


def eighths(setup: bench.Setup, model: Helios, text: list) -> Iterator[bench.Row]:
    """The last of all, as it changes the model: stage 2 in fp8, and how far its output is from before."""
    grid, history = peers.cases(model, setup.size, bench.SCHEDULE)[f"stage {bench.SCHEDULE.stages - 1}"]
    latents, timestep = setup.scale.normal(1, 16, *grid), torch.tensor([700.0], device=setup.device)
    context = model.context(history, grid)
    before = model(latents, timestep, text, context)
    in_float8(model)
    after = model(latents, timestep, text, context)
    how = "float8 times float8" if model.blocks[0].attn1.to_q.in_float8 else "cast back"
    row = bench.race(setup, f"the same with --memory fp8, {how}", lambda: model(latents, timestep, text, context),
                     tokens=len(context.rope), flop=model.flops(context, bench.ROWS))
    yield replace(row, difference=((after - before).norm() / before.norm()).item())


def chunk(setup: bench.Setup, what: str, models: Models, words: Tensor, options: Options) -> bench.Row:
    """A chunk after the first, led by a warp of noise, from warp to frames."""
    generator, size = torch.Generator().manual_seed(0), setup.size
    rollout = Rollout(models, Prompts(words), size, generator, image=setup.scale.normal(1, 3, *size).clamp(-1, 1),
                      options=options)
    warp = Warp(setup.scale.normal(1, 3, WINDOW, *size).clamp(-1, 1), torch.ones(1, 1, WINDOW, *size, device=setup.device))
    rollout.next(warp=warp)
    state, before = rollout.state(), rollout.flops
    rollout.next(warp=warp)
    work = rollout.flops - before

    def again() -> Tensor:
        rollout.restore(state)
        return rollout.next(warp=warp).frames

    row = bench.race(setup, what, again, flop=work)
    counted = needed("sample.py", "--memory full", size)
    return replace(row, what=f"{what}: {WINDOW / row.seconds[0]:.3g} frames/s; all in all at most {peak(setup)}"
                             f" (the released model, counted: {counted:.1f})")


def peak(setup: bench.Setup) -> str:
    if setup.device.type != "cuda":
        return "what a CPU does not tell"
    return f"{torch.cuda.max_memory_allocated(setup.device) / GIB:.1f} GiB"


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

    yield bench.race(setup, "training step, stage 0, warp", step, tokens=len(context.rope),
                     flop=model.flops(context, bench.ROWS, training=True))
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
        yield chunk(setup, "chunk, steps 2,2,2", models, words, Options(amplify_first_chunk=False))
        yield chunk(setup, "chunk, preset realtime", models, words, REALTIME)
        yield from vae_rows(setup, vae)
        yield from pi3x(setup)
    yield from training(setup, model, text)
    with torch.no_grad():
        forwards = [block.forward for block in model.blocks]
        model.compile_blocks()
        yield from (replace(row, what=f"compiled: {row.what}") for row in calls(setup, model, text))
        for block, forward in zip(model.blocks, forwards):
            block.forward = forward
        yield from eighths(setup, model, text)
