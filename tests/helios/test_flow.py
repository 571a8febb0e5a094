"""flow.py against the official schedule numbers and solver steps, a live diffusers peer, and what must hold exactly."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from goldens import DISTILLED, HELIOS, cases, check, prefixed, tensors
from safetensors import safe_open

from helios.flow import (
    Schedule,
    block_noise,
    dmd,
    downsample_noise,
    endpoints,
    euler,
    guide,
    interval_levels,
    load_schedule,
    renoise,
    sample,
    shift_mu,
    shifted_levels,
    stage_tables,
    table_levels,
    timesteps,
    training_item,
    unipc,
)

SCHEDULE = cases(HELIOS / "schedule.json")
STEPS = tensors(HELIOS / "scheduler_steps.safetensors")
TWO = Schedule(sampler="euler", stages=2, stage_range=(0, 0.5, 1), use_dynamic_shifting=True)
ONE = Schedule(sampler="euler", stages=1, stage_range=(0, 1))


def schedule_of(config: dict) -> Schedule:
    """Goldens name only the settings that differ from the official defaults."""
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return Schedule(sampler=config.pop("scheduler_type"), **config)


def solve(schedule: Schedule, velocity, x, times, sigmas):
    if schedule.sampler == "unipc":
        return unipc(velocity, x, times, sigmas, schedule)
    return {"dmd": dmd, "euler": euler}[schedule.sampler](velocity, x, times, sigmas)


def close(actual, expected):
    """Every single number to 1e-12 of itself, not only of the largest."""
    actual, expected = torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    ratio = torch.where(expected == 0, 1 + actual, actual / expected)
    check("schedule numbers", ratio, torch.ones_like(expected), 1e-12)


# -------------------------------------------------------------------------------------- official numbers


def test_endpoints():
    """Of an official training item; the items themselves are in test_train.py, as a step draws them."""
    golden = tensors(HELIOS / "train.safetensors")
    clean = golden["cond.target_latents"]
    seed = cases(HELIOS / "train_cases.json")["items.release_stage0"]["torch_manual_seed"]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    for end, name in zip(endpoints(clean, noise, load_schedule(DISTILLED), 0), ("start_point", "end_point")):
        check("training items", end, golden[f"items.release_stage0.stage0.{name}"], 1e-5)


@pytest.mark.parametrize("case", SCHEDULE["configs"], ids=lambda case: "-".join(map(str, case["config"].values())))
def test_schedule_numbers(case):
    schedule = schedule_of(case["config"])
    tables = stage_tables(schedule)
    assert len(tables) == len(case["stages"]) == schedule.stages
    for table, expected in zip(tables, case["stages"]):
        assert len(table.timesteps) == len(table.sigmas) == expected["timesteps_per_stage_len"]
        close([table.start, table.end, table.ori_start, *table.ratios],
              [*(expected[f"{name}_sigma"] for name in ("start", "end", "ori_start")), *expected["timestep_ratio"]])
        for name in ("timesteps", "sigmas"):
            close(getattr(table, name)[[0, 333, -1]].tolist(),
                  [expected[f"{name}_per_stage_{place}"] for place in ("first", "[333]", "last")])
        if expected["stage"] > 0:
            close([table.alpha, table.beta],
                  [expected["renoise_alpha(used when entering this stage, i>0)"], expected["renoise_beta"]])

    for run in case["runs"]:
        stage, (t, h, w) = run["stage"], run["full_latent_THW"]
        factor = 2 ** (schedule.stages - 1 - stage)
        mu = shift_mu(torch.Size([1, 16, t, h // factor, w // factor]))
        times, sigmas = timesteps(schedule, stage, run["num_inference_steps_arg"], mu, run["is_amplify_first_chunk"])
        close(mu, run["mu"])
        close(times, run["timesteps"])
        close(sigmas, run["sigmas"])
        assert [int(t) for t in times] == run["timesteps_int"]


@pytest.mark.parametrize("name", SCHEDULE["step_cases"])
def test_solver_steps(name):
    case = SCHEDULE["step_cases"][name]
    schedule = schedule_of(case["config"])
    stage = case["stage"] or 0  # None in the single-stage case
    times, sigmas = timesteps(schedule, stage, case["steps"], case["mu"], case["amplify"])
    close(times, case["timesteps"])
    close(sigmas, case["sigmas"])
    component = f"{schedule.sampler} steps" + (", order 3" if schedule.solver_order == 3 else "")
    tolerance = 2e-5 if schedule.solver_order == 3 else 3e-6
    calls = []

    def velocity(x, t, step):
        check(component, x, STEPS[f"{name}.x{step}"], tolerance)
        calls.append((t, step))
        return STEPS[f"{name}.v{step}"]

    x = solve(schedule, velocity, STEPS[f"{name}.x0"], times, sigmas)
    check(component, x, STEPS[f"{name}.x{len(times)}"], tolerance)
    assert x.dtype == torch.float32 and calls == list(zip(times, range(len(times))))


def test_block_noise():
    """The official gamma, and another one with its own seed."""
    golden = prefixed(tensors(HELIOS / "block_noise.safetensors"), "noise_")
    with safe_open(HELIOS / "block_noise.safetensors", "pt") as file:
        seeds = [int(seed) for seed in re.findall(r"seed (\d+)", file.metadata()["note"])]
    for name, expected in golden.items():
        other = name.startswith("gamma")
        gamma, seed = (float(name[5:]), seeds[1]) if other else (1 / 3, seeds[0])
        noise = block_noise(expected.shape, gamma, torch.Generator().manual_seed(seed), torch.device("cpu"))
        assert noise.dtype == torch.float32
        check("block noise", noise, expected, 1e-5)


# ----------------------------------------------------------------------------------------- diffusers peer

@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # the peer, under numpy 2
@pytest.mark.parametrize("options", [
    dict(sampler="euler", stages=2, stage_range=(0, 0.5, 1), use_dynamic_shifting=True),
    dict(sampler="euler", stages=2, stage_range=(0, 0.3, 1), gamma=0.2, shift=3.0),
    dict(sampler="unipc", stages=2, stage_range=(0, 0.5, 1), disable_corrector=(1, 2), lower_order_final=False,
         solver_order=3),
    dict(sampler="unipc", stages=4, stage_range=(0, 0.2, 0.5, 0.9, 1), num_train_timesteps=500, solver_type="bh1",
         solver_order=4, use_dynamic_shifting=True, time_shift_type="linear"),
    dict(sampler="unipc", stages=1, stage_range=(0, 1), num_train_timesteps=500, use_dynamic_shifting=True),
    dict(sampler="euler", stages=1, stage_range=(0, 1), shift=3.0),
], ids=str)
def test_equals_diffusers(options):
    diffusers = pytest.importorskip("diffusers")
    schedule = Schedule(**options)
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    peer = diffusers.HeliosScheduler(scheduler_type=config.pop("sampler"), **config)
    generator, n, mu = torch.Generator().manual_seed(5), 6, 0.9
    for stage in range(schedule.stages):
        table = stage_tables(schedule)[stage]
        close([table.start, table.end, table.ori_start, *table.timesteps.tolist()],
              [peer.start_sigmas[stage], peer.end_sigmas[stage], peer.ori_start_sigmas[stage],
               *peer.timesteps_per_stage[stage].tolist()])
        times, sigmas = timesteps(schedule, stage, n, mu)
        if schedule.stages == 1:
            peer.set_timesteps(n, sigmas=torch.linspace(0.999, 0, n + 1, dtype=torch.float64).numpy()[:-1], mu=mu)
        else:
            peer.set_timesteps(n, stage, mu=mu)
        close(times, peer.timesteps.tolist())
        close(sigmas, peer.sigmas.tolist())

        # in float64, where unipc must agree but for the clamp of the last sigma (the peer's euler stays in float32)
        x = expected = torch.randn(1, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
        drift = torch.randn(n, *x.shape, generator=generator, dtype=torch.float64)
        for k, t in enumerate(peer.timesteps):
            expected = peer.step(0.3 * expected + drift[k], t, expected, return_dict=False)[0]
        actual = solve(schedule, lambda x, t, step: 0.3 * x + drift[step], x, times, sigmas)
        check("solver steps, diffusers peer", actual, expected, 1e-6, relative=True)


# --------------------------------------------------------------------------------------------- properties

@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("sampler", ["euler", "unipc", "dmd"])
def test_straight_flow_is_exact(sampler, steps):
    """On the straight line from noise to data the velocity is constant: the samplers must land on the data."""
    noise, data = torch.randn(2, 1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    schedule = replace(ONE, sampler=sampler)
    times, sigmas = timesteps(schedule, 0, steps, mu=0.5)
    x = solve(schedule, lambda x, t, step: noise - data, sigmas[0] * noise + (1 - sigmas[0]) * data, times, sigmas)
    # dmd takes the start for noise, although a thousandth of it is data
    within = 0.001 if sampler == "dmd" and steps > 1 else 1e-7
    assert (x - data).abs().max() <= within * (noise - data).abs().max()


def test_unipc_beats_euler():
    """For data from N(0, 1/4) the flow is known: v = (s - (1 - s)/4) / (s^2 + (1 - s)^2/4) x, from 1 at s = .999."""
    exact = 0.5 / math.sqrt(0.999**2 + 0.001**2 / 4)

    def velocity(x, t, step):
        s = t / 1000
        return (s - (1 - s) / 4) / (s**2 + (1 - s) ** 2 / 4) * x

    def error(solver, steps):
        start = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
        return abs(solver(velocity, start, *timesteps(ONE, 0, steps, mu=0.5)).item() - exact)

    assert 3 < error(euler, 10) / error(euler, 40) < 5  # first order
    assert error(unipc, 10) < error(euler, 10) / 10 and error(unipc, 40) < error(euler, 40) / 10


def test_low_precision_velocity_is_not_rounded_again():
    x, v = torch.randn(2, 1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    v = v.bfloat16()
    for solver in (dmd, euler, unipc):
        times, sigmas = timesteps(replace(ONE, sampler=solver.__name__), 0, 3, mu=0.5)
        low = solver(lambda x, t, step: v, x, times, sigmas)
        assert low.dtype == torch.float32 and torch.equal(low, solver(lambda x, t, step: v.float(), x, times, sigmas))


def test_renoised_noise_is_white():
    """Upsampled noise of level ori_start must become white noise of level start, exactly, for every gamma."""
    for schedule in (Schedule(), TWO, replace(TWO, gamma=0.1)):
        for table in stage_tables(schedule)[1:]:
            gamma = schedule.gamma
            block = (1 + gamma) * torch.eye(4, dtype=torch.float64) - gamma
            covariance = (table.alpha * table.ori_start) ** 2 * torch.ones(4, 4) + table.beta**2 * block
            torch.testing.assert_close(covariance, table.start**2 * torch.eye(4, dtype=torch.float64))

    x = torch.randn(1, 8, 2, 40, 40, generator=torch.Generator().manual_seed(2)) * stage_tables(TWO)[1].ori_start
    y = renoise(x, TWO, 1, torch.Generator().manual_seed(4))
    assert y.shape == (1, 8, 2, 80, 80) and abs(y.std() - stage_tables(TWO)[1].start) < 0.01
    blocks = rearrange(y, "b c t (h p) (w q) -> (p q) (b c t h w)", p=2, q=2)
    assert (torch.corrcoef(blocks) - torch.eye(4)).abs().max() < 0.03
    # the mean of a block is untouched but for alpha (and the ridge): the noise sums to zero at gamma 1/3
    torch.testing.assert_close(blocks.mean(0), stage_tables(TWO)[1].alpha * x.flatten(), atol=1e-3, rtol=0)


def test_downsampled_noise():
    noise = torch.randn(1, 2, 3, 8, 12, generator=torch.Generator().manual_seed(6))
    half = 2 * noise.unfold(3, 2, 2).unfold(4, 2, 2).mean((-1, -2))
    torch.testing.assert_close(downsample_noise(noise, 1), half)
    torch.testing.assert_close(downsample_noise(noise, 2), downsample_noise(half, 1))
    assert torch.equal(downsample_noise(noise, 0), noise)


@pytest.mark.parametrize("schedule, steps, amplify", [
    (ONE, [3], False), (replace(ONE, sampler="dmd"), [3], True), (TWO, [2, 3], True),
    (Schedule(sampler="dmd"), [2, 1, 3], False),
    (Schedule(sampler="dmd", use_dynamic_shifting=True, time_shift_type="linear"), [2, 1, 3], True),
    (Schedule(sampler="unipc"), [4, 4, 4], True),
    (replace(TWO, sampler="unipc", solver_order=3, solver_type="bh1", lower_order_final=False, disable_corrector=(1,)),
     [5, 6], False)], ids=str)
def test_sample_walks_the_stages(schedule, steps, amplify):
    noise = torch.randn(1, 4, 3, 8, 16, generator=torch.Generator().manual_seed(8))
    log = []

    def velocity_for(stage, shape):
        log.append((stage, tuple(shape)))

        def velocity(x, t, step):
            assert x.shape == shape and x.dtype == torch.float32
            log.append((stage, step, t))
            return 0.3 * x + 0.1 * step
        return velocity

    result = sample(velocity_for, noise, schedule, steps, torch.Generator().manual_seed(9), amplify)

    expected_log, generator = [], torch.Generator().manual_seed(9)
    x = downsample_noise(noise, schedule.stages - 1)
    for stage, count in enumerate(steps):
        shape = (1, 4, 3, 8 >> (schedule.stages - 1 - stage), 16 >> (schedule.stages - 1 - stage))
        mu = shift_mu(x.shape)  # before upsampling
        x = x if stage == 0 else renoise(x, schedule, stage, generator)
        times, sigmas = timesteps(schedule, stage, count, mu, amplify)
        assert len(times) == count * (2 if amplify and schedule.sampler == "dmd" else 1)
        expected_log.append((stage, shape))
        expected_log += [(stage, k, float(math.trunc(t)) if schedule.stages > 1 else t) for k, t in enumerate(times)]
        x = solve(schedule, lambda x, t, step: 0.3 * x + 0.1 * step, x, times, sigmas)
    assert log == expected_log
    assert torch.equal(result, x) and result.shape == noise.shape


def test_guide():
    cond, uncond = torch.randn(2, 2, 3, 2, 4, 1, generator=torch.Generator().manual_seed(10))
    torch.testing.assert_close(guide(cond, uncond, 5.0, zero_star=False), 5 * cond - 4 * uncond)
    fit = torch.stack([(c * u).sum() / (u * u).sum() for c, u in zip(cond, uncond)]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(guide(cond, uncond, 5.0, zero_star=True), 5 * cond - 4 * fit * uncond)
    torch.testing.assert_close(guide(cond, 3 * uncond, 5.0, zero_star=True), 5 * cond - 4 * fit * uncond)
    assert torch.equal(guide(cond, torch.zeros_like(cond), 2.0, zero_star=True), 2 * cond)  # no division by zero
    strided = [x.transpose(1, 2) for x in (cond, uncond)]
    torch.testing.assert_close(guide(*strided, 5.0, zero_star=True), (5 * cond - 4 * fit * uncond).transpose(1, 2))


# ------------------------------------------------------------------------------------------ configurations

RELEASED = {"stages": 3, "stage_range": [0, 1 / 3, 2 / 3, 1], "gamma": 1 / 3, "shift": 1.0,
            "use_dynamic_shifting": True, "time_shift_type": "linear"}


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the distilled model's two files, as released, and a function that changes entries of either (... removes one)."""
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(DISTILLED / name, tmp_path / name)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | RELEASED))

    def change(name="scheduler/scheduler_config.json", **entries):
        content = json.loads((tmp_path / name).read_text()) | entries
        (tmp_path / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        return tmp_path
    return change


def test_load_schedule(checkpoint):
    released = Schedule("dmd", use_dynamic_shifting=True, time_shift_type="linear")
    assert load_schedule(checkpoint()) == released
    for folder in (DISTILLED, HELIOS / "mid"):
        entries = cases(folder / "scheduler" / "scheduler_config.json")
        schedule = load_schedule(folder)
        for name in vars(schedule).keys() & entries.keys():
            assert getattr(schedule, name) == (tuple(entries[name]) if isinstance(entries[name], list) else entries[name])
    assert load_schedule(DISTILLED).sampler == "dmd" != load_schedule(HELIOS / "mid").sampler
    folder = checkpoint(solver_order=3, stages=2, stage_range=[0, 0.5, 1], disable_corrector=[0], gamma=0.2, new_key=1)
    assert load_schedule(folder) == Schedule(
        "dmd", stages=2, stage_range=(0, 0.5, 1), gamma=0.2, use_dynamic_shifting=True, time_shift_type="linear",
        solver_order=3, disable_corrector=(0,))


def test_dmd_by_class_or_by_type(checkpoint):
    index = dict(name="model_index.json", scheduler=["diffusers", "HeliosScheduler"])
    assert load_schedule(checkpoint(scheduler_type="euler")).sampler == "dmd"  # class in model_index.json
    assert load_schedule(checkpoint(scheduler_type=..., time_shift_type=...)).time_shift_type == "linear"
    assert load_schedule(checkpoint(**index)).sampler == "unipc"
    assert load_schedule(checkpoint(**index)).time_shift_type == "exponential"
    assert load_schedule(checkpoint(scheduler_type="dmd")).sampler == "dmd"
    assert load_schedule(checkpoint(scheduler_type="euler")).sampler == "euler"
    assert load_schedule(checkpoint(_class_name="HeliosDMDScheduler")).sampler == "dmd"


def test_a_single_stage_has_the_whole_range(checkpoint):
    """A file may still hold the default for three, which the official program doesn't look at then."""
    assert load_schedule(checkpoint(stages=1)).stage_range == (0, 1)


@pytest.mark.parametrize("entries, found", [
    (dict(prediction_type="epsilon"), "prediction_type is 'epsilon'"),
    (dict(thresholding=True), "thresholding is True"),
    (dict(predict_x0=False), "predict_x0 is False"),
    (dict(solver_p="x"), "solver_p is 'x'"),
    (dict(stage_range=[0, 0.5, 1]), "stage_range is (0, 0.5, 1), expected 4 numbers"),
    (dict(stage_range=[0, 0.6, 0.5, 1]), "stage_range is (0, 0.6, 0.5, 1)"),
    (dict(stage_range=[0, 0.3, 0.6, 0.9]), "stage_range is"),
    (dict(stage_range=[0, "a", 0.5, 1]), "stage_range is (0, 'a', 0.5, 1)"),
    (dict(stages=2.0), "stages is 2.0"),
    (dict(stages=0), "expected 1 numbers, as stages is 0"),
    (dict(stages=0, stage_range=[]), "stage_range is (), expected"),
    (dict(shift=3.0), "shift is 3.0"),
    (dict(shift=-1, use_dynamic_shifting=False), "shift is -1"),
    (dict(shift="1"), "shift is '1'"),
    (dict(gamma=0.5), "gamma is 0.5"),
    (dict(gamma=0.0), "gamma is 0.0"),
    (dict(gamma=math.nan), "gamma is nan"),
    (dict(use_dynamic_shifting=1), "use_dynamic_shifting is 1"),
    (dict(time_shift_type="log"), "time_shift_type is 'log'"),
    (dict(num_train_timesteps=1), "num_train_timesteps is 1"),
    (dict(solver_order=0), "solver_order is 0"),
    (dict(solver_type="heun"), "solver_type is 'heun'"),
    (dict(disable_corrector=3), "disable_corrector is 3"),
], ids=lambda value: str(value)[:40])
def test_bad_scheduler_config(checkpoint, entries, found):
    with pytest.raises(ValueError) as error:
        load_schedule(checkpoint(**entries))
    message = str(error.value)
    assert "scheduler_config.json: " in message and found in message and "expected" in message and "\n" not in message


def test_bad_checkpoint_files(checkpoint):
    for scheduler in (..., None, "HeliosPipeline", [], ["diffusers", "DDIMScheduler"], ["diffusers", []]):
        with pytest.raises(ValueError, match=r"model_index.json: scheduler is .* expected \[..., HeliosScheduler"):
            load_schedule(checkpoint("model_index.json", scheduler=scheduler))
    folder = checkpoint("model_index.json", scheduler=["diffusers", "HeliosScheduler"])
    with pytest.raises(ValueError, match="scheduler_config.json: sampler is 'ddim', expected"):
        load_schedule(checkpoint(scheduler_type="ddim"))
    for content in ("{", "[1]", "\x00"):
        (folder / "scheduler" / "scheduler_config.json").write_text(content)
        with pytest.raises(ValueError, match="scheduler_config.json: "):
            load_schedule(folder)
    with pytest.raises(OSError):
        load_schedule(folder / "nowhere")


def test_training_items_of_a_batch():
    """Every sample has its own u; one stage is plain flow matching from noise to data; u spans the table."""
    clean, noise = torch.randn(3, 4, 2, 8, 8), torch.randn(3, 4, 2, 8, 8)
    u = torch.tensor([0.0, 0.4, 1.0])
    for schedule, stage in ((ONE, 0), (TWO, 0), (TWO, 1), (Schedule(), 1)):
        item = training_item(clean, noise, u, schedule, stage)
        assert item.sigma[0] == 0.999 and item.sigma[2] < 1e-3 + 1e-6 and item.timestep.shape == (3,)
        for i in range(3):
            alone = training_item(clean[i:i + 1], noise[i:i + 1], u[i:i + 1], schedule, stage)
            assert torch.equal(alone.latents[0], item.latents[i]) and torch.equal(alone.target[0], item.target[i])
    item = training_item(clean, noise, u, ONE, 0)
    assert torch.equal(item.target, noise - clean)
    torch.testing.assert_close(item.latents[1], 0.5994 * noise[1] + 0.4006 * clean[1])
    assert len(table_levels(u, ONE, 0, clean.shape)[0]) == 3


def test_stages_meet():
    """The velocity of a training pair leads, over the stage's whole clock, to where the sampler enters the next stage:
    upsampled and renoised, the end of one stage has the clean part of the start of the next, and white noise of its
    level: of four equal pixels and block noise, whose neighbours have the covariance -gamma."""
    schedule, clean = Schedule(), torch.randn(1, 2, 1, 8, 8)
    for stage in (0, 1):
        none = torch.zeros_like(clean)
        _, end = endpoints(clean, none, schedule, stage)
        start, _ = endpoints(clean, none, schedule, stage + 1)
        table = stage_tables(schedule)[stage + 1]
        torch.testing.assert_close(table.alpha * end.repeat_interleave(2, -1).repeat_interleave(2, -2), start)
        equal, block = (table.alpha * table.ori_start) ** 2, table.beta**2
        assert equal + block == pytest.approx(table.start**2) and equal == pytest.approx(schedule.gamma * block)


def test_exponential_shift_is_bounded_in_training():
    u, shape = torch.tensor([0.5]), torch.Size([1, 16, 99, 512, 512])
    schedule = replace(ONE, use_dynamic_shifting=True)
    _, sigma = shifted_levels(u, schedule, 0, shape)
    plain = table_levels(u, schedule, 0, shape)[1]
    torch.testing.assert_close(sigma / (1 - sigma), 7 * plain / (1 - plain))


def test_bad_interval():
    with pytest.raises(ValueError, match="1 steps at stage 0: expected at least 2"):
        interval_levels(torch.rand(1), ONE, 0, torch.Size([1, 16, 9, 8, 8]), steps=1)


def test_bad_steps_and_sizes():
    noise, generator = torch.zeros(1, 4, 3, 8, 16), torch.Generator()
    for steps in ([2], [2, 0], [2, 2, 2]):
        with pytest.raises(ValueError, match="steps per stage are .* expected 2 numbers"):
            sample(None, noise, TWO, steps, generator)
    with pytest.raises(ValueError, match=r"latents are \[1, 4, 3, 6, 16\], expected height and width .* multiples of 4"):
        sample(None, noise[..., :6, :], Schedule(), [2, 2, 2], generator)
