"""A small writer of ONNX graphs: nodes and weights in, one checked model out.

Weights lie in the model itself, or in an `ExternalData` file beside it, into which they go as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.external import ExternalData
from export.matrices import BLOCK, Blocked, Source, as_source, can_block, float_pieces

Shape = Sequence[int | str]
Weight = np.ndarray | Source
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
_IR_VERSION = 10
_INLINE = 1024  # bytes; smaller weights stay in the model even where larger ones lie beside it
_WHOLE = {8: TensorProto.INT8, 4: TensorProto.INT4}


class GraphWriter:
    """Collects nodes in order; every method that adds one returns the name of its output.

    Args:
        opset: version of the standard operator set; nothing else is used.
        dtype: floating type of weights and activations: float32, float16 or ml_dtypes.bfloat16.
        data: where large weights go; None: into the model.
        bits: 8 or 4 to hold the matrices of products as whole numbers in blocks; None: as they are.
    """

    def __init__(
        self,
        *,
        opset: int,
        dtype: Any = np.float32,
        data: ExternalData | None = None,
        bits: int | None = None,
    ) -> None:
        self.opset, self.dtype, self.data, self.bits = opset, dtype, data, bits
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
            array = np.ascontiguousarray(np.asarray(value).astype(self.dtype))
            if self.data is None or array.nbytes < _INLINE:
                self._constants[name] = numpy_helper.from_array(array, name)
            else:
                self._constants[name] = self.data.add(name, self.float_type, array.shape, [array])
        return name

    def matrix(self, name: str, weight: Weight, *, bits: int | None = None) -> str:
        """torch's weight [out, in] as what a product takes, [in, out]; written once.

        ``bits``: another number format than the graph's. A matrix smaller than a block stays floating.
        """
        source, bits = as_source(weight), bits or self.bits
        out, inputs = source.shape
        if name in self._constants or f"{name}.scale" in self._constants:
            return name
        if bits is None or not can_block(source):
            self._add(name, self.float_type, (inputs, out), float_pieces(source, self.dtype))
            return name
        blocked = Blocked(source, bits, self.dtype)
        whole, scale = f"{name}.int{bits}", f"{name}.scale"
        self._add(whole, _WHOLE[bits], (inputs, out), blocked.pieces())
        self._add(scale, self.float_type, blocked.scales.shape, [blocked.scales])
        return self.node("DequantizeLinear", [whole, scale], name, axis=0, block_size=BLOCK)

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

    def linear(self, x: str, name: str, weight: Weight, bias: np.ndarray | None = None, *,
               bits: int | None = None) -> str:  # fmt: skip
        """``x @ weight.T + bias`` with torch's weight [out, in]; ``bits`` as in `matrix`."""
        y = self.node("MatMul", [x, self.matrix(f"{name}.weight", weight, bits=bits)])
        return y if bias is None else self.node("Add", [y, self.weight(f"{name}.bias", bias)])

    def rms_norm(self, x: str, name: str, scale: np.ndarray, epsilon: float) -> str:
        return self.node(
            "RMSNormalization", [x, self.weight(name, scale)], axis=-1, epsilon=epsilon, stash_type=1
        )

    def layer_norm(self, x: str, name: str, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> str:
        inputs = [x, self.weight(name, scale), self.weight(f"{name}.bias", bias)]
        return self.node("LayerNormalization", inputs, axis=-1, epsilon=epsilon, stash_type=1)

    def gated_mlp(
        self,
        x: str,
        name: str,
        gate_up: Weight,
        down: Weight,
        *,
        gate_up_bias: np.ndarray | None = None,
        down_bias: np.ndarray | None = None,
    ) -> str:
        """``down(silu(gate(x)) * up(x))``, the matrices of gate and up one under the other."""
        both = self.linear(x, f"{name}.gate_up", gate_up, gate_up_bias)
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
        if self.data is None:
            onnx.checker.check_model(model)
        return model

    def save(self, name: str, path: Path) -> None:
        """Write the checked model to ``path``, in the folder of its external data."""
        onnx.save(self.model(name), path)
        if self.data is not None:
            self.data.flush()
            onnx.checker.check_model(str(path))  # by its path: the checker looks for the data beside it

    def _add(self, name: str, kind: int, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
        if self.data is not None:
            self._constants[name] = self.data.add(name, kind, shape, pieces)
            return
        raw = b"".join(np.ascontiguousarray(piece).tobytes() for piece in pieces)
        self._constants[name] = TensorProto(name=name, data_type=kind, dims=shape, raw_data=raw)

    def _fresh(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"
