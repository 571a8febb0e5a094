"""Memory modes: streamed weights give bit-equal results in little memory, fp8 weights nearly equal ones."""

import collections
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import goldens
import pytest
import torch
import torch.nn.functional as F
from goldens import DISTILLED, check
from safetensors.torch import save_file
from test_model import CASES, loss_of, matrices, run

from files.checkpoint import load, quantize, read_config, weight_files
from helios import stream
from helios.load import encode_prompts, files_read, halve, load_models
from helios.lora import Lora
from helios.stream import load_streamed
from helios.text import UMT5Encoder
from model import Helios, HeliosConfig, Linear

PLAIN = [case for case in CASES if not CASES[case]["config_override"]]


def deep_checkpoint(folder, layers: int, dtype: torch.dtype = torch.float32):
    """The golden transformer with as many blocks as asked for, each a little different."""
    config = replace(read_config(HeliosConfig, DISTILLED / "transformer" / "config.json"), num_layers=layers)
    with torch.device("meta"):
        names = Helios(config).state_dict()
    base, generator = load(Helios, DISTILLED / "transformer").state_dict(), torch.Generator().manual_seed(0)
    state = {name: base[re.sub(r"blocks\.\d+", "blocks.0", name)] * (0.9 + 0.2 * torch.rand(1, generator=generator))
             for name in names}
    save_file({name: value.to(dtype) for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return folder


def streamed(folder, dtype: torch.dtype = torch.float32) -> Helios:
    return load_streamed(Helios, folder, "cpu", dtype, "blocks", ("attn2.to_k",))


def some_lora(model: Helios) -> Lora:
    generator, adapters = torch.Generator().manual_seed(1), {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and "attn1" in name:
            out, into = layer.weight.shape
            adapters[name] = torch.randn(4, into, generator=generator) / 10, torch.randn(out, 4, generator=generator) / 10, 1.0
    return Lora("some", adapters)


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_equals_full(tmp_path, layers, dtype):
    """Outputs and, in training, gradients, with a LoRA and again and again; also where both dtypes are cast (from fp32)."""
    folder = deep_checkpoint(tmp_path, layers)
    models, results = (load(Helios, folder, dtype=dtype), streamed(folder, dtype)), []
    lora = some_lora(models[0])
    for model in models:
        model.checkpointing = model.keep_attention = True
        with torch.no_grad():
            made = [run(model, case) for case in ("all_bands", "wah_masks_thr0.1") * 2]
        for _ in range(2):
            loss_of(model, "wah_masks_thr0.1", lora).backward()
            made += [matrix.grad.clone() for matrix in matrices(lora)]
        results.append(made)
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*results))


@pytest.fixture
def reads(monkeypatch):
    """The blocks that are read, in order."""
    order, original = [], stream.BlockStream.read

    def read(self, index, used):
        order.append(index)
        return original(self, index, used)

    monkeypatch.setattr(stream.BlockStream, "read", read)
    return order


def source_of(model: Helios) -> stream.BlockStream:
    return next(iter(model.blocks[0]._forward_pre_hooks.values())).func.__self__


@pytest.mark.parametrize("layers", [5, 6])
def test_each_block_is_read_once_and_ahead(tmp_path, reads, layers):
    """Forward passes go up, the backward pass goes down from the two blocks that are still there; the next one is sent for
    as soon as a block is used, if its buffer is free."""
    model = streamed(deep_checkpoint(tmp_path, layers))
    source, up = source_of(model), list(range(layers))
    again = [0] if layers % 2 == 0 else []  # in an odd number of blocks the first and the last share a buffer

    def use(*blocks: int) -> list[int]:
        reads.clear()
        for index in blocks:
            source.arrive(index, None, ())
        source.reader.submit(int).result()  # it has come to the end of what it was asked for
        return reads.copy()

    with torch.no_grad():
        assert use(0) == [0, 1] and use(1) == [2] and use(*up[2:]) == up[3:] + again
        assert use(0) == ([1] if again else [0, 1]) and use(*up[1:]) == up[2:] + again
    assert use(*up) == up[1 if again else 0:]  # the end of a pass that trains: the block before is still there
    assert use(layers - 2) == [layers - 3] and use(*range(layers - 3, -1, -1)) == up[layers - 4::-1]
    assert use(*up) == up[2:]
    model.checkpointing = True
    reads.clear()
    loss_of(model, "all_bands", some_lora(model)).backward()
    assert reads[-layers + 2:] == up[layers - 3::-1]


def test_training_needs_checkpointing(tmp_path):
    """Weights that the backward pass needs may be gone by then; autograd notices."""
    model = streamed(deep_checkpoint(tmp_path, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(model, "all_bands", some_lora(model)).backward()


def test_a_block_that_cannot_be_read(tmp_path):
    model = streamed(deep_checkpoint(tmp_path, 4))
    before = (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="model.safetensors"):
            run(model, "all_bands")
    before.rename(tmp_path / "model.safetensors")  # it is tried again
    assert torch.equal(run(model, "all_bands"), run(load(Helios, tmp_path), "all_bands"))


def test_loading_is_strict(tmp_path):
    folder = deep_checkpoint(tmp_path, 2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ValueError, match="missing blocks.2"):
        streamed(folder)


def test_the_text_encoder_streams_too():
    for prompt in ("", "a red car drives along the road"):
        full, other = (encode_prompts(DISTILLED, prompt, False, False, "cpu", memory).plain for memory in ("full", "stream"))
        assert torch.equal(full, other)


# ------------------------------------------------------------------------------------------------ two simulated streams


class World:
    """Two streams of work, run by chance: what waits for nothing may be next."""

    def __init__(self, seed: int):
        self.chance, self.lock = random.Random(seed), threading.RLock()
        self.computing, self.copying = Lane(self), Lane(self)

    def run(self, until) -> None:
        with self.lock:
            while not until():
                ready = [lane for lane in (self.computing, self.copying) if lane.work and lane.work[0][0].done]
                if not ready:
                    return
                self.chance.choice(ready).work.popleft()[1]()

    def go_on(self) -> None:
        count = self.chance.randrange(6)
        self.run(lambda budget=iter(range(count)): next(budget, None) is None)


class Event:
    def __init__(self, world: World, done: bool = False):
        self.world, self.done = world, done

    def finish(self) -> None:
        self.done = True

    def synchronize(self) -> None:
        self.world.run(lambda: self.done)
        assert self.done


class Lane:
    """A stream: (what it waits for, what it then does), one after the other."""

    def __init__(self, world: World):
        self.world, self.work = world, collections.deque()

    def add(self, action, after: Event | None = None) -> None:
        with self.world.lock:
            self.work.append((after or Event(self.world, True), action))

    def wait_event(self, event: Event) -> None:
        self.add(lambda: None, event)

    def record_event(self) -> Event:
        event = Event(self.world)
        self.add(event.finish)
        return event


class Simulated(stream.Courier):
    """The courier itself, on simulated streams; `leave_out` names one of its three waits."""

    def __init__(self, world: World, size: int, leave_out: str):
        self.world, self.stream, self.leave_out = world, world.copying, leave_out
        self.pinned, self.copied = torch.zeros(size, dtype=torch.uint8), Event(world, True)
        self.told = []  # the streams that the memory of a buffer is told of

    def computing(self):
        lane = self.world.computing
        return SimpleNamespace(record_event=lane.record_event, wait_event=lambda event: None) if (
            self.leave_out == "copied") else lane

    def wait_for_pinned(self) -> None:
        if self.leave_out != "pinned":
            super().wait_for_pinned()

    def copy(self, buffer, used):
        later = SimpleNamespace(copy_=lambda pinned, non_blocking: self.stream.add(lambda: buffer.copy_(pinned)),
                                record_stream=self.told.append)
        return super().copy(later, Event(self.world, True) if self.leave_out == "used" else used)


def wrong_blocks(model: Helios, full: Helios, seed: int, leave_out: str = "") -> int:
    """How often a block was not the one asked for, in two passes of work on streams that run as chance will."""
    source, world, wrong = source_of(model), World(seed), []
    source.courier = Simulated(world, len(source.buffers[0]), leave_out)
    source.asked, source.latest = [None, None], -1

    def compute(index: int) -> None:
        held = source.views(source.buffers[index % 2])
        wrong.append(not all(torch.equal(held[name], value) for name, value in full.blocks[index].named_parameters()))

    with torch.no_grad():
        for index in [*range(len(full.blocks))] * 2:
            source.arrive(index, None, ())
            world.computing.add(partial(compute, index))
            world.go_on()
    source.reader.submit(int).result()
    world.run(lambda: False)
    assert len(wrong) == 2 * len(full.blocks)
    assert len(source.courier.told) > len(full.blocks) and {*source.courier.told} == {world.copying}
    return sum(wrong)


@pytest.fixture
def both(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    folder = deep_checkpoint(tmp_path, 5)
    return streamed(folder), load(Helios, folder)


def test_no_order_of_two_streams_mixes_blocks(both):
    assert [seed for seed in range(60) if wrong_blocks(*both, seed)] == []


@pytest.mark.parametrize("leave_out", ["used", "copied", "pinned"])
def test_each_wait_is_needed(both, leave_out):
    assert any(wrong_blocks(*both, seed, leave_out) for seed in range(60))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the process's memory from /proc")
def test_memory_of_a_streamed_model(tmp_path):
    """Sampling with 24 blocks of width 512 takes the private memory of two blocks and of the pages that one is read from."""
    config = HeliosConfig(num_attention_heads=8, attention_head_dim=64, rope_dim=(24, 20, 20), num_layers=24, ffn_dim=1536,
                          text_dim=32, freq_dim=32)
    with torch.device("meta"):
        state = Helios(config).state_dict()
    zeros = {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in state.items()}
    save_file(zeros, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    script = """if True:
        import sys, threading, time, torch
        from files.checkpoint import load
        from model import Helios, History
        from helios.stream import load_streamed
        torch.set_num_threads(1)
        def memory():
            lines = dict(line.split(":") for line in open("/proc/self/status"))
            return [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")]
        def watch():
            while True:
                peak[:] = map(max, peak, memory())
                time.sleep(0.001)
        def use(model):
            with torch.no_grad():
                context = model.context(History(), (1, 8, 8))
                return model(torch.ones(1, 16, 1, 8, 8), torch.tensor([500.0]), model.text(torch.ones(1, 2, 32)), context)
        torch.nn.functional.linear(torch.ones(64, 512), torch.ones(512, 512))  # what a first product takes for good
        start = memory()
        peak = list(start)
        threading.Thread(target=watch, daemon=True).start()
        model = load_streamed(Helios, sys.argv[1], "cpu", torch.float32, "blocks", ("attn2.to_k",))
        use(model)
        use(model)
        block = sum(value.numel() * 4 for value in model.blocks[0].parameters())
        rest = sum(value.numel() * 4 for name, value in model.named_parameters() if not name.startswith("blocks."))
        print(*((high - low - rest) / block for high, low in zip(peak, start)))
    """
    words = [sys.executable, "-c", script, tmp_path]
    private, all_of_it = map(float, subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {
        "OMP_NUM_THREADS": "1"}, cwd=goldens.GOLDEN.parent.parent).stdout.split())
    goldens.record("memory of a streamed model, private", private, 3, "blocks")
    assert 1.5 < private < 3 and all_of_it < 4, f"{private:.2f} blocks of 24 private, {all_of_it:.2f} with the file's pages"


# ---------------------------------------------------------------------------------------------------------------- fp8


def test_quantized_weights():
    """Error of a layer of full width with normal weights: that of 3 bits of mantissa; a row of zeros stays zero."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(512, 5120, generator=generator) / 72, torch.randn(64, 5120, generator=generator)
    weight[7] = 0
    for dtype in (torch.float32, torch.bfloat16):
        layer = Linear(5120, 512).to(dtype)
        (float8, layer.scale), layer.bias.data = quantize(weight, dtype), torch.zeros(512, dtype=dtype)
        layer.weight = torch.nn.Parameter(float8, requires_grad=False)
        assert float8.dtype == torch.float8_e4m3fn and layer.scale.shape == (512,)
        actual, expected = layer(x.to(dtype)).float(), F.linear(x, weight)
        assert not actual[:, 7].any()
        check("fp8 layer of width 5120, relative rms", (actual - expected).norm() / expected.norm(), torch.tensor(0.0), 0.03)
    halves = torch.tensor([[448.0, 1.0, -1.125, 0.0], [1.0, 0.5, 0.25, -0.125]])
    float8, scale = quantize(halves, torch.float32)
    torch.testing.assert_close(float8.float() * scale[:, None], halves, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", PLAIN)
def test_fp8_forward(case):
    full, quantized = (load_models(Helios, DISTILLED, "cpu", memory).transformer for memory in ("full", "fp8"))
    kinds = {name: value.dtype for name, value in quantized.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float8_e4m3fn} == {
        f"{name}.weight" for name, layer in full.named_modules() if isinstance(layer, Linear)}
    expected = run(full, case)
    error = (run(quantized, case) - expected).norm() / expected.norm()
    check("fp8 forward, relative rms", error, torch.tensor(0.0), 0.06)
    assert error > 0.001


def test_float8_times_float8():
    """As cards multiply them, here by the CPU's kernel: rows of x are rounded too, and training casts back."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(512, 1024, generator=generator) / 32, torch.randn(2, 24, 1024, generator=generator)
    x[0, 3] = 0
    layer = Linear(1024, 512).bfloat16().requires_grad_(False)
    (float8, layer.scale), layer.bias.data = quantize(weight, torch.bfloat16), torch.randn(512).bfloat16()
    layer.weight = torch.nn.Parameter(float8, requires_grad=False)
    expected, cast_back = F.linear(x, weight, layer.bias.float()), layer(x.bfloat16())
    layer.eval().in_float8 = True
    actual = layer(x.bfloat16())
    assert actual.dtype == torch.bfloat16 and torch.equal(actual[0, 3], layer.bias)
    check("fp8 times fp8, relative rms", (actual.float() - expected).norm() / expected.norm(), torch.tensor(0.0), 0.045)
    assert not torch.equal(actual, cast_back)
    assert torch.equal(layer.train()(x.bfloat16()), cast_back)


def test_fp8_trains():
    """Gradients of a LoRA over quantized weights point where those over the full ones do."""
    models, gradients = [load_models(Helios, DISTILLED, "cpu", memory).transformer for memory in ("full", "fp8")], []
    lora = some_lora(models[0])
    for model in models:
        model.checkpointing = True
        loss_of(model, "wah_masks_thr0.1", lora).backward()
        gradients.append(torch.cat([matrix.grad.flatten() for matrix in matrices(lora)]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("memory", ["full", "fp8", "stream"])
def test_compiled_blocks(tmp_path, monkeypatch, memory):
    """Each block is one graph without breaks, for all sizes of history and target, without and with a LoRA, and few are enough."""
    compiler, graphs, original = torch._dynamo, [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend=backend, **options))
    compiler.reset()
    folder = tmp_path / "weights"
    folder.mkdir()
    for part in ("vae", "scheduler"):
        (folder / part).symlink_to(DISTILLED / part)
    (folder / "model_index.json").symlink_to(DISTILLED / "model_index.json")
    (folder / "transformer").mkdir()
    deep_checkpoint(folder / "transformer", 4)
    eager, compiled = (load_models(Helios, folder, "cpu", memory).transformer for _ in range(2))
    compiled.compile_blocks()
    loras = [None, some_lora(eager)] if memory == "full" else [None]
    with torch.no_grad():
        for lora in loras:
            for case in ("all_bands", "wah_masks_thr0.1", "odd_sizes"):
                for model in (eager, compiled):
                    model.set_lora(lora)
                check("compiled blocks", run(compiled, case), run(eager, case), 5e-5)
    assert len(graphs) == 3 * len(loras)  # the first block (whose inputs are views), those between, and the last one
    compiler.reset()


def test_half_the_size(tmp_path):
    """What a card holds of the copy is what it holds of the original, with all files that a run reads."""
    half, whole = tmp_path / "half", tmp_path / "folder" / "whole"
    shutil.copytree(DISTILLED, whole)
    within = "Pi3X/model.safetensors", "lora.safetensors", "taew2_1.pth"
    (whole / "Pi3X").mkdir()
    for name in within:
        (whole / name).write_bytes(name.encode())
    halve(Helios, whole, half)
    assert all((half / name).read_bytes() == name.encode() for name in within)
    for part, network in (("transformer", Helios), ("text_encoder", UMT5Encoder)):
        ours, theirs = (load(network, folder / part, "cpu", torch.bfloat16).state_dict() for folder in (half, DISTILLED))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        sizes = [sum(file.stat().st_size for file in weight_files(folder / part)) for folder in (half, DISTILLED)]
        assert sizes[0] < 0.65 * sizes[1]
    assert all((half / file.relative_to(DISTILLED)).is_file() for file in files_read(DISTILLED))
    assert (half / "vae" / "config.json").read_bytes() == (DISTILLED / "vae" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="half: exists already"):
        halve(Helios, DISTILLED, half)
    assert {file.name for file in tmp_path.iterdir()} == {"half", "folder"}
