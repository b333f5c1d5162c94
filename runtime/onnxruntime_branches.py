"""Branches of a conversation on onnxruntime: one block and one cache for all of them."""

from __future__ import annotations

import numpy as np

from runtime.branches import Block
from runtime.host_branches import HostBranches
from runtime.host_context import Cache, HostDecoder
from runtime.onnxruntime_library import Binding, Session, Value, floats_of
from runtime.session import Float32Array


class OnnxBranches(HostBranches):
    """`runtime.session.Branches` on a cache of its own.

    Args:
        decoders: for blocks, and for a single token. The rest is as `HostBranches` has it.
    """

    def __init__(
        self, decoders: tuple[Session, Session], host: HostDecoder, trunk: Cache, count: int
    ) -> None:
        super().__init__(host, trunk, count, floats_of(decoders[0]))
        self._logits = np.zeros((count, self._shapes.vocabulary), np.float32)
        self._bindings: list[tuple[Session, Binding]] = [(one, one.io_binding()) for one in decoders]

    def _read(self, block: Block) -> Float32Array:
        count, tables = len(block.ids), self._tables
        session, binding = self._bindings[count == 1]
        if len(block.last) > len(self._logits):
            self._logits = np.zeros((len(block.last), self._shapes.vocabulary), np.float32)
        answer = self._logits[: len(block.last)]
        added = np.zeros((1, count, self._shapes.hidden), self._floats)
        fed = {
            "inputs_embeds": self._host.embedding[block.ids][None].astype(self._floats, copy=False),
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

    def _hold(self) -> None:
        for (kind, layer), memory in self._cache.items():
            value = Value.ortvalue_from_numpy(memory)
            for _, binding in self._bindings:
                binding.bind_ortvalue_input(f"{kind}_cache_{layer}", value)
                binding.bind_ortvalue_output(f"{kind}_cache_out_{layer}", value)
