"""Safetensors and configs -> modules in memory, from folders in the Hugging Face layout.

A `Network` brings its config (`Config`, a dataclass whose fields are the keys of config.json that matter) and names its
parameters as the checkpoint does. It is built on the meta device and filled tensor by tensor by safetensors' own
reader, straight to device and dtype, so that host memory never holds a second copy. Strict: whatever is missing,
unexpected or mis-shaped is named. Nothing is ever unpickled.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from files.cli import note
from files.machine import multiplies_float8

POINTER = b"version https://git-lfs.github.com/spec/"
JSON_BYTES = 2**26


def few(items: Iterable[str], most: int = 5) -> str:
    """The first of many, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def check_pointer(path: Path) -> None:
    """Raises FileNotFoundError for a missing file, ValueError for what git leaves in place of a large one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path}: a git-lfs pointer, not the file: run `git lfs pull` in its folder, or"
                             " download the file itself")


def open_safetensors(path: Path):
    """safetensors' own reader, with errors that name the file. Its tensors are views of the file."""
    check_pointer(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({str(error)[:200]})") from None


# ---------------------------------------------------------------------------------------------------------------- json


def once(pairs: list[tuple[str, object]]) -> dict:
    """An object of a JSON file, whose keys must differ: readers disagree which of two counts."""
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"key {name[:100]!r} is there twice")
        content[name] = value
    return content


def parse_json(text: str, where: object) -> Any:
    """The value of a JSON text; raises ValueError naming `where` it is from, however it is broken."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: not valid JSON ({str(error)[:200] or 'too much of it'})") from None


def read_json_value(path: Path) -> Any:
    """Whatever a JSON file holds; raises OSError if there is no such file, ValueError naming it for anything else."""
    check_pointer(path)
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected JSON of at most {JSON_BYTES}")
    try:
        text = (content := path.read_bytes()).decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    return parse_json(text, path)


def read_json(path: Path) -> dict:
    """An object from a JSON file, as `read_json_value`."""
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected an object")
    return content


# ------------------------------------------------------------------------------------------------------------- configs


def conform(value: Any, kind: Any) -> Any:
    """A JSON value as the annotated type of a config's field: lists become tuples. Raises TypeError for another type, a
    negative integer, a long text, and for numbers that are not finite or beyond 1e9."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else conform(value, inner[0])
    if origin is tuple and isinstance(value, list) and len(value) <= 1000:
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(map(conform, value, kinds))
    elif kind is float and isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= 1e9:
        return value
    elif kind is bool and type(value) is bool or kind is str and type(value) is str and len(value) <= 500:
        return value
    elif kind is int and type(value) is int and 0 <= value <= 1e9:
        return value
    raise TypeError


# Most of a config's integers count channels, heads or pixels; these count other things.
LIMIT = 8192
LIMITS = {"num_layers": 1000, "num_res_blocks": 64, "stages": 10, "ffn_dim": 2**16, "d_ff": 2**16,
          "vocab_size": 2**21, "num_train_timesteps": 10**5, "relative_attention_max_distance": 2**20}


def read_config(config_class: type, path: Path, more: dict | None = None):
    """A config dataclass from the keys of a config.json that it has as fields, and from `more`; other keys are
    ignored. Types and sizes are checked before anything is built from them."""
    values, config, kinds = read_json(path) | (more or {}), {}, get_type_hints(config_class)
    for field in fields(config_class):
        if field.name not in values:
            continue
        value = values[field.name]
        found = repr(tuple(value) if isinstance(value, list) else value)[:100]
        try:
            config[field.name] = conform(value, kinds[field.name])
        except TypeError:
            raise ValueError(f"{path}: {field.name} is {found}, expected a value like {field.default!r}") from None
        limit = LIMITS.get(field.name, LIMIT)
        inner = config[field.name] if isinstance(config[field.name], tuple) else (config[field.name],)
        if any(type(each) is int and each > limit for each in inner):
            raise ValueError(f"{path}: {field.name} is {found}, expected at most {limit}")
    try:
        return config_class(**config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# --------------------------------------------------------------------------------------------------------------- files


def snapshot(folder: Path, name: str) -> Path:
    """The folder that has the file `name`: `folder` itself or, if it is a model's in the Hugging Face cache (with
    snapshots/ and refs/main), its snapshot. Raises ValueError if there are several and none is the main one."""
    there = sorted(path.parent for path in folder.glob(f"snapshots/*/{name}"))
    main = folder / "refs" / "main"
    named = main.read_text(errors="replace").strip() if there and main.is_file() else ""
    there = [path for path in there if path.name == named] or there
    if len(there) > 1:
        raise ValueError(f"{folder}: {len(there)} snapshots there, expected the path of one of them")
    return there[0] if there else folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: shards named by an index, or a single file, or, with a printed word,
    those of a variant such as fp16 if there are no others."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for stem in ("diffusion_pytorch_model", "model"):
        # NAME[.VARIANT].safetensors[.index[.VARIANT].json]
        pattern = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors(\.index(?:\.(\w+))?\.json)?")
        found = [match for match in map(pattern.fullmatch, names) if match]
        if found:
            best = min(found, key=lambda match: (match[1] or match[3] or "", match[2] is None))
            if best[1] or best[3]:
                note(f"{folder}: only the variant {best[1] or best[3]} of the weights is there, so it is used")
            return index_files(folder / best[0]) if best[2] else [folder / best[0]]
    shards = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled and not shards:
        raise FileNotFoundError(f"{folder}: its weights are pickled ({pickled[0]}), which is never read; expected"
                                " .safetensors: download those, or convert them")
    raise FileNotFoundError(f"{folder}: no model.safetensors, diffusion_pytorch_model.safetensors or index of shards"
                            + (f", found {few(shards)}" if shards else ""))


def index_files(index: Path) -> list[Path]:
    """The shards that an index names, which must lie beside it (in the Hugging Face cache: in the model's folder)."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: no weight_map, expected tensor names and their files")
    folder = index.parent.resolve()
    home = next((parent for parent in folder.parents if parent.name.startswith("models--")), folder)
    for name in shards.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{index}: a file is {str(name)[:100]!r}, expected the plain name of a .safetensors")
        if not (folder / name).resolve().is_relative_to(home):
            raise ValueError(f"{index}: {name} is a link out of its folder, expected the file itself")
    return [index.parent / name for name in sorted(set(shards.values()))]


class Network(nn.Module):
    """A module that knows how its checkpoint looks."""

    Config: type
    config: Any
    fp32: tuple[str, ...] = ()  # parts of names that stay fp32 in a bf16 model
    aliases: dict[str, str] = {}  # other names that a file may use -> ours
    ignored: tuple[str, ...] = ()  # beginnings of keys that a file has and we have no use for
    fp8: tuple[str, ...] = ()  # ends of names of the weights that may be held in 8 bits
    # a ModuleList, and parts of its blocks that are called by themselves
    streamed: tuple[str, tuple[str, ...]] = "", ()
    # ends of names of layers that several processes can divide by what they give, and by what they take
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


N = TypeVar("N", bound=Network)
L = TypeVar("L", bound=nn.Module)


class Layers(nn.ModuleList, Generic[L]):
    """A ModuleList that says what it holds."""

    if TYPE_CHECKING:
        def __iter__(self) -> Iterator[L]: ...

        def __getitem__(self, index: int) -> L: ...


class NoInitialisers(TorchFunctionMode):
    """Initialisers do nothing: on the meta device they only take time, about a core-second for a large network."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else (options or {})["tensor"]
        return function(*arguments, **(options or {}))


def on_meta(network: Callable[[], N]) -> N:
    """A network without weights, built in milliseconds."""
    with torch.device("meta"), NoInitialisers():
        return network()


PREFIXES = "model.diffusion_model.", "transformer.", "module.", "model."  # that others put before all names


def locate(module: Network, files: list[Path]) -> dict[Path, dict[str, str]]:
    """Which file holds each of a module's tensors, and under which key: file -> our name -> key.

    Strict: all names and shapes are compared before the first tensor is read, and missing, unexpected or mis-shaped
    ones are named. `module.aliases` maps other names that a file may use, also beside ours, keys that start with one of
    `module.ignored` are skipped, and one of `PREFIXES` that all keys have is stripped, with a printed word.
    """
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    found: list[tuple[Path, str, list[int]]] = []
    for path in files:
        with open_safetensors(path) as file:
            found += [(path, key, file.get_slice(key).get_shape()) for key in file.keys()]
    prefix = next((each for each in PREFIXES if found and all(key.startswith(each) for _, key, _ in found)), "")
    if prefix:
        note(f"{files[0].parent}: all names of its tensors begin with {prefix}, which is left out")
    places: dict[Path, dict[str, str]] = {path: {} for path in files}
    problems, there, names = [], set(), {key.removeprefix(prefix) for _, key, _ in found}
    for path, key, shape in found:
        name = key.removeprefix(prefix)
        if name.startswith(module.ignored) or module.aliases.get(name) in names:
            continue
        name = module.aliases.get(name, name)
        if name not in wanted:
            problems.append(f"unexpected {key}")
        elif shape != wanted[name]:
            problems.append(f"{key} has shape {shape}, expected {wanted[name]}")
        elif name in there:
            problems.append(f"{key} is in more than one file")
        there.add(name)
        places[path][name] = key
    problems += [f"missing {name}" for name in wanted if name not in there]
    if problems:
        raise ValueError(f"{files[0].parent}: weights do not fit the config: {few(problems)}")
    return places


def kept_dtype(module: Network | type[Network], name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a network's tensor in a model of `dtype`: `module.fp32` lists what stays fp32."""
    return torch.float32 if any(part in name for part in module.fp32) else dtype


def take(tensor: Tensor, module: Network | type[Network], name: str, device: torch.device | str,
         dtype: torch.dtype) -> Tensor:
    """A tensor of a file in memory of its own, always: in a file numbers stand at odd addresses, which costs kernels
    time and the last bit of some results, and a file may change."""
    return tensor.to(device, kept_dtype(module, name, dtype), copy=True)


class Share(Protocol):
    """What this process holds of a network that several divide."""

    def divide(self, module: Network) -> None:
        """Make a module on the meta device ready for its share."""

    def read(self, module: Network, name: str, piece: Any) -> Tensor:
        """This process's part of a tensor, of which `piece` reads from the file what it is indexed with."""
        ...

    def largest(self, module: Network, name: str, rows: Tensor) -> Tensor:
        """The largest number of each row of a weight, of which `rows` [out] are those of this process's part."""
        ...


def quantize(weight: Tensor, dtype: torch.dtype,
             join: Callable[[Tensor], Tensor] = lambda rows: rows) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as float8_e4m3fn, and the scale of each row [out] in `dtype`: weight ~ float8 * scale.
    `join` makes the whole row's largest number from that of the part that is here.

    That is all that weight-only fp8 takes. The layer casts its weight back when it is used (every float8 is a bf16),
    and the scale of a row can wait until after the matrix product, so that no kernel, calibration or activation range
    is needed. 3 bits of mantissa leave an error of about 2.6 % of a weight (rms), of a row's output too, as errors
    are independent.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    rows = weight.float()
    least = torch.finfo(torch.float32).tiny  # a row may be zero
    scale = (join(rows.abs().amax(dim=1)) / largest).clamp(min=least).to(dtype)
    return (rows / scale.float()[:, None]).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


def fill(module: N, files: list[Path], device: torch.device | str, dtype: torch.dtype, fp8: tuple[str, ...] = (),
         share: Share | None = None) -> N:
    """Give a module built on the meta device its tensors, each read straight to its device and dtype; strict
    (`locate`). Weights whose names end in one of `fp8` are quantized, and their layers get the `scale`. Of a network
    that is divided only this process's `share` is read."""
    state, places = {}, locate(module, files)
    if share is not None:
        share.divide(module)
    for path, names in places.items():
        with open_safetensors(path) as file:
            for name, key in names.items():
                piece = file.get_tensor(key) if share is None else share.read(module, name, file.get_slice(key))
                if name.endswith(fp8):
                    layer: Any = module.get_submodule(name.rpartition(".")[0])
                    join = [] if share is None else [partial(share.largest, module, name)]
                    state[name], layer.scale = quantize(piece.to(device), dtype, *join)
                    whole = share is None and not any(side % 16 for side in piece.shape)  # what the kernel takes
                    layer.in_float8 = whole and multiplies_float8(device)
                else:
                    state[name] = take(piece, module, name, device, dtype)
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def build(network: type[N], folder: Path) -> N:
    """A network after `folder`/config.json, on the meta device."""
    path = folder / "config.json"
    config = read_config(network.Config, path)
    for name in [field.name for field in fields(config) if type(getattr(config, field.name)) is int]:
        if getattr(config, name) < 1:
            raise ValueError(f"{path}: {name} is {getattr(config, name)}, expected at least 1")
    return build_from(path, lambda: network(config))


def build_from(path: Path, network: Callable[[], N]) -> N:
    """`on_meta`, where sizes that do not go together are an error that names the file that they are from."""
    try:
        return on_meta(network)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path}: no network can be built from it ({reason})") from None


def load(network: type[N], folder: str | Path, device: torch.device | str = "cpu",
         dtype: torch.dtype = torch.float32, fp8: tuple[str, ...] = ()) -> N:
    """Build `network` from `folder`/config.json and `fill` it from the folder's files."""
    folder = Path(folder)
    return fill(build(network, folder), weight_files(folder), device, dtype, fp8)


def count_numbers(files: list[Path]) -> int:
    """How many numbers safetensors files hold, by their headers."""
    total = 0
    for path in files:
        with open_safetensors(path) as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    return total
