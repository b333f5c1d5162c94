"""Constraints: what may follow, what must follow, and the same language as a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcr.constraint import Choice, Constraint, Cursor, Free, Literal, Segment

ALPHABET = "abcdefghij;<"
WORDS = range(10)
STOP = 10

tokens = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5, unique=True).map(tuple)
literals = st.lists(st.integers(0, 11), min_size=1, max_size=4).map(lambda ids: Literal(tuple(ids)))
frees = st.builds(Free, tokens, st.just(STOP), st.integers(1, 4))
segments = st.one_of(literals, tokens.map(Choice), frees)
constraints = st.lists(segments, max_size=5).map(lambda parts: Constraint(tuple(parts)))


def decode(ids: Sequence[int]) -> str:
    return "".join(ALPHABET[i] for i in ids)


def answer(constraint: Constraint, choose: st.DataObject) -> list[int]:
    """Any answer the constraint allows, one token at a time."""
    cursor, out = constraint.start(), []
    while not cursor.done:
        token = choose.draw(st.sampled_from(cursor.allowed().tolist()))
        cursor.advance(token)
        out.append(token)
    return out


@given(constraints, st.data())
def test_every_answer_is_short_enough_and_matches_the_regex(
    constraint: Constraint, data: st.DataObject
) -> None:
    given_answer = answer(constraint, data)
    assert len(given_answer) <= constraint.max_tokens
    assert re.fullmatch(constraint.regex(decode), decode(given_answer))


@given(constraints, st.data())
def test_forced_tokens_are_the_only_ones_allowed(constraint: Constraint, data: st.DataObject) -> None:
    cursor = constraint.start()
    while not cursor.done:
        forced = cursor.forced()
        for token in forced:
            assert cursor.allowed().tolist() == [token]
            cursor.advance(token)
        if cursor.done:
            break
        allowed = cursor.allowed()
        assert len(allowed) > 1 or is_open(cursor), "a token that must come was not forced"
        cursor.advance(data.draw(st.sampled_from(allowed.tolist())))


def is_open(cursor: Cursor) -> bool:
    return isinstance(cursor.segments[cursor.index], Free)


@given(constraints, st.data())
def test_allowed_is_ascending_and_the_rest_is_refused(constraint: Constraint, data: st.DataObject) -> None:
    cursor = constraint.start()
    while not cursor.done:
        allowed = cursor.allowed()
        assert allowed.dtype == np.int64 and (np.diff(allowed) > 0).all()
        place = cursor.index, cursor.inside
        for token in set(range(-1, 13)) - set(allowed.tolist()):
            with pytest.raises(ValueError, match="not allowed"):
                cursor.advance(token)
        assert (cursor.index, cursor.inside) == place
        cursor.advance(data.draw(st.sampled_from(allowed.tolist())))


def test_a_free_field_needs_a_token_and_ends_at_its_length() -> None:
    cursor = Constraint((Free((1, 2), STOP, 2),)).start()
    assert cursor.allowed().tolist() == [1, 2]
    cursor.advance(2)
    assert cursor.allowed().tolist() == [1, 2, STOP] and cursor.forced() == ()
    cursor.advance(1)
    assert cursor.allowed().tolist() == [STOP] and cursor.forced() == (STOP,)
    cursor.advance(STOP)
    assert cursor.done and cursor.allowed().size == 0 and cursor.forced() == ()


def test_forced_runs_cross_segments() -> None:
    cursor = Constraint((Literal((1, 2)), Choice((3,)), Literal((4,)), Choice((5, 6)), Literal((7,)))).start()
    assert cursor.forced() == (1, 2, 3, 4)
    for token in (1, 2, 3, 4):
        cursor.advance(token)
    assert cursor.forced() == () and cursor.allowed().tolist() == [5, 6]
    cursor.advance(6)
    assert cursor.forced() == (7,)


def test_two_cursors_of_one_constraint_do_not_meet() -> None:
    constraint = Constraint((Choice((1, 2)), Choice((3, 4))))
    first, second = constraint.start(), constraint.start()
    first.advance(1)
    assert second.allowed().tolist() == [1, 2] and first.allowed().tolist() == [3, 4]


def test_repeated_choices_share_one_group_of_the_regex() -> None:
    assert Constraint((Choice((0, 1)),) * 6).regex(decode) == "(?:a|b){6}"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Literal(()),
        lambda: Choice(()),
        lambda: Free((), STOP, 3),
        lambda: Free((1,), STOP, 0),
        lambda: Free((1, STOP), STOP, 3),
    ],
)
def test_segments_that_could_never_end_are_refused(make: Callable[[], Segment]) -> None:
    with pytest.raises(ValueError):
        make()
