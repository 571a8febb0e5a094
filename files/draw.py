"""Pictures for a person to look at: contact sheets, a path from above, a curve, a point cloud."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def save_png(path: Path, image: np.ndarray) -> None:
    """[H,W,3] or [H,W] uint8."""
    Image.fromarray(image).save(path, format="PNG")


def evenly_spaced(count: int, columns: int) -> list[int]:
    """At most `columns` of the indices below `count`, first and last included."""
    return np.linspace(0, count - 1, min(count, columns)).round().astype(int).tolist()


def contact_sheet(rows: dict[str, np.ndarray], columns: int = 8, tile_width: int = 256) -> np.ndarray:
    """A picture [H,W,3] uint8 of evenly spaced frames: one labelled row for each video [T,H,W,3] or [T,H,W] uint8."""
    gap, label = 4, 14
    first = next(iter(rows.values()))
    picks = evenly_spaced(len(first), columns)
    height = round(tile_width * first.shape[1] / first.shape[2])
    sheet = Image.new("RGB", (gap + len(picks) * (tile_width + gap), gap + len(rows) * (label + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, frames) in enumerate(rows.items()):
        top = gap + row * (label + height + gap)
        draw.text((gap, top), name, fill="black")
        for column, index in enumerate(picks):
            tile = Image.fromarray(frames[index]).resize((tile_width, height), Image.Resampling.LANCZOS)
            sheet.paste(tile, (gap + column * (tile_width + gap), top + label))
    return np.array(sheet)


def plan(points: np.ndarray, colors: np.ndarray, track: np.ndarray, heading: np.ndarray,
         axes: tuple[str, str]) -> np.ndarray:
    """A picture [640,640,3] uint8 of a scene and a camera path along two axes, named in `axes`: to the right and up.

    `points` [N,2] and their `colors` [N,3] uint8; camera places `track` [T,2] and viewing directions `heading` [T,2].
    """
    low, high = np.quantile(points, 0.02, axis=0), np.quantile(points, 0.9, axis=0)  # the sky would shrink everything
    low, high = np.minimum(low, track.min(0)), np.maximum(high, track.max(0))
    side, margin = 640, 40
    scale = (side - 2 * margin) / max((high - low).max(), 1e-9)
    flip = np.array([1, -1]) * scale
    origin = np.array([margin, side - margin]) - low * flip
    canvas = np.full((side, side, 3), 255, np.uint8)
    x, y = (points * flip + origin).clip(-1, side).round().astype(int).T
    shown = (x > margin) & (x < side - margin) & (y > margin) & (y < side - margin)
    canvas[y[shown], x[shown]] = colors[shown] // 2 + 128  # pale, so that the path stands out
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    places, ahead = track * flip + origin, track * flip + origin + heading * np.array([28, -28])
    for index in evenly_spaced(len(track), 13):
        draw.line([*places[index], *ahead[index]], fill="blue")
    draw.line(places.flatten().tolist(), fill="black", width=2)
    marks = ("start", places[0], "green", -8, "ra"), ("end", places[-1], "red", 8, "la")
    for name, (x, y), color, shift, anchor in marks:
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=color)
        draw.text((x + shift, y + 4), name, fill=color, anchor=anchor)
    draw.line([(margin, margin), (margin, side - margin), (side - margin, side - margin)], fill="gray")
    right, up = axes
    ends = low + (side - 2 * margin) / scale
    draw.text((margin, side - margin + 6), f"{right} {low[0]:.4g}, {up} {low[1]:.4g}", fill="black")
    draw.text((side - margin, side - margin + 6), f"{right} {ends[0]:.4g}", fill="black", anchor="rt")
    draw.text((margin, margin - 14), f"{up} {ends[1]:.4g}", fill="black")
    return np.array(image)


def save_ply(path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    """A point cloud [N,3] with colours [N,3] uint8, as a binary .ply that MeshLab and Blender open."""
    vertices = np.empty(len(points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertices["xyz"], vertices["rgb"] = points, colors
    properties = [f"property float {axis}" for axis in "xyz"]
    properties += [f"property uchar {color}" for color in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header", ""]
    path.write_bytes("\n".join(header).encode() + vertices.tobytes())


def draw_curve(losses: list[float]) -> np.ndarray:
    """Losses over steps, pale, and their running mean: a picture [360, 640, 3] uint8."""
    image = Image.new("RGB", (640, 360), "white")
    draw, count, values = ImageDraw.Draw(image), len(losses), np.array(losses)
    left, top, right, bottom = 56, 32, 620, 320
    high = 1.1 * np.quantile(values, 0.99) + 1e-9  # a single high value would flatten the rest
    mean = [values[max(0, index - 24):index + 1].mean() for index in range(count)]

    def place(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * step / count, bottom - (bottom - top) * min(value / high, 1)

    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, y), step = place(share * count, share * high), round(share * count)
        draw.line([(left, y), (right, y)], fill="lightgray")
        draw.text((left - 6, y), f"{share * high:.2g}", fill="black", anchor="rm")
        draw.text((x, bottom + 6), f"{step}", fill="black", anchor="ma")
    for line, color, width in ((values, "lightskyblue", 1), (mean, "darkblue", 3)):
        draw.line([place(step, value) for step, value in enumerate(line, start=1)], fill=color, width=width)
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    draw.text((left, 10), f"loss over steps; dark: the mean of 25, now {mean[-1]:.4g}", fill="darkblue")
    return np.array(image)


def draw_means(places: list[float], lines: dict[str, list[tuple[float, float]]], along: str) -> np.ndarray:
    """Lines of means with standard errors (nan: not known) over `places`, all on one scale: [360, 640, 3] uint8."""
    image = Image.new("RGB", (640, 360), "white")
    draw, colors = ImageDraw.Draw(image), ("darkblue", "darkorange", "darkgreen", "firebrick")
    left, top, right, bottom = 56, 40, 610, 310
    ends = [mean + sign * np.nan_to_num(error) for line in lines.values() for mean, error in line for sign in (-1, 1)]
    low, high, span = min(ends), max(ends), max(places) - min(places)
    low, high = low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - min(places)) / (span or 1), (y - low) / (high - low)
        return left + (right - left) * across, bottom - (bottom - top) * up

    for value in np.linspace(low, high, 5):
        draw.line([place(min(places), value), place(max(places), value)], fill="lightgray")
        draw.text((left - 6, place(0, value)[1]), f"{value:.1f}", fill="black", anchor="rm")
    for x in places:
        draw.text((place(x, 0)[0], bottom + 6), f"{x:g}", fill="black", anchor="ma")
    draw.text(((left + right) / 2, bottom + 24), along, fill="black", anchor="ma")
    for number, (name, line) in enumerate(lines.items()):
        color = colors[number % len(colors)]
        draw.line([place(x, mean) for x, (mean, _) in zip(places, line)], fill=color, width=2)
        for x, (mean, error) in zip(places, line):
            column = place(x, mean)[0]
            draw.line([(column, place(x, mean + sign * np.nan_to_num(error))[1]) for sign in (-1, 1)], fill=color)
            draw.ellipse([column - 3, place(x, mean)[1] - 3, column + 3, place(x, mean)[1] + 3], fill=color)
        draw.text((left + 150 * number, 14), name, fill=color)
    return np.array(image)
