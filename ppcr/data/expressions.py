"""Referring expressions for a scene graph, checked against its geometry and worded in many ways.

A kind is drawn, a query of that kind is made (``queries``), the geometry decides it (``relations``), and the
grammar words it (``grammar``). Whatever a person could dispute is dropped on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ppcr.data.grammar import Dice, express, semantic_prompt
from ppcr.data.graph import SceneGraph
from ppcr.data.queries import QueryMaker
from ppcr.data.relations import AMBIGUOUS, Ambiguity, Phrase, Query, Relations, resolve
from ppcr.prompts import MAX_TARGETS, SemanticPrompt

__all__ = ["AMBIGUOUS", "MIX", "Expression", "Phrase", "Query", "Relations", "resolve", "sample_expressions"]

MIX: tuple[dict[str, float], ...] = (
    {"attribute": 0.65, "plural": 0.20, "none_attribute": 0.15},
    {
        "attribute": 0.33,
        "relation": 0.30,
        "superlative": 0.12,
        "plural": 0.10,
        "none_attribute": 0.10,
        "none_relation": 0.05,
    },
    {
        "attribute": 0.20,
        "relation": 0.26,
        "between": 0.06,
        "superlative": 0.075,
        "ordinal": 0.05,
        "negation": 0.05,
        "two_hop": 0.055,
        "plural": 0.10,
        "none_attribute": 0.09,
        "none_relation": 0.06,
    },
)
"""Per level: kind -> share drawn. A kind that a scene does not offer gives way to another."""

_ATTEMPTS = 14


@dataclass(frozen=True)
class Expression:
    """One expression about one scene.

    Attributes:
        text: lower-case English.
        targets: object indices ordered by centre x; empty where nothing fits.
        semantic: the canonical prompt; depends on the words, except for its count (``len(targets)``, 0..6).
        kind: a key of ``MIX[2]``.
        landmarks: anchors of the outermost relation, in the order of the words; may be empty.
        query: the structure that text and prompt are worded from.
    """

    text: str
    targets: tuple[int, ...]
    semantic: SemanticPrompt
    kind: str
    landmarks: tuple[int, ...]
    query: Query


def sample_expressions(
    graph: SceneGraph,
    count: int,
    rng: np.random.Generator,
    level: int = 2,
    mix: Mapping[str, float] | None = None,
) -> list[Expression]:
    """Draw ``count`` expressions, different in wording wherever the scene allows.

    Args:
        graph: the scene.
        count: how many; a larger count leaves the first ones as they are.
        rng: read once; equal states give equal expressions.
        level: 0 attributes; 1 also one-hop relations and superlatives; 2 everything.
        mix: kind -> share drawn, instead of the level's ``MIX``.

    Raises:
        ValueError: a level other than 0, 1, 2.
    """
    if level not in (0, 1, 2):
        raise ValueError(f"level is 0, 1 or 2, not {level}")
    relations = Relations(graph)
    dice = Dice(int(rng.integers(1 << 62)))
    maker = QueryMaker(relations, dice)
    found: list[Expression] = []
    texts: set[str] = set()
    for _ in range(count):
        for _ in range(_ATTEMPTS):
            expression = _draw(relations, maker, dice, level, mix or MIX[level])
            if expression.text not in texts:
                break
        texts.add(expression.text)
        found.append(expression)
    return found


def _draw(
    relations: Relations, maker: QueryMaker, dice: Dice, level: int, shares: Mapping[str, float]
) -> Expression:
    """One expression of a drawn kind, or of another kind where the scene does not offer that one."""
    mix = dict(shares)
    while True:
        kind = dice.weighted(tuple(mix), tuple(mix.values()))
        make = getattr(maker, _ATTRIBUTES_ONLY.get(kind, kind) if level == 0 else kind)
        for _ in range(_ATTEMPTS):
            query = make()
            expression = query and _checked(query, kind, relations, dice)
            if expression:
                return expression
        if len(mix) > 1:
            del mix[kind]


_ATTRIBUTES_ONLY = {"plural": "plural_attribute", "none_attribute": "false_attribute"}


def _checked(query: Query, kind: str, relations: Relations, dice: Dice) -> Expression | None:
    """The worded query, if it is beyond dispute and has as many targets as its kind wants."""
    targets = resolve(relations, query)
    if isinstance(targets, Ambiguity) or len(targets) > MAX_TARGETS:
        return None
    if kind.startswith("none_") != (not targets) or (kind == "plural" and len(targets) < 2):
        return None
    anchors = [relations.evaluate(landmark) for landmark in query.phrase.landmarks]
    landmarks = tuple(bits.bit_length() - 1 for bits in anchors if bits)
    text = express(query, len(targets), dice)
    return Expression(text, targets, semantic_prompt(query, len(targets)), kind, landmarks, query)
