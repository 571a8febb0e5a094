"""bf16 against fp32, ours beside the peers': our casts may not cost more than theirs. And the VAE with TF32 convolutions.

Each network runs in fp32 and in bf16, ours with its fp32 islands, the peer (diffusers, transformers) with its own, on
the same weights: rounded to bf16 once, so that only the casts on the way count. Errors are root mean squares over all
of a block's output, relative to the peer's fp32 output. docs/parity.md lists the casts that differ.
"""

import copy

import peers
import pytest
import torch
import torch.nn.functional as F
from goldens import DISTILLED, GEOMETRY, record, tensors
from test_model import arguments
from torch.overrides import TorchFunctionMode

from bench import SCHEDULE
from files.checkpoint import load
from geometry import pi3x
from geometry.pi3x import load_pi3x
from helios.text import UMT5Encoder
from helios.vae import VAE
from model import Helios

MOST = 1.1  # times the peer's error


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def seen_by(blocks, call) -> list[torch.Tensor]:
    """What each block gave (history and target in one, but for our last block, which leaves the history), and the end."""
    seen = []

    def keep(module, inputs, output):
        whole = torch.cat(output, dim=1) if isinstance(output, tuple) and module is not blocks[-1] else output
        seen.append(whole[-1] if isinstance(whole, tuple) else whole)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    seen.append(call())
    for hook in hooks:
        hook.remove()
    return seen


def compare(what: str, ours: list, theirs: list, exact: list) -> None:
    assert len(ours) == len(theirs) == len(exact)
    for mine, peer, right in zip(ours, theirs, exact):
        peer, right = (x[:, -mine.shape[1]:] if x.dim() == 3 else x for x in (peer, right))
        off = error(mine, right), error(peer, right)
        assert 0 < off[0] < 0.5
        record(f"bf16 {what}: our error", off[0], 0.5, "rel")
        record(f"bf16 {what}: over the peer's", off[0] / off[1], MOST, "times")
        assert off[0] <= MOST * off[1], f"{what}: {off[0]:.3g}, the peer's {off[1]:.3g}"


def in_fp32(network):
    """The same numbers, computed with in fp32."""
    return copy.deepcopy(network).float()


def transformers(kind: str):
    """A network in bf16 and calls of it: latents, timestep, embeddings, history; all numbers are those of bf16."""
    if kind == "golden":
        model = load(Helios, DISTILLED / "transformer", dtype=torch.bfloat16)
        return model, [arguments(case) for case in ("all_bands", "wah_masks_thr0.1")]
    scale = peers.Scale(1024, 8, torch.device("cpu"), torch.bfloat16)
    model, words = scale.transformer(), scale.normal(1, 64, 1024)
    grids = peers.cases(model, (128, 192), SCHEDULE)
    return model, [(scale.normal(1, 16, *grid), torch.tensor([700.0]), words, history)
                   for name, (grid, history) in grids.items() if name in ("stage 0, warp", "stage 1")]


@pytest.mark.parametrize("kind", ["golden", "8 layers of width 1024"])
def test_transformer(kind):
    model, calls = transformers(kind)
    exact, peer = peers.twin(in_fp32(model)), peers.twin(model)
    call_peer, call_exact = peers.Denoiser(peer), peers.Denoiser(exact)
    for latents, timestep, words, history in calls:
        latents, words = latents.bfloat16().float(), words.bfloat16()
        context = model.context(history, latents.shape[2:])
        ours = seen_by(model.blocks, lambda: model(latents, timestep, model.text(words), context))
        theirs = seen_by(peer.blocks, lambda: call_peer(latents, timestep, words, history))
        right = seen_by(exact.blocks, lambda: call_exact(latents, timestep, words.float(), history))
        compare(f"DiT, {kind}", ours, theirs, right)


@pytest.mark.parametrize("kind", ["golden", "8 layers of width 1024"])
def test_text_encoder(kind):
    if kind == "golden":
        ours = load(UMT5Encoder, DISTILLED / "text_encoder", dtype=torch.bfloat16)
    else:
        ours = peers.Scale(1024, 8, torch.device("cpu"), torch.bfloat16).encoder()
    exact, peer = peers.twin(in_fp32(ours)), peers.twin(ours)
    ids = torch.arange(2, 42)[None]
    made = [seen_by(network.encoder.block, lambda: call(network)) for network, call in (
        (ours, lambda network: network(ids)), (peer, lambda network: network(ids).last_hidden_state),
        (exact, lambda network: network(ids).last_hidden_state))]
    compare(f"UMT5, {kind}", *made)


class Exact(torch.nn.Module):
    """A head that autocast leaves alone."""

    def __init__(self, head: torch.nn.Module):
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor, *size: int):
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float(), *size)


class Last(Exact):
    """The last of them, behind which autocast is over."""

    def forward(self, x: torch.Tensor, *size: int):
        result = super().forward(x, *size)
        torch.set_autocast_enabled("cpu", False)
        return result


@pytest.mark.parametrize("name", ["pi3x_n1", "pi3x_n3"])
def test_pi3x(monkeypatch, name):
    """Officially bf16 is autocast over fp32 weights, with rotary angles in bf16 and heads and what follows in fp32."""
    images = (tensors(GEOMETRY / f"{name}.safetensors")["imgs_u8"].float() / 255).permute(0, 3, 1, 2)[None]
    ours, cast, exact = (load_pi3x(GEOMETRY / "pi3x_weights.safetensors", dtype=dtype)
                         for dtype in (torch.bfloat16, torch.float32, torch.float32))
    for head in ("point_head", "conf_head", "camera_head"):
        setattr(cast, head, Exact(getattr(cast, head)))
    cast.metric_head = Last(cast.metric_head)

    def run(network) -> list[torch.Tensor]:
        def end() -> torch.Tensor:
            made = network(images)
            parts = made.points, made.confidence, made.c2w, made.metric
            return torch.cat([(part / part.abs().max()).flatten() for part in parts])

        return seen_by([*network.encoder.blocks, *network.decoder], end)

    mine, right = run(ours), run(exact)
    table = pi3x.rope_table
    monkeypatch.setattr(pi3x, "rope_table", lambda positions, dtype: table(positions, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        official = run(cast)
    compare("Pi3X", mine, official, right)


# ---------------------------------------------------------------------------------------------------------------- TF32


class TF32(TorchFunctionMode):
    """Convolutions whose inputs are rounded to 10 bits of mantissa, as tensor cores take them."""

    @staticmethod
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return ((x.contiguous().view(torch.int32) + 2**12) & ~(2**13 - 1)).view(torch.float32)

    def __torch_function__(self, function, types, given=(), options=None):
        if function is F.conv2d:
            given = *map(self.rounded, given[:2]), *given[2:]
        return function(*given, **(options or {}))


@pytest.mark.parametrize("width", [0, 96])
def test_vae_with_tf32(width):
    """A frame moves by less than one of its 256 levels, on the golden VAE and on a random one of full width."""
    vae = peers.Scale(1024, 1, torch.device("cpu"), torch.float32).vae(width) if width else load(VAE, DISTILLED / "vae")
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    exact = vae.decode(vae.denormalize(latents))
    with TF32():
        coarse = vae.decode(vae.denormalize(latents))
    levels = (coarse - exact).abs() * 127.5
    assert exact.std() > 0.05
    record("VAE decode with TF32, largest", levels.max().item(), 1, "levels")
    assert 0 < levels.max() < 1
