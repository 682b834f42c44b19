"""kopf's event handlers and settings: each event updates the caches and marks keys dirty, and does nothing else.

kopf only watches: no handler makes it write, so its finalizer and annotations are named but never used. An event
may be late, duplicated or missing; the resync compensates, so no handler depends on receiving every event.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import kopf

from lorapool_api.basemodel import PLURAL as BASES
from lorapool_api.common import GROUP, LABEL_BASE, VERSION
from lorapool_api.loraadapter import PLURAL as ADAPTERS
from lorapool_operator.world.intake import Intake


def registry_of(intake: Intake, login: Any) -> kopf.OperatorRegistry:
    """Returns a registry of its own that holds all handlers."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(login)

    async def base_event(event: Mapping[str, Any], **_: Any) -> None:
        intake.base(event["object"], deleted=event["type"] == "DELETED")

    async def adapter_event(event: Mapping[str, Any], **_: Any) -> None:
        intake.adapter(event["object"], deleted=event["type"] == "DELETED")

    async def pod_event(event: Mapping[str, Any], **_: Any) -> None:
        intake.pod(event["object"], deleted=event["type"] == "DELETED")

    async def deployment_event(event: Mapping[str, Any], **_: Any) -> None:
        intake.deployment(event["object"], deleted=event["type"] == "DELETED")

    kopf.on.event(GROUP, VERSION, BASES, registry=registry)(base_event)
    kopf.on.event(GROUP, VERSION, ADAPTERS, registry=registry)(adapter_event)
    kopf.on.event("", "v1", "pods", registry=registry)(pod_event)
    kopf.on.event("apps", "v1", "deployments", registry=registry)(deployment_event)
    return registry


def pinned_settings() -> kopf.OperatorSettings:
    """Returns kopf's settings with every value that the operator relies on pinned.

    Timeouts are set because kopf's defaults leave a silent watch or a hung request undetected for minutes.
    """
    settings = kopf.OperatorSettings()
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.inactivity_timeout = 70
    settings.watching.connect_timeout = 10
    settings.watching.label_selectors["pods"] = LABEL_BASE
    settings.watching.label_selectors["deployments.apps"] = LABEL_BASE
    settings.networking.request_timeout = 15
    settings.networking.error_backoffs = (1, 1, 2, 3, 5, 8)
    settings.queueing.error_delays = (1, 1, 2, 3, 5, 8, 13, 21, 30)
    settings.queueing.idle_timeout = 1.0  # kopf has one worker per object: thousands of them need not linger
    settings.execution.default_backoff = 5
    settings.scanning.disabled = True  # the operator has no right to list CRDs and namespaces
    settings.posting.enabled = False  # the operator posts its own few events
    settings.posting.level = logging.WARNING
    settings.persistence.finalizer = f"{GROUP}/never-used"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    settings.process.ultimate_exiting_timeout = 20
    settings.background.cancellation_polling = 5
    settings.peering.standalone = True
    return settings
