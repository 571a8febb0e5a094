"""LoRA files, official and others', into memory. Nothing is ever unpickled.

Read are the names of diffusers, PEFT, ComfyUI and kohya, in .safetensors and in .pt files of plain tensors, with the
scale that PEFT gives: from its settings in the header or in adapter_config.json beside the file, or kohya's alpha of
each layer. What those settings ask for beyond low-rank updates, and other kinds of adapters, are refused by name.
"""

import math
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files.checkpoint import check_pointer, few, open_safetensors, parse_json, read_json

Adapter = tuple[Tensor, Tensor, float]  # A [r, in], B [out, r], scale

# PREFIX LAYER .lora_A [.ADAPTER] .weight, in the words of PEFT and diffusers, ComfyUI, DDP, and kohya
KEY = re.compile(
    r"(?:(?:base_model\.model|model|transformer|diffusion_model|module)\.)*(?:lora_(?:unet|transformer)_)?"
    r"(?P<layer>.+?)\.(?:lora[_.](?P<half>A|B|down|up)(?:\.(?!weight)\w+)?\.weight|alpha)"
)
OTHERS = {"lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT",
          "lora_embedding_": "a LoRA of embeddings", "lora_B.bias": "lora_bias", "diff_b": "a difference of weights"}
FREE = {"use_rslora", "inference_mode", "init_lora_weights", "ensure_weight_tying"}  # flags that change nothing here
ASK_MORE = ("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "arrow_config",
            "alora_invocation_tokens", "kasa_config", "velora_config", "monteclora_config")


@dataclass(frozen=True)
class Lora:
    """Low-rank updates by layer name: A [r, in], B [out, r], alpha / r."""

    source: str
    adapters: dict[str, Adapter]
    warp_band: str = "short"  # the band of history that the warp was in when it was trained: short, mid


def load_lora(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Lora:
    """Read a LoRA, or that of a folder as PEFT or diffusers save it. Without settings or alphas its scale is 1.
    Raises ValueError or OSError in one line for anything else, naming the key."""
    path = find_file(Path(path))
    tensors, header = read_tensors(path)
    settings = read_settings(path, header)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        half = {"down": "A", "up": "B"}.get(match["half"], match["half"]) or "alpha" if match else ""
        if match is None or half in parts.setdefault(match["layer"], {}):
            kind = next((kind for word, kind in OTHERS.items() if word in key), "not a key of a LoRA, or there twice")
            raise ValueError(f"{path}: {key}: {kind}, expected LAYER.lora_A.weight and LAYER.lora_B.weight")
        parts[match["layer"]][half] = check_tensor(tensor, 0 if half == "alpha" else 2, f"{path}: {key}")
    single = [name for name, halves in parts.items() if not {"A", "B"} <= halves.keys()]
    if single or not parts:
        raise ValueError(f"{path}: no pair of lora_A and lora_B for: {few(sorted(single)) or 'any layer'}")
    adapters = {name: (halves["A"].to(device, dtype, copy=True), halves["B"].to(device, dtype, copy=True),
                       find_scale(name, halves, settings, path)) for name, halves in parts.items()}
    return Lora(str(path), adapters, find_band(path, header))


def find_file(path: Path) -> Path:
    """The file itself, or the one in a folder as PEFT or diffusers save it."""
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    return next((path / name for name in names if (path / name).is_file()), path)


def check_tensor(tensor: Tensor, dimensions: int, where: str) -> Tensor:
    """In fp32, whatever floats the file has, 8-bit ones too."""
    shape = list(tensor.shape)
    flat = tensor.numel() == 1 if dimensions == 0 else tensor.ndim == dimensions and tensor.numel() > 0
    if not flat or tensor.is_complex() or not tensor.dtype.is_floating_point and dimensions:
        raise ValueError(f"{where}: {shape} of {str(tensor.dtype).removeprefix('torch.')}, expected floats of"
                         f" {dimensions} dimensions, a rank of at least 1")
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f"{where}: not all of its numbers are finite")
    return tensor


# --------------------------------------------------------------------------------------------------------------- scale


def read_settings(path: Path, header: dict[str, str]) -> dict[str, Any]:
    """PEFT's settings, from the header or the file beside; ValueError for those that ask for more than a LoRA."""
    where, beside = f"{path}: lora_adapter_metadata in its header", path.with_name("adapter_config.json")
    settings = parse_json(header.get("lora_adapter_metadata", "{}"), where)
    if path.name == "adapter_model.safetensors" and beside.is_file():
        where, settings = str(beside), read_json(beside)
    if not isinstance(settings, dict):
        raise ValueError(f"{where} is not a JSON object")
    settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    start = settings.get("init_lora_weights")
    flags = [key for key, value in settings.items() if value is True and key not in FREE]
    flags += [key for key in ASK_MORE if settings.get(key)]
    flags += [key for key, plain in (("bias", "none"), ("peft_type", "LORA")) if settings.get(key) not in (None, plain)]
    if isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "corda", "loftq", "lora"):
        flags.append("init_lora_weights")  # these change the base weights
    if flags:
        found = ", ".join(f"{key} is {str(settings[key])[:40]}" for key in sorted({*flags}))
        raise ValueError(f"{where}: {found}, which is not supported")
    for key in ("alpha_pattern", "rank_pattern"):
        if not isinstance(settings.get(key) or {}, dict):
            raise ValueError(f"{where}: {key} is {str(settings[key])[:100]!r}, expected layers and numbers")
    return settings


def find_pattern(pattern: dict[str, Any], name: str, otherwise: Any, where: object) -> Any:
    """The value of the first key that is the end of a layer's name or, as PEFT allows, an expression for it."""
    for key, value in pattern.items():
        # An expression from a file must not run for ever: few repetitions, none of a group.
        if len(key) > 200 or len(re.findall(r"[*+?{|]", key)) > 6 or re.search(r"\)[*+?{]", key):
            raise ValueError(f"{where}: the pattern {key[:100]!r} is not simple, expected a layer's name")
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{where}: the pattern {key!r} is not an expression ({error})") from None
    return otherwise


def find_scale(name: str, halves: dict[str, Tensor], settings: dict[str, Any], where: object) -> float:
    """alpha / rank of a layer, or alpha / sqrt(rank) with use_rslora."""
    rank = len(halves["A"])
    said = find_pattern(settings.get("rank_pattern") or {}, name, settings.get("r", rank), where)
    if said != rank:
        raise ValueError(f"{where}: rank of {name} is {rank}, its settings say {str(said)[:40]!r}")
    alpha = find_pattern(settings.get("alpha_pattern") or {}, name, settings.get("lora_alpha", rank), where)
    if "alpha" in halves:
        alpha = halves["alpha"].item()
    root = settings.get("use_rslora", False) is True
    if type(alpha) not in (int, float) or not 0 < alpha <= 1000 * rank:
        raise ValueError(f"{where}: alpha of {name} is {str(alpha)[:40]!r}, expected a number above 0, at most"
                         f" {1000 * rank}")
    return alpha / (math.sqrt(rank) if root else rank)


def find_band(path: Path, header: dict[str, str]) -> str:
    """Where the LoRA saw the warp: its own word in the header, or the official word in the file's name."""
    band = header.get("wah_warp_band", "mid" if "patchmid" in path.name else "short")
    if band not in ("short", "mid"):
        raise ValueError(f"{path}: wah_warp_band in its header is {band[:40]!r}, expected short or mid")
    return band


def lora_band(path: Path) -> str:
    """`find_band` of a file whose tensors are not needed."""
    if path.suffix != ".safetensors":
        return find_band(path, {})
    with open_safetensors(path) as file:
        return find_band(path, file.metadata() or {})


# ------------------------------------------------------------------------------------------------------------- tensors


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a .safetensors file, or of a .pt file of plain tensors, which has no header."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path}: expected a .safetensors or .pt file")
    state = read_pt(path)
    state = state.get("peft", state) if isinstance(state, dict) else state
    pairs = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        raise ValueError(f"{path}: expected a dictionary of tensors, or one under the key 'peft'")
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > path.stat().st_size:
        raise ValueError(f"{path}: its tensors are larger than the file (expanded), expected plain ones")
    return state, {}


PLAIN = re.compile(  # all that a file of plain tensors names; sparse, nested, meta and quantized ones need other names
    r"collections OrderedDict|torch Size|torch\._utils _rebuild_(tensor_v[23]|parameter)"
    r"|torch (Float|Half|BFloat16|Double|Long|Int)Storage|torch(\.storage)? UntypedStorage|torch float8_\w+")


def read_pt(path: Path) -> Any:
    """What a .pt file of plain tensors holds. What it names is looked at before anything of it is made, so that
    nothing else can be made, and pieces are not compressed, so that they take what the file takes."""
    check_pointer(path)
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            if packed or sum(member.file_size for member in members) > path.stat().st_size:
                raise ValueError("compressed")
            pickles = [file.read(member) for member in members if member.filename.endswith("data.pkl")]
        named = {str(word) for pickle in pickles for code, word, _ in pickletools.genops(pickle)
                 if "GLOBAL" in code.name}
        strange = sorted(word for word in named if not PLAIN.fullmatch(word))
        if strange or len(pickles) != 1:
            raise ValueError(f"it names {few(strange) or 'nothing'}")
        return torch.load(path, map_location="cpu", weights_only=True)  # refuses every pickled object
    except Exception as error:  # zipfile, pickletools and torch.load have no error class of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise ValueError(f"{path}: not a readable .pt that holds nothing but plain tensors ({reason})") from None
