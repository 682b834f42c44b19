"""The session: all jobs of one process on one engine, computed cycle by cycle.

A cycle is planned (`shares`: whose turn it is), computed by the engine, and counted (`jobs.live`: what follows).
Evaluations are computed in pieces between cycles, so that no job waits long for another. One thread makes all calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from lorapool_api.tuning.states import JobFailure, JobReason, JobState, RunState
from lorapool_api.tuning.trainer_protocol import MAX_CRASHES
from lorapool_artifacts.datasets.errors import DatasetError
from lorapool_artifacts.errors import ArtifactError
from lorapool_trainer.data.encoder import Encoder
from lorapool_trainer.engine import Engine, JobSettings, MemoryFigures, Numerics, Take, TargetError
from lorapool_trainer.jobs.checkpoint import BaseChangedError, CheckpointMismatchError, check_origin, read_checkpoints
from lorapool_trainer.jobs.history import progress
from lorapool_trainer.jobs.initial import InitialAdapter
from lorapool_trainer.jobs.inputs import JobInput, read_input
from lorapool_trainer.jobs.live import LiveJob, Loaded
from lorapool_trainer.jobs.order import JobFiles, JobOrder
from lorapool_trainer.jobs.settings import continued_settings, engine_settings
from lorapool_trainer.shares import Demand, Shares
from lorapool_trainer.suspects import ALONE_AFTER, Suspects

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionLimits:
    max_jobs: int = 8
    """Jobs in the engine at the same time."""
    memory_bytes: int | None = None
    """Of the device; None admits any."""


@dataclass(frozen=True, slots=True)
class BaseName:
    display: str
    """For adapter_config.json."""
    identity: str
    """Changes whenever the base's files do."""


class Session:
    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        base: BaseName,
        suspects: Suspects,
        limits: SessionLimits = SessionLimits(),
        *,
        monotonic: Callable[[], float] = time.monotonic,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._encoder, self._base, self._suspects = engine, encoder, base, suspects
        self._limits, self._monotonic, self._unix_time = limits, monotonic, unix_time
        self.jobs: dict[str, LiveJob] = {}
        self.busy_s = 0.0
        self._shares = Shares()
        self._readers = ThreadPoolExecutor(1, "read-data")
        self._reading: dict[str, Future[JobInput]] = {}

    # --- jobs come, change and go ---------------------------------------------------------

    def put(self, order: JobOrder, files: JobFiles) -> LiveJob:
        """Registers a job, or changes what may change of a known one: `run` and `priority`."""
        job = self.jobs.get(order.uid)
        if job is None:
            job = self.jobs[order.uid] = LiveJob(order, files, self._unix_time())
            self._reading[order.uid] = self._readers.submit(
                read_input, order, files, self._encoder, self._most_tokens(order)
            )
        elif not job.state.ended:
            job.order = replace(job.order, run=order.run, priority=order.priority)
        self._apply_run(job)
        return job

    def delete(self, uid: str) -> None:
        """Stops a job without a checkpoint and forgets it."""
        if (job := self.jobs.pop(uid, None)) is not None:
            self._leave(job)
            self._reading.pop(uid, None)
            self._suspects.forget(uid)

    def close(self) -> None:
        """Writes a checkpoint of each active job; nothing is computed afterwards."""
        for job in self._active():
            self._checkpoint(job)
            job.write_pictures()
        self._suspects.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _apply_run(self, job: LiveJob) -> None:
        run = job.order.run
        if job.state.ended:
            return
        if run is RunState.CANCELLED:
            self._leave(job)
            job.state = JobState.CANCELLED
        elif run is RunState.PAUSED and job.state is not JobState.PAUSED and job.loaded is not None:
            if job.active:
                self._checkpoint(job)
            self._leave(job)
            job.state, job.queued_for = JobState.PAUSED, None
        elif run is RunState.RUN and job.state is JobState.PAUSED:
            self._queue(job)

    def _leave(self, job: LiveJob) -> None:
        if job.active:
            job.leave(self._engine)

    def _most_tokens(self, order: JobOrder) -> int:
        return min(order.training.max_tokens or self._engine.base.max_positions, self._engine.base.max_positions)

    # --- work -----------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any job can be computed, or will be once its data was read."""
        return bool(self._reading) or any(job.active or job.state is JobState.QUEUED for job in self.jobs.values())

    @property
    def memory(self) -> MemoryFigures:
        """What is used by what, without measuring again."""
        return self._engine.memory_as_known()

    def wait_for_data(self, timeout_s: float) -> None:
        """Blocks while nothing but the reading of data goes on."""
        for future in list(self._reading.values())[:1]:
            try:
                future.exception(timeout_s)
            except TimeoutError:
                return

    def work(self) -> bool:
        """Takes in what was read, admits who waits, and computes one cycle. False when there was nothing to compute."""
        self._take_in_data()
        self._admit()
        demands = {job.uid: self._demand(job) for job in self._active()}
        taken = self._shares.plan(demands.values(), self._engine.token_budget) if demands else {}
        if not taken:
            return False
        taken = self._apart(taken)
        self._suspects.computing({uid: self.jobs[uid].progress for uid in taken})
        measured = [uid for uid in taken if self.jobs[uid].measuring]
        self._evaluate(measured, demands)
        self._train([Take(uid, count) for uid, count in taken.items() if uid not in measured], demands)
        self._write_due_checkpoints()
        return True

    def _active(self) -> list[LiveJob]:
        return [job for job in self.jobs.values() if job.active]

    def _demand(self, job: LiveJob) -> Demand:
        tokens = (job.measuring.next_tokens,) if job.measuring else self._engine.offer(job.uid).tokens
        return Demand(job.uid, job.order.tenant, job.order.priority, tokens)

    def _apart(self, taken: Mapping[str, int]) -> dict[str, int]:
        """A job that was computing in several deaths is computed alone; whose turn it is comes first in `taken`."""
        first = next(iter(taken))
        if self._is_suspect(first):
            return {first: taken[first]}
        return {uid: count for uid, count in taken.items() if not self._is_suspect(uid)}

    def _is_suspect(self, uid: str) -> bool:
        return self._suspects.deaths(uid) >= ALONE_AFTER

    def deaths(self, uid: str) -> int:
        """How often a trainer's process died while it computed the job's present step."""
        return self._suspects.deaths(uid)

    def _evaluate(self, uids: list[str], demands: Mapping[str, Demand]) -> None:
        for job in map(self.jobs.__getitem__, uids):
            measuring = job.measuring
            assert measuring is not None
            began_s = self._monotonic()
            found = self._engine.evaluate(measuring.uid, measuring.pieces[len(measuring.done)])
            self._count({job.uid: found.tokens}, self._monotonic() - began_s, demands, trained=False)
            if job.after_evaluation(found):
                self._checkpoint(job)  # so that the best result outlives later steps
            self._end_if_trained(job)

    def _train(self, takes: list[Take], demands: Mapping[str, Demand]) -> None:
        if not takes:
            return
        began_s = self._monotonic()
        report = self._engine.run(takes)
        self._count(report.tokens, self._monotonic() - began_s, demands, trained=True)
        for step in report.steps:
            job = self.jobs[step.uid]
            if step.skipped and step.consecutive_skips == 1:
                self._checkpoint(job)  # the weights are still those of the last finite step
            job.after_step(step)
            if job.state is JobState.FAILED:
                self._end(job)
            self._end_if_trained(job)

    def _count(
        self, tokens: Mapping[str, int], seconds: float, demands: Mapping[str, Demand], *, trained: bool
    ) -> None:
        """Divides the time of a cycle among its jobs by their tokens."""
        self.busy_s += seconds
        total = sum(tokens.values()) or 1
        for uid, own in tokens.items():
            self._shares.charge(demands[uid], own)
            self.jobs[uid].computed(own, seconds * own / total, trained=trained)

    # --- the life of a job ----------------------------------------------------------------

    def _take_in_data(self) -> None:
        for uid, future in list(self._reading.items()):
            if future.done():
                del self._reading[uid]
                self._data_read(self.jobs[uid], future)

    def _data_read(self, job: LiveJob, future: Future[JobInput]) -> None:
        if job.state.ended:
            return
        try:
            found = future.result()
            settings = self._settings(job.order, found.initial)
            self._engine.targets(settings)
            self._check_numerics(job.order)
            numerics = self._engine.numerics.value
            job.loaded = Loaded.of(settings, found.dataset, found.initial, self._base.identity, numerics)
            for checkpoint in read_checkpoints(job.files.folder)[-1:]:
                check_origin(checkpoint, job.loaded.origin)
                self._suspects.reached(job.uid, progress(checkpoint.record.step, checkpoint.record.rows))
            self._queue(job)
            self._apply_run(job)
        except DatasetError as error:
            self._fail(job, error.reason, error.message, error.line)
        except ArtifactError as error:
            self._fail(job, JobFailure.SOURCE_UNAVAILABLE, error.message)
        except OSError as error:
            self._fail(job, JobFailure.SOURCE_UNAVAILABLE, f"The data cannot be read: {error}.")
        except CheckpointMismatchError as error:
            reason = JobFailure.BASE_CHANGED if isinstance(error, BaseChangedError) else JobFailure.INCOMPATIBLE
            self._fail(job, reason, str(error))
        except (TargetError, ValueError) as error:
            self._fail(job, JobFailure.INCOMPATIBLE, f"{error}.")

    def _settings(self, order: JobOrder, initial: InitialAdapter | None) -> JobSettings:
        return engine_settings(order) if initial is None else continued_settings(order, initial, self._engine.targets)

    def _check_numerics(self, order: JobOrder) -> None:
        asked = order.training.numerics
        if asked is not None and asked.value == Numerics.EXACT and self._engine.numerics is not Numerics.EXACT:
            raise ValueError("training.numerics is Exact, but this trainer computes with Fast, for all its jobs")

    def _queue(self, job: LiveJob) -> None:
        job.state = JobState.QUEUED
        job.queued_for = JobReason.WAITING_FOR_TURN, ""
        deaths = max(self.deaths(job.uid), job.order.crashes)
        if deaths >= MAX_CRASHES:
            self._fail(
                job,
                JobFailure.POISONED,
                f"The trainer's process ended {deaths} times while it computed this job, at the same step. "
                "Look for unusually long examples, or lower training.batchSize.",
            )

    def _admit(self) -> None:
        """The most important first, then the oldest."""
        waiting = [job for job in self.jobs.values() if job.state is JobState.QUEUED]
        for job in sorted(waiting, key=lambda item: (-item.order.priority, item.order.created_unix_s, item.uid)):
            if len(self._active()) >= self._limits.max_jobs:
                return
            if self._has_memory(job):
                self._enter(job)

    def _has_memory(self, job: LiveJob) -> bool:
        if self._limits.memory_bytes is None or job.loaded is None:
            return True
        found = self._engine.admits(job.loaded.settings, self._limits.memory_bytes)
        job.queued_for = job.queued_for if found.fits else (JobReason.NO_MEMORY, found.message)
        return found.fits

    def _enter(self, job: LiveJob) -> None:
        try:
            job.enter(self._engine, self._monotonic())
        except ArtifactError as error:
            self._fail(job, JobFailure.SOURCE_UNAVAILABLE, error.message)
            return
        except (TargetError, ValueError) as error:
            self._fail(job, JobFailure.INCOMPATIBLE, f"{error}.")
            return
        self._suspects.seed(job.uid, job.progress, job.order.crashes)
        log.info("job in training", extra={"job": job.order.display, "step": job.step})
        self._end_if_trained(job)

    def _end_if_trained(self, job: LiveJob) -> None:
        if job.active and job.trained and job.measuring is None:
            job.state = JobState.PUBLISHING
            job.write_result(self._engine, self._base.display)
            self._engine.remove(job.uid)
            self._end(job, removed=True)

    def _fail(self, job: LiveJob, reason: JobFailure, message: str, line: int | None = None) -> None:
        job.fail(reason, message, line)
        self._end(job, removed=True)

    def _end(self, job: LiveJob, *, removed: bool = False) -> None:
        if not removed:
            self._engine.remove(job.uid)
        job.measuring = None
        if job.rows:
            job.write_pictures()
        found = job.failure
        log.info(
            "job ended",
            extra={"job": job.order.display, "step": job.step, "reason": found.reason if found else job.state.value},
        )

    def _checkpoint(self, job: LiveJob) -> None:
        job.write_checkpoint(self._engine, self._monotonic(), self._unix_time())

    def _write_due_checkpoints(self) -> None:
        now_s = self._monotonic()
        for job in self._active():
            if now_s - job.checkpointed_s >= job.order.checkpoint_every_s:
                self._checkpoint(job)
                job.write_pictures()
