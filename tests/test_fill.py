"""Filling the holes of a warp: what is visible stays, what is not continues its surroundings."""

import json

import numpy as np
import pytest
import torch
from goldens import DISTILLED

from render import Warp, fill_warp, smooth_fill
from wah import Options, model_options

GENERATOR = torch.Generator().manual_seed(0)
FRAMES = torch.rand(1, 3, 4, 48, 80, generator=GENERATOR) * 2 - 1
MASK = (torch.rand(1, 1, 4, 48, 80, generator=GENERATOR) > 0.4).float()
MASK[:, :, 1, 8:40, 10:60] = 0  # a large hole


def test_visible_pixels_stay_bit_for_bit():
    filled = smooth_fill(FRAMES, MASK)
    assert torch.equal(filled * MASK, FRAMES * MASK)
    assert filled.isfinite().all() and filled.abs().max() <= 1


@pytest.mark.parametrize("size", [(48, 80), (7, 13), (1, 9)])
def test_a_hole_in_one_colour_gets_that_colour(size):
    frames = torch.tensor([0.3, -0.5, 0.9]).view(1, 3, 1, 1, 1).expand(1, 3, 2, *size)
    mask = torch.zeros(1, 1, 2, *size)
    mask[..., 0, 0] = 1
    if min(size) > 1:
        assert torch.allclose(smooth_fill(frames * mask, mask), frames, atol=1e-6)


def test_a_hole_is_between_its_sides():
    """Left dark, right bright: the hole rises from one to the other, and its rows are alike."""
    frames = torch.full((1, 3, 1, 32, 64), -1.0)
    frames[..., 40:] = 1
    mask = torch.ones(1, 1, 1, 32, 64)
    mask[..., 24:40] = 0
    row = smooth_fill(frames, mask)[0, 0, 0, 16]
    assert (row.diff() >= -1e-6).all() and abs(row[31] + row[32]) < 0.3


def test_every_frame_by_itself():
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(smooth_fill(FRAMES[:, :, order], MASK[:, :, order]), smooth_fill(FRAMES, MASK)[:, :, order])


def test_nothing_visible_is_gray_and_edges_of_a_resized_mask_are_filled():
    assert smooth_fill(FRAMES, torch.zeros_like(MASK)).abs().max() == 0
    half = MASK.clone()
    half[MASK == 1] = 1.0
    half[..., 20, 20] = 0.5
    bright = FRAMES.clone()
    bright[..., 20, 20] = 9.0  # half of something else
    assert smooth_fill(bright, half)[..., 20, 20].abs().max() <= 1


def test_kinds():
    warp = Warp(FRAMES, MASK)
    assert fill_warp(warp, "mean") is warp
    black = fill_warp(warp, "black").frames
    assert torch.equal(black[(MASK == 0).expand_as(black)], torch.tensor(-1.0).expand((MASK == 0).sum() * 3))
    assert torch.equal(fill_warp(warp, "smooth").visible, MASK)
    with pytest.raises(ValueError, match="mean, smooth or black"):
        Options(warp_fill="gray")


def test_a_small_model_may_say_its_own(tmp_path):
    index = json.loads((DISTILLED / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"warp_fill": "smooth"}))
    (tmp_path / "scheduler").symlink_to(DISTILLED / "scheduler")
    assert model_options(tmp_path).warp_fill == "smooth" and model_options(DISTILLED).warp_fill == "mean"
    assert np.isfinite(model_options(tmp_path).threshold)
