"""What tests share: all of a video, and known inputs, a camera path in double precision, turns about any axis, a smooth picture."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from files.media import read_frames

rotations = st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.1, 1), st.floats(-180, 180))  # axis, degrees


def turned(axis, degrees):
    """Rodrigues' formula, in double precision."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = math.radians(degrees)
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def known_path():
    """Twelve poses, each turned by 15 degrees more about the axis (1, 2, -3), and their quaternions (w x y z)."""
    poses, quaternions = [], []
    for frame in range(12):
        pose, half = np.eye(4), math.radians(7.5 * (frame + 1))
        pose[:3, :3] = turned((1, 2, -3), 15 * (frame + 1))
        pose[:3, 3] = math.sin(frame), 0.3 * frame, 4 - 0.1 * frame**2
        poses.append(pose)
        quaternions.append([math.cos(half), *math.sin(half) * np.array([1, 2, -3]) / math.sqrt(14)])
    return np.stack(poses), np.array(quaternions)


def load_video(path):
    """All frames of a video, uint8 [T,H,W,3]."""
    return np.stack(list(read_frames(path)))


def picture(height=96, width=160):
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([columns, rows, (8 * columns).sin() / 2 + 0.5])[None] * 1.6 - 0.8


C2W, Q = known_path()
