"""One small batch in each element type, fast enough to be repeated under several instruction sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_kit import Collector, greedy, peft_world, request, started, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PROMPTS = {"a": [5, 6, 7], "b": [9, 31, 77, 12, 140, 3, 8, 21, 50, 66, 4, 18, 200]}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.3)])
def test_a_mixed_batch_gives_pefts_log_probabilities(tmp_path: Path, dtype: str, tolerance: float) -> None:
    world = peft_world(tmp_path, tiny_model("Llama"), {"qv": {"r": 8, "target_modules": ["q_proj", "v_proj"]}})
    engine, got = started(world.base, dtype=dtype), Collector()
    try:
        engine.load(0, engine.read_adapter(str(world.adapters["qv"]), max_rank=16)).result(10)
        for name, prompt in PROMPTS.items():
            for slot in (-1, 0):
                engine.submit(request(f"{name}{slot}", prompt, greedy(4, top_logprobs=0), slot=slot), got)
        got.wait([f"{name}{slot}" for name in PROMPTS for slot in (-1, 0)])
    finally:
        engine.stop(5)
    for name, prompt in PROMPTS.items():
        for slot, adapter in ((-1, None), (0, "qv")):
            tokens = got.tokens(f"{name}{slot}")
            with torch.no_grad():
                logits = world.models[adapter](torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
            found = [one.logprob.logprob for one in got.outputs[f"{name}{slot}"] if one.logprob is not None]
            assert found == pytest.approx(wanted, abs=tolerance)
