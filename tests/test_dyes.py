"""Dyes: further colours under made-up names, for training alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ppcr.data.dyes import DYES, dye
from ppcr.data.expressions import Relations, sample_expressions
from ppcr.data.grammar import ADJECTIVES, NOUNS
from ppcr.data.graph import COLORS, SPLITS, sample_scene
from ppcr.data.render import ALBEDO, render
from ppcr.training.mllm_data import NO_NAME, draw

SEEDS = np.random.SeedSequence().generate_state(2).tolist()


def test_no_dye_passes_for_a_named_colour_or_another_dye() -> None:
    colours = np.array([*ALBEDO, *DYES.values()])
    gaps = np.linalg.norm(colours[:, None] - colours, axis=-1) + 9 * np.eye(len(colours))
    assert gaps[len(ALBEDO) :].min() > 0.2


def test_names_of_dyes_are_no_words_of_the_grammar() -> None:
    words = {w for forms in ADJECTIVES.values() for w in forms} | set(COLORS)
    words |= {w for nouns in NOUNS.values() for pair in nouns for w in pair}
    assert not words & set(DYES)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_of_no_split_are_dyed(split: str) -> None:
    assert all(sample_scene(split, seed).color.max() < len(COLORS) for seed in range(20))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", SEEDS)
def test_expressions_speak_of_dyed_objects_and_only_of_what_is_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spoken = 0
    for i in range(30):
        graph = dye(sample_scene("train", seed + i), rng)
        words = Relations(graph).words
        for expression in sample_expressions(graph, 8, rng):
            color = expression.query.phrase.color
            if color in DYES:
                spoken += 1
                assert color in re.findall(r"\w+", expression.text)
                assert color in expression.semantic.attributes.split()
                assert all(words[i]["color"] == color for i in expression.targets)
    assert spoken > 10


@pytest.mark.parametrize("seed", SEEDS)
def test_dyed_objects_are_drawn_in_their_dye_and_have_no_colour_for_the_object_head(seed: int) -> None:
    plain = sample_scene("train", seed)
    dyed = dye(plain, np.random.default_rng(seed))
    kept = np.flatnonzero(dyed.color < len(COLORS))
    scenes = draw([dyed], 64, 8, 2, "cpu")
    named = scenes.classes[0, : len(dyed), 1]
    assert torch.equal(named == NO_NAME, torch.from_numpy(dyed.color >= len(COLORS)))
    assert np.array_equal(named[kept], plain.color[kept])
    before, after = (render([graph], 64, "cpu") for graph in (plain, dyed))
    assert torch.equal(before.masks, after.masks)
    change = (before.image - after.image).abs().sum(1)[0]
    for index in range(len(dyed)):
        seen = before.masks[0, index]
        if seen.sum() > 8:
            moved = bool((change[seen] > 0.02).float().mean() > 0.5)
            assert moved == (index not in kept), (index, dyed.color[index])
