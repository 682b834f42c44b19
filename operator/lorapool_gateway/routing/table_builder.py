"""Builds the two tables that requests read from the cached objects and the runtimes' states, in batches.

A burst of changes rebuilds a table once, and rebuilding never takes more than a small share of the event loop. A
change of runtimes replaces only the small part of the table that names replicas.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from lorapool_api.logs import audit
from lorapool_api.trust.ownership import Owners
from lorapool_gateway.routing.auth import ApiKey, KeyTable, parse_key
from lorapool_gateway.routing.live_tables import LiveKeys, LiveRoutes
from lorapool_gateway.routing.objects import (
    BaseRoute,
    Endpoint,
    ObjectRef,
    RuntimePod,
    adapter_route,
    base_route,
    pod_owner,
    runtime_pod,
    workload,
)
from lorapool_gateway.routing.routes import RouteTable, RuntimeReplica
from lorapool_gateway.routing.runtime_polls import PolledPod, RuntimePolls
from lorapool_gateway.routing.source import Kind, ObjectCache, ObjectSource

BATCH_S = 0.02
"""A change is visible to requests after about this long."""
BUILD_SHARE = 10
"""The next build waits for at least this many times the duration of the last one."""

OWNERS = (
    ((Kind.REPLICA_SETS, Kind.STATEFUL_SETS), pod_owner),
    ((Kind.DEPLOYMENTS, Kind.LEADER_WORKER_SETS), workload),
)
"""What owns pods, and what owns that."""


class TableMetrics(Protocol):
    """Follows the objects, so that series of those that are gone vanish."""

    def sync(self, bases: Iterable[str], adapters: Mapping[str, str]) -> None:
        """Bases, and adapters with their bases."""

    def sync_keys(self, key_ids: Iterable[str]) -> None: ...


class TableBuilder:
    def __init__(self, source: ObjectSource, routes: LiveRoutes, keys: LiveKeys, metrics: TableMetrics) -> None:
        self._source = source
        self._routes = routes
        self._keys = keys
        self._metrics = metrics
        self._dirty = asyncio.Event()
        self._objects_dirty = self._keys_dirty = False
        self.synced = False
        """All objects were read once, every runtime was polled once, and both tables were built from that. It stays
        True: later changes are applied to a table that serves."""
        self.polls: RuntimePolls | None = None
        """Set before `run`; it reports back through `runtimes_changed`."""
        self._bases = source.caches(Kind.BASES, base_route, self._objects_changed)
        self._adapters = source.caches(Kind.ADAPTERS, adapter_route, self._objects_changed)
        self._pods = source.caches(Kind.PODS, runtime_pod, self.runtimes_changed)
        self._pod_owners, self._workloads = (
            [cache for kind in kinds for cache in source.caches(kind, parse, self.runtimes_changed)]
            for kinds, parse in OWNERS
        )
        self._secrets = source.caches(Kind.API_KEYS, parse_key, self._secrets_changed)
        keys.confirmed_s = lambda: min((cache.confirmed_s for cache in self._secrets), default=math.inf)

    async def run(self) -> None:
        """Keeps the caches current and rebuilds the tables until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._source.run(), name="object source")
            group.create_task(self._rebuild(), name="rebuild tables")

    def _all(self) -> list[ObjectCache[Any]]:
        owners = (*self._pod_owners, *self._workloads)
        return [*self._bases, *self._adapters, *self._pods, *owners, *self._secrets]

    def runtimes_changed(self) -> None:
        self._dirty.set()

    def _objects_changed(self) -> None:
        self._objects_dirty = True
        self._dirty.set()

    def _secrets_changed(self) -> None:
        self._keys_dirty = True
        self._dirty.set()

    async def _rebuild(self) -> None:
        pause_s = BATCH_S
        while True:
            await self._dirty.wait()
            await asyncio.sleep(pause_s)
            began_s = time.monotonic()
            self._build()
            pause_s = max(BATCH_S, BUILD_SHARE * (time.monotonic() - began_s))

    def _build(self) -> None:
        objects_dirty, keys_dirty = self._objects_dirty, self._keys_dirty
        self._objects_dirty = self._keys_dirty = False
        self._dirty.clear()
        if keys_dirty:
            self._publish_keys(KeyTable.of(key for cache in self._secrets for key in cache.objects.values()))
        if objects_dirty:
            bases = [base for cache in self._bases for base in cache.objects.values()]
            adapters = [adapter for cache in self._adapters for adapter in cache.objects.values()]
            self._metrics.sync(
                (str(base.ref) for base in bases), {str(adapter.ref): str(adapter.base_ref) for adapter in adapters}
            )
            table = RouteTable.of(bases, adapters, {})
        else:
            table = self._routes.table
        pods = owned_pods((pod for cache in self._pods for pod in cache.objects.values()), self._owners(), table.bases)
        self._routes.publish(dataclasses.replace(table, replicas=self._replicas(pods)))
        self._follow(pods)
        self.synced = self.synced or (all(cache.synced for cache in self._all()) and self._polled_once())

    def _publish_keys(self, table: KeyTable) -> None:
        before, after = {key.id: key for key in self._keys.table}, {key.id: key for key in table}
        if self.synced:
            _audit_keys(before, after)
        self._metrics.sync_keys(after)
        self._keys.publish(table)

    def _polled_once(self) -> bool:
        return self.polls is None or self.polls.polled_once

    def _owners(self) -> Owners:
        return Owners.of(
            (item for cache in self._pod_owners for item in cache.objects.values()),
            (item for cache in self._workloads for item in cache.objects.values()),
        )

    def _replicas(self, pods: Iterable[Endpoint]) -> dict[ObjectRef, tuple[RuntimeReplica, ...]]:
        grouped: dict[ObjectRef, list[RuntimeReplica]] = {}
        for pod in pods:
            state, failed, proven = None, False, False
            if self.polls is not None:
                state, failed = self.polls.states.get(pod.pod_uid), pod.pod_uid in self.polls.failed
                proven = pod.pod_uid in self.polls.proven
            grouped.setdefault(pod.base_ref, []).append(RuntimeReplica(pod, state, failed, proven))
        return {base: tuple(replicas) for base, replicas in grouped.items()}

    def _follow(self, pods: Iterable[Endpoint]) -> None:
        if self.polls is not None:
            self.polls.follow(
                {
                    pod.pod_uid: PolledPod(pod.url, pod.base_uid, str(pod.base_ref))
                    for pod in pods
                    if not pod.terminating
                }
            )


def owned_pods(pods: Iterable[RuntimePod], owners: Owners, bases: Mapping[ObjectRef, BaseRoute]) -> list[Endpoint]:
    """The pods, by uid, whose labels and owners name the same BaseModel, of their own namespace, that exists."""
    found = [pod.endpoint for pod in pods if _belongs(pod, owners, bases.get(pod.endpoint.base_ref))]
    return sorted(found, key=lambda item: item.pod_uid)


def _belongs(pod: RuntimePod, owners: Owners, base: BaseRoute | None) -> bool:
    return base is not None and pod.endpoint.base_uid == base.uid == owners.base_uid(pod.owned)


def _audit_keys(before: Mapping[str, ApiKey], after: Mapping[str, ApiKey]) -> None:
    for key_id in sorted(before.keys() - after.keys()):
        audit("API key removed", api_key=key_id, owner=before[key_id].owner)
    for key_id, key in sorted(after.items()):
        if before.get(key_id) != key:
            audit("API key changed" if key_id in before else "API key added", api_key=key_id, owner=key.owner)
