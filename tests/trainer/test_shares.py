"""Tenants have equal parts of the tokens while they want them, and a tenant's jobs have parts by their priority."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lorapool_trainer.shares import Demand, Shares


def run(demands: list[Demand], budget: int, cycles: int, shares: Shares | None = None) -> Counter[str]:
    """Tokens by job, when every job can always compute the same pieces."""
    shares = shares or Shares()
    computed = Counter[str]()
    for _ in range(cycles):
        for uid, pieces in shares.plan(demands, budget).items():
            demand = next(item for item in demands if item.uid == uid)
            tokens = sum(demand.tokens[:pieces])
            computed[uid] += tokens
            shares.charge(demand, tokens)
    return computed


def test_one_job_has_nearly_half_of_the_tokens_against_fifty_of_another_tenant() -> None:
    crowd = [Demand(f"a-{number}", "a", 50, (64, 64, 64)) for number in range(50)]
    computed = run([*crowd, Demand("b", "b", 50, (60, 60))], 1024, 200)
    assert computed["b"] / computed.total() >= 0.45


def test_a_job_of_twice_the_priority_computes_twice_as_much() -> None:
    computed = run([Demand("low", "a", 50, (50,) * 9), Demand("high", "a", 100, (50,) * 9)], 300, 100)
    assert 1.9 < computed["high"] / computed["low"] < 2.1


def test_one_tenant_alone_uses_the_whole_budget() -> None:
    assert Shares().plan([Demand("a", "a", 50, (100,) * 20)], 1000) == {"a": 10}


def test_a_piece_longer_than_the_budget_travels_alone() -> None:
    assert Shares().plan([Demand("a", "a", 50, (500, 500))], 100) == {"a": 1}


def test_a_tenant_that_comes_back_has_no_claim_to_what_it_did_not_use() -> None:
    shares = Shares()
    steady, late = Demand("a", "a", 50, (100,)), Demand("b", "b", 50, (100,))
    run([steady], 100, 1000, shares)
    computed = run([steady, late], 100, 100, shares)
    assert abs(computed["a"] - computed["b"]) <= 200


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 300), min_size=1, max_size=5)), min_size=1, max_size=8
    ),
    st.integers(1, 600),
)
def test_a_plan_keeps_the_budget_and_computes_at_least_one_piece(
    jobs: list[tuple[str, list[int]]], budget: int
) -> None:
    demands = [Demand(str(number), tenant, 50, tuple(sizes)) for number, (tenant, sizes) in enumerate(jobs)]
    taken = Shares().plan(demands, budget)
    tokens = [size for demand in demands for size in demand.tokens[: taken.get(demand.uid, 0)]]
    assert len(tokens) == 1 or 0 < sum(tokens) <= budget
