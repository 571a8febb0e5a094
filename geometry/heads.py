"""The heads of Pi3X (pi3x.py), fp32 in every model: maps of every pixel by convolutions, a camera from all patches.

Parameter names are the checkpoint's.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from files.checkpoint import Layers

GROUP = 32  # channels that are normalised together inside the residual blocks of the convolutional heads
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="replicate")


def append_view_plane(x: Tensor, aspect: float) -> Tensor:
    """Maps [F, C, h, w] -> [F, C + 2, h, w]: each pixel's centre (u, v) on a plane of diagonal 2 and of the picture's
    `aspect` = W / H comes last."""
    height, width = x.shape[-2:]
    end_u = aspect / math.hypot(aspect, 1) * (width - 1) / width
    end_v = 1 / math.hypot(aspect, 1) * (height - 1) / height
    u = torch.linspace(-end_u, end_u, width, device=x.device)
    v = torch.linspace(-end_v, end_v, height, device=x.device)
    return torch.cat([x, torch.stack(torch.meshgrid(u, v, indexing="xy")).expand(len(x), -1, -1, -1)], dim=1)


class ResidualConv(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        first, second = nn.GroupNorm(1, dim), nn.GroupNorm(2 * dim // GROUP, 2 * dim)
        self.layers = nn.Sequential(first, nn.ReLU(), conv3x3(dim, 2 * dim), second, nn.ReLU(), conv3x3(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ConvHead(nn.Module):
    """Patch features [F, C, H/14, W/14] -> maps [F, H, W, channels], those of all `outputs` side by side."""

    def __init__(self, dim: int, levels: tuple[tuple[int, int], ...], outputs: tuple[int, ...]):
        super().__init__()
        self.upsample_blocks = Layers[nn.ModuleList]()
        for width, blocks in levels:
            upsample = nn.Sequential(nn.ConvTranspose2d(dim + 2, width, 2, stride=2), conv3x3(width, width))
            self.upsample_blocks.append(nn.ModuleList([upsample, *(ResidualConv(width) for _ in range(blocks))]))
            dim = width
        self.output_block = nn.ModuleList(
            nn.Sequential(conv3x3(dim + 2, 32), nn.ReLU(), nn.Conv2d(32, channels, 1)) for channels in outputs
        )

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        for upsample, *blocks in self.upsample_blocks:
            x = upsample(append_view_plane(x, width / height))
            for block in blocks:
                x = block(x)
        x = F.interpolate(x, (height, width), mode="bilinear")  # 8 times the patch grid -> 14 times
        x = append_view_plane(x, width / height)
        return rearrange(torch.cat([block(x) for block in self.output_block], dim=1), "f c h w -> f h w c")


class CameraHead(nn.Module):
    """Patch tokens [F, P, C] -> nine raw numbers of the rotation [F, 9] and the translation [F, 3]."""

    def __init__(self, dim: int):
        super().__init__()
        self.res_conv = Layers[nn.ModuleDict](
            nn.ModuleDict({f"res_conv{index}": nn.Linear(dim, dim) for index in (1, 2, 3)}) for _ in range(2)
        )
        self.more_mlps = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_rot, self.fc_t = nn.Linear(dim, 9), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.res_conv:
            h = x
            for layer in block.values():
                h = F.relu(layer(h))
            x = x + h
        x = self.more_mlps(x.mean(dim=1))
        return self.fc_rot(x), self.fc_t(x)


def nearest_rotation(nine: Tensor) -> Tensor:
    """[..., 9], three rows -> the rotation [..., 3, 3] nearest to the matrix of the rows at unit length."""
    rows = F.normalize(nine.unflatten(-1, (3, 3)), dim=-1)
    u, _, vt = torch.linalg.svd(rows.mT)
    v, ut = vt.mT, u.mT
    handedness = torch.linalg.det(v @ ut)[..., None, None]  # -1 for a reflection
    return torch.cat([v[..., :2], v[..., 2:] * handedness], dim=-1) @ ut
