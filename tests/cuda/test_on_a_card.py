"""The CPU's numbers on a card: goldens in fp32 and bf16, the renderer to the bit, streamed weights, fp8, no waits.

    python -m pytest -m cuda

Each check takes a device. Without a card it runs on the CPU alone, so that its own lines are proven; what needs a card
is skipped, and says so. Nothing is downloaded.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from goldens import DISTILLED, GEOMETRY, HELIOS, check, tensors
from test_model import INPUTS, arguments
from test_stream import deep_checkpoint

from files.checkpoint import load, quantize
from files.machine import allow_tf32, multiplies_float8
from geometry.camera import WINDOW, move_path
from geometry.pi3x import load_pi3x
from geometry.surface import geometry_from_depth, pinhole
from helios.load import load_models, load_network
from helios.lora import load_lora
from helios.stream import load_streamed
from helios.text import UMT5Encoder
from model import Helios, Linear
from render import RenderSettings, render
from wah import Options, Prompts, Rollout

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
on_both = pytest.mark.parametrize("device", DEVICES)
REPEATS = {"cpu": 2, "cuda": 50}  # against races, which a CPU has none of


@pytest.fixture(scope="module", autouse=True)
def exact():
    """Convolutions of fp32 numbers as they are."""
    before = torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32 = before


def call(model: Helios, case: str, device: str) -> torch.Tensor:
    latents, timestep, words, history = arguments(case)
    history = type(history)(**{name: band and type(band)(*(x if x is None else x.to(device) for x in (
        band.latents, band.indices, band.visible))) for name, band in (
        ("short", history.short), ("mid", history.mid), ("long", history.long))}, threshold=history.threshold,
        indices=None if history.indices is None else history.indices.to(device))
    latents, timestep, words = (x.to(device) for x in (latents, timestep, words))
    return model(latents, timestep, model.text(words), model.context(history, latents.shape[2:])).cpu()


@on_both
@pytest.mark.parametrize("case", ["all_bands", "wah_masks_thr0.1"])
def test_transformer(device, case):
    expected = INPUTS[f"{case}.out"]
    check(f"DiT on {device}", call(load(Helios, DISTILLED / "transformer", device), case, device), expected, 2e-4)
    coarse = call(load(Helios, DISTILLED / "transformer", device, torch.bfloat16), case, device)
    error = (coarse - expected).norm() / expected.norm()
    check(f"DiT on {device}, bf16, relative rms", error, torch.tensor(0.0), 0.03)


@on_both
def test_text_encoder(device):
    ids = torch.arange(2, 42)[None]
    expected = load(UMT5Encoder, DISTILLED / "text_encoder")(ids)
    check(f"UMT5 on {device}", load(UMT5Encoder, DISTILLED / "text_encoder", device)(ids.to(device)).cpu(), expected, 5e-4)


@on_both
def test_vae(device):
    ours, theirs = (load_models(Helios, DISTILLED, place).vae for place in (device, "cpu"))
    video = torch.randn(1, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    mean = theirs.encode(video)[0]
    check(f"VAE encode on {device}", ours.encode(video.to(device))[0].cpu(), mean, 5e-4)
    check(f"VAE decode on {device}", ours.decode(mean.to(device)).cpu(), theirs.decode(mean), 5e-4)


@on_both
def test_pi3x(device):
    images = (tensors(GEOMETRY / "pi3x_n3.safetensors")["imgs_u8"].float() / 255).permute(0, 3, 1, 2)[None]
    expected = load_pi3x(GEOMETRY / "pi3x_weights.safetensors")(images)
    actual = load_pi3x(GEOMETRY / "pi3x_weights.safetensors", device)(images.to(device))
    for name in ("points", "confidence", "c2w", "metric"):
        check(f"Pi3X on {device}", getattr(actual, name).cpu(), getattr(expected, name), 1e-3, relative=True)


@on_both
def test_renderer(device):
    """Every bit of frames and masks."""
    size, generator = (96, 160), torch.Generator().manual_seed(0)
    picture = F.interpolate(torch.rand(1, 3, 6, 10, generator=generator), size, mode="bilinear") * 2 - 1
    depth = F.interpolate(torch.rand(1, 1, 4, 5, generator=generator), size)[0, 0] * 3 + 1
    warps = []
    for place in ("cpu", device):
        scene = geometry_from_depth(picture, depth, pinhole(60, *size), limit=60_000)  # on the CPU: the same for both
        moved = {name: value.to(place) for name, value in vars(scene).items() if name not in ("K", "c2w")}
        scene = type(scene)(**moved, K=scene.K, c2w=scene.c2w)
        warps.append(render(scene, move_path("yaw 20, right 1"), scene.size, RenderSettings()))
    for name in ("frames", "visible"):
        assert torch.equal(getattr(warps[0], name), getattr(warps[1], name).cpu())
    assert 0.3 < warps[0].visible.mean() < 1


@on_both
def test_streamed_equals_full(tmp_path, device):
    """Again and again, in bf16: a race between copying and computing would show some time."""
    folder = deep_checkpoint(tmp_path, 6)
    full = load(Helios, folder, device, torch.bfloat16)
    other = load_streamed(Helios, folder, device, torch.bfloat16, "blocks", ("attn2.to_k",))
    expected = call(full, "all_bands", device)
    assert all(torch.equal(call(other, "all_bands", device), expected) for _ in range(REPEATS[device]))


@on_both
def test_fp8(device):
    """The whole network, and a layer of full width, in float8 times float8 where the card does that."""
    full, eight = (load_network(Helios, DISTILLED / "transformer", device, memory) for memory in ("full", "fp8"))
    expected = call(full, "all_bands", device)
    error = (call(eight, "all_bands", device) - expected).norm() / expected.norm()
    check(f"fp8 on {device}, relative rms", error, torch.tensor(0.0), 0.1)
    weight, x = (torch.randn(*shape, device=device) for shape in ((512, 5120), (64, 5120)))
    layer = Linear(5120, 512).to(device, torch.bfloat16).requires_grad_(False).eval()
    (float8, layer.scale), layer.in_float8 = quantize(weight, torch.bfloat16), device == "cpu" or multiplies_float8(device)
    layer.weight, layer.bias.data = torch.nn.Parameter(float8, requires_grad=False), torch.zeros_like(layer.bias)
    wanted = F.linear(x, weight)
    error = (layer(x.bfloat16()).float() - wanted).norm() / wanted.norm()
    check(f"fp8 layer on {device}, relative rms", error.cpu(), torch.tensor(0.0), 0.045)


def rollout(device: str, watch=None) -> torch.Tensor:
    models = load_models(Helios, DISTILLED, device)
    size = 64, 128
    picture = F.interpolate(torch.rand(1, 3, 4, 8, generator=torch.Generator().manual_seed(0)), size) * 2 - 1
    words = torch.randn(2, 1, 8, models.transformer.config.text_dim, generator=torch.Generator().manual_seed(1))
    lora = load_lora(HELIOS / "lora_noprefix.safetensors", device, models.transformer.dtype)
    from memory import Camera

    camera = Camera(geometry_from_depth(picture.to(device), torch.linspace(3, 1, 64)[:, None].expand(size).to(device),
                                        pinhole(60, *size), limit=11_760), size)
    made = Rollout(models, Prompts(*words.to(device)), size, torch.Generator().manual_seed(0), image=picture, lora=lora,
                   camera=camera, options=Options(steps=(2, 2, 2)), on_step=watch)
    chunks = [made.next(poses=poses).latents.cpu() for poses in move_path("yaw 10, yaw 10").split(WINDOW)]
    assert all(chunk.isfinite().all() for chunk in chunks)
    return torch.cat(chunks, dim=2)


@on_both
def test_two_chunks(device):
    """In the device's own dtype: bf16 on a card, which is near the CPU's fp32."""
    expected = rollout("cpu")
    error = (rollout(device) - expected).norm() / expected.norm()
    check(f"two chunks on {device}, relative rms", error, torch.tensor(0.0), 0.0 if device == "cpu" else 0.1)


@on_both
def test_no_step_waits(device, monkeypatch):
    """torch's own alarm is on from a step's begin to the network's end; tests/test_card.py counts the same without a card."""
    original, calls = Helios.forward, []
    alarm = torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None

    def forward(self, *given):
        alarm("error")
        try:
            return original(self, *given)
        finally:
            alarm("default")
            calls.append(1)

    monkeypatch.setattr(Helios, "forward", forward)
    rollout(device, lambda chunk, stage, step: alarm("error"))
    assert len(calls) == 3 * 4 + 3 * 2
    assert device == "cpu" or "torch.cuda" in sys.modules
