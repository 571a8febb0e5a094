"""bench.py: that it runs, measures what it says, and stops when ours and the peer disagree."""

import math
import re
import time

import pytest
import torch

import bench
from goldens import check
from model import Helios
from text import UMT5Encoder
from vae import VAE

TINY = ["--width", "128", "--layers", "1", "--size", "64x64", "--vae-dim", "4", "--vae-size", "16x24",
        "--device", "cpu"]


def table(capsys, *words: str) -> dict[str, dict[str, str]]:
    """The printed rows: what -> column -> cell."""
    assert bench.main([*words]) == 0
    lines = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def complaint(capsys, *words: str) -> str:
    assert bench.main([*words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("part, names, compared", [
    ("dit", ["DiT call, stage 0", "DiT call, stage 0, warp", "DiT call, stage 1", "DiT call, stage 2"], 4),
    ("vae", ["VAE encode, 33 frames of 16x24, base_dim 4", "VAE decode, 33 frames of 16x24, base_dim 4"], 2),
    ("text", ["text encoder, 60 words (peer: 512 rows)"], 1),
    ("chunk", [f"chunk: {name}" for name in ("text", "encode", "denoise", "decode", "whole")], 1),
    ("train", ["training step, stage 0, warp"], 1),
    ("load", ["load the transformer, read each weight once; private memory of the host"], 1),
])
def test_parts(capsys, part, names, compared):
    rows = table(capsys, part, *TINY, "--rounds", "1")
    assert set(names) <= rows.keys()
    for name in names:
        ours, peer = float(rows[name]["ours, s"]), float(rows[name]["peer, s"])
        assert ours > 0 and peer > 0 and float(rows[name]["ratio"]) == pytest.approx(ours / peer, abs=0.02, rel=0.02)
    differences = [float(rows[name]["largest difference"]) for name in names if rows[name]["largest difference"]]
    assert len(differences) == compared
    for difference in differences:
        check(f"bench {part} (peers, random)", difference, 0.0, 1e-4 if part != "chunk" else 1e-3)
    if part == "chunk":
        seconds = [float(rows[name]["ours, s"]) for name in names]
        assert sum(seconds[:-1]) == pytest.approx(seconds[-1], rel=0.02)


@pytest.mark.parametrize("part, network, method", [
    ("dit", Helios, "forward"), ("train", Helios, "forward"), ("chunk", Helios, "forward"),
    ("text", UMT5Encoder, "forward"), ("vae", VAE, "encode"),
])
def test_a_difference_stops_it(capsys, monkeypatch, part, network, method):
    right = getattr(network, method)

    def wrong(*arguments):
        output = right(*arguments)
        return tuple(1.02 * each for each in output) if isinstance(output, tuple) else 1.02 * output

    monkeypatch.setattr(network, method, wrong)
    assert "differs from the peer's by" in complaint(capsys, part, *TINY, "--rounds", "1")


def test_tokens_of_a_warp():
    """Exactly the invisible columns are dropped, and nothing of the native history."""
    small = Helios(bench.HeliosConfig(1, num_layers=1))
    (_, native, _), (_, led, _), *_ = bench.cases(small, (128, 192))
    rows, columns = 16 // 2, 24 // 2
    coarse = 2 // 2 * rows // 2 * columns // 2 + 16 // 4 * rows // 4 * columns // 4
    warp = 0
    for frame in range(9):
        shown = [column < 24 * (1 - bench.LEAVING * frame) for column in range(24)]
        warp += rows * sum(shown[2 * patch] or shown[2 * patch + 1] for patch in range(columns))
    with torch.no_grad():
        assert small.context(native, (9, 4, 6)).tokens.shape[1] == coarse + 2 * rows * columns
        assert small.context(led, (9, 4, 6)).tokens.shape[1] == coarse + 2 * rows * columns + warp
    assert warp < 9 * rows * columns


def setup(rounds: int) -> bench.Setup:
    return bench.Setup(128, 1, (64, 64), rounds, 4, (16, 16), torch.device("cpu"), torch.float32)


def test_race():
    """Sides take turns, seconds are medians, memory is the largest, outputs of the first round are compared."""
    order, seconds = [], {"ours": iter([1.0, 9.0, 2.0]), "peer": iter([5.0, 4.0, 7.0])}

    def side(name):
        order.append(name)
        second = next(seconds[name])
        output = torch.tensor([2.0, 1.0 if name == "ours" else 1.0001])
        return bench.Sample(output, {"part": 0.1, "x": second}, int(second))

    part, row = bench.race(setup(3), lambda: side("ours"), lambda: side("peer"), tokens=7, flop=8)
    assert order == ["ours", "peer"] * 3
    assert part == bench.Row("part", [0.1, 0.1])
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
        sample = bench.measure("x", torch.device("cpu"), call)
        assert sample.seconds["x"] >= 0.05 and 60 < sample.memory / 2**20 < 90


def test_meta(capsys):
    lines = {name: row["numbers"] for name, row in table(capsys, "--meta").items()}
    work = {name: float(value.split()[0]) for name, value in lines.items()}
    assert lines["parameters: DiT"] == "14.312 G" and lines["parameters: text encoder"] == "5.681 G"
    calls = {}
    for name, value in work.items():
        if match := re.fullmatch(r"DiT call, stage (\d)(, warp)?: (\d+) tokens", name):
            calls[match[1] + (match[2] or "")] = int(match[3]), value
    assert [calls[stage][0] for stage in "012"] == [2400 + 540, 2400 + 2160, 2400 + 8640]
    dim, hidden = 5120, 13824
    for stage, (tokens, value) in calls.items():  # the last block does a little less
        target = 540 * 4 ** int(stage[0])
        weights = (4 * dim**2 + 2 * dim * hidden) * tokens + 2 * dim**2 * target
        assert value == pytest.approx(40 * (2 * weights + 4 * dim * (tokens**2 + 512 * target)) / 1e12, rel=0.03)
    plain = 2 * sum(calls[stage][1] for stage in "012") + work["VAE decode, 33 frames"]
    assert work["chunk of (2, 2, 2) steps, decoded"] == pytest.approx(plain, abs=1)
    led = plain + 2 * (calls["0, warp"][1] - calls["0"][1]) + work["VAE encode, 33 frames"]
    assert work["chunk with a warp, encoded too"] == pytest.approx(led, abs=1)
    full, fp8, stream = (work[f"DiT weights, --memory {mode}"] for mode in ("full", "fp8", "stream"))
    assert full == pytest.approx(14.312e9 * 2 / 2**30, rel=0.01) and 0.5 < fp8 / full < 0.52 and stream < 0.08 * full


@pytest.mark.parametrize("words, expected", [
    (["dti"], "parts is ['dti'], expected some of dit, vae,"),
    (["--width", "100"], "width is 100, expected a multiple of 128"),
    (["--size", "96x64"], "size is 96x64, expected multiples of 64"), (["--vae-size", "20x16"], "vae-size is 20x16"),
    (["--rounds", "0"], "rounds is 0"), (["--layers", "0"], "layers is 0"), (["--threads", "0"], "threads is 0"),
    (["--vae-dim", "0"], "vae-dim is 0"),
])
def test_bad_words(capsys, words, expected):
    assert expected in complaint(capsys, *words)


def test_missing_peers(capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "peft" else name)
    assert "peft is not installed: the peers come with pip install '.[test]'" in complaint(capsys, "dit", *TINY)
