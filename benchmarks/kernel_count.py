"""How many kernels one decoder pass starts, counted from the graph that torch's compiler makes of it.

No GPU is needed: the graph goes through tracing, decomposition and fusion, and the count is taken before any
code is compiled. What is counted: each fused group of pointwise and reduction operators, each library
product, and for our ops the kernels that their own plans start. Fusion is decided for the machine
at hand; on a GPU a few groups may fall differently, and `benchmarks/kernel.py` counts there by profiling too.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kernels.op import using
from kernels.plan import Problem, launches, plan_read, plan_write
from kernels.reference import PROMPT_TO_IMAGE
from ppcr.model.mask_decoder import CellFeatures
from ppcr.model.prompt_encoder import EncodedPrompts
from ppcr.model.segmenter import Segmenter, SegmenterConfig

OP, ATTENTION = "ppcr.", "ppcr.prompt_feature_attention"


@dataclass(frozen=True)
class Count:
    """Kernels of one pass: fused groups, library calls (products), and what `ops` calls of ours start."""

    fused: int
    library: int
    ops: int
    ours: int

    @property
    def total(self) -> int:
        return self.fused + self.library + self.ours


def decoder_kernels(mode: str, segmenter: Segmenter | None = None, expressions: int = 1) -> Count:
    """Count one pass of the mask decoder (prompt tokens and features in, masks and scores out).

    mode: of `kernels.op`; "off" is the decoder without our kernels, "op" with them.
    """
    segmenter = segmenter or Segmenter(SegmenterConfig())
    decoder, config = segmenter.mask_decoder.eval(), segmenter.config
    given = arguments(segmenter, expressions)
    nodes: list[Any] = []
    read, write = _plans(config, expressions)
    with using(mode), torch.no_grad():
        _compile(decoder, given, nodes)
    calls = [_target(node) for node in nodes]
    ops = [node for node, target in zip(nodes, calls, strict=True) if OP in target]
    library = sum(type(node).__name__.startswith("Extern") for node in nodes)
    return Count(
        fused=len(nodes) - library,
        library=library - len(ops),
        ops=len(ops),
        ours=sum(_launches(node, read, write) for node in ops),
    )


def arguments(segmenter: Segmenter, expressions: int) -> tuple[Tensor, ...]:
    """Random inputs of `Pass` at the segmenter's sizes."""
    c = segmenter.config
    g, tokens = c.grid, segmenter.prompt_encoder.kinds.shape[0] + c.text_tokens
    features = (
        torch.randn(1, 1, g * g, c.dim),
        torch.randn(1, 1, g * g, 4, c.high_res[0]),
        torch.randn(1, 1, g * g, 4, 4, c.high_res[1]),
    )
    prompts = torch.randn(1, expressions, tokens, c.dim), torch.randn(1, expressions, g * g, c.dim)
    return (*features, *prompts, segmenter.prompt_encoder.cell_positions)


def _plans(c: SegmenterConfig, expressions: int) -> tuple[int, int]:
    """Kernels of one call of the op in each direction."""
    problem = Problem(
        images=1, prompts=expressions, shared=True, tokens=2 + 3 + c.text_tokens, cells=c.grid**2, dim=c.dim,
        heads=c.heads, head_dim=c.head_dim, itemsize=2,
    )  # fmt: skip
    return launches(problem, plan_read(problem)), launches(problem, plan_write(problem))


class Pass(nn.Module):
    """The decoder with tensors alone for arguments."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, f: Tensor, high_0: Tensor, high_1: Tensor, tokens: Tensor, dense: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        masks, scores = self.decoder(CellFeatures(f, high_0, high_1), EncodedPrompts(tokens, dense), cells)
        return masks, scores


class _Scheduled(Exception):
    """The schedule is complete; nothing is to be run."""


class _Unfinished:
    """Stands where the compiled module would."""

    def call(self, *given: object) -> None:
        raise _Scheduled


def _compile(decoder: nn.Module, given: tuple[Tensor, ...], nodes: list[Any]) -> None:
    """Compile up to, and without, the code itself; `nodes` receives the schedule."""
    from torch._inductor.graph import GraphLowering

    def stop(graph: Any) -> _Unfinished:
        graph.codegen()
        nodes.extend(filter(_starts_a_kernel, graph.scheduler.nodes))
        return _Unfinished()

    torch._dynamo.reset()
    with (
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        # A graph out of a cache would never be scheduled.
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        suppress(_Scheduled),
    ):
        torch.compile(Pass(decoder), fullgraph=True)(*given)
    torch._dynamo.reset()


def _starts_a_kernel(node: Any) -> bool:
    # The second kind only names an output of the operator before it.
    nothing = type(node).__name__ == "NopKernelSchedulerNode"
    return not nothing and type(getattr(node, "node", None)).__name__ != "MultiOutput"


def _target(node: Any) -> str:
    return str(getattr(getattr(node, "node", None), "op_overload", ""))


def _launches(node: Any, read: int, write: int) -> int:
    if ATTENTION not in _target(node):
        return 1  # the tokens' own steps
    return read if PROMPT_TO_IMAGE in _constants(node) else write


def _constants(node: Any) -> tuple[object, ...]:
    return tuple(getattr(node.node, "constant_args", ())) + tuple(node.node.kwargs.values())
