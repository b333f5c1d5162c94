"""Read safetensors with numpy alone, whatever their floating type: one file or several with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppcr.errors import CheckpointError

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors below a folder by name, read when asked for; bfloat16 and float16 come as float32.

    numpy knows no bfloat16, and safetensors' own numpy reader refuses it.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers of ``folder/model.safetensors``, or of the files its index names.

        Raises:
            CheckpointError: a file is missing, cut short or not safetensors.
        """
        self.folder = folder
        self._places: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for path in _files(folder):
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                size = path.stat().st_size
                if start > size:
                    raise ValueError("it is cut short")
                header: dict[str, Any] = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
                length = math.prod(shape) * np.dtype(_TYPES[entry["dtype"]]).itemsize
                if length != last - first or start + last > size:
                    raise ValueError("it is cut short")
                self._places[name] = (path, entry["dtype"], shape, start + first)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: copy the whole checkpoint") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot read {path} as safetensors ({error}): copy it again") from None

    def __getitem__(self, name: str) -> np.ndarray:
        path, kind, shape, offset = self._places[name]
        if 0 in shape:
            return np.zeros(shape, np.float32)
        raw = np.memmap(path, dtype=_TYPES[kind], mode="r", offset=offset, shape=shape or (1,))
        if kind == "BF16":
            wide = raw.astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(shape)
        return np.array(raw, np.float32 if kind == "F16" else None).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def find(self, *names: str) -> np.ndarray:
        """The first of ``names`` that is there (writers of one architecture differ in their prefixes).

        Raises:
            CheckpointError: none of them is.
        """
        for name in names:
            if name in self._places:
                return self[name]
        raise CheckpointError(f"{self.folder} holds no tensor {names[0]}: it is of another architecture")


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _WEIGHTS).is_file() or not index.is_file():
        return [folder / _WEIGHTS]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / str(name) for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"cannot read {index}: {error}") from None
