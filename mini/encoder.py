"""The VAE's encoder, written instead of trained: its weights make it the linear codec.

Without its residual branches the encoder is linear up to its last norm: it takes patches of 2x2 pixels, and twice a
convolution halves the picture and another one then the time. A projection of 4x8x8-pixel blocks can be factored like
that. Each stage keeps what the next one needs, by the singular vectors of the codec's basis: of 4x4 pixels 22 numbers,
and 10 for how they change within two frames; of 8x8 pixels 36 and 27. That loses less than 1e-4 of what is encoded.

The last norm and SiLU are passed where both are straight lines: beside one channel that holds a large constant the norm
only divides by it, and of small numbers SiLU leaves one half.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from helios.vae import VAE, Downsample, Encoder
from mini.latents import Codec

STILL_4, MOVING_4 = 22, 10  # numbers of 4x4 pixels: of what stands still, of how it changes between two frames
STILL_8, MOVING_8 = 36, 27  # of 8x8 pixels; the last channel is the constant's
CONSTANT = 1000.0  # far above what the other channels hold
GAIN = 2.0**-4  # of the last norm
CERTAIN = -30.0  # log variance of a posterior without spread


def rows(functionals: Tensor, count: int) -> Tensor:
    """The `count` orthonormal rows [count, N] that best span linear functionals [..., N]."""
    return torch.linalg.svd(functionals.flatten(0, -2))[2][:count]


def halve(layer: Downsample, weight: Tensor) -> None:
    """Make the first outputs linear functionals [O, 4, I] of 2x2 neighbours."""
    kernel = rearrange(weight, "o (a b) i -> o i a b", a=2)
    layer.resample[1].get_parameter("weight")[: kernel.shape[0], : kernel.shape[1], :2, :2] = kernel


def halve_time(layer: Downsample, still: int, change: Tensor) -> None:
    """Make the first outputs means of two frames' inputs, and the next ones functionals [O, 2, I] of both. The very
    first frame passes by as if it stood still, so of a standing picture these must make nothing."""
    assert layer.time_conv is not None
    taps = layer.time_conv.weight[:, :, 1:, 0, 0]  # of these two frames; the one before them is not used
    taps[:still, :still] = torch.eye(still)[..., None] / 2
    taps[still : still + len(change), : change.shape[-1]] = rearrange(change, "o two i -> o i two")


def straighten(encoder: Encoder) -> None:
    """Leave identities: channels that go on as they are, past branches that add nothing."""
    for p in encoder.parameters():
        p.zero_()
    for layer in (encoder.conv_in, *(getattr(block, "conv_shortcut", None) for block in encoder.down_blocks)):
        if isinstance(layer, nn.Conv3d):
            inputs, middle = layer.in_channels, layer.kernel_size[-1] // 2
            layer.weight[:inputs, :, -1, middle, middle] = torch.eye(inputs)


@torch.no_grad()
def write_encoder(vae: VAE, codec: Codec) -> None:
    """Make the miniature's `vae` encode as `codec` does, in place."""
    encoder = vae.encoder
    straighten(encoder)
    to_4x4, to_8x8 = (layer for layer in encoder.down_blocks if isinstance(layer, Downsample))

    # A latent is a sum over four frames' pixels, named by the place of 4x4 pixels, in these of 2x2, and in these,
    # which the encoder sees as one, columns before rows.
    frames = rearrange(codec.basis, "(t q a i r b j c) f -> t f (q r) (a b c j i)", t=4, q=2, a=2, i=2, r=2, b=2, j=2)
    mean, change = frames[0::2] + frames[1::2], frames[1::2] - frames[0::2]  # of two frames each: [2, F, 4, 48]

    still, moving = rows(mean, STILL_4), rows(change, MOVING_4)
    halve(to_4x4, still.unflatten(1, (4, 12)))
    half = moving @ still.T / 2
    halve_time(to_4x4, STILL_4, torch.stack([-half, half], dim=1))

    mean, change = (mean @ still.T).flatten(2), (change @ moving.T).flatten(2)  # of what is left: [2, F, 4 * rows]
    level, growth = mean[0] + mean[1], (mean[1] - mean[0]) / 2
    still, moving = rows(torch.stack([level, growth]), STILL_8), rows(change, MOVING_8)
    halve(to_8x8, torch.cat([F.pad(still.unflatten(1, (4, STILL_4)), (0, MOVING_4)),
                             F.pad(moving.unflatten(1, (4, MOVING_4)), (STILL_4, 0))]))
    level, growth, change = level @ still.T, growth @ still.T, change @ moving.T
    motion = torch.stack([torch.cat([-growth, change[0]], dim=1), torch.cat([growth, change[1]], dim=1)], dim=1)
    both = rows(motion.flatten(1), MOVING_8)
    halve_time(to_8x8, STILL_8, both.unflatten(1, (2, -1)))

    encoder.mid_block.resnets[1].conv2.get_parameter("bias")[-1] = CONSTANT
    encoder.norm_out.gamma.fill_(GAIN)
    slope = GAIN * len(encoder.norm_out.gamma) ** 0.5 / CONSTANT / 2  # of norm and SiLU together
    latents = torch.cat([level, motion.flatten(1) @ both.T], dim=1) / codec.scale[:, None] / slope
    encoder.conv_out.weight[: latents.shape[0], : latents.shape[1], -1, 1, 1] = latents
    vae.quant_conv.weight[:, :, 0, 0, 0] = torch.eye(2 * len(latents))
    vae.quant_conv.get_parameter("bias")[:] = torch.tensor([0.0, CERTAIN]).repeat_interleave(len(latents))
