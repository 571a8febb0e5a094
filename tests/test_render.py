"""The renderer against the official numbers; properties and the preview program."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from goldens import GEOMETRY, check, check_frames, check_share, check_warp, config, only, prefixed, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from known import load_video, picture
from PIL import Image

import memory
import render
from files import draw, media
from files.depth import load_depth
from geometry import camera, surface
from geometry.camera import move_path
from geometry.paths import load_path
from geometry.pi3x import load_pi3x
from geometry.surface import Geometry
from render import RenderSettings, render_frames

FIELDS = ("point_map_world", "depth_map", "conf_map", "valid_mask", "intrinsic", "source_pose", "source_rgb_u8")


def geometry(golden, prefix="geom/", **given) -> Geometry:
    points, depth, confidence, valid, K, c2w, rgb = (
        given[name] if name in given else golden[prefix + name] for name in FIELDS
    )
    return Geometry(points, depth, confidence, valid.bool(), K, c2w, rgb)


# ---- rendering against the goldens


ROOM = GEOMETRY / "render_room.safetensors"
ROOM_CASES = config(ROOM)["cases"]


@pytest.fixture(scope="module")
def room():
    return tensors(ROOM)


def settings_of(case: dict) -> RenderSettings:
    """A recorded case names what differs from the official defaults."""
    return RenderSettings(
        samples=case.get("mesh_samples_per_axis", 4), mesh_break=case.get("mesh_break_mode") != "none",
        hole_radius=0 if case.get("render_mode") == "splat" else case.get("target_fill_radius", 1),
        min_neighbors=case.get("target_fill_min_neighbors", 4), mean_fill=case.get("invisible_fill") != "black")


@pytest.mark.parametrize("case", ROOM_CASES)
def test_room(room, case):
    recorded = ROOM_CASES[case]
    rendered = list(render_frames(geometry(room), room["poses"], settings_of(recorded)))
    stored = recorded["frames_stored"] if "frames_stored" in recorded else recorded["poses_used"]
    check_frames("Render room", [rendered[i] for i in stored], room[f"{case}/frames_u8"], room.get(f"{case}/visible"))


def test_room_samples_and_video(room):
    source = geometry(room)
    samples, rows = render.surface_samples(source, RenderSettings()), room["samples/sample_idx"]
    assert samples.xyz.shape[1] == config(ROOM)["samples"]["num_points"]
    check("Render samples", samples.xyz[:, rows].T, room["samples/sample_points"], 1e-5, relative=True)
    check("Render sample colours", samples.rgb[rows], room["samples/sample_colors"], 0)
    check("Render source xy", samples.xy[rows], room["samples/sample_xy"], 0)
    filled = prefixed(room, "target_fill.mean_first_frame/")
    frame, expected = only(filled, "source_xy_frame")
    _, xy, _ = render.splat(samples, source.c2w @ room["poses"][int(frame)], source.K, source.depth.shape)
    check_share("Render source xy", xy, expected, 0.005)
    warp = render.render(source, room["poses"], (config(ROOM)["height"], config(ROOM)["width"]))
    check_warp("Render", warp, filled["warp_video_sel"], filled["warp_visibility_mask_sel"])


def test_photo_with_target_intrinsics():
    golden = tensors(GEOMETRY / "render_photo.safetensors")
    source, K = geometry(golden), golden["target_intrinsics"]
    for name, intrinsics in (("plain", None), ("target_intrinsics", K)):
        frames = render_frames(source, golden["poses"], RenderSettings(), intrinsics)
        check_frames("Render photo", frames, golden[f"{name}/frames_u8"], golden[f"{name}/visible"])
    points = surface.unproject(source.depth, K[0], source.c2w)
    check("Unproject", points, golden["target_intrinsics/point_map_world"], 1e-5, relative=True)


def test_edges_and_mesh_break():
    golden = tensors(GEOMETRY / "render_edges.safetensors")
    source = geometry(golden)
    for name, tear in (("depth_normal", True), ("none", False)):
        frames = render_frames(source, golden["poses"], RenderSettings(mesh_break=tear))
        check_frames("Render edges", frames, golden[f"{name}/frames_u8"], golden[f"{name}/visible"])
    stats = config(GEOMETRY / "render_edges.safetensors")["break_stats"]
    rtol, degrees = stats["depth_rtol"], stats["normal_tol_deg"]
    _, valid, _ = render.fill_top(source)
    normals, known = surface.surface_normals(source.points, valid)
    check("Normals", normals.permute(1, 2, 0), golden["break/normals"], 1e-5)
    check("Mesh break", known, golden["break/normal_mask"], 0)
    check("Mesh break", surface.depth_edges(source.depth, valid, rtol), golden["break/depth_edge"], 0)
    check_share("Mesh break", surface.normal_edges(normals, known, degrees), golden["break/normal_edge"].bool(), 0.001)
    broken = surface.mesh_break(source.points, source.depth, valid)
    check_share("Mesh break", broken, golden["break/break_mask"].bool(), 0.001)
    second = surface.mesh_break(source.points, source.depth, valid & ~golden["break/break_mask"].bool())
    check_share("Mesh break", second, golden["break/break_mask_second_pass"].bool(), 0.001)
    for name, expected in prefixed(golden, "break/break_mask_rtol").items():
        rtol, degrees = map(float, name.split("_deg"))
        mask = surface.mesh_break(source.points, source.depth, valid, rtol, degrees)
        check_share("Mesh break", mask, expected.bool(), 0.001)


def test_sky():
    """The far plane makes thousands of equally deep samples, hence the larger share."""
    golden = tensors(GEOMETRY / "render_sky.safetensors")
    source = geometry(golden)
    for case, change in (("target_fill", {}), ("splat.black", {"hole_radius": 0, "mean_fill": False})):
        frames = list(render_frames(source, golden["poses"], RenderSettings(**change)))
        expected = golden[f"{case}/frames_u8"]
        check_frames("Render sky", frames, expected, golden[f"{case}/visible"], share=0.08, seen=0.0)
        pictures = torch.stack([rgb for rgb, _ in frames])
        if len(pictures) == len(expected):
            difference = (pictures.float() - expected.float()).abs().mean()
            check("Render sky frames, mean (grey levels)", difference, torch.tensor(0.0), 0.2)
    points, valid, filled = render.fill_top(source)
    check("Top fill mask", filled, golden["topfill/fill_mask"], 0)
    check("Top fill mask", valid, golden["topfill/valid"], 0)
    check("Top fill points", points[filled], golden["topfill/points_at_fill"], 1e-5, relative=True)
    mesh_valid = valid & ~surface.mesh_break(points, source.depth, valid)
    check("Top fill mask", mesh_valid, golden["topfill/mesh_valid"], 0)
    variants = {key.partition("/")[0] for key in prefixed(golden, "topfill_")}
    assert variants
    for name in variants:
        variant = prefixed(golden, f"topfill_{name}/")
        points, _, filled = render.fill_top(
            replace(source, depth=variant["depth_map"], confidence=variant["conf_map"],
                    points=torch.ones_like(source.points)))
        check("Top fill mask", filled, variant["fill_mask"], 0)
        step, expected = only(variant, "points_at_fill_every")
        check("Top fill points", points[filled][::int(step)], expected, 1e-5, relative=True)


def test_a_short_ring_does_not_set_the_far_plane():
    """Fewer than 128 pixels around the unknown region, all deeper than 98 % of the picture: these decide."""
    depth = torch.ones(700, 12)
    depth[90:98] = 9
    confidence = torch.ones_like(depth)
    confidence[:90] = 0
    points = torch.ones(700, 12, 3)
    flat = Geometry(points, depth, confidence, depth > 0, torch.eye(3), torch.eye(4), points.byte())
    filled_points, _, filled = render.fill_top(flat)
    assert filled[:90].all() and not filled[90:].any() and (filled_points[:90, :, 2] == 1).all()


FALLBACK = GEOMETRY / "render_fallback.safetensors"


@pytest.mark.parametrize("case", config(FALLBACK)["variants"])
def test_fallback(case):
    golden, expected = tensors(FALLBACK), config(FALLBACK)["variants"][case]
    common = {"intrinsic": golden["intrinsic"], "source_pose": golden["source_pose"], "source_rgb_u8": golden["rgb"]}
    source = geometry(golden, case + "/", **common)
    ensured = surface.ensure_valid(source)
    check("Fallback mask", ensured.valid, golden[f"{case}/ensured_valid_mask"], 0)
    check("Fallback confidence", ensured.confidence, golden[f"{case}/ensured_conf_map"], 0)
    for name, mask in prefixed(golden, f"{case}/forced").items():
        check("Fallback mask", surface.keep_confident(source, int(name.partition("_")[0])).valid, mask, 0)
    check("Depth scale", surface.median_depth(ensured), expected["depth_scale"], 1e-6, relative=True)
    assert render.surface_samples(source, RenderSettings()).xyz.shape[1] == expected["samples"]["num_points"]
    frames = render_frames(source, golden["poses"])
    check_frames("Render fallback", frames, golden[f"{case}/frames_u8"], golden[f"{case}/visible"])


def test_fallback_retries_and_the_whole_call():
    golden, expected = tensors(FALLBACK), config(FALLBACK)
    for case in (name for name in expected if name.startswith("small_")):
        source = geometry(golden, f"{case}/geom/")
        samples = render.surface_samples(source, RenderSettings())
        assert samples.xyz.shape[1] == expected[case]["num_points"]
        frames = render_frames(source, golden["poses"])
        check_frames("Render fallback", frames, golden[f"{case}/frames_u8"], golden[f"{case}/visible"])
    common = {"intrinsic": golden["intrinsic"], "source_pose": golden["source_pose"], "source_rgb_u8": golden["rgb"]}
    call = expected["render_call"]
    source = surface.ensure_valid(geometry(golden, "none_valid_smooth_conf/", **common))
    scale = call["translation_scale"] * surface.median_depth(source)
    check("Depth scale", scale, call["effective_scale"], 1e-6, relative=True)
    poses = camera.scale_translation(golden["render_call/camera_poses"], scale)
    poses = camera.normalize(poses, call["num_frames"])
    check("Poses", poses, golden["render_call/camera_pose_rollout"], 1e-6)
    frames = render_frames(source, poses)
    check_frames("Render fallback", frames, golden["render_call/frames_u8"], golden["render_call/visible"])
    nowhere = replace(source, depth=-source.depth)
    assert surface.median_depth(nowhere) == 1.0
    with pytest.raises(ValueError, match="no surface to render"):
        next(render_frames(nowhere, poses))


# ---- sizes against the goldens


@pytest.fixture(scope="module")
def poses():
    return tensors(GEOMETRY / "poses.safetensors")


def test_sizes_masks_and_boundary_frame(poses):
    for entry in config(GEOMETRY / "poses.safetensors")["pi3_target_size"]:
        size = surface.geometry_size(entry["height"], entry["width"], entry["pixel_limit"])
        assert size == tuple(entry["out_hw"]), entry
    check("Boundary frame", media.quantize(poses["boundary/in"]), poses["boundary/out"], 1e-7)
    frames, masks = poses["frames/in_u8"], poses["mask/render_in"]
    check("Render video", render.to_video(frames, masks[:2], (30, 44)).frames, poses["frames/out"], 1e-6)
    black = torch.zeros(*masks.shape, 3, dtype=torch.uint8)
    check("Render mask", render.to_video(black, masks, (30, 44)).visible, poses["mask/render_to_output"], 1e-6)
    depth, valid = poses["depthscale/depth"], poses["depthscale/valid"].bool()
    expected = config(GEOMETRY / "poses.safetensors")["depthscale"]
    for name, mask in (("normal", valid), ("empty_valid", torch.zeros_like(valid))):
        blank = torch.zeros(*depth.shape, 3)
        source = Geometry(blank, depth, depth, mask, torch.eye(3), torch.eye(4), blank.byte())
        check("Depth scale", surface.median_depth(source), expected[name], 1e-6, relative=True)


# ---- geometry and properties


@settings(max_examples=8, deadline=None)
@given(st.floats(0.2, 9), st.floats(0, 0.4), st.floats(30, 100))
def test_identity_reproduces_the_source(depth, slope, fov):
    image = picture(28, 42)
    ramp = depth * (1 + slope * torch.linspace(0, 1, 28)[:, None].expand(28, 42))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surface, "map_size", lambda height, width, *limit: (height, width))
        source = surface.geometry_from_depth(image, ramp, surface.pinhole(fov, 28, 42))
    _, (rgb, visible) = render_frames(source, torch.eye(4).repeat(2, 1, 1), RenderSettings(hole_radius=0))
    assert visible[1:-1, 1:-1].all()
    step = max(source.rgb.int().diff(dim=axis).abs().max() for axis in (0, 1))
    assert (rgb.int() - source.rgb.int())[visible].abs().max() <= step  # a sample is at most half a pixel away


def test_directions():
    """Forward enlarges, yaw right moves the content left, up moves it down."""
    image = torch.full((1, 3, 96, 160), -1.0)
    image[..., 40:56, 70:90] = 1
    source = surface.geometry_from_depth(image, torch.ones(96, 160), surface.pinhole(60, 96, 160))

    def seen(move):
        poses = move_path(move, 5)
        poses[:, :3, 3] *= 0.2
        white = render.render(source, poses[[0, -1]], (96, 160)).frames[0, 0, 1] > 0.5
        rows, columns = white.nonzero(as_tuple=True)
        return len(rows), rows.float().mean().item(), columns.float().mean().item()

    area, row, column = seen("hold")
    assert abs(row - 47.5) < 1 and abs(column - 79.5) < 1
    assert seen("forward 1")[0] > 1.3 * area > 0.7 * area > seen("back 2")[0]
    assert seen("yaw 10")[2] < column - 5 and seen("right 1")[2] < column - 5
    assert seen("up 1")[1] > row + 5 and seen("pitch 10")[1] > row + 5


def component_sizes(mask):
    labels = render.components(mask)
    assert torch.equal(labels == mask.numel(), ~mask)
    return sorted(labels[mask].unique(return_counts=True)[1].tolist())


def flood(mask):
    """The sizes of the 8-connected components, found the slow way."""
    todo, sizes = {tuple(p) for p in mask.nonzero().tolist()}, []
    while todo:
        stack, size = [todo.pop()], 0
        while stack:
            y, x = stack.pop()
            size += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            stack += near
        sizes.append(size)
    return sorted(sizes)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 24), st.integers(1, 24))
def test_components(seed, density, height, width):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < density
    assert component_sizes(mask) == flood(mask)


def test_components_of_a_snake():
    mask = torch.zeros(41, 30, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    assert component_sizes(mask) == [int(mask.sum())]


# ---- the preview program


def run(tmp_path, *arguments):
    draw.save_png(tmp_path / "in.png", media.to_u8(picture(50, 90)[0] / 2 + 0.5).permute(1, 2, 0).numpy())
    files = ["--image", str(tmp_path / "in.png"), "--out", str(tmp_path / "w.mp4")]
    return render.main([*files, "--size", "64x96", *arguments])


def test_preview(tmp_path, capsys):
    np.save(tmp_path / "d.npy", np.linspace(4, 1, 50)[:, None] * np.ones((1, 90)))
    poses = {"c2w": move_path("back 2 + yaw 5", 9).tolist(), "fps": 12, "fov_x": 70}
    (tmp_path / "p.json").write_text(json.dumps(poses))
    arguments = ["--poses", str(tmp_path / "p.json"), "--depth", str(tmp_path / "d.npy"), "--frames", "12"]
    assert run(tmp_path, *arguments) == 0
    assert "field of view 70 degrees" in capsys.readouterr().out
    video, mask = load_video(tmp_path / "w.mp4"), np.stack(list(media.read_mask(tmp_path / "w_mask.mp4")))
    assert video.shape == (12, 64, 96, 3) and mask.shape == (12, 64, 96)
    assert mask[0].min() > 0.98 and 0.2 < mask[-1].mean() < 0.98
    _, source = surface.place(media.load_image(tmp_path / "in.png"), load_depth(tmp_path / "d.npy"), 70, (64, 96))
    path = camera.scale_translation(load_path(tmp_path / "p.json").c2w, 0.1 * surface.median_depth(source))
    warp = render.render(source, camera.normalize(path, 12), (64, 96))
    difference = torch.from_numpy(video[-1]).permute(2, 0, 1) / 127.5 - 1 - warp.frames[0, :, -1]
    assert difference.abs().mean() < 0.05  # the video codec's loss
    sheet, view = (np.array(Image.open(tmp_path / name)) for name in ("w_sheet.png", "w_path.png"))
    assert sheet.shape[1] > 8 * 200 and (view == [255, 0, 0]).all(-1).any() and (view == [0, 128, 0]).all(-1).any()
    names = {"d.npy", "in.png", "p.json", "w.mp4", "w_mask.mp4", "w_path.png", "w_sheet.png", "w_cloud.ply"}
    assert {p.name for p in tmp_path.iterdir()} == names
    header, _, body = (tmp_path / "w_cloud.ply").read_bytes().partition(b"end_header\n")
    cloud = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    assert f"element vertex {len(cloud)}".encode() in header and b"binary_little_endian" in header
    assert np.array_equal(cloud["xyz"], source.points[source.valid].numpy())
    assert np.array_equal(cloud["rgb"], source.rgb[source.valid].numpy())


def test_preview_by_pi3x(tmp_path, capsys):
    weights = GEOMETRY / "pi3x_weights.safetensors"
    assert run(tmp_path, "--move", "orbit 10", "--geometry", str(weights), "--frames", "3", "--resample", "--fps", "8") == 0
    out = capsys.readouterr().out
    assert f"Pi3X of {weights}" in out and "3 poses" in out and "3 frames" in out
    assert load_video(tmp_path / "w.mp4").shape == (3, 64, 96, 3)
    network, image = load_pi3x(weights), media.fit_image(media.load_image(tmp_path / "in.png"), (64, 96))
    geometry = surface.ensure_valid(surface.estimate(network, [image])[0])
    assert f"one unit of it is {0.1 * surface.median_depth(geometry):.4g} of" in out
    (tmp_path / "Pi3X").mkdir()
    shutil.copy(weights, tmp_path / "Pi3X" / "model.safetensors")
    assert run(tmp_path, "--move", "orbit 10", "--geometry", str(tmp_path / "Pi3X"), "--frames", "2") == 0


def test_the_flag_beats_the_file(tmp_path, capsys):
    (tmp_path / "p.json").write_text(json.dumps({"c2w": move_path("hold", 3).tolist(), "fov_x": 70}))
    for flag, expected in (([], 70), (["--fov", "40"], 40)):
        assert run(tmp_path, "--poses", str(tmp_path / "p.json"), *flag) == 0
        assert f"field of view {expected} degrees" in capsys.readouterr().out
    assert run(tmp_path, "--move", "hold", "--frames", "2") == 0
    assert "field of view 55 degrees" in capsys.readouterr().out


def test_a_tall_picture_is_told_to_be_cut(tmp_path, capsys):
    Image.new("RGB", (60, 120)).save(tmp_path / "tall.png")
    words = ["--image", str(tmp_path / "tall.png"), "--move", "hold", "--frames", "1", "--size", "64x96"]
    assert render.main([*words, "--out", str(tmp_path / "w.mp4")]) == 0
    assert "tall.png: 60 wide and 120 high" in capsys.readouterr().err


def test_stopping_leaves_nothing(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(render, "to_video", stop)
    assert run(tmp_path, "--move", "hold") == 130 and "stopped" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


# ---- the same bits on every CPU


def fingerprint_of_frames() -> str:
    """Of depth, warp and keyframes of a demo picture, along a path that turns about every axis."""
    data = Path(render.__file__).parent / "data"
    image, depth = media.load_image(data / "plaza.png"), load_depth(data / "plaza_depth.png")
    _, geometry = surface.place(image, depth, 55, (64, 96))
    path = move_path("forward 3 + yaw 23 + up 1, orbit 31 + roll 4")[::8]
    poses = camera.normalize(camera.scale_translation(path, 0.1 * surface.median_depth(geometry)), len(path))
    digest = hashlib.sha256(geometry.points.numpy().tobytes())
    for frames in (render_frames(geometry, poses), memory.render_keyframes([geometry, geometry], poses)):
        warp = render.collect(frames, (64, 96))
        digest.update(warp.frames.numpy().tobytes() + warp.visible.numpy().tobytes())
    return digest.hexdigest()


def test_frames_do_not_depend_on_the_cpu():
    """Kernels without vector instructions, and so without fused multiply-add, give the same bits."""
    words = "from test_render import fingerprint_of_frames as f; print(f())"
    plain = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    other = subprocess.run([sys.executable, "-c", words], env=plain, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint_of_frames()


def test_resizing_equals_the_library():
    """Bit for bit where the CPU has fused multiply-add and pictures have three channels; elsewhere the library differs."""
    generator = torch.Generator().manual_seed(0)
    for old, new in (((48, 80), (84, 140)), ((392, 644), (384, 640)), ((1, 1), (4, 5)), ((30, 44), (64, 30))):
        images = torch.rand(2, 3, *old, generator=generator)
        expected = F.interpolate(images, new, mode="bilinear", align_corners=False)
        check("Resized maps", surface.resize(images, new), expected, 2e-5)
