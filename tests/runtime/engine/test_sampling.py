"""Tokens follow from a request's own parameters and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch

from lorapool_runtime.engines.interface import ConstraintError, SamplingParams
from lorapool_runtime.engines.request_check import check_params
from lorapool_runtime.engines.torch import sampling
from lorapool_runtime.engines.torch.sampling import SampleRow, sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def row(position: int = 0, seed: int = 1, generated: dict[int, int] | None = None, **params: Any) -> SampleRow:
    text = [token for token, count in (generated or {}).items() for _ in range(count)]
    return SampleRow(SamplingParams(max_tokens=9, **params), seed, position, [3, *text], 1)


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


def test_fewer_than_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        check_params(SamplingParams(max_tokens=-1), vocab_size=5)


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    assert draws(20, temperature=1e-30) == {0: 20}


WISHES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 3},
    {"top_k": 400, "top_p": 0.95},
    {"top_p": 0.5},
    {"top_p": 0.99999},
    {"min_p": 0.1},
    {"min_p": 0.02, "top_k": 40, "top_p": 0.9, "temperature": 1.7},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.3, "logit_bias": {5: 4.0}},
    {"top_logprobs": 3, "temperature": 0.0},
    {"top_logprobs": 5, "top_p": 0.8},
)


def test_every_kind_of_row_gives_the_same_whoever_shares_the_batch() -> None:
    torch.manual_seed(3)
    count = 3 * len(WISHES)
    logits = torch.randn(count, 5003) * 4
    logits[1::3] = logits[1::3].bfloat16().float()  # many equal values
    rows = [row(i, seed=i % 5, generated={7: 1, 5: 2}, **WISHES[i % len(WISHES)]) for i in range(count)]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(count)]
    for company in (list(range(count)), list(range(count))[::-1], list(range(0, count, 2)), list(range(1, count, 5))):
        assert sample(logits[company], [rows[i] for i in company]) == [alone[i] for i in company]


def test_rows_filtered_at_once_are_those_filtered_one_by_one() -> None:
    torch.manual_seed(4)
    logits = torch.randn(6, 997) * 3
    wishes = ({}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_p": 0.999, "top_k": 300}, {"temperature": 0.3})
    params = [SamplingParams(max_tokens=1, **wish) for wish in wishes]  # type: ignore[arg-type]
    at_once = sampling._filtered(logits, params)  # as a GPU does it
    for i, one_params in enumerate(params):
        assert torch.equal(at_once[i], sampling._filtered(logits[i : i + 1], [one_params])[0])


def test_equals_at_the_edge_of_the_share_are_all_kept() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, :2500] = 0.5
    kept = {one(logits[0], row(position, top_p=0.62)) for position in range(300)}
    assert len(kept) > 200
    assert all(token is not None and token < 2500 for token in kept)


class Allows:
    """A constraint that allows fixed tokens, or fails."""

    complete = False

    def __init__(self, *tokens: int, error: str | None = None) -> None:
        self.tokens, self.error = tokens, error

    def mask(self) -> bytes:
        if self.error:
            raise ConstraintError(self.error)
        return bytes([sum(1 << token for token in self.tokens)])

    def accept(self, token_id: int) -> None:
        raise AssertionError("sampling only asks")


def constrained(constraint: Allows, **params: Any) -> SampleRow:
    return dataclasses.replace(row(**params), constraint=constraint)


def test_a_constraint_bounds_its_own_row_and_no_other() -> None:
    rows = [row(temperature=0.0), constrained(Allows(3, 4), temperature=0.0), constrained(Allows(2)), row(top_k=1)]
    assert [s.token_id for s in sample(LOGITS.repeat(4, 1), rows)] == [0, 3, 2, 0]
    wide = torch.tensor([0.0] * 20 + [9.0])
    assert one(wide, constrained(Allows(1), temperature=0.0)) == 1  # beyond its last bit nothing is allowed


def test_a_constraint_that_fails_or_allows_nothing_ends_its_own_row_only() -> None:
    rows = [row(temperature=0.0), constrained(Allows(error="too deep")), constrained(Allows()), row(temperature=0.0)]
    got = sample(LOGITS.repeat(4, 1), rows)
    assert [s.token_id for s in got] == [0, None, None, 0]
    assert got[1].error == "too deep"
    assert got[2].error == "the constraint allows no further token"


def test_a_bias_cannot_break_a_constraint() -> None:
    assert one(LOGITS, constrained(Allows(3), temperature=0.0, logit_bias={0: 100.0, 3: -100.0})) == 3
