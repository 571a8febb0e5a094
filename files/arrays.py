"""Numpy files, .npy and .npz, of plain numbers: headers first, and no memory is taken before its size is known to suit.

Such files come from anywhere. What nobody asks for is never read, so whatever it is does no harm.
"""

import math
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.lib import format as npy

SMALL, FACTOR = 2**26, 32  # an array from an archive has at most so many bytes, or so many times the archive's


@dataclass(frozen=True)
class Header:
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes]) -> Header:
    """Of an .npy file; the stream then stands at its numbers. Raises ValueError unless they are plain ones in a shape
    that can be, and whatever numpy's own parser raises."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):  # 3.0 is for names beyond Latin, which numbers have not
        raise ValueError(f"version {version}")
    with warnings.catch_warnings():  # of headers that Python 2 wrote
        warnings.simplefilter("ignore")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    if dtype.kind not in "biuf" or dtype.itemsize == 0:
        raise ValueError(f"its type is {str(dtype)[:40]}")
    if len(shape) > 16 or not all(0 <= side < 2**40 for side in shape) or math.prod(shape) >= 2**48:
        raise ValueError(f"its shape is {str(shape)[:40]}")
    return Header(shape, "F" if fortran else "C", dtype)


@contextmanager
def readable(where: object) -> Iterator[None]:
    """Whatever a damaged file makes zipfile, zlib, tokenize or numpy raise is one ValueError that names the place."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{where}: not a readable numpy file of plain numbers ({reason[0][:200]})") from None


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of a file by name, in its order, each read when it is asked for. An .npy file has one, '' (memory-
    mapped). Reading raises ValueError naming the file, and the array unless it is the only one."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such file")
        with open(path, "rb") as file:
            magic = file.read(6)
        self.archive, self.names = magic[:2] == b"PK", [""]
        with readable(path):
            if self.archive:
                with zipfile.ZipFile(path) as file:
                    self.names = [name.removesuffix(".npy") for name in dict.fromkeys(file.namelist())]
            elif magic != npy.MAGIC_PREFIX:
                raise ValueError("it begins with other bytes")
        if not self.names:
            raise ValueError(f"{path}: not a readable numpy file of plain numbers (it holds no array)")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise ValueError(f"{self.path}: no array {name!r}, found {', '.join(sorted(self.names)[:5])}")
        with readable(f"{self.path}: {name!r}" if len(self) > 1 else self.path):
            array = self.unpack(name) if self.archive else self.map()
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))

    def map(self) -> np.ndarray:
        with open(self.path, "rb") as file:
            header = read_header(file)
            return np.memmap(file, header.dtype, "r", file.tell(), header.shape, header.order)

    def unpack(self, name: str) -> np.ndarray:
        """One member of an archive, which may be compressed as numpy does it, but not much more than numbers are."""
        with zipfile.ZipFile(self.path) as file:
            member = file.getinfo(name if name in file.NameToInfo else f"{name}.npy")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"compressed by method {member.compress_type}")
            with file.open(member) as stream:
                header = read_header(stream)
                if header.size > max(SMALL, FACTOR * self.path.stat().st_size):
                    raise ValueError(f"shape {header.shape} is too large for a file of this size")
                numbers = stream.read(header.size)
        if len(numbers) != header.size:
            raise ValueError(f"{len(numbers)} bytes, expected {header.size}")
        return np.frombuffer(numbers, header.dtype).reshape(header.shape, order=header.order)
