"""Read safetensors with numpy alone, whatever their floating type: one file or several with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """Read the headers of ``folder/model.safetensors``, or of the files its index names, or of ``names``.

        Raises:
            CheckpointError: a file is missing, cut short or not safetensors.
        """
        self.folder = folder
        self._places: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for path in _files(folder) if names is None else [folder / name for name in names]:
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
        if 0 in self.shape(name):
            return np.zeros(self.shape(name), np.float32)
        return _widened(self.raw(name), self.kind(name)).reshape(self.shape(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the file's header. Raises KeyError."""
        return self._places[name][2]

    def kind(self, name: str) -> str:
        """The type as the file has it: "F32", "F16", "BF16", …"""
        return self._places[name][1]

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the tensor has this shape."""
        held = self.shape(name)
        if held != shape:
            told = f"{name} of {self.folder} has shape {list(held)}, its config.json says {list(shape)}"
            raise CheckpointError(f"{told}: copy weights and configuration of one model")

    def raw(self, name: str) -> np.ndarray:
        """The tensor's own bytes, mapped and not read (bfloat16 as uint16); a scalar has shape [1]."""
        path, kind, shape, offset = self._places[name]
        return np.memmap(path, dtype=_TYPES[kind], mode="r", offset=offset, shape=shape or (1,))

    def name_of(self, *names: str) -> str:
        """The first of ``names`` that is there (writers of one architecture differ in their prefixes).

        Raises:
            CheckpointError: none of them is.
        """
        for name in names:
            if name in self._places:
                return name
        raise CheckpointError(f"{self.folder} holds no tensor {names[0]}: it is of another architecture")

    def find(self, *names: str) -> np.ndarray:
        """The tensor of the first of ``names`` that is there. Raises CheckpointError."""
        return self[self.name_of(*names)]

    def matrix(self, *names: str) -> Matrix:
        """The tensors of these names, flattened to [out, in] each, one under the other; nothing is read yet.

        Raises:
            CheckpointError: their widths differ, or one is no matrix.
        """
        shapes = [self.shape(name) for name in names]
        if any(len(shape) < 2 for shape in shapes) or len({math.prod(shape[1:]) for shape in shapes}) != 1:
            told = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
            raise CheckpointError(f"{self.folder} holds matrices that do not fit each other: {told}")
        return Matrix(self, names)


@dataclass(frozen=True)
class Matrix:
    """A matrix [out, in] that stays in its files and is read some columns at a time."""

    files: TensorFiles
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        first = self.files.shape(self.names[0])
        return sum(self.files.shape(name)[0] for name in self.names), math.prod(first[1:])

    def columns(self, start: int, stop: int) -> np.ndarray:
        """f32 [out, stop - start]."""
        parts = [self._part(name)[:, start:stop] for name in self.names]
        kinds = [self.files.kind(name) for name in self.names]
        wide = [_widened(part, kind) for part, kind in zip(parts, kinds, strict=True)]
        return np.asarray(wide[0] if len(wide) == 1 else np.concatenate(wide), np.float32)

    def _part(self, name: str) -> np.ndarray:
        raw = self.files.raw(name)
        return raw.reshape(raw.shape[0], -1)


class RowTable:
    """A table [rows, columns] left in its file: rows are read, as float32, when they are asked for.

    What an embedding is to a runtime: a gigabyte of which a conversation needs a few hundred rows.
    """

    def __init__(self, files: TensorFiles, name: str) -> None:
        self._raw, self._kind = files.raw(name), files.kind(name)
        self.shape: tuple[int, ...] = files.shape(name)

    def __getitem__(self, ids: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """f32 [*shape of ids, columns]."""
        return np.asarray(_widened(np.asarray(self._raw[ids]), self._kind), np.float32)


def _widened(raw: np.ndarray, kind: str) -> np.ndarray:
    """A copy with bfloat16 (as uint16) and float16 as float32."""
    if kind == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.array(raw, np.float32 if kind == "F16" else None)


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _WEIGHTS).is_file() or not index.is_file():
        return [folder / _WEIGHTS]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / str(name) for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"cannot read {index}: {error}") from None
