"""What the machine offers: its devices, their memory, and the dtype that networks have on them."""

import os
import re
import sys
import time

import torch


def network_dtype(device: torch.device | str) -> torch.dtype:
    """The one dtype policy: bf16 on CUDA (with the fp32 islands of each network), fp32 on the CPU."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def free_memory(device: torch.device | str) -> int:
    """Bytes that a device still has to give; 0 for the host where the system does not tell."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0


def peak_memory(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of memory"


def check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device!r}: expected cpu, cuda or cuda:N")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there is no such device, {torch.cuda.device_count()} found")


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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.last
        self.start()
