"""A KV cache on the GPU and both ways to extend it: one token as a CUDA graph, and blocks of any length."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppcr.errors import EngineError
from ppcr.manifest import Shapes
from runtime.device import DeviceMemory, Event, Graph, PinnedArray, Stream
from runtime.positions import Tables
from runtime.session import Float32Array
from runtime.tensorrt_engine import Context, Engine

_STEP, _BLOCK = 0, 1  # optimization profiles of the decoder
_ROWS = ("inputs_embeds", "rope_cos", "rope_sin", "attn_mask")


@dataclass(frozen=True)
class DeviceFeatures:
    """Image features on the GPU by tensor name, and the mark behind which they are there.

    tokens: of the MLLM, that the image takes; 0 for the segmenter's.
    """

    memory: dict[str, DeviceMemory]
    ready: Event
    tokens: int = 0


class Slot:
    """A KV cache and both ways to extend it, bound once: the step as a CUDA graph, blocks of any length.

    Attributes:
        tables: of the image size of the conversation that has the slot; read on the host alone.
    """

    def __init__(self, decoder: Engine, shapes: Shapes, tables: Tables, stream: Stream) -> None:
        self._shapes, self.tables, self._stream = shapes, tables, stream
        self.logits = PinnedArray((1, 1, shapes.vocabulary), np.float32)
        self._answer = decoder.memory("logits")
        # Zeros, not garbage: a masked position still meets a weight of 0, and 0 times NaN is NaN.
        self.caches = {
            f"{kind}_cache{{}}_{layer}": decoder.memory(f"{kind}_cache_{layer}", zeroed=True)
            for layer in range(shapes.layers)
            for kind in "kv"
        }
        self._itemsize = decoder.tensors["k_cache_0"].itemsize
        length, half = shapes.max_length, shapes.head_dim // 2
        width = {
            "inputs_embeds": (shapes.hidden, np.float32),
            "rope_cos": (half, np.float32),
            "rope_sin": (half, np.float32),
            "attn_mask": (length, np.bool_),
        }
        # One set of rows serves both ways: a step uses the first row of each.
        self._rows = {name: PinnedArray((length, size), kind) for name, (size, kind) in width.items()}
        # DeepStack adds nothing to text: these stay zero on the host, and an image's rows come on the GPU.
        nothing = PinnedArray((length, shapes.hidden), np.float32) if shapes.deepstack else None
        self._levels = [f"deepstack_{level}" for level in range(shapes.deepstack)]
        if nothing is not None:
            self._rows |= dict.fromkeys(self._levels, nothing)
        self._numbers = {name: PinnedArray((1,), np.int64) for name in ("write_indices", "logits_index")}
        pinned = {**self._rows, **self._numbers}
        self._inputs = {name: DeviceMemory(memory.array.nbytes) for name, memory in pinned.items()}
        self._one, self._many = self._bind(decoder, _STEP), self._bind(decoder, _BLOCK)
        self._shape(self._one, 1)
        self._graph = self._capture()

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._shapes.max_length

    def step(self, embedding: Float32Array, start: int) -> None:
        """Queue the run of one token at position ``start``; its embedding is f32 [hidden]."""
        self._fill(embedding[None], start)
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._queue_step()

    def block(
        self,
        embeddings: Float32Array,
        start: int,
        places: npt.NDArray[np.int64],
        features: DeviceFeatures | None,
    ) -> None:
        """Queue the run of a block f32 [S, hidden] from ``start``; ``features`` go to rows ``places``."""
        count = len(embeddings)
        self._fill(embeddings, start)
        self._shape(self._many, count)
        self._upload(count)
        if features is not None:
            self._stream.after(features.ready)
            self._place("inputs_embeds", features.memory["image_features"], places)
            for level in self._levels:
                self._place(level, features.memory[level], places)
        self._many.run()
        self._download()

    def _place(self, name: str, source: DeviceMemory, places: npt.NDArray[np.int64]) -> None:
        """Queue copies of the rows of ``source`` to ``places`` of the input ``name``."""
        row, target = self._rows[name].array[0].nbytes, self._inputs[name].address
        # Image tokens follow each other: one copy for each run of neighbours.
        for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1):
            first, count = int(run[0]), len(run)
            self._stream.move(target + int(places[first]) * row, source.address + first * row, count * row)

    def snapshot(self, length: int) -> list[DeviceMemory]:
        """Copies of the keys and values of the first ``length`` tokens, [kv_heads, length, head_dim] each."""
        row = self._shapes.head_dim * self._itemsize
        held = []
        for cache in self.caches.values():
            copy = DeviceMemory(self._shapes.kv_heads * length * row)
            self._copy(copy.address, length * row, cache.address, self._shapes.max_length * row, length * row)
            held.append(copy)
        self._stream.wait()
        return held

    def restore(self, snapshot: list[DeviceMemory], length: int) -> None:
        """Begin with the keys and values of ``length`` tokens of `snapshot`."""
        row = self._shapes.head_dim * self._itemsize
        for cache, copy in zip(self.caches.values(), snapshot, strict=True):
            self._copy(cache.address, self._shapes.max_length * row, copy.address, length * row, length * row)

    def _copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int) -> None:
        self._stream.move_rows(target, target_pitch, source, source_pitch, width, self._shapes.kv_heads)

    def _bind(self, decoder: Engine, profile: int) -> Context:
        context = decoder.context(self._stream, profile)
        for name, memory in self._inputs.items():
            context.bind(name, memory.address)
        for name, memory in self.caches.items():
            # The same address as input and output: the cache is updated in place.
            context.bind(name.format(""), memory.address)
            context.bind(name.format("_out"), memory.address)
        context.bind("logits", self._answer.address)
        return context

    def _shape(self, context: Context, count: int) -> None:
        for name, memory in self._rows.items():
            width = memory.array.shape[1]
            context.shape(name, (1, 1, count, width) if name == "attn_mask" else (1, count, width))

    def _fill(self, embeddings: Float32Array, start: int) -> None:
        count, tables = len(embeddings), self.tables
        rows = slice(start, start + count)
        values = (embeddings, tables.cos[rows], tables.sin[rows], tables.mask[rows])
        for name, value in zip(_ROWS, values, strict=True):
            self._rows[name].array[:count] = value
        self._numbers["write_indices"].array[0] = start
        self._numbers["logits_index"].array[0] = count - 1

    def _upload(self, count: int) -> None:
        for name, memory in self._rows.items():
            self._stream.upload(self._inputs[name].address, memory.address, memory.array[:count].nbytes)
        for name, memory in self._numbers.items():
            self._stream.upload(self._inputs[name].address, memory.address, memory.array.nbytes)

    def _download(self) -> None:
        self._stream.download(self.logits.address, self._answer.address, self.logits.array.nbytes)

    def _queue_step(self) -> None:
        self._upload(1)
        self._one.run()
        self._download()

    def _capture(self) -> Graph | None:
        # The first run prepares what a capture may not: TensorRT finishes kernels and takes memory then. It
        # writes position 0, which every conversation writes again.
        self._fill(np.zeros((1, self._shapes.hidden), np.float32), 0)
        self._queue_step()
        self._stream.wait()
        try:
            return self._stream.capture(self._queue_step)
        except EngineError as error:
            warnings.warn(
                f"the decoding step runs without a CUDA graph: {error}", RuntimeWarning, stacklevel=2
            )
            return None
