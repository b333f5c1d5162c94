"""Weights that are drawn instead of read: the tensors of a model of any size, without its files."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np

from ppcr.tensors import TensorFiles

_POOL = 1 << 25
_SPREAD = 0.02
_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


class DrawnTensors(TensorFiles):
    """The tensors of a Qwen decoder as whoever reads them asks for them, in fp32.

    All are windows of one pool of normal numbers, so that a model of any size takes no memory; rows of a
    matrix larger than the pool overlap.
    """

    def __init__(self, seed: int = 0) -> None:
        self.folder = Path("drawn")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pool = np.random.default_rng(seed).standard_normal(_POOL, np.float32) * np.float32(_SPREAD)

    def __contains__(self, name: object) -> bool:
        return not str(name).endswith(".bias") or str(name).endswith(_BIASES)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> np.ndarray:
        values = np.array(self.raw(name))
        return values + 1 if name.endswith("norm.weight") else values

    def name_of(self, *names: str) -> str:
        return names[0]

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """From now on ``name`` has this shape."""
        self._shapes[name] = shape

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def kind(self, name: str) -> str:
        return "F32"

    def raw(self, name: str) -> np.ndarray:
        shape = self.shape(name)
        rows, columns = shape[0], math.prod(shape[1:])
        step = min(columns, (_POOL - columns) // rows)
        first = zlib.crc32(name.encode()) % (_POOL - (rows - 1) * step - columns + 1)
        strides = (step * self._pool.itemsize, self._pool.itemsize)
        windows = np.lib.stride_tricks.as_strided(
            self._pool[first:], (rows, columns), strides, writeable=False
        )
        return windows.reshape(shape)
