"""What kopf calls for each event: keep the newest version, mark keys dirty, nothing else.

Registered by `__main__`. An event may be late, doubled or missing; the resync makes up for that, so nothing here
depends on having seen every one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kopf

from lorapool_api.basemodel import PLURAL as BASES
from lorapool_api.common import GROUP, VERSION
from lorapool_api.loraadapter import PLURAL as ADAPTERS
from lorapool_operator.world.intake import Intake


def registry_of(intake: Intake, login: Any) -> kopf.OperatorRegistry:
    """All handlers, in a registry of their own."""
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
