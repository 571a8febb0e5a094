"""Walks of 20 chunks that go round twice and end where they began: is what was seen on the first round there again?

    python -m mini.walk --scenes 3            # weights/mini; a table, and contact sheets of both choices

Held-out scenes in which nothing moves. Keyframes have their true depth: the scene itself stands for the geometry
network, from the poses that `known_poses` tells it, so that the choice of keyframes alone differs. Three ways:
"true frames": nothing is generated, every chunk is taken to have come out right, and the warp alone is looked at;
"true first round": the first ten chunks are the true video, and the second round is generated; "one picture": all is.
Measured on the second round: PSNR against the true video and, where all is generated, against the first round's own
frames; the camera at the ends of chunks, searched in the known scene; and the jump from chunk to chunk.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import pi, radians
from pathlib import Path
from random import Random
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.quality import psnr
from evaluation.table import means
from files.cli import run_program
from files.draw import contact_sheet, save_png
from files.measure import steadiness
from files.media import from_frames, to_frames
from geometry.camera import WINDOW, inverse
from geometry.known import Known
from geometry.pi3x import Pi3X, Pi3XConfig, Prediction
from geometry.surface import pinhole, stretch, transform, unproject
from helios.index import read_index
from helios.load import ROOT, Models, Prompts, encode_prompts, load_models
from memory import CHOICES, Memory
from mini import world
from mini.geometry import HAZE
from mini.known import camera_error
from mini.pretrain import HELD_OUT
from mini.world import CLEARANCE, Clip, clearance
from model import Helios
from render import RenderSettings, Warp, fill_warp
from wah import Rollout, model_options

CHUNKS, ROUND = 20, 10  # of a walk, and of its first round
FRAMES, AGAIN = CHUNKS * WINDOW, ROUND * WINDOW  # AGAIN: where the second round begins
WAYS = "true frames, the warp", "true first round", "one picture"


class TrueGeometry:
    """Stands for a geometry network that is never wrong: depths of a known scene, where its pictures are told to be."""

    config, image_mean = Pi3XConfig(), torch.zeros(1)

    def __init__(self, scene: world.Scene, clip: Clip):
        self.scene, self.clip = scene, clip

    def __call__(self, images: Tensor, known: Known) -> Prediction:
        assert known.c2w is not None
        old, size, c2w = self.clip.frames.shape[1:3], images.shape[-2:], known.c2w[0]
        K = stretch(self.clip.K, (old[0], old[1]), (size[0], size[1]))
        _, depth = world.render(self.scene, self.clip.c2w[0] @ c2w, K, (size[0], size[1]), 1)
        near, depth = depth < HAZE, depth.clamp(max=HAZE)
        local = torch.stack([unproject(each, K, torch.eye(4)) for each in depth])
        points = torch.stack([torch.stack(transform(pose, *each.unbind(-1)), -1) for pose, each in zip(c2w, local)])
        confidence = torch.where(near, 10.0, -10.0)
        return Prediction(points[None], local[None], F.normalize(local, dim=-1)[None], confidence[None], c2w[None],
                          torch.ones(1))


def tour(scene: world.Scene, rng: Random) -> Tensor | None:
    """Two rounds [FRAMES,4,4] on a small circle, looking outwards, if there is room for one."""
    for _ in range(50):
        x, z = (rng.uniform(-0.6, 0.6) * limit for limit in scene.extent[::2])
        radius, begin, way = rng.uniform(0.3, 0.8), rng.uniform(0, 2 * pi), rng.choice((-1, 1))
        yaw = begin + way * 2 * pi * torch.arange(FRAMES, dtype=torch.float64) / AGAIN
        level = torch.full_like(yaw, -rng.uniform(1.2, 1.7))
        place = torch.stack([x + radius * yaw.sin(), level, z + radius * yaw.cos()], -1)
        flat = torch.zeros_like(yaw)
        c2w = world.poses(place, yaw, flat - radians(rng.uniform(5, 10)), flat)
        if clearance(scene, place).min() < CLEARANCE:
            continue
        _, depth = world.render(scene, c2w[:AGAIN:8], pinhole(60, 8, 12), (8, 12), 1)
        if depth.flatten(1).sort().values[:, 28].min() > 1:  # as in `world.make_path`
            return c2w
    return None


def held_out(size: tuple[int, int]) -> Iterator[tuple[int, world.Scene, Clip]]:
    for seed in count(HELD_OUT + 2000):
        rng = Random(seed)
        scene = world.make_scene(rng)
        c2w = None if any(solid.motion for solid in scene.solids) else tour(scene, rng)
        if c2w is not None:
            K = pinhole(rng.uniform(50, 70), *size)
            frames, depth = (x.repeat(2, *(1 for _ in x.shape[1:])) for x in world.render(scene, c2w[:AGAIN], K, size))
            yield seed, scene, Clip(frames, depth, c2w, K, world.caption(scene))


@dataclass(frozen=True)
class Walk:
    scene: world.Scene
    clip: Clip
    video: Tensor  # [1, 3, FRAMES, H, W] in [-1, 1]
    models: Models
    prompts: Prompts
    weights: Path
    keyframes: int

    def camera(self, choice: str) -> Memory:
        index, network = read_index(self.weights), cast(Pi3X, TrueGeometry(self.scene, self.clip))
        limit = index.size[0] * index.size[1]
        return Memory(lambda: network, self.video[:, :, 0], index.size, RenderSettings(index.samples), self.keyframes,
                      unit=1.0, limit=limit, known_poses=True, choice=choice)

    def rollout(self, camera: Memory, image: Tensor | None = None, video: Tensor | None = None) -> Rollout:
        return Rollout(self.models, self.prompts, read_index(self.weights).size, torch.Generator().manual_seed(0),
                       image, video, camera, options=model_options(self.weights))

    def chunks(self, first: int = 0) -> Iterator[Tensor]:
        """Poses of the chunks from `first` on."""
        return islice((inverse(self.clip.c2w[:1]) @ self.clip.c2w).split(WINDOW), first, None)


def shown(warp: Warp | None) -> Tensor:
    """The 33 frames of a chunk's warp, its holes filled."""
    assert warp is not None
    return fill_warp(warp, "smooth").frames[:, :, -WINDOW:]


def make(walk: Walk, choice: str) -> Iterator[tuple[str, Tensor]]:
    """The video [1, 3, FRAMES, H, W] of each way with a choice of keyframes; the true one where it is not made."""
    camera, warps, before = walk.camera(choice), [], {}
    for index, poses in enumerate(walk.chunks()):
        before = camera.state() if index == ROUND else before
        warps.append(shown(camera.warp(poses)))
        camera.remember(walk.video[:, :, (index + 1) * WINDOW - 1])
    yield WAYS[0], torch.cat(warps, dim=2)

    camera = walk.camera(choice)
    rollout = walk.rollout(camera, video=walk.video[:, :, :AGAIN])
    camera.restore(before)
    made = [rollout.next(poses).frames for poses in walk.chunks(ROUND)]
    yield WAYS[1], torch.cat([walk.video[:, :, :AGAIN], *made], dim=2)

    rollout = walk.rollout(walk.camera(choice), image=walk.video[:, :, 0])
    yield WAYS[2], torch.cat([rollout.next(poses).frames for poses in walk.chunks()], dim=2)


def measure(way: str, video: Tensor, walk: Walk, found: list[int]) -> dict[str, float]:
    frames, truth = to_frames(video), walk.clip.frames.numpy()
    result = {"psnr": psnr(frames[AGAIN:], truth[AGAIN:]), "psnr last chunk": psnr(frames[-WINDOW:], truth[-WINDOW:])}
    if way == WAYS[2]:
        result["psnr first round"] = psnr(frames[AGAIN:], frames[:AGAIN])
    seam = steadiness(frames[AGAIN:])["seam"]
    return result | camera_error(video, walk.scene, walk.clip, found) | {"seam": seam}


@torch.inference_mode()
def judge(walk: Walk, found: list[int]) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """The numbers of each way and choice, and frames at the ends of chunks [1, 3, CHUNKS, H, W]."""
    rows, tiles, ends = {}, {}, slice(WINDOW - 1, None, WINDOW)
    for choice in CHOICES:
        for way, video in make(walk, choice):
            rows[f"{way}, {choice}"] = measure(way, video, walk, found)
            tiles[f"{way}, {choice}"] = video[:, :, ends].clone()  # a view would keep the whole video
    order = sorted(rows, key=lambda name: [way in name for way in WAYS], reverse=True)
    tiles = {"truth": walk.video[:, :, ends]} | {name: tiles[name] for name in order}
    return {name: rows[name] for name in order}, tiles


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    begin, rows = time.perf_counter(), {}
    models, options = load_models(Helios, args.weights, "cpu"), model_options(args.weights)
    for seed, scene, clip in islice(held_out(read_index(args.weights).size), args.scenes):
        prompts = encode_prompts(args.weights, clip.caption, False, options.guidance > 1, "cpu")
        video = from_frames(clip.frames)
        ends = [(chunk + 1) * WINDOW - 1 for chunk in range(ROUND, CHUNKS, 3)]
        numbers, tiles = judge(Walk(scene, clip, video, models, prompts, args.weights, args.keyframes), ends)
        for name, each in numbers.items():
            rows.setdefault(name, {})[str(seed)] = each
        pictures = {name: to_frames(each) for name, each in tiles.items()}
        save_png(args.out / f"{seed}.png", contact_sheet(pictures, CHUNKS, 96))
        print(f"scene {seed}, {time.perf_counter() - begin:.0f} s: {clip.caption}", flush=True)
        (args.out / "table.md").write_text(means(rows))
    print(means(rows))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("mini.walk", description=str(__doc__).splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "mini")
    parser.add_argument("--scenes", type=int, default=3)
    parser.add_argument("--keyframes", type=int, default=4, help="pictures that the geometry is taken from (4)")
    parser.add_argument("--out", type=Path, default=Path("runs/walk"), help="folder of the table and the sheets")
    return run_program("mini.walk", run, parser.parse_args(words))


if __name__ == "__main__":
    raise SystemExit(main())
