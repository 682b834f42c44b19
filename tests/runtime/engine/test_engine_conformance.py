"""The requirements of `interface.Engine`. A new engine is tested by adding it to the `engine` fixture."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_kit import MAX_LEN, VOCAB, Collector, PeftWorld, greedy, peft_world, request, started, tiny_model

from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.engines.interface import BASE_SLOT, Engine, FinishReason, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PROMPT = (5, 9, 17, 33)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    configs = {
        "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "two": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    }
    return peft_world(tmp_path_factory.mktemp("world"), tiny_model("Llama"), configs)


SLOTS = 3


@pytest.fixture(scope="module", params=["torch"])
def shared(world: PeftWorld) -> Iterator[Engine]:
    made = started(world.base, slots=SLOTS, max_batch=4, max_batch_tokens=32, kv_block_tokens=8)
    yield made
    made.stop(10)


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """An engine that runs nothing and has no adapter; a test ends what it submits."""
    yield shared
    for slot in range(SLOTS):
        shared.unload(slot).result(10)
    state = shared.observe()
    assert (state.running, state.waiting, state.kv_blocks_used, state.healthy) == (0, 0, 0, True)


def load(engine: Engine, world: PeftWorld, name: str, slot: int) -> int:
    return engine.load(slot, engine.read_adapter(str(world.adapters[name]), max_rank=16)).result(10).device_bytes


def test_facts_describe_the_base(engine: Engine) -> None:
    facts = engine.facts
    assert (facts.max_model_len, facts.vocab_size, facts.dtype) == (MAX_LEN, VOCAB, "float32")
    assert facts.eos_token_ids == {2}
    assert len(facts.targets) == 14
    down = next(t for t in facts.targets if t.module == "model.layers.1.mlp.down_proj")
    assert (down.in_features, down.out_features) == (96, 64)
    assert facts.weight_bytes > 0


def test_a_request_streams_its_tokens_and_ends_once(engine: Engine, world: PeftWorld) -> None:
    got = Collector()
    engine.submit(request("a", PROMPT, greedy(6)), got)
    got.wait(["a"])
    outputs = got.outputs["a"]
    assert [o.token_id for o in outputs] == world.answer(None, PROMPT, 6)
    assert [o.completion_tokens for o in outputs] == [1, 2, 3, 4, 5, 6]
    assert {o.prompt_tokens for o in outputs} == {4}
    assert [o.finish_reason for o in outputs] == [None] * 5 + [FinishReason.LENGTH]


def test_an_ending_token_is_counted_but_is_not_text(engine: Engine, world: PeftWorld) -> None:
    tokens, got = world.answer(None, PROMPT, 6), Collector()
    stop = next(t for i, t in enumerate(tokens) if i and t not in tokens[:i])
    at = tokens.index(stop) + 1
    engine.submit(request("a", PROMPT, greedy(6, stop_token_ids=frozenset({stop}))), got)
    got.wait(["a"])
    last = got.last("a")
    assert (last.token_id, last.text_token, last.finish_reason) == (stop, False, FinishReason.STOP)
    assert last.completion_tokens == at


def test_end_of_sequence_ends_unless_it_is_ignored(engine: Engine) -> None:
    got = Collector()
    forced = {"logit_bias": {2: 1000.0}}
    engine.submit(request("ends", PROMPT, greedy(5, ignore_eos=False, **forced)), got)
    engine.submit(request("goes on", PROMPT, greedy(5, ignore_eos=True, **forced)), got)
    got.wait(["ends", "goes on"])
    assert (got.last("ends").finish_reason, got.tokens("ends")) == (FinishReason.STOP, [2])
    assert (got.last("goes on").finish_reason, got.tokens("goes on")) == (FinishReason.LENGTH, [2] * 5)
    assert all(o.text_token for o in got.outputs["goes on"])


def test_adapters_and_the_base_share_a_batch(engine: Engine, world: PeftWorld) -> None:
    got = Collector()
    assert load(engine, world, "one", 0) > 0
    assert load(engine, world, "two", 2) > 0
    for name, slot in (("base", BASE_SLOT), ("one", 0), ("two", 2)):
        engine.submit(request(name, PROMPT, greedy(8), slot=slot), got)
    got.wait(["base", "one", "two"])
    assert got.tokens("base") == world.answer(None, PROMPT, 8)
    assert got.tokens("one") == world.answer("one", PROMPT, 8)
    assert got.tokens("two") == world.answer("two", PROMPT, 8)


def test_loading_and_unloading_wait_for_no_request(engine: Engine, world: PeftWorld) -> None:
    got = Collector(pause_s=0.01)
    engine.submit(request("long", PROMPT, greedy(150)), got)
    got.next()
    loaded = load(engine, world, "two", 1)
    assert engine.unload(1).result(10) == loaded
    assert not got.ended("long")
    got.wait(["long"])
    assert got.tokens("long") == world.answer(None, PROMPT, 150)


def test_a_slot_is_used_again_by_another_adapter(engine: Engine, world: PeftWorld) -> None:
    for round_number, name in enumerate(["one", "two", "one"]):
        got = Collector()
        load(engine, world, name, 1)
        engine.submit(request(name, PROMPT, greedy(8), slot=1, salt=f"digest-{round_number}"), got)
        got.wait([name])
        assert got.tokens(name) == world.answer(name, PROMPT, 8)
        assert engine.unload(1).result(10) > 0


def test_a_slot_in_use_is_neither_cleared_nor_overwritten(engine: Engine, world: PeftWorld) -> None:
    got = Collector(pause_s=0.01)
    load(engine, world, "one", 0)
    engine.submit(request("user", PROMPT, greedy(120), slot=0), got)
    got.next()
    with pytest.raises(RuntimeError, match="slot 0"):
        engine.unload(0).result(10)
    with pytest.raises(RuntimeError, match="slot 0"):
        load(engine, world, "two", 0)
    got.wait(["user"])
    assert got.tokens("user") == world.answer("one", PROMPT, 120)


def test_a_slot_without_an_adapter_never_answers_for_the_base(engine: Engine) -> None:
    got = Collector()
    engine.submit(request("lost", PROMPT, greedy(4), slot=1), got)
    got.wait(["lost"])
    assert (got.last("lost").finish_reason, got.tokens("lost")) == (FinishReason.ERROR, [])


def test_a_slot_never_answers_for_other_weights(engine: Engine, world: PeftWorld) -> None:
    got = Collector()
    load(engine, world, "one", 0)
    engine.submit(request("right", PROMPT, greedy(4), slot=0, salt="digest-1"), got)
    engine.submit(request("wrong", PROMPT, greedy(4), slot=0, salt="digest-2"), got)
    got.wait(["right", "wrong"])
    assert got.last("right").finish_reason is FinishReason.LENGTH
    assert (got.last("wrong").finish_reason, got.tokens("wrong")) == (FinishReason.ERROR, [])


def test_cancelling_ends_within_the_step_with_the_counts_so_far(engine: Engine) -> None:
    got = Collector(pause_s=0.01)
    engine.submit(request("a", PROMPT, greedy(150)), got)
    got.next()
    engine.cancel("a")
    got.wait(["a"])
    last = got.last("a")
    assert (last.finish_reason, last.token_id) == (FinishReason.CANCELLED, None)
    assert last.completion_tokens == len(got.tokens("a")) < 150
    assert engine.observe().kv_blocks_used == 0


def test_a_waiting_request_can_be_cancelled(engine: Engine) -> None:
    got = Collector()
    for i in range(5):  # the batch holds four
        engine.submit(request(f"r{i}", PROMPT, greedy(100)), got)
    engine.cancel("r4")
    got.wait(["r4"])
    assert got.last("r4").finish_reason is FinishReason.CANCELLED
    got.wait([f"r{i}" for i in range(4)])


def test_cancelling_the_unknown_is_ignored(engine: Engine) -> None:
    engine.cancel("unknown")
    got = Collector()
    engine.submit(request("a", PROMPT, greedy(2)), got)
    got.wait(["a"])
    engine.cancel("a")
    assert engine.observe().healthy


@pytest.mark.parametrize(
    ("prompt", "sampling", "slot", "named"),
    [
        ((), greedy(1), BASE_SLOT, "no tokens"),
        (PROMPT, greedy(MAX_LEN - 3), BASE_SLOT, str(MAX_LEN)),
        ((1, VOCAB), greedy(1), BASE_SLOT, "token outside"),
        (PROMPT, greedy(1), 3, "slot 3"),
        (PROMPT, SamplingParams(max_tokens=1, temperature=-1), BASE_SLOT, "temperature"),
        (PROMPT, greedy(1, logit_bias={VOCAB: 1.0}), BASE_SLOT, "logit_bias"),
    ],
)
def test_a_request_that_can_never_run_is_refused_at_submission(
    engine: Engine, prompt: tuple[int, ...], sampling: SamplingParams, slot: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        engine.submit(request("bad", prompt, sampling, slot=slot), Collector())


def test_a_request_larger_than_the_whole_cache_is_refused_at_submission(world: PeftWorld) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 8 * 4
    small = started(world.base, kv_bytes=4 * block_bytes, kv_block_tokens=8)
    try:
        with pytest.raises(ValueError, match="KV cache of 24 tokens"):
            small.submit(request("bad", PROMPT, greedy(22)), Collector())
        got = Collector()
        small.submit(request("fits", PROMPT, greedy(21)), got)
        got.wait(["fits"])
        assert got.tokens("fits") == world.answer(None, PROMPT, 21)
    finally:
        small.stop(10)


def test_one_id_runs_once(engine: Engine) -> None:
    got = Collector()
    engine.submit(request("a", PROMPT, greedy(100)), got)
    with pytest.raises(ValueError, match="running already"):
        engine.submit(request("a", PROMPT, greedy(1)), got)
    got.wait(["a"])
    again = Collector()
    engine.submit(request("a", PROMPT, greedy(1)), again)
    again.wait(["a"])


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(engine: Engine) -> None:
    got, seeded = Collector(), SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    engine.submit(request("alone", PROMPT, seeded), got)
    got.wait(["alone"])
    for i in range(3):
        engine.submit(request(f"other{i}", (i + 3,) * 9, SamplingParams(max_tokens=30, ignore_eos=True)), got)
    engine.submit(request("together", PROMPT, seeded), got)
    got.wait(["together", "other0", "other1", "other2"])
    assert got.tokens("together") == got.tokens("alone")
    engine.submit(request("other seed", PROMPT, SamplingParams(max_tokens=20, seed=8, ignore_eos=True)), got)
    got.wait(["other seed"])
    assert got.tokens("other seed") != got.tokens("alone")


def test_logprobs_are_returned_when_requested(engine: Engine) -> None:
    got = Collector()
    engine.submit(request("a", PROMPT, greedy(2, top_logprobs=3)), got)
    engine.submit(request("b", PROMPT, greedy(2)), got)
    got.wait(["a", "b"])
    first = got.outputs["a"][0].logprob
    assert first is not None
    assert first.token_id == first.top[0][0] == got.tokens("a")[0]
    assert len(first.top) == 3
    assert got.outputs["b"][0].logprob is None


def test_a_refused_adapter_names_its_reason(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        engine.read_adapter(str(tmp_path), max_rank=8)
    assert caught.value.reason == "UnsupportedFormat"


def test_observe_counts_running_and_waiting_requests(engine: Engine) -> None:
    before, got = engine.observe(), Collector()
    assert (before.running, before.waiting, before.kv_blocks_used, before.slots_total) == (0, 0, 0, SLOTS)
    for i in range(6):
        engine.submit(request(f"r{i}", PROMPT, greedy(120)), got)
    for _ in range(12):
        got.next()
    during = engine.observe()
    assert (during.running, during.waiting) == (4, 2)
    assert 0 < during.kv_blocks_used <= during.kv_blocks_total
    got.wait([f"r{i}" for i in range(6)])
    after = engine.observe()
    assert (after.running, after.waiting, after.kv_blocks_used) == (0, 0, 0)
    computed = (after.prompt_tokens - before.prompt_tokens, after.generated_tokens - before.generated_tokens)
    assert computed == (24, 720)
    assert after.healthy


def test_device_bytes_follow_loads_and_unloads(engine: Engine, world: PeftWorld) -> None:
    empty = engine.observe().device_bytes
    loaded = load(engine, world, "two", 0)
    assert engine.observe().device_bytes == empty + loaded
    engine.unload(0).result(10)
    assert engine.observe().device_bytes == empty


def test_stopping_ends_every_request_and_the_thread(world: PeftWorld) -> None:
    before = set(threading.enumerate())
    engine, got = started(world.base), Collector()
    engine.submit(request("a", PROMPT, greedy(150)), got)
    got.next()
    begin = time.monotonic()
    engine.stop(10)
    assert time.monotonic() - begin < 5
    assert got.last("a").finish_reason is FinishReason.CANCELLED
    assert not any(thread.name == "engine" for thread in set(threading.enumerate()) - before)
    engine.submit(request("late", PROMPT, greedy(1)), got)
    assert got.last("late").finish_reason is FinishReason.ERROR
    with pytest.raises(RuntimeError):
        engine.unload(0).result(1)
