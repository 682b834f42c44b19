"""Learns from one run what a decode step computes, as a list of calls of the native kernels.

`step_program` asks for it at start. Nothing is known of architectures: the fitted model decodes a few rows while every
native operator, every attention and every rotary embedding is written down with what went in and came out. What lies
between two calls is then found by value: each input must equal, bit for bit, an earlier output, some columns of one, a
rotation of one, or the sum of the residual stream and one. A model with anything else in between raises
NotFollowedError, and goes on as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorapool_runtime.engines.torch.decode_program.ops import (
    Add,
    Attend,
    Gate,
    Linear,
    Norm,
    Op,
    Place,
    Recipe,
    Rotary,
    Turn,
)
from lorapool_runtime.engines.torch.kernels.base_step import PanelLinear, RowGate, RowNorm, watched
from lorapool_runtime.engines.torch.model.attention import Attention, LayerAttention

_NEAR = 8  # how many values back an input is looked for


class NotFollowedError(Exception):
    """The model computes something between its kernels that a program cannot; the message says where."""


@dataclass(frozen=True, slots=True)
class _Called:
    op: PanelLinear | RowNorm | RowGate
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class _Attended:
    layer: int
    q: Tensor  # [rows, heads * head_dim], as k and v
    k: Tensor
    v: Tensor
    heads: int
    scale: float
    wants: LayerAttention
    out: Tensor  # [rows, heads * head_dim]


def learn(
    model: nn.Module, run: Callable[[Attention], Tensor], attention: Attention, positions: Tensor, token_ids: Tensor
) -> Recipe:
    """`run` decodes one token per row with the attention it is given -> logits [rows, vocabulary]; `attention`,
    positions and token_ids (int64 [rows], all different) are what it computes with. Raises NotFollowedError."""
    recording = _Recording(attention)
    with _hooked(model, recording, positions), watched(recording.note):
        logits = run(recording)
    embedded = [(m, y) for m, ids, y in recording.embedded if ids.numel() == len(token_ids)]
    if len(embedded) != 1 or not recording.calls:
        raise NotFollowedError("the model has no single embedding, or no native operators")
    embedding, stream = embedded[0]
    return _Follower(recording, stream.reshape(len(token_ids), -1)).recipe(embedding, logits)


class _Recording:
    """`Attention` that passes on and writes down."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self.calls: list[_Called | _Attended] = []
        self.embedded: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.rotaries: list[tuple[Rotary, Tensor, Tensor]] = []

    def note(self, op: object, x: Tensor, y: Tensor) -> None:
        assert isinstance(op, PanelLinear | RowNorm | RowGate)
        self.calls.append(_Called(op, x.clone(), y.clone()))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        """As `attention.Attention`."""
        out = self._attention.attend(layer, q, k, v, scale, wants)
        by_row = (t[0].transpose(0, 1).reshape(q.shape[2], -1).clone() for t in (q, k, v))
        queries, keys, values = by_row
        self.calls.append(
            _Attended(layer, queries, keys, values, q.shape[1], scale, wants, out[0].reshape(q.shape[2], -1).clone())
        )
        return out


@contextmanager
def _hooked(model: nn.Module, recording: _Recording, positions: Tensor) -> Iterator[None]:
    def embedded(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recording.embedded.append((module, args[0], output.clone()))

    def turned(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2 and all(isinstance(t, Tensor) for t in output):
            cos, sin = (t.reshape(-1, t.shape[-1]) for t in output)
            if cos.shape == sin.shape and cos.shape[0] == len(positions):
                recording.rotaries.append((Rotary(module, args, kwargs, positions), cos, sin))

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(embedded))
        elif not any(True for _ in module.parameters()) and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(turned, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Follower:
    """Walks through the calls with the values that are at hand, each at its place."""

    def __init__(self, recording: _Recording, embedded: Tensor) -> None:
        self._recording = recording
        self._embedded = embedded
        self._buffers = 0
        self._ops: list[Op] = []
        self._values: list[tuple[Place, Tensor]] = []
        first = recording.calls[0]
        if isinstance(first, _Attended):
            raise NotFollowedError("attention comes before everything else")
        entering = _rows_of(first.x, len(embedded))
        factor = None
        if entering.shape == embedded.shape:
            factor = _factor_of(entering, embedded, lambda f: torch.equal(_scaled(embedded, f), entering))
        if factor is None:
            raise NotFollowedError("the first operator does not take the embedded tokens")
        self._factor = factor
        self._stream = self._new(entering)
        self._columns: set[int] = {0}
        """Where heads may begin in a fused output."""
        for call in recording.calls:
            if isinstance(call, _Attended):
                self._columns |= {call.q.shape[1], call.q.shape[1] + call.k.shape[1]}

    def recipe(self, embedding: nn.Module, logits: Tensor) -> Recipe:
        stream = self._stream
        for call in self._recording.calls:
            if isinstance(call, _Attended):
                self._attended(call)
            else:
                self._called(call)
        place, last = self._values[-1]
        finish = _finish_of(last, logits)
        if finish is None:
            raise NotFollowedError("the logits are not the last layer's output")
        return Recipe(
            embedding=embedding,
            embedding_factor=self._factor,
            stream=stream,
            ops=tuple(self._ops),
            rotaries=tuple(rotary for rotary, _, _ in self._recording.rotaries),
            logits=place,
            finish=finish,
        )

    def _called(self, call: _Called) -> None:
        rows = len(self._embedded)
        if isinstance(call.op, RowNorm):
            x, y = self._by_row(call.x, call.y)
            self._ops.append(Norm(call.op, self._find(x), self._new(y)))
            return
        source, y = self._find(_rows_of(call.x, rows)), _rows_of(call.y, rows)
        if not source.whole:
            raise NotFollowedError(f"operator {len(self._ops)} takes some columns of a layer's output")
        kind = Linear if isinstance(call.op, PanelLinear) else Gate
        self._ops.append(kind(call.op, source, self._new(y)))  # type: ignore[arg-type]  # each with its own operator

    def _attended(self, call: _Attended) -> None:
        q, k, v = (self._heads(t, call.wants.head_dim) for t in (call.q, call.k, call.v))
        self._ops.append(Attend(call.layer, q, k, v, self._new(call.out), call.heads, call.scale, call.wants))

    def _by_row(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A norm of heads may be given [1, heads, rows, head_dim] as well as [1, rows, heads, head_dim]."""
        rows = len(self._embedded)
        plain = (_rows_of(x, rows), _rows_of(y, rows))
        if x.dim() != 4 or x.shape[2] != rows:
            return plain
        turned = (_rows_of(x.transpose(1, 2), rows), _rows_of(y.transpose(1, 2), rows))
        return turned if self._some_columns(turned[0]) is not None else plain

    def _find(self, x: Tensor) -> Place:
        for place, value in self._near():
            if value.shape == x.shape and torch.equal(value, x):
                return place
        if (found := self._some_columns(x)) is not None:
            return found
        return self._summed(x)

    def _some_columns(self, x: Tensor) -> Place | None:
        width = x.shape[1]
        for place, value in self._near():
            for column in self._columns:
                if column + width <= place.of and torch.equal(value[:, column : column + width], x):
                    return Place(place.buffer, column, width, place.of)
        return None

    def _summed(self, x: Tensor) -> Place:
        """The stream plus some value, which becomes the stream."""
        at, stream = next((n, v) for n, (place, v) in enumerate(self._values) if place.buffer == self._stream.buffer)
        for place, value in self._near():
            if place.buffer == self._stream.buffer or value.shape != stream.shape or x.shape != stream.shape:
                continue
            factor = _factor_of(x - stream, value, partial(_sums_to, x, stream, value))
            if factor is not None:
                self._ops.append(Add(place, self._stream, factor))
                del self._values[at]
                self._values.append((self._stream, x))
                return self._stream
        raise NotFollowedError(f"operator {len(self._ops)} takes what is no sum of what is known")

    def _heads(self, x: Tensor, head_dim: int) -> Place:
        """Queries, keys or values: columns as they are, or turned by a rotary embedding."""
        if (found := self._some_columns(x)) is not None:
            return found
        width = x.shape[1]
        for place, value in self._near():
            for column in self._columns:
                if column + width > place.of:
                    continue
                part = value[:, column : column + width]
                for number, (_, cos, sin) in enumerate(self._recording.rotaries):
                    if torch.equal(rotated(part, head_dim, cos, sin), x):
                        turned = Place(place.buffer, column, width, place.of)
                        self._ops.append(Turn(number, width // head_dim, turned))
                        return turned
        raise NotFollowedError(f"operator {len(self._ops)}: attention takes what no layer gave")

    def _near(self) -> list[tuple[Place, Tensor]]:
        """The latest first; the stream is always among them."""
        late = self._values[-_NEAR:]
        held = [v for v in self._values[:-_NEAR] if v[0].buffer == self._stream.buffer]
        return [*reversed(late), *held]

    def _new(self, value: Tensor) -> Place:
        place = Place(self._buffers, 0, value.shape[1], value.shape[1])
        self._buffers += 1
        self._values.append((place, value))
        return place


def rotated(x: Tensor, head_dim: int, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by halves (Su et al., RoFormer, 2021). x: [rows, vectors * head_dim]; cos, sin: [rows, turned]."""
    turned = cos.shape[1]
    heads = x.view(len(x), -1, head_dim)
    front, rest = heads[..., :turned], heads[..., turned:]
    half = torch.cat((-front[..., turned // 2 :], front[..., : turned // 2]), dim=-1)
    out = front * cos[:, None] + half * sin[:, None]
    return torch.cat((out, rest), dim=-1).view(x.shape)


def _rows_of(x: Tensor, rows: int) -> Tensor:
    return x.reshape(rows, -1)


def _factor_of(product: Tensor, value: Tensor, holds: Callable[[float], bool]) -> float | None:
    """The number that `value` was multiplied by, 1 or as short as it can be, for which `holds`."""
    at = int(value.abs().argmax())
    found = float(product.reshape(-1)[at].double() / value.reshape(-1)[at].double())
    candidates = (1.0, *(float(f"{found:.{digits}g}") for digits in range(1, 8)), found)
    return next((factor for factor in candidates if holds(factor)), None)


def _finish_of(last: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Nothing, a division by a short number, or a soft cap of one."""
    if last.shape != logits.shape:
        return None
    if torch.equal(last, logits):
        return _as_it_is
    divisor = _factor_of(last, logits, lambda by: torch.equal(last / by, logits))
    if divisor is not None:
        return partial(_divided, divisor)
    cap = _cap_of(last, logits)
    return None if cap is None else partial(_capped, cap)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _divided(by: float, x: Tensor) -> Tensor:
    return x / by


def _capped(cap: float, x: Tensor) -> Tensor:
    return torch.tanh(x / cap) * cap


def _cap_of(last: Tensor, logits: Tensor) -> float | None:
    """The short number c for which logits = c tanh(last / c), found by halving: the right side grows with c."""
    at = int(last.abs().argmax())
    x, y = (abs(float(t.reshape(-1)[at])) for t in (last, logits))
    low, high = y, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
    candidates = (float(f"{high:.{digits}g}") for digits in range(1, 8))
    return next((c for c in candidates if c and torch.equal(_capped(c, last), logits)), None)


def _sums_to(x: Tensor, stream: Tensor, value: Tensor, factor: float) -> bool:
    return torch.equal(stream + _scaled(value, factor), x)


def _scaled(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor
