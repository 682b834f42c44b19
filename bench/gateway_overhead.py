"""W8: what the gateway adds to a request, against a direct call to the same runtime in the same rounds.

    python bench/gateway_overhead.py [--records PATH]

The gateway, with 1,000 adapters in its table, keys and metrics, is a process of its own on one core; a runtime that
answers at once and the clients (`gateway_load`) share the other. What one core can serve at all is measured with a
minimal baseline: aiohttp's server and client with nothing between them. A second gateway, in turns with the first,
shows what TLS to the runtime costs; with `--before`, so does the gateway of an older checkout, which may have none.
What the journal costs, while the ledger takes it and while it is away, is measured with several processes of each
kind: the addresses of its objects make one process several per cent faster than another of the same code.
Processor time per request is comparable even on a shared machine; latencies and rates are not.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from aiohttp import ClientSession, TCPConnector, web
from common import records as measuring
from common.gateway_load import EVENTS, Ask, Client, Round, StubRuntime, closed_loop, connect, once_each, open_loop

from lorapool_api.pod_address import CERTIFICATE, KEY
from lorapool_api.trust.tls import ReleaseTrust, ServerCertificate
from lorapool_gateway.app import Gateway
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.process import key_guard, listen, run
from lorapool_gateway.requests.attempt import RuntimeClient
from lorapool_gateway.requests.dispatch import Dispatcher
from lorapool_gateway.requests.http_client import HttpClient
from lorapool_gateway.routing.auth import ApiKey, KeyTable
from lorapool_gateway.routing.live_tables import LiveKeys, LiveRoutes
from lorapool_gateway.routing.objects import BaseRoute, Endpoint, ObjectRef, RuntimeState, adapter_route, base_route
from lorapool_gateway.routing.routes import RouteTable, RuntimeReplica
from lorapool_gateway.settings import Settings
from lorapool_operator.effects.authority import Authority

API_KEY = "lp-" + "b" * 43
ADAPTERS = 1000
DIGEST = "sha256:" + "0" * 64
RATE_PER_S = 2000
"""The rate at which latencies are measured, so that they are not those of an overloaded gateway."""
PROMPT_BYTES = 500
LARGE_PROMPT_BYTES = 200_000
STREAMS = 1000
PROCESSES = 4
"""Of each kind, where the journal's cost is measured."""
GATEWAY_CORE, CLIENT_CORE = 0, 1
AWAY = "http://127.0.0.1:9"
"""Where no ledger listens."""
ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("operator", "crds")
"""The folders of a checkout that have the gateway's packages."""


# --- the gateway's process ----------------------------------------------------------------


class _NeverAsleep:
    def wake(self, base: BaseRoute) -> None:
        raise AssertionError("the base of the benchmark is up")


def _object(name: str, **spec: object) -> dict[str, object]:
    metadata = {"name": name, "namespace": "demo", "uid": f"uid-{name}", "generation": 1}
    return {"metadata": metadata, "spec": spec, "status": {"observedGeneration": 1, "digest": DIGEST}}


async def _gateway(runtime_url: str, ca_file: Path | None, ledger_url: str | None) -> None:
    ref, source = ObjectRef("demo", "tiny"), {"uri": "hf://org/x"}
    base = base_route(_object("tiny", source=source))
    endpoint = Endpoint(ref, base.uid, "pod-1", "pod-1", runtime_url, ready=True, terminating=False)
    state = RuntimeState("boot", ready=True, draining=False, in_flight=0, loaded=frozenset({("uid-a0", DIGEST)}))
    adapters = [adapter_route(_object(f"a{i}", baseModelRef={"name": "tiny"}, source=source)) for i in range(ADAPTERS)]
    routes = LiveRoutes(RouteTable.of([base], adapters, {ref: (RuntimeReplica(endpoint, state, proven=True),)}))
    keys = LiveKeys(KeyTable.of([ApiKey("bench", hashlib.sha256(API_KEY.encode()).hexdigest(), frozenset({"demo"}))]))
    metrics = Metrics()
    metrics.sync([str(ref)], {str(adapter.ref): str(ref) for adapter in adapters})
    async with AsyncExitStack() as stack:
        kept = () if ledger_url is None else (_journal(stack, ledger_url),)  # a gateway of an older checkout has none
        http = HttpClient(trust=ReleaseTrust(ca_file), **({"before_write": kept[0].write} if kept else {}))
        stack.push_async_callback(http.close)
        guard = key_guard(Settings(keys_namespace="x"), keys, metrics)
        dispatcher = Dispatcher(
            routes, _NeverAsleep(), RuntimeClient(http, lambda base: ("t" * 64,)), metrics, guard, *kept
        )
        server = Gateway(Settings(keys_namespace="x"), routes, guard, dispatcher, metrics, *kept).server()
        _, port = await listen(stack, web.ServerRunner(server), "127.0.0.1", 0)
        await _serve_until_the_parent_goes(port)


def _journal(stack: AsyncExitStack, ledger_url: str) -> object:
    """Keeps a journal and sends it, as the process does."""
    from lorapool_gateway.ledger.attempts import Attempts
    from lorapool_gateway.ledger.journal import Journal
    from lorapool_gateway.ledger.sender import LedgerClient, Sender

    journal = Journal(Path(stack.enter_context(tempfile.TemporaryDirectory())), 2**30)
    client = LedgerClient(ledger_url, lambda: ("t" * 64,), lambda: None)
    stack.push_async_callback(client.close)
    for work in (Sender(client, journal).run(), journal.keep_synced()):
        stack.callback(asyncio.create_task(work).cancel)
    return Attempts(journal)


async def _minimal_proxy(runtime_url: str) -> None:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(ClientSession(runtime_url, connector=TCPConnector(limit=0)))

        async def forward(request: web.BaseRequest) -> web.Response:
            body, headers = await request.read(), {"Content-Type": "application/json"}
            async with session.post(request.path, data=body, headers=headers) as answer:
                return web.Response(body=await answer.read(), status=answer.status, headers=headers)

        server = web.Server(forward, access_log=None)
        _, port = await listen(stack, web.ServerRunner(server), "127.0.0.1", 0)
        await _serve_until_the_parent_goes(port)


async def _serve_until_the_parent_goes(port: int) -> None:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


class Process:
    """The gateway's or the minimal proxy's process, as observed from outside."""

    def __init__(self, pid: int, port: int) -> None:
        self.port = port
        self._clock = (~pid << 3) | 2  # Linux: the clock of another process's processor time

    def cpu_s(self) -> float:
        return time.clock_gettime(self._clock)


@asynccontextmanager
async def _process(kind: str, runtime_url: str, *more: str, checkout: Path = ROOT) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        checkout / Path(__file__).relative_to(ROOT),
        f"--{kind}",
        runtime_url,
        *more,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(checkout / room) for room in ROOMS)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(await asyncio.wait_for(process.stdout.readline(), 60))
        _pin(process.pid, GATEWAY_CORE)
        yield Process(process.pid, port)
    finally:
        process.stdin.close()
        await process.wait()


def _pin(pid: int, core: int) -> None:
    if core < (os.cpu_count() or 1):
        os.sched_setaffinity(pid, {core})


# --- the measuring process ----------------------------------------------------------------

Load = Callable[[list[Client], Ask, int], Awaitable[Round]]


class Bench:
    """Runs loads directly and through the gateway in turns, on connections opened before."""

    def __init__(self, gateway: Process, direct_port: int, seconds: float, rounds: int) -> None:
        self._gateway, self._direct_port = gateway, direct_port
        self._seconds, self._rounds = seconds, rounds
        self.records: list[measuring.Record] = []

    async def saturated(self, clients: list[Client], ask: Ask, _round: int) -> Round:
        return await closed_loop(clients, ask, self._seconds)

    async def at_rate(self, clients: list[Client], ask: Ask, number: int) -> Round:
        return await open_loop(clients, ask, RATE_PER_S, self._seconds, seed=number)

    async def at_half_the_rate(self, clients: list[Client], ask: Ask, number: int) -> Round:
        return await open_loop(clients, ask, RATE_PER_S / 2, self._seconds, seed=number)

    async def compare(self, name: str, ask: Ask, connections: int, load: Load) -> None:
        """Measures added latency, rate, and requests per second of the gateway's processor time."""
        direct = await connect(self._direct_port, connections)
        through = await connect(self._gateway.port, connections)
        await closed_loop(direct, ask, 0.2)
        await closed_loop(through, ask, 0.4)
        rounds: list[tuple[Round, Round]] = []  # (through, direct)
        per_core_s: list[float] = []
        for number in range(self._rounds):
            baseline = await load(direct, ask, number)
            before_s = self._gateway.cpu_s()
            ours = await load(through, ask, number)
            per_core_s.append(len(ours.latencies_s) / (self._gateway.cpu_s() - before_s))
            rounds.append((ours, baseline))
        for client in (*direct, *through):
            client.close()
        for short, share in (("p50", 0.5), ("p99", 0.99)):
            pairs = [(_ms(ours, share), _ms(baseline, share)) for ours, baseline in rounds]
            medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
            note = f"{medians[0]:.2f} through, {medians[1]:.2f} direct"
            self._add(measuring.measured(f"{name}added_{short}_ms", "ms", [a - b for a, b in pairs], note))
        rates = [(ours.per_s, baseline.per_s) for ours, baseline in rounds]
        self._add(
            measuring.against(f"{name}requests_per_s", "1/s", [a for a, _ in rates], "direct", [b for _, b in rates])
        )
        self._add(
            measuring.measured(
                f"{name}requests_per_core_s", "1/s", per_core_s, "per second of the gateway's processor time"
            )
        )

    async def open_streams(self, ask: Ask) -> None:
        """1,000 streams open at the same time, an event every 0.1 s on each."""
        clients = await connect(self._gateway.port, STREAMS)
        errors: list[float] = []
        per_core_s: list[float] = []
        for _ in range(self._rounds):
            before_s = self._gateway.cpu_s()
            failed, seconds = await once_each(clients, ask)
            errors.append(failed)
            per_core_s.append(STREAMS * EVENTS / (self._gateway.cpu_s() - before_s))
        for client in clients:
            client.close()
        note = f"{EVENTS} events each, {seconds:.1f} s"
        self._add(measuring.measured("streams_1000_errors", "errors", errors, note))
        self._add(measuring.measured("streams_1000.events_per_core_s", "1/s", per_core_s, "their first bytes included"))

    async def against_minimal(self, minimal: Process, ask: Ask, connections: int) -> None:
        """Requests per second of processor time, the gateway's and the minimal proxy's in turns."""
        ours, theirs = await self._per_core(self._gateway, minimal, ask, connections)
        note = "aiohttp's server and client and nothing between them, no keys, no metrics"
        self._add(
            measuring.against(
                "requests_per_core_over_minimal_proxy", "1/s", ours, "a minimal aiohttp proxy", theirs, note
            )
        )

    async def in_turns(
        self, name: str, pairs: Sequence[tuple[Process, Process]], called: str, ask: Ask, connections: int
    ) -> None:
        """Requests, or the events of spaced streams, per second of processor time, of two kinds of gateway in turns."""
        ours: list[float] = []
        theirs: list[float] = []
        for one, other in pairs:
            found = await self._per_core(one, other, ask, connections)
            ours += found[0]
            theirs += found[1]
        what = "events" if ask.spaced else "requests"
        self._add(measuring.against(f"{name}{what}_per_core_s", "1/s", ours, called, theirs))

    async def latency_in_turns(self, name: str, one: Process, other: Process, called: str, ask: Ask) -> None:
        """How many milliseconds the median request takes longer at one gateway than at the other, at the same rate."""
        sides = [(process, await connect(process.port, 32)) for process in (one, other)]
        pairs: list[tuple[float, float]] = []
        for number in range(self._rounds + 1):
            found = {
                process: _ms(await self.at_half_the_rate(clients, ask, number), 0.5)
                for process, clients in (sides if number % 2 else reversed(sides))
            }
            if number:
                pairs.append((found[one], found[other]))
        for _, clients in sides:
            for client in clients:
                client.close()
        medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
        note = f"{medians[0]:.2f}, and {medians[1]:.2f} for {called}"
        self._add(measuring.measured(f"{name}more_p50_ms", "ms", [a - b for a, b in pairs], note))

    async def _per_core(
        self, one: Process, other: Process, ask: Ask, connections: int
    ) -> tuple[list[float], list[float]]:
        sides = {process: await connect(process.port, connections) for process in (one, other)}
        found: dict[Process, list[float]] = {process: [] for process in sides}
        for number in range(self._rounds + 1):
            for process, clients in sorted(sides.items(), key=lambda side: side[0].port, reverse=number % 2 == 1):
                before_s = process.cpu_s()
                done = await self._count(clients, ask)
                if number:  # the first one warms up
                    found[process].append(done / (process.cpu_s() - before_s))
        for clients in sides.values():
            for client in clients:
                client.close()
        return found[one], found[other]

    async def _count(self, clients: list[Client], ask: Ask) -> int:
        """Runs one round; returns the number of its requests, or events of spaced streams."""
        if not ask.spaced:
            return len((await closed_loop(clients, ask, self._seconds)).latencies_s)
        failed, _ = await once_each(clients, ask)
        if failed:
            raise RuntimeError(f"{failed} of {len(clients)} streams failed")
        return len(clients) * EVENTS

    def _add(self, record: measuring.Record) -> None:
        self.records.append(replace(record, name="gateway." + record.name))


def _ms(done: Round, share: float) -> float:
    return measuring.percentile(done.latencies_s, share) * 1000


@contextmanager
def _certificates() -> Iterator[tuple[ssl.SSLContext, Path]]:
    """What the stub runtime serves TLS with, and the file with the authority that a gateway trusts."""
    with tempfile.TemporaryDirectory() as made:
        folder, served = Path(made), Path(made) / "served"
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=bench"
        files = ("-keyout", folder / KEY, "-out", folder / CERTIFICATE)
        subprocess.run([*command.split(), *files], check=True, capture_output=True)
        served.mkdir()
        pair = Authority(folder).issuer().issue("uid-tiny", datetime.now(UTC))
        for name, content in zip((CERTIFICATE, KEY), pair, strict=True):
            (served / name).write_bytes(content)
        yield ServerCertificate(served).context, folder / CERTIFICATE


async def _stub(stack: AsyncExitStack, tls: ssl.SSLContext | None = None) -> int:
    """Serves the runtime that answers at once; returns its port."""
    identity = f"demo/a0@{DIGEST}"
    stub = await asyncio.get_running_loop().create_server(
        lambda: StubRuntime(identity), "127.0.0.1", 0, backlog=1024, ssl=tls
    )
    stack.callback(stub.close)
    return int(stub.sockets[0].getsockname()[1])


async def _ledger(stack: AsyncExitStack) -> str:
    """Takes every batch at once; returns its URL."""

    async def take(request: web.BaseRequest) -> web.Response:
        numbers = re.findall(rb'"seq":([0-9]+)', (await request.read())[-2000:])
        return web.Response(body=b'{"through":%b}' % numbers[-1], content_type="application/json")

    runner = web.ServerRunner(web.Server(take, access_log=None))
    _, port = await listen(stack, runner, "127.0.0.1", 0)
    return f"http://127.0.0.1:{port}"


async def measure(seconds: float, rounds: int, only: str, before: Path | None) -> list[measuring.Record]:
    whole, stream = (Ask.of(API_KEY, stream=kind, prompt_bytes=PROMPT_BYTES) for kind in (False, True))
    large = Ask.of(API_KEY, stream=False, prompt_bytes=LARGE_PROMPT_BYTES)
    spaced = Ask.of(API_KEY, stream=True, prompt_bytes=PROMPT_BYTES, spaced=True)
    async with AsyncExitStack() as stack:
        context, ca_file = stack.enter_context(_certificates())
        port, tls_port = await _stub(stack), await _stub(stack, context)
        url, encrypted_url = f"http://127.0.0.1:{port}", f"https://127.0.0.1:{tls_port}"
        gateway = await stack.enter_async_context(_process("gateway", url))
        encrypted = await stack.enter_async_context(_process("gateway", encrypted_url, "--ca", str(ca_file)))
        minimal = await stack.enter_async_context(_process("minimal", url))
        bench = Bench(gateway, port, seconds, rounds)
        # Records without a prefix are those that have a target.
        plan: list[tuple[str, Ask, int, Load]] = [
            ("", whole, 32, bench.at_rate),
            ("half_", whole, 32, bench.at_half_the_rate),
            ("json_1.", whole, 1, bench.saturated),
            ("json_32.", whole, 32, bench.saturated),
            ("json_1000.", whole, 1000, bench.saturated),
            ("stream_1.", stream, 1, bench.saturated),
            ("stream_32.", stream, 32, bench.saturated),
            ("stream_1000.", stream, 1000, bench.saturated),
            ("large_", large, 32, bench.saturated),
        ]
        for name, ask, connections, load in plan:
            if name.startswith(only):
                await bench.compare(name, ask, connections, load)
        if "minimal".startswith(only):
            await bench.against_minimal(minimal, whole, 32)
        compared: list[tuple[str, Sequence[tuple[Process, Process]], str]] = [
            ("tls_", [(encrypted, gateway)], "the gateway without TLS")
        ]
        if "journal".startswith(only) or only.startswith("journal"):
            ledger, called = await _ledger(stack), "the gateway without a journal"
            kinds = [("--ledger", ledger), ("--ledger", AWAY), ()]
            made = [
                [await stack.enter_async_context(_process("gateway", url, *more)) for more in kinds]
                for _ in range(PROCESSES)
            ]
            compared += [
                ("journal_", [(keeping, without) for keeping, _, without in made], called),
                ("journal_alone_", [(alone, without) for _, alone, without in made], called),
            ]
            for name, ask in (("json_", whole), ("stream_", stream)):
                for kind, pairs, _ in compared[1:]:
                    await bench.latency_in_turns(f"{kind}{name}", *pairs[0], called, ask)
        if before is not None:
            old = await stack.enter_async_context(_process("gateway", url, checkout=before))
            compared += [
                ("since_", [(encrypted, old)], "the gateway before"),
                ("since_without_tls_", [(gateway, old)], "the gateway before"),
            ]
        for kind, pairs, called in compared:
            loads = [("json", 32, whole), ("stream", 32, stream), ("large", 32, large), ("spaced", 300, spaced)]
            for sent, connections, ask in loads:
                if (name := f"{kind}{sent}_{connections}.").startswith(only):
                    await bench.in_turns(name, pairs[:1] if ask.spaced else pairs, called, ask, connections)
        if "streams".startswith(only):
            await bench.open_streams(spaced)
    return bench.records


def main() -> None:
    asked = measuring.parser(__doc__)
    asked.add_argument("--seconds", type=float, default=2.0, help="of each load, side and round")
    asked.add_argument("--rounds", type=int, default=measuring.COUNTED_ROUNDS)
    asked.add_argument("--only", default="", help="loads whose name starts so")
    asked.add_argument("--before", metavar="CHECKOUT", type=Path, help="of a version to compare with")
    asked.add_argument("--gateway", metavar="URL", help=argparse.SUPPRESS)
    asked.add_argument("--minimal", metavar="URL", help=argparse.SUPPRESS)
    asked.add_argument("--ledger", metavar="URL", help=argparse.SUPPRESS)
    asked.add_argument("--ca", type=Path, help=argparse.SUPPRESS)
    arguments = measuring.parsed(asked)
    if arguments.gateway or arguments.minimal:
        run(
            _gateway(arguments.gateway, arguments.ca, arguments.ledger)
            if arguments.gateway
            else _minimal_proxy(arguments.minimal)
        )
        return
    _pin(0, CLIENT_CORE)
    records = asyncio.run(measure(arguments.seconds, arguments.rounds, arguments.only, arguments.before))
    measuring.report(records, arguments, {name: version(name) for name in ("aiohttp", "httptools", "uvloop")})


if __name__ == "__main__":
    main()
