"""Numpy files: .npy and .npz of plain numbers."""

import zipfile
from pathlib import Path

import numpy as np


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or of an .npy file (memory-mapped) under the name ''."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if Path(path).suffix.lower() == ".npy":
            arrays = {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
        arrays = {}
    if not arrays or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError(f"{path}: not a readable numpy file of plain numbers")
    return arrays
