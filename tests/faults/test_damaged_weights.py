"""One number of the weights that is none: no video, one line that says where, and what was there before stays."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from goldens import DISTILLED, GEOMETRY
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from files.checkpoint import weight_files
from geometry.pi3x import load_pi3x
from geometry.surface import estimate
from helios.load import Models, Prompts, embed_prompts, load_models
from model import Helios
from sample import main
from wah import Options, Rollout

SIZE = 64, 128


@pytest.fixture
def models() -> Models:
    return load_models(Helios, DISTILLED, "cpu")


def spoil(parameter: torch.Tensor) -> None:
    parameter.data.flatten()[0] = math.nan


def rollout(models: Models) -> Rollout:
    image = torch.zeros(1, 3, *SIZE)
    prompts = Prompts(torch.zeros(1, 8, models.transformer.config.text_dim))
    options = Options(steps=(1, 1, 1))
    return Rollout(models, prompts, SIZE, torch.Generator().manual_seed(0), image=image, options=options)


@pytest.mark.parametrize("chunk", (0, 1))
def test_the_transformer(models, chunk):
    made = rollout(models)
    for _ in range(chunk):
        made.next()
    spoil(models.transformer.proj_out.weight)
    steps = 2 if chunk == 0 else 1
    with pytest.raises(ValueError, match=rf"chunk {chunk + 1}: after stage 1 of 3 \({steps} steps\) the latents are not"):
        made.next()
    assert made.chunk == chunk


def test_the_vae(models):
    made = rollout(models)
    spoil(models.vae.decoder.conv_out.weight)
    with pytest.raises(ValueError, match="chunk 1: decoded frames are not finite"):
        made.next()
    assert made.chunk == 0
    spoil(models.vae.encoder.conv_in.weight)
    with pytest.raises(ValueError, match="chunk 1: encoded pictures are not finite"):
        rollout(models)


def test_the_geometry():
    network = load_pi3x(GEOMETRY / "pi3x_weights.safetensors")
    spoil(network.conf_head.output_block[0][0].weight)
    with pytest.raises(ValueError, match="Pi3X: its geometry is not finite"):
        estimate(network, [torch.zeros(1, 3, 56, 84)])


def damaged(folder, part: str, key: str):
    """A copy of the weights with one number that is none."""
    shutil.copytree(DISTILLED, folder)
    for file in weight_files(folder / part):
        state = load_file(file)
        if key in state:
            spoil(state[key])
            save_file(state, file)
            return folder
    raise KeyError(key)


def test_the_text_encoder(tmp_path):
    weights = damaged(tmp_path / "w", "text_encoder", "encoder.final_layer_norm.weight")
    with pytest.raises(ValueError, match="text_encoder: the embedding of 'a' is not finite"):
        embed_prompts(weights, ["a"], "cpu")


def test_what_was_there_stays(tmp_path, monkeypatch, capsys):
    weights = damaged(tmp_path / "w", "transformer", "proj_out.weight")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save("image.png")
    (tmp_path / "out.mp4").write_bytes(b"mine")
    words = "--image image.png --size 64x128 --set device=cpu steps=1,1,1 amplify_first_chunk=false --weights".split()
    assert main([*words, str(weights)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("sample.py: error: chunk 1: after stage 1 of 3 (1 steps)")
    assert (tmp_path / "out.mp4").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "out.mp4", "w"]


def test_a_lora_of_another_model_is_refused_before_weights_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "generate", lambda *args: pytest.fail("weights would be read"))
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save("image.png")
    save_file({f"blocks.99.attn1.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}, "x.safetensors")
    words = "--image image.png --size 64x128 --move hold --lora x.safetensors --set device=cpu --weights".split()
    assert main([*words, str(DISTILLED)]) == 2
    assert "x.safetensors: not a LoRA of this model: no layer blocks.99.attn1.to_q" in capsys.readouterr().err


@pytest.mark.parametrize("part, change, words", [
    ("text_encoder", {"d_model": 64}, "transformer/config.json: text_dim is 32, expected 64 as d_model in text_encoder"),
    ("text_encoder", {"relative_attention_num_buckets": 3}, "text_encoder/config.json: relative_attention_num_buckets"),
    ("vae", {"z_dim": 4, "latents_mean": [0] * 4, "latents_std": [1] * 4}, "in_channels is 16, expected 4 as z_dim in"),
    ("vae", {"latents_std": [0] * 16}, "vae/config.json: latents_std is"),
    ("transformer", {"freq_dim": 1}, "transformer/config.json: freq_dim is 1"),
    ("transformer", {"num_layers": 10**9}, "transformer/config.json: num_layers is 1000000000, expected at most 1000"),
])
def test_configs_are_checked_before_weights_are_read(tmp_path, monkeypatch, capsys, part, change, words):
    monkeypatch.setattr(sample, "generate", lambda *args: pytest.fail("weights would be read"))
    weights = shutil.copytree(DISTILLED, tmp_path / "w")
    config = weights / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert main(["--weights", str(weights), "--set", "device=cpu", "--out", str(tmp_path / "o.mp4")]) == 2
    assert words in capsys.readouterr().err
