"""A step of the decoder on OpenVINO: the bundle's graph for one token, with a quarter of the bytes to read.

A step reads every weight for one token, so their bytes are what it costs. Matrices that lie on the grid of
`ppcr.int8`, as those of ppcr-tiny do, are held as whole numbers and scales and widened to fp32 where they are
used: same numbers, same arithmetic, no activation quantised.

OpenVINO does not know TensorScatter, nor can a graph of it write into the cache it reads. So the graph looks
at the cache and, beside it, at the token itself, and answers with the token's key and value of each layer;
the host puts these in their place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.errors import BundleError
from ppcr.int8 import fit
from ppcr.manifest import REBUILD, Shapes
from runtime.openvino_library import (
    Compiled,
    ConversionExtension,
    Core,
    Model,
    Orders,
    Tensor,
    compile_model,
    is_float32,
    read,
)
from runtime.openvino_library import operators as op
from runtime.session import Float32Array

Cache = dict[tuple[str, int], npt.NDArray[Any]]
# Added to the score of what may not be looked at. Not infinite: a row of nothing else would become NaN.
_HIDDEN = np.float32(-1e30)
_BIAS, _STORED = "score_bias", "stored"
"""What is added to the scores of the cache's tokens and of the token itself; and its keys and values, those
of a layer one after the other, f32 [2 * layers, kv_heads, 1, head_dim]."""
ROWS = ("inputs_embeds", "rope_cos", "rope_sin")


class StepGraphs:
    """The decoder's graph for one token, compiled for each length of cache that is asked for.

    Args:
        path: the bundle's decoder; shapes: the bundle's; threads: to compute it with.

    Raises:
        BundleError: it is not a decoder as the export writes them.
    """

    def __init__(self, path: Path, shapes: Shapes, threads: int) -> None:
        self._path, self._shapes, self._threads = path, shapes, threads
        self._core = Core()
        self._model = _Reader(self._core).read(path, shapes.layers)
        self._compiled = Orders(self._compile)

    def of(self, length: int) -> Compiled:
        """For a cache of ``length`` tokens; takes a moment the first time."""
        return self._compiled.order(length).result()

    def foresee(self, length: int) -> None:
        """Have the graph for a cache of ``length`` tokens made in the background."""
        self._compiled.order(length)

    def _compile(self, length: int) -> Compiled:
        s = self._shapes
        cache = [1, s.kv_heads, length, s.head_dim]
        inputs = {
            "inputs_embeds": [1, 1, s.hidden],
            "rope_cos": [1, 1, s.head_dim // 2],
            "rope_sin": [1, 1, s.head_dim // 2],
            _BIAS: [1, 1, 1, length + 1],
            **{f"{kind}_cache_{layer}": cache for layer in range(s.layers) for kind in "kv"},
        }
        return compile_model(self._core, self._model, self._path, self._threads, shapes=inputs)


class Step:
    """The step of one conversation: every tensor is bound once, to memory of the host's. Not thread-safe.

    Args:
        compiled: of `StepGraphs`, for the cache's length.
        rows: the token to come, by the names of `ROWS`, f32 [1, 1, …]; filled in by the host before each run.
        cache: f32 [1, kv_heads, length, head_dim] by ("k" or "v", layer).
        logits: f32 [1, 1, vocabulary], where answers go.
    """

    def __init__(
        self, compiled: Compiled, rows: dict[str, Float32Array], cache: Cache, logits: Float32Array
    ) -> None:
        self._places = [cache[kind, layer] for layer in range(len(cache) // 2) for kind in "kv"]
        _, heads, length, width = self._places[0].shape
        self._bias = np.full((1, 1, 1, length + 1), _HIDDEN)
        self._bias[..., length] = 0
        self._past = self._bias[..., :length]
        self._stored = np.zeros((len(self._places), heads, 1, width), np.float32)
        memory: dict[str, npt.NDArray[Any]] = {
            **rows,
            _BIAS: self._bias,
            _STORED: self._stored,
            "logits": logits,
            **{f"{kind}_cache_{layer}": array for (kind, layer), array in cache.items()},
        }
        self._tensors = {name: Tensor(array, shared_memory=True) for name, array in memory.items()}
        self._request = compiled.create_infer_request()
        for name, tensor in self._tensors.items():
            self._request.set_tensor(name, tensor)

    def run(self, at: int) -> None:
        """Read the token in ``rows`` as number ``at`` of the conversation."""
        self._past[..., :at] = 0
        self._past[..., at:] = _HIDDEN
        self._request.infer()
        for place, new in zip(self._places, self._stored, strict=True):
            place[0, :, at] = new[:, 0]


class _Reader:
    """Reads the ONNX decoder as a graph for one token.

    Three of its operators are read in this form's own way; the rest is OpenVINO's.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        # A model is read with inputs of its file alone: `read` puts the input `_BIAS` in the place of this.
        self._bias = op.constant(np.full((1, 1, 1, 1), _HIDDEN))
        readers = {
            "TensorScatter": self._scatter,
            "Attention": self._attention,
            "RotaryEmbedding": self._rotate,
        }
        for name, reader in readers.items():
            core.add_extension(ConversionExtension(name, "", reader))

    def read(self, path: Path, layers: int) -> Model:
        """The model, its cache of open length."""
        source = read(self._core, path)
        found = {
            name: result.input_value(0)
            for result in source.get_results()
            for name in result.output(0).get_names()
        }
        try:
            # What stands for a cache's new state is `_scatter`'s pair: the past, and what is new.
            stored = [
                found[f"{kind}_cache_out_{layer}"].get_node().input_value(1)
                for layer in range(layers)
                for kind in "kv"
            ]
            logits = found["logits"]
        except (KeyError, RuntimeError):
            raise BundleError(f"{path} is no decoder that the OpenVINO engine can step: {REBUILD}") from None
        bias = op.parameter([1, 1, 1, -1], np.float32)
        bias.output(0).set_names({_BIAS})
        self._bias.output(0).replace(bias.output(0))
        inputs = [bias]
        for parameter in source.get_parameters():
            name = parameter.output(0).any_name
            if name == "logits_index":
                parameter.output(0).replace(_numbers(0).output(0))
            elif name.startswith("deepstack_"):  # for image tokens; a step has none
                parameter.output(0).replace(op.constant(np.zeros((1, 1, 1), np.float32)).output(0))
            elif name not in ("write_indices", "attn_mask"):
                inputs.append(parameter)
        answers = {"logits": op.result(logits), _STORED: op.result(op.concat(stored, 0))}
        for name, answer in answers.items():
            answer.output(0).set_names({name})
        model = Model(list(answers.values()), inputs, "step")
        compress(model)
        return model

    def _scatter(self, node: Any) -> Any:
        return op.concat([node.get_input(0), node.get_input(1)], 2).outputs()

    def _attention(self, node: Any) -> Any:
        query, keys, values = (node.get_input(i) for i in range(3))
        heads, width = (query.get_partial_shape()[i].get_length() for i in (1, 3))
        shared = keys.get_partial_shape()[1].get_length()
        # The queries that share keys lie together, as if one head asked several times: nothing is repeated.
        query = op.reshape(query, _numbers(1, shared, heads // shared, width), False)
        # Scaled here, once: left to the operator, all keys are.
        query = op.multiply(query, np.float32(width**-0.5))
        one = op.constant(np.float32(1))
        found = op.scaled_dot_product_attention(query, keys, values, self._bias, one)
        return op.reshape(found, _numbers(1, heads, 1, width), False).outputs()

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
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = node.input_value(1).get_node()
        # float32 alone: what is narrower already has its own way of being widened.
        if constant.get_type_name() != "Constant" or not is_float32(constant):
            continue
        weight = constant.data if node.get_attributes()["transpose_b"] else constant.data.T
        if weight.ndim != 2:
            continue
        numbers, scale = fit(weight)
        if not np.array_equal((numbers.astype(np.float32) * scale).reshape(weight.shape), weight):
            continue
        wide = op.multiply(op.convert(op.constant(numbers), "f32"), op.constant(scale))
        whole = op.reshape(wide, _numbers(*weight.shape), False)
        product = op.matmul(node.input_value(0), whole, node.get_attributes()["transpose_a"], True)
        node.output(0).replace(product.output(0))
        count += 1
    return count


def _numbers(*values: int) -> Any:
    return op.constant(np.array(values, np.int64))
