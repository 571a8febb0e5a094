"""The VAE's decoder on whole batches of clips at once, for training it: vae.py's layers with all frames in a batch.

vae.py takes frames one by one, so that memory stays small; here the same layers see all frames of all clips as one
stack of pictures [B * T, C, H, W] in channels_last, which is several times as fast. Results are equal but for rounding.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from helios.vae import VAE, MidBlock, ResidualBlock, TimeConv, Upsample, from_patches

torch._dynamo.config.recompile_limit = 64  # one for each width and memory layout


@torch.compile(dynamic=True)
def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of a VAE's RMSNorm, over the channels of [N, C, H, W]."""
    square = x.float().square().sum(1, keepdim=True)
    return F.silu(x * torch.rsqrt(square / x.shape[1] + 1e-12) * gamma.flatten()[:, None, None]).to(x.dtype)


def time_conv(layer: TimeConv, x: Tensor, frames: int) -> Tensor:
    """A causal convolution of clips of `frames` frames: one of pictures that hold their predecessors too."""
    taps, last = layer.kernel_size[0], x.movedim(1, -1).unflatten(0, (-1, frames))  # no copy: x is channels_last
    padded = F.pad(last, (0, 0, 0, 0, 0, 0, taps - 1, 0))
    stacked = torch.cat([padded[:, tap : tap + frames] for tap in range(taps)], dim=-1).flatten(0, 1).movedim(-1, 1)
    weight = rearrange(layer.weight, "o i t h w -> o (t i) h w")
    return F.conv2d(stacked, weight, layer.bias, padding=layer.padding[1:])


def residual(block: ResidualBlock, x: Tensor, frames: int) -> Tensor:
    h = time_conv(block.conv1, norm_silu(x, block.norm1.gamma), frames)
    h = time_conv(block.conv2, norm_silu(h, block.norm2.gamma), frames)
    return h + (x if isinstance(block.conv_shortcut, nn.Identity) else block.conv_shortcut(x))


def middle(block: MidBlock, x: Tensor, frames: int) -> Tensor:
    x = block.attentions[0](residual(block.resnets[0], x, frames))
    return residual(block.resnets[1], x.contiguous(memory_format=torch.channels_last), frames)


def upsample(layer: Upsample, x: Tensor, frames: int) -> tuple[Tensor, int]:
    if layer.time_conv is not None and frames > 1:
        clips = x.movedim(1, -1).unflatten(0, (-1, frames))  # [B, T, H, W, C]
        later = time_conv(layer.time_conv, clips[:, 1:].flatten(0, 1).movedim(-1, 1), frames - 1)
        doubled = rearrange(later, "(b t) (two c) h w -> b (t two) h w c", t=frames - 1, two=2)
        x, frames = torch.cat([clips[:, :1], doubled], dim=1).flatten(0, 1).movedim(-1, 1), 2 * frames - 1
    return layer.resample(x), frames


def decode(vae: VAE, latents: Tensor) -> Tensor:
    """Raw latents [B, z, k, h, w] -> videos [B, 3, 1 + 4 (k-1), H, W], not clamped: that would have no gradient."""
    batch, frames, decoder = len(latents), latents.shape[2], vae.decoder
    pictures = rearrange(latents, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
    x = vae.post_quant_conv(pictures)
    x = time_conv(decoder.conv_in, x, frames)
    x = middle(decoder.mid_block, x, frames)
    for level in decoder.up_blocks:
        for block in level.resnets:
            x = residual(block, x, frames)
        for layer in level.upsamplers:
            x, frames = upsample(layer, x, frames)
    x = time_conv(decoder.conv_out, norm_silu(x, decoder.norm_out.gamma), frames)
    return rearrange(from_patches(x, vae.config.patch), "(b t) c h w -> b c t h w", b=batch)
