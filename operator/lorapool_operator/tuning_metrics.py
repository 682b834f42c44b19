"""The metrics of fine-tuning jobs, made from their status at each scrape: a job's series vanish with its object.

Live figures of training, such as losses, are exported by the trainer itself.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from lorapool_api.tuning.states import JobCondition, JobFailure, JobState
from lorapool_operator.clock import unix
from lorapool_operator.metrics import Metric, ScrapeCollector
from lorapool_operator.world.cluster_cache import find_condition
from lorapool_operator.world.tuning import TuningObject

LABELS = ("base", "fine_tune_job")
"""Both `namespace/name`."""
QUEUED = (None, JobState.VALIDATING, JobState.QUEUED)


class TuningCollector(ScrapeCollector):
    """Is read in a thread of its own."""

    def __init__(
        self,
        jobs: Iterable[TuningObject],
        *,
        max_tracked_jobs: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._max_tracked_jobs = max_tracked_jobs
        self._now = now

    def collect(self) -> Iterator[Metric]:
        jobs = list(self._jobs)
        tracked = sorted(jobs, key=lambda job: (job.ended, -job.meta.created_unix_s, job.meta.uid))
        yield self._states(jobs)
        yield from self._queue(tracked[: self._max_tracked_jobs])
        yield from self._usage(tracked[: self._max_tracked_jobs])

    def _states(self, jobs: Collection[TuningObject]) -> Metric:
        family = GaugeMetricFamily(
            "lorapool_operator_tuning_jobs",
            "FineTuneJobs by state and by the reason of their failure, which is empty without one.",
            labels=["base", "state", "reason"],
        )
        counts = Tally((str(job.base_key), (job.state or JobState.VALIDATING).value, _reason(job)) for job in jobs)
        for labels, count in sorted(counts.items()):
            family.add_metric(list(labels), float(count))
        return family

    def _queue(self, jobs: Collection[TuningObject]) -> tuple[Metric, ...]:
        position = GaugeMetricFamily(
            "lorapool_operator_tuning_job_queue_position",
            "1 for the job whose turn is next; only of jobs that wait for their turn.",
            labels=LABELS,
        )
        waiting = GaugeMetricFamily(
            "lorapool_operator_tuning_job_waiting_seconds",
            "How long the job has waited to be trained; only of jobs that wait.",
            labels=LABELS,
        )
        for job in jobs:
            labels, queue = [str(job.base_key), str(job.key)], job.status.queue
            if job.state not in QUEUED:
                continue
            waiting.add_metric(labels, max(0.0, self._now() - _waits_since(job)))
            if queue is not None and queue.position is not None:
                position.add_metric(labels, float(queue.position))
        return position, waiting

    def _usage(self, jobs: Collection[TuningObject]) -> tuple[Metric, ...]:
        text = "since the job was created; unfinished jobs, then the newest max_tracked_adapters, have series."
        tokens = CounterMetricFamily(
            "lorapool_operator_tuning_job_trained_tokens", f"Tokens that were computed {text}", labels=LABELS
        )
        seconds = CounterMetricFamily(
            "lorapool_operator_tuning_job_trainer_seconds", f"Share of the trainer's time {text}", labels=LABELS
        )
        for job in jobs:
            labels, usage = [str(job.base_key), str(job.key)], job.status.usage
            tokens.add_metric(labels, float(usage.trained_tokens if usage is not None else 0))
            seconds.add_metric(labels, usage.trainer_seconds if usage is not None else 0.0)
        return tokens, seconds


def _reason(job: TuningObject) -> str:
    """Returns one of a fixed set of names, so that the series stay few."""
    found = job.status.failure.reason if job.status.failure is not None else ""
    return found if found in tuple(JobFailure) else ""


def _waits_since(job: TuningObject) -> float:
    """Returns since when the job is not trained: its creation, or the end of its last stay in a trainer."""
    admitted = find_condition(job.status.conditions, JobCondition.ADMITTED)
    since = unix(admitted.last_transition_time) if admitted is not None else None
    return since or job.meta.created_unix_s
