"""Official files -> modules in memory: folders in the Hugging Face layout, and LoRA files.

A network class brings its config (`Config`, a dataclass whose fields are the keys of config.json that matter), names its
parameters as the checkpoint does, and lists what stays fp32 in a bf16 model (`fp32`), which other names a file may use
(`aliases`) and which parts of a file it has no use for (`ignored`). It is built on the meta device and filled tensor by
tensor by safetensors' own reader, straight to device and dtype, so that host memory never holds a second copy. Strict:
whatever is missing, unexpected or mis-shaped is named. Nothing is ever unpickled.
"""

import json
import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def open_safetensors(path: Path):
    """safetensors' own reader, with errors that name the file. Its tensors are views of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None


def read_json(path: Path) -> dict:
    """An object from a JSON file; raises OSError if there is no such file, ValueError naming it for any other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected an object")
    return content


def read_config(config_class: type, path: Path, more: dict = {}):
    """A config dataclass from the keys of a config.json that it has as fields, and from `more`; other keys are ignored."""
    values, config = read_json(path) | more, {}
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


def locate(module: nn.Module, files: list[Path]) -> dict[Path, dict[str, str]]:
    """Which file holds each of a module's tensors, and under which key: file -> our name -> key.

    Strict: all names and shapes are compared before the first tensor is read, and every missing, unexpected or mis-shaped
    one is named. `module.aliases` maps other names that a file may use, keys that start with one of `module.ignored` are
    skipped.
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


def kept_dtype(module: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a network's tensor in a model of `dtype`: `module.fp32` lists what stays fp32."""
    return torch.float32 if any(part in name for part in module.fp32) else dtype


def take(tensor: Tensor, module: nn.Module, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A tensor of a file in memory of its own, always: in a file numbers stand at odd addresses, which costs kernels time and
    the last bit of some results, and a file may change."""
    return tensor.to(device, kept_dtype(module, name, dtype), copy=True)


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as float8_e4m3fn, and the scale of each row [out] in `dtype`: weight ~ float8 * scale.

    That is all that weight-only fp8 takes. The layer casts its weight back when it is used (every float8 is a bf16), and the
    scale of a row can wait until after the matrix product, so that no kernel, calibration or activation range is needed.
    3 bits of mantissa leave an error of about 2.6 % of a weight (rms), of a row's output too, as errors are independent.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    rows = weight.float()
    scale = (rows.abs().amax(dim=1) / largest).clamp(min=torch.finfo(torch.float32).tiny).to(dtype)  # a row may be zero
    return (rows / scale.float()[:, None]).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


def fill(module: nn.Module, files: list[Path], device: torch.device | str, dtype: torch.dtype,
         fp8: tuple[str, ...] = ()) -> nn.Module:
    """Give a module built on the meta device its tensors, each read straight to its device and dtype; strict (`locate`).
    Weights whose names end in one of `fp8` are quantized, and their layers get the `scale`."""
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


def build(network: type[nn.Module], folder: Path) -> nn.Module:
    """A network after `folder`/config.json, on the meta device."""
    config = read_config(network.Config, folder / "config.json")
    try:
        with torch.device("meta"):
            return network(config)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:  # negative sizes and the like
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / 'config.json'}: no network can be built from it ({reason})") from None


def load(network: type[nn.Module], folder: str | Path, device: torch.device | str = "cpu",
         dtype: torch.dtype = torch.float32, fp8: tuple[str, ...] = ()) -> nn.Module:
    """Build `network` from `folder`/config.json and `fill` it from the folder's files."""
    folder = Path(folder)
    return fill(build(network, folder), weight_files(folder), device, dtype, fp8)


def network_dtype(device: torch.device | str) -> torch.dtype:
    """The one dtype policy: bf16 on CUDA (with the fp32 islands of each network), fp32 on the CPU."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def count_numbers(files: list[Path]) -> int:
    """How many numbers safetensors files hold, by their headers."""
    total = 0
    for path in files:
        with open_safetensors(path) as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    return total


def free_memory(device: torch.device | str) -> int:
    """Bytes that a device still has to give; 0 for the host where the system does not tell."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0


@dataclass(frozen=True)
class Lora:
    """Low-rank updates by layer name: A [r, in], B [out, r], alpha / r."""

    source: str
    adapters: dict[str, tuple[Tensor, Tensor, float]]


def load_lora(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Lora:
    """Read a LoRA in any official format: keys `[transformer.]LAYER.lora_{A,B}.weight` in a .safetensors, or in a .pt, there
    also under the key "peft".

    alpha is taken equal to the rank (scale 1) unless the safetensors header carries PEFT's `lora_adapter_metadata`.
    Raises ValueError for anything else, naming the keys.
    """
    path = Path(path)
    tensors, metadata = read_lora_file(path)
    settings = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    halves: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:transformer\.)?(.+)\.lora_([AB])\.weight", key)
        if match is None or tensor.ndim != 2 or not tensor.numel() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} {list(tensor.shape)}, expected LAYER.lora_A.weight or LAYER.lora_B.weight,"
                             " two dimensions, a rank of at least 1, finite numbers")
        halves[match[2]][match[1]] = tensor.to(device, dtype, copy=True)
    downs, ups = halves["A"], halves["B"]
    if not downs or downs.keys() != ups.keys():
        single = ", ".join(sorted(downs.keys() ^ ups.keys())) or "any layer"
        raise ValueError(f"{path}: no pair of lora_A and lora_B for: {single}")
    adapters, pattern = {}, settings.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{path}: alpha_pattern is {pattern!r}, expected layers and numbers")
    for name, down in downs.items():
        alpha = pattern.get(name, settings.get("lora_alpha", len(down)))
        if type(alpha) not in (int, float):
            raise ValueError(f"{path}: alpha of {name} is {alpha!r}, expected a number")
        adapters[name] = (down, ups[name], alpha / len(down))
    return Lora(str(path), adapters)


def read_lora_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and PEFT settings of a LoRA file."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            header = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        try:
            settings = json.loads(header)
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: lora_adapter_metadata in its header is not a JSON object")
        return tensors, settings
    if path.suffix != ".pt":
        raise ValueError(f"{path}: a LoRA is a .safetensors or .pt file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # refuses every pickled object
    except Exception:  # torch.load has no error class of its own for a broken or unsafe file
        raise ValueError(f"{path}: not a readable .pt that holds nothing but tensors") from None
    state = state.get("peft", state) if isinstance(state, dict) else state
    pairs = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        raise ValueError(f"{path}: expected a dictionary of tensors, or one under the key 'peft'")
    return state, {}
