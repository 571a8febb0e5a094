"""How cameras stand to each other: sets of pictures fit together, what may not change is held, pairs are measured."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_mini_geometry import TINY

from geometry.camera import inverse
from geometry.pi3x import Pi3X, load_pi3x
from geometry.surface import unproject
from mini import cameras, geometry, world
from mini.cameras import (
    TRAINED,
    VIEWS,
    WEIGHTS,
    Sets,
    clip_pair,
    degrees,
    draw_scene,
    draw_scenes,
    evaluate,
    losses,
    match_loss,
    matches,
    pick,
    plain_pairs,
    train,
)
from mini.geometry import INPUT, MIRROR, camera_losses, export, stretched
from mini.pretrain import HELD_OUT, Recipe

FOUR = replace(TINY, decoder_blocks=4)  # of which the last sees all pictures, and matches them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four scenes, and a small network of a seed."""
    folder = tmp_path_factory.mktemp("cameras")
    draw_scenes(folder / "scenes.safetensors", 3, 4)
    draw_scenes(folder / "held-out.safetensors", HELD_OUT, 4)
    torch.manual_seed(0)
    network = Pi3X(FOUR)
    torch.nn.init.normal_(network.metric_token)
    save_file(network.state_dict(), folder / "start.safetensors")
    return folder


def test_a_scene_fits_together():
    """The points of one picture, seen from another's turned camera, have its depth where they are not hidden."""
    drawn = draw_scene(5)
    assert drawn["pictures"].shape == (VIEWS, *INPUT, 3) and drawn["pictures"].dtype == torch.uint8
    rng = world.Random(5)
    scene = world.make_scene(rng)
    world.make_path(scene, rng, 66), rng.random()
    K = stretched(rng.uniform(45, 85), INPUT)
    _, depth = world.render(scene, drawn["c2w"], K, INPUT, 1)
    assert torch.equal(depth[:, 3::7, 3::7].clamp(max=40), drawn["depth"].clamp(max=40))
    points = unproject(depth[0], K, drawn["c2w"][0])[depth[0].isfinite()]
    checked = 0
    for pose, there in zip(inverse(drawn["c2w"][1:]), depth[1:]):
        x, y, z = (points @ pose[:3, :3].T + pose[:3, 3]).unbind(-1)
        column, row = (x / z * K[0, 0] + K[0, 2]).round(), (y / z * K[1, 1] + K[1, 2]).round()
        inside = (z > 0.1) & (column >= 0) & (column < INPUT[1]) & (row >= 0) & (row < INPUT[0])
        seen = there[row[inside].long(), column[inside].long()]
        shown = z[inside] < 1.1 * seen
        assert ((z[inside] / seen - 1).abs() < 0.05)[shown].float().mean() > 0.9
        checked += int(shown.sum())
    assert checked > 10_000


def test_sets_are_of_one_scene_each(folder, monkeypatch):
    """Each picture is found again by its gray, as it is or mirrored: so are the cameras, in units of median depth."""
    monkeypatch.setattr(cameras, "PICTURES", 6)
    scenes, mirrored = load_file(folder / "scenes.safetensors"), []
    gray = scenes["pictures"].float().mean(-1).flatten(0, 1)  # [scenes * VIEWS, H, W]
    both = torch.stack([gray, gray.flip(-1)]).flatten(2)
    both = (both - both.mean(-1, keepdim=True)) / both.std(-1, keepdim=True)
    for seed in range(3):
        sets = pick(scenes, seed, 3)
        assert sets.images.shape == (2, 3, 3, *INPUT) and 0 <= sets.images.min() and sets.images.max() <= 1
        for images, c2w, seen, _ in zip(*sets):
            likeness = torch.einsum("fnp,vp->vfn", both, images.mean(1).flatten(1)).flatten(1)
            flips, views = likeness.argmax(1).div(len(gray), rounding_mode="floor"), likeness.argmax(1) % len(gray)
            assert len({*flips.tolist()}) == 1 and len({*(views // VIEWS).tolist()}) == 1 and len({*views.tolist()}) == 3
            true, depth = scenes["c2w"].flatten(0, 1)[views], scenes["depth"].flatten(0, 1)[views]
            true = MIRROR @ true @ MIRROR if flips[0] else true
            true[:, :3, 3] /= depth[depth.isfinite()].median()
            assert torch.allclose(c2w, true, atol=1e-6)
            assert torch.allclose(seen, (depth.flip(-1) if flips[0] else depth) / depth[depth.isfinite()].median())
            mirrored.append(int(flips[0]))
        assert torch.equal(pick(scenes, seed, 3).images, sets.images)
    assert 0 < sum(mirrored) < len(mirrored)


def test_matches(folder, monkeypatch):
    """A patch and what it is matched with have the same colour, much more than it and its place in the other picture;
    a picture beside itself matches itself; a head that looks there has no loss."""
    monkeypatch.setattr(cameras, "PICTURES", 8)
    pairs = pick(load_file(folder / "scenes.safetensors"), 1, 2)
    found = matches(pairs)
    whole = found.sum(-1) > 0.99
    colors = pairs.images.unfold(3, 14, 14).unfold(4, 14, 14).mean((-1, -2)).flatten(3)  # [B, 2, 3, P]
    there = torch.einsum("bnpq,bncq->bncp", found, colors.flip(1))
    errors = [(other - colors).abs().mean(2)[whole].mean() for other in (there, colors.flip(1))]
    assert whole.float().mean() > 0.2 and errors[0] < 0.6 * errors[1]
    same = Sets(*(x[:, :1].expand(-1, 2, *x.shape[2:]) for x in pairs[:3]), pairs.K)
    eye = torch.eye(found.shape[-1])
    assert torch.allclose(matches(same), eye * matches(same).sum(-1, keepdim=True), atol=1e-4)
    step = torch.eye(4).repeat(1, 2, 1, 1)  # before a wall, one patch to the right
    step[0, 1, 0, 3] = 14 * 3 / pairs.K[0, 0, 0]
    wall = matches(Sets(pairs.images[:1], step, torch.full_like(pairs.depth[:1], 3), pairs.K[:1]))
    wall = wall.unflatten(-1, (7, 11)).unflatten(-3, (7, 11))  # [1, 2, row, column, other's row, other's column]
    expected = torch.einsum("ik,jl->ijkl", torch.eye(7), torch.diag(torch.ones(10), -1))  # it moves to the left
    assert torch.allclose(wall[0, 0], expected, atol=1e-4) and torch.allclose(
        wall[0, 1], expected.permute(2, 3, 0, 1), atol=1e-4)
    codes = F.normalize(torch.randn(len(eye), 63, generator=torch.Generator().manual_seed(0)), dim=-1).repeat(2, 1)
    side = torch.tensor([1.0, -1.0]).repeat_interleave(len(eye))[:, None]
    q, itself, other = (torch.cat([codes, sign * side], dim=-1)[None, None].expand(len(found), 1, -1, -1) * 30
                        for sign in (1, 1, -1))
    monkeypatch.setattr(cameras, "rotate", lambda x, rope: x)
    block = mock.Mock()
    for k, right in ((other, True), (itself, False)):
        block.attn.heads.return_value = q, k, None
        assert (match_loss(block, q[:, 0], q, same) < 0.01) == right


def test_what_is_kept(folder, monkeypatch):
    """Compared with itself nothing has changed; each change is seen by its own loss; without pairs there are no poses."""
    monkeypatch.setattr(cameras, "PICTURES", 2)
    sets = pick(load_file(folder / "scenes.safetensors"), 0, 2)
    before = load_pi3x(folder / "start.safetensors")
    with torch.no_grad():
        parts = losses(load_pi3x(folder / "start.safetensors"), before, sets)
        assert set(parts) == set(WEIGHTS) and parts["point"] == parts["conf"] == parts["metric"] == 0 < parts["turn"]
        assert set(losses(before, before, Sets(*(x[:, :1] for x in sets)))) == {"point", "conf", "metric"}
        assert set(losses(before, None, sets)) == {"turn", "place", "hand", "match"}
        for name in ("point", "conf", "metric"):
            changed = load_pi3x(folder / "start.safetensors")
            layer = changed.metric_head if name == "metric" else getattr(changed, f"{name}_decoder").linear_out
            layer.bias.add_(torch.ones_like(layer.bias))
            found = losses(changed, before, sets)
            assert {key for key in ("point", "conf", "metric") if found[key] > 0} == {name}
        assert found["metric"].item() == pytest.approx(1, abs=1e-5)


def test_training_goes_on_and_exports(folder, monkeypatch, tmp_path):
    """What is trained moves and nothing else does; two steps are one and one; the averaged weights are exported."""
    monkeypatch.setattr(cameras, "PICTURES", 4)
    states = []
    for name, stops in (("whole", (2,)), ("parts", (1, 2))):
        (tmp_path / name).mkdir()
        for file in ("scenes", "held-out"):
            (tmp_path / name / f"{file}.safetensors").symlink_to(folder / f"{file}.safetensors")
        for steps in stops:
            train(tmp_path / name, folder / "start.safetensors", Recipe(steps, 1, every=1))
        states.append(load_file(tmp_path / name / "cameras.safetensors"))
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], atol=1e-6), name
    start = load_file(folder / "start.safetensors")
    moved = {name for name, tensor in start.items() if not torch.equal(tensor, states[0][f"network.{name}"])}
    assert moved == {name for name in start if name.startswith(TRAINED)}
    log = (tmp_path / "whole" / "cameras.jsonl").read_text().splitlines()
    assert len(log) == 2 and all(f'"{name}"' in log[-1] for name in (*WEIGHTS, "degrees"))
    export(tmp_path / "whole" / "cameras.safetensors", tmp_path / "out" / "model.safetensors")
    network = load_pi3x(tmp_path / "out" / "model.safetensors")
    for name, p in network.named_parameters():
        assert torch.equal(p, states[0][f"average.{name}"].half().float()), name


@pytest.mark.parametrize("knows", [True, False])
def test_pairs_are_measured(folder, monkeypatch, capsys, knows):
    """Who knows the cameras, in a world of his own, has no error; who guesses no motion is wrong by all of it."""
    scenes = load_file(folder / "held-out.safetensors")
    asked, world_pose = [], world.poses(torch.randn(1, 3), *torch.randn(3, 1))

    class Stub:
        def branches(self, images):
            c2w = world_pose @ asked.pop(0).flatten(0, 1) if knows else torch.eye(4).expand(2 * len(images), 4, 4)
            return None, None, c2w[:, :3, :3].flatten(1), c2w[:, :3, 3], None

    measure = cameras.errors_of_pairs

    def measured(network, images, c2w):
        asked.append(c2w)
        return measure(network, images, c2w)

    monkeypatch.setattr(cameras, "errors_of_pairs", measured)
    table = evaluate(Stub(), scenes, range(HELD_OUT, HELD_OUT + 2))
    assert set(table) == {"all", "0 to 5 degrees", "5 to 10 degrees", "10 to 20 degrees", "20 to 30 degrees",
                          "30 to 60 degrees", "two frames of a clip"}
    for name, row in table.items():
        if row["turn"] == row["turn"]:  # not nan: there are such pairs
            wanted = (0, 0) if knows else (row["turn"], row["shift"])
            assert (row["error"], row["shift error"]) == pytest.approx(wanted, abs=0.1), name
    out = capsys.readouterr().out
    assert table["all"]["turn"] > 1 and table["all"]["shift"] > 0.01
    assert "| all | 60 |" in out and "| two frames of a clip | 2 |" in out


def test_units_of_pairs(folder):
    """All pairs of a scene's pictures, each in units of its own median depth."""
    scenes = load_file(folder / "held-out.safetensors")
    images, c2w = plain_pairs(scenes)[1]
    assert images.shape == (15, 2, 3, *INPUT)
    assert torch.equal(images[14, 1], scenes["pictures"][1, 5].permute(2, 0, 1) / 255)
    depth = scenes["depth"][1, [4, 5]]
    true = scenes["c2w"][1, [4, 5]]
    true[:, :3, 3] /= depth[depth.isfinite()].median()
    assert torch.allclose(c2w[14], true, atol=1e-5)
    views = geometry.draw_views(HELD_OUT, 2)
    moved = (views.c2w[0, 0, :3, 3] - views.c2w[0, 1, :3, 3]) / views.depth[views.depth.isfinite()].median()
    c2w = clip_pair(HELD_OUT)[1][0]
    assert torch.allclose(c2w[0, :3, 3] - c2w[1, :3, 3], moved, atol=1e-5)


def test_degrees():
    turns = world.poses(torch.zeros(3, 3), torch.tensor([0.0, 0.5, -1.0]), *torch.zeros(2, 3))[:, :3, :3]
    assert degrees(turns).tolist() == pytest.approx([0, 28.648, 57.296], abs=0.05)


def test_a_reflection_is_seen():
    """Reflected cameras stand to each other as before: only the loss of the hand tells them from right ones."""
    c2w = world.poses(torch.randn(2, 3), *torch.randn(3, 2))[None]
    for mirror in (MIRROR, -torch.eye(4)):
        parts = camera_losses(mirror @ c2w, c2w)
        assert parts["turn"] < 1e-5 and parts["place"] < 1e-5 and parts["hand"] > 0.1
    assert camera_losses(world.poses(torch.ones(1, 3), *torch.ones(3, 1)) @ c2w, c2w)["hand"] < 1e-5
