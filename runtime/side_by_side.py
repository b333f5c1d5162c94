"""Several conversations at once: each forward call reads for all that have not finished.

A conversation goes at its own pace: one may be at its boxes while another still describes its target, and
one that ends leaves the next call to the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ppcr.constraint import Constraint
from runtime.generation import Part, Speech, Turn, speak
from runtime.session import Branches, Float32Array
from runtime.timing import Stopwatch

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Ask:
    """One turn to be had.

    Attributes:
        stage: what its time counts as. tokens: what is read before the answer.
        constraint: what may be answered.
        afresh: the tokens follow the image; otherwise they follow the turn before.
        draft, onward, first: as `runtime.generation.generate` has them.
    """

    stage: str
    tokens: tuple[int, ...]
    constraint: Constraint
    afresh: bool = False
    draft: tuple[int, ...] = ()
    onward: tuple[int, ...] = ()
    first: Float32Array | None = None


Conversation = Generator[Ask, Turn | None, _Answer]
"""Yields each turn it wants, is sent the turn that was had, and returns what it made of them."""


class _Row(Generic[_Answer]):
    """A conversation on its branch. ``part``: what it wants read next; None when it has its ``answer``."""

    def __init__(self, conversation: Conversation[_Answer], branches: Branches, branch: int) -> None:
        self._conversation, self._branches, self._branch = conversation, branches, branch
        self._speech: Speech
        self.stage = ""
        self.part: Part | None = None
        self.answer: _Answer
        self._ask(None)

    def hear(self, logits: Float32Array | None) -> None:
        """Go on with the logits after ``part``."""
        try:
            self.part = self._speech.send(logits)
            self._branches.truncate(self._branch, self.part.start)
        except StopIteration as end:
            self._branches.truncate(self._branch, end.value.length)
            self._ask(end.value)

    def _ask(self, turn: Turn | None) -> None:
        try:
            ask = self._conversation.send(turn)
        except StopIteration as end:
            self.part, self.answer = None, end.value
            return
        self.stage = ask.stage
        length = self._branches.length(self._branch)
        self._speech = speak(ask.tokens, ask.constraint, length, ask.draft, ask.onward, ask.first)
        self.hear(None)


def converse(
    branches: Branches,
    conversations: Sequence[Conversation[_Answer]],
    watches: Sequence[Stopwatch],
    meanwhile: Callable[[], None],
) -> list[_Answer]:
    """Have all ``conversations``, each on the branch of its number; their answers.

    The time of a forward call is shared out equally among those it reads for. ``meanwhile`` is called once,
    after the first.
    """
    rows = [_Row(one, branches, branch) for branch, one in enumerate(conversations)]
    calls = 0
    while waiting := {branch: row.part for branch, row in enumerate(rows) if row.part is not None}:
        start = time.perf_counter()
        stages = [rows[branch].stage for branch in waiting]
        logits = branches.extend(
            {branch: part.tokens for branch, part in waiting.items()},
            {branch: part.guesses for branch, part in waiting.items()},
        )
        calls += 1
        if calls == 1:
            meanwhile()
        first = 0
        for branch, part in waiting.items():
            rows[branch].hear(logits[first : first + 1 + part.guesses])
            first += 1 + part.guesses
        share = (time.perf_counter() - start) / len(waiting)
        for branch, stage in zip(waiting, stages, strict=True):
            watches[branch].add(stage, share, share)
    return [row.answer for row in rows]
