"""A conversation on onnxruntime: bound buffers, a KV cache updated in place, no allocation per step."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.host_context import HostContext, HostDecoder
from runtime.onnxruntime_branches import OnnxBranches
from runtime.onnxruntime_library import Binding, Session, Value, floats_of
from runtime.positions import Int64Array
from runtime.session import Float32Array

# Tokens of text up to which a block has the threads of a step: the image encoder may be at work beside it,
# and threads that wait for a processor take longer than they save.
_FEW = 16


class OnnxContext(HostContext):
    """`runtime.session.Context`: two sets of bindings over one KV cache, for single tokens and for blocks.

    The cache is bound as input and as output, so that it is updated in place. For single tokens every buffer
    is bound once and filled in place; for blocks the inputs that carry the block's length are bound anew, as
    views of buffers that already exist.
    """

    def __init__(self, decoders: tuple[Session, Session], host: HostDecoder, length: int) -> None:
        self._decoder, self._stepper = decoders
        super().__init__(host, length, floats_of(self._decoder))
        self._last = np.zeros(1, np.int64)
        self._held = {place: self._value(memory) for place, memory in self._cache.items()}
        self._answer = self._value(self._logits)
        self._single, self._block = self._bind(self._stepper), self._bind(self._decoder)
        self._few = self._block if self._stepper is self._decoder else self._bind(self._stepper)
        self._fed = {name: self._value(buffer) for name, buffer in self._step.items()}
        self._fed["write_indices"] = self._value(self._at)
        for name, value in self._fed.items():
            self._single.bind_ortvalue_input(name, value)
        for binding in (self._block, self._few):
            binding.bind_cpu_input("write_indices", self._at)
            binding.bind_cpu_input("logits_index", self._last)

    def _value(self, array: npt.NDArray[Any]) -> Value:
        """``array`` for a binding: here its own memory, so that what is written into it is fed."""
        return Value.ortvalue_from_numpy(array)

    def _bind(self, session: Session) -> Binding:
        binding = session.io_binding()
        for (kind, layer), value in self._held.items():
            binding.bind_ortvalue_input(f"{kind}_cache_{layer}", value)
            binding.bind_ortvalue_output(f"{kind}_cache_out_{layer}", value)
        binding.bind_ortvalue_output("logits", self._answer)
        return binding

    def _launch_step(self) -> None:
        self._stepper.run_with_iobinding(self._single)

    def _launch_block(self, binding: Binding) -> None:
        session = self._decoder if binding is self._block else self._stepper
        session.run_with_iobinding(binding)

    @cached_property
    def can_branch(self) -> bool:
        """Whether the graph answers for several tokens of a block, on a cache of any length."""
        return self.can_verify and not self._is_fixed("k_cache_0", 2)

    @cached_property
    def can_verify(self) -> bool:
        """Whether the graph answers for several tokens of a block."""
        return not self._is_fixed("logits_index", 0)

    def _is_fixed(self, name: str, axis: int) -> bool:
        return any(
            value.name == name and isinstance(value.shape[axis], int) for value in self._decoder.get_inputs()
        )

    def branch(self, count: int) -> OnnxBranches:
        """``count`` conversations that begin with what this one holds, on a cache of their own."""
        return OnnxBranches((self._decoder, self._stepper), self._host, self.snapshot(), count)

    def _read_block(
        self, ids: Int64Array, start: int, features: Float32Array | None, answers: Float32Array | None
    ) -> None:
        count, rows = len(ids), slice(start, start + len(ids))
        few = answers is None and features is None and count <= _FEW
        binding = self._few if few else self._block
        embeds, levels = self._embed(ids, features)
        binding.bind_cpu_input("inputs_embeds", embeds[None])
        binding.bind_cpu_input("rope_cos", self._cos[None, rows])
        binding.bind_cpu_input("rope_sin", self._sin[None, rows])
        for level, values in enumerate(levels):
            binding.bind_cpu_input(f"deepstack_{level}", values[None])
        binding.bind_cpu_input("attn_mask", self._mask[None, None, rows])
        if answers is None:
            self._last[0] = count - 1
            self._launch_block(binding)
            return
        binding.bind_cpu_input("logits_index", np.arange(count - answers.shape[1], count))
        binding.bind_ortvalue_output("logits", Value.ortvalue_from_numpy(answers))
        try:
            self._launch_block(binding)
        finally:
            binding.bind_cpu_input("logits_index", self._last)
            binding.bind_ortvalue_output("logits", self._answer)
