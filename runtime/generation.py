"""Turn-level decoding: greedy, within a constraint; forced and rightly guessed tokens take no step each."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ppcr.constraint import Constraint, Cursor
from runtime.session import Context, Features, Float32Array, TurnContext, VerifyingContext


@dataclass(frozen=True)
class Turn:
    """One answer and what it cost.

    Attributes:
        tokens: the answer's ids.
        unread: tokens of the conversation that are not in the cache yet: the end of the answer. The next turn
            begins with them, so that they cost no forward pass of their own.
        forward_calls: blocks run; reused_tokens: tokens the cache already held.
        length: tokens of the conversation that are in the cache now.
        drafted: tokens of the draft that were read; accepted: those that the model would have written itself.
        ahead: the logits f32 [vocabulary] after ``onward`` (see `generate`), where that was read as well.
    """

    tokens: tuple[int, ...]
    unread: tuple[int, ...]
    forward_calls: int
    reused_tokens: int
    length: int
    drafted: int = 0
    accepted: int = 0
    ahead: Float32Array | None = field(default=None, compare=False)


def generate(
    context: Context,
    prompt: Sequence[int],
    constraint: Constraint,
    *,
    features: Features | None = None,
    max_tokens: int | None = None,
    meanwhile: Callable[[], None] | None = None,
    draft: Sequence[int] = (),
    onward: Sequence[int] = (),
    first: Float32Array | None = None,
) -> Turn:
    """Feed ``prompt``, then decode the most likely answer that ``constraint`` allows, token by token.

    Tokens that are forced (literals, a choice of one, the end of a full field) are appended without asking
    the model; they are fed in one block together with whatever comes before the next decision. What follows
    the last decision is not fed at all. ``features`` belong to image tokens in ``prompt``. ``meanwhile`` is
    called once, after the first block: what it starts runs beside the steps, which leave processors idle.

    ``draft`` is a guess at the answer or its beginning (speculative decoding): on a context that can say what
    comes after each token of a block, it is read with the prompt, and kept as far as it is what the model
    would have written. The answer is the same with any draft.

    ``onward`` is what the conversation goes on with after an answer as guessed. It is read along with a draft
    of the whole answer; if all of that was right, the turn has the logits ``ahead``. They are what the next
    turn, whose prompt is empty then, takes as ``first``: it saves that turn's first forward call.

    Raises:
        ValueError: the answer could be longer than ``max_tokens``, or the context is too short.
    """
    if max_tokens is not None and constraint.max_tokens > max_tokens:
        raise ValueError(f"the constraint allows {constraint.max_tokens} tokens, more than {max_tokens}")
    if isinstance(context, TurnContext):
        return context.answer(prompt, constraint, features=features, meanwhile=meanwhile)
    verifying = context if isinstance(context, VerifyingContext) and context.can_verify else None
    speech = speak(prompt, constraint, context.length, draft if verifying else (), onward, first)
    logits: Float32Array | None = None
    while True:
        try:
            part = speech.send(logits)
        except StopIteration as end:
            turn: Turn = end.value
            context.truncate(turn.length)
            return turn
        context.truncate(part.start)
        if part.guesses and verifying is not None:
            logits = verifying.verify(part.tokens, part.guesses, features)
        else:
            logits = context.extend(part.tokens, features)[None]
        features = None
        if meanwhile is not None:
            meanwhile()
            meanwhile = None


@dataclass(frozen=True)
class Part:
    """What is to be read next.

    Attributes:
        tokens: of the block. guesses: how many of its last ones are guesses at the answer.
        start: where it begins. What the cache holds from there on were wrong guesses, to be forgotten first.
    """

    tokens: list[int]
    start: int
    guesses: int = 0


Speech = Generator[Part, Float32Array | None, Turn]
"""Yields each part to be read, is sent the logits f32 [1 + guesses, vocabulary] after the last token that is
no guess and after each guess, and returns the turn."""


def speak(
    prompt: Sequence[int],
    constraint: Constraint,
    reused: int,
    draft: Sequence[int] = (),
    onward: Sequence[int] = (),
    first: Float32Array | None = None,
) -> Speech:
    """The turn of `generate` as what is to be read, for one that reads it: alone, or with other turns.

    reused: tokens that the cache holds already. The rest is as `generate` has it.
    """
    cursor = constraint.start()
    pending, answer = list(prompt), list[int]()
    calls = drafted = accepted = 0
    length = reused
    while not cursor.done:
        forced = cursor.forced()
        if forced:
            for token in forced:
                cursor.advance(token)
            answer.extend(forced)
            pending.extend(forced)
            continue
        guess = list[int]()
        if first is not None and not pending:
            rows = first[None]
        else:
            guess, whole = _allowed_part(cursor, draft[len(answer) :], bool(onward))
            more = [*guess, *onward] if whole else guess
            logits = yield Part([*pending, *more], length, len(more))
            assert logits is not None
            rows, calls, length = logits, calls + 1, length + len(pending)
        first, drafted = None, drafted + len(guess)
        for expected, row in zip(guess, rows, strict=False):
            token = best(row, cursor.allowed())
            cursor.advance(token)
            answer.append(token)
            if token != expected:
                break
            accepted, length = accepted + 1, length + 1
        else:
            if cursor.done:  # the guess was right to the end, and what comes after it has been read
                ahead, length = rows[-1].copy(), length + len(onward)
                return Turn(tuple(answer), (), calls, reused, length, drafted, accepted, ahead)
            token = best(rows[len(guess)], cursor.allowed())
            cursor.advance(token)
            answer.append(token)
        pending, draft = [token], ()
    return Turn(tuple(answer), tuple(pending), calls, reused, length, drafted, accepted)


def _allowed_part(cursor: Cursor, draft: Sequence[int], to_the_end: bool) -> tuple[list[int], bool]:
    """The beginning of ``draft`` that is allowed from here on, and whether it completes the answer.

    It stops short of the last token unless ``to_the_end``: where nothing is read beyond, that token would be
    read for nothing.
    """
    ahead, part = replace(cursor), list[int]()
    for token in draft:
        if token not in ahead.allowed():
            break
        ahead.advance(token)
        if ahead.done:
            return ([*part, token], True) if to_the_end else (part, False)
        part.append(token)
    return part, False


def best(logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.int64]) -> int:
    """The allowed id (ascending, int64 [n]) of the highest logit; the lowest such id on a tie."""
    first, last = int(allowed[0]), int(allowed[-1])
    if last - first + 1 == len(allowed):  # a run of neighbours, such as the location tokens: no gather
        return first + int(logits[first : last + 1].argmax())
    return int(allowed[logits[allowed].argmax()])
