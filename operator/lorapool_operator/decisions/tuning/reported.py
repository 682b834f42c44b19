"""What a trainer says of a job, or why there is no trainer that has it."""

from __future__ import annotations

from lorapool_api.tuning.states import JobFailure, JobReason, JobState, RunState
from lorapool_api.tuning.trainer_protocol import JobReport
from lorapool_operator.decisions.tuning.job_status import Decided, was_valid
from lorapool_operator.decisions.tuning.retries import retry_at
from lorapool_operator.decisions.tuning.session import RESTART_S, session_name
from lorapool_operator.decisions.tuning.turns import Turns
from lorapool_operator.decisions.tuning.values import Failure, TuningLimits, Waiting
from lorapool_operator.world.tuning import ObservedJob, ObservedTuning, TuningObject

KEPT = (JobFailure.TRAINER_LOST, JobFailure.PREEMPTED, JobFailure.SOURCE_UNAVAILABLE, JobFailure.PUBLISH_FAILED)
"""Failures that stay in the status until a trainer computes the job again."""


def silent(tuning: ObservedTuning, job: TuningObject) -> bool:
    """True while the pod that has the job runs but does not answer: then nothing new is known, and nothing changes."""
    before, trainer = job.status.trainer, tuning.trainer
    if before is None or trainer is None or trainer.current is not None:
        return False
    return trainer.pod.ready and not trainer.pod.terminating and trainer.pod.meta.name == before.pod


def trained(tuning: ObservedTuning, observed: ObservedJob, turns: Turns, now: float, limits: TuningLimits) -> Decided:
    """Returns what the trainer says of a job, or why it has none."""
    job = observed.job
    report = tuning.report(job.meta.uid)
    if report is not None:
        if (
            report.state is JobState.FAILED
            and (failure := _failure_of(report)) is not None
            and failure.reason.transient
        ):
            due = retry_at(job.status.failure, failure.reason, None, now, limits)
            waiting = Waiting(JobReason.RETRYING, failure.message)
            return Decided(JobState.QUEUED, waiting, failure, report, retry_at_unix_s=due)
        if report.state is JobState.PAUSED and job.spec.run is RunState.RUN:
            # stopped by the operator, or not resumed yet
            return Decided(JobState.QUEUED, turns.waiting.get(job.meta.uid) or _resumes(), report=report)
        return _reported(tuning, job, report)
    if job.spec.run is RunState.PAUSED:
        return Decided(JobState.PAUSED)
    waiting = turns.waiting.get(job.meta.uid) or _for_trainer(tuning)
    held = tuning.session
    restart = held.ended_unix_s + RESTART_S if held is not None and held.failure else None
    failure = _lost(tuning, job) or waiting.failure
    return Decided(JobState.QUEUED, waiting, failure, retry_at_unix_s=restart if failure is not None else None)


def _resumes() -> Waiting:
    return Waiting(JobReason.WAITING_FOR_TURN, "The trainer is about to continue it.")


def _reported(tuning: ObservedTuning, job: TuningObject, report: JobReport) -> Decided:
    failure = _failure_of(report)
    skew_s = tuning.trainer.skew_s if tuning.trainer is not None else 0.0
    retry = report.failure.retry_at_unix_s if report.failure is not None else None
    state = JobState.PUBLISHING if report.state is JobState.SUCCEEDED else report.state
    if state is JobState.CANCELLED:  # only the owner cancels; the trainer has not read of it yet otherwise
        state = JobState.QUEUED
    waiting = None
    if state is JobState.QUEUED:
        known = report.queue.reason if report.queue is not None else ""
        reason = JobReason(known) if known in tuple(JobReason) else JobReason.WAITING_FOR_TURN
        message = report.failure.message if report.failure is not None else ""
        waiting = Waiting(reason, message, report.queue.position if report.queue is not None else None)
    return Decided(
        state, waiting, failure, report, tuning.trainer, retry_at_unix_s=retry + skew_s if retry is not None else None
    )


def _failure_of(report: JobReport) -> Failure | None:
    """Returns the trainer's failure; a reason that this version does not know counts as the loss of the trainer."""
    found = report.failure
    if found is None:
        return None
    known = JobFailure(found.reason) if found.reason in tuple(JobFailure) else JobFailure.TRAINER_LOST
    return Failure(known, found.message, found.line)


def _for_trainer(tuning: ObservedTuning) -> Waiting:
    """Returns why there is no trainer yet."""
    held, trainer = tuning.session, tuning.trainer
    if held is not None and held.suspended:
        message = f"Job {held.meta.name} is suspended: by the profile, or by Kueue until it admits it."
        return Waiting(JobReason.AWAITING_RELEASE, message)
    problem = trainer.pod.problem if trainer is not None else ""
    if held is not None and held.failure:
        failure = Failure(JobFailure.TRAINER_LOST, f"The trainer was given up: {held.failure}. It is started again.")
        return Waiting(JobReason.TRAINER_STARTING, failure.message, failure=failure)
    if problem.startswith("Unschedulable"):
        failure = Failure(JobFailure.NO_CAPACITY, f"No node has room for the trainer's pod: {problem}")
        return Waiting(JobReason.TRAINER_STARTING, failure.message, failure=failure)
    name = session_name(tuning.key.name)
    message = f"The trainer is being started (Job {name}). {problem}".strip()
    failure_or_none = Failure(JobFailure.TRAINER_LOST, problem) if problem else None
    return Waiting(JobReason.TRAINER_STARTING, message, failure=failure_or_none)


def _lost(tuning: ObservedTuning, job: TuningObject) -> Failure | None:
    """Returns what became of the trainer that had the job, until another one has it."""
    before, trainer = job.status.trainer, tuning.trainer
    known = job.status.failure
    if before is None:
        still = known is not None and known.reason in KEPT and was_valid(job.status)
        return Failure(JobFailure(known.reason), known.message) if known is not None and still else None
    if trainer is not None and trainer.pod.meta.name == before.pod and trainer.pod.disruption:
        message = f"The pod {before.pod} made room ({trainer.pod.disruption}). Training continues from its checkpoint."
        return Failure(JobFailure.PREEMPTED, message)
    why = trainer.pod.last_exit or trainer.pod.problem if trainer is not None else ""
    message = f"The trainer in pod {before.pod} is gone. {why} Training continues from the last checkpoint."
    return Failure(JobFailure.TRAINER_LOST, " ".join(message.split()))
