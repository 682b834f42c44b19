"""Puts the parts together and runs them: leader election, first listing, kopf's watches, workers, resync, probes.

Called by `__main__` and by tests. Nothing acts before the Lease is held and everything was listed once; when the
Lease is lost the process ends, and its successor starts from what the API server and the runtimes say.
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
from lorapool_operator.apply import Applier
from lorapool_operator.cluster import Cluster, ClusterError, Fenced
from lorapool_operator.handlers import registry_of
from lorapool_operator.intake import Intake
from lorapool_operator.judge import ArtifactInspector, Inspector, JudgeBook
from lorapool_operator.kopfsettings import pinned_settings
from lorapool_operator.lease import Leadership
from lorapool_operator.manifests import RuntimeImage
from lorapool_operator.metrics import Metrics, StateCollector, status_app
from lorapool_operator.observe import PlanSettings
from lorapool_operator.observer import Observer
from lorapool_operator.profiles import ProfilesError, read_profiles
from lorapool_operator.reconciler import Reconciler
from lorapool_operator.resync import Resync
from lorapool_operator.runtimes import PollSettings, RuntimeBook
from lorapool_operator.settings import Settings
from lorapool_operator.store import Key, Store
from lorapool_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

STUCK_S = 300.0
"""A key that is due for this long means the workers hang: the kubelet may restart us."""
LOAD_DELAY_S = 1.0
"""A busy runtime reports at every request; its base is planned once a second then."""
LISTING_RETRY_S = 2.0


class Process:
    """One operator process. `run` returns when the Lease is lost or `stop` was called."""

    def __init__(self, settings: Settings, *, sources: SourceSettings, inspector: Inspector | None = None) -> None:
        self.settings = settings
        self.store = Store()
        self.queue: WorkQueue[Key] = WorkQueue()
        self.metrics = Metrics()
        self.metrics_port = 0
        self.synced = False
        self._profiles = read_profiles(settings.profiles_file)
        self._profiles_stamp = settings.profiles_file.stat().st_mtime_ns
        self._master_token = read_master_token(settings.master_token_file)
        self._inspector = inspector or ArtifactInspector(sources, timeout_s=settings.judge_timeout_s)
        self._stop = asyncio.Event()
        self._finished = False

    def stop(self) -> None:
        self._stop.set()

    @property
    def told_to_stop(self) -> bool:
        return self._stop.is_set()

    async def run(self) -> None:
        """Raises AccessError, ProfilesError, SettingsError at the start; later only what nothing could handle."""
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
        self.runtimes = RuntimeBook(
            self.store,
            master_token=self._master_token,
            settings=PollSettings(
                settings.poll_wait_s, settings.poll_pause_s, settings.snapshot_stale_s, settings.runtime_timeout_s
            ),
            changed=self._runtime_news,
        )
        self.judge = JudgeBook(
            self.store,
            self._inspector,
            self.runtimes,
            concurrency=settings.judge_concurrency,
            timeout_s=settings.judge_timeout_s,
            changed=self.queue.add,
            pending_status_s=settings.pending_status_s,
        )
        self.intake = Intake(
            self.store,
            self.queue,
            counts_interval_s=settings.counts_interval_s,
            pods_changed=self.runtimes.follow_pods,
        )
        self.observer = Observer(
            self.store,
            self.runtimes,
            self.judge,
            profiles=self._profiles,
            image=RuntimeImage(settings.runtime_image, settings.runtime_image_pull_policy),
            master_token=self._master_token,
        )
        self.reconciler = Reconciler(
            self.queue,
            self.observer,
            Applier(self.cluster, self.store, self.intake, self.runtimes, self.judge),
            self.intake,
            self.runtimes,
            self.judge,
            self.metrics,
            PlanSettings(
                pending_status_s=settings.pending_status_s,
                usage_interval_s=settings.usage_interval_s,
                counts_interval_s=settings.counts_interval_s,
                retry_min_s=settings.retry_min_s,
                retry_max_s=settings.retry_max_s,
                start_allowance_s=settings.start_allowance_s,
            ),
        )
        self.resync = Resync(self.cluster, self.store, self.intake, settings.watched)
        self.metrics.registry.register(
            StateCollector(
                self.store,
                self.queue,
                self.judge,
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
        except* Fenced:
            log.error("the Lease is lost: ending, so that the next start is a clean one")
        finally:
            await self.judge.close()
            await self.runtimes.close()

    async def _list_first(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await self.resync.first()
                break
            except ClusterError as error:
                log.warning("first listing failed", extra={"error": str(error)})
                await asyncio.sleep(LISTING_RETRY_S)
        self.synced = True
        log.info(
            "listed",
            extra={
                "bases": len(self.store.bases),
                "adapters": len(self.store.adapters),
                "seconds": round(time.monotonic() - began, 2),
            },
        )

    async def _watch(self) -> None:
        """kopf in our own loop; it ends only by cancellation or a fatal error of a watch."""
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
            self._stop.set()  # kopf took the signal

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self.settings.resync_s)
            self._reload_profiles()
            try:
                self.metrics.repairs.inc(await self.resync.again())
                self.metrics.resyncs.labels("done").inc()
            except ClusterError as error:
                self.metrics.resyncs.labels("error").inc()
                log.warning("resync failed", extra={"error": str(error)})
            self.runtimes.follow_pods()
            self.observer.apply_all_again()
            for base in self.store.bases:
                self.queue.add(base.key)
            for adapter in self.store.adapters:
                self.queue.add(adapter.key)

    def _reload_profiles(self) -> None:
        """A changed file counts; a broken one is logged and the old profiles stay."""
        try:
            stamp = self.settings.profiles_file.stat().st_mtime_ns
            if stamp == self._profiles_stamp:
                return
            self.observer.profiles = read_profiles(self.settings.profiles_file)
            self._profiles_stamp = stamp
            log.info("profiles read again")
        except (ProfilesError, OSError) as error:
            log.error("profiles not read; the former ones stay", extra={"error": str(error)})

    def _runtime_news(self, base: Key, adapter_uids: Iterable[str], urgent: bool) -> None:
        """What a runtime said: conditions at once, counting later."""
        self.queue.add(base, 0.0 if urgent else LOAD_DELAY_S)
        wanted = set(adapter_uids)
        if not wanted:
            return
        delay_s = 0.0 if urgent else self.settings.usage_interval_s
        for adapter in self.store.adapters_of(base):
            if adapter.meta.uid in wanted:
                self.queue.add(adapter.key, delay_s)

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
        """A standby is ready: it could take over at any time. A leader is once it has listed everything."""
        if self._leadership.may_write() and not self.synced:
            return "the first listing is not done"
        return "" if not self._finished else "ending"
