"""The miniature's geometry: a small Pi3X, trained on rendered pictures whose depth and cameras are known.

    python -m mini.geometry train --steps 15000     # goes on where it was stopped; --start: from an export
    python -m mini.geometry export                  # weights/mini/Pi3X/model.safetensors
    python -m mini.geometry evaluate                # these on 40 held-out scenes, as a table

The network is that of pi3x.py and sees pictures as `surface.estimate` shows them. Losses after Pi3 (arXiv 2507.13347),
on what the renderer reads: depth in the network's unit, which is to be a set's median depth, and this in meters (the
metric branch); rays, which give the focal lengths; confidence, low in the sky, so that the renderer drops it. Left out:
Pi3's alignment of scale, as it is known here; its loss on normals, which `edges` stands for; and how cameras stand to
each other, which a network of this size did not learn (docs/miniature.md): its camera branch stays what it is.
"""

import argparse
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

import render
from files.media import from_frames
from geometry import surface
from geometry.camera import WINDOW, inverse, scale_translation
from geometry.pi3x import Branch, Pi3X, Pi3XConfig, Prediction, load_pi3x
from geometry.surface import ensure_valid, estimate, geometry_from_depth, median_depth, resize
from mini import world
from mini.latents import SIZE
from mini.pretrain import HELD_OUT, Recipe, averaged_weights, fit

# Most of a step goes into the convolutional heads and most of the learning into the blocks: so the heads are narrow.
CONFIG = Pi3XConfig(dim=192, grid=9, registers=1, specials=1, encoder_blocks=4, encoder_hidden=512, decoder_blocks=6,
                    decoder_hidden=512, point=Branch(128, 1, 256, 64), conf=Branch(64, 1, 128, 64),
                    camera=Branch(128, 1, 256, 64), metric=Branch(64, 1, 128, 64),
                    point_head=((32, 0), (16, 0), (8, 0)), conf_head=((16, 0), (8, 0)))
INPUT = surface.geometry_size(*SIZE, CONFIG.pixels)  # what the network sees of a video
DRAWN = SIZE, SIZE, (SIZE[0] * 5 // 8, SIZE[1] * 5 // 8), INPUT  # generated pictures are blurred, others sharper
PICTURES = 9  # in a step, at most
HAZE = 40.0  # meters: what is as far cannot be told from the sky
WEIGHTS = {"depth": 1.0, "edges": 1.0, "rays": 8.0, "unit": 0.3, "confidence": 0.2}


class Views(NamedTuple):
    """B sets of N pictures, each set of one scene, and what is to be found out about them."""

    images: Tensor  # [B, N, 3, H, W] in [0, 1]
    depth: Tensor  # [B, N, H, W] meters, inf in the sky and the haze
    slopes: Tensor  # [B, 1, H, W, 2] x / z and y / z of every pixel's ray


def stretched(fov_x: float, size: tuple[int, int]) -> Tensor:
    """[3,3] of a video's frame with this field of view in degrees that was resized to `size`."""
    return surface.stretch(surface.pinhole(fov_x, *SIZE), SIZE, size)


def recolored(pictures: Tensor, rng: Random, generator: torch.Generator) -> Tensor:
    """[N,H,W,3] uint8 -> [N,3,H,W] in [0, 1] in other colours, with another contrast and noise."""
    images = rearrange(pictures, "n h w c -> n c h w")[:, rng.sample(range(3), 3)] / 255
    images = (images - 0.5) * rng.uniform(0.7, 1.3) + rng.uniform(0.35, 0.65)
    images = images + rng.uniform(0, 0.04) * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1)


def draw_views(seed: int, count: int) -> Views:
    """A set of `count` frames of one random clip; mirrored, recoloured and noisy at random."""
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    scene, frames = world.make_scene(rng), WINDOW // 2 if count == 1 else 2 * WINDOW
    path, fov_x = world.make_path(scene, rng, frames), rng.uniform(45, 85)
    c2w, drawn, K = path[sorted(rng.sample(range(frames), count))], rng.choice(DRAWN), stretched(fov_x, INPUT)
    pictures, depth = world.render(scene, c2w, K, INPUT, 2 if drawn == INPUT else 1)
    if drawn != INPUT:
        pictures, _ = world.render(scene, c2w, stretched(fov_x, drawn), drawn)
    images = resize(recolored(pictures, rng, generator), INPUT)
    slopes = surface.unproject(torch.ones(INPUT), K, torch.eye(4))[..., :2]
    if rng.random() < 0.5:  # the slopes are symmetric
        images, depth = images.flip(-1), depth.flip(-1)
    return Views(images[None], depth.where(depth < HAZE, torch.inf)[None], slopes[None, None])


def batch(first: int, count: int) -> Views:
    """A step's sets of `count` pictures, of the seeds from `first` on."""
    sets = (draw_views(first + index, count) for index in range(PICTURES // count))
    return Views(*map(torch.cat, zip(*sets)))


def losses(prediction: Prediction, views: Views) -> dict[str, Tensor]:
    """Means, to be weighted."""
    known, local = views.depth.isfinite(), prediction.local_points
    unit = views.depth.where(known, torch.nan).flatten(1).nanmedian(1).values  # [B]
    wanted = (views.depth / unit[:, None, None, None]).where(known, 1).log()
    error = ((local[..., 2] / prediction.metric[:, None, None, None]).log() - wanted).where(known, 0)  # [B, N, H, W]
    parts = {"depth": error.abs().sum() / known.sum(), "edges": torch.zeros_like(unit[0])}
    for e, k in ((error, known), (error.mT, known.mT)):
        for step in (1, 3):  # neighbours shall be wrong alike
            both = k[..., step:] & k[..., :-step]
            parts["edges"] = parts["edges"] + 0.5 * (e[..., step:] - e[..., :-step]).abs().where(both, 0).mean()
    parts["rays"] = (local[..., :2] / local[..., 2:] - views.slopes).abs().mean()
    parts["unit"] = (prediction.metric / unit).log().abs().mean()
    right = known & (error.detach().abs() < 0.1)
    parts["confidence"] = F.binary_cross_entropy_with_logits(prediction.confidence, right.float())
    return parts


def train(folder: Path, recipe: Recipe, start: Path | None = None) -> None:
    """State and log are `geometry.safetensors` and `.jsonl` in `folder`; logged are the losses on held-out pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = (Pi3X(CONFIG) if start is None else load_pi3x(start)).train().requires_grad_()
    for part in (network.camera_decoder, network.camera_head):
        part.requires_grad_(False)
    held_out = [batch(HELD_OUT + PICTURES * index, count) for index, count in enumerate((1, 1, 1, 2, 3))]

    def accumulate(network: Pi3X, step: int, rank: int) -> float:
        turn = 2 * step + rank
        views = batch(turn * PICTURES % HELD_OUT, Random(turn).choice((1, 1, 2, 3)))
        loss = torch.stack([WEIGHTS[name] * part for name, part in losses(network(views.images), views).items()]).sum()
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def validate(network: Pi3X) -> dict:
        parts = [losses(network(views.images), views) for views in held_out]
        return {name: torch.stack([part[name] for part in parts]).mean().item() for name in WEIGHTS}

    fit(network, accumulate, validate, recipe, folder / "geometry.safetensors")


def export(state: Path, out: Path) -> None:
    """The averaged weights of a training state as `pi3x.load_pi3x` reads them, in fp16."""
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(averaged_weights(state), out)


def judge(network: Pi3X, clip: world.Clip) -> dict[str, float]:
    """Errors of what is estimated from a clip's first frame.

    Warps are compared with frames 16 and 32 where they and that of the exact depth are visible. Those of the estimate
    go as many meters ("in meters"), or tenths of its median depth, the unit of sample.py; "plane": at the true median;
    "no network": what sample.py does without one, the same plane with a field of view of 55 degrees.
    """
    true = from_frames(clip.frames[::16])
    image, truth, poses = true[:, :, 0], clip.depth[0], inverse(clip.c2w[0]) @ clip.c2w[::16]
    exact, guess = geometry_from_depth(image, truth, clip.K), ensure_valid(estimate(network, [image])[0])
    (height, width), flat = truth.shape, torch.full_like(truth, median_depth(exact))
    plane, blind = (geometry_from_depth(image, flat, K) for K in (clip.K, surface.pinhole(55, *truth.shape)))
    scaled = scale_translation(poses, median_depth(guess) / median_depth(exact))
    depth, confidence = (resize(x[None, None], truth.shape)[0, 0] for x in (guess.depth, guess.confidence))
    known, kept = truth < HAZE, confidence > surface.MIN_CONFIDENCE
    ratio, focal = (depth / truth)[known], guess.K[0, 0] * truth.shape[1] / guess.depth.shape[1]
    errors = {"depth, in meters": (ratio - 1).abs().mean(), "depth": (ratio / ratio.median() - 1).abs().mean(),
              "focal length": (focal / clip.K[0, 0] - 1).abs(), "kept": kept[known].float().mean(),
              "kept of the sky": kept[~known].float().mean()}  # nan without a sky
    ways = {"exact": (exact, poses), "plane": (plane, poses), "no network": (blind, poses),
            "in meters": (guess, poses), "estimate": (guess, scaled)}
    warps = {name: render.render(*way, (height, width)) for name, way in ways.items()}
    for name, warp in warps.items():
        seen = torch.minimum(warp.visible, warps["exact"].visible)[:, :, 1:].expand(-1, 3, -1, -1, -1) > 0.5
        square = (warp.frames - true)[:, :, 1:].square()[seen].mean()
        errors |= {f"PSNR, {name}": 10 * torch.log10(4 / square), f"visible, {name}": warp.visible[:, :, 1:].mean()}
    return {name: float(value) for name, value in errors.items()}


def evaluate(network: Pi3X, scenes: range) -> dict[str, float]:
    """Means over held-out `scenes` (seeds), printed as a table."""
    rows = [judge(network, world.make_clip(seed, WINDOW, SIZE)) for seed in scenes]
    means = {name: torch.tensor([row[name] for row in rows]).nanmean().item() for name in rows[0]}
    print("\n".join(f"| {name} | {value:.3f} |" for name, value in means.items()))
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("part", choices=("train", "export", "evaluate"))
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"), help="state and log of the training")
    parser.add_argument("--weights", type=Path, default=Path("weights/mini/Pi3X/model.safetensors"))
    parser.add_argument("--start", type=Path, help="weights to begin with")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--decay", type=int, default=5000, help="steps at the end over which the learning rate falls")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    if args.part == "train":
        train(args.folder, Recipe(args.steps, args.decay, args.lr), args.start)
    elif args.part == "export":
        export(args.folder / "geometry.safetensors", args.weights)
    else:
        evaluate(load_pi3x(args.weights), range(HELD_OUT, HELD_OUT + 40))


if __name__ == "__main__":
    main()
