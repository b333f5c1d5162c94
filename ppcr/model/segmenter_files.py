"""segmenter/ of a checkpoint as files: config.json and model.safetensors, of whatever architecture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ppcr.kinds import read_fields

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

_Config = TypeVar("_Config", bound="DataclassInstance")
_Model = TypeVar("_Model", bound=nn.Module)


def save_segmenter(
    model: nn.Module, config: DataclassInstance, folder: str | Path, *, half: bool = False
) -> None:
    """Write config.json and model.safetensors (fp16 where `half`); the weights are renamed into place.

    Raises:
        OSError, SafetensorError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (value.half() if half and value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    partial = folder / f"{WEIGHTS_FILE}.partial"
    try:
        save_file(state, partial, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / WEIGHTS_FILE)
    finally:
        partial.unlink(missing_ok=True)


def parse_config(kind: type[_Config], text: str, architectures: Sequence[str]) -> _Config:
    """config.json's text as ``kind``.

    Raises:
        ValueError: of none of ``architectures``, or fields are unknown or of another kind.
    """
    values: dict[str, Any] = json.loads(text)
    found = values.get("architecture")
    if found not in architectures:
        raise ValueError(f"architecture {found!r} is none of {', '.join(architectures)}")
    try:
        return read_fields(kind, values)
    except TypeError as error:
        raise ValueError(f"the segmenter's config.json does not fit this version of ppcr: {error}") from None


def read_config(folder: str | Path) -> str:
    """Text of config.json. Raises OSError or ValueError (not UTF-8)."""
    return (Path(folder) / CONFIG_FILE).read_text(encoding="utf-8")


def fill(model: _Model, folder: str | Path) -> _Model:
    """`model` with the weights of a folder, as fp32 and in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged or does not fit the model.
    """
    path = Path(folder) / WEIGHTS_FILE
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    try:
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its config.json: {error}") from None
    return model.eval()
