"""Conversations of the MLLM: how much of a cache is filled, and caches that are lent and given back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from runtime.session import Features, Float32Array


class FilledContext:
    """What contexts with a KV cache of their own share: the tokens in it are counted here."""

    _length = 0

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on: the cache's rows are simply written again."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate a context of {self._length} tokens to {length}")
        self._length = length


class Slot(Protocol):
    """A cache, and what an engine has bound to it."""

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        ...


_Slot = TypeVar("_Slot", bound=Slot)
_Lent = TypeVar("_Lent", contravariant=True)


class Lender(Protocol[_Lent]):
    """The session that a slot belongs to."""

    def run(
        self, slot: _Lent, token_ids: Sequence[int], start: int, features: Features | None
    ) -> Float32Array:
        """One block of a conversation; logits f32 [vocabulary] after it."""
        ...

    def release(self, slot: _Lent) -> None:
        """A conversation ended: the next may have its cache."""
        ...


class SlotContext(FilledContext, Generic[_Slot]):
    """`runtime.session.Context` on a slot, which goes back when the conversation is forgotten."""

    def __init__(self, session: Lender[_Slot], slot: _Slot) -> None:
        self._session, self._slot = session, slot

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._slot.capacity

    def begin(self, length: int) -> None:
        """The slot's cache holds ``length`` tokens already."""
        self._length = length

    def extend(self, token_ids: Sequence[int], features: Features | None = None) -> Float32Array:
        """Run a block; logits f32 [vocabulary] after its last token, overwritten by the next call."""
        count, start = len(token_ids), self._length
        if not 0 < count <= self.capacity - start:
            raise ValueError(f"{count} tokens do not fit after {start} of a context of {self.capacity}")
        logits = self._session.run(self._slot, token_ids, start, features)
        self._length = start + count
        return logits

    def __del__(self) -> None:
        self._session.release(self._slot)
