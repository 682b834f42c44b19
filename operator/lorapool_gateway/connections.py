"""aiohttp's HTTP server with bounds on what a connection may cost before its request is known.

Connections are bounded in all and per client address. A head that has begun must be complete in time, and a malformed
one is answered with a plain 400. Bodies are never decompressed. No response names the server's software.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from aiohttp import StreamReader, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from lorapool_api.openai import InvalidRequestError, UnavailableError

log = logging.getLogger(__name__)

KEEPALIVE_S = 75.0
"""For which a connection may be silent before and between requests. Longer than the idle timeout of common load
balancers, so that they close the connection first."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    in_all: int
    per_address: int
    head_timeout_s: float
    """From the first byte of a head to its last."""


class _Connections:
    """The open connections by client address."""

    def __init__(self, limits: ConnectionLimits, refused: Callable[[], None]) -> None:
        self.limits = limits
        self._refused = refused
        self._open: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        if self._open.total() >= self.limits.in_all or self._open[address] >= self.limits.per_address:
            self._refused()
            return False
        self._open[address] += 1
        return True

    def leave(self, address: str) -> None:
        self._open[address] -= 1
        if self._open[address] <= 0:
            del self._open[address]


class Server(web.Server):
    """Serves `handler`; a client that disconnects cancels it."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        limits: ConnectionLimits,
        refused: Callable[[], None],
    ) -> None:
        """`refused` is called for every connection beyond the limits."""
        super().__init__(handler, request_factory=_make_request, handler_cancellation=True)
        self._open_connections = _Connections(limits, refused)

    def __call__(self) -> RequestHandler:
        return _Connection(self._open_connections, self, self._loop)


class _Request(web.BaseRequest):
    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers.pop(hdrs.SERVER, None)


def _make_request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    return _Request(message, payload, protocol, writer, task, asyncio.get_running_loop())


class _Connection(RequestHandler):
    def __init__(self, connections: _Connections, manager: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(manager, loop=loop, access_log=None, keepalive_timeout=KEEPALIVE_S, auto_decompress=False)  # type: ignore[arg-type]
        self._connections = connections
        self._address: str | None = None
        """None: the connection is not open, or was refused."""
        self._timer: asyncio.TimerHandle | None = None
        """Closes the connection when the first head does not begin, or a head that has begun does not end."""
        self._in_head = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        address = str((transport.get_extra_info("peername") or ("",))[0])
        if not self._connections.enter(address):
            cast(asyncio.Transport, transport).write(_TOO_MANY)
            transport.close()
            return
        self._address = address
        super().connection_made(transport)
        self._close_after(KEEPALIVE_S)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._address is None:
            return
        self._connections.leave(self._address)
        self._address = None
        self._head_is_complete()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._address is None:
            return
        super().data_received(data)
        if self._waiter is None or self._waiter.done():
            if self._timer is not None:
                self._head_is_complete()
        elif not self._in_head:  # it waits for a request, and has received a part of a head
            self._in_head = True
            self._close_after(self._connections.limits.head_timeout_s)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp calls this for each part of a body that is read, also while nothing is paused."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def _head_is_complete(self) -> None:
        self._in_head = False
        self._close_after(None)

    def _close_after(self, seconds: float | None) -> None:
        """Replaces the timer; None: nothing closes the connection."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self.force_close)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what is not HTTP. The log has no traceback, since only the client is at fault."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        log.info("malformed request", extra={"remote": request.remote, "error": type(exc).__name__})
        error = InvalidRequestError("The request is not valid HTTP/1.1, or its headers are too long.", code="bad_http")
        response = web.json_response(error.body(), status=error.status)
        response.force_close()
        return response


def _refusal() -> bytes:
    error = UnavailableError("Too many connections are open. Close some, or reuse them for several requests.",
                             code="too_many_connections", retry_after_s=1)  # fmt: skip
    body = json.dumps(error.body()).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


_TOO_MANY = _refusal()
