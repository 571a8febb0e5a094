"""What a run goes on from: tensors and words in one safetensors file that knows if it was changed."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from files.checkpoint import open_safetensors


def pack(tensors: dict[str, Tensor], header: dict[str, str]) -> bytes:
    """A safetensors file, equal for equal content: the library writes the words of a header in random order."""
    content = save(tensors)
    end = 8 + int.from_bytes(content[:8], "little")
    words = json.dumps({"__metadata__": header, **json.loads(content[8:end])}).encode()
    words += b" " * (-len(words) % 8)
    return len(words).to_bytes(8, "little") + words + content[end:]


def digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    sum_ = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        sum_.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sum_.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sum_.hexdigest()


def pack_state(tensors: dict[str, Tensor], header: dict[str, str]) -> bytes:
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return pack(tensors, header | {"digest": digest(tensors, header)})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and words of `pack_state`. Raises OSError or ValueError for any other file, or one that was changed."""
    with open_safetensors(path) as file:
        header = file.metadata() or {}
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    if header.pop("digest", None) != digest(tensors, header):
        raise ValueError(f"{path}: not a state of this program, or changed since it was written; remove its folder to"
                         " start anew")
    return tensors, header


def check_same(path: Path, old: dict, new: dict, option: str) -> None:
    """Raises ValueError for the first thing that a run depends on and that is not as it was."""
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise ValueError(f"{path}: {name} was {old.get(name)}, now it is {new.get(name)}; {option} needs the same")
