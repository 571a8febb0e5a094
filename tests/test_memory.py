"""Keyframe memory against the official numbers, and the rules of a rollout: what is kept, where the camera stands."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from goldens import GEOMETRY, check, check_frames, check_share, check_warp, config, only, prefixed, tensors

import memory
import render
from files import media
from geometry import surface
from geometry.pi3x import Pi3XConfig, Prediction, load_pi3x
from geometry.surface import Geometry, estimate
from memory import Atlas, Memory, align_scale, depth_ratio, render_keyframes, smooth_focals
from render import RenderSettings

DATA = Path(render.__file__).parent / "data"

SCENE, ROLLOUT = GEOMETRY / "keyframes_scene.safetensors", GEOMETRY / "camera_rollout.safetensors"
FIELDS = {"points": "point_map_world", "depth": "depth_map", "confidence": "conf_map", "valid": "valid_mask",
          "K": "intrinsic", "c2w": "source_pose", "rgb": "source_rgb_u8"}  # fmt: skip


def geometry(golden, prefix) -> Geometry:
    fields = {name: golden[prefix + key] for name, key in FIELDS.items()}
    return Geometry(**{**fields, "valid": fields["valid"].bool()})


def bare(depth, valid=None, K=None) -> Geometry:
    """Depths alone; the other maps don't matter."""
    valid = torch.ones_like(depth) if valid is None else valid
    K, points = torch.eye(3) if K is None else K, torch.ones(*depth.shape, 3)
    return Geometry(points, depth, torch.ones_like(depth), valid.bool(), K, torch.eye(4), points.byte())


@pytest.fixture(scope="module")
def scene():
    return tensors(SCENE)


@pytest.fixture(scope="module")
def keyframes(scene):
    return [geometry(scene, f"kf{index}/") for index in range(len(config(SCENE)["target_fill"]))]


@pytest.fixture(scope="module")
def rollout():
    return tensors(ROLLOUT)


@pytest.fixture(scope="module")
def network():
    return load_pi3x(GEOMETRY / "pi3x_weights.safetensors")


def start(network, rollout, **options) -> Memory:
    scalars = config(ROLLOUT)
    image = (rollout["image_u8"] / 127.5 - 1).permute(2, 0, 1)[None]
    return Memory(lambda: network, image, (scalars["height"], scalars["width"]), limit=scalars["pi3_pixel_limit"], **options)


# ---- focal lengths and scale


def test_smooth_focals(scene):
    size = config(SCENE)["height"], config(SCENE)["width"]
    smoothed = smooth_focals([bare(torch.ones(size), K=K) for K in scene["smooth/in"]])
    check("Focal smoothing", torch.stack([each.K for each in smoothed]), scene["smooth/out"], 1e-6, relative=True)
    free = replace(bare(torch.ones(size), K=scene["smooth/in"][0] + torch.ones(3, 3)), points=torch.zeros(*size, 3))
    (only,) = smooth_focals([free])
    expected = [[free.K[0, 0], 0, (size[1] - 1) / 2], [0, free.K[1, 1], (size[0] - 1) / 2], [0, 0, 1]]
    check("Focal smoothing", only.K, torch.tensor(expected), 0)
    assert only.points is free.points
    (none,) = smooth_focals([replace(free, K=torch.zeros(3, 3))])
    check("Focal smoothing", none.K.diagonal(), torch.tensor([0.65e-6, 0.65e-6, 1]), 0)


@pytest.mark.parametrize("case", ["basic", "clamped", "clamped_low", "no_masks", "no_overlap", "resized_reference"])
def test_depth_ratio(scene, case):
    recorded, basic = config(SCENE)[f"scale/{case}"], config(SCENE)["scale/basic"]
    current = bare(scene["scale/cur"], scene["scale/valid_cur"])
    reference = bare(scene["scale/ref"], scene["scale/valid_ref"])
    depths = recorded.get("reference_median_depth", 1.0) / basic["reference_median_depth"]
    deeper = replace(reference, depth=reference.depth * depths)
    everywhere, nowhere = torch.ones_like(current.valid), torch.zeros_like(current.valid)
    current, reference = {
        "clamped": (current, deeper),
        "clamped_low": (current, deeper),
        "no_masks": (replace(current, valid=everywhere), replace(reference, valid=everywhere)),
        "no_overlap": (replace(current, valid=nowhere), reference),
        "resized_reference": (current, bare(scene["scale/ref_small"], scene["scale/valid_ref_small"])),
    }.get(case, (current, reference))
    check("Scale alignment", depth_ratio(current, reference), recorded["applied_scale"], 1e-6, relative=True)


def test_few_ratios_are_not_trimmed():
    """31 ratios have a plain median, 32 that of the 10th to the 90th percentile. Unknown ones never count."""
    ratios = torch.cat([torch.arange(1, 21), torch.full((12,), 21)])[None] / 8
    assert depth_ratio(bare(torch.ones(1, 31)), bare(ratios[:, :31])) == 16 / 8
    assert depth_ratio(bare(torch.ones(1, 32)), bare(ratios)) == 18.5 / 8  # the lowest four are out, the many 21 stay
    for unknown in (-1.0, torch.inf, torch.nan):
        ratios[0, 31] = unknown
        assert depth_ratio(bare(torch.ones(1, 32)), bare(ratios)) == 16 / 8
        assert depth_ratio(bare(ratios), bare(torch.ones(1, 32))) == 8 / 16


def test_alignment_scales_lengths_alone():
    near = bare(torch.full((8, 8), 2.0))
    pose = torch.eye(4) + torch.tensor([0, 0, 0, 1.0])[None] * torch.tensor([1, 2, 3, 0.0])[:, None]
    first, second = align_scale([near, replace(near, c2w=pose, depth=near.depth * 3)], bare(torch.full((8, 8), 5.0)))
    assert (first.depth == 5).all() and (second.depth == 15).all() and (second.points == 2.5).all()
    assert second.c2w[:3, 3].tolist() == [2.5, 5, 7.5] and torch.equal(second.c2w[:3, :3], pose[:3, :3])
    assert torch.equal(first.K, near.K) and torch.equal(first.c2w, near.c2w)


# ---- background


def test_background(scene, keyframes):
    for index, keyframe in enumerate(keyframes):
        expected = scene[f"atlas/background_mask{index}"].bool()
        check("Background mask", memory.background_mask(keyframe), expected, 0)
    latest = keyframes[-1]
    size, scalars = tuple(latest.depth.shape), config(SCENE)["atlas"]
    assert memory.ATLAS == (scalars["atlas_height"], scalars["atlas_width"])
    rays = memory.pixel_rays(latest.c2w, latest.K, size, latest.depth.device)
    check("Background rays", rays, scene["atlas/rays_world_latest"], 1e-6)
    columns, rows = scene["atlas/uv_latest"].long().unbind(-1)
    check_share("Background texels", memory.texels(rays), rows * scalars["atlas_width"] + columns, 0.002)
    raw = memory.atlas_colors(keyframes)
    filled = memory.fill_rows(raw)
    for name, atlas in (("raw", raw), ("filled", filled)):
        index = atlas.known.flatten().nonzero()[:, 0]
        check("Background atlas", index, scene[f"atlas/{name}_idx"], 0)
        check("Background atlas", atlas.rgb.flatten(0, 1)[index], scene[f"atlas/{name}_rgb"], 0)
    (frame, valid), = ((name[5:-6], mask) for name, mask in prefixed(scene, "atlas/").items() if name.endswith("_valid"))
    rgb, known = memory.look_up(filled, scene["target_poses_world"][int(frame)], latest.K, size)
    check_share("Background view", known, valid.bool(), 0.002)
    both = known & valid.bool()
    check_share("Background view", rgb[both], scene[f"atlas/frame{frame}"][both], 0.005)


def test_little_background_is_the_whole_picture():
    """Below 128 depths there is no far part; from there on the deepest 35 % count."""
    assert memory.background_mask(bare(torch.rand(9, 10) + 1)).all()  # nothing unknown: all of it
    half = torch.arange(100).view(10, 10) >= 10
    assert torch.equal(memory.background_mask(bare(torch.ones(10, 10), half)), ~half)  # a tenth is enough
    deep = torch.arange(200.0).view(10, 20) + 1
    assert memory.background_mask(bare(deep)).sum() == 70
    unsure = replace(bare(torch.ones(9, 10)), confidence=torch.linspace(0.05, 1, 90).view(9, 10))
    assert memory.background_mask(unsure).all()
    unsure = replace(unsure, confidence=(torch.arange(90) >= 30).view(9, 10).float())
    assert memory.background_mask(unsure).sum() == 30


def test_texels_of_all_directions():
    """Behind is where the first column meets the last; up is the first row, down the last."""
    behind, nearly, ahead, up, down = memory.texels(torch.tensor(
        [[0, 0, -1], [1e-4, 0, -1], [0, 0, 1], [0, -1, 0], [0, 1, 0.0]])).tolist()
    assert [behind, nearly, ahead] == [192 * 768, 193 * 768 - 1, 192 * 768 + 384]
    assert [up // 768, down // 768] == [0, 383]


def test_row_fill(scene):
    atlas = memory.fill_rows(Atlas(scene["rowfill/atlas"], scene["rowfill/valid"].bool()))
    check("Background row fill", atlas.known, scene["rowfill/out_valid"], 0)
    check("Background row fill", atlas.rgb[atlas.known], scene["rowfill/out_atlas"][atlas.known], 0)
    known = torch.zeros(1, 20, dtype=torch.bool)
    known[0, [1, 5]] = True
    rgb = torch.arange(20).view(1, 20, 1).expand(1, 20, 3).byte()
    filled = memory.fill_rows(Atlas(rgb, known))
    assert filled.rgb[0, filled.known[0], 0].tolist() == [1, 1, 1, 1, 5, 5, 5, 5, 5, 1, 1]
    assert filled.known[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 18, 19]


# ---- rendering


def check_case(frames, golden, case):
    """All frames of a case, or as many of them as have their masks recorded."""
    visible, frames = golden.get(f"{case}/visible"), list(frames)
    frames = frames if visible is None else frames[:len(visible)]
    check_frames("Render keyframes", frames, golden[f"{case}/frames_u8"], visible)


def test_render_keyframes(scene, keyframes):
    poses, latest = scene["poses"], keyframes[-1]
    subset = [keyframes[index] for index in config(SCENE)["training"]["subset"]]
    check_case(render_keyframes(keyframes, poses), scene, "target_fill")
    check_case(render_keyframes(keyframes, poses, RenderSettings(hole_radius=0)), scene, "splat")
    check_case(render_keyframes(keyframes[:1], poses), scene, "single_keyframe")
    check_case(render_keyframes(subset, scene["training/relative_poses"]), scene, "training")
    check("Poses", latest.c2w @ poses, scene["target_poses_world"], 1e-6)
    warp = render.collect(render_keyframes(keyframes, poses), tuple(latest.depth.shape))
    check_warp("Render keyframes", warp, scene["target_fill/warp_video_sel"],
                 scene["target_fill/warp_visibility_mask_sel"])


def test_samples_of_all_keyframes(scene, keyframes):
    counts = [entry["num_points"] for entry in config(SCENE)["target_fill"]]
    samples = memory.keyframe_samples(keyframes, RenderSettings())
    assert samples.xyz.shape[1] == len(samples.rgb) == len(samples.xy) == sum(counts)
    for part, entry in zip(samples.xyz.split(counts, dim=1), config(SCENE)["target_fill"]):
        check("Keyframe samples", part.double().mean(1), torch.tensor(entry["points_mean"]), 1e-5, relative=True)
    frame, expected = only(scene, "target_fill/source_xy_frame")
    pose, size = scene["target_poses_world"][int(frame)], tuple(keyframes[-1].depth.shape)
    _, xy, _ = render.splat(samples, pose, keyframes[-1].K, size)
    check_share("Render source xy", xy, expected, 0.005)


def test_unusable_keyframes(scene, keyframes):
    first, *others = keyframes
    latest, nowhere = others[-1], torch.zeros_like(first.valid)
    relaxed = [replace(first, valid=nowhere), *others]
    check_case(render_keyframes(relaxed, scene["poses"]), scene, "kf0_empty_valid")
    skipped = [replace(first, valid=nowhere, depth=-first.depth), *others]
    check_case(render_keyframes(skipped, scene["poses"]), scene, "kf0_no_depth")
    with pytest.raises(ValueError, match="no surface to render"):
        next(render_keyframes([first, replace(latest, valid=nowhere, depth=-latest.depth)], scene["poses"]))


def test_other_intrinsics_are_other_geometries(scene, keyframes):
    """Officially, points not marked as kept are rebuilt with frame 0's intrinsics, which then serve every frame."""
    K = scene["target_intrinsics"][0]
    rebuilt = [replace(each, points=surface.unproject(each.depth, K, each.c2w), K=K) for each in keyframes]
    check_case(render_keyframes(rebuilt, scene["poses"]), scene, "not_preserved_target_intrinsics")


# ---- a rollout through the network


def check_geometry(actual, golden, prefix):
    for name, key in FIELDS.items():
        if prefix + key not in golden:
            continue
        value, expected = getattr(actual, name), golden[prefix + key]
        if name == "valid":
            check("Memory valid pixels (share)", (value != expected.bool()).double().mean(), 0.0, 0.002)
        elif name == "rgb":
            check("Memory pictures", value, expected, 0)
        else:
            check("Memory geometry", value, expected, 2e-5, relative=True)


def check_chunk(warp, golden, case, selection):
    """Thresholds amplify the network's last bits, so a few pixels may differ, as on another machine."""
    selected = golden[f"{case}/frames_u8"], golden[f"{case}/visible"].bool()
    expected = render.to_video(*selected, tuple(warp.frames.shape[-2:]))
    check_warp("Memory", render.Warp(warp.frames[:, :, selection], warp.visible[:, :, selection]),
                 expected.frames, expected.visible)


def test_rollout(network, rollout):
    """The window of the golden is short; ours goes on with its last pose."""
    scalars, poses = config(ROLLOUT), rollout["camera_poses"].split(config(ROLLOUT)["window_num_frames"])
    camera = start(network, rollout)
    check_geometry(camera.reference, rollout, "chunk0/geom/")
    check("Memory unit", camera.unit, scalars["chunk0"]["effective_scale"], 1e-5, relative=True)
    warp = camera.warp(poses[0])
    assert warp.frames.shape == (1, 3, 33, scalars["height"], scalars["width"]) and warp.visible.shape[2] == 33
    check_chunk(warp, rollout, "chunk0", range(len(poses[0])))
    mask_mean = torch.tensor(scalars["chunk0"]["mask_mean"])
    check("Memory mask", warp.visible[0, 0, : len(mask_mean)].mean((1, 2)), mask_mean, 0.005)

    camera.remember(rollout["chunk1/decoded_last_frame"])
    check("Boundary frame", camera.images[-1], rollout["chunk1/boundary_frame"], 1e-7)
    geometries = estimate(network, camera.images, scalars["pi3_pixel_limit"])
    for index, each in enumerate(geometries):
        recovered = rollout[f"chunk1/kf{index}/intrinsic_recovered"]
        check("Memory geometry", each.K, recovered, 2e-5, relative=True)
    ratio = scalars["chunk1"]["scale_alignment"]["applied_scale"]
    check("Scale alignment", depth_ratio(geometries[0], camera.reference), ratio, 1e-5, relative=True)
    for index, each in enumerate(align_scale(smooth_focals(geometries), camera.reference)):
        check_geometry(each, rollout, f"chunk1/kf{index}/")
    warp = camera.warp(poses[1])
    assert warp.frames.shape[2] == warp.visible.shape[2] == 34
    check_chunk(warp, rollout, "chunk1", scalars["chunk1"]["frames_stored"])
    again = camera.warp(poses[1])
    assert torch.equal(warp.frames, again.frames) and torch.equal(warp.visible, again.visible)


def test_memory_off(network, rollout):
    scalars, poses = config(ROLLOUT), rollout["camera_poses"].split(config(ROLLOUT)["window_num_frames"])
    camera = start(network, rollout, keyframes=1)
    camera.warp(poses[0])
    camera.remember(rollout["chunk1/decoded_last_frame"])
    (alone,) = estimate(network, camera.images, scalars["pi3_pixel_limit"])
    check_geometry(alone, rollout, "nomem_chunk1/geom/")
    check("Memory unit", camera.unit, scalars["nomem_chunk1"]["effective_scale"], 1e-5, relative=True)
    check_chunk(camera.warp(poses[1]), rollout, "nomem_chunk1", scalars["nomem_chunk1"]["frames_stored"])


def test_what_is_valid():
    """Confident, finite and in front of the camera; a plane has no edges."""
    local = torch.ones(1, 1, 42, 56, 3)
    confidence = torch.zeros(1, 1, 42, 56)
    for column, bad in enumerate((torch.nan, torch.inf, -1.0, 0.0)):
        local[..., 5, column, 2] = bad
    local[..., 6, 0, 0] = torch.nan
    confidence[..., 7, 0], confidence[..., 7, 1] = -2.2, -2.19  # a probability of 0.0998, 0.1006
    prediction = Prediction(local, local, local, confidence, torch.eye(4).expand(1, 1, 4, 4), torch.ones(1))
    network = Mock(return_value=prediction, image_mean=torch.zeros(1), config=Pi3XConfig())
    (only,) = estimate(network, [torch.full((1, 3, 48, 64), 100.6 / 127.5 - 1)], limit=2352)
    assert (~only.valid).nonzero().tolist() == [[5, 0], [5, 1], [5, 2], [5, 3], [6, 0], [7, 0]]
    assert (only.rgb == 101).all()


def test_a_small_network_sees_fewer_pixels(network, rollout):
    """No more than its position embedding has places for, but its maps are as large as ever; a given limit counts."""
    seen = []

    def watch(images, known):
        seen.append(tuple(images.shape[-2:]))
        raise InterruptedError

    for grid, limit, size in ((37, None, (392, 644)), (9, None, (98, 154)), (9, 255_000, (98, 154)), (9, 8000, (70, 112)),
                              (37, 130_000, (280, 462)), (37, 500_000, (546, 910))):
        watched = Mock(side_effect=watch, image_mean=torch.zeros(1), config=Pi3XConfig(grid=grid))
        with pytest.raises(InterruptedError):
            estimate(watched, [torch.zeros(1, 3, 384, 640)], limit)
        assert seen.pop() == size
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    (coarse,), (fine,) = estimate(network, [picture], network.config.pixels), estimate(network, [picture])
    assert coarse.depth.shape == surface.geometry_size(64, 96, network.config.pixels)
    assert fine.depth.shape == surface.map_size(64, 96) == (252, 378)
    rows, columns = (large / small for large, small in zip(fine.depth.shape, coarse.depth.shape))
    assert fine.K[0, 0] == pytest.approx(coarse.K[0, 0].item() * columns, rel=0.02)
    assert fine.K[1, 1] == pytest.approx(coarse.K[1, 1].item() * rows, rel=0.02)
    for name in ("depth", "confidence", "points", "rgb"):
        small, large = (getattr(each, name).float().view(*each.depth.shape, -1) for each in (coarse, fine))
        back = surface.resize(large.permute(2, 0, 1)[None], coarse.depth.shape)[0].permute(1, 2, 0)
        assert (back - small).abs().mean() < 0.1 * small.abs().mean(), name
    assert Memory(lambda: network, picture, (64, 96)).reference.depth.shape == fine.depth.shape


def test_kept_pictures(network, rollout):
    """The first one always, then the latest; without a bound all of them; one alone is the latest."""
    size = config(ROLLOUT)["height"], config(ROLLOUT)["width"]
    frames = [torch.full((1, 3, *size), value / 5 * 2 - 1) for value in range(1, 6)]
    for bound, kept in ((None, [1, 2, 3, 4, 5]), (3, [4, 5]), (2, [5]), (1, [5])):
        camera = start(network, rollout, keyframes=bound, choice="latest")
        first = camera.images[0]
        for frame in frames:
            camera.remember(frame)
        assert (camera.images[0] is first) == (bound != 1)
        latest = camera.images if bound == 1 else camera.images[1:]
        assert [round((image.mean().item() / 2 + 0.5) * 5) for image in latest] == kept
    with pytest.raises(ValueError, match="keyframes 0: expected at least 1"):
        start(network, rollout, keyframes=0)


def test_where_the_camera_stands(network, rollout, monkeypatch):
    """Later poses count from the last one of the warp before; a chunk without a warp leaves the camera there."""
    seen = []

    def spy(geometries, poses, settings, zoom):
        seen.append(poses)
        return render_keyframes(geometries, poses, settings)

    monkeypatch.setattr(memory, "render_keyframes", spy)
    path = torch.eye(4).repeat(4, 1, 1)
    path[:, 0, 3] = torch.tensor([1.0, 2, 3, 5])
    camera = start(network, rollout, unit=0.5)
    assert camera.unit == 0.5
    camera.warp(path[3:])  # thought better of
    camera.warp(path[:2])
    camera.remember(camera.images[0])
    camera.remember(camera.images[0])
    camera.warp(path[2:])
    check("Memory poses", seen[0][:, 0, 3], torch.tensor([0, 0.5] + [1.5] * 32), 0)
    camera.remember(camera.images[0])
    camera.warp(path[:1])
    check("Memory poses", seen[1][:, 0, 3], torch.tensor([0] + [-2.0] * 33), 0)


def test_the_fallback_follows_the_alignment(network, rollout, monkeypatch):
    """Keyframes without a valid pixel don't decide the scale, but are rendered by their most confident ones."""
    camera, rendered = start(network, rollout), []
    camera.remember(camera.images[0])

    def none_valid(network, images, limit, known=None):
        return [replace(each, valid=torch.zeros_like(each.valid), depth=each.depth * 2)
                for each in estimate(network, images, limit)]

    def spy(geometries, poses, settings, zoom):
        rendered.extend(geometries)
        return render_keyframes(geometries, poses, settings)

    monkeypatch.setattr(memory, "estimate", none_valid)
    monkeypatch.setattr(memory, "render_keyframes", spy)
    camera.warp(rollout["camera_poses"])
    unscaled = none_valid(network, camera.images, camera.limit)
    for actual, expected in zip(rendered, unscaled):
        assert actual.valid.any() and torch.equal(actual.depth, expected.depth)


def test_no_surface_names_the_problem(network, rollout):
    camera = start(network, rollout)
    camera.reference = replace(camera.reference, depth=-camera.reference.depth)
    with pytest.raises(ValueError, match="no surface to render"):
        camera.warp(rollout["camera_poses"])


# ---- zoom, and a lens that is known


def test_zoom_of_a_given_geometry():
    """The chunk's own focal lengths, relative to the picture's; a later chunk's too."""
    _, geometry = surface.place(media.load_image(DATA / "plaza.png"), None, 60, (32, 48))
    still, zoom = torch.eye(4).repeat(33, 1, 1), torch.linspace(1, 2, 33)[:, None].expand(-1, 2)
    rolled = memory.Camera(geometry, (32, 48))
    first, second = rolled.warp(still, zoom), rolled.warp(still, torch.full((33, 2), 2.0))
    intrinsics = surface.zoomed(geometry.K, 33, zoom)
    expected = render.render(geometry, still, (32, 48), intrinsics=intrinsics)
    assert torch.equal(first.frames, expected.frames) and not torch.equal(first.frames[:, :, 32], first.frames[:, :, 0])
    assert torch.equal(second.frames[:, :, 0], first.frames[:, :, 32])
    plain = memory.Camera(geometry, (32, 48)).warp(still)
    assert torch.equal(plain.frames[:, :, 5], plain.frames[:, :, 32])


@pytest.mark.parametrize("K", [None, surface.pinhole(70, 64, 96)])
@pytest.mark.parametrize("keyframes", [1, 3])
def test_zoom_through_the_network(monkeypatch, keyframes, K):
    """Each warp begins with the latest picture, seen with the focal length that the last one ended with; a known lens
    is every keyframe's, but for its zoom."""
    generator, size = torch.Generator().manual_seed(0), (64, 96)
    image = torch.rand(1, 3, *size, generator=generator) * 2 - 1
    _, plane = surface.place(media.load_image(DATA / "plaza.png"), None, 60, size)
    seen, real = [], render.render_samples

    def estimated(network, images, limit, known):
        return [replace(plane, c2w=torch.eye(4)) for _ in images]

    def spy(samples, source, poses, settings, intrinsics, *rest):
        seen.append((source.K, intrinsics))
        return real(samples, source, poses, settings, intrinsics, *rest)

    monkeypatch.setattr(memory, "estimate", estimated)
    monkeypatch.setattr(memory, "render_samples", spy)
    monkeypatch.setattr(render, "render_samples", spy)
    rollout = memory.Memory(lambda: None, image, size, keyframes=keyframes, K=K)
    still = torch.eye(4).repeat(33, 1, 1)
    rollout.warp(still, torch.linspace(1, 2, 33)[:, None].expand(-1, 2))
    rollout.remember(image)
    state = rollout.state()
    again = memory.Memory(lambda: None, image, size, keyframes=keyframes, K=K)
    again.restore(state)
    for one in (rollout, again):
        one.warp(still, torch.full((33, 2), 4.0))
    own = plane.K if K is None else surface.stretch(K, size, tuple(plane.depth.shape))
    check("Zoom", seen[0][1][:, 0, 0], own[0, 0] * torch.linspace(1, 2, 33), 1e-3)
    for latest, intrinsics in seen[1:]:
        if K is not None:
            check("Zoom", latest[0, 0], own[0, 0] * 2, 1e-3)
        assert torch.equal(intrinsics[0], latest)
        check("Zoom", intrinsics[1:, 0, 0], latest[0, 0] * torch.full((33,), 2.0), 1e-3)
