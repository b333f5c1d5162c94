"""Which objects an expression speaks of on the way to its targets: what the pointing heads are taught."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ppcr.data.expressions import Expression
from ppcr.data.relations import AXIS_RELATIONS, BETWEEN, Relations

QUESTIONS = ("target", "landmark", "candidate")


@dataclass(frozen=True)
class ObjectSets:
    """Sets of objects as bits.

    Attributes:
        targets: what is asked for; landmarks: the anchors of the outermost relation.
        candidates: all objects with the named properties, however they stand.
        standing: all objects in the named relation, whatever they are; known: those of which that is clear
            (none where the relation ranks its candidates, or there is no relation).
    """

    targets: int
    landmarks: int
    candidates: int
    standing: int
    known: int

    def rows(self, objects: int) -> np.ndarray:
        """bool [5, objects], one row per attribute."""
        bits = (self.targets, self.landmarks, self.candidates, self.standing, self.known)
        return np.array([[b >> i & 1 for i in range(objects)] for b in bits], bool)


def object_sets(relations: Relations, expression: Expression) -> ObjectSets:
    """The sets of one expression about the scene of ``relations``."""
    standing, known = _standing(relations, expression)
    return ObjectSets(
        targets=_bits(expression.targets),
        landmarks=_bits(expression.landmarks),
        candidates=relations.described(expression.query.phrase) or 0,
        standing=standing,
        known=known,
    )


def _standing(relations: Relations, expression: Expression) -> tuple[int, int]:
    phrase = expression.query.phrase
    anchors = [relations.evaluate(landmark) or 0 for landmark in phrase.landmarks]
    if phrase.relation not in (*AXIS_RELATIONS, BETWEEN):
        return 0, 0
    if 0 in anchors:
        return 0, relations.everything  # nothing stands so to what is not there
    others = relations.everything & ~_union(anchors)
    places = [anchor.bit_length() - 1 for anchor in anchors]
    if phrase.relation == BETWEEN:
        yes, doubtful = relations.between(places[0], places[1], others)
    else:
        yes, doubtful = (table[places[0]] for table in relations.axis[phrase.relation])
    return yes & others, others & ~doubtful


def _bits(indices: tuple[int, ...]) -> int:
    return _union([1 << i for i in indices])


def _union(sets: list[int]) -> int:
    union = 0
    for one in sets:
        union |= one
    return union
