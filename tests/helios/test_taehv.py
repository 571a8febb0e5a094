"""The tiny autoencoder, against all frames at once as its published shapes say, and in a run."""

import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from goldens import DISTILLED, check
from safetensors.torch import save_file
from taehv_weights import tensors

from helios.load import load_models
from helios.taehv import load_taehv
from model import Helios


def at_once(x: torch.Tensor, state: dict[str, torch.Tensor], part: str, plan: str) -> torch.Tensor:
    """All frames [T, C, H, W] through a half, layer by layer, as the words of `plan` say."""
    def conv(name, x, **more):
        weight = state[f"{part}.{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{part}.{name}.bias"), padding=weight.shape[-1] // 2, **more)

    for index, word in enumerate(plan.split()):
        if word == "squash":
            x = 3 * torch.tanh(x / 3)
        elif word == "relu":
            x = F.relu(x)
        elif word == "block":
            y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
            for place in (0, 2):
                y = F.relu(conv(f"{index}.conv.{place}", y))
            x = F.relu(conv(f"{index}.conv.4", y) + x)
        elif word == "up":
            x = F.interpolate(x, scale_factor=2)
        elif match := re.fullmatch(r"pool(\d)", word):
            x = conv(f"{index}.conv", x.reshape(-1, int(match[1]) * x.shape[1], *x.shape[2:]))
        elif match := re.fullmatch(r"grow(\d)", word):
            x = conv(f"{index}.conv", x).reshape(-1, x.shape[1], *x.shape[2:])
        else:
            x = conv(str(index), x, stride=2 if word == "half" else 1)
    return x


THREE = "block block block"
ENCODE = f"conv relu pool2 half {THREE} pool2 half {THREE} pool1 half {THREE} conv"
DECODE = f"squash conv relu {THREE} up grow1 conv {THREE} up grow2 conv {THREE} up grow2 conv relu conv"


@pytest.fixture(params=["safetensors", "pth"])
def file(request, tmp_path):
    path = tmp_path / f"taew2_1.{request.param}"
    save = save_file if request.param == "safetensors" else torch.save
    save(tensors(), path)
    return path


def test_it_is_what_all_frames_at_once_give(file):
    taehv = load_taehv(file).double()  # random weights make large numbers, which are cut to 0..1 at the end
    state = {key: tensor.double() for key, tensor in tensors().items()}
    video = torch.rand(1, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    padded = torch.cat([video[0, :, :1]] * 3 + [video[0]], 1).transpose(0, 1) / 2 + 0.5
    latents = at_once(padded, state, "encoder", ENCODE)
    mean, logvar = taehv.encode(video)
    ours = taehv.sample(mean, logvar, torch.randn_like(mean))
    check("TAEHV encodes", ours, latents.transpose(0, 1)[None], 1e-9)
    wide = ours * 4  # beyond 3, where they are squashed
    expected = at_once(wide[0].transpose(0, 1), state, "decoder", DECODE)[3:].clamp(0, 1) * 2 - 1
    decoded = taehv.decode(taehv.denormalize(wide))
    check("TAEHV decodes", decoded, expected.transpose(0, 1)[None], 1e-9)
    assert decoded.shape == video.shape and decoded.std() > 0.1


def test_frames_come_as_soon_as_they_are_known(tmp_path):
    save_file(tensors(), tmp_path / "taew2_1.safetensors")
    taehv = load_taehv(tmp_path / "taew2_1.safetensors")
    latents, calls = torch.randn(1, 16, 4, 2, 2), []
    taehv.decoder[1].register_forward_hook(lambda *_: calls.append(1))
    stream = taehv.decode_stream(latents)
    next(stream)
    assert len(calls) == 1
    assert len([*stream]) == 12 and len(calls) == 4


@pytest.mark.parametrize("change, words", [
    ({"decoder.3.conv.0.weight": torch.zeros(12, 12, 3, 3)}, "shape [12, 12, 3, 3], expected [12, 24, 3, 3]"),
    ({"decoder.3.conv.0.weight": None}, "missing decoder.3.conv.0.weight"),
    ({"decoder.1.weight": None}, "no convolution decoder.1.weight"),
    ({"more": torch.zeros(1)}, "unexpected more"),
])
def test_what_does_not_fit_is_named(tmp_path, change, words):
    path = tmp_path / "taew2_1.safetensors"
    save_file({key: value for key, value in {**tensors(), **change}.items() if value is not None}, path)
    with pytest.raises(ValueError) as error:
        load_taehv(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_which_half_it_takes(tmp_path):
    """Beside the weights it is found; `taehv-decode` leaves encoding to the VAE; other channels are refused."""
    weights = shutil.copytree(DISTILLED, tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="taew2_1"):
        load_models(Helios, weights, "cpu", vae="taehv")
    save_file(tensors(), tmp_path / "taew2_1.safetensors")
    whole, half, none = (load_models(Helios, weights, "cpu", vae=vae) for vae in ("taehv", "taehv-decode", "wan"))
    kinds = [[type(network).__name__ for network in (models.vae, models.decoder)] for models in (whole, half, none)]
    assert kinds == [["TAEHV", "TAEHV"], ["VAE", "TAEHV"], ["VAE", "NoneType"]]
    save_file(tensors(channels=12), tmp_path / "taew2_1.safetensors")
    with pytest.raises(ValueError, match="12 channels, expected 16"):
        load_models(Helios, weights, "cpu", vae="taehv")
