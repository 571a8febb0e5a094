"""One thread and one kind of products, so that the small models run fast and alike everywhere; and the parity table after the run."""

import json

import goldens
import numpy as np
import pytest
import torch
from goldens import INPUTS, SIZE
from PIL import Image

from files.machine import choose_products
from geometry import surface
from helios.load import encode_prompts, load_models
from model import Helios

torch.set_num_threads(1)
choose_products()  # as all programs do


@pytest.fixture
def page_words(tmp_path, monkeypatch):
    """What the page is started with in a folder of its own: the golden model and picture, and small geometry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(surface, "map_size", lambda height, width, *limit: (56, 112))  # to be fast
    Image.fromarray(INPUTS["image"]).save("image.png")
    return ["--weights", str(goldens.DISTILLED), "--size", "64x128", "--image", "image.png", "--prompt", "a car", "--set",
            "device=cpu", "steps=1,1,1", "amplify_first_chunk=false"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with the official runs' inputs as files; geometry is coarse, to be fast."""
    monkeypatch.chdir(tmp_path)
    small = surface.geometry_size
    monkeypatch.setattr(surface, "map_size", lambda height, width, *limit: small(height, width, 11_760))
    Image.fromarray(INPUTS["image"]).save("image.png")
    np.save("warp.npy", INPUTS["warp"])
    np.save("mask.npy", INPUTS["mask"])
    c2w = np.tile(np.eye(4), (33, 1, 1))
    c2w[:, 2, 3] = np.linspace(0, 1, 33)
    (tmp_path / "poses.json").write_text(json.dumps({"c2w": c2w.tolist(), "fps": 12}))
    np.save("depth.npy", np.linspace(3, 1, SIZE[0], dtype=np.float32)[:, None].repeat(SIZE[1], 1))
    return tmp_path


@pytest.fixture(scope="session")
def models():
    """The golden distilled model."""
    return load_models(Helios, goldens.DISTILLED, "cpu")


@pytest.fixture(scope="session")
def prompts():
    """The golden runs' prompt."""
    return encode_prompts(goldens.DISTILLED, goldens.COMMON["prompt"], lora=True, guided=True, device="cpu")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA card here"))


def pytest_sessionfinish(session):
    """With pytest-xdist each worker hands its part of the table over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = goldens.parity


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for component, entry in getattr(node, "workeroutput", {}).get("parity", {}).items():
        goldens.record(component, *entry)


def pytest_terminal_summary(terminalreporter):
    if not goldens.parity:
        return
    terminalreporter.section("parity with the official numbers (worst case seen)")
    for component, (difference, tolerance, unit) in sorted(goldens.parity.items()):
        terminalreporter.write_line(f"{component:<44} {difference:9.2e} {unit:<8} of {tolerance:.0e}")
