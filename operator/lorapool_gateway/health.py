"""Metrics and probes on their own port, so that they need no key and no client can reach them.

They are served in a thread of their own, so that busy requests delay neither. What they read is safe to read there.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_gateway.metrics import Metrics


def health_app(
    metrics: Metrics, access: MetricsAccess, alive: Callable[[], bool], ready: Callable[[], bool]
) -> web.Application:
    """Serves metrics and probes.

    `alive`: the event loop and the task that builds the tables run. `ready`: they were complete once, and it is not
    draining.
    """

    def probe(ask: Callable[[], bool]) -> Callable[[web.Request], object]:
        async def handler(_: web.Request) -> web.Response:
            good = ask()
            return web.Response(status=200 if good else 503, text="ok\n" if good else "not ok\n")

        return handler

    async def text(request: web.Request) -> web.Response:
        if not access.permits(request.headers.get("Authorization")):
            return web.Response(status=401)
        return web.Response(body=metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def name_no_software(_: web.Request, response: web.StreamResponse) -> None:
        response.headers.pop("Server", None)

    app = web.Application()
    app.on_response_prepare.append(name_no_software)
    app.router.add_get("/healthz", probe(alive))  # type: ignore[arg-type]  # aiohttp's Handler alias is not exported
    app.router.add_get("/readyz", probe(ready))  # type: ignore[arg-type]
    app.router.add_get("/metrics", text)
    return app
