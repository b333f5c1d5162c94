"""Blocks of the decoder's tokens on OpenVINO, in graphs of few sizes; their first layers in bfloat16.

A graph takes a fixed number of tokens, of which the last may hold none, and a cache of any length: products
then have shapes that are known when the graph is compiled, which makes it up to twice as fast. What a token
gets does not depend on the size of the graph that reads it, nor on the tokens beside it, to the last bit
(tested): so a larger one may stand in for one that is still being compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.manifest import Shapes
from runtime.host_context import Cache, empty_cache
from runtime.openvino_cut import BETWEEN
from runtime.openvino_decoder import BIAS, pairs_of, read_blocks, score_bias
from runtime.openvino_library import Compiled, Core, Orders, Tensor, compile_model
from runtime.positions import BoolArray, Int64Array
from runtime.session import Float32Array
from runtime.threads import Threads

SIZES = (16, 48, 96, 112)
"""Tokens of a graph. Longer blocks are read in parts: more rows make a product no faster."""
ANSWERS = 32
"""Tokens that a graph answers for; more than that, and it is one that answers for all."""
# Lengths of what is looked at are few: for each new one OpenVINO prepares a graph again.
_STEP = 32
# Up to here a block has the threads of a step: the image encoder may be at work beside it.
_SHORT = 16

Rows = dict[str, Float32Array]
"""Inputs of a block with a row for each of its tokens, f32 [S, …], by their names in the graph."""
_Kind = tuple[int, int]
"""The tokens that a graph takes, and those that it answers for."""


class BlockGraphs:
    """Reads blocks. Threads may share it.

    Args:
        path: the bundle's decoder, whose cache is of open length; shapes: the bundle's; threads: to use.
        bf16: False computes in float32 throughout.

    Raises:
        BundleError: it is not a decoder as the export writes them.
    """

    def __init__(self, path: Path, shapes: Shapes, threads: Threads, *, bf16: bool = True) -> None:
        self._path, self._shapes, self._threads, self._bf16 = path, shapes, threads, bf16
        self._core = Core()
        # Kept: what is compiled from one model shares its weights.
        self._models = read_blocks(self._core, path, shapes.layers)
        self._graphs = Orders(self._compile)
        self._foresees = False
        # The largest does for all, until there are others.
        self._graphs.order((SIZES[-1], ANSWERS)).result()

    def foresee(self) -> None:
        """From now on have graphs that would fit better made in the background, for blocks to come."""
        self._foresees = True

    def read(
        self, rows: Rows, cache: Cache, start: int, sees: BoolArray, wanted: Sequence[int] | Int64Array
    ) -> Float32Array:
        """Read a block into ``cache`` from slot ``start`` on.

        Args:
            rows: of its S tokens.
            sees: bool [S, start + S], the slots that each may look at.
            wanted: the tokens, ascending, after which logits are wanted.

        Returns:
            logits f32 [len(wanted), vocabulary].
        """
        count, most = len(sees), SIZES[-1]
        logits = np.empty((len(wanted), self._shapes.vocabulary), np.float32)
        places = np.asarray(wanted)
        for first in range(0, count, most):
            end = min(first + most, count)
            part = {name: array[first:end] for name, array in rows.items()}
            here = np.flatnonzero((first <= places) & (places < end))
            lent = self._lend(end - first, len(here))
            seen = sees[first:end, : start + end]
            logits[here] = lent.run(part, cache, start + first, seen, places[here] - first)
            lent.give_back()
        return logits

    def _lend(self, count: int, answers: int) -> _Reading:
        """The best graph that is ready, or the best one."""
        fits = _fitting(count, answers)
        if self._foresees:
            self._graphs.order(fits[0])
        ready = next((kind for kind in fits if self._graphs.is_ready(kind)), fits[0])
        return self._graphs.order(ready).result().lend()

    def _compile(self, kind: _Kind) -> _Graph:
        s, (size, answers) = self._shapes, kind
        cache = [1, s.kv_heads, -1, s.head_dim]
        shapes = {
            BETWEEN: [1, size, s.hidden],
            "inputs_embeds": [1, size, s.hidden],
            "rope_cos": [1, size, s.head_dim // 2],
            "rope_sin": [1, size, s.head_dim // 2],
            **{f"deepstack_{level}": [1, size, s.hidden] for level in range(s.deepstack)},
            BIAS: [1, 1, size, -1],
            "logits_index": [answers],
            **{f"{letter}_cache_{layer}": cache for layer in range(s.layers) for letter in "kv"},
        }
        threads = self._threads.step if size <= _SHORT else self._threads.decoder
        parts = []
        for model in self._models:
            taken = {given.any_name: shapes[given.any_name] for given in model.inputs}
            # The last part computes in float32.
            half = self._bf16 and model is not self._models[-1]
            parts.append(compile_model(self._core, model, self._path, threads, bf16=half, shapes=taken))
        return _Graph(parts, s, kind)


def _fitting(count: int, answers: int) -> list[_Kind]:
    """Graphs that take ``count`` tokens and answer for ``answers`` of them, the best one first."""
    return [(size, size if answers > ANSWERS else min(size, ANSWERS)) for size in SIZES if size >= count]


class _Graph:
    """A graph of one kind, and what it is read with when nobody else reads: making that takes a while."""

    def __init__(self, parts: list[Compiled], shapes: Shapes, kind: _Kind) -> None:
        self.parts, self.shapes, self.kind = parts, shapes, kind
        self.idle = [_Reading(self)]

    def lend(self) -> _Reading:
        try:
            return self.idle.pop()
        except IndexError:
            return _Reading(self)


class _Reading:
    """The requests of a graph, and the memory that they read and answer in. One thread at a time."""

    def __init__(self, graph: _Graph) -> None:
        self._graph = graph
        s, (self._size, answers) = graph.shapes, graph.kind
        self._requests = [part.create_infer_request() for part in graph.parts]
        self._tensors = dict[str, Tensor]()
        widths = {"inputs_embeds": s.hidden, "rope_cos": s.head_dim // 2, "rope_sin": s.head_dim // 2}
        widths |= {f"deepstack_{level}": s.hidden for level in range(s.deepstack)}
        self._rows = {name: np.zeros((1, self._size, width), np.float32) for name, width in widths.items()}
        self._last = np.zeros(answers, np.int64)
        self._logits = np.zeros((1, answers, s.vocabulary), np.float32)
        self._stored = np.zeros((2 * s.layers, s.kv_heads, self._size, s.head_dim), np.float32)
        self._bias = np.zeros((1, 1, self._size, 0), np.float32)
        self._shorts = dict[int, Cache]()
        self._bound: Cache | None = None
        self._names = [{value.any_name for value in (*part.inputs, *part.outputs)} for part in graph.parts]
        self._bind(
            {
                **self._rows,
                BETWEEN: np.zeros((1, self._size, s.hidden), np.float32),
                "logits_index": self._last,
                "logits": self._logits,
                **pairs_of(self._stored),
            }
        )

    def _bind(self, memory: dict[str, npt.NDArray[Any]]) -> None:
        for name, array in memory.items():
            self._tensors[name] = tensor = Tensor(array, shared_memory=True)
            for request, names in zip(self._requests, self._names, strict=True):
                if name in names:
                    request.set_tensor(name, tensor)

    def run(self, rows: Rows, cache: Cache, start: int, sees: BoolArray, wanted: Int64Array) -> Float32Array:
        """Read tokens into the cache; logits f32 [len(wanted), vocabulary], overwritten by the next run."""
        count = len(sees)
        for name, array in rows.items():
            self._rows[name][0, :count] = array
        self._last[: len(wanted)] = wanted
        past, seen = self._past(cache, sees[:, :start])
        if past is not self._bound:
            self._bind({f"{kind}_cache_{layer}": memory for (kind, layer), memory in past.items()})
            self._bound = past
        slots = _length(past) + self._size
        if self._bias.shape[-1] != slots:
            self._bias = np.empty((1, 1, self._size, slots), np.float32)
            self._bind({BIAS: self._bias})
        score_bias(seen, sees[:, start:], self._bias[0, 0])
        for request in self._requests:
            request.infer()
        for memory, new in zip(cache.values(), self._stored, strict=True):
            memory[0, :, start : start + count] = new[:, :count]
        return self._logits[0, : len(wanted)]

    def _past(self, cache: Cache, sees: BoolArray) -> tuple[Cache, BoolArray]:
        """What the graph looks at of the cache's first slots, and who may look at what of it.

        That is a copy of the slots that anybody looks at, where these are much less than the cache: of a
        conversation that has just begun, or of one branch of many.
        """
        slots = np.flatnonzero(sees.any(axis=0))
        short = max(_STEP, -(-len(slots) // _STEP) * _STEP)
        if 2 * short > _length(cache):
            return cache, sees
        if short not in self._shorts:
            self._shorts[short] = empty_cache(self._graph.shapes, short)
        past = self._shorts[short]
        for place, memory in past.items():
            np.take(cache[place], slots, axis=2, out=memory[:, :, : len(slots)])
        return past, sees[:, slots]

    def give_back(self) -> None:
        """Others may have it."""
        self._graph.idle.append(self)


def _length(cache: Cache) -> int:
    """Slots of a cache."""
    return next(iter(cache.values())).shape[2]
