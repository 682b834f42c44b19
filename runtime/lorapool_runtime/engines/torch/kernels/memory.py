"""Torch tensors in anonymous mappings, of which only the pages that were written occupy memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.host_memory import anonymous_mapping, huge_page_zeros

_HUGE = 2 * 2**20


def huge_page_region(size_bytes: int) -> Tensor:
    """uint8 [size_bytes, rounded up to whole huge pages] on the CPU, in huge pages where the system has them."""
    return torch.from_numpy(huge_page_zeros(-(-size_bytes // _HUGE) * _HUGE, np.dtype(np.uint8)))


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU their pages are not touched, as torch.zeros would: a cache that never fills costs nothing."""
    count = torch.Size(shape).numel()
    if device.type != "cpu" or count == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(anonymous_mapping(count * dtype.itemsize), dtype=dtype).view(shape)
