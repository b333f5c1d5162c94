"""Branches of a conversation whose cache lies in the host's memory: what engines of CPUs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.branches import Block, LaidOut, Layout
from runtime.host_context import Cache, HostDecoder, empty_cache
from runtime.session import Float32Array


class HostBranches(LaidOut):
    """`runtime.session.Branches` on a cache of its own, which grows with what is said.

    An engine fills in `_read`, and `_hold` where it has to do something with a cache that was made anew.

    Args:
        trunk: keys and values that all branches begin with. count: of branches.
        floats: numpy's type of what the engine is fed.
    """

    def __init__(self, host: HostDecoder, trunk: Cache, count: int, floats: Any = np.float32) -> None:
        self._host, self._shapes, self._tables, self._floats = host, host.shapes, host.tables, floats
        self._layout = Layout(count, next(iter(trunk.values())).shape[2], len(host.tables.cos))
        self._cache = trunk

    def extend(
        self, parts: Mapping[int, Sequence[int]], guesses: Mapping[int, int] | None = None
    ) -> Float32Array:
        """Read on in some branches; logits f32 [sum of 1 + guesses, vocabulary] at the end of each part."""
        if any(self._host.image_token in tokens for tokens in parts.values()):
            raise ValueError("image tokens belong to what all branches begin with")
        block = self._layout.place(parts, guesses)
        self._reserve(block.start, block.mask.shape[1])
        return self._read(block)

    def _read(self, block: Block) -> Float32Array:
        """The logits f32 [n, vocabulary] after ``block.last``, its keys and values in the cache."""
        raise NotImplementedError

    def _hold(self) -> None:
        """Do what there is to do with a new cache: here nothing."""

    def _reserve(self, used: int, slots: int) -> None:
        """A cache of ``slots``, of which the first ``used`` hold what they held."""
        if next(iter(self._cache.values())).shape[2] == slots:
            return
        wider = empty_cache(self._shapes, slots, self._floats)
        for place, memory in wider.items():
            memory[:, :, :used] = self._cache[place][:, :, :used]
        self._cache = wider
        self._hold()
