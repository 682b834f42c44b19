"""How often the load state of an adapter is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from adapter_world import NOW, OLD, adapter, base, plan, replica, report, settled

from lorapool_api.common import FailureReason
from lorapool_api.loraadapter import LoraAdapterStatus
from lorapool_api.protocol import AdapterReport, AdapterState, ErrorDetail
from lorapool_operator.decisions.load_writes import BURST, LoadWrites, decide
from lorapool_operator.decisions.plan import AdapterPlan
from lorapool_operator.world.observed import ObservedAdapter

INTERVAL_S = 10.0


def observed_with(status: LoraAdapterStatus | None, until_unix_s: float, *reports: AdapterReport) -> ObservedAdapter:
    """A checked adapter with this status on one replica that reports this."""
    one = settled(adapter(), base())
    known = one if status is None else replace(one, status=status)
    return ObservedAdapter(known, base(), replicas=(replica(*reports),), load_writes_until_unix_s=until_unix_s)


def rotate(cycles: int, period_s: float) -> list[tuple[float, bool]]:
    """Loads and unloads an adapter again and again. Returns when its status was written, and whether it was loaded."""
    status, until_unix_s, writes = None, 0.0, []
    for step in range(2 * cycles):
        now, loaded = NOW + step * period_s / 2, step % 2 == 0
        made = plan(observed_with(status, until_unix_s, *([report()] if loaded else [])), now)
        until_unix_s = made.load_writes_until_unix_s
        if made.status is not None:
            status = made.status
            writes.append((now - NOW, loaded))
        assert loaded or status is None or status.loaded_replicas == 0, "the status says that an unloaded one is loaded"
    return writes


@pytest.mark.parametrize("period_s", [0.4, 2.0, 7.0])
def test_an_adapter_that_takes_turns_is_written_once_in_an_interval_on_average(period_s: float) -> None:
    lasts_s = 400.0
    writes = rotate(int(lasts_s / period_s), period_s)
    assert len(writes) <= BURST + 1 + lasts_s / INTERVAL_S
    assert len(writes) >= lasts_s / INTERVAL_S / 2


def test_an_adapter_that_seldom_changes_is_written_at_once() -> None:
    assert len(rotate(20, 2 * INTERVAL_S)) == 40


def test_a_write_that_is_held_back_is_made_when_it_is_due() -> None:
    until_unix_s = NOW + BURST * INTERVAL_S
    held = plan(observed_with(None, until_unix_s, report()))
    assert (held.status, held.requeue_at) == (None, NOW + INTERVAL_S)
    assert held.load_writes_until_unix_s == until_unix_s
    made = plan(observed_with(None, until_unix_s, report()), NOW + INTERVAL_S)
    assert made.status is not None
    assert made.status.loaded_replicas == 1


def test_what_is_no_longer_loaded_is_corrected_at_once() -> None:
    loaded = plan(observed_with(None, 0.0, report())).status
    assert loaded is not None
    made = plan(observed_with(loaded, NOW + 3600))
    assert made.status is not None
    assert (made.status.loaded_replicas, made.status.replicas) == (0, [])


def test_a_failure_is_never_held_back() -> None:
    detail = ErrorDetail(reason=FailureReason.LOAD_FAILED.value, message="no", retry_at_unix_s=NOW + 5)
    made = plan(observed_with(None, NOW + 3600, report(AdapterState.FAILED, OLD, failure=detail)))
    assert made.status is not None
    assert made.status.state == "LoadFailed"


def test_writes_that_are_paid_for_are_forgotten() -> None:
    assert plan(observed_with(None, NOW - 1)) == AdapterPlan()
    assert decide(LoraAdapterStatus(), None, NOW + 5, NOW, INTERVAL_S) == LoadWrites(NOW + 5)
