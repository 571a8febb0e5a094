"""WBench's score on cameras whose answers are known by hand."""

import math

import pytest
import torch

from evaluation.navigation import ideal, mirrored, navigation, read_keys, wanted_path
from geometry.camera import motion

SIZES = {"step": 2.0, "degrees": 30.0, "radius": 3.0}
TURN = 20


def path(*actions: str, third: bool = False, **sizes: float) -> torch.Tensor:
    return wanted_path([*actions], third, TURN, **SIZES | sizes)


@pytest.mark.parametrize("perspective", ["first_person", "third_person"])
@pytest.mark.parametrize("actions", [("W", "W", "A"), ("left", "W", "right"), ("D", "up"), ("W+left", "W+right"),
                                     ("W+D", "S", "down")])
def test_a_camera_that_obeys(actions, perspective):
    """Also in another unit and another place: the way is fitted to the camera. A subject that is circled and walks is
    not told apart, by the original neither."""
    least = 0.86 if actions[0] == "W+left" and perspective == "third_person" else 0.96
    poses = path(*actions, third=perspective != "first_person")
    moved = motion(torch.eye(4), torch.tensor([5.0, 1, 2, 40, 0, 0]), torch.ones(1)) @ poses
    scaled = poses.clone()
    scaled[:, :3, 3] *= 3
    for each in (poses, moved, scaled):
        assert navigation(each, [*actions], perspective)["accuracy"] > least
    if actions[0] == "W+left" or actions[1] == "W":
        assert navigation(poses, [*actions], perspective)["consistency"] > 0.96


@pytest.mark.parametrize("count", [8, 12])
def test_every_fourth_frame(count):
    """A turn of 33 frames is 8 or 9 of these poses: cut at 8, later turns would begin in earlier ones."""
    actions = (["W", "left", "S", "right"] * 3)[:count]
    poses = wanted_path(actions, False, 33, **SIZES)[::4]
    found = navigation(poses, actions, "first_person")
    assert found["consistency"] > 0.97 and found["accuracy"] > 0.97


def test_a_camera_that_does_the_opposite():
    """Forward instead of back by 2: at the place s the error is 2 s, 2 on average over a way of 2, so at most 1 is
    taken; there is no turn, so half of the score is left."""
    found = navigation(path("W"), ["S"], "first_person")
    assert found == {"accuracy": pytest.approx(0.5, abs=1e-6)}
    turned = navigation(path("right"), ["left"], "first_person")["accuracy"]
    assert turned == pytest.approx(1 - (30 / 30) / 2, abs=0.02)  # mean angle 2 x 15 over 30 degrees


def test_sideways_instead_of_forward():
    """The error at s is sqrt(2) s: sqrt(2) / 2 of the way on average."""
    found = navigation(path("D"), ["W"], "first_person")["accuracy"]
    assert found == pytest.approx(1 - math.sqrt(2) / 4, abs=1e-6)


def test_repeated_turns():
    """W twice, the second half as far: at s the ways differ by s, 0.5 on average, over a mean way of 1.5."""
    first, second = path("W"), path("W", step=1.0)
    second[:, 2, 3] += 2
    found = navigation(torch.cat([first, second]), ["W", "W"], "first_person")
    assert found["consistency"] == pytest.approx(1 - 0.5 / 1.5 / 2, abs=1e-6)
    assert found["NavScore"] == pytest.approx((found["accuracy"] + found["consistency"]) / 2)
    back = path("W", "S")
    assert navigation(back, ["W", "S"], "first_person")["consistency"] == pytest.approx(1, abs=0.03)


def test_directions():
    """OpenCV: right is +x, forward +z, and looking up turns z towards -y; around a subject to the left, looking right."""
    for action, row in (("W", (0, 0, 2)), ("A", (-2, 0, 0)), ("W+D", (math.sqrt(2), 0, math.sqrt(2)))):
        torch.testing.assert_close(path(action)[-1, :3, 3], torch.tensor(row, dtype=torch.float32), rtol=0, atol=1e-5)
    assert path("right")[-1, 0, 2] == pytest.approx(0.5, abs=1e-5) and not path("right")[:, :3, 3].any()
    assert path("up")[-1, 1, 2] == pytest.approx(-0.5, abs=1e-5)
    around = path("right", third=True)
    assert around[-1, 0, 3] == pytest.approx(-1.5, abs=1e-5) and around[-1, 0, 2] == pytest.approx(0.5, abs=1e-5)
    subject = around[:, :3, 3] + 3 * around[:, :3, 2]
    torch.testing.assert_close(subject, torch.tensor([0.0, 0, 3]).expand(TURN, 3), rtol=0, atol=1e-5)


def test_keys():
    assert read_keys("w, left").tolist() == [0, 1, -1, 0] and read_keys("→").tolist() == [0, 0, 1, 0]
    assert read_keys("a dog appears") is None and read_keys("") is None
    assert mirrored(read_keys("W+left"), read_keys("W+right")).tolist() == [-1, 1, 1]
    assert mirrored(read_keys("W"), read_keys("S")).tolist() == [1, 1, -1]
    assert mirrored(read_keys("W"), read_keys("A")) is None


def test_turns_that_are_none_are_left_out():
    poses = path("W", "hold", "W")
    assert navigation(poses, ["W", "jump", "W"], "first_person")["accuracy"] > 0.96
    with pytest.raises(ValueError, match="keys such as W"):
        navigation(poses, ["jump"], "first_person")
    assert ideal(torch.zeros(4, dtype=torch.float64), 3, True, 1, 30, 1).eq(torch.eye(4)).all()
