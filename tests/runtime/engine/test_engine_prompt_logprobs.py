"""Log-probabilities of prompts, constraints and seeds in the real engine, whatever else is in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_kit import VOCAB, Collector, PeftWorld, greedy, peft_world, request, started, tiny_model

from lorapool_runtime.engines.interface import (
    ConstraintError,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenConstraint,
    TokenLogprob,
)
from lorapool_runtime.engines.torch.engine import TorchEngine

PROMPT = tuple((3 + 29 * i) % VOCAB for i in range(50))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    own = {"one": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}
    return peft_world(tmp_path_factory.mktemp("world"), tiny_model("Llama"), own)


@pytest.fixture(scope="module")
def engine(world: PeftWorld) -> Iterator[TorchEngine]:
    engine = started(world.base, max_batch_tokens=24, max_batch=8, kv_block_tokens=4)
    engine.load(0, engine.read_adapter(str(world.adapters["one"]), max_rank=16)).result(10)
    yield engine
    engine.stop(10)


def wanted(world: PeftWorld, adapter: str | None, prompt: tuple[int, ...]) -> torch.Tensor:
    """[tokens - 1]: the log-probability that transformers, or peft, gives each token after its predecessors."""
    with torch.no_grad():
        logprobs = torch.log_softmax(world.models[adapter](torch.tensor([prompt])).logits[0], dim=-1)
    return logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


def scoring(
    request_id: str, prompt: tuple[int, ...], max_tokens: int = 0, count: int = 2, **more: Any
) -> GenerationRequest:
    return dataclasses.replace(request(request_id, prompt, greedy(max_tokens), **more), prompt_logprobs=count)


def test_prompts_are_scored_as_transformers_and_peft_do_chunk_by_chunk_in_a_batch(
    engine: TorchEngine, world: PeftWorld
) -> None:
    got = Collector()
    for i in range(4):
        engine.submit(request(f"other{i}", PROMPT[i : i + 9], greedy(20)), got)
    engine.submit(scoring("base", PROMPT), got)
    engine.submit(scoring("one", PROMPT, slot=0, max_tokens=3), got)
    got.wait(["base", "one", *(f"other{i}" for i in range(4))])
    for name, adapter in (("base", None), ("one", "one")):
        first = got.outputs[name][0]
        assert first.prompt_logprobs is not None
        assert [one.token_id for one in first.prompt_logprobs] == list(PROMPT[1:])
        found = torch.tensor([one.logprob for one in first.prompt_logprobs])
        torch.testing.assert_close(found, wanted(world, adapter, PROMPT), rtol=1e-4, atol=1e-4)
        assert all(
            len(one.top) == 2 and one.top[0][1] >= max(one.top[1][1], one.logprob) for one in first.prompt_logprobs
        )
    assert [(o.token_id, o.completion_tokens, o.finish_reason) for o in got.outputs["base"]] == [
        (None, 0, FinishReason.LENGTH)
    ]
    assert got.tokens("one") == world.answer("one", PROMPT, 3)
    assert all(o.prompt_logprobs is None for o in got.outputs["one"][1:])


def test_a_prompt_of_one_token_and_one_that_fills_the_context_are_scored(engine: TorchEngine) -> None:
    got, full = Collector(), tuple(i % VOCAB for i in range(engine.facts.max_model_len))
    engine.submit(scoring("short", PROMPT[:1]), got)
    engine.submit(scoring("full", full), got)
    got.wait(["short", "full"])
    assert got.last("short").prompt_logprobs == ()
    assert len(got.last("full").prompt_logprobs or ()) == len(full) - 1
    assert engine.observe().kv_blocks_used == 0


class Alternating:
    """Allows even and odd tokens in turn and is complete after some; fails after `fails_after`."""

    def __init__(self, length: int, fails_after: int | None = None) -> None:
        self.taken: list[int] = []
        self.length, self.fails_after = length, fails_after

    def mask(self) -> bytes:
        if self.fails_after is not None and len(self.taken) >= self.fails_after:
            raise ConstraintError("it grew too large")
        return bytes([0xAA if len(self.taken) % 2 else 0x55]) * (VOCAB // 8)

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == len(self.taken) % 2
        self.taken.append(token_id)

    @property
    def complete(self) -> bool:
        return len(self.taken) == self.length


@dataclasses.dataclass
class Gives:
    """A grammar with one constraint."""

    one: TokenConstraint
    text: str = ""
    is_schema: bool = False

    def constraint(self, end_ids: frozenset[int] = frozenset()) -> TokenConstraint:
        return self.one


def constrained(request_id: str, constraint: TokenConstraint, sampling: SamplingParams) -> GenerationRequest:
    return dataclasses.replace(request(request_id, PROMPT[:7], sampling), grammar=Gives(constraint))


def test_a_constrained_sequence_follows_its_constraint_through_preemption_and_changes_no_other(
    world: PeftWorld,
) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 4 * 4
    engine, got = started(world.base, kv_block_tokens=4, kv_bytes=16 * block_bytes), Collector()
    try:
        alone = Collector()
        sampled = SamplingParams(max_tokens=24, temperature=0.9, seed=5, ignore_eos=True)
        engine.submit(constrained("c", Alternating(20), sampled), alone)
        alone.wait(["c"])
        for i in range(3):
            engine.submit(request(f"plain{i}", PROMPT[:6], greedy(24)), got)
        rules = [Alternating(20), Alternating(20, fails_after=6)]
        for number, rule in enumerate(rules):
            engine.submit(constrained(f"c{number}", rule, sampled), got)
        got.wait(["c0", "c1", *(f"plain{i}" for i in range(3))])
        assert got.tokens("c0") == alone.tokens("c") == rules[0].taken
        assert (got.last("c0").finish_reason, got.last("c0").text_token) == (FinishReason.STOP, True)
        assert len(rules[0].taken) == 20
        assert (got.last("c1").finish_reason, got.last("c1").error) == (FinishReason.ERROR, "it grew too large")
        for i in range(3):
            assert got.tokens(f"plain{i}") == world.answer(None, PROMPT[:6], 24)
        assert engine.observe().kv_blocks_used == 0
    finally:
        engine.stop(10)


def test_one_seed_gives_one_text_in_any_batch(engine: TorchEngine) -> None:
    params = SamplingParams(
        max_tokens=20, temperature=1.1, top_p=0.9, top_k=80, seed=77, ignore_eos=True, top_logprobs=2
    )
    got = Collector()
    for round_ in range(3):
        for i in range(2 * round_):
            noise = SamplingParams(max_tokens=4 + 9 * i, temperature=0.5 + 0.3 * i, seed=i, min_p=0.05 * i)
            engine.submit(request(f"noise{round_}-{i}", PROMPT[: 3 + 5 * i], noise, slot=-1 if i % 2 else 0), got)
        engine.submit(request(f"mine{round_}", PROMPT[:11], params), got)
        got.wait([f"mine{round_}"])
    texts = [got.tokens(f"mine{round_}") for round_ in range(3)]
    assert texts[0] == texts[1] == texts[2]
    logprobs: list[list[TokenLogprob | None]] = [[o.logprob for o in got.outputs[f"mine{r}"]] for r in range(3)]
    for one, two in zip(logprobs[0], logprobs[2], strict=True):
        assert one is not None
        assert two is not None
        assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
