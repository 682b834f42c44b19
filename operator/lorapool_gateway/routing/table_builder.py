"""Builds the two tables that requests read from the cached objects and the runtimes' states, in batches.

A burst of changes rebuilds a table once, and rebuilding never takes more than a small share of the event loop. A
change of runtimes replaces only the small part of the table that names replicas.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable
from itertools import chain
from typing import Any

from lorapool_gateway.metrics import Metrics
from lorapool_gateway.routing.auth import KeyTable, parse_key
from lorapool_gateway.routing.live_tables import LiveKeys, LiveRoutes
from lorapool_gateway.routing.objects import Endpoint, ObjectRef, adapter_route, base_route, endpoints
from lorapool_gateway.routing.routes import RouteTable, RuntimeReplica
from lorapool_gateway.routing.runtime_polls import PolledPod, RuntimePolls
from lorapool_gateway.routing.source import Kind, ObjectCache, ObjectSource

BATCH_S = 0.02
"""A change is visible to requests after about this long."""
BUILD_SHARE = 10
"""The next build waits for at least this many times the duration of the last one."""


class TableBuilder:
    def __init__(self, source: ObjectSource, routes: LiveRoutes, keys: LiveKeys, metrics: Metrics) -> None:
        self._source = source
        self._routes = routes
        self._keys = keys
        self._metrics = metrics
        self._dirty = asyncio.Event()
        self._objects_dirty = self._keys_dirty = False
        self.synced = False
        """All objects were read once and both tables were built from them. It stays True: later changes are applied to
        a table that serves."""
        self.polls: RuntimePolls | None = None
        """Set before `run`; it reports back through `runtimes_changed`."""
        self._bases = source.caches(Kind.BASES, base_route, self._objects_changed)
        self._adapters = source.caches(Kind.ADAPTERS, adapter_route, self._objects_changed)
        self._slices = source.caches(Kind.ENDPOINT_SLICES, lambda raw: tuple(endpoints(raw)), self.runtimes_changed)
        self._secrets = source.caches(Kind.API_KEYS, parse_key, self._secrets_changed)

    async def run(self) -> None:
        """Keeps the caches current and rebuilds the tables until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._source.run(), name="object source")
            group.create_task(self._rebuild(), name="rebuild tables")

    def _all(self) -> list[ObjectCache[Any]]:
        return [*self._bases, *self._adapters, *self._slices, *self._secrets]

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
            self._keys.publish(KeyTable.of(key for cache in self._secrets for key in cache.objects.values()))
        if objects_dirty:
            bases = [base for cache in self._bases for base in cache.objects.values()]
            adapters = [adapter for cache in self._adapters for adapter in cache.objects.values()]
            self._metrics.sync(
                (str(base.ref) for base in bases), {str(adapter.ref): str(adapter.base_ref) for adapter in adapters}
            )
            table = RouteTable.of(bases, adapters, {})
        else:
            table = self._routes.table
        slices = (slice_ for cache in self._slices for slice_ in cache.objects.values())
        pods = merge_endpoints(chain.from_iterable(slices))
        self._routes.publish(dataclasses.replace(table, replicas=self._replicas(pods)))
        self._follow(pods, table)
        self.synced = self.synced or all(cache.synced for cache in self._all())

    def _replicas(self, pods: Iterable[Endpoint]) -> dict[ObjectRef, tuple[RuntimeReplica, ...]]:
        states = self.polls.states if self.polls is not None else {}
        failed = self.polls.failed if self.polls is not None else set()
        grouped: dict[ObjectRef, list[RuntimeReplica]] = {}
        for pod in pods:
            replica = RuntimeReplica(pod, states.get(pod.pod_uid), pod.pod_uid in failed)
            grouped.setdefault(pod.base_ref, []).append(replica)
        return {base: tuple(replicas) for base, replicas in grouped.items()}

    def _follow(self, pods: Iterable[Endpoint], table: RouteTable) -> None:
        if self.polls is None:
            return
        followed: dict[str, PolledPod] = {}
        for pod in pods:
            base = table.bases.get(pod.base_ref)
            if base is not None and pod.base_uid in (None, base.uid) and not pod.terminating:
                followed[pod.pod_uid] = PolledPod(pod.url, base.uid)
        self.polls.follow(followed)


def merge_endpoints(pods: Iterable[Endpoint]) -> list[Endpoint]:
    """One endpoint per pod. A pod has two while Kubernetes moves it between slices, or with two address families."""
    merged: dict[str, Endpoint] = {}
    for pod in pods:
        known = merged.get(pod.pod_uid)
        if known is None or (pod.ready, known.url) > (known.ready, pod.url):
            merged[pod.pod_uid] = pod
    return sorted(merged.values(), key=lambda item: item.pod_uid)
