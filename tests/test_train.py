"""Training against the official numbers: conditions, histories, losses, gradients, updates, choices."""

import re

import numpy as np
import pytest
import torch
from goldens import DISTILLED, HELIOS, INPUTS, cases, check, tensors
from training import RANK

from clips import Choices, Condition, Conditions, draw_case, item_order
from files.checkpoint import load
from geometry.camera import normalize
from helios.flow import load_schedule
from helios.load import Models, Prompts, add_trigger, embed_prompts
from helios.vae import VAE
from model import Helios
from render import make_warp
from train import TARGETS, Recipe, Trainer, build_history, draw_items, learning_rate
from wah import Rollout

GOLDEN = tensors(HELIOS / "train.safetensors")
CASES = cases(HELIOS / "train_cases.json")
SAMPLING = cases(HELIOS / "train_sampling.json")


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
    assert transformer.training  # in which fp8 weights are cast back
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
