"""Reads a safetensors file into NumPy arrays, trusting nothing in it.

`adapter_file` calls it in worker threads, so no torch here: a torch operator in a second thread would take the
engine's cores. The `safetensors` package's NumPy reader has no bfloat16, which adapters are commonly kept in.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

_MAX_HEADER_BYTES = 16 << 20
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class SafetensorsError(ValueError):
    """The file is not what it says it is."""


class UnsupportedDtypeError(SafetensorsError):
    """A tensor has an element type that adapters are not read in."""


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors as float32 (exact for every type read). Raises SafetensorsError, OSError."""
    raw = path.read_bytes()
    if len(raw) < 8:
        raise SafetensorsError(f"{path.name} is too short ({len(raw)} bytes) to be safetensors")
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    if header_bytes > min(_MAX_HEADER_BYTES, len(raw) - 8):
        raise SafetensorsError(f"{path.name} is truncated or no safetensors: its header claims {header_bytes} bytes")
    try:
        header = json.loads(raw[8 : 8 + header_bytes])
    except ValueError as error:
        raise SafetensorsError(f"{path.name} has a header that is no JSON") from error
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path.name} has a header that is no object")
    header.pop("__metadata__", None)
    body = memoryview(raw)[8 + header_bytes :]
    spans = sorted((_span(name, entry), name) for name, entry in header.items())
    expected = 0
    for (begin, end), name in spans:
        if begin != expected:
            raise SafetensorsError(f"{path.name}: {name} starts at byte {begin}, expected {expected}")
        expected = end
    if expected != len(body):
        raise SafetensorsError(f"{path.name} holds {len(body)} bytes of tensors, its header describes {expected}")
    return {name: _tensor(header[name], body[begin:end]) for (begin, end), name in spans}


def _span(name: str, entry: object) -> tuple[int, int]:
    if not isinstance(entry, dict):
        raise SafetensorsError(f"{name} is not described by an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2):
        raise SafetensorsError(f"{name} has no valid shape and offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise UnsupportedDtypeError(f"{name} has element type {dtype}; adapters are read in F32, F16 and BF16")
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise SafetensorsError(f"{name} of shape {shape} and type {dtype} cannot take {end - begin} bytes")
    return begin, end


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _tensor(entry: dict[str, Any], data: memoryview) -> np.ndarray:
    shape = entry["shape"]
    match entry["dtype"]:
        case "BF16":
            values = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        case "F16":
            values = np.frombuffer(data, dtype="<f2").astype(np.float32)
        case _:
            values = np.frombuffer(data, dtype="<f4")
    return values.reshape(shape)
