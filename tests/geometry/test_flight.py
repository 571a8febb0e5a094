"""Paths through keyframes and drives: exact at the keys, smooth between them, even in time."""

import math

import pytest
import torch

from geometry.camera import CameraPath, inverse, motion, resample, turn_degrees
from geometry.flight import AMOUNTS, drive, end_slope, film, pushed, turn_vector, turned


def pose(*move: float) -> torch.Tensor:
    return motion(torch.eye(4), torch.tensor(move), torch.ones(1))[0]


KEYS = torch.stack([pose(0, 0, 0, 0, 0, 0), pose(1, 0, 2, 40, 5, 0), pose(3, -1, 3, 100, -10, 8), pose(2, 0, 5, 170, 0, 0)])


def test_turn_vectors_there_and_back():
    vectors = torch.tensor([[0.0, 0, 0], [1e-7, 0, 0], [0.3, -0.5, 1.2], [0, math.pi - 1e-3, 0]], dtype=torch.float64)
    back = turn_vector(turned(vectors, torch.zeros(4, 3, dtype=torch.float64))[:, :3, :3])
    assert torch.allclose(back, vectors, atol=1e-9)


def test_a_film_has_two_frames_at_least():
    """However short: one at each end."""
    path = film(KEYS[:2], [0.01], 16)
    assert len(path) == 2 and torch.allclose(path, KEYS[:2], atol=1e-5)


def test_film_passes_the_keys_in_time():
    path = film(KEYS, [1.0, 0.5, 2.0], 16)
    assert len(path) == 57 and path.dtype == torch.float32
    for frame, key in zip((0, 16, 24, 56), KEYS):
        assert torch.allclose(path[frame], key, atol=1e-5)
    identity = path[:, :3, :3] @ path[:, :3, :3].mT
    assert torch.allclose(identity, torch.eye(3).expand_as(identity), atol=1e-5)


def test_film_is_smooth():
    """No step, straight or turning, differs from the one before by more than a spline's curvature explains: halving the
    time between frames halves the largest change of speed, which at a corner it would not."""
    jumps = []
    for fps in (50, 100, 200):
        path = film(KEYS, [1.0, 1.0, 1.0], fps).double()
        speed = path[1:, :3, 3].diff(dim=0) * fps
        spin = turn_vector((inverse(path[:-1]) @ path[1:])[:, :3, :3]) * fps
        jumps.append([speed.diff(dim=0).norm(dim=-1).max().item(), spin.diff(dim=0).norm(dim=-1).max().item()])
    for coarse, fine in zip(jumps, jumps[1:]):
        assert fine[0] < 0.6 * coarse[0] and fine[1] < 0.65 * coarse[1]


def test_two_keys_are_slerp():
    path = film(KEYS[:2], [2.0], 16)
    assert torch.allclose(path, resample(CameraPath(KEYS[:2]), 33).c2w, atol=1e-5)


@pytest.mark.parametrize("keys, seconds", [(1, []), (2, [0.0]), (3, [1.0]), (2, [-1.0])])
def test_bad_films(keys, seconds):
    with pytest.raises(ValueError, match="keyframes"):
        film(KEYS[:keys], seconds, 16)


def test_a_drive_has_no_seam():
    """Equal ways in a row: every step over the border is as long as those inside, and turns as far."""
    way = pose(0, 0, 2, 12, 0, 0)
    here, chunks = torch.eye(4), []
    for _ in range(3):
        there = here @ way
        chunks.append(drive(here, there))
        here = there
    path = torch.cat(chunks).double()
    assert len(path) == 99 and torch.equal(path[0], torch.eye(4, dtype=torch.float64))
    turns = turn_degrees(path[1:, :3, :3], path[:-1, :3, :3])
    assert (turns - 12 / 33).abs().max() < 1e-4
    straight = torch.cat([drive(torch.eye(4) @ pose(0, 0, 2 * k, 0, 0, 0), pose(0, 0, 2 * (k + 1), 0, 0, 0)) for k in range(3)])
    assert (straight[:, 2, 3].diff() - 2 / 33).abs().max() < 1e-5


def test_buttons():
    """Each verb moves its own way; up goes up, where y points down."""
    assert pushed(torch.eye(4), "up", 1.0)[1, 3] == -1 and pushed(torch.eye(4), "right", 2.0)[0, 3] == 2
    assert pushed(pose(0, 0, 0, 90, 0, 0), "forward", 1.0)[0, 3] == pytest.approx(1, abs=1e-6)  # after a right turn
    for verb, amount in AMOUNTS.items():
        assert not torch.equal(pushed(torch.eye(4), verb, amount), torch.eye(4))


def test_slopes_at_the_ends_are_exact():
    """The turn vector that grows with `end_slope` turns with the wanted velocity, by differences."""
    turn, velocity = torch.tensor([0.4, -1.1, 0.7]).double(), torch.tensor([0.2, 0.5, -0.3]).double()
    slope, step, zero = end_slope(turn, velocity), 1e-5, torch.zeros(1, 3).double()
    now, later = (turned((turn + step * k * slope)[None], zero)[0] for k in (0, 1))
    assert torch.allclose(turn_vector((now.T @ later)[:3, :3]) / step, velocity, atol=1e-4)
