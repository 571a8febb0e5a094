"""A linear codec with the VAE's shapes, and the miniature's clips as its latents on disk.

The transformer is pretrained in a latent space that is fixed beforehand: principal components of 4x8x8-pixel blocks, 32
of them, in the layout of the VAE (1 + 4k frames, the first one alone, as if it stood still for four). The VAE's encoder
is this codec (mini/encoder.py); its decoder is trained beside the transformer instead of before it. The covariance is
averaged over mirror images and permutations of the colour channels, so that both are exact linear maps of the latents:
augmentation without decoding. Half-whitened: channel deviations are the square roots of the components'.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from geometry.camera import WINDOW
from mini.leaves import make_leaves
from mini.world import make_clip

CHANNELS = 32
LEAVES = 0.05  # share of dead leaves in what the components are fitted to
CHUNKS, FRAMES = 3, 3 * WINDOW
SIZE = 128, 192
PART = 50  # clips in a file


def to_blocks(frames: Tensor) -> Tensor:
    """[..., 1 + 4k, H, W, 3] uint8 -> [..., 1 + k, H/8, W/8, 768] in [-1, 1]; the first frame counts as four."""
    video = frames.float() / 127.5 - 1
    video = torch.cat([video[..., :1, :, :, :].expand(*video.shape[:-4], 3, *video.shape[-3:]), video], dim=-4)
    return rearrange(video, "... (t pt) (h ph) (w pw) c -> ... t h w (pt ph pw c)", pt=4, ph=8, pw=8)


def symmetries() -> list[tuple[bool, tuple[int, ...]]]:
    """Mirrored or not, with every order of the colour channels; the identity first."""
    return [(flip, order) for flip in (False, True) for order in itertools.permutations(range(3))]


def permute(blocks: Tensor, flip: bool, order: tuple[int, ...]) -> Tensor:
    """A symmetry of block vectors [..., 768]."""
    shaped = blocks.unflatten(-1, (4, 8, 8, 3))[..., list(order)]
    return (shaped.flip(-2) if flip else shaped).flatten(-4)


@dataclass(frozen=True)
class Codec:
    basis: Tensor  # [768, C] orthonormal
    scale: Tensor  # [C] of the latents: basis' projections over this
    maps: Tensor  # [12, C, C] what each symmetry does to a latent vector

    def encode(self, frames: Tensor) -> Tensor:
        """[..., 1 + 4k, H, W, 3] uint8 -> [..., C, 1 + k, H/8, W/8]."""
        return rearrange(to_blocks(frames) @ self.basis / self.scale, "... t h w c -> ... c t h w")

    def decode(self, latents: Tensor) -> Tensor:
        """[..., C, 1 + k, h, w] -> frames [..., 1 + 4k, 8h, 8w, 3] in [-1, 1]."""
        blocks = (rearrange(latents, "... c t h w -> ... t h w c") * self.scale) @ self.basis.T
        video = rearrange(blocks, "... t h w (pt ph pw c) -> ... (t pt) (h ph) (w pw) c", pt=4, ph=8, pw=8, c=3)
        return video[..., 3:, :, :, :].clamp(-1, 1)

    def transform(self, latents: Tensor, which: int) -> Tensor:
        """Latents [..., C, T, h, w] of the clip after a symmetry."""
        turned = torch.einsum("oc,...cthw->...othw", self.maps[which], latents)
        return turned.flip(-1) if symmetries()[which][0] else turned


def fit_codec(seeds: range) -> Codec:
    covariance = torch.zeros(768, 768, dtype=torch.float64)
    for seed in seeds:
        for share, frames in ((1 - LEAVES, make_clip(seed, WINDOW, SIZE).frames),
                              (LEAVES, make_leaves(seed, WINDOW, SIZE))):
            blocks = to_blocks(frames).flatten(0, -2).double()
            covariance += share * (blocks.T @ blocks) / len(blocks) / len(seeds)
    eye, average = torch.eye(768, dtype=torch.float64), torch.zeros_like(covariance)
    for symmetry in symmetries():
        turn = permute(eye, *symmetry)
        average += turn.T @ covariance @ turn / len(symmetries())
    values, vectors = (each.flip(-1) for each in torch.linalg.eigh(average))
    kept, start = [], 0
    while len(kept) < CHANNELS:  # the strongest; of equal ones all or none, as only together they map to themselves
        equal = range(start, start + int((values[start:] > 0.999 * values[start]).sum()))
        kept += equal if len(kept) + len(equal) <= CHANNELS else []
        start = equal.stop
    values, basis = values[kept], vectors[:, kept]
    scale = values**0.25
    scale = scale * (values / scale**2).mean().sqrt()  # latents then have a mean square of 1
    maps = []
    for symmetry in symmetries():
        inside = basis.T @ permute(basis.T, *symmetry).T  # projections of the turned blocks
        maps.append(inside * scale[None] / scale[:, None])
    return Codec(basis.float(), scale.float(), torch.stack(maps).float())


def save_codec(codec: Codec, path: Path) -> None:
    save_file({"basis": codec.basis.contiguous(), "scale": codec.scale, "maps": codec.maps.contiguous()}, path)


def load_codec(path: Path) -> Codec:
    return Codec(**load_file(path))


def encode_clip(codec: Codec, seed: int) -> tuple[Tensor, str]:
    """Latents [2, 3, C, 9, h, w] of three chunks, each encoded by itself as in a rollout, forward and backward in
    time, and the clip's caption. Every fourth clip is of dead leaves, of which nothing is said: what moves is to be
    copied, whatever it is."""
    if seed % 4 == 3:
        frames, words = make_leaves(seed, FRAMES, SIZE), ""
    else:
        clip = make_clip(seed, FRAMES, SIZE)
        frames, words = clip.frames, clip.caption
    both = torch.stack([frames, frames.flip(0)])
    return codec.encode(rearrange(both, "d (k t) h w c -> d k t h w c", k=CHUNKS)), words


def make_parts(codec: Codec, folder: Path, parts: range) -> None:
    """Write clips as files of `PART`; seeds count from 0. What exists is kept, so this goes on where it stopped."""
    for part in parts:
        path = folder / f"clips_{part:04d}.npy"
        if path.is_file():
            continue
        latents, captions = zip(*(encode_clip(codec, seed) for seed in range(part * PART, (part + 1) * PART)))
        path.with_suffix(".json").write_text(json.dumps(captions))
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, torch.stack(latents).half().numpy())
        temporary.rename(path)
        print(path, flush=True)


def load_parts(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    """All clips [2, 3, C, 9, h, w] float16, memory-mapped, and their captions."""
    clips, captions = [], []
    for path in sorted(folder.glob("clips_????.npy")):
        clips += list(np.load(path, mmap_mode="r"))
        captions += json.loads(path.with_suffix(".json").read_text())
    return clips, captions
