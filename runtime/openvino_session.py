"""OpenVINO on the CPU: the segmenter, and the decoder's steps; the MLLM's blocks of tokens on onnxruntime.

What "bf16" means here is the segmenter, whose masks it hardly moves, and the first blocks of the vision tower
(`runtime.openvino_tower`). The decoder always computes in fp32: what is rounded in keys and values is read
again by every token to come, and changes more answers. So does an MLLM whose weights lie in files of their
own, tower and all.

In fp32, image and prompt are read by onnxruntime, whose products of many rows are as fast and take any
length. Steps read one row, and there OpenVINO is faster: `runtime.openvino_step`.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ppcr.errors import EngineError
from ppcr.manifest import DATA, WEIGHTS, Shapes
from ppcr.prompts import MAX_TARGETS
from ppcr.tensors import RowTable
from runtime.bundle import AUTO, Bundle
from runtime.onnxruntime_context import OnnxContext
from runtime.onnxruntime_library import Session, open_graph
from runtime.onnxruntime_session import ImageTowers, OnnxMLLM, Towers, load_decoder, plan_threads
from runtime.openvino_library import Compiled, Core, has_bf16
from runtime.openvino_segmenter import OpenVinoSegmenter
from runtime.openvino_step import ROWS, Step, StepGraphs
from runtime.openvino_tower import HalfTowers
from runtime.positions import Tables
from runtime.session import Float32Array, Sessions
from runtime.threads import Threads

# Graphs at these precisions compute in fp32, with operators that OpenVINO reads.
_READABLE = ("fp32", "int8")
_USUAL_EXPRESSION = 16


def load(bundle: Bundle, *, threads: int, precision: str = AUTO) -> Sessions:
    """Both sessions of a bundle, in the precision of its graphs, or "bf16" as above.

    Raises:
        BundleError: a graph cannot be read, as onnxruntime's `load`.
        EngineError: bf16 is asked for, and this processor has no instructions for it.
    """
    core = Core()
    half = _is_half(core, precision)
    plan = plan_threads(bundle, threads)
    path = bundle.graphs["decoder"]
    # Weights in files of their own belong to models too large to be held twice.
    apart = f"decoder{WEIGHTS}" in bundle.graphs or path.with_name(path.name + DATA).exists()
    stepped = bundle.precision in _READABLE and not apart
    # Most of the time goes into compilers, which leave Python alone: they run side by side.
    with ThreadPoolExecutor(3, "ppcr-loader") as pool:
        segmenter = pool.submit(OpenVinoSegmenter, core, bundle, plan, bf16=half)
        steps = pool.submit(StepGraphs, path, bundle.manifest.shapes, plan.step) if stepped else None
        towers = pool.submit(_load_towers, core, bundle, plan.vision, half and not apart)
        decoders = load_decoder(bundle, threads=threads)
        mllm = OpenVinoMLLM(towers.result(), decoders, bundle, steps.result() if steps else None)
        return Sessions(mllm, segmenter.result(), precision="bf16" if half else bundle.precision)


def _load_towers(core: Core, bundle: Bundle, threads: int, half: bool) -> ImageTowers:
    if half:
        return HalfTowers(core, bundle, threads)
    return Towers(open_graph(bundle.graphs["vision"], threads), bundle, threads)


def load_segmenter(bundle: Bundle, *, threads: int, precision: str = AUTO) -> OpenVinoSegmenter:
    """The segmenter alone, every graph with all ``threads``. Raises as `load` does."""
    core = Core()
    return OpenVinoSegmenter(core, bundle, Threads(*[threads] * 5), bf16=_is_half(core, precision))


def _is_half(core: Core, precision: str) -> bool:
    half = precision == "bf16"
    if half and not has_bf16(core):
        raise EngineError("this processor has no bfloat16 instructions: use --precision fp32")
    return half


class OpenVinoMLLM(OnnxMLLM):
    """`runtime.session.MLLMSession`: as `OnnxMLLM`, with the steps of small decoders on OpenVINO.

    Args:
        steps: None leaves the steps to onnxruntime as well.
    """

    def __init__(
        self, towers: ImageTowers, decoders: tuple[Session, Session], bundle: Bundle, steps: StepGraphs | None
    ) -> None:
        super().__init__(towers, decoders, bundle)
        self._steps = steps
        # What conversations that ended were held in, by table and length of cache: to make it takes longer
        # than to read a token.
        self._ended: defaultdict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        if steps is not None:
            steps.of(self._cache_length(_usual_length(bundle)))

    def _new_context(self, tables: Tables, length: int) -> OnnxContext:
        if self._steps is None:
            return super()._new_context(tables, length)
        ended = self._ended[id(tables), length]
        try:
            context = OpenVinoContext.again(ended.pop())
            # It is not the first conversation: a longer one will come as well, and should not wait.
            self._steps.foresee(self._cache_length(min(length + 1, self._shapes.max_length)))
        except IndexError:
            step = self._steps.of(length)
            context = OpenVinoContext(
                self._decoders, self._shapes, tables, self._embedding, self._image_token, length, step
            )
        weakref.finalize(context, ended.append, vars(context))
        return context


class OpenVinoContext(OnnxContext):
    """`runtime.session.Context`: one KV cache, read in blocks by onnxruntime and stepped by OpenVINO."""

    def __init__(
        self,
        decoders: tuple[Session, Session],
        shapes: Shapes,
        tables: Tables,
        embedding: Float32Array | RowTable,
        image_token: int,
        length: int,
        step: Compiled,
    ) -> None:
        super().__init__(decoders, shapes, tables, embedding, image_token, length)
        rows = {name: self._step[name] for name in ROWS}
        self._stepped = Step(step, rows, self._cache, self._logits)

    @classmethod
    def again(cls, state: dict[str, Any]) -> OpenVinoContext:
        """An empty conversation in the memory of one that ended, whose ``vars`` are given."""
        context = cls.__new__(cls)
        context.__dict__ = state
        context.truncate(0)
        return context

    def _launch_step(self) -> None:
        self._stepped.run(int(self._at[0]))


def _usual_length(bundle: Bundle) -> int:
    """Tokens of a conversation about a short expression: its step is compiled when the bundle is loaded."""
    tokenizer = bundle.tokenizer
    image = bundle.manifest.shapes.image_tokens
    answers = tokenizer.semantic_constraint.max_tokens + tokenizer.spatial_constraint(MAX_TARGETS).max_tokens
    asked = len(tokenizer.prefix(image)) + len(tokenizer.between_stages) + _USUAL_EXPRESSION
    return min(asked + answers, bundle.manifest.shapes.max_length)
