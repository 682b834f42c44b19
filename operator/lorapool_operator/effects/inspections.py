"""Inspects sources, in the background and never twice at once for the same question.

Asked by `apply`, answers through `observe`. Bounded: so many inspections at one time, each with a time limit.
Results stay until another question is asked of the same object; what is done about them is the plan's business.
The facts of a base are read once and shared by all its adapters.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lorapool_api.common import FailureReason
from lorapool_api.protocol import DEFAULT_MAX_ADAPTER_BYTES, ResolveRequest, SourceRef
from lorapool_artifacts.compatibility import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import BaseInspection, inspect_adapter, inspect_base
from lorapool_artifacts.settings import FetchLimits, JudgeLimits, SourceSettings
from lorapool_operator.decisions.plan import Failure, JudgeJob, Judgement, Judging, SourceFacts
from lorapool_operator.effects.runtime_polls import RuntimeBook, RuntimeCallError
from lorapool_operator.world.cluster_cache import BaseObject, Key, Kind, Store

log = logging.getLogger(__name__)

Outcome = SourceFacts | Failure
At = TypeVar("At")
R = TypeVar("R")


class Inspector(Protocol):
    """The two questions asked of `lorapool_artifacts`; tests answer them without sources."""

    async def base(self, uri: str, revision: str | None) -> BaseInspection: ...

    async def adapter(
        self, uri: str, revision: str | None, digest: str | None, base: BaseFacts | None, max_rank: int
    ) -> Outcome: ...


class ArtifactInspector:
    """The real one."""

    def __init__(self, settings: SourceSettings, *, timeout_s: float) -> None:
        self._settings = settings
        self._limits = FetchLimits(total_timeout_s=timeout_s)

    async def base(self, uri: str, revision: str | None) -> BaseInspection:
        return await inspect_base(uri, revision, self._settings, fetch_limits=self._limits)

    async def adapter(
        self, uri: str, revision: str | None, digest: str | None, base: BaseFacts | None, max_rank: int
    ) -> Outcome:
        limits = JudgeLimits(max_rank=max_rank, max_bytes=DEFAULT_MAX_ADAPTER_BYTES)
        found = await inspect_adapter(uri, revision, digest, base, limits, self._settings, fetch_limits=self._limits)
        if not found.verdict.ok or found.digest is None:
            return Failure(found.verdict.reason or FailureReason.INCOMPATIBLE, found.verdict.message)
        return SourceFacts(found.digest, found.revision, found.rank, found.target_modules, found.size_bytes)


@dataclass
class _Job:
    job: JudgeJob
    task: asyncio.Task[None]
    running_since_unix_s: float | None = None


class JudgeBook:
    def __init__(
        self,
        store: Store,
        inspector: Inspector,
        runtimes: RuntimeBook,
        *,
        concurrency: int,
        timeout_s: float,
        changed: Callable[[Key, float], None],
        pending_status_s: float,
    ) -> None:
        """`changed(key, delay_s)` marks a key dirty: when a result is there, or an inspection takes long."""
        self._store = store
        self._inspector = inspector
        self._runtimes = runtimes
        self._turns = asyncio.Semaphore(concurrency)
        self._timeout_s = timeout_s
        self._changed = changed
        self._pending_status_s = pending_status_s
        self._results: dict[str, Judgement] = {}
        self._jobs: dict[str, _Job] = {}
        self._shared: dict[tuple[Any, ...], asyncio.Task[Outcome]] = {}
        self._facts: dict[str, BaseFacts] = {}
        self._facts_tasks: dict[str, asyncio.Task[BaseInspection]] = {}
        self.outcomes: dict[str, int] = {}
        """Finished inspections by reason, for the metrics."""

    # --- facts

    def result(self, uid: str) -> Judgement | None:
        return self._results.get(uid)

    def judging(self, uid: str) -> Judging | None:
        held = self._jobs.get(uid)
        return Judging(held.job.fingerprint, held.running_since_unix_s) if held is not None else None

    def waiting(self) -> int:
        """Inspections asked for and not ended."""
        return len(self._jobs)

    # --- work

    def start(self, job: JudgeJob) -> None:
        """Begins an inspection; an older one about another question is given up."""
        held = self._jobs.get(job.uid)
        if held is not None:
            if held.job.fingerprint == job.fingerprint:
                return
            held.task.cancel()
        task = asyncio.create_task(self._run(job), name=f"judge {job.key}")
        self._jobs[job.uid] = _Job(job, task)

    def forget(self, uid: str) -> None:
        """The object is gone."""
        self._results.pop(uid, None)
        self._facts.pop(uid, None)
        held = self._jobs.pop(uid, None)
        if held is not None:
            held.task.cancel()

    async def close(self) -> None:
        tasks: list[asyncio.Task[Any]] = [held.task for held in self._jobs.values()]
        tasks += [*self._shared.values(), *self._facts_tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: JudgeJob) -> None:
        me = asyncio.current_task()
        try:
            async with self._turns:
                held = self._jobs.get(job.uid)
                if held is not None and held.task is me:
                    held.running_since_unix_s = time.time()
                    self._changed(job.key, self._pending_status_s)
                outcome = await self._outcome(job)
        finally:
            held = self._jobs.get(job.uid)
            if held is not None and held.task is me:
                del self._jobs[job.uid]
        reason = outcome.reason.value if isinstance(outcome, Failure) else "Resolved"
        self.outcomes[reason] = self.outcomes.get(reason, 0) + 1
        self._results[job.uid] = Judgement(job.fingerprint, job.attempt, outcome, time.time(), random.random())
        self._changed(job.key, 0.0)

    async def _outcome(self, job: JudgeJob) -> Outcome:
        """Every way an inspection can end, as a value."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if job.key.kind is Kind.BASE:
                    return await self._base(job)
                if job.via_pod_uid is not None:
                    return await self._via_runtime(job, job.via_pod_uid)
                return await self._adapter(job)
        except ArtifactError as error:
            return Failure(error.reason, error.message, error.retry_after_s)
        except RuntimeCallError as error:
            return Failure(FailureReason.SOURCE_UNAVAILABLE, f"The runtime that reads the source: {error}")
        except TimeoutError:
            return Failure(FailureReason.SOURCE_TIMEOUT, f"{job.uri} was not read within {self._timeout_s:g} s.")
        except Exception:
            log.exception("inspection failed unexpectedly", extra={"object": str(job.key)})
            return Failure(
                FailureReason.SOURCE_UNAVAILABLE, f"{job.uri} could not be inspected; see the operator's log."
            )

    async def _base(self, job: JudgeJob) -> Outcome:
        self._facts.pop(job.uid, None)
        found = await self._inspect_base(job.uid, job.uri, job.revision)
        return SourceFacts(found.digest or "", found.revision, size_bytes=found.size_bytes)

    async def _adapter(self, job: JudgeJob) -> Outcome:
        facts = await self._base_facts(job.base_uid or "")
        question = (job.uri, job.revision, job.digest, job.base_uid, job.max_rank)
        return await _share(
            self._shared,
            question,
            lambda: self._inspector.adapter(job.uri, job.revision, job.digest, facts, job.max_rank),
        )

    async def _via_runtime(self, job: JudgeJob, pod_uid: str) -> Outcome:
        request = ResolveRequest(
            source=SourceRef(uri=job.uri, revision=job.revision), digest=job.digest, max_bytes=DEFAULT_MAX_ADAPTER_BYTES
        )
        answer = await self._runtimes.resolve(pod_uid, request, timeout_s=self._timeout_s)
        if answer.failure is not None:
            try:
                reason = FailureReason(answer.failure.reason)
            except ValueError:
                reason = FailureReason.LOAD_FAILED
            return Failure(reason, answer.failure.message)
        if answer.digest is None:
            return Failure(FailureReason.SOURCE_UNAVAILABLE, "The runtime found no digest.")
        return SourceFacts(answer.digest, answer.revision, answer.rank, tuple(answer.target_modules), answer.size_bytes)

    async def _base_facts(self, base_uid: str) -> BaseFacts:
        known = self._facts.get(base_uid)
        if known is not None:
            return known
        base = next((item for item in self._store.bases if item.meta.uid == base_uid), None)
        if base is None:
            raise ArtifactError(FailureReason.SOURCE_UNAVAILABLE, "The base is gone.")
        return (await self._facts_of(base)).facts

    async def _facts_of(self, base: BaseObject) -> BaseInspection:
        try:
            return await self._inspect_base(base.meta.uid, base.spec.source.uri, base.spec.source.revision)
        except ArtifactError as error:
            # whatever is wrong with the base, this adapter is only waiting for it
            told = f"BaseModel {base.key}: {error.message}"
            raise ArtifactError(FailureReason.SOURCE_UNAVAILABLE, told, retry_after_s=error.retry_after_s) from error

    async def _inspect_base(self, uid: str, uri: str, revision: str | None) -> BaseInspection:
        found = await _share(self._facts_tasks, uid, lambda: self._inspector.base(uri, revision))
        self._facts[uid] = found.facts
        return found


async def _share(running: dict[At, asyncio.Task[R]], at: At, work: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Joins the work that runs under this key, or begins it; one who leaves does not end it for the others."""
    task = running.get(at)
    if task is None:
        task = running[at] = asyncio.create_task(work())
        task.add_done_callback(lambda _: running.pop(at, None))
    return await asyncio.shield(task)
