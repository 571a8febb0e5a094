"""bench.py: that it runs, measures what it says, and stops when ours and the peer disagree."""

import contextlib
import io
import math
import re
import time

import peers
import pytest
import torch
from goldens import check

import bench
from helios.text import UMT5Encoder
from helios.vae import VAE
from model import Helios, HeliosConfig

CPU = torch.device("cpu")


def setup(rounds: int) -> bench.Setup:
    return bench.Setup(peers.Scale(128, 1, CPU, torch.float32), (64, 64), 4, (16, 16), rounds, CPU)


def table(*words: str) -> dict[str, dict[str, str]]:
    """The printed rows: what -> column -> cell."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert bench.main([*words]) == 0
    lines = [line[2:-2].split(" | ") for line in out.getvalue().splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def complaint(capsys, *words: str) -> str:
    assert bench.main([*words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def rows():
    """Of one run of all parts."""
    return table("--width", "128", "--layers", "1", "--size", "64x64", "--vae-dim", "4", "--vae-size", "16x16",
                 "--rounds", "1", "--device", "cpu")


@pytest.mark.parametrize("names, tolerance, counted", [
    (["DiT call, stage 0", "DiT call, stage 0, warp", "DiT call, stage 1", "DiT call, stage 2"], 1e-4, True),
    (["VAE encode, 33 frames of 16x16, base_dim 4", "VAE decode, 33 frames of 16x16, base_dim 4"], 1e-4, True),
    (["text encoder, 60 words (peer: 512 rows)"], 1e-4, True), (["chunk of 33 frames from a picture"], 1e-3, False),
    (["training step, stage 0, warp"], 1e-4, True), (["load the transformer, read each weight once"], 1e-4, False),
])
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # the peer, under numpy 2
def test_rows(rows, names, tolerance, counted):
    for row in map(rows.get, names):
        ours, peer = float(row["ours, s"]), float(row["peer, s"])
        assert ours > 0 and peer > 0 and float(row["ratio"]) == pytest.approx(ours / peer, abs=0.02, rel=0.02)
        check(f"bench: {names[0].partition(',')[0]}", float(row["largest difference"]), 0.0, tolerance)
        if counted:
            assert float(row["TFLOP/s"]) == pytest.approx(float(row["TFLOP"]) / ours, rel=0.02)


def test_parts_of_a_chunk(rows):
    for side in ("ours, s", "peer, s"):
        seconds = [float(rows[f"of it: {part}"][side]) for part in ("text", "encode", "denoise", "decode")]
        assert min(seconds) > 0
        assert sum(seconds) == pytest.approx(float(rows["chunk of 33 frames from a picture"][side]), rel=0.03)


@pytest.mark.parametrize("part, network, method", [
    ("dit", Helios, "forward"), ("train", Helios, "forward"), ("chunk", Helios, "forward"),
    ("text", UMT5Encoder, "forward"), ("vae", VAE, "encode"),
])
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_a_difference_stops_it(monkeypatch, part, network, method):
    right = getattr(network, method)

    def wrong(*arguments):
        output = right(*arguments)
        return tuple(1.02 * each for each in output) if isinstance(output, tuple) else 1.02 * output

    monkeypatch.setattr(network, method, wrong)
    if part == "chunk":  # what is compared comes before the frames
        frames = torch.zeros(1, 3, 33, 64, 64)
        monkeypatch.setattr(VAE, "decode", lambda vae, latents: frames)
        monkeypatch.setattr("diffusers.AutoencoderKLWan.decode", lambda *arguments, **named: (frames,))
    monkeypatch.setattr(bench, "count_flop", lambda *arguments: 0)  # which takes longer than all else here
    with pytest.raises(ValueError, match="differs from the peer's by"):
        list(bench.PARTS[part](setup(1)))


def test_first_minutes_with_a_card(monkeypatch):
    """All of `python bench.py --device cuda`, here on the CPU and tiny, without the compiler."""
    compiled, cudnn = [], torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", cudnn.deterministic)
    monkeypatch.setattr(Helios, "compile_blocks", lambda model: compiled.append(model))
    rows = table("card", "--width", "128", "--layers", "1", "--size", "64x64", "--vae-dim", "4", "--rounds", "1",
                 "--device", "cpu")
    calls = ["stage 0, 86 % of the warp visible", "stage 0, 47 % of the warp visible", "stage 1", "stage 2"]
    eighths = "DiT call, stage 2, --memory fp8, cast back"
    parts = ["copy of", "warp, preset official", "chunk, preset official", "warp, preset realtime",
             "chunk, preset realtime", "VAE encode", "VAE decode", "Pi3X, 1", "Pi3X, 8", "training step", eighths,
             *(f"DiT call, {call}" for call in calls), *(f"compiled: DiT call, {call}" for call in calls)]
    for part in parts:
        (name,) = [name for name in rows if name.startswith(part) and (part == eighths or name != eighths)]
        assert float(rows[name]["ours, s"]) > 0, part
    assert len(rows) == len(parts) and len(compiled) == 1 and cudnn.deterministic  # as in a user's run
    tokens = [int(rows[f"DiT call, {call}"]["tokens"]) for call in calls]
    assert tokens[0] > tokens[1] and 0 < float(rows[eighths]["largest difference"]) < 0.1


def test_what_a_card_is_asked_for():
    """On CUDA the full size is the default, elsewhere the peers'."""
    assert (bench.parse(["--device", "cuda"]).parts, bench.parse(["--device", "cuda"]).layers) == (["card"], 40)
    assert bench.parse(["--device", "cpu"]).parts == [*bench.PEERED] and bench.parse(["--device", "cpu"]).width == 1024


def test_tokens_of_a_warp():
    """Exactly the invisible columns are dropped, and nothing of the native history."""
    small = Helios(HeliosConfig(1, num_layers=1))
    (_, native), (_, led), *_ = peers.cases(small, (128, 192), bench.SCHEDULE).values()
    rows, columns = 16 // 2, 24 // 2
    coarse = 2 // 2 * rows // 2 * columns // 2 + 16 // 4 * rows // 4 * columns // 4
    warp = 0
    for frame in range(9):
        shown = [column < 24 * (1 - peers.LEAVING * frame) for column in range(24)]
        warp += rows * sum(shown[2 * patch] or shown[2 * patch + 1] for patch in range(columns))
    with torch.no_grad():
        assert small.context(native, (9, 4, 6)).tokens.shape[1] == coarse + 2 * rows * columns
        assert small.context(led, (9, 4, 6)).tokens.shape[1] == coarse + 2 * rows * columns + warp
    assert warp < 9 * rows * columns


def test_race(monkeypatch):
    """Sides take turns, seconds are medians, memory is the largest, outputs of the first round are compared."""
    order, seconds = [], {"ours": iter([1.0, 9.0, 2.0]), "peer": iter([5.0, 4.0, 7.0])}

    def measure(device, name):
        order.append(name)
        second = next(seconds[name])
        return torch.tensor([2.0, 1.0 if name == "ours" else 1.0001 * len(order) / 2]), second, int(second)

    monkeypatch.setattr(bench, "measure", measure)
    row = bench.race(setup(3), "x", "ours", "peer", tokens=7, flop=8)
    assert order == ["ours", "peer"] * 3
    assert (row.what, row.seconds, row.memory, row.tokens, row.flop) == ("x", [2.0, 5.0], (9, 7), 7, 8)
    assert row.difference == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize("ours", [torch.tensor([1.0, math.nan]), torch.tensor([1.0]), torch.tensor([1.0, 2.01])])
def test_compare(ours):
    with pytest.raises(ValueError, match="x: our output"):
        bench.compare("x", ours, torch.tensor([1.0, 2.0]), 1e-3)
    near = torch.tensor([1.0, 2.001])
    assert bench.compare("x", near, torch.tensor([1.0, 2.0]), 1e-3) == pytest.approx(5e-4, rel=0.01)


@pytest.mark.skipif(bench.host_memory("VmRSS") is None, reason="needs /proc/self/status")
def test_measure():
    """Of what a call takes and gives back, the peak; and its time."""
    def call():
        time.sleep(0.05)
        return torch.ones(2**24).sum() + torch.ones(2**24).sum()  # 64 MiB, twice in turn

    for _ in range(2):
        _, seconds, memory = bench.measure(CPU, call)
        assert 0.05 <= seconds < 5 and 60 < memory / 2**20 < 90


def test_meta():
    lines = {name: row["numbers"] for name, row in table("--meta").items()}
    work = {name: float(value.split()[0]) for name, value in lines.items()}
    assert lines["DiT parameters"] == "14.312 G"
    calls = {}
    for name, value in work.items():
        if match := re.fullmatch(r"DiT call, stage (\d)(, warp)?: (\d+) tokens", name):
            calls[match[1] + (match[2] or "")] = int(match[3]), value
    assert [calls[stage][0] for stage in "012"] == [2400 + 540, 2400 + 2160, 2400 + 8640]
    assert [value for _, value in calls.values()] == [66.5, 237.8, 115.7, 355.9]
    dim, hidden = 5120, 13824
    for stage, (tokens, value) in calls.items():  # the last block does a little less
        target = 540 * 4 ** int(stage[0])
        weights = (4 * dim**2 + 2 * dim * hidden) * tokens + 2 * dim**2 * target
        assert value == pytest.approx(40 * (2 * weights + 4 * dim * (tokens**2 + 512 * target)) / 1e12, rel=0.03)
    full, fp8, stream = (work[f"DiT weights, --memory {mode}"] for mode in ("full", "fp8", "stream"))
    assert full == pytest.approx(14.312e9 * 2 / 2**30, rel=0.01) and 0.5 < fp8 / full < 0.52 and stream < 0.08 * full


@pytest.mark.parametrize("words, expected", [
    (["dti"], "dti: expected some of dit, vae,"), (["--width", "100"], "--width 100: expected a multiple of 128"),
    (["--size", "96x64", "--meta"], "size 96x64: height and width must be multiples of 64"),
    (["--vae-size", "20"], "'20': expected HEIGHTxWIDTH"), (["--rounds", "0"], "--rounds 0"),
    (["--layers", "-1"], "--layers -1"), (["--vae-dim", "0"], "--vae-dim 0"),
    (["--device", "foo", "text"], "device 'foo': expected cpu, mps, cuda"), (["--device", "cuda:99"], "no such device"),
])
def test_bad_words(capsys, words, expected):
    assert expected in complaint(capsys, *words)


def test_missing_peers(capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "peft" else name)
    assert "peft: not installed; the peers come with pip install '.[test]'" in complaint(capsys, "dit")
