"""Metrics of a trainer, made from its reports at each scrape: a job's series vanish with the job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorapool_api.tuning.states import JobState
from lorapool_api.tuning.trainer_protocol import JobReport
from lorapool_trainer.serve.worker import Published

LABELS = ("base", "fine_tune_job")
"""Not `job`: Prometheus has a label of that name for what it scrapes, and renames others."""
Figure = Callable[[JobReport], object]
"""The number, or anything else where there is none yet."""

GAUGES: tuple[tuple[str, str, Figure], ...] = (
    (
        "train_loss",
        "Mean training loss of the last steps, in nats.",
        lambda job: job.metrics and job.metrics.train_loss,
    ),
    ("valid_loss", "Validation loss of the last evaluation.", lambda job: job.metrics and job.metrics.valid_loss),
    (
        "base_valid_loss",
        "Validation loss of the base alone.",
        lambda job: job.metrics and job.metrics.base_valid_loss,
    ),
    ("step", "Optimiser steps that are done.", lambda job: job.progress and job.progress.step),
    ("steps_planned", "Optimiser steps of the whole job.", lambda job: job.progress and job.progress.total_steps),
)
COUNTERS: tuple[tuple[str, str, Figure], ...] = (
    ("trained_tokens", "Tokens that were computed for the job.", lambda job: job.usage.trained_tokens),
    ("trainer_seconds", "The job's share of the trainer's busy time.", lambda job: job.usage.trainer_seconds),
    (
        "skipped_steps",
        "Steps without effect: loss or gradient was not finite.",
        lambda job: job.usage.skipped_steps,
    ),
)


class TrainerMetrics(Collector):
    def __init__(self, base: str, published: Callable[[], Published], limit_bytes: Callable[[], int]) -> None:
        """`base` is `namespace/name`."""
        self._base, self._published, self._limit_bytes = base, published, limit_bytes
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        found = self._published()
        for name, text, figure in GAUGES:
            yield self._filled(
                GaugeMetricFamily(f"lorapool_tuning_job_{name}", text, labels=LABELS), found.jobs, figure
            )
        for name, text, figure in COUNTERS:
            family = CounterMetricFamily(f"lorapool_tuning_job_{name}", text, labels=LABELS)
            yield self._filled(family, found.jobs, figure)
        states = GaugeMetricFamily("lorapool_tuning_jobs", "Registered jobs by state.", labels=("base", "state"))
        for state in JobState:
            states.add_metric((self._base, state.value), sum(job.state is state for job in found.jobs))
        yield states
        busy = CounterMetricFamily("lorapool_tuning_busy_seconds", "Time in cycles.", labels=("base",))
        busy.add_metric((self._base,), found.busy_s)
        yield busy
        yield from self._memory(found)

    def _memory(self, found: Published) -> Iterator[Metric]:
        """What jobs are admitted by."""
        limit = GaugeMetricFamily(
            "lorapool_tuning_memory_limit_bytes", "Memory that training may use.", labels=("base",)
        )
        parts = GaugeMetricFamily(
            "lorapool_tuning_memory_bytes",
            "Memory by use; activations as measured for a whole cycle.",
            labels=("base", "part"),
        )
        if found.memory is not None:
            figures = found.memory
            limit.add_metric((self._base,), self._limit_bytes())
            for part, size in (
                ("base", figures.base),
                ("process", figures.fixed),
                ("jobs", figures.adapters),
                ("activations", figures.activations),
            ):
                parts.add_metric((self._base, part), size)
        yield from (limit, parts)

    def _filled(
        self, family: GaugeMetricFamily | CounterMetricFamily, jobs: Iterable[JobReport], figure: Figure
    ) -> Metric:
        for job in jobs:
            if not job.state.ended and isinstance(value := figure(job), (int, float)):
                family.add_metric((self._base, job.display), value)
        return family
