"""Random weights of a small TAEHV under the released names."""

import torch

ENCODER, DECODER = (8, 8, 8, 8), (12, 10, 8, 6)  # officially 64, and 256, 128, 64, 64


def tensors(encoder=ENCODER, decoder=DECODER, channels=16) -> dict[str, torch.Tensor]:
    state, generator = {}, torch.Generator().manual_seed(3)

    def conv(name, dim_in, dim_out, size=3, bias=True):
        spread = 1.5 / (dim_in * size * size) ** 0.5
        state[f"{name}.weight"] = torch.randn(dim_out, dim_in, size, size, generator=generator) * spread
        if bias:
            state[f"{name}.bias"] = torch.randn(dim_out, generator=generator) * 0.1

    def blocks(part, start, dim):
        for index in range(start, start + 3):
            for place, dim_in in ((0, 2 * dim), (2, dim), (4, dim)):
                conv(f"{part}.{index}.conv.{place}", dim_in, dim)

    conv("encoder.0", 3, encoder[0])
    for level, stride in enumerate((2, 2, 1)):
        conv(f"encoder.{2 + 5 * level}.conv", encoder[level] * stride, encoder[level], 1, False)
        conv(f"encoder.{3 + 5 * level}", encoder[level], encoder[level + 1], bias=False)
        blocks("encoder", 4 + 5 * level, encoder[level + 1])
    conv("encoder.17", encoder[3], channels)
    conv("decoder.1", channels, decoder[0])
    for level, stride in enumerate((1, 2, 2)):
        blocks("decoder", 3 + 6 * level, decoder[level])
        conv(f"decoder.{7 + 6 * level}.conv", decoder[level], decoder[level] * stride, 1, False)
        conv(f"decoder.{8 + 6 * level}", decoder[level], decoder[level + 1], bias=False)
    conv("decoder.22", decoder[3], 3)
    return state
