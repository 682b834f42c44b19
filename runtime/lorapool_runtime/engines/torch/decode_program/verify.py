"""Checks a traced op graph, and the native program made of it, against further runs of the model.

A trace sees one run; what happens to be the identity there is missing from the graph. So every intermediate value, the
logits, and the keys and values of further runs must agree bit for bit: at positions beyond every bound that the
config names and at the last one, with adapters and the base in one batch, alone and together, and with activations
scaled until clamps and soft caps show. The program is refused where one bit differs, since a request may be computed
by the program in one step and by the model's own code in the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

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
    RotaryEmbedding,
    rotated,
    scaled,
)
from lorapool_runtime.engines.torch.decode_program.recorder import AttentionCall, OperatorCall, Recording, record
from lorapool_runtime.engines.torch.decode_program.step_program import StepProgram
from lorapool_runtime.engines.torch.model.attention import PagedAttention
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base, text_settings
from lorapool_runtime.engines.torch.scheduling.scheduler import StepPlan
from lorapool_runtime.engines.torch.trial_steps import decode_plan, random_adapters

_MAX_POSITIONS = 32
"""Positions that are verified at most; a config of a real base names some 15 bounds."""
_MAX_CONTEXT = 64
"""Tokens that a row attends to, except the last row: attention is one kernel in both runs, whatever the length."""
_NORM_FACTORS = (-16.0, 4096.0)
"""Powers of two, so that no weight loses a bit; the second is beyond any clamp or cap of a known architecture."""


class VerificationError(Exception):
    """The graph or the program computes something other than the model; the message says under which condition."""


@dataclass(frozen=True, slots=True)
class Condition:
    """The rows of one verification step."""

    positions: tuple[int, ...]
    contexts: tuple[int, ...]
    """Tokens that each row attends to."""
    slots: tuple[int, ...]
    """The adapter slot of each row, BASE_SLOT for the base."""
    norm_factor: float = 1.0
    """Multiplied into every norm's weight during the step, so that all activations grow."""

    def __str__(self) -> str:
        adapters = sorted({slot for slot in self.slots if slot != BASE_SLOT})
        with_adapters = f", adapters in slots {adapters}" if adapters else ""
        return f"positions {list(self.positions)}, norms times {self.norm_factor:g}{with_adapters}"


def bound_positions(config: Mapping[str, Any], last: int) -> tuple[int, ...]:
    """0, the last position, and one position beyond every number in the (nested) config that could be a bound.

    Any number may switch behaviour (`original_max_position_embeddings`, `sliding_window`, a scaling's floor), so none
    is chosen by its name. One position lies between each two neighbouring bounds. The largest are kept."""
    beyond = {number + 1 for number in _numbers(config) if 0 < number < last}
    return (0, *sorted({last, *beyond} - {0})[-_MAX_POSITIONS + 1 :])


def _numbers(value: Any) -> Iterator[int]:
    """All whole numbers in a nested config."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        yield int(value)


def conditions(
    positions: SequenceOf[int], *, rows: int, slots: SequenceOf[int], longest_window: int, last: int
) -> Iterator[Condition]:
    """All that a program is verified under: steps of at most `rows` rows, in batches of several and of one."""

    def condition(chosen: SequenceOf[int], slots_of_rows: SequenceOf[int], factor: float = 1.0) -> Condition:
        contexts = tuple(min(p, _MAX_CONTEXT if p < last else max(longest_window, _MAX_CONTEXT)) + 1 for p in chosen)
        return Condition(tuple(chosen), contexts, tuple(slots_of_rows), factor)

    mixed = [(BASE_SLOT, *slots)[number % (1 + len(slots))] for number in range(len(positions))]
    for begin in range(0, len(positions), rows):
        yield condition(positions[begin : begin + rows], mixed[begin : begin + rows])
    yield condition([last], [BASE_SLOT])
    for factor in _NORM_FACTORS:
        chosen = sorted({0, last // 2, last})[-rows:]
        yield condition(chosen, [BASE_SLOT] * len(chosen), factor)


def verify(program: StepProgram, graph: DecodeGraph, base: Base, pool: KVPool, *, max_batch: int, last: int) -> int:
    """Returns under how many conditions graph and program computed what the model computes. Raises VerificationError.

    last: the last position that is ever served. The pool must be unused, and is left so; no slot may be occupied."""
    adapters = base.lora.slots
    assert adapters is not None
    positions = bound_positions(text_settings(base), last)
    window = max((layer.window or 0 for layer in base.layers), default=0)
    rows = min(max_batch, pool.data.shape[2] - 1)
    count = 0
    with random_adapters(base, adapters) as slots:
        for condition in conditions(positions, rows=rows, slots=slots, longest_window=window, last=last):
            _verify_under(condition, program, graph, base, pool)
            count += 1
    return count


def _verify_under(condition: Condition, program: StepProgram, graph: DecodeGraph, base: Base, pool: KVPool) -> None:
    plan = decode_plan(pool, condition.contexts, base.vocab_size, condition.slots)
    positions = torch.tensor(condition.positions)
    blocks = [chunk.sequence.block_table[0] for chunk in plan.decodes]
    try:
        with _scaled_norms(graph, condition.norm_factor):
            recording = record_decode(base, pool, plan, positions)
            cached = pool.data.index_select(2, torch.tensor(blocks))
            _GraphCheck(graph, recording, base).run()
            pool.wipe(tuple(blocks))
            logits = program.replay(plan.decodes, positions)
        if not torch.equal(logits, recording.logits):
            raise VerificationError("the program's logits differ from the model's")
        if not torch.equal(pool.data.index_select(2, torch.tensor(blocks)), cached):
            raise VerificationError("the program's keys or values differ from the model's")
    except VerificationError as error:
        raise VerificationError(f"{error}; {condition}") from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # of a module that takes no other rows
        raise VerificationError(f"the graph cannot be computed: {error}; {condition}") from error
    finally:
        pool.wipe(tuple(blocks))
        base.lora.set(())


def record_decode(base: Base, pool: KVPool, plan: StepPlan, positions: Tensor) -> Recording:
    """Runs the model's own code over a plan that only decodes, at these positions (int64 [rows])."""
    token_ids = torch.tensor([chunk.sequence.tokens[chunk.start] for chunk in plan.decodes])
    slots = torch.tensor([chunk.sequence.slot for chunk in plan.decodes], dtype=torch.int32)
    base.lora.use(slots)
    return record(
        base.model,
        lambda attention: base.logits(token_ids, positions, torch.arange(len(token_ids)), attention),
        PagedAttention(pool, plan),
        positions,
    )


class _GraphCheck:
    """Computes a graph's values from a recording, and compares the input of every recorded call."""

    def __init__(self, graph: DecodeGraph, recording: Recording, base: Base) -> None:
        self._graph, self._recording, self._base = graph, recording, base
        self._groups = {id(group.base.product): group.number for group in base.lora.groups}
        self._values: dict[int, Tensor] = {}  # by buffer: [rows, width]
        self._calls = iter(recording.calls)

    def run(self) -> None:
        """Raises VerificationError at the first difference."""
        graph, recording = self._graph, self._recording
        if [module for module, _ in recording.embeddings] != [graph.embedding]:
            raise VerificationError("the model calls other embeddings")
        self._values[graph.stream.buffer] = scaled(recording.embeddings[0][1], graph.embedding_factor)
        self._check_rotary_tables()
        for number, op in enumerate(graph.ops):
            match op:
                case Add():
                    self._add(op)
                case RotaryEmbedding():
                    self._rotate(op)
                case Attend():
                    self._attend(number, op)
                case _:
                    self._operator(number, op)
        if next(self._calls, None) is not None:
            raise VerificationError("the model calls more operators than the graph holds")
        if not torch.equal(graph.finish(self._read(graph.logits)), recording.logits):
            raise VerificationError("the logits are computed otherwise from the last layer's output")

    def _check_rotary_tables(self) -> None:
        recorded = self._recording.rotary_tables
        if [tables.module for tables, _, _ in recorded] != [tables.module for tables in self._graph.rotary_tables]:
            raise VerificationError("the model calls other rotary modules")
        for tables, (_, cos, sin) in zip(self._graph.rotary_tables, recorded, strict=True):
            ours = tables(self._recording.positions)
            if not (torch.equal(ours[0], cos) and torch.equal(ours[1], sin)):
                raise VerificationError("a rotary module depends on more than the positions")

    def _add(self, op: Add) -> None:
        self._values[op.to.buffer] = self._read(op.to) + scaled(self._read(op.source), op.factor)

    def _rotate(self, op: RotaryEmbedding) -> None:
        _, cos, sin = self._recording.rotary_tables[op.table]
        columns = slice(op.to.column, op.to.column + op.to.width)
        value = self._values[op.to.buffer].clone()
        value[:, columns] = rotated(self._read(op.to), op.to.width // op.vectors, cos, sin)
        self._values[op.to.buffer] = value

    def _attend(self, number: int, op: Attend) -> None:
        call = next(self._calls, None)
        if not isinstance(call, AttentionCall) or (call.layer, call.heads) != (op.layer, op.heads):
            raise VerificationError(f"the model calls something else than operator {number}")
        if call.wants != op.wants or call.scale != op.scale:
            raise VerificationError(f"layer {op.layer}'s attention asks for another scale, window or cap")
        for name, source, value in (("queries", op.q, call.q), ("keys", op.k, call.k), ("values", op.v, call.v)):
            if not torch.equal(self._read(source), value):
                raise VerificationError(f"layer {op.layer}'s {name} are computed otherwise (operator {number})")
        self._values[op.to.buffer] = call.out

    def _operator(self, number: int, op: Norm | Linear | GatedActivation) -> None:
        call = next(self._calls, None)
        if not isinstance(call, OperatorCall) or call.op is not op.op:
            raise VerificationError(f"the model calls something else than operator {number}")
        x = self._read(op.source)
        y = next((y for given, y in call.layouts(len(x)) if given.shape == x.shape and torch.equal(given, x)), None)
        if y is None:
            raise VerificationError(f"the input of operator {number} ({type(op).__name__}) is computed otherwise")
        group = self._groups.get(id(op.op))
        if group is not None:
            y = y.clone()
            self._base.lora.add(group, x.contiguous(), y)
        self._values[op.to.buffer] = y

    def _read(self, source: BufferSlice) -> Tensor:
        return self._values[source.buffer][:, source.column : source.column + source.width]


@contextmanager
def _scaled_norms(graph: DecodeGraph, factor: float) -> Iterator[None]:
    """Both runs read a norm's weight from the same memory, so both see it scaled."""
    norms = {id(op.op): op.op for op in graph.ops if isinstance(op, Norm)} if factor != 1 else {}
    with ExitStack() as stack:
        for norm in norms.values():
            stack.enter_context(norm.scaled(factor))
        yield
