"""Videos and masks: what is read is what was written, frames stay even, and bad files are one clear line."""

import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from files import draw, media, video

RNG = np.random.default_rng(0)
SMOOTH = np.full((32, 48, 3), 90, np.uint8)


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


def test_a_video_that_is_not_whole_is_an_error(tmp_path):
    with pytest.raises(OSError, match="written whole"), video.VideoWriter(tmp_path / "v.mp4", 8, (32, 48)) as writer:
        writer.write(SMOOTH)
        writer.count += 1  # as if the encoder had lost a frame
    with pytest.raises(OSError, match="written whole"), video.VideoWriter(tmp_path / "w.mp4", 8, (20000, 64)) as writer:
        for _ in range(2):  # too large for H.264
            writer.write(np.zeros((20000, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="expected uint8"), video.VideoWriter(tmp_path / "x.mp4", 8, (32, 50)) as writer:
        writer.write(SMOOTH)


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
