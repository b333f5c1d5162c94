"""From an image to the patches that Qwen2.5-VL and Qwen3-VL read, without torch.

A size is (height, width) in pixels. `smart_size` is the size that those models' own processors choose; a
bundle has graphs for a few sizes only, and takes the `nearest_size` of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from ppcr import images
from ppcr.config import MLLMConfig
from ppcr.errors import ImageError

Float32Array = npt.NDArray[np.float32]
Size = tuple[int, int]

MAX_ASPECT = 200
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def smart_size(size: Size, unit: int, min_pixels: int, max_pixels: int) -> Size:
    """The multiples of ``unit`` nearest to ``size`` whose area lies within the bounds, proportions kept.

    Raises:
        ImageError: one side is more than 200 times the other.
    """
    if max(size) > MAX_ASPECT * min(size):
        height, width = size
        raise ImageError(f"an image of {width}x{height} is too narrow: crop it to at most {MAX_ASPECT}:1")
    # Python's own rounding: half a unit goes to the even side, as in the processors.
    sides = [round(side / unit) * unit for side in size]
    area = size[0] * size[1]
    if math.prod(sides) > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        sides = [max(unit, math.floor(side / shrink / unit) * unit) for side in size]
    elif math.prod(sides) < min_pixels:
        grow = math.sqrt(min_pixels / area)
        sides = [math.ceil(side * grow / unit) * unit for side in size]
    return sides[0], sides[1]


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
