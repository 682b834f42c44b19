"""The life of a store process: serves the objects, sweeps what has expired, and serves metrics and probes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import generate_latest

from lorapool_api.liveness import Heartbeat
from lorapool_api.trust.health_port import health_port
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_api.trust.tls import ServerCertificate
from lorapool_store.app import StoreApp
from lorapool_store.metrics import Metrics
from lorapool_store.objects import Bounds, Objects
from lorapool_store.settings import Settings

log = logging.getLogger("lorapool_store")

SHUTDOWN_S = 20.0
"""Uploads in progress have this long to finish after a signal."""


@dataclass(frozen=True, slots=True)
class StoreProcess:
    objects: Objects
    api_port: int
    metrics_port: int


@asynccontextmanager
async def running(settings: Settings, masters: MasterTokens) -> AsyncIterator[StoreProcess]:
    """Serves inside the context. Raises SettingsError if a file that the settings name cannot be used."""
    async with AsyncExitStack() as stack:
        metrics, objects = (
            Metrics(),
            Objects(settings.location, Bounds(settings.max_object_bytes, settings.quota_bytes)),
        )
        metrics.follow(lambda: objects.counted)
        app = StoreApp(objects, masters, metrics, body_timeout_s=settings.body_timeout_s)
        heartbeat = Heartbeat(settings.loop_stuck_s)
        for work, name in ((heartbeat.run(), "heartbeat"), (_sweep(objects, metrics, settings.sweep_s), "sweep")):
            task = asyncio.create_task(work, name=name)
            stack.push_async_callback(_cancel, task)
        access = MetricsAccess(settings)
        host, port = settings.listen_host, settings.metrics_port
        probes = health_port(
            host,
            port,
            access,
            lambda: generate_latest(metrics.registry),
            alive=lambda: heartbeat.alive,
            ready=lambda: heartbeat.alive,
        )
        metrics_port = await stack.enter_async_context(probes)
        tls = None if settings.tls_dir is None else ServerCertificate(settings.tls_dir).context
        runner = web.ServerRunner(app.server(), shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, settings.listen_host, settings.api_port, ssl_context=tls).start()
        api_port = int(runner.addresses[0][1])
        log.info("serving %s on %d, metrics on %d", settings.location, api_port, metrics_port)
        yield StoreProcess(objects, api_port, metrics_port)


async def _sweep(objects: Objects, metrics: Metrics, pause_s: float) -> None:
    while True:
        try:
            metrics.expired(await objects.sweep(time.time()))
        except Exception as error:  # of any type: what has expired must go once the storage answers again
            log.error("expired objects were not deleted; tried again", extra={"error": repr(error)[:300]})
        await asyncio.sleep(pause_s)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
