"""Images in: any file, Pillow image or array becomes uint8 RGB; then resize, normalise and patchify.

Conventions: an image is `uint8[H, W, 3]`, RGB, 0..255, rows downwards, as a viewer shows it (EXIF orientation
applied, transparency over white, first frame of an animation). Model input is `f32[3, H, W]`.
"""

from __future__ import annotations

import logging
import os
import stat
import warnings
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ppcr.errors import ImageError

PathLike = str | os.PathLike[str]
UInt8Image = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

MAX_PIXELS = 50_000_000
"""Largest image that is decoded, in pixels; larger ones are refused from their header alone."""

# Pillow logs some damage before it raises; without a handler Python would print that on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Named, so that Pillow never starts an external program (EPS) or guesses where there is no signature (TGA).
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "AVIF")
_ORIENTATION_TAG = 0x0112
_ROWS = 64
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> UInt8Image:
    """Read an image file as `uint8[H, W, 3]` RGB.

    Handles EXIF orientation, CMYK, 16-bit (scaled to 8), palettes, transparency (over white) and animations
    (first frame). The size is checked from the header, before any pixel is decoded.
    Raises ImageError when the file is missing, empty, truncated, not an image, of a kind without a fixed
    range (32-bit float), or has more than `max_pixels` pixels.
    """
    if not os.fspath(path):
        raise ImageError("cannot read image: its path is empty; give an image file")
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise ImageError(f"cannot read image {path}: it is a folder; give an image file")
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(f"cannot read image {path}: it is not a regular file; give an image file")
        if info.st_size == 0:
            raise ImageError(f"cannot read image {path}: the file is empty; check how it was copied")
        with open(path, "rb") as file:
            return _decode(file, str(path), max_pixels)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"cannot read image {path}: no such file; check the path") from error
    except PermissionError as error:
        raise ImageError(f"cannot read image {path}: permission denied; make it readable") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read image {path}: {getattr(error, 'strerror', None) or error}") from error


def as_rgb(source: PathLike | Image.Image | npt.NDArray[Any], *, max_pixels: int = MAX_PIXELS) -> UInt8Image:
    """Turn a path, a Pillow image or an array into `uint8[H, W, 3]` RGB.

    Arrays: `[H, W]`, or `[H, W, C]` with C = 1 grey, 2 grey+alpha, 3 RGB or 4 RGBA; uint8, uint16 (0..65535),
    bool, or float in 0..1. The answer is a new array. Raises ImageError on anything else.
    """
    if isinstance(source, Image.Image):
        return _pixels(source, "the given image", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return load_image(source, max_pixels=max_pixels)
    kind = type(source).__name__
    raise ImageError(f"cannot use {kind} as an image; give a path, a Pillow image or a numpy array")


def resize(image: UInt8Image, size: tuple[int, int]) -> UInt8Image:
    """Stretch `uint8[H, W, 3]` to `size` = (height, width): Pillow's BILINEAR, antialiased when shrinking.

    An image of that size already is given back as it is.
    """
    height, width = size
    if image.shape[:2] == size:
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def normalise(image: UInt8Image, mean: Sequence[float], std: Sequence[float]) -> Float32Array:
    """`uint8[H, W, 3]` to contiguous `f32[3, H, W]`: (x / 255 - mean) / std, per channel."""
    # Planes first and in place: with a new array for each operation, most of the time goes into fresh memory.
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    middles, spreads = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    for plane, middle, spread in zip(planes, middles, spreads, strict=True):
        # Some rows at a time: they stay in the processor's cache from one operation to the next.
        for top in range(0, len(plane), _ROWS):
            rows = plane[top : top + _ROWS]
            rows /= np.float32(255)
            rows -= middle
            rows /= spread
    return planes


def patchify(pixels: Float32Array, patch: int, merge: int, temporal: int) -> Float32Array:
    """`f32[C, H, W]` to `f32[n_patches, C * temporal * patch * patch]` in Qwen2-VL's order.

    Rows run over (grid_h / merge, grid_w / merge, merge, merge), so that the patches merged into one token
    are neighbours; columns over (channel, temporal, patch row, patch column), the still image repeated
    `temporal` times. Raises ValueError unless H and W are multiples of patch * merge.
    """
    channels, height, width = pixels.shape
    unit = patch * merge
    if height % unit or width % unit:
        raise ValueError(f"image {height}x{width} is not a multiple of patch * merge = {unit}")
    rows, columns = height // unit, width // unit
    grid = pixels.reshape(channels, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
    # [rows, columns, merge, merge, C, temporal, patch, patch]
    frames = np.repeat(grid[:, :, :, :, :, None], temporal, axis=5)
    return frames.reshape(rows * columns * merge * merge, channels * temporal * patch * patch)


def _decode(file: BinaryIO, name: str, max_pixels: int) -> UInt8Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own size warning; `_pixels` checks the size
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise ImageError(_too_large(name, max_pixels)) from error
        except (UnidentifiedImageError, KeyError) as error:  # KeyError: this Pillow lacks the last formats
            raise ImageError(
                f"cannot read image {name}: no known kind of image, or damaged; convert it to PNG or JPEG"
            ) from error
        except Exception as error:
            raise ImageError(_damaged(name, error)) from error
        with image:
            return _pixels(image, name, max_pixels)


def _pixels(image: Image.Image, name: str, max_pixels: int) -> UInt8Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"cannot use image {name}: it has no pixels; give another image")
    if width * height > max_pixels:
        raise ImageError(_too_large(name, max_pixels, f" ({width}x{height})"))
    try:
        image.load()
        # Asked after loading (some formats turn themselves) and before converting (which drops metadata).
        turn = _turn(image)
        flat = _to_rgb(image, name)
        return np.array(flat if turn is None else flat.transpose(turn))
    except ImageError:
        raise
    except Exception as error:
        # Pillow's decoders raise a dozen unrelated types on damaged data; all of them mean the same here.
        raise ImageError(_damaged(name, error)) from error


def _damaged(name: str, error: Exception) -> str:
    return f"cannot read image {name}: the file is damaged or cut short ({error}); save or copy it again"


def _too_large(name: str, max_pixels: int, size: str = "") -> str:
    return f"image {name} is too large{size}: the limit is {max_pixels / 1e6:g} megapixels; shrink it first"


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata of any sort; the pixels are still good
        return None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(_eight_bit(np.asarray(image).clip(0, 65535))).convert("RGB")
    if mode in ("I", "F", "LAB"):
        told = f"pixel format {mode} has no fixed range"
        raise ImageError(f"cannot use image {name}: {told}; save it as 8-bit PNG or JPEG")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _eight_bit(values: npt.NDArray[Any]) -> UInt8Image:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, rounded


def _from_array(array: npt.NDArray[Any], max_pixels: int) -> UInt8Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        shape = array.shape
        raise ImageError(f"cannot use an array of shape {shape} as an image; give [H, W] or [H, W, 1..4]")
    if array.shape[0] * array.shape[1] > max_pixels:
        raise ImageError(_too_large("array", max_pixels, f" ({array.shape[1]}x{array.shape[0]})"))
    if array.size == 0:
        raise ImageError(f"cannot use an array of shape {array.shape} as an image: it has no pixels")
    if array.dtype == np.uint8:
        if array.shape[2] == 3:
            return np.array(array, order="C")
        values = np.ascontiguousarray(array)
    elif array.dtype == np.uint16:
        values = _eight_bit(array)
    elif array.dtype == np.bool_:
        values = array.astype(np.uint8) * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating) and bool(((array >= 0) & (array <= 1)).all()):
        values = np.rint(array * 255).astype(np.uint8)
    else:
        raise ImageError(
            f"cannot use a {array.dtype} array as an image; give uint8, uint16, bool, or float within 0..1"
        )
    # [H, W, 1] is not a Pillow shape; the other channel counts are L+A, RGB, RGBA.
    picture = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    return np.array(_to_rgb(picture, "array"))
