"""Packs the matrices of an adapter's file into the adapter's buffer.

A small native library, where it was built, does it in one pass over memory and in one call that releases the GIL, so
that the engine's thread is not delayed. Otherwise NumPy does it matrix by matrix. Both give the same bits. A file that
ends early raises an error.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from functools import cache

import numpy as np

from lorapool_runtime.native_library import NativeUnavailableError, open_library

_NAME, _VERSION = "lora_pack", 3  # of the library and its interface
_UNUSABLE = 1 << 32
_TOO_LARGE_BFLOAT16 = 0x4980  # TOO_LARGE's bit pattern
TOO_LARGE = 2.0**20
"""A weight of this magnitude, after scaling, is refused. Training gives weights below 100; products with much larger
ones overflow, and a batch that is not finite can reach the rows of other requests in a GPU's kernels."""

FILE_TYPES = ("F32", "BF16", "F16")
"""Element types that can be read, by their safetensors names; float32 represents all of them exactly."""
MATRIX_FIELDS = ("offset", "type", "rows", "cols", "transposed", "to")
"""The int64 fields that describe one matrix: its first byte in the file, its index in FILE_TYPES, its shape there, 1 to
transpose it, and the element of the buffer where it begins."""


@dataclass(frozen=True, slots=True)
class Throttle:
    """How much of the machine the packing of one file may use."""

    threads: int
    pause_ratio: float
    """Length of the pause after each part of the work, relative to the time that part took."""


UNTHROTTLED = Throttle(threads=2, pause_ratio=0.0)
"""For an idle engine. More than two threads gain no memory bandwidth on small machines."""
DURING_A_BATCH = Throttle(threads=1, pause_ratio=2.0)
"""For a busy engine: a third of one thread, so that decoding keeps its cores and its memory bandwidth."""


def pack_file(
    file: int, buffer: np.ndarray, matrices: np.ndarray, scales: np.ndarray, throttle: Throttle
) -> int | None:
    """Reads, scales and rounds all matrices of an open file into `buffer`.

    file: a descriptor; buffer: [elements] of float32, float16, or uint16 for bfloat16's bit patterns; matrices: int64
    [matrices, len(MATRIX_FIELDS)]; scales: float32 [matrices], the factor of each. Rounds to nearest even.

    Returns the row of the first matrix with a value that is not finite or, after scaling and rounding, has a magnitude
    of TOO_LARGE or more; None where there is none. Raises OSError, EOFError where the file ends too early, and
    ValueError for tables that do not fit.
    """
    if matrices.dtype != np.int64 or scales.dtype != np.float32 or matrices.shape != (len(scales), len(MATRIX_FIELDS)):
        raise ValueError(f"matrices {matrices.dtype} {matrices.shape}, scales {scales.dtype} {scales.shape}")
    ends = matrices[:, 2] * matrices[:, 3] + matrices[:, 5]
    if matrices.min(initial=0) < 0 or ends.max(initial=0) > len(buffer):
        raise ValueError(f"a matrix is outside of the buffer's {len(buffer)} elements")
    native = _native()
    if native is None or buffer.dtype not in (np.float32, np.uint16):
        return _pack_file(file, buffer, matrices, scales)
    matrices, scales = np.ascontiguousarray(matrices), np.ascontiguousarray(scales)
    failed = native.lora_pack_file(
        file, buffer.ctypes.data, matrices.ctypes.data, scales.ctypes.data, len(scales), buffer.dtype == np.uint16,
        throttle.threads, throttle.pause_ratio,
    )  # fmt: skip
    if failed >= _UNUSABLE:
        return int(failed - _UNUSABLE)
    if failed == errno.ENODATA:
        raise EOFError("the file ends too early")
    if failed:
        raise OSError(failed, os.strerror(failed))
    return None


def pack(values: np.ndarray, to: np.ndarray, *, scale: float, transposed: bool) -> bool:
    """Scales and rounds one matrix into `to`; returns whether every value is finite and below TOO_LARGE.

    values: float32 [rows, cols]; to: the same shape, or [cols, rows] if transposed; float32, float16, or uint16 for
    bfloat16's bit patterns. Rounds to nearest even.
    """
    if to.shape != (values.T.shape if transposed else values.shape) or values.dtype != np.float32:
        raise ValueError(f"cannot put {values.dtype} {values.shape} into {to.shape}")
    native = _native()
    contiguous = values.flags.c_contiguous and to.flags.c_contiguous
    if native is not None and contiguous and to.dtype in (np.float32, np.uint16):
        rows, cols = values.shape
        bfloat16 = to.dtype == np.uint16
        unusable = native.lora_pack(to.ctypes.data, values.ctypes.data, rows, cols, transposed, scale, bfloat16)
        return bool(unusable == 0)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.multiply(values.T if transposed else values, np.float32(scale), dtype=np.float32, order="C")
    return _cast(scaled, to)


def _pack_file(file: int, buffer: np.ndarray, matrices: np.ndarray, scales: np.ndarray) -> int | None:
    for number, (offset, kind, rows, cols, transposed, to) in enumerate(matrices.tolist()):
        values = _widened(_read(file, rows * cols * (4 if kind == 0 else 2), offset), FILE_TYPES[kind])
        target = buffer[to : to + rows * cols].reshape((cols, rows) if transposed else (rows, cols))
        if not pack(values.reshape(rows, cols), target, scale=float(scales[number]), transposed=bool(transposed)):
            return number
    return None


def read_values(file: int, kind: str, start: int, first: int, count: int) -> np.ndarray:
    """float32 [count]: elements of a tensor from its element `first` on. Raises OSError, EOFError.

    kind: one of FILE_TYPES; start: the tensor's first byte in the open file.
    """
    size = 4 if kind == "F32" else 2
    return _widened(_read(file, count * size, start + first * size), kind)


def rounded_to(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 values as they are after storing them in a file as `kind`, one of FILE_TYPES."""
    match kind:
        case "BF16":
            bits = np.empty(values.shape, np.uint16)
            _cast(values, bits)
            return _widened(bytearray(bits.tobytes()), kind).reshape(values.shape)
        case "F16":
            with np.errstate(over="ignore"):
                return values.astype(np.float16).astype(np.float32)
        case _:  # F32
            return values


def _read(file: int, size: int, offset: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        part = os.pread(file, size - len(data), offset + len(data))
        if not part:
            raise EOFError("the file ends too early")
        data += part
    return data


def _widened(data: bytearray, kind: str) -> np.ndarray:
    match kind:
        case "BF16":
            return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        case "F16":
            return np.frombuffer(data, dtype="<f2").astype(np.float32)
        case _:  # F32
            return np.frombuffer(data, dtype="<f4")


def _cast(values: np.ndarray, to: np.ndarray) -> bool:
    if to.dtype == np.uint16:
        bits = values.view(np.uint32)
        to[:] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bool(np.isfinite(values).all() and ((to & 0x7FFF) < _TOO_LARGE_BFLOAT16).all())
    with np.errstate(over="ignore"):
        to[:] = values
    return bool(np.isfinite(to).all() and (to.dtype == np.float16 or (np.abs(to) < TOO_LARGE).all()))


@cache
def _native() -> ctypes.CDLL | None:
    try:
        library = open_library(_NAME, _VERSION, shares_openmp=False)
        one, file = library.lora_pack, library.lora_pack_file
    except (NativeUnavailableError, AttributeError):
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    one.argtypes = [pointer, pointer, size, size, number, ctypes.c_float, number]
    file.argtypes = [number, pointer, pointer, pointer, size, number, number, ctypes.c_double]
    file.restype = size
    return library
