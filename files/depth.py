"""Depth maps from files, and what in them is no depth."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from files.arrays import Arrays
from files.media import open_image

FAR = 1e9  # and beyond: what renderers write where there is nothing
SATURATED = (65504.0, 65535.0)  # the largest numbers of 16 bits, half a float's and a whole number's
NAMES = ("depth", "depths", "depth_map", "pred", "disparity")


def read_pfm(path: Path) -> np.ndarray:
    """A portable float map of one channel, which begins with its lowest row."""
    data = path.read_bytes()
    match = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+(-?[0-9.eE+]+)\s", data)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not match or width * height == 0 or len(data) - match.end() < 4 * width * height:
        raise ValueError(f"{path}: not a readable .pfm of one channel")
    kind = "<f4" if float(match[3]) < 0 else ">f4"
    return np.frombuffer(data, kind, width * height, match.end()).reshape(height, width)[::-1].astype(np.float32)


def read_numbers(path: Path) -> np.ndarray:
    """The map as it is in the file."""
    with open(path, "rb") as file:
        begin = file.read(6)
    if begin[:2] == b"Pf":
        return read_pfm(path)
    if begin[:4] == b"\x76\x2f\x31\x01":
        raise ValueError(f"{path}: OpenEXR is not read, expected .npy, .npz, .pfm or a 16-bit png: save the channel as"
                         " float32 with numpy")
    if begin[:2] == b"PK" or begin == b"\x93NUMPY" or path.suffix.lower() in (".npy", ".npz"):
        arrays = Arrays(path)
        found = [name for name in NAMES if name in arrays] or list(arrays)
        if len(arrays) != 1 and found[0] not in NAMES:
            raise ValueError(f"{path}: arrays {', '.join(sorted(arrays))}, expected one, or one named 'depth'")
        return arrays[found[0]]
    image = open_image(path)
    if not image.mode.startswith(("I", "F")):
        raise ValueError(f"{path}: a picture of mode {image.mode}, expected 16-bit gray depth")
    return np.asarray(image)


def known_depth(numbers: Tensor, where: object, inverse: bool = False, least: float = 0.5) -> Tensor:
    """A map [h,w] of z with 0 where it is unknown: what is not finite, not positive, or stands for the sky (1e9 and
    more, the largest of 16 bits, ten thousand times the near depths). With `inverse` the numbers are 1 / z and 0 is the
    sky. Raises ValueError if less than the share `least` is known but for the sky."""
    known = numbers.isfinite() & (numbers > 0)
    if not known.any() and least == 0:
        return torch.zeros_like(numbers)
    if not known.any():
        sign = ", all are negative, as z is in OpenGL: save them with the other sign" if (numbers < 0).any() else ""
        raise ValueError(f"{where}: no depth is finite and positive{sign}")
    sky = numbers == 0 if inverse else numbers.isposinf() | (numbers >= FAR)
    if not inverse:
        values = numbers[known]
        near = values.kthvalue(1 + len(values) // 10).values
        sky |= known & (numbers > 10_000 * near)
        sky |= torch.isin(numbers, torch.tensor(SATURATED)) & (numbers == values.max()) & (numbers > 2 * near)
    share = (known | sky).float().mean().item()
    if share < least or least and not (known & ~sky).any():
        raise ValueError(f"{where}: {100 * share:.2g} % of the depth map is known, expected at least"
                         f" {100 * least:g} %: fill it in first")
    numbers = torch.where(known & ~sky, numbers, 0)
    return torch.where(numbers > 0, 1 / numbers, 0) if inverse else numbers


def load_depth(path: str | Path, inverse: bool = False) -> Tensor:
    """A depth map [h,w] float32, z in any unit, 0 where it is unknown (`known_depth`): .npy, .npz, .pfm, a 16-bit
    picture or a tiff of floats, [1,h,w] and [h,w,1] too. Raises ValueError naming the file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    depth = read_numbers(Path(path))
    shape = depth.shape
    if depth.ndim == 3 and 1 in (shape[0], shape[2]):
        depth = depth[0] if shape[0] == 1 else depth[..., 0]
    if depth.ndim != 2 or depth.dtype.kind not in "fiu" or not depth.size:
        raise ValueError(f"{path}: array of shape {shape}, type {depth.dtype}, expected numbers [height, width]")
    with np.errstate(over="ignore"):  # too far is unknown
        numbers = torch.from_numpy(depth.astype(np.float32))
    return known_depth(numbers, path, inverse)
