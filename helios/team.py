"""The processes of one run: `torchrun --nproc-per-node N sample.py ...`, each with a card of its own.

Rank 0 runs the program: it alone reads, draws random numbers, has the VAE and the camera, prints and writes. The others
`follow`: they wait for what rank 0 calls of a network (`Led`), and compute their share of it (parallel.py). So they can
never come to differ, and no program has a second way to run. With split=tokens the text encoder is rank 0's alone.
In training (split=draws) rank 0 is the program too; the others compute the gradients of their part of a step's draws.
Left out: `stream` with divided weights, torch.compile.

When one process dies, all end, and the first to notice says so in one line: its connections are closed (on CUDA
torchrun ends the others, which may hang in a kernel).
"""

import json
import os
import signal
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from files.checkpoint import N, Network, build, fill, weight_files
from files.cli import deferred_interrupt
from files.machine import network_dtype, use_device
from helios.load import Loader, load_network
from helios.lora import Lora
from helios.parallel import TokenShare, WeightShare
from helios.text import UMT5Encoder

SPLITS = ("weights", "tokens")
PATIENCE = timedelta(hours=1)  # with which the others wait for rank 0, which may decode a video on a CPU meanwhile


def ranks() -> tuple[int, int]:
    """This process's rank, and how many there are, in torchrun's words."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


Given = tuple[Tensor, Tensor, Tensor, Any]  # of a training step: latents, timestep, target, context


def add_gradients(network: Any, text: list, items: list[Given], mine: slice = slice(None),
                  lap: Callable[[str], None] = lambda name: None) -> Tensor:
    """Add the gradients of the mean of all items' losses, as far as the items that are `mine` make them, one after
    another; returns the losses [items], zero for the others."""
    losses = torch.zeros(len(items), device=items[0][0].device)
    for index in range(len(items))[mine]:
        latents, timestep, target, context = items[index]
        loss = F.mse_loss(network(latents, timestep, text, context), target)
        lap("forward")
        (loss / len(items)).backward()
        lap("backward")
        losses[index] = loss.detach()
    return losses


class Text(list):
    """Keys and values of a prompt, this rank's share of them."""

    number = 0  # by which the other ranks know theirs


class Team:
    """`call`, on rank 0, and `obey`, on the others, do the same on all of them."""

    def __init__(self, transformer: type[Network]):
        self.store, self.rank, self.size = next(rendezvous("env://"))
        dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        self.kinds = {kind.__name__: kind for kind in (transformer, UMT5Encoder)}
        self.device = torch.device("cpu")
        self.group: Any = None
        self.network: Any = None
        self.lora: Lora | None = None
        self.context: Any = None
        self.lap: Callable[[str], None] | None = None  # of rank 0's clock
        self.texts: MutableMapping[int, Text] = {} if self.rank else weakref.WeakValueDictionary()
        self.numbers = count()
        self.forgotten: list[int] = []  # numbers of texts that rank 0 no longer has
        self.reason: BaseException | None = None  # why the others no longer listen
        signal.signal(signal.SIGTERM, lambda *_: self.give_up())

    def first(self) -> bool:
        """Whether no other process has said yet why all end."""
        try:
            return self.store.add("said", 1) == 1
        except RuntimeError:  # its keeper is gone, too
            return True

    def give_up(self) -> NoReturn:
        """End this process because another one has ended."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it too, while this is being said
        if self.reason is None:
            words = f"one of the {self.size} processes was stopped, and so are all"
            self.reason = ConnectionError(words) if self.first() else SystemExit(2)
        raise self.reason

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # in these words back ends say that a process is gone
            if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
                self.give_up()
            raise

    def say(self, words: dict | None = None, tensors: Sequence[Tensor] = ()) -> tuple[dict, list[Tensor]]:
        """From rank 0 to all. The others give nothing, and get it."""
        kinds = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        letters = torch.frombuffer(bytearray(json.dumps([words, kinds]).encode()), dtype=torch.uint8)
        length = torch.tensor([len(letters)])
        dist.broadcast(length, 0)
        letters = letters.new_empty(int(length)) if self.rank else letters
        dist.broadcast(letters, 0)
        words, kinds = json.loads(letters.numpy().tobytes())
        said = [torch.empty(shape, dtype=getattr(torch, kind), device=self.device) for kind, shape in kinds
                ] if self.rank else [tensor.to(self.device).contiguous() for tensor in tensors]
        for tensor in filter(Tensor.numel, said):
            dist.broadcast(tensor.flatten().view(torch.uint8), 0, group=self.group)
        return cast(dict, words), said

    def call(self, what: str, words: dict, *tensors: Tensor) -> Any:
        """Rank 0: all do it; returns what it gives here. Ctrl-C waits until it is done."""
        if self.reason is not None:
            raise self.reason
        self.forgotten, gone = [], self.forgotten
        alone = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else Ctrl-C waits for more already
        try:
            with deferred_interrupt() if alone else nullcontext(Event()) as stop, self.together():
                result = self.act(*self.say({"what": what, "gone": gone, **words}, tensors))
        except BaseException as error:
            self.reason = error
            raise
        if stop.is_set():
            raise KeyboardInterrupt
        return result

    @torch.no_grad()
    def obey(self) -> bool:
        """The others: wait for what rank 0 says and do it; False at the end."""
        with self.together():
            words, tensors = self.say()
            self.act(words, tensors)
        return words["what"] != "end"

    def act(self, words: dict, tensors: list[Tensor]) -> Any:
        for number in words["gone"]:
            self.texts.pop(number, None)
        return getattr(self, f"do_{words['what']}")(words, tensors)

    # ---- rank 0

    def begin(self, split: str, device: str) -> None:
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device {device}: expected cpu or cuda, of which each process takes its own")
        self.call("begin", {"split": split, "device": device})

    def load(self, network: type[N], folder: Path, device: torch.device | str, memory: str = "full") -> N:
        """As `load_network`, on all ranks."""
        if self.split != "weights" and network is UMT5Encoder:
            return load_network(network, folder, device, memory)
        if self.split == "weights":  # what cannot be is refused here, before all ranks try
            if memory == "stream":
                raise ValueError("--memory stream: weights in their files cannot be divided, tokens can (split=tokens)")
            self.weights.divide(build(network, folder))
        words = {"kind": network.__name__, "folder": str(folder), "memory": memory}
        return cast(N, Led(self, self.call("load", words)))

    def end(self) -> None:
        """Let the others go; if they are lost, or at something else, the reason is said elsewhere."""
        if self.reason is None:
            self.call("end", {})
        else:
            self.first()
            self.store.set("ended", "")
        self.leave(self.reason is not None)

    def leave(self, failed: bool) -> None:
        """gloo's threads must end before the process, which they abort now and then else (pytorch issue 190489). NCCL
        could wait for ever after a failure: there the end of the process ends all."""
        if self.group is None or not failed:
            dist.destroy_process_group()

    # ---- what all ranks do

    def do_begin(self, words: dict, tensors: list[Tensor]) -> None:
        self.split = words["split"]
        if words["device"] == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            use_device(name)
            self.device, self.group = torch.device(name), dist.new_group(backend="nccl")
        self.weights = WeightShare(self.rank, self.size, self.group)

    def do_load(self, words: dict, tensors: list[Tensor]) -> Network:
        self.network = self.lora = self.context = None  # that of before goes first
        kind, folder, memory = self.kinds[words["kind"]], Path(words["folder"]), words["memory"]
        if self.split != "weights":
            self.network = load_network(kind, folder, self.device, memory)
            if self.split == "tokens":
                TokenShare(self.rank, self.size, self.group, self.network)
        else:
            self.network = fill(build(kind, folder), weight_files(folder), self.device, network_dtype(self.device),
                                kind.fp8 if memory == "fp8" else (), self.weights)
        return self.network.train(self.split == "draws")  # when fp8 weights are cast back, also for the text

    def do_lora(self, words: dict, tensors: list[Tensor]) -> None:
        if tensors:
            pairs = zip(words["names"], tensors[::2], tensors[1::2], words["scales"])
            whole = Lora("the LoRA", {name: (down, up, scale) for name, down, up, scale in pairs})
            self.lora = whole if self.split != "weights" else self.weights.lora(self.network, whole)
        self.network.set_lora(self.lora if words["on"] else None)

    def do_text(self, words: dict, tensors: list[Tensor]) -> Text:
        self.texts[words["number"]] = text = Text(self.network.text(*tensors))
        return text

    def do_encode(self, words: dict, tensors: list[Tensor]) -> Tensor:
        return self.network(*tensors)

    def do_denoise(self, words: dict, tensors: list[Tensor]) -> Tensor:
        latents, timestep, *context = tensors
        if context:
            self.context = SimpleNamespace(tokens=context[0], rope=context[1])
        return self.network(latents, timestep, self.texts[words["text"]], self.context)

    @torch.enable_grad()
    def do_gradients(self, words: dict, tensors: list[Tensor]) -> Tensor:
        network, names, lap = self.network, words["names"], self.lap or (lambda name: None)
        matrices, tensors = tensors[:2 * len(names)], tensors[2 * len(names):]
        if self.rank:  # rank 0 has its own, and what steps them
            matrices = [matrix.requires_grad_() for matrix in matrices]
            network.checkpointing, network.keep_attention = words["checkpointing"], words["keep_attention"]
            network.set_lora(Lora("", {name: (down, up, scale) for name, down, up, scale in
                                       zip(names, matrices[::2], matrices[1::2], words["scales"])}))
        else:
            matrices = [half for name in names for half in network.get_submodule(name).adapter[:2]]
        begin = 3 * len(words["context_of"])
        contexts = [SimpleNamespace(tokens=tokens, rope=rope) for tokens, rope in
                    zip(tensors[begin::2], tensors[begin + 1::2])]
        triples = zip(tensors[:begin:3], tensors[1:begin:3], tensors[2:begin:3])
        items = [(*triple, contexts[which]) for triple, which in zip(triples, words["context_of"])]
        losses = add_gradients(network, self.texts[words["text"]], items, slice(self.rank, None, self.size), lap)
        found = [torch.zeros_like(matrix) if matrix.grad is None else matrix.grad for matrix in matrices]
        flat = torch.cat([losses, *(grad.flatten() for grad in found)])
        dist.all_reduce(flat, group=self.group)
        losses, *grads = flat.split([len(losses), *(matrix.numel() for matrix in matrices)])
        for matrix, grad in zip(matrices, grads):
            matrix.grad = grad.view_as(matrix)
        return losses

    def do_end(self, words: dict, tensors: list[Tensor]) -> None:
        pass


class Led:
    """On rank 0 in a network's place: what is called of it, all do."""

    def __init__(self, team: Team, network: Network):
        self.team, self.network = team, network
        self.known_lora: Lora | None = None  # which the others have
        self.known_context: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def set_lora(self, lora: Lora | None) -> None:
        tensors, words = [], {"on": lora is not None}
        if lora is not None and lora is not self.known_lora:
            self.known_lora = lora
            tensors = [half for down, up, _ in lora.adapters.values() for half in (down, up)]
            words |= {"names": [*lora.adapters], "scales": [scale for _, _, scale in lora.adapters.values()]}
        self.team.call("lora", words, *tensors)

    def text(self, embeddings: Tensor) -> Text:
        number = next(self.team.numbers)
        text = self.team.call("text", {"number": number}, embeddings)
        text.number = number
        weakref.finalize(text, lambda: self.team.forgotten.append(number))
        return text

    def add_gradients(self, lora: Lora, text: Text, items: list[Given], lap: Callable[[str], None]) -> Tensor:
        """As the function, each rank with its part of the items; `lora` is that of this rank's network."""
        contexts = list({id(item[3]): item[3] for item in items}.values())
        words = {"names": [*lora.adapters], "scales": [scale for _, _, scale in lora.adapters.values()],
                 "context_of": [[each is item[3] for each in contexts].index(True) for item in items],
                 "text": text.number, "checkpointing": self.network.checkpointing,
                 "keep_attention": self.network.keep_attention}
        matrices = [half.detach() for down, up, _ in lora.adapters.values() for half in (down, up)]
        numbers = [tensor for item in items for tensor in item[:3]]
        self.team.lap = lap
        return self.team.call("gradients", words, *matrices, *numbers,
                              *(tensor for each in contexts for tensor in (each.tokens, each.rope)))

    def __call__(self, *inputs: Any) -> Tensor:
        if len(inputs) == 1:
            return self.team.call("encode", {}, *inputs)
        latents, timestep, text, context = inputs
        more = [] if context is self.known_context else [context.tokens, context.rope]
        self.known_context = context
        return self.team.call("denoise", {"text": text.number}, latents, timestep, *more)


@contextmanager
def lead(transformer: type[Network], split: str, device: str) -> Iterator[Loader]:
    """Rank 0's part: how networks are loaded, while the others follow. A process alone loads them as always."""
    if ranks()[1] == 1:
        yield load_network
        return
    team = Team(transformer)
    try:
        team.begin(split, device)
        yield team.load
    finally:
        team.end()


def follow(transformer: type[Network]) -> None:
    """The other ranks' part, until rank 0 ends it, and with it the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    team, failed = Team(transformer), True
    try:
        while team.obey():
            pass
        failed = False
    except ConnectionError:
        raise
    except Exception:
        with suppress(RuntimeError):  # a while for rank 0 to find the same error
            team.store.wait(["ended"], timedelta(seconds=3))
        if team.first():
            raise
        raise SystemExit(2) from None
    finally:
        team.leave(failed)
    os._exit(0)  # past the interpreter's end, which a thread of gloo's may still need: then it aborts (pytorch 179291)
