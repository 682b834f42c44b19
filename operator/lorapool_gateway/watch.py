"""Lists and watches one kind of object and keeps what it has parsed.

Called by tables. Survives what API servers do: expired versions (410: list again), silent connections (bookmarks
come each minute, so silence is a fault), restarts (back-off with jitter, the last objects are kept). An object
that cannot be parsed counts as absent: denied, not guessed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import aiohttp

from lorapool_gateway.kube import KubeError

log = logging.getLogger(__name__)

T = TypeVar("T")
Key = tuple[str, str]

PAGE_SIZE = "500"
WATCH_S = (240, 300)
"""Length of one watch, drawn anew, so that gateways do not all reconnect together."""
INACTIVITY_TIMEOUT_S = 70.0
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 4.0)
PAUSE_S = 0.1
GONE = 410


class KubeApi(Protocol):
    async def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]: ...

    def watch(
        self, path: str, params: Mapping[str, str], inactivity_timeout_s: float
    ) -> AsyncIterator[dict[str, Any]]: ...


class _Expired(Exception):
    """The resource version is too old to watch from."""


class Watch(Generic[T]):
    def __init__(
        self,
        kube: KubeApi,
        kind: str,
        path: str,
        parse: Callable[[Mapping[str, Any]], T],
        on_change: Callable[[], None],
        on_error: Callable[[str], None],
        *,
        selector: str | None = None,
        inactivity_timeout_s: float = INACTIVITY_TIMEOUT_S,
    ) -> None:
        self._kube = kube
        self.kind = kind
        self._path = path
        self._parse = parse
        self._on_change = on_change
        self._on_error = on_error
        self._params = {"labelSelector": selector} if selector else {}
        self._inactivity_timeout_s = inactivity_timeout_s
        self.objects: dict[Key, T] = {}
        self._version: str | None = None
        """Resource version to watch from; None: list first."""
        self.synced = False
        """The first list is in. Stays true: an old table is better than none."""

    async def run(self) -> None:
        """Never returns; cancel it."""
        failures = 0
        while True:
            try:
                if self._version is None:
                    self._version = await self._list()
                before = self._version
                await self._follow(self._version)
                failures = 0 if self._version != before else failures
                await asyncio.sleep(PAUSE_S)  # a server that ends every watch at once is not asked in a hot loop
            except _Expired:
                self._version = None
            except Exception as error:  # whatever it is, a gateway that stops watching serves revoked keys
                network = isinstance(error, aiohttp.ClientError | OSError | TimeoutError)
                if not network:
                    self._version = None  # refused or not understood: begin anew
                known = network or isinstance(error, KubeError)
                log.warning("watch failed", extra={"kind": self.kind, "error": repr(error)[:300]}, exc_info=not known)
                self._on_error(self.kind)
                await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)] * random.uniform(0.7, 1.3))
                failures += 1

    async def _list(self) -> str:
        objects: dict[Key, T] = {}
        params = {**self._params, "limit": PAGE_SIZE}
        while True:
            page = await self._kube.get(self._path, params)
            for raw in page.get("items") or []:
                self._put(objects, raw)
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                break
            params["continue"] = str(metadata["continue"])
            await asyncio.sleep(0)  # requests go on between two pages
        first, self.synced = not self.synced, True
        if objects != self.objects or first:
            self.objects = objects
            self._on_change()
        return str(metadata.get("resourceVersion") or "0")

    async def _follow(self, version: str) -> None:
        """One watch, until the server ends it. The version reached is where the next one goes on."""
        params = {
            **self._params,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(*WATCH_S)),
        }
        async for event in self._kube.watch(self._path, params, self._inactivity_timeout_s):
            raw = event.get("object") or {}
            kind = event.get("type")
            if kind == "ERROR":
                if raw.get("code") == GONE:
                    raise _Expired
                raise KubeError(int(raw.get("code") or 500), str(raw.get("message") or raw.get("reason") or ""))
            if kind == "DELETED":
                if self.objects.pop(_key(raw), None) is not None:
                    self._on_change()
            elif kind in ("ADDED", "MODIFIED"):
                before = self.objects.get(_key(raw))
                self._put(self.objects, raw)
                if self.objects.get(_key(raw)) != before:
                    self._on_change()
            self._version = str(raw["metadata"]["resourceVersion"])

    def _put(self, objects: dict[Key, T], raw: Mapping[str, Any]) -> None:
        try:
            objects[_key(raw)] = self._parse(raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            objects.pop(_key(raw), None)
            # Of a Secret not even the error's text is safe to log.
            detail = type(error).__name__ if self.kind == "secrets" else repr(error)[:300]
            log.warning("object ignored", extra={"kind": self.kind, "object": "/".join(_key(raw)), "error": detail})


def _key(raw: Mapping[str, Any]) -> Key:
    metadata = raw.get("metadata") or {}
    return str(metadata.get("namespace", "")), str(metadata.get("name", ""))
