"""The bundle's decoder as OpenVINO reads it: graphs that look at a cache, and leave writing it to the host.

OpenVINO does not know TensorScatter, nor can a graph of it write into the cache it reads. So the graph looks
at the cache and, beside it, at the tokens themselves, and answers with these tokens' keys and values of each
layer; the host puts them in their place.

Inputs are those of the ONNX graph, but for two: instead of "attn_mask" and "write_indices" there is `BIAS`,
f32 [1, 1, S, L + S], what is added to the scores of the cache's L tokens and of the S tokens themselves.
Outputs: "logits"; and by layer "stored_0" and on, its keys and then its values of the tokens,
f32 [2, kv_heads, S, head_dim].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ppcr.errors import BundleError
from ppcr.int8 import fit
from ppcr.manifest import REBUILD
from runtime.openvino_cut import cut
from runtime.openvino_library import ConversionExtension, Core, Model, is_float32, read
from runtime.openvino_library import operators as op
from runtime.positions import BoolArray
from runtime.session import Float32Array

HIDDEN = np.float32(-1e30)
"""Added to the score of what may not be looked at. Not infinite: a row of nothing else would become NaN."""
BIAS = "score_bias"
# To cut behind 5, 6 or 7 of ppcr-tiny's 8 layers made no difference to its answers. Not behind the last one:
# logits are told apart by less than bfloat16 rounds to.
_LAYER, _SHARE = re.compile(r"layers\.(\d+)\.out"), 0.875


def read_step(core: Core, path: Path, layers: int) -> Model:
    """The graph for one token, its matrices held as whole numbers where they lie on the grid of `ppcr.int8`.

    Raises:
        BundleError: it is not a decoder as the export writes them.
    """
    model = _Reader(core, single=True).read(path, layers)
    compress(model)
    return model


def read_blocks(core: Core, path: Path, layers: int) -> tuple[Model, ...]:
    """The graph for a block of tokens, which has the input "logits_index" too. Raises as `read_step`.

    In two parts: the first layers, and the rest (see `runtime.openvino_cut`). In one where layers have no
    names.
    """
    whole = _Reader(core, single=False).read(path, layers)
    transpose(whole)
    return cut(whole, _LAYER, _SHARE) or (whole,)


class _Reader:
    """Reads the ONNX decoder. Three operators are read in a way of their own; the rest is OpenVINO's."""

    def __init__(self, core: Core, *, single: bool) -> None:
        self._core, self._single = core, single
        readers = {
            "TensorScatter": self._scatter,
            "Attention": self._attention,
            "RotaryEmbedding": self._rotate,
        }
        for name, reader in readers.items():
            core.add_extension(ConversionExtension(name, "", reader))

    def read(self, path: Path, layers: int) -> Model:
        """The model, all lengths open."""
        source = read(self._core, path)
        found = {
            name: result.input_value(0)
            for result in source.get_results()
            for name in result.output(0).get_names()
        }
        try:
            # What stands for a cache's new state is `_scatter`'s pair: the past, and what is new.
            stored = [
                [found[f"{kind}_cache_out_{layer}"].get_node().input_value(1) for kind in "kv"]
                for layer in range(layers)
            ]
            answers = {"logits": op.result(found["logits"])}
        except (KeyError, RuntimeError):
            told = f"{path} is no decoder that the OpenVINO engine can read"
            raise BundleError(f"{told}: {REBUILD}") from None
        bias = op.parameter([1, 1, -1, -1], np.float32)
        inputs = [bias]
        for parameter in source.get_parameters():
            name, given = parameter.output(0).any_name, parameter.output(0)
            if name == "attn_mask":
                given.replace(bias.output(0))
            elif name == "logits_index" and self._single:
                given.replace(_numbers(0).output(0))
            elif name.startswith("deepstack_") and self._single:  # for image tokens; a step has none
                given.replace(op.constant(np.zeros((1, 1, 1), np.float32)).output(0))
            elif name != "write_indices":
                inputs.append(parameter)
        answers |= {f"stored_{layer}": op.result(op.concat(pair, 0)) for layer, pair in enumerate(stored)}
        # What is put in another's place takes its names over.
        bias.output(0).set_names({BIAS})
        for name, answer in answers.items():
            answer.output(0).set_names({name})
        return Model(list(answers.values()), inputs, "step" if self._single else "block")

    def _scatter(self, node: Any) -> Any:
        return op.concat([node.get_input(0), node.get_input(1)], 2).outputs()

    def _attention(self, node: Any) -> Any:
        query, keys, values, mask = (node.get_input(i) for i in range(4))
        heads, width = (query.get_partial_shape()[i].get_length() for i in (1, 3))
        shared = keys.get_partial_shape()[1].get_length()
        # The queries that share keys lie together, as if one head asked several times: nothing is repeated.
        query = op.reshape(query, _numbers(1, shared, -1, width), False)
        if not self._single and heads > shared:
            mask = op.concat([mask] * (heads // shared), 2)
        # Scaled here, once: left to the operator, all keys are.
        query = op.multiply(query, np.float32(width**-0.5))
        one = op.constant(np.float32(1))
        found = op.scaled_dot_product_attention(query, keys, values, mask, one)
        return op.reshape(found, _numbers(1, heads, -1, width), False).outputs()

    def _rotate(self, node: Any) -> Any:
        # Written as OpenVINO's own rotary operator is recognised.
        x = node.get_input(0)
        cos, sin = (op.unsqueeze(node.get_input(i), _numbers(1)) for i in (1, 2))
        half = x.get_partial_shape()[3].get_length() // 2
        first, second = op.variadic_split(x, op.constant(3), _numbers(half, half)).outputs()
        turned = (
            op.subtract(op.multiply(first, cos), op.multiply(second, sin)),
            op.add(op.multiply(second, cos), op.multiply(first, sin)),
        )
        return op.concat(list(turned), -1).outputs()


def compress(model: Model) -> int:
    """Hold the matrices of products that lie on the int8 grid as whole numbers and scales; how many do."""
    count = 0
    for node, weight in _products(model):
        numbers, scale = fit(weight)
        if not np.array_equal((numbers.astype(np.float32) * scale).reshape(weight.shape), weight):
            continue
        wide = op.multiply(op.convert(op.constant(numbers), "f32"), op.constant(scale))
        _replace(node, op.reshape(wide, _numbers(*weight.shape), False))
        count += 1
    return count


def transpose(model: Model) -> None:
    """Hold the matrices of products as OpenVINO wants them: else every compilation makes a copy."""
    for node, weight in _products(model):
        if not node.get_attributes()["transpose_b"]:
            _replace(node, op.constant(np.ascontiguousarray(weight)))


def _products(model: Model) -> Iterator[tuple[Any, Float32Array]]:
    """Products with a constant matrix, f32 [out, in]."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = node.input_value(1).get_node()
        # float32 alone: what is narrower already has its own way of being widened.
        if constant.get_type_name() != "Constant" or not is_float32(constant):
            continue
        weight = constant.data if node.get_attributes()["transpose_b"] else constant.data.T
        if weight.ndim == 2:
            yield node, weight


def _replace(node: Any, weight: Any) -> None:
    """Put a product with ``weight``, [out, in], in the place of ``node``."""
    product = op.matmul(node.input_value(0), weight, node.get_attributes()["transpose_a"], True)
    node.output(0).replace(product.output(0))


def score_bias(past: BoolArray, own: BoolArray, out: Float32Array) -> None:
    """Fill in `BIAS` for the first rows of a block.

    Args:
        past: bool [count, n], which of the cache's first slots each row may look at.
        own: bool [count, count], which of the block's rows.
        out: f32 [S, L + S]. Rows from ``count`` on, which hold no token, look at themselves alone.
    """
    count, size = len(own), len(out)
    length = out.shape[1] - size
    out.fill(HIDDEN)
    np.copyto(out[:count, : past.shape[1]], 0, where=past)
    np.copyto(out[:count, length : length + count], 0, where=own)
    rows = np.arange(count, size)
    out[rows, length + rows] = 0


def _numbers(*values: int) -> Any:
    return op.constant(np.array(values, np.int64))


def pairs_of(stored: Float32Array) -> dict[str, Float32Array]:
    """Memory for the outputs "stored_0" and on: f32 [2 * layers, kv_heads, S, head_dim] by layer."""
    return {f"stored_{layer}": stored[2 * layer : 2 * layer + 2] for layer in range(len(stored) // 2)}
