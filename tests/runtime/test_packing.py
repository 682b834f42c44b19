"""Packing a matrix gives the same bits with the native library and without, and sees whatever is not finite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_runtime import packing
from lorapool_runtime.packing import pack, zeroed

TYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


def packed(values: np.ndarray, kind: str, *, native: bool, scale: float, transposed: bool) -> tuple[np.ndarray, bool]:
    shape = values.T.shape if transposed else values.shape
    to = zeroed(values.size, np.dtype(TYPES[kind])).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(packing, "_native", lambda: None)
        with np.errstate(invalid="ignore"):
            return to, pack(values, to, scale=scale, transposed=transposed)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70), cols=st.integers(1, 40), seed=st.integers(0, 99), scale=st.sampled_from([1.0, 2.0, 0.3])
)
def test_both_ways_give_the_same_bits(
    kind: str, transposed: bool, rows: int, cols: int, seed: int, scale: float
) -> None:
    values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    native, plain = (packed(values, kind, native=n, scale=scale, transposed=transposed) for n in (True, False))
    np.testing.assert_array_equal(native[0].view(np.uint8), plain[0].view(np.uint8))
    assert native[1]
    assert plain[1]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("sick", [np.nan, np.inf, -np.inf, np.uint32(0x7FFFFFFF).view(np.float32)])
@pytest.mark.parametrize("kind", TYPES)
def test_one_number_that_is_not_finite_is_seen_wherever_it_stands(kind: str, sick: float, native: bool) -> None:
    for place in ((0, 0), (16, 3), (36, 6)):
        values = np.ones((37, 7), np.float32)
        values[place] = sick
        for transposed in (False, True):
            assert not packed(values, kind, native=native, scale=1.0, transposed=transposed)[1]


@pytest.mark.parametrize("native", [True, False])
def test_what_rounds_or_scales_to_infinity_is_seen(native: bool) -> None:
    largest = np.full((3, 3), np.finfo(np.float32).max, np.float32)
    assert packed(largest, "float32", native=native, scale=1.0, transposed=True)[1]
    assert not packed(largest, "bfloat16", native=native, scale=1.0, transposed=True)[1]
    assert not packed(largest, "float16", native=native, scale=1.0, transposed=False)[1]
    assert not packed(largest, "float32", native=native, scale=2.0, transposed=True)[1]


def test_a_place_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot put"):
        pack(np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32), scale=1.0, transposed=True)


def test_memory_for_a_buffer_is_zero_and_as_long_as_asked() -> None:
    for elements in (0, 5, 3 * 2**20):
        made = zeroed(elements, np.dtype(np.float32))
        assert made.shape == (elements,)
        assert not made.any()
