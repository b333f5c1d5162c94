"""Weights beside a graph: ONNX external data, written piece by piece so that none is whole in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx
from onnx import TensorProto

# Engines map the file into memory, which asks for offsets at whole pages.
_PAGE = 4096


class ExternalData:
    """One file of tensors, in the order they come. Several graphs of one folder may share it.

    A context manager: left by an error, it removes the file again. A tensor that is added a second time under
    its name is not written again: graphs that differ in their shapes alone share their weights.
    """

    def __init__(self, path: Path) -> None:
        """Create ``path``, which must not exist; graphs that use it lie in the same folder."""
        self.path = path
        self._known: dict[str, onnx.TensorProto] = {}
        self._file = path.open("xb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            if kind is not None:
                self.path.unlink(missing_ok=True)

    def flush(self) -> None:
        """Give everything written so far to whoever opens the file now. Raises OSError."""
        self._file.flush()

    def add(
        self, name: str, kind: int, shape: tuple[int, ...], pieces: Iterable[np.ndarray]
    ) -> onnx.TensorProto:
        """Append a tensor of ONNX type ``kind`` whose bytes ``pieces`` bring, and return what stands for it.

        Raises OSError when the disk is full.
        """
        if name in self._known:
            return self._known[name]
        start = -(-self._file.tell() // _PAGE) * _PAGE
        self._file.seek(start)
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (
            ("location", self.path.name), ("offset", start), ("length", self._file.tell() - start)
        ):  # fmt: skip
            tensor.external_data.add(key=key, value=str(value))
        self._known[name] = tensor
        return tensor
