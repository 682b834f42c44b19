"""One matrix of an adapter's file to its place in the adapter's buffer: transposed, scaled, rounded, looked at.

`adapter_file` calls it for every A and B, in worker threads, hence no torch. By a small native library where it was
built (one pass over the file's bytes), else by NumPy (several); both give the same bits.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY = Path(__file__).parent / "native" / "liblora_pack.so"
_VERSION = 1
_HUGE = 2 * 2**20


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
        bad = native(to.ctypes.data, values.ctypes.data, rows, cols, transposed, scale, to.dtype == np.uint16)
        return bool(bad == 0)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.multiply(values.T if transposed else values, np.float32(scale), dtype=np.float32, order="C")
    return _cast(scaled, to)


def _cast(values: np.ndarray, to: np.ndarray) -> bool:
    if to.dtype == np.uint16:
        bits = values.view(np.uint32)
        to[:] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bool(np.isfinite(values).all() and ((to & 0x7F80) != 0x7F80).all())
    with np.errstate(over="ignore"):
        to[:] = values
    return bool(np.isfinite(to).all())


@cache
def _native() -> Callable[..., int] | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if library.lora_pack_version() != _VERSION:
            return None
        function = library.lora_pack
    except (OSError, AttributeError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, size, size, ctypes.c_int, ctypes.c_float, ctypes.c_int]
    checked: Callable[..., int] = function
    return checked
