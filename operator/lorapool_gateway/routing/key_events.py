"""Events on Secrets that are labelled as an API key but hold none, so that their owner learns why a key is refused.

All gateways of a release see the same Secret, so the name of the event is derived from its content: it exists once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from lorapool_gateway.routing.auth import ApiKeyError
from lorapool_gateway.routing.kube import KubeError
from lorapool_gateway.routing.source import ref_of

log = logging.getLogger(__name__)

T = TypeVar("T")

REASON = "InvalidApiKey"
COMPONENT = "lorapool-gateway"


class EventTarget(Protocol):
    async def create_event(self, event: Mapping[str, Any]) -> None: ...


class KeyEvents:
    def __init__(self, target: EventTarget) -> None:
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    def reporting(self, parse: Callable[[Mapping[str, Any]], T]) -> Callable[[Mapping[str, Any]], T]:
        """The same parser, which also posts an event when it raises ApiKeyError."""

        def parsed(secret: Mapping[str, Any]) -> T:
            try:
                return parse(secret)
            except ApiKeyError as error:
                task = asyncio.create_task(self._post(secret, str(error)), name=f"event {ref_of(secret)}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                raise

        return parsed

    async def _post(self, secret: Mapping[str, Any], problem: str) -> None:
        try:
            await self._target.create_event(event_of(secret, problem, datetime.now(UTC)))
        except (KubeError, OSError, TimeoutError) as error:
            log.warning("event not posted", extra={"object": str(ref_of(secret)), "error": repr(error)[:200]})


def event_of(secret: Mapping[str, Any], problem: str, now: datetime) -> dict[str, Any]:
    """The event, which names the field that is wrong and never its value."""
    metadata = secret["metadata"]
    about = f"{metadata.get('uid')} {metadata.get('resourceVersion')} {problem}"
    time = now.isoformat(timespec="seconds").replace("+00:00", "Z")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name'][:200]}.{hashlib.sha256(about.encode()).hexdigest()[:16]}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Secret",
            **{
                field: metadata[field] for field in ("namespace", "name", "uid", "resourceVersion") if field in metadata
            },
        },
        "type": "Warning",
        "reason": REASON,
        "message": f"The gateways ignore this API key: {problem}. Correct the field; no restart is needed.",
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
    }
