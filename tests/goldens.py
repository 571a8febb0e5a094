"""Numbers recorded from the official code, and the one way to compare with them.

`tests/golden/` holds inputs and outputs of the official programs on small random models. `check` asserts a
tolerance and remembers the worst difference of each component; `conftest.py` prints them as a table at the end of a
run.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
HELIOS = GOLDEN / "helios"
GEOMETRY = GOLDEN / "geometry"
DISTILLED = HELIOS / "distilled"

parity: dict[str, tuple[float, float, str]] = {}  # component -> worst difference, tolerance, unit


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def config(path: Path) -> dict:
    """The `config` entry of a geometry golden's header."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def cases(path: Path) -> dict:
    return json.loads(path.read_text())


COMMON = cases(HELIOS / "pipeline_cases.json")["_common"]  # of all recorded runs
SIZE = COMMON["height"], COMMON["width"]
with np.load(HELIOS / "pipeline_inputs.npz") as file:
    INPUTS = dict(file)


def prefixed(golden: dict, prefix: str) -> dict:
    """The entries whose keys begin so, by the rest of their keys."""
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def only(golden: dict, prefix: str) -> tuple[str, torch.Tensor]:
    """The one entry whose key begins so: the rest of its key, which says a frame or a number, and its value."""
    (entry,) = prefixed(golden, prefix).items()
    return entry


def record(component: str, difference: float, tolerance: float, unit: str) -> None:
    """Note a difference for the table; the entry nearest to its own tolerance stays."""
    old = parity.get(component)
    if old is None or difference / max(tolerance, 1e-300) >= old[0] / max(old[1], 1e-300):
        parity[component] = (difference, tolerance, unit)


def check(component: str, actual, expected, tolerance: float, relative: bool = False) -> None:
    """Largest absolute difference (divided by the largest expected magnitude if `relative`) within `tolerance`."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{component}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    difference = (actual - expected).abs().max().item() if expected.numel() else 0.0
    if relative and expected.numel():
        difference /= max(expected.abs().max().item(), 1e-300)
    record(component, difference, tolerance, "rel" if relative else "abs")
    assert difference <= tolerance, f"{component}: difference {difference:.3g}, at most {tolerance:.3g} allowed"


def check_share(component: str, actual, expected, share: float, apart: float = 0.0, axes: tuple[int, ...] = ()) -> None:
    """At most a `share` of the entries (of each frame, where `axes` are those of a frame) are more than `apart` away.

    The last bit of a product, which differs by CPU, decides between equally deep samples and at thresholds.
    """
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{component}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    different = ((actual.double() - expected.double()).abs() > apart).double()
    check(f"{component} (share of pixels)", different.mean(axes or None).max(), 0.0, share)


def nearest(frames: torch.Tensor, expected: torch.Tensor) -> list[int]:
    """Which of the frames [T, ...] the recorded ones [S, ...] are, where a golden holds a few and does not say which."""
    distances = torch.stack([(frames.double() - each.double()).abs().flatten(1).mean(1) for each in expected])
    return distances.argmin(1).tolist()


def check_frames(component: str, frames, expected, visible=None, share: float = 0.005, seen: float = 0.002) -> None:
    """8-bit frames [T, H, W, 3] of a renderer and its masks [T, H, W], or those of them that are recorded."""
    pictures, masks = map(torch.stack, zip(*frames))
    if len(pictures) != len(expected):
        pictures = pictures[nearest(pictures, expected)]
    worst = (pictures.int() - expected.int()).abs().amax(-1)
    check_share(f"{component} frames", worst, torch.zeros_like(worst), share, axes=(1, 2))
    if visible is not None:
        check_share(f"{component} visibility", masks, visible.bool(), seen, axes=(1, 2))


def check_warp(component: str, warp, video, visible) -> None:
    """The recorded frames of a warp, at video size: video [1, 3, S, H, W] and visible [1, 1, S, H, W]."""
    stored = nearest(warp.frames[0].transpose(0, 1), video[0].transpose(0, 1))
    worst = (warp.frames[:, :, stored] - video).abs().amax(1)
    check_share(f"{component} video", worst, torch.zeros_like(worst), 0.01, 1e-6, axes=(0, 2, 3))
    check_share(f"{component} mask", warp.visible[:, :, stored], visible, 0.005, 1e-6, axes=(0, 1, 3, 4))
