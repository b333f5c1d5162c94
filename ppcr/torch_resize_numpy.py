"""`ppcr.torch_resize` in plain numpy: the reference, and the way where no compiled resizer is installed.

After `upsample_bilinear2d_aa` of torch for uint8 on a CPU (aten/src/ATen/native/cpu/UpSampleKernel.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

UInt8Image = npt.NDArray[np.uint8]

_BLOCK = 16  # results whose weights lie in one small matrix; the inputs of neighbours overlap
# Multiplications of one product: for more of them OpenBLAS starts threads, which wait for the processors that
# the models run on.
_PRODUCT = 1 << 18
_EXACT = 16  # bits of a weight up to which float32 holds every sum of products


def resize_with_numpy(image: UInt8Image, size: tuple[int, int]) -> UInt8Image:
    """Stretch `uint8[H, W, 3]` to `size` = (height, width), columns first, then rows."""
    height, width = size
    columns, rows = _line(image.shape[1], width), _line(image.shape[0], height)
    middle = np.empty((image.shape[0], 3, width), np.float32)
    step = max(1, columns.most // 3)
    for top in range(0, len(image), step):
        some = middle[top : top + step].reshape(-1, width)
        # [rows * 3, W]: each channel of a row is a line of its own.
        lines = image[top : top + step].transpose(0, 2, 1).astype(columns.dtype).reshape(-1, image.shape[1])
        for start, stop, first, weights in columns.blocks:
            some[:, start:stop] = _rounded(lines[:, first : first + len(weights)] @ weights)
    resized = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        for left in range(0, width, rows.most):
            some = middle[:, channel, left : left + rows.most].astype(rows.dtype, copy=False)
            for start, stop, first, weights in rows.blocks:
                drawn = weights.T @ some[first : first + len(weights)]
                resized[start:stop, left : left + rows.most, channel] = _rounded(drawn)
    return resized


def _rounded(sums: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Whole numbers 0..255, in place."""
    sums += 0.5
    return np.floor(sums, out=sums)


@dataclass(frozen=True)
class _Line:
    """How the values of a line become those of another.

    Attributes:
        dtype: holds every sum of products exactly.
        blocks: (start, stop, first, weights): results start:stop are sums of inputs from `first` on, times
            weights [inputs, stop - start], multiples of a power of two.
    """

    dtype: type[np.floating]
    blocks: tuple[tuple[int, int, int, npt.NDArray[np.floating]], ...]

    @property
    def most(self) -> int:
        """Lines to be turned at once."""
        return max(1, _PRODUCT // (_BLOCK * max(len(weights) for *_, weights in self.blocks)))


@lru_cache(maxsize=64)
def _line(count: int, size: int) -> _Line:
    """From ``count`` to ``size`` values."""
    scale = count / size
    support, reach = max(scale, 1.0), 1.0 / max(scale, 1.0)
    centers = scale * (np.arange(size) + 0.5)
    low = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centers + support + 0.5).astype(np.int64), count)
    places = low[:, None] + np.arange(int((high - low).max()))
    weights = np.maximum(1.0 - np.abs((places - centers[:, None] + 0.5) * reach), 0.0)
    weights = np.where(places < high[:, None], weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    bits = next(n for n in range(23) if n == 22 or int(0.5 + weights.max() * 2 ** (n + 1)) >= 1 << 15)
    weights = np.floor(0.5 + weights * 2**bits) / 2**bits
    dtype: type[np.floating] = np.float32 if bits <= _EXACT else np.float64
    return _Line(dtype, tuple(_blocks(weights, low, high, dtype)))


def _blocks(
    weights: npt.NDArray[np.float64],
    low: npt.NDArray[np.int64],
    high: npt.NDArray[np.int64],
    dtype: type[np.floating],
) -> Iterator[tuple[int, int, int, npt.NDArray[np.floating]]]:
    for start in range(0, len(weights), _BLOCK):
        stop = min(start + _BLOCK, len(weights))
        first = int(low[start])
        block = np.zeros((int(high[stop - 1]) - first, stop - start), dtype)
        for column, result in enumerate(range(start, stop)):
            used = slice(int(low[result]) - first, int(high[result]) - first)
            block[used, column] = weights[result, : int(high[result] - low[result])]
        yield start, stop, first, block
