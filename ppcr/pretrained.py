"""What a bundle must know of a public Qwen2.5-VL or Qwen3-VL directory, read from its own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppcr.config import MLLMConfig
from ppcr.errors import CheckpointError
from ppcr.files import read_json
from ppcr.zero_shot import CONVENTIONS

# About 256 image tokens each, in the proportions of photographs. Multiples of 112 pixels where the family
# attends within windows of that side: windows are then whole, and cost no mask.
RESOLUTIONS = {
    "qwen2_5_vl": ((448, 448), (336, 560), (560, 336), (336, 672), (672, 336)),
    "qwen3_vl": ((512, 512), (448, 576), (576, 448), (384, 640), (640, 384), (352, 704), (704, 352)),
}
MAX_LENGTH = 1024
"""Tokens of both turns together: about 300 of the image, 160 of instructions, and the longest answers."""
_NORMALISATION = {
    "qwen2_5_vl": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "qwen3_vl": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def spoken_to(folder: Path) -> tuple[MLLMConfig, str]:
    """How to speak to the public model in ``folder``, and how it writes boxes (`ppcr.boxes`).

    Raises:
        CheckpointError: another architecture, or a file that cannot be read.
    """
    config = mllm_config(folder)
    return config, CONVENTIONS[config.family]


def mllm_config(folder: Path) -> MLLMConfig:
    """How to speak to the model in ``folder``, from its config.json and, if there, preprocessor_config.json.

    Raises:
        CheckpointError: another architecture, or a file that cannot be read.
    """
    config = _read(folder / "config.json")
    family = config.get("model_type")
    if family not in CONVENTIONS:
        known = " or ".join(CONVENTIONS)
        raise CheckpointError(f"{folder} holds a model of type {family!r}: give a directory of {known}")
    told = folder / "preprocessor_config.json"
    processor = _read(told) if told.is_file() else {}
    mean, std = _NORMALISATION[family]
    sizes = RESOLUTIONS[family]
    try:
        vision = config["vision_config"]
        patch, merge = int(vision["patch_size"]), int(vision["spatial_merge_size"])
        made = MLLMConfig(
            family=family,
            image_size=sizes[0],
            resolutions=sizes,
            patch=patch,
            merge=merge,
            temporal=int(vision["temporal_patch_size"]),
            mean=_three(processor.get("image_mean") or mean),
            std=_three(processor.get("image_std") or std),
            ruler=0,
            max_length=MAX_LENGTH,
            resample="bicubic",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not describe a {family}: {error!r}") from None
    if any(side % (patch * merge) for size in sizes for side in size):
        raise CheckpointError(f"{folder} cuts images into other patches than the published {family} models")
    return made


def _read(path: Path) -> dict[str, Any]:
    missing = f"{path} is missing: give the directory of a whole model"
    return read_json(path, CheckpointError, missing=missing)


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third
