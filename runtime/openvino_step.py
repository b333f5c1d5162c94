"""A step of the decoder on OpenVINO: the bundle's graph for one token, with a quarter of the bytes to read.

A step reads every weight for one token, so their bytes are what it costs. Matrices that lie on the grid of
`ppcr.int8`, as those of ppcr-tiny do, are held as whole numbers and scales and widened to fp32 where they are
used: same numbers, same arithmetic, no activation quantised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.manifest import Shapes
from runtime.host_context import Cache
from runtime.openvino_decoder import BIAS, HIDDEN, pairs_of, read_step
from runtime.openvino_library import Compiled, Core, Orders, Tensor, compile_model
from runtime.session import Float32Array

ROWS = ("inputs_embeds", "rope_cos", "rope_sin")


class StepGraphs:
    """The decoder's graph for one token, compiled for each length of cache that is asked for.

    Args:
        path: the bundle's decoder; shapes: the bundle's; threads: to compute it with.

    Raises:
        BundleError: it is not a decoder as the export writes them.
    """

    def __init__(self, path: Path, shapes: Shapes, threads: int) -> None:
        self._path, self._shapes, self._threads = path, shapes, threads
        self._core = Core()
        self._model = read_step(self._core, path, shapes.layers)
        self._compiled = Orders(self._compile)

    def of(self, length: int) -> Compiled:
        """For a cache of ``length`` tokens; takes a moment the first time."""
        return self._compiled.order(length).result()

    def foresee(self, length: int) -> None:
        """Have the graph for a cache of ``length`` tokens made in the background."""
        self._compiled.order(length)

    def _compile(self, length: int) -> Compiled:
        s = self._shapes
        cache = [1, s.kv_heads, length, s.head_dim]
        inputs = {
            "inputs_embeds": [1, 1, s.hidden],
            "rope_cos": [1, 1, s.head_dim // 2],
            "rope_sin": [1, 1, s.head_dim // 2],
            BIAS: [1, 1, 1, length + 1],
            **{f"{kind}_cache_{layer}": cache for layer in range(s.layers) for kind in "kv"},
        }
        return compile_model(self._core, self._model, self._path, self._threads, shapes=inputs)


class Step:
    """The step of one conversation: every tensor is bound once, to memory of the host's. Not thread-safe.

    Args:
        compiled: of `StepGraphs`, for the cache's length.
        rows: the token to come, by the names of `ROWS`, f32 [1, 1, …]; filled in by the host before each run.
        cache: f32 [1, kv_heads, length, head_dim] by ("k" or "v", layer).
        logits: f32 [1, 1, vocabulary], where answers go.
    """

    def __init__(
        self, compiled: Compiled, rows: dict[str, Float32Array], cache: Cache, logits: Float32Array
    ) -> None:
        self._places = [cache[kind, layer] for layer in range(len(cache) // 2) for kind in "kv"]
        _, heads, length, width = self._places[0].shape
        self._bias = np.full((1, 1, 1, length + 1), HIDDEN)
        self._bias[..., length] = 0
        self._past = self._bias[..., :length]
        self._stored = np.zeros((len(self._places), heads, 1, width), np.float32)
        memory: dict[str, npt.NDArray[Any]] = {
            **rows,
            BIAS: self._bias,
            **pairs_of(self._stored),
            "logits": logits,
            **{f"{kind}_cache_{layer}": array for (kind, layer), array in cache.items()},
        }
        self._tensors = {name: Tensor(array, shared_memory=True) for name, array in memory.items()}
        self._request = compiled.create_infer_request()
        for name, tensor in self._tensors.items():
            self._request.set_tensor(name, tensor)

    def run(self, at: int) -> None:
        """Read the token in ``rows`` as number ``at`` of the conversation."""
        self._past[..., :at] = 0
        self._past[..., at:] = HIDDEN
        self._request.infer()
        for place, new in zip(self._places, self._stored, strict=True):
            place[0, :, at] = new[:, 0]
