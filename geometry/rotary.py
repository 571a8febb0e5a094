"""Where a token of Pi3X (pi3x.py) stands, told to attention: its row and column, and its camera if that is known."""

import torch
from einops import rearrange
from torch import Tensor

from geometry.camera import inverse

HEAD_DIM = 64  # of every attention: the one size that no shape tells


def rope_table(positions: Tensor, dtype: torch.dtype, pairs: int = HEAD_DIM // 4) -> Tensor:
    """Integer (row, column) positions [..., S, 2] -> cosines and sines [2, ..., S, 2, pairs] of `pairs` frequencies.

    Kept for parity: in bf16 the angles themselves are rounded, which is coarse for far rows and columns.
    """
    frequency = 100 ** (-torch.arange(pairs, device=positions.device).float() / pairs)
    angle = (positions[..., None] * frequency).to(dtype)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate heads [..., S, D]: their first half by the row, the second by the column, in pairs D / 4 apart."""
    cos, sin = rope
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # [..., S, 2, D / 4] each
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-2).flatten(-3)


class Placing:
    """How tokens [b, heads, n * p, 64] of n pictures with known cameras are seen from each other (PRoPE, arXiv
    2507.10496): half of a head is points that go through the camera, the rest is rotated by the patch's column and row.
    """

    def __init__(self, c2w: Tensor, has_pose: Tensor, rows: int, columns: int):
        """c2w [B, N, 4, 4], has_pose [B, N] bool, and the patches of a picture."""
        sets, count = has_pose.shape
        self.c2w, self.w2c = c2w, inverse(c2w)
        patch = torch.cartesian_prod(*(torch.arange(n, device=c2w.device) for n in (rows, columns)))
        self.rope = rope_table(patch.flip(-1).repeat(count, 1), torch.float32, HEAD_DIM // 8)
        pair = has_pose[:, :, None] & has_pose[:, None] | torch.eye(count, dtype=torch.bool, device=c2w.device)
        self.mask = None if has_pose.all() else pair.repeat_interleave(len(patch), 1).repeat_interleave(
            len(patch), 2)[:, None]
        self.share = has_pose.repeat_interleave(len(patch), 1)[..., None]

    def turned(self, x: Tensor, cameras: Tensor, way: int) -> Tensor:
        """`x` through the matrices [B, N, 4, 4] of its pictures, and by its places, forwards (1) or back (-1)."""
        points, flat = x.float().chunk(2, dim=-1)
        points = rearrange(points, "b h (n p) (k j) -> b n h p k j", n=cameras.shape[1], j=4)
        points = rearrange(points @ cameras.mT[:, :, None, None], "b n h p k j -> b h (n p) (k j)")
        cos, sin = self.rope
        return torch.cat([points, rotate(flat, torch.stack([cos, -way * sin]))], dim=-1).type_as(x)
