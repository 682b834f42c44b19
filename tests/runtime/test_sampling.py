"""Tokens follow from a request's own parameters and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from lorapool_runtime.interface import SamplingParams
from lorapool_runtime.sampling import SampleRow, check_params, sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def row(position: int = 0, seed: int = 1, generated: dict[int, int] | None = None, **params: Any) -> SampleRow:
    return SampleRow(SamplingParams(max_tokens=9, **params), seed, position, (3,), generated or {})


def draws(count: int = 600, **params: Any) -> Counter[int | None]:
    rows = [row(position, **params) for position in range(count)]
    return Counter(one.token_id for one in sample(LOGITS.repeat(count, 1), rows))


def one(logits: torch.Tensor, sample_row: SampleRow) -> int | None:
    return sample(logits[None], [sample_row])[0].token_id


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(20, temperature=0.0) == {0: 20}


def test_frequencies_follow_the_distribution() -> None:
    counts = draws(4000)
    for token, expected in enumerate(torch.softmax(LOGITS, -1).tolist()):
        assert counts[token] / 4000 == pytest.approx(expected, abs=0.03)


def test_a_low_temperature_sharpens() -> None:
    assert draws(400, temperature=0.2)[0] > 380


def test_top_k_one_is_greedy_and_top_k_two_never_leaves_the_two() -> None:
    assert draws(50, top_k=1) == {0: 50}
    assert draws(300, top_k=2).keys() == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert draws(300, top_p=0.6).keys() == {0}  # the first alone has 0.636
    assert draws(300, top_p=0.8).keys() == {0, 1}


def test_min_p_drops_what_is_far_less_likely_than_the_likeliest() -> None:
    assert draws(300, min_p=0.3).keys() == {0, 1}


def test_the_same_seed_gives_the_same_tokens_whoever_shares_the_batch() -> None:
    alone = [one(LOGITS, row(position, seed=42)) for position in range(30)]
    others = [row(position, seed=position) for position in range(30)]
    mixed = sample(LOGITS.repeat(60, 1), [r for p in range(30) for r in (others[p], row(p, seed=42))])
    assert [s.token_id for s in mixed[1::2]] == alone
    assert [one(LOGITS, row(position, seed=43)) for position in range(30)] != alone


def test_the_uniform_number_is_fixed_for_ever() -> None:
    assert uniform(1, 2) == uniform(1, 2) != uniform(2, 1)
    assert 0 <= uniform(0, 0) < 1


def test_a_bias_can_force_and_forbid() -> None:
    assert draws(50, logit_bias={4: 100.0}) == {4: 50}
    assert 0 not in draws(200, logit_bias={0: -100.0})
    assert one(LOGITS, row(temperature=0.0, logit_bias={0: -100.0})) == 1


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    assert one(LOGITS, row(temperature=0.0, presence_penalty=1.5, generated={0: 1})) == 1
    assert one(LOGITS, row(temperature=0.0, frequency_penalty=0.4, generated={0: 2})) == 0
    assert one(LOGITS, row(temperature=0.0, frequency_penalty=0.4, generated={0: 3})) == 1


def test_the_repetition_penalty_counts_the_prompt_too() -> None:
    logits = torch.tensor([1.0, 0.0, 0.0, 1.5, 0.0])
    assert one(logits, row(temperature=0.0)) == 3
    assert one(logits, row(temperature=0.0, repetition_penalty=2.0)) == 0  # token 3 stands in the prompt


def test_logprobs_are_the_models_own() -> None:
    found = sample(LOGITS[None], [row(temperature=0.0, logit_bias={1: 50.0}, top_logprobs=2)])[0].logprob
    expected = torch.log_softmax(LOGITS, -1).tolist()
    assert found is not None
    assert (found.token_id, found.logprob) == (1, pytest.approx(expected[1]))
    assert [token for token, _ in found.top] == [0, 1]
    assert [value for _, value in found.top] == pytest.approx(expected[:2])


def test_zero_top_logprobs_gives_the_sampled_tokens_alone() -> None:
    found = sample(LOGITS[None], [row(temperature=0.0, top_logprobs=0)])[0].logprob
    assert found is not None
    assert found.top == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gets_no_token_and_the_others_theirs(bad: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = bad
    tokens = [s.token_id for s in sample(logits, [row(temperature=0.0), row(), row(temperature=0.0)])]
    assert tokens == [0, None, 0]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {5: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"top_logprobs": 6}, "top_logprobs"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(params: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_params(SamplingParams(max_tokens=1, **params), vocab_size=5)


def test_no_tokens_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        check_params(SamplingParams(max_tokens=0), vocab_size=5)
