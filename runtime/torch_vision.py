"""The vision tower of a Qwen2.5-VL in torch for images of one size, on a GPU as one CUDA graph.

It takes the stock tower's weights and computes what that computes, but everything that follows from the size
is made once, and windows attend as one batch: nothing is asked of the host on the way. The stock tower takes
its windows one by one, thousands of launches to an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.session import Float32Array
from runtime.torch_graph import record

_THETA = 10000.0


class TorchTower:
    """One size of images.

    Args:
        visual: the stock tower, in evaluation mode. grid: patches (rows, columns).
    """

    def __init__(self, visual: Any, grid: tuple[int, int], *, graph: bool) -> None:
        config = visual.config
        self._visual, self._merged = visual, config.spatial_merge_size**2
        self._heads, self._whole = config.num_heads, frozenset(config.fullatt_block_indexes)
        embed = visual.patch_embed.proj.weight
        # Patches do not overlap: their convolution is a product.
        self._embed = embed.detach().reshape(embed.shape[0], -1)
        side = config.window_size // config.spatial_merge_size // config.patch_size
        cells = (grid[0] // config.spatial_merge_size, grid[1] // config.spatial_merge_size)
        order, sizes = windows(cells, side)
        device, patches = embed.device, grid[0] * grid[1]
        self._order = _spread(order, self._merged).to(device)
        self._back = torch.argsort(order).to(device)
        head_dim = config.hidden_size // config.num_heads
        places = patch_places(grid, config.spatial_merge_size)[_spread(order, self._merged)]
        self._cos, self._sin = (table.to(device) for table in rotary(places, head_dim))
        self._windows, self._mask = len(sizes), None
        if len(set(sizes.tolist())) > 1:
            number = torch.repeat_interleave(torch.arange(len(sizes)), sizes * self._merged)
            self._mask = (number[:, None] == number).to(device)
        self._pixels = torch.zeros(patches, self._embed.shape[1], dtype=embed.dtype, device=device)
        # Page-locked: the GPU copies from it without the processor.
        self._staged = torch.zeros(patches, self._embed.shape[1], pin_memory=embed.is_cuda)
        self._recorded = record(self.run, "the vision tower") if graph else None

    def encode(self, patches: Float32Array) -> Tensor:
        """Patches f32 [patches, patch_dim] to features f[image_tokens, hidden] on the device, to be kept."""
        self._staged.copy_(torch.from_numpy(patches))
        self._pixels.copy_(self._staged, non_blocking=True)
        if self._recorded is None:
            return self.run()
        features = self._recorded.replay().clone()
        # The next image is staged in the same memory.
        torch.cuda.current_stream().synchronize()
        return features

    def run(self) -> Tensor:
        """Features of what lies in the input, in new memory or in that of the graph."""
        visual = self._visual
        x = F.linear(self._pixels, self._embed)[self._order]
        for index, block in enumerate(visual.blocks):
            x = x + self._attend(block.attn, _normed(block.norm1, x), whole=index in self._whole)
            y, mlp = _normed(block.norm2, x), block.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
        merger = visual.merger
        y = _normed(merger.ln_q, x).reshape(-1, merger.hidden_size)
        found: Tensor = merger.mlp(y)[self._back]
        return found

    def _attend(self, attention: Any, x: Tensor, *, whole: bool) -> Tensor:
        count = len(x)
        qkv = attention.qkv(x).view(count, 3, self._heads, -1)
        q, k, v = qkv.unbind(1)  # [S, heads, D]
        q, k = (_turned(z.float(), self._cos, self._sin).to(x.dtype) for z in (q, k))
        parts = self._windows if self._mask is None and not whole else 1
        q, k, v = (z.view(parts, count // parts, self._heads, -1).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, None if whole else self._mask)
        out: Tensor = attention.proj(y.transpose(1, 2).reshape(count, -1))
        return out


def windows(cells: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """Order of the cells (rows, columns), window by window, and how many each window of ``side`` has."""
    place = torch.arange(cells[0] * cells[1])
    row, column = place // cells[1], place % cells[1]
    number = row // side * -(-cells[1] // side) + column // side
    return torch.argsort(number, stable=True), torch.bincount(number)


def patch_places(grid: tuple[int, int], merge: int) -> Tensor:
    """Row and column of every patch, int64 [patches, 2], those of a cell one after the other."""
    rows, columns = grid
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    places = places.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    return places.reshape(-1, 2)


def rotary(places: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, f32 [patches, 1, head_dim / 2]: half of the angles follow the row, half the column."""
    spatial = head_dim // 2
    inverse = 1.0 / _THETA ** (torch.arange(0, spatial, 2, dtype=torch.float32) / spatial)
    angles = (places[:, :, None].float() * inverse).flatten(1)[:, None]
    return angles.cos(), angles.sin()


def _spread(order: Tensor, count: int) -> Tensor:
    """Places of the ``count`` patches of each cell, for cells in ``order``."""
    return (order[:, None] * count + torch.arange(count)).reshape(-1)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
