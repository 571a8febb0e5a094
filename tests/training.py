"""train.py as the tests call it: on the golden model, small."""

import json
from pathlib import Path

from goldens import DISTILLED, GEOMETRY, HELIOS, tensors
from safetensors import safe_open

from train import main

RANK = len(tensors(HELIOS / "lora_noprefix.safetensors")["blocks.0.attn1.to_q.lora_A.weight"])


def train_on(video, *words, weights=DISTILLED) -> int:
    """train.py at a small size, for 2 steps unless the words say more."""
    geometry = [] if "--depth" in words else ["--geometry", GEOMETRY / "pi3x_weights.safetensors"]
    small = ["--size", "64x64", "--device", "cpu", "--set", "geometry_pixels=2000", f"rank={RANK}", "steps=2"]
    return main([str(word) for word in ("--video", video, "--weights", weights, *geometry, *small, *words)])


def read(path: str | Path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def metrics(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def refused(capsys, video, words: list[str], *parts: str, weights=DISTILLED) -> None:
    """Exit status 2 and one line on stderr that says `parts`."""
    words = words if "--out" in words else ["--out", "run", *words]
    capsys.readouterr()
    assert train_on(video, *words, weights=weights) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: error: ") and all(part in error for part in parts), error
