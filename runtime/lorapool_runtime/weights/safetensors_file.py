"""An open safetensors file: the bytes of its header, and a descriptor to read its tensors from.

`lorapool_artifacts.checks.header` parses the header. The file was inspected before, so that its number of tensors is
not bounded again. The tensors are read, never mapped: a truncated file or a failing disk then fails one load instead of
killing the process by a signal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorapool_artifacts.checks.header import (
    ADAPTER_DTYPES,
    LENGTH_BYTES,
    HeaderBounds,
    SafetensorsHeader,
    header_length,
    parse_header,
)

_FIRST_READ_BYTES = 64 * 1024  # most headers are shorter
_UNBOUNDED = HeaderBounds(max_tensors=2**31, dtypes=ADAPTER_DTYPES)


@dataclass(frozen=True, slots=True)
class WeightsFile:
    descriptor: int
    size_bytes: int
    head: bytes
    """The length and the JSON of the header, exactly as in the file."""
    name: str
    bounds: HeaderBounds = _UNBOUNDED

    def header(self) -> SafetensorsHeader:
        """The parsed header. Raises ArtifactError."""
        return parse_header(self.head, self.size_bytes, self.bounds, name=self.name)


@contextmanager
def open_weights(path: Path, bounds: HeaderBounds = _UNBOUNDED) -> Iterator[WeightsFile]:
    """Opens the file while the context lasts. Raises ArtifactError for an invalid header, and OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, _FIRST_READ_BYTES, 0)
        whole = LENGTH_BYTES + header_length(head, size, bounds, name=path.name)
        if len(head) < whole:
            head += os.pread(descriptor, whole - len(head), len(head))
        yield WeightsFile(descriptor, size, head[:whole], path.name, bounds)
    finally:
        os.close(descriptor)
