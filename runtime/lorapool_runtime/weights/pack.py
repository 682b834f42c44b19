"""The matrices of an adapter's file to their places in the adapter's buffer, and the buffer to its slot.

`adapter_file` and `memory` call it in threads of their own, hence no torch. By a small native library where it was
built: one pass over memory and one call without the GIL, so that the engine's thread is not held up. Else by NumPy,
matrix by matrix; both give the same bits. A file whose bytes end early is an error, never a half-filled buffer.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lorapool_runtime.native_library import NativeUnavailableError, open_library

_VERSION = 2
_HUGE = 2 * 2**20
_NOT_FINITE = 1 << 32

FILE_TYPES = ("F32", "BF16", "F16")
"""Types of numbers that are read, as safetensors calls them; all are exact in float32."""
MATRIX_FIELDS = ("offset", "type", "rows", "cols", "transposed", "to")
"""Of one matrix, int64 each: its first byte in the file, its index in FILE_TYPES, its shape there, 1 to transpose it,
the element of the buffer where it begins."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How much of the machine a load may take."""

    threads: int
    rest: float
    """Pause after each piece of work, in times of the work."""


ALONE = Pace(threads=2, rest=0.0)
"""Nobody generates: as fast as it goes. More threads than this find no more memory bandwidth on small machines."""
BESIDE_A_BATCH = Pace(threads=1, rest=2.0)
"""Others generate: a third of one thread, so that their steps keep their cores and the memory's bandwidth."""


def zeroed(elements: int, dtype: np.dtype[Any]) -> np.ndarray:
    """[elements] of memory of its own, which goes back to the operating system with the array; in huge pages where it
    fills them: a fault for every 4 KiB costs more than packing does."""
    size = max(elements * dtype.itemsize, 1)
    mapping = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(mapping, dtype=np.uint8)
    start = -whole.ctypes.data % _HUGE
    if huge := size // _HUGE * _HUGE:
        mapping.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return whole[start : start + elements * dtype.itemsize].view(dtype)


def pack_file(file: int, buffer: np.ndarray, matrices: np.ndarray, scales: np.ndarray, pace: Pace) -> int | None:
    """The row of `matrices` that first holds a number that is not finite, before or after; None where there is none.

    file: a descriptor; buffer: [elements] of float32, float16, or uint16 for bfloat16's bit patterns; matrices: int64
    [matrices, len(MATRIX_FIELDS)]; scales: float32 [matrices], by which each is multiplied. Rounds to nearest even.
    Raises OSError, EOFError where the file ends too early.
    """
    if matrices.dtype != np.int64 or scales.dtype != np.float32 or matrices.shape != (len(scales), len(MATRIX_FIELDS)):
        raise ValueError(f"matrices {matrices.dtype} {matrices.shape}, scales {scales.dtype} {scales.shape}")
    ends = matrices[:, 2] * matrices[:, 3] + matrices[:, 5]
    if matrices.min(initial=0) < 0 or ends.max(initial=0) > len(buffer):
        raise ValueError(f"a matrix lies outside of the buffer's {len(buffer)} elements")
    native = _native()
    if native is None or buffer.dtype not in (np.float32, np.uint16):
        return _pack_file(file, buffer, matrices, scales)
    matrices, scales = np.ascontiguousarray(matrices), np.ascontiguousarray(scales)
    failed = native.lora_pack_file(
        file, buffer.ctypes.data, matrices.ctypes.data, scales.ctypes.data, len(scales), buffer.dtype == np.uint16,
        pace.threads, pace.rest,
    )  # fmt: skip
    if failed >= _NOT_FINITE:
        return int(failed - _NOT_FINITE)
    if failed == errno.ENODATA:
        raise EOFError("the file ends too early")
    if failed:
        raise OSError(failed, os.strerror(failed))
    return None


def pack(values: np.ndarray, to: np.ndarray, *, scale: float, transposed: bool) -> bool:
    """Whether every number is finite, before and after.

    values: float32 [rows, cols]; to: the same shape, or [cols, rows] if transposed; float32, float16, or uint16 for
    bfloat16's bit patterns; rounded to nearest even.
    """
    if to.shape != (values.T.shape if transposed else values.shape) or values.dtype != np.float32:
        raise ValueError(f"cannot put {values.dtype} {values.shape} into {to.shape}")
    native = _native()
    plain = values.flags.c_contiguous and to.flags.c_contiguous
    if native is not None and plain and to.dtype in (np.float32, np.uint16):
        rows, cols = values.shape
        bad = native.lora_pack(to.ctypes.data, values.ctypes.data, rows, cols, transposed, scale, to.dtype == np.uint16)
        return bool(bad == 0)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.multiply(values.T if transposed else values, np.float32(scale), dtype=np.float32, order="C")
    return _cast(scaled, to)


def copy_bytes(to: np.ndarray, values: np.ndarray, pace: Pace) -> None:
    """uint8 [bytes] each, of equal length."""
    if to.shape != values.shape or to.dtype != np.uint8 or values.dtype != np.uint8:
        raise ValueError(f"cannot copy {values.dtype} {values.shape} to {to.dtype} {to.shape}")
    native = _native()
    if native is None:
        np.copyto(to, values)
    else:
        native.lora_copy(to.ctypes.data, values.ctypes.data, len(values), pace.threads, pace.rest)


def _pack_file(file: int, buffer: np.ndarray, matrices: np.ndarray, scales: np.ndarray) -> int | None:
    for number, (offset, kind, rows, cols, transposed, to) in enumerate(matrices.tolist()):
        values = _widened(_read(file, rows * cols * (4 if kind == 0 else 2), offset), FILE_TYPES[kind])
        place = buffer[to : to + rows * cols].reshape((cols, rows) if transposed else (rows, cols))
        if not pack(values.reshape(rows, cols), place, scale=float(scales[number]), transposed=bool(transposed)):
            return number
    return None


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
        return bool(np.isfinite(values).all() and ((to & 0x7F80) != 0x7F80).all())
    with np.errstate(over="ignore"):
        to[:] = values
    return bool(np.isfinite(to).all())


@cache
def _native() -> ctypes.CDLL | None:
    try:
        library = open_library("lora_pack", _VERSION, shares_openmp=False)
        one, file, copy = library.lora_pack, library.lora_pack_file, library.lora_copy
    except (NativeUnavailableError, AttributeError):
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    one.argtypes = [pointer, pointer, size, size, number, ctypes.c_float, number]
    file.argtypes = [number, pointer, pointer, pointer, size, number, number, ctypes.c_double]
    file.restype = size
    copy.argtypes = [pointer, pointer, size, number, ctypes.c_double]
    copy.restype = None
    return library
