"""Clips that are shot again: which frame is seen from where, over borders of chunks; and paths that are taken from clips."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import known
import numpy as np
import pytest
import torch
from goldens import DISTILLED, GEOMETRY, INPUTS, SIZE
from PIL import Image
from sampling import read, refused, sample, stop_in_chunk

import view
from clips import steady_path
from files.media import fit_image, read_rate, resize_frame, to_frames
from files.video import is_film, write_video
from geometry import surface
from geometry.camera import CameraPath, move_path, normalize, product
from geometry.paths import load_path, path_json
from geometry.pi3x import load_pi3x
from geometry.surface import Geometry, estimate, place
from job import load_settings, prepare
from memory import Camera
from reshoot import Reshoot, estimate_frames, filmed_path
from sample import parse
from studio import Studio

WEIGHTS = GEOMETRY / "pi3x_weights.safetensors"
PI3X = ["--set", f"geometry={WEIGHTS}"]
FOV = 60.0


def scene(frame: int = 0, depth: float = 2.0, c2w: torch.Tensor = torch.eye(4)) -> Geometry:
    """A gray wall at depth 4 and before it, at `depth`, a white square of 12 pixels that goes 1 pixel to the right in every
    frame: its left edge is at column 20 in frame 0."""
    picture = np.full((64, 96, 3), 90, np.uint8)
    picture[:, ::4] = 110
    z = torch.full((64, 96), 4.0)
    picture[26:38, 20 + frame:32 + frame] = 250
    z[26:38, 20 + frame:32 + frame] = depth
    _, geometry = place(Image.fromarray(picture), z, FOV, (64, 96))
    points = torch.stack(surface.transform(c2w, *geometry.points.unbind(-1)), dim=-1)
    return replace(geometry, points=points, c2w=c2w)


PATH = move_path("right 3 + yaw -5 + zoom 1.2, up 1")


def chunks(camera, path=PATH, zoom=None):
    """The warp along a path, chunk by chunk, as a rollout asks for it: frames and visibility [T, ...]."""
    frames, seen = [], []
    for start in range(0, len(path), 33):
        warp = camera.warp(path[start:start + 33], None if zoom is None else zoom[start:start + 33])
        camera.remember(torch.zeros(1))
        frames.append(warp.frames[0, :, -33:].transpose(0, 1))
        seen.append(warp.visible[0, 0, -33:])
    return torch.cat(frames), torch.cat(seen)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Maps of the size of the small pictures, to be fast."""
    monkeypatch.setattr(surface, "map_size", lambda height, width, *limit: (height, width))


@pytest.mark.parametrize("relative", ["clip", "first"])
def test_a_standing_clip_is_a_picture(relative):
    """To the bit, over the border of two chunks, with zoom; also if it is shorter than the path."""
    zoom = torch.linspace(1, 1.3, 66)[:, None].expand(-1, 2)
    start = product(move_path("forward 1", 2)[1:], PATH)  # a path may begin anywhere
    for path in (PATH, start):
        expected = chunks(Camera(scene(), (64, 96)), path, zoom)
        for count in (66, 40):
            found = chunks(Reshoot([scene()] * count, (64, 96), relative=relative), path, zoom)
            assert all(map(torch.equal, found, expected))


def square(frames: torch.Tensor) -> list[float]:
    """Column of the middle of what is white in each frame [T, 3, H, W]."""
    white = (frames > 0.8).all(1).float().sum(1)
    return ((white * torch.arange(frames.shape[-1])).sum(1) / white.sum(1)).tolist()


@pytest.mark.parametrize("relative", ["clip", "first"])
def test_what_moves_is_where_it_is_at_that_time(relative):
    """The square has gone t pixels in frame t, and a camera f times as far from a thing sees it shifted by f / depth."""
    focal, unit, away = 48 / np.tan(np.radians(FOV / 2)), 0.5, move_path("right 1, hold")
    camera = Reshoot([scene(min(t, 45)) for t in range(66)], (64, 96), unit, relative=relative)
    frames, seen = chunks(camera, away)
    for t in (0, 1, 20, 32, 33, 34, 45, 65):
        shift = focal * unit * away[t, 0, 3].item() / 2
        assert abs(square(frames[t:t + 1])[0] - (25.5 + min(t, 45) - shift)) < 0.7, t
    assert seen[0].min() == 1 and 0.8 < seen[65].mean() < 1  # what the square hid is not known


def test_its_own_path_gives_the_clip_back():
    """Relative to the clip's moving camera nothing moves; relative to its first frame that takes the clip's own path."""
    clip = move_path("right 2 + yaw 8", 40)
    geometries = [scene(t, c2w=pose) for t, pose in enumerate(clip)]
    own = torch.stack([geometry.rgb for geometry in geometries]).permute(0, 3, 1, 2) / 127.5 - 1
    own = surface.resize(own, (64, 96))
    for relative, path in (("clip", torch.eye(4).repeat(40, 1, 1)), ("first", clip)):
        camera = Reshoot(geometries, (64, 96), 1.0, relative=relative)
        frames, seen = chunks(camera, path)
        inside = (slice(0, 40), slice(None), slice(8, -8), slice(8, -8))
        assert (frames[:40] - own)[inside].abs().mean() < 0.03 and seen[:40].mean() > 0.97
        assert torch.equal(frames[0], own[0])
        assert (camera.world(path) - clip).abs().max() < 1e-5


def test_relative_to_the_first_frame_the_clips_camera_is_undone():
    """The scene stands, the clip's camera turns: seen from the first frame's camera all frames show what that one does."""
    turns = move_path("yaw 6", 33)
    geometries = [scene(c2w=pose) for pose in turns]  # the square stays in the middle of the view, so it goes in the world
    still = torch.eye(4).repeat(33, 1, 1)
    clip, first = (chunks(Reshoot(geometries, (64, 96), 1.0, relative=relative), still)[0] for relative in ("clip", "first"))
    focal = 48 / np.tan(np.radians(FOV / 2))
    places = square(clip), square(first)
    assert abs(places[0][32] - places[0][0]) < 0.5
    x = np.arctan((25.5 - 47.5) / focal)
    assert abs(places[1][32] - (47.5 + focal * np.tan(x + np.radians(6)))) < 0.7


def test_state_goes_on():
    """What a rollout keeps of it is enough for the same next chunk, and an error before it changes nothing."""
    clip = [scene(min(t, 45)) for t in range(66)]
    whole, broken = Reshoot(clip, (64, 96)), Reshoot(clip, (64, 96))
    before = broken.state()
    broken.warp(PATH[:33])
    broken.restore(before)
    assert not broken.begun and broken.frame == 0
    broken.warp(PATH[:33])
    broken.remember(torch.zeros(1))
    other = Reshoot(clip, (64, 96))
    other.restore(broken.state())
    expected = chunks(whole)[0][33:]
    assert torch.equal(chunks(other, PATH[33:])[0], expected) and other.frame == 66


def test_one_lens_for_all_frames():
    network = load_pi3x(WEIGHTS)
    images = [fit_image(Image.fromarray(np.roll(INPUTS["image"], 5 * t, axis=1)), SIZE) for t in range(3)]
    joint = estimate(network, images, 11_760)
    found = estimate_frames(network, images, True, 11_760)
    assert torch.equal(found[0].K, found[2].K) and torch.allclose(found[0].K, torch.stack([each.K for each in joint]).mean(0))
    assert all(torch.equal(a.c2w, b.c2w) and torch.equal(a.depth, b.depth) for a, b in zip(found, joint))
    alone = estimate_frames(network, images, False, 11_760, torch.tensor([[80.0, 0, 63.5], [0, 80.0, 31.5], [0, 0, 1]]))
    assert torch.equal(alone[1].depth, estimate(network, images[1:2], 11_760)[0].depth)
    assert torch.equal(alone[2].c2w, torch.eye(4)) and abs(alone[0].K[0, 0] - 80 * alone[0].size[1] / SIZE[1]) < 1e-3


# ------------------------------------------------------------------------------------------------- a path from a clip


def test_what_is_a_film(tmp_path):
    """By its content, whatever its name."""
    write_video(tmp_path / "a.json", np.zeros((3, 32, 32, 3), np.uint8), 24)
    (tmp_path / "b.mp4").write_text('{"c2w": []}')
    (tmp_path / "c.txt").write_text("1 2 3\n" * 200)
    np.save(tmp_path / "d.npy", np.zeros((3, 4, 4)))
    np.savez(tmp_path / "e.mp4", np.zeros(3))
    Image.new("RGB", (9, 9)).save(tmp_path / "f.gif")
    assert [is_film(tmp_path / name) for name in ("a.json", "b.mp4", "c.txt", "d.npy", "e.mp4", "", "none")] == [True] + [False] * 6
    assert read_rate(tmp_path / "a.json") == 24 and read_rate(tmp_path / "d.npy") is None


def test_a_clips_path_is_in_its_own_depth(tmp_path):
    """What the network says of all frames together, from the first one on, in tenths of that one's median depth."""
    frames = np.stack([np.roll(INPUTS["image"], 5 * t, axis=1) for t in range(4)])
    np.save(tmp_path / "clip.npy", frames)
    network = load_pi3x(WEIGHTS)
    path, sure = filmed_path(network, tmp_path / "clip.npy", 11_760)
    small = [resize_frame(frame, surface.geometry_size(*SIZE, 11_760)) for frame in frames]
    joint = estimate(network, [torch.tensor(frame).permute(2, 0, 1)[None] / 127.5 - 1 for frame in small], 11_760)
    c2w = normalize(torch.stack([each.c2w for each in joint]), 4)
    assert (path.c2w[0] - torch.eye(4)).abs().max() < 1e-5
    assert torch.allclose(path.c2w[:, :3, :3], c2w[:, :3, :3], atol=1e-5)
    assert torch.allclose(path.c2w[:, :3, 3], c2w[:, :3, 3] / (0.1 * surface.median_depth(joint[0])), atol=1e-5)
    assert abs(sure - torch.stack([each.confidence.mean() for each in joint]).mean()) < 1e-6
    (tmp_path / "path.json").write_text(path_json(CameraPath(path.c2w, 24.0)))
    again = load_path(tmp_path / "path.json")
    assert torch.allclose(again.c2w, path.c2w, atol=1e-6) and again.fps == 24 and again.unit == "depth"


# ------------------------------------------------------------------------------------------------------ as a user


@pytest.fixture
def place_of(tmp_path, monkeypatch):
    """An empty folder with a clip of 40 frames at 12 a second, its depths and its camera."""
    monkeypatch.chdir(tmp_path)
    frames = np.stack([np.roll(INPUTS["image"], 2 * t, axis=1) for t in range(40)])
    write_video(tmp_path / "clip.mp4", frames, 12)
    write_video(tmp_path / "other.mp4", frames[::-1], 12)
    np.save("clip.npy", frames)
    np.savez("depths.npz", depth=np.linspace(3, 1, SIZE[0], dtype=np.float32)[None, :, None].repeat(40, 0).repeat(SIZE[1], 2))
    (tmp_path / "camera.json").write_text(json.dumps({"c2w": move_path("right 2", 40).tolist(), "fov_x": 60}))
    np.save("standing.npy", np.repeat(frames[:1], 40, 0))
    Image.fromarray(frames[0]).save("image.png")
    np.save("depth.npy", np.linspace(3, 1, SIZE[0], dtype=np.float32)[:, None].repeat(SIZE[1], 1))
    return tmp_path


QUICK = ["--set", "steps=1,1,1", "amplify_first_chunk=false"]
AGAIN = ["--video", "clip.mp4", "--move", "right 1, up 1", "--depth", "depths.npz", *QUICK]


def test_a_standing_clip_makes_the_pictures_video(place_of):
    """Two chunks to the bit, frames by the clip's own number."""
    words = ["--move", "right 1, up 1", *QUICK, "--set", "fov=60"]
    assert sample("--video", "standing.npy", "--depth", "depths.npz", "--out", "a.mp4", *words) == 0
    assert sample("--image", "image.png", "--depth", "depth.npy", "--out", "b.mp4", "--frames", "40", *words) == 0
    for ending in (".mp4", "_warp.mp4"):
        assert Path(f"a{ending}").read_bytes() == Path(f"b{ending}").read_bytes()


def test_ways_to_shoot_a_clip_again(place_of, capsys):
    """Its length and rate; geometry from maps, from files beside it, from Pi3X, from nothing."""
    assert sample(*AGAIN) == 0
    assert len(read("out.mp4")) == 40 and read_rate(Path("out.mp4")) == 12
    assert "depths.npz" in (said := capsys.readouterr().out) and "camera: taken to stand" in said
    given = read("out_warp.mp4")
    assert sample(*AGAIN, "--set", "poses_of_clip=camera.json", "relative=first", "fps=20", "--frames", "35") == 0
    assert len(read("out.mp4")) == 35 and read_rate(Path("out.mp4")) == 20
    assert "camera: camera.json" in (said := capsys.readouterr().out) and "the clip's first one" in said
    assert abs(read("out_warp.mp4").astype(int) - given[:35]).mean() > 1
    shutil.copy("depths.npz", "clip_depth.npz")
    shutil.copy("camera.json", "clip.json")
    words = ["--video", "clip.mp4", "--move", "right 1", *QUICK, "--frames", "3"]
    for more, where in (([], "clip_depth.npz"), (PI3X, "all frames together"), ([*PI3X, "keyframes=1"], "each frame by itself")):
        assert sample(*words, *more) == 0
        assert where in capsys.readouterr().out
    assert sample("--video", "standing.npy", *words[2:]) == 0
    assert "plane at depth 1" in capsys.readouterr().out


def test_the_check_follows_the_clips_camera(place_of):
    """A path is relative to it, so the result's camera goes both ways."""
    words = ["--weights", str(DISTILLED), "--size", "x".join(map(str, SIZE)), *AGAIN, "poses_of_clip=camera.json"]
    args = parse([*words, "device=cpu"])
    job = prepare(args, load_settings(args))
    clip, path = move_path("right 2", 40)[:, :3, 3], move_path("right 1, up 1")[:40, :3, 3]
    assert torch.allclose(job.path.c2w[:, :3, 3], clip / job.start.camera.unit + path, atol=1e-5)


def test_a_video_alone_is_continued(place_of):
    """At its own rate, unless another one is asked for."""
    for words, fps in (([], 12), (["--set", "fps=20"], 20)):
        assert sample("--video", "clip.mp4", "--frames", "3", *QUICK, *words) == 0
        assert len(read("out.mp4")) == 3 and not Path("out_warp.mp4").exists() and read_rate(Path("out.mp4")) == fps


@pytest.mark.parametrize("way", ["maps", "Pi3X"])
def test_an_interrupted_clip_goes_on(place_of, monkeypatch, way, capsys):
    """To the same files; another clip, other depths or another camera are refused."""
    words = AGAIN if way == "maps" else [*AGAIN[:4], *QUICK, *PI3X, "geometry_pixels=11760"]
    (place_of / "whole").mkdir()
    assert sample(*words, "--out", "whole/out.mp4") == 0
    stop_in_chunk(monkeypatch, 2, RuntimeError)
    with pytest.raises(RuntimeError):
        sample(*words)
    capsys.readouterr()
    changed = words.copy()
    changed[1] = "other.mp4"
    refused(capsys, place_of, [*changed, "--continue"], "state.safetensors", ": video was ")
    refused(capsys, place_of, [*words, "--set", "relative=first", "--continue"], ": relative was ")
    if way == "maps":
        refused(capsys, place_of, [*words, "--set", "poses_of_clip=camera.json", "--continue"], ": clip was ")
    assert sample(*words, "--continue") == 0
    for ending in (".mp4", "_warp.mp4", "_sheet.png"):
        assert Path(f"out{ending}").read_bytes() == Path(f"whole/out{ending}").read_bytes()


def test_a_path_from_a_clip(place_of, capsys):
    """Said, and saved beside the output; that file makes the same video."""
    words = ["--image", "image.png", "--depth", "depth.npy", "--frames", "34", *QUICK]
    clip = read("clip.mp4")[::8]
    write_video(Path("walk.mp4"), clip, 12)
    small = [*PI3X, "geometry_pixels=11760"]
    assert sample(*words, "--poses", "walk.mp4", *small, "--out", "a.mp4") == 0
    said = capsys.readouterr().out
    assert "5 poses" in said and "degrees turned" in said and "mean confidence" in said
    assert steady_path(Path("a_path.json")).fps == 12
    assert sample(*words, "--poses", "walk.mp4", *small, "keyframes=4", "--frames", "2") == 0  # of the clip, not of the run
    assert sample(*words, "--poses", "a_path.json", "--out", "b.mp4", "--set", "geometry_pixels=11760") == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_other_programs_name_the_one_that_takes_a_clip(place_of):
    with pytest.raises(ValueError, match=r"clip\.mp4: a video.*sample\.py --poses"):
        load_path("clip.mp4")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp", "x.tif", "x.jp2", "x.gif", "x.mpo"])
def test_a_picture_is_no_path(place_of, capsys, name):
    """A film to ffmpeg, but no clip. An animation is one."""
    first, second = Image.open("image.png"), Image.new("RGB", SIZE[::-1])
    first.save(name, **({"save_all": True, "append_images": [second]} if name == "x.mpo" else {}))
    expected = f"{name}: a picture, expected a file of poses"
    words = ["--image", "image.png", "--poses", name]
    refused(capsys, place_of, words, f"--poses {expected}, a COLMAP folder or a clip (docs/paths.md)")
    with pytest.raises(ValueError, match=re.escape(f"{expected} or a COLMAP folder (docs/paths.md)")):
        load_path(name)
    if name in ("x.gif", "x.webp"):
        first.save(name, save_all=True, append_images=[second])
        refused(capsys, place_of, words, f"--poses {name}: the path of a clip's camera takes Pi3X")


def test_a_path_from_a_clip_needs_a_network_that_knows_cameras(place_of, capsys):
    words = ["--image", "image.png", "--poses", "clip.mp4"]
    refused(capsys, place_of, words, "--poses clip.mp4", "there is no Pi3X here", "geometry=FILE")
    refused(capsys, place_of, [*AGAIN, "--set", "keyframes=2"], "--set keyframes: Pi3X is not used beside")
    refused(capsys, place_of, ["--video", "clip.mp4", "--move", "hold", "--set", "keyframes=2"], "there is no Pi3X here")
    refused(capsys, place_of, [*words, *PI3X, "keyframes=1"], "clip.mp4", "does not know how cameras stand", "keyframes=8")
    mini = Path(__file__).parents[1] / "weights" / "mini"
    refused(capsys, place_of, words, "clip.mp4", "geometry=FILE", weights=mini)


@pytest.mark.parametrize("words, parts", [
    (["--image", "clip.mp4", "--move", "hold"], ["--image clip.mp4", "--video clip.mp4"]),
    ([*AGAIN, "--frames", "41"], ["clip.mp4", "40", "41"]),
    ([*AGAIN, "--set", "relative=last"], ["relative", "clip or first"]),
    (["--video", "clip.mp4", "--set", "relative=first"], ["relative", "camera path"]),
    (["--video", "clip.mp4", "--move", "hold", "--set", "poses_of_clip=camera.json"], ["poses_of_clip", "--depth"]),
    ([*AGAIN, "--set", "poses_of_clip=none.json"], ["none.json"]),
    ([*AGAIN, "--set", "keyframes=1"], ["keyframes"]),
    (["--video", "clip.mp4", "--move", "hold", "--depth", "depth.npy"], ["depth.npy", "[T, height, width]"]),
    ([*AGAIN, "--out", "clip.mp4"], ["clip.mp4"]),
    (["--video", "image.png", "--move", "hold", "--frames", "2"], ["image.png", "1 frames"]),
])
def test_bad_words(capsys, place_of, words, parts):
    refused(capsys, place_of, words, *parts)


def test_the_page_shoots_a_clip_again(place_of):
    """`view.py --video`: a preview is the warp, and both follow what moves; the same as sample.py makes of that path."""
    smooth = to_frames(known.picture(64, 168)[:, :, None])[0]
    write_video(Path("smooth.mp4"), np.stack([smooth[:, t:t + 128] for t in range(40)]), 12)  # coded alike in any parts
    clip = ["--video", "smooth.mp4", "--depth", "depths.npz"]
    words = ["--weights", str(DISTILLED), "--size", "64x128", *clip, "--set", "device=cpu", *QUICK[1:]]
    studio = Studio(view.parse(words))
    studio.keys.append(move_path("right 2", 2)[-1])
    studio.seconds.append(35 / studio.fps)  # the clip's
    Path("path.json").write_bytes(studio.saved("json"))
    for _ in range(2):  # a preview leaves nothing behind
        studio.preview()
        Path("preview.mp4").write_bytes(studio.saved("mp4"))
    studio.generate()
    raw = np.stack(studio.frames).astype(int)
    Path("film.mp4").write_bytes(studio.saved("mp4"))
    assert sample(*clip, "--poses", "path.json", *QUICK, "--frames", "36") == 0
    assert read_rate(Path("film.mp4")) == read_rate(Path("out.mp4")) == 12
    assert len(read("preview.mp4")) == 36 and abs(read("preview.mp4").astype(int) - read("out_warp.mp4")).mean() < 1
    assert abs(raw - read("out.mp4")).mean() < 1.1 * abs(raw - read("film.mp4")).mean()  # a noisy result, coded in two parts


def test_files_beside_the_clip_are_inputs(capsys, place_of):
    shutil.copy("depths.npz", "clip_depth.npz")
    shutil.copy("camera.json", "clip.json")
    words = ["--video", "clip.mp4", "--move", "right 1", *QUICK, "--set", "latents=x.safetensors"]
    Path("x.safetensors").symlink_to("clip.json")
    refused(capsys, place_of, words, "x.safetensors", "clip.json")
