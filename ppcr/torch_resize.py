"""Bilinear resizing of 8-bit images with torch's arithmetic, to the last bit and without torch.

SAM 2's processor resizes with torch: columns first, then rows, each with weights of at most 15 bits and eight
bits in between. Pillow keeps 22 bits of a weight, and rounds up to one pixel in twenty-five the other way.

cykooz-resizer (the Rust crate fast_image_resize) and torch both took that arithmetic from Pillow-SIMD, so one
direction at a time they agree. It has no wheels for some machines (Linux on ARM): there numpy does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ppcr.torch_resize_numpy import resize_with_numpy

UInt8Image = npt.NDArray[np.uint8]
Resize = Callable[[UInt8Image, tuple[int, int]], UInt8Image]

# Shrunk more than 128 times, the compiled resizer keeps one bit less of a weight than torch.
_MOST = 100


def resize_like_torch(image: UInt8Image, size: tuple[int, int]) -> UInt8Image:
    """Stretch `uint8[H, W, 3]` to `size` = (height, width); the answer may be read-only, or the image itself.

    The pixels are those of `torch.nn.functional.interpolate(..., mode="bilinear", antialias=True)` for uint8.
    """
    if image.shape[:2] == size:
        return image
    shrunk = max(image.shape[0] / size[0], image.shape[1] / size[1])
    compiled = compiled_resize() if shrunk <= _MOST else None
    return (compiled or resize_with_numpy)(image, size)


@lru_cache(maxsize=1)
def compiled_resize() -> Resize | None:
    """`resize_like_torch` on cykooz-resizer, for images shrunk at most a hundredfold; None without it."""
    try:
        from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
    except ImportError:
        return None
    options = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear))

    def resize(image: UInt8Image, size: tuple[int, int]) -> UInt8Image:
        height, width = size
        held = ImageData(image.shape[1], image.shape[0], PixelType.U8x3, image.tobytes())
        # Asked for both directions at once it would take the rows first, and round otherwise than torch.
        for columns, rows in ((width, image.shape[0]), (width, height)):
            if (columns, rows) != (held.width, held.height):
                # A resizer of its own for each call: one that is shared refuses a second thread.
                source, held = held, ImageData(columns, rows, PixelType.U8x3)
                Resizer().resize(source, held, options)
        return np.frombuffer(held.get_buffer(), np.uint8).reshape(height, width, 3)

    return resize
