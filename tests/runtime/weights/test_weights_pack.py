"""Packing gives the same bits with the native library and without, and detects values that are not finite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_runtime.host_memory import huge_page_zeros
from lorapool_runtime.native_library import FOLDER
from lorapool_runtime.weights import pack as packing
from lorapool_runtime.weights.pack import DURING_A_BATCH, FILE_TYPES, TOO_LARGE, UNTHROTTLED, Throttle, pack, pack_file

TYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


def packed(values: np.ndarray, kind: str, *, native: bool, scale: float, transposed: bool) -> tuple[np.ndarray, bool]:
    shape = values.T.shape if transposed else values.shape
    to = huge_page_zeros(values.size, np.dtype(TYPES[kind])).reshape(shape)
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
def test_native_code_and_numpy_give_the_same_bits(
    kind: str, transposed: bool, rows: int, cols: int, seed: int, scale: float
) -> None:
    values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    native, plain = (packed(values, kind, native=n, scale=scale, transposed=transposed) for n in (True, False))
    np.testing.assert_array_equal(native[0].view(np.uint8), plain[0].view(np.uint8))
    assert native[1]
    assert plain[1]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.uint32(0x7FFFFFFF).view(np.float32)])
@pytest.mark.parametrize("kind", TYPES)
def test_a_single_non_finite_value_is_detected_anywhere(kind: str, bad: float, native: bool) -> None:
    for place in ((0, 0), (16, 3), (36, 6)):
        values = np.ones((37, 7), np.float32)
        values[place] = bad
        for transposed in (False, True):
            assert not packed(values, kind, native=native, scale=1.0, transposed=transposed)[1]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_that_are_or_become_too_large_are_detected(native: bool, transposed: bool) -> None:
    values = np.full((21, 21), -TOO_LARGE * (1 - 2**-20), np.float32)
    assert packed(values, "float32", native=native, scale=1.0, transposed=transposed)[1]
    assert not packed(values, "bfloat16", native=native, scale=1.0, transposed=transposed)[1]  # rounded up
    assert packed(values, "bfloat16", native=native, scale=0.99, transposed=transposed)[1]
    assert not packed(values, "float16", native=native, scale=1.0, transposed=transposed)[1]
    assert not packed(values, "float32", native=native, scale=1.1, transposed=transposed)[1]
    assert packed(values * 4, "float32", native=native, scale=0.2, transposed=transposed)[1]


def test_a_target_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot put"):
        pack(np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32), scale=1.0, transposed=True)


# --- whole files ---

FILE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LEAD = 24
"""Bytes before the first matrix, in place of a header."""


@contextmanager
def written(path: Path, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, np.ndarray, int]]:
    """A descriptor, the table of the matrices (every other one transposed), and the elements of the buffer."""
    rows, offset, to = [], LEAD, 0
    kinds = {dtype: FILE_TYPES.index(name) for name, dtype in FILE_DTYPES.items()}
    for number, tensor in enumerate(tensors):
        rows.append((offset, kinds[tensor.dtype], *tensor.shape, number % 2, to))
        offset, to = offset + tensor.numel() * tensor.element_size(), to + tensor.numel()
    path.write_bytes(bytes(LEAD) + b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor, np.array(rows, np.int64), to
    finally:
        os.close(descriptor)


def drawn(shapes: Sequence[tuple[int, int]], kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(FILE_DTYPES[kind]) for shape in shapes]


def packed_file(
    file: int, matrices: np.ndarray, elements: int, kind: str, throttle: Throttle, *, native: bool
) -> tuple[np.ndarray, int | None]:
    buffer = huge_page_zeros(elements, np.dtype(TYPES[kind]))
    scales = np.linspace(0.5, 2.0, len(matrices), dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(packing, "_native", lambda: None)
        with np.errstate(invalid="ignore"):
            return buffer, pack_file(file, buffer, matrices, scales, throttle)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("stored", FILE_DTYPES)
@pytest.mark.parametrize("throttle", [UNTHROTTLED, DURING_A_BATCH, Throttle(threads=1, pause_ratio=0.0)])
def test_a_file_is_packed_to_the_same_bits_in_one_call_and_matrix_by_matrix(
    tmp_path: Path, kind: str, stored: str, throttle: Throttle
) -> None:
    shapes = [(16, 576), (1536, 16), (3, 5), (37, 3), (1, 70_000), (40_000, 1), (5, 40_000), (700, 300)]
    with written(tmp_path / "file", drawn(shapes, stored)) as (file, matrices, elements):
        native, plain = (packed_file(file, matrices, elements, kind, throttle, native=n) for n in (True, False))
    np.testing.assert_array_equal(native[0].view(np.uint8), plain[0].view(np.uint8))
    assert native[1] is plain[1] is None


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", FILE_DTYPES)
def test_all_numbers_of_a_16_bit_type_are_widened_exactly(tmp_path: Path, stored: str, native: bool) -> None:
    if stored == "F32":
        every = torch.tensor([[0.0, -0.0, 1e-45, -1e6, 1.5, 1e-38]])
    else:
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(FILE_DTYPES[stored]).reshape(64, 1024)
        every = torch.where(every.float().abs() < TOO_LARGE, every, torch.zeros_like(every))
    with written(tmp_path / "file", [every]) as (file, matrices, elements), pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(packing, "_native", lambda: None)
        buffer = huge_page_zeros(elements, np.dtype(np.float32))
        assert pack_file(file, buffer, matrices, np.ones(1, np.float32), UNTHROTTLED) is None
    np.testing.assert_array_equal(buffer.view(np.uint32), every.float().numpy().reshape(-1).view(np.uint32))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", FILE_DTYPES)
@pytest.mark.parametrize("bad", [0, 1, 4, 5])
def test_the_first_non_finite_matrix_of_a_file_is_returned_by_its_number(
    tmp_path: Path, stored: str, bad: int, native: bool
) -> None:
    tensors = drawn([(33, 60)] * 6, stored)
    for number in {bad, 5}:
        tensors[number][32, 59] = float("nan" if number % 2 else "inf")
    with written(tmp_path / "file", tensors) as (file, matrices, elements):
        for throttle in (UNTHROTTLED, DURING_A_BATCH):
            assert packed_file(file, matrices, elements, "float32", throttle, native=native)[1] == bad


@pytest.mark.parametrize("native", [True, False])
def test_a_file_that_ends_early_and_one_that_cannot_be_read_are_errors(tmp_path: Path, native: bool) -> None:
    with written(tmp_path / "file", drawn([(40, 40), (40, 40)], "F32")) as (file, matrices, elements):
        os.truncate(tmp_path / "file", LEAD + 2 * 40 * 40 * 4 - 1)
        with pytest.raises(EOFError):
            packed_file(file, matrices, elements, "float32", UNTHROTTLED, native=native)
        with pytest.raises(OSError, match="Bad file descriptor"):
            packed_file(-1, matrices, elements, "float32", UNTHROTTLED, native=native)


def test_matrices_outside_of_the_buffer_are_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    with written(tmp_path / "file", drawn([(4, 4), (4, 4)], "F32")) as (file, matrices, elements):
        with pytest.raises(ValueError, match="outside"):
            packed_file(file, matrices, elements - 1, "float32", UNTHROTTLED, native=True)
        matrices[0, 5] = -1
        with pytest.raises(ValueError, match="outside"):
            packed_file(file, matrices, elements, "float32", UNTHROTTLED, native=True)
        with pytest.raises(ValueError, match="int32"):
            packed_file(file, matrices.astype(np.int32), elements, "float32", UNTHROTTLED, native=True)


@pytest.mark.skipif(not (FOLDER / "liblora_pack.so").is_file(), reason="the native library is not built")
@pytest.mark.parametrize(("setting", "native"), [("auto", True), ("avx2", True), ("0", False)])
def test_the_built_library_packs_unless_the_environment_forbids_it(
    setting: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPOOL_NATIVE", setting)
    assert (packing._native.__wrapped__() is not None) == native
