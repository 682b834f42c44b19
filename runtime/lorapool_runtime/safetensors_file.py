"""Reads a safetensors file into NumPy arrays, trusting nothing in it.

`adapter_file` calls it in worker threads, so no torch here: a torch operator in a second thread would take the
engine's cores. The `safetensors` package's NumPy reader has no bfloat16, which adapters are commonly kept in. The
header is `lorapool_artifacts.header`'s business, by the same bounds as when the adapter was judged.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from lorapool_artifacts.header import ADAPTER_BOUNDS, LENGTH_BYTES, TensorInfo, header_length, parse_header
from lorapool_runtime.packing import zeroed


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors as float32 (exact for every type read). Raises ArtifactError, OSError."""
    with path.open("rb", buffering=0) as file:
        raw = zeroed(os.fstat(file.fileno()).st_size, np.dtype(np.uint8))
        data = raw.data[: _read_into(file, raw.data)]
    length = header_length(bytes(data[:LENGTH_BYTES]), len(data), ADAPTER_BOUNDS, name=path.name)
    header = parse_header(bytes(data[: LENGTH_BYTES + length]), len(data), ADAPTER_BOUNDS, name=path.name)
    return {name: _tensor(info, data[info.start : info.end]) for name, info in header.tensors.items()}


def _read_into(file: io.FileIO, to: memoryview) -> int:
    done = 0
    while done < len(to) and (count := file.readinto(to[done:])):
        done += count
    return done


def _tensor(info: TensorInfo, data: memoryview) -> np.ndarray:
    match info.dtype:
        case "BF16":
            values = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        case "F16":
            values = np.frombuffer(data, dtype="<f2").astype(np.float32)
        case _:  # F32: ADAPTER_BOUNDS allows these three
            values = np.frombuffer(data, dtype="<f4")
    return values.reshape(info.shape)
