"""int8 from fp32: weights of matrix products per output channel, activations as they come.

Products whose weight is constant become DynamicQuantizeLinear, MatMulInteger and a scale, which onnxruntime
runs as one integer kernel. Convolutions, norms and attention stay in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

PRECISIONS = ("fp32", "int8")
_OPERATORS = ["MatMul"]

Keep = Callable[[str, onnx.NodeProto], bool]
"""(role, node) -> whether the node stays in fp32."""


def keep_nothing(role: str, node: onnx.NodeProto) -> bool:
    return False


def file_name(name: str, precision: str) -> str:
    """``mllm/decoder.onnx`` at a precision: ``mllm/decoder.int8.onnx``; fp32 keeps the plain name."""
    return name if precision == "fp32" else f"{name.removesuffix('.onnx')}.{precision}.onnx"


def quantise(role: str, source: Path, target: Path, *, keep: Keep = keep_nothing) -> None:
    """Write the int8 form of the fp32 graph ``source`` to ``target``."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(source).graph
    kept = [node.name for node in graph.node if node.op_type in _OPERATORS and keep(role, node)]
    with _quiet():
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=_OPERATORS,
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
            # Shapes are not inferred again for opsets newer than the quantiser knows.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )


@contextmanager
def _quiet() -> Iterator[None]:
    # The quantiser recommends on the root logger, once per call, a preparation these graphs do not need.
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
