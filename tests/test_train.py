"""Training against the official numbers (conditions, histories, losses, gradients, updates, choices), and train.py as a
user runs it: files, resuming, stopping, bad input."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import goldens
import numpy as np
import peers
import pytest
import torch
from goldens import DISTILLED, GEOMETRY, HELIOS, cases, check, tensors
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import clips
import render
import train
from clips import (
    Case,
    Choices,
    Clip,
    Condition,
    Conditions,
    Geometries,
    change_form,
    draw_case,
    find_video,
    item_order,
    known_geometry,
    read_frames,
    render_case,
)
from files import media
from files.checkpoint import load
from files.draw import draw_curve, save_png
from geometry import surface
from geometry.camera import normalize
from geometry.pi3x import load_pi3x
from geometry.surface import geometry_size
from helios.flow import load_schedule
from helios.load import Models, Prompts, add_trigger, embed_prompts
from helios.lora import load_lora
from helios.vae import VAE
from model import Helios
from render import make_warp
from sample import main as sample_main
from train import TARGETS, Recipe, Trainer, build_history, draw_items, learning_rate, main
from wah import Rollout

GOLDEN = tensors(HELIOS / "train.safetensors")
CASES = cases(HELIOS / "train_cases.json")
SAMPLING = cases(HELIOS / "train_sampling.json")
RANK = len(tensors(HELIOS / "lora_noprefix.safetensors")["blocks.0.attn1.to_q.lora_A.weight"])
with np.load(HELIOS / "pipeline_inputs.npz") as file:
    INPUTS = dict(file)


@pytest.fixture(scope="module")
def transformer():
    return load(Helios, DISTILLED / "transformer")


@pytest.fixture
def condition():
    """The official condition's latents, with the visibility of its warp."""
    visible = GOLDEN["hist.release.history_visible_mask_short"][:, :, 2:]
    latents = (GOLDEN[f"cond.{name}_latents"] for name in ("target", "image", "fake_image", "video"))
    return Condition(*latents, visible)


@pytest.fixture
def history(condition):
    """The one that the official losses were taken with."""
    return build_history(condition, Recipe(), stream(CASES["hist.release"]["torch_manual_seed"]))


def frames_of(text: str) -> slice:
    """The frames that a note like "warp[0:33]" names."""
    return slice(*map(int, re.search(r"\[(\d+):(\d+)\]", text).groups()))


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def golden_text(transformer: Helios) -> list:
    rows = GOLDEN["cond.prompt_embeds_nonpad"]
    return transformer.text(torch.nn.functional.pad(rows, (0, 0, 0, 512 - len(rows)))[None])


# ---------------------------------------------------------------------------------------------------- official numbers


def pixels(*frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None] / 255 * 2 - 1


def test_conditions():
    led, target = (frames_of(CASES["cond"][name]) for name in ("warp frames", "target frames"))
    warp = make_warp(INPUTS["warp"][led], INPUTS["mask"][led] / 255, INPUTS["image"].shape[:2])
    seed = CASES["cond"]["seed(args.seed, prepare_condition generator)"]
    conditions = Conditions(load(VAE, DISTILLED / "vae"), [], INPUTS["image"].shape[:2], Choices(seed), 1, "cpu")
    image, fake = conditions.encode_image(pixels(INPUTS["image"]))
    latents, visible = conditions.encode_warp(warp)
    target = conditions.encode(pixels(*INPUTS["warp"][target]), None)
    for name, value in (("image", image), ("fake_image", fake), ("video", latents), ("target", target)):
        check("training conditions", value, GOLDEN[f"cond.{name}_latents"], 5e-5)
    check("training conditions", visible, GOLDEN["hist.release.history_visible_mask_short"][:, :, 2:], 1e-6)
    embeddings = embed_prompts(DISTILLED, {CASES["cond"]["prompt"]}, "cpu")[CASES["cond"]["prompt"]]
    rows = GOLDEN["cond.prompt_embeds_nonpad"]
    check("training conditions", embeddings[0, :len(rows)], rows, 5e-5)
    assert embeddings.shape[1] == 512 and not embeddings[0, len(rows):].any()


HISTORIES = {
    "release": {}, "no_noise_delta2": {"warp_noise": False, "delta": 2}, "sizes_8_2_0": {"history": (8, 2, 0)},
    "positioning_none_nodrop": {"position": "before", "drop": False}, "positioning_last_n": {"position": "reversed"},
}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("hist.")])
def test_histories(condition, name):
    history = build_history(condition, Recipe(**HISTORIES[name[5:]]), stream(CASES[name]["torch_manual_seed"]))
    expected = {key.removeprefix(f"{name}."): value for key, value in GOLDEN.items() if key.startswith(f"{name}.")}
    assert torch.equal(history.indices, expected.pop("indices_hidden_states")[0])
    for key, value in expected.items():
        band = getattr(history, key.removesuffix("_ch").rpartition("_")[2])
        if key.startswith("indices"):
            assert torch.equal(band.indices, value[0])
        else:
            actual = band.visible if "visible" in key else band.latents
            check("training histories", actual[:, 1::5] if key.endswith("_ch") else actual, value, 2e-5)
    missing = {each.rpartition("_")[2] for each in CASES[name]["none"]}
    assert missing == {band for band in ("short", "mid", "long") if getattr(history, band).visible is None}


ITEMS = {"all_stages": {"stages": (0, 1, 2)}, "stage1": {"stages": (1,)}, "stage2": {"stages": (2,)},
         "dyn_on_all": {"stages": (0, 1, 2), "levels": "shifted"}, "first": {"density": "first"},
         "interval": {"levels": "interval"}, "interval_mid_scheduler": {"levels": "interval"},
         "logit_normal": {"density": "logit_normal"}}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("items.")])
def test_items(name):
    schedule = load_schedule(HELIOS / "mid" if "mid" in name else DISTILLED)
    recipe = Recipe(**ITEMS.get(name[6:], {}))
    items = draw_items(GOLDEN["cond.target_latents"], schedule, recipe, stream(CASES[name]["torch_manual_seed"]))
    assert len(items) == len(CASES[name]["items"])
    for item, case in zip(items, CASES[name]["items"]):
        for key in ("timestep", "sigma"):
            check("training timesteps and sigmas", getattr(item, key), torch.tensor(case[key]), 1e-6, relative=True)
        for key, value in (("noisy_latents", item.latents), ("target", item.target)):
            whole = GOLDEN.get(f"{name}.stage{case['stage']}.{key}")
            expected = GOLDEN[f"{name}.stage{case['stage']}.{key}_ch"] if whole is None else whole
            check("training items", value[:, 1::5] if whole is None else value, expected, 1e-5)


def test_several_draws_are_one_after_the_other():
    """Three draws of a stage are those of three calls in a row: other noise, other levels."""
    schedule, clean = load_schedule(DISTILLED), GOLDEN["cond.target_latents"]
    together, generator = draw_items(clean, schedule, Recipe(draws=3), stream(5)), stream(5)
    single = [draw_items(clean, schedule, Recipe(), generator)[0] for _ in range(3)]
    assert len(together) == 3 and len({item.sigma.item() for item in together}) == 3
    for item, other in zip(together, single):
        assert torch.equal(item.latents, other.latents) and torch.equal(item.timestep, other.timestep)


def trainer_of(transformer: Helios, start: dict | None = None, **options) -> Trainer:
    trainer = Trainer(transformer, load_schedule(DISTILLED), Recipe(**{"rank": RANK, **options}))
    for name, value in (start or {}).items():
        trainer.tensors[name].data.copy_(value)
    return trainer


@pytest.mark.parametrize("name, options", [("loss.base_stage0", {}), ("loss.base_all_stages", {"stages": (0, 1, 2)})])
def test_loss_of_the_frozen_model(transformer, history, condition, name, options):
    """B is zero at first, so the adapters change nothing."""
    trainer = trainer_of(transformer, **options)
    seed, recorded = CASES[name]["torch_manual_seed"], CASES[name]["stats"]
    trainer.generator = stream(seed)
    metrics = trainer.step(history, condition.target, golden_text(transformer))
    check("training loss", metrics["loss"], CASES[name]["loss"], 1e-5, relative=True)
    check("training timesteps and sigmas", metrics["timestep"], recorded["timestep_stage0"], 1e-6, relative=True)
    transformer.set_lora(None)
    for stage, item in enumerate(draw_items(condition.target, trainer.schedule, trainer.recipe, stream(seed))):
        context = transformer.context(history, item.latents.shape[2:])
        prediction = transformer(item.latents, item.timestep, golden_text(transformer), context)
        check("training loss", (prediction - item.target).square().mean(), recorded[f"flow_mse_stage{stage}"], 1e-5,
              relative=True)
        if name == "loss.base_stage0":
            check("training prediction", prediction, GOLDEN["pred.stage0_seed300"], 1e-4)


@pytest.mark.parametrize("checkpointing, keep_attention", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("train.")])
def test_updates(transformer, history, condition, name, checkpointing, keep_attention):
    """Losses, gradients and parameters of one or three steps from the official start (or PEFT's, from its seed)."""
    random_start = "random" in name
    start = tensors(HELIOS / "lora_noprefix.safetensors") if random_start else {}
    stages = (0, 1, 2) if "all_stages" in name else (0,)
    setup = CASES[name]["stats"]
    rank, alpha = setup["lora_rank"], setup["lora_alpha"]
    trainer = trainer_of(transformer, start, stages=stages, checkpointing=checkpointing,
                         keep_attention=keep_attention, clip=1.0, rank=rank, scale=alpha / rank)
    assert TARGETS == tuple(setup["lora_target_modules"])
    before = {key: value.detach().clone() for key, value in trainer.tensors.items()}
    records, text = CASES[name]["records"], golden_text(transformer)
    for record in records:
        trainer.generator = stream(record["torch_manual_seed_before_loss"])
        metrics = trainer.step(history, condition.target, text)
        if record["step"] == 0 and f"{name}.grad0.blocks.0.attn1.to_q.lora_A.weight" in GOLDEN:
            for key, value in trainer.tensors.items():  # they are clipped by now
                grad = value.grad * max(1, record["grad_norm"] / trainer.recipe.clip)
                check("training gradients", grad, GOLDEN[f"{name}.grad0.{key}"], 1e-5)
        check("training loss", metrics["loss"], record["loss"], 1e-5, relative=True)
        check("training gradient norm", metrics["grad_norm"], record["grad_norm"], 1e-4, relative=True)
        check("training timesteps and sigmas", metrics["sigma"], record["sigma"], 1e-6, relative=True)
        assert metrics["lr"] == pytest.approx(record["lr"], rel=1e-12)
    for key, value in trainer.tensors.items():
        expected = GOLDEN[f"{name}.after{len(records)}.{key}"]
        check("training, updated parameters", value.detach(), expected, 1e-6)
        moved = (expected - before[key]).abs().max()
        assert moved > 0
        change, expected_change = value.detach() - before[key], expected - before[key]
        check("training, change of parameters", change / moved, expected_change / moved, 0.05)
    if random_start:
        largest = max((value.detach() - before[key]).abs().max().item() for key, value in trainer.tensors.items())
        assert largest == pytest.approx(CASES[name]["max_param_change"], rel=0.05)
    transformer.set_lora(None)


def test_frozen_bf16(history, condition):
    """Over a bf16 model the adapters, their gradients and moments are fp32; the model stays, the loss is near."""
    model = load(Helios, DISTILLED / "transformer", dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(model, tensors(HELIOS / "lora_noprefix.safetensors"))
    record = CASES["train.from_random_lora"]["records"][0]
    trainer.generator = stream(record["torch_manual_seed_before_loss"])
    metrics = trainer.step(history, condition.target, golden_text(model))
    assert metrics["loss"] == pytest.approx(record["loss"], rel=0.02)
    assert metrics["grad_norm"] == pytest.approx(record["grad_norm"], rel=0.05)
    assert {value.dtype for name, value in trainer.state().items() if name != "rng"} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("recorded", SAMPLING, ids=lambda recorded: recorded["row_id"])
def test_choices(recorded):
    args, count = recorded["args"], recorded["n_frames"]
    recipe = Recipe(
        seed=args["seed"], first=args["online_first_chunk_prob"], max_history=args["online_max_history_frames"],
        reverse=args["online_direction_reverse_prob"] if args["online_direction_augmentation"] else 0.0,
        future=args["online_future_keyframe_prob"],
        future_count=(args["online_future_keyframes_min"], args["online_future_keyframes_max"]))
    for expected in recorded["cases"]:
        case = draw_case(recipe, count, recorded["row_id"], expected["prepare_index"])
        assert case.reverse == (expected["direction"] == "reverse")
        assert case.later == (expected["chunk_mode"] == "later")
        assert case.start == expected["first_target"] and len(case.targets) == expected["n_targets"]
        assert [*case.keyframes] == expected["keyframe_indices"]
        assert [*case.path][0] == expected["render_pose_first"] and len(case.path) == expected["n_render_poses"]
        assert case.original(case.condition, count) == expected["condition_frame_original_index"]
        c2w = torch.eye(4).repeat(count, 1, 1)
        c2w[:, 0, 3] = torch.arange(count) if not case.reverse else torch.arange(count - 1, -1, -1)
        relative = normalize(c2w[case.path], len(case.path))[:, 0, 3]
        assert [relative[0].item(), relative[-1].item()] == expected["relative_pose_tx_first_last"]


def test_order_rates_and_triggers():
    for name, expected in CASES["item_order"].items():
        count, seed = (int(part.strip("itemsd")) for part in name.replace("seed", "").replace("items", "").split("_"))
        order = item_order(count, seed)
        assert [next(order) for _ in expected] == expected
    cosine = Recipe(steps=100, decay="cosine", final_lr=0.1)
    for name, recipe in (("lr", Recipe()), ("lr_cosine_final0.1_100steps", cosine)):
        for step, rate in CASES[name].items():
            assert learning_rate(recipe, int(step[4:])) == pytest.approx(rate, rel=1e-12)
    assert learning_rate(Recipe(steps=101, decay="linear"), 100) == 0
    for prompt, expected in CASES["add_online_prompt_trigger"].items():
        assert add_trigger(prompt[1:-1]) == expected


# --------------------------------------------------------------------------------------------------------------- warps


def side_scroll(count: int, size: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A camera that moves right along a wall at depth 2, one pixel a frame: frames [T,H,W,3], depths [T,H,W] and poses
    [T,4,4]."""
    y, x = np.mgrid[0:size, 0:size + count]
    wall = np.stack([128 + 90 * np.sin(x / 5) * np.cos(y / 7), 128 + 90 * np.sin(x / 9 + y / 11), 2 * y + 40], axis=-1)
    frames = np.stack([wall[:, t:t + size] for t in range(count)]).round().astype(np.uint8)
    c2w = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
    c2w[:, 0, 3] = np.arange(count) * 2 / size  # a field of view of 53.13 degrees: the focal length is the width
    return frames, np.full((count, size, size), 2, np.float32), c2w


FOV = math.degrees(2 * math.atan(0.5))


@pytest.fixture
def wall(tmp_path, monkeypatch):
    """40 frames of a video with known depth and camera, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    small = lambda height, width, *limit: geometry_size(height, width, 6_000)  # to be fast
    monkeypatch.setattr(surface, "map_size", small)
    frames, depth, c2w = side_scroll(40)
    np.save("wall.npy", frames)
    np.savez("depth.npz", depth)
    Path("poses.json").write_text(json.dumps({"c2w": c2w.tolist(), "fov_x": FOV, "unit": "meter"}))
    return tmp_path


@pytest.mark.parametrize("case", [Case(False, 2, (2,)), Case(True, 2, (2,)), Case(False, 6, (3, 4, 5)),
                                  Case(False, 6, (5, 20)), Case(True, 5, (3, 4, 30))], ids=str)
def test_warps_agree_with_the_video(wall, case):
    """With exact geometry a warp shows the target's frames wherever it is visible, in both directions."""
    frames = read_frames(Path("wall.npy"), (64, 64))
    path = known_geometry(Path("wall.npy"), Path("poses.json"), Path("depth.npz"), frames, wall.joinpath)
    clip = Clip("", frames, Geometries(path, "cpu"), Geometries(path, "cpu", backwards=True))
    warp = render_case(clip, case)
    targets = [case.original(index, len(frames)) for index in case.targets]
    keyframes = [case.original(index, len(frames)) for index in case.keyframes]
    target = clip.pixels(*targets)
    assert warp.frames.shape == target.shape == (1, 3, 33, 64, 64)
    column = torch.tensor(targets)[:, None] + torch.arange(64)  # of the wall, [33, 64]
    near = torch.stack([(column >= keyframe + 1) & (column < keyframe + 63) for keyframe in keyframes]).any(0)
    near = near[None, None, :, None].expand_as(warp.frames)  # elsewhere is the background, which is a guess
    error = (warp.frames - target).abs()[near].mean()
    still = (target[:, :, :1] - target).abs()[near].mean()
    assert error < 0.05 < still / 4, (error, still)
    assert warp.visible.expand_as(near)[near].mean() > 0.95
    for x in (warp.frames / 2 + 0.5, warp.visible):
        assert (x * 255 - (x * 255).round()).abs().max() < 1e-3  # 8 bits


def test_forms(wall):
    """Mirrored or with other colours, target and warp alike; what else is drawn stays the same."""
    video = torch.rand(1, 3, 2, 4, 6)
    forms = [change_form(video, form) for form in range(12)]
    assert torch.equal(forms[0], video) and torch.equal(forms[1], video.flip(-1))
    assert all(not torch.equal(a, b) for a, b in combinations(forms, 2))
    colours = [sorted(form[0, :, 0, 0, [0, 5]].flatten().tolist()) for form in forms]
    assert all(each == colours[0] for each in colours)
    drawn = [draw_case(Choices(forms=12), 40, "row", step) for step in range(1, 100)]
    assert {case.form for case in drawn} == set(range(12))
    assert [replace(case, form=0) for case in drawn] == [draw_case(Choices(), 40, "row", step) for step in range(1, 100)]

    frames = read_frames(Path("wall.npy"), (64, 64))
    path = known_geometry(Path("wall.npy"), Path("poses.json"), Path("depth.npz"), frames, wall.joinpath)
    clip, case = Clip("", frames, Geometries(path, "cpu"), Geometries(path, "cpu", True)), Case(False, 2, (2,), form=7)
    plain, changed = (render_case(clip, each, atlas=False) for each in (replace(case, form=0), case))
    assert not torch.equal(plain.visible, plain.visible.flip(-1))
    assert torch.equal(changed.frames, plain.frames.flip(-1)[:, [1, 2, 0]])
    assert torch.equal(changed.visible, plain.visible.flip(-1))
    conditions = Conditions(load(VAE, DISTILLED / "vae"), [clip], (64, 64), Choices(), 8, "cpu")
    found, expected = conditions(0, case).target, conditions.encode(change_form(clip.pixels(*case.targets), 7), None)
    assert torch.equal(found, expected)
    found, expected = conditions(0, case).image, conditions.encode_image(change_form(clip.pixels(2), 7))[0]
    assert torch.equal(found, expected)


def test_geometry_beside_the_video(wall, capsys):
    """NAME.json and NAME_depth.npz serve as --poses and --depth do, unless --geometry asks for an estimate."""
    words = ["--video", "wall.npy", "--weights", DISTILLED, "--size", "64x64", "--device", "cpu", "--set", "steps=2"]
    words = [str(word) for word in words]
    shutil.copy("poses.json", "wall.json")
    assert main([*words, "--out", "run"]) == 2 and "no geometry" in capsys.readouterr().err
    shutil.copy("depth.npz", "wall_depth.npz")
    assert main([*words, "--out", "run"]) == 0
    assert main([*words, "--poses", "poses.json", "--depth", "depth.npz", "--out", "told"]) == 0
    assert Path("run/metrics.jsonl").read_bytes() == Path("told/metrics.jsonl").read_bytes()
    assert main([*words, "--geometry", "nothing", "--out", "third"]) == 2 and "nothing" in capsys.readouterr().err


def test_first_chunks_without_the_atlas(wall):
    """As sampling renders a first chunk: holes stay holes; a later chunk's warp has its background all the same."""
    frames = read_frames(Path("wall.npy"), (64, 64))
    path = known_geometry(Path("wall.npy"), Path("poses.json"), Path("depth.npz"), frames, wall.joinpath)
    clip = Clip("", frames, Geometries(path, "cpu"), Geometries(path, "cpu", backwards=True))
    first, later = Case(False, 3, (3,)), Case(False, 6, (3, 4, 5))
    filled, bare = (render_case(clip, first, atlas) for atlas in (True, False))
    same, plain = (render_case(clip, later, atlas) for atlas in (True, False))
    sampled = render.render(clip.forward[3], normalize(clip.forward.c2w[first.path], 33), (64, 64))
    torch.testing.assert_close(bare.frames, media.quantize(sampled.frames), rtol=0, atol=1e-5)
    assert torch.equal(same.frames, plain.frames)
    assert bare.visible.mean() < filled.visible.mean() - 0.05


# ---------------------------------------------------------------------------------------------------------- as a user


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    """A run folder with the Pi3X geometry of the video in `place`, so that only one test waits for it."""
    folder = tmp_path_factory.mktemp("geometry")
    np.save(folder / "clip.npy", INPUTS["warp"][:36])
    assert train_on(folder / "clip.npy", "--out", folder / "run", "--set", "steps=1") == 0
    for name in ("state.safetensors", "lora.safetensors", "metrics.jsonl", "loss.png"):
        (folder / "run" / name).unlink()
    return folder / "run"


@pytest.fixture
def place(tmp_path, monkeypatch, estimated):
    """An empty folder with a short video, and a run folder with its geometry."""
    monkeypatch.chdir(tmp_path)
    np.save("clip.npy", INPUTS["warp"][:36])
    shutil.copytree(estimated, "run")
    return tmp_path


def train_on(video, *words, weights=DISTILLED) -> int:
    """train.py at a small size, for 2 steps unless the words say more."""
    geometry = [] if "--depth" in words else ["--geometry", GEOMETRY / "pi3x_weights.safetensors"]
    small = ["--size", "64x64", "--device", "cpu", "--set", "geometry_pixels=2000", f"rank={RANK}", "steps=2"]
    return main([str(word) for word in ("--video", video, "--weights", weights, *geometry, *small, *words)])


def read(path: str | Path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def metrics(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_leaves(place, capsys):
    assert train_on("clip.npy", "--out", "run", "--prompt", " a car ", "--set", "steps=3", "save_every=2", "lr=0.01",
                    "scale=0.5", "sample_every=2") == 0
    names = {path.name for path in Path("run").iterdir() if not path.name.startswith("geometry")}
    assert names == {"state.safetensors", "lora.safetensors", "metrics.jsonl", "loss.png", "sample_000002.png", "manifest.txt"}
    lines = metrics("run")
    assert [line["step"] for line in lines] == [1, 2, 3] and all(math.isfinite(line["loss"]) for line in lines)
    assert Image.open("run/loss.png").size == (640, 360) and Image.open("run/sample_000002.png").height > 2 * 256
    tensors, header = read("run/lora.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == {
        key: value.shape for key, value in goldens.tensors(HELIOS / "lora_noprefix.safetensors").items()}
    about = json.loads(header["run"])
    assert header["step"] == "3" and about["base"] == "distilled" and about["recipe"]["lr"] == 0.01
    assert about["clips"][0]["video"] == "clip.npy" and about["clips"][0]["prompt"] == " a car "
    out = capsys.readouterr().out
    for part in ("s/step", "data", "forward", "backward", "optimiser", "tokens/step", "TFLOP/s", "peak"):
        assert part in out
    Image.fromarray(INPUTS["image"]).save("image.png")
    words = ["--image", "image.png", "--move", "forward 1", "--size", "64x64", "--frames", "2", "--set", "device=cpu"]
    assert sample_main([*words, "--weights", str(DISTILLED), "--lora", "run/lora.safetensors"]) == 0
    assert {scale for _, _, scale in load_lora("run/lora.safetensors").adapters.values()} == {0.5}


def test_diffusers_and_peft_load_it(place, transformer):
    """The file in diffusers' LoRA loader, after the official pipeline's prefix, and in PEFT: the same forward."""
    from diffusers.loaders.lora_pipeline import HeliosLoraLoaderMixin
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from test_model import CASES as DIT
    from test_model import INPUTS as GIVEN
    from test_model import run

    assert train_on("clip.npy", "--out", "run", "--set", "steps=3", "lr=0.1", "scale=0.5") == 0
    plain = run(transformer, "all_bands")
    transformer.set_lora(load_lora("run/lora.safetensors"))
    ours = run(transformer, "all_bands")
    transformer.set_lora(None)
    assert (ours - plain).abs().max() > 1e-2
    state, metadata = HeliosLoraLoaderMixin.lora_state_dict("run/lora.safetensors", return_lora_metadata=True)
    given = {name: GIVEN[key] for name, key in DIT["all_bands"]["inputs"].items()}
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in metadata.items()})
    for loader in ("diffusers", "peft"):
        peer = peers.twin(transformer)
        if loader == "diffusers":
            prefixed = {f"transformer.{key}": value for key, value in state.items()}
            HeliosLoraLoaderMixin.load_lora_into_transformer(prefixed, peer, metadata=metadata)
        else:
            inject_adapter_in_model(config, peer)
            assert not set_peft_model_state_dict(peer, state).unexpected_keys
        with torch.no_grad():
            theirs = peer(**given, return_dict=False)[0]
        check("trained LoRA in diffusers and PEFT", ours, theirs, 5e-5)


def test_without_steps_it_changes_nothing(transformer):
    """B is zero: a rollout with the new LoRA is bit-equal to one without."""
    models, size = Models(transformer, load(VAE, DISTILLED / "vae"), load_schedule(DISTILLED)), (64, 128)
    prompts = torch.rand(1, 8, transformer.config.text_dim)
    warp, made = make_warp(INPUTS["warp"][:33], INPUTS["mask"][:33] / 255, size), []
    for lora in (None, trainer_of(transformer).lora):
        image = warp.frames[:, :, 0]
        rollout = Rollout(models, Prompts(prompts, prompts), size, stream(0), image=image, lora=lora)
        made.append(rollout.next(warp=warp).latents)
    assert torch.equal(*made)


def test_overfits(transformer, history, condition):
    """On one fixed item the loss falls more than fivefold."""
    trainer = trainer_of(transformer, lr=0.02, warmup=5, weight_decay=0.0)
    text, losses = golden_text(transformer), []
    for _ in range(40):
        trainer.generator = stream(300)
        losses.append(trainer.step(history, condition.target, text)["loss"])
    transformer.set_lora(None)
    assert losses[-1] < losses[0] / 5, losses[::10]


def test_resume_is_exact(place, capsys):
    """Six steps, and three with three more: the same lines, state and LoRA, bit by bit."""
    shutil.copytree("run", "parts")
    assert train_on("clip.npy", "--out", "run", "--set", "steps=6", "save_every=4") == 0
    assert train_on("clip.npy", "--out", "parts", "--set", "steps=3") == 0
    with open("parts/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 9')  # the program died while step 4 was on its way
    assert train_on("clip.npy", "--out", "parts", "--resume", "--set", "steps=6") == 0
    for name in ("metrics.jsonl", "loss.png"):
        assert Path("run", name).read_bytes() == Path("parts", name).read_bytes()
    for name in ("state.safetensors", "lora.safetensors"):
        (one, header), (other, again) = read(f"run/{name}"), read(f"parts/{name}")
        assert header["step"] == again["step"] == "6" and one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert len({line["loss"] for line in metrics("run")}) == 6


def interrupt_at(monkeypatch, count: int, act) -> None:
    """Do `act(trainer)` when `count` steps are done and the next begins."""
    original = Trainer.step

    def step(self, *arguments):
        if self.steps == count:
            act(self)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step)


def test_ctrl_c_saves(place, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 1, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    assert train_on("clip.npy", "--out", "run", "--set", "steps=4") == 0
    assert "stopped; to go on: python train.py --video clip.npy" in capsys.readouterr().out
    assert len(metrics("run")) == 2 and read("run/state.safetensors")[1]["step"] == "2"
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert train_on("clip.npy", "--out", "run", "--resume", "--set", "steps=4") == 0
    assert [line["step"] for line in metrics("run")] == [1, 2, 3, 4]


def test_nan_stops(place, capsys, monkeypatch):
    interrupt_at(monkeypatch, 1, lambda trainer: next(iter(trainer.tensors.values())).data.fill_(math.nan))
    refused(capsys, "clip.npy", ["--set", "save_every=1"], "step 2", "nan", "step 1 is safe")
    tensors, header = read("run/state.safetensors")
    assert header["step"] == "1" and all(value.isfinite().all() for value in tensors.values())
    assert read("run/lora.safetensors")[1]["step"] == "1"
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert train_on("clip.npy", "--out", "run", "--resume") == 0


@pytest.mark.parametrize("name", ["state", "lora", "loss"])
def test_disk_full(place, capsys, monkeypatch, name):
    """Whichever file has no room, those of the save before stay, and nothing half-written."""
    calls, write, draw = [], Path.write_bytes, save_png

    def full(path, write, content):
        calls.append(path.name)
        if name in path.name and sum(name in call for call in calls) == 2:
            write(path, content[:len(content) // 2])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", lambda path, content: full(path, write, content))
    monkeypatch.setattr("files.run.save_png", lambda path, image: full(path, draw, image))
    refused(capsys, "clip.npy", ["--set", "save_every=1"], "run", "step 2", "no room is left", "step 1 is safe")
    assert {read(f"run/{each}.safetensors")[1]["step"] for each in ("state", "lora")} == {"1"}
    assert not [path for path in Path("run").iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert train_on("clip.npy", "--out", "run", "--resume") == 0


def test_geometry_and_latents_are_made_once(place, monkeypatch):
    """The run folder's geometry serves again, without Pi3X; a window is encoded once however often it is drawn."""
    def never(*arguments):
        raise AssertionError("Pi3X is not needed")

    encoded, encode = [], VAE.encode

    def count(self, video):
        encoded.append(video.shape[2])
        return encode(self, video)

    monkeypatch.setattr(clips, "load_pi3x", never)
    monkeypatch.setattr(VAE, "encode", count)
    np.save("short.npy", INPUTS["warp"][:33])  # two cases alone: forward and reversed
    assert train_on("clip.npy", "--out", "run", "--set", "steps=1") == 0
    encoded.clear()
    monkeypatch.setattr(clips, "load_pi3x", load_pi3x)
    assert train_on("short.npy", "--out", "other", "--set", "steps=8") == 0
    assert sorted(encoded) == [1, 1] + [33] * 6  # image, fake, warp, target for each


def test_known_camera_and_depth(wall, capsys):
    """No Pi3X; both directions from one file."""
    words = ["--poses", "poses.json", "--depth", "depth.npz", "--out", "run"]
    assert train_on("wall.npy", *words, "--set", "steps=3") == 0
    assert len(list(Path("run").glob("geometry_*"))) == 1
    Path("maps").mkdir()
    for index in range(40):
        Image.fromarray(np.full((64, 64), 2000, np.uint16)).save(f"maps/{index:03d}.png")
    assert train_on("wall.npy", "--poses", "poses.json", "--depth", "maps", "--out", "other", "--set", "steps=1") == 0
    np.save("few.npy", np.ones((39, 8, 8)))
    for depth, parts in (("few.npy", ("39", "40", "few.npy")), ("wall.npy", ("wall.npy", "[T, height, width]"))):
        refused(capsys, "wall.npy", ["--poses", "poses.json", "--depth", depth, "--out", "third"], *parts)
    refused(capsys, "wall.npy", ["--depth", "depth.npz", "--out", "third"], "--poses", "--depth")

    both = ["--video", "wall.npy", "--poses", "poses.json", "--depth", "depth.npz"]
    refused(capsys, "wall.npy", [*both, "--out", "third"], "1 --poses", "2 videos")
    own = ["--poses", "poses.json", "--depth", "maps", "--out", "two", "--set", "steps=1"]
    assert train_on("wall.npy", *both, *own) == 0
    assert len(list(Path("two").glob("geometry_*"))) == 2  # each with its own depths


def test_one_stage(place):
    """A model without a pyramid is trained on the full grid; --size is by default the model's own."""
    weights = place / "weights"
    shutil.copytree(DISTILLED, weights)
    own = {"height": 64, "width": 64, "max_sequence_length": 16, "train": ["rank=3", "steps=7"]}
    for file, entries in (("model_index.json", own),
                          ("scheduler/scheduler_config.json", {"stages": 1, "stage_range": [0, 1]})):
        (weights / file).write_text(json.dumps(json.loads((weights / file).read_text()) | entries))
    files = ["--geometry", GEOMETRY / "pi3x_weights.safetensors", "--weights", weights, "--out", "run"]
    words = ["--video", "clip.npy", "--device", "cpu", "--set", "steps=1", "geometry_pixels=2000", "sample_every=1"]
    assert main([str(word) for word in files + words]) == 0
    assert Path("run/sample_000001.png").is_file()
    assert len(metrics("run")) == 1  # --set comes after the model's own recipe
    assert {min(tensor.shape) for tensor in read("run/lora.safetensors")[0].values()} == {3}


def test_several_videos(place, capsys):
    """Repeated --video and a csv give the same run; every video has its turn."""
    np.save("other.npy", INPUTS["warp"][40:75])
    words = ["--video", "other.npy", "--prompt", "a car", "--prompt", "a wall"]
    assert train_on("clip.npy", "--out", "run", *words) == 0
    Path("list.csv").write_text("prompt,video,more\na car,clip.npy,1\na wall,other.npy,2\n")
    shutil.copytree("run", "listed", ignore=shutil.ignore_patterns("[!gm]*", "metrics*"))
    assert train_on("list.csv", "--out", "listed") == 0
    assert Path("run/metrics.jsonl").read_bytes() == Path("listed/metrics.jsonl").read_bytes()
    order = item_order(2, Recipe().seed)
    assert [line["video"] for line in metrics("run")] == [next(order) for _ in range(2)]
    for text, parts in (("video,words\nclip.npy,a\n", ("prompt", "words")), ("video,prompt\n", ("at least one row",)),
                        ("video,prompt\nclip.npy\n", ("row 1",)), ("video,prompt\nno.npy,a\n", ("row 1", "no.npy")),
                        ("video,prompt\nclip.npy,a\nclip.npy,a car, fast\n", ("row 2", "3 fields", "quotes")),
                        ('video,prompt\nclip.npy,a\nclip.npy,"a 5" screen, red"\n', ("row 2", "expected after"))):
        Path("list.csv").write_text(text)
        refused(capsys, "list.csv", [], "list.csv", *parts)
    Path("list.csv").write_bytes(b"\xff\x00\xfe")
    refused(capsys, "list.csv", [], "list.csv", "not a readable csv")


def test_curve():
    """Every point is drawn: the line falls from the upper left to the lower right; one step is enough."""
    picture = draw_curve(np.linspace(2, 0.1, 200).tolist())
    dark = (picture[..., 2] > 100) & (picture[..., 0] < 60)
    rows = [np.nonzero(dark[40:320, x])[0].mean() for x in (150, 350, 550)]
    assert rows == sorted(rows) and rows[-1] - rows[0] > 100
    assert draw_curve([1.0]).shape == picture.shape == (360, 640, 3)


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(capsys, video, words: list[str], *parts: str, weights=DISTILLED) -> None:
    """Exit status 2 and one line on stderr that says `parts`."""
    words = words if "--out" in words else ["--out", "run", *words]
    capsys.readouterr()
    assert train_on(video, *words, weights=weights) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: error: ") and all(part in error for part in parts), error


@pytest.mark.parametrize("words, parts", [
    (["--set", "rank=0"], ["rank is 0", "at least 1"]),
    (["--set", "lr=-1"], ["lr is -1", "more than 0"]),
    (["--set", "lr=nan"], ["lr=nan"]),
    (["--set", "lr"], ["lr"]),
    (["--set", "rank=big"], ["rank=big", "32", "int"]),
    (["--set", "color=red"], ["color=red", "rank"]),
    (["--set", "future_count=2"], ["future_count=2", "1,2"]),
    (["--set", "future_count=3,2"], ["future_count is 3,2"]),
    (["--set", "stages=3"], ["stages", "0 to 2"]),
    (["--set", "decay=slow"], ["decay is slow", "cosine"]),
    (["--set", "drop=maybe"], ["drop=maybe"]),
    (["--size", "64x65"], ["64x65"]),
    (["--size", "64x32"], ["64x32", "64"]),
    (["--device", "tpu"], ["tpu"]),
    (["--device", "cuda:77"], ["cuda:77"]),
    (["--set", "warp_sigma=0.2,0.1"], ["warp_sigma is 0.2,0.1"]),
    (["--prompt", "a", "--prompt", "b"], ["--prompt", "2 times"]),
    (["--geometry", "none.safetensors"], ["none.safetensors"]),
    (["--geometry", "clip.npy"], ["clip.npy"]),
    (["--out", "clip.npy/run"], ["clip.npy/run"]),
    (["--out", "clip.npy"], ["clip.npy"]),
    (["--resume"], ["--resume", "state.safetensors"]),
])
def test_bad_words(capsys, place, words, parts):
    refused(capsys, "clip.npy", words, *parts)


def test_bad_videos(capsys, place):
    np.save("short.npy", INPUTS["warp"][:32])
    refused(capsys, "short.npy", [], "short.npy", "32 frames", "33")
    Path("broken.mp4").write_bytes(b"no video")
    refused(capsys, "broken.mp4", [], "broken.mp4", "not a readable video")
    refused(capsys, "no-such-clip", [], "no-such-clip", "DAVIS")
    assert find_video("car-roundabout").is_file()  # one is in data/
    Path("empty").mkdir()
    refused(capsys, "empty", [], "empty", "no frames")


def test_no_geometry(capsys, place):
    assert main(["--video", "clip.npy", "--weights", str(DISTILLED), "--size", "64x64", "--out", "new"]) == 2
    error = capsys.readouterr().err
    assert "--geometry" in error and "--poses" in error and "--depth" in error and not Path("new").exists()


def test_an_existing_run_is_kept(capsys, place):
    assert train_on("clip.npy", "--out", "run") == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    refused(capsys, "clip.npy", [], "run", "--resume", "--overwrite")
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
    assert train_on("clip.npy", "--out", "run", "--overwrite", "--set", "steps=1") == 0
    assert len(metrics("run")) == 1


def test_resume_of_another_run(capsys, place):
    """Another recipe, prompt, video or base is refused by name; so is a broken state."""
    assert train_on("clip.npy", "--out", "run") == 0
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3", "lr=0.5"], "lr was 0.0001, now it is 0.5")
    refused(capsys, "clip.npy", ["--resume", "--prompt", "a tree"], "clips", "a tree")
    np.save("clip.npy", INPUTS["warp"][1:37])
    refused(capsys, "clip.npy", ["--resume"], "clips")
    np.save("clip.npy", INPUTS["warp"][:36])
    whole = Path("run/state.safetensors").read_bytes()
    state, header = read("run/state.safetensors")
    save_file(state, "run/state.safetensors")
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3"], "state.safetensors", "not a state")
    save_file({**state, "rng": torch.zeros(3)}, "run/state.safetensors", header)
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3"], "state.safetensors", "changed since it was written")
    Path("run/state.safetensors").write_bytes(whole[:-50])
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3"], "state.safetensors", "not a complete")
    Path("run/state.safetensors").write_bytes(whole)
    shutil.copytree(DISTILLED, "renamed")
    assert train_on("clip.npy", "--out", "run", "--resume", "--set", "steps=3", weights="renamed") == 0  # the same content


def test_resume_needs_the_same_weights(capsys, place):
    """Their folder's name is not enough; what is not read may change."""
    weights = place / "weights"
    shutil.copytree(DISTILLED, weights)
    assert train_on("clip.npy", "--out", "run", weights=weights) == 0
    file = weights / "vae" / "diffusion_pytorch_model.safetensors"
    whole, edited = file.read_bytes(), tensors(file)
    edited["decoder.conv_out.bias"] += 0.1
    save_file(edited, file)
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3"], "weights was", "now it is", weights=weights)
    file.write_bytes(whole)
    (weights / "notes.txt").write_text("mine")
    assert train_on("clip.npy", "--out", "run", "--resume", "--set", "steps=3", weights=weights) == 0


def test_recoloured_forms_have_the_bare_trigger(place, monkeypatch):
    """In other colours the clip's own words would be wrong: every step is told what its form allows."""
    told, step = [], Trainer.step

    def watch(self, history, clean, text):
        told.append(text[0][0])
        return step(self, history, clean, text)

    monkeypatch.setattr(Trainer, "step", watch)
    words = ["--prompt", "a red car", "--set", "steps=12", "forms=12", "rank=1", "checkpointing=false"]
    assert train_on("clip.npy", "--out", "run", *words) == 0
    own, bare = add_trigger("a red car"), add_trigger("")
    embeddings, network = embed_prompts(DISTILLED, {own, bare}, "cpu"), load(Helios, DISTILLED / "transformer")
    keys = {prompt: network.text(embeddings[prompt])[0][0] for prompt in (own, bare)}
    cases = [draw_case(Choices(forms=12), 36, "online_000000", index) for index in range(1, 13)]
    expected = [bare if case.form > 1 else own for case in cases]  # 0 is the clip itself, 1 its mirror image
    assert set(expected) == {own, bare}
    for actual, prompt in zip(told, expected, strict=True):
        assert torch.equal(actual, keys[prompt])


def test_as_a_program(place):
    """The real command line, without and with what it needs."""
    program = [sys.executable, train.__file__, "--weights", str(DISTILLED), "--device", "cpu", "--size", "64x64"]
    bad = subprocess.run([*program, "--video", "clip.npy"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "--depth" in bad.stderr


def test_memory_modes(place, capsys):
    """Streamed weights give the same losses, quantized ones nearly so; a run goes on with the kind that it began with."""
    losses = {}
    for mode in ("full", "stream", "fp8"):
        words = ["--out", "run", "--prompt", "a car", "--memory", mode, "--overwrite", "--set", "lr=0.01"]
        assert train_on("clip.npy", *words) == 0
        losses[mode] = [(each["loss"], each["grad_norm"]) for each in metrics("run")]
    assert losses["stream"] == losses["full"] != losses["fp8"]
    np.testing.assert_allclose(losses["fp8"], losses["full"], rtol=0.1)
    capsys.readouterr()
    for words, message in ((["--resume", "--set", "steps=3"], "fp8 was True, now it is False"),
                           (["--overwrite", "--memory", "stream", "--set", "checkpointing=false"], "checkpointing=true")):
        assert train_on("clip.npy", "--out", "run", "--prompt", "a car", *words) == 2
        assert message in capsys.readouterr().err


def test_poses_and_depths_are_paired_with_frames_by_name(tmp_path, monkeypatch):
    """A reconstruction lists its frames in any order, and perhaps more of them; a frame without a pose is named."""
    monkeypatch.chdir(tmp_path)
    c2w = torch.eye(4).repeat(35, 1, 1)
    c2w[:, 0, 3] = torch.arange(35) / 50
    Path("frames").mkdir()
    for index in range(33):
        Image.new("RGB", (96, 64), (7 * index, 0, 0)).save(f"frames/{index}.png")
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    listed = [{"file_path": f"images/{i}.png", "transform_matrix": (c2w[i] @ flip).tolist()} for i in reversed(range(35))]
    Path("transforms.json").write_text(json.dumps({"camera_angle_x": 1.0, "frames": listed}))
    np.savez("depth.npz", depth=np.full((33, 8, 12), 2, np.float32) + np.arange(33)[:, None, None])
    frames = torch.zeros(33, 3, 32, 48, dtype=torch.uint8)
    where = tmp_path.joinpath
    path = known_geometry(Path("frames"), Path("transforms.json"), Path("depth.npz"), frames, where)
    made = Geometries(path, "cpu")
    torch.testing.assert_close(made.c2w, c2w[:33])
    assert (made[7].rgb[..., 0] == 49).all() and torch.allclose(made[7].depth, torch.tensor(9.0))
    Path("transforms.json").write_text(json.dumps({"camera_angle_x": 1.0, "frames": listed[20:]}))
    with pytest.raises(ValueError, match="transforms.json: nothing of that name for 18 frames, the first is 15.png"):
        known_geometry(Path("frames"), Path("transforms.json"), Path("depth.npz"), frames, where)
    listed[0]["fl_x"], listed[0]["w"] = 100, 96
    zoomed = [frame | {"fl_x": 100 + i, "w": 96, "h": 64} for i, frame in enumerate(listed[2:])]
    Path("transforms.json").write_text(json.dumps({"frames": zoomed}))
    with pytest.raises(ValueError, match="the focal length changes on the way"):
        known_geometry(Path("frames"), Path("transforms.json"), Path("depth.npz"), frames, where)
