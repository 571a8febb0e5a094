"""A small Pi3X that can be told poses, rays and depth, with weights of a seed: those that the public code ran with."""

import torch

from geometry.pi3x import CONDITIONS, Branch, Pi3X, Pi3XConfig

SMALL = Branch(64, 5, 256, 64)
CONFIG = Pi3XConfig(dim=64, grid=5, registers=2, encoder_blocks=1, encoder_hidden=128, decoder_blocks=10,
                    decoder_hidden=128, point=SMALL, conf=SMALL, camera=SMALL, metric=SMALL,
                    point_head=((32, 1),) * 3, conf_head=((32, 1),) * 3, given=tuple(CONDITIONS), pose_blocks=2)


def drawn(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Weights of a seed, as they were when the numbers were recorded: in the order of their names."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name in sorted(shapes):
        noise = torch.randn(shapes[name], generator=generator)
        scale = 0.3 if noise.ndim > 1 and "token" not in name else 0.1
        state[name] = noise * scale / max(1, noise[0].numel() / 8 if noise.ndim > 1 else 1) ** 0.5
        if "gamma" in name or "norm" in name and name.endswith("weight"):
            state[name] += 1
    return state | {"image_mean": torch.full((1, 3, 1, 1), 0.45), "image_std": torch.full((1, 3, 1, 1), 0.25)}


def small_pi3x() -> Pi3X:
    network = Pi3X(CONFIG).requires_grad_(False)
    network.load_state_dict(drawn({name: tensor.shape for name, tensor in network.state_dict().items()}))
    return network
