"""Pi3X: pictures -> metric points, rays, confidence and camera poses of every pixel and picture (`model.safetensors`).

Pi3X (the metric successor of Pi3, arXiv 2507.13347) is how Warp-as-History sees geometry. A DINOv2 encoder runs on each
picture, a decoder attends in turn inside each picture and over all of them, and four branches read its last two blocks:
points and confidence per pixel (convolutional heads), a camera per picture, and one metric scale for all. No picture is
the reference: reordering them reorders the outputs, and "world" is a frame of the network's own choice.
Parameter names are the checkpoint's. In a bf16 model only the matrix products before the heads are bf16, close to the
official autocast: norms, residual streams, heads and all after them stay fp32.
What is known can be given (`known.Known`): depth and rays are added to a picture's patches, poses turn and move what
the patches of different pictures tell each other. The tensors for that are read only if they are asked for.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from files.checkpoint import Layers, Network, build_from, count_numbers, fill, open_safetensors, snapshot
from files.machine import free_memory, network_dtype
from geometry.heads import GROUP, CameraHead, ConvHead, nearest_rotation
from geometry.known import Known
from geometry.rotary import HEAD_DIM, Placing, rope_table, rotate

CONDITIONS = {"depth": ("depth_encoder.", "depth_emb"), "rays": ("ray_embed.",), "poses": ("pose_inject_blk.",)}
POSE_EVERY = 8  # decoder blocks; poses are given after the second of each group, as far as there are blocks for it

norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class Branch:
    """Sizes of one of the four transformers that follow the decoder."""

    dim: int
    blocks: int
    hidden: int  # width inside the MLP
    out: int  # what its head receives


@dataclass(frozen=True)
class Pi3XConfig:
    """All sizes of the network; the defaults are the released model, which comes without a config.json."""

    dim: int = 1024
    patch: int = 14
    grid: int = 37  # the position embedding is that of grid * grid patches
    registers: int = 4  # tokens that the encoder adds to a picture, and drops at its end
    specials: int = 5  # tokens that the decoder adds to a picture
    encoder_blocks: int = 24
    encoder_hidden: int = 4096
    decoder_blocks: int = 36
    decoder_hidden: int = 4096
    point: Branch = Branch(1024, 5, 4096, 1024)
    conf: Branch = Branch(1024, 5, 4096, 1024)
    camera: Branch = Branch(1024, 5, 4096, 512)
    metric: Branch = Branch(512, 5, 2048, 512)
    point_head: tuple[tuple[int, int], ...] = ((256, 2), (128, 2), (64, 2))  # per level: width and residual blocks
    conf_head: tuple[tuple[int, int], ...] = ((256, 2), (128, 2), (64, 2))
    given: tuple[str, ...] = ()  # what it can be told, of `CONDITIONS`
    pose_blocks: int = 5

    @property
    def pixels(self) -> int:
        """As many as the position embedding has places for; pictures may have more, but were not trained with."""
        return (self.patch * self.grid) ** 2

    @classmethod
    def from_shapes(cls, shapes: dict[str, list[int]], given: tuple[str, ...] = ()) -> "Pi3XConfig":
        """Sizes from the shapes of a file's tensors; ValueError naming the key of one that is missing or impossible.
        Only what decides a size is looked at: `fill` compares all the rest."""
        for name in given:
            if not any(key.startswith(CONDITIONS[name]) for key in shapes):
                raise ValueError(f"no {CONDITIONS[name][0]}* tensors: this network cannot be told {name}")

        def size(key: str, axis: int, multiple: int = 1) -> int:
            shape = shapes.get(key, [])
            if len(shape) <= axis or shape[axis] < 1 or shape[axis] % multiple:
                found = f"has shape {shape}" if key in shapes else "is missing"
                raise ValueError(f"{key} {found}, expected a positive multiple of {multiple} as its size {axis}")
            return shape[axis]

        def count(prefix: str) -> int:  # modules in a list
            return len({key[len(prefix) :].split(".")[1] for key in shapes if key.startswith(f"{prefix}.")})

        def branch(name: str) -> Branch:
            fc1, out = f"{name}.blocks.0.mlp.fc1.weight", f"{name}.linear_out.weight"
            return Branch(size(fc1, 1, HEAD_DIM), count(f"{name}.blocks"), size(fc1, 0), size(out, 0))

        def head(name: str) -> tuple[tuple[int, int], ...]:
            levels = [f"{name}.upsample_blocks.{level}" for level in range(count(f"{name}.upsample_blocks"))]
            blocks = [count(level) - 1 for level in levels]  # residual ones, whose channels are normalised in groups
            widths = (size(f"{level}.0.0.weight", 1, GROUP // 2 if n else 1) for level, n in zip(levels, blocks))
            return tuple(zip(widths, blocks))

        return cls(
            dim=size("encoder.norm.weight", 0, HEAD_DIM),
            patch=size("encoder.patch_embed.proj.weight", 2),
            grid=math.isqrt(size("encoder.pos_embed", 1) - 1),
            registers=size("encoder.register_tokens", 1),
            specials=size("register_token", 2),
            encoder_blocks=count("encoder.blocks"),
            encoder_hidden=size("encoder.blocks.0.mlp.fc1.weight", 0),
            decoder_blocks=count("decoder"),
            decoder_hidden=size("decoder.1.mlp.fc1.weight", 0),  # 1, as the branches need two blocks
            point=branch("point_decoder"), conf=branch("conf_decoder"),
            camera=branch("camera_decoder"), metric=branch("metric_decoder"),
            point_head=head("point_head"), conf_head=head("conf_head"),
            given=given, pose_blocks=count("pose_inject_blk") or cls.pose_blocks,
        )


@dataclass(frozen=True)
class Prediction:
    """Geometry of B sets of N pictures in fp32; lengths are metric, cameras OpenCV (x right, y down, z forward)."""

    points: Tensor  # [B, N, H, W, 3] in the world
    local_points: Tensor  # [B, N, H, W, 3] in each picture's camera
    rays: Tensor  # [B, N, H, W, 3] directions of unit length in each picture's camera
    confidence: Tensor  # [B, N, H, W] logits
    c2w: Tensor  # [B, N, 4, 4] camera to world
    metric: Tensor  # [B] what the network's own units were multiplied with


class Linear(nn.Linear):
    """Works in the dtype of its weights: fp32 norms come in, and what goes out joins an fp32 residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc1=Linear(dim, hidden), gelu=nn.GELU(), fc2=Linear(hidden, dim)))


class Attention(nn.Module):
    def __init__(self, dim: int, qk_norm: bool):
        super().__init__()
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        # eps is 1e-5 here and 1e-6 everywhere else
        self.q_norm, self.k_norm = (nn.LayerNorm(HEAD_DIM, eps=1e-5) if qk_norm else nn.Identity() for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, heads, S, 64]."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, d=HEAD_DIM)
        return self.q_norm(q.float()).type_as(v), self.k_norm(k.float()).type_as(v), v

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        q, k, v = self.heads(x)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One block of the encoder (`scale`), the decoder (`scale`, `qk_norm`) or a branch (neither)."""

    def __init__(self, dim: int, hidden: int, scale: bool = False, qk_norm: bool = False):
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn = Attention(dim, qk_norm)
        self.mlp = mlp(dim, hidden)
        self.ls1, self.ls2 = (LayerScale(dim) if scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:  # [B, S, D] fp32; every row sees all of its own
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PoseBlock(Block):
    """What known cameras add to the patches [B, N * P, D] of all pictures; its two parts read the same."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(dim, hidden, scale=True, qk_norm=True)

    def forward(self, x: Tensor, placing: Placing) -> Tensor:
        q, k, v = self.attn.heads(self.norm1(x))
        q = placing.turned(q, placing.w2c.mT, 1)
        k, v = placing.turned(k, placing.c2w, 1), placing.turned(v, placing.c2w, 1)
        seen = placing.turned(F.scaled_dot_product_attention(q, k, v, placing.mask), placing.w2c, -1)
        seen = self.attn.proj(rearrange(seen, "b h n d -> b n (h d)"))
        return (self.ls1(seen) + self.ls2(self.mlp(self.norm2(x)))) * placing.share


def resize_positions(table: Tensor, height: int, width: int) -> Tensor:
    """Position embedding [1, 1 + M * M, D] of the cls token and M x M patches -> [1, 1 + height * width, D]."""
    grid = rearrange(table[:, 1:], "1 (h w) d -> 1 d h w", h=math.isqrt(table.shape[1] - 1))
    grid = F.interpolate(grid, (height, width), mode="bicubic", antialias=True)
    return torch.cat([table[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int, channels: int = 3):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images.to(self.proj.weight.dtype))


class Encoder(nn.Module):
    """DINOv2 with registers. Pictures or other maps [F, channels, H, W] -> patch tokens [F, P, D], row-major."""

    def __init__(self, config: Pi3XConfig, channels: int = 3):
        super().__init__()
        dim = config.dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, dim))
        self.patch_embed = PatchEmbed(dim, config.patch, channels)
        self.blocks = Layers[Block](Block(dim, config.encoder_hidden, scale=True) for _ in range(config.encoder_blocks))
        self.norm = norm(dim)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        height, width = patches.shape[-2:]
        positions = resize_positions(self.pos_embed, height, width)
        first = torch.cat([self.cls_token + positions[:, :1], self.register_tokens], dim=1)  # these without position
        patches = rearrange(patches, "f d h w -> f (h w) d") + positions[:, 1:]
        x = torch.cat([first.expand(len(images), -1, -1), patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, -height * width :])


class BranchDecoder(nn.Module):
    """Decoder tokens [F, S, 2D] -> [F, S, out], each picture on its own."""

    def __init__(self, dim_in: int, sizes: Branch):
        super().__init__()
        self.projects = Linear(dim_in, sizes.dim)
        self.blocks = Layers[Block](Block(sizes.dim, sizes.hidden) for _ in range(sizes.blocks))
        self.linear_out = Linear(sizes.dim, sizes.out)

    def forward(self, tokens: Tensor, rope: Tensor) -> Tensor:
        x = self.projects(tokens).float()
        for block in self.blocks:
            x = block(x, rope)
        return self.linear_out(x)


class CrossAttention(nn.Module):
    """[B, 1, D] reads [B, S, D]; it stands at (0, 0) of the rotary embedding, so that only the keys are rotated."""

    def __init__(self, dim: int):
        super().__init__()
        self.q_proj, self.k_proj = Linear(dim, dim), Linear(dim, dim)
        self.v_proj, self.proj = Linear(dim, dim), Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        projected = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", d=HEAD_DIM) for y in projected)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, rotate(k, rope), v), "b h n d -> b n (h d)"))


class CrossBlock(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm2, self.norm_y, self.norm3 = norm(dim), norm(dim), norm(dim)
        self.mlp = mlp(dim, hidden)
        self.cross_attn = CrossAttention(dim)

    def forward(self, x: Tensor, tokens: Tensor, rope: Tensor) -> Tensor:
        x = x + self.cross_attn(self.norm2(x), self.norm_y(tokens), rope)
        return x + self.mlp(self.norm3(x))


class MetricDecoder(nn.Module):
    """One query [B, 1, 2D] reads the tokens of all pictures [B, N * S, 2D] -> [B, 1, out]."""

    def __init__(self, dim_in: int, sizes: Branch):
        super().__init__()
        dim = sizes.dim
        self.projects_x, self.projects_y = Linear(dim_in, dim), Linear(dim_in, dim)
        self.blocks = Layers[CrossBlock](CrossBlock(dim, sizes.hidden) for _ in range(sizes.blocks))
        self.linear_out = Linear(dim, sizes.out)

    def forward(self, query: Tensor, tokens: Tensor, rope: Tensor) -> Tensor:
        x, tokens = self.projects_x(query).float(), self.projects_y(tokens).float()
        for block in self.blocks:
            x = block(x, tokens, rope)
        return self.linear_out(x)


class Pi3X(Network):
    """The whole network. Gradients are recorded as usual: call it under `torch.inference_mode()` to only run it."""

    Config = Pi3XConfig
    fp32 = ("norm", "gamma", "token", "pos_embed", "image_", "_head.", "depth_emb")  # stay fp32 in a bf16 model
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: Pi3XConfig):
        super().__init__()
        dim = config.dim
        self.config = config
        self.ignored = sum((keys for name, keys in CONDITIONS.items() if name not in config.given), ())
        self.register_buffer("image_mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.encoder = Encoder(config)
        self.register_token = nn.Parameter(torch.zeros(1, 1, config.specials, dim))
        self.decoder = Layers[Block](
            Block(dim, config.decoder_hidden, scale=True, qk_norm=True) for _ in range(config.decoder_blocks)
        )
        self.point_decoder = BranchDecoder(2 * dim, config.point)
        self.conf_decoder = BranchDecoder(2 * dim, config.conf)
        self.camera_decoder = BranchDecoder(2 * dim, config.camera)
        self.metric_token = nn.Parameter(torch.zeros(1, 1, 2 * dim))
        self.metric_decoder = MetricDecoder(2 * dim, config.metric)
        self.point_head = ConvHead(config.point.out, config.point_head, outputs=(2, 1))  # (x, y) / z and log z
        self.conf_head = ConvHead(config.conf.out, config.conf_head, outputs=(1,))
        self.camera_head = CameraHead(config.camera.out)
        self.metric_head = nn.Linear(config.metric.out, 1)
        if "depth" in config.given:
            self.depth_encoder = Encoder(config, channels=2)  # depth, and where it is known
            self.depth_emb = nn.Parameter(torch.zeros(1, 1, dim))
        if "rays" in config.given:
            self.ray_embed = PatchEmbed(dim, config.patch, channels=2)
        if "poses" in config.given:
            self.pose_inject_blk = Layers[PoseBlock](
                PoseBlock(dim, config.decoder_hidden) for _ in range(config.pose_blocks)
            )

    def tell(self, patches: Tensor, known: Known, images: Tensor) -> tuple[Tensor, Placing | None]:
        """Patch tokens [B * N, P, D] with the known rays and depths added to them, and the known cameras."""
        sets, count, _, height, width = images.shape
        missing = set(known.names()) - set(self.config.given)
        if missing:
            raise ValueError(f"Pi3X: was loaded without what it takes to be told {', '.join(sorted(missing))}")
        masks = known.masks(sets, count, images.device)
        poses, depth = known.scaled(masks["depth"].any(1))
        if masks["rays"].any():
            slopes = known.slopes(height, width).flatten(0, 1)
            added = rearrange(self.ray_embed(slopes), "f d h w -> f (h w) d")
            patches = patches + added * masks["rays"].view(-1, 1, 1)
        if depth is not None and masks["depth"].any():
            maps = torch.stack([depth, (depth > 0).float()], dim=2).flatten(0, 1)
            patches = patches + (self.depth_encoder(maps) + self.depth_emb) * masks["depth"].view(-1, 1, 1)
        if poses is None or not masks["poses"].any():
            return patches, None
        return patches, Placing(poses, masks["poses"], height // self.config.patch, width // self.config.patch)

    def inject(self, x: Tensor, index: int, count: int, placing: Placing) -> Tensor:
        """Known cameras into the tokens [B * N, specials + P, D] after the decoder's block `index`."""
        group, place = divmod(index, POSE_EVERY)
        if place != 1 or group >= len(self.pose_inject_blk):
            return x
        specials, patches = x.split([self.config.specials, x.shape[1] - self.config.specials], dim=1)
        told = self.pose_inject_blk[group](rearrange(patches, "(b n) p d -> b (n p) d", n=count), placing)
        return torch.cat([specials, patches + told.view_as(patches)], dim=1)

    def decode(self, patches: Tensor, count: int, rope: Tensor, rope_all: Tensor,
               placing: Placing | None = None) -> Tensor:
        """Patch tokens [B * N, P, D], N = `count` -> outputs of the last two blocks [B * N, specials + P, 2D]."""
        x = torch.cat([self.register_token[0].expand(len(patches), -1, -1), patches], dim=1)
        for index, block in enumerate(self.decoder):
            before = x
            if index % 2 == 0:  # inside each picture
                x = block(x, rope)
            else:  # over all pictures
                x = block(rearrange(x, "(b n) s d -> b (n s) d", n=count), rope_all).reshape(x.shape)
            x = x if placing is None else self.inject(x, index, count, placing)
        return torch.cat([before, x], dim=-1)

    def branches(self, images: Tensor, known: Known | None = None) -> tuple[Tensor, ...]:
        """What the heads read, of B * N pictures: the points' and the confidence's features [F, 1, C, H/14, W/14], the
        camera's nine numbers [F, 9] and place [F, 3]; and the log of the metric scale [B, 1, 1]."""
        count, patch = images.shape[1], self.config.patch
        rows, columns = (torch.arange(1, size // patch + 1, device=images.device) for size in images.shape[3:])
        positions = F.pad(torch.cartesian_prod(rows, columns), (0, 0, self.config.specials, 0))  # specials at (0, 0)
        rope = rope_table(positions, self.decoder[0].attn.qkv.weight.dtype)
        rope_all = rope.repeat(1, count, 1, 1)

        frames = rearrange(images, "b n c h w -> (b n) c h w")
        patches, placing = self.encoder((frames - self.image_mean) / self.image_std), None
        if known is not None:
            patches, placing = self.tell(patches, known, images)
        tokens = self.decode(patches, count, rope, rope_all, placing)
        decoders = self.point_decoder, self.conf_decoder, self.camera_decoder
        point, conf, camera = (decoder(tokens, rope)[:, self.config.specials :].float() for decoder in decoders)
        point, conf = (rearrange(x, "f (h w) c -> f 1 c h w", h=len(rows)) for x in (point, conf))
        query = self.metric_token.expand(len(images), -1, -1)
        metric = self.metric_decoder(query, rearrange(tokens, "(b n) s d -> b (n s) d", n=count), rope_all)
        return point, conf, *self.camera_head(camera), self.metric_head(metric.float())

    def forward(self, images: Tensor, known: Known | None = None) -> Prediction:
        """Pictures [B, N, 3, H, W] in [0, 1], and what is known of them; ValueError unless H and W are multiples of the
        patch size (14)."""
        shape, patch = list(images.shape), self.config.patch
        if len(shape) != 5 or shape[2] != 3 or 0 in shape or shape[3] % patch or shape[4] % patch:
            raise ValueError(f"Pi3X: images are {shape}, expected [B, N, 3, H, W], H and W multiples of {patch}")
        count, _, height, width = shape[1:]
        point, conf, nine, translation, log_metric = self.branches(images, known)
        xy, log_z = torch.cat([self.point_head(x, height, width) for x in point]).split([2, 1], dim=-1)
        confidence = torch.cat([self.conf_head(x, height, width) for x in conf])  # one by one: bounded memory
        metric = log_metric.exp()[..., None]  # [B, 1, 1, 1]

        z = log_z.clamp_max(15).exp()
        local, rays = torch.cat([xy * z, z], dim=-1), F.normalize(F.pad(xy, (0, 1), value=1.0), dim=-1)
        c2w = torch.cat([nearest_rotation(nine), translation[..., None]], dim=-1)
        local, rays, confidence, c2w = (
            rearrange(x, "(b n) ... -> b n ...", n=count) for x in (local, rays, confidence[..., 0], c2w)
        )
        points = torch.einsum("bnij,bnhwj->bnhwi", c2w[..., :3], local) + c2w[:, :, None, None, :, 3]
        c2w = F.pad(torch.cat([c2w[..., :3], metric * c2w[..., 3:]], dim=-1), (0, 0, 0, 1))
        c2w[..., 3, 3] = 1
        points, local = metric[..., None] * points, metric[..., None] * local
        return Prediction(points, local, rays, confidence, c2w, metric.flatten())


def load_pi3x(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
              given: tuple[str, ...] = ()) -> Pi3X:
    """The network from its one file, with the tensors for what is `given` (of `CONDITIONS`) to it besides pictures.
    OSError if there is none, ValueError naming each tensor that does not fit."""
    path = Path(path)
    with open_safetensors(path) as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    try:
        config = Pi3XConfig.from_shapes(shapes, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return fill(build_from(path, lambda: Pi3X(config)), [path], device, dtype)


def find_pi3x(choice: Path | None, weights: Path) -> Path | None:
    """The file to use: the user's, which may be a folder with it, or that in the weights' folder or beside it."""
    if choice is not None:
        return snapshot(choice, "model.safetensors") / "model.safetensors" if choice.is_dir() else choice
    places = (folder / "Pi3X" / "model.safetensors" for folder in (weights, weights.parent))
    return next((path for path in places if path.is_file()), None)


def pi3x_source(file: Path, device: str, beside: int, often: bool,
                given: tuple[str, ...] = ()) -> Callable[[], Pi3X]:
    """How a run gets Pi3X: read anew for each estimate, so that it makes room for the bytes `beside` it, or kept if it
    is used `often` and both fit on the device, with a quarter more for what they compute."""
    dtype = network_dtype(device)
    read = partial(load_pi3x, file, device, dtype, given)
    needed = (count_numbers([file]) * dtype.itemsize + beside) * 5 // 4
    return cache(read) if often and free_memory(device) > needed else read
