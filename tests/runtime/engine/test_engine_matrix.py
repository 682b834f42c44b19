"""Every architecture with every kind of adapter in one batch gives, token for token, what peft gives one by one."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_kit import VOCAB, Collector, greedy, request, started
from matrix_kit import ARCHITECTURES, World, matrix_world

from lorapool_artifacts.checks.adapter_config import AdapterConfig
from lorapool_artifacts.inspect import base_files_from_folder, inspect_adapter_folder
from lorapool_artifacts.loaded_base import facts_of
from lorapool_artifacts.settings import AdapterLimits
from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.engine import TorchEngine

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SLOTS = 5
"""Fewer than the kinds of adapters, so that each is evicted and loaded again into another slot."""
CORNERS = ("Llama", "Gemma2", "Qwen3Moe")
"""The plain architecture, windows with soft caps, a mixture; all run chunked with `make test-deep`."""
PREFIX = [11, 45, 7, 203, 98, 150, 31, 64, 5, 277, 19, 88]
"""The beginning of many prompts of all adapters and the base, longer than every sliding window and two KV blocks."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return matrix_world(tmp_path_factory.mktemp(request.param), request.param)


def test_all_kinds_in_one_changing_batch_equal_peft_one_by_one(world: World) -> None:
    equal_peft(world, seed=64, max_batch_tokens=64, prefix_cache=True)


# All architectures in the order of the fixture, so that both tests use one world.
@pytest.mark.parametrize(
    "world", [pytest.param(a, marks=[pytest.mark.deep] * (a not in CORNERS)) for a in ARCHITECTURES], indirect=True
)
def test_short_chunks_without_a_prefix_cache_equal_peft_one_by_one(world: World) -> None:
    equal_peft(world, seed=24, max_batch_tokens=24, prefix_cache=False)


def test_the_operator_accepts_from_the_headers_what_the_engine_runs(world: World) -> None:
    facts = facts_of(base_files_from_folder(world.base))
    assert facts is not None
    for name, folder in world.adapters.items():
        result = inspect_adapter_folder(folder, facts, AdapterLimits(max_rank=16)).compatibility
        assert result.ok, (name, result.message)


def test_the_adapters_of_all_kinds_differ_from_the_base_and_from_each_other(world: World) -> None:
    last = {name: world.logits(name, PREFIX)[-1] for name in (None, *world.adapters)}
    names = list(last)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert float((last[one] - last[other]).abs().max()) > 0.05, (one, other)


@pytest.mark.parametrize("world", ["Llama"], indirect=True)
def test_the_comparison_detects_a_scale_that_is_off_by_a_tenth(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    right = AdapterConfig.scaling_of
    monkeypatch.setattr(AdapterConfig, "scaling_of", lambda self, module: 1.1 * right(self, module))
    with pytest.raises(AssertionError, match="peft answers"):
        equal_peft(world, seed=0, prefix_cache=True)


def equal_peft(world: World, *, seed: int, **settings: Any) -> None:
    """Adapters come and go in shuffled order, each twice, while requests of the others and of the base run on."""
    rng, got = random.Random(seed), Collector()
    engine = started(world.base, slots=SLOTS, kv_block_tokens=4, **settings)
    try:
        asked = _run(engine, world, rng, got)
        got.wait(asked)
        for request_id, (adapter, prompt) in asked.items():
            answer = got.tokens(request_id)
            expected = world.choices(adapter, prompt, answer)
            assert answer == expected, f"{request_id} of {adapter}: {answer}, peft answers {expected} to {prompt}"
        assert (engine.observe().prefix_hit_tokens > 0) is settings["prefix_cache"]
        for slot in range(SLOTS):
            engine.unload(slot).result(10)
    finally:
        engine.stop(5)


Asked = dict[str, tuple[str | None, list[int]]]


def _run(engine: TorchEngine, world: World, rng: random.Random, got: Collector) -> Asked:
    order = [name for _ in range(2) for name in rng.sample(sorted(world.adapters), len(world.adapters))]
    asked: Asked = {}
    of_slot: dict[int, list[str]] = {}
    for turn, adapter in enumerate(order):
        slot = turn % SLOTS
        if slot in of_slot:
            got.wait(of_slot[slot])
            engine.unload(slot).result(10)
        engine.load(slot, engine.read_adapter(str(world.adapters[adapter]), max_rank=16)).result(10)
        of_slot[slot] = [
            _submit(engine, rng, got, asked, adapter, slot) for _ in range(2 if turn < len(order) // 2 else 1)
        ]
        if turn % 3 == 0:
            _submit(engine, rng, got, asked, None, BASE_SLOT)
        if turn % 4 == 3:
            got.next()  # some tokens come before the next ones join
    return asked


def _submit(
    engine: TorchEngine, rng: random.Random, got: Collector, asked: Asked, adapter: str | None, slot: int
) -> str:
    prompt = PREFIX[: rng.choice([0, 9, 12, 12])] + [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 16))]
    request_id = f"r{len(asked)}"
    asked[request_id] = (adapter, prompt)
    engine.submit(request(request_id, prompt, greedy(rng.randrange(3, 12)), slot=slot, salt=adapter or "base"), got)
    return request_id
