"""Inspects adapter and base sources in the background.

The number of concurrent inspections and the time of each are bounded, and equal inspections are shared. Each namespace
has a share of the permits, and base models have their own, so that hanging sources of one do not delay the others. A
result stays until the object is inspected again; the plan decides what follows from it. Adapters are checked against
the modules that a runtime has reported of their base; before one did, they are checked by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from lorapool_api.base_modules import BaseModules
from lorapool_api.common import FailureReason
from lorapool_api.protocol import ResolveRequest, SourceRef
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import BaseInspection, inspect_adapter, inspect_base, names_of, parse_source
from lorapool_artifacts.settings import AdapterLimits, FetchLimits, SourceSettings
from lorapool_operator.decisions.plan import InspectionJob
from lorapool_operator.effects.fair_permits import FairPermits
from lorapool_operator.effects.runtime_calls import RuntimeCallError
from lorapool_operator.effects.runtime_polls import RuntimeTracker
from lorapool_operator.effects.source_access import SourceAccess
from lorapool_operator.world.cluster_cache import ClusterCache, Key, ObjectKind
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
        settings = self._with(credentials)
        limits = AdapterLimits(max_rank=max_rank, max_bytes=settings.max_adapter_bytes)
        found = await inspect_adapter(uri, revision, digest, base, limits, settings, fetch_limits=self._limits)
        if not found.compatibility.ok or found.digest is None:
            return SourceFailure(found.compatibility.reason or FailureReason.INCOMPATIBLE, found.compatibility.message)
        return SourceFacts(
            found.digest, found.revision, found.rank, found.target_modules, found.size_bytes, found.weights_digest
        )

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
        self._facts: dict[str, tuple[BaseModules, BaseFacts]] = {}
        """By the uid of the base, with what they were made from."""
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
        tasks += self._shared.values()
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
        fingerprint = sys.intern(job.fingerprint)  # as the status will have it
        if isinstance(outcome, SourceFacts):
            outcome = replace(outcome, digest=sys.intern(outcome.digest))
        self._results[job.uid] = InspectionResult(fingerprint, job.attempt, outcome, time.time(), jitter, began)
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
        credentials = await self._access.credentials(job.key.namespace, job.rights)
        found = await self._inspector.base(job.uri, job.revision, credentials=credentials)
        return SourceFacts(found.digest or "", found.revision, size_bytes=found.size_bytes)

    async def _adapter(self, job: InspectionJob) -> Outcome:
        facts = self._base_facts(job.base_uid or "")
        credentials = await self._access.credentials(job.key.namespace, job.rights)
        reader = None if credentials is None else job.key.namespace
        inspection = (job.uri, job.revision, job.digest, job.base_uid, facts is None, job.max_rank, reader)
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
            response.digest,
            response.revision,
            response.rank,
            tuple(response.target_modules),
            response.size_bytes,
            response.weights_digest,
        )

    def _base_facts(self, base_uid: str) -> BaseFacts | None:
        """Returns what a runtime has reported of the base; None before one did. Raises ArtifactError."""
        base = next((item for item in self._cache.bases if item.meta.uid == base_uid), None)
        if base is None:
            raise ArtifactError(FailureReason.SOURCE_UNAVAILABLE, "The BaseModel does not exist any more.")
        if base.status.modules is None:
            return None
        known = self._facts.get(base_uid)
        if known is None or known[0] is not base.status.modules:
            uri, served = base.spec.source.uri, base.spec.served_name or ""
            facts = BaseFacts.published(base.status.modules, *names_of(parse_source(uri)), served)
            known = self._facts[base_uid] = (base.status.modules, facts)
        return known[1]


async def _share(
    running: dict[SharedKey, asyncio.Task[R]], key: SharedKey, work: Callable[[], Coroutine[Any, Any, R]]
) -> R:
    """Joins the work that runs under this key, or starts it. Cancelling a caller does not cancel the others' work."""
    task = running.get(key)
    if task is None:
        task = running[key] = asyncio.create_task(work())
        task.add_done_callback(lambda _: running.pop(key, None))
    return await asyncio.shield(task)
