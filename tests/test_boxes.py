"""Box frames: every conversion, its inverse, and what a user's box may not be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcr.boxes import (
    LOCATION_BINS,
    area,
    from_location,
    iou,
    parse_box,
    repair,
    to_location,
    to_pixels,
    to_unit,
    validate_box,
)
from ppcr.errors import BoxError

units = st.floats(0, 1, width=32)
finite = st.floats(-10, 10, width=32)
sizes = st.integers(1, 20_000)


@st.composite
def pixel_boxes(draw: st.DrawFn) -> tuple[list[int], int, int]:
    width, height = draw(sizes), draw(sizes)
    x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return [x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))], width, height


@given(units)
def test_a_location_is_within_half_a_bin(value: float) -> None:
    back = float(from_location(to_location(value)))
    assert abs(back - value) <= 0.5 / LOCATION_BINS + 1e-7


def test_every_location_comes_back() -> None:
    bins = np.arange(LOCATION_BINS)
    centres = from_location(bins)
    assert centres.dtype == np.float32
    np.testing.assert_array_equal(to_location(centres), bins)
    np.testing.assert_allclose(centres[[0, 499, 999]], [0.0005, 0.4995, 0.9995], atol=1e-7)


@pytest.mark.parametrize(("value", "bin_"), [(0, 0), (0.5, 500), (1, 999), (-0.2, 0), (7, 999)])
def test_locations_at_and_past_the_ends(value: float, bin_: int) -> None:
    assert to_location(value) == bin_


@given(units)
def test_location_is_the_documented_formula(value: float) -> None:
    assert int(to_location(value)) == min(999, int(value * 1000))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_locations_refuse_what_is_not_finite(value: float) -> None:
    with pytest.raises(BoxError, match="finite"):
        to_location([0.5, value])


@pytest.mark.parametrize("value", [-1, 1000, 0.5])
def test_locations_outside_the_bins_are_refused(value: float) -> None:
    with pytest.raises(BoxError, match="0..999"):
        from_location([value])


def test_no_boxes_are_fine() -> None:
    none = np.zeros((0, 4), np.float32)
    assert to_location(none).shape == from_location(to_location(none)).shape == (0, 4)
    assert to_pixels(none, 5, 7).shape == repair(none).shape == (0, 4)
    assert iou(none[:, None], none[None]).shape == (0, 0)


@given(pixel_boxes())
def test_pixels_to_unit_and_back(case: tuple[list[int], int, int]) -> None:
    box, width, height = case
    unit = to_unit(box, width, height)
    assert unit.dtype == np.float32 and unit.min() >= 0 and unit.max() <= 1
    np.testing.assert_allclose(to_pixels(unit, width, height), box, atol=max(width, height) * 2e-7)


@given(pixel_boxes())
def test_through_locations_a_box_moves_at_most_half_a_bin(case: tuple[list[int], int, int]) -> None:
    box, width, height = case
    back = to_pixels(from_location(to_location(to_unit(box, width, height))), width, height)
    limit = np.array([width, height, width, height]) * (0.5 / LOCATION_BINS + 1e-6)
    assert (np.abs(back - box) <= limit).all()


def test_points_scale_like_corners() -> None:
    np.testing.assert_allclose(to_pixels([[0.5, 0.25]], 200, 80), [[100, 20]])
    np.testing.assert_allclose(to_unit([[100, 20]], 200, 80), [[0.5, 0.25]])
    np.testing.assert_allclose(to_pixels([0.1, 0.2, 0.3, 0.4], 100, 10), [10, 2, 30, 4], rtol=1e-6)


@given(st.lists(finite, min_size=4, max_size=4))
def test_repair_makes_any_box_valid(raw: list[float]) -> None:
    x1, y1, x2, y2 = repair(raw)
    assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


@given(pixel_boxes())
def test_repair_leaves_a_good_box_alone(case: tuple[list[int], int, int]) -> None:
    box, _, _ = case
    unit = np.asarray(box, np.float32) / 20_000
    wide = np.concatenate([unit[:2] * 0.9, unit[2:] * 0.9 + 0.1])
    np.testing.assert_array_equal(repair(wide), wide)


def test_repair_refuses_nan() -> None:
    with pytest.raises(BoxError, match="not finite"):
        repair([0, 0, np.nan, 1])


@given(pixel_boxes())
def test_a_written_box_is_read_back(case: tuple[list[int], int, int]) -> None:
    box, width, height = case
    parsed = parse_box(",".join(map(str, box)), width, height)
    assert parsed.dtype == np.float32
    np.testing.assert_array_equal(parsed, box)


def test_parse_allows_spaces_fractions_and_the_whole_image() -> None:
    np.testing.assert_allclose(parse_box(" 1.5, 2 ,30 , 40.25", 256, 256), [1.5, 2, 30, 40.25])
    np.testing.assert_array_equal(parse_box("0,0,1,1", 1, 1), [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "four finite numbers"),
        ("1,2,3", "four finite numbers"),
        ("1,2,3,4,5", "four finite numbers"),
        ("1,2,3,four", "four finite numbers"),
        ("nan,0,10,10", "four finite numbers"),
        ("0,0,inf,10", "four finite numbers"),
        ("10,10,10,20", "empty"),
        ("20,10,10,20", "empty"),
        ("10,30,20,20", "empty"),
        ("-1,0,10,10", "outside the image; keep x within 0..100 and y within 0..50"),
        ("0,0,101,10", "outside the image"),
        ("0,0,10,51", "outside the image"),
        ("300,300,400,400", "outside the image"),
        ("0.1,0.2,0.5,0.6", "not fractions"),
    ],
)
def test_parse_refuses(text: str, told: str) -> None:
    with pytest.raises(BoxError, match=told):
        parse_box(text, 100, 50)


def test_validate_refuses_nan_in_an_array() -> None:
    with pytest.raises(BoxError, match="not finite"):
        validate_box([0, 0, np.nan, 1], 10, 10)


@given(pixel_boxes(), pixel_boxes())
def test_iou_is_a_symmetric_share(
    first: tuple[list[int], int, int], second: tuple[list[int], int, int]
) -> None:
    a, b = first[0], second[0]
    assert 0 <= iou(a, b) <= 1
    assert iou(a, b) == iou(b, a)
    assert iou(a, a) == 1


def test_iou_known_values_and_broadcasting() -> None:
    a = np.array([[0, 0, 10, 10], [0, 0, 0, 0]])
    b = np.array([[5, 0, 15, 10], [20, 20, 30, 30], [0, 0, 0, 0]])
    pairs = iou(a[:, None], b[None])
    np.testing.assert_allclose(pairs, np.array([[1 / 3, 0, 0], [0, 0, 0]]), rtol=1e-6)


def test_area_of_a_crossed_box_is_zero() -> None:
    np.testing.assert_array_equal(area([[0, 0, 3, 4], [3, 4, 0, 0], [0, 4, 3, 0]]), [12, 0, 0])
