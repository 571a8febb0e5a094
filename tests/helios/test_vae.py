"""The VAE against the official numbers, against diffusers on other sizes, and its bounded memory."""

import hashlib
import weakref
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from goldens import DISTILLED, HELIOS, cases, check, tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from files.checkpoint import load
from helios.vae import VAE, EnlargingConv, TimeConv, VAEConfig

CASES = cases(HELIOS / "vae_cases.json")
GOLDEN = tensors(HELIOS / "vae.safetensors")


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vae() -> VAE:
    return load(VAE, DISTILLED / "vae", torch.device("cpu"))


def formula_video(shape: list[int]) -> tuple[torch.Tensor, str]:
    """The goldens' input video in [-1, 1] and the hash of its bytes."""
    c, t, y, x = torch.meshgrid(*(torch.arange(size) for size in shape[1:]), indexing="ij")
    video = ((3 * x + 5 * y + 7 * t + 41 * c + x * y // (5 + c)) % 256).to(torch.uint8)[None]
    return video / 127.5 - 1, hashlib.sha256(video.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", CASES)
def test_golden(vae, name):
    case, frames = CASES[name], name.removeprefix("F")
    video, sha16 = formula_video(case["video_shape"])
    assert sha16 == case["video_uint8_sha16"]

    mean, logvar = vae.encode(video)
    check("VAE encode", mean, GOLDEN[f"enc{frames}.mean"], 5e-5)
    check("VAE encode", mean, GOLDEN[f"enc{frames}.mode"], 5e-5)
    check("VAE encode", logvar, GOLDEN[f"enc{frames}.logvar"], 5e-5)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    check("VAE sample", vae.sample(mean, logvar, noise), GOLDEN[f"enc{frames}.sample_seed5"], 5e-5)

    decoded = vae.decode(GOLDEN[f"enc{frames}.mode"])
    assert list(decoded.shape) == case["decoded_shape"]
    stored = case["stored_decoded_frames"]
    check("VAE decode", decoded if stored == "all" else decoded[:, :, stored], GOLDEN[f"dec{frames}.frames"], 1e-4)
    assert (decoded.abs() == 1).double().mean().item() == pytest.approx(case["clipped_fraction"], abs=1e-4)


def test_normalisation(vae):
    """Against the formulas in float64, with the checkpoint's own statistics; and there and back again."""
    latents = torch.randn(1, vae.config.z_dim, 2, 3, 4, generator=torch.Generator().manual_seed(3))
    statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float64)
    mean, std = statistics.view(2, 1, -1, 1, 1, 1)
    check("VAE normalisation", vae.normalize(latents), (latents.double() - mean) / std, 5e-6)
    check("VAE normalisation", vae.denormalize(latents), latents.double() * std + mean, 5e-6)
    check("VAE normalisation", vae.denormalize(vae.normalize(latents)), latents, 5e-6)


def test_sample_clamps_logvar(vae):
    logvar = torch.tensor([-1e4, 0.0, 1e4])
    sample = vae.sample(torch.zeros(3), logvar, torch.ones(3))
    check("VAE sample", sample / torch.tensor([-15.0, 0.0, 10.0]).exp(), torch.ones(3), 1e-6)


@pytest.mark.parametrize(
    "options, size",
    [
        (dict(base_dim=8, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]), (16, 24)),
        (dict(base_dim=6, dim_mult=[1, 3, 2, 4], num_res_blocks=1, temperal_downsample=[True, True, False]), (24, 16)),
        (dict(base_dim=4, dim_mult=[2, 1, 4], num_res_blocks=1, temperal_downsample=[True, True], z_dim=16), (20, 12)),
        (dict(base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=2, temperal_downsample=[False, True], z_dim=16), (8, 8)),
        (dict(base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], patch_size=2,
              in_channels=12, out_channels=12), (16, 24)),
    ],
    ids=["wan", "time first", "three levels", "half time", "patches"],
)
def test_equals_diffusers(options, size):
    torch.manual_seed(1)
    peer = AutoencoderKLWan(**options).eval()
    for parameter in peer.parameters():  # norms and biases too
        parameter.add_(0.2 * torch.randn_like(parameter) if parameter.ndim < 5 or parameter.shape[1] == 1 else 0)
    vae = VAE(VAEConfig(**options))
    vae.load_state_dict(peer.state_dict(), strict=True)
    video = 2 * torch.rand(1, 3, 13, *size) - 1
    posterior = peer.encode(video).latent_dist
    mean, logvar = vae.encode(video)
    scale = posterior.mean.abs().max()
    check("VAE encode (diffusers, random)", mean / scale, posterior.mean / scale, 5e-6)
    check("VAE encode (diffusers, random)", logvar / scale, posterior.logvar / scale, 5e-6)
    decoded = peer.decode(posterior.mean).sample
    assert (decoded.abs() < 1).double().mean() > 0.2  # the clamp does not hide the comparison
    check("VAE decode (diffusers, random)", vae.decode(posterior.mean), decoded, 5e-5)


def test_surplus_frames_are_ignored(vae):
    video, _ = formula_video([1, 3, 8, 16, 16])
    for frames in (6, 7, 8):
        assert torch.equal(vae.encode(video[:, :, :frames])[0], vae.encode(video[:, :, :5])[0])


def test_branches_that_add_nothing_are_passed_by(vae):
    """With the same result, bit for bit, and the others stay."""
    vae, (video, _) = deepcopy(vae), formula_video([1, 3, 9, 16, 24])
    block, other = vae.encoder.mid_block.resnets
    with torch.no_grad():
        block.conv2.weight.zero_()
    expected = vae.encode(video)[0]
    assert torch.equal(vae.find_idle().encode(video)[0], expected)
    assert block.idle and not other.idle
    with torch.no_grad():
        block.conv2.bias += 1
    assert not torch.equal(vae.encode(video)[0], expected)


def test_causal_and_stateless(vae):
    """Later frames change nothing before them, and no call leaves anything behind for the next one."""
    video, _ = formula_video([1, 3, 9, 16, 24])
    mean, logvar = vae.encode(video)
    assert torch.equal(vae.encode(video[:, :, :5])[0], mean[:, :, :2])
    stream = vae.decode_stream(mean)
    parts = [next(stream)]
    vae.decode(mean.flip(2))  # another one in between
    parts += stream
    assert [part.shape[2] for part in parts] == [1] * 9
    assert torch.equal(torch.cat(parts, dim=2), vae.decode(mean))
    assert torch.equal(vae.encode(video)[1], logvar)


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes that were alive at once in tensors made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:  # neither a view nor in place
                storage = leaf.untyped_storage()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, size: int) -> None:
        self.now -= size


def test_memory_does_not_grow_with_the_length(vae):
    """Peak of 65 frames against 17: encoding keeps only its (tiny) latents, streamed decoding nothing at all."""
    video, _ = formula_video([1, 3, 65, 32, 48])
    latents = torch.randn(1, vae.config.z_dim, 17, 4, 6)

    def peaks(frames: int) -> tuple[int, int]:
        with PeakMemory() as encoding:
            vae.encode(video[:, :, :frames])
        with PeakMemory() as decoding:
            for _ in vae.decode_stream(latents[:, :, : 1 + (frames - 1) // 4]):
                pass
        return encoding.peak, decoding.peak

    (encode_short, decode_short), (encode_long, decode_long) = peaks(17), peaks(65)
    frame = 4 * vae.config.base_dim * 32 * 48  # bytes of one frame of the widest activation
    assert encode_short > 6 * frame and decode_short > 6 * frame  # the measure sees the activations
    moments = 12 * 2 * vae.config.z_dim * 4 * 6 * 4  # of the latent frames that are more
    assert encode_long - encode_short <= 3 * moments  # and their copies
    assert decode_long == decode_short

    peer = AutoencoderKLWan(base_dim=vae.config.base_dim, num_res_blocks=vae.config.num_res_blocks)
    with PeakMemory() as encoding:
        peer.encode(video[:, :, :17])
    with PeakMemory() as decoding:
        peer.decode(latents[:, :, :5])
    assert encode_short < 0.6 * encoding.peak and decode_short < 0.6 * decoding.peak


def test_less_arithmetic_than_the_definition_says():
    """Of three time taps a pair of frames costs two each, and of a doubled picture's nine taps four are left."""
    torch.manual_seed(0)
    conv, frames, cache = TimeConv(4, 5, 3).double(), torch.randn(4, 1, 4, 6, 8).double().split(1), {}
    frames = [frame[0] for frame in frames]
    expected = F.pad(torch.stack(frames, dim=2), (0, 0, 0, 0, 2, 0))
    expected = F.conv3d(expected, conv.weight, conv.bias, padding=conv.padding).unbind(2)
    single = 2 * 9 * 4 * 5 * 6 * 8
    for group, convolutions in ((frames[:2], 1 + 2), (frames[2:], 4)):
        with FlopCounterMode(display=False) as counter:
            for ours, theirs in zip(conv(group, cache), expected[:2] if group[0] is frames[0] else expected[2:]):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        assert counter.get_total_flops() == convolutions * single

    enlarging, picture = EnlargingConv(4, 5).double(), torch.randn(2, 4, 6, 8).double()
    with FlopCounterMode(display=False) as counter:
        ours = enlarging(picture)
    large = F.interpolate(picture, scale_factor=2)
    torch.testing.assert_close(ours, F.conv2d(large, enlarging.weight, enlarging.bias, padding=1), rtol=0, atol=1e-12)
    assert counter.get_total_flops() == 2 * 4 * (2 * 4 * 5 * 12 * 16)


def test_full_size_names_and_shapes():
    with torch.device("meta"):
        ours = VAE(VAEConfig())
        peer = AutoencoderKLWan()
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert len(shapes) == 194 and sum(parameter.numel() for parameter in ours.parameters()) == 126_892_531
    assert not list(ours.buffers())
    assert shapes == {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}
    for name, shape in {  # of the specification, not by way of a peer
        "encoder.conv_in.weight": (96, 3, 3, 3, 3),
        "encoder.down_blocks.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.down_blocks.8.time_conv.weight": (384, 384, 3, 1, 1),
        "encoder.mid_block.attentions.0.norm.gamma": (384, 1, 1),
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.up_blocks.1.upsamplers.0.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.up_blocks.3.resnets.2.norm2.gamma": (96, 1, 1, 1),
        "quant_conv.weight": (32, 32, 1, 1, 1),
    }.items():
        assert shapes[name] == shape
    for name in ("latents_mean", "latents_std"):
        assert getattr(VAEConfig(), name) == tuple(getattr(peer.config, name))


@pytest.mark.parametrize("key, value", [("attn_scales", [1.0]), ("is_residual", True), ("decoder_base_dim", 8)])
def test_unsupported_variants_are_named(key, value):
    with pytest.raises(ValueError, match=f"{key} is .*Wan 2.1"):
        VAEConfig(**{key: value})


@pytest.mark.parametrize("key", ["in_channels", "out_channels"])
def test_channels_are_those_of_a_patch(key):
    with pytest.raises(ValueError, match=f"{key} is 3, expected 12"):
        VAEConfig(**{"patch_size": 2, "in_channels": 12, "out_channels": 12, key: 3})
    with pytest.raises(ValueError, match=f"{key} is 4, expected 3"):
        VAEConfig(**{key: 4})
    with pytest.raises(ValueError, match="patch_size is -2"):
        VAEConfig(patch_size=-2, in_channels=12, out_channels=12)


def test_wrong_shapes_are_named(vae):
    for shape in ([1, 3, 5, 20, 16], [2, 3, 5, 16, 16], [1, 1, 5, 16, 16], [3, 5, 16, 16], [1, 3, 0, 16, 16]):
        with pytest.raises(ValueError, match="video is .*multiples of 8"):
            vae.encode(torch.zeros(shape))
    channels = vae.config.z_dim
    for shape in ([1, channels - 1, 2, 2, 2], [2, channels, 2, 2, 2], [1, channels, 0, 2, 2]):
        with pytest.raises(ValueError, match="latents are .*expected"):
            vae.decode(torch.zeros(shape))
