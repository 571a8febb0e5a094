"""The realtime recipe: the warp in the mid band, by hand and through diffusers; its preset; its LoRA."""

import shutil

import peers
import pytest
import torch
from goldens import DISTILLED, HELIOS, INPUTS, SIZE, check
from PIL import Image
from safetensors.torch import load_file, save_file
from taehv_weights import tensors
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from files.checkpoint import on_meta
from files.media import fit_image
from geometry.camera import WINDOW
from helios.load import load_models
from job import load_settings
from model import Helios, HeliosConfig, pool
from render import make_warp
from sample import main, parse
from wah import BANDS, CHUNK, Options, Rollout, pseudo_history

GENERATOR = torch.Generator().manual_seed(5)


def latents(frames: int, size: tuple[int, int] = (8, 16)) -> torch.Tensor:
    return torch.randn(1, 16, frames, *size, generator=GENERATOR)


@pytest.fixture(scope="module")
def transformer() -> Helios:
    return load_models(Helios, DISTILLED, "cpu").transformer


def test_the_bands_by_hand():
    """Short: the first frame and the latest; mid: two before it and the warp, at the target's times."""
    first, past, warp = latents(1), latents(19), latents(CHUNK)
    visible = torch.rand(1, 1, CHUNK, 8, 16, generator=GENERATOR)
    history = pseudo_history(first, past, BANDS, warp, visible, warp_band="mid", threshold=0.6)
    assert torch.equal(history.short.latents, torch.cat([first, past[:, :, 18:]], 2))
    assert history.short.indices.tolist() == [0, 19]
    assert torch.equal(history.mid.latents, torch.cat([past[:, :, 16:18], warp], 2))
    assert history.mid.indices.tolist() == [17, 18, *range(20, 29)]
    assert torch.equal(history.mid.visible, torch.cat([torch.ones(1, 1, 2, 8, 16), visible], 2))
    assert history.long.indices.tolist() == list(range(1, 17)) and history.indices.tolist() == list(range(20, 29))


@pytest.mark.parametrize("earlier", [3, 19])
def test_diffusers_agrees(transformer, earlier):
    """The same history through diffusers' transformer, with the tokens dropped that a mean over 2x4x4 calls invisible."""
    visible = (torch.rand(1, 1, CHUNK, 1, 1, generator=GENERATOR) > 0.3).float().expand(-1, -1, -1, 8, 16).clone()
    visible[..., :7] = 1
    history = pseudo_history(latents(1), latents(earlier), BANDS, latents(CHUNK), visible, warp_band="mid", threshold=0.6)
    noisy, time = latents(CHUNK), torch.tensor([700.0])
    words = torch.randn(1, 6, transformer.config.text_dim, generator=GENERATOR)
    with torch.no_grad():
        ours = transformer(noisy, time, transformer.text(words), transformer.context(history, noisy.shape[2:]))
        theirs = peers.Denoiser(peers.twin(transformer))(noisy, time, words, history)
    check("warp in the mid band, diffusers", ours, theirs, 2e-5)
    kept = (pool(history.mid.visible, (2, 4, 4)) >= 0.6).sum()
    assert 0 < kept < 6 * 2 * 4  # 11 frames are padded to 12


def test_tokens_and_work_at_full_size():
    """With everything visible and all of the past there, at 384x640: 3600 history tokens instead of 11040."""
    helios = on_meta(lambda: Helios(HeliosConfig()))
    counts = {}
    for band in ("short", "mid"):
        with torch.device("meta"):
            first, past, warp = (torch.empty(1, 16, frames, 48, 80) for frames in (1, 19, CHUNK))
            history = pseudo_history(first, past, BANDS, warp, torch.ones(1, 1, CHUNK, 48, 80), warp_band=band, drop=False)
            context = helios.context(history, (CHUNK, 12, 20))
        counts[band] = context.tokens.shape[1], helios.flops(context)
    assert counts["short"][0] == 11040 and counts["mid"][0] == 3600
    assert counts["mid"][1] < 0.4 * counts["short"][1]


def work(models, prompts, preset: str) -> list[tuple[int, int, int, float]]:
    """Of two chunks of the golden model, all of the warp visible: calls, history and all tokens of the first call, and
    the calls' operations as torch counts them."""
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # absent from torch's own table
              lambda q, k, v, *rest, out_shape, **options: sdpa_flop_count(q, k, v)}
    image = fit_image(Image.fromarray(INPUTS["image"]), SIZE)
    rollout = Rollout(models, prompts, SIZE, torch.Generator().manual_seed(0), image, options=settings(f"preset={preset}"))
    calls = []

    def count(network, arguments) -> None:
        calls.append((arguments[3].tokens.shape[1], arguments[3].rope.shape[0]))

    hook, table = models.transformer.register_forward_pre_hook(count), []
    try:
        for _ in range(2):
            calls.clear()
            with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
                rollout.next(warp=make_warp(INPUTS["warp"][:WINDOW], None, SIZE))
            counted = sum(counter.get_flop_counts()["Helios"].values())
            table.append((len(calls), *calls[0], counted / 1e9))
    finally:
        hook.remove()
    return table


def test_tokens_and_work_of_the_golden_model(models, prompts):
    """A chunk of the realtime recipe beside the official one's (docs/realtime.md)."""
    official, realtime = (work(models, prompts, preset) for preset in ("official", "realtime"))
    assert [row[:3] for row in official] == [(12, 352, 370), (6, 364, 382)]
    assert [row[:3] for row in realtime] == [(3, 104, 122), (3, 114, 132)]
    assert [round(row[3], 3) for row in official + realtime] == [0.616, 0.311, 0.129, 0.13]


def test_random_draws_are_the_same_in_both_bands(models, prompts):
    image, states = fit_image(Image.fromarray(INPUTS["image"]), SIZE), []
    for band in ("short", "mid"):
        generator = torch.Generator().manual_seed(0)
        rollout = Rollout(models, prompts, SIZE, generator, image, options=settings("steps=1,1,1", f"warp_band={band}"))
        rollout.next(warp=make_warp(INPUTS["warp"][:WINDOW], None, SIZE))
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_a_pair_must_not_mix_past_and_warp():
    with pytest.raises(ValueError, match="even number of mid frames"):
        Options(warp_band="mid", previous=(16, 1, 1))
    with pytest.raises(ValueError, match="short or mid"):
        Options(warp_band="long")


def settings(*words: str):
    return load_settings(parse(["--weights", str(DISTILLED), "--set", *words]))


def test_the_preset_is_one_word_for_its_parts():
    fast = settings("preset=realtime")
    assert (fast.warp_band, fast.steps, fast.amplify_first_chunk, fast.threshold, fast.warp_fill, fast.samples,
            fast.geometry_pixels) == ("mid", (1, 1, 1), False, 0.6, "smooth", 2, 130_000)
    other = settings("threshold=0.3", "preset=realtime", "steps=2,1,1")
    assert other.threshold == 0.3 and other.steps == (2, 1, 1) and other.warp_band == "mid"
    assert settings("preset=official") == settings("threshold=0.1")
    with pytest.raises(ValueError, match="official or realtime"):
        settings("preset=slow")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((128, 64), (-2, -1, 1, 1), 40).convert("RGB").save("image.png")
    return tmp_path


def sample(*words: str) -> int:
    return main(["--weights", "weights", "--size", "64x128", "--image", "image.png", "--move", "forward 1", "--frames", "3",
                 "--set", "device=cpu", "geometry_pixels=8000", *words])


def test_a_run_and_its_lora(place, capsys):
    """It runs; a LoRA of the other mode is refused; auto takes the one that fits."""
    shutil.copytree(DISTILLED, "weights/model")
    (place / "weights" / "warp-as-history").mkdir()
    released = place / "weights" / "warp-as-history" / "visible_lora_state_step1000_efficient_patchmid.pt"
    torch.save(load_file(HELIOS / "lora_noprefix.safetensors"), released)
    ours = load_file(HELIOS / "lora_noprefix.safetensors")
    save_file(ours, "weights/model/lora.safetensors", {"wah_warp_band": "short"})
    save_file(ours, "mid.safetensors", {"wah_warp_band": "mid"})

    def run(*words: str) -> tuple[int, str]:
        status = sample("preset=realtime", "geometry_pixels=8000", "--weights", "weights/model", *words)
        said = capsys.readouterr()
        return status, said.out if status == 0 else said.err.strip().splitlines()[-1]

    status, out = run()
    assert status == 0 and f"LoRA {released.relative_to(place)}" in out and "preset realtime but geometry_pixels=8000\n" in out
    assert run("--lora", "mid.safetensors")[0] == 0
    status, error = run("--lora", "weights/model/lora.safetensors")
    assert status == 2 and "short band" in error and "--set warp_band=short" in error
    status, error = run("--lora", str(released), "--set", "preset=official")
    assert status == 2 and "warp_band=mid" in error


@pytest.mark.parametrize("vae", ["taehv", "taehv-decode"])
def test_a_run_with_the_tiny_decoder(place, capsys, vae):
    """Latents are the VAE's only where it encodes; without the file one line says so."""
    shutil.copytree(DISTILLED, "weights")
    assert sample(f"vae={vae}") == 2 and "taew2_1" in capsys.readouterr().err
    save_file(tensors(), "weights/taew2_1.safetensors")
    assert sample("latents=whole.safetensors", "--out", "whole.mp4") == 0
    assert sample(f"vae={vae}", "latents=tiny.safetensors", "--out", "tiny.mp4") == 0
    same = torch.equal(load_file("whole.safetensors")["latents"], load_file("tiny.safetensors")["latents"])
    assert same == (vae == "taehv-decode")
    assert (place / "whole.mp4").read_bytes() != (place / "tiny.mp4").read_bytes()
    capsys.readouterr()
    (place / "weights" / "taew2_1.safetensors").rename("taew2_1.safetensors")  # where it may be, too
    assert sample(f"vae={vae}", "latents=taew2_1.safetensors", "--out", "again.mp4") == 2
    assert "would overwrite" in capsys.readouterr().err
