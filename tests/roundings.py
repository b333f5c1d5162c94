"""How far half precision may carry an output from its fp32 value.

Every product rounds its result: an error of at most half a unit in the last place, relative to the numbers
around it. Roundings that follow each other are independent, so their squares add up: behind n products in a
row, the error's root mean square stays below sqrt(n) roundings of the output's own spread.
"""

from __future__ import annotations

import numpy as np
import onnx

HALF = 2.0**-11
"""Half a unit in the last place of a float16 between 1 and 2."""
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention")


def products_in_a_row(model: onnx.ModelProto) -> dict[str, int]:
    """By output: the most products that lie on one way from an input to it."""
    found: dict[str, int] = {}
    for node in model.graph.node:
        most = max((found.get(name, 0) for name in node.input), default=0)
        found.update(dict.fromkeys(node.output, most + (node.op_type in _PRODUCTS)))
    return {value.name: found[value.name] for value in model.graph.output}


def allowed(products: int) -> float:
    """The most that `error` may be behind so many products in a row."""
    return HALF * products**0.5


def error(name: str, wanted: np.ndarray, got: np.ndarray) -> float:
    """Root mean square of the difference over the spread of ``wanted``.

    A common offset is no signal, so the spread counts and not the size; but scores are probabilities, which
    may all be alike: they count as they are, on their scale of 0..1.
    """
    scale = 1.0 if name == "scores" else float(wanted.std())
    difference = wanted.astype(np.float32) - got.astype(np.float32)
    return float(np.sqrt(np.mean(difference**2))) / scale
