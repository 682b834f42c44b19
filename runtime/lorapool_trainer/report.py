"""What a job reports of itself: the protocol's `JobReport`, for the operator, the console and report.json. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

from lorapool_api.tuning.finetunejob_status import (
    CheckpointStatus,
    DataStatus,
    MetricsStatus,
    ProgressStatus,
    QueueStatus,
    ResolvedStatus,
    TuningUsage,
)
from lorapool_api.tuning.states import JobState
from lorapool_api.tuning.trainer_protocol import JobFailureDetail, JobReport, JobResult
from lorapool_trainer.jobs.history import recent_loss
from lorapool_trainer.jobs.live import LiveJob
from lorapool_trainer.jobs.order import ADAPTER

MAX_CHECKPOINTS = 16


def report_of(
    job: LiveJob, *, place: str, output: str, deaths: int, shared_with: int, now_s: float, now_unix_s: float
) -> JobReport:
    """`place` and `output`: URIs of the job's folder and of its adapter's files, without a slash at the end."""
    return JobReport(
        uid=job.uid,
        display=job.order.display,
        run=job.order.run,
        priority=job.order.priority,
        state=job.state,
        since_unix_s=job.since_unix_s,
        shared_with=shared_with,
        queue=QueueStatus(reason=job.queued_for[0]) if job.queued_for and job.state is JobState.QUEUED else None,
        data=_data(job),
        resolved=_resolved(job),
        progress=_progress(job, now_s, now_unix_s),
        metrics=_metrics(job),
        checkpoints=_checkpoints(job, place),
        result=None
        if job.result is None
        else JobResult(uri=output, digest=job.result.digest, size_bytes=job.result.size_bytes),
        usage=TuningUsage(
            trained_tokens=job.counters.computed_tokens,
            trainer_seconds=round(job.counters.trainer_seconds, 3),
            restarts=job.counters.restarts,
            skipped_steps=job.skipped,
            crashes=deaths,
        ),
        failure=None if job.failure is None else _failure(job),
    )


def _data(job: LiveJob) -> DataStatus | None:
    if job.loaded is None:
        return None
    dataset = job.loaded.dataset
    return DataStatus(
        digest=dataset.digest,
        validation_digest=dataset.validation_digest,
        examples=len(dataset.training),
        train_tokens=dataset.train_tokens,
        counted_tokens=dataset.counted_tokens,
        validation_examples=len(dataset.validation),
    )


def _resolved(job: LiveJob) -> ResolvedStatus | None:
    if job.loaded is None:
        return None
    settings = job.loaded.settings
    return ResolvedStatus(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        rank=settings.rank,
        alpha=round(settings.alpha),
        max_tokens=job.order.training.max_tokens,
        target_modules=[name[:128] for name in job.modules[:64]],
        seed=settings.seed,
        numerics=job.loaded.origin.numerics,
    )


def _progress(job: LiveJob, now_s: float, now_unix_s: float) -> ProgressStatus | None:
    if job.loaded is None or (job.step == 0 and not job.active):
        return None
    steps, step = job.loaded.steps, job.step
    seconds, done = now_s - job.entered_s, step - job.entered_step
    left_s = (steps - step) * seconds / done if job.active and done else None
    rate = (job.counters.trained_tokens - job.entered_tokens) / seconds if job.active and seconds > 0 else None
    return ProgressStatus(
        step=step,
        total_steps=steps,
        epoch=round(min(job.loaded.settings.epochs, job.loaded.settings.epochs * step / steps), 3),
        trained_tokens=job.counters.trained_tokens,
        percent=100 * step // steps,
        steps=f"{step}/{steps}",
        tokens_per_second=None if rate is None else round(rate, 1),
        estimated_finish=None if left_s is None else _time(now_unix_s + left_s),
    )


def _metrics(job: LiveJob) -> MetricsStatus | None:
    if not job.rows:
        return None
    counters = job.counters
    return MetricsStatus(
        train_loss=recent_loss(job.rows),
        valid_loss=counters.valid_loss,
        base_valid_loss=counters.base_loss,
        best_valid_loss=counters.best.loss,
        best_step=counters.best.step,
        valid_token_accuracy=counters.valid_accuracy,
    )


def _checkpoints(job: LiveJob, place: str) -> list[CheckpointStatus]:
    return [
        CheckpointStatus(
            step=found.record.step,
            digest=found.digest,
            uri=f"{place}/{found.name}",
            train_loss=recent_loss(found.record.rows),
            valid_loss=found.record.rows[-1].valid_loss if found.record.rows else None,
            at=_time(found.record.written_unix_s),
        )
        for found in job.checkpoints[-MAX_CHECKPOINTS:]
    ]


def _failure(job: LiveJob) -> JobFailureDetail:
    assert job.failure is not None
    return JobFailureDetail(reason=job.failure.reason.value, message=job.failure.message, line=job.failure.line)


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def adapter_uri(place: str) -> str:
    """Where the adapter is in a job's own folder."""
    return f"{place}/{ADAPTER}"
