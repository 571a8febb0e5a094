"""The miniature's geometry network learns how cameras stand to each other, without forgetting what depth is.

    python -m mini.cameras scenes                   # once: 1200 scenes seen from six cameras each
    python -m mini.cameras train --steps 4000       # goes on where it was stopped
    python -m mini.cameras export                   # weights/mini/Pi3X/model.safetensors
    python -m mini.cameras evaluate                 # held-out pairs of pictures, as a table

Unfinished: docs/miniature.md, "The geometry network", says how far it comes, and the shipped weights are not from here.

geometry.py trains on what a step draws itself and spends most of it on drawing and on the maps of every pixel; pairs
are few, and the network comes to guess that nothing moves. Here pictures are drawn once and used in many sets of 1 to
4, and no map is made: what the heads of the maps read shall stay what it was in the network that training begins with
(`WEIGHTS`: point, conf, metric), while all before these heads learns relative poses, and where a patch is seen again.
"""

import argparse
import math
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from geometry.camera import WINDOW, homogeneous
from geometry.heads import nearest_rotation
from geometry.pi3x import Block, Pi3X, load_pi3x
from geometry.rotary import HEAD_DIM, rotate
from mini import world
from mini.geometry import (
    HAZE,
    INPUT,
    MIRROR,
    camera_losses,
    draw_views,
    export,
    recolored,
    scaled,
    seen_from_each,
    stretched,
    unit_rows,
)
from mini.pretrain import HELD_OUT, Recipe, fit

VIEWS = 6  # of a scene
TURNS = 20.0, 8.0, 4.0  # degrees that a camera is turned by at most beside its path: yaw, pitch, roll
SCENES, HELD_OUT_SCENES = 1200, 40
FIRST = 2 * 10**5  # seed of the first scene
PICTURES = 18  # in a step
MATCHED = 3  # the decoder block, of those that see all pictures, whose first head learns where a patch is seen again
TRAINED = "encoder.", "decoder.", "register_token", "camera_", "point_decoder.", "conf_decoder.", "metric_"
WEIGHTS = {"turn": 20.0, "place": 10.0, "hand": 5.0, "match": 0.3, "point": 0.3, "conf": 0.15, "metric": 0.1}


class Sets(NamedTuple):
    """B sets of N pictures, each set of one scene."""

    images: Tensor  # [B, N, 3, H, W] in [0, 1]
    c2w: Tensor  # [B, N, 4, 4], in units of a set's median depth
    depth: Tensor  # [B, N, h, w] of every 7th pixel from the fourth on, in that unit, inf in the sky
    K: Tensor  # [B, 3, 3]


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_scene(seed: int) -> dict[str, Tensor]:
    """A scene from places of a random path, where the camera is also turned: `pictures` [VIEWS,H,W,3] uint8, `c2w`
    [VIEWS,4,4] in meters, and `depth` [VIEWS,h,w] of every 7th pixel, inf in the sky."""
    rng = Random(seed)
    scene = world.make_scene(rng)
    path, reach, K = world.make_path(scene, rng, 2 * WINDOW), rng.random(), stretched(rng.uniform(45, 85), INPUT)
    angles = [[math.radians(rng.uniform(-reach, reach) * most) for _ in range(VIEWS)] for most in TURNS]
    c2w = path[rng.sample(range(len(path)), VIEWS)] @ world.poses(torch.zeros(VIEWS, 3), *torch.tensor(angles))
    pictures, depth = world.render(scene, c2w, K, INPUT, 1)
    coarse = depth[:, 3::7, 3::7]
    return {"pictures": pictures, "c2w": c2w, "depth": coarse.where(coarse < HAZE, torch.inf), "K": K}


def draw_scenes(file: Path, first: int, count: int) -> None:
    """Scenes of seeds from `first` on, side by side in a file."""
    rows = [draw_scene(seed) for seed in range(first, first + count)]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, file)


def pick(scenes: dict[str, Tensor], seed: int, count: int) -> Sets:
    """Sets of `count` pictures of random scenes; mirrored, recoloured and noisy at random."""
    rng, generator, sets = Random(seed), torch.Generator().manual_seed(seed), []
    for index in rng.sample(range(len(scenes["c2w"])), PICTURES // count):
        views = rng.sample(range(VIEWS), count)
        images = recolored(scenes["pictures"][index][views], rng, generator)
        c2w, depth = scenes["c2w"][index][views], scenes["depth"][index][views]
        if rng.random() < 0.5:
            images, depth, c2w = images.flip(-1), depth.flip(-1), MIRROR @ c2w @ MIRROR
        unit = depth[depth.isfinite()].median()
        sets.append((images, scaled(c2w[None], 1 / unit[None])[0], depth / unit, scenes["K"][index]))
    return Sets(*map(torch.stack, zip(*sets)))


# ------------------------------------------------------------------------------------------------------------ training


def matches(pairs: Sets) -> Tensor:
    """[B, 2, P, P]: how much of each patch of the other picture is where each patch of this one is seen again; nothing
    where it is hidden, outside, or the sky."""
    v, u = torch.meshgrid(*(torch.arange(10.0, side, 14) for side in INPUT), indexing="ij")  # a place in each patch
    z, K = pairs.depth[:, :, 1::2, 1::2], pairs.K[:, None]
    known = z.isfinite()
    pixels = torch.stack([u, v, torch.ones_like(u)])[None, None].flatten(3)  # [1, 1, 3, P]
    local = torch.linalg.inv(K) @ pixels * z.where(known, 1).flatten(2)[:, :, None]
    turn, place = pairs.c2w[..., :3, :3], pairs.c2w[..., :3, 3:]
    there = turn.flip(1).mT @ (turn @ local + place - place.flip(1))  # in the other's camera
    far = there[:, :, 2].clamp_min(0.01)
    x, y = ((K @ there)[:, :, :2] / far[:, :, None]).unbind(2)
    near = [((at - 3) / 7).round().long().clamp(0, side - 1) for at, side in zip((y, x), pairs.depth.shape[2:])]
    first, second = torch.arange(len(far))[:, None, None], torch.tensor([1, 0])[None, :, None]
    shown = known.flatten(2) & ((far / pairs.depth[first, second, near[0], near[1]] - 1).abs() < 0.15)
    shares = [(1 - ((at - center) / 14).abs()).relu() for at, center in (
        (y[..., None], v.flatten()), (x[..., None], u.flatten()))]
    return shares[0] * shares[1] * shown[..., None]


def match_loss(block: Block, x: Tensor, rope: Tensor, pairs: Sets) -> Tensor:
    """That the first head of a decoder block, which sees the tokens [B, 2 S, D] of both pictures, looks at what it
    looks from in the other one. Poses alone teach that too slowly."""
    q, k, _ = block.attn.heads(block.norm1(x))
    q, k = rotate(q[:, :1], rope)[:, 0], rotate(k[:, :1], rope)[:, 0]
    looks = (q @ k.mT / math.sqrt(HEAD_DIM)).float().log_softmax(-1)
    wanted = matches(pairs)
    size, patches = x.shape[1] // 2, wanted.shape[-1]
    looks = looks.unflatten(-1, (2, size)).unflatten(1, (2, size))[:, :, -patches:, :, -patches:]  # without specials
    looks = torch.stack([looks[:, 0, :, 1], looks[:, 1, :, 0]], dim=1)
    return -(wanted * looks).sum() / wanted.sum().clamp_min(1)


def losses(network: Pi3X, before: Pi3X | None, sets: Sets) -> dict[str, Tensor]:
    """Means, to be weighted: of relative poses if there are any, and of what shall stay as it was `before`."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = network.decoder[MATCHED].register_forward_pre_hook(lambda block, given: seen.append(given))
    point, conf, nine, place, metric = network.branches(sets.images)
    hook.remove()
    parts = {}
    if sets.images.shape[1] > 1:
        found = homogeneous(torch.cat([unit_rows(nine), place[..., None]], dim=-1))
        parts = camera_losses(found.view_as(sets.c2w), sets.c2w)
    if sets.images.shape[1] == 2:
        parts["match"] = match_loss(network.decoder[MATCHED], seen[0][0], seen[0][1], sets)
    if before is not None:
        with torch.no_grad():
            old_point, old_conf, _, _, old_metric = before.branches(sets.images)
        parts |= {name: (now - old).square().mean() / old.var(dim=(0, 3, 4)).mean()
                  for name, now, old in (("point", point, old_point), ("conf", conf, old_conf))}
        parts["metric"] = (metric - old_metric).abs().mean()
    return parts


def train(folder: Path, start: Path, recipe: Recipe) -> None:
    """From the weights in `start`. Scenes, state and log are `scenes.safetensors`, `cameras.safetensors` and
    `cameras.jsonl` in `folder`; logged are the losses on held-out pictures."""
    network, before = load_pi3x(start), load_pi3x(start)
    for name, p in network.named_parameters():
        p.requires_grad_(name.startswith(TRAINED))
    scenes, held_out = (load_file(folder / f"{name}.safetensors") for name in ("scenes", "held-out"))
    unseen = [pick(held_out, HELD_OUT + index, count) for index, count in enumerate((1, 2, 2, 2, 2, 3))]

    def accumulate(network: Pi3X, step: int, rank: int) -> float:
        turn = 2 * step + rank
        count = Random(turn).choice((1, 2, 2, 2, 2, 2, 3, 4))
        kept = before if count == 1 or step % 2 == 0 else None  # in all steps it would be a quarter of their time
        parts = losses(network, kept, pick(scenes, turn, count))
        loss = torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum()
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def validate(network: Pi3X) -> dict:
        parts = [losses(network, before, sets) for sets in unseen]
        means = {name: torch.stack([part[name] for part in parts if name in part]).mean().item() for name in WEIGHTS}
        pairs = (sets for sets in unseen if sets.images.shape[1] == 2)
        errors = torch.cat([errors_of_pairs(network, sets.images, sets.c2w)["error"] for sets in pairs])
        return means | {"degrees": errors.mean().item()}

    fit(network, accumulate, validate, recipe, folder / "cameras.safetensors")


# ------------------------------------------------------------------------------------------------------------ measuring


def degrees(turn: Tensor) -> Tensor:
    """Angles of rotations [..., 3, 3]."""
    return ((turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos().rad2deg()


@torch.no_grad()
def errors_of_pairs(network: Pi3X, images: Tensor, c2w: Tensor) -> dict[str, Tensor]:
    """Of each of B pairs (as in `Sets`): true `turn` in degrees and `shift` in units of the median depth, and their
    errors [B]."""
    _, _, nine, place, _ = network.branches(images)
    found = homogeneous(torch.cat([nearest_rotation(nine), place[..., None]], dim=-1)).view_as(c2w)
    (turn, shift), (true_turn, true_shift) = ([x[:, 0, 1] for x in seen_from_each(each)] for each in (found, c2w))
    return {"turn": degrees(true_turn), "error": degrees(true_turn.mT @ turn), "shift": true_shift.norm(dim=-1),
            "shift error": (shift - true_shift).norm(dim=-1)}


def plain_pairs(scenes: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Images and c2w of all pairs of each scene's pictures, as they are."""
    first, second = torch.combinations(torch.arange(VIEWS)).unbind(-1)
    rows = []
    for pictures, c2w, depth in zip(scenes["pictures"], scenes["c2w"], scenes["depth"]):
        views = torch.stack([first, second], dim=1)  # [15, 2]
        depths = depth[views].where(depth[views].isfinite(), torch.nan).flatten(1)
        rows.append((rearrange(pictures, "n h w c -> n c h w")[views] / 255,
                     scaled(c2w[views], 1 / depths.nanmedian(1).values)))
    return rows


def clip_pair(seed: int) -> tuple[Tensor, Tensor]:
    """Images and c2w of two frames of a clip, as geometry.py trains on them."""
    views = draw_views(seed, 2)
    return views.images, scaled(views.c2w, 1 / views.depth[views.depth.isfinite()].median()[None])


def evaluate(network: Pi3X, scenes: dict[str, Tensor], clips: range) -> dict[str, dict[str, float]]:
    """Mean errors over all pairs of held-out `scenes`, also by how far they are turned, and over those of `clips`
    (seeds), printed as a table."""
    drawn, filmed = ([errors_of_pairs(network, *pairs) for pairs in each]
                     for each in (plain_pairs(scenes), map(clip_pair, clips)))
    drawn, filmed = ({name: torch.cat([row[name] for row in rows]) for name in rows[0]} for rows in (drawn, filmed))
    rows = {"all": drawn} | {f"{low} to {high} degrees": {
        name: values[(drawn["turn"] >= low) & (drawn["turn"] < high)] for name, values in drawn.items()}
        for low, high in ((0, 5), (5, 10), (10, 20), (20, 30), (30, 60))} | {"two frames of a clip": filmed}
    table = {}
    print("| pairs | how many | turn | error | median error | shift | error |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        table[name] = {key: values.mean().item() for key, values in row.items()}
        table[name]["median error"] = row["error"].median().item() if len(row["error"]) else math.nan
        of = table[name]
        print(f"| {name} | {len(row['turn'])} | {of['turn']:.1f} | {of['error']:.1f} | {of['median error']:.1f} |"
              f" {of['shift']:.2f} | {of['shift error']:.2f} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("part", choices=("scenes", "train", "export", "evaluate"))
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"), help="scenes, state and log of the training")
    parser.add_argument("--weights", type=Path, default=Path("weights/mini/Pi3X/model.safetensors"),
                        help="where training begins, and what is exported and evaluated")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--decay", type=int, default=1500, help="steps at the end over which the learning rate falls")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    if args.part == "scenes":
        draw_scenes(args.folder / "scenes.safetensors", FIRST, SCENES)
        draw_scenes(args.folder / "held-out.safetensors", HELD_OUT, HELD_OUT_SCENES)
    elif args.part == "train":
        train(args.folder, args.weights, Recipe(args.steps, args.decay, args.lr, every=100, half=True))
    elif args.part == "export":
        export(args.folder / "cameras.safetensors", args.weights)
    else:
        evaluate(load_pi3x(args.weights), load_file(args.folder / "held-out.safetensors"),
                 range(HELD_OUT + 100, HELD_OUT + 200))


if __name__ == "__main__":
    main()
