"""Memory of the process: zeroed buffers of their own, and pages counted by the kernel."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from lorapool_runtime.host_memory import huge_page_zeros, resident_bytes


@pytest.mark.parametrize("elements", [0, 5, 3 * 2**20])
def test_a_buffer_is_zero_and_as_long_as_asked(elements: int) -> None:
    made = huge_page_zeros(elements, np.dtype(np.float32))
    assert made.shape == (elements,)
    assert not made.any()


def test_only_written_pages_are_resident() -> None:
    made = huge_page_zeros(100 * mmap.PAGESIZE, np.dtype(np.uint8))  # too short for a huge page
    assert resident_bytes(made.ctypes.data, made.nbytes) == 0
    assert not made.any()  # reading maps the shared zero page, which does not count
    assert resident_bytes(made.ctypes.data, made.nbytes) == 0
    made[: 3 * mmap.PAGESIZE] = 1
    assert resident_bytes(made.ctypes.data, made.nbytes) == 3 * mmap.PAGESIZE
