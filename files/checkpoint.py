"""Safetensors and configs -> modules in memory, from folders in the Hugging Face layout.

A `Network` brings its config (`Config`, a dataclass whose fields are the keys of config.json that matter) and names its
parameters as the checkpoint does. It is built on the meta device and filled tensor by tensor by safetensors' own
reader, straight to device and dtype, so that host memory never holds a second copy. Strict: whatever is missing,
unexpected or mis-shaped is named. Nothing is ever unpickled.
"""

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def open_safetensors(path: Path):
    """safetensors' own reader, with errors that name the file. Its tensors are views of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None


def read_json(path: Path) -> dict:
    """An object from a JSON file; raises OSError if there is no such file, ValueError naming it for any other
    content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected an object")
    return content


def read_config(config_class: type, path: Path, more: dict | None = None):
    """A config dataclass from the keys of a config.json that it has as fields, and from `more`; other keys are
    ignored."""
    values, config = read_json(path) | (more or {}), {}
    for field in fields(config_class):
        if field.name in values:
            value = tuple(values[field.name]) if isinstance(values[field.name], list) else values[field.name]
            kinds = (int, float) if isinstance(field.default, float) else (type(field.default),)
            if field.default is not None and type(value) not in kinds:
                raise ValueError(f"{path}: {field.name} is {value!r}, expected a value like {field.default!r}")
            config[field.name] = value
    try:
        return config_class(**config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: shards named by an index, or a single file."""
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index}: no weight_map, expected tensor names and their files")
            return [folder / name for name in sorted(set(shards.values()))]
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    raise FileNotFoundError(f"{folder}: no model.safetensors, diffusion_pytorch_model.safetensors or index of shards")


class Network(nn.Module):
    """A module that knows how its checkpoint looks."""

    Config: type
    fp32: tuple[str, ...] = ()  # parts of names that stay fp32 in a bf16 model
    aliases: dict[str, str] = {}  # other names that a file may use -> ours
    ignored: tuple[str, ...] = ()  # beginnings of keys that a file has and we have no use for
    fp8: tuple[str, ...] = ()  # ends of names of the weights that may be held in 8 bits
    # a ModuleList, and parts of its blocks that are called by themselves
    streamed: tuple[str, tuple[str, ...]] = "", ()


N = TypeVar("N", bound=Network)


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


def locate(module: Network, files: list[Path]) -> dict[Path, dict[str, str]]:
    """Which file holds each of a module's tensors, and under which key: file -> our name -> key.

    Strict: all names and shapes are compared before the first tensor is read, and every missing, unexpected or mis-
    shaped one is named. `module.aliases` maps other names that a file may use, keys that start with one of
    `module.ignored` are skipped.
    """
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    places: dict[Path, dict[str, str]] = {path: {} for path in files}
    problems = []
    for path in files:
        with open_safetensors(path) as file:
            for key in file.keys():
                if key.startswith(module.ignored):
                    continue
                name, shape = module.aliases.get(key, key), file.get_slice(key).get_shape()
                if name not in wanted:
                    problems.append(f"unexpected {key}")
                elif shape != wanted[name]:
                    problems.append(f"{key} has shape {shape}, expected {wanted[name]}")
                places[path][name] = key
    problems += [f"missing {name}" for name in wanted if not any(name in names for names in places.values())]
    if problems:
        raise ValueError(f"{files[0].parent}: weights do not fit the config: " + "; ".join(problems))
    return places


def kept_dtype(module: Network, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a network's tensor in a model of `dtype`: `module.fp32` lists what stays fp32."""
    return torch.float32 if any(part in name for part in module.fp32) else dtype


def take(tensor: Tensor, module: Network, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A tensor of a file in memory of its own, always: in a file numbers stand at odd addresses, which costs kernels
    time and the last bit of some results, and a file may change."""
    return tensor.to(device, kept_dtype(module, name, dtype), copy=True)


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as float8_e4m3fn, and the scale of each row [out] in `dtype`: weight ~ float8 * scale.

    That is all that weight-only fp8 takes. The layer casts its weight back when it is used (every float8 is a bf16),
    and the scale of a row can wait until after the matrix product, so that no kernel, calibration or activation range
    is needed. 3 bits of mantissa leave an error of about 2.6 % of a weight (rms), of a row's output too, as errors
    are independent.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    rows = weight.float()
    scale = (rows.abs().amax(dim=1) / largest).clamp(min=torch.finfo(torch.float32).tiny).to(dtype)  # a row may be zero
    return (rows / scale.float()[:, None]).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


def fill(module: N, files: list[Path], device: torch.device | str, dtype: torch.dtype, fp8: tuple[str, ...] = ()) -> N:
    """Give a module built on the meta device its tensors, each read straight to its device and dtype; strict
    (`locate`). Weights whose names end in one of `fp8` are quantized, and their layers get the `scale`."""
    state = {}
    for path, names in locate(module, files).items():
        with open_safetensors(path) as file:
            for name, key in names.items():
                if name.endswith(fp8):
                    layer = module.get_submodule(name.rpartition(".")[0])
                    state[name], layer.scale = quantize(file.get_tensor(key).to(device), dtype)
                else:
                    state[name] = take(file.get_tensor(key), module, name, device, dtype)
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def build(network: type[N], folder: Path) -> N:
    """A network after `folder`/config.json, on the meta device."""
    config = read_config(network.Config, folder / "config.json")
    try:
        return on_meta(lambda: network(config))
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:  # negative sizes and the like
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / 'config.json'}: no network can be built from it ({reason})") from None


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
