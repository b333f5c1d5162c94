"""A bundle's fp32 graph at the precision an engine computes in: types and folded weights are in the graph.

TensorRT's strongly typed networks compute each node in the types that the graph gives it, so precision is
written here and nowhere else. What the host feeds and reads stays float32; what never leaves the device
(KV caches, the segmenter's features) takes the engine's own type, so that no copy is converted on the way.
Angles stay float32 up to their sine: half precision cannot tell neighbouring pixels apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ppcr.errors import UsageError

KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
ENGINE_PRECISIONS = ("fp16", "bf16", "int8", "int4")
"""What `at_precision` writes. int8 and int4 are weights of products, folded over fp16 arithmetic."""
INT4_BLOCK = 64
_DTYPES: dict[int, type] = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}
_FULL_WEIGHTS = ("lm_head.weight",)  # its rounding would show in every token
_ANGLES = ("Sin", "Cos")
# Engines have no bfloat16 kernel for these; they are small.
_NO_BF16 = ("ConvTranspose",)
_REFUSED = {
    "fp8": "fp8 products need scales of their activations, which these graphs do not carry",
    "fp32": "engines are compiled at half precision: TensorRT refuses attention in fp32",
}


def require_precision(precision: str) -> None:
    """Raise UsageError, saying why and what there is, unless engines can be built at ``precision``."""
    if precision not in ENGINE_PRECISIONS:
        reason = _REFUSED.get(precision, f"{precision!r} is not a precision of engines")
        raise UsageError(f"{reason}; give --precision {', '.join(ENGINE_PRECISIONS)}")


def at_precision(model: onnx.ModelProto, precision: str, carried: Collection[str] = ()) -> None:
    """Rewrite the fp32 ``model`` in place.

    Args:
        precision: of ENGINE_PRECISIONS.
        carried: graph inputs and outputs that stay on the device and take the engine's own type.

    Raises:
        UsageError: no such precision.
    """
    require_precision(precision)
    if precision == "int8":
        fold(model, block=None, levels=127, kind=TensorProto.INT8)
    elif precision == "int4":
        fold(model, block=INT4_BLOCK, levels=7, kind=TensorProto.INT4)
    _Narrower(model, KINDS.get(precision, TensorProto.FLOAT16), carried).run()
    onnx.checker.check_model(model)


def fix_dimensions(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Give the named dynamic dimensions of inputs and outputs their one size (a static KV cache needs it)."""
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]


def fold(model: onnx.ModelProto, *, block: int | None, levels: int, kind: int) -> None:
    """Store the constant matrices [in, out] of products as integers of ``kind``, -levels..levels.

    ``block`` inputs share a scale; None: one scale per output. Matrices whose inputs do not fill blocks stay
    as they are, and so does the head.
    """
    graph = model.graph
    constants = {value.name: value for value in graph.initializer}
    users: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    unfolded = []
    for name in dict.fromkeys(node.input[1] for node in graph.node if node.op_type == "MatMul"):
        value = constants.get(name)
        if value is None or name in _FULL_WEIGHTS or len(value.dims) != 2 or users[name] != {"MatMul"}:
            continue
        if block and value.dims[0] % block:
            continue
        weight = numpy_helper.to_array(value).astype(np.float32)
        inputs, outputs = weight.shape
        parts = weight.reshape(-1, block or inputs, outputs)
        scale = np.abs(parts).max(1, keepdims=True) / levels
        scale[scale == 0] = 1
        numbers = np.clip(np.rint(parts / scale), -levels, levels).reshape(inputs, outputs)
        graph.initializer.remove(value)
        graph.initializer.append(_integers(f"{name}.{levels}", numbers.astype(np.int8), kind))
        shape = (-1, outputs) if block else (outputs,)
        graph.initializer.append(numpy_helper.from_array(scale.reshape(shape), f"{name}.scale"))
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


class _Narrower:
    """Turns the float32 values of one graph into ``kind``, with a Cast wherever the two meet."""

    def __init__(self, model: onnx.ModelProto, kind: int, carried: Collection[str]) -> None:
        self.graph, self.kind, self.carried = model.graph, kind, frozenset(carried)
        typed = onnx.shape_inference.infer_shapes(model).graph
        values = (*typed.value_info, *typed.input, *typed.output)
        self.types: dict[str, int] = {value.name: value.type.tensor_type.elem_type for value in values}
        self.constants = {value.name: value for value in self.graph.initializer}
        self.types.update({name: value.data_type for name, value in self.constants.items()})
        self.wide_nodes = self._feeding(_ANGLES)
        self.wide: set[str] = set()  # float32 values that stay so
        self.cast: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        graph = self.graph
        given = {value.name for value in graph.input if value.name not in self.carried}
        self.wide |= {name for name in given if self._is_float(name)}
        returned = [value.name for value in graph.output if self._is_float(value.name)]
        for value in (*graph.input, *graph.output):
            if value.name in self.carried and self._is_float(value.name):
                value.type.tensor_type.elem_type = self.kind
        renamed = {name: f"{name}.inner" for name in returned if name not in self.carried}
        for node in graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = renamed.get(name, name)
            self._narrow(node)
            self.nodes.append(node)
        for name, inner in renamed.items():
            node = helper.make_node("Cast", [inner], [name], name=f"Return_{name}", to=TensorProto.FLOAT)
            self.nodes.append(node)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        kept = [value for value in self.constants.values() if value.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _narrow(self, node: onnx.NodeProto) -> None:
        stays = node.name in self.wide_nodes or (self._bf16 and node.op_type in _NO_BF16)
        for index, name in enumerate(node.input):
            if self._is_float(name):
                node.input[index] = self._as(name, TensorProto.FLOAT if stays else self.kind)
        if stays:
            self.wide.update(node.output)
            return
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = self.kind
            elif attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(self._converted(attribute.t, attribute.t.name))

    def _as(self, name: str, kind: int) -> str:
        """The name under which the float value ``name`` is to be had in ``kind``."""
        if name in self.constants:
            if kind == TensorProto.FLOAT:
                return name
            narrow = f"{name}.narrow"
            if narrow not in self.constants:
                self.constants[narrow] = self._converted(self.constants[name], narrow)
            return narrow
        if (kind == TensorProto.FLOAT) == (name in self.wide):
            return name
        known = self.cast.get((name, kind))
        if known is None:
            known = self.cast[name, kind] = f"{name}.{'wide' if kind == TensorProto.FLOAT else 'narrow'}"
            self.nodes.append(helper.make_node("Cast", [name], [known], name=f"Type_{known}", to=kind))
        return known

    def _converted(self, value: onnx.TensorProto, name: str) -> onnx.TensorProto:
        array = numpy_helper.to_array(value)
        limit = float(ml_dtypes.finfo(_DTYPES[self.kind]).max)
        # A mask's "minus infinity" may be a number that half precision cannot hold.
        narrow = np.where(np.isfinite(array), np.clip(array, -limit, limit), array).astype(_DTYPES[self.kind])
        return helper.make_tensor(name, self.kind, array.shape, narrow.tobytes(), raw=True)

    def _is_float(self, name: str) -> bool:
        return self.types.get(name.removesuffix(".inner")) == TensorProto.FLOAT

    @property
    def _bf16(self) -> bool:
        return self.kind == TensorProto.BFLOAT16

    def _feeding(self, kinds: Collection[str]) -> set[str]:
        """Names of the nodes of ``kinds`` and of all that computes a float they read."""
        makers = {name: node for node in self.graph.node for name in node.output}
        waiting = [node for node in self.graph.node if node.op_type in kinds]
        found: set[str] = set()
        while waiting:
            node = waiting.pop()
            if node.name not in found:
                found.add(node.name)
                waiting += [makers[n] for n in node.input if n in makers and self._is_float(n)]
        return found
