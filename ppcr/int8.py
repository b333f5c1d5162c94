"""Matrices on an int8 grid: each run of 32 inputs of a row is whole numbers -127..127 times one scale.

Scales have four significant bits, so that whole number times scale is exact in float16: a matrix that `snap`
has moved onto the grid survives a float16 checkpoint, and `fit` finds its whole numbers again without error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

BLOCK = 32
LEVELS = 127
_SMALLEST = 2.0**-24  # the last step of float16
_CANDIDATES = 3


def fit(weight: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """``weight`` [out, in] as whole numbers int8 [out, blocks, block] and scales f32 [out, blocks, 1].

    The block is 32 inputs, or a whole row where 32 does not divide it. Exact for a weight on the grid.
    """
    rows, columns = weight.shape
    block = BLOCK if columns % BLOCK == 0 else columns
    blocks = np.asarray(weight, np.float64).reshape(rows, columns // block, block)
    scale = _round_up(np.abs(blocks).max(axis=-1, keepdims=True) / LEVELS)
    best, error = scale, np.full(scale.shape, np.inf)
    # A block on the grid whose largest number is below 127 had a scale up to two steps larger.
    for _ in range(_CANDIDATES):
        off = np.abs(np.rint(blocks / scale) * scale - blocks).max(axis=-1, keepdims=True)
        exact = (off == 0) & (error > 0)
        best = np.where(exact, scale, best)
        error = np.where(exact, 0.0, error)
        scale = _round_up(scale * (1 + 1e-6))
    numbers = np.clip(np.rint(blocks / best), -LEVELS, LEVELS)
    return numbers.astype(np.int8), best.astype(np.float32)


def snap(weight: npt.NDArray[Any]) -> Float32Array:
    """``weight`` [out, in] moved to the nearest point of the grid; unchanged if it lies on it."""
    numbers, scale = fit(weight)
    return (numbers.astype(np.float32) * scale).reshape(weight.shape)


def _round_up(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The next numbers of four significant bits, at least 8 of float16's last steps."""
    _, exponent = np.frexp(np.maximum(values, 8 * _SMALLEST))
    step = np.ldexp(1.0, exponent - 4)
    return np.ceil(np.maximum(values, 8 * _SMALLEST) / step) * step
