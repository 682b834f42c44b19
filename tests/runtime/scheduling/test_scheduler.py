"""Which sequences compute how much in a step, without a model."""

from __future__ import annotations

import random

import pytest

from lorapool_runtime.engines.interface import FinishReason, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.scheduling.blocks import BlockAllocator
from lorapool_runtime.engines.torch.scheduling.scheduler import Scheduler, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence, SequenceStatus
from lorapool_runtime.engines.torch.scheduling.step_cost import StepCost


def make(arrival: int, prompt_tokens: int, slot: int = -1, max_tokens: int = 8) -> Sequence:
    """A sequence whose prompt shares no prefix with any other."""
    prompt = tuple(range(arrival * 1000, arrival * 1000 + prompt_tokens))
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(GenerationRequest(f"r{arrival}", prompt, slot, "s", params), arrival=arrival, seed=0)


def scheduler(blocks: int = 100, block_size: int = 4, max_batch: int = 8, max_batch_tokens: int = 16) -> Scheduler:
    return Scheduler(BlockAllocator(blocks, block_size), max_batch=max_batch, max_batch_tokens=max_batch_tokens)


def apply(plan: StepPlan) -> None:
    """Applies a plan as the engine does, with a made-up token."""
    for chunk in plan.chunks:
        samples = chunk.samples
        chunk.sequence.advance(chunk.num_tokens)
        if samples:
            chunk.sequence.append(1)


def test_a_long_prompt_is_computed_in_chunks_and_decoding_rows_never_wait_for_it() -> None:
    s = scheduler(max_batch_tokens=8)
    s.add(make(0, 3))
    apply(s.schedule())
    s.add(make(1, 20))
    sizes = []
    for _ in range(3):
        plan = s.schedule()
        assert [c.sequence.arrival for c in plan.decodes] == [0]
        sizes += [c.num_tokens for c in plan.prefills]
        apply(plan)
    assert sizes == [7, 7, 6]


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    s = scheduler(max_batch_tokens=8)
    s.add(make(0, 12))
    first = s.schedule()
    assert [c.samples for c in first.prefills] == [False]
    apply(first)
    assert [c.samples for c in s.schedule().prefills] == [True]


def test_the_token_budget_and_the_batch_size_are_never_exceeded() -> None:
    s = scheduler(max_batch=3, max_batch_tokens=10)
    for i in range(6):
        s.add(make(i, 6))
    for _ in range(5):
        plan = s.schedule()
        assert sum(c.num_tokens for c in plan.chunks) <= 10
        assert len(s.running) <= 3
        apply(plan)


def test_rows_come_ordered_by_slot() -> None:
    s = scheduler(max_batch_tokens=64)
    for i, slot in enumerate([3, -1, 0, 3, -1]):
        s.add(make(i, 2, slot))
    plan = s.schedule()
    assert [c.sequence.slot for c in plan.prefills] == [-1, -1, 0, 3, 3]
    apply(plan)
    assert [c.sequence.slot for c in s.schedule().decodes] == [-1, -1, 0, 3, 3]


def test_admission_is_by_real_blocks_and_first_come_first_served() -> None:
    s = scheduler(blocks=6, block_size=4, max_batch_tokens=64)
    for i, tokens in enumerate([12, 16, 2]):
        s.add(make(i, tokens))
    s.schedule()
    assert [q.arrival for q in s.running] == [0]  # 4 more blocks are not there, and the small one does not overtake
    assert [q.arrival for q in s.waiting] == [1, 2]


def test_the_youngest_is_preempted_when_a_decoding_row_finds_no_block() -> None:
    s = scheduler(blocks=5, block_size=4, max_batch_tokens=64)
    old, young = make(0, 8), make(1, 4)
    s.add(old)
    s.add(young)
    apply(s.schedule())
    plan = s.schedule()
    assert [c.sequence.arrival for c in plan.decodes] == [0, 1]
    for _ in range(4):
        apply(plan)
        plan = s.schedule()
    assert plan.preempted == (young,)
    assert young.status is SequenceStatus.WAITING
    assert young.computed == 0
    assert [c.sequence for c in plan.decodes] == [old]


def test_a_preempted_sequence_returns_before_the_later_ones_and_recomputes_its_text() -> None:
    s = scheduler(blocks=5, block_size=4, max_batch_tokens=64)
    old, young = make(0, 8), make(1, 4)
    s.add(old)
    s.add(young)
    while young.status is not SequenceStatus.WAITING or not young.generated:
        apply(s.schedule())
    s.add(make(2, 1))
    assert s.waiting[0] is young
    s.finish(old, FinishReason.STOP)
    plan = s.schedule()
    chunk = next(c for c in plan.prefills if c.sequence is young)
    assert (chunk.start, chunk.num_tokens) == (0, len(young.tokens))
    assert chunk.samples


def test_the_plan_lists_every_newly_allocated_block() -> None:
    s = scheduler(block_size=4)
    sequences = [make(0, 6), make(1, 5)]
    for sequence in sequences:
        s.add(sequence)
    plan = s.schedule()
    assert sorted(plan.fresh_blocks) == sorted(sequences[0].block_table + sequences[1].block_table)
    apply(plan)
    assert s.schedule().fresh_blocks == ()


def test_a_request_that_can_never_fit_is_detected_before_it_is_added() -> None:
    s = scheduler(blocks=3, block_size=4)
    assert s.could_ever_fit(8, 5)  # the last sampled token needs no block
    assert not s.could_ever_fit(8, 6)
    assert s.could_ever_fit(12, 0)
    assert s.could_ever_fit(12, 1)
    assert not s.could_ever_fit(12, 2)


def test_the_smallest_batch_and_prefill_budget_are_one_token_and_the_cache_is_on_by_default() -> None:
    smallest = Scheduler(BlockAllocator(4, 4), max_batch=1, max_batch_tokens=1, max_prefill_tokens=1)
    assert smallest.prefix_cache
    with pytest.raises(ValueError, match="max_prefill_tokens must be at least 1, not 0"):
        Scheduler(BlockAllocator(4, 4), max_batch=1, max_batch_tokens=1, max_prefill_tokens=0)
    with pytest.raises(ValueError, match="1 <= max_batch"):
        Scheduler(BlockAllocator(4, 4), max_batch=0, max_batch_tokens=1)


def decoding_and_prefilling() -> Scheduler:
    """One sequence decodes, and a prompt with 20 tokens left is being computed, four prompt tokens a step."""
    s = Scheduler(BlockAllocator(100, 4), max_batch=8, max_batch_tokens=16, max_prefill_tokens=4)
    s.add(make(0, 1))
    apply(s.schedule())
    s.add(make(1, 24))
    apply(s.schedule())
    return s


def test_the_prefill_budget_is_bounded_by_decodes_before_any_prompt_is_admitted() -> None:
    s = Scheduler(BlockAllocator(100, 4), max_batch=8, max_batch_tokens=16, max_prefill_tokens=4)
    s.add(make(0, 1))
    apply(s.schedule())
    for arrival in (1, 2):
        s.add(make(arrival, 4))
    plan = s.schedule()
    assert [(c.sequence.arrival, c.num_tokens) for c in plan.prefills] == [(1, 4)]
    assert [waiting.arrival for waiting in s.waiting] == [2]


def test_with_decodes_a_prompt_without_a_share_of_the_prefill_budget_waits() -> None:
    s = decoding_and_prefilling()
    for arrival in (2, 3):
        s.add(make(arrival, 2))
    plan = s.schedule()
    assert [(c.sequence.arrival, c.num_tokens) for c in plan.prefills] == [(1, 2), (2, 2)]
    assert [waiting.arrival for waiting in s.waiting] == [3]


def test_a_short_prompt_is_admitted_before_a_longer_one_that_would_get_no_tokens() -> None:
    s = decoding_and_prefilling()
    s.add(make(2, 40))
    s.add(make(3, 2))
    plan = s.schedule()
    assert [(c.sequence.arrival, c.num_tokens) for c in plan.prefills] == [(1, 2), (3, 2)]
    assert [waiting.arrival for waiting in s.waiting] == [2]


def test_a_batch_larger_than_the_token_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch"):
        scheduler(max_batch=9, max_batch_tokens=8)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.deep] * (seed >= 3)) for seed in range(8)])
def test_thousands_of_random_moves_leave_nothing_behind_and_starve_no_sequence(seed: int) -> None:
    rng = random.Random(seed)
    s = scheduler(blocks=12, block_size=4, max_batch=5, max_batch_tokens=9)
    alive: list[Sequence] = []
    finished = arrivals = 0
    for _ in range(800):
        if rng.random() < 0.4 and len(alive) < 12:
            prompt, more = rng.randrange(1, 24), rng.randrange(1, 20)
            assert s.could_ever_fit(prompt, more)
            alive.append(make(arrivals, prompt, rng.randrange(-1, 3), more))
            s.add(alive[-1])
            arrivals += 1
        if alive and rng.random() < 0.05:
            s.finish(alive.pop(rng.randrange(len(alive))), FinishReason.CANCELLED)
        plan = s.schedule()
        assert plan.chunks or not alive
        apply(plan)
        for sequence in [q for q in alive if q.generated >= q.request.sampling.max_tokens]:
            alive.remove(sequence)
            s.finish(sequence, FinishReason.LENGTH)
            finished += 1
        assert s.allocator.used == sum(len(q.block_table) for q in s.running)
    for sequence in alive:
        s.finish(sequence, FinishReason.CANCELLED)
    assert s.allocator.used == 0
    assert not s.has_work
    assert finished > 40


# --- shares -----------------------------------------------------------------------------------


def run(s: Scheduler) -> list[Sequence]:
    """One step; the sequences that ended in it."""
    plan = s.schedule()
    apply(plan)
    ended = [c.sequence for c in plan.chunks if c.sequence.generated >= c.sequence.request.sampling.max_tokens]
    for sequence in ended:
        s.finish(sequence, FinishReason.LENGTH)
    return ended


def flooded(*, blocks: int = 400, max_batch: int = 8) -> Scheduler:
    """Adapter 0 has filled the batch with answers that take a thousand steps, and has more waiting."""
    s = scheduler(blocks=blocks, max_batch=max_batch, max_batch_tokens=64)
    for arrival in range(2 * max_batch):
        s.add(make(arrival, 4, slot=0, max_tokens=1000))
    for _ in range(3):
        run(s)
    return s


def test_an_adapter_below_its_share_gets_rows_from_one_above_at_once() -> None:
    s = flooded()
    assert len(s.running) == 8
    for arrival in range(100, 106):
        s.add(make(arrival, 4, slot=1))
    plan = s.schedule()
    assert [c.sequence.arrival for c in plan.prefills] == [100, 101, 102, 103]  # half of the batch, and no more
    assert [victim.arrival for victim in plan.preempted] == [7, 6, 5, 4]
    apply(plan)
    assert s.schedule().preempted == ()


def test_a_preempted_sequence_continues_when_there_is_room_again_and_keeps_its_text() -> None:
    s = flooded()
    s.add(make(100, 4, slot=1, max_tokens=5))
    victim = s.schedule().preempted[0]
    text = list(victim.tokens)
    while victim.status is SequenceStatus.WAITING:
        run(s)
    assert victim.tokens[: len(text)] == text
    assert victim.cached_tokens == 0  # counted at the first admission only


def test_blocks_are_shared_like_rows() -> None:
    s = scheduler(blocks=20, block_size=4, max_batch=8, max_batch_tokens=64)
    for arrival in range(4):
        s.add(make(arrival, 14, slot=0, max_tokens=100))
    run(s)
    assert not s.allocator.can_allocate(6)
    s.add(make(100, 14, slot=1))
    plan = s.schedule()
    assert [c.sequence.arrival for c in plan.prefills] == [100]
    assert [victim.arrival for victim in plan.preempted] == [3]


def test_no_sequence_is_preempted_for_an_adapter_when_it_is_the_only_one_of_its_own() -> None:
    s = scheduler(blocks=20, block_size=4, max_batch=8, max_batch_tokens=64)
    s.add(make(0, 60, slot=0, max_tokens=10))
    run(s)
    s.add(make(100, 24, slot=1))
    assert s.schedule().preempted == ()


def test_one_adapter_alone_has_the_whole_batch_and_is_never_preempted_for_itself() -> None:
    s = flooded()
    for _ in range(50):
        assert s.schedule().preempted == ()
        run(s)
    assert len(s.running) == 8


def test_a_flooding_adapter_delays_the_answers_of_others_by_less_than_half() -> None:
    """Steps from arrival to end of every answer of seven adapters, without and with one that floods the batch."""

    def slowest(s: Scheduler) -> int:
        took, arrival = [], 1000
        for _ in range(40):
            begun: dict[int, int] = {}
            for slot in range(1, 8):
                arrival += 1
                s.add(make(arrival, 4, slot=slot, max_tokens=20))
                begun[arrival] = 0
            step = 0
            while begun:
                step += 1
                took += [step for sequence in run(s) if begun.pop(sequence.arrival, None) is not None]
        return sorted(took)[int(len(took) * 0.99)]

    quiet = slowest(scheduler(blocks=4000, max_batch=8, max_batch_tokens=64))
    flooding = slowest(flooded(blocks=4000))
    assert quiet == 20
    assert flooding <= 1.5 * quiet


# --- lent rows ---------------------------------------------------------------------------------


def measured(s: Scheduler, fixed_s: float, per_row_s: float) -> int:
    """One step that takes that time. Returns its number of rows."""
    plan = s.schedule()
    apply(plan)
    s.took(plan, fixed_s + per_row_s * len(plan.chunks))
    for sequence in [c.sequence for c in plan.chunks if c.sequence.generated >= 20 and c.sequence.slot]:
        s.finish(sequence, FinishReason.LENGTH)
    return len(plan.chunks)


def learned(fixed_s: float, per_row_s: float) -> Scheduler:
    """A batch of 16 that adapter 0 fills, and whose steps of different sizes were measured."""
    s = scheduler(blocks=4000, max_batch=16, max_batch_tokens=64)
    for arrival in range(32):
        s.add(make(arrival, 4, slot=0, max_tokens=10_000))
        for _ in range(3):
            measured(s, fixed_s, per_row_s)
    return s


def beside_others(s: Scheduler, fixed_s: float, per_row_s: float, steps: int) -> list[int]:
    """The rows of each step while seven other adapters always have one request."""
    rows, arrival = [], 1000
    for _ in range(steps):
        busy = {sequence.slot for sequence in (*s.running, *s.waiting)}
        for slot in set(range(1, 8)) - busy:
            arrival += 1
            s.add(make(arrival, 4, slot=slot, max_tokens=20))
        rows.append(measured(s, fixed_s, per_row_s))
    return rows


def test_rows_above_a_share_are_lent_only_while_they_lengthen_the_step_by_a_tenth() -> None:
    s = learned(fixed_s=0.05, per_row_s=0.005)
    rows = beside_others(s, 0.05, 0.005, 200)
    # 9 rows are wanted within the shares (2 of adapter 0): 95 ms; a tenth more are 104.5 ms, so 10 rows
    assert max(rows[10:]) == 10
    assert sum(rows[10:]) / len(rows[10:]) > 9


def test_rows_that_cost_nothing_are_all_lent() -> None:
    assert min(beside_others(learned(0.02, 0.0), 0.02, 0.0, 100)) == 16


def test_rows_are_lent_again_soon_after_the_others_are_gone() -> None:
    s = learned(0.02, 0.005)
    beside_others(s, 0.02, 0.005, 100)
    rows = [measured(s, 0.02, 0.005) for _ in range(80)]
    assert rows[-1] == 16


def test_a_sequence_is_not_preempted_again_and_again_between_the_requests_of_others() -> None:
    s = learned(0.02, 0.005)
    beside_others(s, 0.02, 0.005, 100)
    before = {sequence.arrival: sequence.preemptions for sequence in (*s.running, *s.waiting) if not sequence.slot}
    beside_others(s, 0.02, 0.005, 400)
    after = {sequence.arrival: sequence.preemptions for sequence in (*s.running, *s.waiting) if not sequence.slot}
    assert after == before


def test_steps_of_one_size_tell_nothing_about_the_cost_of_rows() -> None:
    cost = StepCost()
    for _ in range(100):
        cost.observe(16, 0.1)
    assert cost.rows_within(4, 1.2, 16) == 16
    for _ in range(100):
        cost.observe(4, 0.04)
    assert cost.rows_within(4, 1.25, 16) == 6
    for _ in range(5000):
        cost.observe(4, 0.04)  # the last line is kept
    assert cost.rows_within(4, 1.25, 16) == 6
