"""Copies between the host and the device, so that a step waits for a GPU once: when its results are fetched.

A copy of pageable memory, as `torch.tensor(values, device="cuda")` makes one, waits until the device has done all that
it was given before. Pinned memory is copied without waiting; torch's allocator keeps it until the copy has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_STAGING_BYTES = 16 << 20
"""Of each of the two buffers of pinned memory through which weights are copied."""


def to_device(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on the device. On a GPU the copy is queued behind the work before it, and nothing waits."""
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    return _copied(host.to(dtype), device)


def fetch(tensors: Sequence[Tensor]) -> list[Any]:
    """The values of tensors of one device, as (nested) lists. The one point at which a step waits for a GPU."""
    return [tensor.tolist() for tensor in _fetched(tensors)]


def _copied(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    if not tensors or tensors[0].device.type != "cuda":
        return list(tensors)
    on_host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for target, tensor in zip(on_host, tensors, strict=True):
        target.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return on_host


class CopyQueue(Protocol):
    """Copies to the device, in order, next to the computation."""

    def begin(self) -> None:
        """Lets the copies that follow wait for all computation that was queued so far."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Queues a copy from pinned memory, which must not change before `wait` returned for the result."""
        ...

    def wait(self, copied: Any) -> None:
        """Blocks until this copy has ended."""
        ...


class CudaCopyQueue:
    """A stream of its own: a GPU copies while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch declares no types here

    def begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor) -> Any:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, copied: Any) -> None:
        copied.synchronize()


class StagedCopier:
    """Copies weights from pageable memory through two pinned buffers in turn: while one is filled, the other is copied.

    One thread at a time may use it. It blocks that thread, and no computation.
    """

    def __init__(self, queue: CopyQueue, buffers: tuple[Tensor, Tensor]) -> None:
        """buffers: uint8, of equal length."""
        self._queue, self._buffers = queue, buffers

    @classmethod
    def on_gpu(cls, device: torch.device) -> StagedCopier:
        first, second = (torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2))
        return cls(CudaCopyQueue(device), (first, second))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target, source: contiguous, of one type and length. When it returns, the copy has ended."""
        self._queue.begin()
        size, to, own = len(self._buffers[0]), target.view(torch.uint8), source.view(torch.uint8)
        pending: list[Any] = [None, None]
        for number, begin in enumerate(range(0, len(own), size)):
            turn, part = number % 2, slice(begin, begin + size)
            if pending[turn] is not None:
                self._queue.wait(pending[turn])
            staged = self._buffers[turn][: len(own[part])]
            staged.copy_(own[part])
            pending[turn] = self._queue.copy(to[part], staged)
        for copied in pending:
            if copied is not None:
                self._queue.wait(copied)
