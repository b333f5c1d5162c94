from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ppcr.data import shapes
from ppcr.data.graph import (
    CENTER_LIFT,
    COLORS,
    SHAPES,
    SIZE_RADIUS,
    SIZES,
    SPLITS,
    SceneGraph,
    Split,
    sample_scene,
)
from ppcr.data.render import Rendered, render


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def scenes(split: Split, count: int, start: int = 0) -> list[SceneGraph]:
    return [sample_scene(split, seed) for seed in range(start, start + count)]


def row(base: SceneGraph, centers: list[tuple[float, float]], **words: int | list[int]) -> SceneGraph:
    """A scene with objects of our choice (shape, color, material, size) under the light of another."""

    def column(name: str) -> NDArray[np.int64]:
        return np.broadcast_to(np.array(words.get(name, 0), np.int64), len(centers))

    radius = np.array(SIZE_RADIUS, np.float32)[column("size")]
    center = np.array(centers, np.float32)
    ground = center[:, 1] + np.array(CENTER_LIFT, np.float32)[column("shape")] * radius
    return dataclasses.replace(
        base,
        shape=column("shape"),
        color=column("color"),
        material=column("material"),
        size=column("size"),
        radius=radius,
        center=center,
        depth=1 - ground,
        rotation=np.zeros(len(centers), np.float32),
    )


def same(a: Rendered, b: Rendered) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Rendered))


@pytest.mark.parametrize("size", [97, 128])
def test_same_seed_same_picture_in_any_batch(size: int) -> None:
    graphs = scenes("train", 6)
    batch = render(graphs, size)
    assert same(batch, render(graphs, size))
    for i, graph in enumerate(graphs):
        alone, n = render([graph], size), len(graph)
        assert torch.equal(alone.image[0], batch.image[i])
        assert torch.equal(alone.masks[0], batch.masks[i, :n])
        assert torch.equal(alone.boxes[0], batch.boxes[i, :n])
        assert torch.equal(alone.points[0], batch.points[i, :n])
        assert batch.present[i].tolist() == [slot < n for slot in range(batch.present.shape[1])]
        assert not batch.masks[i, n:].any()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_what_the_cpu_draws() -> None:
    graphs = scenes("crowded", 8)
    cpu, gpu = render(graphs, 128), render(graphs, 128, "cuda")
    assert same(gpu, render(graphs, 128, "cuda"))
    assert (gpu.image.cpu() - cpu.image).abs().gt(1.5 / 255).float().mean() < 1e-3
    assert (gpu.masks.cpu() != cpu.masks).float().mean() < 1e-4


@pytest.mark.parametrize("size", [32, 97, 128, 256])
def test_shapes_types_and_ranges(size: int) -> None:
    graphs = scenes("crowded", 3)
    n = max(map(len, graphs))
    out = render(graphs, size)
    assert out.image.shape == (3, 3, size, size) and out.image.dtype == torch.float32
    assert out.masks.shape == (3, n, size, size) and out.masks.dtype == torch.bool
    assert out.boxes.shape == (3, n, 4) and out.boxes.dtype == torch.float32
    assert out.points.shape == (3, n, 2) and out.points.dtype == torch.float32
    assert out.present.shape == (3, n) and out.present.dtype == torch.bool
    levels = out.image * 255
    assert levels.min() >= 0 and levels.max() <= 255 and (levels - levels.round()).abs().max() < 1e-3
    assert out.masks.sum(1).max() == 1


@pytest.mark.parametrize("size", [97, 128])
def test_boxes_are_tight_and_points_are_the_nearest_visible_pixel(size: int) -> None:
    graphs = scenes("crowded", 4)
    out = render(graphs, size)
    for i, graph in enumerate(graphs):
        for slot in range(len(graph)):
            y, x = np.nonzero(out.masks[i, slot].numpy())
            box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / size
            np.testing.assert_allclose(out.boxes[i, slot], box, atol=1e-6)
            px, py = out.points[i, slot].numpy() * size - 0.5
            assert out.masks[i, slot, round(float(py)), round(float(px))]
            gap = np.hypot(x - x.mean(), y - y.mean()).min()
            assert math.hypot(px - x.mean(), py - y.mean()) < gap + 0.02


@pytest.mark.parametrize("split", SPLITS)
def test_objects_stay_visible(split: Split) -> None:
    graphs = scenes(split, 24, start=1000)
    out = render(graphs, 128)
    shares = []
    for i, graph in enumerate(graphs):
        alone = [pick(graph, slot) for slot in range(len(graph))]
        whole = render(alone, 128).masks[:, 0].sum((1, 2))
        shares += (out.masks[i, : len(graph)].sum((1, 2)) / whole).tolist()
    assert min(shares) >= 0.25
    assert np.mean(np.array(shares) < 0.98) > 0.05, "no occlusion at all"


def pick(graph: SceneGraph, slot: int) -> SceneGraph:
    names = ("shape", "color", "material", "size", "radius", "center", "depth", "rotation")
    return dataclasses.replace(graph, **{name: getattr(graph, name)[slot : slot + 1] for name in names})


def test_centre_and_radius_of_the_graph_describe_the_picture() -> None:
    graphs = scenes("train", 12)
    for graph in graphs:
        out = render([pick(graph, slot) for slot in range(len(graph))], 256)
        box = out.boxes[:, 0].numpy()
        np.testing.assert_allclose((box[:, :2] + box[:, 2:]) / 2, graph.center, atol=0.02)
        extent = (box[:, 2:] - box[:, :2]).max(1) / 2 / graph.radius
        assert extent.min() > 0.85 and extent.max() < 1.25


def test_windows_never_cut_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = scenes("train", 16)
    cropped = render(graphs, 128)
    monkeypatch.setattr("ppcr.data.render.EXTENT", ((1.6, 1.6),) * len(shapes.EXTENT))
    assert torch.equal(render(graphs, 128).masks, cropped.masks)


def test_the_nearer_object_hides_the_farther() -> None:
    base = sample_scene("train", 0)
    near, far = (0.5, 0.55), (0.5, 0.45)
    cube = SHAPES.index("cube")
    for centers, front in (([near, far], 0), ([far, near], 1)):
        out = render([row(base, centers, shape=cube, size=2, color=[0, 5])], 128)
        x, y = 64, int(0.5 * 128)
        assert out.masks[0, front, y, x] and not out.masks[0, 1 - front, y, x]


def test_ring_has_a_hole() -> None:
    graph = row(sample_scene("train", 0), [(0.5, 0.5)], shape=SHAPES.index("ring"), size=2)
    mask = render([graph], 128).masks[0, 0]
    assert not mask[64, 64] and mask[64, :64].any() and mask[64, 64:].any() and mask[:64, 64].any()


def test_sizes_scale_the_area() -> None:
    sizes = list(range(len(SIZES)))
    graph = row(sample_scene("train", 0), [(0.2, 0.5), (0.45, 0.5), (0.75, 0.5)], shape=1, size=sizes)
    area = render([graph], 256).masks[0].sum((1, 2)).float() / 256**2
    expected = math.pi * (0.95 * torch.tensor(SIZE_RADIUS)) ** 2
    torch.testing.assert_close(area, expected, rtol=0.05, atol=0.0)


def test_colours_and_materials_can_be_told_apart() -> None:
    """A nearest-colour rule on each object's median pixel finds the colour; metal varies more than rubber."""
    centers = [(0.14 + 0.24 * (i % 4), 0.35 + 0.3 * (i // 4)) for i in range(8)]
    spread = {}
    for material in (0, 1):
        graphs = [
            row(base, centers, shape=shape, size=2, color=list(range(8)), material=material)
            for base in scenes("val", 4)
            for shape in range(len(SHAPES))
        ]
        out = render(graphs, 128)
        medians = torch.stack(
            [
                torch.stack([image[:, mask].median(1).values for mask in masks])
                for image, masks in zip(out.image, out.masks, strict=True)
            ]
        )
        chroma = medians / medians.norm(dim=-1, keepdim=True)
        means = chroma.mean(0)
        found = torch.cdist(chroma, means[None].expand(len(graphs), -1, -1)).argmin(-1)
        assert (found == torch.arange(len(COLORS))).float().mean() > 0.97
        levels = [
            image.amax(0)[mask] for image, masks in zip(out.image, out.masks, strict=True) for mask in masks
        ]
        spread[material] = np.mean([float(v.quantile(0.98) - v.quantile(0.02)) for v in levels])
    assert spread[1] > 1.2 * spread[0]


def test_shadows_darken_the_table_beside_an_object() -> None:
    graph = row(sample_scene("train", 0), [(0.5, 0.5)], shape=0, size=2)
    light = graph.light.copy()
    light[:3] = (0.7, -0.2, math.sqrt(1 - 0.53))
    plain = np.zeros_like(graph.background)
    plain[1:7] = 0.5
    image = render([dataclasses.replace(graph, light=light, background=plain)], 128).image[0].mean(0)
    ground = int((1 - float(graph.depth[0])) * 128)
    assert image[ground, 48 - 5 : 48].mean() < 0.85 * image[ground, 120:].mean()


@pytest.mark.parametrize("size", [31, 1025])
def test_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        render(scenes("train", 1), size)


def test_nothing_to_render_and_too_many_objects() -> None:
    with pytest.raises(ValueError, match="nothing"):
        render([])
    with pytest.raises(ValueError, match="15"):
        render([row(sample_scene("train", 0), [(0.5, 0.5)] * 16)], 64)
