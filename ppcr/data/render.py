"""Batched ray-cast renderer of scene graphs: images and exact visible masks, the same code on CPU and CUDA.

Each object is ray-cast in a small window at twice the resolution. Windows meet in an integer depth buffer, so
occlusion is per pixel and no result depends on the order of atomics or on the rest of the batch. All tensor
shapes follow from the graphs alone: nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppcr.data.dyes import DYES
from ppcr.data.graph import SHAPES, SIZE_RADIUS, SIZES, SceneGraph
from ppcr.data.shapes import COS, EXTENT, SIN, TRACERS, YAW, shade
from ppcr.data.table import Scenes, draw_table, expose

ALBEDO = (  # in the order of graph.COLORS
    (0.84, 0.09, 0.10),
    (0.98, 0.47, 0.04),
    (0.96, 0.86, 0.10),
    (0.10, 0.58, 0.16),
    (0.10, 0.80, 0.84),
    (0.10, 0.22, 0.84),
    (0.54, 0.14, 0.72),
    (0.94, 0.94, 0.94),
)
_PALETTE = np.array((*ALBEDO, *DYES.values()), np.float32)

# Cast shadow of each of graph.SHAPES, a tapered capsule on the ground: height of the point that casts its
# tip, half width at the base, half width at the tip, in radii.
SHADOW = (
    (1.3, 0.85, 0.8),
    (1.2, 0.6, 0.7),
    (1.4, 0.72, 0.7),
    (1.7, 0.85, 0.1),
    (1.6, 0.85, 0.1),
    (1.3, 0.6, 0.7),
)
SLOT_BITS = 4
DEPTH_STEPS = 1 << 26


@dataclass(frozen=True)
class Rendered:
    """A batch of B scenes at S x S with N slots (the most objects of any scene in the batch).

    image: f32[B, 3, S, S], RGB in multiples of 1/255, 0..1.
    masks: bool[B, N, S, S], the visible part of each object; at most one object owns a pixel.
    boxes: f32[B, N, 4], x1, y1, x2, y2 of the visible mask in 0..1 (outer pixel edges).
    points: f32[B, N, 2], x, y in 0..1 of the centre of the visible pixel nearest the visible centroid.
    present: bool[B, N], the slot holds an object of the graph (slot i is the graph's object i).
    Boxes and points of an object without a visible pixel are zeros.
    """

    image: Tensor
    masks: Tensor
    boxes: Tensor
    points: Tensor
    present: Tensor


def render(
    graphs: Sequence[SceneGraph],
    size: int = 256,
    device: torch.device | str = "cpu",
    *,
    albedo: Sequence[NDArray[np.float32]] | None = None,
) -> Rendered:
    """Draw the graphs at size x size pixels (32..1024) on the device; gradients are never recorded.

    The same graph gives the same result at a given size, whatever else is in the batch; devices differ by the
    rounding of their arithmetic only. ``albedo`` paints the objects of each graph, f32[N, 3] RGB in 0..1,
    instead of the colours they are named by. Raises ValueError for an empty batch, a size out of range, or a
    graph of more than 15 objects.
    """
    if not graphs:
        raise ValueError("nothing to render: no graphs")
    if not 32 <= size <= 1024:
        raise ValueError(f"size must be 32..1024, got {size}")
    slots = max(len(graph) for graph in graphs)
    if slots >= 1 << SLOT_BITS:
        raise ValueError(f"at most {(1 << SLOT_BITS) - 1} objects a scene, got {slots}")
    device = torch.device(device)
    with torch.no_grad():
        objects = _Objects.collect(graphs, albedo, device)
        scenes = Scenes.collect(graphs, device)
        color, coverage, labels = _draw_objects(objects, len(graphs), size)
        shadow = _draw_shadows(objects, len(graphs), size)
        table = draw_table(scenes, shadow, size)
        image = expose(table * (1.0 - coverage) + color, scenes, size)
        index = torch.arange(1, slots + 1, dtype=torch.uint8, device=device)
        masks = labels[:, None] == index[:, None, None]
        present = torch.as_tensor(np.array([len(g) for g in graphs]), device=device)[:, None] >= index[None]
        return Rendered(image, masks, _boxes(masks), _points(labels, slots), present)


@dataclass(frozen=True)
class _Objects:
    """All M objects of a batch, sorted by (shape, size) so that a kind of object is one slice."""

    ints: NDArray[np.int64]  # [M, 2] scene, slot
    floats: NDArray[np.float32]  # [M, 14], as unpacked in _draw_objects
    slices: list[tuple[int, int, slice]]  # shape, size, rows
    device: torch.device

    @staticmethod
    def collect(
        graphs: Sequence[SceneGraph], albedo: Sequence[NDArray[np.float32]] | None, device: torch.device
    ) -> _Objects:
        counts = [len(graph) for graph in graphs]
        scene = np.repeat(np.arange(len(graphs)), counts)
        slot = np.concatenate([np.arange(count) for count in counts])
        shape, kind, color, material, center, depth, radius, rotation = (
            np.concatenate([getattr(graph, name) for graph in graphs])
            for name in ("shape", "size", "color", "material", "center", "depth", "radius", "rotation")
        )
        yaw = rotation + np.array([YAW.get(name, 0.0) for name in SHAPES], np.float32)[shape]
        light = np.stack([graph.light for graph in graphs])[scene]
        floats = np.column_stack(
            (
                center,
                np.float32(1.0) - depth,
                radius,
                np.cos(yaw),
                np.sin(yaw),
                _PALETTE[color] if albedo is None else np.concatenate(albedo),
                material,
                light[:, :4],
            )
        ).astype(np.float32)
        group = shape * len(SIZES) + kind
        order = np.argsort(group, kind="stable")
        edges = np.searchsorted(group[order], np.arange(len(SHAPES) * len(SIZES) + 1))
        slices = [
            (g // len(SIZES), g % len(SIZES), slice(int(edges[g]), int(edges[g + 1])))
            for g in range(len(SHAPES) * len(SIZES))
            if edges[g] < edges[g + 1]
        ]
        return _Objects(np.stack((scene, slot), 1)[order], floats[order], slices, device)

    def send(self, table: NDArray[np.int64] | NDArray[np.float32]) -> tuple[Tensor, ...]:
        """The columns of a table [m, k] on the device, each [m, 1, 1]."""
        block = torch.from_numpy(table).to(self.device, non_blocking=True)
        return block[:, :, None, None].unbind(1)


def _window(center: NDArray[np.floating], shape: tuple[int, int], limit: int) -> NDArray[np.int64]:
    """First column and row, int64[m, 2], of windows (width, height) around centres, kept in 0..limit."""
    side = np.array(shape)
    return np.clip(np.floor(center - side / 2).astype(np.int64), 0, limit - side)


def _draw_objects(objects: _Objects, batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Colour times coverage f32[B, 3, S, S], coverage f32[B, 1, S, S], label u8[B, S, S]: slot + 1, or 0."""
    device = objects.device
    fine = 2 * size
    depth_keys, fine_pixels, pixels, packed = [], [], [], []
    for shape, kind, rows in objects.slices:
        width, height = (math.ceil(2.1 * extent * SIZE_RADIUS[kind] * fine) + 2 for extent in EXTENT[shape])
        origin = _window(objects.floats[rows, :2] * fine, (width, height), fine)
        ints = np.column_stack((objects.ints[rows], origin))
        scene, slot, left, top = objects.send(ints)
        columns = objects.send(objects.floats[rows])
        x, _, ground, r, cos, sin, red, green, blue, metal, lx, ly, lz, ambient = columns
        column = left + torch.arange(width, device=device)
        row = top + torch.arange(height, device=device)[:, None]
        # Rays start on the plane through the ground point that faces the camera; in radii, object's frame.
        right = ((column + 0.5) / fine - x) / r
        up = (ground - (row + 0.5) / fine) / r
        away = up * SIN
        start = (right * cos + away * sin, away * cos - right * sin, up * COS)
        toward = (-COS * sin, -COS * cos, torch.full_like(cos, SIN))
        light = (lx * cos + ly * sin, ly * cos - lx * sin, lz)
        t, hit, normal = TRACERS[SHAPES[shape]](start, toward)
        glow, shine = shade(normal, toward, light, ambient, metal, start[2] + t * SIN)
        depth = t * r - (1.0 - ground) * (COS / SIN)
        step = ((depth + 2.0) * (DEPTH_STEPS / 3.0)).to(torch.int32)
        depth_keys.append(torch.where(hit, (step << SLOT_BITS) + (slot + 1).to(torch.int32), 0).flatten())
        fine_pixels.append(((scene * fine + row) * fine + column).flatten())
        pixels.append(((scene * size + row // 2) * size + column // 2).flatten())
        word = torch.ones_like(column * row)
        for channel in (blue, green, red):
            level = (channel * glow + shine).clamp_(0.0, 1.0)
            word = (word << 12) + level.mul_(1023.0).add_(0.5).to(torch.int64)
        packed.append(word.flatten())
    key, fine_pixel = torch.cat(depth_keys), torch.cat(fine_pixels)
    nearest = torch.zeros(batch * fine * fine, dtype=torch.int32, device=device)
    nearest.scatter_reduce_(0, fine_pixel, key, "amax")
    wins = (nearest[fine_pixel] == key) & (key > 0)
    # Four samples a pixel, three colours and a count share one 64-bit sum: exact in any order of the atomics.
    total = torch.zeros(batch * size * size, dtype=torch.int64, device=device)
    total.scatter_add_(0, torch.cat(pixels), torch.cat(packed) * wins)
    total = total.view(batch, 1, size, size)
    color = torch.cat([(total >> shift) & 4095 for shift in (0, 12, 24)], 1).float() / (4 * 1023.0)
    owners = (nearest & ((1 << SLOT_BITS) - 1)).to(torch.uint8).view(batch, size, 2, size, 2)
    return color, (total >> 36).float() / 4, _majority(owners)


def _majority(owners: Tensor) -> Tensor:
    """Owner of most of a pixel's four samples, u8[B, S, 2, S, 2] -> u8[B, S, S]; an object wins a draw."""
    a, b, c, d = owners[:, :, 0, :, 0], owners[:, :, 0, :, 1], owners[:, :, 1, :, 0], owners[:, :, 1, :, 1]
    pairs = ((a, b), (a, c), (a, d), (b, c), (b, d), (c, d))
    ab, ac, ad, bc, bd, cd = ((p == q).to(torch.uint8) << SLOT_BITS for p, q in pairs)
    first = torch.maximum(a + ab + ac + ad, b + ab + bc + bd)
    best = torch.maximum(first, torch.maximum(c + ac + bc + cd, d + ad + bd + cd))
    return best & ((1 << SLOT_BITS) - 1)


def _draw_shadows(objects: _Objects, batch: int, size: int) -> Tensor:
    """Darkness of the ground, f32[B, 1, S, S] in 0..1: the strongest shadow wins, in any order."""
    device = objects.device
    pixels, values = [], []
    for shape, kind, rows in objects.slices:
        tip_height, base_width, tip_width = SHADOW[shape]
        width = min(size, math.ceil(2 * 2.1 * 1.05 * SIZE_RADIUS[kind] * size) + 2)
        depth = min(size, math.ceil(2 * 1.4 * 1.05 * SIZE_RADIUS[kind] * size) + 2)
        floats = objects.floats[rows].astype(np.float64)
        reach = tip_height * floats[:, 3] / floats[:, 12]
        middle = floats[:, [0, 2]] + floats[:, [10, 11]] * (reach / 2)[:, None] * np.array((-1.0, SIN))
        ints = np.column_stack((objects.ints[rows, 0], _window(middle * size, (width, depth), size)))
        scene, left, top = objects.send(ints)
        x, _, ground, r, _, _, _, _, _, _, lx, ly, lz, ambient = objects.send(objects.floats[rows])
        column = left + torch.arange(width, device=device)
        row = top + torch.arange(depth, device=device)[:, None]
        gx = ((column + 0.5) / size - x) / r
        gy = (ground - (row + 0.5) / size) / (r * SIN)
        tip_x, tip_y = -lx / lz * tip_height, -ly / lz * tip_height
        along = ((gx * tip_x + gy * tip_y) / (tip_x * tip_x + tip_y * tip_y)).clamp_(0.0, 1.0)
        gap = torch.sqrt((gx - along * tip_x) ** 2 + (gy - along * tip_y) ** 2) - base_width
        gap = gap - along * (tip_width - base_width)
        soft = 0.10 + 0.22 * along
        fade = (0.5 - 0.5 * gap / soft).clamp_(0.0, 1.0)
        cast = fade * fade * (3.0 - 2.0 * fade) * (0.95 - ambient) * (1.0 - 0.35 * along)
        near = (1.0 - (torch.sqrt(gx * gx + gy * gy) - 0.5 * base_width) / 0.8).clamp_(0.0, 1.0)
        values.append(torch.maximum(cast, 0.45 * near * near).flatten())
        pixels.append(((scene * size + row) * size + column).flatten())
    shadow = torch.zeros(batch * size * size, device=device)
    shadow.scatter_reduce_(0, torch.cat(pixels), torch.cat(values), "amax")
    return shadow.view(batch, 1, size, size)


def _boxes(masks: Tensor) -> Tensor:
    """Outer pixel edges of each mask, f32[B, N, 4] in 0..1."""
    size = masks.shape[-1]
    marks = masks.view(torch.uint8)
    ramp = torch.arange(1, size + 1, dtype=torch.int32, device=masks.device)
    columns, rows = marks.amax(2).to(torch.int32), marks.amax(3).to(torch.int32)
    high = torch.stack([(line * ramp).amax(-1) for line in (columns, rows)], -1)
    low = torch.stack([size + 1 - (line * ramp.flip(0)).amax(-1) for line in (columns, rows)], -1)
    return torch.cat((low - 1, high), -1).float() / size * (high[..., :1] > 0)


def _points(labels: Tensor, slots: int) -> Tensor:
    """Centre of the owned pixel nearest each centroid, f32[B, N, 2] in 0..1; zeros where nothing is owned."""
    batch, size = labels.shape[0], labels.shape[-1]
    owner = labels.view(batch, -1).long()
    pixel = torch.arange(size, device=labels.device)
    x, y = pixel.repeat(size), pixel.repeat_interleave(size)
    sums, count = torch.zeros(2, batch, slots + 1, dtype=torch.int64, device=labels.device).unbind()
    sums.scatter_add_(1, owner, (x + (y << 32)).expand(batch, -1))
    count.scatter_add_(1, owner, torch.ones_like(x).expand(batch, -1))
    # The centroid in whole 1/256 pixels, so that ties and rounding are the same everywhere.
    middle_x, middle_y = (256 * part // count.clamp(min=1) for part in (sums & 0xFFFFFFFF, sums >> 32))
    gap_x, gap_y = 256 * x - middle_x.gather(1, owner), 256 * y - middle_y.gather(1, owner)
    best = torch.full((batch, slots + 1), 1 << 62, dtype=torch.int64, device=labels.device)
    best.scatter_reduce_(1, owner, ((gap_x * gap_x + gap_y * gap_y) << 20) + (y * size + x), "amin")
    index = best[:, 1:] & ((1 << 20) - 1)
    point = torch.stack((index % size, index // size), -1).float().add_(0.5) / size
    return point * (count[:, 1:, None] > 0)
