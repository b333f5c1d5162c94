"""Matrices in the number formats of a graph, piece by piece: floating, or int8 and int4 in blocks.

Block-wise: each run of `BLOCK` inputs of an output is whole numbers, -127..127 (int8) or -8..7 (int4), times
one scale, as the standard operator DequantizeLinear reads them. A piece is some rows of the matrix as a graph
has it, [in, out].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

BLOCK = 32
_PIECE_BYTES = 96 << 20
# A block's largest number need not reach the last step: for four bits a finer grid that cuts it off is often
# closer on the whole. Tried in this order; the first of equals is kept.
_REACH = {8: (127.0,), 4: (7.0, 7.5, 8.0)}


class Source(Protocol):
    """A matrix [out, in] that is read some columns at a time (`ppcr.tensors.Matrix`)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def columns(self, start: int, stop: int) -> np.ndarray:
        """f32 [out, stop - start]."""
        ...


@dataclass(frozen=True)
class InMemory:
    """An array [out, in] as a source."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.array.shape
        return rows, columns

    def columns(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.array[:, start:stop], np.float32)


def as_source(weight: np.ndarray | Source) -> Source:
    return InMemory(weight) if isinstance(weight, np.ndarray) else weight


def float_pieces(source: Source, dtype: Any) -> Iterator[np.ndarray]:
    """Rows of the transposed matrix in ``dtype``, from the first to the last."""
    for start, stop in _ranges(source, 1):
        yield source.columns(start, stop).T.astype(dtype)


def can_block(source: Source) -> bool:
    """Whether there is a block of inputs at all, and the outputs fill whole bytes."""
    rows, columns = source.shape
    return columns >= BLOCK and rows % 2 == 0


class Blocked:
    """Whole numbers of a matrix, as they are asked for, and then their scales.

    Args:
        bits: 8 or 4. dtype: of the scales, which is what the products run in.
    """

    def __init__(self, source: Source, bits: int, dtype: Any) -> None:
        self.source, self.bits = source, bits
        rows, columns = source.shape
        self.scales = np.zeros((-(-columns // BLOCK), rows), dtype)

    def pieces(self) -> Iterator[np.ndarray]:
        """int8 rows [inputs, out], or uint8 with two numbers a byte, the first in the low half.

        ``scales`` [in / BLOCK, rounded up; out] are complete after the last piece.
        """
        rows = self.source.shape[0]
        for start, stop in _ranges(self.source, BLOCK):
            block = self.source.columns(start, stop).T
            if (stop - start) % BLOCK:  # the last block of all may be short
                block = np.pad(block, ((0, -(stop - start) % BLOCK), (0, 0)))
            numbers, scale = quantise(block.reshape(-1, BLOCK, rows), self.bits)
            self.scales[start // BLOCK : start // BLOCK + len(scale)] = scale[:, 0]
            whole = numbers.reshape(-1, rows)[: stop - start]
            yield whole if self.bits == 8 else pack_int4(whole)


def quantise(blocks: Float32Array, bits: int) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """``blocks`` f32 [n, BLOCK, out] as whole numbers int8 and scales f32 [n, 1, out], by rounding.

    Of the grids tried, each block takes the one with the least sum of squared errors.
    """
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if bits == 8:
        low = -high
    scale = _scale(largest, _REACH[bits][0])
    numbers = np.clip(np.rint(blocks / scale), low, high)
    if len(_REACH[bits]) > 1:
        error = np.square(numbers * scale - blocks).sum(axis=1, keepdims=True)
        for reach in _REACH[bits][1:]:
            other = _scale(largest, reach)
            tried = np.clip(np.rint(blocks / other), low, high)
            off = np.square(tried * other - blocks).sum(axis=1, keepdims=True)
            better = off < error
            numbers = np.where(better, tried, numbers)
            scale, error = np.where(better, other, scale), np.minimum(off, error)
    return numbers.astype(np.int8), scale


def pack_int4(numbers: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Whole numbers -8..7, an even count, two to a byte."""
    flat = numbers.reshape(-1).view(np.uint8) & np.uint8(15)
    return flat[0::2] | (flat[1::2] << np.uint8(4))


def _scale(largest: Float32Array, reach: float) -> Float32Array:
    # A block of zeros keeps a scale of 1: an engine may divide by it.
    return np.where(largest > 0, largest / np.float32(reach), np.float32(1)).astype(np.float32)


def _ranges(source: Source, step: int) -> Iterator[tuple[int, int]]:
    rows, columns = source.shape
    width = max(step, _PIECE_BYTES // (4 * rows) // step * step)
    for start in range(0, columns, width):
        yield start, min(start + width, columns)
