"""OpenVINO on the CPU: the segmenter, and the MLLM of models whose decoder it holds.

What "bf16" means here is the segmenter, whose masks it hardly moves, and the first of the MLLM's blocks and
layers: `runtime.openvino_tower`, `runtime.openvino_block`. What they leave is computed in float32. So are
steps, which read one row: their time is that of the weights' bytes (`runtime.openvino_step`). And so is all
of an MLLM whose weights lie in files of their own.

In fp32, image and blocks are read by onnxruntime, whose products of many rows are as fast and take any
length without a compiler.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ppcr.errors import EngineError
from ppcr.manifest import DATA, WEIGHTS
from ppcr.prompts import MAX_TARGETS
from runtime.bundle import AUTO, Bundle
from runtime.host_context import HostDecoder
from runtime.host_mllm import HostMLLM, ImageTowers
from runtime.onnxruntime_library import Session, open_graph
from runtime.onnxruntime_session import OnnxMLLM, Towers, load_decoder, plan_threads
from runtime.openvino_block import BlockGraphs
from runtime.openvino_context import Conversations, MixedContext, OpenVinoContext
from runtime.openvino_library import Core, has_bf16
from runtime.openvino_segmenter import OpenVinoSegmenter
from runtime.openvino_step import StepGraphs
from runtime.openvino_tower import HalfTowers
from runtime.session import MLLMSession, Sessions
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
    # Most of the time goes into compilers, which leave Python alone: they run side by side.
    with ThreadPoolExecutor(3, "ppcr-loader") as pool:
        segmenter = pool.submit(OpenVinoSegmenter, core, bundle, plan, bf16=half)
        mllm: MLLMSession
        if apart or bundle.precision not in _READABLE:
            mllm = OnnxMLLM(_load_towers(bundle, plan), load_decoder(bundle, threads=threads), bundle)
        else:
            steps = pool.submit(StepGraphs, path, bundle.manifest.shapes, plan.step)
            if half:
                towers = pool.submit(HalfTowers, core, bundle, plan.vision)
                blocks = BlockGraphs(path, bundle.manifest.shapes, plan)
                mllm = OpenVinoMLLM(towers.result(), blocks, steps.result(), bundle)
            else:
                decoders = load_decoder(bundle, threads=threads)
                mllm = MixedMLLM(_load_towers(bundle, plan), decoders, steps.result(), bundle)
        return Sessions(mllm, segmenter.result(), precision="bf16" if half else bundle.precision)


def _load_towers(bundle: Bundle, plan: Threads) -> Towers:
    return Towers(open_graph(bundle.graphs["vision"], plan.vision), bundle, plan.vision)


def load_segmenter(bundle: Bundle, *, threads: int, precision: str = AUTO) -> OpenVinoSegmenter:
    """The segmenter alone, every graph with all ``threads``. Raises as `load` does."""
    core = Core()
    return OpenVinoSegmenter(core, bundle, Threads(*[threads] * 5), bf16=_is_half(core, precision))


def _is_half(core: Core, precision: str) -> bool:
    half = precision == "bf16"
    if half and not has_bf16(core):
        raise EngineError("this processor has no bfloat16 instructions: use --precision fp32")
    return half


class OpenVinoMLLM(HostMLLM):
    """`runtime.session.MLLMSession`: image, blocks and steps on OpenVINO. Threads may share it."""

    def __init__(self, towers: ImageTowers, blocks: BlockGraphs, steps: StepGraphs, bundle: Bundle) -> None:
        super().__init__(towers, bundle)
        self._blocks = blocks
        self._conversations = Conversations(steps, self._cache_length(_usual_length(bundle)))

    def _new_context(self, host: HostDecoder, length: int) -> OpenVinoContext:
        longer = self._after(length)
        context, used = self._conversations.begin(OpenVinoContext, self._blocks, host, length, longer)
        if used:
            self._blocks.foresee()
        return context


class MixedMLLM(OnnxMLLM):
    """`runtime.session.MLLMSession`: as `OnnxMLLM`, with the steps on OpenVINO."""

    def __init__(
        self, towers: ImageTowers, decoders: tuple[Session, Session], steps: StepGraphs, bundle: Bundle
    ) -> None:
        super().__init__(towers, decoders, bundle)
        self._conversations = Conversations(steps, self._cache_length(_usual_length(bundle)))

    def _new_context(self, host: HostDecoder, length: int) -> MixedContext:
        longer = self._after(length)
        return self._conversations.begin(MixedContext, self._decoders, host, length, longer)[0]


def _usual_length(bundle: Bundle) -> int:
    """Tokens of a conversation about a short expression: its step is compiled when the bundle is loaded."""
    tokenizer = bundle.tokenizer
    image = bundle.manifest.shapes.image_tokens
    answers = tokenizer.semantic_constraint.max_tokens + tokenizer.spatial_constraint(MAX_TARGETS).max_tokens
    asked = len(tokenizer.prefix(image)) + len(tokenizer.between_stages) + _USUAL_EXPRESSION
    return min(asked + answers, bundle.manifest.shapes.max_length)
