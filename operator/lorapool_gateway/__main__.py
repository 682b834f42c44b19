"""Starts the gateway: settings, watches, API on one port, metrics and health on another; drains on SIGTERM.

The only module that reads the environment. Exit code 2: settings that cannot work.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from lorapool_api.logs import set_up_logs
from lorapool_api.protocol import runtime_token
from lorapool_api.settings import SettingsError, read_master_token
from lorapool_gateway.app import Gateway
from lorapool_gateway.dispatch import Dispatcher
from lorapool_gateway.forward import Forwarder
from lorapool_gateway.health import health_app
from lorapool_gateway.kube import Kube
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.runtimes import RuntimePolls
from lorapool_gateway.settings import Settings, read_settings
from lorapool_gateway.store import KeyStore, RouteStore
from lorapool_gateway.tables import Tables
from lorapool_gateway.upstream import Upstream
from lorapool_gateway.wake import ScaleWaker

log = logging.getLogger("lorapool_gateway")

BACKLOG = 1024
SHUTDOWN_S = 1.0
YOUNG_OBJECTS = 20_000
"""So many more than before make the garbage collector look at them, instead of 700. What a request leaves behind is
freed without it."""


@dataclass(frozen=True, slots=True)
class Running:
    gateway: Gateway
    tables: Tables
    api_site: web.TCPSite
    api_port: int
    metrics_port: int


@asynccontextmanager
async def running(settings: Settings, master_token: str) -> AsyncIterator[Running]:
    """The whole process as a context, for `main` and for tests."""
    async with AsyncExitStack() as stack:
        metrics = Metrics(settings.max_tracked_adapters)
        kube = await Kube.connect(settings.kubeconfig)
        stack.push_async_callback(kube.close)
        session = await stack.enter_async_context(client_session())
        token = lru_cache(maxsize=4096)(lambda base_uid: runtime_token(master_token, base_uid))
        routes, keys = RouteStore(), KeyStore()
        tables = Tables(kube, settings.namespaces, settings.keys_namespace, routes, keys, metrics)
        tables.polls = RuntimePolls(session, token, tables.runtimes_changed)
        stack.push_async_callback(tables.polls.close)
        waker = ScaleWaker(kube, metrics.wake)
        stack.push_async_callback(waker.close)
        upstream = Upstream(connect_timeout_s=settings.connect_timeout_s, read_timeout_s=settings.request_timeout_s)
        stack.push_async_callback(upstream.close)
        dispatcher = Dispatcher(routes, waker, Forwarder(upstream, lambda base: token(base.uid)), metrics)
        gateway = Gateway(settings, routes, keys, dispatcher, metrics)
        watching = asyncio.create_task(tables.run(), name="tables")
        stack.push_async_callback(_cancel, watching)

        def alive() -> bool:
            return not watching.done()

        health = health_app(metrics, alive, lambda: alive() and tables.synced and not gateway.draining)
        open_runner = web.AppRunner(health, access_log=None, shutdown_timeout=SHUTDOWN_S)
        _, metrics_port = await listen(stack, open_runner, settings.listen_host, settings.metrics_port)
        runner = web.ServerRunner(gateway.server(), shutdown_timeout=SHUTDOWN_S)
        site, api_port = await listen(stack, runner, settings.listen_host, settings.api_port)
        log.info("listening on %d, metrics on %d", api_port, metrics_port)
        yield Running(gateway, tables, site, api_port, metrics_port)


def client_session() -> aiohttp.ClientSession:
    """For the long-polls of runtimes (requests go by `upstream`): no limit, nothing decompressed, no proxy."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity", "User-Agent": "lorapool-gateway"},
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def drain(process: Running, settings: Settings) -> None:
    """Not ready but accepting; then no new connections; then wait for what is under way."""
    log.info("draining", extra={"in_flight": process.gateway.in_flight})
    process.gateway.draining = True
    await asyncio.sleep(settings.shutdown_delay_s)
    await process.api_site.stop()
    try:
        async with asyncio.timeout(settings.drain_timeout_s):
            await process.gateway.idle.wait()
    except TimeoutError:
        log.warning("drain timeout", extra={"in_flight": process.gateway.in_flight})


async def serve(settings: Settings, master_token: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(settings, master_token) as process:
        await stop.wait()
        await drain(process, settings)


async def listen(stack: AsyncExitStack, runner: web.BaseRunner, host: str, port: int) -> tuple[web.TCPSite, int]:
    """Serves on that port (0: a free one) until the stack unwinds."""
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, host, port, backlog=BACKLOG)
    await site.start()
    return site, int(runner.addresses[0][1])


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def main() -> None:
    try:
        settings = read_settings(os.environ)
        master_token = read_master_token(settings.master_token_file)
    except SettingsError as error:
        error.report("lorapool-gateway")
        sys.exit(2)
    set_up_logs("gateway", settings.log_level, settings.log_format)
    run(serve(settings, master_token))


def run(work: Coroutine[Any, Any, None]) -> None:
    """On the loop that the process serves with.

    What the imports made, tens of thousands of objects, lives as long as the process: the collector leaves it alone. A
    full collection of it holds every request up for tens of milliseconds, and so does one of a large route table, which
    comes ever more rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


if __name__ == "__main__":
    main()
