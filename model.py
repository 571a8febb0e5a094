"""The Helios video DiT, and low-rank adapters (LoRA) beside its weights.

Helios (arXiv 2603.04379; diffusers' `HeliosTransformer3DModel`) denoises a chunk of 9 latent frames while attending to
history tokens: a short band at full detail and a mid and a long band that are patchified more coarsely. Warp-as-History
adds no layer to it. It only decides which latents enter which band, which time indices their rotary embedding gets,
and which of their tokens are dropped (`Band`, `History`; the decisions are made in wah.py).

`Helios.context` and `Helios.text` prepare all that does not depend on the noisy latents, once per pyramid stage and
prompt; `Helios.forward` is then one denoising step. History and target tokens travel as two segments, since each has
its own modulation (history is always "at t = 0"). Module names are the checkpoint's names, so no key map exists. For
training, `checkpointing` keeps of a block its inputs alone, and with `keep_attention` also what its attention gave
(small, and most of a block's time), and runs the rest again in the backward pass. Left out: options that no released
recipe uses (key boosts, learned rotary offsets, a replacement for dropped tokens).
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from files.checkpoint import Layers, Network, few
from helios.lora import Lora


@dataclass(frozen=True)
class HeliosConfig:
    """The keys of transformer/config.json that matter; the defaults are the released 14B model."""

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    num_layers: int = 40
    ffn_dim: int = 13824
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256  # width of the timestep's sinusoid
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_dim: tuple[int, int, int] = (44, 42, 42)  # shares of time, row and column in the head dimension
    rope_theta: float = 10000.0
    eps: float = 1e-6
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    guidance_cross_attn: bool = True  # history tokens skip the text
    zero_history_timestep: bool = True  # history tokens are modulated as clean (t = 0)
    has_multi_term_memory_patch: bool = True
    is_amplify_history: bool = False
    history_scale_mode: str = "per_head"
    added_kv_proj_dim: int | None = None

    def __post_init__(self):
        fixed = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "has_multi_term_memory_patch": True,
                 "added_kv_proj_dim": None, "patch_size": (1, 2, 2)}
        for key, value in fixed.items():
            if getattr(self, key) != value:
                raise ValueError(f"{key} is {getattr(self, key)!r}, supported is only {value!r}")
        if self.history_scale_mode not in ("per_head", "scalar"):
            raise ValueError(f"history_scale_mode is {self.history_scale_mode!r}, expected per_head or scalar")
        if self.freq_dim < 2 or self.rope_theta <= 0 or self.eps <= 0:
            raise ValueError(f"freq_dim is {self.freq_dim}, rope_theta {self.rope_theta}, eps {self.eps}, expected"
                             " at least 2 and positive numbers")
        head, rope = self.attention_head_dim, self.rope_dim
        if len(rope) != 3 or sum(rope) != head or any(width % 2 for width in rope):
            raise ValueError(f"rope_dim is {rope}, expected three even numbers that sum to {head}")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class Band:
    """History frames of one patch size, always at full latent resolution, also in the low pyramid stages."""

    latents: Tensor  # [B, C, T, H, W]
    indices: Tensor  # [T] integer time indices of the rotary embedding
    visible: Tensor | None = None  # [1, 1, T, H, W] in 0..1; tokens below the threshold are dropped; None keeps all


@dataclass(frozen=True)
class History:
    """All that a denoising call attends to besides the target and the text."""

    short: Band | None = None
    mid: Band | None = None  # mid and long need short: their rotary table is pooled from its token grid
    long: Band | None = None
    indices: Tensor | None = None  # [T] time indices of the target latents; None counts from 0
    threshold: float = 0.5  # least visible share of a kept token


@dataclass(frozen=True)
class Context:
    """A History made ready for a stage: embedded tokens and rotary factors of [history, target]."""

    tokens: Tensor  # [B, N_history, D], in the order long, mid, short
    rope: Tensor  # [N_history + N_target, 1, head_dim / 2] complex


def pad_to_multiple(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Replicate the last frame, row and column of [B, C, T, H, W] until the sizes are multiples of `kernel`."""
    t, h, w = (-size % k for size, k in zip(x.shape[-3:], kernel))
    return F.pad(x, (0, w, 0, h, 0, t), mode="replicate") if t or h or w else x


def pool(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Mean over blocks of `kernel` in [B, C, T, H, W], padded at the ends."""
    return F.avg_pool3d(pad_to_multiple(x, kernel), kernel)


def patches(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """[B, C, T, H, W] -> [B, tokens, C * kernel], row-major; rows and columns that fill no patch are cut off."""
    t, h, w = (size // k * k for size, k in zip(x.shape[-3:], kernel))
    return rearrange(x[..., :t, :h, :w], "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)",
                     pt=kernel[0], ph=kernel[1], pw=kernel[2])


def embed(tokens: Tensor, conv: nn.Conv3d) -> Tensor:
    """A convolution whose stride is its kernel, as the matrix product that it is: [B, N, C * kernel] -> [B, N, D]."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


def rope_table(indices: Tensor, height: int, width: int, config: HeliosConfig) -> Tensor:
    """Unit rotations exp(i * angle) of a token grid in fp32: complex [T, height, width, head_dim / 2]."""
    device = indices.device
    grid = (len(indices), height, width)
    positions = indices.float(), *(torch.arange(size, device=device).float() for size in (height, width))
    angles = []
    for axis, (position, size) in enumerate(zip(positions, config.rope_dim)):
        frequency = config.rope_theta ** (-torch.arange(0, size, 2, device=device).float() / size)
        shape = [1, 1, 1, size // 2]
        shape[axis] = grid[axis]
        angles.append(torch.outer(position, frequency).view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle)


def pooled_rope(table: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Kept for checkpoint compatibility: a coarse token's rotation is the mean of its cells' cosines and sines, which
    is shorter than 1."""
    parts = rearrange(torch.view_as_real(table), "t h w d two -> 1 (d two) t h w")
    pooled = rearrange(pool(parts, kernel), "1 (d two) t h w -> t h w d two", two=2)
    return torch.view_as_complex(pooled.contiguous())


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs of [B, N, heads, head_dim] by [N, 1, head_dim / 2] complex, in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).type_as(x)


class Linear(nn.Linear):
    """A linear layer that can carry a low-rank update beside its weight, which itself is never touched.

    The official code merges W + BA and unmerges it again in every chunk, so that its weights drift by rounding.
    """

    adapter: tuple[Tensor, Tensor, float] | None = None  # A [r, in], B [out, r], alpha / r
    scale: Tensor | None  # [out] of a weight in float8 (`checkpoint.quantize`)
    in_float8 = False  # whether the card multiplies float8: then x is rounded too, row by row, but not in training

    def __init__(self, into: int, out: int):
        super().__init__(into, out)
        self.register_buffer("scale", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            y = super().forward(x)
        elif self.in_float8 and not self.training:
            y = self.multiply(x, self.scale)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale + self.bias
        if self.adapter is None:
            return y
        down, up, scale = self.adapter
        return y + F.linear(F.linear(x.to(down.dtype), down) * scale, up).to(y.dtype)

    def multiply(self, x: Tensor, scale: Tensor) -> Tensor:
        """float8 times float8, with a scale for each row of both."""
        largest = torch.finfo(self.weight.dtype).max
        size = (x.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(x.dtype).tiny)
        rows = (x / size).clamp(-largest, largest).to(self.weight.dtype).flatten(0, -2)
        y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            rows, self.weight.T, scale_a=size.flatten(0, -2).float(), scale_b=scale.float()[None], bias=self.bias,
            out_dtype=x.dtype)
        return y.unflatten(0, x.shape[:-1])


class Attention(nn.Module):
    def __init__(self, config: HeliosConfig, amplify: bool = False):
        super().__init__()
        dim = config.dim
        self.heads = config.num_attention_heads
        self.kernel = F.scaled_dot_product_attention  # of [B, heads, N, head_dim]; parallel.py has another
        self.to_q, self.to_k, self.to_v = Linear(dim, dim), Linear(dim, dim), Linear(dim, dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, config.eps), nn.RMSNorm(dim, config.eps)
        if amplify:
            count = self.heads if config.history_scale_mode == "per_head" else 1
            self.history_key_scale = nn.Parameter(torch.empty(count))
        self.amplify = amplify

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # [B, N, heads, head_dim]

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.to_k(x))), self.split(self.to_v(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.to_out[0](out.transpose(1, 2).flatten(-2))

    def over_tokens(self, history: Tensor, target: Tensor, rope: Tensor, targets_only: bool) -> Tensor:
        """Joint self-attention of both segments, in both directions; results for the target alone if asked."""
        x, count = torch.cat([history, target], dim=1), history.shape[1]
        k, v = self.keys_values(x)
        k = rotate(k, rope)
        if self.amplify and count:
            scale = 1 + 9 * self.history_key_scale.sigmoid()
            k = torch.cat([(k[:, :count] * scale[:, None]).type_as(k), k[:, count:]], dim=1)
        q = self.split(self.norm_q(self.to_q(target if targets_only else x)))
        return self.attend(rotate(q, rope[count:] if targets_only else rope), k, v)

    def over_text(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        return self.attend(self.split(self.norm_q(self.to_q(x))), *text)


class GELU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(GELU(dim, hidden), nn.Identity(), Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights in fp32, then an affine map that is one for the whole segment ([B, 1, D])."""
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale).type_as(x)


def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return (x + update * gate).type_as(x)  # the gate is fp32, and so is the sum


class Block(nn.Module):
    def __init__(self, config: HeliosConfig):
        super().__init__()
        self.eps, self.text_for_history = config.eps, not config.guidance_cross_attn
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.dim))
        self.attn1 = Attention(config, amplify=config.is_amplify_history)
        self.attn2 = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)

    def read_text(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        norm = F.layer_norm(x.float(), x.shape[-1:], self.norm2.weight, self.norm2.bias, self.eps)
        return x + self.attn2.over_text(norm.type_as(x), text)

    def feed(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return add_gated(x, self.ffn(modulate(x, shift, scale, self.eps)), gate)

    def forward(self, history: Tensor, target: Tensor, history_time: Tensor, target_time: Tensor,
                text: tuple[Tensor, Tensor], rope: Tensor, targets_only: bool) -> tuple[Tensor, Tensor]:
        """history [B, N_h, D], target [B, N, D], *_time [B, 6, D] (see `Helios.time`); nothing reads the history after
        the last block, so with `targets_only` it comes back as it was."""
        shift1h, scale1h, gate1h, shift2h, scale2h, gate2h = (self.scale_shift_table + history_time).split(1, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + target_time).split(1, dim=1)
        update = self.attn1.over_tokens(modulate(history, shift1h, scale1h, self.eps),
                                        modulate(target, shift1, scale1, self.eps), rope, targets_only)
        target = add_gated(target, update[:, -target.shape[1]:], gate1)
        target = self.feed(self.read_text(target, text), shift2, scale2, gate2)
        if history.shape[1] and not targets_only:
            history = add_gated(history, update[:, :history.shape[1]], gate1h)
            if self.text_for_history:
                history = self.read_text(history, text)
            history = self.feed(history, shift2h, scale2h, gate2h)
        return history, target


class TwoLayers(nn.Module):
    """This and the next two are only names in the checkpoint: `Helios` calls their layers."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, dim), nn.Linear(dim, dim)


class ConditionEmbedder(nn.Module):
    def __init__(self, config: HeliosConfig):
        super().__init__()
        self.time_embedder = TwoLayers(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLayers(config.text_dim, config.dim)


class OutputNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, dim))


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """[B] -> [B, width] in fp32, cosines first."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=timestep.device).float())
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def attention_kept() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For a block's two forward passes: the second takes from the first what attention gave, on any device."""
    def policy(context, operation: torch._ops.OpOverload, *arguments, **options) -> CheckpointPolicy:
        kept = "scaled_dot_product" in operation.name()
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Helios(Network):
    """The DiT. Parameters are named and shaped as in transformer/ of the released checkpoints."""

    Config = HeliosConfig
    fp32 = ("time_embedder", "scale_shift_table", "norm2", "history_key_scale")  # stay fp32 in a bf16 model
    aliases = {"scale_shift_table": "norm_out.scale_shift_table"}  # name in files of the older training code
    fp8 = tuple(f"{layer}.weight" for layer in ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"))
    streamed = "blocks", ("attn2.to_k",)  # `Helios.text` calls the latter
    rows = "to_q", "to_k", "to_v", "norm_q", "norm_k", "history_key_scale", "ffn.net.0.proj"  # heads, hidden channels
    columns = "to_out.0", "ffn.net.2"

    def __init__(self, config: HeliosConfig):
        super().__init__()
        self.config = config
        self.checkpointing = self.keep_attention = False
        time, height, width = config.patch_size

        def patch(scale: int) -> nn.Conv3d:
            kernel = (time * scale, height * scale, width * scale)
            return nn.Conv3d(config.in_channels, config.dim, kernel, stride=kernel)

        self.patch_embedding, self.patch_short, self.patch_mid, self.patch_long = patch(1), patch(1), patch(2), patch(4)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = Layers[Block](Block(config) for _ in range(config.num_layers))
        self.norm_out = OutputNorm(config.dim)
        self.proj_out = nn.Linear(config.dim, config.out_channels * math.prod(config.patch_size))

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def band_tokens(self, band: Band, conv: nn.Conv3d, grid: tuple[int, int], scale: int,
                    threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N, D] of a band, their rotations [N, head_dim / 2], and which are visible [N]; `grid` is the short
        band's."""
        latents, rope = band.latents.to(self.dtype), rope_table(band.indices, *grid, self.config)
        if scale > 1:
            latents, rope = pad_to_multiple(latents, conv.kernel_size), pooled_rope(rope, (scale,) * 3)
        tokens, rope = embed(patches(latents, conv.kernel_size), conv), rope.flatten(0, 2)
        if band.visible is None:
            return tokens, rope, torch.ones(len(rope), dtype=torch.bool, device=rope.device)
        return tokens, rope, pool(band.visible.float(), conv.kernel_size).flatten() >= threshold

    def context(self, history: History, shape: tuple[int, ...]) -> Context:
        """History and target positions for target latents of `shape` (frames, height, width)."""
        frames, height, width = (size // k for size, k in zip(shape, self.config.patch_size))
        device = self.proj_out.weight.device
        indices = torch.arange(frames, device=device) if history.indices is None else history.indices
        target = rope_table(indices, height, width, self.config).flatten(0, 2)
        if history.short is None:
            if history.mid is not None or history.long is not None:
                raise ValueError("history: a mid or long band needs a short band")
            return Context(torch.empty(1, 0, self.config.dim, device=device, dtype=self.dtype), target[:, None])
        _, rows, columns = (size // k for size, k in zip(history.short.latents.shape[-3:], self.config.patch_size))
        bands = [(band, conv, scale) for band, conv, scale in (
            (history.long, self.patch_long, 4), (history.mid, self.patch_mid, 2), (history.short, self.patch_short, 1),
        ) if band is not None]
        parts = [self.band_tokens(band, conv, (rows, columns), scale, history.threshold) for band, conv, scale in bands]
        tokens, rope, visible = (torch.cat(each, dim) for each, dim in zip(zip(*parts), (1, 0, 0)))
        if any(band.visible is not None for band, *_ in bands):
            keep = visible.nonzero().flatten()  # of all bands at once, as the host waits for the device here
            tokens, rope = tokens[:, keep], rope[keep]
        return Context(tokens, torch.cat([rope, target])[:, None])

    def text(self, embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Prompt embeddings [B, L, text_dim] -> keys and values of every block. All L rows count: the zero rows after
        the prompt are embedded and attended too, as in training."""
        embedder = self.condition_embedder.text_embedder
        hidden = F.gelu(embedder.linear_1(embeddings.to(self.dtype)), approximate="tanh")
        hidden = embedder.linear_2(hidden)
        return [block.attn2.keys_values(hidden) for block in self.blocks]

    def time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[B] -> embedding [B, 1, D] and the blocks' modulation [B, 6, D]: shift, scale, gate of attention, of FFN."""
        embedder = self.condition_embedder.time_embedder
        hidden = sinusoid(timestep, self.config.freq_dim)
        embedding = embedder.linear_2(F.silu(embedder.linear_1(hidden))).to(self.dtype)
        modulation = self.condition_embedder.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))
        return embedding[:, None].float(), modulation.float()

    def forward(self, latents: Tensor, timestep: Tensor, text: list[tuple[Tensor, Tensor]], context: Context) -> Tensor:
        """Velocity of noisy `latents` [B, C, T, H, W] at `timestep` [B] (0..1000, may be fractional), in fp32."""
        config = self.config
        target = embed(patches(latents.to(self.dtype), config.patch_size), self.patch_embedding)
        history = context.tokens.expand(target.shape[0], -1, -1)
        embedding, target_time = self.time(timestep)
        history_time = self.time(torch.zeros_like(timestep[:1]))[1] if config.zero_history_timestep else target_time
        for block, block_text in zip(self.blocks, text):
            last = block is self.blocks[-1]
            arguments = history, target, history_time, target_time, block_text, context.rope, last
            if self.checkpointing and torch.is_grad_enabled() and not last:  # the last one's turn comes again at once
                history, target = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False,
                                             context_fn=attention_kept if self.keep_attention else noop_context_fn)
            else:
                history, target = block(*arguments)
        shift, scale = (self.norm_out.scale_shift_table + embedding).split(1, dim=1)
        out = self.proj_out(modulate(target, shift, scale, config.eps))
        pt, ph, pw = config.patch_size
        return rearrange(out.float(), "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=latents.shape[2] // pt,
                         h=latents.shape[3] // ph, w=latents.shape[4] // pw, pt=pt, ph=ph, pw=pw)

    def flops(self, context: Context, text_rows: int = 512, training: bool = False) -> int:
        """Floating-point operations of the blocks' matrix products with a batch of 1, in one `forward` or, for
        `training`, in a whole step: forward, backward (no gradients of frozen weights; attention counts 2.5 times) and
        what `checkpointing` computes again. The LoRA's own products, about 1 % at full size, are not counted."""
        dim, hidden = self.config.dim, self.config.ffn_dim
        total, history = context.rope.shape[0], context.tokens.shape[1]
        target = total - history

        def block(first: bool, last: bool) -> int:
            tokens = target if last else total  # carried on
            reading = target if self.config.guidance_cross_attn else tokens
            qkv = 2 * dim * dim * (2 * total + tokens)
            layers = 2 * dim * dim * tokens + 4 * dim * dim * reading + 4 * dim * hidden * tokens
            attention = 4 * dim * total * tokens + 4 * dim * text_rows * reading
            forward = qkv + layers + attention
            backward = layers + attention * 5 // 2 + (0 if first else qkv)  # no gradient has to leave the first block
            again = forward - attention * self.keep_attention if self.checkpointing and not last else 0
            return forward + again + backward if training else forward

        count = self.config.num_layers
        return sum(block(index == 0, index == count - 1) for index in range(count))

    def compile_blocks(self) -> None:
        """Compile every block by itself, as one graph without breaks; embeddings and histories stay as they are."""
        for block in self.blocks:
            # of the forward alone: what is hooked before a block stays outside
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)

    def set_lora(self, lora: Lora | None) -> None:
        """Attach a LoRA to its layers, or detach whatever is attached (None). Raises ValueError naming each misfit."""
        layers = {name: module for name, module in self.named_modules() if isinstance(module, Linear)}
        flat = {name.replace(".", "_"): name for name in layers}  # kohya's names
        adapters = {flat.get(name, name): adapter for name, adapter in (lora.adapters if lora else {}).items()}
        problems = [f"no layer {name}" for name in adapters if name not in layers]
        for name, (down, up, _) in adapters.items():
            expected = list(layers[name].weight.shape) if name in layers else None
            if expected and ([len(up), down.shape[1]] != expected or up.shape[1] != len(down)):
                problems.append(f"{name}: A {list(down.shape)} and B {list(up.shape)} for a weight {expected}")
        if lora is not None and len(adapters) < len(lora.adapters):
            problems.append("a layer is there twice, in two spellings")
        if lora is not None and problems:
            raise ValueError(f"{lora.source}: not a LoRA of this model: {few(problems)}")
        for name, layer in layers.items():
            layer.adapter = adapters.get(name)
