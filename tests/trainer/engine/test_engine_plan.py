"""What a job computes is a function of its settings; what is computed together fills the budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapool_trainer.engine import JobSettings, Offer, Schedule, Take, learning_rate, plan_cycle, total_steps
from lorapool_trainer.engine.plan import batch_of, micro_batches

SETTINGS = JobSettings(epochs=2, batch_size=3, seed=5)
offers = st.lists(st.lists(st.integers(1, 50), max_size=5).map(tuple), max_size=6).map(
    lambda rows: [Offer(str(number), tokens) for number, tokens in enumerate(rows)]
)


def test_each_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    epochs = [[i for step in steps for i in batch_of(SETTINGS, 7, step)] for steps in (range(3), range(3, 6))]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [len(batch_of(SETTINGS, 7, step)) for step in range(6)] == [3, 3, 1, 3, 3, 1]
    assert total_steps(SETTINGS, 7) == 6
    assert total_steps(replace(SETTINGS, max_steps=4), 7) == 4


def test_another_seed_gives_another_order() -> None:
    assert batch_of(replace(SETTINGS, batch_size=50), 50, 0) != batch_of(
        replace(SETTINGS, batch_size=50, seed=6), 50, 0
    )


def test_consecutive_examples_fill_a_micro_batch_and_a_long_one_is_by_itself() -> None:
    assert micro_batches([10, 20, 30, 99, 5], 60) == (range(0, 3), range(3, 4), range(4, 5))
    assert micro_batches([], 60) == ()


def test_a_cycle_goes_round_the_jobs_and_skips_what_does_not_fit() -> None:
    taken = plan_cycle([Offer("a", (10, 10, 10)), Offer("b", (40, 1)), Offer("c", (5,)), Offer("d", ())], 40)
    assert taken == (Take("a", 3), Take("c", 1))


def test_a_micro_batch_larger_than_the_budget_is_computed_by_itself() -> None:
    assert plan_cycle([Offer("a", (100, 1)), Offer("b", (1,))], 40) == (Take("a", 1),)


@given(offers=offers, budget=st.integers(1, 120))
def test_a_cycle_is_within_the_budget_and_leaves_only_what_does_not_fit(offers: list[Offer], budget: int) -> None:
    taken = Counter({take.uid: take.micro_batches for take in plan_cycle(offers, budget)})
    sizes = {offer.uid: offer.tokens[: taken[offer.uid]] for offer in offers}
    used = sum(map(sum, sizes.values()))
    assert used <= budget or sum(map(len, sizes.values())) == 1
    assert bool(used) == any(offer.tokens for offer in offers)
    left = [offer.tokens[taken[offer.uid]] for offer in offers if taken[offer.uid] < len(offer.tokens)]
    assert all(used + tokens > budget for tokens in left)


@pytest.mark.parametrize("schedule", Schedule)
def test_the_learning_rate_rises_to_its_highest_and_never_falls_below_zero(schedule: Schedule) -> None:
    settings = JobSettings(learning_rate=2.0, warmup=0.25, schedule=schedule)
    rates = [learning_rate(settings, step, 16) for step in range(16)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert max(rates) == rates[4] == 2.0
    assert min(rates) > 0
    assert (rates[-1] == 2.0) is (schedule is Schedule.CONSTANT)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 0), ("learning_rate", float("nan")), ("dropout", 1.0), ("warmup", 2.0), ("weight_decay", -1.0)],
)
def test_a_setting_out_of_its_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        replace(SETTINGS, **{name: value})
