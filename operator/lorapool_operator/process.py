"""Assembles the operator and runs it: leader election, namespaces with kopf's watches, workers, resync, probes.

Nothing acts before the Lease is held and every namespace was listed, or could not be. When the Lease is lost, the
process ends; the next leader starts from the state of the API server and of the runtimes.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from aiohttp import web
from kubernetes.aio.client.api_client import ApiClient

from lorapool_api.pod_address import AUTHORITY
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_api.trust.runtime_tokens import MasterTokens, RuntimeTokens
from lorapool_api.trust.tls import ReleaseTrust
from lorapool_artifacts.policy import PolicyError, read_policy
from lorapool_artifacts.settings import SourceSettings
from lorapool_operator.access import load_configuration, login_handler, make_client
from lorapool_operator.assembly import Control, ControlSettings
from lorapool_operator.decisions.plan import PlanSettings
from lorapool_operator.decisions.tuning.session import trainer_profile
from lorapool_operator.decisions.tuning.values import TuningLimits
from lorapool_operator.effects.authority import Authority
from lorapool_operator.effects.cluster import Cluster, ClusterError, Subject
from lorapool_operator.effects.fence import Fence, FencedError
from lorapool_operator.effects.inspections import ArtifactInspector, Inspector
from lorapool_operator.effects.job_files import StoreFiles
from lorapool_operator.effects.lease import Leadership
from lorapool_operator.effects.left_jobs import release_deleted_jobs
from lorapool_operator.effects.namespace_reports import NamespaceReports
from lorapool_operator.effects.rate_limit import RateLimit
from lorapool_operator.effects.release_certificate import ReleaseCertificate
from lorapool_operator.effects.runtime_calls import RuntimeClient
from lorapool_operator.effects.runtime_polls import PollSettings
from lorapool_operator.effects.store_grants import StoreGrants
from lorapool_operator.effects.token_record import TokenRecord
from lorapool_operator.effects.tuning import JobFiles, TuningControl, TuningSetup
from lorapool_operator.metrics import Metrics, StateCollector, status_app
from lorapool_operator.namespaces import Namespaces
from lorapool_operator.resync import Resync
from lorapool_operator.settings import Settings
from lorapool_operator.tuning_metrics import TuningCollector
from lorapool_operator.watching import Inbox, watcher
from lorapool_operator.world.profiles import Images, ProfilesError, RuntimeImage, read_profiles

log = logging.getLogger(__name__)

STUCK_S = 300.0
"""If a key is due for this long, the workers hang and the liveness probe fails."""
COLLECT_S = 3600.0
"""How often the garbage collector examines the objects that live long: thousands of them take half a second."""
NEVER = 2**31 - 1
GIL_SWITCH_S = 0.0005
"""For how long kopf's threads may keep the interpreter while the event loop waits for it after a system call."""
FILES_CHECK_S = 2.0
"""How often the mounted profiles, policy and credentials are looked at for a change."""
RELEASE_CERTIFICATE_S = 30.0
"""How often the certificates of store and ledger are looked at."""
POLICY_SPREAD_S = 5.0
"""All adapters are planned again within this time after a change of the policy."""


class Process:
    """One operator process. `run` returns when the Lease is lost or after `stop`."""

    def __init__(
        self,
        settings: Settings,
        *,
        sources: SourceSettings,
        inspector: Inspector | None = None,
        job_files: JobFiles | None = None,
    ) -> None:
        """Raises ProfilesError, PolicyError or SettingsError if a file that the settings name cannot be used."""
        self.settings = settings
        self.metrics = Metrics()
        self.metrics_port = 0
        self.synced = False
        self._profiles = read_profiles(settings.profiles_file)
        self._profiles_stamp = settings.profiles_file.stat().st_mtime_ns
        self._policy_content = _content(settings.source_policy_file)
        self._policy = read_policy(settings.source_policy_file)
        self._sources = sources
        self._tokens = RuntimeTokens.from_file(settings.master_token_file)
        self._store = store_grants(settings)
        self._authority = Authority(settings.internal_ca_dir) if settings.internal_tls else None
        self._metrics_access = MetricsAccess(settings)
        self._inspector = inspector or ArtifactInspector(sources, timeout_s=settings.inspection_timeout_s)
        self._job_files = job_files
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
        fence = Fence(self._leadership.may_write)
        self.cluster = Cluster(
            client,
            timeout_s=settings.api_timeout_s,
            identity=settings.identity,
            fence=fence,
            rate_limit=RateLimit(settings.api_qps, settings.api_burst),
        )
        self.control = Control(self.cluster, self._inspector, self._control_settings(), self.metrics, fence=fence)
        if settings.tuning:
            self.control.tuning = self._tuning(fence)
        self.reports = NamespaceReports(
            self.cluster,
            Subject("Lease", settings.own_namespace, settings.lease_name, api_version="coordination.k8s.io/v1"),
            settings.watched,
        )
        if self._authority is not None:
            self.metrics.authority_expiry.set_function(self._authority.expiry_unix_s)
        self.metrics.registry.register(
            StateCollector(
                self.control.cache,
                self.control.queue,
                self.control.inspections,
                self.control.runtimes,
                self.cluster,
                self.reports,
                leading=self._leadership.may_write,
                max_tracked_adapters=settings.max_tracked_adapters,
            )
        )
        if self.control.tuning is not None:
            jobs = self.control.tuning.cache.jobs
            self.metrics.registry.register(TuningCollector(jobs, max_tracked_jobs=settings.max_tracked_adapters))

    def _tuning(self, fence: Fence) -> TuningControl:
        settings, observer = self.settings, self.control.observer
        trust = ReleaseTrust(settings.internal_ca_dir / AUTHORITY)
        return TuningControl(
            self.cluster,
            self.control.cache,
            RuntimeClient(self._tokens.of, timeout_s=settings.runtime_timeout_s, fence=fence, trust=trust),
            _poll_settings(settings),
            TuningSetup(
                image=replace(_images(settings)["torch"], keeps_usage=False),
                profile_of=lambda base: trainer_profile(base, observer.profiles),
                files=self._files(),
                limits=TuningLimits(
                    active_jobs=settings.tuning_active_jobs,
                    unfinished_jobs=settings.tuning_unfinished_jobs,
                    month_tokens=settings.tuning_month_tokens or None,
                    status_interval_s=settings.tuning_status_interval_s,
                    priority_class=settings.tuning_priority_class,
                ),
                serves_tls=self._authority is not None,
                tokens=self._token_record(),
            ),
        )

    def _token_record(self) -> TokenRecord | None:
        settings = self.settings
        if not settings.tuning_month_tokens:
            return None
        return TokenRecord(self.cluster, settings.own_namespace, f"{settings.lease_name}-tokens")

    def _files(self) -> JobFiles | None:
        return self._job_files or (StoreFiles(self._store) if self._store is not None else None)

    def _control_settings(self) -> ControlSettings:
        settings = self.settings
        return ControlSettings(
            tokens=self._tokens.of,
            images=_images(settings),
            profiles=self._profiles,
            policy=self._policy,
            namespace_credentials=settings.namespace_credentials,
            store=self._store.of_namespace if self._store is not None else lambda _namespace: None,
            inspections=settings.inspection_concurrency,
            inspection_timeout_s=settings.inspection_timeout_s,
            counts_interval_s=settings.counts_interval_s,
            usage_delay_s=settings.usage_interval_s,
            plan=PlanSettings(
                pending_status_s=settings.pending_status_s,
                usage_interval_s=settings.usage_interval_s,
                load_status_interval_s=settings.load_status_interval_s,
                retry_min_s=settings.retry_min_s,
                retry_max_s=settings.retry_max_s,
                source_check_s=settings.source_check_s,
                source_poll_s=settings.source_poll_s,
                start_allowance_s=settings.start_allowance_s,
                start_retry_min_s=settings.start_retry_min_s,
                start_retry_max_s=settings.start_retry_max_s,
                max_concurrent_rollouts=settings.max_concurrent_rollouts,
            ),
            polls=_poll_settings(settings),
            authority=self._authority,
            trust=ReleaseTrust(settings.internal_ca_dir / AUTHORITY),
        )

    # --- acting, once the Lease is held

    async def _act(self) -> None:
        inbox = Inbox(self.control.slices.turn)
        tuning = self.control.tuning
        resync = Resync(self.cluster, self.control.cache, self.control.intake, self.control.slices.turn, tuning)
        login = functools.partial(login_handler, self.settings.kubeconfig)
        namespaces = Namespaces(
            self.settings.watched,
            resync,
            self.reports,
            self.control.cache,
            self.metrics,
            watch=watcher(inbox, self.control.intake, login, resync.versions, tuning.intake if tuning else None),
            resync_s=self.settings.resync_s,
        )
        sys.setswitchinterval(GIL_SWITCH_S)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_collect_seldom(), name="collections")
                group.create_task(inbox.empty_forever(), name="inbox")
                group.create_task(namespaces.run(), name="namespaces")
                await self._until_listed(namespaces)
                await self.control.runtimes.answered(self.settings.snapshot_stale_s)
                gc.freeze()  # what was listed lives long: collections need not examine it
                group.create_task(self.control.reconciler.work(self.settings.workers), name="workers")
                group.create_task(self._resync(), name="resync")
                if tuning is not None:
                    group.create_task(tuning.work(), name="fine-tuning")
                else:
                    group.create_task(self._release_deleted_jobs(), name="deleted jobs")
                group.create_task(self._watch_profiles(), name="profiles")
                group.create_task(self._watch_policy(), name="policy")
                group.create_task(self._watch_credentials(), name="credentials")
                group.create_task(self._deliver_credentials(), name="namespace credentials")
                for component, secret in (
                    ("store", self.settings.store_tls_secret),
                    ("ledger", self.settings.ledger_tls_secret),
                ):
                    if self._authority is not None and secret:
                        keeping = self._keep_certificate(self._authority, component, secret)
                        group.create_task(keeping, name=f"certificate of the {component}")
        except* FencedError:
            if not self.stop_requested:
                log.error("lost the Lease: ending, so that the process starts again as a standby")
        finally:
            await self.control.close()

    async def _until_listed(self, namespaces: Namespaces) -> None:
        began = time.monotonic()
        await namespaces.listed()
        self.synced = True
        cache = self.control.cache
        log.info(
            "listed all objects",
            extra={
                "bases": len(cache.bases),
                "adapters": len(cache.adapters),
                "seconds": round(time.monotonic() - began, 2),
            },
        )

    async def _release_deleted_jobs(self) -> None:
        files, adapters = self._files(), self.control.cache.adapters
        while True:
            await release_deleted_jobs(self.cluster, self.settings.watched, files, adapters)
            await asyncio.sleep(self.settings.resync_s)

    async def _resync(self) -> None:
        """Reconciles every object once in each interval, evenly spread over it."""
        control, interval_s = self.control, self.settings.resync_s
        while True:
            await asyncio.sleep(interval_s)
            control.runtimes.follow_pods()
            control.observer.apply_all_again()
            control.mark_all(interval_s)
            if control.tuning is not None:
                control.tuning.mark_all()

    async def _watch_profiles(self) -> None:
        """Plans the bases again that a change of the file affects, within `FILES_CHECK_S`."""
        observer = self.control.observer
        while True:
            await asyncio.sleep(FILES_CHECK_S)
            before, problem = observer.profiles, observer.profiles_problem
            self._reload_profiles()
            for base in self.control.cache.bases:
                name = base.spec.runtime_profile
                if before.get(name) != observer.profiles.get(name) or problem != observer.profiles_problem:
                    self.control.queue.add(base.key)

    def _reload_profiles(self) -> None:
        """Reads the profiles again if the file changed. A broken file is logged once, and shown by every base."""
        observer = self.control.observer
        try:
            stamp = self.settings.profiles_file.stat().st_mtime_ns
            if stamp == self._profiles_stamp:
                return
            self._profiles_stamp = stamp
            observer.profiles = read_profiles(self.settings.profiles_file)
            observer.profiles_problem = ""
            log.info("read the changed profiles")
        except (ProfilesError, OSError) as error:
            if observer.profiles_problem != str(error):
                log.error("cannot read the profiles; the old ones stay in force", extra={"error": str(error)})
            observer.profiles_problem = str(error)

    async def _watch_policy(self) -> None:
        """Plans everything again within `FILES_CHECK_S` of a change of the policy. A broken file changes nothing."""
        file = self.settings.source_policy_file
        while True:
            await asyncio.sleep(FILES_CHECK_S)
            if (found := _content(file)) == self._policy_content:
                continue
            self._policy_content = found
            try:
                self.control.access.policy = read_policy(file)
            except PolicyError as error:
                log.error("cannot read the source policy; the old one stays in force", extra={"error": str(error)})
                continue
            log.info("read the changed source policy")
            self.control.mark_all(POLICY_SPREAD_S)

    async def _watch_credentials(self) -> None:
        """Has sources that refused access inspected again, within `FILES_CHECK_S` of a change of the credentials."""
        known = self._sources.credentials_digest()
        while True:
            await asyncio.sleep(FILES_CHECK_S)
            found = self._sources.credentials_digest()
            if found != known:
                known = found
                log.info("the credentials of sources changed; those that refused access are inspected again")
                self.control.credentials_changed()

    async def _deliver_credentials(self) -> None:
        """Gives runtimes the namespaces' own credentials, and has sources inspected again when these change."""
        while True:
            if await self.control.delivery.run_once():
                self.control.credentials_changed()
            await asyncio.sleep(FILES_CHECK_S)

    async def _keep_certificate(self, authority: Authority, component: str, secret: str) -> None:
        """Issues the certificate of the release's store or ledger, and again when it is due, changed or lost."""
        keeper = ReleaseCertificate(self.cluster, authority, self.settings.own_namespace, secret, component)
        while True:
            try:
                await keeper.ensure()
            except ClusterError as error:
                log.warning(
                    "the certificate of the %s cannot be written; tried again", component, extra={"error": str(error)}
                )
            await asyncio.sleep(RELEASE_CERTIFICATE_S)

    # --- probes

    @asynccontextmanager
    async def _status_server(self) -> AsyncIterator[None]:
        app = status_app(
            self.metrics.registry, self._metrics_access, healthy=self._health_problem, ready=self._ready_problem
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            host, port, tls = self.settings.metrics_host, self.settings.metrics_port, self._metrics_access.tls
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
            self.metrics_port = int(runner.addresses[0][1])
            yield
        finally:
            await runner.cleanup()

    def _health_problem(self) -> str:
        age_s = self.control.queue.oldest_age_s()
        if self._leadership.may_write() and self.synced and age_s > STUCK_S:
            return f"the oldest due key has waited {age_s:.0f} s"
        return ""

    def _ready_problem(self) -> str:
        """A standby is ready, since it can take over at any time; a leader is ready after its first listing."""
        if self._leadership.may_write() and not self.synced:
            return "the first listing is not finished"
        return "" if not self._finished else "ending"


def _images(settings: Settings) -> Images:
    return {
        "torch": RuntimeImage(settings.runtime_image, settings.runtime_image_pull_policy, settings.runtime_usage),
        "vllm": RuntimeImage(
            settings.runtime_vllm_image, settings.runtime_vllm_image_pull_policy, settings.runtime_usage
        ),
    }


def _poll_settings(settings: Settings) -> PollSettings:
    return PollSettings(
        settings.poll_wait_s, settings.poll_pause_s, settings.snapshot_stale_s, settings.runtime_timeout_s
    )


def store_grants(settings: Settings) -> StoreGrants | None:
    """How this process lets others use the store; None without one. Raises SettingsError."""
    if not settings.store_url:
        return None
    masters = MasterTokens.from_file(settings.store_token_file)
    return StoreGrants(settings.store_url, masters, settings.internal_ca_dir / AUTHORITY)


def _content(file: Path | None) -> bytes:
    """What a mounted file has now; nothing if it cannot be read."""
    try:
        return file.read_bytes() if file is not None else b""
    except OSError:
        return b""


async def _collect_seldom() -> None:
    """Collects young garbage as ever, and examines all objects once in `COLLECT_S` instead of whenever they grow.

    What the caches drop is freed by its reference count. Only rare cycles that lived long wait for the collection.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], NEVER)
    try:
        while True:
            await asyncio.sleep(COLLECT_S)
            gc.collect()
    finally:
        gc.set_threshold(*before)
