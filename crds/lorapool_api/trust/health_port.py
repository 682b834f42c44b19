"""Metrics and probes on their own port, so that they need no key and no client can reach them.

They are served in a thread of their own, so that busy requests delay neither. What they read is safe to read there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from aiohttp import web

from lorapool_api.liveness import in_own_thread
from lorapool_api.trust.metrics_access import MetricsAccess


def health_app(
    text: Callable[[], bytes], access: MetricsAccess, alive: Callable[[], bool], ready: Callable[[], bool]
) -> web.Application:
    """Serves the metrics `text()` at `/metrics` and probes at `/healthz` and `/readyz`."""

    def probe(ask: Callable[[], bool]) -> Callable[[web.Request], object]:
        async def handler(_: web.Request) -> web.Response:
            good = ask()
            return web.Response(status=200 if good else 503, text="ok\n" if good else "not ok\n")

        return handler

    async def show(request: web.Request) -> web.Response:
        if not access.permits(request.headers.get("Authorization")):
            return web.Response(status=401)
        return web.Response(body=text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def name_no_software(_: web.Request, response: web.StreamResponse) -> None:
        response.headers.pop("Server", None)

    app = web.Application()
    app.on_response_prepare.append(name_no_software)
    app.router.add_get("/healthz", probe(alive))  # type: ignore[arg-type]  # aiohttp's Handler alias is not exported
    app.router.add_get("/readyz", probe(ready))  # type: ignore[arg-type]
    app.router.add_get("/metrics", show)
    return app


def health_port(
    host: str,
    port: int,
    access: MetricsAccess,
    text: Callable[[], bytes],
    *,
    alive: Callable[[], bool],
    ready: Callable[[], bool],
) -> AbstractAsyncContextManager[int]:
    """Serves metrics and probes in a thread of its own inside the context, which yields the port (0: a free one)."""

    @asynccontextmanager
    async def serving() -> AsyncIterator[int]:
        runner = web.AppRunner(health_app(text, access, alive, ready), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, ssl_context=access.tls).start()
            yield int(runner.addresses[0][1])
        finally:
            await runner.cleanup()

    return in_own_thread(serving, "probes")
