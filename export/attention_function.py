"""Prompt-feature attention in an ONNX file: one node, and a function that gives its meaning in standard
operators.

A runtime that knows nothing of it reads the function's body in its place: onnxruntime when it loads a file,
TensorRT when it parses one. A plugin of the same name takes the whole node instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx.inliner
from onnx import AttributeProto, helper

DOMAIN, NAME, VERSION = "ppcr", "PromptFeatureAttention", 1
INPUTS = (
    "x", "x_position", "y", "y_position", "q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias",
    "out_weight", "out_bias", "norm_weight", "norm_bias",
)  # fmt: skip
MATRICES = ("q_weight", "k_weight", "v_weight", "out_weight")
ATTRIBUTES = ("heads", "scale", "eps", "direction")
"""heads of q, k and v; scale of the queries; eps of the norm; direction of `kernels.reference`, for a plugin:
the body is the same both ways."""

Shape = tuple[int | str, ...]


def attention_function(opset: int) -> onnx.FunctionProto:
    """LayerNorm(x + out(attention(q(x + x_position), k(y + y_position), v(y)))), in any float type.

    x f[B, K or 1, L, C], y f[B, K or 1, N, C]; a dimension of 1 is shared by the K prompts of an image.
    Positions broadcast to x and y. Matrices are [in, out]. The result is f[B, K, L, C].
    """
    nodes = [
        *_constant("heads", "value_int"),
        *_constant("scale", "value_float"),
        helper.make_node("Constant", [], ["kept"], value_ints=[0, 0, 0]),
        helper.make_node("Constant", [], ["rest"], value_ints=[-1]),
        helper.make_node("Reshape", ["heads", "rest"], ["heads_1d"]),
        # The first three dimensions stay, the last becomes heads and their columns.
        helper.make_node("Concat", ["kept", "heads_1d", "rest"], ["split"], axis=0),
        helper.make_node("Concat", ["kept", "rest"], ["joined"], axis=0),
        helper.make_node("Add", ["x", "x_position"], ["x_placed"]),
        helper.make_node("Add", ["y", "y_position"], ["y_placed"]),
        *_projected("x_placed", "q", (0, 1, 3, 2, 4)),
        *_projected("y_placed", "k", (0, 1, 3, 4, 2)),
        *_projected("y", "v", (0, 1, 3, 2, 4)),
        # A constant is fp32; the graph around may have been typed otherwise.
        helper.make_node("CastLike", ["scale", "q_heads"], ["scale_typed"]),
        helper.make_node("Mul", ["q_heads", "scale_typed"], ["q_scaled"]),
        helper.make_node("MatMul", ["q_scaled", "k_heads"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v_heads"], ["read_heads"]),
        helper.make_node("Transpose", ["read_heads"], ["read_cells"], perm=(0, 1, 3, 2, 4)),
        helper.make_node("Reshape", ["read_cells", "joined"], ["read"]),
        helper.make_node("MatMul", ["read", "out_weight"], ["out_product"]),
        helper.make_node("Add", ["out_product", "out_bias"], ["out"]),
        helper.make_node("Add", ["x", "out"], ["sum"]),
        _norm(),
    ]
    return helper.make_function(
        DOMAIN, NAME, INPUTS, ["result"], nodes, [helper.make_opsetid("", opset)], ATTRIBUTES
    )


def add_function(model: onnx.ModelProto) -> None:
    """Give ``model`` the function's body if it has such nodes, and the nodes the names of their layers."""
    names = {}
    for node in attention_nodes(model):
        node.name = node.input[INPUTS.index("q_weight")].removesuffix(".q.weight")
        names[node.output[0]] = f"{node.name}.result"
    for node in model.graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                values[index] = names.get(value, value)
    for value in model.graph.value_info:
        value.name = names.get(value.name, value.name)
    if names:
        opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        model.functions.append(attention_function(opset))


def attention_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes that the function stands for."""
    return (node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, NAME))


def attention_shapes(model: onnx.ModelProto) -> dict[str, list[Shape]]:
    """Shapes of each node's inputs by its name; dynamic sizes are names."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes: dict[str, Shape] = {value.name: tuple(value.dims) for value in model.graph.initializer}
    for value in (*inferred.value_info, *inferred.input):
        shapes[value.name] = tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
    return {node.name: [shapes[name] for name in node.input] for node in attention_nodes(model)}


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with the bodies in place of the nodes, for tools that look at operators one by one."""
    if not model.functions:
        return model
    plain = onnx.inliner.inline_local_functions(model)
    for node in plain.graph.node:
        node.name = node.name or f"node_{node.output[0]}"
    for opset in [opset for opset in plain.opset_import if opset.domain == DOMAIN]:
        plain.opset_import.remove(opset)
    _drop_casts(plain)
    return plain


def _drop_casts(model: onnx.ModelProto) -> None:
    """Take out each CastLike of a value that has the type already: it keeps engines from fusing a scale."""
    typed = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*typed.value_info, *typed.input)}
    kinds |= {constant.name: constant.data_type for constant in typed.initializer}
    same: dict[str, str] = {}
    for node in [node for node in model.graph.node if node.op_type == "CastLike"]:
        value, like = node.input
        if kinds.get(value) and kinds.get(value) == kinds.get(like):
            same[node.output[0]] = value
            model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]


def _constant(name: str, kind: str) -> Iterator[onnx.NodeProto]:
    """The attribute ``name`` as a value."""
    node = helper.make_node("Constant", [], [name])
    form = AttributeProto.INT if kind == "value_int" else AttributeProto.FLOAT
    node.attribute.append(AttributeProto(name=kind, ref_attr_name=name, type=form))
    yield node


def _projected(source: str, name: str, order: tuple[int, ...]) -> Iterator[onnx.NodeProto]:
    """A linear layer, its columns split into heads: f[B, K, H, ...] with the last axes in ``order``."""
    yield helper.make_node("MatMul", [source, f"{name}_weight"], [f"{name}_product"])
    yield helper.make_node("Add", [f"{name}_product", f"{name}_bias"], [name])
    yield helper.make_node("Reshape", [name, "split"], [f"{name}_split"])
    yield helper.make_node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=order)


def _norm() -> onnx.NodeProto:
    node = helper.make_node("LayerNormalization", ["sum", "norm_weight", "norm_bias"], ["result"], axis=-1)
    node.attribute.append(AttributeProto(name="epsilon", ref_attr_name="eps", type=AttributeProto.FLOAT))
    return node
