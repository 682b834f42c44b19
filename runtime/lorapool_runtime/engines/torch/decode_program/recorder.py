"""Runs the model once and records every native operator, attention and rotary embedding with its input and output.

Nothing depends on an architecture's name: the operators report themselves (`kernels.base_step.observed`), attention is
recorded where the engine supplies it, and embeddings and rotary modules by forward hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorapool_runtime.engines.torch.decode_program.ops import RotaryTables
from lorapool_runtime.engines.torch.kernels.base_step import PanelLinear, RowGate, RowNorm, observed
from lorapool_runtime.engines.torch.model.attention import Attention, LayerAttention


@dataclass(frozen=True, slots=True)
class OperatorCall:
    """One call of a native operator; x and y are copies, y before any LoRA was added."""

    op: PanelLinear | RowNorm | RowGate
    x: Tensor
    y: Tensor

    def layouts(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """x and y as [rows, width] each, under every layout that their shapes allow.

        A norm of heads is called with [1, heads, rows, head_dim] by some models and [1, rows, heads, head_dim] by
        others."""
        if self.x.dim() == 4 and self.x.shape[2] == rows:
            yield tuple(t.transpose(1, 2).reshape(rows, -1) for t in (self.x, self.y))  # type: ignore[misc]  # a pair
        if self.x.numel() % rows == 0:
            yield self.x.reshape(rows, -1), self.y.reshape(rows, -1)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention; q, k, v and out are copies."""

    layer: int
    q: Tensor  # [rows, heads * head_dim]
    k: Tensor  # [rows, kv_heads * head_dim], as v
    v: Tensor
    heads: int
    scale: float
    wants: LayerAttention
    out: Tensor  # [rows, heads * head_dim]


@dataclass(slots=True)
class Recording:
    """What one run of the model did, in order."""

    positions: Tensor  # int64 [rows]
    calls: list[OperatorCall | AttentionCall] = field(default_factory=list)
    embeddings: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    """Embedding modules that were called with one token id per row, and their outputs [rows, hidden]."""
    rotary_tables: list[tuple[RotaryTables, Tensor, Tensor]] = field(default_factory=list)
    """Each with its cosines and sines, [rows, rotated elements]."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # [rows, vocabulary]

    @property
    def rows(self) -> int:
        return len(self.positions)


def record(model: nn.Module, run: Callable[[Attention], Tensor], attention: Attention, positions: Tensor) -> Recording:
    """`run` decodes one token per row with the attention it is given -> logits [rows, vocabulary].

    attention computes what the model asks for; positions: int64 [rows], the ones that `run` uses."""
    recording = Recording(positions)

    def note(op: object, x: Tensor, y: Tensor) -> None:
        assert isinstance(op, PanelLinear | RowNorm | RowGate)
        recording.calls.append(OperatorCall(op, x.clone(), y.clone()))

    with _forward_hooks(model, recording), observed(note):
        recording.logits = run(_RecordingAttention(attention, recording)).clone()
    return recording


class _RecordingAttention:
    """`Attention` that records each call and its result."""

    def __init__(self, attention: Attention, recording: Recording) -> None:
        self._attention, self._recording = attention, recording

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        """As `attention.Attention.attend`."""
        queries, keys, values = (t[0].transpose(0, 1).reshape(q.shape[2], -1).clone() for t in (q, k, v))
        out = self._attention.attend(layer, q, k, v, scale, wants)
        self._recording.calls.append(
            AttentionCall(
                layer, queries, keys, values, q.shape[1], scale, wants, out[0].reshape(q.shape[2], -1).clone()
            )
        )
        return out


@contextmanager
def _forward_hooks(model: nn.Module, recording: Recording) -> Iterator[None]:
    rows = recording.rows

    def embedded(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args[0].numel() == rows:
            recording.embeddings.append((module, output.reshape(rows, -1).clone()))

    def rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2 and all(isinstance(t, Tensor) for t in output):
            cos, sin = (t.reshape(-1, t.shape[-1]).clone() for t in output)
            if cos.shape == sin.shape and cos.shape[0] == rows:
                recording.rotary_tables.append((RotaryTables(module, args, kwargs, recording.positions), cos, sin))

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(embedded))
        elif not any(True for _ in module.parameters()) and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(rotary, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
