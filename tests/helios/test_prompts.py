"""Which prompt a chunk has: one each, the last holds, and a slow switch mixes their embeddings."""

import pytest
import torch

from helios.load import Prompts, prompt_at

A, B, C = (Prompts(torch.full((1, 2, 3), value), trigger=torch.full((1, 2, 3), value + 10)) for value in (0.0, 1.0, 5.0))


def test_each_has_its_own_and_the_last_holds():
    assert [prompt_at([A, B, C], chunk) for chunk in range(5)] == [A, B, C, C, C]
    assert prompt_at([A], 7) is A


@pytest.mark.parametrize("blend, shares", [(2, [0, 0, 1, 1, 1]), (3, [0, 0, 0.5, 1, 1]), (5, [0, 0, 0.25, 0.5, 0.75])])
def test_a_slow_switch(blend, shares):
    """From the first prompt to the second, which would come in chunk 1: no share there yet, alone blend - 1 chunks later."""
    for chunk, share in enumerate(shares):
        mixed = prompt_at([A, B], chunk, blend)
        assert mixed.plain.eq(share).all() and mixed.trigger.eq(10 + share).all() and mixed.negative is None
    assert prompt_at([A, B], 20, blend) is B  # the same object: what was made from it is kept
