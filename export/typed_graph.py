"""A bundle's graph at the precision an engine computes in: types and folded weights are in the graph.

TensorRT's strongly typed networks compute each node in the types that the graph gives it, so precision is
written here and nowhere else: types by `export.narrow`, weights as integers here, products in fp8 by
`export.float8`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.constants import Constants, product_weights
from export.external import ExternalData
from export.float8 import to_float8
from export.narrow import KINDS, Narrower
from ppcr.errors import UsageError

ENGINE_PRECISIONS = ("fp16", "bf16", "fp8", "int8", "int4")
"""What `at_precision` writes. int8 and int4 are weights of products, folded over fp16 arithmetic; in fp8 both
sides of a product are, by scales that `export.calibration` measures."""
INT4_BLOCK = 64
_REFUSED = {"fp32": "engines are compiled at half precision: TensorRT refuses attention in fp32"}


def require_precision(precision: str) -> None:
    """Raise UsageError, saying why and what there is, unless engines can be built at ``precision``."""
    if precision not in ENGINE_PRECISIONS:
        reason = _REFUSED.get(precision, f"{precision!r} is not a precision of engines")
        raise UsageError(f"{reason}; give --precision {', '.join(ENGINE_PRECISIONS)}")


def arithmetic(precision: str) -> str:
    """The floating type that engines at ``precision`` compute in, by its name in KINDS."""
    return precision if precision in KINDS else "fp16"


def at_precision(
    model: onnx.ModelProto,
    precision: str,
    carried: Collection[str] = (),
    *,
    ranges: Mapping[str, float] | None = None,
    folder: Path | None = None,
    data: ExternalData | None = None,
) -> None:
    """Rewrite ``model`` in place, which is in fp32 or has the engine's own type already.

    Args:
        precision: of ENGINE_PRECISIONS.
        carried: graph inputs and outputs that stay on the device and take the engine's own type.
        ranges: with fp8, the largest magnitude of each value that a product reads (`export.calibration`).
        folder: of a model whose constants lie beside it; data: where large new ones go then.

    Raises:
        UsageError: no such precision.
    """
    require_precision(precision)
    held = Constants(folder, data)
    if precision == "int8":
        fold(model, block=None, levels=127, kind=TensorProto.INT8, held=held)
    elif precision == "int4":
        fold(model, block=INT4_BLOCK, levels=7, kind=TensorProto.INT4, held=held)
    elif precision == "fp8":
        to_float8(model, ranges or {}, held)
    Narrower(model, KINDS[arithmetic(precision)], carried, held).run()
    if data is None:
        onnx.checker.check_model(model)


def fix_dimensions(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Give the named dynamic dimensions of inputs and outputs their one size (a static KV cache needs it)."""
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]


def fold(
    model: onnx.ModelProto, *, block: int | None, levels: int, kind: int, held: Constants | None = None
) -> None:
    """Store the constant matrices [in, out] of products as integers of ``kind``, -levels..levels.

    ``block`` inputs share a scale; None: one scale per output. Matrices whose inputs do not fill blocks stay
    as they are, and so do the head, and matrices that the graph holds as integers already.
    """
    graph, held = model.graph, held or Constants()
    unfolded = []
    for value in product_weights(model):
        if block and value.dims[0] % block:
            continue
        name, weight = value.name, held.array(value)
        inputs, outputs = weight.shape
        parts = weight.astype(np.float32).reshape(-1, block or inputs, outputs)
        scale = np.abs(parts).max(1, keepdims=True) / levels
        scale[scale == 0] = 1
        numbers = np.clip(np.rint(parts / scale), -levels, levels).reshape(inputs, outputs)
        graph.initializer.remove(value)
        graph.initializer.append(_integers(f"{name}.{levels}", numbers.astype(np.int8), kind))
        shape = (-1, outputs) if block else (outputs,)
        scales = scale.reshape(shape).astype(weight.dtype)
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scale"))
        how = {"axis": 0, "block_size": block} if block else {"axis": 1}
        parts_in = [f"{name}.{levels}", f"{name}.scale"]
        unfolded.append(helper.make_node("DequantizeLinear", parts_in, [name], name=f"{name}.unfold", **how))
    nodes = [*unfolded, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    if unfolded and block:
        # Blocks came with opset 21; the operators of these graphs mean the same there as in 20.
        for opset in model.opset_import:
            opset.version = max(opset.version, 21) if opset.domain == "" else opset.version


def _integers(name: str, numbers: np.ndarray, kind: int) -> onnx.TensorProto:
    if kind == TensorProto.INT8:
        return numpy_helper.from_array(numbers, name)
    # Two to a byte, the first in the low half.
    low, high = numbers.reshape(-1)[0::2] & 0xF, numbers.reshape(-1)[1::2] & 0xF
    packed = (low | (high << 4)).astype(np.uint8).tobytes()
    return helper.make_tensor(name, kind, numbers.shape, packed, raw=True)
