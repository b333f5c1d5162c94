"""A small segmenter and inputs for it, for tests of the model, of its export and of its training."""

from __future__ import annotations

from functools import cache

import torch

from ppcr.model.segmenter import Segmenter, SegmenterConfig

SMALL = SegmenterConfig(
    image_size=64,
    dim=32,
    high_res=(16, 8),
    encoder_blocks=1,
    context_dim=32,
    context_blocks=1,
    text_layers=1,
    heads=2,
)


@cache
def model() -> Segmenter:
    """Random weights, in evaluation mode. Not to be changed."""
    torch.manual_seed(0)
    return Segmenter(SMALL).eval()


def prompts(n: int, t: int = 5, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """What `Segmenter.decode` takes besides features: `n` prompts, their texts of up to `t` tokens."""
    g = torch.Generator().manual_seed(seed)
    low, size = torch.rand(n, 2, generator=g) * 0.5, 0.1 + torch.rand(n, 2, generator=g) * 0.4
    boxes = torch.cat([low, low + size], dim=1)
    mask = torch.arange(t)[None] < torch.randint(1, t + 1, (n, 1), generator=g)
    return boxes, low + size / 2, torch.ones(n), torch.randn(n, t, SMALL.text_dim, generator=g), mask


def pixels(b: int = 1) -> torch.Tensor:
    """f32 [b, 3, 64, 64]: normalised noise."""
    return torch.randn(b, 3, 64, 64, generator=torch.Generator().manual_seed(3))
