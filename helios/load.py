"""A whole folder of weights in the official layout: networks, prompts, and what lies beside them.

`memory` says how weights are held: "full" on the device, "fp8" with the transformer's big layers in 8 bits, "stream"
with the blocks of transformer and text encoder left in their files (stream.py). The transformer's class is an
argument, since model.py stands above this room.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from files.checkpoint import Network, build, load, open_safetensors, read_config, take, weight_files
from files.machine import network_dtype
from helios.flow import Schedule, load_schedule
from helios.index import read_index
from helios.lora import lora_band
from helios.stream import load_streamed
from helios.taehv import TAEHV, find_taehv, load_taehv
from helios.text import Tokenizer, UMT5Encoder, encode_prompt
from helios.vae import VAE

MEMORY = ("full", "fp8", "stream")
VAES = ("wan", "taehv", "taehv-decode")
ROOT = Path(__file__).parents[1] / "weights"
TRIGGER = "camctl23x."
NEGATIVE_PROMPT = (  # of the guided models; the one that Wan and Helios were tuned with
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall"
    " gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands,"
    " poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three"
    " legs, many people in the background, walking backwards"
)

N = TypeVar("N", bound=Network)


@dataclass(frozen=True)
class Models(Generic[N]):
    transformer: N
    vae: VAE | TAEHV
    schedule: Schedule
    decoder: VAE | TAEHV | None = None  # if it is not the one that encodes


@dataclass(frozen=True)
class Prompts:
    """Embeddings [1, 512, text_dim] (fewer rows if the model was made for fewer)."""

    plain: Tensor
    trigger: Tensor | None = None  # for the LoRA's stage
    negative: Tensor | None = None  # for guidance above 1


def load_network(network: type[N], folder: Path, device: torch.device | str, memory: str = "full") -> N:
    """A network in the device's dtype, its weights held as `memory` says."""
    dtype = network_dtype(device)
    if memory == "stream":
        blocks, entries = network.streamed
        return load_streamed(network, folder, device, dtype, blocks, entries)
    return load(network, folder, device, dtype, fp8=network.fp8 if memory == "fp8" else ())


Loader = Callable[[type[N], Path, torch.device | str, str], N]  # `load_network`, or that of several processes (team.py)


def load_models(transformer: type[N], weights: Path, device: torch.device | str, memory: str = "full",
                vae: str = "wan", load_network: Loader = load_network) -> Models[N]:
    """Transformer, VAE (in fp32; one of `VAES`) and schedule. In the transformer's blocks lies all but 4 % of the
    memory that weights need."""
    schedule = load_schedule(weights)
    tiny = None if vae == "wan" else load_taehv(find_taehv(weights), device)
    channels = read_config(transformer.Config, weights / "transformer" / "config.json").in_channels
    if tiny is not None and tiny.channels != channels:
        raise ValueError(f"{find_taehv(weights)}: its latents have {tiny.channels} channels, expected {channels}")
    encoder = tiny if vae == "taehv" and tiny is not None else load(VAE, weights / "vae", device).find_idle()
    return Models(load_network(transformer, weights / "transformer", device, memory), encoder, schedule, tiny)


def size_multiple(schedule: Schedule) -> int:
    """Height and width must be multiples of this: the first stage's latents have to fill whole patches of 2."""
    return 8 * 2 * 2 ** (schedule.stages - 1)


def check_parts(weights: Path, in_channels: int, text_dim: int) -> None:
    """Raises ValueError unless the transformer, whose sizes are given, goes with the other networks by their configs,
    which are all checked before anything large is read."""
    for name, mine, part, network, key in (("in_channels", in_channels, "vae", VAE, "z_dim"),
                                           ("text_dim", text_dim, "text_encoder", UMT5Encoder, "d_model")):
        there = getattr(build(network, weights / part).config, key)
        if mine != there:
            raise ValueError(f"{weights / 'transformer' / 'config.json'}: {name} is {mine}, expected {there} as {key}"
                             f" in {part}/config.json")


def files_read(weights: Path) -> list[Path]:
    """All that a run reads of a folder of weights."""
    parts = [weights / part for part in ("transformer", "vae", "text_encoder")]
    files = [file for part in parts for file in (part / "config.json", *weight_files(part))]
    return [weights / "model_index.json", weights / "scheduler" / "scheduler_config.json",
            weights / "tokenizer" / "spiece.model", *files]


def halve(transformer: type[Network], weights: Path, out: Path) -> None:
    """A copy of a folder of weights that holds in bf16 what a card holds in bf16. There it makes the same videos, bit
    for bit, and half as much is read. Raises ValueError if `out` exists or a part cannot be read."""
    if out.exists():
        raise ValueError(f"{out}: exists already, expected a new name")
    kinds = {"transformer": transformer, "text_encoder": UMT5Encoder}
    with TemporaryDirectory(dir=out.parent) as folder:
        whole = Path(folder, out.name)
        beside = "*/*.index*.json", "Pi3X/*.safetensors", "*.safetensors", "*.pth"  # geometry, a LoRA, a tiny decoder
        for file in [*files_read(weights), *(file for pattern in beside for file in weights.glob(pattern))]:
            copy = whole / file.relative_to(weights)
            copy.parent.mkdir(parents=True, exist_ok=True)
            network = kinds.get(file.parent.name)
            if network is None or file.suffix != ".safetensors":
                shutil.copyfile(file, copy)
                continue
            with open_safetensors(file) as shard:
                save_file({key: take(shard.get_tensor(key), network, key, "cpu", torch.bfloat16)
                           for key in shard.keys()}, copy, {"format": "pt"})
        whole.rename(out)


# ------------------------------------------------------------------------------------------------------------- prompts


def add_trigger(prompt: str) -> str:
    """The prompt of the LoRA's stage; one that has the trigger already stays."""
    prompt = prompt.strip()
    return prompt if prompt.startswith(TRIGGER) else f"{TRIGGER} {prompt}".strip()


def embed_prompts(weights: Path, prompts: Iterable[str], device: torch.device | str,
                  memory: str = "full", load_network: Loader = load_network) -> dict[str, Tensor]:
    """Load the text encoder, embed every prompt, and let it go again, before anything else needs the memory. The
    embeddings are on the CPU: those of a long list would fill a GPU."""
    tokenizer = Tokenizer(weights / "tokenizer")
    encoder = load_network(UMT5Encoder, weights / "text_encoder", device, memory)
    rows = read_index(weights).max_sequence_length
    embedded = {prompt: encode_prompt(tokenizer, encoder, prompt, rows).cpu() for prompt in prompts}
    for prompt, embedding in embedded.items():
        if not embedding.isfinite().all():
            raise ValueError(f"{weights / 'text_encoder'}: the embedding of {prompt[:60]!r} is not finite; are the"
                             " weights damaged?")
    return embedded


def encode_prompts(weights: Path, prompt: str, lora: bool, guided: bool, device: torch.device | str,
                   memory: str = "full") -> Prompts:
    """What one run needs of the text encoder."""
    return encode_each(weights, [prompt], lora, guided, device, memory)[0]


def encode_each(weights: Path, prompts: list[str], lora: bool, guided: bool, device: torch.device | str,
                memory: str = "full", embed: Callable[..., dict[str, Tensor]] = embed_prompts) -> list[Prompts]:
    """The same for several prompts, with the text encoder read once. `embed` is `embed_prompts`, or what keeps them."""
    wanted = {*prompts, *(map(add_trigger, prompts) if lora else ()), *([NEGATIVE_PROMPT] if guided else ())}
    found = embed(weights, wanted, device, memory)
    embedded = {prompt: found[prompt].to(device) for prompt in wanted}
    return [Prompts(embedded[prompt], embedded[add_trigger(prompt)] if lora else None,
                    embedded[NEGATIVE_PROMPT] if guided else None) for prompt in prompts]


def prompt_at(prompts: list[Prompts], chunk: int, blend: int = 1) -> Prompts:
    """That of a chunk (from 0 on): each prompt leads one, the last holds. With a `blend` of n chunks a switch is
    slow: in the chunk where it would come the new one has no share yet, n - 1 chunks later it is alone; between them
    they are mixed.
    """
    seen = [prompts[min(max(chunk - lag, 0), len(prompts) - 1)] for lag in (range(1, blend) if blend > 1 else (0,))]
    if all(each is seen[0] for each in seen):
        return seen[0]
    given = [name for name, value in vars(seen[0]).items() if value is not None]
    mixed = {name: torch.stack([getattr(each, name) for each in seen]).mean(0) for name in given}
    return replace(seen[0], **mixed)


# ------------------------------------------------------------------------------------------------ what lies beside them


def default_weights() -> Path:
    """The released model if it has been downloaded, else the miniature that comes with the code."""
    released = ROOT / "Helios-Distilled"
    return released if released.is_dir() else ROOT / "mini"


RELEASED = {"short": "visible_lora_state_step1000.safetensors",
            "mid": "visible_lora_state_step1000_efficient_patchmid.pt"}  # by the band that the warp was in


def find_lora(choice: str, weights: Path, led: bool, band: str = "short") -> Path | None:
    """The LoRA file to use; "auto" takes one that was trained with the warp in that `band`. It belongs to runs that a
    warp leads; plain Helios runs without."""
    word = choice.lower()
    if word in ("off", "none", "no", "false", "null", "0", "") or (word == "auto" and not led):
        return None
    if word == "auto":
        released = weights.parent / "warp-as-history" / RELEASED[band]
        own = weights / "lora.safetensors"
        return next((path for path in (own, released) if path.is_file() and lora_band(path) == band), None)
    if not led:
        raise ValueError("--lora needs a camera: --poses, --move or --warp")
    return Path(choice)
