"""Branches of a conversation on onnxruntime: one block and one cache for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.manifest import Shapes
from ppcr.tensors import RowTable
from runtime.branches import LaidOut, Layout
from runtime.onnxruntime_library import Binding, Session, Value, floats_of
from runtime.positions import Tables
from runtime.session import Float32Array

# Keys and values of the tokens held, f32 [1, kv_heads, length, head_dim], by ("k" or "v", layer).
Snapshot = dict[tuple[str, int], npt.NDArray[Any]]


class OnnxBranches(LaidOut):
    """`runtime.session.Branches` on a cache of its own, which grows with what is said.

    Args:
        decoders: for blocks, and for a single token. trunk: keys and values that all branches begin with.
        count: of branches.
    """

    def __init__(
        self,
        decoders: tuple[Session, Session],
        shapes: Shapes,
        tables: Tables,
        embedding: Float32Array | RowTable,
        image_token: int,
        trunk: Snapshot,
        count: int,
    ) -> None:
        self._shapes, self._tables = shapes, tables
        self._embedding, self._image_token = embedding, image_token
        self._floats = floats_of(decoders[0])
        held = next(iter(trunk.values())).shape[2]
        self._layout = Layout(count, held, len(tables.cos))
        self._cache = trunk
        self._logits = np.zeros((count, shapes.vocabulary), np.float32)
        self._bindings: list[tuple[Session, Binding]] = [(one, one.io_binding()) for one in decoders]

    def extend(
        self, parts: Mapping[int, Sequence[int]], guesses: Mapping[int, int] | None = None
    ) -> Float32Array:
        """Read on in some branches; logits f32 [sum of 1 + guesses, vocabulary] at the end of each part."""
        if any(self._image_token in tokens for tokens in parts.values()):
            raise ValueError("image tokens belong to what all branches begin with")
        block = self._layout.place(parts, guesses)
        self._reserve(block.start, block.mask.shape[1])
        count, tables = len(block.ids), self._tables
        session, binding = self._bindings[count == 1]
        if len(block.last) > len(self._logits):
            self._logits = np.zeros((len(block.last), self._shapes.vocabulary), np.float32)
        answer = self._logits[: len(block.last)]
        added = np.zeros((1, count, self._shapes.hidden), self._floats)
        fed = {
            "inputs_embeds": self._embedding[block.ids][None].astype(self._floats, copy=False),
            "rope_cos": tables.cos[block.positions][None].astype(self._floats, copy=False),
            "rope_sin": tables.sin[block.positions][None].astype(self._floats, copy=False),
            "write_indices": np.asarray([block.start], np.int64),
            "attn_mask": block.mask[None, None],
            "logits_index": block.last,
            **{f"deepstack_{level}": added for level in range(self._shapes.deepstack)},
        }
        for name, array in fed.items():
            binding.bind_cpu_input(name, array)
        binding.bind_ortvalue_output("logits", Value.ortvalue_from_numpy(answer[None]))
        session.run_with_iobinding(binding)
        return answer

    def _reserve(self, used: int, slots: int) -> None:
        """A cache of ``slots``, of which the first ``used`` hold what they held."""
        if next(iter(self._cache.values())).shape[2] == slots:
            return
        shapes = self._shapes
        for place, held in self._cache.items():
            # Zeros, not garbage: a masked position still meets a weight of 0, and 0 times NaN is NaN.
            memory = np.zeros((1, shapes.kv_heads, slots, shapes.head_dim), self._floats)
            memory[:, :, :used] = held[:, :, :used]
            self._cache[place] = memory
            value, (kind, layer) = Value.ortvalue_from_numpy(memory), place
            for _, binding in self._bindings:
                binding.bind_ortvalue_input(f"{kind}_cache_{layer}", value)
                binding.bind_ortvalue_output(f"{kind}_cache_out_{layer}", value)
