"""The time of a step is divided among its rows without a remainder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapool_runtime.engines.interface import FinishReason, TokenOutput
from lorapool_runtime.engines.step_shares import EQUAL, StepWeights, split
from lorapool_runtime.engines.vllm.step_times import StepTimes

WEIGHTS = StepWeights.of_ns(prefill=100.5, decode=2000.25, context=0.125, rank=3)


@given(total=st.integers(0, 10**12), weights=st.lists(st.integers(0, 10**15), min_size=1, max_size=64))
def test_parts_add_up_exactly_and_each_is_its_share_to_within_one(total: int, weights: list[int]) -> None:
    parts = split(total, weights)
    assert sum(parts) == total
    assert all(part >= 0 for part in parts)
    if whole := sum(weights):
        for part, weight in zip(parts, weights, strict=True):
            assert total * weight // whole <= part <= -(-total * weight // whole)


@given(tokens=st.integers(1, 300), context=st.integers(0, 4000), rank=st.integers(0, 64))
def test_a_prompt_in_two_parts_weighs_the_same_as_whole(tokens: int, context: int, rank: int) -> None:
    cut = tokens // 2
    parts = WEIGHTS.of_prefill(cut, context, rank) + WEIGHTS.of_prefill(tokens - cut, context + cut, rank)
    assert parts == WEIGHTS.of_prefill(tokens, context, rank)


def test_more_tokens_a_longer_context_and_a_higher_rank_weigh_more() -> None:
    assert WEIGHTS.of_prefill(20, 0, 8) > WEIGHTS.of_prefill(10, 0, 8)
    assert WEIGHTS.of_decode(2000, 8) > WEIGHTS.of_decode(1000, 8)
    assert WEIGHTS.of_decode(1000, 16) > WEIGHTS.of_decode(1000, 8)
    assert WEIGHTS.of_decode(1000, 16) - WEIGHTS.of_decode(1000, 8) == 8 * 3000


def token(request_id: str, made: int, *, prompt: int = 10, cached: int = 0) -> TokenOutput:
    return TokenOutput(request_id, 1, True, prompt, made, cached)


def test_the_time_between_two_deliveries_of_vllm_goes_to_those_that_got_tokens() -> None:
    times = StepTimes(EQUAL)
    times.begin(1000)
    assert times.delivered([token("a", 1)], {}, 1500) == (1000, 1500, [("a", 500)])
    taken = times.delivered([token("a", 2), token("b", 1, prompt=9)], {}, 2600)
    assert taken == (1500, 2600, [("a", 100), ("b", 1000)])  # b's prompt was computed too
    assert (
        times.delivered([TokenOutput("a", None, False, 10, 2, finish_reason=FinishReason.CANCELLED)], {}, 3000) is None
    )
    assert times.delivered([token("b", 2)], {}, 3300) == (2600, 3300, [("b", 700)])


def test_a_scored_prompt_of_vllm_without_a_token_has_its_time() -> None:
    times = StepTimes(EQUAL)
    output = TokenOutput("a", None, False, 10, 0, finish_reason=FinishReason.LENGTH)
    assert times.delivered([output], {}, 70) == (0, 70, [("a", 70)])


@pytest.mark.parametrize("cached", [0, 8])
def test_cached_tokens_of_a_prompt_weigh_less_with_vllm(cached: int) -> None:
    times = StepTimes(EQUAL)
    taken = times.delivered([token("a", 1, cached=cached), token("b", 2)], {}, 1200)
    assert taken is not None
    assert dict(taken[2])["a"] == split(1200, [11 - cached, 1])[0]
