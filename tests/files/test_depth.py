"""Depth maps: every kind of file, what in them is unknown, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from files.depth import load_depth

RNG = np.random.default_rng(0)
DEPTH = RNG.uniform(1, 9, (50, 70)).astype(np.float32)


def test_depth_files(tmp_path):
    depth = RNG.uniform(1, 9, (5, 7))
    np.save(tmp_path / "d.npy", depth)
    np.savez(tmp_path / "one.npz", anything=depth)
    np.savez(tmp_path / "two.npz", other=depth + 1, depth=depth)
    for name in ("d.npy", "one.npz", "two.npz"):
        loaded = load_depth(tmp_path / name)
        assert loaded.dtype == torch.float32 and np.array_equal(loaded, depth.astype(np.float32))
    millimetres = (depth * 1000).astype(np.uint16)
    Image.fromarray(millimetres).save(tmp_path / "d.png")
    assert np.array_equal(load_depth(tmp_path / "d.png"), millimetres)


def test_bad_depth_files(tmp_path):
    arrays = {"flat": np.ones(3), "nothing": np.full((2, 2), np.nan), "text": np.array([["a"]]),
              "object": np.array([[{}]])}
    messages = {"flat": "height, width", "nothing": "finite and positive", "text": "numbers", "object": "plain numbers"}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=f"{name}.*{messages[name]}"):
            load_depth(tmp_path / f"{name}.npy")
    np.savez(tmp_path / "two.npz", a=np.ones((2, 2)), b=np.ones((2, 2)))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "rgb.png")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, message in (("two.npz", "named 'depth'"), ("rgb.png", "16-bit"), ("empty.npy", "numpy"),
                          ("no.npy", "no such")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            load_depth(tmp_path / name)


@pytest.mark.parametrize("shape", [(1, 50, 70), (50, 70, 1)])
def test_an_axis_of_one(tmp_path, shape):
    np.save(tmp_path / "d.npy", DEPTH.reshape(shape))
    assert np.array_equal(load_depth(tmp_path / "d.npy"), DEPTH)


def test_float_maps(tmp_path):
    """.pfm begins with its lowest row, in either order of bytes; a .tiff may hold floats; OpenEXR is named."""
    for scale, kind in (("-1.0", "<f4"), ("1.0", ">f4")):
        (tmp_path / "d.pfm").write_bytes(f"Pf\n70 50\n{scale}\n".encode() + DEPTH[::-1].astype(kind).tobytes())
        assert np.array_equal(load_depth(tmp_path / "d.pfm"), DEPTH)
    (tmp_path / "d.pfm").write_bytes(b"Pf\n70 50\n-1\nshort")
    (tmp_path / "d.exr").write_bytes(b"\x76\x2f\x31\x01\x02")
    Image.fromarray(DEPTH).save(tmp_path / "d.tiff")
    assert np.array_equal(load_depth(tmp_path / "d.tiff"), DEPTH)
    for name, message in (("d.pfm", "not a readable .pfm"), ("d.exr", "OpenEXR is not read, expected .npy")):
        with pytest.raises(ValueError, match=message):
            load_depth(tmp_path / name)


@pytest.mark.parametrize("far", [1e10, 65504, 65535, np.inf, 1e5])
def test_the_sky_is_unknown(tmp_path, far):
    depth = DEPTH.copy()
    depth[:30] = far  # 60 %
    np.save(tmp_path / "d.npy", depth)
    loaded = load_depth(tmp_path / "d.npy")
    assert (loaded[:30] == 0).all() and np.array_equal(loaded[30:], DEPTH[30:])


def test_far_is_not_sky(tmp_path):
    """Millimeters may be 65535, and a long view deep, among others like them."""
    for depth in (np.linspace(30_000, 65_535, 3500).reshape(50, 70), np.geomspace(1, 500, 3500).reshape(50, 70)):
        np.save(tmp_path / "d.npy", depth)
        assert (load_depth(tmp_path / "d.npy") > 0).all()


def test_inverse_depth(tmp_path):
    np.save(tmp_path / "d.npy", np.concatenate([1 / DEPTH, np.zeros((40, 70), np.float32)]))
    loaded = load_depth(tmp_path / "d.npy", inverse=True)
    assert torch.allclose(loaded[:50], torch.from_numpy(DEPTH)) and (loaded[50:] == 0).all()


def test_sparse_and_negative_maps(tmp_path):
    sparse = np.where(RNG.uniform(size=DEPTH.shape) < 0.05, DEPTH, 0)
    for depth, message in ((sparse, "% of the depth map is known, expected at least 50 %"), (-DEPTH, "all are negative")):
        np.save(tmp_path / "d.npy", depth)
        with pytest.raises(ValueError, match=message):
            load_depth(tmp_path / "d.npy")
