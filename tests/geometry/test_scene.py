"""A picture and a path brought together: units, the lens, what is visible, and what doesn't fit."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import check
from PIL import Image

from geometry.camera import CameraPath, moves, square_lens
from geometry.scene import choose_unit, describe_visible, given_scene, known_lens, read_path
from geometry.surface import pinhole, place

PICTURE, SIZE = Image.new("RGB", (320, 192)), (48, 80)
STILL = CameraPath(torch.eye(4).repeat(3, 1, 1))
DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def depth(tmp_path):
    np.save(tmp_path / "d.npy", np.full((192, 320), 2500.0, np.float32))
    return tmp_path / "d.npy"


@pytest.mark.parametrize("unit, length", [(None, 250), ("same", 2500 / 2500), ("1000", 1000), ("0.2depth", 500)])
def test_the_users_unit_counts(depth, unit, length):
    """Millimeters beside a path in meters: unit=1000."""
    assert abs(given_scene(PICTURE, STILL, depth, SIZE, unit=unit)[2] / length - 1) < 1e-5
    assert abs(given_scene(PICTURE, replace(STILL, unit="17"), depth, SIZE, unit=unit)[2] / (length if unit else 17) - 1) < 1e-5


def test_meters_beside_millimeters_are_refused(depth):
    with pytest.raises(ValueError, match="whole numbers around 2500, which are no meters; for millimeters the unit is 1000"):
        given_scene(PICTURE, replace(STILL, unit="meter"), depth, SIZE)
    _, geometry = place(PICTURE, torch.full((192, 320), 2.5), 60, SIZE)
    assert choose_unit("meter", geometry, torch.full((192, 320), 2.5)) == 1


def test_a_depth_of_another_shape_names_its_file(tmp_path):
    np.save(tmp_path / "d.npy", np.ones((320, 320), np.float32))
    with pytest.raises(ValueError, match="d.npy: a depth map of 320x320 for a picture of 320x192"):
        given_scene(PICTURE, STILL, tmp_path / "d.npy", SIZE)


@pytest.mark.parametrize("beside, fov", [
    ({"fov": np.float32(90)}, 90), ({"focallength_px": np.float32(160)}, 90), ({}, 55),
    ({"intrinsics": np.array([[0.5, 0, 0.5], [0, 0.5 / 0.6, 0.5], [0, 0, 1]])}, 90), ({"intrinsics": np.eye(3)}, 55),
])  # fmt: skip
def test_what_stands_beside_a_depth_map(tmp_path, beside, fov):
    """The view that a depth network saw; the path's own, or the user's, count more."""
    np.savez(tmp_path / "d.npz", depth=np.ones((192, 320), np.float32), **beside)
    for path, user, degrees in ((STILL, None, fov), (replace(STILL, **square_lens(70)), None, 70), (STILL, (80.0,), 80)):
        _, geometry, _, words = given_scene(PICTURE, path, tmp_path / "d.npz", SIZE, user)
        seen = 2 * math.degrees(math.atan(geometry.depth.shape[1] / 2 / geometry.K[0, 0]))
        assert abs(seen - degrees) < 1e-3 and f"field of view {degrees:g} degrees" in words


def test_a_lens_for_the_network():
    """What Pi3X is told: the user's or the path's view, at the size of the video; nothing if neither says any."""
    assert known_lens(PICTURE, STILL, SIZE, None) == (None, "")
    K, words = known_lens(PICTURE, replace(STILL, **square_lens(70)), SIZE, None)
    check("Lens", K, pinhole(70, *SIZE), 1e-4)
    assert "field of view 70 degrees" in words


def test_visible_shares():
    said = describe_visible([1.0, 0.5, 0.001, 0.0], start=33)
    assert said == "visible: 37.5 % of the pixels, least 0 % in frame 36; 2 of 4 frames show nothing"
    assert describe_visible([1.0, 0.5]) == "visible: 75 % of the pixels, least 50 % in frame 1"


def test_paths_from_words():
    assert torch.equal(read_path(None, "forward 1").c2w, moves("forward 1").c2w)
    assert read_path(None, "sana:w-3").fps == 16 and len(read_path(DATA / "arc.json", None).c2w) > 2
    with pytest.raises(ValueError, match="--move 'worldplai:w-3': keys of 'worldplai', .*worldplay or sana"):
        read_path(None, "worldplai:w-3")
