"""A decode step written down: operators over buffers with one row per request.

`step_recording` learns one from a run of the model, `step_program` turns it into native structures.
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
class Place:
    """Some columns of a buffer with one row per request; `of` is the buffer's whole width."""

    buffer: int
    column: int
    width: int
    of: int

    @property
    def whole(self) -> bool:
        return self.width == self.of


@dataclass(frozen=True, slots=True)
class Norm:
    op: RowNorm
    source: Place
    to: Place


@dataclass(frozen=True, slots=True)
class Linear:
    """The layer, and the LoRA of its group if it has one."""

    op: PanelLinear
    source: Place
    to: Place


@dataclass(frozen=True, slots=True)
class Gate:
    op: RowGate
    source: Place
    to: Place


@dataclass(frozen=True, slots=True)
class Turn:
    """Rotary embedding number `rotary`, in place."""

    rotary: int
    vectors: int
    place: Place


@dataclass(frozen=True, slots=True)
class Attend:
    layer: int
    q: Place
    k: Place
    v: Place
    to: Place
    heads: int
    scale: float
    wants: LayerAttention


@dataclass(frozen=True, slots=True)
class Add:
    """to += factor * source"""

    source: Place
    to: Place
    factor: float


Op = Norm | Linear | Gate | Turn | Attend | Add


@dataclass(frozen=True, slots=True)
class Rotary:
    """A module of the model that gives cosines and sines for positions, and how it was called."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positions: Tensor
    """Which of the arguments are positions: those equal to this one."""

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: int64 [rows] -> cosines and sines, [rows, turned] each"""

        def replaced(value: Any) -> Any:
            return positions.view(1, -1) if _is_same(value, self.positions) else value

        args, kwargs = [replaced(a) for a in self.args], {name: replaced(v) for name, v in self.kwargs.items()}
        cos, sin = self.module(*args, **kwargs)
        return cos.reshape(len(positions), -1), sin.reshape(len(positions), -1)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A decode step: embed, run the operators over the buffers, and the logits lie in the last one's output."""

    embedding: nn.Module
    """token ids [rows] -> [rows, width of the stream]"""
    embedding_factor: float
    stream: Place
    ops: tuple[Op, ...]
    rotaries: tuple[Rotary, ...]
    logits: Place
    finish: Callable[[Tensor], Tensor]
    """What the model does to the last layer's output, out of place."""


def _is_same(value: Any, positions: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.dtype != positions.dtype or value.numel() != positions.numel():
        return False
    return torch.equal(value.reshape(-1), positions)
