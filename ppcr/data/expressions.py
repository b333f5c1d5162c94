"""Referring expressions for a scene graph: drawn target first, checked against the geometry, then worded.

A kind of query is drawn, then a target (or a false description, for no-target kinds), then a description that is
true of it; ``resolve`` has the last word, so whatever a person could dispute is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ppcr.data.grammar import Dice, express, semantic_prompt
from ppcr.data.graph import COLORS, HELD_OUT_PAIRS, SHAPES, SceneGraph
from ppcr.data.relations import (
    AMBIGUOUS,
    AXIS_RELATIONS,
    BETWEEN,
    DISTANCE_RELATIONS,
    FIELDS,
    ORDINALS,
    SUPERLATIVES,
    Phrase,
    Query,
    Relations,
    resolve,
)
from ppcr.prompts import MAX_TARGETS, SemanticPrompt

__all__ = ["AMBIGUOUS", "MIX", "Expression", "Phrase", "Query", "Relations", "resolve", "sample_expressions"]

MIX: tuple[dict[str, float], ...] = (
    {"attribute": 0.65, "plural": 0.20, "none_attribute": 0.15},
    {"attribute": 0.33, "relation": 0.30, "superlative": 0.12, "plural": 0.10, "none_attribute": 0.10}
    | {"none_relation": 0.05},
    {"attribute": 0.20, "relation": 0.25, "between": 0.05, "superlative": 0.08, "ordinal": 0.06}
    | {"negation": 0.05, "two_hop": 0.06, "plural": 0.10, "none_attribute": 0.09, "none_relation": 0.06},
)
"""Per level: kind -> share."""

_ATTEMPTS = 10
_FIELD_NAMES = tuple(name for name, _ in FIELDS)
_VALUES = dict(FIELDS)
_SIZE, _COLOR, _MATERIAL, _SHAPE = (1 << i for i in range(4))
_USUAL = {
    _SHAPE: 1.0,
    _COLOR: 1.0,
    _MATERIAL: 0.5,
    _SIZE: 0.4,
    _COLOR | _SHAPE: 5.0,
    _SIZE | _SHAPE: 1.6,
    _MATERIAL | _SHAPE: 1.6,
    _COLOR | _MATERIAL: 0.9,
    _SIZE | _COLOR: 0.9,
    _SIZE | _MATERIAL: 0.6,
    _COLOR | _MATERIAL | _SHAPE: 2.0,
    _SIZE | _COLOR | _SHAPE: 2.0,
    _SIZE | _MATERIAL | _SHAPE: 1.0,
    _SIZE | _COLOR | _MATERIAL: 0.6,
    _SIZE | _COLOR | _MATERIAL | _SHAPE: 1.5,
}
"""How often people name which properties together (a set of bits in the order of FIELDS)."""
_ANYTHING = {0: 2.0} | {k: v for k, v in _USUAL.items() if k not in (_MATERIAL, _SIZE)}
"""The same where a relation says the rest: often just "the thing", "the ball"."""


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
    graph: SceneGraph, count: int, rng: np.random.Generator, level: int = 2
) -> list[Expression]:
    """Draw ``count`` expressions, different in wording wherever the scene allows.

    Args:
        graph: the scene.
        count: how many.
        rng: consumed by one draw; equal states give equal expressions.
        level: 0 attributes; 1 also one-hop relations and superlatives; 2 everything.

    Raises:
        ValueError: a level other than 0, 1, 2.
    """
    if level not in (0, 1, 2):
        raise ValueError(f"level is 0, 1 or 2, not {level}")
    sampler = _Sampler(graph, Dice(int(rng.integers(1 << 62))))
    found: list[Expression] = []
    texts: set[str] = set()
    for _ in range(count):
        for _ in range(_ATTEMPTS):
            expression = sampler.draw(MIX[level])
            if expression.text not in texts:
                break
        texts.add(expression.text)
        found.append(expression)
    return found


class _Sampler:
    """Draws queries of each kind for one scene. A maker returns a candidate, or None where its draw came to nothing."""

    def __init__(self, graph: SceneGraph, dice: Dice) -> None:
        self.graph = graph
        self.relations = Relations(graph)
        self.dice = dice
        self.n = len(graph.shape)
        self._subsets: dict[int, dict[int, int]] = {}
        self._makers: dict[str, Callable[[], Query | None]] = {
            "attribute": self._attribute,
            "relation": self._relation,
            "between": self._between,
            "superlative": self._superlative,
            "ordinal": self._ordinal,
            "negation": self._negation,
            "two_hop": self._two_hop,
            "plural": self._plural,
            "none_attribute": self._none_attribute,
            "none_relation": self._none_relation,
        }

    def draw(self, mix: dict[str, float]) -> Expression:
        """One expression; a kind this scene does not offer gives way to another of the same mix."""
        level_has_relations = "relation" in mix
        kinds = dict(mix)
        while True:
            kind = self.dice.weighted(tuple(kinds), tuple(kinds.values()))
            maker = self._makers[kind]
            if not level_has_relations and kind in ("plural", "none_attribute"):
                maker = self._plural_attribute if kind == "plural" else self._false_attribute
            for _ in range(_ATTEMPTS):
                query = maker()
                expression = None if query is None else self._checked(query, kind)
                if expression is not None:
                    return expression
            if len(kinds) > 1:
                del kinds[kind]

    def _checked(self, query: Query, kind: str) -> Expression | None:
        targets = resolve(self.relations, query)
        if targets is AMBIGUOUS or len(targets) > MAX_TARGETS or (not targets) != kind.startswith("none_"):
            return None
        if kind == "plural" and len(targets) < 2:
            return None
        anchors = []
        for landmark in query.phrase.landmarks:
            bits = self.relations.evaluate(landmark)
            anchors += self.relations.members(bits) if bits else []
        text = express(query, len(targets), self.dice)
        return Expression(text, targets, semantic_prompt(query, len(targets)), kind, tuple(anchors), query)

    # Building blocks

    def _target(self) -> int:
        """Any object; in the compositional split every second time one of an unseen colour-shape pair."""
        if self._unseen and self.dice.chance(0.5):
            return self.dice.pick(self._unseen)
        return self._any()

    def _any(self) -> int:
        return int(self.dice.uniform() * self.n)

    @cached_property
    def _unseen(self) -> list[int]:
        words = self.relations.words
        return [i for i in range(self.n) if (words[i]["color"], words[i]["shape"]) in HELD_OUT_PAIRS]

    def _fits(self, index: int) -> dict[int, int]:
        """Every set of properties of an object -> the objects that share them."""
        table = self._subsets.get(index)
        if table is None:
            words, having = self.relations.words[index], self.relations.having
            bits = [having[words[name]] for name in _FIELD_NAMES]
            table = {0: self.relations.everything}
            for subset in range(1, 16):
                low = subset & -subset
                table[subset] = table[subset ^ low] & bits[low.bit_length() - 1]
            self._subsets[index] = table
        return table

    def _phrase(self, index: int, subset: int) -> Phrase:
        words = self.relations.words[index]
        size, color, material, shape = (words[f] if subset >> i & 1 else "" for i, f in enumerate(_FIELD_NAMES))
        return Phrase(shape, size, color, material)

    def _unique(self, index: int, usual: dict[int, float]) -> Phrase | None:
        """A description that fits this object alone."""
        fits, alone = self._fits(index), 1 << index
        subsets = [s for s in usual if fits[s] == alone]
        if not subsets:
            return None
        return self._phrase(index, self.dice.weighted(subsets, [usual[s] for s in subsets]))

    def _landmark(self) -> tuple[int, Phrase] | None:
        index = self._any()
        phrase = self._unique(index, _USUAL)
        return None if phrase is None else (index, phrase)

    def _completed(self, target: int, within: int, doubtful: int, others: int) -> Phrase | None:
        """A description of the target, the only clear case of it ``within`` a relation, preferably one that needs it.

        ``others`` are the objects that compete for the relation (all but the landmarks).
        """
        fits = self._fits(target)
        subsets = [s for s in _ANYTHING if fits[s] & within == 1 << target and not fits[s] & doubtful]
        if not subsets:
            return None
        weights = [_ANYTHING[s] * (4 if (fits[s] & others) & ((fits[s] & others) - 1) else 1) for s in subsets]
        return self._phrase(target, self.dice.weighted(subsets, weights))

    def _class(self, least: int, most: int = 16, without: int = 0) -> Phrase | None:
        """A description shared by ``least`` to ``most`` objects, the ones in ``without`` aside."""
        index = self._target()
        fits = self._fits(index)
        subsets = [s for s in _ANYTHING if least <= (fits[s] & ~without).bit_count() <= most]
        if not subsets:
            return None
        return self._phrase(index, self.dice.weighted(subsets, [_ANYTHING[s] for s in subsets]))

    # Kinds with targets

    def _attribute(self) -> Query | None:
        phrase = self._unique(self._target(), _USUAL)
        return phrase and Query(phrase, plural=self.dice.chance(0.06))

    def _related(self, target: int, landmark: int, anchor: Phrase) -> Phrase | None:
        """The target described by how it stands to a landmark."""
        if landmark == target:
            return None
        dice, axis = self.dice, self.relations.axis
        others = self.relations.everything & ~(1 << landmark)
        if dice.chance(0.25):
            name = dice.pick(DISTANCE_RELATIONS) if dice.chance(0.4) else DISTANCE_RELATIONS[0]
            subsets = [s for s in _ANYTHING if self._fits(target)[s] & others & ~(1 << target)]
            if not subsets:
                return None
            phrase = self._phrase(target, dice.weighted(subsets, [_ANYTHING[s] for s in subsets]))
            return replace(phrase, relation=name, landmarks=(anchor,))
        names = [name for name in AXIS_RELATIONS if axis[name][0][landmark] >> target & 1]
        if not names:
            return None
        name = dice.pick(names)
        yes, doubtful = axis[name]
        phrase = self._completed(target, yes[landmark], doubtful[landmark], others)
        return phrase and replace(phrase, relation=name, landmarks=(anchor,))

    def _relation(self) -> Query | None:
        found = self._landmark()
        phrase = found and self._related(self._target(), *found)
        return phrase and Query(phrase, plural=self.dice.chance(0.08))

    def _between(self) -> Query | None:
        first, second = self._landmark(), self._landmark()
        if not first or not second or first[0] == second[0]:
            return None
        others = self.relations.everything & ~(1 << first[0]) & ~(1 << second[0])
        yes, doubtful = self.relations.between(first[0], second[0], others)
        if not yes:
            return None
        phrase = self._completed(self.dice.pick(self.relations.members(yes)), yes, doubtful, others)
        return phrase and Query(replace(phrase, relation=BETWEEN, landmarks=(first[1], second[1])))

    def _superlative(self) -> Query | None:
        phrase = self._class(2)
        return phrase and Query(replace(phrase, relation=self.dice.pick(SUPERLATIVES)))

    def _ordinal(self) -> Query | None:
        phrase = self._class(2)
        name = self.dice.weighted(ORDINALS, _ORDINAL_WEIGHTS)
        return phrase and Query(replace(phrase, relation=name))

    def _negation(self) -> Query | None:
        """A target that lacks a property which others of its description have."""
        target = self._target()
        name, words = self.dice.weighted(("color", "material", "size"), (0.5, 0.3, 0.2)), self.relations.words
        named = _FIELD_NAMES.index(name)
        fits = {s: bits for s, bits in self._fits(target).items() if s in _ANYTHING and not s >> named & 1}
        subset = self.dice.weighted(tuple(fits), tuple(_ANYTHING[s] for s in fits))
        rivals = [i for i in self.relations.members(fits[subset]) if words[i][name] != words[target][name]]
        if not rivals:
            return None
        value = words[self.dice.pick(rivals)][name]
        phrase = replace(self._phrase(target, subset), **{name: f"not {value}"})
        return Query(phrase, plural=(self.relations.described(phrase) or 0).bit_count() > 1 or self.dice.chance(0.2))

    def _two_hop(self) -> Query | None:
        """The landmark is itself found by a relation (or, now and then, a superlative)."""
        if self.dice.chance(0.15):
            inner = self._class(2)
            inner = inner and replace(inner, relation=self.dice.pick(SUPERLATIVES))
        else:
            found = self._landmark()
            inner = found and self._related(self._any(), *found)
        bits = inner and self.relations.evaluate(inner)
        if not inner or not bits or bits & (bits - 1):
            return None
        phrase = self._related(self._target(), bits.bit_length() - 1, inner)
        return phrase and Query(phrase)

    def _plural_attribute(self) -> Query | None:
        phrase = self._class(2, MAX_TARGETS)
        return phrase and Query(phrase, plural=True)

    def _plural(self) -> Query | None:
        found = self._landmark() if self.dice.chance(0.5) else None
        if found is None:
            return self._plural_attribute()
        phrase = self._class(2, without=1 << found[0])
        return phrase and Query(
            replace(phrase, relation=self.dice.pick(AXIS_RELATIONS), landmarks=(found[1],)), plural=True
        )

    # Kinds without a target

    def _absent(self) -> Phrase | None:
        """A description of nothing in the scene, most often one whose words all apply to something else."""
        dice, relations = self.dice, self.relations
        roll = dice.uniform()
        if roll < 0.5:
            color, shape = relations.words[self._any()]["color"], relations.words[self._any()]["shape"]
            phrase = Phrase(shape=shape, color=color)
            if dice.chance(0.3):
                name = dice.pick(("size", "material"))
                phrase = replace(phrase, **{name: dice.pick(_VALUES[name])})
        elif roll < 0.8:
            index = self._target()
            subset = dice.weighted(tuple(_USUAL), tuple(_USUAL.values()))
            name = dice.pick([f for i, f in enumerate(_FIELD_NAMES) if subset >> i & 1])
            phrase = replace(self._phrase(index, subset), **{name: dice.pick(_VALUES[name])})
        elif roll < 0.9:
            index, (name, values) = self._any(), dice.pick(FIELDS)
            phrase = self._phrase(index, dice.weighted(tuple(_USUAL), tuple(_USUAL.values())))
            phrase = replace(phrase, **{name: f"not {relations.words[index][name]}"}) if name != "shape" else phrase
        else:
            phrase = Phrase(color=dice.pick(COLORS)) if dice.chance(0.4) else Phrase(shape=dice.pick(SHAPES))
        if self.graph.split != "compositional" and (phrase.color, phrase.shape) in HELD_OUT_PAIRS:
            return None  # naming a pair that never appears would teach that it never appears
        return phrase if relations.described(phrase) == 0 else None

    def _false_attribute(self) -> Query | None:
        phrase = self._absent()
        return phrase and Query(phrase, plural=self.dice.chance(0.3))

    def _none_attribute(self) -> Query | None:
        phrase, roll = self._absent(), self.dice.uniform()
        if phrase is None or roll < 0.7:
            return phrase and Query(phrase, plural=self.dice.chance(0.3))
        if roll < 0.77:
            return Query(replace(phrase, relation=self.dice.pick(SUPERLATIVES)))
        if roll < 0.82:
            return Query(replace(phrase, relation=self.dice.weighted(ORDINALS, _ORDINAL_WEIGHTS)))
        name = self.dice.pick(AXIS_RELATIONS + DISTANCE_RELATIONS)
        if roll < 0.92:
            found = self._landmark()
            return found and Query(replace(phrase, relation=name, landmarks=(found[1],)))
        target = self._class(1)
        return target and Query(replace(target, relation=name, landmarks=(phrase,)))

    def _none_relation(self) -> Query | None:
        """The objects exist and the landmarks exist; none of the objects stands so."""
        roll = self.dice.uniform()
        if roll < 0.12:
            phrase = self._class(1, 3)
            return phrase and Query(replace(phrase, relation=self.dice.weighted(ORDINALS, _ORDINAL_WEIGHTS)))
        found = self._landmark()
        if found is None:
            return None
        landmark, anchor = found
        if roll < 0.27:
            second = self._landmark()
            phrase = second and self._class(1, 3, without=1 << landmark | 1 << second[0])
            if not phrase or not second or second[0] == landmark or self.relations.distance[landmark][second[0]] < 0.2:
                return None
            return Query(replace(phrase, relation=BETWEEN, landmarks=(anchor, second[1])))
        if roll < 0.42:
            inner = self._related(self._any(), landmark, anchor)
            bits = inner and self.relations.evaluate(inner)
            if not inner or not bits or bits & (bits - 1):
                return None
            landmark, anchor = bits.bit_length() - 1, inner
        phrase = self._class(1, without=1 << landmark)
        plural = self.dice.chance(0.3)
        return phrase and Query(
            replace(phrase, relation=self.dice.pick(AXIS_RELATIONS), landmarks=(anchor,)), plural=plural
        )


_ORDINAL_WEIGHTS = tuple(
    {"second": 3.0, "third": 2.0, "fourth": 1.0}[name.split(" ")[0]]
    * (2.0 if name.endswith(("left", "right")) else 0.6)
    for name in ORDINALS
)
