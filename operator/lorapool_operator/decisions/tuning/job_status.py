"""The status of a FineTuneJob from what was decided and observed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorapool_api.common import set_conditions
from lorapool_api.tuning.finetunejob_status import (
    DataStatus,
    FineTuneJobStatus,
    InitialStatus,
    JobFailureStatus,
    MetricsStatus,
    ProgressStatus,
    QueueStatus,
    ResultStatus,
    TrainerStatus,
)
from lorapool_api.tuning.states import JobCondition, JobFailure, JobReason, JobState
from lorapool_api.tuning.trainer_protocol import JobReport
from lorapool_operator.clock import iso, unix
from lorapool_operator.decisions.plan import ConditionValue, KubeEvent, KubeEventType
from lorapool_operator.decisions.tuning.promotion import adapter_name, alias_of
from lorapool_operator.decisions.tuning.values import Failure, Waiting
from lorapool_operator.world.tuning import DataFinding, ObservedJob, TrainerView

RUNNING = (JobState.TRAINING, JobState.EVALUATING, JobState.PUBLISHING)


@dataclass(frozen=True, slots=True)
class Decided:
    """What was decided about a job."""

    state: JobState
    waiting: Waiting | None = None
    failure: Failure | None = None
    """Terminal if the state is Failed, else transient."""
    report: JobReport | None = None
    trainer: TrainerView | None = None
    promoted: bool = False
    retry_at_unix_s: float | None = None
    initial: InitialStatus | None = None
    """The adapter that the job is about to continue; None if it has none, or the status has it."""


def status_of(observed: ObservedJob, decided: Decided, now: float) -> FineTuneJobStatus:
    """Returns the whole status. What the trainer reported last stays while no trainer has the job."""
    job, report = observed.job, decided.report
    before = job.status
    metrics = _rounded(report.metrics) if report is not None and report.metrics is not None else before.metrics
    started = before.started_at or (iso(now) if decided.state in RUNNING else None)
    status = before.model_copy(
        update={
            "observed_generation": job.meta.generation,
            "state": decided.state.value,
            "started_at": started,
            "finished_at": iso(now) if decided.state.ended else None,
            "data": _data(before.data, observed.finding, report),
            "initial": before.initial or decided.initial,
            "metrics": metrics,
            "trainer": _trainer(report, decided.trainer) if not decided.state.ended else None,
            "queue": _queue(decided),
            "result": _result(observed, decided),
            "failure": _failure(before.failure, decided),
        }
    )
    if report is not None:
        status = status.model_copy(
            update={
                "resolved": report.resolved or before.resolved,
                "progress": _progress(report.progress) or before.progress,
                "checkpoints": report.checkpoints,
                "usage": report.usage,
            }
        )
    wanted = _conditions(observed, decided, metrics)
    conditions = set_conditions(before.conditions, wanted, generation=job.meta.generation, now=iso(now))
    return status.model_copy(update={"conditions": conditions})


def differs_at_once(before: FineTuneJobStatus, after: FineTuneJobStatus) -> bool:
    """True for a change that is written at once; counters and messages wait for their turn."""
    return _shape(before) != _shape(after)


def _shape(status: FineTuneJobStatus) -> tuple[object, ...]:
    failure, trainer = status.failure, status.trainer
    return (
        status.state,
        status.observed_generation,
        [(item.type, item.status, item.reason) for item in status.conditions],
        (failure.reason, failure.attempts, failure.line, failure.retry_at) if failure is not None else None,
        (trainer.pod, trainer.boot_id) if trainer is not None else None,
        status.queue.reason if status.queue is not None else None,
        [item.digest for item in status.checkpoints],
        status.result,
        status.data,
        status.initial,
    )


def events_of(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[KubeEvent, ...]:
    """Returns an event for a new state, or a new failure."""
    failure = after.failure
    if failure is not None and (before.failure is None or before.failure.reason != failure.reason):
        return (KubeEvent(KubeEventType.WARNING, failure.reason, failure.message),)
    if after.state == before.state or after.state is None:
        return ()
    model = after.result.model if after.result is not None and after.result.model else ""
    message = f"The model is {model}." if model else f"The job is {after.state}."
    return (KubeEvent(KubeEventType.NORMAL, after.state, message),)


# --- parts -------------------------------------------------------------------------------


def _data(before: DataStatus | None, finding: DataFinding | None, report: JobReport | None) -> DataStatus | None:
    if report is not None and report.data is not None:
        return report.data
    if before is not None or finding is None or finding.failure is not None:
        return before
    return DataStatus(
        digest=finding.digest,
        validation_digest=finding.validation_digest,
        examples=finding.examples,
        validation_examples=finding.validation_examples,
    )


def _rounded(metrics: MetricsStatus) -> MetricsStatus:
    """Four decimals, as kubectl's columns show them."""
    values = {name: round(value, 4) if isinstance(value, float) else value for name, value in metrics}
    return MetricsStatus(**values)


def _progress(progress: ProgressStatus | None) -> ProgressStatus | None:
    if progress is None:
        return None
    percent = min(100, 100 * progress.step // max(1, progress.total_steps))
    steps = f"{progress.step}/{progress.total_steps}"
    return progress.model_copy(update={"percent": percent, "steps": steps})


def _trainer(report: JobReport | None, trainer: TrainerView | None) -> TrainerStatus | None:
    current = trainer.current if trainer is not None else None
    if report is None or trainer is None or current is None:
        return None
    return TrainerStatus(
        pod=trainer.pod.meta.name,
        boot_id=current.boot_id,
        base_digest=current.base.digest if current.base is not None else None,
        shared_with=report.shared_with,
        since=iso(report.since_unix_s + trainer.skew_s),
    )


def _queue(decided: Decided) -> QueueStatus | None:
    waiting = decided.waiting
    return QueueStatus(position=waiting.position, reason=waiting.reason.value) if waiting is not None else None


def _result(observed: ObservedJob, decided: Decided) -> ResultStatus | None:
    """Returns the files; the names only once the LoraAdapter exists."""
    result = decided.report.result if decided.report is not None else None
    if result is None:
        return observed.job.status.result
    names = {"adapter": adapter_name(observed.job), "model": alias_of(observed.job)} if decided.promoted else {}
    return ResultStatus(digest=result.digest, uri=result.uri, size_bytes=result.size_bytes, **names)


def _failure(before: JobFailureStatus | None, decided: Decided) -> JobFailureStatus | None:
    failure = decided.failure
    if failure is None:
        return None
    same = before is not None and before.reason == failure.reason.value
    attempts = before.attempts if before is not None and same else 0
    due = decided.retry_at_unix_s
    known = before.retry_at if before is not None else None
    again = not same or (due is not None and unix(known) != float(int(due)))
    return JobFailureStatus(
        reason=failure.reason.value,
        message=failure.message[:1024],
        line=failure.line,
        attempts=attempts + 1 if again else attempts,
        retry_at=iso(due) if due is not None else None,
    )


# --- conditions --------------------------------------------------------------------------


def _conditions(observed: ObservedJob, decided: Decided, metrics: MetricsStatus | None) -> Mapping[str, ConditionValue]:
    return {
        JobCondition.DATA_VALID.value: _data_valid(observed, decided),
        JobCondition.ADMITTED.value: _admitted(decided),
        JobCondition.PROGRESSING.value: _progressing(decided),
        JobCondition.EVALUATED.value: _evaluated(observed, decided, metrics),
        JobCondition.PROMOTED.value: _promoted(observed, decided),
        JobCondition.COMPLETED.value: _completed(decided),
    }


DATA_FAILURES = (
    JobFailure.INVALID_DATASET,
    JobFailure.TOO_FEW_EXAMPLES,
    JobFailure.EXAMPLE_TOO_LONG,
    JobFailure.TEMPLATE_UNSUPPORTED,
    JobFailure.SOURCE_UNAVAILABLE,
)


def data_is_valid(observed: ObservedJob) -> bool:
    """True if the data set was checked, now or by an earlier process."""
    if observed.finding is not None:
        return observed.finding.failure is None
    return was_valid(observed.job.status)


def was_valid(status: FineTuneJobStatus) -> bool:
    """True if the status says that the data set can be used."""
    return any(item.type == JobCondition.DATA_VALID and item.status == "True" for item in status.conditions)


def _data_valid(observed: ObservedJob, decided: Decided) -> ConditionValue:
    failure = decided.failure
    passing = failure is not None and failure.reason.transient and data_is_valid(observed)
    if failure is not None and failure.reason in DATA_FAILURES and not passing:
        return ("Unknown" if failure.reason.transient else "False", failure.reason.value, failure.message)
    if data_is_valid(observed):
        return "True", JobReason.VALID.value, "The data set can be used."
    return "Unknown", JobReason.PENDING.value, "The data set is not checked yet."


def _admitted(decided: Decided) -> ConditionValue:
    if decided.waiting is not None:
        return "False", decided.waiting.reason.value, decided.waiting.message
    if decided.state in (*RUNNING, JobState.SUCCEEDED):
        return "True", JobReason.ADMITTED.value, "A trainer has the job."
    reason = JobReason.PAUSED if decided.state is JobState.PAUSED else JobReason.PENDING
    return "False", (JobReason.ENDED if decided.state.ended else reason).value, ""


def _progressing(decided: Decided) -> ConditionValue:
    if decided.state in RUNNING:
        return "True", decided.state.value, ""
    if decided.state.ended:
        return "False", JobReason.ENDED.value, ""
    if decided.failure is not None:
        return "False", decided.failure.reason.value, decided.failure.message
    reason = JobReason.PAUSED if decided.state is JobState.PAUSED else JobReason.PENDING
    return "False", reason.value, ""


def _evaluated(observed: ObservedJob, decided: Decided, metrics: MetricsStatus | None) -> ConditionValue:
    data = observed.job.spec.data
    if data.validation is None and data.validation_fraction is None:
        return "False", JobReason.NOT_EVALUATED.value, "The job has no validation examples."
    trained = decided.report is not None and decided.report.state is JobState.SUCCEEDED
    if trained and metrics is not None and metrics.valid_loss is not None:
        message = f"The validation loss is {metrics.valid_loss}, the base's own {metrics.base_valid_loss}."
        return "True", JobReason.EVALUATED.value, message
    reason = JobReason.ENDED if decided.state.ended else JobReason.PENDING
    return "False", reason.value, ""


def _promoted(observed: ObservedJob, decided: Decided) -> ConditionValue:
    if decided.promoted:
        return "True", JobReason.PROMOTED.value, f"LoraAdapter {adapter_name(observed.job)} has the result."
    if decided.state is JobState.SUCCEEDED:
        return "False", JobReason.PROMOTION_OFF.value, "spec.promotion.policy is Never."
    if decided.state is JobState.FAILED and decided.failure is not None:
        return "False", decided.failure.reason.value, decided.failure.message
    reason = JobReason.ENDED if decided.state.ended else JobReason.PENDING
    return "False", reason.value, ""


def _completed(decided: Decided) -> ConditionValue:
    if decided.state is JobState.FAILED and decided.failure is not None:
        return "True", decided.failure.reason.value, decided.failure.message
    if decided.state.ended:
        return "True", decided.state.value, ""
    return "False", JobReason.PENDING.value, ""
