"""The operator's own decisions and effects, connected to the objects in memory instead of an API server.

Left out of the operator's process are the Lease, kopf's watches and the resync: no second writer exists, and no event
is ever lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorapool_artifacts.inspect import BaseInspection, base_facts_from_folder, names_of
from lorapool_artifacts.settings import SourceSettings
from lorapool_artifacts.uri import parse_uri
from lorapool_operator.decisions.plan import PlanSettings
from lorapool_operator.effects.apply import Applier
from lorapool_operator.effects.inspections import ArtifactInspector, InspectionTracker, Inspector
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeTracker
from lorapool_operator.metrics import Metrics
from lorapool_operator.observe import Observer
from lorapool_operator.reconciler import Reconciler
from lorapool_operator.workqueue import WorkQueue
from lorapool_operator.world.cluster_cache import ClusterCache, Key
from lorapool_operator.world.intake import Intake
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile
from lorapool_serve.objects import ADAPTER, BASE, DEPLOYMENT, POD, Objects

WORKERS = 4
INSPECTIONS = 4
INSPECT_TIMEOUT_S = 120.0
MAX_BASE_BYTES = 200_000_000_000
PROFILE = RuntimeProfile(termination_grace_period_seconds=10)
"""Running requests may finish for 5 s when a runtime is stopped."""
REPORT_DELAY_S = 1.0
"""A busy runtime reports a change with every request; what is only counted is planned once a second."""
COUNTS_INTERVAL_S = 0.5


class LocalInspector(ArtifactInspector):
    """Inspects sources as the operator does, but the bases that were given as local folders in these folders."""

    def __init__(self, settings: SourceSettings, local_bases: Mapping[str, Path]) -> None:
        """`local_bases`: folder by the source URI that it stands for."""
        super().__init__(settings, timeout_s=INSPECT_TIMEOUT_S, max_base_bytes=MAX_BASE_BYTES)
        self._local_bases = local_bases

    async def base(self, uri: str, revision: str | None) -> BaseInspection:
        folder = self._local_bases.get(uri)
        if folder is None:
            return await super().base(uri, revision)
        facts = await asyncio.to_thread(base_facts_from_folder, folder)
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
        return BaseInspection(str(folder), None, facts.with_names(*names_of(parse_uri(uri))), size_bytes)


class Controller:
    """Plans and applies until cancelled; its writes go into the objects, which report every change back to it."""

    def __init__(self, objects: Objects, inspector: Inspector, master_token: str) -> None:
        self._cache = ClusterCache()
        self._queue: WorkQueue[Key] = WorkQueue()
        self._settings = PlanSettings()
        self._runtimes = RuntimeTracker(
            self._cache, master_token=master_token, settings=PollSettings(), changed=self._runtime_changed
        )
        self._inspections = InspectionTracker(
            self._cache,
            inspector,
            self._runtimes,
            concurrency=INSPECTIONS,
            timeout_s=INSPECT_TIMEOUT_S,
            changed=self._queue.add,
            pending_status_s=self._settings.pending_status_s,
        )
        self._intake = Intake(
            self._cache, self._queue.add, counts_interval_s=COUNTS_INTERVAL_S, pods_changed=self._runtimes.follow_pods
        )
        observer = Observer(
            self._cache,
            self._runtimes,
            self._inspections,
            profiles={"default": PROFILE},
            image=RuntimeImage("", "Never"),
            master_token=master_token,
        )
        applier = Applier(objects, self._cache, self._intake, self._runtimes, self._inspections)
        self._reconciler = Reconciler(
            self._queue,
            observer,
            applier,
            self._intake,
            self._runtimes,
            self._inspections,
            Metrics(),
            self._settings,
        )
        objects.listen(POD, lambda raw, deleted: self._intake.pod(raw, deleted=deleted))
        objects.listen(DEPLOYMENT, lambda raw, deleted: self._intake.deployment(raw, deleted=deleted))
        objects.listen(BASE, lambda raw, deleted: self._intake.base(raw, deleted=deleted))
        objects.listen(ADAPTER, lambda raw, deleted: self._intake.adapter(raw, deleted=deleted))

    async def run(self) -> None:
        try:
            await self._reconciler.work(WORKERS)
        finally:
            await self._inspections.close()
            await self._runtimes.close()

    def _runtime_changed(self, base: Key, adapter_uids: Iterable[str], urgent: bool) -> None:
        """Plans the base and its adapters again; also those that the runtime does not know but could now resolve."""
        delay_s, reported = 0.0 if urgent else REPORT_DELAY_S, set(adapter_uids)
        self._queue.add(base, delay_s)
        for adapter in self._cache.adapters_of(base):
            if urgent or adapter.meta.uid in reported:
                self._queue.add(adapter.key, delay_s)
