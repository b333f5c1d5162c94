"""The floats of one graph in half precision, with a Cast wherever the two meet.

What the host feeds and reads is float32, also where the graph was written in half precision; what never
leaves the device (KV caches, the segmenter's features) takes the engine's own type. Angles stay float32 up to
their sine: half precision cannot tell neighbouring pixels apart.
"""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from export.constants import Constants

KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_DTYPES: dict[int, type] = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}
_ANGLES = ("Sin", "Cos")
# Engines have no bfloat16 kernel for these; they are small.
_NO_BF16 = ("ConvTranspose",)


class Narrower:
    """Turns the float32 values of one graph into ``kind``; values that have that type already keep it.

    Args:
        kind: of KINDS. carried: graph inputs and outputs that take that type as well.
    """

    def __init__(
        self, model: onnx.ModelProto, kind: int, carried: Collection[str], held: Constants | None = None
    ) -> None:
        self.graph, self.kind, self.carried = model.graph, kind, frozenset(carried)
        self.held = held or Constants()
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
        self._widen_inputs()
        given = {value.name for value in graph.input if value.name not in self.carried}
        self.wide |= {name for name in given if self._is_float(name)}
        returned = [
            value.name for value in graph.output if self.types[value.name] in (TensorProto.FLOAT, self.kind)
        ]
        for value in (*graph.input, *graph.output):
            if value.name in self.carried and self._is_float(value.name):
                value.type.tensor_type.elem_type = self.kind
        renamed = {name: f"{name}.inner" for name in returned if name not in self.carried}
        for value in graph.output:
            if value.name in renamed:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
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

    def _widen_inputs(self) -> None:
        """Inputs of a graph that was written in half precision, as the host feeds them."""
        for value in self.graph.input:
            if self.types[value.name] == self.kind and value.name not in self.carried:
                value.type.tensor_type.elem_type = self.types[value.name] = TensorProto.FLOAT

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
        return self.held.keep(name, self.kind, self.held.array(value), self._rounded)

    def _rounded(self, array: np.ndarray) -> np.ndarray:
        limit = float(ml_dtypes.finfo(_DTYPES[self.kind]).max)
        # A mask's "minus infinity" may be a number that half precision cannot hold.
        return np.where(np.isfinite(array), np.clip(array, -limit, limit), array).astype(_DTYPES[self.kind])

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
