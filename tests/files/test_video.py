"""Videos and masks: what is read is what was written, frames stay even, and bad files are one clear line."""

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from known import load_video

from files import draw, media, video
from files.writing import replacing

RNG = np.random.default_rng(0)
SMOOTH = np.full((32, 48, 3), 90, np.uint8)
SMOOTH[..., 0], SMOOTH[..., 1] = np.linspace(0, 200, 48), np.linspace(30, 255, 32)[:, None]


def write(path, frames, fps=12.0):
    with video.VideoWriter(path, fps, frames[0].shape[:2]) as writer:
        for frame in frames:
            writer.write(frame)


def test_video_round_trip(tmp_path):
    frames = np.stack([np.roll(SMOOTH, shift, 1) // 2 + 60 for shift in range(9)])
    write(tmp_path / "v.mp4", frames)
    loaded = load_video(tmp_path / "v.mp4")
    assert loaded.shape == frames.shape and np.abs(loaded.astype(int) - frames).mean() < 4
    with av.open(tmp_path / "v.mp4") as container:
        assert container.streams.video[0].average_rate == 12
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
        assert np.array_equal(load_video(tmp_path / name), frames)
    draw.save_png(tmp_path / "folder" / "003.png", frames[0][:5])
    with pytest.raises(ValueError, match="frame 3: size"):
        load_video(tmp_path / "folder")


def test_bad_videos(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"not a video at all")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "v.npy", np.zeros((2, 3, 4)))
    for name, message in (("v.mp4", "readable video"), ("empty", "no frames"), ("v.npy", "uint8"),
                          ("no.mp4", "no such")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            load_video(tmp_path / name)


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
    with pytest.raises(OSError, match="could not be written"), video.VideoWriter(tmp_path / "v.mp4", 8, (32, 48)) as writer:
        writer.write(SMOOTH)
        writer.count += 1  # as if the encoder had lost a frame
    with pytest.raises(OSError, match="could not be written"), video.VideoWriter(tmp_path / "w.mp4", 8, (20000, 64)) as writer:
        for _ in range(2):  # too large for H.264
            writer.write(np.zeros((20000, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="expected uint8"), video.VideoWriter(tmp_path / "x.mp4", 8, (32, 50)) as writer:
        writer.write(SMOOTH)


@pytest.mark.parametrize("fps", [12, 23.976, 60000 / 1001, 7.3, 240])
@pytest.mark.parametrize("lengths", [(33, 33, 5), (33, 1), (2,)])
def test_joined_videos_hold_the_same_frames_evenly(tmp_path, fps, lengths):
    """Nothing is encoded anew, times and lengths are exact, whatever the names, and a frame too few is an error."""
    parts = [tmp_path / f"{index:04d} #?:'_video.mp4" for index in range(len(lengths))]
    for index, (part, length) in enumerate(zip(parts, lengths)):
        video.write_video(part, np.stack([np.roll(SMOOTH, 3 * (index + k), axis=1) for k in range(length)]), fps)
    video.join_videos(parts, list(lengths), fps, tmp_path / "all: #1?.mp4")
    loaded = load_video(tmp_path / "all: #1?.mp4")
    assert np.array_equal(loaded, np.concatenate([load_video(part) for part in parts]))
    rate, count = Fraction(fps).limit_denominator(1001), sum(lengths)
    for path, frames in zip([*parts, tmp_path / "all: #1?.mp4"], [*lengths, count]):
        with av.open(f"file:{path}") as container:
            stream = container.streams.video[0]
            assert stream.average_rate == rate and stream.duration * stream.time_base == frames / rate
            assert abs(container.duration / 10**6 - frames / fps) < 1e-5
            assert [frame.pts * stream.time_base for frame in container.decode(stream)] == [k / rate for k in range(frames)]
    with pytest.raises(OSError, match=f"other.mp4: .* has {count} frames, expected {count + 1}"):
        video.join_videos(parts, [*lengths[:-1], lengths[-1] + 1], fps, tmp_path / "other.mp4")


def test_a_relative_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "file:x.mp4", "a?b=1#c.mp4", "concat:x.mp4", "-x.mp4", "%03d.mp4"):
        video.write_video(Path(name), np.stack([SMOOTH] * 2), 16)
        video.join_videos([Path(name)], [2], 16, Path(f"all_{name}"))
        assert len(load_video(Path(f"all_{name}"))) == 2
    assert len(list(tmp_path.iterdir())) == 12


def chart(height: int, width: int) -> np.ndarray:
    """Sixteen colours in patches."""
    colors = [(255, 255, 255), (255, 255, 0), (0, 255, 255), (0, 255, 0), (255, 0, 255), (255, 0, 0), (0, 0, 255),
              (0, 0, 0), (200, 120, 90), (128, 128, 128), (60, 90, 40), (16, 16, 16), (90, 130, 200), (240, 200, 170),
              (30, 60, 120), (180, 180, 60)]
    return np.array(colors, np.uint8).reshape(4, 4, 3).repeat(height // 4, 0).repeat(width // 4, 1)


@pytest.mark.parametrize("size", [(64, 96), (384, 640), (720, 1280)])
def test_colours_and_form_of_an_mp4(tmp_path, size):
    """Read back by the tags that players go by, the colours are those written; the index comes first."""
    picture, path = chart(*size), tmp_path / "chart.mp4"
    video.write_video(path, picture[None], 16)
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        written = context.color_primaries, context.color_trc
    assert (frame.format.name, frame.colorspace, frame.color_range) == ("yuv420p", 1, 1)  # BT.709, limited
    assert written == (1, 1)
    y, u, v = (np.array(plane).reshape(plane.height, -1)[:, :plane.width].astype(float) for plane in frame.planes)
    y, u, v = (y - 16) / 219, *((each.repeat(2, 0).repeat(2, 1) - 128) / 224 for each in (u, v))
    decoded = np.stack([y + 1.5748 * v, y - 0.1873 * u - 0.4681 * v, y + 1.8556 * u], -1) * 255
    for found in (decoded, load_video(path)[0]):
        error = np.abs(found - picture.astype(float))
        assert error.mean() < 2 and error[size[0] // 8::size[0] // 4, size[1] // 8::size[1] // 4].max() < 5
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")


def test_the_encoder_is_tried_first(monkeypatch):
    video.try_encoder(16, (64, 96))
    with pytest.raises(OSError, match="invalid width x height"):
        video.try_encoder(16, (20000, 64))
    monkeypatch.setattr(av, "codecs_available", {"h264"})
    with pytest.raises(OSError, match="libx264"):
        video.try_encoder(16, (64, 96))


def encode(path, frames, times=None, side=0, **tags) -> None:
    """A video with given times, in 1/600 s, and tags. `side`: turned by as many quarters for the viewer."""
    with av.open(path, "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "8"})
        stream.pix_fmt, (stream.height, stream.width) = "yuv444p", frames[0].shape[:2]
        stream.codec_context.time_base = Fraction(1, 600)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv444p", dst_colorspace=9 if tags.get("colorspace") == 9 else 1)
            picture.pts, picture.time_base = (times[index] if times else 20 * index), Fraction(1, 600)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    if side:
        content = bytearray(path.read_bytes())
        matrix = np.array([np.cos(side * np.pi / 2), np.sin(side * np.pi / 2)]).round().astype(int)
        values = np.array([[matrix[0], matrix[1], 0], [-matrix[1], matrix[0], 0]]) * 2**16
        begin = content.find(b"tkhd") + 44
        content[begin:begin + 24] = values.astype(">i4").tobytes()
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["v.mkv", "v.ts", "v.m4v", "v.3gp", "v.avi", "v.webm", "v.MTS", "v.wmv", "v"])
def test_a_video_is_told_by_its_content(tmp_path, name):
    kind = {".mkv": "matroska", ".ts": "mpegts", ".avi": "avi", ".webm": "webm", ".MTS": "mpegts", ".wmv": "asf"}
    coder = {".webm": "libvpx-vp9", ".wmv": "wmv2"}
    with av.open(tmp_path / name, "w", format=kind.get(Path(name).suffix, "mp4")) as container:
        stream = container.add_stream(coder.get(Path(name).suffix, "libx264"), rate=16)
        stream.pix_fmt, stream.height, stream.width = "yuv420p", 32, 48
        for index in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(SMOOTH, index, 1), format="rgb24")))
        container.mux(stream.encode(None))
    assert media.is_video(tmp_path / name) and len(load_video(tmp_path / name)) == 5


def test_what_is_a_video(tmp_path):
    draw.save_png(tmp_path / "p.mp4", SMOOTH)
    np.save(tmp_path / "v.npy", SMOOTH[None])
    assert [media.is_video(tmp_path / name) for name in ("p.mp4", "v.npy", "", "none.mp4")] == [False, True, True, False]


def test_sound_alone_is_no_video(tmp_path):
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate, sound.pts = 8000, 0
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="a.mp4: not a readable video .there is none in it"):
        load_video(tmp_path / "a.mp4")


def test_an_unknown_codec(tmp_path):
    encode(tmp_path / "v.mp4", [SMOOTH] * 3)
    (tmp_path / "v.mp4").write_bytes((tmp_path / "v.mp4").read_bytes().replace(b"avc1", b"avq1"))
    with pytest.raises(ValueError, match="v.mp4: not a readable video .*known codec"):
        load_video(tmp_path / "v.mp4")


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.5,\nv.ts\n#EXT-X-ENDLIST\n",
                                  "ffconcat version 1.0\nfile v.ts\n"])
def test_a_video_never_leads_to_other_files(tmp_path, text):
    write(tmp_path / "v.mp4", [SMOOTH] * 3)
    (tmp_path / "v.mp4").rename(tmp_path / "v.ts")
    (tmp_path / "list.mp4").write_text(text)
    with pytest.raises(ValueError, match="list.mp4: not a readable video"):
        load_video(tmp_path / "list.mp4")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device on this system")
def test_a_full_disk_is_said_in_the_systems_words():
    with pytest.raises(OSError, match="/dev/full: the video could not be written .No space left on device"):
        video.write_video(Path("/dev/full"), np.stack([SMOOTH] * 3), 16)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.mov"])
def test_frames_of_variable_rate(tmp_path, name):
    """As many as there are, whatever their times."""
    gaps = [10, 10, 20, 600, 10, 200, 10, 10, 40, 10, 300]
    frames = [np.roll(SMOOTH, 3 * index, 1) for index in range(12)]
    encode(tmp_path / name, frames, np.cumsum([0, *gaps]).tolist(), colorspace=1)
    loaded = load_video(tmp_path / name)
    assert len(loaded) == 12 and np.abs(loaded.astype(int) - frames).mean() < 3


@pytest.mark.parametrize("fps, rate", [(480, 240), (24, 24), (0.5, 1)])
def test_the_rate_of_a_video(tmp_path, fps, rate):
    """Slow motion and time lapse come as near to theirs as a result may."""
    write(tmp_path / "v.mp4", [SMOOTH] * 4, fps)
    assert media.read_rate(tmp_path / "v.mp4") == pytest.approx(rate)


def test_what_a_videos_transparency_hides_is_white(tmp_path, capsys):
    """As a picture's."""
    for alpha, left, said in ((0, [255, 255, 255], 1), (255, [255, 0, 0], 0)):
        picture = np.full((32, 48, 4), (255, 0, 0, 255), np.uint8)
        picture[:, :24, 3] = alpha
        with av.open(tmp_path / f"{alpha}.mov", "w") as container:
            stream = container.add_stream("qtrle", rate=12, width=48, height=32, pix_fmt="argb")
            for _ in range(2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgba")))
            container.mux(stream.encode())
        for frame in load_video(tmp_path / f"{alpha}.mov"):
            assert frame[0, 0].tolist() == left and frame[0, -1].tolist() == [255, 0, 0]
        assert capsys.readouterr().err.count("mov: has transparency, taken over white") == said


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_phone(tmp_path, quarters):
    encode(tmp_path / "v.mp4", [SMOOTH] * 3, side=quarters, colorspace=1)
    upright = np.rot90(SMOOTH, -quarters)
    assert np.abs(load_video(tmp_path / "v.mp4")[0].astype(int) - upright).mean() < 3


def test_an_edit_list_is_no_damage(tmp_path, capsys):
    """A clip that was cut short on the phone still holds the frames before its begin."""
    encode(tmp_path / "v.mp4", [SMOOTH // 40 * index for index in range(40)], gop_size=5)
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    entry = content.find(b"elst") + 12  # its length, then where it begins, in 1/19200 s and the like
    begin = int.from_bytes(content[entry + 4:entry + 8], "big")
    with av.open(tmp_path / "v.mp4") as container:
        begin += int(20 / 30 / container.streams.video[0].time_base)
    content[entry + 4:entry + 8] = begin.to_bytes(4, "big")
    (tmp_path / "v.mp4").write_bytes(content)
    assert len(load_video(tmp_path / "v.mp4")) == 20 and capsys.readouterr().err == ""


def test_what_a_damaged_video_lost_is_said(tmp_path, capsys):
    noise = RNG.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    encode(tmp_path / "whole.mp4", noise)
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[:len(content) // 2])
    middle = len(content) // 2
    (tmp_path / "holed.mp4").write_bytes(content[:middle] + bytes(3000) + content[middle + 3000:])
    assert len(load_video(tmp_path / "whole.mp4")) == 40 and capsys.readouterr().err == ""
    for name, line in (("cut", r"cut.mp4: cut off or damaged, (1\d|2\d) of its 40 frames are missing"),
                       ("holed", r"holed.mp4: .*, 0 of its 40 frames are missing and [1-9]\d* damaged")):
        assert len(load_video(tmp_path / f"{name}.mp4")) > 10
        assert re.search(line, capsys.readouterr().err)


@pytest.mark.parametrize("transfer, white", [(16, 0.58), (18, 0.75)])
def test_hdr_is_tone_mapped(tmp_path, transfer, white):
    """Black, the grey card of 26 nits and reference white of 203 as BT.2408 gives them, and the brightest signal."""
    signals = np.array([0, 0.38, white, 1]).repeat(16) * 255
    picture = np.broadcast_to(signals.round().astype(np.uint8)[None, :, None], (32, 64, 3)).copy()
    encode(tmp_path / "v.mp4", [picture], colorspace=9, color_trc=transfer, color_primaries=9)
    black, grey, white, light = load_video(tmp_path / "v.mp4")[0, 16, 8::16].astype(int)
    assert black.max() < 3 and np.abs(grey - 100).max() < 4 and np.abs(white - 232).max() < 4 and light.min() > 245


def test_a_failed_write_names_the_users_file(tmp_path, monkeypatch):
    """Not the temporary one that it was written under."""
    monkeypatch.setattr(video, "check_whole", lambda path, count: (_ for _ in ()).throw(OSError(0, "it is cut off")))
    with pytest.raises(OSError, match=r"out\.mp4: the video could not be written \(it is cut off\)") as caught:
        with replacing({"video": tmp_path / "out.mp4"}) as written:
            video.write_video(written["video"], np.zeros((2, 64, 64, 3), np.uint8), 16)
    assert str(caught.value).startswith(str(tmp_path / "out.mp4")) and not list(tmp_path.iterdir())
