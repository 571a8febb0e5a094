"""Memory on three systems, devices, and what a run says that memory is too small for."""

import argparse
import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from files import machine
from files.cli import run_program
from files.machine import (
    choose_products,
    free_memory,
    host_memory,
    multiplies_float8,
    network_dtype,
    peak_memory,
    use_device,
)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux itself")
def test_linux():
    free, peak = host_memory()
    assert 2**20 < free < 2**50 and 2**24 < peak < 2**40
    held = bytearray(2**28)
    assert host_memory()[1] > peak - 2**20 and len(held) and free_memory("cpu") > 0
    assert peak_memory("cpu").endswith("GiB of memory")


def test_macos(monkeypatch):
    text = ("Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:      100.\nPages active:   900.\n"
            "Pages inactive:    20.\nPages speculative:  3.\nPages throttled: 7.\n")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: SimpleNamespace(stdout=text))
    import resource

    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**30))
    assert host_memory() == (123 * 16384, 3 * 2**30)
    assert peak_memory("cpu") == "3.00 GiB of memory"


def test_windows(monkeypatch):
    """The two structures as Windows fills them: 64 bytes, and the process's, whose second word is the peak."""

    def status(pointer):
        fields = pointer._obj
        assert ctypes.sizeof(fields) == 64 and ctypes.c_uint32.from_buffer(fields).value == 64
        fields[1], fields[2] = 16 * 2**30, 5 * 2**30
        return 1

    def counters(process, pointer, size):
        fields, word = pointer._obj, ctypes.sizeof(ctypes.c_size_t)
        assert process.value == 2 ** (8 * word) - 1 and size == ctypes.sizeof(fields)
        assert ctypes.c_uint32.from_buffer(fields).value == size
        fields[1], fields[2] = 2 * 2**30, 2**30
        return 1

    kernel = SimpleNamespace(GlobalMemoryStatusEx=status, K32GetProcessMemoryInfo=counters)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it is an error
    assert host_memory() == (5 * 2**30, 2 * 2**30)
    assert free_memory("cpu") == 5 * 2**30


def test_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(sys, "platform", "plan9")
    assert host_memory() == (0, 0) and peak_memory("cpu") == "memory not known"


def test_devices(monkeypatch):
    for device in ("cpu:0", "gpu", "cuda:x", "", "mps:1"):
        with pytest.raises(ValueError, match="expected cpu, mps, cuda or cuda:N"):
            use_device(device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device mps: there is no such device"):
        use_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    use_device("mps")
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10, raising=False)
    assert network_dtype("mps") == torch.bfloat16 and free_memory("mps") == 10


def test_memory_of_a_card_that_is_in_use(monkeypatch):
    """Free, or this process's own already."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3)
    assert free_memory("cuda") == 8


def test_a_named_card_becomes_the_current_one(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for device in ("cpu", "cuda", "cuda:1"):
        use_device(device)
    assert taken == ["cuda:1"]
    with pytest.raises(ValueError, match="2 found"):
        use_device("cuda:2")


@pytest.mark.parametrize("capability, refuses, expected", [((8, 6), False, False), ((8, 9), False, True), ((9, 0), True, False)])
def test_float8_is_tried(monkeypatch, capability, refuses, expected):
    """By the card's kernel, for which the CPU's stands here."""
    ones, product = torch.ones, torch._scaled_mm

    def multiply(*given, **named):
        if refuses:
            raise RuntimeError("Rowwise scaling is not currently supported on your device")
        return product(*given, **named)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    multiplies_float8.cache_clear()
    assert multiplies_float8("cuda") == expected and not multiplies_float8("cpu")
    multiplies_float8.cache_clear()


ERRORS = {
    "torch": lambda: torch.empty(2**55, dtype=torch.uint8), "python": lambda: bytearray(2**62),
    "CUDA": lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total")),
    "cuBLAS": lambda: raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
}


def raised(error: Exception):
    raise error


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("memory, less", [("full", "--memory fp8 or stream, "), ("fp8", "--memory stream, "),
                                          ("stream", ""), (None, "")])
def test_out_of_memory_is_one_line(kind, memory, less, capsys):
    args = argparse.Namespace() if memory is None else argparse.Namespace(memory=memory)
    assert run_program("sample.py", lambda args: ERRORS[kind](), args) == 2
    said = capsys.readouterr().err
    assert said.startswith("sample.py: error: out of memory") and said.count("\n") == 1
    assert said.endswith(f"; less is needed with {less}a smaller --size\n")
    assert kind != "CUDA" or "20.00 GiB more" in said


CARD = ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of {total} GiB of which {free} is free."
        " Including non-PyTorch memory, this process has {own} GiB memory in use. Of the allocated memory 3 GiB ...")


def test_out_of_memory_where_the_words_are_not_known(capsys):
    """On the cards of a team's other processes."""
    error = torch.OutOfMemoryError(CARD.format(total=23.64, free="1.20 GiB", own=22.4))
    assert run_program("sample.py", lambda args: raised(error), argparse.Namespace()) == 2
    assert "; less is needed with a smaller --size\n" in capsys.readouterr().err


@pytest.mark.parametrize("program, memory, settings, size, total, free, own, fits", [
    ("sample.py", "full", [], None, 23.64, "1.20 GiB", 22.40, "of the released model --memory fp8 takes 18.3 GiB at 384x640"),
    ("sample.py", "full", [], "768x1280", 79.11, "5.06 GiB", 30.0, "--memory fp8 takes 28.2 GiB at 768x1280"),
    ("sample.py", "full", [], None, 7.79, "120.00 MiB", 7.6, "--memory stream takes 6.5 GiB at 384x640"),
    ("sample.py", "stream", [], None, 5.79, "120.00 MiB", 5.6, "--memory stream --size 256x448 takes 4.7 GiB"),
    ("train.py", "full", [], None, 39.39, "1.20 GiB", 38.0,
     "--memory full --set keep_attention=false takes 35.5 GiB at 384x640"),
    ("train.py", "full", ["keep_attention=false"], None, 23.64, "1.20 GiB", 22.4,
     "--memory stream takes 15.0 GiB at 384x640"),
    ("sample.py", "stream", [], None, 2.0, "1.00 GiB", 1.0, "less is needed with a smaller --size"),
    ("sample.py", "fp8", [], None, 23.64, "1.20 GiB", 22.40, "--memory stream takes 6.5 GiB at 384x640"),
])
def test_out_of_memory_on_a_card(program, memory, settings, size, total, free, own, fits, capsys):
    """One line: what was asked, what is free, and what fits by the counted table into what this run can have."""
    args = argparse.Namespace(memory=memory, set=settings, size=size)
    error = torch.OutOfMemoryError(CARD.format(total=total, free=free, own=own))
    assert run_program(program, lambda args: raised(error), args) == 2
    said = capsys.readouterr().err
    gib = 0.12 if "MiB" in free else float(free.split()[0])
    assert said.startswith(f"{program}: error: out of memory, 20.00 GiB more were needed, {gib:.2f} of {total} GiB are free; ")
    assert said.endswith(f"{fits}\n") and said.count("\n") == 1


def test_peaks_of_a_card(monkeypatch):
    for name, amount in (("max_memory_allocated", 3), ("max_memory_reserved", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda device, amount=amount: amount * 2**30 if device == "cuda:1" else 0)
    assert peak_memory("cuda:1") == "3.00 GiB of GPU memory (4.00 GiB reserved)"


def test_what_is_sent_to_a_card_is_pinned(monkeypatch):
    """Else CUDA makes the host wait for the copy, whatever is asked."""
    sent = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 1)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: sent.append((x.item(), non_blocking)))
    for device in ("cuda", "cpu", "mps"):
        machine.send(torch.zeros(()), torch.device(device))
    assert sent == [(1, True), (0, True), (0, False)]


def test_tf32_is_one_setting(monkeypatch):
    for name in ("allow_tf32", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    for allowed in (False, True):
        machine.allow_tf32(allowed)
        assert torch.backends.cudnn.allow_tf32 == allowed and not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.deterministic


def test_other_errors_of_torch_stay(capsys):
    with pytest.raises(RuntimeError, match="shape"):
        run_program("x", lambda args: torch.ones(2).view(3), argparse.Namespace())


class Device(TorchFunctionMode):
    """A device without doubles: what comes from its tensors is on it, until `cpu` takes it away."""

    doubles: list[str] = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = [each for part in (*arguments, *(options or {}).values())
                 for each in (part if isinstance(part, (list, tuple)) else [part]) if isinstance(each, torch.Tensor)]
        if function is torch.Tensor.cpu:
            return result.detach()
        if any(getattr(each, "on_device", False) for each in given):
            for each in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(each, torch.Tensor):
                    each.on_device = True
                    if each.dtype in (torch.float64, torch.complex128):
                        frame = sys._getframe(1)
                        self.doubles.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {function.__name__}")
        return result


def test_no_device_needs_doubles(monkeypatch):
    """A picture's geometry, keyframes, the background between them, renders, a rollout and a training pair."""
    from goldens import DISTILLED, GEOMETRY

    import geometry.surface as surface
    import memory
    import render
    from geometry.camera import move_path
    from geometry.pi3x import load_pi3x
    from helios.flow import load_schedule, training_item
    from helios.load import Models, Prompts, load_models
    from model import Helios
    from wah import Options, Rollout

    def fused(total, x, factor):  # as accelerators do it
        return total.addcmul(x, factor) if isinstance(factor, torch.Tensor) else total.add(x, alpha=factor)

    for module in (surface, memory, render):
        for name, other in (("fused", fused), ("resize", lambda images, size: torch.nn.functional.interpolate(
                images, size, mode="bilinear", align_corners=False))):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, other)
    models: Models[Helios] = load_models(Helios, DISTILLED, "cpu")
    pi3x = load_pi3x(GEOMETRY / "pi3x_weights.safetensors")
    for network in (models.transformer, models.vae, pi3x):
        for parameter in (*network.parameters(), *network.buffers()):
            parameter.on_device = True
    Device.doubles.clear()
    picture = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture.on_device = True
    with Device(), torch.no_grad():
        camera = memory.Memory(lambda: pi3x, picture, (64, 128), keyframes=2)
        prompts = Prompts(torch.zeros(1, 8, models.transformer.config.text_dim))
        options = Options(steps=(1, 1, 1), amplify_first_chunk=False)
        rollout = Rollout(models, prompts, (64, 128), torch.Generator().manual_seed(0), image=picture, camera=camera,
                          options=options)
        for _ in range(2):
            rollout.next(poses=move_path("yaw 20"))
        latents = torch.zeros(1, 16, 9, 8, 16)
        latents.on_device = True
        item = training_item(latents, latents, torch.tensor([0.3]), load_schedule(DISTILLED), 0)
    assert item.timestep.dtype == torch.float32 and picture.dtype == torch.float32
    assert not Device.doubles, "\n".join(Device.doubles)
    assert machine.network_dtype("cpu") == torch.float32


@pytest.mark.parametrize("rounds", [False, True])
def test_products_stay_fp32(monkeypatch, rounds):
    """The faster products are taken where they are as exact; where a processor would round in them all stays."""
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "ieee"
        with monkeypatch.context() as patch:
            if rounds:
                patch.setattr(torch, "eye", lambda n: torch.zeros(n, n))
            choose_products()
        x = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
        assert ((x @ x.T).double() - x.double() @ x.T.double()).abs().max() < 1e-3
        assert not rounds or products.fp32_precision == "ieee"
    finally:
        products.fp32_precision = before
