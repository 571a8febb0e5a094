"""A network whose work several processes share: each has a part of its weights, or of its tokens.

- `WeightShare` (tensor parallel, Megatron-LM, arXiv 1909.08053): heads and hidden channels are divided. Each rank reads
  its part of the files alone; behind a layer that takes divided channels the parts of the sum are added, and a norm
  across all heads adds its squares.
- `TokenShare` (Ulysses, arXiv 2309.14509): every rank has all weights and a part of the tokens; around attention they
  exchange heads for tokens. Parts may be uneven, as dropped tokens make them.

Hooks on a built network and plain collectives of torch.distributed; docs/parallel.md says why not DTensor's plans. How
the processes come to call the same thing is team.py's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from files.checkpoint import Network
from helios.lora import Lora

# -------------------------------------------------------------------------------------------------------------- weights


class SummedNorm(nn.Module):
    """nn.RMSNorm over a width whose channels are divided."""

    def __init__(self, norm: nn.RMSNorm, total: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight, self.eps, self.width, self.total = norm.weight, norm.eps or 0.0, norm.normalized_shape[0], total

    def forward(self, x: Tensor) -> Tensor:
        squares = self.total(x.float().square().sum(-1, keepdim=True))
        return (x.float() * torch.rsqrt(squares / self.width + self.eps) * self.weight.float()).type_as(x)


class WeightShare:
    """A `checkpoint.Share`: this rank's heads and hidden channels."""

    def __init__(self, rank: int, size: int, group: Any):
        self.rank, self.size, self.group = rank, size, group

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def add_up(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return self.total(output)

    def part(self, count: int) -> slice:
        return slice(count // self.size * self.rank, count // self.size * (self.rank + 1))

    def divide(self, module: Network) -> None:
        parts: dict[str, Any] = dict(module.named_modules())
        for name, parameter in list(module.named_parameters()):
            layer, _, leaf = name.rpartition(".")
            axis = self.axis(module, name)
            if axis is not None and parameter.ndim > axis and parameter.shape[axis] > 1:  # a scalar is everyone's
                count = parameter.shape[axis]
                if count % self.size:
                    raise ValueError(f"{name}: {count} channels cannot be divided among {self.size} processes")
                setattr(parts[layer], leaf, nn.Parameter(parameter.narrow(axis, 0, count // self.size)))
        for name, part in parts.items():
            if hasattr(part, "heads"):
                if part.heads % self.size:
                    raise ValueError(f"{part.heads} heads cannot be divided among {self.size} processes")
                part.heads //= self.size
            if isinstance(part, nn.RMSNorm) and name.endswith(module.rows):
                setattr(parts[name.rpartition(".")[0]], name.rpartition(".")[2], SummedNorm(part, self.total))
            if isinstance(part, nn.Linear) and name.endswith(module.columns):
                part.register_forward_hook(self.add_up)

    def axis(self, module: Network, name: str) -> int | None:
        """That along which a tensor is divided."""
        layer = name.removesuffix(".weight").removesuffix(".bias")
        return 0 if layer.endswith(module.rows) else 1 if layer.endswith(module.columns) else None

    def read(self, module: Network, name: str, piece: Any) -> Tensor:
        shape, axis = piece.get_shape(), self.axis(module, name)
        if axis == 1 and len(shape) == 1:  # the bias of a sum is added once
            return piece[:] if self.rank == 0 else torch.zeros_like(piece[:])
        if axis is None or shape[axis] == 1:
            return piece[:]
        return piece[self.part(shape[0])] if axis == 0 else piece[:, self.part(shape[1])]

    def largest(self, module: Network, name: str, rows: Tensor) -> Tensor:
        if self.axis(module, name) == 1:
            dist.all_reduce(rows, dist.ReduceOp.MAX, group=self.group)
        return rows

    def lora(self, module: Network, lora: Lora) -> Lora:
        """The part of its updates, whose layers may be named with underscores."""
        rows = tuple(end.replace(".", "_") for end in module.rows)
        cut = {name: (down, up[self.part(len(up))], scale) if name.replace(".", "_").endswith(rows)
               else (down[:, self.part(down.shape[1])], up, scale)
               for name, (down, up, scale) in lora.adapters.items()}
        return Lora(lora.source, cut, lora.warp_band)


# --------------------------------------------------------------------------------------------------------------- tokens


class TokenShare:
    """This rank's history and target tokens in a whole transformer."""

    def __init__(self, rank: int, size: int, group: Any, transformer: Any):
        self.rank, self.size, self.group = rank, size, group
        self.history = self.target = [0] * size  # tokens of each rank in this call
        transformer.register_forward_pre_hook(self.cut_context)
        transformer.blocks[0].register_forward_pre_hook(self.cut_target)
        transformer.proj_out.register_forward_hook(self.gather)
        for block in transformer.blocks:
            if block.attn1.heads % size:
                raise ValueError(f"{block.attn1.heads} heads cannot be divided among {size} processes")
            block.attn1.kernel = partial(self.attend, block is transformer.blocks[-1])

    def counts(self, total: int) -> list[int]:
        return [total // self.size + (rank < total % self.size) for rank in range(self.size)]

    def mine(self, x: Tensor, counts: list[int], axis: int) -> Tensor:
        return x.split(counts, dim=axis)[self.rank]

    def cut_context(self, module: nn.Module, inputs: tuple) -> tuple:
        latents, timestep, text, context = inputs
        count = context.tokens.shape[1]
        self.history, self.target = self.counts(count), self.counts(len(context.rope) - count)
        rope = torch.cat([self.mine(context.rope[:count], self.history, 0),
                          self.mine(context.rope[count:], self.target, 0)])
        tokens = self.mine(context.tokens, self.history, 1)
        return latents, timestep, text, type(context)(tokens=tokens, rope=rope)

    def cut_target(self, module: nn.Module, inputs: tuple) -> tuple:
        history, target, *rest = inputs
        return history, self.mine(target, self.target, 1), *rest

    def gather(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        batch, _, channels = output.shape
        shapes = [(batch, count, channels) for count in self.target]
        return torch.cat(self.exchange([output] * self.size, shapes), dim=1)

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Each part to its rank; from every rank what it has for this one, in its shape."""
        sent, expected = [part.numel() for part in parts], [torch.Size(shape).numel() for shape in shapes]
        came = parts[0].new_empty(sum(expected))
        dist.all_to_all_single(came, torch.cat([part.flatten() for part in parts]), expected, sent, group=self.group)
        return [piece.view(shape) for piece, shape in zip(came.split(expected), shapes)]

    def attend(self, targets_only: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [B, heads, own tokens, head_dim]: on the way of all tokens, but of a part of the heads."""
        all_tokens = [history + target for history, target in zip(self.history, self.target)]
        asking = self.target if targets_only else all_tokens
        batch, heads, own, width = q.shape

        def all_of(x: Tensor, counts: list[int]) -> Tensor:
            shapes = [(batch, heads // self.size, count, width) for count in counts]
            return torch.cat(self.exchange(x.chunk(self.size, dim=1), shapes), dim=2)

        out = F.scaled_dot_product_attention(all_of(q, asking), all_of(k, all_tokens), all_of(v, all_tokens))
        shapes = [(batch, heads // self.size, own, width)] * self.size
        return torch.cat(self.exchange(out.split(asking, dim=2), shapes), dim=1)
