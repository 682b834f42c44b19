"""What the prefix cache may give to whom, without a model: a place of a block remembers what it was computed from."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from lorapool_runtime.engines.interface import BASE_SLOT, FinishReason, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch.scheduling.blocks import BlockAllocator
from lorapool_runtime.engines.torch.scheduling.prefix import next_key, root_key
from lorapool_runtime.engines.torch.scheduling.scheduler import Scheduler, StepPlan, split_prefill_budget
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence

SIZE = 4


def make(
    arrival: int, prompt: list[int], *, salt: str = "base", slot: int = BASE_SLOT, max_tokens: int = 8
) -> Sequence:
    request = GenerationRequest(f"r{arrival}", tuple(prompt), slot, salt, SamplingParams(max_tokens=max_tokens))
    return Sequence(request, arrival=arrival, seed=0)


Place = tuple[str, int, tuple[int, ...]]
"""What keys and values depend on: the weights, whether they are the base's, and every token up to theirs."""


@dataclass
class World:
    """A scheduler and the memory behind it, which knows what each place was computed from and by whom."""

    blocks: int = 40
    max_batch: int = 6
    max_batch_tokens: int = 24
    max_prefill_tokens: int | None = None
    prefix_cache: bool = True
    contents: dict[tuple[int, int], tuple[Place, Sequence]] = field(default_factory=dict)
    computed_tokens: int = 0
    failed: list[Sequence] = field(default_factory=list)
    taken_in: dict[Sequence, int] = field(default_factory=dict)
    """How many had failed before each running sequence was admitted: blocks of those must not be given to it."""

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            BlockAllocator(self.blocks, SIZE),
            max_batch=self.max_batch,
            max_batch_tokens=self.max_batch_tokens,
            max_prefill_tokens=self.max_prefill_tokens,
            prefix_cache=self.prefix_cache,
        )
        self.allocator = self.scheduler.allocator

    def step(self) -> StepPlan:
        """What the engine does with a plan. The next token depends on all before it, as a model's does."""
        plan = self.scheduler.schedule()
        running = self.scheduler.running
        self.taken_in = {s: self.taken_in.get(s, len(self.failed)) for s in running if s not in plan.preempted}
        for block in plan.fresh_blocks:
            for offset in range(SIZE):
                self.contents.pop((block, offset), None)
        for chunk in plan.chunks:
            for position in range(chunk.start):
                place, writer = self.contents[_at(chunk.sequence, position)]
                assert place == _place(chunk.sequence, position), "read what was computed from something else"
                assert writer not in self.failed[: self.taken_in[chunk.sequence]]
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                self.contents[_at(chunk.sequence, position)] = (_place(chunk.sequence, position), chunk.sequence)
            self.computed_tokens += chunk.num_tokens
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        for chunk in plan.chunks:
            chunk.sequence.advance(chunk.num_tokens)
        for block, key in self.scheduler.completed(plan):
            self.allocator.register(block, key)
        for sequence in sampling:
            sequence.append(sum(sequence.tokens) % 3)
        return plan

    def run(self, sequences: list[Sequence]) -> None:
        """Until all of them are done."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        while open_ones := [s for s in sequences if s.finish_reason is None]:
            self.step()
            for sequence in open_ones:
                if sequence.generated >= sequence.request.sampling.max_tokens:
                    self.scheduler.finish(sequence, FinishReason.LENGTH)


def _at(sequence: Sequence, position: int) -> tuple[int, int]:
    return sequence.block_table[position // SIZE], position % SIZE


def _place(sequence: Sequence, position: int) -> Place:
    return sequence.request.cache_salt, min(sequence.slot, 0), tuple(sequence.tokens[: position + 1])


# --- keys ---


def test_a_key_covers_the_weights_and_every_token_before() -> None:
    def key(salt: str, *blocks: list[int], scope: str = "", is_base: bool = False) -> bytes:
        parent = root_key(salt, scope, is_base=is_base)
        for tokens in blocks:
            parent = next_key(parent, tokens)
        return parent

    keys = [
        key("sha256:a", [1, 2], [3, 4]),
        key("sha256:b", [1, 2], [3, 4]),
        key("sha256:a", [1, 9], [3, 4]),
        key("sha256:a", [3, 4], [1, 2]),
        key("sha256:a", [3, 4]),
        key("base", [1, 2], [3, 4], is_base=True),
        key("base", [1, 2], [3, 4]),  # an adapter that says it were the base
        key("sha256:a", [1, 2], [3, 4], scope="one"),
        key("sha256:a", [1, 2], [3, 4], scope="two"),
        key("sha256:ao", [1, 2], [3, 4], scope="ne"),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(k) == 32 for k in keys)
    assert key("sha256:a", [1, 2], scope="one") == key("sha256:a", [1, 2], scope="one")


# --- who holds what ---


def test_a_kept_block_is_found_until_nothing_else_is_free() -> None:
    allocator = BlockAllocator(3, SIZE)
    first, second = allocator.allocate(2)
    allocator.register(first, b"1")
    allocator.register(second, b"2")
    allocator.release([first, second])
    assert (allocator.free, allocator.used) == (3, 0)
    assert allocator.find([b"1", b"2"]) == [first, second]
    assert allocator.allocate(1) == [3]  # the blank one goes first
    assert allocator.allocate(1) == [second]  # then, of a chain, its end
    assert allocator.find([b"1", b"2"]) == [first]


def test_the_block_unused_longest_is_evicted_first() -> None:
    allocator = BlockAllocator(3, SIZE)
    blocks = allocator.allocate(3)
    for block in blocks:
        allocator.register(block, bytes([block]))
        allocator.release([block])
    allocator.share([blocks[0]])  # used again
    allocator.release([blocks[0]])
    assert allocator.allocate(2) == blocks[1:]


def test_a_shared_block_counts_once_and_is_free_when_its_last_holder_leaves() -> None:
    allocator = BlockAllocator(2, SIZE)
    [block] = allocator.allocate(1)
    allocator.register(block, b"k")
    allocator.share([block])
    assert allocator.used == 1
    allocator.release([block])
    assert allocator.used == 1
    allocator.release([block])
    assert allocator.used == 0
    with pytest.raises(ValueError, match="not held"):
        allocator.release([block])


def test_sharing_a_cached_block_takes_it_from_the_free_ones() -> None:
    allocator = BlockAllocator(2, SIZE)
    [block] = allocator.allocate(1)
    allocator.register(block, b"k")
    allocator.release([block])
    assert allocator.can_allocate(2)
    assert allocator.can_allocate(1, once_shared=[block])
    assert not allocator.can_allocate(2, once_shared=[block])


def test_a_forgotten_block_is_not_found_and_stays_with_its_holders() -> None:
    allocator = BlockAllocator(2, SIZE)
    held, kept = allocator.allocate(2)
    allocator.register(held, b"held")
    allocator.register(kept, b"kept")
    allocator.release([kept])
    allocator.forget([held, kept])
    assert allocator.find([b"held"]) == allocator.find([b"kept"]) == []
    assert allocator.allocate(1) == [kept]
    allocator.release([held, kept])
    assert (allocator.free, allocator.registered) == (2, 0)


def test_a_key_stays_with_the_block_that_had_it_first() -> None:
    allocator = BlockAllocator(2, SIZE)
    first, second = allocator.allocate(2)
    allocator.register(first, b"k")
    allocator.register(second, b"k")
    assert allocator.find([b"k"]) == [first]
    allocator.release([second])
    assert allocator.find([b"k"]) == [first]


def test_what_was_never_registered_cannot_be_shared() -> None:
    allocator = BlockAllocator(2, SIZE)
    with pytest.raises(ValueError, match="not registered"):
        allocator.share(allocator.allocate(1))


# --- who finds what ---


def test_a_second_prompt_computes_only_what_the_first_did_not() -> None:
    world, prompt = World(), list(range(100, 117))  # four full blocks and one token
    world.run([make(0, prompt)])
    again, longer = make(1, prompt), make(2, [*prompt[:10], 7, 7])
    world.run([again])
    world.run([longer])
    assert again.cached_tokens == 16
    assert longer.cached_tokens == 8
    assert (world.scheduler.queried_tokens, world.scheduler.hit_tokens) == (17 + 17 + 12, 24)


def test_a_step_completes_only_the_blocks_that_it_filled_itself() -> None:
    s = Scheduler(BlockAllocator(9, SIZE), max_batch=2, max_batch_tokens=2 * SIZE + 1)
    sequence = make(0, list(range(100, 100 + 4 * SIZE)))
    s.add(sequence)
    completed = []
    for _ in range(2):
        plan = s.schedule()
        completed.append([block for block, _ in s.completed(plan)])
        for chunk in plan.chunks:
            chunk.sequence.advance(chunk.num_tokens)
    assert completed == [sequence.block_table[:2], sequence.block_table[2:4]]


def test_a_prompt_counts_for_its_share_of_a_step_without_its_cached_blocks() -> None:
    world, prompt = World(max_prefill_tokens=4), list(range(100, 124))
    world.run([make(0, prompt)])
    decoding = make(1, [7])
    world.scheduler.add(decoding)
    world.step()
    world.scheduler.add(make(2, list(range(200, 214))))
    world.scheduler.add(make(3, [*prompt[:20], 5, 6]))  # only two tokens are not cached: shorter than the oldest
    plan = world.step()
    assert [(c.sequence.arrival, c.num_tokens) for c in plan.prefills] == [(2, 2), (3, 2)]


def test_a_prompt_with_requested_log_probabilities_uses_no_cached_block() -> None:
    world, prompt = World(), list(range(100, 117))
    world.run([make(0, prompt)])
    scored = make(1, prompt)
    scored.request = replace(scored.request, prompt_logprobs=0)
    world.scheduler.add(scored)
    [chunk] = world.scheduler.schedule().prefills
    assert (chunk.start, chunk.num_tokens) == (0, 17)


def test_a_prompt_waits_for_a_block_that_is_half_computed_for_another() -> None:
    world, prompt = World(max_batch_tokens=6), list(range(100, 117))
    world.scheduler.add(make(0, prompt))
    world.step()  # one block and a half
    world.scheduler.add(make(1, prompt[:9]))  # shorter than what is left of the first, so it would get tokens
    plan = world.step()
    assert [c.sequence.arrival for c in plan.chunks] == [0]


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    world, prompt = World(), list(range(100, 116))  # exactly four blocks
    world.run([make(0, prompt)])
    again = make(1, prompt)
    world.run([again])
    assert again.cached_tokens == 12


def test_a_conversation_goes_on_from_the_answer_it_got() -> None:
    world = World()
    first = make(0, list(range(100, 110)), max_tokens=9)
    world.run([first])
    second = make(1, [*first.tokens, 50, 51, 52])
    world.run([second])
    assert second.cached_tokens == 16  # of the 18 that were computed


@pytest.mark.parametrize(
    ("salt", "slot"), [("sha256:b", 0), ("sha256:b", 3), ("base", BASE_SLOT), ("sha256:a", BASE_SLOT)]
)
def test_other_weights_find_nothing(salt: str, slot: int) -> None:
    world, prompt = World(), list(range(100, 117))
    world.run([make(0, prompt, salt="sha256:a", slot=0)])
    other = make(1, prompt, salt=salt, slot=slot)
    world.run([other])
    assert other.cached_tokens == 0


def test_the_same_weights_in_another_slot_find_their_own() -> None:
    world, prompt = World(), list(range(100, 117))
    world.run([make(0, prompt, salt="sha256:a", slot=0)])
    moved = make(1, prompt, salt="sha256:a", slot=5)
    world.run([moved])
    assert moved.cached_tokens == 16


def test_prompts_that_arrive_together_compute_their_common_beginning_once() -> None:
    world = World(max_batch_tokens=200)
    common = list(range(100, 132))
    together = [make(i, [*common, 200 + i, 1]) for i in range(5)]
    world.run(together)
    assert [s.cached_tokens for s in together] == [0, 32, 32, 32, 32]
    assert world.computed_tokens == 34 + 4 * 2 + 5 * 7  # the last token generated is never computed


def test_waiting_for_anothers_prompt_delays_no_other() -> None:
    world = World(max_batch_tokens=8)
    leader, follower, other = make(0, list(range(40))), make(1, list(range(40))), make(2, [90, 91])
    for sequence in (leader, follower, other):
        world.scheduler.add(sequence)
    plan = world.step()
    assert {c.sequence for c in plan.chunks} == {leader, other}
    assert follower in world.scheduler.waiting


def test_a_failed_request_leaves_nothing_to_be_found() -> None:
    world, prompt = World(), list(range(100, 117))
    sick = make(0, prompt)
    world.scheduler.add(sick)
    world.step()
    assert world.allocator.registered == 4
    world.scheduler.finish(sick, FinishReason.ERROR)
    assert (world.allocator.registered, world.allocator.used) == (0, 0)
    healthy = make(1, prompt)
    world.run([healthy])
    assert healthy.cached_tokens == 0


def test_a_cancelled_prompt_leaves_what_was_computed_of_it() -> None:
    world, prompt = World(max_batch_tokens=10), list(range(100, 117))
    half = make(0, prompt)
    world.scheduler.add(half)
    world.step()
    world.scheduler.finish(half, FinishReason.CANCELLED)
    again = make(1, prompt)
    world.run([again])
    assert again.cached_tokens == 8  # ten tokens were computed: two blocks are full


def test_switched_off_nothing_is_registered_and_nothing_is_found() -> None:
    world, prompt = World(prefix_cache=False), list(range(100, 117))
    world.run([make(0, prompt)])
    again = make(1, prompt)
    world.run([again])
    assert (again.cached_tokens, world.scheduler.queried_tokens, world.allocator.registered) == (0, 0, 0)


def test_the_preempted_reuse_blocks_that_are_not_overwritten_and_it_is_not_counted_as_cached() -> None:
    world = World(blocks=8, max_batch_tokens=64)
    old, young = make(0, list(range(100, 112)), max_tokens=12), make(1, list(range(200, 208)), max_tokens=12)
    world.run([old, young])
    assert young.preemptions == 1
    assert (old.cached_tokens, young.cached_tokens) == (0, 0)
    alone = 12 + 11 + 8 + 11
    assert world.computed_tokens < alone + len(young.tokens)  # less than a whole second time


def test_blocks_shared_count_once_at_admission() -> None:
    common = list(range(100, 116))
    world = World(blocks=10, max_batch_tokens=64)
    world.run([make(9, [*common, 1], max_tokens=1)])
    many = [make(10 + i, [*common, 50 + i], max_tokens=2) for i in range(3)]
    for sequence in many:
        world.scheduler.add(sequence)
    world.step()
    assert len(world.scheduler.running) == 3  # 3 * 5 blocks if each had its own; 10 are there
    assert world.allocator.used == 4 + 3


# --- how a step is shared ---


@pytest.mark.parametrize(
    ("left", "budget", "given"),
    [
        ([], 8, []),
        ([100], 8, [8]),
        ([100, 3], 8, [5, 3]),
        ([100, 30], 8, [4, 4]),
        ([100, 30, 2], 8, [4, 2, 2]),
        ([100, 100], 8, [8, 0]),
        ([2, 100], 8, [2, 6]),
        ([6, 5, 4], 8, [4, 0, 4]),
        ([100, 30], 1, [1, 0]),
        ([5, 5], 0, [0, 0]),
    ],
)
def test_half_of_a_step_is_the_oldest_prompts_and_half_goes_to_shorter_ones_first(
    left: list[int], budget: int, given: list[int]
) -> None:
    assert split_prefill_budget(left, budget) == given


def test_the_longest_prefill_between_two_decode_steps_is_bounded() -> None:
    world = World(blocks=200, max_batch_tokens=64, max_prefill_tokens=12)
    talker = make(0, [1, 2, 3], max_tokens=60)
    world.scheduler.add(talker)
    world.step()
    for i in range(1, 5):  # 600 tokens of prompts arrive at once
        world.scheduler.add(make(i, [1000 * i + n for n in range(150)], max_tokens=1))
    prompts = []
    for _ in range(50):
        plan = world.step()
        assert talker in {c.sequence for c in plan.decodes}
        prompts.append(sum(c.num_tokens for c in plan.prefills))
    assert max(prompts) == 12
    assert sum(prompts) == 50 * 12  # and the prompts lose nothing of their share


def test_without_decodes_a_prompt_takes_the_whole_step() -> None:
    world = World(blocks=200, max_batch_tokens=64, max_prefill_tokens=12)
    world.scheduler.add(make(0, list(range(100))))
    assert [c.num_tokens for c in world.step().prefills] == [64]


def test_a_short_prompt_is_not_held_up_by_a_long_one_nor_the_long_one_by_many_short_ones() -> None:
    world = World(blocks=400, max_batch=8, max_batch_tokens=16)
    long = make(0, [9000 + n for n in range(160)], max_tokens=1)
    world.scheduler.add(long)
    world.step()
    shorts: list[Sequence] = []
    steps = 0
    while not long.generated:
        shorts.append(make(1 + steps, [100 * steps, 1, 2, 3], max_tokens=1))
        world.scheduler.add(shorts[-1])
        world.step()
        assert shorts[-1].generated == 1  # within the step it came in
        world.scheduler.finish(shorts[-1], FinishReason.LENGTH)
        steps += 1
    assert steps <= -(-144 // 8)  # half of every step at least


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.deep] * (seed >= 3)) for seed in range(12)])
def test_random_schedules_never_read_what_other_weights_tokens_or_failures_left(seed: int) -> None:
    rng = random.Random(seed)
    world = World(
        blocks=16, max_batch=5, max_batch_tokens=rng.choice([5, 9, 24]), max_prefill_tokens=rng.choice([3, 99])
    )
    weights = [("base", BASE_SLOT), ("sha256:a", 0), ("sha256:b", 1), ("sha256:a", 2), ("base", 3)]
    stems = [[rng.randrange(3) for _ in range(20)] for _ in range(3)]  # many prompts begin alike
    alive: list[Sequence] = []
    arrivals = finished = cached = 0
    for _ in range(1500):
        if rng.random() < 0.45 and len(alive) < 12:
            salt, slot = rng.choice(weights)
            prompt = rng.choice(stems)[: rng.randrange(1, 21)] + [rng.randrange(3) for _ in range(rng.randrange(4))]
            alive.append(make(arrivals, prompt, salt=salt, slot=slot, max_tokens=rng.randrange(1, 20)))
            world.scheduler.add(alive[-1])
            arrivals += 1
        if alive and rng.random() < 0.08:
            gone = alive.pop(rng.randrange(len(alive)))
            world.scheduler.finish(gone, rng.choice([FinishReason.CANCELLED, FinishReason.ERROR]))
            world.failed += [gone] if gone.finish_reason is FinishReason.ERROR else []
        plan = world.step()
        assert plan.chunks or not alive
        for sequence in [s for s in alive if s.generated >= s.request.sampling.max_tokens]:
            alive.remove(sequence)
            world.scheduler.finish(sequence, FinishReason.LENGTH)
            finished += 1
            cached += sequence.cached_tokens
        assert world.allocator.used == len({b for s in world.scheduler.running for b in s.block_table})
    for sequence in alive:
        world.scheduler.finish(sequence, FinishReason.CANCELLED)
    assert (world.allocator.used, world.allocator.free) == (0, 16)
    assert not world.scheduler.has_work
    assert finished > 100
    assert cached > 400
