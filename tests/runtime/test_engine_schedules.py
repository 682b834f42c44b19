"""Random schedules: requests join, leave and are cancelled while adapters come and go and blocks run out. Each finished
greedy request equals its solo run, resident weights stay as they are, and nothing is left behind."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engine_kit import VOCAB, Collector, PeftWorld, greedy, peft_world, request, started, tiny_model

from lorapool_runtime.engine import SlotInUseError, TorchEngine
from lorapool_runtime.interface import BASE_SLOT, FinishReason

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONFIGS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    "c": {"r": 2, "lora_alpha": 8, "target_modules": ["down_proj", "o_proj"]},
}
SLOTS = 3
BLOCK_TOKENS = 4
BLOCK_BYTES = 2 * 2 * 2 * 16 * BLOCK_TOKENS * 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    return peft_world(tmp_path_factory.mktemp("world"), tiny_model("Qwen2"), CONFIGS)


class Walk:
    """A seeded walk over everything a server may ask of an engine."""

    def __init__(self, engine: TorchEngine, world: PeftWorld, seed: int) -> None:
        self.engine, self.world, self.rng, self.got = engine, world, random.Random(seed), Collector()
        self.names = [*world.adapters]
        self.slots: dict[int, tuple[str, str]] = {}
        self.asked: dict[str, tuple[str | None, list[int], int, int]] = {}
        # few prompts, so that the reference is computed once each
        self.prompts = [[self.rng.randrange(3, VOCAB) for _ in range(n)] for n in (1, 3, 8, 17, 26)]
        self.loads = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            move = self.rng.random()
            if move < 0.55:
                self.submit()
            elif move < 0.65:
                self.cancel()
            elif move < 0.8:
                self.load()
            elif move < 0.9:
                self.unload()
            else:
                for _ in range(self.rng.randrange(6)):
                    if not all(self.got.ended(i) for i in self.asked):
                        self.got.next()
        self.got.wait(self.asked)

    def submit(self) -> None:
        slot = self.rng.choice([BASE_SLOT, *self.slots])
        prompt = self.rng.choice(self.prompts)
        max_tokens = self.rng.choice([1, 5, 14])
        request_id = f"r{len(self.asked)}"
        name, salt = self.slots.get(slot, (None, "base"))
        self.asked[request_id] = (name, prompt, max_tokens, slot)
        self.engine.submit(request(request_id, prompt, greedy(max_tokens), slot=slot, salt=salt), self.got)

    def cancel(self) -> None:
        if self.asked:
            self.engine.cancel(self.rng.choice([*self.asked]))

    def load(self) -> None:
        slot, name = self.rng.randrange(SLOTS), self.rng.choice(self.names)
        if slot not in self.slots:
            self.engine.load(slot, self.engine.read_adapter(str(self.world.adapters[name]), max_rank=16)).result(10)
            self.loads += 1
            self.slots[slot] = (name, f"digest-{self.loads}")

    def unload(self) -> None:
        slot = self.rng.randrange(SLOTS)
        try:
            self.engine.unload(slot).result(10)
        except SlotInUseError:
            return
        self.slots.pop(slot, None)

    def checked(self) -> int:
        """How many finished; each of them must equal its solo run."""
        finished = 0
        for request_id, (name, prompt, max_tokens, _) in self.asked.items():
            last, tokens = self.got.last(request_id), self.got.tokens(request_id)
            solo = self.world.answer(name, prompt, 14)[:max_tokens]
            assert last.finish_reason in (FinishReason.LENGTH, FinishReason.CANCELLED), last
            assert tokens == solo[: len(tokens)], (request_id, name)
            assert last.completion_tokens == len(tokens)
            if last.finish_reason is FinishReason.LENGTH:
                assert len(tokens) == max_tokens
                finished += 1
        return finished


@pytest.mark.parametrize("seed", range(4))
def test_every_finished_request_equals_its_solo_run_and_nothing_is_left(world: PeftWorld, seed: int) -> None:
    engine = started(
        world.base,
        slots=SLOTS,
        max_batch=5,
        max_batch_tokens=12,
        kv_block_tokens=BLOCK_TOKENS,
        kv_bytes=19 * BLOCK_BYTES,  # 18 blocks: two long requests do not fit together
    )
    try:
        walk = Walk(engine, world, seed)
        walk.run(120)
        assert walk.checked() > 30
        stats = engine.observe()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        for slot in list(walk.slots):
            assert engine.unload(slot).result(10) > 0
        assert engine.observe().device_bytes == engine.facts.weight_bytes + 19 * BLOCK_BYTES
    finally:
        engine.stop(10)


def test_two_thousand_requests_with_cancellations_leave_no_block(world: PeftWorld) -> None:
    engine = started(world.base, max_batch=24, max_batch_tokens=128, kv_block_tokens=4, kv_bytes=60 * BLOCK_BYTES)
    got, rng = Collector(), random.Random(9)
    try:
        for i in range(2000):
            engine.submit(request(f"r{i}", [3 + i % 300] * rng.randrange(1, 12), greedy(rng.randrange(1, 4))), got)
            if rng.random() < 0.3:
                engine.cancel(f"r{rng.randrange(i + 1)}")
        got.wait([f"r{i}" for i in range(2000)], timeout_s=60)
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
