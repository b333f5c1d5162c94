"""What the MLLM may answer: segments that step token by token and print themselves as a regular expression.

Used by every backend: the session-level decoder asks it which tokens are forced (fed as one block, no
choice to make) and which are allowed; turn-level engines (TensorRT-LLM) take its regex.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Literal:
    """These tokens, in this order: no forward pass decides them."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(len(self.tokens) > 0, "a literal needs a token")


@dataclass(frozen=True)
class Choice:
    """Exactly one of ``tokens``."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(len(self.tokens) > 0, "a choice needs a token")

    @cached_property
    def ids(self) -> Ids:
        """``tokens`` as ascending int64 [n]."""
        return np.unique(np.asarray(self.tokens, np.int64))


@dataclass(frozen=True)
class Free:
    """One to ``max_tokens`` of ``tokens``, then the ``stop`` token (forced when the length is reached)."""

    tokens: tuple[int, ...]
    stop: int
    max_tokens: int

    def __post_init__(self) -> None:
        _require(len(self.tokens) > 0 and self.max_tokens > 0, "a free field needs a token and room for it")
        _require(self.stop not in self.tokens, "a free field cannot hold its own stop token")

    @cached_property
    def first_ids(self) -> Ids:
        """Ascending int64 [n]: what may come first; a free field cannot be empty."""
        return np.unique(np.asarray(self.tokens, np.int64))

    @cached_property
    def later_ids(self) -> Ids:
        """Ascending int64 [n]: what may come from the second position on, the stop token included."""
        return np.unique(np.asarray((*self.tokens, self.stop), np.int64))


@dataclass(frozen=True)
class Number(Free):
    """A free field of digits."""


Segment = Literal | Choice | Free


def _longest(segment: Segment) -> int:
    if isinstance(segment, Free):
        return segment.max_tokens + 1
    return len(segment.tokens) if isinstance(segment, Literal) else 1


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


@dataclass(frozen=True)
class Constraint:
    """A sequence of segments over token ids. ``start()`` gives a fresh cursor."""

    segments: tuple[Segment, ...]

    def start(self) -> Cursor:
        """A cursor at the first token; cursors do not share what they have read."""
        return Cursor(self.segments)

    @property
    def max_tokens(self) -> int:
        """Length of the longest answer in tokens."""
        return sum(_longest(segment) for segment in self.segments)

    def regex(self, decode: Callable[[Sequence[int]], str]) -> str:
        """A regular expression of the answer's text, for engines with guided decoding."""
        parts = []
        for segment, run in itertools.groupby(self.segments):
            times = len(list(run))
            if isinstance(segment, Literal):
                part = f"(?:{re.escape(decode(segment.tokens))})"
            elif isinstance(segment, Choice):
                part = f"(?:{'|'.join(re.escape(decode([t])) for t in segment.tokens)})"
            elif isinstance(segment, Number):
                part = f"(?:[0-9]{{1,{segment.max_tokens}}}{re.escape(decode([segment.stop]))})"
            else:
                stop = re.escape(decode([segment.stop]))
                part = f"(?:[^{stop}<]+{stop})"
            parts.append(part if times == 1 else f"{part}{{{times}}}")
        return "".join(parts)


@dataclass
class Cursor:
    """Position inside a constraint. Ask ``forced()``, else ``allowed()``, then ``advance(token)``."""

    segments: tuple[Segment, ...]
    index: int = 0
    inside: int = 0

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self.index >= len(self.segments)

    def forced(self) -> tuple[int, ...]:
        """The tokens that must come next whatever the model says (may be empty)."""
        out: list[int] = []
        index, inside = self.index, self.inside
        while index < len(self.segments):
            segment = self.segments[index]
            if isinstance(segment, Literal):
                out.extend(segment.tokens[inside:])
            elif isinstance(segment, Choice) and len(segment.ids) == 1:
                out.append(segment.tokens[0])
            elif isinstance(segment, Free) and inside >= segment.max_tokens:
                out.append(segment.stop)
            else:
                break
            index, inside = index + 1, 0
        return tuple(out)

    def allowed(self) -> Ids:
        """Ascending int64 [n] ids that may come next (at least one unless done); not to be written to."""
        if self.done:
            return np.zeros(0, np.int64)
        segment = self.segments[self.index]
        if isinstance(segment, Choice):
            return segment.ids
        if isinstance(segment, Literal):
            return np.asarray([segment.tokens[self.inside]], np.int64)
        if self.inside >= segment.max_tokens:
            return np.asarray([segment.stop], np.int64)
        return segment.later_ids if self.inside else segment.first_ids

    def advance(self, token: int) -> None:
        """Take one token.

        Raises:
            ValueError: the token is not allowed here.
        """
        allowed = self.allowed()
        place = int(allowed.searchsorted(token))
        if place == len(allowed) or allowed[place] != token:
            raise ValueError(f"token {token} is not allowed at segment {self.index}")
        segment = self.segments[self.index]
        self.inside += 1
        finished = (
            (isinstance(segment, Literal) and self.inside == len(segment.tokens))
            or isinstance(segment, Choice)
            or (isinstance(segment, Free) and token == segment.stop)
        )
        if finished:
            self.index, self.inside = self.index + 1, 0
