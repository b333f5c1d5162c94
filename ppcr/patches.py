"""From an image to the patches that Qwen2.5-VL and Qwen3-VL read, without torch.

A size is (height, width) in pixels. Those models' own processors choose any multiple of a patch; a bundle has
graphs for a few sizes only, and takes the `nearest_size` of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from ppcr import images
from ppcr.config import MLLMConfig

Float32Array = npt.NDArray[np.float32]
Size = tuple[int, int]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def nearest_size(size: Size, choices: Sequence[Size]) -> Size:
    """The choice whose proportions come nearest to those of ``size``; of equals, the nearest in area."""

    def distance(choice: Size) -> tuple[float, float]:
        stretch = [math.log(mine / theirs) for mine, theirs in zip(size, choice, strict=True)]
        return round(abs(stretch[0] - stretch[1]), 9), abs(sum(stretch))

    return min(choices, key=distance)


def image_patches(image: images.UInt8Image, size: Size, config: MLLMConfig) -> Float32Array:
    """uint8 [H, W, 3] stretched to ``size`` and normalised, as `ppcr.images.patchify` orders it.

    Returns f32 [patches, patch_dim]. Raises ValueError unless the size is a multiple of patch * merge.
    """
    height, width = size
    unit = config.patch * config.merge
    if height % unit or width % unit:
        raise ValueError(f"image {height}x{width} is not a multiple of patch * merge = {unit}")
    small = image
    if image.shape[:2] != size:
        small = np.asarray(Image.fromarray(image).resize((width, height), _FILTERS[config.resample]))
    rows, columns, patch, merge = height // unit, width // unit, config.patch, config.merge
    cells = small.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    # Moved about as bytes, and made into numbers once, by a table of the 256 there are.
    cells = np.ascontiguousarray(cells).reshape(-1, 3, patch * patch)
    out = np.empty((len(cells), 3, config.temporal, patch * patch), np.float32)
    levels = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    table = images.normalise(levels, config.mean, config.std)[:, 0]
    for channel in range(3):
        np.take(table[channel], cells[:, channel], out=out[:, channel, 0], mode="clip")
    out[:, :, 1:] = out[:, :, :1]
    return out.reshape(len(cells), -1)
