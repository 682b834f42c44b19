"""An HTTP/1.1 client for runtimes: persistent connections, one request at a time on each, streamed responses.

It supports only what requests to runtimes need: no redirects, cookies, proxies or compression. The session of a general
library takes more processor time per request than the rest of the gateway. llhttp (httptools) parses the responses.
Buffers are bounded, and no request is ever sent twice here. An https:// URL is spoken to only after its certificate was
checked: its authority, its dates, and the name that the caller expects.

    HttpClientError
    ├── ConnectError           nothing was sent
    ├── ConnectionLostError    the connection was lost, or the response is not HTTP: the request may have begun
    └── ReadTimeoutError       no byte for `read_timeout_s`
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import httptools

from lorapool_api.keep_alive import keep_alive
from lorapool_api.trust.tls import HANDSHAKE_TIMEOUT_S, ReleaseTrust

HEAD_MAX_BYTES: Final = 64 * 1024
BUFFER_BYTES: Final = 256 * 1024
"""Unread bytes of a response's body; beyond this the connection is paused until they are read."""
JOIN_BYTES: Final = 64 * 1024
"""A shorter body is written together with its headers."""


class HttpClientError(Exception):
    pass


class ConnectError(HttpClientError):
    pass


class ConnectionLostError(HttpClientError):
    pass


class ReadTimeoutError(HttpClientError):
    pass


class HttpResponse:
    """A response in progress. Its owner awaits `head`, then calls `read` until it returns b"", and always closes it."""

    __slots__ = (
        "__weakref__", "_begun", "_body", "_buffered", "_complete", "_connection", "_error", "_last_s", "_loop",
        "_timeout_s", "_timer", "_waiter", "headers", "status",
    )  # fmt: skip

    def __init__(self, connection: _Connection, loop: asyncio.AbstractEventLoop, read_timeout_s: float) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """Names are in lower case. Of a repeated name the first value is kept."""
        self._connection: _Connection | None = connection
        self._loop = loop
        self._body: deque[bytes] = deque()
        self._buffered = 0
        self._begun = self._complete = False
        self._error: HttpClientError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timeout_s = read_timeout_s
        self._last_s = loop.time()
        self._timer = loop.call_later(read_timeout_s, self._check_timeout)

    @property
    def has_begun(self) -> bool:
        """Whether status and headers have arrived."""
        return self._begun

    async def head(self, patience_s: float | None = None) -> bool:
        """Waits for status and headers; False if `patience_s` passes first. Raises HttpClientError."""
        if self._begun:
            return True
        self._check()
        waiter = self._waiter = self._loop.create_future()
        timer = None if patience_s is None else self._loop.call_later(patience_s, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
        if not self._begun:
            self._check()
        return self._begun

    async def read(self) -> bytes:
        """The bytes received since the last call; b"" at the end. Raises HttpClientError."""
        while not self._body:
            self._check()
            if self._complete:
                return b""
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        data = self._body.popleft() if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._buffered = 0
        if self._connection is not None:
            self._connection.resume()
        return data

    async def read_all(self, bound: int) -> bytes | None:
        """The whole body; None if it is longer than `bound` bytes. Raises HttpClientError."""
        parts, size = [], 0
        while data := await self.read():
            parts.append(data)
            size += len(data)
            if size > bound:
                return None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Cuts the connection if the response is not complete, which ends the generation."""
        self._timer.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drop()

    def end(self, error: HttpClientError) -> None:
        """Cuts the connection; its reader gets `error`. Does nothing to a complete response."""
        connection = self._connection
        self.failed(error)
        if connection is not None:
            connection.drop()

    def limit_silence(self, timeout_s: float) -> None:
        """Sets how long the runtime may send nothing, from now on, and then after each byte."""
        self._timeout_s = timeout_s
        self._last_s = self._loop.time()
        if self._connection is not None:
            self._timer.cancel()
            self._check_timeout()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    # --- events from the connection

    def begun(self, status: int) -> None:
        self.status, self._begun = status, True
        _wake(self._waiter)

    def arrived(self, data: bytes) -> bool:
        """Takes a part of the body; returns whether more may be read from the connection."""
        self._body.append(data)
        self._buffered += len(data)
        _wake(self._waiter)
        return self._buffered < BUFFER_BYTES

    def touched(self) -> None:
        self._last_s = self._loop.time()

    def completed(self) -> None:
        self._complete, self._connection = True, None
        self._timer.cancel()
        _wake(self._waiter)

    def failed(self, error: HttpClientError) -> None:
        if self._error is None and not self._complete:
            self._error, self._connection = error, None
            self._timer.cancel()
            _wake(self._waiter)

    def _check_timeout(self) -> None:
        """Runs when the timer expires, which is not reset with every byte, and sets the next one."""
        if self._connection is None:
            return
        if self._buffered >= BUFFER_BYTES:  # this process reads slowly; the runtime is not at fault
            self._last_s = self._loop.time()
        left_s = self._last_s + self._timeout_s - self._loop.time()
        if left_s > 0.001:
            self._timer = self._loop.call_later(left_s, self._check_timeout)
            return
        connection = self._connection
        self.failed(ReadTimeoutError(f"no byte for {self._timeout_s:g} s"))
        connection.drop()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class _Tls(NamedTuple):
    """What the certificate of a connection was checked against."""

    context: ssl.SSLContext
    name: str


class _Connection(asyncio.Protocol):
    """One socket; llhttp calls the `on_` methods while it parses."""

    def __init__(self, pool: HttpClient, url: str, tls: _Tls | None) -> None:
        self._pool, self._url = pool, url
        self.tls = tls
        self._parser = httptools.HttpResponseParser(self)
        self._response: HttpResponse | None = None
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._in_body = self._paused = self._sent_much = False
        self.transport: asyncio.Transport | None = None
        self.idle_since_s = 0.0

    # --- events from asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        keep_alive(transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._pool.forget(self._url, self)
        self._fail(ConnectionLostError("the connection was closed" if exc is None else str(exc)))

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(f"the response is not HTTP ({type(error).__name__})")
            return
        if not self._in_body and self._head_bytes > HEAD_MAX_BYTES:
            self._break("the response headers are too long")
        elif self._response is not None:
            self._response.touched()

    # --- events from llhttp

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # trailers belong to no later response
            self._headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue: the final response follows
            self._headers = {}
            return
        self._in_body = True
        if self._response is None:
            self._break("the runtime sent a response without a request")
            return
        self._response.headers, self._headers = self._headers, {}
        self._response.begun(status)

    def on_body(self, data: bytes) -> None:
        if self._response is not None and not self._response.arrived(data) and not self._paused and self.transport:
            self._paused = True
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        if not self._in_body:
            return
        response, self._response = self._response, None
        self._in_body, self._head_bytes = False, 0
        if response is None or self.transport is None:
            return
        if self._parser.should_keep_alive() and self._has_sent_all():
            self.resume()
            self._pool.keep(self._url, self)
        else:  # it responded before reading the request, or closes the connection
            self.transport.abort()
        response.completed()

    def _has_sent_all(self) -> bool:
        """Whether no part of the request is left in a buffer. A TLS transport does not show the buffer below it."""
        assert self.transport is not None
        if self.tls is not None and self._sent_much and self._parser.get_status_code() >= 400:
            return False
        return self.transport.get_write_buffer_size() == 0

    # --- used by HttpResponse and HttpClient

    def send(self, head: bytes, body: bytes, response: HttpResponse) -> None:
        self._response, self._head_bytes, self._sent_much = response, 0, len(body) >= JOIN_BYTES
        if self.transport is None or self.transport.is_closing():
            self._fail(ConnectionLostError("the connection was closed"))
        elif len(body) < JOIN_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)

    def resume(self) -> None:
        if self._paused and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()

    def drop(self) -> None:
        """Cuts the connection."""
        self._response = None
        if self.transport is not None:
            self.transport.abort()

    def _break(self, why: str) -> None:
        self._fail(ConnectionLostError(why))
        self.drop()

    def _fail(self, error: HttpClientError) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.failed(error)


class HttpClient:
    """Connections to all runtimes, pooled by URL (`http://address:port` or `https://address:port`)."""

    def __init__(
        self,
        *,
        trust: ReleaseTrust | None = None,
        connect_timeout_s: float = 1.0,
        read_timeout_s: float = 600.0,
        idle_s: float = 15.0,
    ) -> None:
        """`idle_s` must be shorter than a runtime's own limit, so that it never closes a reused connection."""
        self._trust = trust or ReleaseTrust()
        self._connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self._idle_s = idle_s
        self._idle: dict[str, deque[_Connection]] = {}
        self._sweeping: asyncio.TimerHandle | None = None
        self._closed = False

    async def send(
        self, url: str, method: str, path: str, headers: Mapping[str, str], body: bytes, *, name: str = ""
    ) -> HttpResponse:
        """Sends a request; `name` is the one that the certificate of an https:// URL must have.

        Raises ConnectError, and ValueError for a header that contains a line end.
        """
        if any("\n" in value or "\r" in value for value in headers.values()):
            raise ValueError("a header value must not hold a line end")
        loop = asyncio.get_running_loop()
        tls = _Tls(self._trust.context(), name) if url.startswith("https") else None
        connection = self._take(url, tls, loop.time()) or await self._connect(url, tls)
        host = url.partition("//")[2]
        lines = [f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        response = HttpResponse(connection, loop, self.read_timeout_s)
        connection.send("".join([*lines, "\r\n"]).encode("latin-1"), body, response)
        return response

    async def close(self) -> None:
        """Closes idle connections. Responses in progress are closed by their owners."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        for connections in list(self._idle.values()):
            for connection in list(connections):
                connection.drop()
        await asyncio.sleep(0)  # transports close in the next iteration of the loop

    async def _connect(self, url: str, tls: _Tls | None) -> _Connection:
        loop, made = asyncio.get_running_loop(), _Connection(self, url, tls)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connected = await _connected_socket(url)
            if tls is None:
                await loop.create_connection(lambda: made, sock=connected)
            else:
                await loop.create_connection(
                    lambda: made,
                    sock=connected,
                    ssl=tls.context,
                    server_hostname=tls.name,
                    ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                )
        except (OSError, TimeoutError) as error:
            raise ConnectError(f"{url}: {self._trust.refusal(error) or type(error).__name__}") from error
        return made

    # --- idle connections

    def _take(self, url: str, tls: _Tls | None, now_s: float) -> _Connection | None:
        """Takes the connection that was used last; if that one is too old, so are all others.

        A connection that was checked against another name, or against authorities that have changed, is not used again.
        """
        connections = self._idle.get(url)
        while connections:
            connection = connections.pop()
            if connection.transport is None or connection.transport.is_closing():
                continue
            if now_s - connection.idle_since_s < self._idle_s and connection.tls == tls:
                return connection
            connection.drop()
        return None

    def keep(self, url: str, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        if self._closed:
            connection.drop()
            return
        connection.idle_since_s = loop.time()
        self._idle.setdefault(url, deque()).append(connection)
        if self._sweeping is None:
            self._sweeping = loop.call_later(self._idle_s, self._sweep)

    def forget(self, url: str, connection: _Connection) -> None:
        connections = self._idle.get(url)
        if connections and connection in connections:
            connections.remove(connection)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweeping = None
        for url, connections in list(self._idle.items()):
            while connections and loop.time() - connections[0].idle_since_s >= self._idle_s:
                connections.popleft().drop()
            if not connections:
                del self._idle[url]
        if self._idle:
            self._sweeping = loop.call_later(self._idle_s, self._sweep)


async def _connected_socket(url: str) -> socket.socket:
    """Opens a TCP connection. Raises OSError."""
    address = urlsplit(url)
    host = address.hostname or ""
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(opened, (host, address.port or 80))
    except BaseException:
        opened.close()
        raise
    return opened
