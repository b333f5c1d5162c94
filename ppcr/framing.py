"""How an image lies in the segmenter's square input: stretched over all of it, or scaled and padded.

- "stretch": width and height are scaled each by itself; the image covers the whole input.
- "pad": the longer side is scaled to the input's, the shorter by the same factor and rounded; the image lies
  in the upper left corner, and zeros, after normalisation, below or right of it. This is SAM's way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr import images, masks
from ppcr.config import SegmenterConfig
from ppcr.torch_resize import resize_like_torch

BoolMask = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
UInt8Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Framing:
    """One image's place in the input. Sizes are (height, width).

    Attributes:
        size: of the original image. content: of the part of the input that it covers.
        config: the input's size and normalisation.
    """

    size: tuple[int, int]
    content: tuple[int, int]
    config: SegmenterConfig

    @classmethod
    def of(cls, size: tuple[int, int], config: SegmenterConfig) -> Framing:
        """The framing of an image of ``size`` that ``config`` asks for."""
        if config.fit == "stretch":
            return cls(size, config.image_size, config)
        height, width = size
        scale = min(config.image_size[0] / height, config.image_size[1] / width)
        # A line of pixels stays a line of pixels, however long.
        rows, columns = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        return cls(size, (rows, columns), config)

    def pixels(self, image: UInt8Image) -> Float32Array:
        """uint8 [H, W, 3] of ``size`` to the segmenter's input, f32 [3, h, w], normalised and padded."""
        config = self.config
        # SAM 2's processor resizes with torch, the others' with Pillow.
        resize = resize_like_torch if config.family == "sam2" else images.resize
        inner = images.normalise(resize(image, self.content), config.mean, config.std)
        if self.content == config.image_size:
            return inner
        whole = np.zeros((3, *config.image_size), np.float32)
        whole[:, : self.content[0], : self.content[1]] = inner
        return whole

    def place(self, unit: npt.ArrayLike) -> Float32Array:
        """Boxes [..., 4] or points [..., 2] in 0..1 of the image to 0..1 of the input."""
        values = np.asarray(unit, np.float32)
        (rows, columns), (height, width) = self.content, self.config.image_size
        share = np.asarray([columns / width, rows / height], np.float32)
        return values * np.tile(share, values.shape[-1] // 2)

    def mask(self, logits: npt.NDArray[np.floating[Any]]) -> BoolMask:
        """Logits f32 [h, w] over the whole input to bool [H, W] of the image; True where above 0."""
        if self.config.fit == "stretch":
            return masks.mask_from_logits(logits, self.size)
        rows, columns = (
            _by_way_of(cells, side, content, size)
            for cells, side, content, size in zip(
                logits.shape, self.config.image_size, self.content, self.size, strict=True
            )
        )
        return np.greater(rows @ np.asarray(logits, np.float32) @ columns.T, 0)


@lru_cache(maxsize=64)
def _by_way_of(cells: int, side: int, content: int, size: int) -> Float32Array:
    """f32 [size, cells]: bilinear from ``cells`` to ``side``, cut off at ``content``, bilinear to ``size``.

    SAM's two steps, one after the other along a line: they are linear, so both are one matrix. Going straight
    from the cells to the image would move edges by fractions of a pixel.
    """
    large = _bilinear(np.eye(cells, dtype=np.float32), side)[:content]
    return _bilinear(large, size)


def _bilinear(lines: Float32Array, size: int) -> Float32Array:
    """[n, k] to [size, k], each line between its two neighbours, pixels being areas."""
    count = len(lines)
    places = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    low = np.floor(places).astype(np.int64)
    share = (places - low).astype(np.float32)[:, None]
    return (1 - share) * lines[low] + share * lines[np.minimum(low + 1, count - 1)]
