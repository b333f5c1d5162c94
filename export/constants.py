"""Constants of a graph that is being rewritten, wherever they lie: in the model, or in files beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.external import ExternalData

_INLINE = 1024  # bytes; smaller constants go into the model even where larger ones lie beside it
_PIECE = 1 << 24
_FULL_WEIGHTS = ("lm_head.weight",)  # its rounding would show in every token


def is_outside(value: onnx.TensorProto) -> bool:
    """Whether the bytes of ``value`` lie in a file beside the model."""
    return value.data_location == TensorProto.EXTERNAL


def outside_bytes(value: onnx.TensorProto, *folders: Path) -> np.memmap:
    """The bytes of a constant that `is_outside`, u8 [length], mapped from the file in one of ``folders``.

    Raises OSError where none has it.
    """
    told = {entry.key: entry.value for entry in value.external_data}
    places = [folder / told["location"] for folder in folders]
    path = next((place for place in places if place.is_file()), places[0])
    start, length = int(told.get("offset", 0)), int(told["length"])
    return np.memmap(path, np.uint8, "r", offset=start, shape=(length,))


class Constants:
    """Reads constants of one model, and keeps new ones where its own lie.

    Args:
        folder: of the model's file. data: where large new ones go; None: into the model.
    """

    def __init__(self, folder: Path | None = None, data: ExternalData | None = None) -> None:
        self.folder, self.data = folder, data

    def array(self, value: onnx.TensorProto) -> np.ndarray:
        """The numbers of ``value``; those of another file are mapped, not read."""
        if not is_outside(value):
            return numpy_helper.to_array(value)
        assert self.folder is not None, "a model with data beside it comes with its folder"
        kind = helper.tensor_dtype_to_np_dtype(value.data_type)
        return outside_bytes(value, self.folder).view(kind).reshape(tuple(value.dims))

    def keep(
        self,
        name: str,
        kind: int,
        array: np.ndarray,
        convert: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> onnx.TensorProto:
        """``array``, by ``convert`` in ONNX type ``kind``, as a constant called ``name``; piece by piece."""
        if self.data is None or array.nbytes < _INLINE:
            return helper.make_tensor(name, kind, array.shape, convert(array).tobytes(), raw=True)
        pieces = (convert(piece) for piece in _pieces(array))
        return self.data.add(name, kind, array.shape, pieces)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE]


def product_weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Constant matrices that are used in products alone, the head's left out."""
    constants = {value.name: value for value in model.graph.initializer}
    users: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    names = dict.fromkeys(node.input[1] for node in model.graph.node if node.op_type == "MatMul")
    return [
        constants[name]
        for name in names
        if name in constants
        and name not in _FULL_WEIGHTS
        and len(constants[name].dims) == 2
        and users[name] == {"MatMul"}
    ]
