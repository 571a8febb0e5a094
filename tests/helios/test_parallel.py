"""Several processes against one, over gloo: divided weights and tokens, LoRA, fp8, guidance; what is read; how they end.

This process is rank 0; others `follow` it, a set of them for each number of processes.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from goldens import DISTILLED, check
from safetensors.torch import save_file
from test_stream import some_lora
from torch import nn

import files
from clips import Condition
from files import checkpoint
from files.checkpoint import build, fill, load, read_config, weight_files
from files.cli import deferred_interrupt
from helios import parallel
from helios.flow import load_schedule
from helios.load import embed_prompts, encode_each, load_models, load_network
from helios.lora import Lora
from helios.parallel import TokenShare, WeightShare
from helios.team import SPLITS, Led, Team, ranks
from helios.text import UMT5Config, UMT5Encoder
from model import Band, Helios, HeliosConfig, History
from render import Warp
from train import Recipe, Trainer, build_history
from train import check as check_training
from train import parse as parse_training
from wah import Options, Rollout

ROOT = Path(files.__file__).parents[1]
FOLLOW = "import torch; torch.set_num_threads(1); from helios.team import follow; from model import Helios; follow(Helios)"
PROMPT = "a street"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The golden checkpoint, with a random transformer of four heads."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    shutil.copytree(DISTILLED, folder)
    config = replace(read_config(HeliosConfig, folder / "transformer" / "config.json"), num_attention_heads=4, is_amplify_history=True)
    torch.manual_seed(0)
    network = Helios(config)
    for parameter in network.parameters():
        if parameter.ndim < 2 or min(parameter.shape) < 3:
            nn.init.normal_(parameter, std=0.3)
    for name, module in network.named_modules():
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for file in weight_files(folder / "transformer"):
        file.unlink()
    for file in (folder / "transformer").glob("*.index.json"):
        file.unlink()
    save_file(dict(network.state_dict()), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps(asdict(config)))
    return folder


@pytest.fixture(scope="module")
def lora(weights):
    """Half of its layers have kohya's names."""
    whole = some_lora(load(Helios, weights / "transformer"))
    names = {name: name.replace(".", "_") if index % 2 else name for index, name in enumerate(whole.adapters)}
    return Lora("some", {names[name]: adapter for name, adapter in whole.adapters.items()})


def free_port() -> str:
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return str(any_port.getsockname()[1])


def environment(rank: int, size: int, port: str) -> dict:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port}


@pytest.fixture(scope="module", params=[2, 4])
def team(request):
    port, before = free_port(), signal.getsignal(signal.SIGTERM)
    others = [subprocess.Popen([sys.executable, "-c", FOLLOW], cwd=ROOT, env=os.environ | environment(rank, request.param, port))
              for rank in range(1, request.param)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(0, request.param, port).items():
            patch.setenv(name, value)
        made = Team(Helios)
    yield made
    made.end()
    signal.signal(signal.SIGTERM, before)
    assert [other.wait(20) for other in others] == [0] * len(others)


def make(weights, lora, memory: str, guidance: float, load_network=load_network):
    """Latents and frames of two chunks with a warp whose mask leaves an uneven number of tokens."""
    def embed(*words):
        return embed_prompts(*words, load_network=load_network)

    (prompts,) = encode_each(weights, [PROMPT], lora is not None, guidance > 1, "cpu", memory, embed)
    models = load_models(Helios, weights, "cpu", memory, "wan", load_network)
    generator = torch.Generator().manual_seed(3)
    picture = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    visible = torch.ones(1, 1, 33, 64, 64)
    visible[..., :20, :13] = visible[:, :, 9:, 40:, 25:] = 0
    warp = Warp(picture[:, :, None].expand(-1, -1, 33, -1, -1), visible)
    options = Options(steps=(1, 1, 1), guidance=guidance, amplify_first_chunk=False)
    rollout = Rollout(models, prompts, (64, 64), generator, image=picture, lora=lora, options=options)
    chunks = [rollout.next(warp=warp) for _ in range(2)]
    return torch.cat([chunk.latents for chunk in chunks], 2), torch.cat([chunk.frames for chunk in chunks], 2), rollout


CASES = {"plain": (False, "full", 1.0), "lora": (True, "full", 1.0), "fp8": (True, "fp8", 1.0), "guided": (True, "full", 2.0)}


@pytest.fixture(scope="module")
def alone(weights, lora):
    return {case: make(weights, lora if with_lora else None, *more)[:2] for case, (with_lora, *more) in CASES.items()}


@pytest.mark.parametrize("split", SPLITS)
def test_same_video_as_one_process(team, weights, lora, alone, split, monkeypatch):
    team.begin(split, "cpu")
    uneven = []
    monkeypatch.setattr(TokenShare, "counts", lambda self, total, counts=TokenShare.counts: uneven.append(total % self.size) or counts(self, total))
    for case in CASES if team.size == 2 else ("plain", "lora"):
        with_lora, *more = CASES[case]
        latents, frames, rollout = make(weights, lora if with_lora else None, *more, team.load)
        scale = alone[case][0].abs().max()
        check(f"split={split}, latents", latents / scale, alone[case][0] / scale, 1e-5)
        check(f"split={split}, frames", frames, alone[case][1], 1e-4)
    transformer = rollout.models.transformer
    assert isinstance(transformer, Led)
    block = transformer.blocks[0]
    if split == "weights":
        assert block.attn1.heads == 4 // team.size and block.attn1.to_out[0].weight.shape == (72, 72 // team.size)
        assert block.ffn.net[2].weight.shape == (72, 80 // team.size) and block.attn1.history_key_scale.numel() == 4 // team.size
    else:
        assert block.attn1.heads == 4 and any(uneven)


def test_bytes_moved_are_those_of_the_formula(team, weights, monkeypatch):
    """Of docs/speed.md, without the norms' squares; in fp32, with all tokens visible."""
    sent, size = Counter(), team.size
    reduce, exchange = parallel.dist.all_reduce, parallel.dist.all_to_all_single

    def count_reduced(x, *words, **options):
        sent["weights"] += x.numel() * (x.shape[-1] > 1)
        reduce(x, *words, **options)

    def count_exchanged(came, x, expected, counts, **options):
        sent["tokens"] += x.numel() - counts[0]
        exchange(came, x, expected, counts, **options)

    monkeypatch.setattr(parallel.dist, "all_reduce", count_reduced)
    monkeypatch.setattr(parallel.dist, "all_to_all_single", count_exchanged)
    for split in SPLITS:
        team.begin(split, "cpu")
        network = team.load(Helios, weights / "transformer", "cpu")
        latents, dim, layers = torch.zeros(1, 16, 9, 8, 8), network.config.dim, 2
        context = network.context(History(short=Band(latents, torch.arange(9))), latents.shape[2:])
        text = network.text(torch.zeros(1, 8, 32))
        sent.clear()
        network(latents, torch.tensor([500.0]), text, context)
        total, target = len(context.rope), 144
        if split == "weights":
            blocks = (layers - 1) * (2 * total + target) + 3 * target
            assert sent["weights"] == dim * blocks  # each of which a ring sends 2 (N - 1) / N times
        else:
            own = dim / size * (size - 1) / size
            gathered = target / size * (size - 1) * network.proj_out.out_features
            assert sent["tokens"] == own * ((layers - 1) * 4 * total + 2 * total + 2 * target) + gathered


def test_stream_with_divided_tokens(team, weights, lora, alone):
    team.begin("tokens", "cpu")
    latents = make(weights, lora, "stream", 1.0, team.load)[0]
    scale = latents.abs().max()
    check("split=tokens, latents", latents / scale, alone["lora"][0] / scale, 1e-5)
    team.begin("weights", "cpu")
    with pytest.raises(ValueError, match="stream"):
        make(weights, lora, "stream", 1.0, team.load)


def test_training_shares_its_draws(team):
    """Three draws, which no two or four processes share evenly, in two stages: losses, gradients and updates are those of
    one process, that a state of it goes on from."""
    generator = torch.Generator().manual_seed(5)
    target, image, fake, warp = (torch.randn(1, 16, frames, 8, 8, generator=generator) for frames in (9, 1, 1, 9))
    condition = Condition(target, image, fake, warp, (torch.rand(1, 1, 9, 8, 8, generator=generator) > 0.4).float())
    recipe = Recipe(steps=4, draws=3, stages=(0, 1), rank=4, lr=1e-2, warmup=1)
    team.begin("draws", "cpu")
    led = team.load(Helios, DISTILLED / "transformer", "cpu")
    assert led.network.training
    schedule, embeddings = load_schedule(DISTILLED), torch.randn(1, 8, 32, generator=generator)
    alone = Trainer(load(Helios, DISTILLED / "transformer"), schedule, recipe)
    several = Trainer(led.network, schedule, recipe, led)
    for step in range(3):
        if step == 2:  # another number of processes goes on
            goes_on = Trainer(load(Helios, DISTILLED / "transformer"), schedule, recipe)
            goes_on.restore(several.state(), several.steps)
            several, led = goes_on, goes_on.transformer
        found = [trainer.step(build_history(condition, recipe, trainer.generator), condition.target, network.text(embeddings))
                 for trainer, network in ((several, led), (alone, alone.transformer))]
        check("training shared by processes, loss", found[0]["loss"], found[1]["loss"], 1e-5)
        check("training shared by processes, gradient norm", found[0]["grad_norm"] / found[1]["grad_norm"], 1.0, 1e-5)
    for name, matrix in alone.tensors.items():
        check("training shared by processes, LoRA", several.tensors[name].detach(), matrix.detach(), 1e-5)
    assert max(matrix.abs().max() for name, matrix in alone.tensors.items() if "lora_B" in name) > 1e-3


def test_empty_words_of_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert ranks() == (0, 1)


def test_a_run_of_two_is_one_with_twice_the_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("train.ranks", lambda: (0, 2))
    args = parse_training(["--video", "car-roundabout", "--weights", str(DISTILLED), "--device", "cpu", "--set", "draws=3"])
    assert check_training(args).recipe.draws == 6


def test_texts_are_forgotten_together(team, weights):
    """A text that rank 0 no longer has goes from the others with the next call."""
    team.begin("tokens", "cpu")
    network = team.load(Helios, weights / "transformer", "cpu")
    kept = network.text(torch.zeros(1, 8, 32))
    number = kept.number
    del kept
    assert team.forgotten == [number] and number not in team.texts
    network.set_lora(None)
    assert team.forgotten == []


def test_an_interrupt_waits_for_the_call(team, weights, monkeypatch, request):
    """Then it comes, and the team is as before; where it is waited for already (a training step), it goes there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as by a shell's own jobs
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    team.begin("tokens", "cpu")
    network = team.load(Helios, weights / "transformer", "cpu")
    original, done = team.do_text, []

    def interrupted(*words):
        signal.raise_signal(signal.SIGINT)
        done.append(original(*words))
        return done[-1]

    monkeypatch.setattr(team, "do_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        network.text(torch.zeros(1, 8, 32))
    with deferred_interrupt() as asked:
        network.text(torch.zeros(1, 8, 32))
    assert len(done) == 2 and asked.is_set() and team.reason is None


def test_what_cannot_be_divided_is_refused_before_the_others_try(team, weights, tmp_path):
    folder = shutil.copytree(weights / "transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    team.begin("weights", "cpu")
    with pytest.raises(ValueError, match="divided among"):
        team.load(Helios, folder, "cpu")
    with pytest.raises(ValueError, match="cuda:1"):
        team.begin("weights", "cuda:1")


# --------------------------------------------------------------------------------------------------- without processes


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_weights_of_each_process_at_full_size(size):
    """The released shapes can be divided so, and docs/parallel.md says what each process holds."""
    found = []
    for kind, config in ((Helios, HeliosConfig()), (UMT5Encoder, UMT5Config())):
        with torch.device("meta"):
            module = kind(config)
        WeightShare(0, size, None).divide(module)
        held = sum(each.numel() * checkpoint.kept_dtype(module, name, torch.bfloat16).itemsize
                   for name, each in module.named_parameters())
        found.append(f"{held / 2**30:.1f}")
    page = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| {size} |")]
    assert found == [rows[0][1], rows[0][3]]


@pytest.mark.parametrize("kind, part", [(Helios, "transformer"), (UMT5Encoder, "text_encoder")])
@pytest.mark.parametrize("size", [2, 4])
def test_shares_are_read_in_pieces_and_make_the_whole(weights, kind, part, size, monkeypatch):
    """Each tensor is whole on every rank, or a sum, or its parts side by side; no whole file of a part is read."""
    whole = load(kind, weights / part)
    opened = checkpoint.open_safetensors

    class Pieces:
        def __init__(self, path):
            self.file = opened(path)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *_):
            self.file.__exit__(*_)

        def keys(self):
            return self.file.keys()

        def get_slice(self, key):
            return self.file.get_slice(key)

    monkeypatch.setattr(checkpoint, "open_safetensors", Pieces)
    shares = [fill(build(kind, weights / part), weight_files(weights / part), "cpu", torch.float32, share=WeightShare(rank, size, None))
              .state_dict() for rank in range(size)]
    seen = Counter()
    for name, tensor in whole.state_dict().items():
        parts = [share[name] for share in shares]
        if parts[0].shape != tensor.shape:
            axis = 0 if parts[0].shape[0] < tensor.shape[0] else 1
            assert torch.equal(torch.cat(parts, axis), tensor)
            seen[axis] += 1
        elif name.endswith(("to_out.0.bias", "net.2.bias")):
            assert torch.equal(sum(parts), tensor) and not parts[1].any()
            seen["sum"] += 1
        else:
            assert all(torch.equal(share, tensor) for share in parts)
    blocks = 2
    assert seen == ({0: blocks * 19, 1: blocks * 3, "sum": blocks * 3} if kind is Helios else {0: blocks * 5, 1: blocks * 3})


# ------------------------------------------------------------------------------------------------------ the programs


def sample_words(weights, folder) -> list[str]:
    return ["--weights", str(weights), "--size", "64x64", "--frames", "3300", "--set", "device=cpu", "steps=1,1,1", "--out", str(folder / "out.mp4")]


def torchrun(size: int, *words: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={free_port()}"]
    return subprocess.Popen([*launcher, str(ROOT / "sample.py"), *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def children(process: int) -> list[int]:
    """Those of a process, in the order in which they were started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("size, victim", [(2, 1), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_kill_of_one_ends_all_with_one_line(weights, tmp_path, size, victim):
    run = torchrun(size, *sample_words(weights, tmp_path))
    while run.poll() is None and not (tmp_path / "out_parts" / "state.safetensors").exists():
        time.sleep(0.05)
    others = children(run.pid)
    assert len(others) == size
    os.kill(others[victim], signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    said = [line for line in errors.splitlines() if "sample.py: error" in line]
    assert len(said) == 1 and f"one of the {size} processes was stopped" in said[0], errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in others)
    assert "]: Traceback" not in errors  # torchrun's own has no rank in front
