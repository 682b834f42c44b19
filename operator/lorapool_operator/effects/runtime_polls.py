"""Snapshots from all runtimes by long-poll, and what is known of them.

Each runtime pod has one long-poll, directly to its IP. Only facts are kept: the latest snapshot and since when polls
fail. A runtime that does not answer is reported as such; nothing is assumed about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

from pydantic import ValidationError

from lorapool_api.base_modules import BaseModules
from lorapool_api.common import AdapterKey
from lorapool_api.loraadapter import UsagePart
from lorapool_api.protocol import (
    AdapterDescriptor,
    AdapterReport,
    DeleteAnswer,
    NamespaceCredentials,
    PutAnswer,
    ResolveAnswer,
    ResolveRequest,
    RuntimeSnapshot,
)
from lorapool_api.trust.poll_proof import ProofError
from lorapool_api.trust.tls import ReleaseTrust
from lorapool_operator.effects.fence import Fence
from lorapool_operator.effects.runtime_calls import (
    RuntimeCallError,
    RuntimeClient,
    RuntimeGoneError,
    RuntimeRefusedError,
    RuntimeUntrustedError,
)
from lorapool_operator.world.cluster_cache import BaseObject, ClusterCache, Key, PodObject
from lorapool_operator.world.compact import compact_report
from lorapool_operator.world.observed import AdapterOnReplica, RuntimeView, StrayReport

log = logging.getLogger(__name__)

BACKOFF_MIN_S = 0.3
BACKOFF_MAX_S = 3.0
MODULES_RETRY_S = 30.0
"""Between two questions for the modules of a base, where the first one failed."""
SKEW_TOLERANCE_S = 2.0
"""Clocks that differ by less count as equal: a runtime may send a snapshot half a second after it was made."""


async def _at_once() -> None:
    """Does not wait."""


@dataclass
class _Polled:
    """One pod that is polled."""

    pod: PodObject
    task: asyncio.Task[None] | None = None
    snapshot: RuntimeSnapshot | None = None
    reports: dict[str, tuple[AdapterReport, ...]] = field(default_factory=dict)
    """Adapter uid → its reports, an index that saves a scan of each snapshot for each of thousands of adapters."""
    skew_s: float = 0.0
    """This process's clock minus the runtime's."""
    failing_since: float | None = None
    """Monotonic time; None while polls succeed."""
    stale_reported: bool = False
    token_refused: bool = False
    """The last answer was that the operator's token is not valid."""
    without_modules: str = ""
    """Boot id of a process of an earlier version, which does not know the modules of its base."""
    modules_due: float = 0.0
    """Monotonic time: the modules are not asked for again before."""
    distrust: str = ""
    """Why the certificate that it served last is refused; empty if it is trusted."""
    viewed: tuple[tuple[object, ...], AdapterOnReplica] | None = None
    """The last view of it, without reports, and what it shows: each of thousands of plans asks for it."""


@dataclass(frozen=True, slots=True)
class PollSettings:
    """The part of the operator's settings that polls and calls depend on; each is documented there."""

    wait_s: float = 10.0
    pause_s: float = 0.2
    stale_s: float = 5.0
    timeout_s: float = 10.0


class RuntimeChanged(Protocol):
    """Is called for changes of what the runtimes of a base report."""

    def __call__(self, base: Key, adapter_uids: Iterable[str], *, urgent: bool, serving: bool) -> None:
        """`urgent` is False if only counters changed; `serving` is True if a runtime may serve now or no longer."""


class RuntimeTracker:
    """Owns all polls and the latest snapshots. Belongs to one event loop."""

    def __init__(
        self,
        cache: ClusterCache,
        *,
        tokens: Callable[[str], tuple[str, ...]],
        settings: PollSettings,
        changed: RuntimeChanged,
        turn: Callable[[], Awaitable[None]] = _at_once,
        fence: Fence | None = None,
        trust: ReleaseTrust | None = None,
        clock: Callable[[], float] = time.monotonic,
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        """`tokens(base_uid)` are the bearer tokens of its runtimes, in the order in which to try them.

        `turn()` waits until the event loop has time to take one more answer.
        """
        self._cache = cache
        self._turn = turn
        self._settings = settings
        self._changed = changed
        self._client = RuntimeClient(tokens, timeout_s=settings.timeout_s, fence=fence or Fence(), trust=trust)
        self._clock = clock
        self._now_unix_s = now_unix_s
        self._polled: dict[str, _Polled] = {}
        self._by_base: dict[tuple[Key, str], list[_Polled]] = {}
        self._heard = asyncio.Event()
        self._lost: dict[str, dict[str, UsagePart]] = {}
        self._strays: dict[tuple[str, AdapterKey], float] = {}
        self._registered: dict[str, dict[tuple[str, str], AdapterDescriptor]] = {}
        self._modules: dict[str, BaseModules] = {}
        """By the uid of the base, whose source never changes."""
        self.polls = 0
        self.poll_failures = 0

    # --- life

    def follow_pods(self) -> None:
        """Starts and stops polls so that they match the pods in the cache."""
        wanted = {pod.meta.uid: pod for pod in self._cache.runtime_pods() if pod.ip and pod.port}
        for uid, pod in wanted.items():
            polled = self._polled.get(uid)
            if polled is not None and (polled.pod.ip, polled.pod.port) != (pod.ip, pod.port):
                self._forget(uid)  # another process, which has to prove itself again
                polled = None
            if polled is None:
                polled = self._polled[uid] = _Polled(pod)
                polled.task = asyncio.create_task(self._poll(polled), name=f"poll {pod.meta.namespace}/{pod.meta.name}")
            elif polled.pod != pod:
                left = (pod.terminating and not polled.pod.terminating) or (polled.pod.ready and not pod.ready)
                polled.pod = pod
                if left:
                    self._changed(pod.base, list(polled.reports), urgent=True, serving=True)
        for uid in [uid for uid in self._polled if uid not in wanted]:
            self._forget(uid)
        self._index()

    async def answered(self, within_s: float) -> None:
        """Waits until each runtime has answered or failed once, but not longer than `within_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while any(item.snapshot is None and item.failing_since is None for item in self._polled.values()):
                    self._heard.clear()
                    await self._heard.wait()

    async def close(self) -> None:
        """Stops all polls."""
        tasks = [polled.task for polled in self._polled.values() if polled.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._polled.clear()
        self._by_base.clear()
        await self._client.close()

    def _forget(self, uid: str) -> None:
        polled = self._polled.pop(uid)
        self._index()
        if polled.task is not None:
            polled.task.cancel()
        for adapter_uid, reports in polled.reports.items():
            self._keep_lost(polled.pod, adapter_uid, reports)
        self._strays = {at: since for at, since in self._strays.items() if at[0] != uid}
        self._changed(polled.pod.base, list(polled.reports), urgent=True, serving=True)

    # --- what runtimes report

    def views_of(self, base: BaseObject) -> list[RuntimeView]:
        """Returns the runtimes of this very object."""
        return [self._view(polled).runtime for polled in self._of(base)]

    def replicas_of(self, base: BaseObject, adapter_uid: str) -> list[AdapterOnReplica]:
        """Returns the runtimes of this very object, each with its reports of one adapter."""
        return [_with_reports(self._view(polled), polled.reports.get(adapter_uid)) for polled in self._of(base)]

    def holders_of(self, adapter_uid: str) -> list[AdapterOnReplica]:
        """Returns the runtimes of any base that report this adapter."""
        return [
            _with_reports(self._view(polled), polled.reports[adapter_uid])
            for polled in self._polled.values()
            if adapter_uid in polled.reports
        ]

    def modules_of(self, base: BaseObject) -> BaseModules | None:
        """Returns what adapters may name in the base, if a runtime reported it to this process."""
        return self._modules.get(base.meta.uid)

    def busy(self, base: Key, adapter_uids: Iterable[str], requests: int) -> set[str]:
        """Returns those of the adapters that have at least so many requests on one replica of the base."""
        polled = [item for item in self._polled.values() if item.pod.base == base]
        return {uid for uid in adapter_uids if any(_requests(item, uid) >= requests for item in polled)}

    def lost_usage(self, adapter_uid: str) -> tuple[UsagePart, ...]:
        """Returns the last counts of processes that do not report this adapter any more."""
        return tuple(self._lost.get(adapter_uid, {}).values())

    def forget_lost(self, adapter_uid: str, folded: Iterable[UsagePart]) -> None:
        """Drops counts that `lost_usage` returned and that the status contains now."""
        kept = self._lost.get(adapter_uid, {})
        for part in folded:
            if kept.get(part.boot_id) == part:
                del kept[part.boot_id]
        if not kept:
            self._lost.pop(adapter_uid, None)

    def gone_boot_ids(self, base: BaseObject | None, boot_ids: Iterable[str]) -> frozenset[str]:
        """Returns those of `boot_ids` that will not report again, since every pod of the base has another process.

        A pod that does not answer now has its last known process, or a newer one, but none before that.
        """
        asked = frozenset(boot_ids)
        if not asked or base is None:
            return asked
        unknown = {pod.meta.uid for pod in self._cache.pods_of(base) if pod.ip}
        for polled in self._of(base):
            if polled.snapshot is None:
                return frozenset()
            asked -= {polled.snapshot.boot_id}
            unknown.discard(polled.pod.meta.uid)
        return asked if not unknown else frozenset()

    def strays_of(self, base: BaseObject, known: Callable[[str], bool], now: float) -> list[StrayReport]:
        """Returns the reports of adapters that are not `known` by uid, with the time when each was first noticed."""
        self._strays = {at: since for at, since in self._strays.items() if not known(at[1].uid)}
        return [
            self._stray(polled.pod, AdapterKey(uid, report.digest), report.display, now)
            for polled in self._of(base)
            for uid, reports in polled.reports.items()
            if not known(uid)  # first: nearly all are
            for report in reports
        ]

    def _stray(self, pod: PodObject, key: AdapterKey, display: str, now: float) -> StrayReport:
        since = self._strays.setdefault((pod.meta.uid, key), now)
        return StrayReport(pod.meta.uid, pod.meta.name, key, display, since)

    def registered(self, adapter_uid: str) -> dict[tuple[str, str], AdapterDescriptor]:
        """Returns the descriptors that this process registered last, by boot id and digest."""
        return dict(self._registered.get(adapter_uid, {}))

    def forget_adapter(self, adapter_uid: str) -> None:
        """Drops what is remembered of a deleted adapter."""
        self._lost.pop(adapter_uid, None)
        self._registered.pop(adapter_uid, None)

    def _of(self, base: BaseObject) -> list[_Polled]:
        return self._by_base.get((base.key, base.meta.uid), [])

    def _index(self) -> None:
        self._by_base = {}
        for polled in self._polled.values():
            self._by_base.setdefault((polled.pod.base, polled.pod.base_uid), []).append(polled)

    def _view(self, polled: _Polled) -> AdapterOnReplica:
        """Returns the present view of a runtime, without reports."""
        refused = (polled.token_refused, polled.distrust)
        shown = (polled.pod, polled.snapshot, self._fresh(polled), *refused, polled.skew_s)
        if polled.viewed is None or polled.viewed[0] != shown:
            polled.viewed = (shown, AdapterOnReplica(_make_view(*shown), ()))
        return polled.viewed[1]

    def _fresh(self, polled: _Polled) -> bool:
        if polled.snapshot is None or polled.failing_since is None:
            return polled.snapshot is not None
        return self._clock() - polled.failing_since < (self._settings.stale_s if polled.pod.ready else 0.0)

    # --- polling

    async def _poll(self, polled: _Polled) -> None:
        backoff_s = BACKOFF_MIN_S
        while True:
            query = {"wait": "0"}
            if polled.snapshot is not None and polled.failing_since is None:
                after, boot = str(polled.snapshot.seq), polled.snapshot.boot_id
                query = {"after": after, "boot": boot, "wait": str(self._settings.wait_s)}
            try:
                raw = await self._client.snapshot(
                    polled.pod, query, timeout_s=self._settings.wait_s + self._settings.timeout_s
                )
                await self._turn()
                snapshot = RuntimeSnapshot.model_validate_json(raw)
            except (RuntimeCallError, ProofError, ValidationError) as error:
                self.poll_failures += 1
                self._failed(polled, error)
                self._heard.set()
                await asyncio.sleep(backoff_s)
                backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
                continue
            self.polls += 1
            backoff_s = BACKOFF_MIN_S
            await self._turn()
            self._arrived(polled, snapshot)
            self._heard.set()
            await self._read_modules(polled, snapshot)
            await asyncio.sleep(self._settings.pause_s)

    async def _read_modules(self, polled: _Polled, snapshot: RuntimeSnapshot) -> None:
        """Reads once for each base what adapters may name in it. After a failure it is tried again."""
        pod = polled.pod
        if pod.base_uid in self._modules or polled.without_modules == snapshot.boot_id or not snapshot.ready:
            return
        if self._clock() < polled.modules_due:
            return
        base = self._cache.bases.get(pod.base.namespace, pod.base.name)
        if base is None or base.status.modules is not None:
            return
        try:
            self._modules[pod.base_uid] = await self._client.base_modules(pod)
        except RuntimeCallError as error:
            log.warning("runtime reports no modules", extra={"replica": pod.meta.name, "error": str(error)[:200]})
            polled.modules_due = self._clock() + MODULES_RETRY_S
            if isinstance(error, RuntimeRefusedError) and error.status == HTTPStatus.NOT_FOUND:
                polled.without_modules = snapshot.boot_id
            return
        self._changed(pod.base, (), urgent=True, serving=False)

    def _failed(self, polled: _Polled, error: Exception) -> None:
        now = self._clock()
        if polled.failing_since is None:
            polled.failing_since = now
            log.info("runtime does not answer", extra={"replica": polled.pod.meta.name, "error": str(error)[:200]})
        refused = isinstance(error, RuntimeRefusedError) and error.status in (401, 403)
        distrust = str(error) if isinstance(error, RuntimeUntrustedError) else ""
        if distrust and not polled.distrust:
            where = {"base": str(polled.pod.base), "replica": polled.pod.meta.name}
            log.error("runtime is not trusted", extra={**where, "error": distrust})
        if (refused, distrust) != (polled.token_refused, polled.distrust):
            polled.token_refused, polled.distrust = refused, distrust
            self._changed(polled.pod.base, (), urgent=True, serving=False)
        stale = now - polled.failing_since >= self._settings.stale_s or not polled.pod.ready
        if stale and not polled.stale_reported:
            polled.stale_reported = True
            self._changed(polled.pod.base, list(polled.reports), urgent=True, serving=True)

    def _arrived(self, polled: _Polled, snapshot: RuntimeSnapshot) -> None:
        before, polled.snapshot = polled.snapshot, snapshot.model_copy(update={"adapters": [], "removed": []})
        if snapshot.now_unix_s is not None:
            polled.skew_s = clock_skew(polled.skew_s, self._now_unix_s() - snapshot.now_unix_s)
        recovered = polled.failing_since is not None
        polled.failing_since, polled.stale_reported, polled.token_refused, polled.distrust = None, False, False, ""
        restarted = before is not None and before.boot_id != snapshot.boot_id
        changed = _changed_reports(polled.reports, snapshot)
        for uid, (old, new) in changed.items():
            if old and (restarted or not new):
                self._keep_lost(polled.pod, uid, old)
            if new:
                polled.reports[uid] = new
            else:
                del polled.reports[uid]
        if recovered or restarted or before is None:
            urgent = changed.keys() | polled.reports.keys()
        else:
            urgent = {uid for uid, (old, new) in changed.items() if _shape(old) != _shape(new)}
        touched = changed.keys() | urgent
        base_news = before is None or recovered or restarted or _base_shape(before) != _base_shape(snapshot)
        if urgent or base_news:
            self._changed(polled.pod.base, urgent, urgent=True, serving=base_news)
        if touched - urgent or (before is not None and _load(before) != _load(snapshot)):
            self._changed(polled.pod.base, touched - urgent, urgent=False, serving=False)

    def _keep_lost(self, pod: PodObject, adapter_uid: str, reports: Iterable[AdapterReport]) -> None:
        """Keeps the counts of a process that will not report them again until the status contains them."""
        for report in reports:
            self._keep_usage(pod, adapter_uid, report.usage)

    def _keep_usage(self, pod: PodObject, adapter_uid: str, usage: UsagePart) -> None:
        """Keeps a count unless the adapter is not one of the pod's base: a runtime counts nothing for other bases."""
        adapter = self._cache.adapter_of(adapter_uid)
        if adapter is not None and adapter.base_key == pod.base:
            self._lost.setdefault(adapter_uid, {})[usage.boot_id] = usage

    # --- calls

    async def register(self, pod_uid: str, adapter: AdapterKey, descriptor: AdapterDescriptor) -> PutAnswer:
        """Registers an adapter; idempotent. Raises FencedError, RuntimeGoneError, RuntimeRefusedError."""
        answer = await self._client.register(self._proven(pod_uid), adapter, descriptor)
        self._registered.setdefault(adapter.uid, {})[answer.boot_id, adapter.digest] = descriptor
        return answer

    async def unregister(self, pod_uid: str, adapter: AdapterKey) -> DeleteAnswer | None:
        """Unregisters an adapter. Returns None if it was not registered, or if the runtime still waits for requests.

        Raises FencedError, RuntimeGoneError, RuntimeRefusedError.
        """
        pod = self._proven(pod_uid)
        answer = await self._client.unregister(pod, adapter)
        if answer is not None:
            self._keep_usage(pod, adapter.uid, answer.usage)
            self._registered.get(adapter.uid, {}).pop((answer.boot_id, adapter.digest), None)
        return answer

    async def resolve(self, pod_uid: str, request: ResolveRequest, *, timeout_s: float) -> ResolveAnswer:
        """Inspects a source that only this runtime can read. Raises RuntimeGoneError, RuntimeRefusedError."""
        return await self._client.resolve(self._proven(pod_uid), request, timeout_s=timeout_s)

    async def give_credentials(self, pod_uid: str, credentials: NamespaceCredentials) -> None:
        """Gives a runtime the namespaces' credentials. Raises FencedError, RuntimeGoneError, RuntimeRefusedError."""
        await self._client.give_credentials(self._proven(pod_uid), credentials)

    def _proven(self, pod_uid: str) -> PodObject:
        """Returns the pod, which may be sent the token. Raises RuntimeGoneError."""
        polled = self._polled.get(pod_uid)
        if polled is None:
            raise RuntimeGoneError(f"pod {pod_uid} is gone")
        if polled.snapshot is None:
            raise RuntimeGoneError(f"pod {pod_uid} has not proved to be a runtime of its base")
        return polled.pod


Reports = tuple[AdapterReport, ...]


def _changed_reports(known: Mapping[str, Reports], snapshot: RuntimeSnapshot) -> dict[str, tuple[Reports, Reports]]:
    """Returns the reports before and after, by the uid of each adapter whose reports a snapshot changes."""
    listed: dict[str, dict[str, AdapterReport]] = {}
    if not snapshot.full:
        for uid in {item.uid for item in snapshot.removed} | {item.uid for item in snapshot.adapters}:
            listed[uid] = {report.digest: report for report in known.get(uid, ())}
        for item in snapshot.removed:
            listed[item.uid].pop(item.digest, None)
    for report in snapshot.adapters:
        kept = compact_report(report)
        listed.setdefault(kept.uid, {})[kept.digest] = kept
    after = {uid: tuple(reports.values()) for uid, reports in listed.items()}
    uids = known.keys() | after.keys() if snapshot.full else after.keys()
    pairs = {uid: (known.get(uid, ()), after.get(uid, ())) for uid in uids}
    return {uid: (old, new) for uid, (old, new) in pairs.items() if old != new}


def _make_view(
    pod: PodObject, snapshot: RuntimeSnapshot | None, fresh: bool, token_refused: bool, distrust: str, skew_s: float
) -> RuntimeView:
    return RuntimeView(
        pod=pod.meta.name,
        pod_uid=pod.meta.uid,
        ready=pod.ready,
        terminating=pod.terminating,
        snapshot=snapshot,
        fresh=fresh,
        token_refused=token_refused,
        distrust=distrust,
        skew_s=skew_s,
    )


def _with_reports(replica: AdapterOnReplica, reports: Reports | None) -> AdapterOnReplica:
    return AdapterOnReplica(replica.runtime, reports) if reports else replica


def _requests(polled: _Polled, adapter_uid: str) -> int:
    return sum(report.in_flight + report.waiting for report in polled.reports.get(adapter_uid, ()))


def clock_skew(known_s: float, measured_s: float) -> float:
    """Keeps the known difference of two clocks while a new measurement only differs by the time of a response."""
    return known_s if abs(measured_s - known_s) <= SKEW_TOLERANCE_S else measured_s


def _shape(reports: Iterable[AdapterReport]) -> list[tuple[object, ...]]:
    """Returns the part of the reports that can change a condition; counters and times of use cannot."""
    return [
        (r.digest, r.state, r.tier, r.pinned, r.since_unix_s, r.failure, r.in_flight + r.waiting == 0) for r in reports
    ]


def _base_shape(snapshot: RuntimeSnapshot) -> tuple[object, ...]:
    """Returns the part of a snapshot that can change a condition of the base."""
    return snapshot.ready, snapshot.draining, snapshot.base.digest


def _load(snapshot: RuntimeSnapshot) -> tuple[object, ...]:
    """Returns the part of a snapshot that can change the number of replicas, or the reported progress of a start."""
    return snapshot.in_flight + snapshot.waiting, snapshot.last_request_unix_s, snapshot.startup
