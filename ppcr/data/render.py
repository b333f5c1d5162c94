"""Batched ray-cast renderer of scene graphs: images and exact visible masks, the same code on CPU and CUDA.

Each object is ray-cast analytically in a small window at twice the resolution; windows meet in an integer depth
buffer, so occlusion is per pixel and no result depends on the order of atomics or on the rest of the batch.
Shapes of all tensors follow from the graphs alone: nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppcr.data.graph import CENTER_LIFT, ELEVATION, SHAPES, SIZE_RADIUS, SIZES, SceneGraph

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

SIN, COS = math.sin(ELEVATION), math.cos(ELEVATION)
# Half width and half height of a shape's window around its centre, in radii; every yaw that occurs fits.
EXTENT = ((1.03, 1.20), (0.97, 0.98), (0.74, 1.12), (0.97, 1.13), (1.15, 1.15), (0.97, 0.90))
YAW = {"cube": math.pi / 4, "pyramid": math.pi / 4}  # an edge towards the camera: two faces show
CUBE, CYLINDER, CYLINDER_HEIGHT, SPHERE = 0.72, 0.72, 1.66, 0.95
CONE, CONE_HEIGHT, PYRAMID, PYRAMID_HEIGHT = 0.95, 2.0, 0.80, 1.90
RING, TUBE, RING_STEPS, RING_RELAX, RING_TOUCH = 0.68, 0.27, 10, 1.4, 0.002
# Cast shadow as a tapered capsule on the ground: height of its tip, half width at the base and at the tip (radii).
SHADOW = ((1.3, 0.85, 0.8), (1.2, 0.6, 0.7), (1.4, 0.72, 0.7), (1.7, 0.85, 0.1), (1.6, 0.85, 0.1), (1.3, 0.6, 0.7))
NOISE_SIDE = 512
SLOT_BITS = 4
DEPTH_STEPS = 1 << 26


@dataclass(frozen=True)
class Rendered:
    """A batch of B scenes at S x S with N slots (the most objects of any scene in the batch).

    image: f32[B, 3, S, S], RGB in multiples of 1/255, 0..1.
    masks: bool[B, N, S, S], the visible part of each object; at most one object owns a pixel.
    boxes: f32[B, N, 4], x1, y1, x2, y2 of the visible mask in 0..1 (outer pixel edges); zeros if nothing is visible.
    points: f32[B, N, 2], x, y of the visible pixel's centre nearest the visible centroid; zeros if none is visible.
    present: bool[B, N], the slot holds an object of the graph (slot i is the graph's object i).
    """

    image: Tensor
    masks: Tensor
    boxes: Tensor
    points: Tensor
    present: Tensor


def render(graphs: Sequence[SceneGraph], size: int = 256, device: torch.device | str = "cpu") -> Rendered:
    """Draw the graphs at size x size pixels (32..1024) on the device; gradients are never recorded.

    The same graph gives the same result at a given size, whatever else is in the batch. Raises ValueError for an
    empty batch, a size out of range, or a graph of more than 15 objects.
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
        objects = _Objects.collect(graphs, device)
        scenes = _Scenes.collect(graphs, device)
        color, coverage, labels = _draw_objects(objects, len(graphs), size, device)
        shadow = _draw_shadows(objects, len(graphs), size, device)
        table = _draw_table(scenes, shadow, size)
        image = _expose(table * (1.0 - coverage) + color, scenes, size)
        index = torch.arange(1, slots + 1, dtype=torch.uint8, device=device)
        masks = labels[:, None] == index[:, None, None]
        present = torch.as_tensor(np.array([len(g) for g in graphs]), device=device)[:, None] >= index[None]
        return Rendered(image, masks, _boxes(masks), _points(labels, slots), present)


@dataclass(frozen=True)
class _Objects:
    """All M objects of a batch, sorted by (shape, size) so that a kind of object is one slice."""

    ints: NDArray[np.int64]  # [M, 2] scene, slot
    floats: NDArray[np.float32]  # [M, 17], as unpacked in _draw_objects
    slices: list[tuple[int, int, slice]]  # shape, size, rows
    device: torch.device

    @staticmethod
    def collect(graphs: Sequence[SceneGraph], device: torch.device) -> _Objects:
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
                np.array(ALBEDO, np.float32)[color],
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

    def columns(self, rows: slice) -> list[Tensor]:
        """The float columns of some objects, each f32[m, 1, 1]."""
        block = torch.from_numpy(self.floats[rows]).to(self.device, non_blocking=True)
        return list(block[:, :, None, None].unbind(1))


@dataclass(frozen=True)
class _Scenes:
    """Light and background parameters of B scenes, one f32[B, 1, 1, 1] per number, and the noise offsets."""

    light: list[Tensor]
    background: list[Tensor]
    noise_x: Tensor
    noise_y: Tensor
    offsets: list[tuple[int, int]]

    @staticmethod
    def collect(graphs: Sequence[SceneGraph], device: torch.device) -> _Scenes:
        light, background = (
            torch.from_numpy(np.stack([getattr(graph, name) for graph in graphs])).to(device)
            for name in ("light", "background")
        )
        offset = torch.from_numpy(np.stack([graph.noise_offset for graph in graphs])).to(device)
        return _Scenes(
            list(light[:, :, None, None, None].unbind(1)),
            list(background[:, :, None, None, None].unbind(1)),
            offset[:, 0, None, None],
            offset[:, 1, None, None],
            [(int(x) % NOISE_SIDE, int(y) % NOISE_SIDE) for x, y in (graph.noise_offset for graph in graphs)],
        )


def _window(center: NDArray[np.floating], shape: tuple[int, int], limit: int) -> NDArray[np.int64]:
    """First column and row, int64[m, 2], of windows (width, height) around centres in pixels, kept in 0..limit."""
    side = np.array(shape)
    return np.clip(np.floor(center - side / 2).astype(np.int64), 0, limit - side)


def _draw_objects(objects: _Objects, batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Colour times coverage f32[B, 3, S, S], coverage f32[B, 1, S, S], visible object + 1 per pixel u8[B, S, S]."""
    fine = 2 * size
    depth_keys, fine_pixels, pixels, packed = [], [], [], []
    for shape, kind, rows in objects.slices:
        width, height = (math.ceil(2.1 * extent * SIZE_RADIUS[kind] * fine) + 2 for extent in EXTENT[shape])
        origin = _window(objects.floats[rows, :2] * fine, (width, height), fine)
        ints = np.column_stack((objects.ints[rows], origin))
        scene, slot, left, top = torch.from_numpy(ints).to(device, non_blocking=True)[:, :, None, None].unbind(1)
        x, _, ground, r, cos, sin, red, green, blue, metal, lx, ly, lz, ambient = objects.columns(rows)
        column = left + torch.arange(width, device=device)
        row = top + torch.arange(height, device=device)[:, None]
        # Ray origins on the plane through the ground point that faces the camera, in radii, in the object's frame.
        right = ((column + 0.5) / fine - x) / r
        up = (ground - (row + 0.5) / fine) / r
        away = up * SIN
        start = (right * cos + away * sin, away * cos - right * sin, up * COS)
        toward = (-COS * sin, -COS * cos, torch.full_like(cos, SIN))
        light = (lx * cos + ly * sin, ly * cos - lx * sin, lz)
        t, hit, normal = _TRACERS[SHAPES[shape]](start, toward)
        glow, shine = _shade(normal, toward, light, ambient, metal, start[2] + t * SIN)
        depth = t * r - (1.0 - ground) * (COS / SIN)
        step = ((depth + 2.0) * (DEPTH_STEPS / 3.0)).to(torch.int32)
        depth_keys.append(torch.where(hit, (step << SLOT_BITS) + (slot + 1).to(torch.int32), 0).flatten())
        fine_pixels.append(((scene * fine + row) * fine + column).flatten())
        pixels.append(((scene * size + row // 2) * size + column // 2).flatten())
        word = torch.ones_like(column * row)
        for channel in (blue, green, red):
            word = (word << 12) + (channel * glow + shine).clamp_(0.0, 1.0).mul_(1023.0).add_(0.5).to(torch.int64)
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
    """The owner of most of a pixel's four samples, u8[B, S, 2, S, 2] -> u8[B, S, S]; an object wins a draw."""
    a, b, c, d = owners[:, :, 0, :, 0], owners[:, :, 0, :, 1], owners[:, :, 1, :, 0], owners[:, :, 1, :, 1]
    ab, ac, ad, bc, bd, cd = ((p == q).to(torch.uint8) << 4 for p, q in
                              ((a, b), (a, c), (a, d), (b, c), (b, d), (c, d)))
    best = torch.maximum(torch.maximum(a + ab + ac + ad, b + ab + bc + bd),
                         torch.maximum(c + ac + bc + cd, d + ad + bd + cd))
    return best & 15


Vector = tuple[Tensor, Tensor, Tensor]
Trace = tuple[Tensor, Tensor, Vector]


def _planes(origin: Vector, toward: Vector, planes: Sequence[tuple[float, float, float, float]]) -> Trace:
    """Convex polyhedron of half spaces n . p <= d."""
    x, y, z = origin
    near, far = torch.full_like(x, 9.0), torch.full_like(x, -9.0)
    normal = [torch.zeros_like(x) for _ in range(3)]
    for nx, ny, nz, d in planes:
        speed = nx * toward[0] + ny * toward[1] + nz * toward[2] + 1e-6
        t = sum((n * p for n, p in ((-nx, x), (-ny, y), (-nz, z)) if n), start=torch.full_like(x, d)) / speed
        leaving = speed > 0
        first = leaving & (t < near)
        near = torch.where(first, t, near)
        far = torch.where(leaving, far, torch.maximum(far, t))
        normal = [torch.where(first, n, old) for n, old in zip((nx, ny, nz), normal, strict=True)]
    return near, near > far, (normal[0], normal[1], normal[2])


def _cube(origin: Vector, toward: Vector) -> Trace:
    planes = [(-1.0, 0.0, 0.0, CUBE), (1.0, 0.0, 0.0, CUBE), (0.0, -1.0, 0.0, CUBE), (0.0, 1.0, 0.0, CUBE)]
    return _planes(origin, toward, [*planes, (0.0, 0.0, 1.0, 2 * CUBE), (0.0, 0.0, -1.0, 0.0)])


def _pyramid(origin: Vector, toward: Vector) -> Trace:
    norm = math.hypot(PYRAMID, PYRAMID_HEIGHT)
    side, rise, d = PYRAMID_HEIGHT / norm, PYRAMID / norm, PYRAMID * PYRAMID_HEIGHT / norm
    planes = [(-side, 0.0, rise, d), (side, 0.0, rise, d), (0.0, -side, rise, d), (0.0, side, rise, d)]
    return _planes(origin, toward, [*planes, (0.0, 0.0, -1.0, 0.0)])


def _sphere(origin: Vector, toward: Vector) -> Trace:
    x, y, z = origin[0], origin[1], origin[2] - SPHERE
    b = x * toward[0] + y * toward[1] + z * SIN
    inside = b * b - (x * x + y * y + z * z) + SPHERE * SPHERE
    t = inside.clamp(min=0.0).sqrt() - b
    return t, inside > 0, tuple((o + t * c) / SPHERE for o, c in zip((x, y, z), toward, strict=True))


def _cylinder(origin: Vector, toward: Vector) -> Trace:
    x, y, z = origin
    b = x * toward[0] + y * toward[1]
    inside = b * b - COS * COS * (x * x + y * y - CYLINDER * CYLINDER)
    root = inside.clamp(min=0.0).sqrt()
    side, top = (root - b) / (COS * COS), (CYLINDER_HEIGHT - z) / SIN
    t = torch.minimum(side, top)
    hit = (inside > 0) & (t > torch.maximum((-root - b) / (COS * COS), -z / SIN))
    round_ = (side < top).float()
    return t, hit, ((x + t * toward[0]) / CYLINDER * round_, (y + t * toward[1]) / CYLINDER * round_, 1.0 - round_)


def _cone(origin: Vector, toward: Vector) -> Trace:
    slope = CONE / CONE_HEIGHT
    x, y, z = origin
    w = (CONE_HEIGHT - z) * slope
    a = COS * COS - (slope * SIN) ** 2
    b = x * toward[0] + y * toward[1] + w * (slope * SIN)
    inside = b * b - a * (x * x + y * y - w * w)
    t = (inside.clamp(min=0.0).sqrt() - b) / a
    height = z + t * SIN
    hit = (inside > 0) & (height > 0) & (height < CONE_HEIGHT)
    px, py = x + t * toward[0], y + t * toward[1]
    scale = 1.0 / (math.hypot(1.0, slope) * slope * (CONE_HEIGHT - height).clamp(min=1e-3))
    return t, hit, (px * scale, py * scale, torch.full_like(px, slope / math.hypot(1.0, slope)))


def _ring(origin: Vector, toward: Vector) -> Trace:
    """A torus standing on its rim, axis along y; sphere-traced, as its quartic is no cheaper."""
    x, y, z = origin[0], origin[1], origin[2] - (RING + TUBE)
    b = x * toward[0] + y * toward[1] + z * SIN
    t = torch.sqrt((b * b - (x * x + y * y + z * z) + (RING + TUBE) ** 2).clamp_(min=0.0)) - b
    for _ in range(RING_STEPS):
        px, py, pz = x + t * toward[0], y + t * toward[1], z + t * SIN
        across = torch.sqrt(px * px + pz * pz)
        bulge = across - RING
        gap = torch.sqrt(bulge * bulge + py * py)
        t = t - (gap - TUBE) * RING_RELAX
    bend = bulge / (gap * across.clamp(min=1e-3))
    return t, gap < TUBE + RING_TOUCH, (px * bend, py / gap, pz * bend)


_TRACERS = {"cube": _cube, "sphere": _sphere, "cylinder": _cylinder, "cone": _cone, "pyramid": _pyramid, "ring": _ring}


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _ramp(value: Tensor, low: float, high: float) -> Tensor:
    """Smooth step from 0 at low to 1 at high."""
    u = ((value - low) / (high - low)).clamp_(0.0, 1.0)
    return u * u * (3.0 - 2.0 * u)


def _shade(
    normal: Vector, toward: Vector, light: Vector, ambient: Tensor, metal: Tensor, height: Tensor
) -> tuple[Tensor, Tensor]:
    """How much of its own colour a surface shows, and how much white on top, each f32[m, h, w]."""
    facing, lit = _dot(normal, toward), _dot(normal, light)
    mirror_x, mirror_y, mirror_z = (2.0 * facing * n - c for n, c in zip(normal, toward, strict=True))
    highlight = (mirror_x * light[0] + mirror_y * light[1] + mirror_z * light[2]).clamp_(min=0.0)
    contact = 0.72 + 0.28 * _ramp(height, 0.0, 0.45)
    matte = (ambient * (0.8 + 0.25 * normal[2]) + (1.08 - ambient) * lit.clamp(min=0.0)) * contact
    # A studio around the metal: dark floor, sharp horizon, bright sky; the height term gives upright faces, which
    # mirror one direction only, the same gradient.
    sky = 0.65 * mirror_z + 0.85 * (height - 0.62)
    studio = 0.30 + 0.22 * _ramp(sky, -1.0, -0.1) + 0.62 * _ramp(sky, -0.10, 0.08) - 0.32 * _ramp(sky, 0.12, 0.75)
    # A tall lamp behind the light draws an upright streak on round sides.
    flat = torch.rsqrt((mirror_x * mirror_x + mirror_y * mirror_y + 1e-4) * (1.0 - light[2] * light[2]))
    streak = _ramp((mirror_x * light[0] + mirror_y * light[1]) * flat, 0.88, 1.0) * (1.0 - normal[2])
    tight = highlight**4
    tight = tight * tight
    band = _ramp(sky, -0.04, 0.08) * (1.0 - _ramp(sky, 0.08, 0.40))
    gloss = 0.9 * tight * tight * tight + 0.30 * band + 0.28 * streak
    return matte + metal * (studio - matte), metal * gloss + (1.0 - metal) * 0.06 * tight


def _draw_shadows(objects: _Objects, batch: int, size: int, device: torch.device) -> Tensor:
    """Darkness of the ground, f32[B, 1, S, S] in 0..1: the strongest of all shadows, so their order is irrelevant."""
    pixels, values = [], []
    for shape, kind, rows in objects.slices:
        tip_height, base_width, tip_width = SHADOW[shape]
        width = min(size, math.ceil(2 * 2.1 * 1.05 * SIZE_RADIUS[kind] * size) + 2)
        depth = min(size, math.ceil(2 * 1.4 * 1.05 * SIZE_RADIUS[kind] * size) + 2)
        floats = objects.floats[rows].astype(np.float64)
        reach = tip_height * floats[:, 3] / floats[:, 12]
        middle = floats[:, [0, 2]] + floats[:, [10, 11]] * (reach / 2)[:, None] * np.array((-1.0, SIN))
        ints = np.column_stack((objects.ints[rows, 0], _window(middle * size, (width, depth), size)))
        scene, left, top = torch.from_numpy(ints).to(device, non_blocking=True)[:, :, None, None].unbind(1)
        x, _, ground, r, _, _, _, _, _, _, lx, ly, lz, ambient = objects.columns(rows)
        column, row = left + torch.arange(width, device=device), top + torch.arange(depth, device=device)[:, None]
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


@lru_cache(maxsize=8)
def _noise_tile(device: torch.device, margin: int) -> Tensor:
    """Gaussian noise f32[3, NOISE_SIDE + margin, ...], periodic; drawn on the CPU so that devices agree."""
    generator = torch.Generator().manual_seed(20261)
    tile = torch.randn(3, NOISE_SIDE, NOISE_SIDE, generator=generator)
    wrap = torch.arange(NOISE_SIDE + margin) % NOISE_SIDE
    return tile[:, wrap][:, :, wrap].contiguous().to(device)


def _noise(scenes: _Scenes, column: Tensor, row: Tensor, channel: int) -> Tensor:
    """Noise at integer cells (int64, broadcastable to [B, H, W])."""
    x, y = (column + scenes.noise_x) % NOISE_SIDE, (row + scenes.noise_y) % NOISE_SIDE
    return _noise_tile(x.device, 0)[channel].view(-1)[y * NOISE_SIDE + x]


def _draw_table(scenes: _Scenes, shadow: Tensor, size: int) -> Tensor:
    """Table, backdrop and shadows, f32[B, 3, S, S]."""
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
    on_table = _ramp(y - horizon, -0.75 / size, 0.75 / size)
    surface = wall * (0.9 + 0.25 * y) + on_table * (table * texture * (1.0 - shadow) - wall * (0.9 + 0.25 * y))
    return surface * light


def _clouds(scenes: _Scenes, x: Tensor, y: Tensor) -> Tensor:
    """Smooth noise of about unit size, f32[B, 1, S, S], at cell coordinates x f32[B, 1, 1, S], y f32[B, 1, S, 1]."""
    left, top = torch.floor(x), torch.floor(y)
    u, v = _ramp(x - left, 0.0, 1.0), _ramp(y - top, 0.0, 1.0)
    i, j = left.long()[:, 0], top.long()[:, 0]
    a, b = _noise(scenes, i, j, 1)[:, None], _noise(scenes, i + 1, j, 1)[:, None]
    c, d = _noise(scenes, i, j + 1, 1)[:, None], _noise(scenes, i + 1, j + 1, 1)[:, None]
    upper, lower = a + u * (b - a), c + u * (d - c)
    return 0.6 * (upper + v * (lower - upper))


def _expose(image: Tensor, scenes: _Scenes, size: int) -> Tensor:
    """The camera: exposure, white balance, vignette, sensor noise, 8 bits."""
    exposure, balance = scenes.light[4], torch.cat(scenes.light[5:8], 1)
    vignette, sigma = scenes.background[18:20]
    pixel = torch.arange(size, device=image.device)
    off = (pixel + 0.5) / size - 0.5
    shade = 1.0 - vignette * (off * off + (off * off)[:, None])
    tile = _noise_tile(image.device, size)
    noise = torch.stack([tile[:, y : y + size, x : x + size] for x, y in scenes.offsets])
    image = image * (exposure * balance) * shade + sigma * noise
    return image.clamp_(0.0, 1.0).mul_(255.0).round_().div_(255.0)


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
    """Centre of the owned pixel nearest each centroid, f32[B, N, 2] in 0..1; zeros for an object without pixels."""
    batch, size = labels.shape[0], labels.shape[-1]
    owner = labels.view(batch, -1).long()
    pixel = torch.arange(size, device=labels.device)
    x, y = pixel.repeat(size), pixel.repeat_interleave(size)
    sums, count = torch.zeros(2, batch, slots + 1, dtype=torch.int64, device=labels.device).unbind()
    sums.scatter_add_(1, owner, (x + (y << 32)).expand(batch, -1))
    count.scatter_add_(1, owner, torch.ones_like(x).expand(batch, -1))
    # Twice the centroid, in whole numbers, so that ties and rounding are the same everywhere.
    middle_x, middle_y = (2 * part // count.clamp(min=1) for part in (sums & 0xFFFFFFFF, sums >> 32))
    gap_x, gap_y = 2 * x - middle_x.gather(1, owner), 2 * y - middle_y.gather(1, owner)
    best = torch.full((batch, slots + 1), 1 << 62, dtype=torch.int64, device=labels.device)
    best.scatter_reduce_(1, owner, ((gap_x * gap_x + gap_y * gap_y) << 20) + (y * size + x), "amin")
    index = best[:, 1:] & ((1 << 20) - 1)
    point = torch.stack((index % size, index // size), -1).float().add_(0.5) / size
    return point * (count[:, 1:, None] > 0)
