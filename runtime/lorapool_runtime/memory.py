"""Memory of the device that costs nothing until it is touched, for `slabs` and `kv`.

On CPU an anonymous mapping: torch.zeros would touch every page of a cache that may never fill.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def anonymous_mapping(size_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    count = torch.Size(shape).numel()
    if device.type != "cpu" or count == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(anonymous_mapping(count * dtype.itemsize), dtype=dtype).view(shape)
