"""The weights that come with the code: every tensor of every file is whole, fits its network and is finite."""

import json
from pathlib import Path

import peers
import pytest
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from goldens import check
from safetensors.torch import load_file

from files.checkpoint import load, weight_files
from geometry.pi3x import load_pi3x
from helios.load import load_models
from helios.text import Tokenizer, UMT5Encoder
from helios.vae import VAE, ResidualBlock
from mini.latents import load_codec
from mini.world import make_clip
from model import Helios
from wah import CHUNK, pseudo_history

SHIPPED = Path(__file__).parents[2] / "weights" / "mini"
FILES = sorted(path.relative_to(SHIPPED) for path in SHIPPED.rglob("*.safetensors"))
NETWORKS = {"transformer": Helios, "vae": VAE, "text_encoder": UMT5Encoder}


def test_which_files_there_are():
    """Those of the networks, of the geometry, and the codec of its training; each is read below."""
    networks = {file.relative_to(SHIPPED) for part in NETWORKS for file in weight_files(SHIPPED / part)}
    assert set(FILES) == networks | {Path("Pi3X/model.safetensors"), Path("codec.safetensors")}


@pytest.mark.parametrize("name", FILES, ids=str)
def test_every_number_is_finite(name):
    tensors = load_file(SHIPPED / name)
    assert tensors and all(tensor.numel() for tensor in tensors.values())
    assert not [key for key, tensor in tensors.items() if not tensor.float().isfinite().all()]
    assert any(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("part", NETWORKS)
def test_networks_have_every_tensor(part):
    """Strict loading names what is missing, unexpected or mis-shaped; what is loaded is what the file holds."""
    network = load(NETWORKS[part], SHIPPED / part)
    state = {key: value for file in weight_files(SHIPPED / part) for key, value in load_file(file).items()}
    loaded = network.state_dict()
    assert loaded.keys() == {network.aliases.get(key, key) for key in state}
    assert all(torch.equal(loaded[network.aliases.get(key, key)], value.float()) for key, value in state.items())


def test_the_vae_encodes_as_the_codec_does():
    """By its shortcuts alone."""
    codec, frames = load_codec(SHIPPED / "codec.safetensors"), make_clip(3, 9, (64, 96)).frames
    vae, expected = load_models(Helios, SHIPPED, "cpu").vae, codec.encode(frames[None])
    latents, _ = vae.encode(rearrange(frames, "t h w c -> 1 c t h w") / 127.5 - 1)
    assert all(block.idle for block in vae.encoder.modules() if isinstance(block, ResidualBlock))
    assert (latents - expected).square().mean() < 1e-4 * expected.square().mean()


def test_diffusers_agrees():
    """It is a Helios like any other: diffusers' own class, told which tokens are dropped, gives the same."""
    transformer, generator = load(Helios, SHIPPED / "transformer"), torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    first, past, warp, noisy = (draw(1, transformer.config.in_channels, frames, 8, 12) for frames in (1, 3, CHUNK, CHUNK))
    visible = (torch.rand(1, 1, CHUNK, 8, 12, generator=generator) > 0.8).float()
    history = pseudo_history(first, past, warp=warp, visible=visible, threshold=0.3)
    time, words = torch.tensor([700.0]), draw(1, 6, transformer.config.text_dim)
    with torch.no_grad():
        ours = transformer(noisy, time, transformer.text(words), transformer.context(history, noisy.shape[2:]))
        theirs = peers.Denoiser(peers.twin(transformer))(noisy, time, words, history)
    check("the miniature, diffusers", ours, theirs, 2e-5)


def test_diffusers_agrees_on_the_vae():
    """It is the official class, with the patches of Wan 2.2."""
    vae, clip = load(VAE, SHIPPED / "vae"), make_clip(3, 5, (64, 96)).frames
    peer = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(SHIPPED / "vae")).eval()
    peer.load_state_dict(vae.state_dict())
    with torch.no_grad():
        video = rearrange(clip, "t h w c -> 1 c t h w") / 127.5 - 1
        latents = peer.encode(video).latent_dist.mean
        check("the miniature's VAE, diffusers", vae.encode(video)[0], latents, 1e-3)
        check("the miniature's VAE, diffusers", vae.decode(latents), peer.decode(latents).sample, 1e-4)


def test_geometry_and_codec():
    geometry = load_pi3x(SHIPPED / "Pi3X" / "model.safetensors").eval()
    with torch.inference_mode():
        prediction = geometry(torch.rand(1, 1, 3, 42, 56, generator=torch.Generator().manual_seed(0)))
    assert prediction.points.isfinite().all() and (prediction.local_points[..., 2] > 0).all()
    codec = load_codec(SHIPPED / "codec.safetensors")
    assert codec is not None
    tokens = Tokenizer(SHIPPED / "tokenizer")("a red ball in a room")
    encoder = json.loads((SHIPPED / "text_encoder" / "config.json").read_text())
    assert len(tokens) > 2 and max(tokens) < encoder["vocab_size"]
