from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from ppcr.data.graph import (
    COLORS,
    CROWDED_OBJECTS,
    HELD_OUT_PAIRS,
    MATERIALS,
    OBJECTS,
    SHAPES,
    SIZES,
    SPLITS,
    SceneGraph,
    Split,
    sample_scene,
)

MANY = 300


def pairs(graph: SceneGraph) -> set[tuple[str, str]]:
    return {(COLORS[c], SHAPES[s]) for c, s in zip(graph.color, graph.shape, strict=True)}


@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_same_graph(split: Split) -> None:
    first, second = sample_scene(split, 7), sample_scene(split, 7)
    for field in dataclasses.fields(SceneGraph):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))


def test_splits_and_seeds_never_repeat_a_scene() -> None:
    layouts = {sample_scene(split, seed).center.tobytes() for split in SPLITS for seed in range(MANY)}
    assert len(layouts) == len(SPLITS) * MANY


@pytest.mark.parametrize("split", SPLITS)
def test_counts_cover_exactly_the_range(split: Split) -> None:
    low, high = CROWDED_OBJECTS if split == "crowded" else OBJECTS
    assert {len(sample_scene(split, seed)) for seed in range(MANY)} == set(range(low, high + 1))


@pytest.mark.parametrize("split", ["train", "val", "test", "crowded"])
def test_held_out_pairs_stay_out(split: Split) -> None:
    seen = set().union(*(pairs(sample_scene(split, seed)) for seed in range(4 * MANY)))
    assert not seen & HELD_OUT_PAIRS
    # Every other pair does occur, so that only the combination is new in "compositional".
    assert len(seen) == len(COLORS) * len(SHAPES) - len(HELD_OUT_PAIRS)


def test_compositional_scenes_all_show_a_held_out_pair() -> None:
    graphs = [sample_scene("compositional", seed) for seed in range(MANY)]
    assert all(pairs(graph) & HELD_OUT_PAIRS for graph in graphs)
    assert set().union(*map(pairs, graphs)) >= HELD_OUT_PAIRS


def test_words_are_large_enough_and_distinct() -> None:
    assert len(set(SHAPES)) >= 6 and len(set(COLORS)) == 8 and len(MATERIALS) == 2 and len(SIZES) == 3
    assert {color for color, _ in HELD_OUT_PAIRS} <= set(COLORS)
    assert {shape for _, shape in HELD_OUT_PAIRS} <= set(SHAPES)


@pytest.mark.parametrize("split", SPLITS)
def test_objects_lie_inside_the_image_sorted_by_x(split: Split) -> None:
    for seed in range(MANY):
        graph = sample_scene(split, seed)
        assert np.all(np.diff(graph.center[:, 0]) >= 0)
        assert np.all(graph.center - graph.radius[:, None] > 0)
        assert np.all(graph.center + graph.radius[:, None] < 1)
        assert np.all((graph.depth > 0) & (graph.depth < 1))


@pytest.mark.parametrize("split", SPLITS)
def test_sizes_never_overlap(split: Split) -> None:
    graphs = [sample_scene(split, seed) for seed in range(MANY)]
    size, radius = np.concatenate([g.size for g in graphs]), np.concatenate([g.radius for g in graphs])
    for smaller in (0, 1):
        assert radius[size == smaller + 1].min() > 1.1 * radius[size == smaller].max()


def test_farther_is_higher_for_objects_of_one_kind() -> None:
    checked = 0
    for seed in range(MANY):
        graph = sample_scene("train", seed)
        for i in range(len(graph)):
            alike = (graph.shape == graph.shape[i]) & (graph.radius == graph.radius[i])
            for j in np.flatnonzero(alike | (np.abs(graph.depth - graph.depth[i]) > 0.12)):
                if graph.depth[j] > graph.depth[i]:
                    checked += 1
                    assert graph.center[j, 1] < graph.center[i, 1]
    assert checked > MANY


def test_attributes_are_balanced() -> None:
    graphs = [sample_scene("train", seed) for seed in range(4 * MANY)]
    for name, words in (("shape", SHAPES), ("color", COLORS), ("material", MATERIALS), ("size", SIZES)):
        share = np.bincount(np.concatenate([getattr(g, name) for g in graphs]), minlength=len(words))
        share = share / share.sum() * len(words)
        assert share.min() > 0.75 and share.max() < 1.35, (name, share)


def test_light_is_a_unit_vector_from_above_and_the_front() -> None:
    for seed in range(20):
        x, y, z = sample_scene("test", seed).light[:3]
        assert math.isclose(math.hypot(x, y, z), 1.0, abs_tol=1e-5)
        assert z > 0 and y < 0


@pytest.mark.parametrize(("split", "seed"), [("nowhere", 0), ("train", -1)])
def test_bad_arguments(split: Split, seed: int) -> None:
    with pytest.raises(ValueError):
        sample_scene(split, seed)
