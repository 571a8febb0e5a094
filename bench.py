"""Side by side with the peers: our networks against diffusers, transformers and peft in time, memory and numbers.

    python bench.py [dit vae text chunk train load] [--width 1024 --layers 8 --size 384x640 --rounds 3]
    python bench.py --meta
    python bench.py --device cuda

The released models, scaled in width and depth, with random weights that both sides share (tests/peers.py). A row runs
ours, the peer, ours, the peer, ... in one process, so that a drift of the machine hits both, and takes medians;
outputs of the first round are compared, and the program stops if they differ. TFLOP are those of our matrix products; a
peer may do more. `--meta` counts the released transformer and runs nothing. On CUDA the part `card` is the default:
ours alone at full size in bf16 (tests/first_minutes.py); it was never run there. OMP_NUM_THREADS sets a CPU's threads.
"""

import argparse
import ctypes
import math
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import wah
from files.checkpoint import kept_dtype, load
from files.cli import parse_size, run_program
from files.machine import Clock, allow_tf32, network_dtype, use_device
from helios.flow import Schedule
from helios.load import Models, Prompts
from helios.text import Tokenizer, UMT5Encoder, encode_prompt
from helios.vae import VAE
from model import Helios, HeliosConfig
from train import Recipe, Trainer

TESTS = Path(__file__).resolve().parent / "tests"
sys.path.append(str(TESTS))
import peers

PROMPT = "A red car drives through a roundabout in the evening, trees and houses behind it, long shadows on the street."
ROWS, WORDS = 512, 60  # of a prompt's embeddings: in all, and those that the text encoder is timed with
STEPS = (2, 2, 2)  # of the distilled model, after the first chunk
# The distilled model's, but for gamma: at its 1/3 the peer's factorisation of the block noise fails on the CPU.
SCHEDULE = Schedule(sampler="dmd", gamma=0.33, use_dynamic_shifting=True, time_shift_type="linear")


@dataclass(frozen=True)
class Setup:
    scale: peers.Scale
    size: tuple[int, int]
    vae_dim: int
    vae_size: tuple[int, int]
    rounds: int
    device: torch.device  # that is measured


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Row:
    """Of the table: ours, then the peer if there is one."""

    what: str
    seconds: list[float]
    memory: tuple[int | None, ...] = ()  # bytes at most, beyond what was held before; None: unknown
    difference: float | None = None  # largest one of the outputs, relative to the largest number
    tokens: int | None = None
    flop: int | None = None


def host_memory(key: str) -> int | None:
    """Of this process: VmRSS, now; VmHWM, at most. None if this is not Linux."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def measure(device: torch.device, call: Callable[[], Tensor]) -> tuple[Tensor, float, int | None]:
    """A call's output, seconds and memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = torch.cuda.memory_allocated(device), partial(torch.cuda.max_memory_allocated, device)
    else:
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else a call would find its memory in what earlier ones gave back
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, peak = host_memory("VmRSS"), partial(host_memory, "VmHWM")
    clock = Clock(device)
    clock.lap("before")
    output = call()
    clock.lap("call")
    after = peak()
    return output, clock.seconds["call"], None if before is None or after is None else after - before


def compare(what: str, ours: Tensor, peer: Tensor, tolerance: float) -> float:
    ours, peer = ours.double().cpu(), peer.double().cpu()
    difference = ((ours - peer).abs().max() / peer.abs().max()).item() if ours.shape == peer.shape else math.inf
    if not difference <= tolerance:  # so that nan is caught too
        raise ValueError(f"{what}: our output differs from the peer's by {difference:.2g}, allowed is {tolerance:g}")
    return difference


def race(setup: Setup, what: str, *calls: Callable[[], Tensor], tokens: int | None = None, flop: int | None = None,
         slack: float = 1) -> Row:
    """Ours, the peer, ours, the peer, ..., or ours alone. ValueError if the first outputs differ."""
    rounds, difference = [], None
    for _ in range(setup.rounds):
        outputs, *figures = zip(*(measure(setup.device, call) for call in calls))
        if not rounds and len(calls) == 2:
            tolerance = slack * (1e-4 if setup.scale.dtype == torch.float32 else 0.05)
            difference = compare(what, outputs[0], outputs[1], tolerance)
        rounds.append(figures)
    seconds, memory = (zip(*column) for column in zip(*rounds))  # by side
    most = tuple(None if None in side else max(side) for side in memory)
    return Row(what, [median(side) for side in seconds], most, difference, tokens, flop)


class Split:
    """One side's chunk, timed by part: methods are replaced by ones that count; what remains is denoising."""

    def __init__(self, device: torch.device, chunk: Callable[[], object], encoder: nn.Module, vae: nn.Module):
        self.clock, self.chunk, self.runs = Clock(device), chunk, []
        for part, owner, name in (("text", encoder, "forward"), ("encode", vae, "encode"), ("decode", vae, "decode")):
            setattr(owner, name, partial(self.count, part, getattr(owner, name)))

    def count(self, part: str, method: Callable, *given, **named) -> object:
        self.clock.lap("denoise")
        self.given = given  # in the end to `decode`
        result = method(*given, **named)
        self.clock.lap(part)
        return result

    def __call__(self) -> Tensor:
        """The chunk's latents but the first frame: ours, as the official Warp-as-History, replaces it."""
        self.clock = Clock(self.clock.device)
        self.chunk()
        self.clock.lap("denoise")
        self.runs.append(self.clock.seconds)
        return self.given[0][:, :, 1:]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best of five, as others may use the machine."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(measure(device, lambda: a @ b)[1] for _ in range(5))


# --------------------------------------------------------------------------------------------------------------- parts


@torch.inference_mode()
def bench_dit(setup: Setup) -> Iterator[Row]:
    """Calls; what ours prepares once a stage or prompt, and the peer in every call, has rows of its own."""
    ours, embeddings = setup.scale.transformer(), setup.scale.normal(1, ROWS, setup.scale.width).to(setup.scale.dtype)
    peer, text = peers.Denoiser(peers.twin(ours)), ours.text(embeddings)
    timestep = torch.tensor([700.0], device=setup.device)
    for name, (grid, history) in peers.cases(ours, setup.size, SCHEDULE).items():
        latents, context = setup.scale.normal(1, 16, *grid), ours.context(history, grid)
        yield race(setup, f"DiT call, {name}", lambda: ours(latents, timestep, text, context),
                   lambda: peer(latents, timestep, embeddings, history),
                   tokens=len(context.rope), flop=ours.flops(context, ROWS))
        yield race(setup, "its history, once a stage", lambda: ours.context(history, grid).tokens)
    yield race(setup, "keys and values of the text, once a prompt", lambda: ours.text(embeddings)[0][0])


@torch.inference_mode()
def bench_vae(setup: Setup) -> Iterator[Row]:
    ours, (height, width) = setup.scale.vae(setup.vae_dim), setup.vae_size
    peer, video = peers.twin(ours), setup.scale.normal(1, 3, wah.WINDOW, height, width).clamp(-1, 1)
    latents, where = ours.encode(video)[0], f"{wah.WINDOW} frames of {height}x{width}, base_dim {setup.vae_dim}"
    encode, decode = (count_flop(VAE, ours.config, call) for call in (lambda vae: vae.encode(video.to("meta")),
                                                                      lambda vae: vae.decode(latents.to("meta"))))
    yield race(setup, f"VAE encode, {where}", lambda: torch.cat(ours.encode(video), dim=1),
               lambda: peer.encode(video).latent_dist.parameters, flop=encode)
    yield race(setup, f"VAE decode, {where}", lambda: ours.decode(latents), lambda: peer.decode(latents).sample,
               flop=decode)


@torch.inference_mode()
def bench_text(setup: Setup) -> Iterator[Row]:
    ours = setup.scale.encoder()
    peer, ids = peers.twin(ours), torch.arange(2, 2 + WORDS, device=setup.device)[None]
    padded = F.pad(ids, (0, ROWS - WORDS))
    yield race(setup, f"text encoder, {WORDS} words (peer: {ROWS} rows)", lambda: ours(ids),
               lambda: peer(padded, attention_mask=(padded > 0).long()).last_hidden_state[:, :WORDS], tokens=WORDS,
               flop=count_flop(UMT5Encoder, ours.config, lambda encoder: encoder(ids.to("meta"))))


@torch.inference_mode()
def bench_chunk(setup: Setup) -> Iterator[Row]:
    """Image to video: one native chunk."""
    transformer, encoder, vae = setup.scale.transformer(), setup.scale.encoder(), setup.scale.vae()
    folder = TESTS / "golden" / "helios" / "distilled" / "tokenizer"
    pipeline = peers.pipeline(transformer, encoder, vae, folder, SCHEDULE)
    tokenizer, models = Tokenizer(folder), Models(transformer, vae, SCHEDULE)
    image, options = setup.scale.normal(1, 3, *setup.size).sigmoid(), wah.Options(STEPS, amplify_first_chunk=False)

    def ours() -> None:
        prompts = Prompts(encode_prompt(tokenizer, encoder, PROMPT, ROWS))
        generator = torch.Generator().manual_seed(1)
        wah.Rollout(models, prompts, setup.size, generator, image=2 * image - 1, options=options).next()

    def peer() -> None:
        pipeline(PROMPT, None, *setup.size, wah.WINDOW, guidance_scale=1.0, generator=torch.Generator().manual_seed(1),
                 image=image, add_noise_to_image_latents=False, pyramid_num_inference_steps_list=list(STEPS))

    sides = Split(setup.device, ours, encoder, vae), Split(setup.device, peer, pipeline.text_encoder, pipeline.vae)
    yield race(setup, f"chunk of {wah.WINDOW} frames from a picture", *sides, slack=10)
    for part in ("text", "encode", "denoise", "decode"):
        yield Row(f"of it: {part}", [median(run[part] for run in side.runs) for side in sides])


def bench_train(setup: Setup) -> Iterator[Row]:
    """Forward, backward with gradient checkpointing and AdamW, led by a warp; losses and gradient norms compared."""
    model, embeddings = setup.scale.transformer(), setup.scale.normal(1, ROWS, setup.scale.width).to(setup.scale.dtype)
    grid, history = peers.cases(model, setup.size, SCHEDULE)["stage 0, warp"]
    ours = Trainer(model, SCHEDULE, Recipe(warmup=0))
    peer, clean = peers.PeerTrainer(ours), setup.scale.normal(1, 16, wah.CHUNK, *(side // 8 for side in setup.size))
    text, context = model.text(embeddings), model.context(history, grid)

    def numbers(metrics: dict[str, float]) -> Tensor:
        return torch.tensor([metrics["loss"], metrics["grad_norm"]])

    yield race(setup, "training step, stage 0, warp", lambda: numbers(ours.step(history, clean, text)),
               lambda: numbers(peer.step(history, clean, embeddings)),
               tokens=len(context.rope), flop=model.flops(context, ROWS, training=True))


def bench_load(setup: Setup) -> Iterator[Row]:
    """The transformer from a bf16 file, as the released one is, just written, so that no disk is measured. Every weight
    is read, as the peer may only map the file; memory is the host's, with the file's pages."""
    ours, dtype = setup.scale.transformer(), setup.scale.dtype
    peer = peers.twin(ours)

    def sums(model: nn.Module) -> Tensor:
        return torch.tensor([weight.sum().item() for _, weight in sorted(model.named_parameters())])

    with tempfile.TemporaryDirectory() as folder:
        peer.save_config(folder)
        save_file({name: value.bfloat16() for name, value in ours.state_dict().items()},
                  Path(folder) / "diffusion_pytorch_model.safetensors")
        yield race(replace(setup, device=torch.device("cpu")), "load the transformer, read each weight once",
                   lambda: sums(load(Helios, folder, setup.device, dtype)),
                   lambda: sums(peer.from_pretrained(folder, torch_dtype=dtype).to(setup.device)))


def bench_card(setup: Setup) -> Iterator[Row]:
    """The first ten minutes with a card."""
    import first_minutes  # which is made of what stands here

    return first_minutes.rows(setup)


# -------------------------------------------------------------------------------------------------------------- tables


PEERED = {"dit": bench_dit, "vae": bench_vae, "text": bench_text, "chunk": bench_chunk, "train": bench_train,
          "load": bench_load}
PARTS = PEERED | {"card": bench_card}
HEADER = ["what", "tokens", "ours, s", "peer, s", "ratio", "largest difference", "TFLOP", "TFLOP/s", "of matmul",
          "ours, GiB", "peer, GiB"]


def cells(row: Row, rate: float) -> list[str]:
    """A row of the table; empty where there is nothing to say."""

    def show(value: float | None, form: str, unit: float = 1) -> str:
        return "" if value is None else format(value / unit, form)

    ours, peer = row.seconds[0], row.seconds[1] if len(row.seconds) > 1 else None
    memory = (*row.memory, None, None)[:2]
    speed = row.flop and row.flop / ours
    return [row.what, show(row.tokens, ".0f"), show(ours, ".3g"), show(peer, ".3g"), show(peer and ours / peer, ".2f"),
            show(row.difference, ".1e"), show(row.flop, ".3g", 1e12), show(speed, ".3g", 1e12),
            show(speed, ".0%", rate), *(show(each, ".2f", 2**30) for each in memory)]


def print_table(header: list[str], lines: Iterable[list[str]]) -> None:
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)


def count_flop(network: type[nn.Module], config: object, call: Callable[[nn.Module], object]) -> int:
    """As torch counts them on the meta device, where nothing is computed."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(network(config))
    return counter.get_total_flops()


def count_released(size: tuple[int, int]) -> Iterator[list[str]]:
    """Work and bytes of the released transformer, which is not run."""
    with torch.device("meta"):
        model = Helios(HeliosConfig())
    small = Helios(HeliosConfig(1, num_layers=1))  # the number of tokens does not depend on the width
    for name, (grid, history) in peers.cases(small, size, SCHEDULE).items():
        with torch.no_grad():
            context = small.context(history, grid)
        yield [f"DiT call, {name}: {len(context.rope)} tokens", f"{model.flops(context, ROWS) / 1e12:.1f} TFLOP"]
    sizes = {name: x.numel() * kept_dtype(model, name, torch.bfloat16).itemsize for name, x in model.named_parameters()}
    blocks = sum(count for name, count in sizes.items() if name.startswith("blocks."))
    halved = sum(x.numel() - 2 * len(x) for name, x in model.named_parameters() if name.endswith(Helios.fp8))
    yield ["DiT parameters", f"{sum(x.numel() for x in model.parameters()) / 1e9:.3f} G"]
    for mode, saved in (("full", 0), ("fp8", halved), ("stream", blocks - 2 * blocks // len(model.blocks))):
        yield [f"DiT weights, --memory {mode}", f"{(sum(sizes.values()) - saved) / 2**30:.2f} GiB"]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench.py", usage=argparse.SUPPRESS,  # one line an error
                                     description="Time and memory beside diffusers, transformers and peft.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default: all but card,"
                        " on CUDA card alone")
    parser.add_argument("--width", type=int, help="of transformer and text encoder, a multiple of 128 (1024; card:"
                        " 5120)")
    parser.add_argument("--layers", type=int, help="of both (8; card: 40)")
    parser.add_argument("--size", default="384x640", help="of dit, chunk and train: HEIGHTxWIDTH, multiples of 64")
    parser.add_argument("--vae-dim", type=int, default=96, help="base_dim in the part vae; 96 is the released one")
    parser.add_argument("--vae-size", default="64x96", help="of the part vae, whose time is in proportion to it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--meta", action="store_true", help="count the released transformer at --size; nothing is run")
    args = parser.parse_args(argv)
    args.parts = args.parts or (["card"] if args.device.startswith("cuda") else [*PEERED])
    for name, card, other in (("width", 5120, 1024), ("layers", 40, 8)):
        if getattr(args, name) is None:
            setattr(args, name, card if "card" in args.parts else other)
    return argparse.Namespace(**vars(args), words=argv)


def run(args: argparse.Namespace) -> None:
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise ValueError(f"{unknown[0]}: expected some of {', '.join(PARTS)}")
    for name, multiple in (("width", 128), ("layers", 1), ("vae_dim", 1), ("rounds", 1)):
        if getattr(args, name) < 1 or getattr(args, name) % multiple:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a multiple of {multiple}")
    size, vae_size = parse_size(args.size), parse_size(args.vae_size)
    print(f"python bench.py {shlex.join(args.words)}\n")
    if args.meta:
        return print_table(["the released model, counted", "numbers"], count_released(size))
    missing = [package for package in peers.PACKAGES if find_spec(package) is None]
    if missing and args.parts != ["card"]:
        raise ValueError(f"{', '.join(missing)}: not installed; the peers come with pip install '.[test]'")
    use_device(args.device)
    allow_tf32(True)  # as sample.py and train.py do
    device, dtype = torch.device(args.device), network_dtype(args.device)
    rate = matmul_rate(device, dtype)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *peers.PACKAGES) if name not in missing)
    print(f"{machine}; {versions}; {str(dtype).removeprefix('torch.')}, matmul {rate / 1e12:.3g} TFLOP/s;"
          f" width {args.width}, {args.layers} layers, medians of {args.rounds}\n")
    scale = peers.Scale(args.width, args.layers, device, dtype)
    setup = Setup(scale, size, args.vae_dim, vae_size, args.rounds, device)
    print_table(HEADER, (cells(row, rate) for part in args.parts for row in PARTS[part](setup)))


def main(argv: list[str] | None = None) -> int:
    return run_program("bench.py", run, parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
