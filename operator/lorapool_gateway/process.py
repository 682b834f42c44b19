"""The life of a gateway process, wherever its objects come from: connects the parts, serves, drains.

`__main__` runs it on the API server's objects, `lorapool_serve` on a folder of YAML files.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from lorapool_api.keep_alive import keep_alive
from lorapool_api.liveness import Heartbeat
from lorapool_api.trust.health_port import health_port
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_api.trust.runtime_tokens import MasterTokens, RuntimeTokens
from lorapool_api.trust.tls import ReleaseTrust
from lorapool_gateway.app import Gateway
from lorapool_gateway.ledger.attempts import Attempts
from lorapool_gateway.ledger.forward import Forwarder
from lorapool_gateway.ledger.journal import Journal
from lorapool_gateway.ledger.sender import LedgerClient, Sender
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.quotas.admission import Quotas
from lorapool_gateway.quotas.leases import LeaseKeeper
from lorapool_gateway.quotas.limits import QuotaFile
from lorapool_gateway.requests.attempt import RuntimeClient
from lorapool_gateway.requests.dispatch import Dispatcher
from lorapool_gateway.requests.http_client import HttpClient
from lorapool_gateway.requests.wake import ScaleWaker
from lorapool_gateway.routing.key_guard import KeyGuard
from lorapool_gateway.routing.live_tables import LiveKeys, LiveRoutes
from lorapool_gateway.routing.runtime_polls import RuntimePolls
from lorapool_gateway.routing.source import Kind, ObjectSource, ScaleClient
from lorapool_gateway.routing.table_builder import TableBuilder
from lorapool_gateway.settings import Settings
from lorapool_gateway.tuning.files import Files
from lorapool_gateway.tuning.job_object import parse_object
from lorapool_gateway.tuning.jobs import Jobs, ObjectApi
from lorapool_gateway.tuning.routes import Tuning
from lorapool_gateway.tuning.store_client import StoreClient
from lorapool_gateway.tuning.upload import UploadLimits

log = logging.getLogger("lorapool_gateway")

BACKLOG = 1024
SHUTDOWN_S = 1.0
LAST_WORDS_S = 3.0
"""Time for the error events of streams that a stop ends."""
YOUNG_OBJECTS = 20_000
"""The garbage collector runs after this many more live objects instead of after 700. Reference counting alone frees
what a request allocates."""


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    gateway: Gateway
    tables: TableBuilder
    api_site: web.TCPSite
    api_port: int
    metrics_port: int


@asynccontextmanager
async def running(
    settings: Settings,
    tokens: RuntimeTokens,
    source: ObjectSource,
    scale: ScaleClient,
    metrics: Metrics,
    objects: ObjectApi | None = None,
) -> AsyncIterator[GatewayProcess]:
    """Serves inside the context: on the API port, and metrics and probes on a port and in a thread of their own.

    `objects` makes the objects of fine-tuning jobs. Raises SettingsError if a file that the settings name is unusable.
    """
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(client_session())
        routes, keys, trust = LiveRoutes(), LiveKeys(), ReleaseTrust(settings.internal_ca_file)
        ledger = _ledger(stack, settings, trust)
        attempts = await _journal(stack, settings, ledger, metrics)
        quotas = _quotas(stack, settings, ledger, metrics)
        tables = TableBuilder(source, routes, keys, metrics)
        tables.polls = RuntimePolls(session, tokens.of, tables.runtimes_changed, trust)
        stack.push_async_callback(tables.polls.close)
        waker = ScaleWaker(scale, metrics.wake)
        stack.push_async_callback(waker.close)
        http = HttpClient(
            trust=trust,
            connect_timeout_s=settings.connect_timeout_s,
            read_timeout_s=settings.request_timeout_s,
            before_write=attempts.write,
        )
        stack.push_async_callback(http.close)
        guard = key_guard(settings, keys, metrics, known=lambda: tables.synced)
        runtimes = RuntimeClient(http, lambda base: tokens.of(base.uid))
        dispatcher = Dispatcher(routes, waker, runtimes, metrics, guard, attempts)
        gateway = Gateway(settings, routes, guard, dispatcher, metrics, attempts, Forwarder(ledger), quotas)
        if settings.store_url and objects is not None:
            gateway.use_tuning(_tuning(stack, settings, source, routes, trust, objects))
        watching = asyncio.create_task(tables.run(), name="tables")
        stack.push_async_callback(_cancel, watching)

        heartbeat = Heartbeat(settings.loop_stuck_s)
        beating = asyncio.create_task(heartbeat.run(), name="heartbeat")
        stack.push_async_callback(_cancel, beating)

        def alive() -> bool:
            return heartbeat.alive and not watching.done()

        access = MetricsAccess(settings)
        host, port = settings.listen_host, settings.metrics_port
        probes = health_port(
            host,
            port,
            access,
            metrics.text,
            alive=alive,
            ready=lambda: alive() and tables.synced and not gateway.draining,
        )
        metrics_port = await stack.enter_async_context(probes)
        runner = web.ServerRunner(gateway.server(), shutdown_timeout=SHUTDOWN_S)
        site, api_port = await listen(stack, runner, settings.listen_host, settings.api_port)
        log.info("listening on %d, metrics on %d", api_port, metrics_port)
        yield GatewayProcess(gateway, tables, site, api_port, metrics_port)


def _ledger(stack: AsyncExitStack, settings: Settings, trust: ReleaseTrust) -> LedgerClient | None:
    """The release's ledger; None if there is none."""
    if not settings.ledger_url:
        return None
    client = LedgerClient(
        settings.ledger_url, MasterTokens.from_file(settings.ledger_token_file).current, trust.context
    )
    stack.push_async_callback(client.close)
    return client


async def _journal(
    stack: AsyncExitStack, settings: Settings, ledger: LedgerClient | None, metrics: Metrics
) -> Attempts:
    """Keeps the journal until the stack unwinds, and sends it."""
    if ledger is None or settings.journal_dir is None:
        return Attempts()
    journal = Journal(
        settings.journal_dir, settings.journal_max_bytes, lambda why: metrics.journal_lost.labels(why).inc()
    )
    stack.callback(journal.close)
    metrics.journal_lag.set_function(lambda: journal.lag_s)
    metrics.journal_unsent.set_function(lambda: journal.unsent)
    metrics.journal_bytes.set_function(lambda: journal.size + journal.others)
    sender = Sender(ledger, journal, metrics.ledger_failures.inc, metrics.journal_record_lost)
    attempts = Attempts(journal)
    stack.push_async_callback(sender.send_last)
    stack.callback(attempts.write)
    for work in (sender.run(), journal.keep_synced(), attempts.keep_flushed()):
        stack.push_async_callback(_cancel, asyncio.create_task(work, name="journal"))
    return attempts


def _quotas(stack: AsyncExitStack, settings: Settings, ledger: LedgerClient | None, metrics: Metrics) -> Quotas:
    keeper = LeaseKeeper(
        ledger,
        uuid.uuid4().hex,
        rates=settings.quota_rates_when_away,
        budgets=settings.quota_budgets_when_away,
        grace_s=settings.quota_grace_s,
        failed=metrics.lease_failures.inc,
    )
    quotas = Quotas(keeper, QuotaFile(settings.quota_file), unpriced=metrics.unpriced_requests.inc)
    stack.push_async_callback(keeper.end)
    stack.push_async_callback(_cancel, asyncio.create_task(keeper.run(), name="leases"))
    return quotas


def _tuning(
    stack: AsyncExitStack,
    settings: Settings,
    source: ObjectSource,
    routes: LiveRoutes,
    trust: ReleaseTrust,
    objects: ObjectApi,
) -> Tuning:
    """Files and fine-tuning jobs. The jobs are watched; whether that works decides nothing else."""
    masters = MasterTokens.from_file(settings.store_token_file)
    store = StoreClient(settings.store_url, masters.current, trust)
    stack.push_async_callback(store.close)
    caches = source.caches(Kind.JOBS, parse_object, lambda: None)
    jobs = Jobs(objects, caches, most_unfinished=settings.tuning_unfinished_jobs)
    limits = UploadLimits(silence_s=settings.body_timeout_s, whole_s=settings.upload_timeout_s)
    return Tuning(store, Files(store), jobs, objects, routes, limits)


def key_guard(
    settings: Settings, keys: LiveKeys, metrics: Metrics, *, known: Callable[[], bool] = lambda: True
) -> KeyGuard:
    """The check of keys as the settings want it. `known()`: whether the keys were read once."""
    metrics.keys_age.set_function(lambda: max(0.0, time.monotonic() - keys.confirmed_s()))
    max_age_s = settings.keys_max_age_s if settings.keys_when_stale == "refuse" else None
    return KeyGuard(keys, max_age_s=max_age_s, used=metrics.key_used, known=known)


def client_session() -> aiohttp.ClientSession:
    """For long-polls of runtimes (requests use `HttpClient`): no limit, no decompression, no proxy."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15, socket_factory=poll_socket),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity", "User-Agent": "lorapool-gateway"},
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def poll_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that the kernel closes when the runtime's machine is lost."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    keep_alive(made)
    return made


async def drain(process: GatewayProcess, settings: Settings) -> None:
    """First not ready but accepting, then no new connections; waits for requests in flight, at last ends them."""
    gateway = process.gateway
    log.info("draining", extra={"in_flight": gateway.in_flight})
    gateway.draining = True
    await asyncio.sleep(settings.shutdown_delay_s)
    await process.api_site.stop()
    if await _idle_within(gateway, settings.drain_timeout_s):
        return
    log.warning("ending requests that did not finish in time", extra={"in_flight": gateway.in_flight})
    gateway.end_requests()
    await _idle_within(gateway, LAST_WORDS_S)


async def _idle_within(gateway: Gateway, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await gateway.idle.wait()
    except TimeoutError:
        return False
    return True


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


def run(work: Coroutine[Any, Any, None]) -> None:
    """Runs on uvloop, with the garbage collector set up for a server.

    The tens of thousands of objects that imports create live as long as the process, so the collector skips them. A
    full collection of them would delay every request by tens of milliseconds. A full collection of a large route
    table would as well; the higher threshold makes it rare.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)
