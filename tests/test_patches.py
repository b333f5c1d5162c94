"""Preprocessing without torch against transformers' image processor, and the choice of a bundle's size."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from ppcr.config import MLLMConfig
from ppcr.patches import image_patches, nearest_size
from ppcr.pretrained import RESOLUTIONS

PIXELS = {"qwen2_5_vl": (56 * 56, 28 * 28 * 1280), "qwen3_vl": (256 * 256, 1024 * 1024)}
CONFIGS = {
    "qwen2_5_vl": MLLMConfig(
        family="qwen2_5_vl", patch=14, resample="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
    ),
    "qwen3_vl": MLLMConfig(
        family="qwen3_vl", patch=16, resample="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    ),
}  # fmt: skip


def processor(family: str) -> Any:
    """The processor that both families' directories name, with their settings."""
    config, (low, high) = CONFIGS[family], PIXELS[family]
    return Qwen2VLImageProcessorPil(
        patch_size=config.patch, image_mean=list(config.mean), image_std=list(config.std),
        size={"shortest_edge": low, "longest_edge": high},
    )  # fmt: skip


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """From 28 x 28 to 4000 x 3000, small ones as often as large ones."""
    height = math.exp(rng.uniform(math.log(28), math.log(3000)))
    width = math.exp(rng.uniform(math.log(28), math.log(4000)))
    return round(height), round(width)


def ours(image: np.ndarray, family: str) -> tuple[np.ndarray, tuple[int, int]]:
    config = CONFIGS[family]
    size = smart_resize(*image.shape[:2], config.patch * config.merge, *PIXELS[family])
    return image_patches(image, size, config), size


@pytest.mark.parametrize("family", CONFIGS)
def test_patches_equal_the_processor(family: str) -> None:
    rng = np.random.default_rng()
    theirs = processor(family)
    sizes = [(28, 28), (3000, 4000), *(random_size(rng) for _ in range(6))]
    for size in sizes:
        if max(size) > 200 * min(size):
            continue
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        wanted = theirs(images=[image], input_data_format="channels_last", return_tensors="np")
        got, (height, width) = ours(image, family)
        patch = CONFIGS[family].patch
        assert wanted["image_grid_thw"].tolist() == [[1, height // patch, width // patch]], size
        assert got.shape == wanted["pixel_values"].shape
        # In 8-bit steps before normalisation.
        steps = np.abs(got - wanted["pixel_values"]).max() * max(CONFIGS[family].std) * 255
        assert steps < 1, size
        assert steps < 0.01, size


def test_faster_than_the_processor() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((480, 640), (900, 700))]
    theirs = processor("qwen2_5_vl")

    def theirs_once() -> None:
        for image in images:
            theirs(images=[image], input_data_format="channels_last", return_tensors="np")

    def ours_once() -> None:
        for image in images:
            ours(image, "qwen2_5_vl")

    def best(run: Any) -> float:
        run()
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert best(ours_once) < best(theirs_once)


@pytest.mark.parametrize("family", RESOLUTIONS)
def test_nearest_size_stretches_least(family: str) -> None:
    rng = np.random.default_rng()
    sizes = RESOLUTIONS[family]
    assert all(side % (2 * CONFIGS[family].patch) == 0 for size in sizes for side in size)
    for _ in range(300):
        size = random_size(rng)
        chosen = nearest_size(size, sizes)

        def stretch(choice: tuple[int, int], size: tuple[int, int] = size) -> float:
            return abs(math.log(size[0] / size[1] * choice[1] / choice[0]))

        assert stretch(chosen) <= min(map(stretch, sizes)) + 1e-6
    for size in sizes:
        assert nearest_size((3 * size[0], 3 * size[1]), sizes) == size


def test_a_size_that_is_no_multiple_is_refused() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    with pytest.raises(ValueError, match="multiple of patch"):
        image_patches(image, (28, 30), replace(CONFIGS["qwen2_5_vl"]))
