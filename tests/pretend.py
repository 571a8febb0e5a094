"""A pretended card: the meta device, whose tensors have shapes and no numbers, is taken for a CUDA device.

Inside `Card()` whatever runs on `torch.device("meta")` runs as on CUDA, without one: bf16 by the one dtype policy, fused
attention and norms, a storage for each tensor until it is freed. What a card would refuse is an error here: tensors of
two devices in one operation, an operation that torch's own table (native_functions.yaml) has no CUDA kernel for. What
would cost on a card is noted: live and peak bytes, waits of the host for the device, big tensors that become wider.
Where Python asks for a number there is a fixed choice: all is kept, true, one.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import torchgen
import yaml
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from files.checkpoint import N, kept_dtype, on_meta
from helios.lora import Lora
from helios.stream import BlockStream
from model import Helios
from train import TARGETS

ATEN = torch.ops.aten
ROOT = Path(__file__).resolve().parents[1]
PIECE = 512  # bytes: CUDA's allocator hands out multiples of it
BIG = 2**20  # numbers of a tensor whose width matters


@cache
def kernels() -> dict[str, bool]:
    """torch's own operations, by name and overload: whether there is one for CUDA."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    tables = {each["func"].partition("(")[0]: each for each in entries}

    def on_cuda(entry: dict) -> bool:
        if "structured_delegate" in entry:
            return on_cuda(tables[entry["structured_delegate"]])
        if "ufunc_inner_loop" in entry:
            return True
        keys = {key.strip() for names in entry.get("dispatch", {"Composite": ""}) for key in names.split(",")}
        return any(key == "CUDA" or key.startswith("Composite") for key in keys)

    return {name: on_cuda(entry) for name, entry in tables.items()}


class Norm(torch.autograd.Function):
    """CUDA's fused root-mean-square norm: beside its result it keeps one number a row."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(context, gradient: Tensor):
        return torch.empty_like(context.saved_tensors[0]), None


class Fused(TorchFunctionMode):
    """The kernels that CUDA takes, where the meta device would take one by one what they are made of."""

    def __init__(self, wait: Callable[[str], None]):
        super().__init__()
        self.wait = wait

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.tensor and torch.device(options.get("device") or "cpu").type == "meta":
            self.wait("torch.tensor to the device")  # from numbers of the host, which the meta device never looks at
        if function is Tensor.backward:  # in which blocks are computed again, with the same kernels
            gradient = (torch.ones_like(arguments[0]),)
            with self:
                return _engine_run_backward(arguments, gradient, False, False, (), allow_unreachable=True,
                                            accumulate_grad=True)
        on_card = any(isinstance(each, Tensor) and each.is_meta for each in arguments)
        if on_card and function is F.scaled_dot_product_attention:
            return self.attention(*arguments, **options)
        if on_card and function in (F.rms_norm, torch.rms_norm):
            x, weight = arguments[0], arguments[2] if len(arguments) > 2 else options["weight"]
            if x.dtype != weight.dtype:
                raise RuntimeError(f"a norm of {x.dtype} by {weight.dtype}, which CUDA does in single steps")
            return Norm.apply(x, weight)
        return function(*arguments, **options)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None):
        if q.dtype == torch.float32 or attn_mask is not None:
            bias = None if attn_mask is None else attn_mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2])
            return ATEN._scaled_dot_product_efficient_attention(q, k, v, bias, q.requires_grad, scale=scale)[0]
        return ATEN._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


class Card(TorchDispatchMode):
    device = torch.device("meta")

    def __init__(self, kept: float = 1.0):
        """kept: the share of true entries where code asks which are true (the token drop)."""
        super().__init__()
        self.kept, self.fused = kept, Fused(self.wait)
        self.live = self.peak = 0
        self.storages: dict[int, int] = {}
        self.waits: list[str] = []  # of the host for the device: operation and place
        self.widened: Counter[str] = Counter()  # place -> how often a big tensor came out wider than it went in
        self.operations: set[str] = set()

    def __enter__(self):
        self.fused.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fused.__exit__(*error)

    # ---- bytes

    def hold(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.is_meta and key not in self.storages:
            self.storages[key] = size = -(-storage.nbytes() // PIECE) * PIECE
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key)
        return tensor

    def free(self, key: int) -> None:
        self.live -= self.storages.pop(key)

    def restart(self) -> None:
        """The peak begins anew, at what is held now."""
        self.peak = self.live

    # ---- operations

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        given = among((*arguments, *options.values()))
        if not any(each.is_meta for each in given):
            result = function(*arguments, **options)
            if given and any(each.is_meta for each in among((result,))) and not options.get("non_blocking"):
                self.wait(f"{function} to the device")
        else:
            self.check(function, given)
            result = self.answer(function, arguments, options)
        made = among((result,))
        for each in made:
            self.hold(each)
        self.compare(given, made)
        return result

    def check(self, function, tensors: list[Tensor]) -> None:
        """Raises RuntimeError for what a card would not do."""
        name = function.name().removeprefix("aten::")
        self.operations.add(name)
        if not kernels().get(name, True):
            raise RuntimeError(f"{name} in {place()}: there is no CUDA kernel for it")
        strays = [each for each in tensors if not each.is_meta and each.dim()]
        if strays and function not in (ATEN._to_copy.default, ATEN.copy_.default):
            raise RuntimeError(f"{name} in {place()}: a tensor {list(strays[0].shape)} of the host among the device's")

    def answer(self, function, arguments, options):
        """What a card would give; where that depends on numbers, the fixed choice, and the host has waited for it."""
        x = arguments[0]
        if function is ATEN._local_scalar_dense.default:
            self.wait(function)
            return torch.ones((), dtype=x.dtype).item()
        if function is ATEN.equal.default:
            self.wait(function)
            return True
        if function is ATEN.nonzero.default:
            self.wait(function)
            return x.new_empty(int(x.numel() * self.kept), x.dim(), dtype=torch.long)
        if function is ATEN.index.Tensor or function is ATEN.index_put_.default or function is ATEN.index_put.default:
            return function(x, self.indices(arguments[1]), *arguments[2:], **options)
        if function is ATEN._unique2.default:
            self.wait(function)
            return x.new_empty(1), x.new_empty(0, dtype=torch.long), x.new_empty(0, dtype=torch.long)
        if function is ATEN.bincount.default:
            self.wait(function)
            return x.new_empty(arguments[2] if len(arguments) > 2 else options["minlength"])
        if function is ATEN._to_copy.default and torch.device(options.get("device") or "meta").type == "cpu":
            self.wait(f"{function} to the host")
            return torch.ones(x.shape, dtype=options.get("dtype") or x.dtype)
        if function is ATEN.copy_.default and not arguments[1].is_meta and not options.get("non_blocking"):
            self.wait(f"{function} to the device")
        if function is ATEN.copy_.default and not x.is_meta:
            self.wait(f"{function} to the host")
            return x.fill_(1)
        return function(*arguments, **options)

    def indices(self, given) -> list[Tensor | None]:
        """Masks become as many whole numbers as the fixed choice keeps."""
        result = []
        for each in given:
            if each is None or each.dtype not in (torch.bool, torch.uint8):
                result.append(each)
                continue
            self.wait("index by a mask")
            count = int(each.numel() * self.kept)
            result += [self.hold(each.new_empty(count, dtype=torch.long)) for _ in range(each.dim())]
        return result

    def wait(self, what) -> None:
        self.waits.append(f"{what} in {place()}")

    def compare(self, given: list[Tensor], made: list[Tensor]) -> None:
        """Note a big tensor that came out in more bytes a number, and anything big in double precision."""
        widest = max((width(each) for each in made if each.is_meta and each.numel() >= BIG), default=0)
        narrow = min((width(each) for each in given if each.is_meta and each.numel() >= BIG and width(each)), default=8)
        if widest > min(narrow, 4):
            self.widened[place()] += 1


def among(values: Iterable) -> list[Tensor]:
    """The tensors among an operation's arguments or results, also in lists."""
    lists = (each if isinstance(each, (list, tuple)) else (each,) for each in values)
    return [each for part in lists for each in part if isinstance(each, Tensor)]


def width(tensor: Tensor) -> int:
    """Bytes of a real number; 0 for other kinds."""
    return tensor.dtype.to_real().itemsize if tensor.is_floating_point() or tensor.is_complex() else 0


def place() -> str:
    """The function of the repository that is at work: file:function, or file:class.function."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and "tests" not in path.relative_to(ROOT).parts:
            owner = [type(frame.f_locals["self"]).__name__] if "self" in frame.f_locals else []
            return f"{path.relative_to(ROOT)}:{'.'.join([*owner, frame.f_code.co_name])}"
        frame = frame.f_back
    return "a test"


# ------------------------------------------------------------------------------------------------------- full size on it


def place_network(card: Card, network: Callable[[], N], dtype: torch.dtype, memory: str = "full") -> N:
    """A network as `load_network` would leave it on a card; its peak of bytes begins anew."""
    made = on_meta(network)
    blocks, entries = made.streamed if memory == "stream" else ("", ())
    dtypes = {name: kept_dtype(made, name, dtype) for name, _ in made.named_parameters()}
    for owner, module in made.named_modules():
        for name, parameter in module.named_parameters(owner, recurse=False):
            if memory == "fp8" and name.endswith(made.fp8):
                parameter.data = torch.empty_like(parameter, dtype=torch.float8_e4m3fn)
                module.scale = torch.empty(len(parameter), dtype=dtype, device=card.device)
            elif not blocks or not name.startswith(f"{blocks}."):
                parameter.data = torch.empty_like(parameter, dtype=dtypes[name])
    if blocks:
        inner = {name.removeprefix(f"{blocks}.0."): kind for name, kind in dtypes.items()}
        layers = made.get_submodule(blocks)
        BlockStream(layers, entries, [{} for _ in layers], inner, card.device)
    card.restart()
    return made.requires_grad_(False).eval()


def some_lora(card: Card, network: Helios, rank: int = 32) -> Lora:
    def adapter(dim: int) -> tuple[Tensor, Tensor, float]:
        down, up = (torch.empty(*shape, dtype=torch.bfloat16, device=card.device) for shape in ((rank, dim), (dim, rank)))
        return down, up, 1.0

    layers = range(network.config.num_layers)
    return Lora("pretended", {f"blocks.{layer}.{name}": adapter(network.config.dim) for layer in layers
                              for name in TARGETS})
