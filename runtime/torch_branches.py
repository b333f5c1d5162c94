"""Branches of a conversation in torch: one block and one cache for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from runtime.branches import LaidOut, Layout
from runtime.session import Float32Array
from runtime.torch_decoder import DeviceTables

if TYPE_CHECKING:
    from runtime.torch_session import TorchMLLM


class TorchBranches(LaidOut):
    """`runtime.session.Branches` on a cache of its own, which grows with what is said."""

    def __init__(self, session: TorchMLLM, trunk: Tensor, tables: DeviceTables, count: int) -> None:
        self._session, self._cache, self._tables = session, trunk, tables
        self._layout = Layout(count, trunk.shape[3], len(tables.cos))

    def extend(
        self, parts: Mapping[int, Sequence[int]], guesses: Mapping[int, int] | None = None
    ) -> Float32Array:
        """Read on in some branches; logits f32 [sum of 1 + guesses, vocabulary] at the end of each part."""
        block = self._layout.place(parts, guesses)
        logits, self._cache = self._session.run_branches(block, self._cache, self._tables)
        return logits
