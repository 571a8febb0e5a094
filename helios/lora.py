"""LoRA files, official and others', into memory. Nothing is ever unpickled."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from files.checkpoint import open_safetensors


@dataclass(frozen=True)
class Lora:
    """Low-rank updates by layer name: A [r, in], B [out, r], alpha / r."""

    source: str
    adapters: dict[str, tuple[Tensor, Tensor, float]]


def load_lora(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Lora:
    """Read a LoRA in any official format: keys `[transformer.]LAYER.lora_{A,B}.weight` in a .safetensors, or in a
    .pt, there also under the key "peft".

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
