"""What a file of any format says of a camera, before it is checked: `Recording`, and the numbers in it.

Every reader (from_json.py, from_text.py, from_arrays.py, from_colmap.py) makes one of these, and paths.py a path of it.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch

from geometry.camera import rigid


@dataclass
class Recording:
    where: str  # file, and the place in it
    poses: np.ndarray  # [T, 4, 4] or [T, 3, 4]
    # "c2w" or "w2c", both OpenCV (x right, y down, z forward); "opengl": c2w with y up and z backward; "unreal": c2w of
    # a left-handed world, with the axes forward, right, up
    convention: str = "c2w"
    lens: np.ndarray | None = None  # [T, 4] or [4]: fx, fy, cx, cy; nan: not known
    size: tuple[float, float] | None = None  # width and height of the picture that `lens` is measured in
    names: list[str] | None = None  # of the frames, which decide their order
    times: np.ndarray | None = None  # [T], in seconds or frames: they decide the order, the rate and what is missing
    counted: bool = False  # the times are numbers of frames
    fps: float | None = None
    unit: str = "depth"
    latents: bool = False  # one pose a latent frame, which is four frames


def numbers(value: object, where: str, *shapes: tuple[int, ...]) -> np.ndarray:
    """A file's value as an array of one of the `shapes`, in which -1 stands for any length."""
    try:
        array = np.array(value)
    except ValueError:  # rows of unequal length
        array = np.array(None)
    fits = any(len(shape) == array.ndim and all(a in (-1, b) for a, b in zip(shape, array.shape)) for shape in shapes)
    if array.dtype.kind not in "fiu" or not fits:
        expected = " or ".join(map(str, shapes)).replace("-1", "n")
        raise ValueError(f"{where}: expected a list of numbers of shape {expected}")
    return array.astype(np.float64)


def number(data: dict, key: str, where: str, low: float, high: float) -> float:
    """A file's value as a number. Raises ValueError unless it is one from `low` to `high`."""
    value = data.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{where}: {key} is {repr(value)[:60]}, expected a number from {low} to {high}")
    return value


def pinhole_of(K: object, where: str) -> np.ndarray:
    """fx, fy, cx, cy of a matrix [3,3] or [T,3,3], or of such four numbers: [4] or [T,4]."""
    k = numbers(K, where, (3, 3), (-1, 3, 3), (4,), (-1, 4), (1, -1, 3, 3))
    k = k[0] if k.ndim == 4 else k
    return k if k.shape[-1] == 4 else np.stack([k[..., 0, 0], k[..., 1, 1], k[..., 0, 2], k[..., 1, 2]], axis=-1)


def refuse_lens(model: object, where: str) -> None:
    """Cameras that are no pinholes are named."""
    if isinstance(model, str) and re.search("fisheye|equirect|spher|omni|panoram|vr180|360|cubemap", model.lower()):
        raise ValueError(f"{where}: a camera of type {model}, expected a pinhole: undistort the pictures first")


def rigid_rows(q: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Quaternions [T,4], w first and nearly of length one, and positions [T,3] -> matrices [T,4,4]."""
    return rigid(torch.from_numpy(q), torch.from_numpy(position)).numpy()
