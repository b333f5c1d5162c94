"""Rotary tables and attention masks of a conversation, computed once on the host.

A conversation is: text, then the image's tokens, then text to the end; so the multimodal position of a token
depends on its slot in the KV cache alone. The tables below are indexed by slot: a block of S tokens that
begins at slot n takes rows n..n+S, a view that is never copied or computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rotary:
    """How positions become angles.

    Attributes:
        head_dim: width of an attention head; angles fill half of it.
        theta: base of the frequencies.
        section: pairs given to time, row and column; sums to head_dim / 2.
        interleaved: sections alternate (Qwen3-VL) instead of following each other (Qwen2.5-VL).
    """

    head_dim: int
    theta: float
    section: tuple[int, ...]
    interleaved: bool = False

    @property
    def axes(self) -> Int64Array:
        """int64 [head_dim / 2]: which of time (0), row (1), column (2) turns each pair."""
        if not self.interleaved:
            return np.repeat(np.arange(len(self.section)), self.section)
        pair = np.arange(self.head_dim // 2)
        axis = pair % 3
        return np.where((axis > 0) & (pair < 3 * np.asarray(self.section)[axis]), axis, 0)


@dataclass(frozen=True)
class Tables:
    """Rows by slot, 0..max_length.

    Attributes:
        cos, sin: f32 [max_length, head_dim / 2].
        mask: bool [max_length, max_length], True where the row's token may look: itself and before.
    """

    cos: Float32Array
    sin: Float32Array
    mask: BoolArray


def positions(length: int, image_start: int, grid: tuple[int, int]) -> Int64Array:
    """int64 [3, length] time, row and column of every slot, as Qwen2.5-VL counts them.

    Text counts on all three alike. The image's tokens, in row order of ``grid`` = (rows, columns), stand
    still in time; the text after them goes on behind the longer side.
    """
    rows, columns = grid
    image_end = image_start + rows * columns
    if image_end > length:
        raise ValueError(f"an image of {rows}x{columns} tokens at {image_start} does not fit {length} slots")
    out = np.broadcast_to(np.arange(length), (3, length)).copy()
    row, column = np.divmod(np.arange(rows * columns), columns)
    out[:, image_start:image_end] = image_start + np.stack([np.zeros_like(row), row, column])
    out[:, image_end:] = image_start + max(grid) + np.arange(length - image_end)
    return out


def rotary_angles(places: Int64Array, rotary: Rotary) -> Float32Array:
    """Angles f32 [n, head_dim / 2] of positions int64 [3, n]."""
    # In float32, each step rounded once, as torch does it: numpy's own float32 power differs from torch's in
    # the last bit of some frequencies, and a far token multiplies that.
    exponents = np.arange(0, rotary.head_dim, 2, dtype=np.float32) / np.float32(rotary.head_dim)
    frequencies = np.float32(1) / np.power(rotary.theta, exponents.astype(np.float64)).astype(np.float32)
    return np.asarray(places[rotary.axes].T.astype(np.float32) * frequencies, np.float32)


def make_tables(length: int, image_start: int, grid: tuple[int, int], rotary: Rotary) -> Tables:
    """The tables of every slot of a conversation whose image begins at slot ``image_start``."""
    angles = rotary_angles(positions(length, image_start, grid), rotary).astype(np.float64)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Tables(cos, sin, np.tril(np.ones((length, length), np.bool_)))


def section_of(values: Sequence[int], head_dim: int) -> tuple[int, ...]:
    """``values`` checked as a rotary section of ``head_dim``. Raises ValueError."""
    section = tuple(int(v) for v in values)
    if len(section) != 3 or min(section) < 0 or sum(section) != head_dim // 2:
        raise ValueError(f"rotary sections {section} do not fill half of a head of {head_dim}")
    return section
