"""Pretraining of the miniature, part by part, from nothing but the procedural world.

    python -m mini.pretrain clips --parts 60              # clips as latents of the linear codec
    python -m mini.pretrain dit --steps 20000             # transformer and text encoder: continue videos
    torchrun --nproc-per-node 2 -m -- mini.pretrain dit ...  # the same on two cores
    python -m mini.pretrain vae --batch 4 --steps 20000   # its decoder; the encoder is written
    python -m mini.pretrain export                        # weights/mini in the official layout
    python -m mini.pretrain dit --start weights/mini ...  # go on from an export, where no state was kept

The transformer learns to continue videos and nothing else: no camera, no warp. Its histories are those of native
Helios: the first frame and the latest 19 latents in three bands, cut short at random, slightly noised, or only a
picture. Each part can be stopped at any time and goes on where it was; every step draws from a generator of its own.
Needs torch 2.9 for its Muon optimiser.
"""

import argparse
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from files.machine import choose_products
from geometry.camera import WINDOW
from helios.flow import Schedule, training_item
from helios.text import Tokenizer, UMT5Config, UMT5Encoder, encode_prompt
from helios.vae import VAE, VAEConfig
from mini import coding
from mini.encoder import write_encoder
from mini.latents import CHANNELS, SIZE, Codec, fit_codec, load_codec, load_parts, make_parts, save_codec, symmetries
from mini.leaves import make_leaves
from mini.world import caption, make_clip, make_scene
from model import Helios, HeliosConfig, History
from wah import BANDS, pseudo_history

SCHEDULE = Schedule(sampler="unipc", stages=1, stage_range=(0, 1))
HELIOS = HeliosConfig(in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=4, attention_head_dim=48,
                      num_layers=6, ffn_dim=512, text_dim=64, freq_dim=128, rope_dim=(16, 16, 16), rope_theta=100.0)
UMT5 = UMT5Config(vocab_size=640, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
VAE_CONFIG = VAEConfig(base_dim=32, z_dim=CHANNELS, dim_mult=(1, 2, 2), num_res_blocks=1, patch_size=2,
                       temperal_downsample=(True, True), in_channels=12, out_channels=12,
                       latents_mean=(0.0,) * CHANNELS, latents_std=(1.0,) * CHANNELS)
STEM = "diffusion_pytorch_model"
CROP = 96, 144  # of its pictures
LEAVES = 0.25  # share of its clips that are dead leaves
VAE_FRAMES = 29  # of a training clip: with few, what later frames remember of earlier ones is never learned
TEXT_ROWS = 64  # of the prompt embeddings; the official pipelines pad to 512
LORA = ["steps=250", "lr=1.5e-3", "decay=linear", "draws=4", "forms=12", "first=1", "atlas=false", "threshold=0.1"]
HELD_OUT = 10**6  # seeds from here on are never trained on


# ------------------------------------------------------------------------------------------------------- one mechanism


@dataclass(frozen=True)
class Recipe:
    steps: int
    decay: int  # the last steps, over which the learning rate falls to zero
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.01
    average: float = 0.99  # of the weights that are kept beside the trained ones
    every: int = 200  # steps between checkpoints and validations
    half: bool = False  # autocast to bf16


def optimizers(network: nn.Module, recipe: Recipe) -> tuple[list[nn.Parameter], list[torch.optim.Optimizer]]:
    """The parameters in their order, and what steps them: Muon, at twice the learning rate, for the matrices and (as
    matrices: views of the same memory) the kernels of numbered layers, AdamW for everything else."""
    trained, inner = {name: p for name, p in network.named_parameters() if p.requires_grad}, []
    for name, p in trained.items():
        if re.search(r"\.\d+\.", name) and p.ndim > 1 and p[0].numel() > 1 and not re.search("table|bias", name):
            trained[name] = nn.Parameter(p.data.flatten(1)) if p.ndim > 2 else p
            inner.append(trained[name])
    rest = [p for p in trained.values() if not any(p is other for other in inner)]
    adam = torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    muon = [torch.optim.Muon(inner, lr=2 * recipe.lr, weight_decay=recipe.weight_decay, momentum=0.95,
                             adjust_lr_fn="match_rms_adamw")] if inner else []
    for optim in (adam, *muon):
        for group in optim.param_groups:
            group["initial_lr"] = group["lr"]
    return list(trained.values()), [adam, *muon]


def save_state(path: Path, step: int, network: nn.Module, averaged: nn.Module, optims: list) -> None:
    """Everything that training needs to go on, as safetensors."""
    tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in averaged.state_dict().items()}
    for group, optim in enumerate(optims):
        for index, values in optim.state_dict()["state"].items():
            tensors |= {f"optim.{group}.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    temporary = path.with_suffix(".tmp")
    save_file({key: value.contiguous() for key, value in tensors.items()} | {"step": torch.tensor(step)}, temporary)
    temporary.rename(path)


def load_state(path: Path, network: nn.Module, averaged: nn.Module, optims: list) -> int:
    tensors = load_file(path)
    for prefix, module in (("network.", network), ("average.", averaged)):
        mine = {key: value for key, value in tensors.items() if key.startswith(prefix)}
        module.load_state_dict({key.removeprefix(prefix): value for key, value in mine.items()})
    for group, optim in enumerate(optims):
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith(f"optim.{group}."):
                index, name = key.split(".", 3)[2:]
                state.setdefault(int(index), {})[name] = value
        optim.load_state_dict(optim.state_dict() | {"state": state})
    return int(tensors["step"])


M = TypeVar("M", bound=nn.Module)


def fit(network: M, accumulate: Callable[[M, int, int], float], validate: Callable[[M], dict], recipe: Recipe,
        path: Path) -> None:
    """Train `network`, whose weights are initialised: `accumulate(network, step, rank)` adds a step's gradients and
    returns its loss, `validate` measures the averaged weights. State and log go to `path`."""
    choose_products()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    averaged = cast(M, torch.optim.swa_utils.AveragedModel(network, use_buffers=False).module)
    (trained, optims), start = optimizers(network, recipe), 0
    if path.is_file():
        start = load_state(path, network, averaged, optims)
    parameters, kept = ([p for p in each.parameters() if p.requires_grad] for each in (network, averaged))
    begin, total = time.perf_counter(), 0.0
    for step in range(start, recipe.steps):
        factor = min(1, (step + 1) / recipe.warmup, (recipe.steps - step) / recipe.decay)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.half):
            total += accumulate(network, step, rank)
        grads = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        if world > 1:
            dist.all_reduce(grads)
            grads /= world
        grads *= (1 / (grads.norm() + 1e-6)).clamp(max=1)
        for p, grad in zip(trained, grads.split([p.numel() for p in trained])):
            p.grad = grad.view_as(p)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optim.step()
        network.zero_grad()
        with torch.no_grad():
            keep = min(recipe.average, (step + 1) / (step + 10))
            for mean, p in zip(kept, parameters):
                mean.lerp_(p, 1 - keep)
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            if rank == 0:
                done = step + 1 - max(start, (step // recipe.every) * recipe.every)
                line = {"step": step + 1, "loss": total / done, "seconds": time.perf_counter() - begin}
                line |= validate(averaged)
                with path.with_suffix(".jsonl").open("a") as log:
                    log.write(json.dumps({key: round(value, 5) for key, value in line.items()}) + "\n")
                save_state(path, step + 1, network, averaged, optims)
            begin, total = time.perf_counter(), 0.0


# --------------------------------------------------------------------------------------------------------- transformer


class Generator(nn.Module):
    """What is trained together: the transformer and the text encoder in front of it."""

    def __init__(self):
        super().__init__()
        self.transformer, self.text_encoder = Helios(HELIOS), UMT5Encoder(UMT5)

    @torch.no_grad()
    def initialize(self) -> None:
        for name, p in self.named_parameters():
            if "table" in name:
                p.normal_(std=HELIOS.dim**-0.5)
        head = self.transformer.proj_out
        head.weight.zero_()
        head.bias.zero_()
        for module in self.text_encoder.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=1.0 if module.embedding_dim == UMT5.d_model else 0.1)


def history(prefix: Tensor, native: Tensor, bands: bool) -> History:
    """That of native Helios from the first latent [B, C, 1, h, w] and the latest 19; without `bands` of the short
    one alone."""
    whole = pseudo_history(prefix, native, drop=False)
    return whole if bands else replace(whole, mid=None, long=None)


def draw_start(clip: Tensor, rng: Random, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Target, first latent and the 19 before the target, of one clip's chunks [3, C, 9, h, w]."""
    blank = torch.zeros_like(clip[0, :, :1])
    target = rng.randrange(1, len(clip)) if kind == "continue" else rng.randrange(len(clip))
    if kind == "text":
        return clip[target], blank, blank.repeat(1, sum(BANDS), 1, 1)
    start = rng.randrange(target) if kind == "continue" else target
    prefix = clip[start, :, :1]  # the picture that the video began with; encoded as a standing video it is the same
    native = torch.cat([blank.repeat(1, sum(BANDS), 1, 1), prefix, *clip[start:target]], dim=1)[:, -sum(BANDS) :]
    if kind == "continue" and rng.random() < 0.4:
        native[:, : rng.randrange(sum(BANDS))] = 0
    return clip[target], prefix, native


class Clips:
    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.codec, self.tokenizer = load_codec(folder / "codec.safetensors"), tokenizer
        self.clips, self.captions = load_parts(folder)

    def batch(self, rng: Random, generator: torch.Generator, size: int, kind: str) -> dict:
        """Clean latents [B, C, 9, h, w], prefix, native history (with a little noise) and captions."""
        parts, captions = [], []
        for _ in range(size):
            index, turn = rng.randrange(len(self.clips)), rng.randrange(12)
            clip = torch.from_numpy(self.clips[index][rng.randrange(2)].astype(np.float32))
            parts.append(draw_start(self.codec.transform(clip, turn), rng, kind))
            true_colors = symmetries()[turn][1] == (0, 1, 2)  # else the caption's names of colours would be wrong
            captions.append(self.captions[index] if true_colors or kind == "text" else "")
        clean, prefix, native = (torch.stack(part) for part in zip(*parts))

        def noised(x: Tensor) -> Tensor:
            share = 0.135 * torch.rand(size, 1, x.shape[2], 1, 1, generator=generator)
            return share * torch.randn(x.shape, generator=generator) + (1 - share) * x

        native = noised(native) * (native != 0)
        return {"clean": clean, "prefix": noised(prefix), "native": native, "captions": captions}


def embed_captions(generator: Generator, tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    rows = {caption: encode_prompt(tokenizer, generator.text_encoder, caption, TEXT_ROWS) for caption in set(captions)}
    return torch.cat([rows[caption] for caption in captions])


def velocity_loss(generator: Generator, clips: Clips, batch: dict, u: Tensor, noise: Tensor, bands: bool) -> Tensor:
    transformer = generator.transformer
    u = u / (2 - u)  # twice the odds of noise: u counts from the noisy end
    item = training_item(batch["clean"], noise, u, SCHEDULE, 0)
    context = transformer.context(history(batch["prefix"], batch["native"], bands), batch["clean"].shape[2:])
    text = transformer.text(embed_captions(generator, clips.tokenizer, batch["captions"]))
    return (transformer(item.latents, item.timestep, text, context) - item.target).square().mean()


def train_dit(folder: Path, recipe: Recipe, size: int, start: Path | None) -> None:
    tokenizer = Tokenizer(folder / "spiece.model")
    clips = Clips(folder, tokenizer)
    held_out = clips.clips[:24], clips.captions[:24]
    clips.clips, clips.captions = clips.clips[24:], clips.captions[24:]
    torch.manual_seed(0)
    generator = Generator()
    generator.initialize()
    if start is not None:
        generator.transformer.load_state_dict(load_file(start / "transformer" / f"{STEM}.safetensors"))
        generator.text_encoder.load_state_dict(load_file(start / "text_encoder" / "model.safetensors"))

    def accumulate(network: Generator, step: int, rank: int) -> float:
        rng, draws = Random(step * 64 + rank), torch.Generator().manual_seed(step * 64 + rank)
        kind = rng.choices(("image", "continue", "text"), (0.5, 0.45, 0.05))[0]
        batch = clips.batch(rng, draws, size, kind)
        u = (torch.arange(size) + torch.rand(size, generator=draws)) / size  # stratified
        bands = kind == "continue" or rng.random() < 0.7
        loss = velocity_loss(network, clips, batch, u, torch.randn(batch["clean"].shape, generator=draws), bands)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def validate(network: Generator) -> dict:
        trained, losses = (clips.clips, clips.captions), {}
        clips.clips, clips.captions = held_out
        for kind in ("image", "continue"):
            draws = torch.Generator().manual_seed(1)
            batch = clips.batch(Random(1), draws, 24, kind)
            noise = torch.randn(batch["clean"].shape, generator=draws)
            losses[kind] = velocity_loss(network, clips, batch, (torch.arange(24) + 0.5) / 24, noise, True).item()
        clips.clips, clips.captions = trained
        return losses

    fit(generator, accumulate, validate, recipe, folder / "dit.safetensors")


# ----------------------------------------------------------------------------------------------------------------- VAE


def draw_clip(seed: int) -> Tensor:
    """Frames [T, H, W, 3] uint8 of a part of the world, or of dead leaves; recoloured and mirrored at random."""
    rng = Random(seed)
    flip, order = rng.choice(symmetries())
    if rng.random() < LEAVES:
        frames = make_leaves(seed, VAE_FRAMES, CROP)
    else:
        top, left = (rng.randint(0, side - part) for side, part in zip(SIZE, CROP))
        frames = make_clip(seed, VAE_FRAMES, SIZE).frames[:, top : top + CROP[0], left : left + CROP[1]]
    return (frames.flip(2) if flip else frames)[..., list(order)]


def slope_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the slopes along rows and columns: what a blurred picture lacks."""
    return torch.stack([(a - b).diff(dim=dim).abs().mean() for dim in (-1, -2)]).sum()


def decoder_losses(vae: VAE, codec: Codec, clips: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """Of clips [B, T, H, W, 3] uint8: smooth absolute error, error of the slopes, and squared error.

    The decoder learns from the codec's latents with a little noise, as the transformer's will not be exact either."""
    video = rearrange(clips, "b t h w c -> b c t h w") / 127.5 - 1
    with torch.autocast("cpu", enabled=False):
        latents = codec.encode(clips)
    decoded = coding.decode(vae, latents + noise).float()  # not clamped: that has no gradient
    return (F.smooth_l1_loss(decoded, video, beta=0.1), slope_error(decoded, video),
            (decoded.clamp(-1, 1) - video).square().mean())


def train_vae(folder: Path, recipe: Recipe, size: int, start: Path | None) -> None:
    """The decoder; the encoder is written."""
    codec = load_codec(folder / "codec.safetensors")
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG)
    if start is not None:
        vae.load_state_dict(load_file(start / "vae" / f"{STEM}.safetensors"))
    write_encoder(vae, codec)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)

    def accumulate(network: VAE, step: int, rank: int) -> float:
        first, draws = (step * 64 + rank) * size, torch.Generator().manual_seed(step * 64 + rank)
        clips = torch.stack([draw_clip(HELD_OUT // 2 + first + index) for index in range(size)])
        shape = size, CHANNELS, 1 + VAE_FRAMES // 4, CROP[0] // 8, CROP[1] // 8
        noise = 0.1 * torch.rand(size, 1, 1, 1, 1, generator=draws) * torch.randn(shape, generator=draws)
        picture, slopes, _ = decoder_losses(network, codec, clips, noise)
        loss = 4 * picture + slopes
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def validate(network: VAE) -> dict:
        clips = [make_clip(HELD_OUT + 500 + index, WINDOW, SIZE).frames for index in range(6)]
        leaves = [make_leaves(HELD_OUT + index, WINDOW, SIZE) for index in range(3)]
        rows = [decoder_losses(network, codec, clip[None], torch.zeros(1)) for clip in clips + leaves]
        decibels = [-10 * math.log10(row[2] / 4) for row in rows]
        slopes = sum(row[1].item() for row in rows[:6]) / 6
        return {"slopes": slopes, "psnr": sum(decibels[:6]) / 6, "psnr, leaves": sum(decibels[6:]) / 3}

    fit(vae, accumulate, validate, recipe, folder / "vae.safetensors")


def make_tokenizer(folder: Path, captions: list[str]) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_prefix=str(folder / "spiece"), vocab_size=UMT5.vocab_size, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True, model_type="bpe", hard_vocab_limit=False, minloglevel=2)


# -------------------------------------------------------------------------------------------------------------- export


def averaged_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """What `fit` left of a network's (or one of its parts') averaged weights, in half precision."""
    start = f"average.{prefix}"
    return {key.removeprefix(start): value.half() for key, value in load_file(path).items() if key.startswith(start)}


def export(folder: Path, target: Path) -> None:
    """The miniature in the official layout, from the averaged weights of all parts."""

    def write(part: str, class_name: str, config, weights: dict[str, Tensor], stem: str) -> None:
        (target / part).mkdir(parents=True, exist_ok=True)
        content = {"_class_name": class_name, **asdict(config)}
        (target / part / "config.json").write_text(json.dumps(content, indent=1) + "\n")
        save_file(weights, target / part / f"{stem}.safetensors")

    state = folder / "dit.safetensors"
    write("transformer", "HeliosTransformer3DModel", HELIOS, averaged_weights(state, "transformer."), STEM)
    write("text_encoder", "UMT5EncoderModel", UMT5, averaged_weights(state, "text_encoder."), "model")
    write("vae", "AutoencoderKLWan", VAE_CONFIG, averaged_weights(folder / "vae.safetensors"), STEM)
    for name in ("tokenizer", "scheduler"):
        (target / name).mkdir(exist_ok=True)
    shutil.copyfile(folder / "spiece.model", target / "tokenizer" / "spiece.model")
    shutil.copyfile(folder / "codec.safetensors", target / "codec.safetensors")  # only for training to go on from here
    scheduler = {"_class_name": "HeliosScheduler", "scheduler_type": SCHEDULE.sampler, "stages": SCHEDULE.stages,
                 "stage_range": SCHEDULE.stage_range}
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
    index = {"_class_name": "HeliosPipeline", "is_distilled": False, "num_inference_steps": 4, "guidance_scale": 1.0,
             "max_sequence_length": TEXT_ROWS, "height": SIZE[0], "width": SIZE[1], "keyframes": 1,
             "warp_fill": "smooth", "samples": 2, "train": LORA}
    index |= {"scheduler": ["diffusers", "HeliosScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
              "tokenizer": ["transformers", "T5Tokenizer"], "vae": ["diffusers", "AutoencoderKLWan"],
              "transformer": ["diffusers", "HeliosTransformer3DModel"]}
    (target / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("part", choices=("clips", "dit", "vae", "export"))
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"), help="clips, states and logs")
    parser.add_argument("--parts", type=int, default=40, help="clips: files of 50")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--decay", type=int, default=1, help="steps at the end over which the learning rate falls")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--half", action="store_true", help="compute in bf16: faster where a CPU has avx512_bf16")
    parser.add_argument("--start", type=Path, help="an export, whose codec, tokenizer or weights to begin with")
    parser.add_argument("--target", type=Path, default=Path("weights/mini"), help="export: where to")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(args.steps, args.decay, args.lr, half=args.half)
    if args.part == "clips":
        codec = args.folder / "codec.safetensors"
        if args.start is not None:
            shutil.copyfile(args.start / "codec.safetensors", codec)
            shutil.copyfile(args.start / "tokenizer" / "spiece.model", args.folder / "spiece.model")
        elif not codec.is_file():
            save_codec(fit_codec(range(HELD_OUT, HELD_OUT + 200)), codec)
            seeds = range(HELD_OUT, HELD_OUT + 2000)
            make_tokenizer(args.folder, [caption(make_scene(Random(seed))) for seed in seeds])
        make_parts(load_codec(codec), args.folder, range(args.parts))
    elif args.part == "export":
        export(args.folder, args.target)
    elif args.part == "dit":
        train_dit(args.folder, recipe, args.batch, args.start)
    else:
        train_vae(args.folder, recipe, args.batch, args.start)


if __name__ == "__main__":
    main()
