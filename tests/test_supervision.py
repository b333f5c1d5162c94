"""The object sets that the pointing heads are taught, against the scene's own coordinates."""

from __future__ import annotations

import numpy as np

from ppcr.data.expressions import sample_expressions
from ppcr.data.graph import sample_scene
from ppcr.data.relations import AXIS_RELATIONS, Relations
from ppcr.training.supervision import object_sets


def test_sets_follow_from_the_scene() -> None:
    seen = set()
    for seed in range(40):
        graph = sample_scene("train", 900 + seed)
        relations, rng = Relations(graph), np.random.default_rng(seed)
        x, y = graph.center[:, 0], graph.center[:, 1]
        for expression in sample_expressions(graph, 8, rng):
            sets = object_sets(relations, expression)
            targets, landmarks, candidates, standing, known = sets.rows(len(graph))
            assert tuple(np.flatnonzero(landmarks)) == tuple(sorted(expression.landmarks))
            assert sorted(np.flatnonzero(targets)) == sorted(expression.targets)
            assert not (targets & ~candidates).any()
            phrase = expression.query.phrase
            if known.any():
                # Who has the properties and stands so is a target; the rest is not.
                clear = known | ~candidates
                assert (targets[clear] == (candidates & standing)[clear]).all(), expression.text
            if phrase.relation in AXIS_RELATIONS and len(expression.landmarks) == 1:
                anchor = expression.landmarks[0]
                assert not known[anchor] and not standing[anchor]
                side = {
                    "left of": x < x[anchor],
                    "right of": x > x[anchor],
                    "above": y < y[anchor],
                    "below": y > y[anchor],
                }.get(phrase.relation)
                if side is not None:
                    seen.add(phrase.relation)
                    assert (standing[known] == side[known]).all(), expression.text
    assert len(seen) == 4


def test_nothing_stands_so_to_what_is_not_there() -> None:
    for seed in range(60):
        graph = sample_scene("train", seed)
        relations = Relations(graph)
        for expression in sample_expressions(
            graph, 6, np.random.default_rng(seed), mix={"none_attribute": 1.0}
        ):
            phrase = expression.query.phrase
            if phrase.relation in AXIS_RELATIONS and not expression.landmarks:
                *_, standing, known = object_sets(relations, expression).rows(len(graph))
                assert known.all() and not standing.any()
                return
    raise AssertionError("no expression with an absent landmark was drawn")
