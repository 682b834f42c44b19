"""The requirements of `interface.Engine`: one file, which every engine passes.

The torch engine runs here. vLLM has an environment of its own, in which `test_vllm_engine.py` runs this file with
LORAPOOL_TEST_ENGINE=vllm, on vLLM's build for CPUs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import (
    MAX_LEN,
    VOCAB,
    Collector,
    PeftWorld,
    greedy,
    peft_world,
    request,
    save_adapter,
    started,
    tiny_model,
)
from fakes_runtime import EOS, save_byte_tokenizer
from llguidance import LLMatcher, LLTokenizer
from safetensors.torch import load_file, save_file

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.engines.interface import BASE_SLOT, Engine, FinishReason, SamplingParams, StepTime, TokenOutput
from lorapool_runtime.openai.tools.grammar import CompiledGrammar, json_grammar

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ENGINE = os.environ.get("LORAPOOL_TEST_ENGINE", "torch")
PROMPT = (5, 9, 17, 33)
LONG = tuple((7 + 31 * i) % 250 for i in range(96))
"""A prompt of several KV blocks."""
SLOTS = 3
WAIT_S = 120.0
only_torch = pytest.mark.skipif(ENGINE != "torch", reason="needs a second engine, which takes a minute with vLLM")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    configs: dict[str, dict[str, Any]] = {
        "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "two": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
        "mlp": {"r": 8, "lora_alpha": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        "scaled": {
            "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"], "use_rslora": True,
            "rank_pattern": {"o_proj": 8, r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"o_proj": 3},
        },
    }  # fmt: skip
    model = tiny_model("Llama", head_dim=32)  # vLLM has no attention for smaller heads on a CPU
    made = peft_world(tmp_path_factory.mktemp("world"), model, configs)
    save_byte_tokenizer(made.base)
    return made


@pytest.fixture(scope="module")
def shared(world: PeftWorld) -> Iterator[Engine]:
    made = start(world.base, slots=SLOTS, max_batch=4, max_batch_tokens=32)
    yield made
    made.stop(10)


def start(base: Path, **settings: Any) -> Engine:
    if ENGINE == "torch":
        return started(base, kv_block_tokens=8, **settings)
    from lorapool_runtime.engines.vllm.config import EngineConfig
    from lorapool_runtime.engines.vllm.engine import VllmEngine

    sizes = {"kv_bytes": 64 << 20, "kv_block_tokens": 32, "max_rank": 16, "max_model_len": MAX_LEN}
    made = VllmEngine(EngineConfig(model_dir=str(base), dtype="float32", threads=1, **sizes, **settings))
    made.start()
    return made


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """An engine that runs nothing and has no adapter; a test ends what it submits."""
    yield shared
    for slot in range(SLOTS):
        shared.unload(slot).result(WAIT_S)
    state = shared.observe()
    assert (state.running, state.waiting, state.kv_blocks_used, state.healthy) == (0, 0, 0, True)


def load(engine: Engine, world: PeftWorld, name: str, slot: int) -> int:
    return load_folder(engine, world.adapters[name], slot)


def load_folder(engine: Engine, folder: Path, slot: int) -> int:
    return engine.load(slot, engine.read_adapter(str(folder), max_rank=16)).result(WAIT_S).device_bytes


def answers(
    engine: Engine, prompt: Sequence[int] = PROMPT, tokens: int = 8, **slots: tuple[int, str]
) -> list[list[int]]:
    """The greedy answers of requests that run together, each with its slot and salt."""
    got = Collector()
    for name, (slot, salt) in slots.items():
        engine.submit(request(name, prompt, greedy(tokens), slot=slot, salt=salt), got)
    got.wait(slots, WAIT_S)
    return [got.tokens(name) for name in slots]


def changed(folder: Path, adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


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
    got.wait(["a"], WAIT_S)
    outputs = got.outputs["a"]
    assert [o.token_id for o in outputs] == world.answer(None, PROMPT, 6)
    assert [o.completion_tokens for o in outputs] == [1, 2, 3, 4, 5, 6]
    assert {o.prompt_tokens for o in outputs} == {4}
    assert [o.finish_reason for o in outputs] == [None] * 5 + [FinishReason.LENGTH]


def test_the_time_of_every_step_is_divided_among_its_requests_before_they_get_their_tokens(
    engine: Engine, world: PeftWorld
) -> None:
    steps: list[StepTime] = []
    engine.report_steps(steps.append)
    load(engine, world, "one", 0)
    began_ns, got, unreported = time.monotonic_ns(), Collector(), list[str]()

    def sink(output: TokenOutput) -> None:
        if output.request_id not in {one for _began, _ended, shares in steps for one, _ns in shares}:
            unreported.append(output.request_id)
        got(output)

    engine.submit(request("short", PROMPT, greedy(6)), sink)
    engine.submit(request("long", PROMPT * 7, greedy(6), slot=0), sink)
    got.wait(["short", "long"], WAIT_S)
    engine.report_steps(lambda _step: None)
    assert not unreported
    of_request: Counter[str] = Counter()
    for began, ended, shares in steps:
        assert began_ns <= began <= ended <= time.monotonic_ns()
        assert sum(ns for _one, ns in shares) == ended - began
        began_ns = ended
        of_request.update(dict(shares))
    assert of_request["long"] > of_request["short"] > 0


def test_an_ending_token_is_counted_but_is_not_text(engine: Engine, world: PeftWorld) -> None:
    tokens, got = world.answer(None, PROMPT, 6), Collector()
    stop = next(t for i, t in enumerate(tokens) if i and t not in tokens[:i])
    at = tokens.index(stop) + 1
    engine.submit(request("a", PROMPT, greedy(6, stop_token_ids=frozenset({stop}))), got)
    got.wait(["a"], WAIT_S)
    last = got.last("a")
    assert (last.token_id, last.text_token, last.finish_reason) == (stop, False, FinishReason.STOP)
    assert last.completion_tokens == at


def test_end_of_sequence_ends_unless_it_is_ignored(engine: Engine) -> None:
    got = Collector()
    forced = {"logit_bias": {2: 1000.0}}
    engine.submit(request("ends", PROMPT, greedy(5, ignore_eos=False, **forced)), got)
    engine.submit(request("goes on", PROMPT, greedy(5, ignore_eos=True, **forced)), got)
    got.wait(["ends", "goes on"], WAIT_S)
    assert (got.last("ends").finish_reason, got.tokens("ends")) == (FinishReason.STOP, [2])
    assert (got.last("goes on").finish_reason, got.tokens("goes on")) == (FinishReason.LENGTH, [2] * 5)
    assert all(o.text_token for o in got.outputs["goes on"])


def test_adapters_and_the_base_share_a_batch(engine: Engine, world: PeftWorld) -> None:
    got = Collector()
    assert load(engine, world, "one", 0) > 0
    assert load(engine, world, "two", 2) > 0
    for name, slot in (("base", BASE_SLOT), ("one", 0), ("two", 2)):
        engine.submit(request(name, PROMPT, greedy(8), slot=slot), got)
    got.wait(["base", "one", "two"], WAIT_S)
    assert got.tokens("base") == world.answer(None, PROMPT, 8)
    assert got.tokens("one") == world.answer("one", PROMPT, 8)
    assert got.tokens("two") == world.answer("two", PROMPT, 8)


def test_loading_and_unloading_wait_for_no_request(engine: Engine, world: PeftWorld) -> None:
    waited = True
    for round_number in range(5):  # on a busy machine the request may end first
        got, name = Collector(pause_s=0.01), f"long{round_number}"
        engine.submit(request(name, PROMPT, greedy(150)), got)
        got.next(WAIT_S)
        loaded = load(engine, world, "two", 1)
        assert engine.unload(1).result(WAIT_S) == (0 if engine.facts.slots_reserved else loaded)
        waited = waited and got.ended(name)
        got.wait([name], WAIT_S)
        assert got.tokens(name) == world.answer(None, PROMPT, 150)
        if not waited:
            return
    assert not waited


def test_a_slot_is_used_again_by_another_adapter(engine: Engine, world: PeftWorld) -> None:
    for round_number, name in enumerate(["one", "two", "one"]):
        got = Collector()
        load(engine, world, name, 1)
        engine.submit(request(name, PROMPT, greedy(8), slot=1, salt=f"digest-{round_number}"), got)
        got.wait([name], WAIT_S)
        assert got.tokens(name) == world.answer(name, PROMPT, 8)
        freed = engine.unload(1).result(WAIT_S)
        assert freed == 0 if engine.facts.slots_reserved else freed > 0


def test_a_slot_in_use_is_neither_cleared_nor_overwritten(engine: Engine, world: PeftWorld) -> None:
    got = Collector(pause_s=0.01)
    load(engine, world, "one", 0)
    engine.submit(request("user", PROMPT, greedy(120), slot=0), got)
    got.next()
    with pytest.raises(RuntimeError, match="slot 0"):
        engine.unload(0).result(WAIT_S)
    with pytest.raises(RuntimeError, match="slot 0"):
        load(engine, world, "two", 0)
    got.wait(["user"], WAIT_S)
    assert got.tokens("user") == world.answer("one", PROMPT, 120)


def test_a_slot_without_an_adapter_never_answers_for_the_base(engine: Engine) -> None:
    got = Collector()
    engine.submit(request("lost", PROMPT, greedy(4), slot=1), got)
    got.wait(["lost"], WAIT_S)
    assert (got.last("lost").finish_reason, got.tokens("lost")) == (FinishReason.ERROR, [])


def test_a_slot_never_answers_for_other_weights(engine: Engine, world: PeftWorld) -> None:
    got = Collector()
    load(engine, world, "one", 0)
    engine.submit(request("right", PROMPT, greedy(4), slot=0, salt="digest-1"), got)
    engine.submit(request("wrong", PROMPT, greedy(4), slot=0, salt="digest-2"), got)
    got.wait(["right", "wrong"], WAIT_S)
    assert got.last("right").finish_reason is FinishReason.LENGTH
    assert (got.last("wrong").finish_reason, got.tokens("wrong")) == (FinishReason.ERROR, [])


def test_cancelling_ends_within_the_step_with_the_counts_so_far(engine: Engine) -> None:
    got = Collector(pause_s=0.01)
    engine.submit(request("a", PROMPT, greedy(150)), got)
    got.next()
    engine.cancel("a")
    got.wait(["a"], WAIT_S)
    last = got.last("a")
    assert (last.finish_reason, last.token_id) == (FinishReason.CANCELLED, None)
    assert last.completion_tokens == len(got.tokens("a")) < 150
    assert engine.observe().kv_blocks_used == 0


def test_a_waiting_request_can_be_cancelled(engine: Engine) -> None:
    got = Collector()
    for i in range(5):  # the batch holds four
        engine.submit(request(f"r{i}", PROMPT, greedy(100)), got)
    engine.cancel("r4")
    got.wait(["r4"], WAIT_S)
    assert got.last("r4").finish_reason is FinishReason.CANCELLED
    got.wait([f"r{i}" for i in range(4)], WAIT_S)


def test_cancelling_the_unknown_is_ignored(engine: Engine) -> None:
    engine.cancel("unknown")
    got = Collector()
    engine.submit(request("a", PROMPT, greedy(2)), got)
    got.wait(["a"], WAIT_S)
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


@only_torch  # vLLM does not start with a cache that is smaller than the context
def test_a_request_larger_than_the_whole_cache_is_refused_at_submission(world: PeftWorld) -> None:
    block_bytes = 2 * 2 * 2 * 32 * 8 * 4
    small = started(world.base, kv_bytes=4 * block_bytes, kv_block_tokens=8)
    try:
        with pytest.raises(ValueError, match="KV cache of 24 tokens"):
            small.submit(request("bad", PROMPT, greedy(22)), Collector())
        got = Collector()
        small.submit(request("fits", PROMPT, greedy(21)), got)
        got.wait(["fits"], WAIT_S)
        assert got.tokens("fits") == world.answer(None, PROMPT, 21)
    finally:
        small.stop(10)


def test_one_id_runs_once(engine: Engine) -> None:
    got = Collector()
    engine.submit(request("a", PROMPT, greedy(100)), got)
    with pytest.raises(ValueError, match="running already"):
        engine.submit(request("a", PROMPT, greedy(1)), got)
    got.wait(["a"], WAIT_S)
    again = Collector()
    engine.submit(request("a", PROMPT, greedy(1)), again)
    again.wait(["a"])


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(engine: Engine) -> None:
    got, seeded = Collector(), SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    engine.submit(request("alone", PROMPT, seeded), got)
    got.wait(["alone"], WAIT_S)
    for i in range(3):
        engine.submit(request(f"other{i}", (i + 3,) * 9, SamplingParams(max_tokens=30, ignore_eos=True)), got)
    engine.submit(request("together", PROMPT, seeded), got)
    got.wait(["together", "other0", "other1", "other2"], WAIT_S)
    if engine.facts.exact_seeds:
        assert got.tokens("together") == got.tokens("alone")
    engine.submit(request("other seed", PROMPT, SamplingParams(max_tokens=20, seed=8, ignore_eos=True)), got)
    got.wait(["other seed"], WAIT_S)
    assert got.tokens("other seed") != got.tokens("alone")


def test_logprobs_are_returned_when_requested(engine: Engine) -> None:
    got = Collector()
    engine.submit(request("a", PROMPT, greedy(2, top_logprobs=3)), got)
    engine.submit(request("b", PROMPT, greedy(2)), got)
    got.wait(["a", "b"], WAIT_S)
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
    got.wait([f"r{i}" for i in range(6)], WAIT_S)
    after = engine.observe()
    assert (after.running, after.waiting, after.kv_blocks_used) == (0, 0, 0)
    computed = (after.prompt_tokens - before.prompt_tokens, after.generated_tokens - before.generated_tokens)
    assert computed == (24, 720)
    assert after.healthy


def test_device_bytes_follow_loads_and_unloads(engine: Engine, world: PeftWorld) -> None:
    empty = engine.observe().device_bytes
    loaded = load(engine, world, "two", 0)
    assert loaded > 0
    assert engine.observe().device_bytes == empty + (0 if engine.facts.slots_reserved else loaded)
    engine.unload(0).result(WAIT_S)
    assert engine.observe().device_bytes == empty


# --- adapters that come and go --------------------------------------------------------------------


def test_the_base_is_the_base_while_every_slot_is_full_and_after_a_mixed_batch(
    engine: Engine, world: PeftWorld
) -> None:
    """A row without an adapter must not be computed with one, nor find one's blocks in the prefix cache."""
    slots = {"base": (BASE_SLOT, "base")}
    for slot, name in enumerate(("one", "two", "scaled")):
        load(engine, world, name, slot)
        slots[name] = (slot, name)
    expected = [world.answer(None if name == "base" else name, LONG, 8) for name in slots]
    assert answers(engine, LONG, **slots) == expected
    assert answers(engine, LONG, alone=(BASE_SLOT, "base")) == expected[:1]
    assert answers(engine, LONG, **dict(reversed(slots.items()))) == expected[::-1]
    base_and_one = {name: slots[name] for name in ("base", "one")}
    assert answers(engine, PROMPT, **base_and_one) == [world.answer(None, PROMPT, 8), world.answer("one", PROMPT, 8)]


def test_new_weights_of_one_adapter_share_no_cached_block_with_the_old_ones(engine: Engine, world: PeftWorld) -> None:
    for digest, name in (("digest-1", "one"), ("digest-2", "two"), ("digest-1", "one")):
        load(engine, world, name, 2)
        assert answers(engine, LONG, same=(2, digest)) == [world.answer(name, LONG, 8)]
        engine.unload(2).result(WAIT_S)


def test_tenants_that_share_no_prefix_get_no_cached_token_of_each_other(engine: Engine) -> None:
    cached = []
    prompt = tuple(reversed(LONG))
    for number, tenant in enumerate(("red", "red", "blue")):
        got = Collector()
        asked = dataclasses.replace(request(f"r{number}", prompt, greedy(1)), cache_scope=tenant)
        engine.submit(asked, got)
        got.wait([asked.request_id], WAIT_S)
        cached.append(got.last(asked.request_id).cached_tokens)
    assert cached[0] == cached[2] == 0
    assert cached[1] > 0


def test_a_load_that_fails_leaves_a_slot_for_no_request_and_the_next_adapter(
    engine: Engine, world: PeftWorld, tmp_path: Path
) -> None:
    folder = shutil.copytree(world.adapters["two"], tmp_path / "two")
    adapter = engine.read_adapter(str(folder), max_rank=16)
    os.truncate(folder / "adapter_model.safetensors", 4096)
    if not engine.facts.host_tier:  # the engine reads the folder again
        with pytest.raises(ArtifactError):
            engine.load(0, adapter).result(WAIT_S)
    got = Collector()
    if not engine.facts.host_tier:
        engine.submit(request("lost", PROMPT, greedy(4), slot=0), got)
        got.wait(["lost"], WAIT_S)
        assert (got.last("lost").finish_reason, got.tokens("lost")) == (FinishReason.ERROR, [])
    load(engine, world, "one", 0)
    assert answers(engine, one=(0, "one"), base=(BASE_SLOT, "base")) == [
        world.answer("one", PROMPT, 8), world.answer(None, PROMPT, 8),
    ]  # fmt: skip


def test_the_files_of_a_loaded_adapter_are_not_needed_again(engine: Engine, world: PeftWorld, tmp_path: Path) -> None:
    folder = shutil.copytree(world.adapters["one"], tmp_path / "one")
    load_folder(engine, folder, 0)
    shutil.rmtree(folder)
    load(engine, world, "two", 1)
    for _ in range(2):
        assert answers(engine, one=(0, "one")) == [world.answer("one", PROMPT, 8)]


def test_loads_and_unloads_change_no_token_of_a_running_request(engine: Engine, world: PeftWorld) -> None:
    load(engine, world, "one", 0)
    got = Collector(pause_s=0.005)
    engine.submit(request("running", PROMPT, greedy(150), slot=0, salt="one"), got)
    got.next(WAIT_S)
    rounds = 0
    while not got.ended("running") or rounds < 3:
        for slot, name in ((1, "two"), (2, "scaled")):
            load(engine, world, name, slot)
        for slot in (2, 1):
            engine.unload(slot).result(WAIT_S)
        rounds += 1
    assert got.tokens("running") == world.answer("one", PROMPT, 150)


def test_ranks_and_scales_of_single_modules_are_those_of_peft(engine: Engine, world: PeftWorld) -> None:
    load(engine, world, "scaled", 0)
    assert answers(engine, scaled=(0, "scaled")) == [world.answer("scaled", PROMPT, 8)]


# --- adapters that are refused --------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e28])
def test_an_adapter_with_values_that_are_no_weights_is_refused(
    engine: Engine, world: PeftWorld, tmp_path: Path, bad: float
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = bad

    with pytest.raises(ArtifactError) as caught:
        engine.read_adapter(str(changed(tmp_path / "bad", world.adapters["two"], spoil)), max_rank=16)
    assert caught.value.reason is FailureReason.NON_FINITE_WEIGHTS
    load(engine, world, "one", 0)
    assert answers(engine, base=(BASE_SLOT, "base"), one=(0, "one")) == [
        world.answer(None, PROMPT, 8), world.answer("one", PROMPT, 8),
    ]  # fmt: skip


def test_an_adapter_whose_output_overflows_ends_its_own_requests_only(
    engine: Engine, world: PeftWorld, tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.sign() * 500_000  # permitted, and the product of gate and up overflows

    load_folder(engine, changed(tmp_path / "huge", world.adapters["mlp"], enlarge), 0)
    load(engine, world, "one", 1)
    got = Collector()
    engine.submit(request("huge", LONG, greedy(20), slot=0, salt="huge"), got)
    engine.submit(request("other", LONG, greedy(20), slot=1, salt="one"), got)
    engine.submit(request("base", LONG, greedy(20)), got)
    got.wait(["huge", "other", "base"], WAIT_S)
    assert got.last("huge").finish_reason is FinishReason.ERROR
    assert "not finite" in str(got.last("huge").error)
    assert (got.tokens("other"), got.tokens("base")) == (world.answer("one", LONG, 20), world.answer(None, LONG, 20))
    for prompt in (PROMPT, LONG, LONG[:40]):
        assert answers(engine, prompt, base=(BASE_SLOT, "base"), one=(1, "one")) == [
            world.answer(None, prompt, 8), world.answer("one", prompt, 8),
        ]  # fmt: skip


def test_an_adapter_of_another_base_is_refused(engine: Engine, tmp_path: Path) -> None:
    other = tiny_model("Llama", hidden_size=32)
    with pytest.raises(ArtifactError) as caught:
        engine.read_adapter(str(save_adapter(tmp_path, other, r=2, target_modules=["q_proj"])), max_rank=16)
    assert caught.value.reason is FailureReason.WRONG_BASE


def test_tensors_that_would_be_dropped_are_refused(engine: Engine, world: PeftWorld, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.self_attn.v_proj" in name]:
            tensors[name.replace("v_proj", "w_proj")] = tensors.pop(name)

    folder = changed(tmp_path / "renamed", world.adapters["one"], rename)
    with pytest.raises(ArtifactError, match="w_proj"):
        load_folder(engine, folder, 0)


def test_a_rank_above_the_limit_is_refused(engine: Engine, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, tiny_model("Llama", head_dim=32), r=24, target_modules=["q_proj"])
    with pytest.raises(ArtifactError) as caught:
        engine.read_adapter(str(folder), max_rank=64)
    assert caught.value.reason is FailureReason.RANK_TOO_HIGH


@pytest.mark.skipif(ENGINE != "vllm", reason="the torch engine serves adapters on every base that it serves")
def test_a_base_on_which_vllm_serves_no_adapters_is_refused_before_the_start(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from lorapool_runtime.engines.errors import UnsupportedBaseError

    config = BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBaseError, match=r"Bloom.*torch engine"):
        start(tmp_path, slots=1)


# --- answers --------------------------------------------------------------------------------------


def test_a_request_can_be_cancelled_before_it_has_begun(engine: Engine) -> None:
    for round_number in range(3):
        got, name = Collector(), f"early{round_number}"
        engine.submit(request(name, LONG, greedy(60)), got)
        engine.cancel(name)
        got.wait([name], WAIT_S)
        assert got.last(name).finish_reason is FinishReason.CANCELLED
    assert engine.observe().running == 0


def test_a_prompt_is_scored_with_and_without_an_answer(engine: Engine, world: PeftWorld) -> None:
    full, got = tuple((11 + 7 * i) % 250 for i in range(MAX_LEN)), Collector()
    asked = {"short": (PROMPT, 0), "full": (full, 0), "answered": (PROMPT, 3)}
    for name, (prompt, tokens) in asked.items():
        engine.submit(dataclasses.replace(request(name, prompt, greedy(tokens)), prompt_logprobs=2), got)
    got.wait(asked, WAIT_S)
    for name, (prompt, tokens) in asked.items():
        first = got.outputs[name][0]
        assert first.prompt_logprobs is not None
        with torch.no_grad():
            logprobs = torch.log_softmax(world.models[None](torch.tensor([prompt])).logits[0], dim=-1)
        wanted = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        found = torch.tensor([one.logprob for one in first.prompt_logprobs])
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert {len(one.top) for one in first.prompt_logprobs} == {2}
        assert got.tokens(name) == (world.answer(None, prompt, tokens) if tokens else [])
        assert got.last(name).finish_reason is FinishReason.LENGTH
        assert got.last(name).completion_tokens == tokens


def test_min_tokens_keeps_the_end_away(engine: Engine) -> None:
    got = Collector()
    sampling = greedy(9, ignore_eos=False, min_tokens=4, logit_bias={2: 100.0}, stop_token_ids=frozenset({3}))
    engine.submit(request("late", PROMPT, sampling), got)
    got.wait(["late"], WAIT_S)
    assert (got.last("late").finish_reason, got.last("late").completion_tokens) == (FinishReason.STOP, 5)


def compiled(world: PeftWorld, text: str, *, is_schema: bool) -> CompiledGrammar:
    tokenizer = LLTokenizer((world.base / "tokenizer.json").read_text(), n_vocab=VOCAB, eos_token=EOS)
    matcher = LLMatcher(tokenizer, json_grammar(text) if is_schema else text)
    assert not matcher.get_error()
    return CompiledGrammar(text, matcher, is_schema=is_schema, eos_token_ids=frozenset({EOS}))


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Wien", "Graz"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
STYLED = {**SCHEMA, "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


def test_an_answer_follows_its_schema_and_its_tools_grammar(engine: Engine, world: PeftWorld) -> None:
    load(engine, world, "two", 0)
    lark = f'%llguidance {{}}\nstart: "<tool_call>" body "</tool_call>"\nbody: %json {json.dumps(STYLED)}\n'
    grammars = {
        "schema": compiled(world, json.dumps(SCHEMA), is_schema=True),
        "tools": compiled(world, lark, is_schema=False),
    }
    got = Collector()
    for slot in (BASE_SLOT, 0):
        for name, grammar in grammars.items():
            sampling = SamplingParams(max_tokens=80, temperature=0.9, seed=3, stop_token_ids=frozenset({EOS}))
            asked = dataclasses.replace(request(f"{name}{slot}", PROMPT, sampling, slot=slot), grammar=grammar)
            engine.submit(asked, got)
    engine.submit(request("free", PROMPT, greedy(20)), got)
    got.wait(["free", *(f"{name}{slot}" for name in grammars for slot in (BASE_SLOT, 0))], WAIT_S)
    for slot in (BASE_SLOT, 0):
        for name in grammars:
            outputs = got.outputs[f"{name}{slot}"]
            text = bytes(o.token_id for o in outputs if o.text_token and o.token_id is not None).decode()
            value = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            assert (name == "tools") is text.endswith("</tool_call>")
            assert value.keys() == {"city", "days"}
            assert outputs[-1].finish_reason is FinishReason.STOP
    assert got.tokens("free") == world.answer(None, PROMPT, 20)


# --- the end --------------------------------------------------------------------------------------


@pytest.fixture
def fixtures(request: pytest.FixtureRequest) -> pytest.FixtureRequest:
    return request


def test_stopping_ends_every_request_and_the_thread(world: PeftWorld, fixtures: pytest.FixtureRequest) -> None:
    """The last test: an engine that takes long to start is not started again for it."""
    before = set(threading.enumerate())
    engine = started(world.base) if ENGINE == "torch" else fixtures.getfixturevalue("shared")
    got = Collector()
    engine.submit(request("a", PROMPT, greedy(150)), got)
    engine.submit(request("b", PROMPT, greedy(150)), got)
    got.next(WAIT_S)
    begin = time.monotonic()
    engine.stop(60)
    assert time.monotonic() - begin < 60
    assert {got.last(name).finish_reason for name in "ab"} == {FinishReason.CANCELLED}
    new = set(threading.enumerate()) - (before if ENGINE == "torch" else set())
    assert not any(thread.name == "engine" for thread in new)
    engine.submit(request("late", PROMPT, greedy(1)), got)
    assert got.last("late").finish_reason is FinishReason.ERROR
    with pytest.raises(RuntimeError):
        engine.unload(0).result(1)
