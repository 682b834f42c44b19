"""Compares whole matrices of an adapter with the base's, so that copies without a change can be left out. No torch.

peft saves the embeddings of a model whose vocabulary was resized, or whose embeddings an adapter targets, although
nothing in them was trained. Only the rows that both have are compared: no text of the base has the others' tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorapool_artifacts.checks.header import TensorInfo
from lorapool_runtime.weights.pack import read_values, rounded_to

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix in a file of the base."""

    path: Path
    info: TensorInfo


def first_changed_row(file: int, info: TensorInfo, original: StoredMatrix) -> int | None:
    """The first row in which a matrix of an open file differs from the base's; None where none does.

    Values count as equal if they are after rounding the base's to the other's type. Raises OSError and EOFError.
    """
    width, rows = info.shape[1], min(info.shape[0], original.info.shape[0])
    chunk = max(1, _CHUNK_ELEMENTS // width)
    descriptor = os.open(original.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first in range(0, rows, chunk):
            count = min(chunk, rows - first)
            mine = _rows(file, info, first, count)
            base = rounded_to(_rows(descriptor, original.info, first, count), info.dtype)
            unequal = np.flatnonzero((mine != base).any(axis=1))
            if len(unequal):
                return first + int(unequal[0])
    finally:
        os.close(descriptor)
    return None


def _rows(file: int, info: TensorInfo, first: int, count: int) -> np.ndarray:
    """float32 [count, width]"""
    width = info.shape[1]
    return read_values(file, info.dtype, info.start, first * width, count * width).reshape(count, width)
