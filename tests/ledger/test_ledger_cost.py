"""The parts of a pod's cost add up to its price to the last unit, and move with rank, tokens and memory."""

from __future__ import annotations

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from lorapool_ledger.billing.cost import UNIT, Used, largest_remainder, money, pod_cost, split_cost, spread_idle

HOUR_NS = 3600 * 10**9
GIB = 2**30
POD = {"uptime_ns": HOUR_NS, "slot_bytes": 20 * GIB, "device_bytes": 80 * GIB}

counts = st.integers(min_value=0, max_value=2**63)
accounts = st.dictionaries(
    st.sampled_from(["", "a", "b", "c"]), st.builds(Used, gpu_ns=counts, byte_ns=st.integers(0, 2**100))
)


@given(cost=st.integers(0, 10**15), used=accounts, uptime=counts, slots=counts, device=counts)
def test_the_parts_and_idle_add_up_to_the_cost_to_the_last_unit(
    cost: int, used: dict[str, Used], uptime: int, slots: int, device: int
) -> None:
    split = split_cost(cost, used, uptime_ns=uptime, slot_bytes=slots, device_bytes=device)
    assert split.total == cost
    assert split.idle >= 0
    assert all(part.compute >= 0 and part.residency >= 0 for part in split.accounts.values())
    assert set(split.accounts) == set(used)
    spread = spread_idle(split)
    assert spread.total == cost
    assert spread.idle in (0, split.idle)


@given(st.integers(0, 10**18), st.dictionaries(st.integers(), st.integers(0, 10**30), min_size=1))
def test_largest_remainders_add_up_and_are_off_by_less_than_one(total: int, weights: dict[int, int]) -> None:
    if any(weights.values()):
        parts = largest_remainder(total, weights)
        assert sum(parts.values()) == total
        for key, weight in weights.items():
            assert abs(parts[key] * sum(weights.values()) - total * weight) < sum(weights.values())


def test_the_formula_is_the_published_one() -> None:
    cost = pod_cost(Decimal("2.40"), HOUR_NS)
    used = {"": Used(gpu_ns=HOUR_NS // 4), "a": Used(gpu_ns=HOUR_NS // 2, byte_ns=10 * GIB * HOUR_NS)}
    split = split_cost(cost, used, **POD)
    # m = 20 / 80; compute = (1 - m) * C * gpu / T; residency = m * C * bytes * time / (slot_bytes * T)
    assert money(split.accounts[""].compute) == Decimal("0.45")
    assert money(split.accounts["a"].compute) == Decimal("0.90")
    assert money(split.accounts["a"].residency) == Decimal("0.30")
    assert money(split.idle) == Decimal("0.75")
    assert money(split.total) == Decimal("2.40")


def test_without_load_all_is_idle_and_cannot_be_spread() -> None:
    for used in ({}, {"a": Used()}):
        split = split_cost(1000, used, **POD)
        assert (split.idle, spread_idle(split)) == (1000, split)


def test_twice_the_time_on_the_device_is_twice_the_compute() -> None:
    """Twice the rank or twice the tokens is more of the steps' time, by the weights of the runtime's split."""
    used = {"one": Used(gpu_ns=HOUR_NS // 10), "two": Used(gpu_ns=HOUR_NS // 5)}
    split = split_cost(pod_cost(Decimal(3), HOUR_NS), used, **POD)
    assert split.accounts["two"].compute == 2 * split.accounts["one"].compute > 0


@given(gpu=st.integers(0, HOUR_NS // 2), more=st.integers(1, HOUR_NS // 4), held=st.integers(0, 5 * GIB * HOUR_NS))
def test_more_time_or_memory_never_costs_less(gpu: int, more: int, held: int) -> None:
    def total(one: Used) -> int:
        return split_cost(10**9, {"a": one, "b": Used(HOUR_NS // 8, GIB)}, **POD).accounts["a"].total

    assert total(Used(gpu + more, held)) >= total(Used(gpu, held)) - 2  # units that a remainder may move
    assert total(Used(gpu, held + GIB * more)) >= total(Used(gpu, held)) - 2


def test_a_base_without_slots_has_no_cost_of_residency() -> None:
    split = split_cost(100, {"a": Used(10, 10**30)}, uptime_ns=20, slot_bytes=0, device_bytes=0)
    assert (split.accounts["a"].residency, split.accounts["a"].compute, split.idle) == (0, 50, 50)


def test_clocks_that_disagree_leave_nothing_idle_and_nothing_over() -> None:
    split = split_cost(90, {"a": Used(gpu_ns=60), "b": Used(gpu_ns=30)}, uptime_ns=80, slot_bytes=0, device_bytes=1)
    assert ([part.total for part in split.accounts.values()], split.idle) == ([60, 30], 0)


def test_the_spread_of_idle_follows_what_accounts_cost() -> None:
    split = split_cost(1000, {"a": Used(gpu_ns=30), "b": Used(gpu_ns=10)}, uptime_ns=80, slot_bytes=0, device_bytes=1)
    assert [part.total for part in spread_idle(split).accounts.values()] == [750, 250]


def test_a_pods_cost_is_its_price_times_its_life() -> None:
    assert pod_cost(Decimal("1.80"), HOUR_NS) == Decimal("1.80") / UNIT
    assert money(pod_cost(Decimal("1.80"), HOUR_NS // 60)) == Decimal("0.03")
    assert pod_cost(Decimal(0), HOUR_NS) == pod_cost(Decimal(5), 0) == 0
