"""Derives the op graph of a decode step from one recorded run.

The input of each call is searched for by value: it must equal, bit for bit, an earlier output, some columns of one, a
rotation of one, or the residual stream plus a multiple of one. A model that computes anything else between its kernels
raises UntraceableModelError. What happens to be the identity in this one run is not seen here; `verify` finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lorapool_runtime.engines.torch.decode_program.ops import (
    Add,
    Attend,
    BufferSlice,
    DecodeGraph,
    GatedActivation,
    Linear,
    Norm,
    Op,
    RotaryEmbedding,
    rotated,
    scaled,
)
from lorapool_runtime.engines.torch.decode_program.recorder import AttentionCall, OperatorCall, Recording
from lorapool_runtime.engines.torch.kernels.base_step import PanelLinear, RowNorm

_SEARCHED = 8  # how many outputs back an input is searched for


class UntraceableModelError(Exception):
    """The model computes something between its kernels that the program cannot; the message names the operator."""


def trace(recording: Recording) -> DecodeGraph:
    """The recorded positions must all differ, as must the token ids. Raises UntraceableModelError."""
    if len(recording.embeddings) != 1 or not recording.calls:
        raise UntraceableModelError("the model has no single embedding, or no native operators")
    return _Tracer(recording).graph()


class _Tracer:
    """Goes through the recorded calls and keeps the outputs so far, each with the buffer that holds it."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._rows = recording, recording.rows
        self._buffers = 0
        self._ops: list[Op] = []
        self._values: list[tuple[BufferSlice, Tensor]] = []
        self._factor, entering = self._first_input()
        self._stream = self._new(entering)
        self._columns: set[int] = {0}
        """Where heads may begin in a fused output."""
        for call in recording.calls:
            if isinstance(call, AttentionCall):
                self._columns |= {call.q.shape[1], call.q.shape[1] + call.k.shape[1]}

    def _first_input(self) -> tuple[float, Tensor]:
        """The first operator's input [rows, hidden], and the factor from the embedded tokens to it."""
        first, (_, embedded) = self._recording.calls[0], self._recording.embeddings[0]
        if isinstance(first, AttentionCall):
            raise UntraceableModelError("attention is the first operator")
        entering = self._by_row(first.x)
        factor = None
        if entering.shape == embedded.shape:
            factor = _factor_of(entering, embedded, lambda f: torch.equal(scaled(embedded, f), entering))
        if factor is None:
            raise UntraceableModelError("the first operator's input is not the embedded tokens")
        return factor, entering

    def graph(self) -> DecodeGraph:
        stream = self._stream
        for call in self._recording.calls:
            if isinstance(call, AttentionCall):
                self._attention(call)
            else:
                self._operator(call)
        logits, last = self._values[-1]
        finish = _finish_of(last, self._recording.logits)
        if finish is None:
            raise UntraceableModelError("the logits are not the last layer's output")
        return DecodeGraph(
            embedding=self._recording.embeddings[0][0],
            embedding_factor=self._factor,
            stream=stream,
            ops=tuple(self._ops),
            rotary_tables=tuple(tables for tables, _, _ in self._recording.rotary_tables),
            logits=logits,
            finish=finish,
        )

    def _operator(self, call: OperatorCall) -> None:
        if isinstance(call.op, RowNorm):
            x, y = self._norm_rows(call)
            self._ops.append(Norm(call.op, self._find(x), self._new(y)))
            return
        source, y = self._find(self._by_row(call.x)), self._by_row(call.y)
        if not source.is_whole:
            raise UntraceableModelError(f"operator {len(self._ops)} takes only some columns of a layer's output")
        if isinstance(call.op, PanelLinear):
            self._ops.append(Linear(call.op, source, self._new(y)))
        else:
            self._ops.append(GatedActivation(call.op, source, self._new(y)))

    def _attention(self, call: AttentionCall) -> None:
        q, k, v = (self._heads(t, call.wants.head_dim) for t in (call.q, call.k, call.v))
        self._ops.append(Attend(call.layer, q, k, v, self._new(call.out), call.heads, call.scale, call.wants))

    def _norm_rows(self, call: OperatorCall) -> tuple[Tensor, Tensor]:
        """The layout under which the input is known; the plain one for a sum that is not known yet."""
        layouts = list(call.layouts(self._rows))
        if not layouts:
            raise self._not_one_row_per_request()
        return next((pair for pair in layouts if self._some_columns(pair[0]) is not None), layouts[-1])

    def _by_row(self, x: Tensor) -> Tensor:
        if x.numel() % self._rows:
            raise self._not_one_row_per_request()
        return x.reshape(self._rows, -1)

    def _not_one_row_per_request(self) -> UntraceableModelError:
        return UntraceableModelError(f"operator {len(self._ops)} does not take one row per request")

    def _find(self, x: Tensor) -> BufferSlice:
        for buffer, value in self._latest():
            if value.shape == x.shape and torch.equal(value, x):
                return buffer
        if (found := self._some_columns(x)) is not None:
            return found
        return self._stream_sum(x)

    def _some_columns(self, x: Tensor) -> BufferSlice | None:
        width = x.shape[1]
        for buffer, value in self._latest():
            for column in self._columns:
                if column + width <= buffer.width and torch.equal(value[:, column : column + width], x):
                    return BufferSlice(buffer.buffer, column, width, buffer.width)
        return None

    def _stream_sum(self, x: Tensor) -> BufferSlice:
        """Adds to the graph: stream += factor * value, for the earlier value with which the sum equals x."""
        at, stream = next((n, v) for n, (to, v) in enumerate(self._values) if to.buffer == self._stream.buffer)
        for buffer, value in self._latest():
            if buffer.buffer == self._stream.buffer or value.shape != stream.shape or x.shape != stream.shape:
                continue
            factor = _factor_of(x - stream, value, partial(_sums_to, x, stream, value))
            if factor is not None:
                self._ops.append(Add(buffer, self._stream, factor))
                del self._values[at]
                self._values.append((self._stream, x))
                return self._stream
        raise UntraceableModelError(
            f"the input of operator {len(self._ops)} is neither an earlier output nor a residual sum"
        )

    def _heads(self, x: Tensor, head_dim: int) -> BufferSlice:
        """Queries, keys or values: columns of a layer's output as they are, or rotated."""
        if (found := self._some_columns(x)) is not None:
            return found
        width = x.shape[1]
        for buffer, value in self._latest():
            for column in self._columns:
                if column + width > buffer.width:
                    continue
                part = value[:, column : column + width]
                for number, (_, cos, sin) in enumerate(self._recording.rotary_tables):
                    if torch.equal(rotated(part, head_dim, cos, sin), x):
                        to = BufferSlice(buffer.buffer, column, width, buffer.width)
                        self._ops.append(RotaryEmbedding(number, width // head_dim, to))
                        return to
        raise UntraceableModelError(
            f"operator {len(self._ops)}: attention takes neither a layer's output nor its rotation"
        )

    def _latest(self) -> list[tuple[BufferSlice, Tensor]]:
        """The latest outputs first; the residual stream is always among them."""
        late = self._values[-_SEARCHED:]
        stream = [v for v in self._values[:-_SEARCHED] if v[0].buffer == self._stream.buffer]
        return [*reversed(late), *stream]

    def _new(self, value: Tensor) -> BufferSlice:
        whole = BufferSlice(self._buffers, 0, value.shape[1], value.shape[1])
        self._buffers += 1
        self._values.append((whole, value))
        return whole


def _factor_of(product: Tensor, value: Tensor, holds: Callable[[float], bool]) -> float | None:
    """The number that `value` was multiplied by, 1 or the shortest decimal, for which `holds`."""
    at = int(value.abs().argmax())
    divisor = float(value.reshape(-1)[at])
    if divisor == 0 or not math.isfinite(divisor):
        return 1.0 if holds(1.0) else None
    found = float(product.reshape(-1)[at]) / divisor
    candidates = (1.0, *(float(f"{found:.{digits}g}") for digits in range(1, 8)), found)
    return next((factor for factor in candidates if holds(factor)), None)


def _finish_of(last: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The identity, a division by a short number, or a soft cap of one; None for anything else."""
    if last.shape != logits.shape:
        return None
    if torch.equal(last, logits):
        return _identity
    divisor = _factor_of(last, logits, lambda by: by != 0 and torch.equal(last / by, logits))
    if divisor is not None:
        return partial(_divided, divisor)
    cap = _cap_of(last, logits)
    return None if cap is None else partial(_capped, cap)


def _identity(x: Tensor) -> Tensor:
    return x


def _divided(by: float, x: Tensor) -> Tensor:
    return x / by


def _capped(cap: float, x: Tensor) -> Tensor:
    return torch.tanh(x / cap) * cap


def _cap_of(last: Tensor, logits: Tensor) -> float | None:
    """The short number c for which logits = c tanh(last / c), found by bisection: the right side grows with c."""
    at = int(last.abs().argmax())
    x, y = (abs(float(t.reshape(-1)[at])) for t in (last, logits))
    low, high = y, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
    candidates = (float(f"{high:.{digits}g}") for digits in range(1, 8))
    return next((c for c in candidates if c and torch.equal(_capped(c, last), logits)), None)


def _sums_to(x: Tensor, stream: Tensor, value: Tensor, factor: float) -> bool:
    return torch.equal(stream + scaled(value, factor), x)
