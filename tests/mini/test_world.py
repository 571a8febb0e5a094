"""The miniature's world: determinism, cameras, exact depth, captions, and agreement with the repository's renderer."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from einops import rearrange
from goldens import check
from known import load_video

import clips
import render as splat
from files import media
from files.depth import load_depth
from geometry import camera, paths, surface
from mini import draw, surfaces, world

DATA = Path(__file__).parents[2] / "data"
SIZE = (64, 96)
SEEDS = range(300, 308)  # rooms and squares, some with moving things
VOCABULARY = {
    *world.COLORS, *filter(None, world.TONES), *filter(None, world.PATTERNS), "a", "an", "and", "ball", "between",
    "bounces", "box", "circle", "floor", "fro", "goes", "ground", "houses", "in", "room", "slides", "square", "the",
    "lamp", "table", "to", "turns", "with", "red", "toy", "car", "drives", "round", "roundabout",
}  # fmt: skip


def assert_rigid(c2w: torch.Tensor) -> None:
    """Rotations are orthonormal and no reflections, and all is finite."""
    turn = c2w[:, :3, :3].double()
    assert c2w.isfinite().all() and (turn @ turn.mT - torch.eye(3)).abs().max() < 1e-3
    assert (torch.linalg.det(turn) > 0).all()


def scene_and_path(seed: int, frames: int) -> tuple[world.Scene, torch.Tensor]:
    rng = Random(seed)
    scene = world.make_scene(rng)
    return scene, world.make_path(scene, rng, frames)


def first_seed(wanted, start: int = 0) -> int:
    return next(seed for seed in range(start, start + 200) if wanted(world.make_scene(Random(seed))))


def moving(scene: world.Scene) -> bool:
    return any(solid.motion is not None for solid in scene.solids)


def frozen(scene: world.Scene) -> world.Scene:
    return replace(scene, solids=tuple(replace(solid, motion=None) for solid in scene.solids))


def surface_distance(scene: world.Scene, points: torch.Tensor) -> torch.Tensor:
    """Meters [N] from points [N,3] to the nearest surface of a scene in which nothing moves, from either side."""
    width, height, depth = scene.extent
    x, y, z = points.double().unbind(-1)
    nearest = torch.minimum(y.abs(), torch.full_like(y, math.inf))
    if scene.room:
        nearest = torch.stack([nearest, (y + height).abs(), (x.abs() - width).abs(), (z.abs() - depth).abs()]).amin(0)
    for solid in scene.solids:
        cos, sin = math.cos(solid.yaw), math.sin(solid.yaw)
        axes = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=torch.float64)
        local = (points.double() - torch.tensor(solid.center, dtype=torch.float64)) @ axes
        if solid.shape == "ball":
            away = local.norm(dim=-1) - solid.half[0]
        else:
            gap = local.abs() - torch.tensor(solid.half)
            away = gap.clamp(min=0).norm(dim=-1) + gap.amax(-1).clamp(max=0)
        nearest = torch.minimum(nearest, away.abs())
    return nearest


def test_a_seed_is_one_clip():
    first, again, other = (world.make_clip(seed, 9, (32, 48)) for seed in (5, 5, 6))
    for name in ("frames", "depth", "c2w", "K"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert first.caption == again.caption != other.caption
    assert not torch.equal(first.c2w, other.c2w) and not torch.equal(first.frames, other.frames)
    assert first.frames.shape == (9, 32, 48, 3) and first.frames.dtype == torch.uint8
    assert first.depth.shape == (9, 32, 48) and first.depth.dtype == first.c2w.dtype == first.K.dtype == torch.float32


def test_intrinsics():
    views = []
    for seed in SEEDS:
        K = world.make_clip(seed, 1, (8, 12)).K
        assert K[0, 0] == K[1, 1] and K[:2, 2].tolist() == [5.5, 3.5]
        views.append(2 * math.degrees(math.atan2(12, 2 * K[0, 0].item())))
    assert 50 <= min(views) < max(views) - 5 and max(views) <= 80


@pytest.mark.parametrize("frames", [66, 99, 132])
def test_paths_are_smooth_and_keep_away(frames):
    lengths = []
    for seed in range(frames, frames + 8):
        scene, c2w = scene_and_path(seed, frames)
        assert c2w.shape == (frames, 4, 4)
        assert_rigid(c2w)
        steps = c2w.diff(dim=0)
        assert steps[:, :3, 3].norm(dim=-1).max() < 0.35, seed  # meters a frame
        assert steps.diff(dim=0)[:, :3].abs().max() < 0.06, seed  # no jerks, neither of position nor of direction
        assert world.clearance(scene, c2w[:, :3, 3]).min() >= world.CLEARANCE
        lengths.append(steps.norm())
    assert max(lengths) > 3 * min(lengths)  # slow ones and fast ones


def test_nothing_is_nearer_than_the_clearance():
    for seed in SEEDS:
        clip = world.make_clip(seed, 40, (24, 36))
        rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(36.0), indexing="ij")
        x, y = (columns - clip.K[0, 2]) / clip.K[0, 0], (rows - clip.K[1, 2]) / clip.K[1, 1]
        assert (clip.depth * (x**2 + y**2 + 1).sqrt()).min() > world.CLEARANCE - 1e-3, seed


def test_no_frame_is_all_wall():
    for seed in range(40):
        scene, c2w = scene_and_path(seed, 33)
        _, depth = world.render(scene, c2w[::8], surface.pinhole(60, 16, 24), (16, 24), samples=1)
        assert depth.flatten(1).median(-1).values.min() > 1.6, seed


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_is_exact(seed):
    scene, c2w = scene_and_path(seed, 20)
    scene, K = frozen(scene), surface.pinhole(65, *SIZE)
    _, depth = world.render(scene, c2w[::10], K, SIZE)
    for pose, z in zip(c2w[::10], depth):
        near = z < 30
        points = surface.unproject(torch.where(near, z, 1), K, pose)[near]
        away = surface_distance(scene, points)
        check("World depth: meters off the surfaces", away, torch.zeros_like(away), 1e-3)


def test_sky():
    for seed, room in ((first_seed(lambda scene: scene.room), True), (first_seed(lambda scene: not scene.room), False)):
        scene, c2w = scene_and_path(seed, 4)
        K = surface.pinhole(60, *SIZE)
        _, depth = world.render(replace(scene, solids=scene.solids[:1]), c2w, K, SIZE)
        down = surface.unproject(torch.ones(SIZE), K, c2w[0])[..., 1] - c2w[0, 1, 3]  # the rays' y
        sky = depth[0].isinf()
        assert sky.any() == (not room) and not (sky & (down > 1e-5)).any()


def test_only_what_can_be_seen_is_drawn(monkeypatch):
    for seed in SEEDS:
        scene, c2w = scene_and_path(seed, 33)
        K = surface.pinhole(75, 32, 48)
        frames, depth = world.render(scene, c2w[::8], K, (32, 48))
        with monkeypatch.context() as patch:
            whole = lambda places, *_: [[[0, 32, 0, 48]] * places.shape[1]] * len(places)
            patch.setattr(draw, "screen_boxes", whole)
            all_frames, all_depth = world.render(scene, c2w[::8], K, (32, 48))
        assert torch.equal(depth, all_depth), seed
        difference = (frames.int() - all_frames.int()).abs()  # rounding may pick a pattern's next number
        assert (difference > 1).float().mean() < 1e-3 and difference.max() < 60, seed


@pytest.mark.parametrize("kind", ["slide", "bounce", "circle", "turn"])
def test_things_move(kind):
    wanted = lambda scene: kind in [solid.motion.kind for solid in scene.solids if solid.motion is not None]
    scene = world.make_scene(Random(first_seed(wanted)))
    times = torch.arange(132, dtype=torch.float64)
    for solid in scene.solids:
        place = world.placed(solid, times)
        if solid.motion is None:
            assert torch.equal(place, place[:1].expand_as(place))
            continue
        assert place.diff(dim=0).norm() > 0.1
        if solid.motion.kind == "circle":
            away = (place[:, [0, 2]] - torch.tensor(solid.motion.axis)).norm(dim=-1)
            assert away.max() - away.min() < 1e-6 and away.min() > 0.4
        turned = place[:, 3].max() - place[:, 3].min()
        assert (turned > 1) == (solid.motion.kind in ("circle", "turn"))
        assert place[:, 1].max() <= -solid.half[1] + 1e-6  # never in the ground
    words = {"slide": "slides to and fro", "bounce": "bounces", "circle": "goes in a circle", "turn": "turns"}
    assert words[kind] in world.caption(scene)


def test_motion_is_seen():
    scene = world.make_scene(Random(first_seed(moving)))
    thing = next(solid for solid in scene.solids if solid.motion is not None)
    scene = replace(scene, solids=(replace(thing, motion=world.Motion("slide", 60, (0.5, 0.0, 0.0))),))
    x, _, z = thing.center
    yaw = torch.full((16,), math.atan2(x, z), dtype=torch.float64)  # from the middle outwards
    c2w, K = world.poses(torch.zeros(16, 3, dtype=torch.float64), yaw, 0 * yaw, 0 * yaw), surface.pinhole(75, *SIZE)
    c2w[:, :3, 3] = torch.tensor(thing.center) - 2.5 * c2w[:, :3, 2]
    moved, stood = (world.render(each, c2w, K, SIZE)[0].int() for each in (scene, frozen(scene)))
    assert torch.equal(stood, stood[:1].expand_as(stood))
    assert torch.equal(moved[0], stood[0]) and (moved[15] - stood[15]).abs().max() > 20


def test_captions():
    said = set()
    for seed in range(300):
        scene = world.make_scene(Random(seed))
        words = world.caption(scene)
        said |= set(words.replace(",", "").replace(";", "").split())
        assert (";" in words) == moving(scene) and words.startswith("a" if "room" in words else "a square")
    assert said <= VOCABULARY and len(VOCABULARY) < 120
    assert len(said) > 30


def test_moves_about_a_fifth_and_rooms_and_squares():
    scenes = [world.make_scene(Random(seed)) for seed in range(400)]
    assert 0.12 < sum(map(moving, scenes)) / 400 < 0.3 and 0.5 < sum(scene.room for scene in scenes) / 400 < 0.7


def test_agrees_with_the_splat_renderer():
    """The first frame, splatted into a later camera by `render.py`, is what the world shows there."""
    for seed in (310, 314, 318):
        scene, c2w = scene_and_path(seed, 17)
        K = surface.pinhole(60, *SIZE)
        frames, depth = world.render(frozen(scene), c2w, K, SIZE)
        images = rearrange(frames / 127.5 - 1, "t h w c -> t c h w")
        geometry = surface.geometry_from_depth(images[:1], depth[0], K)
        poses = camera.normalize(c2w, len(c2w))[[0, -1]]
        warp = splat.render(geometry, poses, SIZE, splat.RenderSettings(samples=2))
        seen = warp.visible[0, 0, 1] > 0.99
        moved, same = (((view - images[-1])[:, seen] / 2).square().mean() for view in (warp.frames[0, :, 1], images[0]))
        assert 0.3 < seen.float().mean() < 1
        assert -10 * moved.log10() > 30 and moved < same / 20, seed


def test_colours_are_centred_on_their_pixels():
    plain = surfaces.Texture("", "", 1.0, 0.0, (0.0, 0.0), (1.0, 0.0, 0.0), (0.0,) * 3)
    ball = world.Solid("ball", (0.0, -2.0, 3.0), (0.8,) * 3, 0.0, plain)
    scene = world.make_scene(Random(first_seed(lambda scene: not scene.room)))
    scene = replace(scene, sun=(0.0, -0.6, -0.8), surfaces=(plain,), discs=(), solids=(ball,))
    c2w = torch.eye(4)[None].clone()
    c2w[0, 1, 3] = -2.0
    frames, depth = world.render(scene, c2w, surface.pinhole(60, 48, 64), (48, 64))
    red = torch.where(depth[0] < 3, frames[0, ..., 0].int(), 0)
    assert torch.equal(red > 0, (red > 0).flip(0)) and (red > 0).any()
    assert (red - red.flip(1)).abs().max() < 8


def test_car_roundabout():
    clip = world.car_roundabout(25, (96, 144))
    assert clip.frames.shape == (25, 96, 144, 3)
    assert set(clip.caption.split()) <= VOCABULARY
    assert_rigid(clip.c2w)
    places = []
    for frame, depth, pose in zip(clip.frames[::12], clip.depth[::12], clip.c2w[::12]):
        red = (frame[..., 0] > 150) & (frame[..., 1] < 90) & (frame[..., 2] < 90)
        assert 10 < red.sum() < 1500
        places.append(surface.unproject(depth, clip.K, pose)[red].median(0).values)
    track = torch.stack(places)
    assert (track[:, [0, 2]].norm(dim=-1) - 1.5).abs().max() < 0.3  # meters from the middle: on its lane
    assert track.diff(dim=0).norm(dim=-1).min() > 0.3


def test_demo_files():
    video = load_video(DATA / "car-roundabout.mp4")
    assert video.shape == (99, 192, 288, 3)
    for name, (seed, move) in world.STILLS.items():
        path = paths.load_path(DATA / f"{name}.json")
        check("World demo paths", path.c2w, camera.move_path(move), 2e-6)
        depth, picture = load_depth(DATA / f"{name}_depth.png"), media.load_image(DATA / f"{name}.png")
        assert depth.shape == (256, 384) == picture.size[::-1]
    scene, c2w = scene_and_path(seed, 66)
    _, expected = world.render(scene, c2w[:1], surface.pinhole(path.fov_x, 256, 384), (256, 384), samples=1)
    assert (depth / 1000 - expected[0]).abs().quantile(0.99) < 1e-3  # millimeters; but for edges on other machines


def test_known_clips_can_be_read_back(tmp_path, monkeypatch):
    """As train.py reads them: a pose and a depth for each frame, to a centimeter; the sky has none."""
    make = partial(world.make_clip, 1_100_007)
    monkeypatch.setattr(world, "car_roundabout", lambda frames, size: make(5, (size[0] // 6, size[1] // 6)))
    monkeypatch.setattr(world, "KNOWN", ())
    world.write_known(tmp_path)
    (source,) = clips.read_sources([str(tmp_path / "clips.csv")], [])
    small, depth = make(5, (32, 48)), make(5, (16, 24)).depth
    assert source.prompt == small.caption
    poses, maps = clips.files_beside(source.video)
    path, depths = paths.load_path(poses), torch.stack(clips.read_depths(maps)[0])
    wanted = small.c2w.clone()
    wanted[:, :3, 3] -= small.c2w[0, :3, 3]
    torch.testing.assert_close(path.c2w, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(surface.pinhole(path.fov_x, 32, 48), small.K, rtol=1e-5, atol=1e-4)
    sky = depth.isinf()
    assert 0 < sky.sum() and torch.equal(depths == 0, sky)
    assert ((depths - depth)[~sky].abs() <= 1 / 128 + depth[~sky] / 2048).all()


def test_patterns_repeat_without_seams_and_fade_to_their_mean():
    tile = 2**surfaces.DETAIL
    place = (torch.arange(tile) + 0.5) / tile
    u, v = torch.meshgrid(place, place, indexing="xy")
    for number, pattern in enumerate(surfaces.PATTERNS):
        start = number * surfaces.TEXELS
        fine = surfaces.look_up(start, u.clone(), v.clone(), surfaces.DETAIL)
        assert fine.abs().max() <= 1 and fine.std() > 0.05, pattern
        assert torch.equal(fine, surfaces.look_up(start, u - 3, v + 2, surfaces.DETAIL)), pattern
        levels = torch.randint(surfaces.DETAIL, u.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
        mixed = surfaces.look_up(torch.full_like(levels, start), u.clone(), v.clone(), levels)
        for level in range(surfaces.DETAIL):
            coarse = surfaces.look_up(start, u.clone(), v.clone(), level)
            assert torch.equal(mixed[levels == level], coarse[levels == level])
        torch.testing.assert_close(surfaces.look_up(start, u.clone(), v.clone(), 0), fine.mean().expand_as(fine))
        for jump in (fine[:, 0] - fine[:, -1], fine[0] - fine[-1]):  # a seam would differ more than any neighbours
            assert jump.abs().mean() <= 1.1 * max(fine.diff(dim=dim).abs().mean(1 - dim).max() for dim in (0, 1)), pattern


@pytest.mark.parametrize("shape", ["ball", "box"])
def test_shadows_lie_where_the_sun_is_hidden(shape):
    """On the ground, darker than beside it exactly where the solid is in the way of the sun."""
    plain = surfaces.Texture("", "", 1.0, 0.0, (0.0, 0.0), (0.5,) * 3, (0.0,) * 3)
    solid = world.Solid(shape, (0.2, -0.9, 0.1), (0.4,) * 3, 0.5, plain)
    sun = (0.48, -0.8, 0.36)
    x, z = torch.meshgrid(torch.linspace(-2, 2, 81), torch.linspace(-2, 2, 81), indexing="ij")
    light, height = torch.ones(1, 81, 81), torch.zeros(1, 81, 81)
    draw.cast_shadow(light, [x[None], height, z[None]], solid, [*solid.center, solid.yaw], sun)
    steps = torch.linspace(0, 5, 500)[:, None, None]
    points = torch.stack([x + steps * sun[0] - 0.2, steps * sun[1] + 0.9 + 0 * x, z + steps * sun[2] - 0.1])
    if shape == "ball":
        hidden = (points.norm(dim=0) < 0.4).any(0)
    else:
        cos, sin = math.cos(0.5), math.sin(0.5)
        local = torch.stack([cos * points[0] - sin * points[2], points[1], sin * points[0] + cos * points[2]])
        hidden = (local.abs().amax(0) < 0.4).any(0)
    assert ((light[0] < 1) == hidden).float().mean() > 0.99 and 100 < hidden.sum() < 1000
    assert light.min() == pytest.approx(1 - draw.SHADE, abs=1e-3)
