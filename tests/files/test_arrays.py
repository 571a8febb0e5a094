"""Numpy files: what numpy writes is read as it is, what is damaged or hostile is one line, without time or memory."""

import io
import resource
import struct
import zipfile

import numpy as np
import pytest

from files.arrays import Arrays

POSES = np.arange(64, dtype=np.float32).reshape(4, 4, 4)


def npy(descr="'<f4'", shape="(4, 4, 4)", body=POSES.tobytes(), version=1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + body


def npz(path, method=zipfile.ZIP_DEFLATED, **members: bytes):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def refused(path, *words: str) -> str:
    """The one line that a file is refused with."""
    with pytest.raises(ValueError) as error:
        arrays = Arrays(path)
        list(arrays.values())
    line = str(error.value)
    assert line.startswith(str(path)) and "\n" not in line and len(line) < 500
    assert all(word in line for word in words), line
    return line


@pytest.mark.parametrize("save", (np.savez, np.savez_compressed))
def test_what_numpy_writes(tmp_path, save):
    arrays = {"a": np.asfortranarray(POSES), "b": POSES[0] > 3, "c": POSES.astype(">f8"), "d": np.float16(2),
              "e": np.zeros((0, 3), np.uint8)}
    save(tmp_path / "x.npz", **arrays)
    found = Arrays(tmp_path / "x.npz")
    assert list(found) == list(arrays) and "f" not in found
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape and found[name].dtype.isnative
    np.save(tmp_path / "x.npy", np.asfortranarray(POSES))
    assert list(Arrays(tmp_path / "x.npy")) == [""]
    np.testing.assert_array_equal(Arrays(tmp_path / "x.npy")[""], POSES)


def test_a_kind_is_told_by_content(tmp_path):
    np.save(tmp_path / "x.npy", POSES)
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    np.testing.assert_array_equal(Arrays(tmp_path / "x.npz")[""], POSES)
    (tmp_path / "y.npz").write_bytes(b"nothing")
    refused(tmp_path / "y.npz", "not a readable numpy file")


def test_only_what_is_asked_for_is_read(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    path = npz(tmp_path / "x.npz", poses=npy(), broken=b"\x93NUMPY\x07", objects=buffer.getvalue())
    np.testing.assert_array_equal(Arrays(path)["poses"], POSES)
    with pytest.raises(ValueError, match="x.npz: 'objects': not a readable numpy file of plain numbers"):
        Arrays(path)["objects"]
    with pytest.raises(ValueError, match="x.npz: no array 'depth', found broken, objects, poses"):
        Arrays(path)["depth"]


HEADERS = {
    "nothing in an element": npy("{}"), "void": npy("'V0'"), "no letters": npy("'U0'"), "fields": npy("[('x', '<f4')]"),
    "objects": npy("'|O'"), "complex": npy("'<c8'"), "time": npy("'<M8[s]'"), "rows": npy("('<f4', (1000000000,))"),
    "long": npy(shape="(99999999999999999999,)"), "overflow": npy(shape="(4294967296, 4294967296)"),
    "negative": npy(shape="(-4, 4)"), "large": npy(shape="(1000000000, 4)"), "no token": npy(shape="(4, 4"),
    "version": npy(version=9), "short": npy()[:-4], "nested": npy(shape="(" * 3000), "empty": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(tmp_path, name):
    """Python died of the first as .npy (division by zero inside numpy), and read it for ever as .npz."""
    refused(npz(tmp_path / "x.npz", poses=HEADERS[name]), "not a readable numpy file of plain numbers")
    (tmp_path / "x.npy").write_bytes(HEADERS[name])
    refused(tmp_path / "x.npy", "not a readable numpy file of plain numbers")


@pytest.mark.parametrize("method", (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
def test_other_compression(tmp_path, method):
    refused(npz(tmp_path / "x.npz", method, poses=npy()), f"method {method}")


@pytest.mark.parametrize("offset, value", [(6, 1), (8, 99), (-12, 255)])  # encrypted, unknown method, damaged numbers
def test_damaged_archives(tmp_path, offset, value):
    path = npz(tmp_path / "x.npz", poses=npy())
    content = bytearray(path.read_bytes())
    for start in (content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02") + 2):
        if offset > 0:
            content[start + offset] = value
    content[content.index(b"PK\x01\x02") - 40:content.index(b"PK\x01\x02")] = bytes([value]) * 40
    path.write_bytes(content)
    refused(path, "not a readable numpy file")


def test_a_bomb_takes_no_memory(tmp_path):
    size = 2**31
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("poses.npy", "w") as member:
            member.write(npy(shape=f"({size // 64}, 4, 4)", body=b""))
            for _ in range(32):  # enough: the header alone is read
                member.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "x.npz", "too large for a file of this size")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
