"""The miniature's moving scenes: what is known of them, and that the table can be made."""

from dataclasses import replace

import pytest
import torch

from mini import reshoot
from mini.known import exact_warp
from mini.world import render
from render import Warp

SIZE = (32, 48)


@pytest.fixture(scope="module")
def first():
    return next(reshoot.held_out(SIZE))


def test_a_scene_shot_along_another_path(first):
    """It begins where the clip does; the exact warp shows the truth where the clip sees it, moving things too."""
    _, scene, clip, target = first
    assert torch.equal(clip.frames[0], target.frames[0]) and (clip.c2w[-1] - target.c2w[-1]).abs().max() > 0.1
    warp = exact_warp(target, clip)
    truth = target.frames.permute(3, 0, 1, 2)[None] / 127.5 - 1
    seen = warp.visible.bool()
    wrong = (warp.frames - truth).abs().mean(1, keepdim=True)
    assert 0.4 < seen[:, :, -1].float().mean() < 0.9
    assert wrong[seen].mean() < 0.06 and wrong[~seen].mean() > 3 * wrong[seen].mean()
    alone: Warp = exact_warp(replace(clip, c2w=clip.c2w, frames=clip.frames), clip)
    assert alone.visible.min() == 1 and (alone.frames - (clip.frames.permute(3, 0, 1, 2)[None] / 127.5 - 1)).abs().max() < 1e-3


def test_a_scene_that_is_held_still(first):
    """All is where it is at that frame."""
    _, scene, clip, _ = first
    frames, depth = render(reshoot.still(scene, 40), clip.c2w[40:41], clip.K, SIZE)
    assert torch.equal(frames[0], clip.frames[40]) and torch.equal(depth[0], clip.depth[40])
