"""Where the weights of a filled slot are stored: in the device's own memory, or in the adapter's buffer.

`DeviceMemory` copies every adapter into one region of a GPU's memory, whose addresses a captured graph may keep.
`HostMemory` copies nothing: on a CPU the kernels find every matrix by its address, so a slot is the buffer that was
read from the adapter's file. Neither remembers what it placed: `AdapterSlots` owns the state of the slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.engines.torch.transfers import StagedCopier
from lorapool_runtime.host_memory import resident_bytes
from lorapool_runtime.weights.layout import LINE_BYTES, Layout


class PackedWeights(Protocol):
    """An immutable adapter in host memory, as `weights.reader` returns it."""

    @property
    def layout(self) -> Layout: ...
    @property
    def buffer(self) -> np.ndarray: ...  # [layout.elements], bfloat16 as its 16-bit patterns


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one adapter is stored while it is in a slot."""

    first_element: int
    """Position of its first element, counted in elements from the start of `memory`; may be negative."""
    buffer: Tensor  # [layout.elements] of the memory's type
    resident_bytes: int
    weights: PackedWeights | None
    """The adapter, where the slot is the adapter's own memory."""


class SlotMemory(Protocol):
    memory: Tensor
    """The tensor from whose start positions are counted."""

    def place(self, slot: int, weights: PackedWeights) -> Placement:
        """Stores an adapter for a slot that no request can reach."""
        ...


class DeviceMemory:
    """One region of equal size per slot; a larger adapter gets memory of its own while it is in a slot.

    Any thread may place adapters, one at a time. The copy waits for the computation that was queued before it, since it
    may have read the slot, and computation goes on next to it.
    """

    def __init__(self, slots: int, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._elements = elements
        self.memory = torch.zeros(slots * elements, dtype=dtype, device=device)
        self._copier = StagedCopier.on_gpu(device) if device.type == "cuda" else None

    def place(self, slot: int, weights: PackedWeights) -> Placement:
        elements = weights.layout.elements
        if elements > self._elements:
            buffer = torch.empty(elements, dtype=self.memory.dtype, device=self.memory.device)
            first = (buffer.data_ptr() - self.memory.data_ptr()) // self.memory.itemsize
            resident_bytes = self._elements * self.memory.itemsize + buffer.nbytes
        else:
            first, resident_bytes = slot * self._elements, self._elements * self.memory.itemsize
            buffer = self.memory[first : first + elements]
        source = torch.from_numpy(weights.buffer).view(self.memory.dtype)
        if self._copier is None:
            buffer.copy_(source)
        else:
            self._copier.copy(buffer, source)
        return Placement(first, buffer, resident_bytes, None)


class HostMemory:
    """An adapter that the host cache or another slot holds too is in memory once. Any thread may place adapters."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.memory = torch.zeros(LINE_BYTES // dtype.itemsize, dtype=dtype)  # only its address is used

    def place(self, slot: int, weights: PackedWeights) -> Placement:
        """Uses the adapter's own buffer. Raises ValueError where it is not aligned to whole elements."""
        first, misaligned = divmod(weights.buffer.ctypes.data - self.memory.data_ptr(), self.memory.itemsize)
        if misaligned:
            raise ValueError("the adapter's buffer is not aligned to whole elements")
        buffer = torch.from_numpy(weights.buffer).view(self.memory.dtype)
        return Placement(first, buffer, weights_bytes(weights), weights)


def weights_bytes(weights: PackedWeights) -> int:
    """Bytes of the pages that the adapter's buffer occupies now, counted by the kernel."""
    return resident_bytes(weights.buffer.ctypes.data, weights.buffer.nbytes)
