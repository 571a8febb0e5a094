"""Numbers equal to those of their libraries, on five videos."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image as library
import torchmetrics.functional.image.lpips as library_lpips
import torchmetrics.image.lpip
from torch import nn

from evaluation import quality
from files.measure import flicker

SIZE = 64, 80


def make_pair(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A soft moving picture, a damaged copy, and a mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE[0], :SIZE[1]] / 9
    shift = np.arange(4)[:, None, None, None]
    truth = 127 + 90 * np.sin(x[None, :, :, None] + y[None, :, :, None] * [1, 0.5, 0.2] + 0.3 * shift + seed)
    visible = np.broadcast_to((x + y)[None] < 5 + seed, truth.shape[:3]).copy()
    damaged = truth + rng.normal(0, 4 + 6 * seed, truth.shape) * np.where(visible, 1, 3)[..., None]
    return damaged.clip(0, 255).astype(np.uint8), truth.astype(np.uint8), visible


def tensor(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2) / 255


def stub_features(net: str, pretrained: bool = False) -> nn.Sequential:
    """AlexNet's shapes with random weights, in place of what torchvision would fetch."""
    assert net == "alexnet" and pretrained
    torch.manual_seed(1)
    relu, pool = nn.ReLU, lambda: nn.MaxPool2d(3, 2)
    return nn.Sequential(nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(), nn.Conv2d(64, 192, 5, padding=2), relu(), pool(),
                         nn.Conv2d(192, 384, 3, padding=1), relu(), nn.Conv2d(384, 256, 3, padding=1), relu(),
                         nn.Conv2d(256, 256, 3, padding=1), relu(), pool())


@pytest.fixture
def perceptual(monkeypatch):
    monkeypatch.setattr(library_lpips, "_get_tv_model_features", stub_features)
    monkeypatch.setattr(torchmetrics.image.lpip, "_TORCHVISION_AVAILABLE", True)
    return quality.Perceptual()


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_the_libraries(seed, perceptual):
    frames, truth, visible = make_pair(seed)
    found = quality.measure(frames, truth, visible, perceptual)
    a, b = tensor(frames), tensor(truth)
    expected = {
        "psnr": library.peak_signal_noise_ratio(a, b, data_range=1.0),
        "ssim": library.structural_similarity_index_measure(a, b, data_range=1.0),
        "lpips": library.learned_perceptual_image_patch_similarity(a, b, "alex", normalize=True),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5), name
    mask = torch.from_numpy(visible)[:, None]
    _, similar = library.structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    net = library_lpips._NoTrainLpips(net="alex", spatial=True)
    apart = net(a, b, normalize=True)
    for name, part in (("visible", mask), ("not visible", ~mask)):
        whole = part.expand_as(a)
        assert found[f"psnr {name}"] == pytest.approx(-10 * ((a - b)[whole].square().mean().log10()).item(), rel=1e-5)
        assert found[f"ssim {name}"] == pytest.approx(similar[whole].mean().item(), rel=1e-5)
    assert found["lpips visible"] == pytest.approx(apart[mask].mean().item(), rel=1e-5)
    assert found["lpips visible"] != pytest.approx(found["lpips"], rel=1e-2) and "lpips not visible" not in found


def test_equal_videos_and_whole_masks():
    _, truth, visible = make_pair(0)
    found = quality.measure(truth, truth, np.ones_like(visible))
    assert found == {"psnr": 100, "ssim": pytest.approx(1), "psnr visible": 100, "ssim visible": pytest.approx(1)}


@pytest.mark.parametrize("error", [ModuleNotFoundError("no torchvision"), OSError("no route"), RuntimeError("hash")])
def test_lpips_that_cannot_be_had(monkeypatch, error):
    def refuse(*words):
        raise error

    monkeypatch.setattr(library_lpips, "_get_tv_model_features", refuse)
    monkeypatch.setattr(torchmetrics.image.lpip, "_TORCHVISION_AVAILABLE", True)
    with pytest.raises(ValueError, match="LPIPS needs torchvision.*--lpips off"):
        quality.Perceptual()


def test_flicker():
    """Even change has none; a frame that is brighter by 30 than both neighbours stands out by 30."""
    ramp = np.arange(0, 70, 10, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    assert flicker(ramp) == 0 and flicker(ramp[:2]) == 0
    ramp[3] += 30
    assert flicker(ramp) == pytest.approx((15 + 30 + 15) / 5)


def test_without_the_library_one_line_says_what_is_missing():
    code = "import sys; sys.modules['torchmetrics'] = None; import evaluate"
    words = [sys.executable, "-c", code]
    said = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert said.returncode and said.stderr == 'measuring needs the extra "eval": pip install -e ".[eval]"\n'
