"""Plans all FineTuneJobs of one base, and its trainer.

    base, data, quotas  ->  turns  ->  trainer's Job  ->  what each job is sent  ->  result, gate, model  ->  status

A job that has ended is never planned again, but for its deletion. Nothing here remembers anything: a new operator plans
from the objects, the trainer's report and what the status says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorapool_api.common import duration_s
from lorapool_api.tuning.finetunejob import FINALIZER, FineTuneJobSpec, PromotionPolicy
from lorapool_api.tuning.finetunejob_status import FineTuneJobStatus
from lorapool_api.tuning.states import JobFailure, JobState, RunState
from lorapool_operator.clock import unix
from lorapool_operator.decisions.pods import Manifest
from lorapool_operator.decisions.tuning import checks, session
from lorapool_operator.decisions.tuning.assignment import assignment, initial_to_pin
from lorapool_operator.decisions.tuning.job_status import (
    Decided,
    data_is_valid,
    differs_at_once,
    events_of,
    status_of,
)
from lorapool_operator.decisions.tuning.promotion import gate, is_result, lora_adapter
from lorapool_operator.decisions.tuning.reported import silent, trained
from lorapool_operator.decisions.tuning.retries import retry_at
from lorapool_operator.decisions.tuning.turns import Turns, spent_namespaces, take_turns
from lorapool_operator.decisions.tuning.values import Failure, JobPlan, TuningLimits, TuningPlan
from lorapool_operator.world.tuning import ObservedJob, ObservedTuning, TuningObject


def plan_tuning(tuning: ObservedTuning, now: float, limits: TuningLimits) -> TuningPlan:
    """Returns the whole plan; the same observation, time and limits give the same plan."""
    if tuning.base is None and tuning.base_may_exist:
        return TuningPlan()
    entries = {item.job.meta.uid: _entry(tuning, item, now, limits) for item in tuning.jobs}
    ready = [item for item in tuning.jobs if entries[item.job.meta.uid] is None and not _trained_already(tuning, item)]
    turns = _turns(tuning, ready, now, limits)
    wanted = bool(turns.wanted)
    plans = tuple(_job(tuning, item, entries[item.job.meta.uid], turns, now, limits) for item in tuning.jobs)
    start: tuple[Manifest, ...] = ()
    if wanted and tuning.session is None and tuning.base is not None and tuning.profile is not None:
        start = session.children(tuning, tuning.base, tuning.profile, limits)
    dues = [plan.requeue_at for plan in plans] + [session.stop_due(tuning)]
    return TuningPlan(
        start=start,
        stop_uid=session.stop_uid(tuning, wanted, now),
        jobs=plans,
        requeue_at=min((due for due in dues if due is not None and due > now), default=None),
    )


def _trained_already(tuning: ObservedTuning, observed: ObservedJob) -> bool:
    """True if the trainer has no more to do for the job."""
    report = tuning.report(observed.job.meta.uid)
    return report is not None and report.state.ended


def _turns(tuning: ObservedTuning, ready: list[ObservedJob], now: float, limits: TuningLimits) -> Turns:
    return take_turns(
        ready,
        registered=[item.job.meta.uid for item in ready if tuning.report(item.job.meta.uid) is not None],
        max_jobs=tuning.base.spec.fine_tuning.max_jobs if tuning.base is not None else 1,
        active_jobs=limits.active_jobs,
        active_elsewhere=tuning.active_elsewhere,
        spent=spent_namespaces(tuning.month_tokens, limits.month_tokens, now),
    )


# --- before a trainer --------------------------------------------------------------------


def _entry(tuning: ObservedTuning, observed: ObservedJob, now: float, limits: TuningLimits) -> Decided | None:
    """Returns what is decided about a job without a trainer; None if it is ready to be trained."""
    job = observed.job
    if job.ended or job.meta.deleting:
        return Decided(job.state or JobState.CANCELLED)
    if job.spec.run is RunState.CANCELLED:
        return Decided(JobState.CANCELLED, report=tuning.report(job.meta.uid))
    failure = _over_time(job, now) or _over_quota(tuning, job, limits)
    if failure is not None:
        return Decided(JobState.FAILED, failure=failure, report=tuning.report(job.meta.uid))
    waiting = checks.waits_for_base(tuning, job)
    if waiting is not None:
        return Decided(JobState.QUEUED, waiting)
    if tuning.base is not None and tuning.report(job.meta.uid) is None:
        failure = checks.refusal(observed, tuning.base)
        if failure is not None:
            return Decided(JobState.FAILED, failure=failure)
        if (waiting := checks.waits_for_initial(observed)) is not None:
            return Decided(JobState.QUEUED, waiting)
    return None if data_is_valid(observed) else _data(observed, now, limits)


def _over_time(job: TuningObject, now: float) -> Failure | None:
    due = _deadline_at(job.spec, job.status)
    if due is None or now < due:
        return None
    message = f"The job did not end within {job.spec.active_deadline} (spec.activeDeadline)."
    return Failure(JobFailure.DEADLINE_EXCEEDED, message)


def _over_quota(tuning: ObservedTuning, job: TuningObject, limits: TuningLimits) -> Failure | None:
    """Refuses a new job only: one that was accepted once stays so."""
    older = tuning.older_unfinished.get(job.meta.uid, 0)
    if job.status.state is not None or older < limits.unfinished_jobs:
        return None
    message = (
        f"Namespace {job.meta.namespace} has {older} unfinished jobs, as many as it may: wait for some to end or "
        "cancel some, and create this one again."
    )
    return Failure(JobFailure.QUOTA_EXCEEDED, message)


def _data(observed: ObservedJob, now: float, limits: TuningLimits) -> Decided:
    finding, before = observed.finding, observed.job.status.failure
    if finding is None or finding.failure is None:
        known = before is not None and before.reason == JobFailure.SOURCE_UNAVAILABLE  # of an earlier process
        if before is None or not known:
            return Decided(JobState.VALIDATING)
        failure = Failure(JobFailure.SOURCE_UNAVAILABLE, before.message)
        return Decided(JobState.VALIDATING, failure=failure, retry_at_unix_s=unix(before.retry_at))
    failure = Failure(finding.failure, finding.message, finding.line)
    if not finding.failure.transient:
        return Decided(JobState.FAILED, failure=failure)
    due = retry_at(before, finding.failure, finding.at_unix_s, now, limits)
    return Decided(JobState.VALIDATING, failure=failure, retry_at_unix_s=due)


# --- one job -----------------------------------------------------------------------------


def _job(
    tuning: ObservedTuning,
    observed: ObservedJob,
    entry: Decided | None,
    turns: Turns,
    now: float,
    limits: TuningLimits,
) -> JobPlan:
    job = observed.job
    if job.meta.deleting:
        return _deleting(tuning, observed)
    if job.ended:
        return _ended(tuning, observed, now)
    if entry is None and silent(tuning, job):
        return JobPlan(observed)
    plan = JobPlan(observed, finalizers=_finalizers(job))
    decided = entry or trained(tuning, observed, turns, now, limits)
    if entry is None:
        decided = replace(decided, initial=initial_to_pin(tuning, observed, turns))
    if entry is None or decided.report is not None:
        decided = _completed(observed, decided, now, limits)
        plan = _with_result(tuning, plan, decided, now)
    report = tuning.report(job.meta.uid)
    retry = decided.retry_at_unix_s
    again = report is not None and report.state is JobState.FAILED and retry is not None and now >= retry
    checks_data = decided.state is JobState.VALIDATING and not observed.checking and (retry is None or now >= retry)
    plan = replace(
        plan,
        check_data=checks_data,
        unregister=report is not None and (decided.state.ended or again),
        put=assignment(tuning, observed, turns, now) if entry is None and not decided.state.ended else None,
    )
    return _with_status(plan, observed, decided, now, limits)


def _with_status(plan: JobPlan, observed: ObservedJob, decided: Decided, now: float, limits: TuningLimits) -> JobPlan:
    """Adds the status if it changed: at once for a state, every `status_interval_s` for figures."""
    before, after = observed.job.status, status_of(observed, decided, now)
    dues = [plan.requeue_at, decided.retry_at_unix_s, _deadline_at(observed.job.spec, after)]
    if after != before:
        due = observed.written_unix_s + limits.status_interval_s
        if differs_at_once(before, after) or now >= due:
            plan = replace(plan, status=after, events=events_of(before, after))
        else:
            dues.append(due)
    return replace(plan, requeue_at=min((at for at in dues if at is not None and at > now), default=None))


def _deadline_at(spec: FineTuneJobSpec, status: FineTuneJobStatus) -> float | None:
    started, allowed = unix(status.started_at), spec.active_deadline
    return started + duration_s(allowed) if started is not None and allowed is not None else None


def _finalizers(job: TuningObject) -> tuple[str, ...] | None:
    return None if FINALIZER in job.finalizers else (*job.finalizers, FINALIZER)


def _deleting(tuning: ObservedTuning, observed: ObservedJob) -> JobPlan:
    """The trainer forgets the job first, so that nothing is written after the files are deleted."""
    job = observed.job
    if FINALIZER not in job.finalizers:
        return JobPlan(observed)
    if tuning.report(job.meta.uid) is not None:
        return JobPlan(observed, unregister=True)
    if silent(tuning, job):
        return JobPlan(observed)
    if not observed.deleted_data and tuning.store:
        return JobPlan(observed, delete_data=True)
    return JobPlan(observed, finalizers=tuple(name for name in job.finalizers if name != FINALIZER))


def _ended(tuning: ObservedTuning, observed: ObservedJob, now: float) -> JobPlan:
    job = observed.job
    finished, kept = unix(job.status.finished_at), job.spec.ttl_after_finished
    due = finished + duration_s(kept) if finished is not None and kept is not None else None
    return JobPlan(
        observed,
        unregister=tuning.report(job.meta.uid) is not None,
        delete_object=due is not None and now >= due,
        requeue_at=due if due is not None and now < due else None,
    )


# --- after training ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Whether the report is that of a trained adapter, which passes the gate."""

    failure: Failure | None
    promotes: bool


def _outcome(observed: ObservedJob, decided: Decided) -> _Outcome | None:
    report = decided.report
    if report is None or report.state is not JobState.SUCCEEDED or report.result is None or decided.state.ended:
        return None
    promotion = observed.job.spec.promotion
    if promotion.policy is PromotionPolicy.NEVER:
        return _Outcome(None, promotes=False)
    failure = gate(promotion, report.metrics)
    if failure is None and observed.result is not None and not is_result(observed, report.result):
        name = observed.result.meta.name
        message = f"LoraAdapter {name} exists and is not this job's: its result is in status.result."
        failure = Failure(JobFailure.NAME_TAKEN, message)
    return _Outcome(failure, promotes=failure is None)


def _with_result(tuning: ObservedTuning, plan: JobPlan, decided: Decided, now: float) -> JobPlan:
    """Adds the LoraAdapter, if the result becomes one, it does not exist, and no refusal is waited for."""
    found = _outcome(plan.observed, decided)
    current = tuning.trainer.current if tuning.trainer is not None else None
    report = decided.report
    if found is None or not found.promotes or plan.observed.result is not None or current is None or report is None:
        return plan
    if report.result is None or (decided.retry_at_unix_s or 0.0) > now:
        return plan
    return replace(plan, promote=lora_adapter(plan.observed.job, report, report.result, current))


def _completed(observed: ObservedJob, decided: Decided, now: float, limits: TuningLimits) -> Decided:
    """Decides how a trained job ends. It is Publishing until its model has its name, or it is known why it has not."""
    found = _outcome(observed, decided)
    if found is None:
        return decided
    if found.failure is not None:
        return replace(decided, state=JobState.FAILED, failure=found.failure)
    if not found.promotes:
        return replace(decided, state=JobState.SUCCEEDED, failure=None)
    adapter = observed.result
    if adapter is None:
        if not observed.publish_problem:
            return replace(decided, failure=None)
        failure = Failure(JobFailure.PUBLISH_FAILED, observed.publish_problem)
        before, at = observed.job.status.failure, observed.publish_failed_unix_s
        due = retry_at(before, JobFailure.PUBLISH_FAILED, at, now, limits)
        return replace(decided, failure=failure, retry_at_unix_s=due)
    settled = adapter.status.alias == adapter.spec.alias or adapter.status.failure is not None
    state = JobState.SUCCEEDED if settled else JobState.PUBLISHING
    return replace(decided, state=state, failure=None, promoted=True)
