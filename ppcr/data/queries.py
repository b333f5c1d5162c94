"""Queries drawn target first: an object, then a description that is true of it, or false of everything.

A maker returns a candidate, or None where its draw came to nothing. It need not be right: ``resolve`` has the
last word on every candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from ppcr.data.grammar import Dice
from ppcr.data.graph import COLORS, HELD_OUT_PAIRS, SHAPES
from ppcr.data.relations import (
    AXIS_RELATIONS,
    BETWEEN,
    DISTANCE_RELATIONS,
    FIELDS,
    ORDINALS,
    SUPERLATIVES,
    Phrase,
    Query,
    Relations,
)
from ppcr.prompts import MAX_TARGETS

_FIELD_NAMES = tuple(name for name, _ in FIELDS)
_VALUES = dict(FIELDS)
_SIZE, _COLOR, _MATERIAL, _SHAPE = (1 << i for i in range(4))
USUAL: dict[int, float] = {
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
"""How often which properties are named together (a set of bits in the order of FIELDS)."""
ANYTHING: dict[int, float] = {0: 2.0} | {k: v for k, v in USUAL.items() if k not in (_MATERIAL, _SIZE)}
"""The same where a relation says the rest: often just "the thing", "the ball"."""
_RANK_WEIGHTS = {"second": 3.0, "third": 2.0, "fourth": 1.0}
_SIDE_WEIGHTS = {"left": 2.0, "right": 2.0, "top": 0.6, "bottom": 0.6}
_ORDINAL_WEIGHTS = tuple(
    _RANK_WEIGHTS[rank] * _SIDE_WEIGHTS[side] for rank, side in (name.split(" from ") for name in ORDINALS)
)


class QueryMaker:
    """Makers of each kind of query for one scene; None where a draw found nothing that fits the kind."""

    def __init__(self, relations: Relations, dice: Dice) -> None:
        self.relations = relations
        self.dice = dice
        self.n = len(relations.graph.shape)
        self._subsets: dict[int, dict[int, int]] = {}

    # Kinds with targets

    def attribute(self) -> Query | None:
        """One object by properties that no other shares."""
        return _query(self._unique(self._target()), plural=self.dice.chance(0.06))

    def relation(self) -> Query | None:
        """One object by how it stands to a landmark."""
        found = self._landmark()
        return found and _query(self._related(self._target(), *found), plural=self.dice.chance(0.08))

    def between(self) -> Query | None:
        """One object between two landmarks."""
        first, second = self._landmark(), self._landmark()
        if not first or not second or first[0] == second[0]:
            return None
        others = self._others(first[0], second[0])
        yes, doubtful = self.relations.between(first[0], second[0], others)
        if not yes:
            return None
        phrase = self._completed(self.dice.pick(self.relations.members(yes)), yes, doubtful, others)
        return _query(phrase, BETWEEN, first[1], second[1])

    def superlative(self) -> Query | None:
        """The leftmost, nearest, … of at least two alike."""
        return _query(self._class(2), self.dice.pick(SUPERLATIVES))

    def ordinal(self) -> Query | None:
        """The second, third, … from a side, of at least two alike."""
        return _query(self._class(2), self.dice.weighted(ORDINALS, _ORDINAL_WEIGHTS))

    def negation(self) -> Query | None:
        """A target that lacks a property which others of its description have."""
        target, words = self._target(), self.relations.words
        name = self.dice.weighted(("color", "material", "size"), (0.5, 0.3, 0.2))
        named = _FIELD_NAMES.index(name)
        fits = self._fits(target)
        subset = self._draw({s: weight for s, weight in ANYTHING.items() if not s >> named & 1})
        rivals = [i for i in self.relations.members(fits[subset]) if words[i][name] != words[target][name]]
        if not rivals:
            return None
        value = words[self.dice.pick(rivals)][name]
        phrase = _with(self._phrase(target, subset), name, f"not {value}")
        several = (self.relations.described(phrase) or 0).bit_count() > 1
        return _query(phrase, plural=several or self.dice.chance(0.2))

    def two_hop(self) -> Query | None:
        """The landmark is itself found by a relation (or, now and then, a superlative)."""
        inner = self._nested(self._landmark())
        return inner and _query(self._related(self._target(), *inner))

    def plural_attribute(self) -> Query | None:
        """Two to MAX_TARGETS objects by the properties they share."""
        return _query(self._class(2, MAX_TARGETS), plural=True)

    def plural(self) -> Query | None:
        """Several objects, by half of the draws those on one side of a landmark."""
        found = self._landmark() if self.dice.chance(0.5) else None
        if found is None:
            return self.plural_attribute()
        phrase = self._class(2, without=1 << found[0])
        return _query(phrase, self.dice.pick(AXIS_RELATIONS), found[1], plural=True)

    # Kinds without a target

    def false_attribute(self) -> Query | None:
        """Properties that no object has together."""
        return _query(self._absent(), plural=self.dice.chance(0.3))

    def none_attribute(self) -> Query | None:
        """Nothing fits the properties, whatever else is said; or the landmark is not there."""
        roll = self.dice.uniform()
        if roll < 0.7:
            return self.false_attribute()
        phrase = self._absent()
        if roll < 0.77:
            return _query(phrase, self.dice.pick(SUPERLATIVES))
        if roll < 0.82:
            return _query(phrase, self.dice.weighted(ORDINALS, _ORDINAL_WEIGHTS))
        name = self.dice.pick(AXIS_RELATIONS + DISTANCE_RELATIONS)
        if roll < 0.92:
            found = self._landmark()
            return found and _query(phrase, name, found[1])
        return None if phrase is None else _query(self._class(1), name, phrase)

    def none_relation(self) -> Query | None:
        """The objects exist and the landmarks exist; none of the objects stands so."""
        roll, found = self.dice.uniform(), self._landmark()
        if roll < 0.12:
            return _query(self._class(1, 3), self.dice.weighted(ORDINALS, _ORDINAL_WEIGHTS))
        if found is None:
            return None
        if roll < 0.27:
            second = self._landmark()
            if not second:
                return None
            phrase = self._class(1, 3, without=1 << found[0] | 1 << second[0])
            return _query(phrase, BETWEEN, found[1], second[1])
        if roll < 0.42:
            found = self._nested(found)
        if found is None:
            return None
        phrase = self._class(1, without=1 << found[0])
        return _query(phrase, self.dice.pick(AXIS_RELATIONS), found[1], plural=self.dice.chance(0.3))

    # Building blocks

    def _any(self) -> int:
        return int(self.dice.uniform() * self.n)

    def _target(self) -> int:
        """Any object; in the compositional split every second time one of an unseen colour-shape pair."""
        if self._unseen and self.dice.chance(0.5):
            return self.dice.pick(self._unseen)
        return self._any()

    @cached_property
    def _unseen(self) -> list[int]:
        words = self.relations.words
        return [i for i in range(self.n) if (words[i]["color"], words[i]["shape"]) in HELD_OUT_PAIRS]

    def _others(self, *landmarks: int) -> int:
        return self.relations.everything & ~sum(1 << i for i in landmarks)

    def _draw(self, weights: Mapping[int, float]) -> int:
        return self.dice.weighted(tuple(weights), tuple(weights.values()))

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
        named = (words[name] if subset >> i & 1 else "" for i, name in enumerate(_FIELD_NAMES))
        size, color, material, shape = named
        return Phrase(shape, size, color, material)

    def _unique(self, index: int) -> Phrase | None:
        """A description that fits this object alone."""
        fits = self._fits(index)
        weights = {s: weight for s, weight in USUAL.items() if fits[s] == 1 << index}
        return self._phrase(index, self._draw(weights)) if weights else None

    def _landmark(self) -> tuple[int, Phrase] | None:
        index = self._any()
        phrase = self._unique(index)
        return None if phrase is None else (index, phrase)

    def _nested(self, found: tuple[int, Phrase] | None) -> tuple[int, Phrase] | None:
        """A landmark that is found by its relation to another, or by a superlative."""
        if self.dice.chance(0.15):
            query = self.superlative()
            phrase = query and query.phrase
        else:
            phrase = found and self._related(self._any(), *found)
        bits = phrase and self.relations.evaluate(phrase)
        if not phrase or not bits or bits & (bits - 1):
            return None
        return bits.bit_length() - 1, phrase

    def _class(self, least: int, most: int = 16, without: int = 0) -> Phrase | None:
        """A description shared by ``least`` to ``most`` objects, the ones in ``without`` aside."""
        index = self._target()
        fits = self._fits(index)
        weights = {s: w for s, w in ANYTHING.items() if least <= (fits[s] & ~without).bit_count() <= most}
        return self._phrase(index, self._draw(weights)) if weights else None

    def _related(self, target: int, landmark: int, anchor: Phrase) -> Phrase | None:
        """The target described by how it stands to a landmark."""
        if landmark == target:
            return None
        fits, others = self._fits(target), self._others(landmark)
        if self.dice.chance(0.25):
            name = DISTANCE_RELATIONS[self.dice.chance(0.2)]
            rivals = others & ~(1 << target)
            weights = {s: weight for s, weight in ANYTHING.items() if fits[s] & rivals}
            phrase = self._phrase(target, self._draw(weights)) if weights else None
        else:
            axis = self.relations.axis
            names = [name for name in AXIS_RELATIONS if axis[name][0][landmark] >> target & 1]
            if not names:
                return None
            name = self.dice.pick(names)
            yes, doubtful = axis[name]
            phrase = self._completed(target, yes[landmark], doubtful[landmark], others)
        return phrase and replace(phrase, relation=name, landmarks=(anchor,))

    def _completed(self, target: int, within: int, doubtful: int, others: int) -> Phrase | None:
        """A description of the target that is the one clear case ``within`` a relation, and mostly needs it.

        ``others`` are the objects that compete for the relation (all but the landmarks).
        """
        fits = self._fits(target)
        weights = {
            s: weight * (1 if fits[s] & others == 1 << target else 4)
            for s, weight in ANYTHING.items()
            if fits[s] & within == 1 << target and not fits[s] & doubtful
        }
        return self._phrase(target, self._draw(weights)) if weights else None

    def _absent(self) -> Phrase | None:
        """A description of nothing in the scene, mostly one whose words all apply to something else."""
        dice, words, roll = self.dice, self.relations.words, self.dice.uniform()
        if roll < 0.5:
            phrase = Phrase(shape=words[self._any()]["shape"], color=words[self._any()]["color"])
            if dice.chance(0.3):
                name = dice.pick(("size", "material"))
                phrase = _with(phrase, name, dice.pick(_VALUES[name]))
        elif roll < 0.9:
            index, subset = self._target(), self._draw(USUAL)
            phrase = self._phrase(index, subset)
            name = dice.pick([f for i, f in enumerate(_FIELD_NAMES) if subset >> i & 1])
            negated = roll > 0.8 and name != "shape"
            phrase = _with(phrase, name, f"not {words[index][name]}" if negated else dice.pick(_VALUES[name]))
        else:
            phrase = Phrase(color=dice.pick(COLORS)) if dice.chance(0.4) else Phrase(shape=dice.pick(SHAPES))
        if self.relations.graph.split != "compositional" and (phrase.color, phrase.shape) in HELD_OUT_PAIRS:
            return None  # a pair that is named but never shown would teach that it cannot be there
        return phrase if self.relations.described(phrase) == 0 else None


def _query(
    phrase: Phrase | None, relation: str = "", *landmarks: Phrase, plural: bool = False
) -> Query | None:
    if phrase is None:
        return None
    return Query(replace(phrase, relation=relation, landmarks=landmarks) if relation else phrase, plural)


def _with(phrase: Phrase, name: str, word: str) -> Phrase:
    change: dict[str, Any] = {name: word}
    return replace(phrase, **change)
