"""The comparison itself: what is too far away fails, and the table of differences survives several workers."""

from types import SimpleNamespace

import conftest
import goldens
import pytest
import torch


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """A table of its own, so that what is made up here is not printed."""
    monkeypatch.setattr(goldens, "parity", {})


def test_check():
    goldens.check("a", [1.0, 2.0], [1.0, 2.0 + 1e-6], 1e-5)
    goldens.check("relative", [1000.0], [1000.1], 1e-3, relative=True)
    for actual, expected in (([1.0], [1.1]), ([1.0], [1.0, 1.0]), ([float("nan")], [1.0])):
        with pytest.raises(AssertionError, match="b: "):
            goldens.check("b", actual, expected, 1e-5)
    assert goldens.parity["a"][0] == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize("pixels, good", [(0, True), (1, True), (3, False)])
def test_frames_hold_by_share(pixels, good):
    """Of 400 pixels two may differ; frames of which only some are recorded are found again."""
    pictures = torch.randint(0, 256, (4, 20, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    masks = torch.rand(4, 20, 20, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = pictures.clone()
    expected[2, 0, :pixels] += 1
    frames = list(zip(pictures, masks))
    for recorded in (expected, expected[[0, 2]]):
        if good:
            goldens.check_frames("Frames", frames, recorded, masks)
        else:
            with pytest.raises(AssertionError, match="share of pixels"):
                goldens.check_frames("Frames", frames, recorded)
    with pytest.raises(AssertionError, match="visibility"):
        goldens.check_frames("Frames", frames, pictures, ~masks)


def test_one_bad_frame_is_not_averaged_away():
    worst = torch.zeros(100, 10, 10)
    worst[7, 0] = 1
    goldens.check_share("all", worst, torch.zeros_like(worst), 0.005)
    with pytest.raises(AssertionError):
        goldens.check_share("each", worst, torch.zeros_like(worst), 0.005, axes=(1, 2))
    with pytest.raises(AssertionError):
        goldens.check_share("nan", torch.full((4,), torch.nan), torch.zeros(4), 0.005, 1e-6)


def test_workers_hand_over_their_part():
    """The entry nearest to its own tolerance stays, whichever process had it."""
    goldens.record("near", 4e-6, 1e-5, "abs")
    goldens.record("far", 1e-6, 1e-5, "abs")
    session = SimpleNamespace(config=SimpleNamespace(workeroutput={}))
    conftest.pytest_sessionfinish(session)
    handed = dict(session.config.workeroutput["parity"])
    goldens.parity.clear()
    goldens.record("far", 9e-6, 1e-5, "abs")
    conftest.pytest_testnodedown(SimpleNamespace(workeroutput={"parity": handed}))
    conftest.pytest_testnodedown(SimpleNamespace())  # a worker that died
    assert goldens.parity == {"near": (4e-6, 1e-5, "abs"), "far": (9e-6, 1e-5, "abs")}
    conftest.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace()))  # without workers there is none to tell
