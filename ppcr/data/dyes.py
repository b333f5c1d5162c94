"""More colours to train on, under made-up names: what is learnt of eight colours is learnt pair by pair.

A model that hears eight colour words with six shapes comes to know each pair it is shown, and doubts the
ones it is not. Dyed objects make the pairs too many to know one by one. No dye looks like one of
``graph.COLORS``, and no scene of any split has one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ppcr.data.graph import COLORS, SceneGraph

DYES: dict[str, tuple[float, float, float]] = {
    "whi": (0.98, 0.56, 0.72),
    "fro": (0.90, 0.06, 0.55),
    "betw": (0.62, 0.92, 0.10),
    "abo": (0.03, 0.05, 0.28),
    "mad": (0.40, 0.40, 0.05),
    "bot": (0.02, 0.36, 0.36),
    "fur": (0.36, 0.02, 0.06),
    "vi": (0.72, 0.62, 0.97),
    "hi": (0.04, 0.04, 0.05),
    "tor": (0.60, 0.97, 0.76),
}
"""Name -> RGB in 0..1; a name is one token to the tokenizer, as the names of ``graph.COLORS`` are."""

SHARE = 0.6
"""Chance of an object to be dyed."""
_PALETTE = (2, 5)


def dye(graph: SceneGraph, rng: np.random.Generator) -> SceneGraph:
    """The scene with some objects in two to four dyes: ``color`` counts on past COLORS, as DYES go."""
    palette = len(COLORS) + rng.permutation(len(DYES))[: rng.integers(*_PALETTE)]
    dyed = rng.random(len(graph)) < SHARE
    return replace(graph, color=np.where(dyed, rng.choice(palette, len(graph)), graph.color))
