"""The C heap of this process."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Returns the heap's free pages to the operating system, where the C library can (glibc). Takes milliseconds."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
