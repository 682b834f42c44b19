"""Decides which sequences compute how many tokens in the next step. Pure: no torch, no clock, no I/O.

`schedule()` returns the plan of one step. Every decoding sequence is in every step. In addition at most
`max_prefill_tokens` of prompts are computed. Half of them belong to the oldest prompt; the other half first goes to
prompts with fewer tokens left, so that neither a long prompt nor a series of short ones waits for the others.

Sequences are admitted first come, first served, when blocks for all their tokens are free; shared blocks count once.
When a decoding sequence finds no free block, a young running sequence is preempted and recomputed later. The oldest
sequence always advances, so no sequence starves.

The adapters (and the base) that have sequences share rows and blocks: one that has less than its share is admitted
first, and where there is no room, the youngest sequences of one above its share are preempted for it. What they have
computed stays in the prefix cache, so that they soon continue. Rows above an adapter's share are lent only as long as
they lengthen the step by less than `LENT_ROWS_COST`; those that their adapter used a moment ago are kept for it.
"""

from __future__ import annotations

from bisect import bisect, insort
from dataclasses import dataclass

from lorapool_runtime.engines.interface import FinishReason
from lorapool_runtime.engines.torch.scheduling.blocks import BlockAllocator
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence, SequenceStatus
from lorapool_runtime.engines.torch.scheduling.shares import Shares, WantedRows
from lorapool_runtime.engines.torch.scheduling.step_cost import StepCost

LENT_ROWS_COST = 0.1
"""Part of a step's time by which rows that an adapter has above its share may lengthen it while others run."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` tokens of a sequence, from position `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the chunk holds the sequence's last token, so that a new one is sampled."""
        return self.start + self.num_tokens == len(self.sequence.tokens)

    @property
    def logit_rows(self) -> range:
        """The tokens whose logits are needed: the last to sample from, or all for prompt log-probabilities."""
        if self.sequence.scores_prompt:
            return range(self.num_tokens)
        return range(self.num_tokens - 1, self.num_tokens) if self.samples else range(0)


@dataclass(frozen=True, slots=True)
class StepPlan:
    decodes: tuple[Chunk, ...]
    """One token each, ordered by slot."""
    prefills: tuple[Chunk, ...]
    """Ordered by slot; a chunk may have a single token."""
    fresh_blocks: tuple[int, ...]
    """Blocks allocated by this plan. Their previous contents must be wiped before the step."""
    preempted: tuple[Sequence, ...]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.decodes + self.prefills


class Scheduler:
    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        max_batch: int,
        max_batch_tokens: int,
        max_prefill_tokens: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        if not 1 <= max_batch <= max_batch_tokens:
            raise ValueError(f"need 1 <= max_batch <= max_batch_tokens, got {max_batch} and {max_batch_tokens}")
        if max_prefill_tokens is not None and max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens must be at least 1, not {max_prefill_tokens}")
        self.allocator = allocator
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.max_prefill_tokens = max_batch_tokens if max_prefill_tokens is None else max_prefill_tokens
        self.prefix_cache = prefix_cache
        self.running: list[Sequence] = []  # by arrival
        self.waiting: list[Sequence] = []  # by arrival
        self.queried_tokens = 0
        """Prompt tokens looked up in the prefix cache; `hit_tokens` of them were found."""
        self.hit_tokens = 0
        self._cost = StepCost()
        self._wanted = WantedRows()
        self._fresh: list[int] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def could_ever_fit(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether the whole KV cache can hold this request alone. The last sampled token needs no block."""
        return self.allocator.blocks_for(prompt_tokens + max(max_tokens, 1) - 1) <= self.allocator.total

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_by_arrival)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a waiting or running sequence and releases its blocks. Those of a failed one leave the prefix cache."""
        (self.running if sequence.status is SequenceStatus.RUNNING else self.waiting).remove(sequence)
        if reason is FinishReason.ERROR and self.prefix_cache:
            size = self.allocator.block_size
            for index in range(len(sequence.tokens) // size):  # also those that it filled before it was preempted
                self.allocator.forget(self.allocator.find([sequence.block_key(index, size)]))
        self.allocator.release(sequence.finish(reason))

    def schedule(self) -> StepPlan:
        self._fresh = []
        preempted = self._grow_decodes()
        if not preempted:
            shares = self._shares()
            entitled = self._wanted.observe(self.running, self.waiting, shares)
            limit = self._cost.rows_within(entitled, 1 + LENT_ROWS_COST, self.max_batch)
            preempted = self._take_back(shares, limit) or self._admit(shares, limit - self._wanted.unused(shares))
        decodes = [Chunk(s, s.computed, 1) for s in self.running if s.pending == 1]
        prefilling = self._prefilling()
        sizes = split_prefill_budget([s.pending for s in prefilling], self._prefill_budget(len(decodes)))
        prefills = [Chunk(s, s.computed, size) for s, size in zip(prefilling, sizes, strict=True) if size]
        return StepPlan(
            decodes=tuple(sorted(decodes, key=_by_slot)),
            prefills=tuple(sorted(prefills, key=_by_slot)),
            fresh_blocks=tuple(self._fresh),
            preempted=tuple(preempted),
        )

    def took(self, plan: StepPlan, seconds: float) -> None:
        """Takes the time that the step of this plan took."""
        if not plan.prefills:
            self._cost.observe(len(plan.decodes), seconds)

    def completed(self, plan: StepPlan) -> list[tuple[int, bytes]]:
        """The blocks that this step filled, with their keys in the prefix cache."""
        if not self.prefix_cache:
            return []
        size = self.allocator.block_size
        return [
            (chunk.sequence.block_table[index], chunk.sequence.block_key(index, size))
            for chunk in plan.chunks
            for index in range(chunk.start // size, (chunk.start + chunk.num_tokens) // size)
        ]

    def _grow_decodes(self) -> list[Sequence]:
        """Allocates blocks for the next token of every decoding sequence, oldest first.

        Preempts the youngest sequences, first of the slot that is most above its share, where blocks are missing, and
        returns them.
        """
        preempted: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING or sequence.pending != 1:
                continue
            missing = self.allocator.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
            while not self.allocator.can_allocate(missing):
                victim = self._youngest(self._shares().most_above())
                self._preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
            else:
                sequence.block_table += self._allocate(missing)
        return preempted

    def _prefilling(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.pending > 1]

    def _prefill_budget(self, decodes: int) -> int:
        left = self.max_batch_tokens - decodes
        return min(left, self.max_prefill_tokens) if decodes else left

    def _take_back(self, shares: Shares, limit: int) -> list[Sequence]:
        """Preempts lent rows beyond the limit. Returns their sequences."""
        preempted: list[Sequence] = []
        while len(self.running) > limit and (slot := shares.most_above()) is not None:
            preempted.append(self._youngest(slot))
            shares.remove(preempted[-1])
            self._preempt(preempted[-1])
        return preempted

    def _admit(self, shares: Shares, limit: int) -> list[Sequence]:
        """Admits waiting sequences that would get tokens in this step. None takes the blocks of an earlier one.

        Returns the running sequences that were preempted for them.
        """
        if not self.waiting:
            return []
        entitled = {sequence.slot for sequence in self.waiting if shares.entitled(sequence.slot)}
        preempted: list[Sequence] = []
        budget = self._prefill_budget(sum(s.pending == 1 for s in self.running))
        for sequence in sorted(self.waiting, key=lambda s: s.slot not in entitled)[: self.max_batch]:
            if len(self.running) >= limit and not shares.entitled(sequence.slot):
                continue
            prefilling = self._prefilling()
            found = self._cached_blocks(sequence)
            if self._is_being_computed(sequence, len(found), prefilling):
                continue
            older = bisect(prefilling, sequence.arrival, key=_by_arrival)
            left = [s.pending for s in prefilling]
            left.insert(older, len(sequence.tokens) - len(found) * self.allocator.block_size)
            if not split_prefill_budget(left, budget)[older]:
                continue
            victims = self._make_room(sequence, found, shares)
            if victims is None:
                break
            for victim in victims:
                self._preempt(victim)
            preempted += victims
            self._start(sequence, found)
            shares.add(sequence)
        return preempted

    def _make_room(self, sequence: Sequence, found: list[int], shares: Shares) -> list[Sequence] | None:
        """The sequences to preempt so that this one can run, taken out of `shares`; None when it has to wait."""
        needed = self.allocator.blocks_for(len(sequence.tokens)) - len(found)
        victims: list[Sequence] = []
        while not self._has_room(needed, found, victims):
            slot = shares.most_above() if shares.entitled(sequence.slot, needed) else None
            if slot is None:
                for victim in victims:
                    shares.add(victim)
                return None
            victims.append(self._youngest(slot, besides=victims))
            shares.remove(victims[-1])
        return victims

    def _has_room(self, needed: int, found: list[int], victims: list[Sequence]) -> bool:
        """Whether a row and `needed` blocks are free without the victims. One block more per row avoids preemption."""
        rows = len(self.running) - len(victims)
        freed = self.allocator.held_once({block for v in victims for block in v.block_table} - set(found))
        return rows < self.max_batch and self.allocator.can_allocate(needed + rows - freed, once_shared=found)

    def _shares(self) -> Shares:
        slots = {sequence.slot for sequence in (*self.running, *self.waiting)}
        return Shares(self.running, slots, rows=self.max_batch, blocks=self.allocator.total)

    def _youngest(self, slot: int | None, besides: list[Sequence] | None = None) -> Sequence:
        """The youngest running sequence of the slot, of any slot if it is None."""
        candidates = (s for s in reversed(self.running) if slot is None or s.slot == slot)
        return next(s for s in candidates if s not in (besides or []))

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self.allocator.release(victim.preempt())
        self.add(victim)

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Cached blocks for the longest prefix of its tokens, except the last token, whose logits are needed."""
        if not (self.prefix_cache and sequence.reads_cache):
            return []
        size = self.allocator.block_size
        full = (len(sequence.tokens) - 1) // size
        return self.allocator.find(sequence.block_key(index, size) for index in range(full))

    def _is_being_computed(self, sequence: Sequence, index: int, prefilling: list[Sequence]) -> bool:
        """Whether another sequence is computing the first block that this one misses. Waiting for it saves work."""
        size = self.allocator.block_size
        if not (self.prefix_cache and sequence.reads_cache) or index >= (len(sequence.tokens) - 1) // size:
            return False
        key = sequence.block_key(index, size)
        return any(
            other.computed // size <= index < len(other.tokens) // size and other.block_key(index, size) == key
            for other in prefilling
        )

    def _start(self, sequence: Sequence, found: list[int]) -> None:
        self.allocator.share(found)
        own = self._allocate(self.allocator.blocks_for(len(sequence.tokens)) - len(found))
        if self.prefix_cache and sequence.reads_cache and not sequence.preemptions:
            self.queried_tokens += len(sequence.tokens)
            self.hit_tokens += len(found) * self.allocator.block_size
        sequence.admit(found + own, cached_tokens=len(found) * self.allocator.block_size)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_by_arrival)

    def _allocate(self, count: int) -> list[int]:
        blocks = self.allocator.allocate(count)
        self._fresh += blocks
        return blocks


def split_prefill_budget(left: list[int], budget: int) -> list[int]:
    """Tokens to compute of each prompt. left: the tokens that each prompt has left, oldest prompt first.

    Half of the budget is reserved for the oldest prompt. The other half first goes to prompts with fewer tokens left
    than the oldest, shortest first. What they do not need goes to the oldest, then to the remaining prompts.
    """
    given = [0] * len(left)
    if not left:
        return given
    shorter = sorted((i for i in range(1, len(left)) if left[i] < left[0]), key=lambda i: left[i])
    rest = [i for i in range(len(left)) if i == 0 or left[i] >= left[0]]
    for_shorter = budget - min(left[0], -(-budget // 2))
    for i in shorter:
        given[i] = min(left[i], for_shorter)
        for_shorter -= given[i]
    budget -= sum(given)
    for i in rest:
        given[i] = min(left[i], budget)
        budget -= given[i]
    return given


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _by_slot(chunk: Chunk) -> tuple[int, int]:
    return (chunk.sequence.slot, chunk.sequence.arrival)
