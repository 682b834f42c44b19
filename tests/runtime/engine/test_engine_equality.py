"""A mixed batch gives, token for token, what peft gives one request at a time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import VOCAB, Collector, PeftWorld, greedy, peft_world, request, started, tiny_model

from lorapool_runtime.engines.interface import BASE_SLOT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FIVE: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "qv": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "everything": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"},
    "mlp": {"r": 2, "lora_alpha": 8, "use_rslora": True, "target_modules": r".*\.mlp\.(gate|up|down)_proj"},
    "patterns": {
        "r": 8,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 3},
        "alpha_pattern": {"down_proj": 20},
        "layers_to_transform": [0],
    },
}


def mixed_batch(world: PeftWorld, *, count: int, **settings: Any) -> None:
    """`count` requests over all adapters and the base, joining while others run, of many lengths."""
    names = list(world.adapters)
    engine, got, rng = started(world.base, **settings), Collector(), random.Random(3)
    try:
        for slot, name in enumerate(names):
            engine.load(slot, engine.read_adapter(str(world.adapters[name]), max_rank=16)).result(10)
        asked: dict[str, tuple[str | None, list[int], int]] = {}
        for i in range(count):
            slot = i % (len(names) + 1) - 1
            prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 40))]
            asked[f"r{i}"] = (names[slot] if slot >= 0 else None, prompt, rng.randrange(3, 14))
            engine.submit(request(f"r{i}", prompt, greedy(asked[f"r{i}"][2]), slot=slot), got)
            if i % 5 == 4:
                got.next()  # some tokens come before the next ones join
        got.wait(asked)
        for request_id, (adapter, prompt, max_tokens) in asked.items():
            assert got.tokens(request_id) == world.answer(adapter, prompt, max_tokens), (request_id, adapter)
        assert engine.observe().kv_blocks_used == 0
    finally:
        engine.stop(5)


def test_24_requests_over_five_adapters_and_the_base_equal_peft_one_by_one(tmp_path: Path) -> None:
    mixed_batch(peft_world(tmp_path, tiny_model("Llama"), FIVE), count=24)


def test_tiny_chunks_and_tiny_blocks_change_nothing(tmp_path: Path) -> None:
    world = peft_world(tmp_path, tiny_model("Mistral"), FIVE)
    mixed_batch(world, count=8, max_batch=6, max_batch_tokens=7, kv_block_tokens=4)


def test_adapters_really_differ(tmp_path: Path) -> None:
    world = peft_world(tmp_path, tiny_model("Llama"), FIVE)
    answers = {tuple(world.answer(name, [5, 6, 7], 12)) for name in [None, *world.adapters]}
    assert len(answers) == 6


def test_a_bfloat16_base_serves_adapters_in_its_own_type(tmp_path: Path) -> None:
    world = peft_world(tmp_path, tiny_model("Llama"), {"qv": FIVE["qv"]})
    engine, got = started(world.base, dtype="bfloat16"), Collector()
    try:
        engine.load(0, engine.read_adapter(str(world.adapters["qv"]), max_rank=16)).result(10)
        for slot in (BASE_SLOT, 0):
            engine.submit(request(str(slot), [5, 6, 7], greedy(1, top_logprobs=0), slot=slot), got)
        got.wait([str(BASE_SLOT), "0"])
        for slot, name in ((BASE_SLOT, None), (0, "qv")):
            with torch.no_grad():
                logits = world.models[name](torch.tensor([[5, 6, 7]])).logits[0, -1]
            found = got.last(str(slot)).logprob
            assert found is not None
            assert found.logprob == pytest.approx(float(torch.log_softmax(logits, -1)[found.token_id]), abs=0.3)
    finally:
        engine.stop(5)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True}, "float32"),
        ({"avx512_f": True, "avx512_bw": True, "avx512_vl": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
    ],
)
def test_auto_keeps_a_bfloat16_base_only_where_the_cpu_multiplies_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: str
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    tiny_model("Llama").to(torch.bfloat16).save_pretrained(tmp_path)
    engine = started(tmp_path, dtype="auto")
    assert engine.facts.dtype == dtype
    engine.stop(5)
