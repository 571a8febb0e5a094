"""The table as a page: all numbers, and the worst and best videos playing side by side. One file, no network."""

import base64
import html
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from evaluation.compare import fit
from evaluation.table import Rows, cell, metrics_of, tables, title
from files.video import write_video

SHOWN, WIDTH, FPS = 5, 320, 16  # videos of each end, their width at most, their frame rate
LOW = {"lpips", "R-Err", "T-Err", "ghost", "color_drift", "flicker", "seam", "turn", "shift"}  # the lower the better

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --pale: light-dark(#666, #aaa); }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 90rem;
  background: light-dark(#fff, #16181c); color: light-dark(#1a1a1a, #e6e6e6); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
ul, figcaption, small { color: var(--pale); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.row { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; } figcaption { font-size: .85rem; }
video { display: block; width: min(20rem, 44vw); border-radius: 4px; background: #000; }
"""


def embed(frames: np.ndarray) -> str:
    """A video [T, H, W, 3] uint8 as the address of its own bytes."""
    height, width = frames.shape[1:3]
    scale = min(1, WIDTH / width)
    size = round(height * scale / 2) * 2, round(width * scale / 2) * 2
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, np.stack([fit(frame, size, False) for frame in frames]), FPS)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def grid(corner: str, columns: list[str], lines: dict[str, list[str]]) -> str:
    head = "".join(f"<th>{html.escape(each)}</th>" for each in columns)
    body = "".join(f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{each}</td>' for each in cells)}</tr>\n"
                   for name, cells in lines.items())
    return f'<div class="wide"><table><tr><th>{html.escape(corner)}</th>{head}</tr>\n{body}</table></div>\n'


def ranked(row: dict[str, dict[str, float]], metric: str) -> list[str]:
    """Names of videos from the worst to the best."""
    known = {name: values[metric] for name, values in row.items() if metric in values}
    return sorted(known, key=lambda name: known[name], reverse=metric.partition(" ")[0] in LOW)


def player(name: str, number: str, videos: dict[str, np.ndarray]) -> str:
    figures = "".join(f'<figure><video src="{embed(frames)}" autoplay loop muted playsinline controls></video>'
                      f"<figcaption>{html.escape(label)}</figcaption></figure>\n" for label, frames in videos.items())
    return f'<h3>{html.escape(name)} <small>{number}</small></h3>\n<div class="row">\n{figures}</div>\n'


def make_page(head: list[str], rows: Rows, reference: str | None, shown: str,
              show: Callable[[str], dict[str, np.ndarray]]) -> str:
    """`show` gives the videos of a name by their labels; ranked are those of the row `shown`, by its first metric."""
    metrics = metrics_of(rows)
    parts = ["<h1>Videos, measured</h1>\n<ul>", *(f"<li>{html.escape(line)}</li>" for line in head), "</ul>",
             "<h2>Means and their standard errors</h2>"]
    parts += [grid(*table) for table in tables(rows, reference)]
    metric = metrics_of({shown: rows[shown]})[0]
    names = ranked(rows[shown], metric)
    worst = names[:SHOWN]
    best = [name for name in reversed(names[-SHOWN:]) if name not in worst]
    for words, chosen in (("worst", worst), ("best", best)):
        if chosen:
            parts.append(f"<h2>The {words} of {html.escape(shown)} by {title(metric)}</h2>")
        parts += [player(name, f"{title(metric)} {cell([rows[shown][name][metric]], metric)}", show(name))
                  for name in chosen]
    each = {f"{name}, {row}": [cell([values[metric]] if metric in values else [], metric) for metric in metrics]
            for row, videos in rows.items() for name, values in videos.items()}
    parts += ["<h2>Every video</h2><details><summary>numbers</summary>", grid("", [*map(title, metrics)], each),
              "</details>"]
    body = "\n".join(parts)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Videos, measured</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
            f"<body>\n{body}\n</body></html>\n")
