"""The int8 grid: close to any matrix, exact for one that lies on it, float16 in between included."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ppcr.int8 import BLOCK, LEVELS, fit, snap


def matrix(seed: int, rows: int, columns: int, scale: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, (rows, columns)) * scale).astype(np.float32)


@given(
    seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5),
    columns=st.sampled_from([1, 7, 32, 48, 96]), exponent=st.integers(-20, 6),
)  # fmt: skip
def test_snapped_weights_survive_float16_and_are_found_again(
    seed: int, rows: int, columns: int, exponent: int
) -> None:
    weight = matrix(seed, rows, columns, 2.0**exponent)
    snapped = snap(weight)
    stored = snapped.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(stored, snapped)
    numbers, scale = fit(stored)
    np.testing.assert_array_equal((numbers * scale).reshape(weight.shape), snapped)
    np.testing.assert_array_equal(snap(snapped), snapped)


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-8, 6))
def test_error_is_half_a_step_at_most(seed: int, exponent: int) -> None:
    weight = matrix(seed, 3, 2 * BLOCK, 2.0**exponent)
    numbers, scale = fit(weight)
    largest = np.abs(weight.reshape(3, 2, BLOCK)).max(-1, keepdims=True)
    assert (scale <= largest / LEVELS * 9 / 8 * 1.001).all()
    assert (np.abs(numbers * scale - weight.reshape(3, 2, BLOCK)) <= scale * 0.501).all()


def test_rows_of_odd_length_are_one_block() -> None:
    numbers, scale = fit(matrix(0, 4, 45, 1.0))
    assert numbers.shape == (4, 1, 45) and scale.shape == (4, 1, 1)


def test_zeros_stay_zeros() -> None:
    assert not snap(np.zeros((2, 64), np.float32)).any()
