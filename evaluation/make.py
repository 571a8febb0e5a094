"""Videos of cases, made as sample.py makes them, with the networks loaded once; what is there is not made again."""

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import sample
from evaluation.ablation import Way, folder_name
from evaluation.protocols import Case
from files.settings import show_value
from files.video import write_video
from files.writing import replacing
from geometry.camera import WINDOW
from helios.load import load_network, prompt_at
from job import Settings, check, choose_lora, choose_size, load_settings, prepare
from wah import Rollout


@dataclass(frozen=True)
class Maker:
    """Rows of videos in a folder: ROW/NAME.mp4 and ROW/NAME_warp.mp4, and masks/NAME.npy of what warps show."""

    folder: Path
    words: tuple[str, ...]  # for sample.py: weights, seed, size, memory
    settings: tuple[str, ...]  # for its --set
    ways: dict[str, Way]
    prompts: tuple[str, ...]  # of all cases

    def video(self, row: str, case: str) -> Path:
        return self.folder / folder_name(row) / f"{case}.mp4"

    def mask(self, case: str) -> Path:
        return self.folder / "masks" / f"{case}.npy"

    def picture(self, case: Case) -> Path:
        """Where the first one is, or is to be."""
        return case.image or self.folder / "pictures" / f"{case.name}.png"

    def read(self, case: Case, path: Path, settings: list[str], way: Way) -> tuple[argparse.Namespace, Settings]:
        """The words of a video's command, checked by themselves."""
        options = [f"{name}={show_value(value)}" for name, value in way.options.items()]
        frames, options = WINDOW * max(len(case.actions), 1), [*settings, *self.settings, *options]
        args = sample.parse([
            "--image", str(self.picture(case)), "--poses", str(path), "--prompt", case.prompt, "--frames", str(frames),
            "--lora", str(way.lora or "off"), *self.words, *(["--set", *options] if options else [])])
        chosen = load_settings(args)
        check(args, chosen)
        return args, chosen

    def check(self, case: Case) -> Settings:
        """All that can be refused before anything is written; the settings of the case's last row."""
        read = [self.read(case, self.folder / "path.json", [], way) for way in self.ways.values()]
        for args, settings in read:
            choose_lora(args, settings)
        args, settings = read[-1]
        choose_size(args)
        return settings

    @cached_property
    def networks(self) -> sample.Networks:
        return sample.Networks(load_network, self.prompts)

    def make(self, case: Case, path: Path, settings: list[str], row: str) -> None:
        """Without a camera the picture is the same, and nothing leads."""
        way = self.ways[row]
        args, chosen = self.read(case, path, settings, way)
        job = prepare(args, chosen)
        prompts, models = self.networks.give(args, job)
        generator = torch.Generator().manual_seed(job.settings.seed)
        rollout = Rollout(models, prompts[0], job.size, generator, job.start.image,
                          camera=job.start.camera if way.led else None, lora=job.lora, options=job.settings)
        chunks = []
        for control in job.controls:
            prompt = prompt_at(prompts, rollout.chunk, job.settings.prompt_blend)
            poses, zoom = (control.poses, control.zoom) if way.led else (None, None)
            chunks.append(sample.pictures(rollout.next(poses, prompts=prompt, zoom=zoom)))
        made = {name: np.concatenate([rows[name] for rows in chunks]) for name in chunks[0]}
        video = self.video(row, case.name)
        files = {"warp": video.with_name(f"{case.name}_warp.mp4"), "mask": self.mask(case.name)} if way.led else {}
        for file in (video, *files.values()):
            file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(files | {"result": video}) as names:  # the video last: it says that all is there
            for name in names.keys() - {"mask"}:
                write_video(names[name], made[name], job.fps)
            if "mask" in names:
                np.save(names["mask"], made["mask"][..., 0] > 127)
