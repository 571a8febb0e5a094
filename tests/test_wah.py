"""The method and the rollout against the official runs: latents, frames, histories and the order of random draws."""

import gc
import json
import re
import shutil
from dataclasses import replace

import goldens
import numpy as np
import pytest
import torch
from goldens import DISTILLED, HELIOS, INPUTS, SIZE, check
from PIL import Image

from files.media import fit_image
from geometry import surface
from geometry.camera import WINDOW, move_path, normalize, scale_translation
from geometry.pi3x import load_pi3x
from geometry.surface import geometry_from_depth, geometry_size, pinhole
from helios.flow import load_schedule
from helios.index import read_index
from helios.load import encode_prompts
from helios.lora import load_lora
from memory import Camera, Memory
from render import Warp, make_warp, render
from wah import Options, Rollout, mask_latents, model_options

RUNS = goldens.tensors(HELIOS / "pipeline_runs.safetensors")
HISTORIES = goldens.tensors(HELIOS / "pipeline_histories.safetensors")
CASES = goldens.cases(HELIOS / "pipeline_cases.json")


@pytest.fixture
def draws(monkeypatch):
    """The draws of a run as the goldens list them: [kind, shape, dtype]."""
    trace = []
    for name in ("randn", "rand"):
        original = getattr(torch, name)

        def traced(*shape, name=name, original=original, **options):
            result = original(*shape, **options)
            trace.append([name, list(result.shape), str(result.dtype)])
            return result

        monkeypatch.setattr(torch, name, traced)
    return trace


def generator(case: str) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(CASES[case]["desc"]["seed"])


def picture(name: str = "image") -> Image.Image:
    return Image.fromarray(INPUTS[name])


def compare(case: str, given: torch.Tensor, chunks: list, component: str, worst: float = 3e-4, mean: float = 3e-5) -> None:
    """Latents (what was given in front, as the official latent output has it) and, where recorded, frames."""
    latents = torch.cat([given] + [chunk.latents for chunk in chunks], dim=2)
    assert list(latents.shape) == CASES[case]["latents_shape"]
    full = f"{case}.latents" in RUNS
    actual, expected = (latents, RUNS[f"{case}.latents"]) if full else (latents[:, 1::5], RUNS[f"{case}.latents_ch"])
    check(f"{component}, latents, max", actual, expected, worst)
    check(f"{component}, latents, mean", (actual - expected).abs().mean(), torch.tensor(0.0), mean)
    if f"{case}.frames_sub" in RUNS:
        expected = RUNS[f"{case}.frames_sub"]
        frames = torch.cat([chunk.frames for chunk in chunks], dim=2)[0].permute(1, 2, 3, 0).div(2).add(0.5).clamp(0, 1)
        frames = frames[:len(expected), 1::8, 2::8]
        check(f"{component}, frames, max", frames, expected, 3e-4)
        check(f"{component}, frames, mean", (frames - expected).abs().mean(), torch.tensor(0.0), 3e-5)


def warp_of(frames: slice) -> Warp:
    return make_warp(INPUTS["warp"][frames], INPUTS["mask"][frames] / np.float32(255), SIZE)


def history_of(rollout: Rollout) -> list:
    """Collect the first stage's history of every chunk."""
    seen, original = [], rollout.warp_history
    rollout.warp_history = lambda warp: seen.append(original(warp)) or seen[-1]
    return seen


def compare_history(case: str, chunk: int, history) -> None:
    prefix = f"{case}.hist.chunk{chunk}."
    recorded = {key.removeprefix(prefix): value for key, value in HISTORIES.items() if key.startswith(prefix)}
    if not recorded:
        return
    assert torch.equal(history.indices[None], recorded["indices_hidden_states"])
    for name in ("short", "mid", "long"):
        band, indices = getattr(history, name), recorded.get(f"indices_latents_history_{name}")
        assert (band is None) == (indices is None)
        if band is None:
            continue
        assert torch.equal(band.indices[None], indices)
        tolerance = 2e-5 if chunk == 0 else 1e-4
        check(f"history of chunk {chunk}", band.visible, recorded[f"history_visible_mask_{name}"], tolerance)
        for suffix, step in (("", 1), ("_ch", 5)):
            key = f"latents_history_{name}{suffix}"
            if key in recorded:
                check(f"history of chunk {chunk}", band.latents[:, step > 1::step], recorded[key], tolerance)


NAMES = {  # official option -> ours
    "rope_alignment": "align", "visible_token_drop": "drop", "add_noise_to_warp_latents": "warp_noise",
    "warp_noise_sigma_min": "warp_sigma", "warp_noise_sigma_max": "warp_sigma", "prev_chunk_history_sizes": "previous",
    "is_amplify_first_chunk": "amplify_first_chunk", "add_noise_to_image_latents": "image_noise",
    "guidance_scale": "guidance", "zero_steps": "zero_steps",
}
INPUT_NAMES = {"image", "video", "warp_video", "warp_visibility_mask", "lora_path", "prompt", "negative_prompt",
               "num_frames", "is_enable_stage2", "use_zero_init", "pyramid_num_inference_steps_list",
               "num_inference_steps"}


def asked_of(case: str) -> dict:
    return CASES[case]["desc"].get("options", {})


def options_of(case: str, options: Options) -> Options:
    """The recorded options of a run, of which those that are missing are defaults."""
    asked = asked_of(case)
    changes = {NAMES[name]: tuple(value) if isinstance(value, list) else value
               for name, value in asked.items() if name not in INPUT_NAMES}
    if "warp_sigma" in changes:
        low, high = options.warp_sigma
        changes["warp_sigma"] = asked.get("warp_noise_sigma_min", low), asked.get("warp_noise_sigma_max", high)
    steps = asked.get("pyramid_num_inference_steps_list") or [asked.get("num_inference_steps")]
    return replace(options, **changes, **({"steps": tuple(steps)} if None not in steps else {}))


WARPED = [case for case in CASES if "warp_frames" in CASES[case].get("desc", {}) and "warp_video" not in asked_of(case)]


@pytest.mark.parametrize("case", WARPED)
def test_warp_runs(models, prompts, draws, case):
    asked = asked_of(case)
    lora = load_lora(HELIOS / asked["lora_path"]) if "lora_path" in asked else None
    rollout = Rollout(models, prompts, SIZE, generator(case), image=fit_image(picture(), SIZE, crop=False), lora=lora,
                      options=options_of(case, model_options(DISTILLED)))
    histories, chunks = history_of(rollout), []
    for start in range(0, CASES[case]["desc"]["warp_frames"], WINDOW):
        warp = warp_of(slice(start, start + WINDOW))
        if "warp_visibility_mask" in asked:
            warp = make_warp(INPUTS["warp"][:WINDOW], None, SIZE)
        chunks.append(rollout.next(warp=warp))
    compare(case, rollout.given, chunks, "warp runs")
    assert draws == CASES[case]["rng_trace"]
    for index, history in enumerate(histories):
        compare_history(case, index, history)
    if f"{case}.frame_last" in RUNS:
        last = chunks[-1].frames[0, :, -1].permute(1, 2, 0).div(2).add(0.5).clamp(0, 1)
        check("warp runs, frames, max", last, RUNS[f"{case}.frame_last"], 3e-4)


def test_resized_inputs(models, prompts):
    case = "wah_1c_resized_inputs"
    frames, *steps = map(int, re.search(r"mask\[:(\d+), ::(\d+), ::(\d+)\]", CASES[case]["desc"]["note"]).groups())
    mask = INPUTS["mask"][:frames, ::steps[0], ::steps[1]] / np.float32(255)
    warp = make_warp(INPUTS["warp_small"], mask, SIZE)
    rollout = Rollout(models, prompts, SIZE, generator(case), image=fit_image(picture("image_other"), SIZE, crop=False))
    compare(case, rollout.given, [rollout.next(warp=warp)], "warp runs, resized")


@pytest.mark.parametrize("case", ["wah_3c_camera_stub", "wah_2c_camera_stub_ar"])
def test_windows_of_34_frames(models, prompts, draws, case):
    """Later windows start with the frame before: latents are those of the last 33, the mask is one frame ahead."""
    rollout = Rollout(models, prompts, SIZE, generator(case), image=fit_image(picture("image_other"), SIZE))
    chunks, end = [], 0
    for call in CASES[case]["camera_calls"]:
        start = max(end - 1, 0)
        end = start + call["num_frames"]
        chunks.append(rollout.next(warp=warp_of(slice(start, end))))
    compare(case, rollout.given, chunks, "warp runs of 34 frames")
    if "rng_trace" in CASES[case]:
        assert draws == CASES[case]["rng_trace"]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("native_")])
def test_native_runs(models, prompts, draws, case):
    asked = asked_of(case)
    options = options_of(case, replace(model_options(DISTILLED), restart=True))
    image, video = fit_image(picture(), SIZE, crop=False) if "image" in asked else None, None
    if "video" in asked:
        count = int(re.search(r"first (\d+) warp frames", CASES[case]["desc"]["note"])[1])
        video = make_warp(INPUTS["warp"][:count], None, SIZE).frames
    rollout = Rollout(models, prompts, SIZE, generator(case), image=image, video=video, options=options)
    chunks = [rollout.next() for _ in range(-(-asked.get("num_frames", WINDOW) // WINDOW))]
    compare(case, rollout.given, chunks, "native runs")
    assert draws == CASES[case]["rng_trace"]


GUIDED = {  # run -> schedule, and whether it is CFG-zero-star; both are described in the specification alone
    "mid_t2v_cfgzero": ({}, True), "mid_i2v_cfgzero": ({}, True),
    "mid_t2v_plaincfg_euler_nodyn": ({"sampler": "euler", "use_dynamic_shifting": False}, False),
    "base_t2v_stage1_unipc": ({"stages": 1, "stage_range": (0, 1)}, False),
}


@pytest.mark.parametrize("case", GUIDED)
def test_guided_runs(models, prompts, draws, case):
    asked = asked_of(case)
    change, zero_star = GUIDED[case]
    schedule = replace(load_schedule(HELIOS / "mid"), **change)
    options = options_of(case, Options(amplify_first_chunk=False, zero_star=zero_star))
    if not asked.get("use_zero_init", True):
        options = replace(options, zero_steps=None)
    image = fit_image(picture(), SIZE, crop=False) if "image" in asked else None
    rollout = Rollout(replace(models, schedule=schedule), prompts, SIZE, generator(case), image=image, options=options)
    compare(case, rollout.given, [rollout.next()], "guided runs", 5e-3, 3e-4)
    assert draws == CASES[case]["rng_trace"]


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.fixture
def coarse(monkeypatch):
    """Geometry of few pixels, to be fast."""
    monkeypatch.setattr(surface, "map_size", lambda height, width, *limit: geometry_size(height, width, 11_760))


def room_camera(size) -> Camera:
    image = fit_image(picture(), size)
    depth = torch.linspace(3, 1, SIZE[0])[:, None].expand(SIZE)
    return Camera(geometry_from_depth(image, depth, pinhole(60, *size)), size)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_first_stage_alone_is_led(models, prompts, coarse, stages):
    """Warp, LoRA and trigger belong to the first of however many stages; the size check follows from their number."""
    schedule = replace(models.schedule, stages=stages, stage_range=tuple(i / stages for i in range(stages)) + (1,))
    size = 64, 64 + 16 * 2 ** (stages - 1)
    lora = load_lora(HELIOS / "lora_noprefix.safetensors")
    transformer, seen = models.transformer, []
    options = Options(steps=(1,) * stages)
    rollout = Rollout(replace(models, schedule=schedule), prompts, size, torch.Generator().manual_seed(1), lora=lora,
                      image=fit_image(picture(), size), camera=room_camera(size), options=options)
    make = transformer.context

    def context(history, shape):
        seen.append((tuple(shape[-2:]), history.short.latents.shape[2], history.short.visible is not None,
                     transformer.blocks[0].attn1.to_q.adapter is not None))
        return make(history, shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "context", context)
        chunk = rollout.next(poses=move_path("forward 1"))
    assert set(rollout.text_cache) == {("trigger", True)} | ({("plain", False)} if stages > 1 else set())
    first = size[0] // 8 >> (stages - 1), size[1] // 8 >> (stages - 1)
    assert seen[0] == (first, 11, True, True)
    for stage, (shape, *rest) in enumerate(seen[1:], start=1):
        assert rest == [2, False, False] and shape == (first[0] << stage, first[1] << stage)
    assert len(seen) == stages and chunk.latents.shape[-2:] == (size[0] // 8, size[1] // 8)
    assert transformer.blocks[0].attn1.to_q.adapter is None
    if stages > 1:
        with pytest.raises(ValueError, match=f"multiples of {16 << (stages - 1)}"):
            Rollout(replace(models, schedule=schedule), prompts, (size[0], size[1] + 16), torch.Generator(), options=options)


def test_poses_are_rendered_from_the_first_frame(models, prompts, coarse):
    """Two chunks of poses give the warps of one long path, seen from the picture's own camera; the
    last pose holds where a chunk has fewer than 33."""
    path, camera = move_path("right 2, yaw 15"), room_camera(SIZE)
    assert abs(camera.unit - 0.2) < 1e-4  # a tenth of the median of depths from 3 to 1
    path[:, :3, 3] += 5  # the first pose is the picture's own, wherever it is
    whole = render(camera.geometry, normalize(scale_translation(path[:50], camera.unit), 66), SIZE)
    rollout = Rollout(models, prompts, SIZE, torch.Generator().manual_seed(1), image=fit_image(picture(), SIZE), camera=camera)
    warps = [rollout.next(poses=part).warp for part in path[:50].split(33)]
    assert torch.equal(torch.cat([warp.frames for warp in warps], dim=2), whole.frames)
    assert torch.equal(torch.cat([warp.visible for warp in warps], dim=2), whole.visible)
    with pytest.raises(ValueError, match="has been used"):
        Rollout(models, prompts, SIZE, torch.Generator().manual_seed(1), image=fit_image(picture(), SIZE), camera=camera)


def test_mask_lag_is_an_option(models, prompts):
    """Of 34 frames the mask is read at 0, 4, ... (official) or, with the option off, at 1, 5, ... like the latents."""
    visible = torch.arange(34.0).div(34).view(1, 1, 34, 1, 1).expand(-1, -1, -1, *SIZE)
    for lag, first in ((True, 0), (False, 1)):
        rollout = Rollout(models, prompts, SIZE, torch.Generator().manual_seed(1), options=Options(mask_lag=lag))
        _, latents = rollout.warp_latents(Warp(torch.zeros(1, 3, 34, *SIZE), visible))
        torch.testing.assert_close(latents[0, 0, :, 0, 0], torch.arange(first, 33 + first, 4).div(34))


def test_a_model_may_bring_its_own_defaults(tmp_path):
    """The released files say nothing of steps, guidance, prompt length and size; a small model's model_index.json may."""
    shutil.copytree(DISTILLED, tmp_path / "small")
    assert model_options(tmp_path / "small") == Options() and read_index(tmp_path / "small").size == (384, 640)
    index = json.loads((DISTILLED / "model_index.json").read_text())
    own = {"num_inference_steps": 5, "guidance_scale": 1.5, "max_sequence_length": 40, "height": 64, "width": 128}
    (tmp_path / "small" / "model_index.json").write_text(json.dumps(index | own))
    assert model_options(tmp_path / "small") == Options(steps=(5, 5, 5), guidance=1.5)
    assert read_index(tmp_path / "small").size == (64, 128)
    plain = encode_prompts(tmp_path / "small", "a red car", False, False, "cpu").plain
    assert plain.shape[1] == 40
    torch.testing.assert_close(plain, encode_prompts(DISTILLED, "a red car", False, False, "cpu").plain[:, :40], rtol=0, atol=0)


def test_memory_of_a_rollout_is_bounded(models, prompts):
    """Of all tensors alive, none stays from one chunk to the next once the windows are full."""
    rollout = Rollout(models, prompts, SIZE, torch.Generator().manual_seed(1), image=fit_image(picture(), SIZE))
    warp, sizes = warp_of(slice(0, 33)), []
    for _ in range(6):
        rollout.next(warp=warp)
        gc.collect()
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
                    for value in gc.get_objects() if type(value) is torch.Tensor}
        sizes.append(sum(storages.values()))
    assert sizes[-1] == sizes[-2] == sizes[-3]


def test_clear_errors(models, prompts):
    generator = torch.Generator().manual_seed(1)
    with pytest.raises(ValueError, match="multiples of 64"):
        Rollout(models, prompts, (64, 100), generator)
    for steps in ((2, 2), (2, 0, 2)):
        with pytest.raises(ValueError, match="numbers"):
            Rollout(models, prompts, SIZE, generator, options=Options(steps=steps))
    with pytest.raises(ValueError, match=f"expected {SIZE[0]}x{SIZE[1]}"):
        Rollout(models, prompts, SIZE, generator, image=torch.zeros(1, 3, SIZE[0], SIZE[1] + 64))
    with pytest.raises(ValueError, match="need a camera"):
        Rollout(models, prompts, SIZE, generator).next(poses=move_path("hold"))
    lora = load_lora(HELIOS / "lora_noprefix.safetensors")
    with pytest.raises(ValueError, match="trigger"):
        Rollout(models, replace(prompts, trigger=None), SIZE, generator, lora=lora)
    other = {name.replace(".0.", ".9.", 1): adapter for name, adapter in lora.adapters.items()}
    with pytest.raises(ValueError, match="no layer blocks.9"):
        Rollout(models, prompts, SIZE, generator, lora=replace(lora, adapters=other))
    guided, unguided = Options(guidance=2), replace(prompts, negative=None)
    with pytest.raises(ValueError, match="negative prompt"):
        Rollout(models, unguided, SIZE, generator, options=guided)
    with pytest.raises(ValueError, match="negative prompt"):
        Rollout(models, prompts, SIZE, generator, options=guided).next(prompts=unguided)
    with pytest.raises(ValueError, match="at least 33 frames"):
        Rollout(models, prompts, SIZE, generator, video=torch.zeros(1, 3, 32, *SIZE))
    with pytest.raises(ValueError, match="needs the image"):
        Rollout(models, prompts, SIZE, generator).next(warp=warp_of(slice(0, 33)))
    with pytest.raises(ValueError, match="has 33 frames"):
        Rollout(models, prompts, SIZE, generator, image=fit_image(picture(), SIZE)).next(warp=warp_of(slice(0, 32)))


POSES = goldens.tensors(goldens.GEOMETRY / "poses.safetensors")


@pytest.mark.parametrize("name", ["chunk0", "later"])
def test_mask_latents(name):
    """On this golden's grid of 8 pixels a latent, the mask resized to the latent grid at every fourth frame."""
    mask, expected = POSES[f"mask/{name}_in"], POSES[f"mask/{name}_latent"]
    actual = mask_latents(mask[None, None].float())
    check("mask on the latent grid", actual, expected, 1e-6)


@pytest.fixture(scope="module")
def pi3x():
    return load_pi3x(goldens.GEOMETRY / "pi3x_weights.safetensors")


def test_keyframe_memory_leads_a_rollout(models, prompts, pi3x):
    """With Pi3X later warps have 34 frames, begin with the picture that was generated last, and differ with its content."""
    image, path = fit_image(picture(), SIZE), move_path("right 1, right 1")
    rollout = Rollout(models, prompts, SIZE, torch.Generator().manual_seed(1), image=image, camera=Memory(lambda: pi3x, image, SIZE, limit=11760))
    first, second = (rollout.next(poses=part) for part in path.split(33))
    assert [chunk.warp.frames.shape[2] for chunk in (first, second)] == [33, 34]
    start = torch.nn.functional.interpolate(first.frames[:, :, -1], size=geometry_size(*SIZE, 11760), mode="bilinear")
    start = torch.nn.functional.interpolate(start, size=SIZE, mode="bilinear")
    assert abs(second.warp.frames[:, :, 0] - start).mean() < 0.02
    assert second.warp.visible[:, :, 0].min() == 1
    with pytest.raises(ValueError, match="has been used"):
        Rollout(models, prompts, SIZE, torch.Generator().manual_seed(1), image=image, camera=rollout.camera)


@pytest.mark.parametrize("keyframes", [1, 2, None])
def test_a_rollout_goes_on_from_its_state(models, prompts, pi3x, keyframes):
    """Another rollout that takes over after each chunk makes the same ones, whatever it has seen before."""
    path, image = move_path("right 1, right 1, up 1").split(33), fit_image(picture(), SIZE)

    def new(image: torch.Tensor, seed: int) -> Rollout:
        camera = Memory(lambda: pi3x, image, SIZE, keyframes=keyframes, limit=11760)
        return Rollout(models, prompts, SIZE, torch.Generator().manual_seed(seed), image=image, camera=camera)

    whole, state = new(image, 1), {}
    for index, poses in enumerate(path):
        expected = whole.next(poses=poses)
        other = new(image if index == 0 else image.flip(-1), 1 if index == 0 else 2)
        if state:
            other.restore(state)
        actual = other.next(poses=poses)
        for one, same in ((actual.latents, expected.latents), (actual.frames, expected.frames),
                          (actual.warp.frames, expected.warp.frames), (actual.warp.visible, expected.warp.visible)):
            assert torch.equal(one, same)
        state = {name: value.to("cpu", copy=True).contiguous() for name, value in other.state().items()}


def test_a_state_holds_all_that_changes(models, prompts):
    """Natively and from text, too, where there is no prefix before the first chunk; and a state does not grow."""
    for start in ({}, {"image": fit_image(picture(), SIZE)}, {"video": make_warp(INPUTS["warp"][:WINDOW], None, SIZE).frames}):
        whole = Rollout(models, prompts, SIZE, torch.Generator().manual_seed(1), **start)
        sizes = []
        for _ in range(2):
            other = Rollout(models, prompts, SIZE, torch.Generator().manual_seed(2))
            other.restore(whole.state())
            assert torch.equal(whole.next().latents, other.next().latents) and torch.equal(whole.given, other.given)
            sizes.append({name: value.shape for name, value in whole.state().items()})
        assert sizes[0].keys() == sizes[1].keys() and sizes[0]["native"] == sizes[1]["native"]
