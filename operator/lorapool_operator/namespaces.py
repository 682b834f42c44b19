"""Lists, watches and compares each namespace on its own: one that fails is reported and tried again alone.

The order in a namespace is: list, then watch with kopf and compare at every interval. When the watches end by
themselves, the namespace is compared again first, after a back-off with jitter.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from lorapool_operator.effects.cluster import ClusterError
from lorapool_operator.effects.namespace_reports import NamespaceReports
from lorapool_operator.metrics import Metrics
from lorapool_operator.resync import Resync
from lorapool_operator.watching import WatchError
from lorapool_operator.world.cluster_cache import ClusterCache

log = logging.getLogger(__name__)

BACKOFF_S = (2.0, 5.0, 15.0, 30.0, 60.0)


class Namespaces:
    """Keeps the caches current for all watched namespaces; None stands for the whole cluster."""

    def __init__(
        self,
        watched: tuple[str | None, ...],
        resync: Resync,
        reports: NamespaceReports,
        cache: ClusterCache,
        metrics: Metrics,
        *,
        watch: Callable[[str | None], Awaitable[None]],
        resync_s: float,
    ) -> None:
        """`watch(namespace)` runs until it is cancelled or raises WatchError."""
        self._watched = watched
        self._resync = resync
        self._reports = reports
        self._cache = cache
        self._metrics = metrics
        self._watch = watch
        self._resync_s = resync_s
        self._untried = set(watched)
        self._ready = asyncio.Event()
        cache.unlisted = set(watched)

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            for namespace in self._watched:
                group.create_task(self._follow(namespace), name=f"follow {namespace or '*'}")

    async def listed(self) -> None:
        """Waits until every namespace was listed or has failed once, and at least one was listed."""
        await self._ready.wait()

    async def _follow(self, namespace: str | None) -> None:
        failures = 0
        while True:
            began_s, asked_s = time.monotonic(), 0.0
            try:
                await self._list(namespace)
                await self._watch_and_compare(namespace)
            except Exception as error:  # of any type: one namespace must not end the others
                await self._failed(namespace, error)
                self._tried(namespace)
                asked_s = error.retry_after_s if isinstance(error, ClusterError) else 0.0
            if time.monotonic() - began_s > BACKOFF_S[-1]:
                failures = 0
            pause_s = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)] * random.uniform(0.5, 1.0)
            await asyncio.sleep(max(asked_s, pause_s))
            failures += 1

    async def _list(self, namespace: str | None) -> None:
        if namespace in self._cache.unlisted:
            await self._resync.first(namespace)
            self._cache.unlisted.discard(namespace)
            self._tried(namespace)
        else:
            self._metrics.repairs.inc(await self._resync.again(namespace))

    def _tried(self, namespace: str | None) -> None:
        self._untried.discard(namespace)
        if not self._untried and len(self._cache.unlisted) < len(self._watched):
            self._ready.set()

    async def _watch_and_compare(self, namespace: str | None) -> None:
        """Watches, and compares at every interval. Raises WatchError when the watches end."""
        watching = asyncio.ensure_future(self._watch(namespace))
        try:
            while not watching.done():
                await asyncio.wait([watching], timeout=self._resync_s * random.uniform(0.9, 1.1))
                if not watching.done():
                    await self._compare(namespace)
            watching.result()
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _compare(self, namespace: str | None) -> None:
        try:
            self._metrics.repairs.inc(await self._resync.again(namespace))
            self._metrics.resyncs.labels("done").inc()
            self._reports.recovered(namespace)
        except Exception as error:  # the watches may still be well
            self._metrics.resyncs.labels("error").inc()
            await self._failed(namespace, error)

    async def _failed(self, namespace: str | None, error: Exception) -> None:
        if not isinstance(error, ClusterError | WatchError):
            log.exception("namespace failed unexpectedly", extra={"watched_namespace": namespace})
        await self._reports.failed(namespace, error)
