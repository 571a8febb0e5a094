"""The README's picture: two demo scenes, each as picture, warp, what the model makes of it in four ways, and the truth.
And docs/ideas.md's: the last frame of both with each idea of the method switched off and on.

    python -m mini.gallery            # writes data/demo.webp and docs/idea-*.webp again

The first row is the demo of `python sample.py` (its first chunk), the second the hall along its own path. Warps are
exact.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from files.media import to_frames
from geometry.camera import DEPTH, WINDOW, move_path
from geometry.surface import pinhole
from helios.index import read_index
from helios.load import encode_prompts, load_models
from mini.judge import generate
from mini.known import Scene, scene_of
from mini.world import STILLS, Clip, caption, make_still, render
from model import Helios
from render import fill_warp
from wah import model_options

WAYS = {"no camera": None, "not aligned": {"align": False}, "aligned": {"drop": False}, "aligned, dropped": {},
        "mean colour, all tokens": {"drop": False, "warp_fill": "mean"}, "mean colour, dropped": {"warp_fill": "mean"}}
SHOWN = "picture", "warp", "no camera", "not aligned", "aligned", "aligned, dropped", "truth"  # in the README
IDEAS = {"camera": ("no camera", "aligned, dropped"), "align": ("not aligned", "aligned, dropped"),
         "drop": ("mean colour, all tokens", "mean colour, dropped"),
         "fill": ("mean colour, dropped", "aligned, dropped")}


def demo_clip(name: str, size: tuple[int, int]) -> Clip:
    """The first chunk of a still's own path, as the world shows it."""
    scene, start, fov_x = make_still(name)
    K, path = pinhole(fov_x, *size), move_path(STILLS[name][1])[:WINDOW]
    _, depth = render(scene, start, K, size, samples=1)
    path[:, :3, 3] *= depth[depth.isfinite()].median() / DEPTH
    c2w = start @ path
    return Clip(*render(scene, c2w, K, size, samples=4), c2w, K, caption(scene))


def columns(scene: Scene, weights: Path) -> dict[str, np.ndarray]:
    """The videos of a row by their titles, [33, H, W, 3] uint8."""
    models, options = load_models(Helios, weights, "cpu"), model_options(weights)
    prompts = encode_prompts(weights, scene.clip.caption, False, False, "cpu")
    videos = {"picture": scene.video[:, :, :1].expand(-1, -1, WINDOW, -1, -1),
              "warp": fill_warp(scene.warp, options.warp_fill).frames}
    for name, changes in WAYS.items():
        warp, changed = (None, options) if changes is None else (scene.warp, replace(options, **changes))
        videos[name] = generate(models, prompts, scene, 0, warp, changed, None)
    videos["truth"] = scene.video
    return {name: to_frames(video) for name, video in videos.items()}


def write(rows: list[dict[str, np.ndarray]], path: Path, shown: tuple[str, ...]) -> None:
    """The columns `shown`, titles above, rows below one another: an animation, there and back, or a still of one
    frame."""
    gap, title = 4, 16
    grid = np.stack([np.stack([row[name] for name in shown]) for row in rows])  # [R, C, T, H, W, 3]
    grid = np.pad(grid, ((0, 0), (0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    frames = rearrange(grid, "r c t h w three -> t (r h) (c w) three")
    pictures = []
    for frame in np.pad(frames, ((0, 0), (title, 0), (0, 0), (0, 0)), constant_values=255):
        picture = Image.fromarray(frame)
        for column, name in enumerate(shown):
            ImageDraw.Draw(picture).text((column * grid.shape[4] + 2, 2), name, fill="black")
        pictures.append(picture)
    there_and_back = [*pictures[1:], *pictures[-2:0:-1]]
    pictures[0].save(path, save_all=True, append_images=there_and_back, duration=62, loop=0, quality=72)


def main() -> None:
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, default=root / "weights" / "mini")
    parser.add_argument("--out", type=Path, default=root, help="the folder above data and docs")
    args = parser.parse_args()
    size = read_index(args.weights).size
    with torch.inference_mode():
        rows = [columns(scene_of(demo_clip(name, size)), args.weights) for name in ("plaza", "hall")]
    for folder in ("data", "docs"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    write(rows, args.out / "data" / "demo.webp", SHOWN)
    last = [{name: frames[-1:] for name, frames in row.items()} for row in rows]
    for idea, ways in IDEAS.items():
        write(last, args.out / "docs" / f"idea-{idea}.webp", ("picture", "warp", *ways, "truth"))


if __name__ == "__main__":
    main()
