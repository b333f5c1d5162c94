"""int8 from fp32, in the way each graph bears.

The MLLM's graphs hold their matrices as int8 on the grid of `ppcr.int8` and compute in fp32: location tokens
are near ties by nature (a thousand bins, neighbours almost equally likely), and eight-bit activations decide
many of them differently. An engine unfolds such weights once, when it loads the graph.

The segmenter's matrix products run in int8: weights per output channel, activations quantised as they come.
Convolutions, norms and attention stay in fp32. In the mask decoder only products over the image's cells run
in int8: activations have one scale for all rows, which tokens of many prompts do not bear, and a handful of
rows costs nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.attention_function import inlined
from ppcr.int8 import fit

WEIGHTS_ONLY = frozenset({"vision", "decoder"})
_FULL_WEIGHTS = ("lm_head.weight",)  # tied to the embedding, which stays as it is
_OPERATORS = ["MatMul"]
# The products that run in int8, by their weight's name; in other graphs all do. What GELU leaves in TinyViT's
# later stages is close to zero but for a few large values: in int8 it makes 40 % of the features' error.
_BUT_AFTER_GELU = r"^(?!image_encoder\.model\.stages\.[12]\.\d+\.mlp\.3\.)"
_OVER_CELLS = r"prompt_to_image\.(plain\.)?[kv]\.|image_to_prompt\.(plain\.)?(q|out)\.|\.up_\d\."
_CHOSEN = {"image_encoder": _BUT_AFTER_GELU, "mask_decoder": _OVER_CELLS}


def file_name(name: str, precision: str) -> str:
    """``mllm/decoder.onnx`` at a precision: ``mllm/decoder.int8.onnx``; fp32 keeps the plain name."""
    return name if precision == "fp32" else f"{name.removesuffix('.onnx')}.{precision}.onnx"


def quantise(role: str, source: Path, target: Path) -> None:
    """Write the int8 form of the fp32 graph ``source`` of ``role`` to ``target``."""
    if role in WEIGHTS_ONLY:
        model = onnx.load(source)
        fold_weights(model)
        onnx.save(model, target)
    else:
        quantise_products(source, target, chosen=_CHOSEN.get(role, ""))


def fold_weights(model: onnx.ModelProto) -> None:
    """Replace the constant matrices of products by int8, a scale for 32 inputs each, and their product."""
    graph = model.graph
    constants = {value.name: value for value in graph.initializer}
    unfolded: list[onnx.NodeProto] = []
    for name in dict.fromkeys(node.input[1] for node in graph.node if node.op_type == "MatMul"):
        if name not in constants or name in _FULL_WEIGHTS or len(constants[name].dims) != 2:
            continue
        weight = numpy_helper.to_array(constants[name])
        numbers, scale = fit(weight.T)
        parts = {
            f"{name}.int8": np.ascontiguousarray(numbers.transpose(1, 2, 0)),  # [blocks, block, out]
            f"{name}.scale": np.ascontiguousarray(scale.transpose(1, 2, 0), weight.dtype),
            f"{name}.shape": np.asarray(weight.shape, np.int64),
        }
        graph.initializer.remove(constants[name])
        graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in parts.items())
        kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
        # Not DequantizeLinear: onnxruntime would fuse it with the product and quantise the activations.
        wide, scaled = f"{name}.wide", f"{name}.scaled"
        unfolded += [
            helper.make_node("Cast", [f"{name}.int8"], [wide], name=wide, to=kind),
            helper.make_node("Mul", [wide, f"{name}.scale"], [scaled], name=scaled),
            helper.make_node("Reshape", [scaled, f"{name}.shape"], [name], name=f"{name}.unfolded"),
        ]
    nodes = [*unfolded, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)


def quantise_products(source: Path, target: Path, *, chosen: str = "") -> None:
    """Run matrix products of ``source`` in int8: those whose weight's name ``chosen`` finds."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source, load_external_data=False)
    plain = inlined(model)
    ranks = {constant.name: len(constant.dims) for constant in plain.graph.initializer}
    left_out = [
        node.name
        for node in plain.graph.node
        if node.op_type in _OPERATORS
        # Stacks of small matrices, one for each head of an attention, gain nothing.
        and (not re.search(chosen, node.input[1]) or ranks.get(node.input[1], 2) != 2)
    ]
    with _quiet():
        quantize_dynamic(
            # With the products of functions written out; only small graphs have such.
            plain if model.functions else str(source),
            str(target),
            op_types_to_quantize=_OPERATORS,
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=left_out,
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
