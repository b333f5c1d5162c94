"""Masks out: from logits to `bool[H, W]`, COCO run-length strings, overlap, PNG files and the overlay.

A mask is `bool[H, W]` at the original image's size; instance masks are `bool[N, H, W]`.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ppcr.files import PathLike, atomic_file

BoolMask = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
UInt8Image = npt.NDArray[np.uint8]
Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_COLORS: tuple[Color, ...] = (
    (0, 200, 255), (255, 64, 160), (120, 230, 40), (255, 150, 0), (150, 100, 255), (255, 230, 0),
    (0, 220, 160), (255, 80, 60), (60, 120, 255), (230, 120, 255),
)  # fmt: skip
_DRAW_SIDE = 640
_FILL = 0.25
_BACKGROUND = 0.68
_HALO = 0.45
_CAPTION_PAPER: Color = (24, 26, 32)
_CAPTION_INK: Color = (238, 240, 244)


class RLE(TypedDict):
    """COCO run lengths: `size` is [height, width], `counts` the compressed string, columns first."""

    size: list[int]
    counts: str


def encode_rle(mask: npt.NDArray[Any]) -> RLE:
    """Encode `bool[H, W]` as COCO's compressed RLE: pycocotools' `encode`, with str counts for JSON."""
    flat = np.asarray(mask).astype(bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    runs = np.diff(changes, prepend=0, append=flat.size).tolist()
    # Each run but the first three is stored as the difference to the run two before: often a small number.
    deltas = [run - runs[i - 2] if i > 2 else run for i, run in enumerate(runs)]
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": "".join(map(_number_to_text, deltas))}


def decode_rle(rle: RLE) -> BoolMask:
    """Decode COCO's compressed RLE to `bool[H, W]`. Raises ValueError when the counts do not fit the size."""
    height, width = rle["size"]
    runs: list[int] = []
    for i, delta in enumerate(_text_to_numbers(rle["counts"])):
        runs.append(delta + runs[i - 2] if i > 2 else delta)
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"RLE counts cover {sum(runs)} pixels, not {height}x{width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")


def mask_from_logits(logits: npt.NDArray[np.floating[Any]], size: tuple[int, int]) -> BoolMask:
    """Resize `f32[h, w]` logits bilinearly to the original image's `size` = (H, W); True where above 0."""
    height, width = size
    picture = Image.fromarray(np.ascontiguousarray(logits, np.float32))
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    return np.greater(resized, 0)


def union(masks: npt.NDArray[Any]) -> BoolMask:
    """Union `bool[H, W]` of `bool[N, H, W]`; all False for N = 0."""
    return np.asarray(np.asarray(masks, bool).any(axis=0), np.bool_)


def iou(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Intersection over union of two `bool[H, W]`; 1 when both are empty ("none" answered rightly)."""
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    if first.shape != second.shape:
        raise ValueError(f"masks of different sizes: {first.shape} and {second.shape}")
    both = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / both if both else 1.0


def save_png(array: npt.NDArray[Any], path: PathLike) -> None:
    """Write `bool[H, W]` (as 0, 255) or uint8 (grey or RGB) as a PNG, atomically. Raises OutputError."""
    pixels = array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array
    with atomic_file(path) as part:
        Image.fromarray(pixels).save(part, format="PNG")


def color_of(index: int) -> Color:
    """The overlay's colour of instance `index`, as RGB 0..255; distinct for neighbours, without an end."""
    if index < len(_COLORS):
        return _COLORS[index]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def overlay(
    image: UInt8Image,
    masks: npt.NDArray[Any],
    boxes: npt.ArrayLike,
    labels: Sequence[str] = (),
    *,
    caption: str = "",
    scale: int | None = None,
) -> UInt8Image:
    """Picture of a result: masks filled and outlined, boxes, a label each, and a caption below.

    image `uint8[H, W, 3]`; masks `bool[N, H, W]`; boxes `[N, 4]` xyxy in pixels of the image (or empty);
    labels N short texts (or none). Returns `uint8[H * s (+ caption), W * s, 3]`, where s is `scale`, by
    default the smallest whole number (up to 8) that makes the longer side 640: small images stay legible.
    """
    height, width = image.shape[:2]
    s = scale or min(8, -(-_DRAW_SIDE // max(height, width)))
    picture = Image.fromarray(image).resize((width * s, height * s), Image.Resampling.BICUBIC)
    pixels = np.array(picture, np.float32)
    line = max(1, round(max(pixels.shape[:2]) / 320))
    _paint(pixels, [_enlarge(mask, s) for mask in np.asarray(masks, bool)], line)
    picture = Image.fromarray(np.rint(pixels, out=pixels).astype(np.uint8))
    frames = np.asarray(boxes, np.float32).reshape(-1, 4) * s
    _draw_boxes(picture, frames, labels, line)
    return np.array(_with_caption(picture, caption) if caption else picture)


def _number_to_text(value: int) -> str:
    # Five bits a character from 48 on, lowest first; bit 5: more follows; bit 4 of the last: the sign.
    text = ""
    while True:
        bits = value & 31
        value >>= 5
        last = value == (-1 if bits & 16 else 0)
        text += chr(48 + (bits if last else bits | 32))
        if last:
            return text


def _text_to_numbers(text: str) -> list[int]:
    numbers: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {character!r} does not belong in RLE counts")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            numbers.append(value - (1 << shift) if bits & 16 else value)
            value = shift = 0
    if shift:
        raise ValueError("RLE counts are cut short")
    return numbers


def _enlarge(mask: BoolMask, scale: int) -> BoolMask:
    height, width = mask.shape
    grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    smooth = grey.resize((width * scale, height * scale), Image.Resampling.BILINEAR)
    return np.asarray(smooth) > 127


def _paint(pixels: Float32Array, masks: list[BoolMask], line: int) -> None:
    if not masks:
        return
    # In place and under a mask: indexing by masks of a whole photograph would take several times its memory.
    background = ~np.logical_or.reduce(masks)[..., None]
    np.multiply(pixels, np.float32(_BACKGROUND), out=pixels, where=background)
    for index, mask in enumerate(masks):
        filled = mask[..., None]
        np.multiply(pixels, np.float32(1 - _FILL), out=pixels, where=filled)
        np.add(pixels, np.float32(_FILL) * np.asarray(color_of(index), np.float32), out=pixels, where=filled)
    # Outlines after all fills, so that a neighbour's fill never hides one.
    for index, mask in enumerate(masks):
        pixels[_grow(mask, line) & ~mask] *= _HALO
        pixels[_grow(~mask, line) & mask] = color_of(index)


def _grow(mask: BoolMask, radius: int) -> BoolMask:
    """What lies within `radius` rows and columns of the mask."""
    grown = mask.copy()
    for lines in (grown, grown[::-1], grown.T, grown.T[::-1]):
        # Each round doubles the reach, in place: a photograph's outline is wide, and copies of it are large.
        reach = 0
        while reach < radius:
            step = min(reach + 1, radius - reach)
            lines[:-step] |= lines[step:]
            reach += step
    return grown


def _draw_boxes(picture: Image.Image, boxes: Float32Array, labels: Sequence[str], line: int) -> None:
    draw = ImageDraw.Draw(picture)
    last = np.array([picture.width - 1, picture.height - 1])
    first = np.clip(np.rint(boxes[:, :2]), 0, last)
    second = np.clip(np.maximum(np.rint(boxes[:, 2:]) - 1, first), 0, last)
    corners = [(x1, y1, x2, y2) for x1, y1, x2, y2 in np.concatenate([first, second], axis=1).tolist()]
    for index, box in enumerate(corners):
        draw.rectangle(box, outline=color_of(index), width=line)
    if min(picture.size) < 64:
        return
    font = _font(max(11, max(picture.size) // 46))
    for index, (label, box) in enumerate(zip(labels, corners, strict=False)):
        text = _drawable(label)
        _, _, tag_width, tag_height = (round(v) for v in draw.textbbox((0, 0), text, font=font))
        tag_width, tag_height = tag_width + 8, tag_height + 6
        left = max(0, min(box[0], picture.width - tag_width))
        top = box[1] - tag_height if box[1] >= tag_height else box[1]
        draw.rectangle((left, top, left + tag_width - 1, top + tag_height - 1), fill=color_of(index))
        draw.text((left + 4, top + 2), text, fill=(0, 0, 0), font=font)


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    if picture.width < 64:
        return picture
    size = max(12, min(picture.size) // 36)
    font = _font(size)
    room = picture.width - 2 * size
    lines = [part for line in caption.splitlines() for part in _wrap(_drawable(line), font, room)]
    step = round(size * 1.5)
    sheet = Image.new("RGB", (picture.width, picture.height + step * len(lines) + size), _CAPTION_PAPER)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((size, picture.height + size // 2 + number * step), line, fill=_CAPTION_INK, font=font)
    return sheet


def _wrap(text: str, font: Font, width: int, most: int = 4) -> list[str]:
    lines: list[str] = []
    rest = text
    while rest and len(lines) < most:
        end = min(len(rest), 400)
        while end > 1 and font.getlength(rest[:end]) > width:
            space = rest.rfind(" ", 0, end)
            end = space if space > 0 else end - 1
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-3] + "..."
    return lines


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _drawable(text: str) -> str:
    # Pillow's built-in font knows Western letters only; anything else would be drawn as an empty frame.
    return "".join(c if c.isprintable() else " " for c in text).encode("latin-1", "replace").decode("latin-1")
