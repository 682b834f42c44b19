"""The weights of all adapter slots on the device: one stretch of memory, slot after slot.

The engine thread writes and clears slots between two steps; `lora` multiplies with views that span many slots, so no
weights are ever gathered per row. On CPU the memory is an anonymous mapping: a page that no adapter has touched costs
nothing, and clearing a slot hands its pages back to the operating system (they read as zeros afterwards). How much
a slot really occupies is asked of the kernel, not computed.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.memory import anonymous_mapping
from lorapool_runtime.targets import TargetGroup

_LINE_BYTES = 64  # every part starts on a cache line


class GroupWeights(Protocol):
    """An adapter's part for one group, in host memory, scale folded into b."""

    @property
    def a(self) -> np.ndarray: ...  # [rank, members, in]
    @property
    def b(self) -> tuple[np.ndarray, ...]: ...  # per member [rank, out]


class Slabs:
    """Per group and slot: A [max_rank, members, in], then per member B [max_rank, out]; rank is outermost, so that an
    adapter of low rank touches and reads a prefix only."""

    def __init__(
        self,
        groups: Sequence[TargetGroup],
        *,
        slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.max_rank, self.dtype = slots, max_rank, dtype
        offsets = [0]
        line = _LINE_BYTES // dtype.itemsize
        for group in groups:
            for width in (group.size * group.in_features, *group.out_features):
                offsets.append(offsets[-1] + -(-max_rank * width // line) * line)
        page = mmap.PAGESIZE // dtype.itemsize
        self._stride = -(-offsets[-1] // page) * page
        self.slot_bytes = self._stride * dtype.itemsize
        self._mapping = _small_page_mapping(slots * self.slot_bytes) if device.type == "cpu" and offsets[-1] else None
        if self._mapping is not None:
            self._memory = torch.frombuffer(self._mapping, dtype=dtype)  # [slots * stride]
        else:
            self._memory = torch.zeros(slots * self._stride, dtype=dtype, device=device)
        self.a: list[Tensor] = []  # per group [slots, max_rank, members, in]
        self.b: list[tuple[Tensor, ...]] = []  # per group and member [slots, max_rank, out]
        at = iter(pairwise(offsets))
        for group in groups:
            start, _ = next(at)
            shape = (slots, max_rank, group.size, group.in_features)
            strides = (self._stride, group.size * group.in_features, group.in_features, 1)
            self.a.append(self._memory.as_strided(shape, strides, start))
            self.b.append(
                tuple(
                    self._memory.as_strided((slots, max_rank, out), (self._stride, out, 1), next(at)[0])
                    for out in group.out_features
                )
            )
        self.ranks = [[0] * slots for _ in groups]
        """[group][slot]: 0 where the slot has nothing for the group."""

    def write(self, slot: int, weights: dict[int, GroupWeights]) -> None:
        """Copies an adapter into an empty slot; `weights` by group number."""
        if self.occupied(slot):
            raise ValueError(f"slot {slot} is not empty")
        for number, part in weights.items():
            rank = part.a.shape[0]
            self.a[number][slot, :rank].copy_(self._tensor(part.a))
            for slab, b in zip(self.b[number], part.b, strict=True):
                slab[slot, :rank].copy_(self._tensor(b))
            self.ranks[number][slot] = rank

    def occupied(self, slot: int) -> bool:
        return any(ranks[slot] for ranks in self.ranks)

    def clear(self, slot: int) -> int:
        """Makes the slot all zeros; the bytes given back to the operating system (on a GPU the slot stays reserved)."""
        for ranks in self.ranks:
            ranks[slot] = 0
        if self._mapping is None:
            self._memory[slot * self._stride : (slot + 1) * self._stride].zero_()
            return 0
        before = self.resident_bytes(slot)
        self._mapping.madvise(mmap.MADV_DONTNEED, slot * self.slot_bytes, self.slot_bytes)
        return before - self.resident_bytes(slot)

    def resident_bytes(self, slot: int) -> int:
        """What the slot occupies now, as the kernel counts it; on a GPU its reserved share."""
        if self._mapping is None:
            return self.slot_bytes
        return _resident_bytes(self._memory.data_ptr() + slot * self.slot_bytes, self.slot_bytes)

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if tensor.dtype == self.dtype else tensor.view(self.dtype)


def _small_page_mapping(size: int) -> mmap.mmap:
    mapping = anonymous_mapping(size)
    # a huge page would be filled whole by the first row of a low-rank adapter
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping


_EXCLUSIVE = 1 << 56  # /proc/PID/pagemap: mapped by this process alone, so not the shared zero page
_SWAPPED = 1 << 62


def _resident_bytes(address: int, size: int) -> int:
    pages = size // mmap.PAGESIZE
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
