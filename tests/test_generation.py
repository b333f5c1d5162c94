"""Turns on a fake session: forced runs cost no forward pass; answers equal plain step-by-step decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcr.constraint import Choice, Constraint, Free, Literal
from runtime.generation import best, generate

VOCABULARY = 12
STOP = 10
PROMPT = (11, 3, 7)


@dataclass
class FakeContext:
    """A language model whose logits depend on every token it has read, in order."""

    seed: int = 0
    read: list[int] = field(default_factory=list)
    blocks: list[tuple[int, ...]] = field(default_factory=list)
    seen_features: list[object] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.read)

    @property
    def capacity(self) -> int:
        return 1000

    def extend(self, token_ids: Sequence[int], features: object | None = None) -> npt.NDArray[np.float32]:
        assert len(token_ids) > 0
        self.blocks.append(tuple(token_ids))
        self.seen_features.append(features)
        self.read.extend(token_ids)
        return self.logits()

    @property
    def can_verify(self) -> bool:
        return True

    def verify(
        self, token_ids: Sequence[int], guesses: int, features: object | None = None
    ) -> npt.NDArray[np.float32]:
        assert 0 <= guesses < len(token_ids)
        self.blocks.append(tuple(token_ids))
        self.seen_features.append(features)
        first = len(token_ids) - guesses
        rows = []
        self.read.extend(token_ids[:first])
        for token in (*token_ids[first:], None):
            rows.append(self.logits())
            self.read.extend([] if token is None else [token])
        return np.stack(rows)

    def logits(self) -> npt.NDArray[np.float32]:
        return np.random.default_rng([self.seed, *self.read]).random(VOCABULARY, np.float32)

    def truncate(self, length: int) -> None:
        del self.read[length:]


words = st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True).map(tuple)
segments = st.one_of(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).map(lambda ids: Literal(tuple(ids))),
    words.map(Choice),
    st.builds(Free, words, st.just(STOP), st.integers(1, 5)),
)
constraints = st.lists(segments, min_size=1, max_size=6).map(lambda parts: Constraint(tuple(parts)))


def step_by_step(constraint: Constraint, seed: int) -> tuple[int, ...]:
    """The same answer the slow way: one token at a time, forced ones read one by one as well."""
    model, cursor = FakeContext(seed), constraint.start()
    model.read.extend(PROMPT)
    while not cursor.done:
        logits, allowed = model.logits(), set(cursor.allowed().tolist())
        token = max(sorted(allowed), key=lambda i: logits[i])
        cursor.advance(token)
        model.read.append(token)
    return tuple(model.read[len(PROMPT) :])


@given(constraints, st.integers(0, 99))
def test_answer_equals_step_by_step_decoding(constraint: Constraint, seed: int) -> None:
    context = FakeContext(seed)
    turn = generate(context, PROMPT, constraint)
    assert turn.tokens == step_by_step(constraint, seed)
    assert [*context.read, *turn.unread] == [*PROMPT, *turn.tokens]
    assert turn.forward_calls == len(context.blocks)
    assert turn.length == len(context.read) and turn.reused_tokens == 0


@given(constraints, st.integers(0, 99))
def test_a_forward_call_is_made_for_each_open_decision_and_no_other(
    constraint: Constraint, seed: int
) -> None:
    turn = generate(FakeContext(seed), PROMPT, constraint)
    cursor, decisions = constraint.start(), 0
    for token in turn.tokens:
        decisions += not cursor.forced()
        cursor.advance(token)
    assert turn.forward_calls == decisions


@given(
    constraints, st.integers(0, 99), st.integers(0, 12), st.lists(st.integers(0, VOCABULARY - 1), max_size=9)
)
def test_a_draft_changes_what_an_answer_costs_and_nothing_else(
    constraint: Constraint, seed: int, right: int, wrong: list[int]
) -> None:
    plain = generate(FakeContext(seed), PROMPT, constraint)
    context = FakeContext(seed)
    draft = [*plain.tokens[:right], *wrong]
    turn = generate(context, PROMPT, constraint, draft=draft)
    assert turn.tokens == plain.tokens
    # Nothing of a wrong guess is left in the cache.
    assert [*context.read, *turn.unread] == [*PROMPT, *turn.tokens] and turn.length == len(context.read)
    assert turn.forward_calls == len(context.blocks) <= plain.forward_calls
    assert 0 <= turn.accepted <= turn.drafted <= len(draft)
    assert (plain.drafted, plain.accepted) == (0, 0)


@given(st.integers(0, 99))
def test_an_answer_that_was_guessed_takes_one_forward_call(seed: int) -> None:
    constraint = Constraint((Free((1, 2, 3), STOP, 6), Literal((5, 6)), Choice((1, 2, 7))))
    plain = generate(FakeContext(seed), PROMPT, constraint)
    context = FakeContext(seed)
    # The last decision is not guessed: it comes with what is asked about the rest.
    for draft in (plain.tokens, plain.tokens[:-1]):
        turn = generate(context, PROMPT, constraint, draft=draft)
        assert turn.tokens == plain.tokens and turn.forward_calls == 1
        assert turn.drafted == turn.accepted == len(plain.tokens) - 1
        assert turn.unread == plain.tokens[-1:]
        context.truncate(0)


@given(
    constraints, constraints, st.integers(0, 99), st.integers(0, 15), st.lists(st.integers(0, 9), max_size=3)
)
def test_what_comes_after_a_right_guess_is_read_with_it(
    constraint: Constraint, next_one: Constraint, seed: int, right: int, onward: list[int]
) -> None:
    context, plain = FakeContext(seed), FakeContext(seed)
    answer = generate(plain, PROMPT, constraint)
    wanted = generate(plain, [*answer.unread, *onward], next_one)
    turn = generate(context, PROMPT, constraint, draft=answer.tokens[:right], onward=onward)
    assert turn.tokens == answer.tokens
    read = turn.ahead is not None
    assert read <= (right >= len(answer.tokens) and len(onward) > 0)
    prompt = () if read else (*turn.unread, *onward)
    assert [*context.read, *prompt] == [*PROMPT, *turn.tokens, *onward]
    after = generate(context, prompt, next_one, first=turn.ahead)
    assert after.tokens == wanted.tokens
    assert [*context.read, *after.unread] == [*plain.read, *wanted.unread]
    assert turn.forward_calls + after.forward_calls <= answer.forward_calls + wanted.forward_calls


def test_a_right_guess_and_what_comes_after_it_take_one_forward_call() -> None:
    constraint = Constraint((Choice((1, 2)), Choice((3, 4))))
    context = FakeContext()
    answer = generate(FakeContext(), PROMPT, constraint).tokens
    turn = generate(context, PROMPT, constraint, draft=answer, onward=(7, 8))
    assert context.blocks == [(*PROMPT, *answer, 7, 8)] and turn.unread == () and turn.accepted == 2
    assert turn.ahead is not None and np.array_equal(turn.ahead, context.logits())
    after = generate(context, (), constraint, first=turn.ahead)
    assert after.forward_calls == 1 and context.blocks[1] == after.tokens[:1]
    # A wrong last token takes nothing with it but itself and what came after.
    context.truncate(0)
    wrong = (answer[0], 3 if answer[1] == 4 else 4)
    turn = generate(context, PROMPT, constraint, draft=wrong, onward=(7, 8))
    assert turn.tokens == answer and turn.ahead is None and turn.unread == answer[1:]
    assert context.read == [*PROMPT, answer[0]]


def test_guesses_beyond_what_is_allowed_are_not_read() -> None:
    constraint = Constraint((Choice((1, 2)), Choice((3, 4)), Choice((5, 6))))
    context = FakeContext()
    turn = generate(context, PROMPT, constraint, draft=(9, 3))
    assert turn.drafted == 0 and context.blocks[0] == PROMPT
    context.truncate(0)
    generate(context, PROMPT, constraint, draft=(1, 9, 5))
    assert context.blocks[3] == (*PROMPT, 1)


def test_a_context_that_cannot_check_a_draft_does_without() -> None:
    constraint = Constraint((Choice((1, 2)), Choice((3, 4))))
    context = FakeContext()
    context.__class__ = type("Plain", (FakeContext,), {"can_verify": False})
    turn = generate(context, PROMPT, constraint, draft=(1, 3))
    assert turn.forward_calls == 2 and turn.drafted == 0


def test_a_forced_run_is_one_block_with_the_token_before_it() -> None:
    constraint = Constraint((Choice((1, 2)), Literal((5, 6, 7)), Choice((3, 4)), Literal((8, 9))))
    context = FakeContext()
    turn = generate(context, PROMPT, constraint)
    assert context.blocks == [PROMPT, (turn.tokens[0], 5, 6, 7)]
    assert turn.tokens[1:4] == (5, 6, 7) and turn.tokens[5:] == (8, 9)
    # The end of the answer waits for the next turn.
    assert turn.unread == (turn.tokens[4], 8, 9)


def test_an_answer_without_decisions_needs_no_forward_call() -> None:
    context = FakeContext()
    turn = generate(context, PROMPT, Constraint((Literal((1, 2)), Choice((3,)))))
    assert turn.tokens == (1, 2, 3) and turn.forward_calls == 0 and context.blocks == []
    assert turn.unread == (*PROMPT, 1, 2, 3)


def test_the_second_turn_reuses_the_cache_and_reads_what_was_left() -> None:
    context = FakeContext()
    constraint = Constraint((Choice((1, 2)), Choice((3, 4))))
    first = generate(context, PROMPT, constraint)
    held = context.length
    second = generate(context, [*first.unread, 5, 6], constraint)
    assert context.blocks[2] == (first.tokens[-1], 5, 6)
    assert second.reused_tokens == held == len(PROMPT) + 1
    assert context.read == [*PROMPT, *first.tokens, 5, 6, second.tokens[0]]


def test_features_go_with_the_prompt_alone() -> None:
    context, features = FakeContext(), object()
    generate(context, PROMPT, Constraint((Choice((1, 2)),) * 3), features=features)
    assert context.seen_features == [features, None, None]


def test_what_runs_meanwhile_starts_after_the_first_block() -> None:
    context, started = FakeContext(), list[int]()
    generate(
        context, PROMPT, Constraint((Choice((1, 2)),) * 3), meanwhile=lambda: started.append(context.length)
    )
    assert started == [len(PROMPT)]


def test_too_long_a_constraint_is_refused_before_anything_runs() -> None:
    context = FakeContext()
    with pytest.raises(ValueError, match="4 tokens"):
        generate(context, PROMPT, Constraint((Free((1, 2), STOP, 3),)), max_tokens=3)
    assert context.blocks == []


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, unique=True), st.integers(0, 9))
def test_best_is_the_highest_allowed(ids: list[int], seed: int) -> None:
    logits = np.random.default_rng(seed).integers(0, 4, VOCABULARY).astype(np.float32)
    allowed = np.sort(np.asarray(ids, np.int64))
    chosen = best(logits, allowed)
    assert chosen in ids
    assert logits[chosen] == logits[allowed].max()
    assert chosen == min(i for i in ids if logits[i] == logits[chosen])
