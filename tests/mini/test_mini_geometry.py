"""The miniature's geometry: rendered pictures fit together, each loss sees its own mistake, what is trained loads."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from geometry.camera import inverse
from geometry.pi3x import Branch, Pi3X, Pi3XConfig, Prediction, load_pi3x
from geometry.surface import estimate, focal_from_rays, pinhole
from mini import geometry, world
from mini.geometry import (
    INPUT,
    SIZE,
    WEIGHTS,
    Views,
    draw_views,
    evaluate,
    export,
    losses,
    train,
)
from mini.pretrain import HELD_OUT, Recipe

TINY = Pi3XConfig(dim=64, grid=9, registers=1, specials=1, encoder_blocks=1, encoder_hidden=32, decoder_blocks=2,
                  decoder_hidden=32, point=Branch(64, 1, 32, 16), conf=Branch(64, 1, 32, 16),
                  camera=Branch(64, 1, 32, 16), metric=Branch(64, 1, 32, 16),
                  point_head=((16, 0),), conf_head=((16, 0),))  # fmt: skip
MIRROR = torch.diag(torch.tensor([-1.0, 1, 1, 1]))


def solution(views: Views, unit: float = 1.0) -> Prediction:
    """The true geometry, with the sky 100 m away; where cameras stand is not asked."""
    depth = views.depth.clamp(max=100)
    local = torch.cat([views.slopes.expand(*depth.shape, 2), torch.ones_like(depth)[..., None]], -1) * depth[..., None]
    confidence = torch.where(views.depth.isfinite(), 9.0, -9.0)
    c2w = torch.eye(4).expand(*depth.shape[:2], 4, 4)
    return Prediction(local, local, F.normalize(local, dim=-1), confidence, c2w, torch.full((len(depth),), unit))


def median(views: Views) -> float:
    return views.depth[views.depth.isfinite()].median().item()


@pytest.mark.parametrize("seed", range(6))  # some of them mirrored, in rooms and under the sky
def test_pictures_of_a_set_fit_together(seed):
    """The points of one picture, seen from the other's camera, have its depth where they are not hidden."""
    with mock.patch.object(world, "render", wraps=world.render) as drawn:
        views = draw_views(seed, 2)
    scene, c2w, *shape = next(call.args for call in drawn.call_args_list if INPUT in call.args)
    if not world.render(scene, c2w, *shape)[1].where(views.depth[0].isfinite(), torch.inf).equal(views.depth[0]):
        c2w = MIRROR @ c2w @ MIRROR
    assert views.images.shape == (1, 2, 3, *INPUT) and 0 <= views.images.min() and views.images.max() <= 1
    pose = inverse(c2w[1]) @ c2w[0]
    x, y, z = (solution(views).points[0, 0] @ pose[:3, :3].T + pose[:3, 3]).unbind(-1)
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
    assert [draw_views(3, 1)[index].equal(draw_views(3, 1)[index]) for index in range(3)] == [True] * 3
    assert not draw_views(3, 1).images.equal(draw_views(4, 1).images)


def test_the_truth_has_no_loss():
    views = draw_views(1, 3)
    parts = losses(solution(views, median(views)), views)
    assert set(parts) == set(WEIGHTS) and all(part < 2e-4 for part in parts.values()), parts


def test_each_loss_sees_its_own_mistake():
    """Lengths are compared in the network's own unit, so that a wrong unit is wrong once."""
    sets = (draw_views(seed, 2) for seed in range(100))
    views = next(v for v in sets if 0 < v.depth.isinf().float().mean() < 0.1)
    right = solution(views, median(views))

    def wrong(**changes) -> dict[str, float]:
        parts = losses(replace(right, **changes), views)
        return {name: round(part.item(), 2) for name, part in parts.items() if part > 1e-3}

    stripes = torch.ones(INPUT[1])
    stripes[::2] = 1.02
    sky = views.depth.isinf()[..., None]
    assert wrong() == {}
    assert wrong(metric=2 * right.metric, local_points=2 * right.local_points) == {"unit": 0.69}
    assert wrong(local_points=1.05 * right.local_points) == {"depth": 0.05}
    assert wrong(local_points=right.local_points * stripes[:, None]) == {"depth": 0.01, "edges": 0.02}
    assert wrong(local_points=right.local_points * stripes[: INPUT[0], None, None]) == {"depth": 0.01, "edges": 0.02}
    assert wrong(local_points=right.local_points * torch.tensor([1.1, 1, 1])).keys() == {"rays"}
    assert wrong(local_points=torch.where(sky, 3 * right.local_points, right.local_points)) == {}  # that depth is free
    assert wrong(confidence=torch.full_like(right.confidence, 9.0)).keys() == {"confidence"}


def test_training_goes_on_and_exports(tmp_path, monkeypatch):
    """Every weight learns but the cameras'; two steps are one and one; what is exported are the averaged weights, and
    training can begin there."""
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
        learns = "camera" not in name
        assert torch.equal(start, trained) != learns and torch.equal(trained, average) != learns, name
        assert torch.equal(network.get_parameter(name), average.half().float()), name
    train(tmp_path / "on", Recipe(1, 1, lr=1e-12, every=1), tmp_path / "mini" / "model.safetensors")
    state = load_file(tmp_path / "on" / "geometry.safetensors")
    for name, start in network.named_parameters():
        assert torch.allclose(state[f"network.{name}"], start, atol=1e-6), name


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
    views = Views(torch.zeros(1), depth[None], slopes[None, None])

    def perfect(images, known=None):
        truth = solution(views)
        return replace(truth, points=scale * truth.points, local_points=scale * truth.local_points)

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
