"""Small layers the segmenter's parts share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.LayerNorm):
    """LayerNorm over the last dimension that works in fp32 on fp16 input, whose squares would overflow."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            # The weights may be fp16 as well: torch takes no norm of two types.
            weight, bias = (None if t is None else t.float() for t in (self.weight, self.bias))
            return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
        return super().forward(x)


class Mlp(nn.Sequential):
    """Linear, ReLU, Linear: ReLU quantises better than GELU and costs nothing on a CPU."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out or dim))


class TokenAttention(nn.Module):
    """Multi-head attention among a handful of tokens.

    Shapes: queries f[..., Q, C], keys and values f[..., N, C], bias f[..., 1, 1, N] added to the scores
    (0 keeps a key, a large negative number drops it); returns f[..., Q, C]. Leading dimensions broadcast.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1.0 / math.sqrt(dim // heads)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (
            split_heads(p(x), self.heads) for p, x in ((self.q, queries), (self.k, keys), (self.v, values))
        )
        scores = (q * self.scale) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return self.out(merge_heads(scores.softmax(-1) @ v))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """f[..., N, H*D] -> f[..., H, N, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """f[..., H, N, D] -> f[..., N, H*D]"""
    return x.transpose(-2, -3).flatten(-2)


class FourierPosition(nn.Module):
    """Positions xy in 0..1 as sines and cosines, half of the channels for each axis.

    Frequencies are log-spaced from half a cycle to `max_cycles` cycles across the image; phases of the high
    ones tell positions far finer than a cell apart.
    """

    frequencies: Tensor

    def __init__(self, dim: int, max_cycles: float = 24.0) -> None:
        super().__init__()
        cycles = torch.logspace(math.log10(0.5), math.log10(max_cycles), dim // 4)
        self.register_buffer("frequencies", 2.0 * math.pi * cycles, persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        """f[..., 2] -> f[..., dim]"""
        angles = (points.float().unsqueeze(-1) * self.frequencies).flatten(-2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grid_centers(size: int) -> Tensor:
    """Cell centres xy in 0..1 of a size x size grid, row by row: f32[size*size, 2]."""
    line = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


class ChannelNorm(Norm):
    """LayerNorm over the channels of an image: f[B, C, h, w] -> f[B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Sequential):
    """3x3 or 1x1 convolution, batch norm and optionally ReLU; folds into one convolution at inference."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1, relu: bool = True, groups: int = 1
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(c_out),
        ]
        super().__init__(*layers, *([nn.ReLU()] if relu else []))


def residual(x: Tensor, branch: Tensor) -> Tensor:
    """The closing of a residual block: add, then ReLU."""
    return F.relu(x + branch)
