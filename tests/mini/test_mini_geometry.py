"""The miniature's geometry: rendered pictures fit together, each loss sees its own mistake, what is trained loads."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from geometry.camera import inverse, move_path
from geometry.heads import nearest_rotation
from geometry.pi3x import Branch, Pi3X, Pi3XConfig, Prediction, load_pi3x
from geometry.surface import estimate, focal_from_rays, pinhole
from mini import geometry, world
from mini.geometry import (
    INPUT,
    MIRROR,
    SIZE,
    WEIGHTS,
    Views,
    camera_losses,
    draw_views,
    evaluate,
    export,
    losses,
    seen_from_each,
    train,
    unit_rows,
)
from mini.pretrain import HELD_OUT, Recipe
from mini.world import poses

TINY = Pi3XConfig(dim=64, grid=9, registers=1, specials=1, encoder_blocks=1, encoder_hidden=32, decoder_blocks=2,
                  decoder_hidden=32, point=Branch(64, 1, 32, 16), conf=Branch(64, 1, 32, 16),
                  camera=Branch(64, 1, 32, 16), metric=Branch(64, 1, 32, 16),
                  point_head=((16, 0),), conf_head=((16, 0),))  # fmt: skip


def solution(views: Views, unit: float = 1.0) -> Prediction:
    """The true geometry, with the sky 100 m away, in a world of its own."""
    world_pose = move_path("orbit 50", 2)[1] @ move_path("right 3", 2)[1]
    depth = views.depth.clamp(max=100)
    local = torch.cat([views.slopes, torch.ones_like(views.slopes[..., :1])], -1) * depth[..., None]
    c2w = world_pose @ views.c2w
    points = torch.einsum("bnij,bnhwj->bnhwi", c2w[..., :3, :3], local) + c2w[:, :, None, None, :3, 3]
    confidence = torch.where(views.depth.isfinite(), 9.0, -9.0)
    return Prediction(points, local, F.normalize(local, dim=-1), confidence, c2w, torch.full((len(depth),), unit))


def median(views: Views) -> float:
    return views.depth[views.depth.isfinite()].median().item()


@pytest.mark.parametrize("seed", range(6))  # some of them mirrored, in rooms and under the sky
def test_pictures_of_a_set_fit_together(seed):
    """The points of one picture, seen from the other's camera, have its depth where they are not hidden."""
    views = draw_views(seed, 2)
    assert views.images.shape == (1, 2, 3, *INPUT) and 0 <= views.images.min() and views.images.max() <= 1
    first = solution(views).points[0, 0]
    pose = inverse(solution(views).c2w[0, 1])
    x, y, z = (first @ pose[:3, :3].T + pose[:3, 3]).unbind(-1)
    K = focal_from_rays(solution(views).local_points[0, 1])
    column, row = (x / z * K[0, 0] + K[0, 2]).round(), (y / z * K[1, 1] + K[1, 2]).round()
    height, width = INPUT
    inside = views.depth[0, 0].isfinite() & (z > 0.1) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    there = views.depth[0, 1][row[inside].long(), column[inside].long()]
    hidden = z[inside] > 1.1 * there
    assert inside.float().mean() > 0.15
    agree = ((z[inside] / there - 1).abs() < 0.05)[~hidden].float().mean()
    assert agree > 0.9, f"{agree:.2f} of {inside.sum()} pixels"


def test_pictures_are_those_of_inference():
    """As `estimate` shows a video's frame, and as many pixels; the focal lengths are stretched with it."""
    network = Pi3X(TINY)
    with mock.patch.object(network, "forward", wraps=network.forward) as seen:
        estimate(network, [torch.zeros(1, 3, *SIZE)])
    assert seen.call_args.args[0].shape == (1, 1, 3, *INPUT)
    video, K = pinhole(60, *SIZE), geometry.stretched(60, INPUT)
    for axis, side in ((0, 1), (1, 0)):
        assert torch.allclose(K[axis, axis] / INPUT[side], video[axis, axis] / SIZE[side])
    assert torch.equal(geometry.stretched(60, SIZE), video)
    assert [draw_views(3, 1)[index].equal(draw_views(3, 1)[index]) for index in range(4)] == [True] * 4
    assert not draw_views(3, 1).images.equal(draw_views(4, 1).images)


def test_the_truth_has_no_loss():
    views = draw_views(1, 3)
    parts = losses(solution(views, median(views)), views)
    assert set(parts) == set(WEIGHTS) and all(part < 2e-4 for part in parts.values()), parts
    assert set(losses(solution(draw_views(1, 1)), draw_views(1, 1))) == set(WEIGHTS) - {"turn", "place", "hand"}


def test_each_loss_sees_its_own_mistake():
    """Lengths are compared in the network's own unit, so that a wrong unit is wrong once."""
    sets = (draw_views(seed, 2) for seed in range(100))
    views = next(v for v in sets if 0 < v.depth.isinf().float().mean() < 0.1
                 and (v.c2w[0, 0] - v.c2w[0, 1])[:3, 3].norm() > 0.5)
    right = solution(views, median(views))

    def wrong(**changes) -> dict[str, float]:
        parts = losses(replace(right, **changes), views)
        return {name: round(part.item(), 2) for name, part in parts.items() if part > 1e-3}

    twice = right.c2w.clone()
    twice[..., :3, 3] *= 2
    stripes = torch.ones(INPUT[1])
    stripes[::2] = 1.02
    sky = views.depth.isinf()[..., None]
    turn, step = move_path("yaw 10", 2), move_path("right 1", 2)
    assert wrong() == {}
    assert wrong(metric=2 * right.metric, local_points=2 * right.local_points, c2w=twice) == {"unit": 0.69}
    assert wrong(local_points=1.05 * right.local_points) == {"depth": 0.05}
    assert wrong(local_points=right.local_points * stripes[:, None]) == {"depth": 0.01, "edges": 0.02}
    assert wrong(local_points=right.local_points * stripes[: INPUT[0], None, None]) == {"depth": 0.01, "edges": 0.02}
    assert wrong(local_points=right.local_points * torch.tensor([1.1, 1, 1])).keys() == {"rays"}
    assert wrong(local_points=torch.where(sky, 3 * right.local_points, right.local_points)) == {}  # that depth is free
    assert wrong(c2w=right.c2w @ turn).keys() == {"turn", "place"}
    assert wrong(c2w=right.c2w @ step).keys() == {"place"}
    assert wrong(c2w=turn[1] @ step[1] @ right.c2w) == {}  # so is the world
    assert wrong(c2w=geometry.MIRROR @ right.c2w).keys() == {"hand"}
    assert wrong(confidence=torch.full_like(right.confidence, 9.0)).keys() == {"confidence"}


def test_training_goes_on_and_exports(tmp_path, monkeypatch):
    """Every weight learns; two steps are one and one; what is exported are the averaged weights."""
    monkeypatch.setattr(geometry, "CONFIG", TINY)
    monkeypatch.setattr(geometry, "PICTURES", 3)
    states = []
    for name, stops in (("whole", (2,)), ("parts", (1, 2))):
        for steps in stops:
            train(tmp_path / name, Recipe(steps, 1, every=1))
        states.append(load_file(tmp_path / name / "geometry.safetensors"))
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], atol=1e-6), name
    log = (tmp_path / "whole" / "geometry.jsonl").read_text().splitlines()
    assert len(log) == 2 and all(f'"{name}"' in log[-1] for name in WEIGHTS)
    export(tmp_path / "whole" / "geometry.safetensors", tmp_path / "mini" / "model.safetensors")
    network = load_pi3x(tmp_path / "mini" / "model.safetensors")
    assert network.config == TINY
    torch.manual_seed(0)
    for name, start in Pi3X(TINY).named_parameters():
        trained, average = states[0][f"network.{name}"], states[0][f"average.{name}"]
        assert not torch.equal(start, trained), f"{name} has not moved"
        assert not torch.equal(trained, average), name
        assert torch.equal(network.get_parameter(name), average.half().float()), name


def test_evaluation_of_a_perfect_network(monkeypatch, capsys):
    """The truth at the network's size warps almost like the exact depth, in any unit; a wrong one is found out."""
    clip = world.make_clip(HELD_OUT + 11, 33, SIZE)
    fov_x = 2 * torch.atan(SIZE[1] / 2 / clip.K[0, 0]).rad2deg().item()
    K, scale = geometry.stretched(fov_x, INPUT), 1.0
    rng = world.Random(HELD_OUT + 11)
    scene = world.make_scene(rng)
    path = world.make_path(scene, rng, 33)
    _, depth = world.render(scene, path[:1], K, INPUT)
    slopes = geometry.render.unproject(torch.ones(INPUT), K, torch.eye(4))[..., :2]
    depth = depth.where(depth < geometry.HAZE, torch.inf)
    views = Views(torch.zeros(1), depth[None], slopes[None, None], torch.eye(4).expand(1, 1, 4, 4))

    def perfect(images, known=None):
        truth = solution(views)
        return replace(truth, points=scale * truth.local_points, local_points=scale * truth.local_points, c2w=views.c2w)

    network = mock.Mock(side_effect=perfect, image_mean=torch.zeros(1), config=geometry.CONFIG)
    right = evaluate(network, range(HELD_OUT + 11, HELD_OUT + 12))
    assert right["depth, in meters"] < 0.05 and right["focal length"] < 1e-4 and right["kept"] > 0.98
    assert right["kept of the sky"] < 0.1 and right["PSNR, estimate"] > right["PSNR, exact"] - 5
    assert right["PSNR, estimate"] == pytest.approx(right["PSNR, in meters"], abs=1)
    scale = 2.0
    twice = evaluate(network, range(HELD_OUT + 11, HELD_OUT + 12))
    assert twice["depth, in meters"] == pytest.approx(1, abs=0.06) and twice["depth"] == pytest.approx(right["depth"])
    assert twice["PSNR, estimate"] == pytest.approx(right["PSNR, estimate"], abs=0.3)
    assert twice["PSNR, in meters"] < right["PSNR, in meters"] - 1
    assert "| focal length | 0.000 |" in capsys.readouterr().out


def test_the_shape_that_is_trained_can_be_loaded():
    """Its last levels are narrower than a group of channels, which matters to residual blocks only."""
    with torch.device("meta"):
        network = Pi3X(geometry.CONFIG)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert Pi3XConfig.from_shapes(shapes) == geometry.CONFIG


def test_rotations_in_training():
    """What stands for the nearest rotation is the same at one, and has a gradient there, which an SVD hasn't."""
    turns = poses(torch.randn(5, 3), *torch.randn(3, 5))[:, :3, :3]
    nine = turns.flatten(1).requires_grad_()
    assert torch.allclose(unit_rows(nine), nearest_rotation(nine), atol=1e-5)
    unit_rows(nine).square().mul(torch.rand(5, 3, 3)).sum().backward()
    assert nine.grad.isfinite().all() and nine.grad.abs().max() < 10
    c2w = poses(torch.randn(2, 3), *torch.randn(3, 2))[None]
    moved = poses(torch.randn(1, 3), *torch.randn(3, 1)) @ c2w
    for one, other in zip(seen_from_each(c2w), seen_from_each(moved)):
        assert torch.allclose(one, other, atol=1e-5)
    turn, place = seen_from_each(c2w)
    expected = torch.linalg.inv(c2w[0, 0]) @ c2w[0, 1]
    assert torch.allclose(turn[0, 0, 1], expected[:3, :3], atol=1e-5)
    assert torch.allclose(place[0, 0, 1], expected[:3, 3], atol=1e-5)
    assert torch.allclose(turn[0, 0, 0], torch.eye(3), atol=1e-5) and place[0, 0, 0].abs().max() < 1e-6


def test_no_svd_in_training(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(geometry, "CONFIG", TINY)
    monkeypatch.setattr(geometry, "PICTURES", 3)
    monkeypatch.setattr(geometry, "fit", lambda network, *rest: seen.append(network))
    train(tmp_path, Recipe(1, 1))
    assert seen[0].rotation is unit_rows and Pi3X(TINY).rotation is nearest_rotation


def test_a_reflection_is_seen():
    """Reflected cameras stand to each other as before: only the loss of the hand tells them from right ones."""
    c2w = poses(torch.randn(2, 3), *torch.randn(3, 2))[None]
    for mirror in (MIRROR, -torch.eye(4)):
        parts = camera_losses(mirror @ c2w, c2w)
        assert parts["turn"] < 1e-5 and parts["place"] < 1e-5 and parts["hand"] > 0.1
    assert camera_losses(poses(torch.ones(1, 3), *torch.ones(3, 1)) @ c2w, c2w)["hand"] < 1e-5
