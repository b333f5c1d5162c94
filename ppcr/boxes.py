"""Boxes, and the frames they live in.

- pixels: xyxy of the *original* image, 0..W and 0..H, x right, y down, edges between pixels (a 1x1 image's
  only full box is 0,0,1,1). This is what a user gives and gets.
- unit: the same divided by width and height, 0..1, so that it holds for every stretched copy. The segmenter
  takes it in 0..1 of its input, which `ppcr.framing` turns it into where images are padded.
- location: unit values in 1000 bins, 0..999; bin k covers [k/1000, (k+1)/1000) and stands for its centre.
  This is what the language model of ppcr-tiny writes.
- written: the whole numbers that a pretrained language model writes, in one of two conventions: ``pixels`` of
  the resized image it was shown (Qwen2.5-VL), or ``thousandths`` of width and height, 0..1000 (Qwen3-VL).

All arrays are `[..., 4]` as x1, y1, x2, y2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.errors import BoxError

LOCATION_BINS = 1000
WRITTEN = ("pixels", "thousandths")
"""Conventions of the numbers that pretrained models write."""
Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


def to_location(values: npt.ArrayLike) -> Int64Array:
    """Unit values to location bins: min(999, int(v * 1000)); values outside 0..1 go to the end bins.

    Raises BoxError on NaN or infinity.
    """
    unit = np.asarray(values, np.float64)
    if not np.isfinite(unit).all():
        raise BoxError("a coordinate is not a finite number; give numbers within 0..1")
    return np.clip(np.floor(unit * LOCATION_BINS), 0, LOCATION_BINS - 1).astype(np.int64)


def from_location(bins: npt.ArrayLike) -> Float32Array:
    """Location bins 0..999 to the unit value of their centre, (k + 0.5) / 1000. Raises BoxError on others."""
    k = np.asarray(bins)
    if k.size and (not np.issubdtype(k.dtype, np.integer) or k.min() < 0 or k.max() >= LOCATION_BINS):
        raise BoxError(f"locations must be whole numbers within 0..{LOCATION_BINS - 1}")
    return ((k.astype(np.float64) + 0.5) / LOCATION_BINS).astype(np.float32)


def to_pixels(boxes: npt.ArrayLike, width: int, height: int) -> Float32Array:
    """Unit `[..., 4]` (or points `[..., 2]`) to pixels of a `width` x `height` image."""
    unit = np.asarray(boxes, np.float32)
    return unit * _scale(unit, width, height)


def to_unit(boxes: npt.ArrayLike, width: int, height: int) -> Float32Array:
    """Pixel `[..., 4]` (or points `[..., 2]`) of a `width` x `height` image to unit."""
    pixels = np.asarray(boxes, np.float32)
    return pixels / _scale(pixels, width, height)


def repair(boxes: npt.ArrayLike) -> Float32Array:
    """Make any finite unit boxes `[..., 4]` usable: corners in order, clipped to 0..1, at least one bin wide.

    For boxes that a model wrote; a user's box is validated by `parse_box` instead. Raises BoxError on NaN.
    """
    raw = np.asarray(boxes, np.float32)
    if not np.isfinite(raw).all():
        raise BoxError("a box holds a number that is not finite")
    low = np.clip(np.minimum(raw[..., :2], raw[..., 2:]), 0, 1)
    high = np.clip(np.maximum(raw[..., :2], raw[..., 2:]), 0, 1)
    smallest = np.float32(1 / LOCATION_BINS)
    low = np.minimum(low, 1 - smallest)
    return np.concatenate([low, np.maximum(high, low + smallest)], axis=-1)


def parse_box(text: str, width: int, height: int) -> Float32Array:
    """Read "x1,y1,x2,y2" in pixels of a `width` x `height` image as `f32[4]`.

    Raises BoxError unless it is four finite numbers with 0 <= x1 < x2 <= width, 0 <= y1 < y2 <= height and
    the box is at least one pixel wide and high.
    """
    parts = text.split(",")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) != 4 or not all(math.isfinite(value) for value in values):
        raise BoxError(f"box {text!r} is not four finite numbers; write it as x1,y1,x2,y2 in pixels")
    validate_box(values, width, height)
    return np.asarray(values, np.float32)


def validate_box(box: npt.ArrayLike, width: int, height: int) -> None:
    """Raise BoxError unless the pixel box `[4]` lies inside the image and is at least a pixel each way."""
    x1, y1, x2, y2 = (float(value) for value in np.asarray(box, np.float64))
    shown = f"box {x1:g},{y1:g},{x2:g},{y2:g}"
    if not all(math.isfinite(value) for value in (x1, y1, x2, y2)):
        raise BoxError(f"{shown} holds a number that is not finite; write it as x1,y1,x2,y2 in pixels")
    if x2 <= x1 or y2 <= y1:
        raise BoxError(f"{shown} is empty; x1 must be less than x2 and y1 less than y2")
    if min(x1, y1) < 0 or x2 > width or y2 > height:
        raise BoxError(f"{shown} is outside the image; keep x within 0..{width} and y within 0..{height}")
    if x2 - x1 < 1 or y2 - y1 < 1:
        size = f"{width}x{height}"
        raise BoxError(f"{shown} is smaller than a pixel; give pixels of the {size} image, not fractions")


def to_written(boxes: npt.ArrayLike, convention: str, size: tuple[int, int]) -> Int64Array:
    """Unit boxes as the numbers a pretrained model writes, shown an image of `size` = (height, width) pixels.

    Values outside 0..1 go to the image's edges. Raises BoxError on NaN, infinity or an unknown convention.
    """
    unit = np.asarray(boxes, np.float64)
    if not np.isfinite(unit).all():
        raise BoxError("a coordinate is not a finite number; give numbers within 0..1")
    return np.rint(unit.clip(0, 1) * _written_scale(unit, convention, size)).astype(np.int64)


def from_written(numbers: npt.ArrayLike, convention: str, size: tuple[int, int]) -> Float32Array:
    """The unit boxes of numbers a model wrote, shown an image of `size` = (height, width); see `repair`."""
    values = np.asarray(numbers, np.float64)
    return (values / _written_scale(values, convention, size)).astype(np.float32)


def area(boxes: npt.ArrayLike) -> Float32Array:
    """Areas `[...]` of boxes `[..., 4]`; 0 for a box with its corners out of order."""
    b = np.asarray(boxes, np.float32)
    sides = np.maximum(b[..., 2:] - b[..., :2], np.float32(0))
    return np.asarray(sides[..., 0] * sides[..., 1], np.float32)


def iou(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32Array:
    """Intersection over union, 0..1, of boxes `[..., 4]` in one frame, broadcasting; 0 where both are empty.

    For all pairs: `iou(a[:, None], b[None])` is `[len(a), len(b)]`.
    """
    first, second = np.asarray(a, np.float32), np.asarray(b, np.float32)
    corners = [np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])]
    inter = area(np.concatenate(corners, axis=-1))
    union = area(first) + area(second) - inter
    return np.where(union > 0, inter / np.where(union > 0, union, 1), 0).astype(np.float32)


def _scale(boxes: npt.NDArray[Any], width: int, height: int) -> Float32Array:
    return np.tile(np.asarray([width, height], np.float32), boxes.shape[-1] // 2)


def _written_scale(values: npt.NDArray[np.float64], convention: str, size: tuple[int, int]) -> Float32Array:
    height, width = size
    if convention == "pixels":
        return _scale(np.zeros(values.shape), width, height)
    if convention == "thousandths":
        return _scale(np.zeros(values.shape), 1000, 1000)
    raise BoxError(f"unknown convention {convention!r} for boxes: it is one of {', '.join(WRITTEN)}")
