"""The op graph of a decode step: operators over buffers that have one row per request.

`trace` derives it from a recorded run, `verify` checks it against further runs, and `step_program` turns it into native
structures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorapool_runtime.engines.torch.kernels.base_step import PanelLinear, RowGate, RowNorm
from lorapool_runtime.engines.torch.model.attention import LayerAttention


@dataclass(frozen=True, slots=True)
class BufferSlice:
    """Contiguous columns of a buffer with one row per request."""

    buffer: int
    column: int
    width: int
    buffer_width: int

    @property
    def is_whole(self) -> bool:
        return self.width == self.buffer_width


@dataclass(frozen=True, slots=True)
class Norm:
    op: RowNorm
    source: BufferSlice
    to: BufferSlice


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, followed by the LoRA of its group if it has one."""

    op: PanelLinear
    source: BufferSlice
    to: BufferSlice


@dataclass(frozen=True, slots=True)
class GatedActivation:
    op: RowGate
    source: BufferSlice
    to: BufferSlice


@dataclass(frozen=True, slots=True)
class RotaryEmbedding:
    """Rotates `vectors` heads in place by the tables of `DecodeGraph.rotary_tables[table]`."""

    table: int
    vectors: int
    to: BufferSlice


@dataclass(frozen=True, slots=True)
class Attend:
    layer: int
    q: BufferSlice
    k: BufferSlice
    v: BufferSlice
    to: BufferSlice
    heads: int
    scale: float
    wants: LayerAttention


@dataclass(frozen=True, slots=True)
class Add:
    """to += factor * source"""

    source: BufferSlice
    to: BufferSlice
    factor: float


Op = Norm | Linear | GatedActivation | RotaryEmbedding | Attend | Add


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """A module of the model that computes cosines and sines from positions, with the arguments of its recorded call."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positions: Tensor
    """Arguments equal to this tensor are positions; they are replaced at each call."""

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: int64 [rows] -> cosines and sines, [rows, rotated elements] each."""

        def replaced(value: Any) -> Any:
            return positions.view(1, -1) if _same_positions(value, self.positions) else value

        args, kwargs = [replaced(a) for a in self.args], {name: replaced(v) for name, v in self.kwargs.items()}
        cos, sin = self.module(*args, **kwargs)
        return cos.reshape(len(positions), -1), sin.reshape(len(positions), -1)


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A decode step: embed the tokens into `stream`, run `ops` in order, and apply `finish` to `logits`."""

    embedding: nn.Module
    """token ids [rows] -> [rows, hidden]"""
    embedding_factor: float
    stream: BufferSlice
    """The residual stream."""
    ops: tuple[Op, ...]
    rotary_tables: tuple[RotaryTables, ...]
    logits: BufferSlice
    finish: Callable[[Tensor], Tensor]
    """What the model computes from the last layer's output, out of place."""


def rotated(x: Tensor, head_dim: int, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by halves (Su et al., RoFormer, 2021). x: [rows, vectors * head_dim]; cos, sin: [rows, rotated elements]."""
    width = cos.shape[1]
    heads = x.view(len(x), -1, head_dim)
    front, rest = heads[..., :width], heads[..., width:]
    half = torch.cat((-front[..., width // 2 :], front[..., : width // 2]), dim=-1)
    out = front * cos[:, None] + half * sin[:, None]
    return torch.cat((out, rest), dim=-1).view(x.shape)


def scaled(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor


def _same_positions(value: Any, positions: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.dtype != positions.dtype or value.numel() != positions.numel():
        return False
    return torch.equal(value.reshape(-1), positions)
