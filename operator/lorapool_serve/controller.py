"""The operator's own decisions and effects, connected to the objects in memory instead of an API server.

Left out of the operator's process are the Lease, kopf's watches and the resync: no second writer exists, and no event
is ever lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_artifacts.inspect import BaseInspection, base_files_from_folder
from lorapool_artifacts.settings import SourceSettings
from lorapool_operator.assembly import Control, ControlSettings
from lorapool_operator.effects.inspections import ArtifactInspector, Inspector
from lorapool_operator.metrics import Metrics
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile
from lorapool_serve.objects import ADAPTER, BASE, DEPLOYMENT, POD, REPLICA_SET, Objects

WORKERS = 4
INSPECTIONS = 4
INSPECT_TIMEOUT_S = 120.0
PROFILE = RuntimeProfile(termination_grace_period_seconds=10)
"""Running requests may finish for 5 s when a runtime is stopped."""
REPORT_DELAY_S = 1.0
"""What is only counted is planned once a second."""
COUNTS_INTERVAL_S = 0.5


class LocalInspector(ArtifactInspector):
    """Inspects sources as the operator does, but the bases that were given as local folders in these folders."""

    def __init__(self, settings: SourceSettings, local_bases: Mapping[str, Path]) -> None:
        """`local_bases`: folder by the source URI that it stands for."""
        super().__init__(settings, timeout_s=INSPECT_TIMEOUT_S)
        self._local_bases = local_bases

    async def base(
        self, uri: str, revision: str | None, *, credentials: Mapping[str, str] | None = None
    ) -> BaseInspection:
        folder = self._local_bases.get(uri)
        if folder is None:
            return await super().base(uri, revision, credentials=credentials)
        files = await asyncio.to_thread(base_files_from_folder, folder)
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
        return BaseInspection(str(folder), None, files, size_bytes)


class Controller:
    """Plans and applies until cancelled; its writes go into the objects, which report every change back to it."""

    def __init__(self, objects: Objects, inspector: Inspector, tokens: RuntimeTokens) -> None:
        settings = ControlSettings(
            tokens=tokens.of,
            images={"torch": RuntimeImage("", "Never")},
            profiles={"default": PROFILE},
            inspections=INSPECTIONS,
            inspection_timeout_s=INSPECT_TIMEOUT_S,
            counts_interval_s=COUNTS_INTERVAL_S,
            usage_delay_s=REPORT_DELAY_S,
        )
        self._control = Control(objects, inspector, settings, Metrics())
        intake = self._control.intake
        objects.listen(POD, lambda raw, deleted: intake.pod(raw, deleted=deleted))
        objects.listen(REPLICA_SET, lambda raw, deleted: intake.replica_set(raw, deleted=deleted))
        objects.listen(DEPLOYMENT, lambda raw, deleted: intake.deployment(raw, deleted=deleted))
        objects.listen(BASE, lambda raw, deleted: intake.base(raw, deleted=deleted))
        objects.listen(ADAPTER, lambda raw, deleted: intake.adapter(raw, deleted=deleted))

    async def run(self) -> None:
        try:
            await self._control.reconciler.work(WORKERS)
        finally:
            await self._control.close()
