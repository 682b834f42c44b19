"""What the gateway adds to a request: latency through it against a direct call, at 1 and at 32 connections.

Three processes on loopback: a runtime that answers at once, the gateway with injected tables, and this client.
`python bench/gateway_overhead.py` prints a table and one JSON line; `--requests` bounds the work. Direct and
through-gateway requests alternate in short rounds, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from lorapool_api.common import HEADER_ADAPTER, HEADER_USAGE
from lorapool_gateway.__main__ import client_session
from lorapool_gateway.app import Gateway
from lorapool_gateway.auth import ApiKey, KeyTable
from lorapool_gateway.dispatch import Dispatcher
from lorapool_gateway.forward import Forwarder
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.objects import BaseRoute, Endpoint, ObjectRef, RuntimeState, adapter_route, base_route
from lorapool_gateway.routes import Replica, RouteTable
from lorapool_gateway.settings import Settings
from lorapool_gateway.store import KeyStore, RouteStore

KEY = "lp-bench"
ADAPTERS = 1000
ROUNDS = 10
DIGEST = "sha256:" + "0" * 64
CHUNK = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n'
ANSWER = json.dumps({"id": "c", "object": "chat.completion", "choices": [{"message": {"content": "x" * 400}}]}).encode()
USAGE = '{"prompt_tokens":5,"completion_tokens":20,"cached_tokens":0}'
STREAM_EVENTS = 20
IDENTITY = f"demo/a0@{DIGEST}"
BODY = {"model": "demo/a0", "messages": [{"role": "user", "content": "word " * 100}]}


# --- the runtime that answers at once


async def _answer(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    headers = {HEADER_ADAPTER: IDENTITY}
    if not body.get("stream"):
        return web.Response(body=ANSWER, content_type="application/json", headers={**headers, HEADER_USAGE: USAGE})
    out = web.StreamResponse(headers=headers)
    out.content_type = "text/event-stream"
    await out.prepare(request)
    for _ in range(STREAM_EVENTS):
        await out.write(b": lorapool-usage " + USAGE.encode() + b"\n" + CHUNK)
    await out.write(b"data: [DONE]\n\n")
    await out.write_eof()
    return out


def _runtime_app() -> web.Application:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", _answer)
    return app


# --- the gateway, with 1,000 adapters in its table


class _NeverAsleep:
    def wake(self, base: BaseRoute) -> None:
        raise AssertionError("the base of the benchmark is up")


def _object(name: str, **spec: object) -> dict[str, object]:
    metadata = {"name": name, "namespace": "demo", "uid": f"uid-{name}", "generation": 1}
    return {"metadata": metadata, "spec": spec, "status": {"observedGeneration": 1, "digest": DIGEST}}


def _gateway_app(runtime_url: str, session: aiohttp.ClientSession) -> web.Application:
    ref = ObjectRef("demo", "tiny")
    endpoint = Endpoint(ref, None, "pod-1", "pod-1", runtime_url, ready=True, terminating=False)
    state = RuntimeState("boot", ready=True, draining=False, in_flight=0, loaded=frozenset({("uid-a0", DIGEST)}))
    source = {"uri": "hf://org/x"}
    adapters = [
        adapter_route(_object(f"a{number}", baseModelRef={"name": "tiny"}, source=source)) for number in range(ADAPTERS)
    ]
    routes = RouteStore(
        RouteTable.of([base_route(_object("tiny", source=source))], adapters, {ref: (Replica(endpoint, state),)})
    )
    metrics = Metrics()
    metrics.sync([str(ref)], {str(adapter.ref): str(ref) for adapter in adapters})
    keys = KeyStore(KeyTable.of([ApiKey("bench", hashlib.sha256(KEY.encode()).hexdigest(), None)]))
    forwarder = Forwarder(session, lambda base: "t" * 64)
    dispatcher = Dispatcher(routes, _NeverAsleep(), forwarder, metrics)
    return Gateway(Settings(keys_namespace="x"), routes, keys, dispatcher, metrics).app()


async def _serve(role: str, runtime_url: str) -> None:
    async with client_session() as session:
        app = _runtime_app() if role == "runtime" else _gateway_app(runtime_url, session)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        sys.stdout.write(f"{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent goes
        await runner.cleanup()


@asynccontextmanager
async def _process(role: str, runtime_url: str = "") -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--role", role, "--runtime-url", runtime_url,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        yield f"http://127.0.0.1:{int(line)}"
    finally:
        process.stdin.close()
        await process.wait()


# --- the client


async def _round(session: aiohttp.ClientSession, url: str, connections: int, count: int, stream: bool) -> list[float]:
    """Milliseconds of each request."""
    left = count
    times: list[float] = []
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {**BODY, "stream": stream}

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            began_s = time.perf_counter()
            async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                data = await response.read()
            times.append((time.perf_counter() - began_s) * 1000)
            if response.status != 200 or not data:
                raise SystemExit(f"unexpected answer {response.status}: {data[:200]!r}")

    await asyncio.gather(*(worker() for _ in range(connections)))
    return times


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def _measure(requests: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    async with _process("runtime") as runtime, _process("gateway", runtime) as gateway, client_session() as session:
        for stream in (False, True):
            for connections in (1, 32):
                await _round(session, runtime, connections, 50, stream)
                await _round(session, gateway, connections, 50, stream)
                direct: list[float] = []
                through: list[float] = []
                spent_s = 0.0
                for _ in range(ROUNDS):
                    direct += await _round(session, runtime, connections, requests // ROUNDS, stream)
                    began_s = time.perf_counter()
                    through += await _round(session, gateway, connections, requests // ROUNDS, stream)
                    spent_s += time.perf_counter() - began_s
                results.append(
                    {
                        "stream": stream,
                        "connections": connections,
                        "requests": len(through),
                        "direct_p50_ms": round(statistics.median(direct), 2),
                        "direct_p99_ms": round(_percentile(direct, 0.99), 2),
                        "gateway_p50_ms": round(statistics.median(through), 2),
                        "gateway_p99_ms": round(_percentile(through, 0.99), 2),
                        "added_p50_ms": round(statistics.median(through) - statistics.median(direct), 2),
                        "added_p99_ms": round(_percentile(through, 0.99) - _percentile(direct, 0.99), 2),
                        "requests_per_s": round(len(through) / spent_s),
                    }
                )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=1000, help="per line of the table and side")
    parser.add_argument("--role", choices=("runtime", "gateway"), help=argparse.SUPPRESS)
    parser.add_argument("--runtime-url", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        asyncio.run(_serve(arguments.role, arguments.runtime_url))
        return
    results = asyncio.run(_measure(arguments.requests))
    sys.stdout.write("stream  connections  direct p50/p99 ms  gateway p50/p99 ms  added p50/p99 ms  requests/s\n")
    for line in results:
        sys.stdout.write(
            f"{line['stream']!s:6}  {line['connections']:11}  {line['direct_p50_ms']:8} / {line['direct_p99_ms']:<6}"
            f"  {line['gateway_p50_ms']:8} / {line['gateway_p99_ms']:<7}  {line['added_p50_ms']:6} / "
            f"{line['added_p99_ms']:<6}  {line['requests_per_s']}\n"
        )
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    sys.stdout.write(json.dumps({"machine": machine, "adapters": ADAPTERS, "results": results}) + "\n")


if __name__ == "__main__":
    main()
