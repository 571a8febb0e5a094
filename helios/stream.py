"""Weights that stay in their file: a network whose blocks pass, one after another, through two buffers on the device.

`load_streamed` builds a network as `checkpoint.load` does, but for the blocks of one of its lists. The parameters of
the even blocks are views of one buffer, those of the odd blocks of the other, for good; a hook before each block
makes sure that the buffer holds this block and sends for the next one, which a thread reads while this one computes.
So neither the device nor the host ever holds more than two blocks (and, while one is read, its pages of the file),
results are bit-equal, and neither the network, its LoRA nor its training know of it: when gradient checkpointing runs
the blocks again, last to first, they are fetched in that order. Without checkpointing autograd refuses, as the
weights it needs have been overwritten.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from files.checkpoint import Layers, N, build, kept_dtype, locate, open_safetensors, take, weight_files

ALIGNMENT = 256  # bytes, as CUDA's own allocations are


class Courier:
    """The way to a CUDA device: pinned memory, a stream that copies, and the events that make the hand-over safe.

    Two streams share the buffers. In whatever order they run, as each waits for an event of the other's,
    * a copy into a buffer begins after all that was asked of its old block: `used`, recorded on the computing stream;
    * what is asked of the new block begins after the copy: `copied`, recorded on the copying stream;
    * pinned memory is written after the last copy from it: for that the reading thread waits, not the program.
    And a buffer that nobody holds any longer becomes free memory after the last copy into it: `record_stream`.
    """

    def __init__(self, device: torch.device, size: int):
        self.stream, self.copied = torch.cuda.Stream(device), torch.cuda.Event()
        self.pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def computing(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.stream.device)

    def wait_for_pinned(self) -> None:
        self.copied.synchronize()  # at once if there was no copy yet

    def copy(self, buffer: Tensor, used: torch.Event) -> torch.Event:
        self.stream.wait_event(used)
        buffer.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            buffer.copy_(self.pinned, non_blocking=True)
        self.copied = self.stream.record_event()
        return self.copied


class BlockStream:
    """Two buffers and the thread that fills them."""

    def __init__(self, blocks: Layers, entries: tuple[str, ...], places: list[dict[Path, dict[str, str]]],
                 dtypes: dict[str, torch.dtype], device: torch.device):
        """blocks on the meta device, all alike, and the `entries` of `load_streamed`; `places` says for each block
        where its tensors are (see `checkpoint.locate`), `dtypes` what they become."""
        self.places, self.layout, size = places, [], 0  # layout: name, dtype, shape, first byte
        for name, parameter in blocks[0].named_parameters():
            self.layout.append((name, dtypes[name], parameter.shape, size))
            size += -(-parameter.numel() * dtypes[name].itemsize // ALIGNMENT) * ALIGNMENT
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.courier = Courier(device, size) if device.type == "cuda" else None
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.asked: list[tuple[int, Future] | None] = [None, None]  # of each buffer: the block, and when it is there
        self.latest = -1
        for index, block in enumerate(blocks):
            block.load_state_dict(self.views(self.buffers[index % 2]), assign=True)
            for module in (block, *map(block.get_submodule, entries)):
                module.register_forward_pre_hook(partial(self.arrive, index))

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {name: buffer[start:start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
                for name, dtype, shape, start in self.layout}

    def arrive(self, index: int, module: nn.Module, inputs: tuple) -> None:
        """Before a block is used: wait for it, and send for the one that comes next, which has the other buffer."""
        copied = self.request(index).result()
        if self.courier and copied:
            self.courier.computing().wait_event(copied)
        count = len(self.places)
        ahead = index + (1 if index > self.latest else -1)
        if ahead == count:  # the end: training goes back, sampling starts again
            ahead = count - 2 if torch.is_grad_enabled() else 0
        self.latest, ahead = index, abs(ahead)  # after -1, the first block's end of training, comes 1
        if ahead < count and ahead % 2 != index % 2:
            self.request(ahead)

    def request(self, index: int) -> Future:
        asked = self.asked[index % 2]
        failed = asked is not None and asked[1].done() and asked[1].exception() is not None  # then it is tried again
        if asked is None or asked[0] != index or failed:
            # All that has used the buffer so far is queued on the computing stream, which this event marks.
            used = self.courier.computing().record_event() if self.courier else None
            asked = self.asked[index % 2] = (index, self.reader.submit(self.read, index, used))
        return asked[1]

    def read(self, index: int, used: torch.Event | None) -> torch.Event | None:
        """File -> buffer, on CUDA by way of pinned memory; there it returns when the copy is under way, and its end."""
        buffer = self.buffers[index % 2]
        if self.courier:
            self.courier.wait_for_pinned()
        views = self.views(self.courier.pinned if self.courier else buffer)
        for path, names in self.places[index].items():
            with open_safetensors(path) as file:  # anew, so that its pages don't count as ours any longer
                for name, key in names.items():
                    views[name].copy_(file.get_tensor(key))
        return self.courier.copy(buffer, used) if self.courier and used else None


def load_streamed(network: type[N], folder: str | Path, device: torch.device | str, dtype: torch.dtype,
                  blocks: str, entries: tuple[str, ...] = ()) -> N:
    """`checkpoint.load`, with the same errors at once, but for the ModuleList named `blocks`, which is streamed.
    `entries` names parts of a block that are also called by themselves: it is fetched before these too."""
    folder = Path(folder)
    module = build(network, folder)
    layers = cast(Layers, module.get_submodule(blocks))
    places = [{} for _ in layers]
    resident = {}
    for path, names in locate(module, weight_files(folder)).items():
        with open_safetensors(path) as file:
            for name, key in names.items():
                if name.startswith(f"{blocks}."):
                    index, _, inner = name.removeprefix(f"{blocks}.").partition(".")
                    places[int(index)].setdefault(path, {})[inner] = key
                else:
                    resident[name] = take(file.get_tensor(key), module, name, device, dtype)
    module.load_state_dict(resident, strict=False, assign=True)
    dtypes = {name: kept_dtype(module, name, dtype) for name, _ in layers[0].named_parameters()}
    BlockStream(layers, entries, places, dtypes, torch.device(device))
    return module.requires_grad_(False).eval()
