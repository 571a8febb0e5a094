"""The miniature's making: its latent space, its histories, its training loop, and what is exported."""

import json
from copy import deepcopy
from pathlib import Path
from random import Random

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import nn

from helios.index import read_index
from helios.load import load_models
from helios.text import Tokenizer
from helios.vae import VAE
from mini import coding
from mini.encoder import write_encoder
from mini.latents import CHANNELS, FRAMES, SIZE, encode_clip, fit_codec, load_codec, make_parts, save_codec, symmetries
from mini.leaves import make_leaves
from mini.pretrain import (
    HELD_OUT,
    VAE_CONFIG,
    Clips,
    Generator,
    Recipe,
    decoder_losses,
    draw_start,
    export,
    fit,
    history,
    make_tokenizer,
    save_state,
    velocity_loss,
)
from mini.world import caption, make_clip, make_scene
from model import Helios
from render import smooth_fill
from sample import main as sample
from wah import Options, Rollout, model_options

GRID = SIZE[0] // 8, SIZE[1] // 8
SMALL = 64, 96  # where the size does not matter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A codec of a few clips, a tokenizer, and one file of three clips."""
    folder = tmp_path_factory.mktemp("mini")
    save_codec(fit_codec(range(HELD_OUT, HELD_OUT + 12)), folder / "codec.safetensors")
    make_tokenizer(folder, [caption(make_scene(Random(seed))) for seed in range(300)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini.latents.PART", 3)
        make_parts(load_codec(folder / "codec.safetensors"), folder, range(1))
    return folder


@pytest.fixture(scope="module")
def clips(folder):
    return Clips(folder, Tokenizer(folder))


def test_symmetries_are_linear_maps_of_the_latents(clips):
    """Of this codec, too, whose 32nd and 33rd components would be a pair."""
    frames, codec = make_clip(3, 9, SIZE).frames, clips.codec
    for which, (flip, order) in enumerate(symmetries()):
        turned = frames[..., list(order)]
        turned = turned.flip(-2) if flip else turned
        actual, expected = codec.transform(codec.encode(frames), which), codec.encode(turned)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_latents_of_a_clip(clips):
    """The layout of the VAE: the first latent is the first frame's alone, in every chunk of both directions."""
    latents, words = encode_clip(clips.codec, 0)
    assert latents.shape == (2, 3, CHANNELS, 9, *GRID) and words == clips.captions[0]
    torch.testing.assert_close(torch.from_numpy(clips.clips[0].copy()).float(), latents, rtol=0, atol=2e-2)
    clip = make_clip(0, FRAMES, SIZE)
    torch.testing.assert_close(latents[0, 1, :, :1], clips.codec.encode(clip.frames[33:34]), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents[1, 0, :, :1], clips.codec.encode(clip.frames[-1:]), rtol=0, atol=1e-5)
    restored, wanted = clips.codec.decode(latents[0, 0]), clip.frames[:33] / 127.5 - 1
    assert (restored - wanted).square().mean() < 0.02


def test_every_fourth_clip_is_of_dead_leaves(clips):
    latents, words = encode_clip(clips.codec, 7)
    torch.testing.assert_close(latents[0, 0], clips.codec.encode(make_leaves(7, FRAMES, SIZE)[:33]), rtol=0, atol=1e-5)
    assert words == ""


def test_training_histories_are_those_of_a_rollout(folder, exported):
    """A continued clip sees what `Rollout.native_history` shows before a later chunk."""
    models = load_models(Helios, exported, "cpu")
    latents = torch.randn(3, CHANNELS, 9, *GRID)
    rollout = Rollout(models, None, SIZE, torch.Generator(), options=Options(steps=(1,)))
    rollout.prefix = latents[None, 0, :, :1]
    rollout.native = torch.cat([torch.zeros(1, CHANNELS, 18, *GRID), rollout.prefix], dim=2)
    rng = Random(0)
    for chunk, kind in ((0, "image"), (1, "continue"), (2, "continue")):
        expected = rollout.native_history()
        rollout.native = torch.cat([rollout.native, latents[None, chunk]], dim=2)[:, :, -19:]
        for _ in range(1000):  # until the draw is this chunk, from the clip's beginning, with the whole history
            target, prefix, native = draw_start(latents, rng, kind)
            actual = history(prefix[None], native[None], bands=True)
            if torch.equal(target, latents[chunk]) and torch.equal(actual.long.latents, expected.long.latents):
                break
        for name in ("short", "mid", "long"):
            ours, theirs = getattr(actual, name), getattr(expected, name)
            assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.indices, theirs.indices), name
        assert torch.equal(actual.indices, expected.indices)


def test_batches(clips):
    batch = clips.batch(Random(1), torch.Generator().manual_seed(1), 8, "continue")
    assert batch["clean"].shape == (8, CHANNELS, 9, *GRID) and batch["native"].shape == (8, CHANNELS, 19, *GRID)
    assert {"", *clips.captions} >= set(batch["captions"]) and "" in batch["captions"]
    again = clips.batch(Random(1), torch.Generator().manual_seed(1), 8, "continue")
    assert torch.equal(batch["native"], again["native"])
    text = clips.batch(Random(1), torch.Generator().manual_seed(1), 8, "text")
    assert not text["native"].any() and "" not in text["captions"]


def test_fit_goes_on_where_it_stopped(tmp_path):
    """Two steps and then two more are four, bit for bit, for both optimisers and the average."""

    def run(path, *stops):
        for steps in stops:
            torch.manual_seed(0)
            layers = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten())
            network = nn.ModuleDict({"layers": layers, "head": nn.Linear(6, 1)})

            def accumulate(network, step, rank):
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
                loss = (network["head"](network["layers"](x).tanh()) - x[:, :1]).square().mean()
                loss.backward()
                return loss.item()

            fit(network, accumulate, lambda averaged: {"mean": averaged["head"].weight.mean().item()},
                Recipe(steps, 1, warmup=1, every=1), path)
        return load_file(path), [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]

    (straight, log), (broken, other) = run(tmp_path / "a.safetensors", 4), run(tmp_path / "b.safetensors", 2, 4)
    assert straight.keys() == broken.keys()
    assert [[*value.shape] for key, value in straight.items() if "momentum" in key] == [[6, 6], [2, 6]]  # Muon's
    torch.manual_seed(0)
    fresh = nn.Linear(6, 6), nn.Conv1d(2, 2, 3)
    for layer, index in zip(fresh, (0, 2)):
        assert 1e-4 < (straight[f"network.layers.{index}.weight"] - layer.weight).abs().max() < 0.1
    for key, value in straight.items():
        assert torch.equal(value, broken[key]), key
    assert [{**line, "seconds": 0} for line in log] == [{**line, "seconds": 0} for line in other] and len(log) == 4


def test_training_chooses_its_products(tmp_path, monkeypatch):
    """As all programs do, though these have a start of their own: before the first step."""
    chosen = []
    monkeypatch.setattr("mini.pretrain.choose_products", lambda: chosen.append("products"))

    def accumulate(network, step, rank):
        chosen.append("step")
        return network(torch.ones(1, 2)).sum().item()

    fit(nn.Linear(2, 1), accumulate, lambda averaged: {}, Recipe(1, 1), tmp_path / "a.safetensors")
    assert chosen == ["products", "step"]


@pytest.fixture(scope="module")
def exported(folder):
    torch.manual_seed(0)
    generator, vae = Generator(), VAE(VAE_CONFIG)
    generator.initialize()
    averaged = deepcopy(generator)
    averaged.transformer.proj_out.bias.data.fill_(0.5)  # the average is what is exported
    save_state(folder / "dit.safetensors", 0, generator, averaged, [])
    save_state(folder / "vae.safetensors", 0, vae, deepcopy(vae), [])
    export(folder, folder / "exported")
    return folder / "exported"


def test_an_export_is_a_whole_model(exported, tmp_path, monkeypatch):
    assert load_models(Helios, exported, "cpu").transformer.proj_out.bias.eq(0.5).all()
    assert read_index(exported).size == SIZE and model_options(exported) == Options(steps=(4,), guidance=1.0, warp_fill="smooth")
    shipped = Path(__file__).parents[2] / "weights" / "mini"
    for name in ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((shipped / name).read_text())
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) < 25e6
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    words = ["--image", str(Path(__file__).parents[2] / "data" / "hall.png"), "--prompt", "a room"]
    assert sample([*words, "--weights", str(exported), "--out", "out.mp4"]) == 0
    assert (tmp_path / "out.mp4").is_file()


def test_losses_fall(clips):
    """Some steps on one batch teach the transformer it, and the decoder one clip."""
    torch.manual_seed(0)
    generator, vae = Generator(), VAE(VAE_CONFIG)
    generator.initialize()
    draws = torch.Generator().manual_seed(0)
    batch = clips.batch(Random(0), draws, 2, "image")
    batch |= {name: batch[name][..., :8, :12] for name in ("clean", "prefix", "native")}
    noise, frames = torch.randn(batch["clean"].shape, generator=draws), make_clip(1, 5, SMALL).frames[None]

    def velocity() -> torch.Tensor:
        return velocity_loss(generator, clips, batch, torch.rand(2, generator=draws), noise, True)

    for network, loss_of in ((generator, velocity),
                             (vae.decoder, lambda: sum(decoder_losses(vae, clips.codec, frames, torch.zeros(1))[:2]))):
        optimizer, losses = torch.optim.AdamW(network.parameters(), lr=2e-3), []
        for _ in range(25):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses


def test_batches_are_decoded_as_frames_are():
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG)
    for frames in (1, 3):
        latents = torch.randn(2, CHANNELS, frames, 2, 3)
        expected = torch.cat([vae.decode(each[None]) for each in latents])
        torch.testing.assert_close(coding.decode(vae, latents).clamp(-1, 1), expected, rtol=0, atol=1e-5)


def test_the_written_encoder_is_the_codec(folder):
    """Of clips of the world and of dead leaves, with whatever codec and whatever was in the VAE before."""
    codec = load_codec(folder / "codec.safetensors")
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG)
    write_encoder(vae, codec)
    for clip in (make_clip(1, 9, SMALL).frames, make_leaves(1, 9, SMALL)):
        expected = codec.encode(clip[None])
        mean, logvar = vae.encode(rearrange(clip, "t h w c -> 1 c t h w") / 127.5 - 1)
        assert (mean - expected).square().mean() < 1e-4 * expected.square().mean()
        assert logvar.eq(-30).all()


def test_dead_leaves():
    first, again, other = (make_leaves(seed, 5, (32, 48)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (5, 32, 48, 3) and first.dtype == torch.uint8
    moved = sum((clip[0].int() - clip[-1].int()).abs().float().mean() > 1 for clip in
                (make_leaves(seed, 5, (32, 48)) for seed in range(12)))
    assert moved > 6


def test_holes_are_filled_from_around_them():
    """What is visible stays; a hole takes its neighbours' colours, one between two areas something between."""
    frames, visible = torch.zeros(1, 3, 2, 13, 20), torch.ones(1, 1, 2, 13, 20)
    frames[..., :10], frames[..., 10:] = -0.5, 0.5
    visible[:, :, 0, 4:9, 2:5] = visible[:, :, 0, 3:10, 8:12] = 0
    broken = torch.where(visible > 0, frames, 9.0)
    filled = smooth_fill(broken, visible)
    assert torch.equal(filled[visible.expand_as(filled) > 0], frames[visible.expand_as(frames) > 0])
    torch.testing.assert_close(filled[:, :, 0, 4:9, 2:5], frames[:, :, 0, 4:9, 2:5], rtol=0, atol=0.02)
    across = filled[0, 0, 0, 6, 8:12]
    assert (across.diff() >= 0).all() and across.abs().max() <= 0.5 and across[0] < 0 < across[-1]
    assert torch.equal(filled[:, :, 1], frames[:, :, 1])
