"""Fine-tuning in a real Prometheus: the dashboard shows figures of each job, and a job's series vanish with it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from chart_kit import dashboard_expressions, run
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_kit import exported, free_port, prometheus
from tuning_plans import job, report

from lorapool_api.tuning.states import JobState
from lorapool_operator.tuning_metrics import TuningCollector
from lorapool_operator.world.tuning import TuningObject
from lorapool_store.metrics import Metrics as StoreMetrics
from lorapool_trainer.engine import MemoryFigures
from lorapool_trainer.serve.metrics import TrainerMetrics
from lorapool_trainer.serve.worker import Published

BASE = "team/tiny"
FAILED = {"reason": "Diverged", "message": ""}
WAITS = {"state": "Queued", "queue": {"position": 1, "reason": "WaitingForTurn"}}


class Exporters:
    """What operator, trainer and store export of the jobs in the lists."""

    def __init__(self, tracked: int = 9) -> None:
        self.jobs: list[TuningObject] = []
        self.published = Published(busy_s=5.0, memory=MemoryFigures(100, 10, 20, 30))
        operator, store = CollectorRegistry(), StoreMetrics()
        operator.register(TuningCollector(self.jobs, max_tracked_jobs=tracked, now=lambda: 1e9))
        store.follow(lambda: {"team": 7})
        trainer = TrainerMetrics(BASE, lambda: self.published, lambda: 1000)
        self.registries = (operator, trainer.registry, store.registry)

    def train(self, *names: str) -> None:
        metrics = {"trainLoss": 0.5, "validLoss": 1.25, "baseValidLoss": 2.0}
        progress = {"step": 3, "totalSteps": 30}
        usage = {"trainedTokens": 40, "trainerSeconds": 2.5}
        reports = [report(name, metrics=metrics, progress=progress, usage=usage) for name in names]
        self.published = Published(tuple(reports), 5.0, memory=self.published.memory)

    def samples(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for registry in self.registries[:2]:
            for family in registry.collect():
                for sample in family.samples:
                    found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return found


def of(name: str) -> tuple[tuple[str, str], ...]:
    return (("base", BASE), ("fine_tune_job", f"team/{name}"))


async def test_each_panel_has_figures_and_the_series_of_a_job_vanish_with_it(tmp_path: Path) -> None:
    exporters = Exporters()
    exporters.jobs += [
        job("a", status={"state": "Training", "usage": {"trainedTokens": 40, "trainerSeconds": 2.5}}),
        job("b", status=WAITS),
        job("c", status={"state": "Failed", "failure": FAILED}),
    ]
    exporters.train("a")
    ports = [free_port() for _ in exporters.registries]
    async with AsyncExitStack() as stack:
        for registry, port in zip(exporters.registries, ports, strict=True):
            await stack.enter_async_context(exported(registry, port))
        metrics = await stack.enter_async_context(prometheus(tmp_path, ports))
        await metrics.until('lorapool_tuning_job_valid_loss{fine_tune_job="team/a"}', 1.25)
        await metrics.until('sum(lorapool_operator_tuning_job_queue_position{fine_tune_job="team/b"})', 1)
        for where, expression in dashboard_expressions(base=BASE, adapter=""):
            if where.startswith("tuning:"):
                async with asyncio.timeout(30):
                    while await metrics.value(expression) is None:  # noqa: ASYNC110  another process
                        await asyncio.sleep(0.1)
        exporters.jobs.clear()
        exporters.train()
        for name in ("a", "b", "c"):
            await metrics.until(f'count({{fine_tune_job="team/{name}"}})', None)


def test_the_figures_are_those_of_reports_and_status() -> None:
    exporters = Exporters()
    exporters.train("a")
    usage: dict[str, Any] = {"trainedTokens": 40, "trainerSeconds": 2.5}
    exporters.jobs += [job("a", status={"state": "Training", "usage": usage}), job("b", status=WAITS)]
    exporters.jobs.append(job("c", status={"state": "Queued", "failure": {**FAILED, "reason": "made-up"}}))

    found = exporters.samples()

    assert found["lorapool_tuning_job_train_loss"] == {of("a"): 0.5}
    assert found["lorapool_tuning_job_trained_tokens_total"] == {of("a"): 40.0}
    assert found["lorapool_operator_tuning_job_trainer_seconds_total"][of("a")] == 2.5
    assert found["lorapool_operator_tuning_job_queue_position"] == {of("b"): 1.0}
    assert set(found["lorapool_operator_tuning_job_waiting_seconds"]) == {of("b"), of("c")}
    parts = {dict(labels)["part"]: size for labels, size in found["lorapool_tuning_memory_bytes"].items()}
    assert parts == {"base": 100.0, "process": 10.0, "jobs": 20.0, "activations": 30.0}
    states = {dict(labels)["state"]: count for labels, count in found["lorapool_operator_tuning_jobs"].items()}
    assert states == {"Training": 1.0, "Queued": 2.0}  # an unknown reason makes no series of its own


def test_unfinished_jobs_keep_their_series_before_ended_ones() -> None:
    exporters = Exporters(tracked=2)
    ended = JobState.SUCCEEDED.value
    exporters.jobs += [job(f"ended-{number}", created=number, status={"state": ended}) for number in range(3)]
    exporters.jobs.append(job("waits", created=-9, status=WAITS))

    found = exporters.samples()["lorapool_operator_tuning_job_trained_tokens_total"]

    assert set(found) == {of("waits"), of("ended-2")}


def test_promtool_finds_nothing_to_complain_of(tmp_path: Path) -> None:
    exporters = Exporters()
    exporters.train("a")
    exporters.jobs.append(job("b", status=WAITS))
    for registry in exporters.registries[:2]:
        checked = run("promtool", "check", "metrics", text=generate_latest(registry).decode())
        assert checked.returncode == 0, checked.stdout + checked.stderr
