"""Which sequences compute how many tokens in the next step. Pure: no torch, no clock, no I/O.

The engine calls `schedule()` once per step and spends the plan it returns. Every decoding row is in every step; beside
them at most `max_prefill_tokens` of prompts are computed: half of it is the oldest prompt's, the other half first goes
to prompts with less left than that one, so that neither a long prompt nor a stream of short ones waits for the others.
A sequence is admitted, first come first served, when blocks for all its tokens are free (those it shares count once).
When a decoding row finds no block, the youngest running sequence goes back to the queue and is recomputed later. The
oldest sequence always advances, so nothing starves.
"""

from __future__ import annotations

from bisect import bisect, insort
from dataclasses import dataclass

from lorapool_runtime.engines.interface import FinishReason
from lorapool_runtime.engines.torch.scheduling.blocks import BlockAllocator
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence, SequenceStatus


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
        """Of prompts that were looked up in the prefix cache; `hit_tokens` of them were there."""
        self.hit_tokens = 0
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
        """Ends a sequence wherever it stands and takes its blocks back. Nobody finds those of a failed one again."""
        (self.running if sequence.status is SequenceStatus.RUNNING else self.waiting).remove(sequence)
        blocks = sequence.finish(reason)
        if reason is FinishReason.ERROR:
            self.allocator.forget(blocks)
        self.allocator.release(blocks)

    def schedule(self) -> StepPlan:
        self._fresh = []
        preempted = self._grow_decodes()
        if not preempted:
            self._admit()
        decodes = [Chunk(s, s.computed, 1) for s in self.running if s.pending == 1]
        prefilling = self._prefilling()
        sizes = share_out([s.pending for s in prefilling], self._prefill_budget(len(decodes)))
        prefills = [Chunk(s, s.computed, size) for s, size in zip(prefilling, sizes, strict=True) if size]
        return StepPlan(
            decodes=tuple(sorted(decodes, key=_by_slot)),
            prefills=tuple(sorted(prefills, key=_by_slot)),
            fresh_blocks=tuple(self._fresh),
            preempted=tuple(preempted),
        )

    def completed(self, plan: StepPlan) -> list[tuple[int, bytes]]:
        """The blocks that this step filled, with the keys under which the next ones may find them."""
        if not self.prefix_cache:
            return []
        size = self.allocator.block_size
        return [
            (chunk.sequence.block_table[index], chunk.sequence.block_key(index, size))
            for chunk in plan.chunks
            for index in range(chunk.start // size, (chunk.start + chunk.num_tokens) // size)
        ]

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

    def _prefilling(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.pending > 1]

    def _prefill_budget(self, decodes: int) -> int:
        left = self.max_batch_tokens - decodes
        return min(left, self.max_prefill_tokens) if decodes else left

    def _admit(self) -> None:
        """Takes in who waits and would get tokens in this step; nobody takes the blocks of one before him."""
        prefilling = self._prefilling()
        budget = self._prefill_budget(sum(s.pending == 1 for s in self.running))
        for sequence in self.waiting[: self.max_batch]:
            if len(self.running) >= self.max_batch:
                return
            found = self._find(sequence)
            if self._is_coming(sequence, len(found), prefilling):
                continue
            older = bisect(prefilling, sequence.arrival, key=_by_arrival)
            left = [s.pending for s in prefilling]
            left.insert(older, len(sequence.tokens) - len(found) * self.allocator.block_size)
            if not share_out(left, budget)[older]:
                continue
            if not self._can_admit(sequence, found):
                return
            self._take_in(sequence, found)
            if sequence.pending > 1:
                prefilling.insert(older, sequence)

    def _find(self, sequence: Sequence) -> list[int]:
        """Computed blocks of the beginning of its tokens; never of the last one, which gives the next token."""
        if not (self.prefix_cache and sequence.reads_cache):
            return []
        size = self.allocator.block_size
        full = (len(sequence.tokens) - 1) // size
        return self.allocator.find(sequence.block_key(index, size) for index in range(full))

    def _is_coming(self, sequence: Sequence, index: int, prefilling: list[Sequence]) -> bool:
        """Whether the first block it misses is being computed for another: better to wait than to compute it twice."""
        size = self.allocator.block_size
        if not (self.prefix_cache and sequence.reads_cache) or index >= (len(sequence.tokens) - 1) // size:
            return False
        key = sequence.block_key(index, size)
        return any(
            other.computed // size <= index < len(other.tokens) // size and other.block_key(index, size) == key
            for other in prefilling
        )

    def _can_admit(self, sequence: Sequence, found: list[int]) -> bool:
        """Blocks for all its tokens, and one spare for each that runs already, so that it does not push them out."""
        needed = self.allocator.blocks_for(len(sequence.tokens)) - len(found)
        return self.allocator.can_allocate(needed + len(self.running), beside=found)

    def _take_in(self, sequence: Sequence, found: list[int]) -> None:
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


def share_out(left: list[int], budget: int) -> list[int]:
    """Tokens for each prompt, given what is left of each, oldest first.

    Half of the budget is the oldest's. The other half first goes to those with less left than the oldest, least first;
    what they do not need goes to the oldest, then to the rest.
    """
    given = [0] * len(left)
    if not left:
        return given
    shorter = sorted((i for i in range(1, len(left)) if left[i] < left[0]), key=lambda i: left[i])
    rest = [i for i in range(len(left)) if i == 0 or left[i] >= left[0]]
    beside = budget - min(left[0], -(-budget // 2))
    for i in shorter:
        given[i] = min(left[i], beside)
        beside -= given[i]
    budget -= sum(given)
    for i in rest:
        given[i] = min(left[i], budget)
        budget -= given[i]
    return given


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _by_slot(chunk: Chunk) -> tuple[int, int]:
    return (chunk.sequence.slot, chunk.sequence.arrival)
