"""A decode step on CPU as one native call: what transformers' Python and torch's small operators cost is gone.

`core` makes one at start, `runner` hands it the steps that only decode. `step_recording` learns the list of kernels
from one run; here it gets buffers and becomes C structures (step_program.h), and is proved on other rows: logits, keys
and values must equal the model's own run bit for bit, since a request may be computed by either from step to step.
A model that cannot be followed is served as before, and the log says why.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.decode_program.ops import Add, Attend, Gate, Linear, Norm, Op, Place, Recipe, Turn
from lorapool_runtime.engines.torch.decode_program.recorder import NotFollowedError, learn
from lorapool_runtime.engines.torch.kernels.base_step import BaseKernel, Decode, PagedDecode, base_kernel
from lorapool_runtime.engines.torch.lora.kernel_cpu import NativeRowKernel
from lorapool_runtime.engines.torch.model.attention import PagedAttention
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base
from lorapool_runtime.engines.torch.scheduling.blocks import NULL_BLOCK
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence

log = logging.getLogger(__name__)

KINDS = ("norm", "linear", "lora", "rotary", "attention", "activation", "residual")
"""`StepKind` of step_program.h, in its order."""
_NORM, _LINEAR, _LORA, _TURN, _ATTEND, _GATE, _ADD = range(len(KINDS))
_CROWD = 64
"""Rows of one adapter beyond which its plain products win by more than the Python around them costs."""
_USUAL_CACHE_BYTES = 8 << 20
_LEARNED_AT, _PROVED_AT = (1, 5, 11), (9, 0)
"""Positions of the rows that are learned from, and of those that prove it."""


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


class _Turn(ctypes.Structure):
    """`StepTurn` of base_step.h."""

    _fields_ = (
        ("vectors", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("cosines", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
    )


class _Cosines(ctypes.Structure):
    """`StepCosines` of base_step.h."""

    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("turned", ctypes.c_int64))


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
        ("cosines", ctypes.c_void_p),
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
        self, recipe: Recipe, base: Base, pool: KVPool, kernel: BaseKernel, lora: NativeRowKernel, *, max_batch: int
    ) -> None:
        slabs = base.lora.slots
        assert slabs is not None
        self._recipe, self._base, self._pool, self._slabs, self._max_batch = recipe, base, pool, slabs, max_batch
        self._run = kernel.library.base_step_run
        self._run.argtypes = [ctypes.c_void_p]
        self._buffers = _buffers(recipe, max_batch, base.dtype)
        self._kept: list[Any] = [kernel, lora]
        self._groups = {id(group.base.product): group.number for group in base.lora.groups}
        ops = [made for op in recipe.ops for made in self._made(op, lora)]
        self._ops = (_Op * len(ops))(*ops)
        self._cosines = (_Cosines * max(1, len(recipe.rotaries)))()
        self._spent = np.zeros(len(KINDS), np.int64)
        self._lengths, self._slots = np.zeros(max_batch, np.int32), np.zeros(max_batch, np.int32)
        self._tables = np.full((max_batch, 1), NULL_BLOCK, np.int32)
        self._held: list[list[int]] = [[] for _ in range(max_batch)]
        job = self._job = _Program()
        job.ops, job.count, job.cosines = ctypes.addressof(self._ops), len(ops), ctypes.addressof(self._cosines)
        job.lengths, job.slots, job.lora = self._lengths.ctypes.data, slabs.count, lora.calls
        widest = max(len(group.out_features) for group in slabs.groups)
        self._u = np.zeros(max_batch * widest * slabs.max_rank, np.float32)
        job.u, job.most_ahead = self._u.ctypes.data, _shared_cache_bytes() // 2

    def can_run(self, plan: StepPlan) -> bool:
        """Whether the step is nothing but decoding, without a crowd of rows on one adapter."""
        if plan.prefills or not 0 < len(plan.decodes) <= self._max_batch:
            return False
        rows_of = Counter(chunk.sequence.slot for chunk in plan.decodes)
        del rows_of[BASE_SLOT]
        return max(rows_of.values(), default=0) <= _CROWD

    def run(self, plan: StepPlan) -> Tensor:
        """As `runner.DecodePath.run`."""
        chunks, job = plan.decodes, self._job
        rows = job.rows = len(chunks)
        self._base.lora.set(())  # what the last step of the model's own code left there
        self._fill_tables(chunks)
        self._lengths[:rows] = [chunk.start + 1 for chunk in chunks]
        slots = [chunk.sequence.slot for chunk in chunks]
        self._slots[:rows] = slots
        job.row_slots = self._slots.ctypes.data if any(slot != BASE_SLOT for slot in slots) else None
        self._enter(
            torch.tensor([chunk.sequence.tokens[chunk.start] for chunk in chunks]),
            torch.tensor([chunk.start for chunk in chunks]),
        )
        if failed := self._run(ctypes.addressof(job)):
            raise MemoryError("a step's scratch memory") if failed == 2 else ValueError("a row names no slot")
        return self._recipe.finish(self._view(self._recipe.logits)[:rows])

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
        recipe = self._recipe
        stream = recipe.embedding(token_ids)
        if recipe.embedding_factor != 1:
            stream = stream * recipe.embedding_factor
        self._view(recipe.stream)[: len(token_ids)] = stream.view(len(token_ids), -1)
        turning = []
        for number, rotary in enumerate(recipe.rotaries):
            cos, sin = (t.contiguous() for t in rotary(positions))
            turning += [cos, sin]
            self._cosines[number] = _Cosines(cos.data_ptr(), sin.data_ptr(), cos.shape[1])
        self._turning = turning  # alive until the next step

    def _fill_tables(self, chunks: SequenceOf[Chunk]) -> None:
        width = max(len(chunk.sequence.block_table) for chunk in chunks)
        if width > self._tables.shape[1]:
            self._tables = np.full((self._max_batch, 2 * width), NULL_BLOCK, np.int32)
            self._held = [[] for _ in range(self._max_batch)]
        for row, chunk in enumerate(chunks):
            table = chunk.sequence.block_table
            if table != self._held[row]:  # most steps change no table
                self._tables[row, : len(table)] = table
                self._held[row] = list(table)
        self._job.tables, self._job.width = self._tables.ctypes.data, self._tables.shape[1]

    # --- from the recipe to structures ---

    def _made(self, op: Op, lora: NativeRowKernel) -> list[_Op]:
        match op:
            case Norm():
                parts, row_bytes = op.source.width // op.op.width, op.source.of * self._base.dtype.itemsize
                return [_Op(_NORM, parts, op.op.address, self._at(op.source), self._at(op.to), row_bytes)]
            case Linear():
                linear = _Op(_LINEAR, 0, op.op.address, self._at(op.source), self._at(op.to), 0)
                group = self._groups.get(id(op.op))
                if group is None:
                    return [linear]
                address = lora.address_of(self._slabs.groups[group])
                return [linear, _Op(_LORA, 0, address, self._at(op.source), self._at(op.to), 0)]
            case Gate():
                return [_Op(_GATE, 0, op.op.address, self._at(op.source), self._at(op.to), 0)]
            case Turn():
                turn = _Turn(op.vectors, op.place.width // op.vectors, op.rotary, self._is_bfloat16)
                return [_Op(_TURN, 0, self._address(turn), None, self._at(op.place), op.place.of)]
            case Attend():
                return [_Op(_ATTEND, 0, self._address(self._decode(op)), None, None, 0)]
            case Add():
                add = _Add(op.to.width, op.factor, self._is_bfloat16)
                return [_Op(_ADD, 0, self._address(add), self._at(op.source), self._at(op.to), 0)]

    def _decode(self, op: Attend) -> Decode:
        keys, values = self._pool.rows(op.layer)
        dim, job = op.wants.head_dim, Decode()
        job.q, job.k, job.v, job.out = (self._at(place) for place in (op.q, op.k, op.v, op.to))
        job.q_row, job.k_row, job.v_row = op.q.of, op.k.of, op.v.of
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

    def _at(self, place: Place) -> int:
        return self._buffers[place.buffer].data_ptr() + place.column * self._base.dtype.itemsize

    def _view(self, place: Place) -> Tensor:
        return self._buffers[place.buffer][:, : place.of]


def _shared_cache_bytes() -> int:
    """Of the cache that all cores share; a guess where the system does not tell."""
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), _USUAL_CACHE_BYTES)
    except (OSError, ValueError):
        return _USUAL_CACHE_BYTES


def _buffers(recipe: Recipe, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """[rows, width] each; buffers share memory when none is read after another is written."""
    last: dict[int, int] = {}
    for number, op in enumerate(recipe.ops):
        last |= {place.buffer: number for place in _touched(op)}
    last |= {recipe.logits.buffer: len(recipe.ops), recipe.stream.buffer: len(recipe.ops)}
    widths = {recipe.stream.buffer: recipe.stream.of}
    for op in recipe.ops:
        widths |= {place.buffer: place.of for place in _touched(op)}
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

    take(recipe.stream.buffer, 0)
    for number, op in enumerate(recipe.ops):
        for place in _touched(op):
            if place.buffer not in buffers:
                take(place.buffer, number)
    return [buffers[number] for number in sorted(buffers)]


def _touched(op: Op) -> tuple[Place, ...]:
    match op:
        case Turn():
            return (op.place,)
        case Attend():
            return (op.q, op.k, op.v, op.to)
        case _:
            return (op.source, op.to)


def load_step_program(base: Base, pool: KVPool, *, max_batch: int) -> StepProgram | None:
    """None where the model's own Python must serve; the log says why. The pool must be empty, and is left so."""
    kernel, lora = base_kernel(), base.lora.kernel
    if kernel is None or not isinstance(lora, NativeRowKernel) or not PagedDecode.serves(pool.data, pool.head_dim):
        log.info("no decode program: the native kernels do not serve this base")
        return None
    try:
        recipe = _learned(base, pool)
        program = StepProgram(recipe, base, pool, kernel, lora, max_batch=max_batch)
        _prove(program, base, pool, _PROVED_AT[:max_batch])
    except NotFollowedError as error:
        log.info("no decode program, the model's own code serves: %s", error)
        return None
    log.info("decode program", extra={"operators": len(recipe.ops)})
    return program


def _learned(base: Base, pool: KVPool) -> Recipe:
    plan = _plan(pool, _LEARNED_AT, base.vocab_size)
    token_ids = torch.tensor([chunk.sequence.tokens[chunk.start] for chunk in plan.decodes])
    positions = torch.tensor([chunk.start for chunk in plan.decodes])
    base.lora.set(())
    attention = PagedAttention(pool, plan)
    try:
        return learn(
            base.model,
            lambda recording: base.logits(token_ids, positions, torch.arange(len(token_ids)), recording),
            attention,
            positions,
            token_ids,
        )
    finally:
        pool.wipe(_held(plan))


def _prove(program: StepProgram, base: Base, pool: KVPool, positions_of_rows: SequenceOf[int]) -> None:
    """Raises NotFollowedError unless program and model agree on rows that nothing was learned from."""
    plan = _plan(pool, positions_of_rows, base.vocab_size)
    if not program.can_run(plan):
        raise NotFollowedError("the pool holds no block")
    base.lora.set(())
    token_ids = torch.tensor([chunk.sequence.tokens[chunk.start] for chunk in plan.decodes])
    positions = torch.tensor([chunk.start for chunk in plan.decodes])
    held = _held(plan)
    blocks = torch.tensor(held)
    want = base.logits(token_ids, positions, torch.arange(len(token_ids)), PagedAttention(pool, plan))
    cached = pool.data.index_select(2, blocks)
    pool.wipe(held)
    got = program.run(plan)
    same = torch.equal(got, want) and torch.equal(pool.data.index_select(2, blocks), cached)
    pool.wipe(held)
    if not same:
        raise NotFollowedError("what was learned from one run does not compute another")


def _plan(pool: KVPool, starts: SequenceOf[int], vocab_size: int) -> StepPlan:
    """One row each at these positions, as many as the pool has blocks for, over keys and values of zero."""
    chunks, free = [], 1
    for number, start in enumerate(starts):
        blocks = -(-(start + 1) // pool.block_size)
        if free + blocks > pool.data.shape[2]:
            break
        prompt = tuple((11 + 17 * number + 7 * i) % vocab_size for i in range(start + 1))
        request = GenerationRequest(f"program-{number}", prompt, BASE_SLOT, "base", SamplingParams(max_tokens=1))
        sequence = Sequence(request, arrival=number, seed=0)
        sequence.admit(list(range(free, free + blocks)))
        free += blocks
        chunks.append(Chunk(sequence, start, 1))
    return StepPlan(tuple(chunks), (), (), ())


def _held(plan: StepPlan) -> tuple[int, ...]:
    return tuple(block for chunk in plan.decodes for block in chunk.sequence.block_table)
