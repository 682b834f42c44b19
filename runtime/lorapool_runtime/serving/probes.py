"""The listener for probes and scrapers, in a thread of its own, so that no busy request delays a probe.

Metrics read the state of the main event loop and are therefore rendered there; a probe reads single values.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from lorapool_api.liveness import Heartbeat
from lorapool_api.protocol import ROUTE_HEALTH, ROUTE_METRICS, ROUTE_READY
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_runtime.serving.service import Runtime

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Render = Callable[[], bytes]


@asynccontextmanager
async def probes(
    runtime: Runtime, access: MetricsAccess, heartbeat: Heartbeat, main: asyncio.AbstractEventLoop, port: int
) -> AsyncIterator[int]:
    """Serves on the running loop; yields the port. `main` is the loop that the runtime and its heartbeat run on."""
    runner = web.AppRunner(make_probes_app(runtime, access, heartbeat, main), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, runtime.settings.host, port, ssl_context=access.tls).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def make_probes_app(
    runtime: Runtime, access: MetricsAccess, heartbeat: Heartbeat, main: asyncio.AbstractEventLoop
) -> web.Application:
    """Probes, our own metrics, and on a second path the names that inference gateways read."""

    def metrics(render: Render) -> Handler:
        async def rendered() -> bytes:
            return render()

        async def handler(request: web.Request) -> web.Response:
            if not access.permits(request.headers.get("Authorization")):
                return web.Response(status=401)
            return exposition(await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(rendered(), main)))

        return handler

    async def health(_: web.Request) -> web.Response:
        return health_response(runtime) if heartbeat.alive else _stuck()

    async def readiness(_: web.Request) -> web.Response:
        return readiness_response(runtime) if heartbeat.alive else _stuck()

    app = web.Application()
    app.on_response_prepare.append(name_no_software)
    app.router.add_get(ROUTE_HEALTH, health)
    app.router.add_get(ROUTE_READY, readiness)
    app.router.add_get(ROUTE_METRICS, metrics(runtime.metrics.render))
    app.router.add_get(ROUTE_METRICS + "/vllm", metrics(runtime.metrics.render_gateway_names))
    return app


def health_response(runtime: Runtime) -> web.Response:
    healthy = runtime.healthy
    return web.Response(text="ok\n" if healthy else "the engine has died\n", status=200 if healthy else 503)


def readiness_response(runtime: Runtime) -> web.Response:
    if runtime.ready:
        return web.Response(text="ready\n")
    return web.Response(text="draining\n" if runtime.draining else "loading\n", status=503)


def exposition(body: bytes) -> web.Response:
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def name_no_software(_: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: the response does not say which server and version made it."""
    response.headers.pop("Server", None)


def _stuck() -> web.Response:
    return web.Response(text="the event loop is stuck\n", status=503)
