"""Held-out scenes in which things move, shot again: a clip along another true path, against the true video.

    python -m mini.reshoot                    # weights/mini, scenes of two chunks each, a table and contact sheets

Beside the re-shot clip stands the method with a picture alone (the clip's first frame, which does not know what moves),
and both warps as they are, filled smoothly. Depths are true, or estimated from each frame by the small Pi3X, whose
camera is the true one at the scale of the first frame's depth. Measured are PSNR where the clip shows what is to be
seen (with true depths), elsewhere, and where something has moved since the first frame; and the camera.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from evaluation.quality import psnr
from evaluation.table import means
from files.cli import run_program
from files.draw import contact_sheet, save_png
from files.media import from_frames, to_frames
from geometry.camera import WINDOW, inverse, product, scale_translation
from geometry.pi3x import find_pi3x, load_pi3x
from geometry.surface import Geometry, geometry_from_depth, median_depth, transform
from helios.index import read_index
from helios.load import ROOT, encode_prompts, load_models
from memory import Camera
from mini import world
from mini.draw import placed
from mini.known import camera_error, exact_warp
from mini.pretrain import HELD_OUT
from mini.world import CLEARANCE, Clip, clearance, make_clip, make_path
from model import Helios
from render import RenderSettings, fill_warp
from reshoot import Reshoot, estimate_frames
from wah import Rollout, model_options

FRAMES = 2 * WINDOW


def still(scene: world.Scene, frame: int) -> world.Scene:
    """The scene with everything where it is at a frame."""
    solids = []
    for solid in scene.solids:
        x, y, z, yaw = placed(solid, torch.tensor([float(frame)], dtype=torch.float64))[0].tolist()
        solids.append(replace(solid, center=(x, y, z), yaw=yaw, motion=None))
    return replace(scene, solids=tuple(solids))


def shoot(scene: world.Scene, c2w: Tensor, clip: Clip) -> Clip:
    """The scene of a clip along another path, at the same times."""
    size = clip.frames.shape[1], clip.frames.shape[2]
    return Clip(*world.render(scene, c2w, clip.K, size), c2w, clip.K, clip.caption)


def another(scene: world.Scene, clip: Clip, seed: int) -> Clip | None:
    """The scene along a path that begins where the clip does and goes another way, if one is found on which the clip
    shows between 40 and 90 % of the last frame."""
    rng, last = Random(seed + 1), still(scene, len(clip.c2w) - 1)
    end = replace(clip, frames=clip.frames[-1:], depth=clip.depth[-1:], c2w=clip.c2w[-1:])
    for _ in range(10):
        other = make_path(scene, rng, len(clip.c2w))
        c2w = product(clip.c2w[:1], product(inverse(other[:1]), other))
        if clearance(scene, c2w[:, :3, 3]).min() > CLEARANCE:
            if 0.4 < exact_warp(shoot(last, c2w[-1:], clip), end).visible.mean() < 0.9:
                return shoot(scene, c2w, clip)
    return None


def held_out(size: tuple[int, int]) -> Iterator[tuple[int, world.Scene, Clip, Clip]]:
    """Seeds of scenes in which something moves, the clip, and the truth along another path."""
    for seed in count(HELD_OUT + 2000):
        scene = world.make_scene(Random(seed))
        if any(solid.motion for solid in scene.solids):
            clip = make_clip(seed, FRAMES, size)
            target = another(scene, clip, seed)
            if target is not None:
                yield seed, scene, clip, target


def at_pose(geometry: Geometry, c2w: Tensor) -> Geometry:
    """A geometry in its own camera's axes, put where that camera is."""
    return replace(geometry, points=torch.stack(transform(c2w, *geometry.points.unbind(-1)), dim=-1), c2w=c2w)


def cameras(clip: Clip, weights: Path) -> Iterator[tuple[str, Camera]]:
    """What leads each way; all are in meters."""
    index, images = read_index(weights), from_frames(clip.frames).unbind(2)
    settings = RenderSettings(index.samples)
    true = [geometry_from_depth(image, depth, clip.K) for image, depth in zip(images, clip.depth)]
    yield "picture alone", Camera(true[0], index.size, 1.0, settings)
    known = [at_pose(*each) for each in zip(true, clip.c2w)]
    yield "re-shot", Reshoot(known, index.size, 1.0, settings, "first")
    file = find_pi3x(None, weights)
    if file is not None:
        guessed = estimate_frames(load_pi3x(file), images, together=False)
        scale = median_depth(guessed[0]) / median_depth(true[0])
        guessed = [at_pose(*each) for each in zip(guessed, scale_translation(clip.c2w, scale))]
        yield "re-shot, estimated depths", Reshoot(guessed, index.size, scale, settings, "first")


def regions(scene: world.Scene, clip: Clip, target: Clip) -> dict[str, np.ndarray]:
    """Masks [T, H, W] of the frames after the first: what the clip shows of them, or does not; and where what is to
    be seen has moved since the first frame."""
    seen = exact_warp(target, clip).visible[0, 0, 1:].numpy() > 0
    before = shoot(still(scene, 0), target.c2w[1:], target).depth
    moved = ((before.nan_to_num(posinf=1e4) / target.depth[1:].nan_to_num(posinf=1e4) - 1).abs() > 0.02).numpy()
    return {"": np.ones_like(seen), " visible": seen, " not visible": ~seen, " moved": moved}


def measure(frames: Tensor, scene: world.Scene, target: Clip, masks: dict[str, np.ndarray],
            found: list[int]) -> dict[str, float]:
    """PSNR by region of the frames [1, 3, T, H, W] after the first, which is given; and the camera of those `found`."""
    video, truth = to_frames(frames)[1:], target.frames.numpy()[1:]
    result = {f"psnr{name}": psnr(video[mask], truth[mask]) for name, mask in masks.items()}
    errors = [camera_error(frames, still(scene, index), target, [index]) for index in found]
    return result | {name: float(np.mean([error[name] for error in errors])) for name in errors[0]}


@torch.inference_mode()
def judge(weights: Path, scene: world.Scene, clip: Clip, target: Clip, found: list[int]) -> tuple[dict, dict]:
    """The numbers of each way, and its frames [T, H, W, 3] uint8."""
    models, options = load_models(Helios, weights, "cpu"), model_options(weights)
    prompts = encode_prompts(weights, clip.caption, False, options.guidance > 1, "cpu")
    truth = from_frames(target.frames)
    made, poses = {"the truth": truth}, inverse(target.c2w[:1]) @ target.c2w
    for name, camera in cameras(clip, weights):
        rollout = Rollout(models, prompts, read_index(weights).size, torch.Generator().manual_seed(0),
                          image=truth[:, :, 0], camera=camera, options=options)
        chunks = [rollout.next(part) for part in poses.split(WINDOW)]
        warps = [fill_warp(chunk.warp, "smooth").frames for chunk in chunks if chunk.warp is not None]
        made |= {f"{name}, the warp": torch.cat(warps, dim=2),
                 name: torch.cat([chunk.frames for chunk in chunks], dim=2)}
    masks = regions(scene, clip, target)
    rows = {name: measure(frames, scene, target, masks, found) for name, frames in made.items()}
    return rows, {"the clip": clip.frames.numpy()} | {name: to_frames(each) for name, each in made.items()}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    begin, rows = time.perf_counter(), {}
    for seed, scene, clip, target in islice(held_out(read_index(args.weights).size), args.scenes):
        numbers, videos = judge(args.weights, scene, clip, target, [WINDOW - 1, FRAMES - 1])
        for name, each in numbers.items():
            rows.setdefault(name, {})[str(seed)] = each
        save_png(args.out / f"{seed}.png", contact_sheet(videos, 7))
        print(f"scene {seed}, {time.perf_counter() - begin:.0f} s: {clip.caption}", flush=True)
        (args.out / "table.md").write_text(means(rows))
    print(means(rows))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("mini.reshoot", description=str(__doc__).splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "mini")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/reshoot"), help="folder of the table and the sheets")
    return run_program("mini.reshoot", run, parser.parse_args(words))


if __name__ == "__main__":
    raise SystemExit(main())
