"""The renderer and camera paths against the official numbers; moves, files, properties and the preview program."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import GEOMETRY, check, config, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import render
from files import draw, media
from geometry import camera, surface
from geometry.camera import CameraPath, move_path
from geometry.paths import load_path
from geometry.pi3x import load_pi3x
from geometry.surface import Geometry
from render import RenderSettings, render_frames
from sample import pose_chunks

FIELDS = ("point_map_world", "depth_map", "conf_map", "valid_mask", "intrinsic", "source_pose", "source_rgb_u8")


def geometry(golden, prefix="geom/", **given) -> Geometry:
    points, depth, confidence, valid, K, c2w, rgb = (
        given[name] if name in given else golden[prefix + name] for name in FIELDS
    )
    return Geometry(points, depth, confidence, valid.bool(), K, c2w, rgb)


def check_frames(component, frames, expected, visible=None):
    """Bit for bit: the largest difference in grey levels, and any pixel of the mask."""
    pictures, masks = map(torch.stack, zip(*frames))
    check(f"{component} frames (grey levels)", pictures, expected, 0)
    if visible is not None:
        check(f"{component} visibility", masks, visible, 0)


# ---- rendering against the goldens


@pytest.fixture(scope="module")
def room():
    return tensors(GEOMETRY / "render_room.safetensors")


@pytest.mark.parametrize("case, frames, options", [
    ("splat.mean_first_frame", range(8), {"hole_radius": 0}),
    ("splat.black", [4, 7], {"hole_radius": 0, "mean_fill": False}),
    ("target_fill.mean_first_frame", range(8), {}),
    ("target_fill.black", [4, 7], {"mean_fill": False}),
    ("nobreak", [0, 4, 7], {"mesh_break": False}),
    ("spa1", [0, 4, 7], {"samples": 1}),
    ("spa2.r2n6", [0, 4, 7], {"samples": 2, "hole_radius": 2, "min_neighbors": 6}),
])  # fmt: skip
def test_room(room, case, frames, options):
    rendered = list(render_frames(geometry(room), room["poses"], RenderSettings(**options)))
    check_frames("Render room", [rendered[i] for i in frames], room[f"{case}/frames_u8"], room.get(f"{case}/visible"))


def test_room_samples_and_video(room):
    source = geometry(room)
    samples, rows = render.surface_samples(source, RenderSettings()), room["samples/sample_idx"]
    assert samples.xyz.shape[1] == config(GEOMETRY / "render_room.safetensors")["samples"]["num_points"]
    check("Render samples", samples.xyz[:, rows].T, room["samples/sample_points"], 1e-5, relative=True)
    check("Render sample colours", samples.rgb[rows], room["samples/sample_colors"], 0)
    check("Render source xy", samples.xy[rows], room["samples/sample_xy"], 0)
    _, xy, _ = render.splat(samples, source.c2w @ room["poses"][4], source.K, source.depth.shape)
    check("Render source xy", xy, room["target_fill.mean_first_frame/source_xy_frame4"], 0)
    video, mask = (room[f"target_fill.mean_first_frame/warp_{name}_sel"] for name in ("video", "visibility_mask"))
    warp = render.render(source, room["poses"], tuple(video.shape[-2:]))
    check("Render video", warp.frames[:, :, [3, 4]], video, 1e-6)
    check("Render mask", warp.visible[:, :, [3, 4]], mask, 1e-6)


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
    _, valid, _ = render.fill_top(source)
    normals, known = surface.surface_normals(source.points, valid)
    check("Normals", normals.permute(1, 2, 0), golden["break/normals"], 1e-5)
    check("Mesh break", known, golden["break/normal_mask"], 0)
    check("Mesh break", surface.depth_edges(source.depth, valid, 0.03), golden["break/depth_edge"], 0)
    check("Mesh break", surface.normal_edges(normals, known, 5.0), golden["break/normal_edge"], 0)
    broken = surface.mesh_break(source.points, source.depth, valid)
    check("Mesh break", broken, golden["break/break_mask"], 0)
    second = surface.mesh_break(source.points, source.depth, valid & ~broken)
    check("Mesh break", second, golden["break/break_mask_second_pass"], 0)
    for rtol, degrees in ((0.005, 1.0), (0.1, 20.0)):
        mask = surface.mesh_break(source.points, source.depth, valid, rtol, degrees)
        check("Mesh break", mask, golden[f"break/break_mask_rtol{rtol}_deg{degrees}"], 0)


def test_sky():
    golden = tensors(GEOMETRY / "render_sky.safetensors")
    source = geometry(golden)
    check_frames("Render sky", render_frames(source, golden["poses"]), golden["target_fill/frames_u8"],
                 golden["target_fill/visible"])
    plain = list(render_frames(source, golden["poses"], RenderSettings(hole_radius=0, mean_fill=False)))
    check("Render sky visibility", torch.stack([mask for _, mask in plain]), golden["splat.black/visible"], 0)
    points, valid, filled = render.fill_top(source)
    check("Top fill mask", filled, golden["topfill/fill_mask"], 0)
    check("Top fill mask", valid, golden["topfill/valid"], 0)
    check("Top fill points", points[filled], golden["topfill/points_at_fill"], 1e-5, relative=True)
    mesh_valid = valid & ~surface.mesh_break(points, source.depth, valid)
    check("Top fill mask", mesh_valid, golden["topfill/mesh_valid"], 0)
    for name in ("far_patch", "boundary_gt_global", "few_boundary", "two_small_one_side"):
        key = f"topfill_{name}/"
        points, _, filled = render.fill_top(
            replace(source, depth=golden[key + "depth_map"], confidence=golden[key + "conf_map"],
                    points=torch.ones_like(source.points)))
        check("Top fill mask", filled, golden[key + "fill_mask"], 0)
        if filled.any():
            check("Top fill points", points[filled][::37], golden[key + "points_at_fill_every37"], 1e-5, relative=True)


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


@pytest.mark.parametrize("case", ["all_edges_equal_conf", "all_edges_equal_conf_ramp", "none_valid_checker_conf",
                                  "none_valid_smooth_conf", "single_valid_pixel"])  # fmt: skip
def test_fallback(case):
    path = GEOMETRY / "render_fallback.safetensors"
    golden, expected = tensors(path), config(path)["variants"][case]
    common = {"intrinsic": golden["intrinsic"], "source_pose": golden["source_pose"], "source_rgb_u8": golden["rgb"]}
    source = geometry(golden, case + "/", **common)
    ensured = surface.ensure_valid(source)
    check("Fallback mask", ensured.valid, golden[f"{case}/ensured_valid_mask"], 0)
    check("Fallback confidence", ensured.confidence, golden[f"{case}/ensured_conf_map"], 0)
    for percent in (20, 50):
        valid = surface.keep_confident(source, percent).valid
        check("Fallback mask", valid, golden[f"{case}/forced{percent}_valid_mask"], 0)
    check("Depth scale", surface.median_depth(ensured), expected["depth_scale"], 1e-6, relative=True)
    assert render.surface_samples(source, RenderSettings()).xyz.shape[1] == expected["samples"]["num_points"]
    frames = render_frames(source, golden["poses"])
    check_frames("Render fallback", frames, golden[f"{case}/frames_u8"], golden[f"{case}/visible"])


def test_fallback_retries_and_the_whole_call():
    path = GEOMETRY / "render_fallback.safetensors"
    golden, expected = tensors(path), config(path)
    for case in ("small_checker", "small_edges"):
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


# ---- poses and sizes against the goldens


@pytest.fixture(scope="module")
def poses():
    return tensors(GEOMETRY / "poses.safetensors")


def test_pose_normalisation(poses):
    given = poses["roll/poses"]
    for name, value, frames in [("exact4x4", given, 7), ("pad4x4", given, 11), ("trunc4x4", given, 4),
                                ("from3x4", given[:, :3], 8), ("batch", given[None], 7),
                                ("nonorthonormal_out", poses["roll/nonorthonormal_in"], 7),
                                ("scaled_then_rel", poses["roll/scaled_0.1x3.7"], 7)]:  # fmt: skip
        check("Poses", camera.normalize(value, frames), poses[f"roll/{name}"], 1e-6)
    check("Poses", camera.inverse(given), poses["roll/se3_inverse"], 1e-6)
    check("Poses", camera.scale_translation(given, 0.1 * 3.7), poses["roll/scaled_0.1x3.7"], 1e-6)
    for shape in ((2, 5, 4, 4), (4, 4), (5, 4, 3)):
        with pytest.raises(ValueError, match="expected"):
            camera.homogeneous(torch.zeros(shape))


def window(path, chunk):
    """What sample.py feeds and the cameras make of it: 33 poses, after chunk 0 with the one before in front."""
    chunks = [camera.hold(control.poses) for control in pose_chunks(path, 33 * (chunk + 1))]
    return torch.cat([chunks[chunk - 1][-1:], chunks[chunk]]) if chunk else chunks[0]


def test_windows(poses):
    path, expected = poses["auto/poses_in"], config(GEOMETRY / "poses.safetensors")
    for length, chunks in expected["windows_33"].items():
        for chunk, indices in enumerate(chunks):
            assert window(torch.arange(int(length)), chunk).tolist() == indices
    for chunk in (1, 2):
        check("Pose windows", window(path, chunk), poses[f"auto/chunk{chunk}"], 0)
    check("Pose windows", window(path[:50], 1), poses["auto/short17_chunk1"], 0)
    for chunk in range(3):
        scaled = camera.scale_translation(window(path, chunk), expected["effective_scale_used"])
        check("Poses", camera.normalize(scaled, len(scaled)), poses[f"auto/rollout{chunk}"], 1e-6)


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


def test_web_page_moves(poses):
    axes = {"strafe_right": (0, 1), "strafe_left": (0, -1), "rise": (1, 1), "descend": (1, -1), "forward": (2, 1),
            "backward": (2, -1), "yaw_right": (3, 1), "yaw_left": (3, -1), "pitch_up": (4, 1), "pitch_down": (4, -1),
            "roll_right": (5, 1), "roll_left": (5, -1)}  # fmt: skip
    for index, case in enumerate(config(GEOMETRY / "poses.safetensors")["web"]):
        move = torch.zeros(6)
        for button in case["buttons"]:
            component, sign = axes[button]
            move[component] += sign
        move[:3] /= max(move[:3].norm(), 1e-9)
        move[3:] *= case["rotation_degrees"]
        progress = torch.linspace(0 if case["include_start"] else 1 / case["window"], 1, case["window"])
        path = camera.motion(poses[f"web/{index}/start"], move, progress)
        check("Web page moves", path, poses[f"web/{index}/poses"], 1e-6)
        check("Web page moves", path[-1], poses[f"web/{index}/end"], 1e-6)


# ---- moves and files


def test_moves_end_where_they_say():
    path = move_path("forward 1, yaw 90, forward 2 + up 1, hold")
    assert path.shape == (132, 4, 4)
    assert torch.equal(path[0], torch.eye(4))
    ends = path[32::33, :3, 3]
    check("Moves", ends, torch.tensor([[0, 0, 1], [0, 0, 1], [2, -1, 1], [2, -1, 1.0]]), 1e-6)  # right of z is x; up -y
    check("Moves", path[65, :3, 2], torch.tensor([1.0, 0, 0]), 1e-6)  # yawed right: z looks along x
    check("Moves", move_path("pitch 90")[-1, :3, 2], torch.tensor([0, -1.0, 0]), 1e-6)
    check("Moves", move_path("roll 90")[-1, :3, 0], torch.tensor([0, 1.0, 0]), 1e-6)  # clockwise: x turns to down
    assert torch.equal(move_path("left 1.5"), move_path("right -1.5"))
    steps = (path[1:, :3, 3] - path[:-1, :3, 3]).norm(dim=-1)
    assert steps[0] < 0.01 < 0.04 < steps[16] < 0.06  # slow at the ends, fast in the middle
    assert steps.max() < 0.12


@pytest.mark.parametrize("text, message", [
    ("forward 1, fly 2", "unknown verb 'fly', expected forward, back"), ("forward", "one number below 10000"
                                                                                    " after 'forward'"),
    ("yaw left", "one number below 10000 after 'yaw'"), ("", "unknown verb ''"), ("forward 1,", "unknown verb"),
    ("forward 1 2", "one number"), ("yaw nan", "one number"), ("hold 3", "hold alone"),
])  # fmt: skip
def test_bad_moves(text, message):
    with pytest.raises(ValueError, match=message):
        move_path(text)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_inverse_and_file_round_trip(tmp_path_factory, move):
    move = torch.tensor(move) * torch.tensor([1, 1, 1, 60, 60, 60.0])
    path = camera.motion(torch.eye(4), move, torch.linspace(0, 1, 5))
    check("Pose round trip", camera.inverse(camera.inverse(path)), path, 1e-5)
    check("Pose round trip", camera.inverse(path) @ path, torch.eye(4).expand(5, 4, 4), 1e-5)
    file = tmp_path_factory.mktemp("path") / "poses.json"
    file.write_text(json.dumps({"c2w": path[:, :3].tolist(), "fps": 24, "fov_x": 60.5}))
    loaded = load_path(file)
    assert torch.equal(loaded.c2w, path) and (loaded.fps, loaded.fov_x) == (24, 60.5)


def test_official_path_file(tmp_path):
    path = move_path("forward 1")
    np.savez(tmp_path / "camera_poses.npz", camera_poses=path.numpy())
    loaded = load_path(tmp_path / "camera_poses.npz")
    assert torch.equal(loaded.c2w, path) and loaded == CameraPath(loaded.c2w, None, None)


STILL = move_path("hold").tolist()


def broken(frame, change):
    path = move_path("forward 1").clone()
    path[frame] = change(path[frame])
    return path.tolist()


@pytest.mark.parametrize("content, message", [
    ({"c2w": broken(3, lambda p: p * math.nan)}, "frame 3: a number is not finite"),
    ({"c2w": broken(4, lambda p: p + torch.eye(4) * 0.01)}, "frame 4: the last row"),
    ({"c2w": broken(5, lambda p: torch.diag(torch.tensor([1, 1.1, 1, 1])) @ p)}, "frame 5: .* orthonormal"),
    ({"c2w": broken(6, lambda p: torch.diag(torch.tensor([1, -1.0, 1, 1])) @ p)}, "frame 6: .* reflection"),
    ({"c2w": move_path("hold")[:1].tolist()}, "1 pose"), ({"c2w": [[1, 2], [3]]}, "expected a list"),
    ({"c2w": [[1, 2], [3, 4]]}, "expected"), ({"poses": []}, "the key 'c2w'"), ([], "the key 'c2w'"), ({"c2w": [[["1"]]]}, "expected"),
    ({"c2w": broken(2, lambda p: p + 1e7 * torch.eye(4).roll(-1, 1))}, "frame 2: .*1e6"), ({"c2w": [10**400]}, "expected"),
    ({"c2w": STILL, "fps": -1}, "fps"), ({"c2w": STILL, "fps": 0}, "fps"), ({"c2w": STILL, "fov_x": 180}, "fov_x"),
    ({"c2w": STILL, "fps": "fast"}, "fps is 'fast'"), ({"c2w": []}, "expected"),
])  # fmt: skip
def test_bad_path_files(tmp_path, content, message):
    file = tmp_path / "poses.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"(?s)poses.json.*{message}"):
        load_path(file)


def test_unreadable_path_files(tmp_path):
    (tmp_path / "p.json").write_text("{")
    (tmp_path / "p.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "other.npz", c2w=np.eye(4))
    np.savez(tmp_path / "pickle.npz", camera_poses=np.array([{}], dtype=object))
    for name, message in (("p.json", "not valid JSON"), ("p.npz", "not a readable numpy file"),
                          ("p.obj", "unknown camera"), ("other.npz", "no array 'camera_poses', found c2w"),
                          ("pickle.npz", "plain numbers")):
        with pytest.raises(ValueError, match=message):
            load_path(tmp_path / name)
    with pytest.raises(OSError):
        load_path(tmp_path / "missing.json")


# ---- geometry and properties


def picture(height=96, width=160):
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([columns, rows, (8 * columns).sin() / 2 + 0.5])[None] * 1.6 - 0.8


@settings(max_examples=8, deadline=None)
@given(st.floats(0.2, 9), st.floats(0, 0.4), st.floats(30, 100))
def test_identity_reproduces_the_source(depth, slope, fov):
    image = picture(28, 42)
    ramp = depth * (1 + slope * torch.linspace(0, 1, 28)[:, None].expand(28, 42))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surface, "map_size", lambda height, width: (height, width))
        source = surface.geometry_from_depth(image, ramp, surface.pinhole(fov, 28, 42))
    _, (rgb, visible) = render_frames(source, torch.eye(4).repeat(2, 1, 1), RenderSettings(hole_radius=0))
    assert visible[1:-1, 1:-1].all()
    step = max(source.rgb.int().diff(dim=axis).abs().max() for axis in (0, 1))
    assert (rgb.int() - source.rgb.int())[visible].abs().max() <= step  # a sample is at most half a pixel away


def test_a_thumbnail_keeps_the_pictures_colours():
    """Stripes too fine for the video's own size are still on the geometry's surface; at official sizes nothing changes."""
    stripes = np.tile(np.repeat(np.uint8([0, 255]), 3), 64)[None, :, None].repeat(256, 0).repeat(3, 2)
    image, geometry = surface.place(Image.fromarray(stripes), None, 60, (64, 96))
    assert geometry.rgb.float().std() > 90 > 127.5 * image.std()
    image, geometry = surface.place(Image.fromarray(stripes), None, 60, (384, 640))
    assert torch.equal(geometry.rgb, surface.geometry_from_depth(image, torch.ones(1, 1), surface.pinhole(60, 384, 640)).rgb)


def test_geometry_from_depth_is_a_pinhole():
    source = surface.geometry_from_depth(picture(), torch.ones(3, 5) * 2, surface.pinhole(90, 96, 160))
    height, width = source.depth.shape
    assert (height, width) == (378, 644) and source.valid.all()  # of 16 points a pixel
    check("Geometry from depth", source.K[0], torch.tensor([width / 2, 0, (width - 1) / 2]), 1e-4)
    check("Geometry from depth", source.K[1], torch.tensor([0, height / 2 * 160 / 96, (height - 1) / 2]), 1e-4)
    check("Geometry from depth", source.points[0, 0, 0], torch.tensor(-2 * (width - 1) / width), 1e-5)
    assert (source.points[..., 2] == 2).all() and source.rgb.dtype == torch.uint8


def test_unknown_depth_is_invalid_and_does_not_bleed():
    depth = torch.full((96, 160), 3.0)
    depth[40:60, 50:80] = math.nan
    depth[10:20, 10:20], depth[80:85, 100:120] = -1, math.inf
    source = surface.geometry_from_depth(picture(), depth, surface.pinhole(60, 96, 160))
    check("Geometry from depth", source.depth[source.valid], torch.tensor(3.0).expand(source.valid.sum()), 1e-6)
    share = (~source.valid).float().mean().item()
    assert abs(share - (600 + 100 + 100) / depth.numel()) < 0.005
    assert source.points.isfinite().all()


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
    video, mask = media.load_video(tmp_path / "w.mp4"), np.stack(list(media.read_mask(tmp_path / "w_mask.mp4")))
    assert video.shape == (12, 64, 96, 3) and mask.shape == (12, 64, 96)
    assert mask[0].min() > 0.98 and 0.2 < mask[-1].mean() < 0.98
    _, source = surface.place(media.load_image(tmp_path / "in.png"), media.load_depth(tmp_path / "d.npy"), 70, (64, 96))
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


def test_depth_and_field_of_view_are_cropped_with_the_picture():
    """A wide picture loses its sides: a depth edge stays on its colour edge, at any size of the depth map, and the field
    of view of the whole picture narrows."""
    edge = np.zeros((100, 400, 3), np.uint8)
    edge[:, 170:] = 255
    for rows, columns in ((100, 400), (50, 200), (10, 400)):
        depth = torch.ones(rows, columns)
        depth[:, round(columns * 170 / 400):] = 3
        _, geometry = surface.place(Image.fromarray(edge), depth, 90, (64, 128))
        color = geometry.rgb[200, :, 0] > 127
        place = (geometry.depth[200] > 2).int().argmax() - color.int().argmax()
        assert abs(place) <= 4, f"{rows}x{columns}: {place} pixels apart of {len(color)}"
    width = geometry.depth.shape[1]
    seen = 2 * math.degrees(math.atan(width / 2 / geometry.K[0, 0]))
    assert abs(seen - 2 * math.degrees(math.atan(0.5))) < 0.1  # half the width of 90 degrees


def test_preview_by_pi3x(tmp_path, capsys):
    weights = GEOMETRY / "pi3x_weights.safetensors"
    assert run(tmp_path, "--move", "orbit 10", "--geometry", str(weights), "--frames", "3", "--resample", "--fps", "8") == 0
    out = capsys.readouterr().out
    assert f"Pi3X of {weights}" in out and "3 poses" in out and "3 frames" in out
    assert media.load_video(tmp_path / "w.mp4").shape == (3, 64, 96, 3)
    network, image = load_pi3x(weights), media.fit_image(media.load_image(tmp_path / "in.png"), (64, 96))
    geometry = surface.ensure_valid(surface.estimate(network, [image])[0])
    assert f"one unit of it is {0.1 * surface.median_depth(geometry):.4g} of" in out


def test_the_flag_beats_the_file(tmp_path, capsys):
    (tmp_path / "p.json").write_text(json.dumps({"c2w": move_path("hold", 3).tolist(), "fov_x": 70}))
    for flag, expected in (([], 70), (["--fov", "40"], 40)):
        assert run(tmp_path, "--poses", str(tmp_path / "p.json"), *flag) == 0
        assert f"field of view {expected} degrees" in capsys.readouterr().out
    assert run(tmp_path, "--move", "hold", "--frames", "2") == 0
    assert "field of view 55 degrees" in capsys.readouterr().out


def test_stopping_leaves_nothing(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(render, "to_video", stop)
    assert run(tmp_path, "--move", "hold") == 130 and "stopped" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_a_missing_argument_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        render.main(["--image", "x.png"])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("arguments, message", [
    (["--move", "fly 1"], "unknown verb 'fly'"), (["--move", "hold", "--size", "64"], "HEIGHTxWIDTH"),
    (["--move", "hold", "--size", "65x96"], "even"), (["--poses", "nowhere.npz"], "nowhere.npz"),
    (["--move", "hold", "--depth", "nowhere.npy"], "nowhere.npy"), (["--move", "hold", "--fov", "180"], "fov"),
    (["--move", "hold", "--frames", "0"], "frame"), (["--move", "hold", "--out", "/no/such/folder/w.mp4"], "folder"),
    (["--move", "hold", "--out", "w.avi"], "mp4"), (["--move", ""], "unknown verb"), (["--poses", ""], "format"),
    (["--move", "hold", "--size", "999999x999999"], "8192"),
])  # fmt: skip
def test_preview_errors(tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("render.py: error: ") and message in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["in.png"]
