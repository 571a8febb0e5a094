"""The paper's ablation on the miniature: what makes a frozen video model follow a camera.

    python -m mini.ablate                     # weights/mini, 20 held-out scenes x 3 seeds, zero-shot and with its LoRA

For scenes that training never saw, with their true later frames: image to video without a camera, with the warp as
history but unaligned in time, aligned, and aligned without the tokens that nothing shows; each with warps whose holes
are filled with the mean colour or black. Warps are exact (by the true depth of both frames, with occlusion), or made as
`sample.py` does, from geometry that the small Pi3X sees in the first frame. Bounds: the warp itself, and the VAE's copy
of the truth. PSNR and SSIM over all pixels and by visibility, and the camera that Pi3X sees in the result.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import media
from camera import WINDOW, inverse, path_error
from checkpoint import Lora, load_lora
from mini.pretrain import HELD_OUT
from mini.world import Clip, make_clip
from pi3x import Pi3X, load_pi3x
from render import Warp, ensure_valid, estimate, median_depth, render, transform, unproject
from wah import Models, Options, Prompts, Rollout, encode_prompts, load_models, load_options, native_size

REGIONS = ("all", "visible", "invisible")


@dataclass(frozen=True)
class Scene:
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


def make_scene(seed: int, pi3x: Pi3X | None, size: tuple[int, int]) -> Scene | None:
    """A held-out scene; None if its camera hardly moves, shows too little of the first frame, or things move."""
    clip = make_clip(seed, WINDOW, size)
    black = exact_warp(clip)
    shown = black.visible[0, 0, -1].mean().item()
    if not 0.3 < shown < 0.85 or ";" in clip.caption:
        return None
    video = rearrange(clip.frames, "t h w c -> 1 c t h w") / 127.5 - 1
    mean = video[:, :, :1].mean((3, 4), keepdim=True)
    warps = {"exact": fill(black, mean), "exact, black": black}
    if pi3x is not None:
        geometry = ensure_valid(estimate(pi3x, [video[:, :, 0]])[0])
        known = clip.depth[0][clip.depth[0].isfinite()].median()
        poses = inverse(clip.c2w[:1]) @ clip.c2w
        poses[:, :3, 3] *= median_depth(geometry) / known  # the path in units of depth, as users give it
        warps["estimated"] = render(geometry, poses, size)
    return Scene(clip, video, warps, black.visible > 0)


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
    """PSNR in dB and SSIM by region, over the frames after the first."""
    square = (frames - scene.video).square().mean(1, keepdim=True)[:, :, 1:]
    ssim, visible = ssim_map(frames, scene.video)[:, :, 1:], scene.visible[:, :, 1:]
    result = {}
    for name, mask in zip(REGIONS, (torch.ones_like(visible), visible, ~visible)):
        result[f"psnr {name}"] = -10 * torch.log10(square[mask].mean() / 4 + 1e-10).item()
        result[f"ssim {name}"] = ssim[mask].mean().item()
    return result


def camera_error(frames: Tensor, scene: Scene, pi3x: Pi3X) -> dict[str, float]:
    """As `sample.py --check`: every fourth frame's camera, as Pi3X sees it, against the true one."""
    images = [frames[:, :, index] for index in range(0, frames.shape[2], 4)]
    error = path_error(torch.stack([geometry.c2w for geometry in estimate(pi3x, images)]), scene.clip.c2w[::4])
    return {"rotation": error["rotation_degrees"], "translation": error["translation_share"]}


# ---------------------------------------------------------------------------------------------------------------- runs


def variants(loras: list[Path], estimated: bool) -> dict[str, tuple[str | None, dict, Path | None]]:
    """Name -> which warp, which options, which LoRA."""
    unaligned, aligned, dropped = {"align": False}, {"drop": False}, {}
    table = {"no camera": (None, {}, None)}
    for lora in (None, *loras):
        suffix = "" if lora is None else f", LoRA {lora.stem}"
        table |= {f"not aligned, dropped{suffix}": ("exact", unaligned, lora),
                  f"aligned{suffix}": ("exact", aligned, lora),
                  f"aligned, dropped{suffix}": ("exact", dropped, lora)}
        if lora is None:
            table |= {"aligned, black holes": ("exact, black", aligned, lora),
                      "aligned, dropped, black holes": ("exact, black", dropped, lora)}
        if estimated:
            table[f"aligned, dropped, estimated geometry{suffix}"] = ("estimated", dropped, lora)
    return table


def generate(models: Models, prompts: Prompts, scene: Scene, seed: int, warp: str | None, options: Options,
             lora: Lora | None) -> Tensor:
    rollout = Rollout(models, prompts, tuple(scene.video.shape[-2:]), torch.Generator().manual_seed(seed),
                      image=scene.video[:, :, 0], lora=lora, options=options)
    return rollout.next(warp=None if warp is None else scene.warps[warp]).frames


def run(args: argparse.Namespace) -> None:
    models, defaults, size = load_models(args.weights, "cpu"), load_options(args.weights), native_size(args.weights)
    geometry = args.weights / "Pi3X" / "model.safetensors"
    pi3x = load_pi3x(geometry) if geometry.is_file() else None
    tries = (make_scene(HELD_OUT + 2000 + index, pi3x, size) for index in count())
    scenes, rows = list(islice(filter(None, tries), args.scenes)), {}
    table, begin = variants(args.lora, pi3x is not None), time.perf_counter()
    results: dict[str, list[dict]] = {name: [] for name in ("copy the warp", "VAE of the truth", *table)}
    loras = {path: load_lora(path) for path in args.lora}
    for number, scene in enumerate(scenes):
        vae, prompts = models.vae, encode_prompts(args.weights, scene.clip.caption, True, False, "cpu")
        with torch.inference_mode():
            truth = vae.decode(vae.encode(scene.video)[0])
        made = {"copy the warp": [scene.warps["exact"].frames], "VAE of the truth": [truth]}
        for name, (warp, changes, lora) in table.items():
            options = replace(defaults, **changes)
            made[name] = [generate(models, prompts, scene, seed, warp, options, loras.get(lora))
                          for seed in range(args.seeds)]
        for name, videos in made.items():
            for frames in videos:
                results[name].append(measure(frames, scene) | (camera_error(frames, scene, pi3x) if pi3x else {}))
        if number < 4:
            shown = {"truth": [scene.video]} | made
            rows |= {f"{number} {name}": to_u8(videos[0]) for name, videos in shown.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    media.save_png(args.out / "ablation.png", media.contact_sheet(rows, tile_width=96))
    (args.out / "ablation.json").write_text(json.dumps(results, indent=1) + "\n")
    text = summary(results)
    (args.out / "ablation.md").write_text(text)
    seconds = time.perf_counter() - begin
    print(f"{text}\n{len(scenes)} scenes, {args.seeds} seeds, {seconds:.0f} s; pictures in {args.out}")


def to_u8(frames: Tensor) -> np.ndarray:
    return (rearrange(frames, "1 c t h w -> t h w c") * 127.5 + 127.5).round().clamp(0, 255).byte().numpy()


def summary(results: dict[str, list[dict]]) -> str:
    """A Markdown table of means, and the paired gain over "not aligned" in the visible region, with standard error."""
    columns = list(next(iter(results.values()))[0])
    lines = ["| | " + " | ".join(columns) + " | gain over not aligned, visible |", "|---" * (len(columns) + 2) + "|"]
    reference = np.array([row["psnr visible"] for row in results["not aligned, dropped"]])
    for name, rows in results.items():
        means = [np.nanmean([row[column] for row in rows]) for column in columns]
        cells = [f"{mean:.2f}" if column.startswith("psnr") else f"{mean:.3f}" for column, mean in zip(columns, means)]
        gain = ""
        if len(rows) == len(reference):
            paired = np.array([row["psnr visible"] for row in rows]) - reference
            gain = f"{paired.mean():+.2f} ± {paired.std() / max(len(paired) - 1, 1) ** 0.5:.2f}"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {gain} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("weights/mini"))
    parser.add_argument("--lora", type=Path, nargs="*", default=[], help="LoRA files to compare with the frozen model")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    run(parser.parse_args())


if __name__ == "__main__":
    main()
