"""The miniature's table: every scene made in every way of the ablation, beside bounds, and measured.

Rows beside the paper's: the truth, and the fill alone (the warp as it is), each also through the VAE; the full method
with geometry that is estimated from the first frame; and a walk of three chunks with warps rendered from the first
frame's true depth. A scene's numbers are a file of their own, so that an interrupted run goes on, and several can
share the scenes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from evaluation.ablation import Way, folder_name, labels, ways
from evaluation.quality import measure, psnr
from files.measure import flicker
from files.media import from_frames, to_frames
from files.video import write_video
from files.writing import fingerprint, replacing
from geometry.camera import WINDOW, inverse
from geometry.pi3x import find_pi3x, load_pi3x
from geometry.surface import geometry_from_depth
from helios.index import read_index
from helios.load import Models, Prompts, encode_prompts, files_read, load_models
from helios.lora import Lora, load_lora
from helios.taehv import TAEHV
from helios.vae import VAE
from memory import Camera
from mini.known import Scene, camera_error, ghost, scene_of, suits
from mini.pretrain import HELD_OUT
from mini.world import make_clip, make_scene
from model import Helios
from render import RenderSettings, Warp, fill_warp
from wah import Options, Rollout, model_options

FPS, WALK = 16, 3  # chunks of a walk
ESTIMATED = "full, estimated geometry"  # the full method, with a warp by what Pi3X sees in the first frame


@dataclass(frozen=True)
class Trial:
    """What the numbers of a scene depend on."""

    weights: Path
    loras: list[Path]
    seeds: int
    found: list[int]  # frames whose camera is searched
    folder: Path  # where they go
    full: bool = False  # the full method alone, as the weights have it

    def about(self) -> dict:
        geometry = find_pi3x(None, self.weights)
        return {"full": self.full, "weights": fingerprint(self.weights, files_read(self.weights)), "seeds": self.seeds,
                "geometry": geometry and fingerprint(geometry), "found": self.found,
                "loras": {label: fingerprint(path) for label, path in labels(self.loras).items()}}

    def file(self, seed: int) -> Path:
        return self.folder / f"scene-{seed}.json"

    def video(self, row: str, seed: int) -> Path:
        return self.folder / folder_name(row) / f"scene-{seed}.mp4"

    def read(self, seed: int) -> dict | None:
        """A scene's rows, if it is whole. Raises ValueError if it was made with something else."""
        file = self.file(seed)
        if not file.is_file():
            return None
        found = json.loads(file.read_text())
        if found["about"] != self.about():
            raise ValueError(f"{file}: measured with other weights, LoRAs or seeds; choose another --out, or remove"
                             f" {self.folder}")
        return found


def held_out(scenes: int, size: tuple[int, int]) -> list[int]:
    return list(islice((seed for seed in count(HELD_OUT + 2000) if suits(seed, size)), scenes))


def remember_encodings(vae: VAE | TAEHV) -> None:
    """All ways and seeds encode the same few videos: once is enough."""
    known, encode = {}, vae.encode

    def remembered(video: Tensor) -> tuple[Tensor, Tensor]:
        key = video.numpy().tobytes()
        if key not in known:
            known[key] = encode(video)
        return known[key]

    vae.encode = remembered


def generate(models: Models, prompts: Prompts, scene: Scene, seed: int, warp: Warp | None, options: Options,
             lora: Lora | None) -> Tensor:
    height, width = scene.video.shape[-2:]
    rollout = Rollout(models, prompts, (height, width), torch.Generator().manual_seed(seed),
                      image=scene.video[:, :, 0], lora=lora, options=options)
    return rollout.next(warp=warp).frames


def all_ways(scene: Scene, trial: Trial, fill: str) -> Iterator[tuple[str, Warp | None, Way]]:
    """Rows, the warps that lead them, and how they are made."""
    for name, way in ways(trial.loras).items():
        if not trial.full or name.startswith(f"full, {fill}"):
            yield name, scene.warp if way.led else None, way
            if name.startswith(f"full, {fill}") and scene.estimated is not None:
                yield name.replace("full", ESTIMATED), scene.estimated, way


def numbers(frames: np.ndarray, truth: np.ndarray, visible: np.ndarray) -> dict[str, float]:
    """Over the frames after the first, which is given; flicker over all."""
    found = measure(frames[1:], truth[1:], visible[1:])
    return found | {"ghost": ghost(frames[1:], truth[0], visible[1:]), "flicker": flicker(frames)}


def walk(seed: int, trial: Trial, models: Models, prompts: Prompts, lora: Lora | None, options: Options) -> dict:
    """PSNR of each chunk of a longer path through the scene, with warps from the first frame's true depth."""
    index = read_index(trial.weights)
    clip = make_clip(seed, WALK * WINDOW, index.size)
    video = from_frames(clip.frames)
    camera = Camera(geometry_from_depth(video[:, :, 0], clip.depth[0], clip.K), index.size, 1.0,
                    RenderSettings(index.samples))
    rollout = Rollout(models, prompts, index.size, torch.Generator().manual_seed(0), image=video[:, :, 0],
                      camera=camera, lora=lora, options=options)
    poses, truth, found = inverse(clip.c2w[:1]) @ clip.c2w, clip.frames.numpy(), {}
    for chunk in range(WALK):
        here = slice(chunk * WINDOW, (chunk + 1) * WINDOW)
        frames = to_frames(rollout.next(poses[here]).frames)
        begin = chunk == 0  # the very first frame is given
        found[f"psnr chunk {chunk + 1}"] = psnr(frames[begin:], truth[here][begin:])
    return found


def bounds(scene: Scene, models: Models) -> dict[str, Tensor]:
    """What needs no transformer."""
    made = {"the truth": scene.video}
    for fill in ("smooth", "mean"):
        made[f"the {fill} filling alone"] = fill_warp(scene.warp, fill).frames
    return {name: way for row, video in made.items() for name, way in
            ((row, video), (f"{row}, through the VAE", models.vae.decode(models.vae.encode(video)[0])))}


@torch.inference_mode()
def judge(seed: int, trial: Trial) -> None:
    """Measure a scene in all ways; its file is written when it is whole. Of the first seed also the videos stay."""
    torch.set_num_threads(1)  # scenes run side by side
    models, defaults = load_models(Helios, trial.weights, "cpu"), model_options(trial.weights)
    remember_encodings(models.vae)
    geometry = find_pi3x(None, trial.weights)
    index = read_index(trial.weights)
    clip = make_clip(seed, WINDOW, index.size)
    scene = scene_of(clip, None if geometry is None else load_pi3x(geometry), RenderSettings(index.samples))
    prompts = encode_prompts(trial.weights, clip.caption, bool(trial.loras), defaults.guidance > 1, "cpu")
    loras = {path: load_lora(path) for path in trial.loras}
    made = {} if trial.full else {name: [video] for name, video in bounds(scene, models).items()}
    for name, warp, way in all_ways(scene, trial, defaults.warp_fill):
        options = replace(defaults, **way.options)
        lora = None if way.lora is None else loras[way.lora]
        made[name] = [generate(models, prompts, scene, each, warp, options, lora) for each in range(trial.seeds)]
    truth, visible = clip.frames.numpy(), scene.warp.visible[0, 0].numpy() > 0
    results = {}
    for name, videos in made.items():
        frames = [to_frames(video) for video in videos]
        each = [numbers(video, truth, visible) for video in frames]
        results[name] = {metric: float(np.mean([one[metric] for one in each if metric in one])) for metric in each[0]}
        if trial.found:
            results[name] |= camera_error(videos[0], make_scene(Random(seed)), clip, trial.found)
        save_video(trial.video(name, seed), frames[0])
    walks = {f"full, {defaults.warp_fill} filling" + (f", LoRA {label}" if label else ""):
             walk(seed, trial, models, prompts, loras[path] if path else None, defaults)
             for label, path in [("", None), *labels(trial.loras).items()][: 0 if trial.full else 2]}
    with replacing({"scene": trial.file(seed)}) as files:
        found = {"about": trial.about(), "rows": results, "walks": walks}
        files["scene"].write_text(json.dumps(found, indent=1) + "\n")


def save_video(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing({"video": path}) as files:
        write_video(files["video"], frames, FPS)
