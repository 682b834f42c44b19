"""In bfloat16 an engine cannot equal peft token for token; it must be as close as peft is to itself.

peft's own answers depend on how many requests it computes at once: left padding and other products round otherwise.
The engine's log-probabilities may differ from those of peft one by one, on average, by no more than peft's batch does,
with the native kernels and without them. Where torch has no vector instructions, padding changes no sum, so that peft's
batch says nothing about rounding: there the engine must be as close to peft in float32 as peft in bfloat16 is. The
adapters change the base's outputs by a few parts in a hundred, as trained ones do.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import VOCAB, Collector, greedy, request, save_adapter, started, tiny_model
from matrix_kit import ARCHITECTURES, kinds

from lorapool_runtime.engines.torch.kernels import base_step as basekernel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

REQUESTS, TOKENS = 16, 12
LEAST = 1e-4
"""What the engine may differ by where peft's batch changes nothing: for Gemma 2, whose attention is computed operator
by operator. A single logit that rounds differently changes a log-probability by more."""
SAME_ROUNDING = 1.1
"""Two computations that round at the same places may differ by this factor in their mean distance to float32."""
Rows = list[tuple[list[int], list[int]]]
"""Prompts and answers."""


def engine_answers(base: Path, adapter: Path) -> tuple[Rows, torch.Tensor]:
    """Greedy answers to all prompts in one batch with base rows; log-probabilities [requests, tokens]."""
    rng, got = random.Random(5), Collector()
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(4, 32))] for _ in range(REQUESTS)]
    engine = started(base, dtype="bfloat16", max_batch=32)
    try:
        engine.load(2, engine.read_adapter(str(adapter), max_rank=16)).result(10)
        for i, prompt in enumerate(prompts):
            engine.submit(request(f"r{i}", prompt, greedy(TOKENS, top_logprobs=0), slot=2), got)
            engine.submit(request(f"b{i}", prompt, greedy(TOKENS)), got)
        got.wait([f"{kind}{i}" for kind in "rb" for i in range(REQUESTS)])
    finally:
        engine.stop(5)
    rows = [(prompt, got.tokens(f"r{i}")) for i, prompt in enumerate(prompts)]
    found = [[o.logprob.logprob for o in got.outputs[f"r{i}"] if o.logprob is not None] for i in range(REQUESTS)]
    return rows, torch.tensor(found)


def peft_answers(model: Any, rows: Rows) -> torch.Tensor:
    """Log-probabilities [rows, tokens] that peft gives to the answers, decoding all rows in one padded batch."""
    width = max(len(prompt) for prompt, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(rows):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    answers = torch.tensor([answer for _, answer in rows])
    positions, cache, found = (mask.cumsum(1) - 1).clamp(min=0), None, []
    with torch.inference_mode():
        for step in range(answers.shape[1]):
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
            cache, ids = out.past_key_values, answers[:, step : step + 1]
            found.append(torch.log_softmax(out.logits[:, -1].float(), -1).gather(1, ids))
            mask, positions = torch.cat([mask, torch.ones_like(ids)], 1), positions[:, -1:] + 1
    return torch.cat(found, 1)


CORNERS = ("Llama", "Gemma2", "Mixtral")
"""The plain one, windows with soft caps, a mixture; the others run with `make test-deep`."""


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[pytest.mark.deep] * (a not in CORNERS)) for a in ARCHITECTURES]
)
def test_log_probabilities_are_as_close_to_pefts_as_pefts_batch_is(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tiny = tiny_model(architecture)
    tiny.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    targets = kinds(architecture)["all-linear"]["target_modules"]
    adapter = save_adapter(tmp_path / "adapter", tiny, r=8, lora_alpha=2, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(loaded, adapter).eval()
    found = {}
    for kernels in ("native", "torch"):
        if kernels == "torch":
            monkeypatch.setattr(basekernel, "base_kernel", lambda: None)
        rows, engine = engine_answers(tmp_path / "base", adapter)
        alone = torch.cat([peft_answers(model, [row]) for row in rows])
        ours, own = distance(engine, alone), distance(peft_answers(model, rows), alone)
        print(f"{architecture} by {kernels}: engine to peft {ours:.5f}, peft to itself {own:.5f}")
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            found[kernels] = (rows, engine, alone)
        else:
            assert ours <= max(own, LEAST), kernels
    model.float()
    for kernels, (rows, engine, alone) in found.items():
        exact = torch.cat([peft_answers(model, [row]) for row in rows])
        ours, own = distance(engine, exact), distance(alone, exact)
        print(f"{architecture} by {kernels}: to float32, the engine {ours:.5f}, peft {own:.5f}")
        assert ours <= own * SAME_ROUNDING, kernels


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean absolute difference of log-probabilities."""
    return float((one - other).abs().mean())
