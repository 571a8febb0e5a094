"""sample.py as the tests call it: on the golden model, small, in a folder with the official runs' inputs."""

import goldens
import numpy as np
from goldens import DISTILLED, HELIOS, INPUTS, SIZE
from known import load_video

from sample import main
from wah import Rollout

SIZED = "x".join(map(str, SIZE))
LONG = len(INPUTS["warp"])  # frames
WEIGHTS = goldens.GEOMETRY / "pi3x_weights.safetensors"
PI3X = ["--set", f"geometry={WEIGHTS}"]
LORA = HELIOS / "lora_prefix.safetensors"
LED = ["--image", "image.png", "--move", "forward 1"]


def sample(*words: str, weights=DISTILLED) -> int:
    return main(["--weights", str(weights), "--size", SIZED, "--set", "device=cpu", *words])


def read(path: str) -> np.ndarray:
    return load_video(path)


def everything(place) -> dict:
    """All files and what is in them, and all folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def refused(capsys, place, words: list[str], *parts: str, weights=DISTILLED) -> None:
    """Exit status 2, one line on stderr that says `parts`, and no file made or changed."""
    before = everything(place)
    assert sample(*words, weights=weights) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sample.py: error: ") and all(part in error for part in parts), error
    assert everything(place) == before


def stop_in_chunk(monkeypatch, count: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """The chunk of that number (from 1 on) of the next run raises an error."""
    original = Rollout.next

    def next_chunk(self, *control):
        if self.chunk == count - 1:
            monkeypatch.setattr(Rollout, "next", original)
            raise error
        return original(self, *control)

    monkeypatch.setattr(Rollout, "next", next_chunk)
