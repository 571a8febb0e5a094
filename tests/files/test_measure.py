"""Seams and drift on videos whose answers are known."""

import numpy as np
import pytest

from files.measure import sharpness, steadiness


def moving(count: int) -> np.ndarray:
    """Soft stripes that move evenly."""
    x = np.arange(256) - 2 * np.arange(count)[:, None]
    level = 127 + 100 * np.sin(2 * np.pi * x / 64)
    return level.astype(np.uint8)[:, None, :, None].repeat(16, 1).repeat(3, 3)


def test_even_motion_has_no_seam_and_a_jump_is_one():
    frames = moving(99)
    assert steadiness(frames)["seam"] == pytest.approx(1, abs=0.05)
    frames[33:66] = 255 - frames[33:66]
    assert steadiness(frames)["seam"] > 5
    assert steadiness(frames, window=40)["seam"] < 1  # the borders are elsewhere


@pytest.mark.parametrize("frames", [moving(33), np.zeros((66, 8, 8, 3), np.uint8)])
def test_nothing_to_compare(frames):
    assert "seam" not in steadiness(frames)


def test_drift_of_colour_and_sharpness():
    frames = np.full((40, 16, 16, 3), 100, np.uint8)
    frames[:, ::2, ::2] = 140
    frames[-6:] = frames[-6:] // 2
    found = steadiness(iter(frames))
    assert found["color_drift"] == pytest.approx(frames[0].mean() / 2, abs=0.5)
    assert found["sharpness"] == pytest.approx(0.5, abs=0.01)
    assert sharpness(np.full((8, 8, 3), 9, np.uint8)) == 0
