"""The segmenter on OpenVINO, in graphs without open shapes: prompts in groups of few sizes, texts padded."""

from __future__ import annotations

import tempfile
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.onnxruntime_library import write_out_functions
from runtime.openvino_angles import cut_angles
from runtime.openvino_attention import drop_image_axis
from runtime.openvino_library import Core, Graph, Orders, compile_model, read
from runtime.session import Float32Array, Prompts
from runtime.threads import Threads

GROUPS = (4, 1)
"""How many prompts a graph of the mask decoder takes: four save a fifth of the work for each, more no more.
The graph for four is compiled after the second call, or when so many come before that; two and three go one
by one, and wait for no compiler."""
_TEXT_STEP = 16


class OpenVinoSegmenter:
    """`runtime.session.SegmenterSession`. Threads may share it."""

    def __init__(self, core: Core, bundle: Bundle, threads: Threads, *, bf16: bool) -> None:
        self._core, self._threads, self._bf16 = core, threads.mask_decoder, bf16
        self._shapes = bundle.manifest.shapes
        path = bundle.graphs["image_encoder"]
        pixels = {"pixels": [1, 3, *self._shapes.image_size]}
        encoder = compile_model(core, read(core, path), path, threads.image_encoder, bf16=bf16, shapes=pixels)
        self._encoder = Graph(encoder)
        self._features = {output.any_name: list(output.shape) for output in encoder.outputs}
        self._path = bundle.graphs["mask_decoder"]
        with tempfile.TemporaryDirectory(prefix="ppcr-openvino-") as folder:  # OpenVINO reads no functions
            self._decoder = read(core, write_out_functions(self._path, Path(folder)))
        drop_image_axis(self._decoder)
        angles = cut_angles(self._decoder) if bf16 else None
        self._angles = Graph(compile_model(core, angles, self._path, self._threads)) if angles else None
        self._graphs = Orders(self._compile)
        self._graph(1, 1).result()
        self._called = False

    def encode(self, pixels: Float32Array) -> dict[str, Float32Array]:
        """Pixels f32 [3, H, W] to the features of one image, by output name."""
        return self._encoder.run({"pixels": pixels[None]})

    def decode(
        self, features: dict[str, Float32Array], prompts: Prompts
    ) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] and scores f32 [N]."""
        given = {field.name: getattr(prompts, field.name) for field in fields(prompts)}
        length = given["text_mask"].shape[1]
        padded = min(-(-length // _TEXT_STEP) * _TEXT_STEP, max(length, self._shapes.max_text))
        for name in ("text_embeddings", "text_mask"):
            given[name] = _lengthened(given[name], padded)
        found, first = list[dict[str, Float32Array]](), 0
        for size in groups(len(prompts.boxes)):
            some = {name: array[first : first + size] for name, array in given.items()}
            graph = self._graph(size, padded).result()
            found.append(graph.run({**features, **some, **self._sines(some)}))
            first += size
        # Not beside the first call: a process that asks once would wait at its end for nothing.
        if self._called:
            self._graph(GROUPS[0], padded)
        self._called = True
        logits, scores = (
            np.concatenate([answer[name] for answer in found]) for name in ("mask_logits", "scores")
        )
        return logits, scores

    def _sines(self, given: dict[str, npt.NDArray[Any]]) -> dict[str, Float32Array]:
        """What the mask decoder takes beside boxes and points; nothing where it computes in float32."""
        if self._angles is None:
            return {}
        return self._angles.run({name: given[name] for name in self._angles.inputs})

    def _graph(self, count: int, length: int) -> Future[Graph]:
        """The mask decoder for ``count`` prompts with texts of ``length``."""
        return self._graphs.order((count, max(length, min(_TEXT_STEP, self._shapes.max_text))))

    def _compile(self, sizes: tuple[int, int]) -> Graph:
        count, length = sizes
        shapes = {
            **self._features,
            "boxes": [count, 4],
            "points": [count, 2],
            "spatial_valid": [count],
            "text_embeddings": [count, length, self._shapes.hidden],
            "text_mask": [count, length],
        }
        blank = {name: np.zeros(shapes[name], np.float32) for name in ("boxes", "points")}
        shapes |= {name: list(sine.shape) for name, sine in self._sines(blank).items()}
        return Graph(
            compile_model(
                self._core, self._decoder, self._path, self._threads, bf16=self._bf16, shapes=shapes
            )
        )


def groups(count: int) -> list[int]:
    """``count`` prompts as sizes of `GROUPS`, large ones first."""
    sizes = []
    for size in GROUPS:
        sizes += [size] * (count // size)
        count %= size
    return sizes


def _lengthened(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """[N, T, …] to [N, length, …], filled up with zeros."""
    out = np.zeros((len(array), length, *array.shape[2:]), array.dtype)
    out[:, : array.shape[1]] = array
    return out
