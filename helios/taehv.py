"""TAEHV, the tiny autoencoder for Wan 2.1 latents (`taew2_1`, MIT): much smaller than the VAE, a little softer.

It takes and gives normalised latents, has no posterior and so no noise: other latents than the VAE's, so a seed means
another video. Four frames are one latent; three copies of frame 0 go in front, and of a decoded video the first three
frames are dropped, which gives the VAE's 1 + 4k frames. Layers have the released names. The video passes frame by
frame, depth first, as in vae.py: a block that looks back keeps its last input, and nothing more.
"""

from collections.abc import Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files.checkpoint import Network, build_from, few
from helios.lora import read_tensors
from helios.vae import Cache, Frames, Layer, through, to_frame

FACTOR = 4  # frames a latent
NAMES = "taew2_1.safetensors", "taew2_1.pth"
CONVS = {"encoder": (0, 3, 8, 13, 17), "decoder": (1, 8, 14, 20)}  # whose outputs are the widths


def conv(dim_in: int, dim_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(dim_in, dim_out, 3, stride, padding=1, bias=bias)


class Squash(nn.Module):
    """Latents beyond 3 are pulled in."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block that also sees the frame before; before the first one lie zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Sequential(conv(2 * dim, dim), nn.ReLU(), conv(dim, dim), nn.ReLU(), conv(dim, dim))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        (before,) = cache.get(self, [torch.zeros_like(x)])
        cache[self] = [x]
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class TimePool(nn.Module):
    """`stride` frames become one."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim * stride, dim, 1, bias=False)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:  # -> [1 or 0, C, H, W]
        frames = [*cache.get(self, ()), x]
        whole = len(frames) == self.stride
        cache[self] = [] if whole else frames
        return self.conv(torch.cat(frames, dim=1)) if whole else x[:0]


class TimeGrow(nn.Module):
    """One frame becomes `stride`."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim, dim * stride, 1, bias=False)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return torch.cat(self.conv(x).chunk(self.stride, dim=1))


def make_encoder(widths: list[int], channels: int) -> nn.Sequential:
    first, *others = widths
    levels = [[TimePool(before, stride), conv(before, dim, 2, False), *(MemoryBlock(dim) for _ in range(3))]
              for (before, dim), stride in zip(pairwise([first, *others]), (2, 2, 1))]
    return nn.Sequential(conv(3, first), nn.ReLU(), *chain(*levels), conv(widths[-1], channels))


def make_decoder(widths: list[int], channels: int) -> nn.Sequential:
    levels = [[*(MemoryBlock(dim) for _ in range(3)), nn.Upsample(scale_factor=2), TimeGrow(dim, stride),
               conv(dim, after, bias=False)] for (dim, after), stride in zip(pairwise(widths), (1, 2, 2))]
    return nn.Sequential(Squash(), conv(channels, widths[0]), nn.ReLU(), *chain(*levels), nn.ReLU(),
                         conv(widths[-1], 3))


def with_cache(layer: nn.Module) -> Layer:
    """A layer as `through` calls it; most know of no cache."""
    looks_back = isinstance(layer, (MemoryBlock, TimePool, TimeGrow))

    def call(frames: Frames, cache: Cache) -> Frames:
        made = (layer(x, cache) if looks_back else layer(x) for x in frames)
        return [y[None] for each in made for y in each]

    return call


class TAEHV(Network):
    """Stands where a `VAE` does: videos [1, 3, 1 + 4k, H, W] in [-1, 1], latents [1, C, 1 + k, H/8, W/8]."""

    space_factor = 8

    def __init__(self, encoder: list[int], decoder: list[int], channels: int):
        """The widths of both halves from their first layer on, and the channels of a latent."""
        super().__init__()
        self.channels = channels
        self.encoder = make_encoder(encoder, channels)
        self.decoder = make_decoder(decoder, channels)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(latents, zeros): what would be the deviation plays no part, see `sample`. ValueError for a shape other than
        [1, 3, F, H, W] with H and W multiples of 8; frames after the last whole group of 4 are ignored."""
        shape = list(video.shape)
        if len(shape) != 5 or shape[:2] != [1, 3] or shape[2] < 1 or shape[3] % 8 or shape[4] % 8:
            raise ValueError(f"TAEHV.encode: video is {shape}, expected [1, 3, F, H, W], H and W multiples of 8")
        padded = torch.cat([video[:, :, :1].expand(-1, -1, FACTOR - 1, -1, -1), video], dim=2)
        frames = (to_frame(frame) / 2 + 0.5 for frame in padded.split(1, dim=2))
        latents = torch.stack(list(through(map(with_cache, self.encoder), frames, 1)), dim=2)
        return latents, torch.zeros_like(latents)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """As `decode`, but yields each frame [1, 3, 1, H, W] as soon as it is known."""
        shape = list(latents.shape)
        if len(shape) != 5 or shape[:2] != [1, self.channels] or shape[2] < 1:
            raise ValueError(f"TAEHV.decode: latents are {shape}, expected [1, {self.channels}, frames, height, width]")
        frames = through(map(with_cache, self.decoder), map(to_frame, latents.split(1, dim=2)), 1)
        for index, frame in enumerate(frames):
            if index >= FACTOR - 1:
                yield frame.clamp(0, 1)[:, :, None] * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> the whole video [1, 3, 1 + 4 (k-1), H, W]."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """There is no posterior: the latents themselves."""
        return mean

    def normalize(self, latents: Tensor) -> Tensor:
        """They are normalised already."""
        return latents

    denormalize = normalize


def load_taehv(path: Path, device: torch.device | str = "cpu") -> TAEHV:
    """From its one file, .safetensors or .pth of plain tensors, in fp32. Raises OSError if there is none, ValueError
    naming each tensor that does not fit."""
    tensors, _ = read_tensors(path)
    network = build_from(path, lambda: TAEHV(*read_widths(path, tensors)))
    wanted = network.state_dict()
    problems = [f"unexpected {key}" for key in tensors if key not in wanted]
    problems += [f"missing {key}" for key in wanted if key not in tensors]
    problems += [f"{key} has shape {list(tensors[key].shape)}, expected {list(wanted[key].shape)}"
                 for key in wanted if key in tensors and tensors[key].shape != wanted[key].shape]
    if problems:
        raise ValueError(f"{path}: not a TAEHV of Wan 2.1: {few(problems)}")
    network.load_state_dict({key: tensor.to(device, torch.float32, copy=True) for key, tensor in tensors.items()},
                            assign=True)
    return network.requires_grad_(False).eval()


def read_widths(path: Path, tensors: Mapping[str, Tensor]) -> tuple[list[int], list[int], int]:
    """What `TAEHV` is built from, by the shapes of its tensors; they are few thousand channels at most."""
    keys = {part: [f"{part}.{index}.weight" for index in places] for part, places in CONVS.items()}
    for key in chain(*keys.values()):
        if key not in tensors or tensors[key].ndim != 4 or not 1 <= tensors[key].shape[0] <= 4096:
            raise ValueError(f"{path}: no convolution {key}, expected a TAEHV of Wan 2.1 (taew2_1)")
    encoder, decoder = ([tensors[key].shape[0] for key in keys[part]] for part in ("encoder", "decoder"))
    return encoder[:-1], decoder, encoder[-1]


def find_taehv(weights: Path) -> Path:
    """The file in the weights' folder or beside it."""
    places = [folder / name for folder in (weights, weights.parent) for name in NAMES]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no {' or '.join(NAMES)} in {weights} or beside it, which vae=taehv needs")
    return found
