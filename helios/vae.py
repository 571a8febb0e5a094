"""Wan 2.1 causal video VAE: pixels <-> latents, 8x smaller in space and 4x in time (`vae/` of a checkpoint).

Frame 0 stands alone and every latent frame after it holds four pixel frames, so 1 + 4k frames <-> 1 + k latent
frames. Time convolutions only look back, so a video goes through depth first: frame 0 and then every pair of frames
passes all layers before the next one enters, and all that is kept is the last inputs of each time convolution. Memory
does not grow with the length and is less than the official groups of four frames take; no frame is padded or copied.
Reproduces diffusers' AutoencoderKLWan as Helios uses it, under the checkpoint's own parameter names.
Inside, a frame is a picture `[1, C, H, W]` in channels_last: per-frame layers are plain 2D layers and a 3D convolution
is a sum of 2D ones, much faster than conv3d on a CPU. Two sums take less arithmetic than the layers' definitions say:
three time taps at a pair of frames, and a convolution of an enlarged picture.
Left out: tiling, slicing, per-level attention and the residual variant of Wan 2.2; its patches of pixels are here.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from files.checkpoint import Layers, Network
from files.machine import send

Frames = list[Tensor]  # each [1, C, H, W]
Cache = dict[nn.Module, Frames]  # of one encode or decode: layer -> its last input frames
Layer = Callable[[Frames, Cache], Frames]  # one or two frames -> none to four


@dataclass(frozen=True)
class VAEConfig:
    """Keys of `vae/config.json`, spelt as there; the defaults are the released Wan 2.1 VAE."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # widths of the levels, in base_dim; space is halved between levels
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # between which levels time is halved too
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    patch_size: int | None = None  # the sides of squares of pixels that the layers see as one, as in Wan 2.2
    in_channels: int = 3  # of such a patch
    out_channels: int = 3
    attn_scales: tuple[float, ...] = ()  # this and what follows: only so that other variants are refused
    is_residual: bool = False
    decoder_base_dim: int | None = None

    def __post_init__(self):
        if not 1 <= len(self.dim_mult) <= 8:
            raise ValueError(f"dim_mult has {len(self.dim_mult)} levels, expected 1 to 8")
        for key in ("latents_mean", "latents_std"):
            if len(getattr(self, key)) != self.z_dim:
                raise ValueError(f"{key} has {len(getattr(self, key))} numbers, expected z_dim = {self.z_dim}")
        if min(self.latents_std) <= 0:
            raise ValueError(f"latents_std is {self.latents_std}, expected positive numbers")
        if self.patch < 1:
            raise ValueError(f"patch_size is {self.patch_size}, expected a positive number")
        for key in ("in_channels", "out_channels"):
            if getattr(self, key) != (inside := 3 * self.patch**2):
                raise ValueError(f"{key} is {getattr(self, key)}, expected {inside} (3 x patch_size squared)")
        for key in ("attn_scales", "is_residual", "decoder_base_dim"):
            if getattr(self, key):
                raise ValueError(f"{key} is {getattr(self, key)}, expected none (Wan 2.1, not 2.2)")

    @property
    def patch(self) -> int:
        return self.patch_size or 1


class TimeConv(nn.Conv3d):
    """Causal 3D convolution: the output at frame t sees frame t and the two before it."""

    def __init__(self, dim_in: int, dim_out: int, size: int):
        super().__init__(dim_in, dim_out, (3, size, size), padding=(0, size // 2, size // 2))

    def forward(self, frames: Frames, cache: Cache) -> Frames:
        seen = [*cache.get(self, ()), *frames]
        cache[self] = seen[-2:]
        if len(seen) == 4:
            return self.pair(*seen)
        return [self.combine(seen[:end]) for end in range(len(seen) - len(frames) + 1, len(seen) + 1)]

    def flat(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.padding[1:])

    def combine(self, frames: Frames) -> Tensor:
        """The output at the last of these frames, at most three; before the first one lie zeros."""
        *earlier, last = self.weight.unbind(2)[-len(frames) :]
        y = self.flat(frames[-1], last, self.bias)
        for frame, tap in zip(frames, earlier):
            y += self.flat(frame, tap)
        return y

    def pair(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Frames:
        """The outputs at c and d, by four 2D convolutions instead of six (Winograd's F(2, 3))."""
        first, middle, last = self.weight.unbind(2)
        total = self.flat(b + c, (first + middle + last) / 2, self.bias)
        change = self.flat(c - b, (first - middle + last) / 2)
        at_c = self.flat(a - c, first).add_(total).add_(change)
        at_d = total.sub_(change).add_(self.flat(d - b, last))
        return [at_c, at_d]


class PointConv(nn.Conv3d):
    """1x1x1 convolution: a linear map of each pixel's channels."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, 0], self.bias)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over a pixel's channels."""

    def __init__(self, dim: int, trailing: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * trailing))  # the checkpoint has 3 or 2 trailing ones

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1).mul_(self.gamma.view(-1, 1, 1) * x.shape[1] ** 0.5)


def activate(norm: RMSNorm, frames: Frames) -> Frames:
    return [F.silu(norm(x), inplace=True) for x in frames]


class ResidualBlock(nn.Module):
    idle = False  # whether its branch adds nothing but a constant, see `VAE.find_idle`

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm1 = RMSNorm(dim_in, 3)
        self.conv1 = TimeConv(dim_in, dim_out, 3)
        self.norm2 = RMSNorm(dim_out, 3)
        self.conv2 = TimeConv(dim_out, dim_out, 3)
        self.conv_shortcut = PointConv(dim_in, dim_out) if dim_in != dim_out else nn.Identity()

    def forward(self, frames: Frames, cache: Cache) -> Frames:
        if self.idle:
            return [self.conv_shortcut(x) + self.conv2.get_parameter("bias")[:, None, None] for x in frames]
        h = activate(self.norm2, self.conv1(activate(self.norm1, frames), cache))
        return [y.add_(self.conv_shortcut(x)) for x, y in zip(frames, self.conv2(h, cache))]


class Attention(nn.Module):
    """Each frame's pixels attend to each other, in one head."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "t (three c) h w -> three t 1 (h w) c", three=3)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(rearrange(y, "t 1 (h w) c -> t c h w", h=x.shape[2]))


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = Layers[ResidualBlock]([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = Layers[Attention]([Attention(dim)])

    def forward(self, frames: Frames, cache: Cache) -> Frames:
        frames = list(map(self.attentions[0], self.resnets[0](frames, cache)))
        return self.resnets[1](frames, cache)


class Downsample(nn.Module):
    """Halves space, and with `time` also time: frame 0 stays, then two frames become one."""

    def __init__(self, dim: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = TimeConv(dim, dim, 1) if time else None  # with a stride of 2

    def forward(self, frames: Frames, cache: Cache) -> Frames:
        frames = [self.resample(x) for x in frames]
        if self.time_conv is None:
            return frames
        seen = [*cache.get(self, ()), *frames]
        cache[self] = seen[-1:]
        if len(seen) == 3:
            return [self.time_conv.combine(seen)]
        return frames if len(seen) == 1 else []  # frame 0 passes by, but is seen by the next; a last one alone goes


class EnlargingConv(nn.Conv2d):
    """A 3x3 convolution of a picture enlarged to twice its size by nearest neighbours. As these are copies, each of its
    pixels sees 2x2 different ones: it is a transposed convolution of the small picture, with 4/9 of the work."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.avg_pool2d(self.weight.flip(2, 3), 2, 1, padding=1, divisor_override=1)  # sums of 2x2: [C', C, 4, 4]
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class Upsample(nn.Module):
    """Doubles space and halves the channels; with `time` first doubles time: frame 0 stays, then one becomes two."""

    def __init__(self, dim: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), EnlargingConv(dim, dim // 2))  # numbered as in the checkpoint
        self.time_conv = TimeConv(dim, 2 * dim, 1) if time else None

    def forward(self, frames: Frames, cache: Cache) -> Frames:
        if self.time_conv is None:
            return [self.resample(x) for x in frames]
        if self.time_conv not in cache:  # frame 0 passes by; kept for parity: the next frames see zeros in its place
            cache[self.time_conv] = []
            return [self.resample(x) for x in frames]
        doubled = [half for x in self.time_conv(frames, cache) for half in x.chunk(2, dim=1)]
        return [self.resample(x.contiguous(memory_format=torch.channels_last)) for x in doubled]


def grouped(frames: Iterable[Tensor], together: int) -> Iterator[Frames]:
    """The first frame, and then so many at a time."""
    frames = iter(frames)
    group = list(islice(frames, 1))
    while group:
        yield [group.pop(0) for _ in range(len(group))]  # nothing is held here while the layers behind are at work
        group = list(islice(frames, together))


def through(layers: Iterable[Layer], frames: Iterable[Tensor], together: int = 2) -> Iterator[Tensor]:
    """Frames `[1, C, H, W]` through all layers, the first one and then so many `together`; what comes out, one by one,
    as soon as it is known."""
    cache: Cache = {}

    def step(layer: Layer, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        for made in map(lambda group: layer(group, cache), grouped(frames, together)):
            while made:
                yield made.pop(0)  # as above

    for layer in layers:
        frames = step(layer, frames)
    return iter(frames)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        self.conv_in = TimeConv(config.in_channels, dims[0], 3)
        self.down_blocks = Layers["ResidualBlock | Downsample"]()  # flat, as in the checkpoint
        for level, (dim_in, dim) in enumerate(pairwise(dims)):
            for block in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(dim_in if block == 0 else dim, dim))
            if level < len(config.temperal_downsample):
                self.down_blocks.append(Downsample(dim, config.temperal_downsample[level]))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = TimeConv(dims[-1], 2 * config.z_dim, 3)

    def forward(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:  # in patches -> [1, 2 * z_dim, H/8, W/8]
        return through((self.conv_in, *self.down_blocks, self.mid_block, self.head), frames)

    def head(self, frames: Frames, cache: Cache) -> Frames:
        return self.conv_out(activate(self.norm_out, frames), cache)


class DecoderLevel(nn.Module):
    """Only a name in the checkpoint: iterate for its layers."""

    def __init__(self, dim_in: int, dim: int, blocks: int, upsampler: Upsample | None):
        super().__init__()
        self.resnets = Layers[ResidualBlock](ResidualBlock(dim if block else dim_in, dim) for block in range(blocks))
        self.upsamplers = Layers[Upsample]([upsampler] if upsampler else [])

    def __iter__(self) -> Iterator[nn.Module]:
        return chain(self.resnets, self.upsamplers)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in reversed(config.dim_mult)]
        doubles_time = config.temperal_downsample[::-1]
        self.conv_in = TimeConv(config.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = Layers[DecoderLevel]()
        dim_in = dims[0]
        for level, dim in enumerate(dims):
            upsampler = Upsample(dim, doubles_time[level]) if level < len(doubles_time) else None
            self.up_blocks.append(DecoderLevel(dim_in, dim, config.num_res_blocks + 1, upsampler))
            dim_in = dim // 2  # the upsampler halves it
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = TimeConv(dims[-1], config.out_channels, 3)

    def forward(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:  # [1, z_dim, h, w] -> in patches
        return through((self.conv_in, self.mid_block, *chain(*self.up_blocks), self.head), latents)

    def head(self, frames: Frames, cache: Cache) -> Frames:
        return self.conv_out(activate(self.norm_out, frames), cache)


class VAE(Network):
    """The whole VAE. Gradients are recorded as usual: call it under `torch.inference_mode()` to only run it.

    Videos are `[1, 3, F, H, W]` in [-1, 1], raw latents `[1, z_dim, 1 + (F-1)//4, H/8, W/8]`, both in the dtype and on
    the device of the weights. The transformer works on `normalize`d latents.
    """

    Config = VAEConfig

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.channels = config.z_dim
        self.space_factor = config.patch * 2 ** (len(config.dim_mult) - 1)  # 8
        self.encoder = Encoder(config)
        self.quant_conv = PointConv(2 * config.z_dim, 2 * config.z_dim)
        self.post_quant_conv = PointConv(config.z_dim, config.z_dim)
        self.decoder = Decoder(config)

    def find_idle(self) -> "VAE":
        """Pass residual branches by whose last weights are zeros, with the same result: all of the miniature's encoder
        are, 7/8 of its work. For weights that are loaded and stay."""
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                block.idle = not block.conv2.weight.any()
        return self

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video -> (mean, logvar) of the raw latents; the mode of the posterior is its mean.

        Frames after the last whole group of 4 are ignored, as officially. ValueError for a shape other than
        [1, 3, F, H, W] with H and W multiples of 8.
        """
        space, shape = self.space_factor, list(video.shape)
        if len(shape) != 5 or shape[:2] != [1, 3] or shape[2] < 1 or shape[3] % space or shape[4] % space:
            raise ValueError(f"VAE.encode: video is {shape}, expected [1, 3, F, H, W], H and W multiples of {space}")
        frames = (to_patches(to_frame(frame), self.config.patch) for frame in video.split(1, dim=2))
        moments = [self.quant_conv(x) for x in self.encoder(frames)]
        mean, logvar = torch.stack(moments, dim=2).chunk(2, dim=1)
        return mean, logvar

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """As `decode`, but yields each frame [1, 3, 1, H, W] as soon as it is known."""
        z_dim, shape = self.config.z_dim, list(latents.shape)
        if len(shape) != 5 or shape[:2] != [1, z_dim] or shape[2] < 1:
            raise ValueError(f"VAE.decode: latents are {shape}, expected [1, {z_dim}, frames, height, width]")
        for frame in self.decoder(self.post_quant_conv(to_frame(latent)) for latent in latents.split(1, dim=2)):
            yield from_patches(frame.clamp(-1, 1), self.config.patch)[:, :, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents -> the whole video [1, 3, 1 + 4 (k-1), H, W]. ValueError if not [1, z_dim, k, h, w]."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior, given standard normal noise of the mean's shape."""
        return mean + torch.exp(logvar.clamp(-30, 20) / 2) * noise

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw latents -> about zero mean and unit deviation per channel, as the transformer wants them."""
        mean, scale = self._statistics()
        return (latents - mean) * scale

    def denormalize(self, latents: Tensor) -> Tensor:
        """The transformer's latents -> raw latents, as `decode` wants them."""
        mean, scale = self._statistics()
        return latents / scale + mean  # kept for parity: over the rounded inverse, not times the deviation

    def _statistics(self) -> tuple[Tensor, Tensor]:  # mean and 1 / deviation, in the dtype of the weights
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (self.config.latents_mean, self.config.latents_std))
        weight = self.quant_conv.weight
        return send(mean.to(weight.dtype), weight.device), send((1 / std).to(weight.dtype), weight.device)


def to_frame(video: Tensor) -> Tensor:
    """[1, C, 1, H, W] -> [1, C, H, W]"""
    return video[:, :, 0].contiguous(memory_format=torch.channels_last)


def to_patches(x: Tensor, side: int) -> Tensor:
    """Each patch of pixels as one: [N, C, side h, side w] -> [N, C side side, h, w], columns before rows."""
    x = rearrange(x, "n c (h a) (w b) -> n (c b a) h w", a=side, b=side)
    return x.contiguous(memory_format=torch.channels_last)


def from_patches(x: Tensor, side: int) -> Tensor:
    """The other way: [N, C side side, h, w] -> [N, C, side h, side w]."""
    return rearrange(x, "n (c b a) h w -> n c (h a) (w b)", a=side, b=side)
