"""The tokens of a month: each is counted once, whatever dies or is deleted, and no more are trained than a limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from base_world import NOW
from hypothesis import given
from hypothesis import strategies as st
from tuning_plans import after, condition, job, observed, only, plan, report, session, trainer

from lorapool_api.tuning.states import JobState, RunState
from lorapool_operator.clock import iso
from lorapool_operator.decisions.tuning.tokens import MonthRecord, counted, month_of
from lorapool_operator.decisions.tuning.values import TuningLimits
from lorapool_operator.world.tuning import Sent

LIMITS = TuningLimits(month_tokens=1000)
MONTH_S = 31 * 86400.0
SPENT = {"month_tokens": {"team": 1000}}


def count(record: MonthRecord, now: float = NOW, **totals: int) -> MonthRecord:
    return counted(record, [(job(name), total) for name, total in totals.items()], (), now)


def test_each_token_is_counted_once_however_often_it_is_looked_at() -> None:
    record = count(count(count(MonthRecord(), a=100, b=50), a=100, b=50), a=130, b=50)
    assert (record.month, record.tokens) == (month_of(NOW), 180)


def test_a_deleted_job_stays_in_the_sum_and_not_in_the_record() -> None:
    record = count(count(MonthRecord(), a=100, b=50), b=60)
    assert (record.tokens, record.jobs) == (160, {"b-uid": 60})


def test_work_of_a_lost_trainer_that_is_computed_again_is_counted_once() -> None:
    record = count(count(count(MonthRecord(), a=100), a=70), a=110)
    assert record.tokens == 110


def test_a_month_begins_with_nothing_and_a_job_counts_from_where_it_was() -> None:
    record = count(count(MonthRecord(), a=100), NOW + MONTH_S, a=130)
    assert (record.month, record.tokens) == (month_of(NOW + MONTH_S), 30)


def test_a_job_that_ended_in_an_earlier_month_counts_in_none_after_it() -> None:
    """Also where nothing was recorded of it, as before the limit was set."""
    ended = job("a", status={"state": "Succeeded", "finishedAt": iso(NOW)})
    assert counted(MonthRecord(), [(ended, 100)], (), NOW).tokens == 100
    assert counted(MonthRecord(), [(ended, 100)], (), NOW + MONTH_S) == MonthRecord(month=month_of(NOW + MONTH_S))


def test_a_job_that_cannot_be_read_for_a_while_is_not_counted_again_later() -> None:
    hidden = counted(count(MonthRecord(), a=100), (), ["a-uid"], NOW)
    assert (hidden.tokens, count(hidden, a=120).tokens) == (100, 120)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 100), st.booleans()), max_size=30))
def test_whatever_operators_die_and_in_whatever_order_the_sum_is_that_of_the_jobs(
    steps: list[tuple[str, int, bool]],
) -> None:
    """An operator that dies before it writes leaves the record as it was."""
    totals, record = dict.fromkeys("abc", 0), MonthRecord()
    for name, more, written in steps:
        totals[name] += more
        found = count(record, **totals)
        record = found if written else record
    assert count(record, **totals).tokens == sum(totals.values())


# --- what follows for jobs


def test_a_job_whose_namespace_has_used_up_its_month_waits_without_a_pod() -> None:
    found = plan(observed(), limits=LIMITS, **SPENT)
    assert (found.start, condition(only(found), "Admitted")) == ((), ("False", "TokenQuota"))
    status = only(found).status
    assert status is not None
    assert status.state == JobState.QUEUED
    message = next(item.message for item in status.conditions if item.type == "Admitted")
    assert "Namespace team trained 1000 tokens in 2023-11, and may train 1000 in a month (UTC)" in message
    for world in ({}, {"month_tokens": {"team": 999}}, {"month_tokens": {"other": 1000}}):
        assert plan(observed(), limits=LIMITS, **world).start
    assert plan(observed(), limits=TuningLimits(), **SPENT).start


def test_a_job_in_training_writes_a_checkpoint_waits_and_goes_on_when_the_month_is_over() -> None:
    world: dict[str, Any] = {"limits": LIMITS, "session": session()}
    first = only(plan(observed(), trainer=trainer(), **world)).put
    assert first is not None
    trains = replace(observed(status={"state": "Training"}), sent=Sent("boot", first, NOW))
    stopping = only(plan(trains, trainer=trainer(report()), **SPENT, **world))
    assert stopping.put is not None
    assert stopping.put.run is RunState.PAUSED
    assert stopping.status is not None
    assert stopping.status.state == JobState.TRAINING  # until the trainer says that it wrote the checkpoint

    paused = trainer(report(state=JobState.PAUSED, run="Paused"))
    waits = only(plan(after(stopping, sent=Sent("boot", stopping.put, NOW)), trainer=paused, **SPENT, **world))
    assert (waits.put, condition(waits, "Admitted")) == (None, ("False", "TokenQuota"))
    assert waits.status is not None
    assert waits.status.state == JobState.QUEUED

    goes_on = only(plan(after(waits), trainer=paused, **world))
    assert goes_on.put is not None
    assert goes_on.put.run is RunState.RUN
    assert goes_on.status is not None
    assert goes_on.status.state == JobState.QUEUED


@pytest.mark.parametrize("run", ["Paused", "Cancelled"])
def test_what_the_owner_asks_for_comes_first(run: str) -> None:
    found = only(plan(observed(run=run), limits=LIMITS, **SPENT))
    assert found.status is not None
    assert found.status.state == run
