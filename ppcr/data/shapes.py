"""The six shapes as ray-traced solids and the two materials, in units of the object's radius.

An object stands at the origin of its own frame, Z up; rays start on a plane facing the camera and `toward`
points at the camera, so the largest t is the nearest hit. Tensors broadcast to f32[m, h, w], one window each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ppcr.data.graph import ELEVATION

SIN, COS = math.sin(ELEVATION), math.cos(ELEVATION)
# Half width and half height of a shape's window around its centre, in radii; every yaw that occurs fits.
EXTENT = ((1.03, 1.20), (0.97, 0.98), (0.74, 1.12), (0.97, 1.13), (1.15, 1.15), (0.97, 0.90))
YAW = {"cube": math.pi / 4, "pyramid": math.pi / 4}  # an edge towards the camera: two faces show
CUBE, CYLINDER, CYLINDER_HEIGHT, SPHERE = 0.72, 0.72, 1.66, 0.95
CONE, CONE_HEIGHT, PYRAMID, PYRAMID_HEIGHT = 0.95, 2.0, 0.80, 1.90
RING, TUBE, RING_STEPS, RING_RELAX, RING_TOUCH = 0.68, 0.27, 10, 1.4, 0.002

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
    nx, ny, nz = ((o + t * c) / SPHERE for o, c in zip((x, y, z), toward, strict=True))
    return t, inside > 0, (nx, ny, nz)


def _cylinder(origin: Vector, toward: Vector) -> Trace:
    x, y, z = origin
    b = x * toward[0] + y * toward[1]
    inside = b * b - COS * COS * (x * x + y * y - CYLINDER * CYLINDER)
    root = inside.clamp(min=0.0).sqrt()
    side, top = (root - b) / (COS * COS), (CYLINDER_HEIGHT - z) / SIN
    t = torch.minimum(side, top)
    hit = (inside > 0) & (t > torch.maximum((-root - b) / (COS * COS), -z / SIN))
    round_ = (side < top).float()
    across, along = ((o + t * c) / CYLINDER * round_ for o, c in ((x, toward[0]), (y, toward[1])))
    return t, hit, (across, along, 1.0 - round_)


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


TRACERS = {
    "cube": _cube,
    "sphere": _sphere,
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _pyramid,
    "ring": _ring,
}


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def ramp(value: Tensor, low: float, high: float) -> Tensor:
    """Smooth step of any tensor: 0 up to ``low``, 1 from ``high`` on."""
    u = ((value - low) / (high - low)).clamp_(0.0, 1.0)
    return u * u * (3.0 - 2.0 * u)


def shade(
    normal: Vector, toward: Vector, light: Vector, ambient: Tensor, metal: Tensor, height: Tensor
) -> tuple[Tensor, Tensor]:
    """How much of its own colour a surface shows, and how much white on top, each f32[m, h, w]."""
    facing, lit = _dot(normal, toward), _dot(normal, light)
    mirror_x, mirror_y, mirror_z = (2.0 * facing * n - c for n, c in zip(normal, toward, strict=True))
    highlight = (mirror_x * light[0] + mirror_y * light[1] + mirror_z * light[2]).clamp_(min=0.0)
    contact = 0.72 + 0.28 * ramp(height, 0.0, 0.45)
    matte = (ambient * (0.8 + 0.25 * normal[2]) + (1.08 - ambient) * lit.clamp(min=0.0)) * contact
    # A studio around the metal: dark floor, sharp horizon, bright sky. The height term gives upright faces,
    # which mirror one direction only, the same gradient.
    sky = 0.65 * mirror_z + 0.85 * (height - 0.62)
    studio = 0.30 + 0.22 * ramp(sky, -1.0, -0.1) + 0.62 * ramp(sky, -0.10, 0.08)
    studio = studio - 0.32 * ramp(sky, 0.12, 0.75)
    # A tall lamp behind the light draws an upright streak on round sides.
    flat = torch.rsqrt((mirror_x * mirror_x + mirror_y * mirror_y + 1e-4) * (1.0 - light[2] * light[2]))
    streak = ramp((mirror_x * light[0] + mirror_y * light[1]) * flat, 0.88, 1.0) * (1.0 - normal[2])
    tight = highlight * highlight
    tight = tight * tight
    tight = tight * tight
    band = ramp(sky, -0.04, 0.08) * (1.0 - ramp(sky, 0.08, 0.40))
    gloss = 0.9 * tight * tight * tight + 0.30 * band + 0.28 * streak
    return matte + metal * (studio - matte), metal * gloss + (1.0 - metal) * 0.06 * tight
