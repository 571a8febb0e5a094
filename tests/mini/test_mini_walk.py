"""The miniature's walks: they come round again, the geometry is the scene's, and covering keyframes show what was seen."""

from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest
import torch

from geometry.known import Known
from geometry.pi3x import Pi3X
from geometry.surface import estimate
from helios.load import ROOT
from memory import CHOICES
from mini import walk
from mini.world import clearance

SIZE = (32, 48)


@pytest.fixture(scope="module")
def first():
    seed, scene, clip = next(walk.held_out(SIZE))
    video = clip.frames.permute(3, 0, 1, 2)[None] / 127.5 - 1
    return walk.Walk(scene, clip, video, Mock(), Mock(), Path(ROOT / "mini"), 3)


def test_it_goes_round_twice(first):
    c2w, frames = first.clip.c2w, first.clip.frames
    assert len(c2w) == len(frames) == walk.FRAMES and clearance(first.scene, c2w[:, :3, 3]).min() > 0.4
    assert (c2w[walk.AGAIN:] - c2w[:walk.AGAIN]).abs().max() < 1e-5 and torch.equal(frames[5], frames[walk.AGAIN + 5])
    assert (c2w[walk.AGAIN // 2, :3, 2] + c2w[0, :3, 2])[[0, 2]].abs().max() < 1e-5  # half way round it looks back
    assert (c2w[0] - c2w[-1]).abs().max() < 0.05


def test_the_scene_stands_for_the_network(first):
    """Depths and places are those of the clip's frames, from the poses that are told."""
    geometry, clip = walk.TrueGeometry(first.scene, first.clip), first.clip
    path = torch.linalg.inv(clip.c2w[:1]) @ clip.c2w[[0, 40]]
    images = torch.zeros(1, 2, 3, *SIZE)
    prediction = geometry(images, Known(c2w=path[None]))
    near = clip.depth[[0, 40]] < 30
    wrong = (prediction.local_points[0, ..., 2] / clip.depth[[0, 40]] - 1)[near]
    assert wrong.abs().max() < 1e-3 and torch.equal(prediction.c2w[0], path)
    found = estimate(cast(Pi3X, geometry), [images[:, 0], images[:, 1]], 42 * 56, Known(c2w=path[None]))
    assert found[1].K[0, 0].item() == pytest.approx(clip.K[0, 0].item() * found[1].depth.shape[1] / SIZE[1], rel=0.01)


def test_covering_keyframes_show_what_was_seen(first, monkeypatch):
    """In the second round, where the truth was remembered; the latest alone do not."""
    monkeypatch.setattr(walk, "read_index", lambda weights: Mock(size=SIZE, samples=1))
    wrong = {}
    for choice in CHOICES:
        camera = first.camera(choice)
        for chunk, poses in enumerate(first.chunks()):
            if chunk == walk.ROUND + 4:
                break
            here = slice(chunk * 33, chunk * 33 + 33)
            shown = walk.shown(camera.warp(poses))
            if chunk >= walk.ROUND:
                wrong.setdefault(choice, []).append((shown - first.video[:, :, here]).square().mean())
            camera.remember(first.video[:, :, here][:, :, -1])
    latest, covering = (torch.stack(wrong[choice]).mean() for choice in CHOICES)
    assert covering < 0.5 * latest
