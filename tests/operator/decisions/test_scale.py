"""The number of replicas; time is an argument, so a ten-minute scale-down takes a microsecond."""

from __future__ import annotations

from typing import Any

import pytest

from lorapool_api.basemodel import Scaling
from lorapool_operator.decisions.scaling.scale import Load, ScaleDecision, decide, initial_replicas
from lorapool_operator.world.observed import ScaleMemory

NOW = 10_000.0
ALLOWANCE_S = 1800.0


def scaling(**fields: Any) -> Scaling:
    return Scaling.model_validate(
        {"maxReplicas": 4, "targetInFlight": 10, "idleAfter": "10m", "scaleDownDelay": "2m", **fields}
    )


def load(in_flight: int = 0, *, ready: int = 1, silent: int = 0, idle_s: float = 0.0, asked_s: float = 0.0) -> Load:
    return Load(
        in_flight=in_flight, silent=silent, ready=ready, last_activity_unix_s=NOW - idle_s, asked_unix_s=NOW - asked_s
    )


def decided(
    current: int, observed: Load, *, floor: int = 0, memory: ScaleMemory | None = None, **fields: Any
) -> ScaleDecision:
    made = decide(
        current,
        scaling(**fields),
        observed,
        memory or ScaleMemory(),
        floor=floor,
        now=NOW,
        start_allowance_s=ALLOWANCE_S,
    )
    assert isinstance(made.memory, ScaleMemory)  # the next decision needs it
    return made


@pytest.mark.parametrize(
    ("current", "in_flight", "wanted"),
    [(1, 10, 1), (1, 11, 2), (1, 25, 3), (1, 1000, 4), (2, 15, 2)],
)
def test_load_above_the_target_scales_up_at_once_up_to_the_bound(current: int, in_flight: int, wanted: int) -> None:
    assert decided(current, load(in_flight, ready=current)).replicas == wanted


def test_an_idle_base_goes_to_zero_only_after_its_time() -> None:
    early = decided(1, load(idle_s=599))
    assert (early.replicas, early.recheck_unix_s) == (1, NOW + 1)
    assert decided(1, load(idle_s=600)).replicas == 0


def test_an_idle_base_keeps_its_minimum_and_what_warm_adapters_need() -> None:
    assert decided(3, load(ready=3, idle_s=9999), minReplicas=1).replicas == 1
    assert decided(3, load(ready=3, idle_s=9999), floor=2).replicas == 2


def test_nothing_scales_down_while_a_request_is_in_flight_or_a_replica_does_not_answer() -> None:
    assert decided(1, load(1, idle_s=9999)).replicas == 1
    assert decided(1, load(0, silent=1, ready=0, idle_s=9999)).replicas == 1
    assert decided(3, load(5, ready=2, silent=1)).replicas == 3


def test_load_must_stay_low_before_a_replica_is_removed() -> None:
    first = decided(3, load(5, ready=3))
    assert (first.replicas, first.memory.low_since_unix_s, first.recheck_unix_s) == (3, NOW, NOW + 120)
    assert decided(3, load(5, ready=3), memory=ScaleMemory(NOW - 119)).replicas == 3
    assert decided(3, load(5, ready=3), memory=ScaleMemory(NOW - 120)).replicas == 1


def test_a_burst_in_between_restarts_the_wait() -> None:
    assert decided(2, load(15, ready=2), memory=ScaleMemory(NOW - 100)).memory == ScaleMemory()


def test_a_base_at_zero_replicas_stays_there_until_it_is_woken() -> None:
    assert decided(0, load(ready=0)).replicas == 0
    assert decided(0, load(ready=0), floor=1).replicas == 1


def test_a_wake_up_is_not_reverted_while_the_replica_starts() -> None:
    starting = decided(1, load(ready=0, idle_s=900), idleAfter="1s")
    assert (starting.replicas, starting.reason) == (1, "starting")
    assert decided(1, load(ready=0, idle_s=ALLOWANCE_S), idleAfter="1s").replicas == 0


def test_changed_bounds_are_enforced() -> None:
    assert decided(4, load(ready=4), maxReplicas=2).replicas == 2
    assert decided(1, load(), minReplicas=2).replicas == 2


def test_a_new_base_starts_once_to_show_a_misconfiguration() -> None:
    assert initial_replicas(scaling(), 0) == 1
    assert initial_replicas(scaling(minReplicas=2), 0) == 2
    assert initial_replicas(scaling(), 3) == 3


def test_replicas_that_do_not_start_are_given_up_after_idle_after_once_one_serves() -> None:
    assert decided(2, load(ready=1, idle_s=599)).replicas == 2
    waiting = decided(2, load(ready=1, idle_s=599))
    assert (waiting.reason, waiting.recheck_unix_s, waiting.memory) == ("starting", NOW + 1, ScaleMemory())
    assert decided(2, load(ready=1, idle_s=600)).replicas == 0
    assert decided(1, load(ready=0, idle_s=600)).replicas == 1


def test_a_start_at_the_lower_bound_needs_no_recheck() -> None:
    assert decided(1, load(ready=0), minReplicas=1).recheck_unix_s is None
    assert decided(1, load(ready=0)).recheck_unix_s == NOW + ALLOWANCE_S


@pytest.mark.parametrize(
    ("current", "observed", "reason"),
    [
        (0, load(ready=0), "scaled to zero"),
        (1, load(11), "11 requests in flight"),
        (3, load(5, ready=2, silent=1), "1 replicas do not answer"),
        (3, load(5, ready=3), "5 requests in flight"),
        (1, load(idle_s=600), "no request for 10m"),
        (1, load(5), "5 requests in flight"),
        (2, load(ready=2), "no request in flight"),
        (9, load(ready=9), "bounds are 0 to 4"),
        (1, load(ready=0, idle_s=ALLOWANCE_S), "not started within 1800s"),
    ],
)
def test_every_decision_names_its_reason(current: int, observed: Load, reason: str) -> None:
    assert decided(current, observed).reason == reason


def test_a_scale_down_names_how_long_the_load_was_low() -> None:
    assert decided(3, load(5, ready=3), memory=ScaleMemory(NOW - 120)).reason == "5 requests in flight for 2m"


def test_no_replica_is_given_up_while_a_wanted_one_still_starts() -> None:
    starting = decided(4, load(5, ready=1), memory=ScaleMemory(NOW - 999))
    assert (starting.replicas, starting.reason, starting.memory) == (4, "starting", ScaleMemory())
    assert starting.recheck_unix_s == NOW + ALLOWANCE_S
    overdue = load(5, ready=1, asked_s=ALLOWANCE_S)
    assert decided(4, overdue).memory.low_since_unix_s == NOW
    assert decided(4, overdue, memory=ScaleMemory(NOW - 120)).replicas == 1


@pytest.mark.parametrize(
    ("current", "observed"),
    [
        (2, load(0, ready=2)),
        (2, load(1, ready=2)),
        (1, load(1000)),
        (9, load(3, ready=4)),
        (2, load(3, ready=1, asked_s=ALLOWANCE_S)),
    ],
)
def test_an_external_autoscalers_number_is_not_changed(current: int, observed: Load) -> None:
    kept = decided(current, observed, mode="External", memory=ScaleMemory(NOW - 999))
    assert (kept.replicas, kept.memory) == (current, ScaleMemory())


def test_with_an_external_autoscaler_an_idle_base_still_goes_to_zero_unless_it_has_a_minimum() -> None:
    assert decided(3, load(ready=3, idle_s=599), mode="External").recheck_unix_s == NOW + 1
    assert decided(3, load(ready=3, idle_s=600), mode="External").replicas == 0
    assert decided(9, load(ready=4, idle_s=600), mode="External").replicas == 0
    assert decided(3, load(ready=3, idle_s=600), mode="External", minReplicas=1).replicas == 3
    assert decided(3, load(ready=3, idle_s=600), mode="External", floor=1).replicas == 3


def test_with_an_external_autoscaler_a_wanted_minimum_wakes_a_base_at_zero() -> None:
    assert decided(0, load(ready=0), mode="External").replicas == 0
    assert decided(0, load(ready=0), mode="External", floor=2).replicas == 2
