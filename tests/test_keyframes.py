"""What Pi3X is told of keyframes, and which are chosen: by the points that they show of the coming views."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from goldens import check
from told import small_pi3x

import memory
import render
from files import media
from geometry import coverage, surface
from geometry.camera import move_path
from memory import Memory

DATA = Path(render.__file__).parent / "data"
SIZE = (64, 96)
LENS = torch.tensor([[160.0, 0, 79.5], [0, 160, 79.5], [0, 0, 1]])  # of views of 160x160, which are 10x10 cells


@pytest.fixture(scope="module")
def plane():
    """A picture on a plane at depth 1."""
    return surface.place(media.load_image(DATA / "plaza.png"), None, 60, SIZE, limit=11_760)


@pytest.fixture(scope="module")
def network():
    return small_pi3x()


def wall(left: float, right: float, depth: float = 5.0) -> torch.Tensor:
    """Points [20, 20, 3] of an upright wall; a view of 160x160 from the origin shows 5 of it at depth 5."""
    across = torch.linspace(left, right, 20).expand(20, 20)
    return torch.stack([across, torch.linspace(-2.4, 2.4, 20)[:, None].expand(20, 20), torch.full((20, 20), depth)], -1)


# ---- coverage


def test_the_nearest_point_of_a_cell():
    points = torch.tensor([[[0.0, 0, 5], [0, 0, 4], [0, 0, -3], [9, 0, 5], [torch.nan] * 3], [[-1.9, 1.9, 5]] * 5])
    shift = torch.eye(4)
    shift[2, 3] = 1
    depth = coverage.nearest(points[..., None, :], shift, LENS, (160, 160))
    assert depth.shape == (2, 10, 10) and depth.isfinite().sum((1, 2)).tolist() == [1, 1]
    assert depth[0].min() == 3 and depth[1, 9, 0] == 4


def test_points_from_where_a_picture_stands(plane):
    """Whatever world its geometry is in; what is not valid has none."""
    pose, world = move_path("forward 1 + yaw 30")[-1], move_path("right 3 + yaw -50")[-1]
    geometry = replace(plane[1], valid=plane[1].valid.clone())
    geometry.valid[:8] = False
    moved = replace(geometry, c2w=world, points=torch.stack(surface.transform(world, *geometry.points.unbind(-1)), -1))
    points = coverage.thin(moved, pose)
    expected = torch.stack(surface.transform(pose, *geometry.points.unbind(-1)), -1)[::8, ::8]
    assert points[0].isnan().all() and not points[1:].isnan().any()
    check("Thinned points", points[1:], expected[1:], 1e-5)


def test_a_picture_whose_depth_is_not_known_yet():
    """It stands before the wall that another saw, and where none saw anything that has the wall's depth too."""
    shift = torch.eye(4)
    shift[2, 3] = 2
    found = coverage.guess(wall(-1.3, 0)[None], shift, LENS, (160, 160))
    assert found.shape == (20, 20, 3)
    check("Guessed depth", found[..., 2], torch.full((20, 20), 5.0), 1e-5)
    check("Guessed reach", found[10, :, 0], torch.linspace(-1.42, 1.42, 20), 0.05)


@pytest.mark.parametrize("coming, chosen", [(0.0, [0, 2, 5]), (10.0, [0, 3, 5]), (-30.0, [0, 4, 5])])
def test_the_choice_covers_what_comes(coming, chosen):
    """Of walls along a line the one before the coming view; of those that show nothing of it the latest."""
    points = torch.stack([wall(20, 25), wall(-8, -3), wall(-3, 3), wall(7, 13), wall(30, 35), wall(0, 0) * torch.nan])
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[0, 0, 3], poses[1, 0, 3] = 60, coming
    assert coverage.choose(points, poses, LENS.expand(2, 3, 3), (160, 160), 3) == chosen


def test_what_is_hidden_or_covered_already_does_not_count():
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[0, 0, 3] = 60
    nothing, left, left_behind = wall(20, 25), wall(-1.5, 0, 4.0), wall(-4.8, 0.8, 8.0)
    points = torch.stack([nothing, left, left_behind, nothing, nothing * torch.nan])
    assert coverage.choose(points, poses, LENS.expand(2, 3, 3), (160, 160), 3) == [0, 1, 4]
    points = torch.stack([left, left, wall(1, 2.4, 4.0), nothing, nothing * torch.nan])
    assert coverage.choose(points, poses, LENS.expand(2, 3, 3), (160, 160), 3) == [0, 2, 4]
    assert coverage.choose(points, poses, LENS.expand(2, 3, 3), (160, 160), 9) == [0, 1, 2, 3, 4]


# ---- what the network is told


def told(network) -> Mock:
    """The network, and what it was called with."""
    return Mock(side_effect=network, image_mean=network.image_mean, config=network.config)


def walk(camera: Memory, image: torch.Tensor, parts: list[torch.Tensor | None]) -> list[render.Warp]:
    """The warps along `parts`, after each of which a picture is remembered, each another; None: a chunk without one."""
    warps = []
    for index, part in enumerate(parts):
        warps += [] if part is None else [camera.warp(part)]
        camera.remember(image.roll(index + 1, dims=-1))
    return warps


def test_the_network_is_told_where_the_keyframes_stand(network, plane):
    """The first pose of all, and the last of each chunk, in the unit of the geometry."""
    path = move_path("right 1 + yaw 10, forward 2, up 1, left 3")
    watched = told(network)
    camera = Memory(lambda: watched, plane[0], SIZE, keyframes=3, unit=0.5, limit=4704, known_poses=True)
    walk(camera, plane[0], [*path.split(33)])
    given = [call.args[1] for call in watched.call_args_list]
    assert [each.has_pose.tolist() for each in given] == [[[False]], [[True] * 2], [[True] * 3], [[True] * 3]]
    for each, frames in zip(given[1:], ([0, 32], [0, 32, 65], [0, 65, 98])):
        expected = path[frames].clone()
        expected[:, :3, 3] *= 0.5
        check("Told poses", each.c2w, expected[None], 0)
    images = watched.call_args.args[0]
    assert not torch.equal(network(images, given[-1]).c2w, network(images).c2w)


def test_what_is_not_told_changes_nothing(network, plane):
    """By default the network is told nothing, so that one without the tensors for it does the same."""
    plain = replace(network.config, given=())
    less = type(network)(plain).requires_grad_(False)
    less.load_state_dict({name: value for name, value in network.state_dict().items() if name in less.state_dict()})
    path, watched = [*move_path("right 1, forward 2").split(33)], told(network)
    made = [walk(Memory(lambda: each, plane[0], SIZE, keyframes=2, limit=4704), plane[0], path)[1].frames
            for each in (watched, less)]
    assert torch.equal(*made) and all(call.args[1] is None for call in watched.call_args_list)
    with pytest.raises(ValueError, match="loaded without what it takes to be told poses"):
        Memory(lambda: less, plane[0], SIZE, keyframes=2, limit=4704, known_poses=True)


def test_after_a_chunk_without_a_warp_the_way_is_not_known(network, plane):
    """Only the cameras since then are told; the first of them stands for the others, which are masked."""
    path, watched = move_path("right 1, forward 2, up 1"), told(network)
    camera = Memory(lambda: watched, plane[0], SIZE, unit=1.0, limit=4704, known_poses=True)
    walk(camera, plane[0], [path[:33], None, path[33:66], path[66:]])
    given = watched.call_args.args[1]
    assert given.has_pose.tolist() == [[False, False, True, True]]
    check("Told poses", given.c2w, path[[32, 32, 32, 65]][None], 0)


# ---- the choice in a rollout


def looking_round(monkeypatch, plane) -> list[list[torch.Tensor]]:
    """Every keyframe shows a plane at depth 1; returns what is estimated together, call by call."""
    seen, smooth = [], memory.smooth_focals

    def estimated(network, images, limit, known):
        seen.append(images)
        return [plane[1] for _ in images]

    def smoothed(geometries, zooms):
        assert len(geometries) == len(zooms)
        return smooth(geometries, zooms)

    monkeypatch.setattr(memory, "estimate", estimated)
    monkeypatch.setattr(memory, "smooth_focals", smoothed)
    return seen


ROUND = ", ".join(["yaw 45"] * 8 + ["yaw 20"])  # round, and on into what was seen first


def indices(images: list[torch.Tensor], camera: Memory) -> list[int]:
    return [next(index for index, kept in enumerate(camera.images) if kept is image) for image in images]


@pytest.mark.parametrize("choice, kept, last", [("latest", 4, [0, 1, 2, 3]), ("covering", 9, [0, 1, 7, 8])])
def test_looking_round(monkeypatch, plane, choice, kept, last):
    """Back at the start the frame of the first chunk, at 45 degrees, shows more of what comes than the latest ones."""
    seen, path = looking_round(monkeypatch, plane), move_path(ROUND).split(33)
    camera = Memory(Mock(), plane[0], SIZE, keyframes=4, choice=choice)
    walk(camera, plane[0], [*path[:8]])
    count = len(camera.images)
    camera.warp(path[8])
    assert indices(seen[-1], camera) == last and (kept, count) == ((4, 4) if choice == "latest" else (9, 9))


def test_few_keyframes_are_all_taken(monkeypatch, plane):
    """As long as there is nothing to choose, both ways are the same."""
    looking_round(monkeypatch, plane)
    path = [*move_path("yaw 30, forward 1, yaw 10").split(33)]
    made = [walk(Memory(Mock(), plane[0], SIZE, keyframes=3, choice=choice), plane[0], path)
            for choice in memory.CHOICES]
    assert all(torch.equal(one.frames, other.frames) for one, other in zip(*made))
    for keyframes, kept in ((None, 4), (2, 2), (1, 1)):
        for choice in memory.CHOICES:
            camera = Memory(Mock(), plane[0], SIZE, keyframes=keyframes, choice=choice)
            walk(camera, plane[0], path)
            assert len(camera.images) == kept


@pytest.mark.parametrize("known_poses", [False, True])
def test_a_choice_goes_on_from_its_state(network, plane, known_poses):
    """One that takes over after any chunk makes the same warps."""
    path = move_path("yaw 45, yaw 45, yaw 45, yaw -80, yaw 10").split(33)

    def new() -> Memory:
        return Memory(lambda: network, plane[0], SIZE, keyframes=3, limit=4704, known_poses=known_poses,
                      choice="covering")

    whole = new()
    for index, part in enumerate(path):
        other = new()
        other.restore({name: value.clone() for name, value in whole.state().items()})
        (expected,), (actual,) = (walk(each, plane[0].roll(index, dims=-2), [part]) for each in (whole, other))
        assert torch.equal(actual.frames, expected.frames)
        assert all(torch.equal(value.nan_to_num(), whole.state()[name].nan_to_num())
                   for name, value in other.state().items())
