"""Metrics: known values, the protocols' differences, and properties that hold for any masks."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ppcr import masks
from ppcr.evaluation.metrics import (
    DEFAULT,
    PRECISION_AT,
    PROTOCOLS,
    Case,
    by_kind,
    compare,
    stretch,
    summarise,
)

Mask = npt.NDArray[np.bool_]
EMPTY = np.zeros((4, 5), np.bool_)
GRIDS = arrays(np.bool_, (6, 7))


def strip(columns: int) -> Mask:
    """The first columns of a 4x5 mask."""
    mask = EMPTY.copy()
    mask[:, :columns] = True
    return mask


def test_known_figures() -> None:
    cases = [
        compare(strip(2), strip(4), kind="plural"),
        compare(strip(3), strip(3), kind="attribute"),
        compare(EMPTY, strip(5), kind="attribute"),
        compare(EMPTY, EMPTY, kind="none_attribute"),
        compare(strip(1), EMPTY, kind="none_attribute"),
    ]
    assert [case.iou() for case in cases] == [0.5, 1.0, 0.0, 1.0, 0.0]
    figures = summarise(cases)
    assert figures.n == 5 and figures.with_target == 3
    assert figures.miou == pytest.approx(0.5)
    # Intersections 8 + 12 + 0 + 0 + 0 pixels, unions 16 + 12 + 20 + 0 + 4.
    assert figures.oiou == pytest.approx(20 / 52)
    assert figures.precision == {0.5: 0.4, 0.6: 0.4, 0.7: 0.4, 0.8: 0.4, 0.9: 0.4}
    assert figures.none_recall == 0.5
    assert figures.none_false_rate == pytest.approx(1 / 3)
    kinds = by_kind(cases)
    assert {kind: (one.n, one.miou) for kind, one in kinds.items()} == {
        "attribute": (2, 0.5), "none_attribute": (2, 0.5), "plural": (1, 0.5),
    }  # fmt: skip
    assert kinds["plural"].none_recall is None and kinds["none_attribute"].none_false_rate is None


def test_precision_is_strict_by_default_and_not_under_lavt() -> None:
    half = [Case(1, 2, True, False)]
    assert summarise(half).precision[0.5] == 0.0
    assert summarise(half, PROTOCOLS["lavt"]).precision[0.5] == 1.0


@pytest.mark.parametrize(("name", "expected"), [("default", 1.0), ("lisa", 1.0), ("cris", 0.0)])
def test_empty_against_empty(name: str, expected: float) -> None:
    protocol = PROTOCOLS[name]
    figures = summarise([compare(EMPTY, EMPTY, protocol=protocol)], protocol)
    assert (figures.miou, figures.oiou) == (expected, expected)


def test_thresholds_cut_logits() -> None:
    # sigmoid(-0.5) = 0.378: background at 0, foreground at CRIS's 0.35.
    logits = np.full((4, 5), -0.5, np.float32)
    assert compare(logits, strip(5)).iou() == 0.0
    assert compare(logits, strip(5), protocol=PROTOCOLS["cris"]).iou() == 1.0


def test_few_pixels_count_as_empty_under_ssp_sam() -> None:
    protocol = PROTOCOLS["ssp_sam"]
    prediction, truth = np.zeros((2, 512, 512), np.bool_)
    prediction[0, :49] = True
    case = compare(prediction, truth, protocol=protocol)
    assert case.said_none and case.iou(protocol) == 1.0
    prediction[0, 49] = True
    case = compare(prediction, truth, protocol=protocol)
    assert not case.said_none and case.iou(protocol) == 0.0


def test_rela_judges_precision_by_expressions_with_targets() -> None:
    cases = [compare(strip(2), strip(2)), compare(EMPTY, EMPTY), compare(strip(1), EMPTY)]
    assert summarise(cases).precision[0.5] == pytest.approx(2 / 3)
    assert summarise(cases, PROTOCOLS["rela"]).precision[0.5] == 1.0


def test_overlapping_polygons_are_foreground_once() -> None:
    assert compare(strip(3), strip(3).astype(np.uint8) * 2).iou() == 1.0


def test_an_empty_mask_need_not_mean_that_none_was_said() -> None:
    case = compare(EMPTY, EMPTY, said_none=False)
    assert not case.said_none and case.iou() == 1.0
    assert compare(strip(2), strip(2), said_none=True).intersection == 0


def test_sizes_must_fit_the_protocol() -> None:
    with pytest.raises(ValueError, match="shapes"):
        compare(EMPTY, EMPTY[:2])
    with pytest.raises(ValueError, match="480"):
        compare(EMPTY, EMPTY, protocol=PROTOCOLS["lavt"])
    side = PROTOCOLS["lavt"].side
    ready = stretch(strip(2), side), stretch(strip(4), side)
    assert compare(*ready, protocol=PROTOCOLS["lavt"]).iou() == 0.5
    assert stretch(EMPTY, None) is EMPTY


def test_nothing_cannot_be_summarised() -> None:
    with pytest.raises(ValueError, match="no cases"):
        summarise([])


def test_a_protocol_says_its_name_and_rules() -> None:
    told = {name: str(protocol) for name, protocol in PROTOCOLS.items()}
    assert all(text.startswith(f"{name} (at ") for name, text in told.items())
    assert told["default"] == (
        "default (at the original size, logit > 0, empty against empty = 1, P@X: IoU > X)"
    )
    assert len({text.removeprefix(name) for name, text in told.items()}) == len(told) - 1  # lisa = default


def test_json_names_the_fields_and_keeps_what_is_unknown() -> None:
    told = summarise([compare(strip(1), strip(1))]).to_json()
    assert told["precision_at_0.5"] == told["miou"] == told["oiou"] == 1.0
    assert told["none_recall"] is None and told["none_false_rate"] == 0.0
    assert (told["n"], told["protocol"]) == (1, "default")


@given(GRIDS, GRIDS)
def test_iou_is_symmetric_and_agrees_with_masks(first: Mask, second: Mask) -> None:
    value = compare(first, second).iou()
    assert value == compare(second, first).iou() == masks.iou(first, second)
    assert 0.0 <= value <= 1.0
    assert compare(first, first).iou() == 1.0


@given(st.lists(st.tuples(GRIDS, GRIDS), min_size=1, max_size=6), st.randoms())
def test_summaries_ignore_order_and_stay_within_their_cases(
    pairs: list[tuple[Mask, Mask]], dice: random.Random
) -> None:
    cases = [compare(*pair) for pair in pairs]
    figures = summarise(cases)
    ious = [case.iou() for case in cases]
    assert min(ious) - 1e-12 <= figures.miou <= max(ious) + 1e-12
    shares = [figures.precision[x] for x in PRECISION_AT]
    assert shares == sorted(shares, reverse=True)
    shuffled = cases.copy()
    dice.shuffle(shuffled)
    again = summarise(shuffled)
    assert again.miou == pytest.approx(figures.miou)
    assert dataclasses.replace(again, miou=figures.miou) == figures


@given(st.lists(st.tuples(GRIDS, GRIDS), min_size=1, max_size=6))
def test_answers_split_by_whether_there_is_a_target(pairs: list[tuple[Mask, Mask]]) -> None:
    cases = [compare(*pair) for pair in pairs]
    figures = summarise(cases, DEFAULT)
    missed = sum(not a.any() and b.any() for a, b in pairs)
    right = sum(not a.any() and not b.any() for a, b in pairs)
    held = sum(bool(b.any()) for _, b in pairs)
    assert (figures.none_false_rate or 0) * held == pytest.approx(missed)
    assert (figures.none_recall or 0) * (len(pairs) - held) == pytest.approx(right)
