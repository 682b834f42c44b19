"""A faulty row fails its own request only; every request learns of the death of the engine thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import Collector, PeftWorld, greedy, peft_world, request, started, tiny_model

from lorapool_runtime.engines.errors import EngineStartError, UnsupportedBaseError
from lorapool_runtime.engines.interface import BASE_SLOT, FinishReason, TokenOutput
from lorapool_runtime.engines.torch.engine import EngineConfig, TorchEngine
from lorapool_runtime.weights.reader import PackedAdapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PROMPT = (5, 9, 17, 33, 8)
BOTH = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "two": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    return peft_world(tmp_path_factory.mktemp("world"), tiny_model("Llama"), BOTH)


def load(engine: TorchEngine, world: PeftWorld, name: str, slot: int, *, poison: bool = False) -> None:
    adapter = engine.read_adapter(str(world.adapters[name]), max_rank=16)
    assert isinstance(adapter, PackedAdapter)
    if poison:  # what the check at reading would have refused
        adapter.buffer[:] = np.nan
    engine.load(slot, adapter).result(10)


def test_a_nan_adapter_that_slips_past_the_check_ends_its_own_requests_only(world: PeftWorld) -> None:
    engine, got = started(world.base, kv_block_tokens=4, max_batch_tokens=24), Collector()
    try:
        load(engine, world, "one", 0)
        load(engine, world, "two", 1, poison=True)
        load(engine, world, "two", 2)
        for i in range(4):
            engine.submit(request(f"base{i}", PROMPT, greedy(20)), got)
            engine.submit(request(f"one{i}", PROMPT, greedy(20), slot=0), got)
            engine.submit(request(f"sick{i}", PROMPT * 3, greedy(20), slot=1), got)
            engine.submit(request(f"two{i}", PROMPT, greedy(20), slot=2), got)
        ids = [f"{kind}{i}" for kind in ("base", "one", "sick", "two") for i in range(4)]
        got.wait(ids)
        for i in range(4):
            assert (got.last(f"sick{i}").finish_reason, got.tokens(f"sick{i}")) == (FinishReason.ERROR, [])
            assert got.tokens(f"base{i}") == world.answer(None, PROMPT, 20)
            assert got.tokens(f"one{i}") == world.answer("one", PROMPT, 20)
            assert got.tokens(f"two{i}") == world.answer("two", PROMPT, 20)
        assert engine.observe().healthy
        assert engine.observe().kv_blocks_used == 0
    finally:
        engine.stop(10)


def test_blocks_that_a_nan_request_left_harm_no_later_request(world: PeftWorld) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 4 * 4
    engine, got = started(world.base, kv_block_tokens=4, kv_bytes=13 * block_bytes), Collector()
    try:
        load(engine, world, "two", 1, poison=True)
        for i in range(4):  # the same few blocks change hands again and again
            engine.submit(request(f"sick{i}", PROMPT * 5, greedy(20), slot=1), got)
            engine.submit(request(f"base{i}", PROMPT, greedy(20)), got)
        got.wait([f"{kind}{i}" for kind in ("sick", "base") for i in range(4)])
        assert all(got.tokens(f"base{i}") == world.answer(None, PROMPT, 20) for i in range(4))
    finally:
        engine.stop(10)


def test_a_sink_that_fails_ends_its_own_request_only(world: PeftWorld) -> None:
    engine, got = started(world.base), Collector()

    def broken(output: TokenOutput) -> None:
        raise RuntimeError("the loop is closed")

    try:
        engine.submit(request("broken", PROMPT, greedy(100)), broken)
        engine.submit(request("fine", PROMPT, greedy(20)), got)
        got.wait(["fine"])
        assert got.tokens("fine") == world.answer(None, PROMPT, 20)
        assert engine.observe().running == 0
    finally:
        engine.stop(10)


def test_the_threads_death_ends_every_request_with_an_error_and_is_observed(
    world: PeftWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, got = started(world.base, max_batch=2), Collector()
    try:
        for i in range(4):
            engine.submit(request(f"r{i}", PROMPT, greedy(150)), got)
        got.next()

        def fail(*_: Any) -> torch.Tensor:
            raise MemoryError("no memory for the step")

        assert engine._core is not None
        monkeypatch.setattr(engine._core.runner, "run", fail)
        got.wait([f"r{i}" for i in range(4)])
        assert {got.last(f"r{i}").finish_reason for i in range(4)} == {FinishReason.ERROR}
        assert not engine.observe().healthy
        engine.submit(request("late", PROMPT, greedy(1)), got)
        assert got.last("late").finish_reason is FinishReason.ERROR
        with pytest.raises(RuntimeError):
            engine.unload(0).result(1)
    finally:
        engine.stop(10)


def test_a_folder_without_safetensors_is_refused_at_start(tmp_path: Path) -> None:
    engine = TorchEngine(EngineConfig(model_dir=str(tmp_path), device="cpu"))
    with pytest.raises(EngineStartError, match="safetensors"):
        engine.start()
    assert not engine.observe().healthy


def llama_with(**rope: Any) -> Callable[[], Any]:
    return lambda: tiny_model("Llama", rope_parameters={"rope_theta": 10000.0, **rope})


def test_a_rope_that_depends_on_the_rest_of_the_batch_is_refused(tmp_path: Path) -> None:
    llama_with(rope_type="dynamic", factor=2.0)().save_pretrained(tmp_path)
    engine = TorchEngine(EngineConfig(model_dir=str(tmp_path), device="cpu"))
    with pytest.raises(UnsupportedBaseError, match="dynamic"):
        engine.start()


def test_attention_sinks_are_refused_with_a_reason(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    engine = TorchEngine(EngineConfig(model_dir=str(tmp_path), device="cpu"))
    with pytest.raises(ValueError, match="s_aux"):
        engine.start()


def test_a_modified_model_that_differs_from_the_stock_one_is_not_served(
    world: PeftWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorapool_runtime.engines.torch.model.attention as attention

    monkeypatch.setattr(attention, "_visible", lambda at, context, window: context < at + 1000)
    engine = TorchEngine(EngineConfig(model_dir=str(world.base), device="cpu"))
    with pytest.raises(UnsupportedBaseError, match="differs from the stock"):
        engine.start()


def test_a_bad_configuration_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        EngineConfig(model_dir="x", max_batch=64, max_batch_tokens=32)
    with pytest.raises(ValueError, match="slots"):
        EngineConfig(model_dir="x", slots=0)


def test_the_base_slot_is_no_adapter_slot() -> None:
    assert BASE_SLOT == -1
