"""Structured queries over a scene graph, and the geometry that decides them.

Sets of objects are Python integers used as bit sets (bit ``i`` = object ``i``). Every predicate has a clear
"yes" zone, a clear "no" zone and a doubtful zone between them; a query that meets a doubtful candidate is
``AMBIGUOUS`` and never becomes an expression. All distances are in image widths (x right, y down).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np

from ppcr.data.dyes import DYES
from ppcr.data.graph import COLORS, MATERIALS, SHAPES, SIZE_RADIUS, SIZES, SceneGraph

FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("size", SIZES),
    ("color", COLORS),
    ("material", MATERIALS),
    ("shape", SHAPES),
)
"""Described properties in canonical order, each with its values (also the order of a noun phrase)."""

_WORDS = tuple((name, (*values, *DYES) if name == "color" else values) for name, values in FIELDS)
"""The same with the dyes, which a scene may have but no description is drawn from."""

AXIS_RELATIONS = ("left of", "right of", "above", "below", "behind", "in front of")
DISTANCE_RELATIONS = ("nearest to", "farthest from")
BETWEEN = "between"
SUPERLATIVES = (
    *("leftmost", "rightmost", "topmost", "bottommost", "nearest", "farthest", "largest", "smallest"),
)
RANKS = ("second", "third", "fourth")
SIDES = ("left", "right", "top", "bottom")
ORDINALS = tuple(f"{rank} from {side}" for rank in RANKS for side in SIDES)


class Ambiguity(Enum):
    """The one value ``AMBIGUOUS``: what ``resolve`` says when people could disagree."""

    AMBIGUOUS = "ambiguous"


AMBIGUOUS = Ambiguity.AMBIGUOUS


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: properties ("red", "not red" or "" for unnamed) and at most one relation.

    ``relation`` is one of the relation, superlative or ordinal names of this module; ``landmarks`` are the
    phrases it refers to (none for superlatives and ordinals, two for "between").
    """

    shape: str = ""
    size: str = ""
    color: str = ""
    material: str = ""
    relation: str = ""
    landmarks: tuple[Phrase, ...] = ()


@dataclass(frozen=True)
class Query:
    """A phrase, and whether its wording asks for all that fit (``plural``) or for exactly one."""

    phrase: Phrase
    plural: bool = False


@dataclass(frozen=True)
class Margins:
    """Where each predicate stops being doubtful."""

    axis: float = 0.045
    """left, right, above, below: least distance of the centres along the axis."""
    depth: float = 0.06
    """behind, in front, nearest, farthest: least difference of depth."""
    order: float = 0.03
    """superlatives and ordinals along an image axis: least lead over the runner-up."""
    ratio: float = 1.2
    """nearest to, farthest from, largest, smallest: least ratio to the runner-up."""
    gap: float = 0.03
    """nearest to, farthest from: least difference of distance to the runner-up."""
    between_length: float = 0.2
    """between: least distance of the two landmarks."""
    between_inside: tuple[float, float] = (0.2, 0.2)
    """between: a "yes" projects this far (in lengths) from both ends, and lies this near the line."""
    between_outside: tuple[float, float] = (0.05, 0.4)
    """between: a "no" projects nearer an end than this, or lies farther from the line than this."""
    size: float = 0.15
    """size words: an object this far (in log radius) from its size's usual radius is of disputable size."""


@dataclass(frozen=True)
class Relations:
    """The predicate tables of one scene, computed when first asked for."""

    graph: SceneGraph
    margins: Margins = field(default_factory=Margins)

    @cached_property
    def everything(self) -> int:
        """The set of all objects, a bit each."""
        return (1 << len(self.graph.shape)) - 1

    @cached_property
    def having(self) -> dict[str, int]:
        """Property word -> objects that have it; every word of FIELDS is a key."""
        table: dict[str, int] = {}
        for name, values in _WORDS:
            bits = [0] * len(values)
            for i, value in enumerate(getattr(self.graph, name).tolist()):
                bits[value] |= 1 << i
            table.update(zip(values, bits, strict=True))
        return table

    @cached_property
    def words(self) -> list[dict[str, str]]:
        """Per object: field name -> word."""
        columns = [[values[v] for v in getattr(self.graph, name).tolist()] for name, values in _WORDS]
        names = [name for name, _ in FIELDS]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    @cached_property
    def odd_sized(self) -> int:
        """Objects whose size word is disputable: a crowded table shrinks everything."""
        usual = np.asarray(SIZE_RADIUS)[self.graph.size]
        odd = np.abs(np.log(self.graph.radius / usual)) > self.margins.size
        return int(odd @ (1 << np.arange(len(odd), dtype=np.int64)))

    @cached_property
    def axis(self) -> dict[str, tuple[list[int], list[int]]]:
        """Axis relation -> (yes, doubtful): per landmark, the objects that stand so to it."""
        x, y, depth = self.graph.center[:, 0], self.graph.center[:, 1], self.graph.depth
        table = {}
        powers = 1 << np.arange(len(x), dtype=np.int64)
        others = ~np.eye(len(x), dtype=bool)
        spread = ((x, self.margins.axis), (y, self.margins.axis), (depth, self.margins.depth))
        names = (("left of", "right of"), ("above", "below"), ("in front of", "behind"))
        for (less, more), (value, margin) in zip(names, spread, strict=True):
            difference = value[None, :] - value[:, None]  # [landmark, object]
            doubtful = ((np.abs(difference) < margin) & others) @ powers
            table[less] = (((difference <= -margin) @ powers).tolist(), doubtful.tolist())
            table[more] = (((difference >= margin) @ powers).tolist(), doubtful.tolist())
        return table

    @cached_property
    def distance(self) -> list[list[float]]:
        """Distances between projected centres, [N][N]."""
        offset = self.graph.center[:, None] - self.graph.center[None]
        return np.sqrt((offset.astype(np.float64) ** 2).sum(-1)).tolist()

    @cached_property
    def columns(self) -> dict[str, list[float]]:
        """Per superlative and ordinal side: a value per object, the winner has the smallest."""
        x, y = self.graph.center[:, 0].tolist(), self.graph.center[:, 1].tolist()
        depth, radius = self.graph.depth.tolist(), self.graph.radius.tolist()
        minus = [[-v for v in column] for column in (x, y, depth, radius)]
        columns = (x, minus[0], y, minus[1], depth, minus[2], minus[3], radius)
        return dict(zip(SUPERLATIVES, columns, strict=True))

    def members(self, bits: int) -> list[int]:
        """Indices of a bit set, ascending."""
        return [i for i in range(len(self.graph.shape)) if bits >> i & 1]

    def superlative(self, name: str, among: int) -> int | None:
        """The one object (as a bit set) that leads ``among``; None where the lead is not clear."""
        if not among & (among - 1):
            return among
        value = self.columns[name]
        first, second = sorted(self.members(among), key=value.__getitem__)[:2]
        lead = value[second] - value[first]
        if name in ("largest", "smallest"):
            a, b = abs(value[first]), abs(value[second])
            sizes = self.graph.size
            among_sizes = [int(sizes[i]) for i in self.members(among)]
            best = max(among_sizes) if name == "largest" else min(among_sizes)
            # Perspective can make a medium object look larger than a large one: then "largest" is disputable.
            clear = max(a, b) >= self.margins.ratio * min(a, b) and int(sizes[first]) == best
        else:
            clear = lead >= (self.margins.depth if name in ("nearest", "farthest") else self.margins.order)
        return 1 << first if clear else None

    def ordinal(self, name: str, among: int) -> int | None:
        """The object at a rank from a side; 0 where there are too few, None where a neighbour is close."""
        rank_word, side = name.split(" from ")
        rank = RANKS.index(rank_word) + 1
        value = self.columns[SUPERLATIVES[SIDES.index(side)]]
        order = sorted(self.members(among), key=value.__getitem__)
        if rank >= len(order):
            return 0
        near = [value[order[k + 1]] - value[order[k]] for k in (rank - 1, rank) if k + 1 < len(order)]
        return 1 << order[rank] if min(near) >= self.margins.order else None

    def by_distance(self, name: str, landmark: int, among: int) -> int | None:
        """The object of ``among`` nearest to or farthest from a landmark; None where not clear."""
        if not among & (among - 1):
            return among
        distance = self.distance[landmark]
        order = sorted(self.members(among), key=distance.__getitem__)
        first, near, far = order[0], distance[order[0]], distance[order[1]]
        if name == "farthest from":
            first, near, far = order[-1], distance[order[-2]], distance[order[-1]]
        return 1 << first if far - near >= self.margins.gap and far >= self.margins.ratio * near else None

    def between(self, a: int, b: int, among: int) -> tuple[int, int]:
        """(yes, doubtful) objects of ``among`` between two landmarks, in the image plane."""
        margins, length = self.margins, self.distance[a][b]
        if length < margins.between_length:
            return 0, among
        (ax, ay), (bx, by) = self.graph.center[a].tolist(), self.graph.center[b].tolist()
        ux, uy = (bx - ax) / length, (by - ay) / length
        yes = doubtful = 0
        for i in self.members(among):
            dx, dy = self.columns["leftmost"][i] - ax, self.columns["topmost"][i] - ay
            along, across = (dx * ux + dy * uy) / length, abs(dx * uy - dy * ux) / length
            end = min(along, 1 - along)
            if end >= margins.between_inside[0] and across <= margins.between_inside[1]:
                yes |= 1 << i
            elif end >= margins.between_outside[0] and across <= margins.between_outside[1]:
                doubtful |= 1 << i
        return yes, doubtful

    def described(self, phrase: Phrase) -> int | None:
        """Objects with the phrase's properties, its relation aside; None where a size is disputable."""
        bits = self.everything
        for word in (phrase.color, phrase.material, phrase.shape, phrase.size):
            if word and word is phrase.size and bits & self.odd_sized:
                return None
            if word:
                bits &= ~self.having[word[4:]] if word.startswith("not ") else self.having[word]
        return bits

    def evaluate(self, phrase: Phrase) -> int | None:
        """Objects that fit a whole phrase; 0 for clearly none; None where it is doubtful."""
        bits = self.described(phrase)
        name = phrase.relation
        if not bits or not name:
            return bits
        if not phrase.landmarks:
            return self.ordinal(name, bits) if " from " in name else self.superlative(name, bits)
        anchors = []
        for landmark in phrase.landmarks:
            found = self.evaluate(landmark)
            if found is None or found & (found - 1):
                return None
            anchors.append(found)
        if 0 in anchors:
            return 0  # what it is related to is not there, so nothing stands in that relation
        if len(set(anchors)) < len(anchors):
            return None
        for anchor in anchors:
            bits &= ~anchor
        if not bits:
            return 0
        first = anchors[0].bit_length() - 1
        if name in DISTANCE_RELATIONS:
            return self.by_distance(name, first, bits)
        if name == BETWEEN:
            yes, doubtful = self.between(first, anchors[1].bit_length() - 1, bits)
        else:
            yes, doubtful = (table[first] for table in self.axis[name])
        return None if bits & doubtful else bits & yes


def resolve(scene: SceneGraph | Relations, query: Query) -> tuple[int, ...] | Ambiguity:
    """The targets of a query: object indices ordered by centre x, empty for none, or ``AMBIGUOUS``.

    A query that asks for one and finds several is ambiguous, as is any query with a doubtful candidate.
    """
    relations = scene if isinstance(scene, Relations) else Relations(scene)
    bits = relations.evaluate(query.phrase)
    if bits is None or (not query.plural and bits & (bits - 1)):
        return AMBIGUOUS
    return tuple(sorted(relations.members(bits), key=relations.columns["leftmost"].__getitem__))
