"""Pictures, depth maps, videos, masks: what is read is what was written, and bad files are one clear line."""

import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from goldens import GEOMETRY, check, tensors
from PIL import Image

from files import draw, media, video, writing

RNG = np.random.default_rng(0)
SMOOTH = np.full((32, 48, 3), 90, np.uint8)
SMOOTH[..., 0], SMOOTH[..., 1] = np.linspace(0, 200, 48), np.linspace(30, 255, 32)[:, None]


@pytest.mark.parametrize("case", ["tall", "up", "wide"])
def test_fit_equals_the_official_crop(case):
    golden = tensors(GEOMETRY / "poses.safetensors")
    expected = golden[f"crop/{case}_out"]
    fitted = media.fit_image(Image.fromarray(golden[f"crop/{case}_in"].numpy()), tuple(expected.shape[:2]))
    check("Crop and resize (grey levels)", (fitted[0].permute(1, 2, 0) + 1) * 127.5, expected, 1e-4)


def test_stretch_keeps_the_whole_picture():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, :10] = picture[:, -10:] = 255  # a crop would lose the edges
    assert media.fit_image(Image.fromarray(picture), (32, 32), crop=False)[0, 0, :, [0, -1]].min() > 0.9
    assert media.fit_image(Image.fromarray(picture), (32, 32))[0, 0, :, [0, -1]].max() < -0.9


def test_pictures_of_every_mode(tmp_path):
    gray = (np.arange(12, dtype=np.uint8) * 20).reshape(3, 4)
    color = RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    alpha = np.dstack([color, np.full((3, 4), 7, np.uint8)])
    palette = Image.fromarray(color).quantize(12)
    cases = {"gray": (Image.fromarray(gray), gray), "alpha": (Image.fromarray(alpha), color),
             "palette": (palette, np.array(palette.convert("RGB"))),
             "deep": (Image.fromarray(gray.astype(np.uint16) * 257), gray)}
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        loaded = np.array(media.load_image(tmp_path / f"{name}.png"))
        assert np.array_equal(loaded, expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, -1)), name


def test_unreadable_pictures(tmp_path):
    Image.fromarray(RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tiff")
    for name, message in (("cut.png", "readable"), ("text.png", "readable"), ("none.png", "no such"),
                          ("float.tiff", "float")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            media.load_image(tmp_path / name)


def test_depth_files(tmp_path):
    depth = RNG.uniform(1, 9, (5, 7))
    np.save(tmp_path / "d.npy", depth)
    np.savez(tmp_path / "one.npz", anything=depth)
    np.savez(tmp_path / "two.npz", other=depth + 1, depth=depth)
    for name in ("d.npy", "one.npz", "two.npz"):
        loaded = media.load_depth(tmp_path / name)
        assert loaded.dtype == torch.float32 and np.array_equal(loaded, depth.astype(np.float32))
    millimetres = (depth * 1000).astype(np.uint16)
    Image.fromarray(millimetres).save(tmp_path / "d.png")
    assert np.array_equal(media.load_depth(tmp_path / "d.png"), millimetres)


def test_bad_depth_files(tmp_path):
    arrays = {"flat": np.ones(3), "nothing": np.full((2, 2), np.nan), "text": np.array([["a"]]),
              "object": np.array([[{}]])}
    messages = {"flat": "height, width", "nothing": "finite and positive", "text": "numbers", "object": "plain numbers"}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=f"{name}.*{messages[name]}"):
            media.load_depth(tmp_path / f"{name}.npy")
    np.savez(tmp_path / "two.npz", a=np.ones((2, 2)), b=np.ones((2, 2)))
    Image.fromarray(SMOOTH).save(tmp_path / "rgb.png")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, message in (("two.npz", "named 'depth'"), ("rgb.png", "16-bit"), ("empty.npy", "numpy"),
                          ("no.npy", "no such")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            media.load_depth(tmp_path / name)


def write(path, frames, fps=12.0):
    with video.VideoWriter(path, fps, frames[0].shape[:2]) as writer:
        for frame in frames:
            writer.write(frame)


def test_video_round_trip(tmp_path):
    frames = np.stack([np.roll(SMOOTH, shift, 1) // 2 + 60 for shift in range(9)])
    write(tmp_path / "v.mp4", frames)
    loaded = media.load_video(tmp_path / "v.mp4")
    assert loaded.shape == frames.shape and np.abs(loaded.astype(int) - frames).mean() < 4
    with video.imageio.get_reader(tmp_path / "v.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 12
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_a_video_is_read_lazily(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((4, 6, 8, 3), np.uint8))
    write(tmp_path / "v.mp4", [SMOOTH] * 4)
    for name in ("v.npy", "v.mp4"):
        frames = media.read_frames(tmp_path / name)
        next(frames)
        assert len(list(frames)) == 3


def test_frames_of_a_folder_and_an_array(tmp_path):
    frames = RNG.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "v.npy", frames)
    (tmp_path / "folder").mkdir()
    for index, frame in enumerate(frames):
        draw.save_png(tmp_path / "folder" / f"{index:03}.png", frame)
    for name in ("v.npy", "folder"):
        assert np.array_equal(media.load_video(tmp_path / name), frames)
    draw.save_png(tmp_path / "folder" / "003.png", frames[0][:5])
    with pytest.raises(ValueError, match="frame 3: size"):
        media.load_video(tmp_path / "folder")


def test_bad_videos(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"not a video at all")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "v.npy", np.zeros((2, 3, 4)))
    for name, message in (("v.mp4", "readable video"), ("empty", "no frames"), ("v.npy", "uint8"),
                          ("no.mp4", "no such")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            media.load_video(tmp_path / name)


def load_mask(path) -> np.ndarray:
    return np.stack(list(media.read_mask(path)))


def test_masks(tmp_path):
    mask = np.zeros((3, 32, 48), bool)
    mask[:, 8:24, 12:36] = True
    for name, array in (("bool", mask), ("byte", mask.astype(np.uint8) * 255), ("float", mask * 0.5)):
        np.save(tmp_path / f"{name}.npy", array)
        loaded = load_mask(tmp_path / f"{name}.npy")
        assert loaded.dtype == np.float32 and np.array_equal(loaded, mask * (0.5 if name == "float" else 1.0))
    write(tmp_path / "m.mp4", mask.astype(np.uint8) * 255)
    assert np.abs(load_mask(tmp_path / "m.mp4") - mask).mean() < 0.02
    np.save(tmp_path / "bad.npy", mask - 3.0)
    with pytest.raises(ValueError, match="bad.npy.*expected 0..1"):
        load_mask(tmp_path / "bad.npy")


def publish(paths: dict, inputs=(), content="new", fail=False) -> None:
    with writing.replacing(paths, inputs) as partials:
        for partial in partials.values():
            partial.write_text(content)
        if fail:
            raise RuntimeError("stop")


def test_outputs_appear_together_or_not_at_all(tmp_path):
    paths = {"a": tmp_path / "a.txt", "b": tmp_path / "b.txt"}
    paths["a"].write_text("before")
    with pytest.raises(RuntimeError, match="stop"):
        publish(paths, fail=True)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]
    publish(paths)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "new", "b.txt": "new"}


def test_what_cannot_be_written_is_noticed_at_once(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "in.mp4").write_text("input")
    good = tmp_path / "good.mp4"
    for bad, message in ((tmp_path / "no" / "v.mp4", "v.mp4"), (tmp_path / "folder.mp4", "folder.mp4"),
                         (tmp_path / "in.mp4", "overwrite"), (tmp_path / "x" / ".." / "good.mp4", "overwrite")):
        with pytest.raises((ValueError, OSError), match=message):
            publish({"good": good, "bad": bad}, inputs=[tmp_path / "in.mp4"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.mp4", "in.mp4"]
    for name in ("v.avi", ".mp4", ""):
        with pytest.raises(ValueError, match=".mp4"):
            writing.beside(tmp_path / name)


def test_a_video_that_is_not_whole_is_an_error(tmp_path):
    with pytest.raises(OSError, match="written whole"), video.VideoWriter(tmp_path / "v.mp4", 8, (32, 48)) as writer:
        writer.write(SMOOTH)
        writer.count += 1  # as if the encoder had lost a frame
    with pytest.raises(OSError, match="written whole"), video.VideoWriter(tmp_path / "w.mp4", 8, (20000, 64)) as writer:
        for _ in range(2):  # too large for H.264
            writer.write(np.zeros((20000, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="expected uint8"), video.VideoWriter(tmp_path / "x.mp4", 8, (32, 50)) as writer:
        writer.write(SMOOTH)


def test_contact_sheet():
    assert draw.evenly_spaced(33, 8) == [0, 5, 9, 14, 18, 23, 27, 32]
    assert draw.evenly_spaced(3, 8) == [0, 1, 2]
    levels = np.arange(33, dtype=np.uint8) * 7
    video = np.broadcast_to(levels[:, None, None, None], (33, 20, 40, 3))
    sheet = draw.contact_sheet({"video": video, "mask": video[..., 0]}, columns=4, tile_width=80)
    assert sheet.shape == (4 + 2 * (14 + 40 + 4), 4 + 4 * 84, 3) and sheet.dtype == np.uint8
    for row in (40, 98):
        for column, index in enumerate(draw.evenly_spaced(33, 4)):
            assert (sheet[row, 44 + 84 * column] == levels[index]).all()
    assert (sheet[4:16, :60] < 128).any()  # the label


@pytest.mark.parametrize("fps", [12, 23.976, 240])
def test_joined_videos_hold_the_same_frames_evenly(tmp_path, fps):
    """Nothing is encoded anew, frames keep their distance across the joints, and a frame too few is an error."""
    lengths, parts = (33, 33, 5), [tmp_path / f"{index:04d}_video.mp4" for index in range(3)]
    for index, (part, length) in enumerate(zip(parts, lengths)):
        video.write_video(part, np.stack([np.roll(SMOOTH, 3 * (index + frame), axis=1) for frame in range(length)]), fps)
    video.join_videos(parts, list(lengths), fps, tmp_path / "all.mp4")
    assert np.array_equal(media.load_video(tmp_path / "all.mp4"), np.concatenate([media.load_video(part) for part in parts]))
    show = ["-i", tmp_path / "all.mp4", "-vf", "showinfo", "-f", "null", "-"]
    said = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *show], capture_output=True, text=True).stderr
    times = np.array([float(time) for time in re.findall(r"pts_time:([\d.]+)", said)])
    assert len(times) == 71 and abs(np.diff(times) * fps - 1).max() < 0.001
    with pytest.raises(OSError, match="written whole"):
        video.join_videos(parts, [33, 33, 6], fps, tmp_path / "other.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {part.name for part in parts} | {"all.mp4", "other.mp4"}
