"""SAM's prompt encoder for boxes and points, and the path by which the semantic prompt's text comes in."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppcr.model.layers import TokenAttention, grid_centers
from ppcr.model.prompt_encoder import Prompts, TextEncoder
from ppcr.model.sam_config import SamConfig


class SamPrompts(NamedTuple):
    """spatial f[B, K, P, C], tokens of box and point; text f[B, K, T, C], what was read from the text."""

    spatial: Tensor
    text: Tensor


class RandomFourier(nn.Module):
    """Positions xy in 0..1 as sines and cosines of random frequencies, which belong to the weights."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, dim // 2))

    def forward(self, points: Tensor) -> Tensor:
        """f[..., 2] -> f[..., dim]"""
        angles = 2.0 * math.pi * ((2.0 * points - 1.0) @ self.frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SamPromptEncoder(nn.Module):
    """`Prompts` -> `SamPrompts`.

    SAM's mask prompts and background points are left out: no prompt of PPCR's asks for them.
    """

    centers: Tensor

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        dim = config.dim
        self.points, self.ends_with_padding = config.points, config.architecture == "sam2"
        # SAM speaks of a pixel by its centre: the corner x1, y1 of a box is the centre of pixel x1, y1.
        self.half_pixel = 0.5 / config.image_size
        self.position = RandomFourier(dim)
        self.corners = nn.Parameter(torch.randn(2, dim))
        self.point = nn.Parameter(torch.randn(dim))
        self.no_point = nn.Parameter(torch.randn(dim))
        self.text = TextEncoder(
            embedding_dim=config.text_dim,
            dim=dim,
            heads=config.heads,
            layers=config.text_layers,
            tokens=config.text_tokens,
            max_length=config.max_text,
        )
        self.register_buffer("centers", grid_centers(config.grid), persistent=False)

    @property
    def cell_positions(self) -> Tensor:
        """f[N, C], the positions of the image's cells."""
        cells: Tensor = self.position(self.centers)
        return cells

    def forward(self, prompts: Prompts) -> SamPrompts:
        boxes = prompts.boxes
        places = [boxes[..., :2], boxes[..., 2:]]
        kinds: list[Tensor] = [self.corners]
        if self.points:
            places.insert(0, prompts.points)
            kinds.insert(0, self.point[None])
        spatial = self.position(torch.stack(places, dim=-2) + self.half_pixel) + torch.cat(kinds)
        use = prompts.spatial_valid[..., None, None]
        spatial = use * spatial + (1.0 - use) * self.no_point
        if self.ends_with_padding:
            end = self.no_point.expand(*spatial.shape[:-2], 1, -1)
            spatial = torch.cat([spatial, end], dim=-2)
        return SamPrompts(spatial, self.text(prompts.text_embeddings, prompts.text_mask))


class SemanticReader(nn.Module):
    """Lets the decoder's tokens read the text: tokens f[B, K, M, C], text f[B, K, T, C] -> f[B, K, M, C].

    The projection it ends with is zero until trained. It then adds exactly nothing, so that an untrained
    composition is the SAM it was made from; appending the text as tokens of their own would not be, since
    every token takes its share of an attention.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = TokenAttention(dim, heads)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.attention.out.bias)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        return tokens + self.attention(tokens, text, text)
