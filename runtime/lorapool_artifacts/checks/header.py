"""Parses the header of a safetensors file from its first bytes and the file's size.

Pure. Stricter than the safetensors library: bounded header, bounded count, known dtypes, no gaps, no overlaps and no
trailing bytes. Values are not checked: NaN is found when the weights are loaded. The bounds are ours and protect the
process's memory: a file beyond them is refused as too large, never as damaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorapool_artifacts.checks.causes import refusal
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import MAX_TENSORS, MIB

LENGTH_BYTES = 8
MAX_NAME_CHARS = 512
HEADER_BYTES_PER_TENSOR = 160
"""Length of an entry, with the long names of the layers of a mixture of experts."""

_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip

ADAPTER_DTYPES = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class HeaderBounds:
    """Largest header that is accepted. `dtypes` None allows every known dtype."""

    max_tensors: int = MAX_TENSORS
    dtypes: frozenset[str] | None = None

    @property
    def max_header_bytes(self) -> int:
        """Room for that many tensors; a small header is never refused for its length."""
        return max(1 * MIB, self.max_tensors * HEADER_BYTES_PER_TENSOR)


BASE_BOUNDS = HeaderBounds()
ADAPTER_BOUNDS = HeaderBounds(dtypes=ADAPTER_DTYPES)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's dtype, shape and position. `start` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """All tensors of a file, by name."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size_bytes: int
    """Size of the whole file."""


def header_length(prefix: bytes, file_size: int, bounds: HeaderBounds, *, name: str) -> int:
    """Bytes of the JSON header, read from the first eight bytes of the file. Raises ArtifactError when invalid."""
    if file_size < LENGTH_BYTES + 2 or len(prefix) < LENGTH_BYTES:
        raise _corrupt(name, f"it is {file_size} bytes long, too short for a safetensors file")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length < 2 or LENGTH_BYTES + length > file_size:
        raise _corrupt(name, f"it announces a header of {length} bytes in a file of {file_size}")
    if length > bounds.max_header_bytes:
        raise _too_large(name, f"has a header of {length} bytes", f"{bounds.max_header_bytes} bytes", bounds)
    return length


def parse_header(prefix: bytes, file_size: int, bounds: HeaderBounds, *, name: str) -> SafetensorsHeader:
    """Parses the header in `prefix`, the first bytes of the file; bytes after it are ignored. Raises ArtifactError."""
    length = header_length(prefix, file_size, bounds, name=name)
    raw = prefix[LENGTH_BYTES : LENGTH_BYTES + length]
    if len(raw) != length:
        raise _corrupt(name, f"only {len(raw)} of the header's {length} bytes were read")
    document = _load(raw, name)
    metadata = _metadata(document.pop("__metadata__", {}), name)
    if not document:
        raise _corrupt(name, "it holds no tensor")
    if len(document) > bounds.max_tensors:
        raise _too_large(name, f"holds {len(document)} tensors", str(bounds.max_tensors), bounds)
    base = LENGTH_BYTES + length
    tensors = {key: _tensor(key, value, base, bounds, name) for key, value in document.items()}
    end = _check_layout(tensors, base, name)
    if end != file_size:
        raise _corrupt(name, f"its tensors end at byte {end} but the file is {file_size} bytes long")
    return SafetensorsHeader(tensors, metadata, file_size)


def _load(raw: bytes, name: str) -> dict[str, Any]:
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _corrupt(name, "its header is not valid JSON") from error
    if not isinstance(document, dict) or raw[:1] != b"{":
        raise _corrupt(name, "its header is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _metadata(value: Any, name: str) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _corrupt(name, "its __metadata__ is not a map of strings")
    return value


def _tensor(key: str, value: Any, base: int, bounds: HeaderBounds, name: str) -> TensorInfo:
    if len(key) > MAX_NAME_CHARS:
        raise _corrupt(name, f"the name of tensor {_short(key)} is longer than {MAX_NAME_CHARS} characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(name, f"the entry of tensor {_short(key)} is malformed")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise _corrupt(name, f"tensor {_short(key)} has the unknown dtype {_short(str(dtype))}")
    if bounds.dtypes is not None and dtype not in bounds.dtypes:
        raise refusal("element-type", file=name, tensor=_short(key), dtype=dtype)
    if not _naturals(shape) or len(shape) > 8 or not _naturals(offsets) or len(offsets) != 2:
        raise _corrupt(name, f"the shape or offsets of tensor {_short(key)} are malformed")
    start, end = offsets
    if end < start or (end - start) * 8 != math.prod(shape) * _DTYPE_BITS[dtype]:
        raise _corrupt(name, f"tensor {_short(key)} of shape {list(shape)} does not fill its {end - start} bytes")
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(tensors: Mapping[str, TensorInfo], base: int, name: str) -> int:
    """Checks that tensors follow each other without gaps or overlaps. Returns the end offset of the last one."""
    position = base
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise _corrupt(
                name,
                f"tensor {_short(key)} {'overlaps another' if tensor.start < position else 'leaves a gap before it'}",
            )
        position = tensor.end
    return position


def _too_large(name: str, what: str, bound: str, bounds: HeaderBounds) -> ArtifactError:
    return refusal("too-many-tensors", file=name, what=what, bound=bound, setting=bounds.max_tensors)


def _corrupt(name: str, what: str) -> ArtifactError:
    return refusal("damaged", file=name, what=what)


def _short(text: str) -> str:
    return ascii(text if len(text) <= 100 else text[:99] + "…")
