"""The paper's ablation on the miniature: what makes a frozen video model follow a camera.

    python -m mini.ablate                     # weights/mini, 20 held-out scenes x 3 seeds, zero-shot and with its LoRA

For scenes that training never saw, with their true later frames: image to video without a camera, with the warp as
history but unaligned in time, aligned, and aligned without the tokens that nothing shows. Holes of the warps are filled
smoothly, which is ours, or as in the paper with the mean colour, or left black. Warps are exact (by the true depth of
both frames, with occlusion), or made as `sample.py` does, from geometry that the small Pi3X sees in the first frame.
Bounds: the warp itself, as it is and through the VAE, and the VAE's copy of the truth. Measured are PSNR and SSIM over
all pixels and by visibility; the "ghost", the share of invisible pixels that show the mean colour; and the camera, from
where the known scene would look most like the result (of the first seed, in two frames).
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from files import draw
from files.media import to_frames
from geometry.camera import WINDOW, inverse
from geometry.pi3x import Pi3X, load_pi3x
from geometry.surface import ensure_valid, estimate, median_depth, transform, unproject
from helios.index import read_index
from helios.load import Models, Prompts, encode_prompts, load_models
from helios.lora import Lora, load_lora
from helios.taehv import TAEHV
from helios.vae import VAE
from mini import world
from mini.pretrain import HELD_OUT
from mini.world import Clip, make_clip
from model import Helios
from render import Warp, render, smooth_fill
from wah import Options, Rollout, model_options

REGIONS = ("all", "visible", "invisible")
NUDGE = torch.tensor([0.02, 0.02, 0.02, 0.06, 0.06, 0.06])  # radians and meters, for derivatives


@dataclass(frozen=True)
class Scene:
    seed: int
    clip: Clip
    video: Tensor  # [1, 3, 33, H, W] in [-1, 1], the truth
    warps: dict[str, Warp]
    visible: Tensor  # [1, 1, 33, H, W] bool of the exact warp: the regions of all measurements


def exact_warp(clip: Clip) -> Warp:
    """Every frame's points looked up in the first frame, if it sees them; black elsewhere."""
    video = rearrange(clip.frames, "t h w c -> t c h w") / 127.5 - 1
    height, width = video.shape[-2:]
    frames, masks = [], []
    for depth, c2w in zip(clip.depth, clip.c2w):
        far = depth.isinf()
        points = unproject(torch.where(far, torch.full_like(depth, 1e4), depth), clip.K, c2w)  # [H, W, 3] world
        x, y, z = transform(inverse(clip.c2w[:1])[0], *points.unbind(-1))  # in the first camera
        u, v = clip.K[0, 0] * x / z + clip.K[0, 2], clip.K[1, 1] * y / z + clip.K[1, 2]
        grid = torch.stack([2 * u / (width - 1) - 1, 2 * v / (height - 1) - 1], -1)[None]
        source = F.grid_sample(clip.depth[:1, None].clamp(max=1e4), grid, mode="nearest", padding_mode="border",
                               align_corners=True)
        inside = (z > 0) & (u + 0.5 >= 0) & (u + 0.5 <= width) & (v + 0.5 >= 0) & (v + 0.5 <= height)
        mask = inside & ((source[0, 0] / z - 1).abs() < 0.04)
        color = F.grid_sample(video[:1], grid, padding_mode="border", align_corners=True)[0]
        frames.append(torch.where(mask, color, -1.0))
        masks.append(mask)
    return Warp(torch.stack(frames, 1)[None], torch.stack(masks)[None, None].float())


def fill(warp: Warp, color: Tensor | float) -> Warp:
    """The warp with `color` where nothing is visible."""
    return replace(warp, frames=torch.where(warp.visible > 0, warp.frames, color))


def suits(seed: int, size: tuple[int, int]) -> bool:
    """Whether a scene's camera moves, shows enough of the first frame to the end, and nothing else moves."""
    clip = make_clip(seed, WINDOW, size)
    return ";" not in clip.caption and 0.3 < exact_warp(clip).visible[0, 0, -1].mean().item() < 0.85


def make_scene(seed: int, pi3x: Pi3X | None, size: tuple[int, int]) -> Scene:
    return scene_of(make_clip(seed, WINDOW, size), seed, pi3x)


def scene_of(clip: Clip, seed: int = 0, pi3x: Pi3X | None = None) -> Scene:
    """A clip with its exact warps; `seed` is the known scene's, `pi3x` for the warp of an estimated geometry."""
    size = clip.frames.shape[1], clip.frames.shape[2]
    black = exact_warp(clip)
    video = rearrange(clip.frames, "t h w c -> 1 c t h w") / 127.5 - 1
    mean = video[:, :, :1].mean((3, 4), keepdim=True)
    smooth = replace(black, frames=smooth_fill(black.frames, black.visible))
    warps = {"smooth": smooth, "mean": fill(black, mean), "black": black}
    if pi3x is not None:
        geometry = ensure_valid(estimate(pi3x, [video[:, :, 0]])[0])
        known = clip.depth[0][clip.depth[0].isfinite()].median()
        poses = inverse(clip.c2w[:1]) @ clip.c2w
        poses[:, :3, 3] *= median_depth(geometry) / known  # the path in units of depth, as users give it
        warp = render(geometry, poses, size)
        warps["estimated"] = replace(warp, frames=smooth_fill(warp.frames, warp.visible))
    return Scene(seed, clip, video, warps, black.visible > 0)


# ------------------------------------------------------------------------------------------------------------ measures


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity [1, 1, T, H, W] of videos in [-1, 1]: Gaussian window of 1.5 pixels, mean of channels."""
    x = torch.arange(-5.0, 6)
    window = torch.exp(-x.square() / 4.5)
    kernel = (window[:, None] * window / window.sum() ** 2)[None, None]

    def blur(video: Tensor) -> Tensor:
        frames = rearrange(video, "1 c t h w -> (c t) 1 h w")
        return F.conv2d(F.pad(frames, (5, 5, 5, 5), mode="reflect"), kernel)

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    ssim = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return rearrange(ssim, "(c t) 1 h w -> 1 c t h w", c=3).mean(1, keepdim=True)


def measure(frames: Tensor, scene: Scene) -> dict[str, float]:
    """PSNR in dB and SSIM by region, and the ghost, over the frames after the first."""
    square = (frames - scene.video).square().mean(1, keepdim=True)[:, :, 1:]
    ssim, visible = ssim_map(frames, scene.video)[:, :, 1:], scene.visible[:, :, 1:]
    result = {}
    for name, mask in zip(REGIONS, (torch.ones_like(visible), visible, ~visible)):
        result[f"psnr {name}"] = -10 * torch.log10(square[mask].mean() / 4 + 1e-10).item()
        result[f"ssim {name}"] = ssim[mask].mean().item()
    mean = scene.video[:, :, :1].mean((3, 4), keepdim=True)
    near = ((frames - mean).abs().amax(1, keepdim=True) < 0.12)[:, :, 1:]
    return result | {"ghost": near[~visible].float().mean().item()}


def twist(motion: Tensor) -> Tensor:
    """Small motions [..., 6] (turns in radians, then shifts) as matrices [..., 4, 4]."""
    x, y, z = motion[..., :3].unbind(-1)
    zero = torch.zeros_like(x)
    turn = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    return torch.linalg.matrix_exp(F.pad(torch.cat([turn, motion[..., 3:, None]], -1), (0, 0, 0, 1)))


def find_camera(picture: Tensor, starts: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """The pose [4,4] from which `draw` (poses [N,4,4] -> pictures [N, ...]) gives most nearly `picture`: damped, robust
    Gauss-Newton from each of `starts` [S,4,4], best result."""
    best = []
    for pose in starts:
        shown, damping = draw(pose[None])[0], 1e-3
        error = (picture - shown).abs().mean()
        for _ in range(10):
            slopes = (draw(pose @ twist(torch.diag(NUDGE))) - shown).flatten(1) / NUDGE[:, None]  # [6, P]
            wrong = (picture - shown).flatten()
            weighted = slopes / (wrong.abs() + 0.05)  # what cannot be explained counts less
            normal = weighted @ slopes.T
            step = torch.linalg.solve(normal + damping * normal.diag().diag() + 1e-6 * torch.eye(6), weighted @ wrong)
            tried = pose @ twist(step)
            seen = draw(tried[None])[0]
            left = (picture - seen).abs().mean()
            if left > 0.999 * error and damping > 0.1:
                break
            if left < error:
                pose, shown, error, damping = tried, seen, left, damping / 4
            else:
                damping *= 16
        best.append((error.item(), pose))
    return min(best, key=lambda each: each[0])[1]


def camera_error(frames: Tensor, scene: Scene, at: list[int]) -> dict[str, float]:
    """Degrees and meters between the true camera and the one from which the scene would look like the result, means of
    the frames `at`; searched from the true one, the first frame's, and between."""
    known, clip, (height, width) = world.make_scene(Random(scene.seed)), scene.clip, frames.shape[-2:]

    def soft(pictures: Tensor) -> Tensor:  # blurred, so that slopes reach further
        return F.avg_pool2d(pictures, 5, 2, 2, count_include_pad=False)

    def draw(poses: Tensor) -> Tensor:
        pictures = world.render(known, poses, clip.K, (height, width), 1)[0]
        return soft(rearrange(pictures, "n h w c -> n c h w") / 127.5 - 1)

    turns, shifts = [], []
    for index in at:
        true, first = clip.c2w[index], clip.c2w[0]
        way = torch.linalg.inv(first) @ true
        half = first @ twist(0.5 * torch.stack([way[2, 1], way[0, 2], way[1, 0], *way[:3, 3]]))
        found = find_camera(soft(frames[:, :, index])[0], torch.stack([true, half, first]), draw)
        apart = torch.linalg.inv(true) @ found
        turns.append(torch.rad2deg(((apart[:3, :3].trace() - 1) / 2).clamp(-1, 1).acos()).item())
        shifts.append(apart[:3, 3].norm().item())
    return {"turn, degrees": float(np.mean(turns)), "shift, m": float(np.mean(shifts))}


# ---------------------------------------------------------------------------------------------------------------- runs


Way = tuple[str | None, dict, Path | None]  # which warp, which options, which LoRA


def variants(loras: list[Path], estimated: bool) -> dict[str, Way]:
    """What is generated; of the LoRAs after the first one only the full method."""
    unaligned, aligned, dropped = {"align": False}, {"drop": False}, {}
    table: dict[str, Way] = {"no camera": (None, {}, None)}
    for number, lora in enumerate((None, *loras)):
        suffix = "" if lora is None else f", LoRA {lora.stem}"
        if number < 2:
            table |= {f"not aligned, dropped{suffix}": ("smooth", unaligned, lora),
                      f"aligned{suffix}": ("smooth", aligned, lora)}
        table[f"aligned, dropped{suffix}"] = ("smooth", dropped, lora)
        if lora is None:
            for filling, words in (("mean", "holes of the mean colour"), ("black", "black holes")):
                table |= {f"aligned, {words}": (filling, aligned, lora),
                          f"aligned, dropped, {words}": (filling, dropped, lora)}
        if estimated and number < 2:
            table[f"aligned, dropped, estimated geometry{suffix}"] = ("estimated", dropped, lora)
    return table


def generate(models: Models, prompts: Prompts, scene: Scene, seed: int, warp: str | None, options: Options,
             lora: Lora | None) -> Tensor:
    height, width = scene.video.shape[-2:]
    rollout = Rollout(models, prompts, (height, width), torch.Generator().manual_seed(seed),
                      image=scene.video[:, :, 0], lora=lora, options=options)
    return rollout.next(warp=None if warp is None else scene.warps[warp]).frames


def remember_encodings(vae: VAE | TAEHV) -> None:
    """All variants and seeds encode the same few videos: once is enough."""
    known, encode = {}, vae.encode

    def remembered(video: Tensor) -> tuple[Tensor, Tensor]:
        key = video.numpy().tobytes()
        if key not in known:
            known[key] = encode(video)
        return known[key]

    vae.encode = remembered


@torch.inference_mode()
def judge(seed: int, args: argparse.Namespace) -> tuple[dict[str, list[dict]], dict[str, Tensor]]:
    """All measurements of a scene, and each variant's first video."""
    torch.set_num_threads(1)  # scenes run side by side
    models, defaults = load_models(Helios, args.weights, "cpu"), model_options(args.weights)
    remember_encodings(models.vae)
    geometry = args.weights / "Pi3X" / "model.safetensors"
    pi3x = load_pi3x(geometry) if geometry.is_file() else None
    scene = make_scene(seed, pi3x, read_index(args.weights).size)
    prompts = encode_prompts(args.weights, scene.clip.caption, True, False, "cpu")
    loras = {path: load_lora(path) for path in args.lora}

    def through_vae(video: Tensor) -> list[Tensor]:
        return [models.vae.decode(models.vae.encode(video)[0])]

    made = {"truth": [scene.video], "VAE of the truth": through_vae(scene.video)}
    for filling, words in (("mean", "holes of the mean colour"), ("smooth", "holes filled smoothly")):
        warp = scene.warps[filling].frames
        made |= {f"copy the warp, {words}": [warp], f"VAE of the warp, {words}": through_vae(warp)}
    for name, (source, changes, lora) in variants(args.lora, pi3x is not None).items():
        made[name] = [generate(models, prompts, scene, each, source, replace(defaults, **changes), loras.get(lora))
                      for each in range(args.seeds)]
    results = {name: [measure(frames, scene) for frames in videos] for name, videos in made.items()}
    for name, videos in made.items():
        results[name][0] |= camera_error(videos[0], scene, args.found)
    return results, {name: videos[0] for name, videos in made.items()}


def run(args: argparse.Namespace) -> None:
    begin, size = time.perf_counter(), read_index(args.weights).size
    seeds = list(islice((seed for seed in count(HELD_OUT + 2000) if suits(seed, size)), args.scenes))
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        scenes = list(pool.map(partial(judge, args=args), seeds))
    results = {name: [row for scene, _ in scenes for row in scene[name]] for name in scenes[0][0]}
    rows = {f"{number} {name}": to_frames(video / 2 + 0.5) for number, (_, videos) in enumerate(scenes[:4])
            for name, video in videos.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    draw.save_png(args.out / "ablation.png", draw.contact_sheet(rows, tile_width=96))
    (args.out / "ablation.json").write_text(json.dumps(results, indent=1) + "\n")
    text = summary(results)
    (args.out / "ablation.md").write_text(text)
    seconds = time.perf_counter() - begin
    print(f"{text}\n{len(scenes)} scenes, {args.seeds} seeds, {seconds:.0f} s; pictures in {args.out}")


def mean_and_error(values: list[float]) -> str:
    known = np.array([value for value in values if np.isfinite(value)])
    return f"{known.mean():.2f} ± {known.std() / max(len(known) - 1, 1) ** 0.5:.2f}"


def summary(results: dict[str, list[dict]]) -> str:
    """A Markdown table of means with standard errors; last the paired gain over "not aligned" in the visible region."""
    columns = list(next(iter(results.values()))[0])
    lines = ["| | " + " | ".join(columns) + " | gain over not aligned, visible |", "|---" * (len(columns) + 2) + "|"]
    reference = [row["psnr visible"] for row in results["not aligned, dropped"]]
    for name, rows in results.items():
        cells = [mean_and_error([row.get(column, np.nan) for row in rows]) for column in columns]
        paired = zip(rows, reference) if len(rows) == len(reference) else ()
        gain = [row["psnr visible"] - other for row, other in paired]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {mean_and_error(gain) if gain else ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("weights/mini"))
    parser.add_argument("--lora", type=Path, nargs="*", help="LoRA files, for each the full method, for the first one"
                                                             " all (default: lora.safetensors of the weights)")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--found", type=int, nargs="+", default=[WINDOW // 2, WINDOW - 1],
                        help="frames whose camera is measured")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args()
    own = args.weights / "lora.safetensors"
    if args.lora is None:
        args.lora = [own] if own.is_file() else []
    run(args)


if __name__ == "__main__":
    main()
