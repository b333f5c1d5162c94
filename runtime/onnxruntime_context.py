"""A conversation on onnxruntime: bound buffers, a KV cache updated in place, no allocation per step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.manifest import Shapes
from ppcr.tensors import RowTable
from runtime.contexts import FilledContext
from runtime.onnxruntime_branches import OnnxBranches, Snapshot
from runtime.onnxruntime_library import Binding, Session, Value, floats_of
from runtime.positions import Tables
from runtime.session import Float32Array

# Tokens of text up to which a block has the threads of a step: the image encoder may be at work beside it,
# and threads that wait for a processor take longer than they save.
_FEW = 16


class OnnxContext(FilledContext):
    """`runtime.session.Context`: two sets of bindings over one KV cache, for single tokens and for blocks.

    The cache is bound as input and as output, so that it is updated in place. For single tokens every buffer
    is bound once and filled in place; for blocks the inputs that carry the block's length are bound anew, as
    views of buffers that already exist.
    """

    def __init__(
        self,
        decoders: tuple[Session, Session],
        shapes: Shapes,
        tables: Tables,
        embedding: Float32Array | RowTable,
        image_token: int,
        length: int,
    ) -> None:
        self._decoder, self._stepper = decoders
        self._embedding, self._image_token = embedding, image_token
        self._capacity, self._shapes, self._tables = length, shapes, tables
        half = shapes.head_dim // 2
        self._logits = np.zeros((1, 1, shapes.vocabulary), np.float32)
        self._at, self._last = np.zeros(1, np.int64), np.zeros(1, np.int64)
        floats = floats_of(self._decoder)
        self._cos, self._sin = tables.cos.astype(floats, copy=False), tables.sin.astype(floats, copy=False)
        self._embeds = np.zeros((length, shapes.hidden), floats)
        self._levels = np.zeros((shapes.deepstack, length, shapes.hidden), floats)
        nothing = np.zeros((1, 1, shapes.hidden), floats)
        self._step = {
            "inputs_embeds": np.zeros((1, 1, shapes.hidden), floats),
            "rope_cos": np.zeros((1, 1, half), floats),
            "rope_sin": np.zeros((1, 1, half), floats),
            "attn_mask": np.zeros((1, 1, 1, length), np.bool_),
            "logits_index": np.zeros(1, np.int64),
            **{f"deepstack_{level}": nothing for level in range(shapes.deepstack)},
        }
        self._mask = tables.mask if length == len(tables.mask) else tables.mask[:length, :length].copy()
        # Zeros, not garbage: a masked position still meets a weight of 0, and 0 times NaN is NaN.
        self._cache = {
            (kind, layer): np.zeros((1, shapes.kv_heads, length, shapes.head_dim), floats)
            for layer in range(shapes.layers)
            for kind in "kv"
        }
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

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._capacity

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
        return OnnxBranches(
            (self._decoder, self._stepper), self._shapes, self._tables, self._embedding, self._image_token,
            self.snapshot(), count,
        )  # fmt: skip

    def snapshot(self) -> Snapshot:
        """Copies of the keys and values held."""
        return {place: memory[:, :, : self._length].copy() for place, memory in self._cache.items()}

    def restore(self, snapshot: Snapshot, length: int) -> None:
        """Begin with the keys and values of ``length`` tokens that another context has computed."""
        for place, memory in self._cache.items():
            memory[:, :, :length] = snapshot[place]
        self._length = length

    def extend(self, token_ids: Sequence[int], features: Float32Array | None = None) -> Float32Array:
        """Run a block; logits f32 [vocabulary] after its last token, overwritten by the next call."""
        count, start = len(token_ids), self._begin(token_ids)
        if count == 1 and features is None and token_ids[0] != self._image_token:
            self._run_single(token_ids[0], start)
        else:
            self._last[0] = count - 1
            binding = self._few if count <= _FEW and features is None else self._block
            self._run_block(binding, np.asarray(token_ids, np.int64), start, features)
        self._length = start + count
        return self._logits[0, 0]

    def verify(
        self, token_ids: Sequence[int], guesses: int, features: Float32Array | None = None
    ) -> Float32Array:
        """Run a block; logits f32 [1 + guesses, vocabulary] after the last token that is no guess, and on."""
        count, start = len(token_ids), self._begin(token_ids)
        if not 0 <= guesses < count:
            raise ValueError(f"{guesses} guesses in a block of {count} tokens: one at least is none")
        answers = np.zeros((1, 1 + guesses, self._shapes.vocabulary), np.float32)
        self._block.bind_cpu_input("logits_index", np.arange(count - 1 - guesses, count))
        self._block.bind_ortvalue_output("logits", Value.ortvalue_from_numpy(answers))
        try:
            self._run_block(self._block, np.asarray(token_ids, np.int64), start, features)
        finally:
            self._block.bind_cpu_input("logits_index", self._last)
            self._block.bind_ortvalue_output("logits", self._answer)
        self._length = start + count
        return answers[0]

    def _begin(self, token_ids: Sequence[int]) -> int:
        """Where these tokens go. Raises ValueError when they do not fit."""
        count, start = len(token_ids), self._length
        if not 0 < count <= self._capacity - start:
            raise ValueError(f"{count} tokens do not fit after {start} of a context of {self._capacity}")
        self._at[0] = start
        return start

    def _run_single(self, token: int, start: int) -> None:
        step = self._step
        step["inputs_embeds"][0, 0] = self._embedding[token]
        step["rope_cos"][0, 0] = self._cos[start]
        step["rope_sin"][0, 0] = self._sin[start]
        step["attn_mask"][0, 0, 0] = self._mask[start]
        self._launch_step()

    def _run_block(
        self, binding: Binding, ids: npt.NDArray[np.int64], start: int, features: Float32Array | None
    ) -> None:
        count, rows = len(ids), slice(start, start + len(ids))
        embeds, levels = self._embeds[:count], self._levels[:, :count]
        embeds[:] = self._embedding[ids]
        levels[:] = 0
        places = np.flatnonzero(ids == self._image_token)
        held = 0 if features is None else features.shape[-2]
        if len(places) != held:
            raise ValueError(f"{len(places)} image tokens, but features of {held}")
        if features is not None:
            embeds[places] = features if features.ndim == 2 else features[0]
            levels[:, places] = features[1:] if features.ndim == 3 else 0
        binding.bind_cpu_input("inputs_embeds", embeds[None])
        binding.bind_cpu_input("rope_cos", self._cos[None, rows])
        binding.bind_cpu_input("rope_sin", self._sin[None, rows])
        for level, values in enumerate(levels):
            binding.bind_cpu_input(f"deepstack_{level}", values[None])
        binding.bind_cpu_input("attn_mask", self._mask[None, None, rows])
        self._launch_block(binding)
