"""The peers that tests and bench.py compare with: diffusers, transformers and peft, on weights that ours shares.

`Scale` makes our networks in any width with random weights, `cases` the histories that they are called with. `twin`
makes a peer of any of our networks; `Denoiser`, `PeerTrainer` and `pipeline` call it as ours is called and add what it
lacks, the drop of invisible tokens. What they compute is theirs alone, but for the random draws of a training step
(train.py). The packages are imported where they are used, as `bench.py --meta` needs none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

import wah
from files.checkpoint import kept_dtype, on_meta
from helios.flow import Schedule
from helios.load import Models
from helios.text import UMT5Config, UMT5Encoder
from helios.vae import VAE, VAEConfig
from model import Helios, HeliosConfig, History, pool
from train import TARGETS, Trainer, draw_items

PACKAGES = ("diffusers", "transformers", "peft")
LEAVING = 0.08  # of a warp's columns, in each latent frame: a camera that turns away


def randomize(network: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights, always the same ones of a kind of device, where they are made, under which activations stay near
    1. The network may be on the meta device."""
    generator, state = torch.Generator(device).manual_seed(0), {}
    for name, parameter in network.named_parameters():
        vector = parameter.numel() == max(parameter.shape)
        mean, deviation = float(vector and not name.endswith("bias")), 0.05 if vector else parameter[0].numel() ** -0.5
        value = mean + deviation * torch.randn(parameter.shape, generator=generator, device=device)
        state[name] = value.to(kept_dtype(network, name, dtype))
    network.load_state_dict(state, strict=False, assign=True)
    return network.to(device).requires_grad_(False).eval()


@dataclass(frozen=True)
class Scale:
    """The released networks in another width and depth, and text as wide as the transformer."""

    width: int
    layers: int
    device: torch.device
    dtype: torch.dtype

    def transformer(self) -> Helios:
        config = HeliosConfig(self.width // 128, num_layers=self.layers, ffn_dim=-(-self.width * 27 // 1280) * 128,
                              text_dim=self.width)
        return randomize(on_meta(lambda: Helios(config)), self.device, self.dtype)

    def encoder(self) -> UMT5Encoder:
        config = UMT5Config(1000, self.width, d_ff=self.width * 5 // 2, num_layers=self.layers,
                            num_heads=self.width // 64)
        return randomize(UMT5Encoder(config), self.device, self.dtype)

    def vae(self, base_dim: int | None = None) -> VAE:
        """In fp32; `base_dim` None makes it as much narrower as the transformer is."""
        config = VAEConfig(base_dim=max(8, 96 * self.width // 5120 // 8 * 8) if base_dim is None else base_dim)
        return randomize(VAE(config), self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(self.device)


def cases(transformer: Helios, size: tuple[int, int], schedule: Schedule,
          leaving: float = LEAVING) -> dict[str, tuple[tuple, History]]:
    """The calls of a later chunk, with and without a warp: name -> grid (T, H, W) of the target's latents, and the
    history that `wah.Rollout` makes."""
    rollout = wah.Rollout(Models(transformer, None, schedule), None, size, torch.Generator().manual_seed(0))
    rollout.chunk, rollout.prefix = 1, rollout.normal(1)
    rollout.native = rollout.earlier = rollout.normal(sum(wah.BANDS))
    height, width = rollout.latent_shape[1:]
    shown = torch.arange(width) < width * (1 - leaving * torch.arange(wah.CHUNK))[:, None]
    visible = repeat(shown.float(), "t w -> 1 1 t h w", h=height).to(rollout.device)
    rollout.warp_latents = lambda warp: (rollout.normal(wah.CHUNK), visible)  # in place of the VAE
    native, led = rollout.native_history(), rollout.warp_history(None)
    first, *others = ((wah.CHUNK, height >> halved, width >> halved) for halved in reversed(range(schedule.stages)))
    return {"stage 0": (first, native), "stage 0, warp": (first, led),
            **{f"stage {stage}": (grid, native) for stage, grid in enumerate(others, 1)}}


def twin(network: Helios | VAE | UMT5Encoder) -> Any:
    """The peer of the same config (another package's module) with the same weights, which are in memory once."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(network.config).items()}
    if isinstance(network, Helios):
        from diffusers import HeliosTransformer3DModel

        peer = HeliosTransformer3DModel(**config)
    elif isinstance(network, VAE):
        from diffusers import AutoencoderKLWan

        peer = AutoencoderKLWan(**config)
    else:
        from transformers import UMT5Config, UMT5EncoderModel

        peer = UMT5EncoderModel(UMT5Config(**config))
    state = network.state_dict()
    peer.to(next(network.parameters()).device)
    peer.load_state_dict({name: state[network.aliases.get(name, name)] for name in peer.state_dict()}, assign=True)
    return peer.requires_grad_(False).eval()


class Denoiser:
    """diffusers' transformer, given our `History`, whose invisible tokens it drops before its first block."""

    def __init__(self, model: nn.Module):
        self.model = model
        for block in model.blocks:  # all of them, as with gradient checkpointing each runs again by itself
            block.register_forward_pre_hook(self.drop)

    def __call__(self, latents: Tensor, timestep: Tensor, embeddings: Tensor, history: History) -> Tensor:
        bands = {name: getattr(history, name) for name in ("long", "mid", "short")}
        self.keep = None
        if history.short.visible is not None:
            masks = [pool(band.visible, getattr(self.model, f"patch_{name}").kernel_size).flatten() >= history.threshold
                     for name, band in bands.items()]
            target = latents[0, 0, :, ::2, ::2].numel()
            self.keep = torch.cat([*masks, masks[0].new_ones(target)]).nonzero().flatten()
        return self.model(
            latents.to(self.model.dtype), timestep, embeddings, indices_hidden_states=history.indices[None],
            **{f"latents_history_{name}": band.latents.to(self.model.dtype) for name, band in bands.items()},
            **{f"indices_latents_history_{name}": band.indices[None] for name, band in bands.items()},
            return_dict=False)[0]

    def drop(self, block: nn.Module, inputs: tuple) -> tuple:
        if self.keep is None:
            return inputs
        hidden, text, time, rope, count = inputs
        if block is self.model.blocks[0]:
            hidden, self.time, self.rope = hidden[:, self.keep], time[:, self.keep], rope[:, self.keep]
        return hidden, text, self.time, self.rope, count


class PeerTrainer:
    """Steps of diffusers and peft with gradient checkpointing, from where a new `Trainer` stands; no warm-up."""

    def __init__(self, trainer: Trainer):
        from peft import LoraConfig, inject_adapter_in_model

        self.recipe, self.schedule, self.generator = trainer.recipe, trainer.schedule, trainer.generator.clone_state()
        rank, model = self.recipe.rank, twin(trainer.transformer)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)), model)
        model.train().enable_gradient_checkpointing()
        adapters = {name.replace(".default", ""): x for name, x in model.named_parameters() if x.requires_grad}
        for name, matrix in trainer.tensors.items():
            adapters[name].data = matrix.detach().clone()
        self.denoiser, self.weights = Denoiser(model), list(adapters.values())
        self.optimizer = torch.optim.AdamW(self.weights, lr=self.recipe.lr, weight_decay=self.recipe.weight_decay)

    def step(self, history: History, clean: Tensor, embeddings: Tensor) -> dict[str, float]:
        item = draw_items(clean, self.schedule, self.recipe, self.generator)[0]
        self.optimizer.zero_grad()
        prediction = self.denoiser(item.latents, item.timestep, embeddings, history)
        loss = F.mse_loss(prediction.float(), item.target)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, self.recipe.clip)
        self.optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}


def pipeline(transformer: Helios, encoder: UMT5Encoder, vae: VAE, tokenizer: Path, schedule: Schedule) -> Callable:
    """diffusers' pipeline of a distilled checkpoint, with twins of our networks."""
    from diffusers import HeliosDMDScheduler, HeliosPyramidPipeline
    from transformers import AutoTokenizer

    names = "gamma", "use_dynamic_shifting", "time_shift_type"
    scheduler = HeliosDMDScheduler(**{name: getattr(schedule, name) for name in names})
    whole = HeliosPyramidPipeline(AutoTokenizer.from_pretrained(tokenizer), twin(encoder), twin(vae), scheduler,
                                  twin(transformer), is_distilled=True)
    whole.set_progress_bar_config(disable=True)
    return whole
