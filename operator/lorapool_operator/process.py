"""Assembles the operator and runs it: leader election, first listing, kopf's watches, workers, resync, probes.

Nothing acts before the Lease is held and all objects were listed once. When the Lease is lost, the process ends; the
next leader starts from the state of the API server and of the runtimes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import kopf
from aiohttp import web
from kubernetes.aio.client.api_client import ApiClient

from lorapool_api.settings import read_master_token
from lorapool_artifacts.settings import SourceSettings
from lorapool_operator.access import load_configuration, login_handler, make_client
from lorapool_operator.decisions.plan import PlanSettings
from lorapool_operator.effects.apply import Applier
from lorapool_operator.effects.cluster import Cluster, ClusterError, FencedError
from lorapool_operator.effects.inspections import ArtifactInspector, InspectionTracker, Inspector
from lorapool_operator.effects.lease import Leadership
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeTracker
from lorapool_operator.handlers import pinned_settings, registry_of
from lorapool_operator.metrics import Metrics, StateCollector, status_app
from lorapool_operator.observe import Observer
from lorapool_operator.reconciler import Reconciler
from lorapool_operator.resync import Resync
from lorapool_operator.settings import Settings
from lorapool_operator.workqueue import WorkQueue
from lorapool_operator.world.cluster_cache import ClusterCache, Key
from lorapool_operator.world.intake import Intake
from lorapool_operator.world.profiles import ProfilesError, RuntimeImage, read_profiles

log = logging.getLogger(__name__)

STUCK_S = 300.0
"""If a key is due for this long, the workers hang and the liveness probe fails."""
LOAD_DELAY_S = 1.0
"""A busy runtime reports a change with every request; its base is then planned at most once a second."""
LISTING_RETRY_S = 2.0
PROFILES_CHECK_S = 2.0
"""How often the file of profiles is looked at for a change."""


class Process:
    """One operator process. `run` returns when the Lease is lost or after `stop`."""

    def __init__(self, settings: Settings, *, sources: SourceSettings, inspector: Inspector | None = None) -> None:
        """Raises ProfilesError or SettingsError if a file that the settings name cannot be used."""
        self.settings = settings
        self.cache = ClusterCache()
        self.queue: WorkQueue[Key] = WorkQueue()
        self.metrics = Metrics()
        self.metrics_port = 0
        self.synced = False
        self._profiles = read_profiles(settings.profiles_file)
        self._profiles_stamp = settings.profiles_file.stat().st_mtime_ns
        self._master_token = read_master_token(settings.master_token_file)
        self._inspector = inspector or ArtifactInspector(
            sources, timeout_s=settings.judge_timeout_s, max_base_bytes=settings.max_base_bytes
        )
        self._stop = asyncio.Event()
        self._finished = False

    def stop(self) -> None:
        """Ends `run`, as a signal does."""
        self._stop.set()

    @property
    def stop_requested(self) -> bool:
        return self._stop.is_set()

    async def run(self) -> None:
        """Runs until the Lease is lost or `stop` is called. Raises AccessError if no API server is configured."""
        settings = self.settings
        client = make_client(await load_configuration(settings.kubeconfig))
        try:
            self._build(client)
            async with self._status_server():
                leading = asyncio.create_task(self._leadership.run(self._act), name="leadership")
                stopping = asyncio.create_task(self._stop.wait(), name="stop")
                try:
                    await asyncio.wait({leading, stopping}, return_when=asyncio.FIRST_COMPLETED)
                    if leading.done():
                        leading.result()
                finally:
                    for task in (leading, stopping):
                        task.cancel()
                    await asyncio.gather(leading, stopping, return_exceptions=True)
        finally:
            self._finished = True
            await client.close()

    def _build(self, client: ApiClient) -> None:
        settings = self.settings
        self._leadership = Leadership(settings, client)
        self.cluster = Cluster(
            client,
            timeout_s=settings.api_timeout_s,
            identity=settings.identity,
            may_write=self._leadership.may_write,
        )
        self.runtimes = RuntimeTracker(
            self.cache,
            master_token=self._master_token,
            settings=PollSettings(
                settings.poll_wait_s, settings.poll_pause_s, settings.snapshot_stale_s, settings.runtime_timeout_s
            ),
            changed=self._runtime_changed,
        )
        self.inspections = InspectionTracker(
            self.cache,
            self._inspector,
            self.runtimes,
            concurrency=settings.judge_concurrency,
            timeout_s=settings.judge_timeout_s,
            changed=self.queue.add,
            pending_status_s=settings.pending_status_s,
        )
        self.intake = Intake(
            self.cache,
            self.queue.add,
            counts_interval_s=settings.counts_interval_s,
            pods_changed=self.runtimes.follow_pods,
        )
        self.observer = Observer(
            self.cache,
            self.runtimes,
            self.inspections,
            profiles=self._profiles,
            image=RuntimeImage(settings.runtime_image, settings.runtime_image_pull_policy),
            master_token=self._master_token,
        )
        self.reconciler = Reconciler(
            self.queue,
            self.observer,
            Applier(self.cluster, self.cache, self.intake, self.runtimes, self.inspections),
            self.intake,
            self.runtimes,
            self.inspections,
            self.metrics,
            PlanSettings(
                pending_status_s=settings.pending_status_s,
                usage_interval_s=settings.usage_interval_s,
                retry_min_s=settings.retry_min_s,
                retry_max_s=settings.retry_max_s,
                source_check_s=settings.source_check_s,
                source_poll_s=settings.source_poll_s,
                start_allowance_s=settings.start_allowance_s,
                start_retry_min_s=settings.start_retry_min_s,
                start_retry_max_s=settings.start_retry_max_s,
                max_concurrent_rollouts=settings.max_concurrent_rollouts,
            ),
        )
        self.resync = Resync(self.cluster, self.cache, self.intake, settings.watched)
        self.metrics.registry.register(
            StateCollector(
                self.cache,
                self.queue,
                self.inspections,
                self.runtimes,
                self.cluster,
                leading=self._leadership.may_write,
                max_tracked_adapters=settings.max_tracked_adapters,
            )
        )

    # --- acting, once the Lease is held

    async def _act(self) -> None:
        try:
            await self._list_first()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(), name="kopf")
                group.create_task(self.reconciler.work(self.settings.workers), name="workers")
                group.create_task(self._resync(), name="resync")
                group.create_task(self._watch_profiles(), name="profiles")
        except* FencedError:
            log.error("lost the Lease: ending, so that the process starts again as a standby")
        finally:
            await self.inspections.close()
            await self.runtimes.close()

    async def _list_first(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await self.resync.first()
                break
            except ClusterError as error:
                log.warning("first listing failed, trying again", extra={"error": str(error)})
                await asyncio.sleep(LISTING_RETRY_S)
        self.synced = True
        log.info(
            "listed all objects",
            extra={
                "bases": len(self.cache.bases),
                "adapters": len(self.cache.adapters),
                "seconds": round(time.monotonic() - began, 2),
            },
        )

    async def _watch(self) -> None:
        """Runs kopf in this event loop; it ends by a signal, by cancellation or by a fatal error of a watch."""
        namespaces = self.settings.namespaces
        await kopf.operator(
            registry=registry_of(self.intake, login_handler(self.settings.kubeconfig)),
            settings=pinned_settings(),
            standalone=True,
            clusterwide=namespaces is None,
            namespaces=sorted(namespaces) if namespaces is not None else (),
            stop_flag=self._stop,
        )
        if not self._stop.is_set():
            self._stop.set()  # kopf handled the signal

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self.settings.resync_s)
            try:
                self.metrics.repairs.inc(await self.resync.again())
                self.metrics.resyncs.labels("done").inc()
            except ClusterError as error:
                self.metrics.resyncs.labels("error").inc()
                log.warning("resync failed", extra={"error": str(error)})
            self.runtimes.follow_pods()
            self.observer.apply_all_again()
            for base in self.cache.bases:
                self.queue.add(base.key)
            for adapter in self.cache.adapters:
                self.queue.add(adapter.key)

    async def _watch_profiles(self) -> None:
        """Plans the bases again whose profile changed in the file, within `PROFILES_CHECK_S`."""
        while True:
            await asyncio.sleep(PROFILES_CHECK_S)
            before = self.observer.profiles
            self._reload_profiles()
            after = self.observer.profiles
            for base in self.cache.bases if after is not before else ():
                name = base.spec.runtime_profile
                if before.get(name) != after.get(name):
                    self.queue.add(base.key)

    def _reload_profiles(self) -> None:
        """Reads the profiles again if the file changed. Logs a broken file once and keeps the old profiles."""
        try:
            stamp = self.settings.profiles_file.stat().st_mtime_ns
            if stamp == self._profiles_stamp:
                return
            self._profiles_stamp = stamp
            self.observer.profiles = read_profiles(self.settings.profiles_file)
            log.info("read the changed profiles")
        except (ProfilesError, OSError) as error:
            log.error("cannot read the profiles; the old ones stay in force", extra={"error": str(error)})

    def _runtime_changed(self, base: Key, adapter_uids: Iterable[str], urgent: bool) -> None:
        """Marks dirty what a runtime's report affects: at once for conditions, later for counters."""
        self.queue.add(base, 0.0 if urgent else LOAD_DELAY_S)
        wanted = set(adapter_uids)
        if not wanted:
            return
        soon = set() if urgent else self._may_spread(base, wanted)
        delay_s = 0.0 if urgent else self.settings.usage_interval_s
        for adapter in self.cache.adapters_of(base):
            if adapter.meta.uid in wanted:
                self.queue.add(adapter.key, LOAD_DELAY_S if adapter.meta.uid in soon else delay_s)

    def _may_spread(self, key: Key, adapter_uids: set[str]) -> set[str]:
        """Returns the adapters whose number of preferred replicas may have to change with their load."""
        base = self.cache.bases.get(key.namespace, key.name)
        if base is None or base.spec.scaling.max_replicas == 1:
            return set()
        return self.runtimes.busy(key, adapter_uids, 1 + base.spec.scaling.target_in_flight // 2)

    # --- probes

    @asynccontextmanager
    async def _status_server(self) -> AsyncIterator[None]:
        app = status_app(self.metrics.registry, healthy=self._health_problem, ready=self._ready_problem)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.settings.metrics_host, self.settings.metrics_port).start()
            self.metrics_port = int(runner.addresses[0][1])
            yield
        finally:
            await runner.cleanup()

    def _health_problem(self) -> str:
        age_s = self.queue.oldest_age_s()
        if self._leadership.may_write() and self.synced and age_s > STUCK_S:
            return f"the oldest due key has waited {age_s:.0f} s"
        return ""

    def _ready_problem(self) -> str:
        """A standby is ready, since it can take over at any time; a leader is ready after its first listing."""
        if self._leadership.may_write() and not self.synced:
            return "the first listing is not finished"
        return "" if not self._finished else "ending"
