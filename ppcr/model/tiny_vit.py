"""TinyViT as MobileSAM's image encoder: convolutions at S/4, window attention at S/8 and S/16.

After "TinyViT: Fast Pretraining Distillation for Small Vision Transformers" (arXiv 2207.10666) and "Faster
Segment Anything" (arXiv 2306.14289), which keeps its last stage at S/16 and adds SAM's neck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppcr.model.layers import ChannelNorm, ConvNorm, Norm, merge_heads


@dataclass(frozen=True)
class TinyViTSizes:
    """Sizes of the encoder; the defaults are MobileSAM's.

    dims, depths: channels and blocks of the four stages, of which the first is convolutional; heads, windows:
    of the other three; strides: of the convolutions between stages; expand: hidden width of a block over its
    width.
    """

    dims: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int] = (4, 5, 10)
    windows: tuple[int, int, int] = (7, 14, 7)
    strides: tuple[int, int, int] = (2, 2, 1)
    expand: int = 4

    @property
    def patch(self) -> int:
        """Pixels a cell of the answer is wide."""
        first, second, third = self.strides
        return 4 * first * second * third


class InvertedBottleneck(nn.Module):
    """1x1 up, 3x3 for each channel by itself, 1x1 down, and a skip: f[B, C, h, w] -> f[B, C, h, w]."""

    def __init__(self, dim: int, expand: int) -> None:
        super().__init__()
        hidden = expand * dim
        self.body = nn.Sequential(
            ConvNorm(dim, hidden, 1, relu=False),
            nn.GELU(),
            ConvNorm(hidden, hidden, relu=False, groups=hidden),
            nn.GELU(),
            ConvNorm(hidden, dim, 1, relu=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.body(x))


class Downsample(nn.Sequential):
    """To the next stage's channels, and by `stride` to its resolution."""

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__(
            ConvNorm(dim, out, 1, relu=False),
            nn.GELU(),
            ConvNorm(out, out, stride=stride, relu=False, groups=out),
            nn.GELU(),
            ConvNorm(out, out, 1, relu=False),
        )


class WindowAttention(nn.Module):
    """Attention within a window, with a learned bias for each distance: f[B, w*w, C] -> f[B, w*w, C]."""

    distance: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.norm = Norm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(heads, window * window))
        line = torch.arange(window)
        apart = (line[:, None] - line).abs()  # [w, w]
        both = apart[:, None, :, None] * window + apart[None, :, None, :]
        self.register_buffer("distance", both.reshape(window**2, window**2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # Query, key and value lie side by side within each head.
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2)
        q, k, v = qkv.unbind(3)  # each [B, heads, w*w, D]
        scores = (q * self.scale) @ k.transpose(-1, -2) + self.bias[:, self.distance]
        return self.out(merge_heads(scores.softmax(-1) @ v))


class WindowBlock(nn.Module):
    """Window attention, a 3x3 convolution of each channel, an MLP: f[B, C, h, w] -> f[B, C, h, w].

    What goes from block to block has its channels in front, and what has them last is never [B, h, w, C]: of
    that an engine that computes convolutions with channels last would keep the layout and turn the numbers.
    """

    def __init__(self, dim: int, heads: int, window: int, expand: int) -> None:
        super().__init__()
        self.window = window
        self.attention = WindowAttention(dim, heads, window)
        self.local = ConvNorm(dim, dim, relu=False, groups=dim)
        self.mlp = nn.Sequential(
            Norm(dim), nn.Linear(dim, expand * dim), nn.GELU(), nn.Linear(expand * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x + self._by_window(x))
        cells = self.mlp(x.permute(0, 2, 3, 1).flatten(1, 2))
        return x + cells.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _by_window(self, x: Tensor) -> Tensor:
        w, (dim, height, width) = self.window, x.shape[1:]
        # What the padding adds takes part in the attention: the weights were trained with it.
        x = F.pad(x, (0, -width % w, 0, -height % w))
        rows, columns = x.shape[2] // w, x.shape[3] // w
        cells = x.permute(0, 2, 3, 1).reshape(-1, rows, w, columns, w, dim)
        parts = self.attention(cells.transpose(2, 3).reshape(-1, w * w, dim))
        cells = parts.reshape(-1, rows, columns, w, w, dim).transpose(2, 3)
        cells = cells.reshape(-1, rows * w, columns * w, dim)[:, :height, :width]
        return cells.permute(0, 3, 1, 2)


class TinyViT(nn.Module):
    """pixels f32[B, 3, S, S] (RGB, normalised) -> image features f[B, out, S/16, S/16]."""

    def __init__(self, sizes: TinyViTSizes, out: int) -> None:
        super().__init__()
        d0, d1, d2, d3 = dims = sizes.dims
        self.stem = nn.Sequential(
            ConvNorm(3, d0 // 2, stride=2, relu=False), nn.GELU(), ConvNorm(d0 // 2, d0, stride=2, relu=False)
        )
        self.convolutions = nn.Sequential(
            *(InvertedBottleneck(d0, sizes.expand) for _ in range(sizes.depths[0]))
        )
        pairs = zip(dims[:3], dims[1:], sizes.strides, strict=True)
        self.downsamples = nn.ModuleList(Downsample(*pair) for pair in pairs)
        self.stages = nn.ModuleList(
            nn.Sequential(*(WindowBlock(dim, heads, window, sizes.expand) for _ in range(depth)))
            for dim, depth, heads, window in zip(
                dims[1:], sizes.depths[1:], sizes.heads, sizes.windows, strict=True
            )
        )
        self.neck = nn.Sequential(
            nn.Conv2d(d3, out, 1, bias=False),
            ChannelNorm(out, eps=1e-6),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            ChannelNorm(out, eps=1e-6),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.convolutions(self.stem(pixels))
        for downsample, stage in zip(self.downsamples, self.stages, strict=True):
            x = stage(downsample(x))
        features: Tensor = self.neck(x)
        return features
