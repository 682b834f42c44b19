"""Objects from the API server: lists each kind, then watches it, and fills the caches of `source`.

Survives what API servers do: expired versions (410: list again), silent connections (bookmarks come every minute, so
silence is a fault), restarts (back-off with jitter; the last objects are kept).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import aiohttp

from lorapool_api.common import GROUP, LABEL_API_KEY, LABEL_BASE, LABEL_GROUP_SET, VERSION
from lorapool_gateway.routing.key_events import EventTarget, KeyEvents
from lorapool_gateway.routing.kube import KubeError
from lorapool_gateway.routing.objects import ObjectRef
from lorapool_gateway.routing.source import Kind, ObjectCache

log = logging.getLogger(__name__)

T = TypeVar("T")

PAGE_SIZE = "500"
WATCH_S = (240, 300)
"""Length of one watch, drawn at random each time, so that gateways do not all reconnect together."""
INACTIVITY_TIMEOUT_S = 70.0
KEYS_WATCH_S = (12, 20)
KEYS_INACTIVITY_TIMEOUT_S = 25.0
"""A watch of API keys is short, so that a connection that died silently delays a revocation by less than 30 s."""
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 4.0)
PAUSE_S = 0.1
GONE = 410
NOT_FOUND = 404
MISSING_API_PAUSE_S = 30.0
"""A kind that the cluster need not have is looked for this often while the cluster does not have it."""

API_OF = {
    Kind.BASES: f"/apis/{GROUP}/{VERSION}",
    Kind.ADAPTERS: f"/apis/{GROUP}/{VERSION}",
    Kind.PODS: "/api/v1",
    Kind.REPLICA_SETS: "/apis/apps/v1",
    Kind.DEPLOYMENTS: "/apis/apps/v1",
    Kind.STATEFUL_SETS: "/apis/apps/v1",
    Kind.LEADER_WORKER_SETS: "/apis/leaderworkerset.x-k8s.io/v1",
    Kind.API_KEYS: "/api/v1",
    Kind.JOBS: f"/apis/{GROUP}/{VERSION}",
}
SELECTOR_OF = {
    Kind.PODS: LABEL_BASE,
    Kind.REPLICA_SETS: LABEL_BASE,
    Kind.DEPLOYMENTS: LABEL_BASE,
    Kind.STATEFUL_SETS: LABEL_GROUP_SET,
    Kind.LEADER_WORKER_SETS: LABEL_BASE,
    Kind.API_KEYS: f"{LABEL_API_KEY}=true",
}


class KubeApi(EventTarget, Protocol):
    async def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]: ...

    def watch(
        self, path: str, params: Mapping[str, str], inactivity_timeout_s: float
    ) -> AsyncIterator[dict[str, Any]]: ...


class KubeSource:
    """Implements `ObjectSource`: one watch per kind and watched namespace; API keys come from their own namespace."""

    def __init__(
        self,
        kube: KubeApi,
        namespaces: Iterable[str] | None,
        keys_namespace: str,
        on_error: Callable[[str], None],
    ) -> None:
        """`namespaces` None: all. `on_error(kind)` counts a list or watch that failed."""
        self._kube = kube
        self._scopes = [""] if namespaces is None else [f"/namespaces/{name}" for name in sorted(namespaces)]
        self._keys_scope = f"/namespaces/{keys_namespace}"
        self._on_error = on_error
        self._key_events = KeyEvents(kube)
        self.watches: list[Watch[Any]] = []

    def caches(
        self, kind: Kind, parse: Callable[[Mapping[str, Any]], T | None], on_change: Callable[[], None]
    ) -> Sequence[ObjectCache[T]]:
        scopes = self._scopes
        if kind is Kind.API_KEYS:
            scopes, parse = [self._keys_scope], self._key_events.reporting(parse)
        made = [ObjectCache(kind, parse, on_change) for _ in scopes]
        for scope, cache in zip(scopes, made, strict=True):
            path = f"{API_OF[kind]}{scope}/{kind}"
            watch = Watch(self._kube, cache, path, self._on_error, selector=SELECTOR_OF.get(kind))
            if kind is Kind.API_KEYS:
                watch.length_s, watch.inactivity_timeout_s = KEYS_WATCH_S, KEYS_INACTIVITY_TIMEOUT_S
            self.watches.append(watch)
        return made

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for watch in self.watches:
                group.create_task(watch.run(), name=f"watch {watch.cache.kind}")


class _ExpiredError(Exception):
    """The resource version is too old to watch from."""


class _MissingApiError(Exception):
    """The cluster does not have this kind, and need not."""


class Watch(Generic[T]):
    """Keeps one cache current from one path of the API server."""

    def __init__(
        self,
        kube: KubeApi,
        cache: ObjectCache[T],
        path: str,
        on_error: Callable[[str], None],
        *,
        selector: str | None = None,
        inactivity_timeout_s: float = INACTIVITY_TIMEOUT_S,
    ) -> None:
        self._kube = kube
        self.cache = cache
        self._path = path
        self._on_error = on_error
        self._params = {"labelSelector": selector} if selector else {}
        self.inactivity_timeout_s = inactivity_timeout_s
        self.length_s = WATCH_S
        self._version: str | None = None
        """Resource version to watch from; None: list first."""

    async def run(self) -> None:
        """Never returns; cancel it."""
        failures = 0
        while True:
            try:
                if self._version is None:
                    self._version = await self._list()
                before = self._version
                await self._watch(self._version)
                failures = 0 if self._version != before else failures
                await asyncio.sleep(PAUSE_S)  # a server that ends every watch at once is not asked in a hot loop
            except _ExpiredError:
                self._version = None
            except _MissingApiError:
                self._version = None
                self.cache.replace_all({})
                await asyncio.sleep(MISSING_API_PAUSE_S)
            except Exception as error:  # of any type: a gateway that stops watching would serve revoked keys
                network = isinstance(error, aiohttp.ClientError | OSError | TimeoutError)
                if not network:
                    self._version = None  # refused or not understood: list again
                known, kind = network or isinstance(error, KubeError), self.cache.kind
                log.warning("watch failed", extra={"kind": kind, "error": repr(error)[:300]}, exc_info=not known)
                self._on_error(kind)
                await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)] * random.uniform(0.7, 1.3))
                failures += 1

    async def _list(self) -> str:
        """Reads all objects, page by page, and returns the resource version of the list."""
        objects: dict[ObjectRef, T] = {}
        params = {**self._params, "limit": PAGE_SIZE}
        while True:
            try:
                page = await self._kube.get(self._path, params)
            except KubeError as error:
                if error.status == NOT_FOUND and self.cache.kind is Kind.LEADER_WORKER_SETS:
                    raise _MissingApiError from error
                raise
            objects |= self.cache.parse_all(page.get("items") or [])
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                break
            params["continue"] = str(metadata["continue"])
            await asyncio.sleep(0)  # requests proceed between two pages
        self.cache.replace_all(objects)
        self.cache.confirmed_s = time.monotonic()
        return str(metadata.get("resourceVersion") or "0")

    async def _watch(self, version: str) -> None:
        """One watch, until the server ends it. Advances the version, from which the next watch starts."""
        params = {
            **self._params,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(*self.length_s)),
        }
        async for event in self._kube.watch(self._path, params, self.inactivity_timeout_s):
            raw = event.get("object") or {}
            kind = event.get("type")
            if kind == "ERROR":
                if raw.get("code") == GONE:
                    raise _ExpiredError
                raise KubeError(int(raw.get("code") or 500), str(raw.get("message") or raw.get("reason") or ""))
            if kind == "DELETED":
                self.cache.drop(raw)
            elif kind in ("ADDED", "MODIFIED"):
                self.cache.put(raw)
            self._version = str(raw["metadata"]["resourceVersion"])
            self.cache.confirmed_s = time.monotonic()
        self.cache.confirmed_s = time.monotonic()  # ended in order by the server, which had nothing more to send
