"""SAM 2's resizing, compiled and in numpy, against torch itself: the same pixels, whatever the sizes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ppcr import torch_resize
from ppcr.torch_resize import compiled_resize, resize_like_torch
from ppcr.torch_resize_numpy import resize_with_numpy

Size = tuple[int, int]

needs_compiled = pytest.mark.skipif(
    compiled_resize() is None, reason="cykooz-resizer is not installed: it has no wheel for this machine"
)


@pytest.fixture(autouse=True)
def _found_again() -> Iterator[None]:
    yield
    compiled_resize.cache_clear()


def by_torch(image: np.ndarray, size: Size) -> np.ndarray:
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    resized = F.interpolate(planes, size, mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def random_side(rng: np.random.Generator, most: int) -> int:
    return round(math.exp(rng.uniform(0, math.log(most))))


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, Size]:
    """A picture of one of three sorts, and the size that it shall have."""
    rows, columns = random_side(rng, 1500), random_side(rng, 1500)
    if rng.random() < 0.3:  # of one colour: every rounding shows
        image = np.broadcast_to(rng.integers(0, 256, (1, 1, 3), np.uint8), (rows, columns, 3)).copy()
    elif rng.random() < 0.3:  # slow gradients: sums lie close to halves all over
        down, right = np.linspace(0, 200, rows)[:, None, None], np.linspace(0, 55, columns)[None, :, None]
        image = (down + right + np.zeros(3)).astype(np.uint8)
    else:
        image = rng.integers(0, 256, (rows, columns, 3), np.uint8)
    return image, (random_side(rng, 1100), random_side(rng, 1100))


def test_pixels_are_those_of_torch() -> None:
    rng = np.random.default_rng()
    for _ in range(40):
        image, size = random_case(rng)
        found = resize_like_torch(image, size)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, by_torch(image, size), err_msg=f"{image.shape} to {size}")


@needs_compiled
def test_compiled_and_numpy_agree() -> None:
    rng = np.random.default_rng()
    compiled = compiled_resize()
    assert compiled is not None
    for _ in range(40):
        image, size = random_case(rng)
        if max(np.divide(image.shape[:2], size)) <= torch_resize._MOST:
            wanted = resize_with_numpy(image, size)
            np.testing.assert_array_equal(compiled(image, size), wanted, err_msg=f"{image.shape} to {size}")


@pytest.mark.parametrize("resize", [resize_like_torch, resize_with_numpy])
@pytest.mark.parametrize("size", [(768, 1024), (1024, 1024)])
def test_the_largest_photographs(resize: torch_resize.Resize, size: Size) -> None:
    image = np.random.default_rng().integers(0, 256, (3000, 4000, 3), np.uint8)
    np.testing.assert_array_equal(resize(image, size), by_torch(image, size))


@pytest.mark.parametrize(
    ("given", "size"), [((3, 6819), (985, 1)), ((2220, 40), (14, 100)), ((1, 900), (7, 9))]
)
def test_lines_shrunk_more_than_a_hundredfold(given: Size, size: Size) -> None:
    image = np.random.default_rng().integers(0, 256, (*given, 3), np.uint8)
    np.testing.assert_array_equal(resize_like_torch(image, size), by_torch(image, size))


def test_views_into_a_larger_image() -> None:
    whole = np.random.default_rng().integers(0, 256, (200, 300, 3), np.uint8)
    view = whole[10:190:2, 250:20:-1]
    np.testing.assert_array_equal(resize_like_torch(view, (64, 48)), by_torch(view.copy(), (64, 48)))


def test_an_image_of_that_size_is_given_back() -> None:
    image = np.zeros((5, 4, 3), np.uint8)
    assert resize_like_torch(image, (5, 4)) is image


def test_without_the_compiled_resizer_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_resize.cache_clear()
    monkeypatch.setitem(sys.modules, "cykooz_resizer", None)  # an import of it fails
    assert compiled_resize() is None
    image = np.random.default_rng().integers(0, 256, (90, 70, 3), np.uint8)
    np.testing.assert_array_equal(resize_like_torch(image, (64, 64)), by_torch(image, (64, 64)))


def test_many_threads_at_once() -> None:
    image = np.random.default_rng().integers(0, 256, (300, 500, 3), np.uint8)
    wanted = by_torch(image, (256, 256))
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: resize_like_torch(image, (256, 256)), range(32)):
            np.testing.assert_array_equal(found, wanted)
