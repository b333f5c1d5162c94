"""The segmenter's image encoder: a convolution pyramid with attention blocks at its coarsest level."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ppcr.model.layers import (
    ConvNorm,
    FourierPosition,
    Mlp,
    Norm,
    grid_centers,
    merge_heads,
    residual,
    split_heads,
)


class ImageFeatures(NamedTuple):
    """What decoding needs of an image; computed once for all its prompts.

    image_features f[B, C, S/8, S/8]; high_res_0 f[B, C0, S/4, S/4]; high_res_1 f[B, C1, S/2, S/2].
    """

    image_features: Tensor
    high_res_0: Tensor
    high_res_1: Tensor


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first `hidden` channels wide, and a skip."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNorm(dim, hidden), ConvNorm(hidden, dim, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        return residual(x, self.body(x))


class Bottleneck(nn.Module):
    """1x1 down to `hidden`, 3x3, 1x1 up, and a skip."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(dim, hidden, 1), ConvNorm(hidden, hidden), ConvNorm(hidden, dim, 1, relu=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return residual(x, self.body(x))


class ContextBlock(nn.Module):
    """Pre-norm self-attention over all cells, then an MLP: f[B, N, C] -> f[B, N, C]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = Norm(dim), Norm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(self.norm_attention(x)).chunk(3, dim=-1))
        x = x + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return x + self.mlp(self.norm_mlp(x))


class ImageEncoder(nn.Module):
    """pixels f32[B, 3, S, S] (RGB, normalised) -> ImageFeatures.

    Args:
        image_size: S, a multiple of 16.
        dim, high_res: channels of image_features, and of (high_res_0, high_res_1).
        context: channels of the attention blocks at S/16, a multiple of 32.
        blocks: convolution blocks at S/8 on either side of the attention.
        context_blocks: attention blocks.
    """

    position: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        dim: int,
        high_res: tuple[int, int],
        context: int,
        blocks: int,
        context_blocks: int,
    ) -> None:
        super().__init__()
        c0, c1 = high_res
        self.stem = nn.Sequential(ConvNorm(3, c1, stride=2), BasicBlock(c1, c1))
        self.quarter = nn.Sequential(ConvNorm(c1, c0, stride=2), BasicBlock(c0, c0))
        self.eighth = nn.Sequential(
            ConvNorm(c0, dim, stride=2), *(Bottleneck(dim, dim // 2) for _ in range(blocks))
        )
        self.down = ConvNorm(dim, context, stride=2)
        self.position_projection = nn.Linear(context, context)
        self.context = nn.Sequential(*(ContextBlock(context, context // 32) for _ in range(context_blocks)))
        self.up = nn.Linear(context, 4 * dim)
        self.fuse = nn.Sequential(*(Bottleneck(dim, dim // 2) for _ in range(blocks)))
        self.grid = image_size // 16
        position = FourierPosition(context)(grid_centers(self.grid))
        self.register_buffer("position", position, persistent=False)

    def forward(self, pixels: Tensor) -> ImageFeatures:
        high_res_1 = self.stem(pixels)
        high_res_0 = self.quarter(high_res_1)
        eighth = self.eighth(high_res_0)
        cells = self.down(eighth).flatten(2).transpose(1, 2)
        cells = self.up(self.context(cells + self.position_projection(self.position)))
        # Each coarse cell writes its own 2x2 finer cells: a pixel shuffle, without interpolation.
        cells = cells.unflatten(1, (self.grid, self.grid)).unflatten(-1, (2, 2, -1)).transpose(2, 3)
        cells = cells.flatten(1, 4).transpose(1, 2).unflatten(-1, (2 * self.grid, 2 * self.grid))
        features = self.fuse(residual(eighth, cells))
        return ImageFeatures(features, high_res_0, high_res_1)
