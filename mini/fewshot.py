"""How many clips should a LoRA learn from? LoRAs of some numbers of the miniature's known clips, by its own recipe.

The clips, the runs and the LoRAs lie in one folder; what is there is not made again, and a run that was stopped goes
on. Clips are those of `python -m mini.world --known`, the demo clip first.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import train
from clips import read_csv
from files.folder import STATE
from files.writing import fingerprint, replacing
from helios.index import read_index
from helios.load import files_read
from mini.world import KNOWN, write_known

MOST = 1 + len(KNOWN)  # clips


def lora_file(folder: Path, count: int) -> Path:
    return folder / f"{count}-clips.safetensors"


def describe_loras(weights: Path, settings: list[str]) -> dict:
    """What the LoRAs depend on. Raises ValueError for `settings` that train.py has not."""
    recipe = train.read_recipe(read_index(weights), settings)
    return {"weights": fingerprint(weights, files_read(weights)), **asdict(recipe)}


def train_loras(counts: list[int], folder: Path, weights: Path, settings: list[str]) -> list[Path]:
    """A LoRA of the first clips for each of `counts`, but none for 0. Raises ValueError if a training failed."""
    clips = folder / "clips"
    if not (clips / "clips.csv").is_file():
        write_known(clips)
    sources, files = read_csv(clips / "clips.csv"), []
    for count in filter(None, counts):
        file, run = lora_file(folder, count), folder / f"run-{count}"
        words = ["--weights", str(weights), "--out", str(run), "--device", "cpu"]
        for source in sources[:count]:
            words += ["--video", str(source.video), "--prompt", source.prompt]
        words += [*(["--set", *settings] if settings else []), *(["--resume"] if (run / STATE).is_file() else [])]
        if not file.is_file():
            if train.main(words):
                raise ValueError(f"{run}: the LoRA of {count} clips was not made, for the reason above")
            with replacing({"lora": file}) as names:
                shutil.copy(run / "lora.safetensors", names["lora"])
        files.append(file)
    return files
