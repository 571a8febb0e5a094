"""Numbers about a finished video that need no truth: seams between its chunks, and how it changes from begin to end."""

from collections.abc import Iterable

import numpy as np

WINDOW = 33  # frames a chunk
SHARE = 0.15  # of the frames, at the begin and at the end


def sharpness(frame: np.ndarray) -> float:
    """Mean absolute Laplacian of the brightness of [H, W, 3] uint8, in grey levels."""
    gray = frame.astype(np.float64).mean(-1)
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float(np.abs(around - 4 * gray[1:-1, 1:-1]).mean())


def steadiness(frames: Iterable[np.ndarray], window: int = WINDOW) -> dict[str, float]:
    """Of a video's frames [H, W, 3] uint8, looked at one by one.

    `seam`: mean absolute difference of neighbouring frames over the border of two chunks, over that inside chunks; 1
    is none, and it is left out if there is one chunk, or nothing moves. From the first to the last 15 % of the
    frames: `color_drift`, how far the mean colour goes, in grey levels; `sharpness`, the last ones' over the first
    ones'.
    """
    steps, colors, details, before = [], [], [], None
    for frame in frames:
        if before is not None:
            steps.append(np.abs(frame.astype(int) - before).mean())
        colors.append(frame.mean((0, 1)))
        details.append(sharpness(frame))
        before = frame
    count = max(round(SHARE * len(colors)), 1)
    color = np.abs(np.mean(colors[-count:], axis=0) - np.mean(colors[:count], axis=0)).max()
    result = {"color_drift": float(color), "sharpness": np.mean(details[-count:]) / max(np.mean(details[:count]), 1e-9)}
    border = np.arange(1, len(colors)) % window == 0
    inside = np.array(steps)[~border]
    if border.any() and inside.any():
        result["seam"] = np.array(steps)[border].mean() / inside.mean()
    return {name: float(value) for name, value in result.items()}


def flicker(frames: Iterable[np.ndarray]) -> float:
    """What goes there and back from one frame [H, W, 3] uint8 to the next: mean absolute distance of the brightness
    from the mean of the frames before and after, in grey levels; 0 if there are fewer than three."""
    grays = [frame.mean(-1, dtype=np.float32) for frame in frames]
    apart = [np.abs(now - (before + after) / 2).mean() for before, now, after in zip(grays, grays[1:], grays[2:])]
    return float(np.mean(apart)) if apart else 0.0
