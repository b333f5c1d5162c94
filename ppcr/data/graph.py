"""Scene graphs: what stands where on the table, sampled from a seed before anything is drawn (numpy only).

The camera is orthographic, looking down at `ELEVATION` radians. World axes: X right, Y away from the camera,
Z up, all in image widths. A ground point (X, Y) projects to image x = X, y = 1 - Y * sin(ELEVATION).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SHAPES = ("cube", "sphere", "cylinder", "cone", "pyramid", "ring")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
MATERIALS = ("rubber", "metal")
SIZES = ("small", "medium", "large")

Split = Literal["train", "val", "test", "compositional", "crowded"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "compositional", "crowded")

HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "cylinder"),
        ("orange", "cube"),
        ("yellow", "ring"),
        ("green", "cone"),
        ("cyan", "sphere"),
        ("blue", "pyramid"),
        ("purple", "cube"),
        ("white", "cone"),
    }
)

ELEVATION = math.radians(35.0)
SIZE_RADIUS = (0.055, 0.080, 0.115)
# Height of the projected centre above the ground point, in radii: the middle of each shape's silhouette.
CENTER_LIFT = (0.60, 0.78, 0.68, 0.55, 0.46, 0.78)
# Radius of the circle on the ground that contains the shape, in radii.
FOOTPRINT = (1.0, 0.85, 0.72, 0.95, 1.0, 0.85)

OBJECTS = (3, 10)
CROWDED_OBJECTS = (11, 14)
CROWDED_SCALE = 0.92
# Largest share of an object's disc that the discs in front of it may cover, summed over pairs.
MAX_COVERED = 0.5

_TABLES = (  # muted, so that no table passes for one of COLORS
    (0.52, 0.42, 0.33),
    (0.38, 0.30, 0.24),
    (0.45, 0.46, 0.48),
    (0.30, 0.32, 0.36),
    (0.60, 0.56, 0.48),
    (0.33, 0.38, 0.33),
    (0.42, 0.36, 0.40),
    (0.34, 0.40, 0.46),
)


@dataclass(frozen=True)
class SceneGraph:
    """One scene of N objects, sorted by centre x. Image coordinates are x right, y down, in 0..1.

    shape, color, material, size: int64[N], indices into SHAPES, COLORS, MATERIALS, SIZES.
    radius: f32[N], projected half extent in image widths.
    center: f32[N, 2], (x, y) of the middle of the silhouette, occlusion ignored.
    depth: f32[N], 0 nearest the camera .. 1 farthest; the object's ground point is (center x, 1 - depth).
    rotation: f32[N], radians around the vertical.
    light: f32[8], unit direction to the light (X, Y, Z), ambient share, exposure, white balance (R, G, B).
    background: f32[20], horizon y (0 = none), table RGB, wall RGB, brightness slope (x, y), stripe strength,
        frequency, angle, phase, cloud strength, cloud cells, speckle strength, checker strength,
        checker frequency, vignette strength, sensor noise sigma.
    noise_offset: int64[2], where this scene reads the shared noise tile.
    """

    split: Split
    seed: int
    shape: NDArray[np.int64]
    color: NDArray[np.int64]
    material: NDArray[np.int64]
    size: NDArray[np.int64]
    radius: NDArray[np.float32]
    center: NDArray[np.float32]
    depth: NDArray[np.float32]
    rotation: NDArray[np.float32]
    light: NDArray[np.float32]
    background: NDArray[np.float32]
    noise_offset: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.shape)

    def describe(self, index: int) -> tuple[str, str, str, str]:
        """The words (size, color, material, shape) of one object."""
        return (
            SIZES[self.size[index]],
            COLORS[self.color[index]],
            MATERIALS[self.material[index]],
            SHAPES[self.shape[index]],
        )


_HELD_OUT = sorted((SHAPES.index(shape), COLORS.index(color)) for color, shape in HELD_OUT_PAIRS)
_ALLOWED = tuple(tuple(c for c in range(len(COLORS)) if (s, c) not in _HELD_OUT) for s in range(len(SHAPES)))


class _Uniform:
    """Scalar uniform draws out of blocks: a call costs a tenth of a Generator method's."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._block: list[float] = []

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._block:
            self._block = self._rng.random(256).tolist()
        return low + (high - low) * self._block.pop()

    def index(self, n: int) -> int:
        return int(self() * n)

    def subset(self, n: int, k: int) -> list[int]:
        items = list(range(n))
        for i in range(k):
            j = i + self.index(n - i)
            items[i], items[j] = items[j], items[i]
        return items[:k]


def sample_scene(split: Split, seed: int) -> SceneGraph:
    """Sample one scene: the same (split, seed >= 0) gives the same graph, and splits never share a stream.

    3..10 objects (11..14 in "crowded"). Colour-shape pairs of HELD_OUT_PAIRS appear only in "compositional",
    there in every scene. Every object is inside the image and, taken as a disc, covered at most MAX_COVERED
    by the discs in front of it.
    Raises ValueError for an unknown split or a negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"seed must not be negative: {seed}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((SPLITS.index(split), seed))))
    uniform = _Uniform(rng)
    low, high = CROWDED_OBJECTS if split == "crowded" else OBJECTS
    count = low + uniform.index(high - low + 1)
    pairs = _sample_pairs(uniform, count, split)
    # Large objects first: small ones still find a gap.
    sizes = sorted((uniform.index(3) for _ in range(count)), reverse=True)
    background = _sample_background(uniform)
    scale = CROWDED_SCALE if split == "crowded" else 1.0
    shapes = [shape for shape, _ in pairs]
    placed = _place(uniform, shapes, sizes, scale, horizon=background[0])
    order = sorted(range(count), key=lambda i: placed[i][0])
    x, y, ground, radius = (np.array(column, np.float32)[order] for column in zip(*placed, strict=True))
    return SceneGraph(
        split=split,
        seed=seed,
        shape=np.array(shapes, np.int64)[order],
        color=np.array([color for _, color in pairs], np.int64)[order],
        material=np.array([uniform.index(2) for _ in range(count)], np.int64),
        size=np.array(sizes, np.int64)[order],
        radius=radius,
        center=np.stack((x, y), axis=1),
        depth=np.float32(1.0) - ground,
        rotation=np.array([uniform(-0.5, 0.5) for _ in range(count)], np.float32),
        light=np.array(_sample_light(uniform), np.float32),
        background=np.array(background, np.float32),
        noise_offset=np.array([uniform.index(1 << 20), uniform.index(1 << 20)], np.int64),
    )


def _sample_pairs(uniform: _Uniform, count: int, split: Split) -> list[tuple[int, int]]:
    """(shape, color) of each object, from a palette of the scene, so that objects share words."""
    shapes = uniform.subset(len(SHAPES), 2 + uniform.index(len(SHAPES) - 1))
    palette = set(uniform.subset(len(COLORS), 3 + uniform.index(len(COLORS) - 2)))
    pairs = []
    forced = uniform.index(count)
    for i in range(count):
        if split == "compositional" and (i == forced or uniform() < 0.35):
            pairs.append(_HELD_OUT[uniform.index(len(_HELD_OUT))])
            continue
        shape = shapes[uniform.index(len(shapes))]
        colors = [c for c in _ALLOWED[shape] if c in palette]
        pairs.append((shape, colors[uniform.index(len(colors))] if colors else _ALLOWED[shape][0]))
    return pairs


def _place(
    uniform: Callable[[float, float], float],
    shapes: list[int],
    sizes: list[int],
    scale: float,
    horizon: float,
) -> list[tuple[float, float, float, float]]:
    """(x, y, ground y, radius) of each object; a layout that does not fit starts again a little smaller."""
    sin_e = math.sin(ELEVATION)
    while True:
        placed: list[tuple[float, float, float, float]] = []
        covered: list[float] = []
        for shape, size in zip(shapes, sizes, strict=True):
            radius = SIZE_RADIUS[size] * scale * uniform(0.95, 1.05)
            lift, foot = CENTER_LIFT[shape] * radius, FOOTPRINT[shape] * radius
            margin = 1.2 * radius + 0.01
            top = max(margin, horizon + 0.02 + foot * sin_e - lift)
            for _ in range(40):
                x, y = uniform(margin, 1.0 - margin), uniform(top, 1.0 - margin)
                shares = _cover(x, y, radius, y + lift, foot, shapes, placed, covered)
                if shares is not None:
                    covered = shares
                    placed.append((x, y, y + lift, radius))
                    break
            else:
                break
        if len(placed) == len(shapes):
            return placed
        scale *= 0.97


def _cover(
    x: float,
    y: float,
    radius: float,
    ground: float,
    foot: float,
    shapes: list[int],
    placed: list[tuple[float, float, float, float]],
    covered: list[float],
) -> list[float] | None:
    """Covered shares once an object stands at (x, y), the new one last; None if it may not stand there."""
    stretch = 1.0 / math.sin(ELEVATION)
    shares = [*covered, 0.0]
    for i, (other_x, other_y, other_ground, other_radius) in enumerate(placed):
        reach = foot + FOOTPRINT[shapes[i]] * other_radius
        if math.hypot(x - other_x, (ground - other_ground) * stretch) < reach:
            return None
        area = _lens(math.hypot(x - other_x, y - other_y), radius, other_radius)
        if area:
            hidden, hidden_radius = (i, other_radius) if ground > other_ground else (-1, radius)
            shares[hidden] += area / (math.pi * hidden_radius * hidden_radius)
            if shares[hidden] > MAX_COVERED:
                return None
    return shares


def _lens(distance: float, a: float, b: float) -> float:
    """Area shared by two discs of radii a, b."""
    if distance >= a + b:
        return 0.0
    if distance <= abs(a - b):
        return math.pi * min(a, b) ** 2
    p = (distance * distance + a * a - b * b) / (2.0 * distance)
    q = distance - p
    chord = math.sqrt(max(a * a - p * p, 0.0))
    return a * a * math.acos(p / a) + b * b * math.acos(q / b) - distance * chord


def _sample_light(uniform: _Uniform) -> list[float]:
    # From the camera's side (negative Y), clearly left or right, so that faces differ and shadows show.
    side = 1.0 if uniform() < 0.5 else -1.0
    azimuth, height = uniform(0.35, 1.15), uniform(0.65, 1.05)
    direction = [
        side * math.sin(azimuth) * math.cos(height),
        -math.cos(azimuth) * math.cos(height),
        math.sin(height),
    ]
    warmth = uniform(-0.05, 0.05)
    return [*direction, uniform(0.36, 0.5), uniform(0.92, 1.2), 1.0 + warmth, 1.0, 1.0 - warmth]


def _sample_background(uniform: _Uniform) -> list[float]:
    def muted() -> list[float]:
        base, gain = _TABLES[uniform.index(len(_TABLES))], uniform(0.75, 1.1)
        return [channel * gain * uniform(0.94, 1.06) for channel in base]

    def sometimes(chance: float, low: float, high: float) -> float:
        value = uniform(low, high)
        return value if uniform() < chance else 0.0

    return [
        sometimes(0.6, 0.06, 0.22),
        *muted(),
        *muted(),
        *(uniform(-0.25, 0.25), uniform(-0.25, 0.25)),
        sometimes(0.4, 0.04, 0.16),
        *(uniform(6.0, 22.0), uniform(0.0, math.pi), uniform(0.0, 2 * math.pi)),
        uniform(0.0, 0.2),
        uniform(3.0, 9.0),
        sometimes(0.5, 0.02, 0.08),
        sometimes(0.25, 0.04, 0.12),
        uniform(4.0, 10.0),
        uniform(0.0, 0.25),
        uniform(0.004, 0.022),
    ]
