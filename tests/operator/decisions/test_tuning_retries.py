"""Transient failures of fine-tuning jobs: tried again after growing waits that the status shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from base_world import NOW
from tuning_plans import LIMITS, VALID, after, condition, observed, only, plan, report, session, trained, trainer

from lorapool_api.tuning.states import JobFailure, JobState
from lorapool_operator.clock import iso
from lorapool_operator.decisions.tuning.session import RESTART_S
from lorapool_operator.decisions.tuning.values import JobPlan
from lorapool_operator.world.tuning import DataFinding, ObservedJob

FIRST = LIMITS.retry_s


def failure_of(found: JobPlan) -> tuple[str, int, str | None]:
    assert found.status is not None
    assert found.status.failure is not None
    return found.status.failure.reason, found.status.failure.attempts, found.status.failure.retry_at


def away(at: float) -> DataFinding:
    return DataFinding(failure=JobFailure.SOURCE_UNAVAILABLE, message="503", at_unix_s=at)


def test_the_waits_between_reads_of_a_data_set_double_and_a_new_operator_keeps_them() -> None:
    found = only(plan(observed(finding=away(NOW))))
    assert failure_of(found) == ("SourceUnavailable", 1, iso(NOW + FIRST))
    new = only(plan(after(found, finding=None), now=NOW + FIRST - 1))
    assert (new.check_data, new.status, new.requeue_at) == (False, None, NOW + FIRST)
    assert only(plan(after(found, finding=None), now=NOW + FIRST)).check_data
    again = only(plan(after(found, finding=away(NOW + FIRST)), now=NOW + FIRST))
    assert failure_of(again) == ("SourceUnavailable", 2, iso(NOW + FIRST + 2 * FIRST))
    assert not again.check_data
    valid = plan(after(again, finding=VALID), now=NOW + 3 * FIRST)
    assert valid.start
    assert condition(only(valid), "DataValid") == ("True", "Valid")


def test_no_wait_is_longer_than_the_longest() -> None:
    job, now = observed(finding=away(NOW)), NOW
    for _ in range(12):
        found = only(plan(job, now=now))
        due = now + LIMITS.retry_max_s
        assert found.requeue_at is not None
        assert found.requeue_at <= due
        now = found.requeue_at
        job = after(found, finding=away(now))
    assert found.requeue_at == due


def failed(reason: str = "SourceUnavailable") -> object:
    return report(state=JobState.FAILED, failure={"reason": reason, "message": "the store is away"})


def test_a_job_that_its_trainer_gave_up_for_now_is_sent_again_and_not_failed() -> None:
    gives_up = trainer(failed())  # type: ignore[arg-type]
    found = only(plan(observed(), session=session(), trainer=gives_up))
    assert found.status is not None
    assert (found.status.state, condition(found, "Admitted")) == ("Queued", ("False", "Retrying"))
    assert failure_of(found) == ("SourceUnavailable", 1, iso(NOW + FIRST))
    waits = only(plan(after(found), now=NOW + FIRST - 1, session=session(), trainer=gives_up))
    assert (waits.unregister, waits.put, waits.status) == (False, None, None)
    due = only(plan(after(found), now=NOW + FIRST, session=session(), trainer=gives_up))
    assert (due.unregister, due.put) == (True, None)
    forgotten = only(plan(after(found), now=NOW + FIRST, session=session(), trainer=trainer()))
    assert forgotten.put is not None
    assert failure_of(forgotten) == ("SourceUnavailable", 1, None)
    again = only(plan(after(forgotten), now=NOW + FIRST, session=session(), trainer=gives_up))
    assert failure_of(again) == ("SourceUnavailable", 2, iso(NOW + 3 * FIRST))
    trains = only(plan(after(again), now=NOW + 9 * FIRST, session=session(), trainer=trainer(report())))
    assert trains.status is not None
    assert (trains.status.state, trains.status.failure) == ("Training", None)


def test_a_final_failure_of_a_trainer_ends_the_job_at_once() -> None:
    found = only(plan(observed(), session=session(), trainer=trainer(failed("Diverged"))))  # type: ignore[arg-type]
    assert condition(found, "Completed") == ("True", "Diverged")


def refused(job: ObservedJob, at: float) -> ObservedJob:
    return replace(job, publish_problem="forbidden by a policy", publish_failed_unix_s=at)


def test_a_model_that_the_api_server_refuses_is_published_again_later() -> None:
    world = {"session": session(), "trainer": trainer(trained())}
    assert only(plan(observed(), **world)).promote
    found = only(plan(refused(observed(), NOW), **world))
    assert (found.promote, failure_of(found)) == (None, ("PublishFailed", 1, iso(NOW + FIRST)))
    due = only(plan(refused(after(found), NOW), now=NOW + FIRST, **world))
    assert due.promote
    again = only(plan(refused(after(found), NOW + FIRST), now=NOW + FIRST, **world))
    assert (again.promote, failure_of(again)) == (None, ("PublishFailed", 2, iso(NOW + 3 * FIRST)))


@pytest.mark.parametrize("ended", [NOW - 1, NOW - RESTART_S + 1])
def test_a_trainer_that_kubernetes_gave_up_is_replaced_at_the_time_that_the_status_shows(ended: float) -> None:
    given_up = session(failure="BackoffLimitExceeded", ended_unix_s=ended)
    found = only(plan(observed(), session=given_up))
    assert failure_of(found) == ("TrainerLost", 1, iso(ended + RESTART_S))
    assert plan(after(found), session=given_up, now=ended + RESTART_S).stop_uid == "session-uid"
