"""A rollout beside the official path: a chunk that fails, prompts beside a LoRA, a video that goes on."""

from dataclasses import replace

import pytest
import torch
from goldens import HELIOS, INPUTS, SIZE
from PIL import Image

from files.media import fit_image
from geometry import surface
from geometry.camera import WINDOW, move_path
from helios.lora import Lora, load_lora
from memory import Camera
from model import Helios
from render import make_warp
from wah import Options, Rollout

IMAGE = fit_image(Image.fromarray(INPUTS["image"]), SIZE)
WARP = make_warp(INPUTS["warp"][:WINDOW], None, SIZE)


def new(models, prompts, **given) -> Rollout:
    return Rollout(models, prompts, SIZE, torch.Generator().manual_seed(1), **given)


# ---------------------------------------------------------------------------------------------------- a chunk that fails


class Fault(Exception):
    pass


def fail(*arguments):
    raise Fault


def in_a_step(patch, rollout: Rollout) -> None:
    patch.setattr(rollout, "on_step", lambda chunk, stage, step: fail() if stage == 1 else None)


def in_the_decoder(patch, rollout: Rollout) -> None:
    patch.setattr(rollout.models.vae, "decode", fail)


def after_all(patch, rollout: Rollout) -> None:
    patch.setattr(rollout.camera, "remember", fail)


@pytest.mark.parametrize("where", [in_a_step, in_the_decoder, after_all])
def test_a_failed_chunk_leaves_the_rollout_as_it_was(models, prompts, where):
    """In the first chunk and in a later one: the state is the same, no LoRA stays on, a second try gives its numbers."""
    depth = torch.linspace(3, 1, SIZE[0])[:, None].expand(SIZE)
    geometry = surface.geometry_from_depth(IMAGE, depth, surface.pinhole(60, *SIZE), limit=11_760)
    lora = load_lora(HELIOS / "lora_noprefix.safetensors")
    whole, broken = (new(models, prompts, image=IMAGE, camera=Camera(geometry, SIZE), lora=lora) for _ in range(2))
    for poses in move_path("right 1, right 1").split(WINDOW):
        expected, before = whole.next(poses=poses), {key: value.clone() for key, value in broken.state().items()}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Fault):
            where(patch, broken)
            broken.next(poses=poses)
        after = broken.state()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert models.transformer.blocks[0].attn1.to_q.adapter is None
        actual = broken.next(poses=poses)
        assert torch.equal(actual.latents, expected.latents) and torch.equal(actual.warp.frames, expected.warp.frames)


def test_a_failed_chunk_keeps_its_prompt(models, prompts):
    """A chunk may bring other words; if it fails, the next one without any has those of before."""
    other = replace(prompts, plain=prompts.plain.flip(1), trigger=prompts.trigger.flip(1))
    whole, broken = (new(models, prompts, image=IMAGE) for _ in range(2))
    broken.on_step = fail
    with pytest.raises(Fault):
        broken.next(prompts=other)
    broken.on_step = whole.on_step
    expected = whole.next().latents
    assert torch.equal(broken.next().latents, expected)
    assert not torch.equal(new(models, prompts, image=IMAGE).next(prompts=other).latents, expected)


# ------------------------------------------------------------------------------------------------ prompts beside a LoRA


def text_lora(transformer: Helios) -> Lora:
    """On the layers that make keys and values of the text, which the released LoRA leaves alone."""
    generator, adapters = torch.Generator().manual_seed(2), {}
    for name in (f"blocks.{index}.attn2.{part}" for index in range(len(transformer.blocks)) for part in ("to_k", "to_v")):
        out, into = transformer.get_parameter(f"{name}.weight").shape
        adapters[name] = torch.randn(3, into, generator=generator), torch.randn(out, 3, generator=generator) / 3, 1.0
    return Lora("text", adapters)


def test_keys_of_the_prompts_with_and_without_the_lora(models, prompts):
    """With guidance the first stage's negative prompt has the LoRA's keys, later stages' the model's own."""
    transformer, lora = models.transformer, text_lora(models.transformer)
    options = Options(steps=(1,) * models.schedule.stages, guidance=3.0, amplify_first_chunk=False)
    rollout = new(models, prompts, image=IMAGE, lora=lora, options=options)
    latents = rollout.next(warp=WARP).latents
    cached = {name: keys[0][0] for name, keys in rollout.text_cache.items()}
    assert cached.keys() == {("trigger", True), ("negative", True), ("plain", False), ("negative", False)}
    for (name, with_lora), keys in cached.items():
        transformer.set_lora(lora if with_lora else None)
        with torch.no_grad():
            assert torch.equal(keys, transformer.text(getattr(prompts, name))[0][0])
    transformer.set_lora(None)
    assert not torch.equal(cached["negative", True], cached["negative", False])

    afresh = new(models, prompts, image=IMAGE, lora=lora, options=options)
    afresh.text = lambda name, lora: transformer.text(getattr(prompts, name))  # nothing is kept
    assert torch.equal(afresh.next(warp=WARP).latents, latents)


# -------------------------------------------------------------------------------------------------- a video that goes on


def test_a_video_goes_on_after_its_end(models, prompts):
    """Officially the first latent that continues a video is overwritten with the video's first; here only if asked."""
    video = make_warp(INPUTS["warp"][:2 * WINDOW], None, SIZE).frames
    options = Options(steps=(1,) * models.schedule.stages)
    ours, official = (new(models, prompts, video=video, options=replace(options, restart=restart))
                      for restart in (False, True))
    first, (made, overwritten) = official.first_frame, (rollout.next().latents for rollout in (ours, official))
    assert ours.first_frame is None and torch.equal(overwritten[:, :, :1], first)
    assert torch.equal(made[:, :, 1:], overwritten[:, :, 1:])
    assert (made[:, :, :1] - first).abs().mean() > 0.1
