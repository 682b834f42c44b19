"""Lists the objects of a namespace before work begins, and compares the caches with the API server periodically.

Watches lose events. A listing of names and versions is cheap, and shows which objects are missing, deleted or outdated
in the caches, so that a lost event is noticed after one interval at most. A namespace that cannot be listed keeps its
objects as last known.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lorapool_api.common import LABEL_GROUP_SET
from lorapool_operator.effects.cluster import (
    OPTIONAL,
    RUNTIME_SELECTOR,
    Cluster,
    ClusterError,
    ObjectNotFoundError,
    Page,
    plural_of,
)
from lorapool_operator.effects.tuning import TuningControl
from lorapool_operator.world.cluster_cache import LEADER_WORKER_SET, ClusterCache, ObjectKind
from lorapool_operator.world.intake import Intake
from lorapool_operator.world.tuning import LABEL_TRAINER

log = logging.getLogger(__name__)

Feed = Callable[..., None]


class Resync:
    """Feeds listed objects to the intake, kind by kind."""

    def __init__(
        self,
        cluster: Cluster,
        cache: ClusterCache,
        intake: Intake,
        turn: Callable[[], Awaitable[None]],
        tuning: TuningControl | None = None,
    ) -> None:
        """`turn()` waits until the event loop has time for one more object. `tuning`: its kinds are listed too."""
        self._turn = turn
        self._cluster = cluster
        self._versions: dict[str | None, dict[str, str]] = {}
        self._kinds: tuple[tuple[str, str, Feed, Callable[[], Any]], ...] = (
            ("Pod", RUNTIME_SELECTOR, intake.pod, lambda: cache.pods),
            ("ReplicaSet", RUNTIME_SELECTOR, intake.replica_set, lambda: cache.replica_sets),
            ("Deployment", RUNTIME_SELECTOR, intake.deployment, lambda: cache.deployments),
            ("StatefulSet", LABEL_GROUP_SET, intake.stateful_set, lambda: cache.stateful_sets),
            (LEADER_WORKER_SET, RUNTIME_SELECTOR, intake.leader_worker_set, lambda: cache.leader_worker_sets),
            (ObjectKind.BASE.value, "", intake.base, lambda: cache.bases),
            (ObjectKind.ADAPTER.value, "", intake.adapter, lambda: cache.adapters),
            *(_tuning_kinds(tuning) if tuning is not None else ()),
        )

    async def first(self, namespace: str | None) -> None:
        """Lists a namespace, or the cluster (None). Raises ClusterError.

        An object's absence from a cache means nothing before this.
        """
        for kind, labels, feed, _ in self._kinds:
            with _tolerating(kind):
                async for page in self._cluster.pages(kind, namespace, labels=labels):
                    self._listed_at(kind, namespace, page)
                    for raw in page.items:
                        await self._turn()
                        feed(raw)

    def versions(self, namespace: str | None) -> Mapping[str, str]:
        """Returns the version of the last listing of each kind, by its plural. A watch can continue from there."""
        return dict(self._versions.get(namespace, {}))

    def _listed_at(self, kind: str, namespace: str | None, page: Page) -> None:
        self._versions.setdefault(namespace, {})[plural_of(kind)] = page.version

    async def again(self, namespace: str | None) -> int:
        """Compares names and versions, fetches what differs, and returns the number of repairs. Raises ClusterError."""
        repaired = 0
        for kind, labels, feed, cache in self._kinds:
            with _tolerating(kind):
                repaired += await self._compare(namespace, kind, labels, feed, cache)
        return repaired

    async def _compare(
        self, namespace: str | None, kind: str, labels: str, feed: Feed, cache: Callable[[], Any]
    ) -> int:
        before = {
            (item.meta.namespace, item.meta.name): item.meta
            for item in cache()
            if namespace in (None, item.meta.namespace)
        }
        listed: set[tuple[str, str]] = set()
        repaired = 0
        async for page in self._cluster.pages(kind, namespace, labels=labels, metadata_only=True):
            self._listed_at(kind, namespace, page)
            for raw in page.items:
                await self._turn()
                meta = raw["metadata"]
                at = (meta["namespace"], meta["name"])
                listed.add(at)
                cached = cache().get(*at)
                if cached is None or cached.meta.uid != meta["uid"] or _behind(cached.meta.resource_version, meta):
                    repaired += await self._fetch(kind, at, feed)
        for at, old in before.items():
            if at in listed:
                continue
            cached = cache().get(*at)
            if cached is not None and cached.meta.uid == old.uid:
                repaired += await self._fetch(kind, at, feed, gone=old.uid)
        return repaired

    async def _fetch(self, kind: str, at: tuple[str, str], feed: Feed, gone: str = "") -> int:
        try:
            feed(await self._cluster.get(kind, *at))
        except ObjectNotFoundError:
            if gone:
                feed(_tombstone(at, gone), deleted=True)
        log.info("repaired a lost watch event", extra={"kind": kind, "object": "/".join(at)})
        return 1


@contextmanager
def _tolerating(kind: str) -> Iterator[None]:
    """Keeps an API that a cluster need not have, and that fails, from making the namespace fail."""
    try:
        yield
    except ClusterError as error:
        if kind not in OPTIONAL:
            raise
        log.warning("optional API fails; its objects are kept as last known", extra={"kind": kind, "error": str(error)})


def _tuning_kinds(tuning: TuningControl) -> tuple[tuple[str, str, Feed, Callable[[], Any]], ...]:
    return (
        ("Job", LABEL_TRAINER, tuning.intake.session, lambda: tuning.cache.sessions),
        (ObjectKind.TUNING.value, "", tuning.intake.job, lambda: tuning.cache.jobs),
    )


def _behind(cached: str, meta: Mapping[str, Any]) -> bool:
    try:
        return int(cached) < int(meta["resourceVersion"])
    except ValueError:
        return bool(cached != meta["resourceVersion"])


def _tombstone(at: tuple[str, str], uid: str) -> dict[str, Any]:
    return {"metadata": {"namespace": at[0], "name": at[1], "uid": uid}}
