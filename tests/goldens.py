"""Numbers recorded from the official code, and the one way to compare with them.

`tests/golden/` holds inputs and outputs of the official programs on small random models. `check` asserts a
tolerance and remembers the worst difference of each component; `conftest.py` prints them as a table at the end of a
run.
"""

import json
from pathlib import Path

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
    if relative:
        difference /= max(expected.abs().max().item(), 1e-300)
    record(component, difference, tolerance, "rel" if relative else "abs")
    assert difference <= tolerance, f"{component}: difference {difference:.3g}, at most {tolerance:.3g} allowed"
