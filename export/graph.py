"""A small writer of ONNX graphs: nodes and weights in, one checked model out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str]
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
_IR_VERSION = 10


class GraphWriter:
    """Collects nodes in order; every method that adds one returns the name of its output.

    Args:
        opset: version of the standard operator set; nothing else is used.
        dtype: floating type of weights and activations, float32 or float16.
    """

    def __init__(self, *, opset: int, dtype: type[np.floating[Any]] = np.float32) -> None:
        self.opset, self.dtype = opset, dtype
        self.float_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def input(self, name: str, shape: Shape, kind: int | None = None) -> str:
        """Declare an input (floating unless ``kind`` says otherwise); a string in ``shape`` is dynamic."""
        self._inputs.append(helper.make_tensor_value_info(name, kind or self.float_type, shape))
        return name

    def output(self, name: str, shape: Shape, kind: int | None = None) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, kind or self.float_type, shape))
        return name

    def weight(self, name: str, value: np.ndarray) -> str:
        """A floating constant in the graph's type, written once however often it is named."""
        if name not in self._constants:
            array = np.ascontiguousarray(value, self.dtype)
            self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        """A constant of exactly ``dtype``: shapes, indices, masks."""
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        return self.nodes(kind, inputs, [output or self._fresh(kind)], **attributes)[0]

    def nodes(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str] | int, **attributes: Any
    ) -> list[str]:
        """A node of several outputs, named, or counted."""
        names = [self._fresh(kind) for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        label = f"{kind}_{names[0]}"
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=label, **attributes))
        return names

    def linear(self, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
        """``x @ weight.T + bias`` with torch's weight [out, in]."""
        y = self.node("MatMul", [x, self.weight(f"{name}.weight", weight.T)])
        return y if bias is None else self.node("Add", [y, self.weight(f"{name}.bias", bias)])

    def rms_norm(self, x: str, name: str, scale: np.ndarray, epsilon: float) -> str:
        return self.node(
            "RMSNormalization", [x, self.weight(name, scale)], axis=-1, epsilon=epsilon, stash_type=1
        )

    def gated_mlp(self, x: str, name: str, gate_up: tuple[np.ndarray, np.ndarray], down: np.ndarray, *,
                  gate_up_bias: tuple[np.ndarray, np.ndarray] | None = None,
                  down_bias: np.ndarray | None = None) -> str:  # fmt: skip
        """``down(silu(gate(x)) * up(x))``, gate and up as one product."""
        bias = None if gate_up_bias is None else np.concatenate(gate_up_bias)
        both = self.linear(x, f"{name}.gate_up", np.concatenate(gate_up), bias)
        gate, up = self.nodes("Split", [both], 2, axis=-1, num_outputs=2)
        gate = self.node("Mul", [gate, self.node("Sigmoid", [gate])])
        return self.linear(self.node("Mul", [gate, up]), f"{name}.down", down, down_bias)

    def model(self, name: str) -> onnx.ModelProto:
        """The checked model."""
        constants = list(self._constants.values())
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=_IR_VERSION,
            producer_name="ppcr",
        )
        onnx.checker.check_model(model)
        return model

    def save(self, name: str, path: Path) -> None:
        onnx.save(self.model(name), path)

    def _fresh(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"
