"""Conversations side by side in one KV cache: where each token stands, and what it sees.

They go on from one image. The cache's first slots hold the trunk, what all branches begin with: the system
turn and the image. Behind it every token that is read takes the next slot, of whichever branch it is; the
attention mask gives each token the trunk and its own branch, and its position counts these alone. So the
image's keys and values are held once, nothing is padded, and one forward call reads for as many branches as
have something to say.

What branches have in common they read together: a token whose whole past is that of another one shares its
slot. Questions often begin alike, and the same question asked twice costs nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.positions import BoolArray, Int64Array

_CACHE_STEP = 64
_TRUNK = -1


@dataclass(frozen=True)
class Block:
    """The tokens of one forward call.

    Attributes:
        ids: int64 [S]. positions: int64 [S], the row of `runtime.positions.Tables` of each.
        start: slot of the first; the others follow.
        mask: bool [S, capacity], the slots that each may look at. The cache must have room for so many.
        last: int64 [n], the tokens of the block whose logits are wanted: of each branch that reads the one
            that ends its part, after those before it that were asked for.
    """

    ids: Int64Array
    positions: Int64Array
    start: int
    mask: BoolArray
    last: Int64Array

    @property
    def end(self) -> int:
        """The first free slot once the block is read."""
        return self.start + len(self.ids)


class Layout:
    """Who stands where.

    Args:
        count: of branches. trunk: tokens that all begin with. limit: tokens that a branch may have in all.
    """

    def __init__(self, count: int, trunk: int, limit: int) -> None:
        if count < 1:
            raise ValueError(f"{count} branches: at least one is needed")
        self._limit, self._free = limit, trunk
        self._trunk = trunk
        # The slots of each branch's own tokens, and that of a token by the one before it.
        self._own: list[list[int]] = [[] for _ in range(count)]
        self._slots: dict[tuple[int, int], int] = {}
        self._sees = np.zeros((count, trunk), np.bool_)
        self._sees[:, :trunk] = True

    def length(self, branch: int) -> int:
        """Tokens of a branch, the trunk's included."""
        return self._trunk + len(self._own[branch])

    def truncate(self, branch: int, length: int) -> None:
        """Forget a branch from position ``length`` on; others keep what they share with it."""
        if not self._trunk <= length <= self.length(branch):
            raise ValueError(f"cannot truncate a branch of {self.length(branch)} tokens to {length}")
        own = self._own[branch]
        self._sees[branch, own[length - self._trunk :]] = False
        del own[length - self._trunk :]

    def place(self, parts: Mapping[int, Sequence[int]], guesses: Mapping[int, int] | None = None) -> Block:
        """Give the next tokens of some branches, by branch, their slots.

        ``guesses`` are as in `runtime.session.Branches.extend`. Raises ValueError, before anything is placed,
        when there is nothing to read, too much for a branch, or nothing but guesses.
        """
        wanted = guesses or {}
        for branch, tokens in parts.items():
            held = self.length(branch)
            if not wanted.get(branch, 0) < len(tokens) <= self._limit - held:
                told = f"{len(tokens)} tokens do not fit after {held} of a context of {self._limit}"
                raise ValueError(told)
        if not parts:
            raise ValueError("no branch has anything to read")
        start, most = self._free, sum(map(len, parts.values()))
        self._make_room(start + most)
        ids, positions = np.zeros((2, most), np.int64)
        mask = np.zeros((most, self._sees.shape[1]), np.bool_)
        last = []
        for branch, tokens in parts.items():
            sees, own = self._sees[branch], self._own[branch]
            asked = len(tokens) - wanted.get(branch, 0)
            for at, token in enumerate(tokens, 1):
                before = own[-1] if own else _TRUNK, int(token)
                slot = self._slots.get(before)
                # Whose logits are asked for is read again where an earlier call has read it.
                if slot is None or (at >= asked and slot < start):
                    slot, self._slots[before] = self._free, self._free
                    self._free += 1
                    ids[slot - start], positions[slot - start] = token, self.length(branch)
                    mask[slot - start] = sees
                    mask[slot - start, slot] = True
                sees[slot] = True
                own.append(slot)
                if at >= asked:
                    last.append(slot - start)
        count = self._free - start
        return Block(ids[:count], positions[:count], start, mask[:count], np.asarray(last, np.int64))

    def _make_room(self, slots: int) -> None:
        count, held = self._sees.shape
        if slots > held:
            # Attention looks at the whole cache, and growing copies it: half as much again is between both.
            wider = -(-slots * 3 // (2 * _CACHE_STEP)) * _CACHE_STEP
            self._sees = np.concatenate([self._sees, np.zeros((count, wider - held), np.bool_)], axis=1)


class LaidOut:
    """What `runtime.session.Branches` of every engine share: their tokens are counted in ``_layout``."""

    _layout: Layout

    def length(self, branch: int) -> int:
        """Tokens of a branch, the image's and all before it included."""
        return self._layout.length(branch)

    def truncate(self, branch: int, length: int) -> None:
        """Forget everything of a branch from position ``length`` on."""
        self._layout.truncate(branch, length)
