"""Prompt -> embeddings: cleaning, sentencepiece, UMT5 encoder (`tokenizer/`, `text_encoder/` of a checkpoint).

Reproduces the text path of the official Helios pipeline (diffusers' Wan prompt cleaning, transformers' T5 tokenizer and
UMT5EncoderModel) under the checkpoint's own parameter names. The official encoder sees the prompt padded to 512 tokens,
masks the padding as keys and zeroes its rows afterwards; attention bias depends on relative positions only, so here
just the prompt's own tokens are run and zeros appended: the same numbers at a fraction of the work.
Left out: the T5 decoder, dropout, plain (ungated) feed-forward layers, and batches of prompts of different length.
"""

import html
import math
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from files.checkpoint import Layers, Network, check_pointer
from files.cli import note

END = 1  # id of </s>; 0 is <pad>, and there is no token for the beginning


def clean(prompt: str) -> str:
    """Repair mojibake and curly quotes, unescape HTML (twice, for &amp;amp;), collapse white space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class Tokenizer:
    """The sentencepiece model of a `tokenizer/` folder, or a `spiece.model` itself.

    Characters outside the vocabulary become byte pieces if the model has them, as in transformers 4.51; transformers
    5 gives <unk> instead. ValueError if the file is missing or not a sentencepiece model.
    """

    def __init__(self, path: str | Path):
        file = Path(path, "spiece.model") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"{file}: expected a sentencepiece model, found no such file; tokenizer.json is not read")
        check_pointer(file)
        try:
            self.model = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError, ValueError) as error:  # which of them depends on its version
            raise ValueError(f"{file}: expected a sentencepiece model, found {str(error)[:300]}") from None

    def __call__(self, text: str, max_length: int = 512) -> list[int]:
        """Cleaned text -> ids, cut so that with the final </s> there are at most `max_length`, which is said; not
        padded."""
        ids = self.model.encode(text)
        if len(ids) >= max_length:
            lost = self.model.decode(ids[max_length - 1:])
            note(f"the prompt {text[:30]!r}... has {len(ids)} tokens, {max_length - 1} are read; what is cut off begins"
                 f" with {lost[:60]!r}")
        return ids[: max_length - 1] + [END]


@dataclass(frozen=True)
class UMT5Config:
    """Keys of `text_encoder/config.json`, spelt as there; the defaults are the released UMT5-XXL."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64  # width of a head
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # from here on all distances share the last bucket
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    dense_act_fn: str = "gelu_new"

    def __post_init__(self):
        for key, value in (("feed_forward_proj", "gated-gelu"), ("dense_act_fn", "gelu_new")):
            if getattr(self, key) != value:
                raise ValueError(f"{key} is {getattr(self, key)!r}, supported is only {value!r}")
        buckets = self.relative_attention_num_buckets
        if not 4 <= buckets <= 2 * self.relative_attention_max_distance:
            raise ValueError(f"relative_attention_num_buckets is {buckets}, expected at least 4, and at most twice"
                             " relative_attention_max_distance")


def distance_buckets(length: int, buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Bucket of every (query, key) pair [length, length]: half of them for keys at or before the query, half after.

    Of each half, the first half holds one distance each, the rest widen logarithmically up to `max_distance`.
    """
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]  # key - query
    half, exact = buckets // 2, buckets // 4
    distance = offset.abs()
    octave = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (half - exact)  # fp32 as officially
    far = (exact + octave.clamp_min(0).long()).clamp_max(half - 1)  # clamped below as log(0) has no integer
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class SelfAttention(nn.Module):
    """Attention with a bias by relative position, an own one in every layer, and without the 1/sqrt(d) scale."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=self.heads) for layer in (self.q, self.k, self.v))
        bias = rearrange(self.relative_attention_bias(buckets), "q k h -> 1 h q k").contiguous()  # for fused kernels
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(y, "b h n d -> b n (h d)"))


class GatedFeedForward(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Residual(nn.Module):
    """A layer behind its norm, beside the stream; `name` is the layer's in the checkpoint."""

    def __init__(self, name: str, layer: nn.Module, config: UMT5Config):
        super().__init__()
        self.layer_norm, self.name = nn.RMSNorm(config.d_model, config.layer_norm_epsilon), name
        self.add_module(name, layer)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        return x + self.get_submodule(self.name)(self.layer_norm(x), *given)


class Block(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.layer = nn.ModuleList([Residual("SelfAttention", SelfAttention(config), config),
                                    Residual("DenseReluDense", GatedFeedForward(config), config)])

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, buckets))


class Stack(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.block = Layers[Block](Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        for block in self.block:
            x = block(x, buckets)
        return self.final_layer_norm(x)


class UMT5Encoder(Network):
    """Token ids [B, N] without padding -> last hidden state [B, N, d_model].

    In bf16 all weights are bf16; norms and softmax are fp32 inside and rounded once (officially a norm also before its
    weight, and the attention scores before the softmax).
    """

    Config = UMT5Config
    aliases = {"encoder.embed_tokens.weight": "shared.weight"}  # a file may hold either or both
    streamed = "encoder.block", ()
    rows = ".q", ".k", ".v", "wi_0", "wi_1"
    columns = ".o", "wo", "relative_attention_bias"

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    def forward(self, ids: Tensor) -> Tensor:
        config = self.config
        buckets = distance_buckets(ids.shape[1], config.relative_attention_num_buckets,
                                   config.relative_attention_max_distance, ids.device)
        return self.encoder(self.shared(ids), buckets)  # not scaled by sqrt(d_model)


def encode_prompt(tokenizer: Tokenizer, encoder: UMT5Encoder, prompt: str, max_length: int = 512) -> Tensor:
    """Prompt as the user wrote it -> [1, max_length, d_model], zero from the end of the prompt on."""
    ids = tokenizer(clean(prompt), max_length)
    x = encoder(torch.tensor([ids], device=encoder.shared.weight.device))  # [1, len(ids), d_model]
    return F.pad(x, (0, 0, 0, max_length - len(ids)))
