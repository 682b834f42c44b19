"""The memory behind the slots: one stretch of the device's with a copy per slot, or on CPU the adapters' own.

`slabs` owns one and keeps the tables of what is where in it. `CopyingStore` takes an adapter's bytes as they are: one
copy, slot after slot, as a GPU needs it and as products over neighbouring slots do. `SharingStore` copies nothing: host
memory is the device, a kernel finds every matrix by its place, and so the slot is the adapter that `adapter_file` read,
held as long as it is in the slot. No torch operator fills or empties a slot, so any thread may, for a slot that nobody
reads.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.engines.torch.kernels.memory import SlotMemory, resident_bytes
from lorapool_runtime.weights.layout import LINE_BYTES, Layout
from lorapool_runtime.weights.pack import Pace


class PackedWeights(Protocol):
    """An adapter in host memory: what `adapter_file` makes. Nobody changes it any more."""

    @property
    def layout(self) -> Layout: ...
    @property
    def buffer(self) -> np.ndarray: ...  # [layout.elements], bfloat16 as its 16-bit patterns


class SlotStore(Protocol):
    memory: Tensor
    """What places are counted from, in elements."""

    def fill(self, slot: int, weights: PackedWeights, pace: Pace) -> None: ...

    def release(self, slot: int) -> int:
        """The bytes that really came free."""
        ...

    def resident_bytes(self, slot: int) -> int:
        """What the slot occupies now, as the system counts it."""
        ...

    def begin(self, slot: int) -> int:
        """The place of a filled slot's first element; it may lie before `memory`."""
        ...

    def view(self, first: int, slots: int, rows: int, width: int, at: int) -> Tensor:
        """[slots, rows, width], from element `at` of each slot on."""
        ...


class CopyingStore:
    """On CPU pages that no adapter has touched cost nothing, and emptying a slot hands its pages back."""

    def __init__(self, slots: int, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._pages: SlotMemory | None = None
        self._stride = elements
        if device.type == "cpu" and elements:
            self._pages = SlotMemory(slots, elements * dtype.itemsize)
            self._stride = self._pages.stride_bytes // dtype.itemsize
            self.memory = torch.frombuffer(
                self._pages.mapping, dtype=dtype, count=slots * self._stride, offset=self._pages.offset
            )
        else:
            self.memory = torch.zeros(slots * elements, dtype=dtype, device=device)

    def fill(self, slot: int, weights: PackedWeights, pace: Pace) -> None:
        """On a GPU only the engine thread may call it."""
        if self._pages is not None:
            self._pages.fill(slot, weights.buffer.view(np.uint8), pace)
            return
        values = torch.from_numpy(weights.buffer).view(self.memory.dtype)
        self.memory[self.begin(slot) :][: len(values)].copy_(values, non_blocking=True)

    def release(self, slot: int) -> int:
        """None on a GPU, whose share is reserved."""
        return 0 if self._pages is None else self._pages.release(slot)

    def resident_bytes(self, slot: int) -> int:
        return self._stride * self.memory.itemsize if self._pages is None else self._pages.resident_bytes(slot)

    def begin(self, slot: int) -> int:
        return slot * self._stride

    def view(self, first: int, slots: int, rows: int, width: int, at: int) -> Tensor:
        return self.memory.as_strided((slots, rows, width), (self._stride, width, 1), self.begin(first) + at)


class SharingStore:
    """On CPU only. An adapter that is also kept elsewhere (the host cache, another slot) is in memory once."""

    def __init__(self, slots: int, dtype: torch.dtype) -> None:
        self.memory = torch.zeros(LINE_BYTES // dtype.itemsize, dtype=dtype)  # a place to count from, nothing more
        self._held: list[PackedWeights | None] = [None] * slots

    def fill(self, slot: int, weights: PackedWeights, pace: Pace) -> None:
        if (weights.buffer.ctypes.data - self.memory.data_ptr()) % self.memory.itemsize:
            raise ValueError("an adapter's buffer does not begin at a whole element")
        self._held[slot] = weights

    def release(self, slot: int) -> int:
        """0 where somebody else still holds the adapter."""
        held, self._held[slot] = self._held[slot], None
        if held is None:
            return 0
        size, watch = _resident_bytes(held), weakref.ref(held)
        del held
        return size if watch() is None else 0

    def resident_bytes(self, slot: int) -> int:
        held = self._held[slot]
        return 0 if held is None else _resident_bytes(held)

    def begin(self, slot: int) -> int:
        return (self._filled(slot).buffer.ctypes.data - self.memory.data_ptr()) // self.memory.itemsize

    def view(self, first: int, slots: int, rows: int, width: int, at: int) -> Tensor:
        """Of one slot: adapters are no neighbours here."""
        if slots != 1:
            raise ValueError(f"{slots} slots share no memory")
        whole = torch.from_numpy(self._filled(first).buffer).view(self.memory.dtype)
        return whole[at : at + rows * width].view(1, rows, width)

    def _filled(self, slot: int) -> PackedWeights:
        held = self._held[slot]
        assert held is not None  # `slabs` asks for what is published only
        return held


def _resident_bytes(weights: PackedWeights) -> int:
    return resident_bytes(weights.buffer.ctypes.data, weights.buffer.nbytes)
