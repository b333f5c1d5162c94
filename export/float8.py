"""Products in fp8: both sides rounded to float8e4m3fn before they are multiplied, sums in the engine's type.

Each column of a matrix has a scale of its own; what it is multiplied by has one scale, from the largest
magnitude that was seen in calibration (`export.calibration`). Written as pairs of standard quantising
operators around the product, which TensorRT takes together as one product in fp8.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.constants import Constants, product_weights

LARGEST = 448.0
"""Of float8e4m3fn."""
LEAST_TARGET = 89
"""Compute capability, times ten, from which on a GPU multiplies in fp8."""
# Scales are kept in half precision: below its smallest normal number they would lose digits.
_LEAST_SCALE = 2.0**-14
_ZERO = "fp8.zero"


def to_float8(model: onnx.ModelProto, ranges: Mapping[str, float], held: Constants) -> None:
    """Rewrite ``model``: products with the constant matrices that ``ranges`` names are taken in fp8.

    ranges: by the name of the matrix, the largest magnitude of what it is multiplied by.
    """
    graph, rounded = model.graph, dict[str, str]()
    weights = {value.name: value for value in product_weights(model) if value.name in ranges}
    types = {name: held.array(value).dtype for name, value in weights.items()}
    nodes = [_weight(graph, value, held) for value in weights.values()]
    zero = helper.make_tensor(_ZERO, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    graph.initializer.append(zero)
    for node in graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        if name in weights:
            read = node.input[0]
            if read not in rounded:
                rounded[read] = f"{read}.fp8.read"
                scale = np.asarray(max(ranges[name] / LARGEST, _LEAST_SCALE), types[name])
                graph.initializer.append(numpy_helper.from_array(scale, f"{read}.fp8.scale"))
                nodes += _pair(read)
            node.input[0] = rounded[read]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _weight(graph: onnx.GraphProto, value: onnx.TensorProto, held: Constants) -> onnx.NodeProto:
    """Put ``value`` [in, out] into ``graph`` as fp8 and scales; the node that unfolds it under its name."""
    name, weight = value.name, held.array(value)
    wide = weight.astype(np.float32)
    scale = np.maximum(np.abs(wide).max(0) / LARGEST, _LEAST_SCALE).astype(weight.dtype)
    numbers = np.clip(wide / scale.astype(np.float32), -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    graph.initializer.remove(value)
    graph.initializer.extend(
        [
            helper.make_tensor(
                f"{name}.fp8", TensorProto.FLOAT8E4M3FN, wide.shape, numbers.tobytes(), raw=True
            ),
            numpy_helper.from_array(scale, f"{name}.scale"),
        ]
    )
    parts = [f"{name}.fp8", f"{name}.scale"]
    return helper.make_node("DequantizeLinear", parts, [name], name=f"{name}.unfold", axis=1)


def _pair(name: str) -> list[onnx.NodeProto]:
    """The value ``name`` rounded to fp8, as ``name``.fp8.read."""
    inner, outer, scale = f"{name}.fp8", f"{name}.fp8.read", f"{name}.fp8.scale"
    return [
        helper.make_node("QuantizeLinear", [name, scale, _ZERO], [inner], name=f"Round_{inner}"),
        helper.make_node("DequantizeLinear", [inner, scale], [outer], name=f"Read_{inner}"),
    ]
