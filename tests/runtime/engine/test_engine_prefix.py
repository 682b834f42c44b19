"""The prefix cache in the whole engine: cached prompts give what a fresh engine computes, for the same weights only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import Collector, PeftWorld, greedy, peft_world, request, started, tiny_model

from lorapool_runtime.engines.interface import BASE_SLOT, FinishReason, GenerationRequest, TokenOutput
from lorapool_runtime.engines.torch.engine import TorchEngine
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.weights.reader import PackedAdapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PROMPT = tuple((7 * i) % 300 + 3 for i in range(39))
"""Nine full blocks of four tokens, and three tokens."""
WEIGHTS: dict[str, tuple[str | None, int, str]] = {
    "base": (None, BASE_SLOT, "base"),
    "translator@1": ("one", 0, "sha256:one"),
    "translator@2": ("two", 1, "sha256:two"),  # the same name, rolled over
    "other": ("three", 2, "sha256:three"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    configs = {
        "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "two": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "three": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    }
    return peft_world(tmp_path_factory.mktemp("world"), tiny_model("Llama"), configs)


def fresh(world: PeftWorld, **changes: Any) -> TorchEngine:
    engine = started(world.base, **{"kv_block_tokens": 4, "max_batch_tokens": 32} | changes)
    for name, slot, _ in WEIGHTS.values():
        if name is not None:
            load(engine, world, name, slot)
    return engine


def load(engine: TorchEngine, world: PeftWorld, name: str, slot: int, *, poison: bool = False) -> None:
    adapter = engine.read_adapter(str(world.adapters[name]), max_rank=16)
    assert isinstance(adapter, PackedAdapter)
    if poison:  # what the check at reading would have refused
        adapter.buffer[:] = np.nan
    engine.load(slot, adapter).result(10)


@pytest.fixture
def engine(world: PeftWorld) -> Iterator[TorchEngine]:
    made = fresh(world)
    yield made
    made.stop(10)


def run(engine: TorchEngine, asked: list[GenerationRequest]) -> Collector:
    got = Collector()
    for one in asked:
        engine.submit(one, got)
    got.wait([one.request_id for one in asked])
    return got


def submit_at_once(engine: TorchEngine, asked: list[GenerationRequest], got: Collector) -> None:
    """Submits all of them between the same two steps."""
    engine._run_on_engine_thread(lambda: [engine.submit(one, got) for one in asked]).result(10)


def ask(request_id: str, weights: str, *, max_tokens: int = 12, prompt: tuple[int, ...] = PROMPT) -> GenerationRequest:
    _, slot, salt = WEIGHTS[weights]
    return request(request_id, prompt, greedy(max_tokens, top_logprobs=2), slot=slot, salt=salt)


def summary(outputs: list[TokenOutput]) -> list[Any]:
    return [(o.token_id, o.logprob) for o in outputs]


def test_adapters_and_versions_of_one_name_share_a_prompt_and_nothing_else(
    engine: TorchEngine, world: PeftWorld
) -> None:
    for turn, cached in enumerate([0, 36, 36]):
        for weights, (name, _, _) in WEIGHTS.items():
            request_id = f"{weights} {turn}"
            got = run(engine, [ask(request_id, weights)])
            assert got.tokens(request_id) == world.answer(name, PROMPT, 12)
            assert {o.cached_tokens for o in got.outputs[request_id]} == {cached}, weights
    stats = engine.observe()
    assert stats.prefix_queried_tokens == 3 * len(WEIGHTS) * len(PROMPT)
    assert stats.prefix_hit_tokens == 2 * len(WEIGHTS) * 36


def test_a_cached_prompt_gives_what_a_fresh_engine_computes(engine: TorchEngine, world: PeftWorld) -> None:
    for turn in range(2):
        mixed = run(engine, [ask(f"{turn} {weights}", weights) for weights in WEIGHTS])
    for weights in WEIGHTS:
        alone = fresh(world, prefix_cache=False)
        try:
            solo = run(alone, [ask("solo", weights)])
        finally:
            alone.stop(10)
        assert mixed.last(f"1 {weights}").cached_tokens == 36
        assert solo.last("solo").cached_tokens == 0
        assert mixed.tokens(f"1 {weights}") == solo.tokens("solo")
        for here, there in zip(mixed.outputs[f"1 {weights}"], solo.outputs["solo"], strict=True):
            assert here.logprob is not None
            assert there.logprob is not None
            assert here.logprob.logprob == pytest.approx(there.logprob.logprob, abs=1e-4)


def test_a_reused_slot_finds_no_blocks_of_its_previous_adapter(engine: TorchEngine, world: PeftWorld) -> None:
    first = run(engine, [ask("first", "translator@1")])
    engine.unload(0).result(10)
    load(engine, world, "three", 0)
    other = run(engine, [replace(ask("other", "translator@1"), cache_salt="sha256:three")])
    engine.unload(0).result(10)
    load(engine, world, "one", 0)
    again = run(engine, [ask("again", "translator@1")])
    assert other.tokens("other") == world.answer("three", PROMPT, 12)
    assert (other.last("other").cached_tokens, again.last("again").cached_tokens) == (0, 36)  # kept under its digest
    assert again.tokens("again") == first.tokens("first") == world.answer("one", PROMPT, 12)


def test_an_adapter_with_the_salt_of_the_base_finds_no_blocks_of_the_base(
    engine: TorchEngine, world: PeftWorld
) -> None:
    run(engine, [ask("base", "base")])
    got = run(engine, [replace(ask("posing", "other"), cache_salt="base")])
    assert got.last("posing").cached_tokens == 0
    assert got.tokens("posing") == world.answer("three", PROMPT, 12)


def test_requests_of_two_scopes_share_no_blocks_also_while_both_compute(engine: TorchEngine, world: PeftWorld) -> None:
    both = run(engine, [replace(ask(f"{scope} first", "base"), cache_scope=scope) for scope in ("one", "two")])
    again = run(engine, [replace(ask(f"{scope} again", "base"), cache_scope=scope) for scope in ("one", "three", "")])
    assert [both.last(f"{scope} first").cached_tokens for scope in ("one", "two")] == [0, 0]
    assert [again.last(f"{scope} again").cached_tokens for scope in ("one", "three", "")] == [36, 0, 0]
    assert all(got == world.answer(None, PROMPT, 12) for got in (both.tokens("two first"), again.tokens("one again")))


def test_choices_of_one_prompt_compute_it_once(engine: TorchEngine, world: PeftWorld) -> None:
    got = run(engine, [ask(f"choice {i}", "translator@2") for i in range(4)])
    assert sorted(got.last(f"choice {i}").cached_tokens for i in range(4)) == [0, 36, 36, 36]
    assert all(got.tokens(f"choice {i}") == world.answer("two", PROMPT, 12) for i in range(4))


def test_a_prompt_with_requested_logprobs_is_computed_entirely(engine: TorchEngine) -> None:
    run(engine, [ask("before", "other")])
    got = run(engine, [replace(ask("scored", "other"), prompt_logprobs=0)])
    first = got.outputs["scored"][0]
    assert first.cached_tokens == 0
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == len(PROMPT) - 1


def test_switched_off_every_prompt_is_computed(world: PeftWorld) -> None:
    engine = fresh(world, prefix_cache=False)
    try:
        for i in range(2):
            assert run(engine, [ask(f"r{i}", "base")]).last(f"r{i}").cached_tokens == 0
        assert engine.observe().prefix_queried_tokens == 0
    finally:
        engine.stop(10)


def test_preempted_requests_find_their_prompt_in_the_cache_and_give_the_same_text(world: PeftWorld) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 4 * 4
    engine = fresh(world, kv_bytes=31 * block_bytes, max_batch_tokens=64)
    try:
        prompts = {f"r{i}": (*PROMPT[:16], 20 + i) for i in range(5)}  # 10 blocks each at the end, 4 of them shared
        got = run(engine, [ask(i, "other", max_tokens=24, prompt=prompt) for i, prompt in prompts.items()])
        for request_id, prompt in prompts.items():
            assert got.tokens(request_id) == world.answer("three", prompt, 24)
        stats = engine.observe()
        assert stats.preemptions > 0
        assert stats.kv_blocks_used == 0
    finally:
        engine.stop(10)


def test_rows_in_a_batch_with_a_nan_adapter_equal_those_with_a_healthy_one_bit_for_bit(world: PeftWorld) -> None:
    """Same batch, same shapes: the only difference is the contents of the NaN adapter's slot."""
    observed: list[dict[str, list[Any]]] = []
    for poison in (False, True):
        engine = fresh(world, max_batch=24, max_batch_tokens=600, max_prefill_tokens=600)
        try:
            engine.unload(1).result(10)
            load(engine, world, "two", 1, poison=poison)
            asked = [ask(f"{weights} {i}", weights) for i in range(3) for weights in ("base", "translator@1", "other")]
            sick = [ask(f"sick {i}", "translator@2", max_tokens=1, prompt=PROMPT[i:]) for i in range(3)]
            got = Collector()
            submit_at_once(engine, [*sick, *asked], got)
            got.wait([one.request_id for one in [*sick, *asked]])
            for one in sick:
                expected = FinishReason.ERROR if poison else FinishReason.LENGTH
                assert got.last(one.request_id).finish_reason is expected
            observed.append({one.request_id: summary(got.outputs[one.request_id]) for one in asked})
        finally:
            engine.stop(10)
    assert observed[0] == observed[1]


def test_rows_in_a_batch_with_a_nan_adapter_give_the_same_text_as_without_it(
    engine: TorchEngine, world: PeftWorld
) -> None:
    engine.unload(1).result(10)
    load(engine, world, "two", 1, poison=True)
    healthy = [ask(f"{weights} {i}", weights) for i in range(3) for weights in ("base", "translator@1", "other")]
    got = run(engine, [*healthy, *(ask(f"sick {i}", "translator@2") for i in range(3))])
    for one in healthy:
        name, _, _ = WEIGHTS[one.request_id.split()[0]]
        assert got.tokens(one.request_id) == world.answer(name, PROMPT, 12)
    for i in range(3):
        assert (got.last(f"sick {i}").finish_reason, got.tokens(f"sick {i}")) == (FinishReason.ERROR, [])


def test_no_request_finds_the_blocks_of_a_failed_one(engine: TorchEngine, world: PeftWorld) -> None:
    engine.unload(1).result(10)
    load(engine, world, "two", 1, poison=True)
    assert engine._core is not None
    for turn in range(2):
        got = run(engine, [ask(f"sick {turn}", "translator@2")])
        assert got.last(f"sick {turn}").finish_reason is FinishReason.ERROR
        assert got.last(f"sick {turn}").cached_tokens == 0
        assert engine._core.scheduler.allocator.registered == 0
    engine.unload(1).result(10)
    load(engine, world, "two", 1)  # whole again, under the same digest
    well = run(engine, [ask("well", "translator@2")])
    assert well.last("well").cached_tokens == 0
    assert well.tokens("well") == world.answer("two", PROMPT, 12)


def test_a_block_with_one_bad_number_is_not_finite() -> None:
    pool = KVPool(
        layers=2, kv_heads=2, head_dim=4, blocks=5, block_size=4, dtype=torch.float32, device=torch.device("cpu")
    )
    rows = torch.ones(1, 2, 4)
    pool.write(0, torch.tensor([1 * 4 + 3]), rows, rows)
    pool.write(1, torch.tensor([2 * 4]), rows * float("nan"), rows)
    pool.write(1, torch.tensor([3 * 4]), rows, rows * float("-inf"))
    pool.write(0, torch.tensor([4 * 4]), rows * float("inf"), rows * float("-inf"))
    assert pool.are_finite([1, 2, 3, 4, 5]).tolist() == [True, False, False, False, True]


def test_a_long_prompt_does_not_delay_a_short_answer(world: PeftWorld, tmp_path: Path) -> None:
    engine, got = fresh(world, max_batch_tokens=64, max_prefill_tokens=8), Collector()
    try:
        assert engine._core is not None
        plans, schedule = [], engine._core.scheduler.schedule

        def noted() -> Any:
            plans.append(schedule())
            return plans[-1]

        engine._core.scheduler.schedule = noted  # type: ignore[method-assign]  # looks, changes nothing
        engine.submit(ask("talker", "base", max_tokens=60), got)
        got.next()
        long = [tuple((i + 5 * n) % 300 + 3 for n in range(140)) for i in range(2)]
        for i, prompt in enumerate(long):
            engine.submit(ask(f"long {i}", "other", max_tokens=4, prompt=prompt), got)
        got.wait(["talker", "long 0", "long 1"])
        talking = [plan for plan in plans if any(c.sequence.request_id == "talker" for c in plan.decodes)]
        assert len(talking) == 59  # in every step since its first token, without a gap
        assert plans.index(talking[-1]) - plans.index(talking[0]) == 58
        assert max(sum(c.num_tokens for c in plan.prefills) for plan in talking) == 8
        assert all(got.tokens(f"long {i}") == world.answer("three", prompt, 4) for i, prompt in enumerate(long))
    finally:
        engine.stop(10)
