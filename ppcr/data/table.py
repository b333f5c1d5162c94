"""What surrounds the objects: the table and its backdrop, and the camera's exposure and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ppcr.data.graph import SceneGraph
from ppcr.data.shapes import SIN, ramp

NOISE_SIDE = 512


@dataclass(frozen=True)
class Scenes:
    """Light and background parameters of B scenes, one f32[B, 1, 1, 1] per number, and the noise offsets."""

    light: list[Tensor]
    background: list[Tensor]
    noise_x: Tensor
    noise_y: Tensor
    offsets: list[tuple[int, int]]

    @staticmethod
    def collect(graphs: Sequence[SceneGraph], device: torch.device) -> Scenes:
        """The light, background and noise of each scene, side by side on ``device``."""
        light, background = (
            torch.from_numpy(np.stack([getattr(graph, name) for graph in graphs])).to(device)
            for name in ("light", "background")
        )
        offset = torch.from_numpy(np.stack([graph.noise_offset for graph in graphs])).to(device)
        return Scenes(
            list(light[:, :, None, None, None].unbind(1)),
            list(background[:, :, None, None, None].unbind(1)),
            offset[:, 0, None, None],
            offset[:, 1, None, None],
            [(int(x) % NOISE_SIDE, int(y) % NOISE_SIDE) for x, y in (graph.noise_offset for graph in graphs)],
        )


@lru_cache(maxsize=8)
def _noise_tile(device: torch.device, margin: int) -> Tensor:
    """Gaussian noise f32[3, NOISE_SIDE + margin, ...], periodic; drawn on the CPU so that devices agree."""
    generator = torch.Generator().manual_seed(20261)
    tile = torch.randn(3, NOISE_SIDE, NOISE_SIDE, generator=generator)
    wrap = torch.arange(NOISE_SIDE + margin) % NOISE_SIDE
    return tile[:, wrap][:, :, wrap].contiguous().to(device)


def _noise(scenes: Scenes, column: Tensor, row: Tensor, channel: int) -> Tensor:
    """Noise at integer cells (int64, broadcastable to [B, H, W])."""
    x, y = (column + scenes.noise_x) % NOISE_SIDE, (row + scenes.noise_y) % NOISE_SIDE
    return _noise_tile(x.device, 0)[channel].view(-1)[y * NOISE_SIDE + x]


def draw_table(scenes: Scenes, shadow: Tensor, size: int) -> Tensor:
    """Table and backdrop, RGB f32[B, 3, S, S], darkened by ``shadow`` f32[B, 1, S, S], 0 lit .. 1 dark."""
    values = scenes.background
    horizon, table, wall = values[0], torch.cat(values[1:4], 1), torch.cat(values[4:7], 1)
    slope_x, slope_y, stripes, frequency, angle, phase, cloud, cells, speckle, checker, squares = values[7:18]
    grid = (torch.arange(size, device=shadow.device) + 0.5) / size
    x, y = grid[None, None, None, :], grid[None, None, :, None]
    away = (1.0 - y) / SIN
    light = 1.0 + slope_x * (x - 0.5) + slope_y * (y - 0.5)
    smooth = _clouds(scenes, x * cells, away * cells)
    across = torch.cos(angle) * x + torch.sin(angle) * away + 0.03 * smooth
    texture = 1.0 + cloud * smooth + stripes * torch.sin(frequency * 2 * math.pi * across + phase)
    tiles = torch.floor(x * squares) + torch.floor(away * squares)
    texture = texture + checker * (torch.remainder(tiles, 2.0) * 2.0 - 1.0)
    grain = (grid * 192).long()
    texture = texture + speckle * _noise(scenes, grain[None, None], grain[None, :, None], 0)[:, None]
    on_table = ramp(y - horizon, -0.75 / size, 0.75 / size)
    wall = wall * (0.9 + 0.25 * y)
    return (wall + on_table * (table * texture * (1.0 - shadow) - wall)) * light


def _clouds(scenes: Scenes, x: Tensor, y: Tensor) -> Tensor:
    """Smooth noise of about unit size, f32[B, 1, S, S], at cells x f32[B, 1, 1, S], y f32[B, 1, S, 1]."""
    left, top = torch.floor(x), torch.floor(y)
    u, v = ramp(x - left, 0.0, 1.0), ramp(y - top, 0.0, 1.0)
    i, j = left.long()[:, 0], top.long()[:, 0]
    a, b = _noise(scenes, i, j, 1)[:, None], _noise(scenes, i + 1, j, 1)[:, None]
    c, d = _noise(scenes, i, j + 1, 1)[:, None], _noise(scenes, i + 1, j + 1, 1)[:, None]
    upper, lower = a + u * (b - a), c + u * (d - c)
    return 0.6 * (upper + v * (lower - upper))


def expose(image: Tensor, scenes: Scenes, size: int) -> Tensor:
    """The camera on f32[B, 3, S, S]: exposure, white balance, vignette, sensor noise, 8 bits; 0..1."""
    exposure, balance = scenes.light[4], torch.cat(scenes.light[5:8], 1)
    vignette, sigma = scenes.background[18:20]
    pixel = torch.arange(size, device=image.device)
    off = (pixel + 0.5) / size - 0.5
    shade = 1.0 - vignette * (off * off + (off * off)[:, None])
    tile = _noise_tile(image.device, size)
    noise = torch.stack([tile[:, y : y + size, x : x + size] for x, y in scenes.offsets])
    image = image * (exposure * balance) * shade + sigma * noise
    return image.clamp_(0.0, 1.0).mul_(255.0).round_().div_(255.0)
