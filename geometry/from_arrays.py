"""Camera paths in numpy files: one array of poses under any usual name, and what may stand beside it."""

from pathlib import Path

import numpy as np

from files.arrays import Arrays
from geometry.recording import Recording, numbers, pinhole_of

POSES = {  # name of the array -> convention
    "camera_poses": "c2w", "c2w": "c2w", "c2ws": "c2w", "cam_c2w": "c2w", "poses": "c2w", "pose": "c2w",
    "": "c2w", "arr_0": "c2w",  # of np.save, and of np.savez without a name
    "w2c": "w2c", "w2cs": "w2c", "extrinsic": "w2c", "extrinsics": "w2c", "data": "c2w",
}  # fmt: skip
LENSES = ("intrinsics", "intrinsic", "K", "Ks")


def poses_bounds(file: Path, rows: np.ndarray) -> Recording:
    """LLFF's poses_bounds.npy [T,17]: a matrix 3x5 of the camera's down, right and back, its position, and the height,
    width and focal length; then two depths."""
    table = rows[:, :15].reshape(-1, 3, 5)
    down, right, back, place, (height, width, _) = *table[..., :4].transpose(2, 0, 1), table[0, :, 4]
    lens = np.stack([table[:, 2, 4], table[:, 2, 4], *np.full((2, len(rows)), np.nan)], axis=1)
    return Recording(str(file), np.stack([right, down, -back, place], axis=-1), "c2w", lens, (width, height))


def from_arrays(file: Path) -> Recording:
    """Any one array of POSES; of ViPE `data` and `inds`; with the intrinsics, `fps`, and the depth's size if there."""
    arrays = Arrays(file)
    found = [name for name in POSES if name in arrays and (name != "data" or "inds" in arrays)]
    if len(found) != 1:
        problem = "more than one layout" if found else "no array of poses"
        raise ValueError(f"{file}: {problem}, found {', '.join(sorted(arrays))}; expected one of"
                         f" {', '.join(filter(None, POSES))}")
    (name,) = found
    poses, where = arrays[name], f"{file}: {name!r}" if name else str(file)
    if poses.dtype.kind not in "fiu":
        raise ValueError(f"{where} has type {poses.dtype}, expected numbers")
    poses = np.array(poses, dtype=np.float64)
    if poses.ndim == 2 and poses.shape[1] == 17:
        return poses_bounds(file, poses)
    poses = poses[0] if poses.ndim == 4 and len(poses) == 1 else poses
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"{where}: shape {poses.shape}, expected [T,4,4] or [T,3,4]")
    found = Recording(where, poses, POSES[name])
    if name == "data":
        found.times, found.counted = numbers(arrays["inds"], f"{file}: 'inds'", (len(poses),)), True
    beside = next((key for key in LENSES if key in arrays), None)
    near = file.with_name("intrinsics.npy")
    if beside is None and near != file and near.is_file():
        found.lens = pinhole_of(Arrays(near)[""], str(near))
    elif beside is not None:
        found.lens = pinhole_of(arrays[beside], f"{file}: {beside!r}")
    if found.lens is not None and "depth" in arrays and name != "data":
        height, width = arrays["depth"].shape[-2:]
        found.size = (width, height) if min(height, width) > 16 else None
    if "fps" in arrays:
        found.fps = float(numbers(arrays["fps"].reshape(-1), f"{file}: 'fps'", (1,))[0])
        if not 1 <= found.fps <= 240:
            raise ValueError(f"{file}: fps is {found.fps:g}, expected a number from 1 to 240")
    return found
