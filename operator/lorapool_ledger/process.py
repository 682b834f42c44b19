"""The life of a ledger process: watches objects, collects, sums, checks, serves.

Every replica serves. One leads: it pulls runtimes, makes the sums and checks them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from prometheus_client import generate_latest
from sqlalchemy import text

from lorapool_api.keep_alive import keep_alive
from lorapool_api.liveness import Heartbeat
from lorapool_api.trust.health_port import health_port
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_api.trust.runtime_tokens import MasterTokens, RuntimeTokens
from lorapool_api.trust.tls import ReleaseTrust, ServerCertificate
from lorapool_gateway.routing.key_guard import KeyGuard
from lorapool_gateway.routing.live_tables import LiveKeys, LiveRoutes
from lorapool_gateway.routing.routes import RouteTable
from lorapool_gateway.routing.runtime_polls import RuntimePolls
from lorapool_gateway.routing.source import ObjectSource
from lorapool_gateway.routing.table_builder import TableBuilder
from lorapool_ledger.api.organization import OrganizationApi
from lorapool_ledger.api.signing import Signer
from lorapool_ledger.console.app import Console
from lorapool_ledger.console.live_objects import LiveObjects
from lorapool_ledger.intake.attempts_api import MOST_BYTES, AttemptsIntake
from lorapool_ledger.intake.price_list import PriceListKeeper
from lorapool_ledger.intake.pulls import PulledPod, Pulls
from lorapool_ledger.intake.runtime_page import Pod
from lorapool_ledger.metrics import Metrics
from lorapool_ledger.quotas.leases import Leases
from lorapool_ledger.settings import Settings
from lorapool_ledger.sinks.sender import Sinks
from lorapool_ledger.store.database import Database, DatabaseAwayError, LedgerDatabaseError
from lorapool_ledger.store.leader import Leadership
from lorapool_ledger.sums.invoices import InvoiceCloser
from lorapool_ledger.sums.reconcile import Reconciler
from lorapool_ledger.sums.retention import Retention
from lorapool_ledger.sums.rollups import RollUps

log = logging.getLogger("lorapool_ledger")

SHUTDOWN_S = 10.0
"""Requests in progress have this long to finish after a signal."""
OPEN_RETRY_S = 2.0
DATABASE_CHECK_S = 2.0
DATABASE_ANSWER_S = 5.0
GONE_CHECK_S = 15.0


@dataclass(frozen=True, slots=True)
class LedgerProcess:
    database: Database
    api_port: int
    metrics_port: int


class _NoSeries:
    """The ledger has no metrics by object."""

    def sync(self, bases: Iterable[str], adapters: Mapping[str, str]) -> None: ...

    def sync_keys(self, key_ids: Iterable[str]) -> None: ...


async def open_database(url: str) -> Database:
    """Opens the database, and waits for it while it does not answer. Raises LedgerDatabaseError for any other fault."""
    waiting = False
    while True:
        try:
            return await asyncio.to_thread(Database.open, url)
        except DatabaseAwayError as error:
            if not waiting:
                log.warning("waiting for the database", extra={"error": str(error)})
            waiting = True
            await asyncio.sleep(OPEN_RETRY_S)


@asynccontextmanager
async def running(
    settings: Settings, own_tokens: MasterTokens, runtime_tokens: RuntimeTokens, source: ObjectSource
) -> AsyncIterator[LedgerProcess]:
    """Serves inside the context. Raises SettingsError for a file that cannot be used, LedgerDatabaseError."""
    async with AsyncExitStack() as stack:
        metrics = Metrics()
        heartbeat = Heartbeat(settings.loop_stuck_s)
        await _task(stack, heartbeat.run(), "heartbeat")
        state = _State()
        access = MetricsAccess(settings)
        host, port = settings.listen_host, settings.metrics_port
        probes = health_port(
            host,
            port,
            access,
            lambda: generate_latest(metrics.registry),
            alive=lambda: heartbeat.alive,
            ready=lambda: heartbeat.alive and state.serving and state.database_answers,
        )
        metrics_port = await stack.enter_async_context(probes)
        database = await open_database(settings.database_url)
        stack.push_async_callback(database.close)
        await _task(stack, _watch_database(database, metrics, state), "database check")

        trust = ReleaseTrust(settings.internal_ca_file)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15, socket_factory=_socket),
                headers={"User-Agent": "lorapool-ledger"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        )
        routes, keys = LiveRoutes(), LiveKeys()
        tables = TableBuilder(source, routes, keys, _NoSeries())
        tables.polls = RuntimePolls(session, runtime_tokens.of, tables.runtimes_changed, trust)
        stack.push_async_callback(tables.polls.close)
        collector = _Collector(
            Pulls(session, database, runtime_tokens.of, trust, metrics), routes, lambda: tables.synced, metrics
        )
        stack.push_async_callback(collector.pulls.close)
        live = LiveObjects(
            routes, keys, lambda: leases.uses_anywhere(), currency=lambda: leases.currency, now_unix_s=time.time
        )
        if settings.tuning:
            live.watch_jobs(source)
        await _task(stack, tables.run(), "objects")
        roll_ups = RollUps(database, metrics)
        prices_refused = functools.partial(metrics.configuration_refused, "prices")
        metrics.follow(lambda: collector.pulls.oldest_answer_s, lambda: roll_ups.lag_s)
        leadership: Leadership
        leases = Leases(database, own_tokens, lambda: leadership.leads)
        metrics.follow_quotas(leases.uses)
        leader_work = _LeaderWork(
            {
                "leases": leases.run,
                "pulls": collector.run,
                "roll-ups": roll_ups.run,
                "reconciliation": Reconciler(database, metrics).run,
                "retention": Retention(database, settings.keep_facts_days).run,
                "price list": PriceListKeeper(database, settings.bill_dir, refused=prices_refused).run,
                "invoices": InvoiceCloser(database, settings.close_after_days).run,
                "sinks": Sinks(database, settings.bill_dir, settings.sink_secrets_dir, session, metrics).run,
            }
        )
        stack.push_async_callback(leader_work.stop)

        def lead(leads: bool) -> None:
            metrics.leading.set(leads)
            if leads:
                leader_work.start()
            else:
                leader_work.cancel()

        leadership = Leadership(database, lead)
        await _task(stack, leadership.run(), "leadership")

        app = web.Application(client_max_size=MOST_BYTES)
        AttemptsIntake(database, own_tokens, metrics).add_routes(app)
        leases.add_routes(app)
        guard = KeyGuard(keys, known=lambda: tables.synced)
        OrganizationApi(database, guard, Signer("page", own_tokens.current)).add_routes(app)
        Console(database, keys, guard, Signer("session", own_tokens.current), live).add_routes(app)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        tls = None if settings.tls_dir is None else ServerCertificate(settings.tls_dir).context
        await web.TCPSite(runner, settings.listen_host, settings.api_port, ssl_context=tls).start()
        api_port = int(runner.addresses[0][1])
        state.serving = True
        stack.callback(state.stop)
        log.info("serving the ledger on %d, metrics on %d", api_port, metrics_port)
        yield LedgerProcess(database, api_port, metrics_port)


class _State:
    """What the probes report. Read in another thread."""

    def __init__(self) -> None:
        self.serving = False
        self.database_answers = False

    def stop(self) -> None:
        self.serving = False


class _Collector:
    """Pulls the pods that the objects of the cluster show, once they have proved themselves."""

    def __init__(self, pulls: Pulls, routes: LiveRoutes, synced: Callable[[], bool], metrics: Metrics) -> None:
        self.pulls = pulls
        self._routes = routes
        self._synced = synced
        self._collecting = False
        routes.subscribe(self._follow)

    async def run(self) -> None:
        """Pulls until cancelled."""
        self._collecting = True
        try:
            self._follow(self._routes.table)
            while True:
                await asyncio.sleep(GONE_CHECK_S)
                if self._synced():
                    with suppress(LedgerDatabaseError):
                        present = (
                            one.endpoint.pod_uid for all_ in self._routes.table.replicas.values() for one in all_
                        )
                        await self.pulls.close_gone(frozenset(present))
        finally:
            self._collecting = False
            self.pulls.follow({})

    def _follow(self, table: RouteTable) -> None:
        if not self._collecting:
            return
        self.pulls.follow(
            {
                one.endpoint.pod_uid: PulledPod(
                    Pod(
                        one.endpoint.pod_uid,
                        one.endpoint.pod_name,
                        one.endpoint.base_uid,
                        str(one.endpoint.base_ref),
                        table.bases[one.endpoint.base_ref].spec.runtime_profile,
                    ),
                    one.endpoint.url,
                )
                for replicas in table.replicas.values()
                for one in replicas
                if one.proven
            }
        )


class _LeaderWork:
    """Tasks that run while this replica leads. One that fails starts again."""

    def __init__(self, work: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        self._work = work
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks += [asyncio.create_task(_again(run, name), name=name) for name, run in self._work.items()]

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = [task for task in self._tasks if not task.done()]

    async def stop(self) -> None:
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _again(run: Callable[[], Awaitable[None]], name: str) -> None:
    while True:
        try:
            await run()
        except Exception as error:  # of any type: the bill must not stop for a fault that one record causes
            log.error("%s failed and starts again", name, extra={"error": repr(error)[:300]}, exc_info=True)
        await asyncio.sleep(OPEN_RETRY_S)


async def _watch_database(database: Database, metrics: Metrics, state: _State) -> None:
    while True:
        try:
            async with asyncio.timeout(DATABASE_ANSWER_S):
                await database.read(lambda connection: connection.execute(text("SELECT 1")).scalar())
            state.database_answers = True
        except (LedgerDatabaseError, TimeoutError):
            state.database_answers = False
        metrics.database_up.set(state.database_answers)
        await asyncio.sleep(DATABASE_CHECK_S)


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    keep_alive(made)
    return made


async def _task(stack: AsyncExitStack, work: Awaitable[None], name: str) -> None:
    task = asyncio.ensure_future(work)
    stack.push_async_callback(_cancel, task)


async def _cancel(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
