"""Masks: COCO run lengths against pycocotools, resizing, overlap, PNG files and the overlay picture."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from ppcr.errors import OutputError
from ppcr.masks import RLE, color_of, decode_rle, encode_rle, iou, mask_from_logits, overlay, save_png, union

BoolMask = npt.NDArray[np.bool_]

any_mask = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))


def disc(height: int, width: int, x: float, y: float, radius: float) -> BoolMask:
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


@given(any_mask)
def test_rle_round_trip(mask: BoolMask) -> None:
    rle = json.loads(json.dumps(encode_rle(mask)))
    assert rle["size"] == list(mask.shape)
    np.testing.assert_array_equal(decode_rle(rle), mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under numpy 2
@given(any_mask)
def test_rle_equals_pycocotools(mask: BoolMask) -> None:
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    theirs = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = encode_rle(mask)
    assert ours["counts"] == theirs["counts"].decode("ascii")
    assert ours["size"] == theirs["size"]
    np.testing.assert_array_equal(reference.decode(ours).astype(bool), mask)


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        (np.zeros((4, 5), bool), "d0"),
        (np.ones((4, 5), bool), "0d0"),
        (np.eye(4, dtype=bool), "01400000"),
        (np.array([[0, 1], [0, 1]], bool), "22"),
        (disc(30, 40, 18, 14, 9), "f99d02N2N2N2O0000000000000001N2N2N2Nm;"),
    ],
    ids=["empty", "full", "diagonal", "column", "disc"],
)
def test_rle_known_strings(mask: BoolMask, counts: str) -> None:
    # Strings as pycocotools 2.0.11 writes them, so that the format holds where pycocotools is not installed.
    assert encode_rle(mask)["counts"] == counts


def test_rle_of_long_runs() -> None:
    mask = np.zeros((3000, 3000), bool)
    mask[:, 1000:1001] = mask[:, 2500:] = True
    rle = encode_rle(mask)
    assert len(rle["counts"]) < 40
    np.testing.assert_array_equal(decode_rle(rle), mask)


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [4, 5], "counts": "c0"},
        {"size": [4, 5], "counts": ""},
        {"size": [4, 5], "counts": "d"},
        {"size": [4, 5], "counts": "d0 "},
        {"size": [1, 1], "counts": "N3"},
    ],
    ids=["short", "nothing", "cut", "foreign character", "negative run"],
)
def test_damaged_rle_is_refused(rle: RLE) -> None:
    with pytest.raises(ValueError, match="RLE"):
        decode_rle(rle)


def test_rle_counts_whatever_is_not_zero() -> None:
    grey = np.array([[0, 255], [1, 0]], np.uint8)
    np.testing.assert_array_equal(decode_rle(encode_rle(grey)), grey > 0)


@pytest.mark.parametrize("size", [(1, 1), (128, 128), (256, 256), (333, 77), (50, 700)])
def test_mask_from_logits_follows_the_shape(size: tuple[int, int]) -> None:
    logits = np.where(disc(128, 128, 80, 40, 30), 5.0, -5.0).astype(np.float32)
    mask = mask_from_logits(logits, size)
    assert mask.dtype == np.bool_ and mask.shape == size
    if min(size) > 1:
        # The logits' own coordinates of each pixel's centre.
        scale = np.array(size).reshape(2, 1, 1) / 128
        rows, columns = (np.mgrid[: size[0], : size[1]] + 0.5) / scale - 0.5
        assert iou(mask, (columns - 80) ** 2 + (rows - 40) ** 2 < 30**2) > 0.9


def test_mask_from_logits_interpolates_before_it_cuts() -> None:
    # Half-pixel centres: the zero crossing between -1 and 3 lies a quarter of the way along.
    row = np.array([[-1.0, 3.0]], np.float32)
    assert mask_from_logits(row, (1, 8)).tolist() == [[False, False, False, True, True, True, True, True]]
    assert not mask_from_logits(np.zeros((2, 2), np.float32), (5, 5)).any()


def test_mask_from_logits_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    logits = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    up = torch.nn.functional.interpolate(torch.from_numpy(logits)[None, None], (100, 70), mode="bilinear")
    sure = np.abs(up[0, 0].numpy()) > 1e-4
    np.testing.assert_array_equal(mask_from_logits(logits, (100, 70))[sure], (up[0, 0] > 0).numpy()[sure])


@given(any_mask, st.integers(0, 2**32 - 1))
def test_iou_is_a_symmetric_share(mask: BoolMask, seed: int) -> None:
    other = np.random.default_rng(seed).random(mask.shape) < 0.5
    assert iou(mask, mask) == 1
    assert 0 <= iou(mask, other) == iou(other, mask) <= 1


def test_iou_known_values() -> None:
    empty = np.zeros((2, 2), bool)
    assert iou(empty, empty) == 1.0
    assert iou(empty, ~empty) == 0.0
    assert iou(np.array([[1, 1, 0]]), np.array([[0, 1, 1]])) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="different sizes"):
        iou(np.zeros((2, 2)), np.zeros((2, 1)))


def test_union_of_none_some_and_all() -> None:
    assert not union(np.zeros((0, 3, 4), bool)).any()
    assert union(np.zeros((0, 3, 4), bool)).shape == (3, 4)
    masks = np.stack([disc(20, 20, 5, 5, 4), disc(20, 20, 14, 14, 4)])
    np.testing.assert_array_equal(union(masks), masks[0] | masks[1])


@given(any_mask)
def test_a_saved_mask_reads_back(tmp_path_factory: pytest.TempPathFactory, mask: BoolMask) -> None:
    path = tmp_path_factory.getbasetemp() / "mask.png"
    save_png(mask, path)
    with Image.open(path) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), mask * np.uint8(255))


def test_save_png_of_a_picture_and_into_an_impossible_place(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    save_png(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
    with pytest.raises(OutputError):
        save_png(picture, tmp_path / "a.png" / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_colours_are_distinct() -> None:
    colours = np.array([color_of(index) for index in range(10)])
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(10, dtype=int)
    assert distance.min() >= 60
    assert len({color_of(index) for index in range(40)}) == 40


def test_overlay_shows_masks_outlines_and_boxes() -> None:
    image = np.full((64, 96, 3), 100, np.uint8)
    masks = np.stack([disc(64, 96, 20, 30, 12), disc(64, 96, 70, 30, 15)])
    boxes = np.array([[8, 18, 33, 43], [55, 15, 86, 46]], np.float32)
    picture = overlay(image, masks, boxes, scale=1)
    assert picture.shape == image.shape and picture.dtype == np.uint8
    for index, (box, x) in enumerate(zip(boxes.astype(int), (20, 70), strict=True)):
        assert tuple(picture[box[1], box[0]]) == color_of(index)
        assert tuple(picture[box[3] - 1, box[2] - 1]) == color_of(index)
        expected = 0.75 * 100 + 0.25 * np.array(color_of(index))
        assert np.abs(picture[30, x] - expected).max() <= 1
        outline = (picture == color_of(index)).all(-1)[masks[index]]
        assert outline.sum() > 40
    assert (picture[5, 45] == 68).all()
    np.testing.assert_array_equal(image, 100)


@pytest.mark.parametrize("size", [(40, 1300), (1300, 40), (700, 3)])
def test_outlines_are_as_wide_as_the_picture_asks(size: tuple[int, int]) -> None:
    rng = np.random.default_rng()
    mask = rng.random(size) < 0.002
    mask[-1, -1] = mask[0, 0] = True
    picture = overlay(np.full((*size, 3), 100, np.uint8), mask[None], [], scale=1)
    line = round(max(size) / 320)
    near = np.zeros(size, np.bool_)
    for row, column in np.argwhere(mask):
        near[max(0, row - line) : row + line + 1, max(0, column - line) : column + line + 1] = True
    expected = np.where(near, round(100 * 0.68 * 0.45), round(100 * 0.68))
    np.testing.assert_array_equal(picture[..., 0][~mask], expected[~mask])


def test_overlay_of_a_large_image_takes_little_memory() -> None:
    image = np.zeros((120, 16_000, 3), np.uint8)
    mask = disc(120, 16_000, 8_000, 60, 50)[None]
    tracemalloc.start()
    overlay(image, mask, [[7_950, 10, 8_050, 110]], scale=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30 * mask.size


def test_overlay_enlarges_small_images_and_adds_a_caption() -> None:
    image = np.zeros((256, 256, 3), np.uint8)
    masks = disc(256, 256, 100, 100, 30)[None]
    plain = overlay(image, masks, [[70, 70, 130, 130]])
    assert plain.shape == (768, 768, 3)
    labelled = overlay(image, masks, [[70, 70, 130, 130]], ["red cube 0.97"])
    assert (labelled != plain).any()
    captioned = overlay(image, masks, [[70, 70, 130, 130]], caption="all red cubes\ncube; red; -; 1")
    assert captioned.shape[0] > 768 and captioned.shape[1:] == (768, 3)
    np.testing.assert_array_equal(captioned[:768], plain)
    assert captioned[768:].max() > 200


def test_overlay_of_none_is_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(overlay(image, np.zeros((0, 50, 40), bool), [], scale=1), image)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (7, 5), (700, 900)])
@pytest.mark.parametrize(
    "text",
    ["", "x", "\U0001f534 \u0623\u062d\u0645\u0631\x00\x1b", "w" * 10_000, "word " * 2_000, "\n\n"],
    ids=["none", "short", "foreign", "long word", "long text", "blank"],
)
def test_overlay_takes_any_size_and_text(size: tuple[int, int], text: str) -> None:
    image = np.zeros((*size, 3), np.uint8)
    boxes = [[0, 0, size[1], size[0]], [-5, -5, 2, 2], [size[1] - 1, 0, size[1] + 50, 3]]
    picture = overlay(image, np.ones((3, *size), bool), boxes, [text] * 3, caption=text)
    assert picture.dtype == np.uint8
    assert picture.shape[0] <= size[0] * 8 + 400
