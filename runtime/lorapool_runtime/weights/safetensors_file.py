"""A safetensors file held open: its header's bytes, and a descriptor by which its numbers are read.

`adapter_file` opens one in a worker thread. The header is `lorapool_artifacts.header`'s business, by the same bounds
as when the adapter was judged. The numbers are read, never mapped: a file cut short or a failing disk is then an
error of one load, and not a signal that ends the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorapool_artifacts.header import ADAPTER_BOUNDS, LENGTH_BYTES, SafetensorsHeader, header_length, parse_header

_FIRST_READ_BYTES = 64 * 1024  # holds most headers whole


@dataclass(frozen=True, slots=True)
class WeightsFile:
    descriptor: int
    size_bytes: int
    head: bytes
    """The length and the JSON of the header, as they stand in the file."""
    name: str

    def header(self) -> SafetensorsHeader:
        """Raises ArtifactError."""
        return parse_header(self.head, self.size_bytes, ADAPTER_BOUNDS, name=self.name)


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Raises ArtifactError for what has no header of an adapter's, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, _FIRST_READ_BYTES, 0)
        whole = LENGTH_BYTES + header_length(head, size, ADAPTER_BOUNDS, name=path.name)
        if len(head) < whole:
            head += os.pread(descriptor, whole - len(head), len(head))
        yield WeightsFile(descriptor, size, head[:whole], path.name)
    finally:
        os.close(descriptor)
