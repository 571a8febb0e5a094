"""Pictures and depth maps: what is read is what was written, and bad files are one clear line."""

import numpy as np
import pytest
import torch
from goldens import GEOMETRY, check, tensors
from PIL import Image

from files import media

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


def test_names_are_sorted_as_people_count(tmp_path):
    names = ["a2", "a10", "a10b3", "a11/1", "b1", "b01", "b\u00b2"]
    assert sorted(reversed(names[:5]), key=media.natural_order) == names[:5]
    assert sorted(names, key=media.natural_order) == names  # of the same number, as they came
    for index in range(12):
        Image.new("RGB", (4, 4), (20 * index, 0, 0)).save(tmp_path / f"{index}.png")
    assert [frame[0, 0, 0] for frame in media.read_frames(tmp_path)] == [20 * index for index in range(12)]
