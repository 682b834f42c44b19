"""Inspects adapter and base sources in the background.

The number of concurrent inspections and the time of each are bounded, and equal inspections are shared. Each namespace
has a share of the permits, and base models have their own, so that hanging sources of one do not delay the others. A
result stays until the object is inspected again; the plan decides what follows from it. The facts of a base are read
once and shared by all its adapters.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lorapool_api.common import FailureReason
from lorapool_api.protocol import DEFAULT_MAX_ADAPTER_BYTES, ResolveRequest, SourceRef
from lorapool_artifacts.compatibility import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import BaseInspection, inspect_adapter, inspect_base
from lorapool_artifacts.settings import AdapterLimits, FetchLimits, SourceSettings
from lorapool_operator.decisions.plan import InspectionJob
from lorapool_operator.effects.fair_permits import FairPermits
from lorapool_operator.effects.runtime_calls import RuntimeCallError
from lorapool_operator.effects.runtime_polls import RuntimeTracker
from lorapool_operator.effects.source_access import SourceAccess
from lorapool_operator.world.cluster_cache import BaseObject, ClusterCache, Key, ObjectKind
from lorapool_operator.world.observed import InspectionResult, RunningInspection, SourceFacts, SourceFailure

log = logging.getLogger(__name__)

Outcome = SourceFacts | SourceFailure
SharedKey = TypeVar("SharedKey")
R = TypeVar("R")


class Inspector(Protocol):
    """The two inspections of `lorapool_artifacts`; tests replace them.

    `credentials`, by the names of their variables, are used in place of the operator's; None: the operator's are.
    """

    async def base(
        self, uri: str, revision: str | None, *, credentials: Mapping[str, str] | None = None
    ) -> BaseInspection: ...

    async def adapter(
        self,
        uri: str,
        revision: str | None,
        digest: str | None,
        base: BaseFacts | None,
        max_rank: int,
        *,
        credentials: Mapping[str, str] | None = None,
    ) -> Outcome: ...


class ArtifactInspector:
    """Inspects the sources themselves, each within `timeout_s`."""

    def __init__(self, settings: SourceSettings, *, timeout_s: float) -> None:
        self._settings = settings
        self._limits = FetchLimits(total_timeout_s=timeout_s)

    async def base(
        self, uri: str, revision: str | None, *, credentials: Mapping[str, str] | None = None
    ) -> BaseInspection:
        return await inspect_base(uri, revision, self._with(credentials), fetch_limits=self._limits)

    async def adapter(
        self,
        uri: str,
        revision: str | None,
        digest: str | None,
        base: BaseFacts | None,
        max_rank: int,
        *,
        credentials: Mapping[str, str] | None = None,
    ) -> Outcome:
        limits = AdapterLimits(max_rank=max_rank, max_bytes=DEFAULT_MAX_ADAPTER_BYTES)
        settings = self._with(credentials)
        found = await inspect_adapter(uri, revision, digest, base, limits, settings, fetch_limits=self._limits)
        if not found.compatibility.ok or found.digest is None:
            return SourceFailure(found.compatibility.reason or FailureReason.INCOMPATIBLE, found.compatibility.message)
        return SourceFacts(found.digest, found.revision, found.rank, found.target_modules, found.size_bytes)

    def _with(self, credentials: Mapping[str, str] | None) -> SourceSettings:
        return self._settings if credentials is None else self._settings.with_only(credentials)


@dataclass
class _Started:
    job: InspectionJob
    task: asyncio.Task[None]
    running_since_unix_s: float | None = None


class InspectionTracker:
    """Owns all inspections and their results, by the uid of the object."""

    def __init__(
        self,
        cache: ClusterCache,
        inspector: Inspector,
        runtimes: RuntimeTracker,
        *,
        concurrency: int,
        timeout_s: float,
        changed: Callable[[Key, float], None],
        pending_status_s: float,
        access: SourceAccess,
    ) -> None:
        """`changed(key, delay_s)` marks a key dirty: for a result, and for an inspection that takes long.

        `concurrency` bounds the inspections of adapters, and likewise those of base models.
        """
        self._cache = cache
        self._inspector = inspector
        self._runtimes = runtimes
        self._permits = {kind: FairPermits(concurrency) for kind in ObjectKind}
        self._timeout_s = timeout_s
        self._changed = changed
        self._pending_status_s = pending_status_s
        self._access = access
        self._results: dict[str, InspectionResult] = {}
        self._started: dict[str, _Started] = {}
        self._shared: dict[tuple[Any, ...], asyncio.Task[Outcome]] = {}
        self._facts: dict[str, BaseFacts] = {}
        self._facts_tasks: dict[str, asyncio.Task[BaseInspection]] = {}
        self.outcomes: dict[str, int] = {}
        """Number of finished inspections by reason, for the metrics."""

    # --- results

    def result(self, uid: str) -> InspectionResult | None:
        """Returns the latest result for an object."""
        return self._results.get(uid)

    def running(self, uid: str) -> RunningInspection | None:
        """Returns the inspection of an object that is queued or running."""
        started = self._started.get(uid)
        return RunningInspection(started.job.fingerprint, started.running_since_unix_s) if started is not None else None

    def waiting(self) -> int:
        """Returns the number of inspections that are queued or running."""
        return len(self._started)

    # --- work

    def start(self, job: InspectionJob) -> None:
        """Starts an inspection. One of the same object with another fingerprint is cancelled."""
        started = self._started.get(job.uid)
        if started is not None:
            if started.job.fingerprint == job.fingerprint:
                return
            started.task.cancel()
        task = asyncio.create_task(self._run(job), name=f"inspect {job.key}")
        self._started[job.uid] = _Started(job, task)

    def forget(self, uid: str) -> None:
        """Cancels and drops everything about a deleted object."""
        self._results.pop(uid, None)
        self._facts.pop(uid, None)
        started = self._started.pop(uid, None)
        if started is not None:
            started.task.cancel()

    async def close(self) -> None:
        """Cancels all inspections and waits for their end."""
        tasks: list[asyncio.Task[Any]] = [started.task for started in self._started.values()]
        tasks += [*self._shared.values(), *self._facts_tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: InspectionJob) -> None:
        me = asyncio.current_task()
        try:
            async with self._permits[job.key.kind].permit(job.key.namespace):
                started = self._started.get(job.uid)
                began = time.time()
                if started is not None and started.task is me:
                    started.running_since_unix_s = began
                    self._changed(job.key, self._pending_status_s)
                outcome = await self._outcome(job)
        finally:
            started = self._started.get(job.uid)
            if started is not None and started.task is me:
                del self._started[job.uid]
        reason = outcome.reason.value if isinstance(outcome, SourceFailure) else "Resolved"
        self.outcomes[reason] = self.outcomes.get(reason, 0) + 1
        jitter = random.random()
        self._results[job.uid] = InspectionResult(job.fingerprint, job.attempt, outcome, time.time(), jitter, began)
        self._changed(job.key, 0.0)

    async def _outcome(self, job: InspectionJob) -> Outcome:
        """Runs one inspection and returns its result or its failure as a value."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if job.key.kind is ObjectKind.BASE:
                    return await self._base(job)
                if job.via_pod_uid is not None:
                    return await self._via_runtime(job, job.via_pod_uid)
                return await self._adapter(job)
        except ArtifactError as error:
            return SourceFailure(error.reason, error.message, error.retry_after_s)
        except RuntimeCallError as error:
            return SourceFailure(FailureReason.SOURCE_UNAVAILABLE, f"The runtime that reads the source failed: {error}")
        except TimeoutError:
            return SourceFailure(FailureReason.SOURCE_TIMEOUT, f"{job.uri} was not read within {self._timeout_s:g} s.")
        except Exception:
            log.exception("inspection failed unexpectedly", extra={"object": str(job.key)})
            return SourceFailure(
                FailureReason.SOURCE_UNAVAILABLE, f"{job.uri} could not be inspected; see the operator's log."
            )

    async def _base(self, job: InspectionJob) -> Outcome:
        self._facts.pop(job.uid, None)
        credentials = await self._access.credentials(job.key.namespace, job.rights)
        found = await self._inspect_base(job.uid, job.uri, job.revision, credentials)
        return SourceFacts(found.digest or "", found.revision, size_bytes=found.size_bytes)

    async def _adapter(self, job: InspectionJob) -> Outcome:
        facts = await self._base_facts(job.base_uid or "")
        credentials = await self._access.credentials(job.key.namespace, job.rights)
        reader = None if credentials is None else job.key.namespace
        inspection = (job.uri, job.revision, job.digest, job.base_uid, job.max_rank, reader)
        return await _share(
            self._shared,
            inspection,
            lambda: self._inspector.adapter(
                job.uri, job.revision, job.digest, facts, job.max_rank, credentials=credentials
            ),
        )

    async def _via_runtime(self, job: InspectionJob, pod_uid: str) -> Outcome:
        request = ResolveRequest(
            source=SourceRef(uri=job.uri, revision=job.revision),
            namespace=job.key.namespace,
            digest=job.digest,
            max_bytes=DEFAULT_MAX_ADAPTER_BYTES,
        )
        response = await self._runtimes.resolve(pod_uid, request, timeout_s=self._timeout_s)
        if response.failure is not None:
            try:
                reason = FailureReason(response.failure.reason)
            except ValueError:
                reason = FailureReason.LOAD_FAILED
            return SourceFailure(reason, response.failure.message)
        if response.digest is None:
            return SourceFailure(FailureReason.SOURCE_UNAVAILABLE, "The runtime reported no digest.")
        return SourceFacts(
            response.digest, response.revision, response.rank, tuple(response.target_modules), response.size_bytes
        )

    async def _base_facts(self, base_uid: str) -> BaseFacts:
        known = self._facts.get(base_uid)
        if known is not None:
            return known
        base = next((item for item in self._cache.bases if item.meta.uid == base_uid), None)
        if base is None:
            raise ArtifactError(FailureReason.SOURCE_UNAVAILABLE, "The BaseModel does not exist any more.")
        return (await self._facts_of(base)).facts

    async def _facts_of(self, base: BaseObject) -> BaseInspection:
        source = base.spec.source
        try:
            rights = self._access.rules_of(base).check(base.meta.namespace, source.uri)
            credentials = await self._access.credentials(base.meta.namespace, rights)
            return await self._inspect_base(base.meta.uid, source.uri, source.revision, credentials)
        except ArtifactError as error:
            # a base's failure is transient for its adapters, whatever its reason: they wait for the base
            message = f"BaseModel {base.key}: {error.message}"
            raise ArtifactError(FailureReason.SOURCE_UNAVAILABLE, message, retry_after_s=error.retry_after_s) from error

    async def _inspect_base(
        self, uid: str, uri: str, revision: str | None, credentials: Mapping[str, str] | None
    ) -> BaseInspection:
        found = await _share(
            self._facts_tasks, uid, lambda: self._inspector.base(uri, revision, credentials=credentials)
        )
        self._facts[uid] = found.facts
        return found


async def _share(
    running: dict[SharedKey, asyncio.Task[R]], key: SharedKey, work: Callable[[], Coroutine[Any, Any, R]]
) -> R:
    """Joins the work that runs under this key, or starts it. Cancelling a caller does not cancel the others' work."""
    task = running.get(key)
    if task is None:
        task = running[key] = asyncio.create_task(work())
        task.add_done_callback(lambda _: running.pop(key, None))
    return await asyncio.shield(task)
