"""kopf's event handlers and settings: each event updates the caches and marks keys dirty, and does nothing else.

kopf only watches: no handler makes it write, so its finalizer and annotations are named but never used. An event
may be late, duplicated or missing; the resync compensates, so no handler depends on receiving every event. Handlers run
in kopf's thread and only pass the event on.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import kopf
from kopf._core.reactor.inventory import (
    ResourceMemories,
    ResourceMemory,
)  # `kopf.operator` takes one, but none is public

from lorapool_api.basemodel import PLURAL as BASES
from lorapool_api.common import GROUP, LABEL_BASE, LABEL_GROUP_SET, VERSION
from lorapool_api.loraadapter import PLURAL as ADAPTERS
from lorapool_api.tuning.finetunejob import PLURAL as JOBS
from lorapool_operator.world.intake import Intake
from lorapool_operator.world.tuning import LABEL_TRAINER
from lorapool_operator.world.tuning_intake import TuningIntake

GROUPS = ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets")
"""Only watched if the cluster has this API when the watches begin; later, the resync finds what it has."""


class Feed(Protocol):
    """Takes one object as the API server sent it."""

    def __call__(self, raw: Mapping[str, Any], *, deleted: bool = False) -> None: ...


def registry_of(
    intake: Intake,
    put: Callable[[Feed, Mapping[str, Any], bool], None],
    login: Any,
    tuning: TuningIntake | None = None,
) -> kopf.OperatorRegistry:
    """Returns a kopf registry of its own that holds all handlers. Each passes (feed, object, deleted) to `put`.

    The kinds of fine-tuning are watched only if there is a `tuning`: a watch that is refused ends all others.
    """
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(login)

    def passes_to(feed: Feed) -> Callable[..., Awaitable[None]]:
        async def handler(event: Mapping[str, Any], **_: Any) -> None:
            put(feed, event["object"], event["type"] == "DELETED")

        return handler

    kopf.on.event(GROUP, VERSION, BASES, registry=registry)(passes_to(intake.base))
    kopf.on.event(GROUP, VERSION, ADAPTERS, registry=registry)(passes_to(intake.adapter))
    kopf.on.event("", "v1", "pods", registry=registry)(passes_to(intake.pod))
    kopf.on.event("apps", "v1", "replicasets", registry=registry)(passes_to(intake.replica_set))
    kopf.on.event("apps", "v1", "deployments", registry=registry)(passes_to(intake.deployment))
    kopf.on.event("apps", "v1", "statefulsets", registry=registry)(passes_to(intake.stateful_set))
    kopf.on.event(*GROUPS, registry=registry)(passes_to(intake.leader_worker_set))
    if tuning is not None:
        kopf.on.event(GROUP, VERSION, JOBS, registry=registry)(passes_to(tuning.job))
        kopf.on.event("batch", "v1", "jobs", registry=registry)(passes_to(tuning.session))
    return registry


class NoMemories(ResourceMemories):  # type: ignore[misc]  # mypy does not read kopf
    """No handler keeps anything between events; kopf's own memories hold the last body of every object."""

    async def recall(
        self,
        raw_body: Mapping[str, Any],
        *,
        memobase: Any = None,
        noticed_by_listing: bool = False,
        ephemeral: bool = True,
    ) -> ResourceMemory:
        return await super().recall(raw_body, memobase=memobase, noticed_by_listing=noticed_by_listing, ephemeral=True)


class NoDiffBase(kopf.DiffBaseStorage):  # type: ignore[misc]  # mypy does not read kopf
    """No handler asks for differences; kopf's own storages copy the whole object twice for every event."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Keeps nothing."""


class NoProgress(kopf.ProgressStorage):  # type: ignore[misc]  # the same
    """No handler is tried again by kopf, so there is no progress to keep."""

    def fetch(self, *, key: str, body: kopf.Body) -> kopf.ProgressRecord | None:
        return None

    def store(self, *, key: str, record: kopf.ProgressRecord, body: kopf.Body, patch: kopf.Patch) -> None:
        """Keeps nothing."""

    def purge(self, *, key: str, body: kopf.Body, patch: kopf.Patch) -> None:
        """Has nothing to remove."""

    def touch(self, *, body: kopf.Body, patch: kopf.Patch, value: str | None) -> None:
        """Writes nothing."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def pinned_settings() -> kopf.OperatorSettings:
    """Returns kopf's settings with every value that the operator relies on pinned.

    Timeouts are set because kopf's defaults leave a silent watch or a hung request undetected for minutes.
    """
    settings = kopf.OperatorSettings()
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.inactivity_timeout = 70
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500  # one answer with thousands of objects would stop all threads while it is parsed
    settings.watching.label_selectors["pods"] = LABEL_BASE
    settings.watching.label_selectors["replicasets.apps"] = LABEL_BASE
    settings.watching.label_selectors["deployments.apps"] = LABEL_BASE
    settings.watching.label_selectors["statefulsets.apps"] = LABEL_GROUP_SET
    settings.watching.label_selectors["leaderworkersets.leaderworkerset.x-k8s.io"] = LABEL_BASE
    settings.watching.label_selectors["jobs.batch"] = LABEL_TRAINER
    settings.networking.request_timeout = 15
    settings.networking.error_backoffs = (1, 1, 2, 3, 5, 8)
    settings.queueing.error_delays = (1, 1, 2, 3, 5, 8, 13, 21, 30)
    settings.queueing.worker_limit = 100  # kopf has one worker per object: a listing of thousands starts so many
    settings.queueing.idle_timeout = 0.05  # and they need not linger, since a handler keeps nothing between events
    settings.execution.default_backoff = 5
    settings.scanning.disabled = True  # the operator has no right to list CRDs and namespaces
    settings.posting.enabled = False  # the operator posts its own few events
    settings.posting.level = logging.WARNING
    settings.persistence.finalizer = f"{GROUP}/never-used"
    settings.persistence.progress_storage = NoProgress()
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.process.ultimate_exiting_timeout = None  # kopf would kill the process for one namespace that hangs
    settings.background.cancellation_polling = 5
    settings.peering.standalone = True
    return settings
