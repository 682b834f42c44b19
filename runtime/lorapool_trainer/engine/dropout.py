"""Dropout by counters: whether an element is dropped depends on where it is, not on what was drawn before it.

A mask is a function of (seed, step, module, example, position, feature), so it does not change with a job's neighbours,
with the order of computation or after a restart. The generator is that of SplitMix64 (Steele, Lea, Flood 2014), on
torch's int64, whose arithmetic wraps.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 24
"""Uniform numbers have so many bits: all of them are exact in float32."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """The masks of one micro-batch."""

    probability: float
    rows: Tensor
    """int64 [rows]: a key for each row, made by `row_keys`."""

    def scale(self, module: str, features: int) -> Tensor:
        """float32 [rows, features]: 0 for a dropped element, 1 / (1 - probability) for another."""
        key = _mixed(self.rows + zlib.crc32(module.encode()))
        numbers = _mixed(key[:, None] + _features(features, self.rows.device))
        kept: Tensor = (_shifted(numbers, 64 - _BITS)).float() >= self.probability * 2**_BITS
        scaled: Tensor = kept.float() / (1 - self.probability)
        return scaled


def row_keys(seed: int, step: int, examples: Tensor, positions: Tensor) -> Tensor:
    """examples, positions: int64 [rows], indices in the data set and in the example -> int64 [rows]."""
    key = _mixed(torch.full_like(examples, seed)) + step
    return _mixed(_mixed(_mixed(key) + examples) + positions)


@functools.lru_cache(maxsize=16)
def _features(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * _signed(_INCREMENT)


def _mixed(z: Tensor) -> Tensor:
    z = z + _signed(_INCREMENT)
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
