"""Memory of this process, page by page: allocate it in huge pages, count what is resident, return what is free.

Imports no torch, and no function runs one of its operators, so any thread may use this module.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

_HUGE = 2 * 2**20


def anonymous_mapping(size_bytes: int) -> mmap.mmap:
    """Private zeroed memory. A page that is never written occupies nothing."""
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def huge_page_zeros(elements: int, dtype: np.dtype[Any]) -> np.ndarray:
    """[elements] of zeros in a mapping of their own, which the operating system gets back together with the array.

    As far as the elements fill huge pages they are stored in these: a page fault for every 4 KiB would cost more than
    writing the contents.
    """
    size = max(elements * dtype.itemsize, 1)
    mapping = anonymous_mapping(size + _HUGE)
    whole = np.frombuffer(mapping, dtype=np.uint8)
    start = -whole.ctypes.data % _HUGE
    if huge := size // _HUGE * _HUGE:
        mapping.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return whole[start : start + elements * dtype.itemsize].view(dtype)


_EXCLUSIVE = 1 << 56  # /proc/PID/pagemap: mapped by this process alone, so not the shared zero page
_SWAPPED = 1 << 62


def resident_bytes(address: int, size: int) -> int:
    """Bytes of the pages of [address, address + size) that occupy memory or swap, as the kernel counts them."""
    pages = -(-(address % mmap.PAGESIZE + size) // mmap.PAGESIZE)
    address -= address % mmap.PAGESIZE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(address // mmap.PAGESIZE * 8)
            entries = np.frombuffer(pagemap.read(pages * 8), dtype=np.uint64)
        return int(np.count_nonzero(entries & np.uint64(_EXCLUSIVE | _SWAPPED))) * mmap.PAGESIZE
    except OSError:  # a sandbox without pagemap: mincore also counts pages that were only ever read
        present = (ctypes.c_ubyte * pages)()
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), present) != 0:
            raise OSError(ctypes.get_errno(), "mincore failed") from None
        return sum(flags & 1 for flags in present) * mmap.PAGESIZE


def return_free_memory() -> None:
    """Asks the C library to return its free pages to the operating system, where it can (glibc). Takes milliseconds."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
