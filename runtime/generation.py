"""Turn-level decoding: greedy, within a constraint, forced tokens without a forward pass of their own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppcr.constraint import Constraint
from runtime.session import Context, Features, Float32Array, TurnContext


@dataclass(frozen=True)
class Turn:
    """One answer and what it cost.

    Attributes:
        tokens: the answer's ids.
        unread: tokens of the conversation that are not in the cache yet: the end of the answer. The next turn
            begins with them, so that they cost no forward pass of their own.
        forward_calls: blocks run; fed_tokens: tokens in them; reused_tokens: tokens the cache already held.
    """

    tokens: tuple[int, ...]
    unread: tuple[int, ...]
    forward_calls: int
    fed_tokens: int
    reused_tokens: int


def generate(
    context: Context,
    prompt: Sequence[int],
    constraint: Constraint,
    *,
    features: Features | None = None,
    max_tokens: int | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Turn:
    """Feed ``prompt``, then decode the most likely answer that ``constraint`` allows, token by token.

    Tokens that are forced (literals, a choice of one, the end of a full field) are appended without asking
    the model; they are fed in one block together with whatever comes before the next decision. What follows
    the last decision is not fed at all. ``features`` belong to image tokens in ``prompt``. ``meanwhile`` is
    called once, after the first block: what it starts runs beside the steps, which leave processors idle.

    Raises:
        ValueError: the answer could be longer than ``max_tokens``, or the context is too short.
    """
    if max_tokens is not None and constraint.max_tokens > max_tokens:
        raise ValueError(f"the constraint allows {constraint.max_tokens} tokens, more than {max_tokens}")
    if isinstance(context, TurnContext):
        return context.answer(prompt, constraint, features=features, meanwhile=meanwhile)
    speech = speak(prompt, constraint, context.length)
    logits: Float32Array | None = None
    while True:
        try:
            block = speech.send(logits)
        except StopIteration as end:
            turn: Turn = end.value
            return turn
        logits, features = context.extend(block, features), None
        if meanwhile is not None:
            meanwhile()
            meanwhile = None


Speech = Generator[list[int], Float32Array | None, Turn]
"""Yields each block to be read, is sent the logits f32 [vocabulary] after it, and returns the turn."""


def speak(prompt: Sequence[int], constraint: Constraint, reused: int) -> Speech:
    """The turn of `generate` as what is to be read, for one that reads it: alone, or with other turns.

    reused: tokens that the cache holds already.
    """
    cursor = constraint.start()
    pending, answer = list(prompt), list[int]()
    calls = fed = 0
    while not cursor.done:
        forced = cursor.forced()
        if forced:
            for token in forced:
                cursor.advance(token)
            answer.extend(forced)
            pending.extend(forced)
            continue
        logits = yield pending
        assert logits is not None
        calls, fed = calls + 1, fed + len(pending)
        token = best(logits, cursor.allowed())
        cursor.advance(token)
        answer.append(token)
        pending = [token]
    return Turn(tuple(answer), tuple(pending), calls, fed, reused)


def best(logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.int64]) -> int:
    """The allowed id (ascending, int64 [n]) of the highest logit; the lowest such id on a tie."""
    first, last = int(allowed[0]), int(allowed[-1])
    if last - first + 1 == len(allowed):  # a run of neighbours, such as the location tokens: no gather
        return first + int(logits[first : last + 1].argmax())
    return int(allowed[logits[allowed].argmax()])
