"""What the MLLM may answer: segments that step token by token and print themselves as a regular expression.

Used by every backend: the session-level decoder asks it which tokens are forced (fed as one block, no
choice to make) and which are allowed; turn-level engines (TensorRT-LLM) take its regex.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Literal:
    """These tokens, in this order: no forward pass decides them."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """Exactly one of ``tokens``."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Free:
    """One to ``max_tokens`` of ``tokens``, then the ``stop`` token (forced when the length is reached)."""

    tokens: tuple[int, ...]
    stop: int
    max_tokens: int


Segment = Literal | Choice | Free


@dataclass(frozen=True)
class Constraint:
    """A sequence of segments over token ids. ``start()`` gives a fresh cursor."""

    segments: tuple[Segment, ...]

    def start(self) -> Cursor:
        return Cursor(self.segments)

    @property
    def max_tokens(self) -> int:
        """Length of the longest answer in tokens."""
        sizes = {Literal: lambda s: len(s.tokens), Choice: lambda s: 1, Free: lambda s: s.max_tokens + 1}
        return sum(sizes[type(s)](s) for s in self.segments)

    def regex(self, decode: Callable[[Sequence[int]], str]) -> str:
        """A regular expression of the answer's text, for engines with guided decoding."""
        parts = []
        for segment in self.segments:
            if isinstance(segment, Literal):
                parts.append(re.escape(decode(segment.tokens)))
            elif isinstance(segment, Choice):
                parts.append("(?:" + "|".join(re.escape(decode([t])) for t in segment.tokens) + ")")
            else:
                stop = decode([segment.stop])
                parts.append(f"[^{re.escape(stop)}<]+{re.escape(stop)}")
        return "".join(parts)


@dataclass
class Cursor:
    """Position inside a constraint. Ask ``forced()``, else ``allowed()``, then ``advance(token)``."""

    segments: tuple[Segment, ...]
    index: int = 0
    inside: int = 0
    _arrays: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def done(self) -> bool:
        return self.index >= len(self.segments)

    def forced(self) -> tuple[int, ...]:
        """The tokens that must come next whatever the model says (may be empty)."""
        out: list[int] = []
        index, inside = self.index, self.inside
        while index < len(self.segments):
            segment = self.segments[index]
            if isinstance(segment, Literal):
                out.extend(segment.tokens[inside:])
            elif isinstance(segment, Choice) and len(segment.tokens) == 1:
                out.append(segment.tokens[0])
            elif isinstance(segment, Free) and inside >= segment.max_tokens:
                out.append(segment.stop)
            else:
                break
            index, inside = index + 1, 0
        return tuple(out)

    def allowed(self) -> np.ndarray:
        """int64 [n] ids that may come next (at least one unless done)."""
        if self.done:
            return np.zeros(0, np.int64)
        segment = self.segments[self.index]
        if isinstance(segment, Literal):
            return np.asarray([segment.tokens[self.inside]], np.int64)
        if isinstance(segment, Free) and self.inside >= segment.max_tokens:
            return np.asarray([segment.stop], np.int64)
        # A free field cannot be empty: the stop token is offered from its second position on.
        key = 2 * self.index + (1 if isinstance(segment, Free) and self.inside else 0)
        if key not in self._arrays:
            tokens = segment.tokens + ((segment.stop,) if isinstance(segment, Free) and self.inside else ())
            self._arrays[key] = np.asarray(tokens, np.int64)
        return self._arrays[key]

    def advance(self, token: int) -> None:
        """Take one token.

        Raises:
            ValueError: the token is not allowed here.
        """
        if token not in self.allowed():
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
