"""Which sequences compute how many tokens in the next step. Pure: no torch, no clock, no I/O.

The engine calls `schedule()` once per step and spends the plan it returns. Rules: decoding rows come first;
what is left of the token budget prefills, in order of arrival, in chunks; a sequence is admitted when blocks for
all its tokens are free, first come first served; when a decoding row finds no block, the youngest running sequence
goes back to the queue and is recomputed later. The oldest sequence always advances, so nothing starves.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from lorapool_runtime.blocks import BlockAllocator
from lorapool_runtime.interface import FinishReason
from lorapool_runtime.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` of a sequence, from `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the sequence's last token is in it, so that a new one is sampled."""
        return self.start + self.num_tokens == len(self.sequence.tokens)

    @property
    def logit_rows(self) -> range:
        """Of the chunk's tokens, those whose logits are wanted: the last when it samples, all when it scores."""
        if self.sequence.scores_prompt:
            return range(self.num_tokens)
        return range(self.num_tokens - 1, self.num_tokens) if self.samples else range(0)


@dataclass(frozen=True, slots=True)
class StepPlan:
    decodes: tuple[Chunk, ...]
    """One token each, ordered by slot."""
    prefills: tuple[Chunk, ...]
    """Ordered by slot; may hold chunks of one token."""
    fresh_blocks: tuple[int, ...]
    """Blocks that change hands with this plan: what their last holder left must not be read."""
    preempted: tuple[Sequence, ...]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.decodes + self.prefills


class Scheduler:
    def __init__(self, allocator: BlockAllocator, *, max_batch: int, max_batch_tokens: int) -> None:
        if not 1 <= max_batch <= max_batch_tokens:
            raise ValueError(f"need 1 <= max_batch <= max_batch_tokens, got {max_batch} and {max_batch_tokens}")
        self.allocator = allocator
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.running: list[Sequence] = []  # by arrival
        self.waiting: list[Sequence] = []  # by arrival
        self._fresh: list[int] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def could_ever_fit(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether the whole KV cache holds this request alone (the last token sampled needs no place)."""
        return self.allocator.blocks_for(prompt_tokens + max(max_tokens, 1) - 1) <= self.allocator.total

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_by_arrival)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence wherever it stands and takes its blocks back."""
        (self.running if sequence.status is SequenceStatus.RUNNING else self.waiting).remove(sequence)
        self.allocator.release(sequence.finish(reason))

    def schedule(self) -> StepPlan:
        self._fresh = []
        preempted = self._grow_decodes()
        decodes = [Chunk(s, s.computed, 1) for s in self.running if s.pending == 1]
        budget = self.max_batch_tokens - len(decodes)
        prefills: list[Chunk] = []
        for sequence in self.running:
            if sequence.pending > 1 and budget > 0:
                prefills.append(_chunk(sequence, budget))
                budget -= prefills[-1].num_tokens
        while budget > 0 and self.waiting and not preempted and self._can_admit(self.waiting[0]):
            sequence = self.waiting.pop(0)
            sequence.admit(self._allocate(self.allocator.blocks_for(len(sequence.tokens))))
            insort(self.running, sequence, key=_by_arrival)
            prefills.append(_chunk(sequence, budget))
            budget -= prefills[-1].num_tokens
        return StepPlan(
            decodes=tuple(sorted(decodes, key=_by_slot)),
            prefills=tuple(sorted(prefills, key=_by_slot)),
            fresh_blocks=tuple(self._fresh),
            preempted=tuple(preempted),
        )

    def _grow_decodes(self) -> list[Sequence]:
        """A block for the next token of every decoding sequence, oldest first, from the youngest if need be."""
        preempted: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING or sequence.pending != 1:
                continue
            missing = self.allocator.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
            while not self.allocator.can_allocate(missing):
                victim = self.running.pop()
                self.allocator.release(victim.preempt())
                self.add(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
            else:
                sequence.block_table += self._allocate(missing)
        return preempted

    def _can_admit(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, and one spare for each that runs already, so that it does not push them out."""
        if len(self.running) >= self.max_batch:
            return False
        needed = self.allocator.blocks_for(len(sequence.tokens))
        return self.allocator.can_allocate(needed + len(self.running))

    def _allocate(self, count: int) -> list[int]:
        blocks = self.allocator.allocate(count)
        self._fresh += blocks
        return blocks


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    return Chunk(sequence, sequence.computed, min(sequence.pending, budget))


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _by_slot(chunk: Chunk) -> tuple[int, int]:
    return (chunk.sequence.slot, chunk.sequence.arrival)
