"""Objects in colours that have no name: shapes must be told apart by their shape.

A model that sees eight colours learns which shapes each of them comes in, and denies the pairs it never saw.
A repainted object can have any colour, but never one whose nearest named colour would make an unseen pair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ppcr.data.graph import COLORS, HELD_OUT_PAIRS, SHAPES, SceneGraph
from ppcr.data.render import ALBEDO

SEEN_PAIRS: NDArray[np.bool_] = np.array(
    [[(color, shape) not in HELD_OUT_PAIRS for shape in SHAPES] for color in COLORS]
)
"""bool [colours, shapes]: the pairs that training scenes show."""


def repaint(graph: SceneGraph, rng: np.random.Generator) -> NDArray[np.float32]:
    """f32 [N, 3] a random RGB in 0..1 for each object, none of them passing for an unseen pair."""
    palette = np.array(ALBEDO, np.float32)
    paint = np.empty((len(graph), 3), np.float32)
    waiting = np.arange(len(graph))
    while len(waiting):
        drawn = rng.uniform(0.03, 0.97, (len(waiting), 3)).astype(np.float32)
        paint[waiting] = drawn
        nearest = np.linalg.norm(drawn[:, None] - palette, axis=-1).argmin(-1)
        waiting = waiting[~SEEN_PAIRS[nearest, graph.shape[waiting]]]
    return paint
