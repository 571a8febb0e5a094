"""One known camera path as files of several formats, and how their readers are asked."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import check
from known import C2W, Q

from geometry.camera import normalize, resolve_lens
from geometry.paths import load_path

FOV, WIDTH, HEIGHT = 62.0, 640, 384
FOCAL = WIDTH / 2 / math.tan(math.radians(FOV) / 2)
K = [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]
FLIP = np.diag([1.0, -1, -1, 1])  # OpenCV to OpenGL axes of the camera
W2C = np.linalg.inv(C2W)
Q_W2C = Q * [1, -1, -1, -1]
PATHS = Path(__file__).parent / "paths"


def words(*values):
    return " ".join(f"{value:.9f}" for value in values)


TABLE = {  # name of the file -> lines
    "re10k.txt": ["https://www.youtube.com/watch?v=0",
                  *(f"{i * 33366} " + words(FOCAL / WIDTH, FOCAL / HEIGHT, 0.5, 0.5, 0, 0, *w2c[:3].ravel())
                    for i, w2c in enumerate(W2C))],
    "tum.txt": ["# timestamp tx ty tz qx qy qz qw",
                *(words(i / 30, *c2w[:3, 3], *q[1:], q[0]) for i, (c2w, q) in enumerate(zip(C2W, Q)))],
    "kitti.txt": [words(*c2w[:3].ravel()) for c2w in C2W],
}  # fmt: skip


def gl(pose):
    return (pose @ FLIP).tolist()


def transforms(poses, names=None, **keys):
    frames = [{"transform_matrix": gl(pose)} | ({"file_path": names[i]} if names else {}) for i, pose in enumerate(poses)]
    return {"frames": frames, **keys}


def colmap(folder, cameras=True):
    """The first image has points, the others an empty line; the order in the file isn't that of the names."""
    lines = ["# Image list with two lines of data per image:"]
    for i, (q, w2c) in reversed(list(enumerate(zip(Q_W2C, W2C)))):
        row = [str(40 - i), *map(str, q), *map(str, w2c[:3, 3]), "7", f"my frame{i:03}.jpg"]
        lines += [" ".join(row), "1.5 2.5 -1 3 4 17" if i == 11 else ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    if cameras:
        lines = ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]", "1 SIMPLE_PINHOLE 64 64 64 32 32",
                 f"7 OPENCV {WIDTH} {HEIGHT} {FOCAL} {FOCAL} 320 192 0.1 0 0 0", "70 PINHOLE 9 9 9 9 4 4"]
        (folder / "cameras.txt").write_text("\n".join(lines) + "\n")
    return folder


def lines_of(times):
    return [words(time, *c2w[:3, 3], *q[1:], q[0]) for time, c2w, q in zip(times, C2W, Q)]


def save(folder, content):
    (folder / "poses.json").write_text(json.dumps(content))
    return folder / "poses.json"


def write(folder, lines):
    (folder / "poses.txt").write_text("\n".join(lines))
    return folder / "poses.txt"


def same(path, fov_x=FOV, fps=None):
    """The known path, in any world; its field of view is that of a picture of the known size."""
    wanted = torch.from_numpy(C2W)
    check("Pose files", normalize(path.c2w.double(), len(path.c2w)), normalize(wanted, 12), 1e-5)
    assert path.c2w.dtype == torch.float32 and path.unit == "depth" and path.zoom is None
    assert path.c2w[0, :3, 3].abs().max() == 0
    assert path.fps == fps if fps is None else abs(path.fps / fps - 1) < 1e-6
    assert (path.lens is None) == (fov_x is None)
    if fov_x is not None:
        (fx, fy, cx, cy), _ = resolve_lens(path, WIDTH, HEIGHT)
        check("Pose files, field of view", 2 * math.degrees(math.atan(0.5 / fx)), fov_x, 1e-5)
        assert abs(fx * WIDTH / (fy * HEIGHT) - 1) < 1e-6 and abs(cx - 0.5) < 1e-6 and abs(cy - 0.5) < 1e-6


def refused(file, message):
    with pytest.raises(ValueError) as error:
        load_path(file)
    text = str(error.value)
    assert re.search(message, text) and str(file) in text and len(text.splitlines()) == 1
