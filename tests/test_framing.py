"""How images come to the segmenter: as transformers' processors do it, and back to the original's pixels."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ppcr.boxes import to_unit
from ppcr.config import SegmenterConfig
from ppcr.framing import Framing
from ppcr.masks import iou

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDED = SegmenterConfig("sam", (1024, 1024), MEAN, STD, fit="pad")
STRETCHED = SegmenterConfig("sam2", (1024, 1024), MEAN, STD, fit="stretch")
SMALL = SegmenterConfig("sam", (128, 128), MEAN, STD, fit="pad")


def random_sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """(height, width), small and large alike, within 28x28 and 3000x4000."""
    rng = np.random.default_rng(seed)
    low, high = np.log([28, 28]), np.log([3000, 4000])
    return [tuple(np.exp(rng.uniform(low, high)).round().astype(int).tolist()) for _ in range(count)]


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def eight_bit(pixels: np.ndarray) -> np.ndarray:
    """Normalised pixels as 0..255 again, [3, h, w]."""
    mean, std = (np.asarray(v, np.float64)[:, None, None] for v in (MEAN, STD))
    return (pixels * std + mean) * 255


@pytest.mark.parametrize("size", [(28, 28), (28, 4000), (3000, 4000), *random_sizes(5, seed=1)])
def test_padded_pixels_equal_transformers(size: tuple[int, int]) -> None:
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    image = picture(size)
    found = Framing.of(size, PADDED).pixels(image)
    processor = SamImageProcessorPil()
    wanted = np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])
    assert found.dtype == np.float32 and found.shape == wanted.shape == (3, 1024, 1024)
    assert np.abs(eight_bit(found) - eight_bit(wanted)).max() < 1.0
    np.testing.assert_array_equal(found == 0, wanted == 0)


def least_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Of the processor, after a first run that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def test_faster_than_the_processor_of_transformers() -> None:
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    image, processor = picture((1200, 1600)), SamImageProcessorPil()
    ours = least_seconds(lambda: Framing.of((1200, 1600), PADDED).pixels(image))
    assert ours < least_seconds(lambda: processor(images=image, return_tensors="np"))


def stripes(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Rows that are all the same: what is rounded the wrong way in one is so in all that are averaged."""
    return np.broadcast_to(picture((1, size[1]), seed), (*size, 3)).copy()


def slopes(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Slow gradients in both directions, where sums lie close to halves all over."""
    rows, columns = np.linspace(0, 200, size[0])[:, None, None], np.linspace(0, 55, size[1])[None, :, None]
    return (rows + columns + np.zeros(3)).astype(np.uint8)


@pytest.mark.parametrize("draw", [picture, stripes, slopes])
@pytest.mark.parametrize(
    "size", [(28, 28), (28, 4000), (900, 500), (400, 5000), (1024, 77), *random_sizes(3, seed=2)]
)
def test_stretched_pixels_are_those_of_torch(size: tuple[int, int], draw: Callable[..., np.ndarray]) -> None:
    # transformers' processor of SAM 2 runs on torchvision alone, which these pins leave out. On CPUs with
    # AVX2 torchvision hands 8-bit images to this function of torch, which so stands for the processor.
    image = draw(size)
    found = eight_bit(Framing.of(size, STRETCHED).pixels(image))
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    wanted = F.interpolate(planes, (1024, 1024), mode="bilinear", antialias=True, align_corners=False)
    assert wanted.dtype == torch.uint8
    assert np.abs(found - wanted[0].numpy()).max() < 0.01


@pytest.mark.parametrize("size", random_sizes(20, seed=3))
@pytest.mark.parametrize("config", [SMALL, STRETCHED], ids=["pad", "stretch"])
def test_a_box_comes_back_to_its_place(size: tuple[int, int], config: SegmenterConfig) -> None:
    height, width = size
    framing, side = Framing.of(size, config), 256
    box = np.array([0.25 * width, 0.4 * height, 0.8 * width, 0.9 * height], np.float32)
    x1, y1, x2, y2 = framing.place(to_unit(box, width, height)) * side
    rows, columns = np.arange(side) + 0.5, np.arange(side) + 0.5
    # Signed distance to the box's edges: what a sharp segmenter would answer.
    down = np.minimum(rows - y1, y2 - rows)[:, None]
    right = np.minimum(columns - x1, x2 - columns)[None]
    mask = framing.mask(np.minimum(down, right).astype(np.float32))
    truth = np.zeros(size, bool)
    truth[round(float(box[1])) : round(float(box[3])), round(float(box[0])) : round(float(box[2]))] = True
    cell = max(size) / side if config is SMALL else 0
    slack = 2 * max(cell / max(1.0, 0.5 * min(size)), 1 / max(1.0, 0.5 * min(size)))
    assert mask.shape == size and iou(mask, truth) > 1 - max(0.02, slack)


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (900, 300), *random_sizes(3, seed=4)])
def test_padded_masks_equal_those_of_the_official_steps(size: tuple[int, int]) -> None:
    # The official steps: to the input's size, cut off the padding, to the image's size.
    framing = Framing.of(size, PADDED)
    g = torch.Generator().manual_seed(5)
    coarse = torch.randn(1, 1, 12, 12, generator=g)
    logits = F.interpolate(coarse, (256, 256), mode="bicubic", align_corners=False)
    rows, columns = framing.content
    large = F.interpolate(logits, (1024, 1024), mode="bilinear", align_corners=False)[..., :rows, :columns]
    wanted = F.interpolate(large, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    clear = np.abs(wanted) > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(framing.mask(logits[0, 0].numpy())[clear], (wanted > 0)[clear])


def test_points_and_empty_arrays_are_placed() -> None:
    framing = Framing.of((50, 100), SMALL)
    assert framing.content == (64, 128)
    np.testing.assert_allclose(framing.place([[0.5, 0.5]]), [[0.5, 0.25]])
    np.testing.assert_allclose(framing.place([0.0, 0.0, 1.0, 1.0]), [0.0, 0.0, 1.0, 0.5])
    assert framing.place(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert Framing.of((1, 5000), SMALL).content == (1, 128)
