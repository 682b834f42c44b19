"""Which watched namespaces can be listed and watched now: for metrics, and one warning for each that cannot.

The usual cause is that a tenant was removed together with the Role in its namespace. The warning is a line of the log
and an event on the Lease, since nothing can be written into the namespace itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from lorapool_operator.decisions.plan import KubeEvent, KubeEventType
from lorapool_operator.effects.cluster import Cluster, ClusterError, Subject

log = logging.getLogger(__name__)

WATCH_FAILED = "WatchFailed"
WHOLE_CLUSTER = "*"


class NamespaceReports:
    def __init__(self, cluster: Cluster, lease: Subject, namespaces: Iterable[str | None]) -> None:
        """`lease` is the object that events are about."""
        self._cluster = cluster
        self._lease = lease
        self.failures = {_label(namespace): 0 for namespace in namespaces}
        """Number of failures of each namespace since the start."""
        self.failing: dict[str, str] = {}
        """Why a namespace cannot be listed or watched, for those that cannot."""

    async def failed(self, namespace: str | None, error: Exception) -> None:
        """Counts a failure. Logs and posts the first one until the namespace recovers."""
        label = _label(namespace)
        self.failures[label] += 1
        first = label not in self.failing
        self.failing[label] = str(error)
        if not first:
            return
        log.warning(
            "namespace cannot be watched, and its objects are kept as last known: give the operator its Role there, or "
            "remove the namespace from the chart's watchNamespaces",
            extra={"watched_namespace": label, "error": str(error)},
        )
        try:
            await self._cluster.post_event(self._lease, _event(label, error), time.time())
        except ClusterError as refused:
            log.info("event not posted", extra={"watched_namespace": label, "error": str(refused)})

    def recovered(self, namespace: str | None) -> None:
        """Records that the namespace was listed and is being watched."""
        if self.failing.pop(_label(namespace), None) is not None:
            log.info("namespace is watched again", extra={"watched_namespace": _label(namespace)})


def _label(namespace: str | None) -> str:
    return WHOLE_CLUSTER if namespace is None else namespace


def _event(label: str, error: Exception) -> KubeEvent:
    where = "The cluster" if label == WHOLE_CLUSTER else f"Namespace {label}"
    message = (
        f"{where} cannot be listed or watched, so its objects are kept as last known: {error}. Give the operator its "
        "Role there, or remove the namespace from the chart's watchNamespaces."
    )
    return KubeEvent(KubeEventType.WARNING, WATCH_FAILED, message)
