"""Lists everything once before work begins, and compares with the API server again and again.

Called by `__main__`. Watches lose events; a listing of names and versions is cheap, and shows what is missing,
what is gone and what is older than it should be. Bounds what a lost event can cost to one interval.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lorapool_operator.effects.cluster import RUNTIME_SELECTOR, Cluster, NotFound
from lorapool_operator.world.cluster_cache import Kind, Store
from lorapool_operator.world.intake import Intake

log = logging.getLogger(__name__)

Feed = Callable[..., None]


class Resync:
    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        intake: Intake,
        watched: tuple[str | None, ...],
    ) -> None:
        self._cluster = cluster
        self._watched = watched
        self._kinds: tuple[tuple[str, str, Feed, Callable[[], Any]], ...] = (
            ("Pod", RUNTIME_SELECTOR, intake.pod, lambda: store.pods),
            ("Deployment", RUNTIME_SELECTOR, intake.deployment, lambda: store.deployments),
            (Kind.BASE.value, "", intake.base, lambda: store.bases),
            (Kind.ADAPTER.value, "", intake.adapter, lambda: store.adapters),
        )

    async def first(self) -> None:
        """Everything whole: nothing may be concluded from an object's absence before this. Raises ClusterError."""
        for kind, labels, feed, _ in self._kinds:
            for namespace in self._watched:
                async for raw in self._cluster.objects(kind, namespace, labels=labels):
                    feed(raw)

    async def again(self) -> int:
        """Compares names and versions, fetches what differs. The number of repairs. Raises ClusterError."""
        repaired = 0
        for kind, labels, feed, cache in self._kinds:
            repaired += await self._compare(kind, labels, feed, cache)
        return repaired

    async def _compare(self, kind: str, labels: str, feed: Feed, cache: Callable[[], Any]) -> int:
        before = {(item.meta.namespace, item.meta.name): item.meta for item in cache()}
        seen: set[tuple[str, str]] = set()
        repaired = 0
        for namespace in self._watched:
            async for raw in self._cluster.objects(kind, namespace, labels=labels, metadata_only=True):
                meta = raw["metadata"]
                at = (meta["namespace"], meta["name"])
                seen.add(at)
                held = cache().get(*at)
                if held is None or held.meta.uid != meta["uid"] or _behind(held.meta.resource_version, meta):
                    repaired += await self._fetch(kind, at, feed)
        for at, was in before.items():
            if at in seen:
                continue
            held = cache().get(*at)
            if held is not None and held.meta.uid == was.uid:
                repaired += await self._fetch(kind, at, feed, gone=was.uid)
        return repaired

    async def _fetch(self, kind: str, at: tuple[str, str], feed: Feed, gone: str = "") -> int:
        try:
            feed(await self._cluster.get(kind, *at))
        except NotFound:
            if gone:
                feed(_tombstone(at, gone), deleted=True)
        log.info("a lost event was made up for", extra={"kind": kind, "object": "/".join(at)})
        return 1


def _behind(held: str, meta: Mapping[str, Any]) -> bool:
    try:
        return int(held) < int(meta["resourceVersion"])
    except ValueError:
        return bool(held != meta["resourceVersion"])


def _tombstone(at: tuple[str, str], uid: str) -> dict[str, Any]:
    return {"metadata": {"namespace": at[0], "name": at[1], "uid": uid}}
