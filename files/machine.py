"""What the machine offers: its devices, their memory, and the dtype that networks have on them."""

import ctypes
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

GIB = 2**30
# GiB that the released model takes on a card, counted by tests/test_card.py: what is held whatever the size, and what a
# chunk or a training step adds at 384x640, in proportion to the pixels.
NEEDS = {
    "sample.py": {"--memory full": (28.07, 3.29), "--memory fp8": (14.99, 3.29), "--memory stream": (3.20, 3.29)},
    "train.py": {
        "--memory full": (27.78, 12.14), "--memory full --set keep_attention=false": (27.78, 7.68),
        "--memory fp8": (15.62, 12.14), "--memory fp8 --set keep_attention=false": (15.62, 7.68),
        "--memory stream": (2.90, 12.14), "--memory stream --set keep_attention=false": (2.90, 7.68),
    },
}
SIZE = 384, 640


def network_dtype(device: torch.device | str) -> torch.dtype:
    """The one dtype policy: bf16 on accelerators (with the fp32 islands of each network), fp32 on the CPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def choose_products() -> None:
    """Matrix products of fp32 by oneDNN, with up to twice the rounding error of MKL's, which are half as fast on
    processors that are not Intel's.

    The one switch for it also allows rounding to bf16 inside: a processor that does so (AMX) keeps what it had.
    """
    products = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, products.fp32_precision = products.fp32_precision, "bf16"
    fine = torch.full((256, 256), 1 + 2.0**-20)
    if not torch.equal(fine @ torch.eye(256), fine):
        products.fp32_precision = before


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, for which the host does not wait: CUDA copies from pinned memory, which torch
    keeps until the copy is done. mps has no such copy that could be relied on."""
    pinned = x.pin_memory() if device.type == "cuda" else x
    return pinned.to(device, non_blocking=device.type != "mps")


# -------------------------------------------------------------------------------------------------------------- memory


def linux_memory() -> tuple[int, int]:
    """Bytes that the system can still give, and the most that this process has held."""
    import resource  # which Windows doesn't have

    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mac_memory() -> tuple[int, int]:
    """As `linux_memory`."""
    import resource

    text = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
    size = int(re.search(r"page size of (\d+)", text)[1])  # pyright: ignore[reportOptionalSubscript]
    pages = re.findall(r"Pages (?:free|inactive|speculative):\s+(\d+)", text)
    return sum(map(int, pages)) * size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # there in bytes


def windows_memory() -> tuple[int, int]:
    """As `linux_memory`, from GlobalMemoryStatusEx and GetProcessMemoryInfo."""
    kernel = ctypes.windll.kernel32  # pyright: ignore[reportAttributeAccessIssue]
    status = (ctypes.c_uint64 * 8)(64)  # length and load in its first 8 bytes, then total, available, ...
    counters = (ctypes.c_size_t * 9)(ctypes.sizeof(ctypes.c_size_t * 9))  # size and faults, then the peak, ...
    kernel.GlobalMemoryStatusEx(ctypes.byref(status))
    kernel.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), ctypes.byref(counters), ctypes.sizeof(counters))
    return status[2], counters[1]


SYSTEMS: dict[str, Callable[[], tuple[int, int]]] = {
    "linux": linux_memory, "darwin": mac_memory, "win32": windows_memory}  # fmt: skip


def host_memory() -> tuple[int, int]:
    """Bytes that the system can still give, and the most that this process has held; 0 for what it does not tell."""
    try:
        return SYSTEMS[sys.platform]()
    except (KeyError, OSError, ValueError, TypeError, AttributeError, ImportError, subprocess.SubprocessError):
        return 0, 0


def free_memory(device: torch.device | str) -> int:
    """Bytes that a device has for this process, a card with those that it holds already (a list's later videos find
    the networks there); 0 if the system does not tell."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if kind == "mps":
        return torch.mps.recommended_max_memory()
    return host_memory()[0]


def peak_memory(device: str) -> str:
    """The most that this process has held so far, in words."""
    if torch.device(device).type == "cuda":
        used, taken = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return f"{used / GIB:.2f} GiB of GPU memory ({taken / GIB:.2f} GiB reserved)"
    peak = host_memory()[1]
    return f"{peak / GIB:.2f} GiB of memory" if peak else "memory not known"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; CPU, CUDA and libraries each have words of their own."""
    words = "out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "cannot allocate memory"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error).lower() for w in words)


def needed(program: str, words: str, size: tuple[int, int]) -> float:
    """GiB that the released model takes, by the counted table."""
    held, work = NEEDS[program][words]
    return held + work * size[0] * size[1] / (SIZE[0] * SIZE[1])


def what_fits(program: str, words: str, size: tuple[int, int], room: float) -> str:
    """The words, less hungry than those given, with which the released model fits into `room` GiB, of which CUDA takes
    half a GiB and its allocator's gaps a thirtieth; with a smaller size if it must be. "" if nothing helps."""
    room = room * 0.97 - 0.5
    for other in NEEDS[program]:
        if needed(program, other, size) < min(room, needed(program, words, size)):
            return f"{other} takes {needed(program, other, size):.1f} GiB at {size[0]}x{size[1]}"
    for eighths in range(7, 0, -1):
        smaller = size[0] * eighths // 8 // 64 * 64, size[1] * eighths // 8 // 64 * 64
        if min(smaller) and needed(program, other, smaller) < room:
            return f"{other} --size {smaller[0]}x{smaller[1]} takes {needed(program, other, smaller):.1f} GiB"
    return ""


# ------------------------------------------------------------------------------------------------------------- devices


@cache
def multiplies_float8(device: torch.device | str) -> bool:
    """Ada, Hopper and later cards do, row by row. Not every torch lets them (none on Windows), so it is tried."""
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(128, 128, device=device)
    x, scale = ones.to(torch.float8_e4m3fn), ones[:, :1].contiguous()
    try:
        torch._scaled_mm(x, x.T, scale, scale.T, out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError:
        return False
    return True


def allow_tf32(allowed: bool) -> None:
    """Convolutions of fp32 numbers on CUDA (the VAE, the heads of Pi3X) with 10 bits of mantissa instead of 23: as
    torch and so the official code do without being asked, and several times as fast. Products of matrices stay exact:
    among those in fp32 are cameras and timesteps."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.deterministic = True  # else a transposed one may add up in any order: a seed is one video
    torch.backends.cuda.matmul.allow_tf32 = False


def describe_machine(device: str) -> str:
    """What the last bits of a result depend on beside the program and its input."""
    if torch.device(device).type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    kind = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, CPU {kind}, {torch.get_num_threads()} threads"


def use_device(device: str) -> None:
    """Make a card that is named the current one: clocks and pinned memory go by that. Raises ValueError for a device
    that torch does not know, or that is not there."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"device {device!r}: expected cpu, mps, cuda or cuda:N")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: there is no such device, or this torch was built without it")
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device}: there is no such device, {torch.cuda.device_count()} found")
    if ":" in device:
        torch.cuda.set_device(device)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.last
        self.start()
