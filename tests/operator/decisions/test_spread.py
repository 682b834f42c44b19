"""The number of preferred replicas of one adapter; time is an argument."""

from __future__ import annotations

import pytest

from lorapool_operator.decisions.spread import UP_AFTER_S, SpreadDecision, decide
from lorapool_operator.world.observed import SpreadMemory

NOW = 10_000.0


def decided(
    k: int,
    requests: int,
    *,
    lowest: int = 1,
    highest: int = 4,
    memory: SpreadMemory | None = None,
    now: float = NOW,
) -> SpreadDecision:
    return decide(
        k,
        requests,
        lowest=lowest,
        highest=highest,
        target=10,
        down_delay_s=120.0,
        memory=memory or SpreadMemory(),
        now=now,
    )


@pytest.mark.parametrize(("requests", "wanted"), [(11, 2), (25, 3), (1000, 4)])
def test_a_load_above_the_target_for_some_seconds_adds_replicas(requests: int, wanted: int) -> None:
    first = decided(1, requests)
    assert (first.k, first.memory.high_since_unix_s, first.recheck_unix_s) == (1, NOW, NOW + UP_AFTER_S)
    later = decided(1, requests, memory=first.memory, now=NOW + UP_AFTER_S)
    assert (later.k, later.memory) == (wanted, SpreadMemory())
    assert f"{requests} requests" in later.why


def test_a_burst_that_ends_soon_spreads_nothing() -> None:
    burst = decided(1, 40)
    assert decided(1, 10, memory=burst.memory, now=NOW + 2).memory == SpreadMemory()


def test_a_cold_adapter_has_one_replica() -> None:
    quiet = decided(1, 10)
    assert (quiet.k, quiet.memory, quiet.recheck_unix_s) == (1, SpreadMemory(), None)


def test_a_replica_is_given_up_only_after_the_load_was_low_for_the_delay() -> None:
    first = decided(3, 5)
    assert (first.k, first.memory.low_since_unix_s, first.recheck_unix_s) == (3, NOW, NOW + 120)
    assert decided(3, 5, memory=first.memory, now=NOW + 119).k == 3
    assert decided(3, 5, memory=first.memory, now=NOW + 120).k == 1


@pytest.mark.parametrize("requests", range(11, 31))
def test_a_steady_load_reaches_a_number_that_it_keeps(requests: int) -> None:
    k, memory, now, seen = 1, SpreadMemory(), NOW, []
    for _ in range(1000):
        made = decided(k, requests, memory=memory, now=now)
        k, memory, now = made.k, made.memory, now + 1
        seen.append(k)
    assert len(set(seen[10:])) == 1


def test_a_load_between_the_two_thresholds_changes_nothing() -> None:
    assert decided(2, 9, memory=SpreadMemory(low_since_unix_s=NOW - 999)).k == 2


def test_bounds_take_effect_at_once() -> None:
    assert decided(4, 1000, highest=2).k == 2
    assert decided(1, 0, lowest=2).k == 2
    assert decided(1, 0, lowest=3, highest=1).k == 3
