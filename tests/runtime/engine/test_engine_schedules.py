"""Random schedules: requests join, leave and are cancelled while adapters come and go and blocks run out. Each finished
greedy request equals its solo run, resident weights stay as they are, and nothing is left behind."""

from __future__ import annotations

import gc
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_kit import VOCAB, Collector, PeftWorld, greedy, peft_world, request, started, tiny_model

from lorapool_runtime.engines.interface import BASE_SLOT, FinishReason, SamplingParams
from lorapool_runtime.engines.torch.engine import SlotInUseError, TorchEngine

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONFIGS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    "c": {"r": 2, "lora_alpha": 8, "target_modules": ["down_proj", "o_proj"]},
}
SLOTS = 3
LONGEST = 14
BLOCK_TOKENS = 4
BLOCK_BYTES = 2 * 2 * 2 * 16 * BLOCK_TOKENS * 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    return peft_world(tmp_path_factory.mktemp("world"), tiny_model("Qwen2"), CONFIGS)


class Solo:
    """A separate engine without a prefix cache that runs one request at a time, as the reference."""

    def __init__(self, world: PeftWorld) -> None:
        self.engine = started(world.base, prefix_cache=False)
        self.slots: dict[str | None, int] = {None: BASE_SLOT}
        for slot, (name, folder) in enumerate(world.adapters.items()):
            self.engine.load(slot, self.engine.read_adapter(str(folder), max_rank=16)).result(60)
            self.slots[name] = slot
        self._answers: dict[tuple[str | None, tuple[int, ...], int | None], list[int]] = {}

    def answer(self, adapter: str | None, prompt: Sequence[int], seed: int | None) -> list[int]:
        key = (adapter, tuple(prompt), seed)
        if key not in self._answers:
            got = Collector()
            self.engine.submit(request("solo", prompt, said(LONGEST, seed), slot=self.slots[adapter]), got)
            got.wait(["solo"])
            self._answers[key] = got.tokens("solo")
        return self._answers[key]


@pytest.fixture(scope="module")
def solo(world: PeftWorld) -> Iterator[Solo]:
    made = Solo(world)
    yield made
    made.engine.stop(10)


def said(max_tokens: int, seed: int | None) -> SamplingParams:
    """Greedy without a seed."""
    return greedy(max_tokens) if seed is None else greedy(max_tokens, temperature=0.9, top_p=0.95, seed=seed)


def digest_of(adapter: str | None) -> str:
    return "base" if adapter is None else f"sha256:{adapter}"


_STEM = [random.Random(1).randrange(3, VOCAB) for _ in range(26)]
PROMPTS = [
    [*_STEM[:shared], *range(10, 10 + own)]
    for shared, own in ((0, 1), (0, 3), (8, 0), (8, 3), (17, 0), (17, 5), (26, 0))
]
"""Few, so that the reference answers each only once; several have a common prefix."""


@dataclass(frozen=True)
class Asked:
    adapter: str | None
    prompt: list[int]
    max_tokens: int
    seed: int | None


class Walk:
    """A seeded random sequence of all calls to an engine: two names whose adapters are replaced, and the base."""

    def __init__(self, engine: TorchEngine, world: PeftWorld, seed: int, *, first: int = 0) -> None:
        self.engine, self.world, self.rng, self.got = engine, world, random.Random(seed), Collector()
        self.first = first
        self.slots: dict[int, str] = {}
        """The adapter in each slot."""
        self.sums: dict[int, bytes] = {}
        self.serving: dict[str, int] = {}
        """The slot that each name's requests go to; its previous slot drains."""
        self.asked: dict[str, Asked] = {}
        self.rollovers = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            move = self.rng.random()
            if move < 0.55:
                self.submit()
            elif move < 0.63:
                self.cancel()
            elif move < 0.8:
                self.roll_over(self.rng.choice(["red", "blue"]))
            elif move < 0.9:
                self.unload(self.rng.randrange(SLOTS))
            else:
                for _ in range(self.rng.randrange(6)):
                    if not all(self.got.ended(i) for i in self.asked):
                        self.got.next()
        self.got.wait(self.asked)

    def submit(self) -> None:
        slot = self.rng.choice([BASE_SLOT, *self.serving.values()])
        adapter = self.slots.get(slot)
        asked = Asked(adapter, self.rng.choice(PROMPTS), self.rng.choice([1, 5, LONGEST]), self.rng.choice([None, 3]))
        request_id = f"r{self.first + len(self.asked)}"
        self.asked[request_id] = asked
        sampling = said(asked.max_tokens, asked.seed)
        self.engine.submit(request(request_id, asked.prompt, sampling, slot=slot, salt=digest_of(adapter)), self.got)

    def cancel(self) -> None:
        if self.asked:
            self.engine.cancel(self.rng.choice([*self.asked]))

    def roll_over(self, name: str) -> None:
        """Loads another adapter for the name into a second slot, while the first one still answers."""
        empty = [slot for slot in range(SLOTS) if slot not in self.slots]
        if not empty:
            return
        slot, adapter = self.rng.choice(empty), self.rng.choice([*self.world.adapters])
        self.engine.load(slot, self.engine.read_adapter(str(self.world.adapters[adapter]), max_rank=16)).result(60)
        self.slots[slot] = adapter
        self.sums[slot] = weights_in(self.engine, slot)
        self.rollovers += name in self.serving
        self.serving[name] = slot

    def unload(self, slot: int) -> None:
        try:
            self.engine.unload(slot).result(60)
        except SlotInUseError:
            return
        self.slots.pop(slot, None)
        self.sums.pop(slot, None)
        self.serving = {name: at for name, at in self.serving.items() if at != slot}

    def checked(self, solo: Solo) -> int:
        """The number of finished requests, each of which must equal its reference run."""
        finished = 0
        for request_id, asked in self.asked.items():
            last, tokens = self.got.last(request_id), self.got.tokens(request_id)
            alone = solo.answer(asked.adapter, asked.prompt, asked.seed)
            assert last.finish_reason in (FinishReason.LENGTH, FinishReason.CANCELLED), last
            assert tokens == alone[: len(tokens)], (request_id, asked)
            assert last.completion_tokens == len(tokens)
            if last.finish_reason is FinishReason.LENGTH:
                assert len(tokens) == asked.max_tokens
                finished += 1
        return finished


def weights_in(engine: TorchEngine, slot: int) -> bytes:
    """A checksum of a slot's weights, taken between two steps."""

    def look() -> bytes:
        assert engine._core is not None
        held = engine._core.slots._states[slot].contents.placement.buffer
        return hashlib.sha256(held.view(torch.uint8).numpy().tobytes()).digest()

    return engine._run_on_engine_thread(look).result(60)


def tensors(engine: TorchEngine) -> int:
    """The number of tensors in the process, after a last step that is always the same."""
    got = Collector()
    engine.submit(request("last", [5], greedy(1)), got)
    got.wait(["last"])

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    return engine._run_on_engine_thread(count).result(60)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.deep] * (seed >= 2)) for seed in range(6)])
def test_every_finished_request_equals_its_reference_run_and_nothing_is_left(
    world: PeftWorld, solo: Solo, seed: int
) -> None:
    engine = started(
        world.base,
        slots=SLOTS,
        max_batch=5,
        max_batch_tokens=12,
        max_prefill_tokens=[3, 12][seed % 2],
        kv_block_tokens=BLOCK_TOKENS,
        kv_bytes=19 * BLOCK_BYTES,  # 18 blocks: two long requests do not fit together
    )
    try:
        warm = Walk(engine, world, seed + 1000)
        warm.run(40)
        for slot in list(warm.slots):
            warm.unload(slot)
        before = tensors(engine)
        walk = Walk(engine, world, seed, first=len(warm.asked))
        walk.run(120)
        assert {slot: weights_in(engine, slot) for slot in walk.sums} == walk.sums
        assert walk.rollovers > 0
        stats = engine.observe()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert stats.preemptions > 0
        assert stats.prefix_hit_tokens > 100
        for slot in list(walk.slots):
            assert engine.unload(slot).result(60) > 0
        assert engine.observe().device_bytes == engine.facts.weight_bytes + 19 * BLOCK_BYTES
        assert tensors(engine) <= before
        assert walk.checked(solo) > 30
    finally:
        engine.stop(10)


def test_thousands_of_requests_with_cancellations_leave_no_block_and_no_tensor(
    world: PeftWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole engine except for the model, whose logits are random."""
    engine = started(world.base, max_batch=24, max_batch_tokens=128, kv_block_tokens=4, kv_bytes=60 * BLOCK_BYTES)
    core, rng = engine._core, random.Random(9)
    assert core is not None
    logits = torch.eye(256, VOCAB)
    monkeypatch.setattr(core.runner, "run", lambda plan: logits[: sum(len(c.logit_rows) for c in plan.chunks)])
    engine.load(0, engine.read_adapter(str(world.adapters["a"]), max_rank=16)).result(60)

    def thousand(first: int) -> None:
        got, ids = Collector(), [f"r{first + i}" for i in range(1000)]
        for n, request_id in enumerate(ids):
            prompt = [3 + rng.randrange(4)] * rng.randrange(1, 30)
            slot = rng.choice([BASE_SLOT, 0])
            engine.submit(request(request_id, prompt, greedy(rng.randrange(1, 6)), slot=slot), got)
            if rng.random() < 0.3:
                engine.cancel(ids[rng.randrange(n + 1)])
        got.wait(ids)
        assert all(sum(o.finish_reason is not None for o in outputs) == 1 for outputs in got.outputs.values())

    try:
        thousand(0)
        before = tensors(engine)
        for turn in range(1, 3):
            thousand(turn * 1000)
        stats = engine.observe()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert core.scheduler.allocator.free == core.scheduler.allocator.total
        assert (core._sequences, engine._sinks) == ({}, {})
        assert stats.prefix_hit_tokens > 0
        assert engine.unload(0).result(60) > 0
        assert engine.observe().device_bytes == engine.facts.weight_bytes + 60 * BLOCK_BYTES
        assert tensors(engine) <= before
    finally:
        engine.stop(10)


def test_hundreds_of_requests_through_the_model_leave_no_block(world: PeftWorld) -> None:
    engine = started(world.base, max_batch=24, max_batch_tokens=128, kv_block_tokens=4, kv_bytes=60 * BLOCK_BYTES)
    got, rng = Collector(), random.Random(9)
    try:
        for i in range(300):
            engine.submit(request(f"r{i}", [3 + i % 300] * rng.randrange(1, 12), greedy(rng.randrange(1, 4))), got)
            if rng.random() < 0.3:
                engine.cancel(f"r{rng.randrange(i + 1)}")
        got.wait([f"r{i}" for i in range(300)], timeout_s=60)
        assert all(sum(o.finish_reason is not None for o in outputs) == 1 for outputs in got.outputs.values())
        assert engine.observe().kv_blocks_used == 0
    finally:
        engine.stop(10)


def test_preempted_requests_give_the_same_text(world: PeftWorld, tmp_path: Path) -> None:
    engine, got = started(world.base, kv_block_tokens=4, kv_bytes=14 * BLOCK_BYTES, max_batch_tokens=64), Collector()
    prompts = [[7 + i] * 3 for i in range(4)]  # each grows to 11 blocks; 13 are there
    try:
        for i, prompt in enumerate(prompts):
            engine.submit(request(f"r{i}", prompt, greedy(40)), got)
        got.wait([f"r{i}" for i in range(4)])
        for i, prompt in enumerate(prompts):
            assert got.tokens(f"r{i}") == world.answer(None, prompt, 40)
        assert engine.observe().steps > 60  # they could not all run at once
    finally:
        engine.stop(10)
