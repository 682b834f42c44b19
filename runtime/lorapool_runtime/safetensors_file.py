"""Reads a safetensors file into NumPy arrays, trusting nothing in it.

`adapter_file` calls it in worker threads, so no torch here: a torch operator in a second thread would take the
engine's cores. The `safetensors` package's NumPy reader has no bfloat16, which adapters are commonly kept in. The
header is `lorapool_artifacts.header`'s business, by the same bounds as when the adapter was judged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorapool_artifacts.header import ADAPTER_BOUNDS, TensorInfo, parse_header


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors as float32 (exact for every type read). Raises ArtifactError, OSError."""
    raw = path.read_bytes()
    header = parse_header(raw, len(raw), ADAPTER_BOUNDS, name=path.name)
    data = memoryview(raw)
    return {name: _tensor(info, data[info.start : info.end]) for name, info in header.tensors.items()}


def _tensor(info: TensorInfo, data: memoryview) -> np.ndarray:
    match info.dtype:
        case "BF16":
            values = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        case "F16":
            values = np.frombuffer(data, dtype="<f2").astype(np.float32)
        case _:  # F32: ADAPTER_BOUNDS allows these three
            values = np.frombuffer(data, dtype="<f4")
    return values.reshape(info.shape)
