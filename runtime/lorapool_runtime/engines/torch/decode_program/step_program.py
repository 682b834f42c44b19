"""Replays an op graph as one native call per decode step, without transformers' Python and torch's small operators.

The graph's operators get buffers and become C structures (step_program.h). `load` makes one program at start, and
`runner` gives it the steps that only decode.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.engines.interface import BASE_SLOT
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
)
from lorapool_runtime.engines.torch.kernels.base_step import BaseKernel, Decode
from lorapool_runtime.engines.torch.lora.kernel_cpu import NativeRowKernel
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base
from lorapool_runtime.engines.torch.scheduling.blocks import NULL_BLOCK
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan

KINDS = ("norm", "linear", "lora", "rotary", "attention", "activation", "residual")
"""`StepKind` of step_program.h, in its order."""
_NORM, _LINEAR, _LORA, _ROTARY, _ATTEND, _ACTIVATION, _ADD = range(len(KINDS))
MAX_ROWS_PER_ADAPTER = 64
"""Beyond it the plain products of one adapter win by more than the Python around them costs."""
_USUAL_CACHE_BYTES = 8 << 20


class _Op(ctypes.Structure):
    """`StepOp` of step_program.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("what", ctypes.c_void_p),
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("in_row", ctypes.c_int64),
    )


class _RotaryEmbedding(ctypes.Structure):
    """`StepRotaryEmbedding` of base_step.h."""

    _fields_ = (
        ("vectors", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("table", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
    )


class _RotaryTable(ctypes.Structure):
    """`StepRotaryTable` of base_step.h."""

    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("width", ctypes.c_int64))


class _Add(ctypes.Structure):
    """`StepAdd` of base_step.h."""

    _fields_ = (("width", ctypes.c_int64), ("factor", ctypes.c_float), ("bfloat16", ctypes.c_int32))


class _Program(ctypes.Structure):
    """`StepProgram` of step_program.h."""

    _fields_ = (
        ("ops", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("tables", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("rotary_tables", ctypes.c_void_p),
        ("row_slots", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("lora", ctypes.c_void_p),
        ("u", ctypes.c_void_p),
        ("most_ahead", ctypes.c_int64),
        ("spent_ns", ctypes.c_void_p),
    )


class StepProgram:
    """`runner.DecodePath` for CPU. The tensor `run` returns is overwritten by the next `run`."""

    def __init__(
        self, graph: DecodeGraph, base: Base, pool: KVPool, kernel: BaseKernel, lora: NativeRowKernel, *, max_batch: int
    ) -> None:
        adapters = base.lora.slots
        assert adapters is not None
        self._graph, self._base, self._pool, self._adapters, self._max_batch = graph, base, pool, adapters, max_batch
        self._run = kernel.library.base_step_run
        self._run.argtypes = [ctypes.c_void_p]
        self._buffers = _buffers(graph, max_batch, base.dtype)
        self._kept: list[Any] = [kernel, lora]
        self._groups = {id(group.base.product): group.number for group in base.lora.groups}
        ops = [made for op in graph.ops for made in self._made(op, lora)]
        self._ops = (_Op * len(ops))(*ops)
        self._rotary_tables = (_RotaryTable * max(1, len(graph.rotary_tables)))()
        self._spent = np.zeros(len(KINDS), np.int64)
        self._lengths, self._slots = np.zeros(max_batch, np.int32), np.zeros(max_batch, np.int32)
        self._block_tables = np.full((max_batch, 1), NULL_BLOCK, np.int32)
        self._held: list[list[int]] = [[] for _ in range(max_batch)]
        job = self._job = _Program()
        job.ops, job.count = ctypes.addressof(self._ops), len(ops)
        job.rotary_tables = ctypes.addressof(self._rotary_tables)
        job.lengths, job.slots, job.lora = self._lengths.ctypes.data, adapters.count, lora.calls
        widest = max(len(group.out_features) for group in adapters.groups)
        self._u = np.zeros(max_batch * widest * adapters.max_rank, np.float32)
        job.u, job.most_ahead = self._u.ctypes.data, _shared_cache_bytes() // 2

    def can_run(self, plan: StepPlan) -> bool:
        """Whether the step only decodes, with at most MAX_ROWS_PER_ADAPTER rows of each adapter, none of them one that
        changes an embedding or experts."""
        if plan.prefills or not 0 < len(plan.decodes) <= self._max_batch:
            return False
        rows_of = Counter(chunk.sequence.slot for chunk in plan.decodes)
        del rows_of[BASE_SLOT]
        if any(map(self._adapters.runs_by_torch, rows_of)):
            return False
        return max(rows_of.values(), default=0) <= MAX_ROWS_PER_ADAPTER

    def run(self, plan: StepPlan) -> Tensor:
        """As `runner.DecodePath.run`."""
        return self.replay(plan.decodes, torch.tensor([chunk.start for chunk in plan.decodes]))

    def replay(self, chunks: SequenceOf[Chunk], positions: Tensor) -> Tensor:
        """One row per chunk, at these positions (int64 [rows]) -> logits [rows, vocabulary], valid until the next call.

        Raises MemoryError, and ValueError for a slot that does not exist; nothing was computed then."""
        job = self._job
        rows = job.rows = len(chunks)
        self._base.lora.set(())  # what the last step of the model's own code left there
        self._fill_tables(chunks)
        self._lengths[:rows] = [chunk.start + 1 for chunk in chunks]
        slots = [chunk.sequence.slot for chunk in chunks]
        self._slots[:rows] = slots
        job.row_slots = self._slots.ctypes.data if any(slot != BASE_SLOT for slot in slots) else None
        self._enter(torch.tensor([chunk.sequence.tokens[chunk.start] for chunk in chunks]), positions)
        if failed := self._run(ctypes.addressof(job)):
            raise MemoryError("a step's scratch memory") if failed == 2 else ValueError("a row names no slot")
        return self._graph.finish(self._view(self._graph.logits)[:rows])

    def spent_ms(self) -> dict[str, float]:
        """Milliseconds by kind of operator since the last call; the first call starts the clock."""
        spent = dict(zip(KINDS, (self._spent / 1e6).tolist(), strict=True))
        self._spent[:] = 0
        self._job.spent_ns = self._spent.ctypes.data
        return spent

    def stop_clock(self) -> None:
        self._job.spent_ns = None

    def _enter(self, token_ids: Tensor, positions: Tensor) -> None:
        """token_ids, positions: int64 [rows]"""
        graph = self._graph
        stream = graph.embedding(token_ids)
        if graph.embedding_factor != 1:
            stream = stream * graph.embedding_factor
        self._view(graph.stream)[: len(token_ids)] = stream.view(len(token_ids), -1)
        tables = []
        for number, rotary_tables in enumerate(graph.rotary_tables):
            cos, sin = (t.contiguous() for t in rotary_tables(positions))
            tables += [cos, sin]
            self._rotary_tables[number] = _RotaryTable(cos.data_ptr(), sin.data_ptr(), cos.shape[1])
        self._tables_in_use = tables  # alive until the next step

    def _fill_tables(self, chunks: SequenceOf[Chunk]) -> None:
        width = max(len(chunk.sequence.block_table) for chunk in chunks)
        if width > self._block_tables.shape[1]:
            self._block_tables = np.full((self._max_batch, 2 * width), NULL_BLOCK, np.int32)
            self._held = [[] for _ in range(self._max_batch)]
        for row, chunk in enumerate(chunks):
            table = chunk.sequence.block_table
            if table != self._held[row]:  # most steps change no table
                self._block_tables[row, : len(table)] = table
                self._held[row] = list(table)
        self._job.tables, self._job.width = self._block_tables.ctypes.data, self._block_tables.shape[1]

    # --- from the graph to C structures ---

    def _made(self, op: Op, lora: NativeRowKernel) -> list[_Op]:
        match op:
            case Norm():
                parts, row_bytes = op.source.width // op.op.width, op.source.buffer_width * self._base.dtype.itemsize
                return [_Op(_NORM, parts, op.op.address, self._at(op.source), self._at(op.to), row_bytes)]
            case Linear():
                linear = _Op(_LINEAR, 0, op.op.address, self._at(op.source), self._at(op.to), 0)
                group = self._groups.get(id(op.op))
                if group is None:
                    return [linear]
                address = lora.address_of(self._adapters.groups[group])
                return [linear, _Op(_LORA, 0, address, self._at(op.source), self._at(op.to), 0)]
            case GatedActivation():
                return [_Op(_ACTIVATION, 0, op.op.address, self._at(op.source), self._at(op.to), 0)]
            case RotaryEmbedding():
                rotary = _RotaryEmbedding(op.vectors, op.to.width // op.vectors, op.table, self._is_bfloat16)
                return [_Op(_ROTARY, 0, self._address(rotary), None, self._at(op.to), op.to.buffer_width)]
            case Attend():
                return [_Op(_ATTEND, 0, self._address(self._decode(op)), None, None, 0)]
            case Add():
                add = _Add(op.to.width, op.factor, self._is_bfloat16)
                return [_Op(_ADD, 0, self._address(add), self._at(op.source), self._at(op.to), 0)]

    def _decode(self, op: Attend) -> Decode:
        keys, values = self._pool.rows(op.layer)
        dim, job = op.wants.head_dim, Decode()
        job.q, job.k, job.v, job.out = (self._at(columns) for columns in (op.q, op.k, op.v, op.to))
        job.q_row, job.k_row, job.v_row = op.q.buffer_width, op.k.buffer_width, op.v.buffer_width
        job.q_head = job.k_head = job.v_head = job.head_dim = dim
        job.keys, job.values = keys.data_ptr(), values.data_ptr()
        job.heads, job.kv_heads, job.block_size = op.heads, op.wants.kv_heads, self._pool.block_size
        job.window, job.scale, job.softcap = op.wants.window or 0, op.scale, op.wants.softcap or 0.0
        job.bfloat16 = self._is_bfloat16
        return job

    @property
    def _is_bfloat16(self) -> bool:
        return self._base.dtype == torch.bfloat16

    def _address(self, structure: ctypes.Structure) -> int:
        self._kept.append(structure)
        return ctypes.addressof(structure)

    def _at(self, columns: BufferSlice) -> int:
        return self._buffers[columns.buffer].data_ptr() + columns.column * self._base.dtype.itemsize

    def _view(self, columns: BufferSlice) -> Tensor:
        return self._buffers[columns.buffer][:, : columns.buffer_width]


def _shared_cache_bytes() -> int:
    """The size of the cache that all cores share; a usual size where the system does not report it."""
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), _USUAL_CACHE_BYTES)
    except (OSError, ValueError):
        return _USUAL_CACHE_BYTES


def _buffers(graph: DecodeGraph, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """[rows, width] each; buffers share memory when none is read after another is written."""
    last: dict[int, int] = {}
    for number, op in enumerate(graph.ops):
        last |= {columns.buffer: number for columns in _touched(op)}
    last |= {graph.logits.buffer: len(graph.ops), graph.stream.buffer: len(graph.ops)}
    widths = {graph.stream.buffer: graph.stream.buffer_width}
    for op in graph.ops:
        widths |= {columns.buffer: columns.buffer_width for columns in _touched(op)}
    memory: list[tuple[Tensor, int]] = []  # and until which operator it is taken
    buffers: dict[int, Tensor] = {}

    def take(buffer: int, now: int) -> None:
        count = rows * widths[buffer]
        free = [n for n, (held, until) in enumerate(memory) if until < now and len(held) >= count]
        number = min(free, key=lambda n: len(memory[n][0]), default=len(memory))
        if number == len(memory):
            memory.append((torch.zeros(count, dtype=dtype), 0))
        memory[number] = (memory[number][0], last[buffer])
        buffers[buffer] = memory[number][0][:count].view(rows, widths[buffer])

    take(graph.stream.buffer, 0)
    for number, op in enumerate(graph.ops):
        for columns in _touched(op):
            if columns.buffer not in buffers:
                take(columns.buffer, number)
    return [buffers[number] for number in sorted(buffers)]


def _touched(op: Op) -> tuple[BufferSlice, ...]:
    match op:
        case RotaryEmbedding():
            return (op.to,)
        case Attend():
            return (op.q, op.k, op.v, op.to)
        case _:
            return (op.source, op.to)
