"""Device memory that takes no space until it is written, for adapter slots, the KV pool and packed weights.

On CPU these are anonymous mappings: torch.zeros would touch every page of a cache that may never fill. `SlotMemory`
also returns pages slot by slot, and reads from the system how many a slot holds. Its methods run no torch operator, so
any thread may call them for a slot that no request reads.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.weights.pack import ALONE, Pace, copy_bytes, zeroed

_HUGE = 2 * 2**20


def anonymous_mapping(size_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def huge_region(size_bytes: int) -> Tensor:
    """uint8 [at least size_bytes], zeros, in huge pages where the system has them; unused pages take no space."""
    return torch.from_numpy(zeroed(-(-size_bytes // _HUGE) * _HUGE, np.dtype(np.uint8)))


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of this shape; on CPU a page takes no space until it is written."""
    count = torch.Size(shape).numel()
    if device.type != "cpu" or count == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(anonymous_mapping(count * dtype.itemsize), dtype=dtype).view(shape)


class SlotMemory:
    """`slots` contiguous regions of equal size. Huge pages hold the filled part of a slot as far as it fills them,
    which saves page faults and TLB misses; small pages hold its end, so that no memory is wasted."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._unit = _HUGE if slot_bytes >= _HUGE else mmap.PAGESIZE
        self.stride_bytes = -(-slot_bytes // self._unit) * self._unit
        self.mapping = anonymous_mapping(slots * self.stride_bytes + self._unit)
        self.mapping.madvise(mmap.MADV_NOHUGEPAGE)
        whole = np.frombuffer(self.mapping, dtype=np.uint8)
        self.offset = -whole.ctypes.data % self._unit
        """Bytes from the mapping's start to slot 0."""
        self._bytes = whole[self.offset : self.offset + slots * self.stride_bytes]

    def fill(self, slot: int, values: np.ndarray, pace: Pace = ALONE) -> None:
        """values: uint8 [bytes], written from the slot's start on; the rest of the slot reads as zeros."""
        begin = slot * self.stride_bytes
        kept = -(-len(values) // mmap.PAGESIZE) * mmap.PAGESIZE
        if kept < self.stride_bytes:
            self._discard(self.offset + begin + kept, self.stride_bytes - kept)
        self._bytes[begin + len(values) : begin + kept] = 0
        if self._unit == _HUGE and (huge := len(values) // _HUGE * _HUGE):
            self.mapping.madvise(mmap.MADV_HUGEPAGE, self.offset + begin, huge)
        copy_bytes(self._bytes[begin : begin + len(values)], values, pace)

    def release(self, slot: int) -> int:
        """Gives the pages back to the system; they read as zeros afterwards. Returns the bytes freed, as measured."""
        before = self.resident_bytes(slot)
        self._discard(self.offset + slot * self.stride_bytes, self.stride_bytes)
        return before - self.resident_bytes(slot)

    def _discard(self, at: int, size: int) -> None:
        self.mapping.madvise(mmap.MADV_DONTNEED, at, size)
        self.mapping.madvise(mmap.MADV_NOHUGEPAGE, at, size)

    def resident_bytes(self, slot: int) -> int:
        """Bytes of the slot that are in memory now."""
        return resident_bytes(self._bytes.ctypes.data + slot * self.stride_bytes, self.stride_bytes)


_EXCLUSIVE = 1 << 56  # /proc/PID/pagemap: mapped by this process alone, so not the shared zero page
_SWAPPED = 1 << 62


def resident_bytes(address: int, size: int) -> int:
    """Resident bytes of the pages that overlap [address, address + size), as the operating system counts them."""
    pages = -(-(address % mmap.PAGESIZE + size) // mmap.PAGESIZE)
    address -= address % mmap.PAGESIZE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(address // mmap.PAGESIZE * 8)
            entries = np.frombuffer(pagemap.read(pages * 8), dtype=np.uint64)
        return int(np.count_nonzero(entries & np.uint64(_EXCLUSIVE | _SWAPPED))) * mmap.PAGESIZE
    except OSError:  # a sandbox without pagemap: mincore counts pages that were only read, too
        present = (ctypes.c_ubyte * pages)()
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), present) != 0:
            raise OSError(ctypes.get_errno(), "mincore failed") from None
        return sum(flags & 1 for flags in present) * mmap.PAGESIZE
