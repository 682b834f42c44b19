"""Turns what is watched into the two tables that requests read, in batches.

Called by `__main__`. A burst of events rebuilds a table once, and rebuilding never takes more than a small
share of the loop; a change of runtimes replaces the small part of the table only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable
from itertools import chain
from typing import Any

from lorapool_api.basemodel import PLURAL as BASEMODELS
from lorapool_api.common import GROUP, LABEL_API_KEY, LABEL_BASE, VERSION
from lorapool_api.loraadapter import PLURAL as LORAADAPTERS
from lorapool_gateway.auth import ApiKey, KeyTable, parse_key
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.objects import (
    AdapterRoute,
    BaseRoute,
    Endpoint,
    ObjectRef,
    adapter_route,
    base_route,
    endpoints,
)
from lorapool_gateway.routes import Replica, RouteTable
from lorapool_gateway.runtimes import Followed, RuntimePolls
from lorapool_gateway.store import KeyStore, RouteStore
from lorapool_gateway.watch import KubeApi, Watch

BATCH_S = 0.02
"""A change is visible to requests after about this long."""
BUILD_SHARE = 10
"""And not before this many times what the last build took."""


class Tables:
    def __init__(
        self,
        kube: KubeApi,
        namespaces: Iterable[str] | None,
        keys_namespace: str,
        routes: RouteStore,
        keys: KeyStore,
        metrics: Metrics,
    ) -> None:
        """`namespaces` None: all."""
        self._routes = routes
        self._keys = keys
        self._metrics = metrics
        self._dirty = asyncio.Event()
        self._objects_dirty = self._keys_dirty = False
        self.polls: RuntimePolls | None = None
        """Set before `run`; it reports back through `runtimes_changed`."""
        scopes = [""] if namespaces is None else [f"/namespaces/{name}" for name in sorted(namespaces)]
        ours, discovery = f"/apis/{GROUP}/{VERSION}", "/apis/discovery.k8s.io/v1"
        error = self._count_error
        self._bases: list[Watch[BaseRoute]] = [
            Watch(kube, BASEMODELS, f"{ours}{scope}/{BASEMODELS}", base_route, self._objects_changed, error)
            for scope in scopes
        ]
        self._adapters: list[Watch[AdapterRoute]] = [
            Watch(kube, LORAADAPTERS, f"{ours}{scope}/{LORAADAPTERS}", adapter_route, self._objects_changed, error)
            for scope in scopes
        ]
        self._slices: list[Watch[tuple[Endpoint, ...]]] = [
            Watch(
                kube,
                "endpointslices",
                f"{discovery}{scope}/endpointslices",
                lambda raw: tuple(endpoints(raw)),
                self.runtimes_changed,
                error,
                selector=LABEL_BASE,
            )
            for scope in scopes
        ]
        self._secrets: list[Watch[ApiKey]] = [
            Watch(
                kube,
                "secrets",
                f"/api/v1/namespaces/{keys_namespace}/secrets",
                parse_key,
                self._secrets_changed,
                error,
                selector=f"{LABEL_API_KEY}=true",
            )
        ]

    @property
    def synced(self) -> bool:
        """All first lists are in and both tables were built from them."""
        return all(watch.synced for watch in self._all()) and not self._dirty.is_set()

    async def run(self) -> None:
        """Watches and rebuilds until cancelled."""
        async with asyncio.TaskGroup() as group:
            for watch in self._all():
                group.create_task(watch.run(), name=f"watch {watch.kind}")
            group.create_task(self._rebuild(), name="rebuild tables")

    def _all(self) -> list[Watch[Any]]:
        return [*self._bases, *self._adapters, *self._slices, *self._secrets]

    def runtimes_changed(self) -> None:
        self._dirty.set()

    def _objects_changed(self) -> None:
        self._objects_dirty = True
        self._dirty.set()

    def _secrets_changed(self) -> None:
        self._keys_dirty = True
        self._dirty.set()

    def _count_error(self, kind: str) -> None:
        self._metrics.watch_errors.labels(kind).inc()

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
            self._keys.publish(KeyTable.of(key for watch in self._secrets for key in watch.objects.values()))
        if objects_dirty:
            bases = [base for watch in self._bases for base in watch.objects.values()]
            adapters = [adapter for watch in self._adapters for adapter in watch.objects.values()]
            self._metrics.sync(
                (str(base.ref) for base in bases), {str(adapter.ref): str(adapter.base_ref) for adapter in adapters}
            )
            table = RouteTable.of(bases, adapters, {})
        else:
            table = self._routes.table
        slices = (slice_ for watch in self._slices for slice_ in watch.objects.values())
        pods = merge_endpoints(chain.from_iterable(slices))
        self._routes.publish(dataclasses.replace(table, replicas=self._replicas(pods)))
        self._follow(pods, table)

    def _replicas(self, pods: Iterable[Endpoint]) -> dict[ObjectRef, tuple[Replica, ...]]:
        states = self.polls.states if self.polls is not None else {}
        failed = self.polls.failed if self.polls is not None else set()
        grouped: dict[ObjectRef, list[Replica]] = {}
        for pod in pods:
            replica = Replica(pod, states.get(pod.pod_uid), pod.pod_uid in failed)
            grouped.setdefault(pod.base_ref, []).append(replica)
        return {base: tuple(replicas) for base, replicas in grouped.items()}

    def _follow(self, pods: Iterable[Endpoint], table: RouteTable) -> None:
        if self.polls is None:
            return
        followed: dict[str, Followed] = {}
        for pod in pods:
            base = table.bases.get(pod.base_ref)
            if base is not None and pod.base_uid in (None, base.uid) and not pod.terminating:
                followed[pod.pod_uid] = Followed(pod.url, base.uid)
        self.polls.follow(followed)


def merge_endpoints(pods: Iterable[Endpoint]) -> list[Endpoint]:
    """One endpoint per pod: while Kubernetes moves it between slices, or lists it per address family, it has two."""
    merged: dict[str, Endpoint] = {}
    for pod in pods:
        known = merged.get(pod.pod_uid)
        if known is None or (pod.ready, known.url) > (known.ready, pod.url):
            merged[pod.pod_uid] = pod
    return sorted(merged.values(), key=lambda item: item.pod_uid)
