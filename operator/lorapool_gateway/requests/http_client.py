"""An HTTP/1.1 client for runtimes: persistent connections, one request at a time on each, streamed responses.

It supports only what requests to runtimes need: no redirects, cookies, proxies or compression. The session of a general
library takes more processor time per request than the rest of the gateway. llhttp (httptools) parses the responses.
Buffers are bounded, and no request is ever sent twice here. An https:// URL is spoken to only after its certificate was
checked: its authority, its dates, and the name that the caller expects.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import httptools

from lorapool_api.keep_alive import keep_alive
from lorapool_api.trust.tls import HANDSHAKE_TIMEOUT_S, ReleaseTrust
from lorapool_gateway.requests.http_response import ConnectError, ConnectionLostError, HttpClientError, HttpResponse

HEAD_MAX_BYTES: Final = 64 * 1024
READ_BYTES: Final = 256 * 1024
"""At most this much is read from a connection at once."""
JOIN_BYTES: Final = 64 * 1024
"""A shorter body is written together with its headers."""
SWEEP_S: Final = 0.25
"""A timeout is noticed at most this much later. One timer for all responses costs less than two for each."""


class _Tls(NamedTuple):
    """What the certificate of a connection was checked against."""

    context: ssl.SSLContext
    name: str


class _Connection(asyncio.BufferedProtocol):
    """One socket; llhttp calls the `on_` methods while it parses.

    A chunk of a body costs no function of Python: llhttp appends it to a list, which is passed on once for each read.
    """

    def __init__(self, pool: HttpClient, url: str, tls: _Tls | None) -> None:
        self._pool, self._url = pool, url
        self.tls = tls
        self._parts: list[bytes] = []
        self.on_body = self._parts.append
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

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._pool.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self._in_body:
            self._head_bytes += nbytes
        try:
            self._parser.feed_data(self._pool.buffer[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(f"the response is not HTTP ({type(error).__name__})")
            return
        if not self._in_body and self._head_bytes > HEAD_MAX_BYTES:
            self._break("the response headers are too long")
        elif self._response is not None:
            self._response.touched()
        self._pass_on()

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
        response.completed(self._parts)
        self._parts.clear()

    def _pass_on(self) -> None:
        """Gives what has arrived of the body to the response, which may ask for a pause."""
        if not self._parts:
            return
        more = self._response is None or self._response.arrived(self._parts)
        self._parts.clear()
        if not more and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def _has_sent_all(self) -> bool:
        """Whether no part of the request is left in a buffer. A TLS transport does not show the buffer below it."""
        assert self.transport is not None
        if self.tls is not None and self._sent_much and self._parser.get_status_code() >= 400:
            return False
        return self.transport.get_write_buffer_size() == 0

    # --- used by HttpResponse and HttpClient

    def expect(self, response: HttpResponse) -> None:
        """Takes what arrives from now on for this response."""
        self._response, self._head_bytes = response, 0

    def send(self, head: bytes, body: bytes, response: HttpResponse) -> None:
        """Sends its request unless it was closed meanwhile."""
        if self._response is not response:
            return
        self._sent_much = len(body) >= JOIN_BYTES
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
        self._pass_on()
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
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """`idle_s` must be shorter than a runtime's own limit, so that it never closes a reused connection.

        The requests of one turn of the event loop are written together; `before_write()` is called first.
        """
        self._trust = trust or ReleaseTrust()
        self._connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self._idle_s = idle_s
        self._idle: dict[str, deque[_Connection]] = {}
        self._sweeping: asyncio.TimerHandle | None = None
        self._open: set[HttpResponse] = set()
        self._checking: asyncio.TimerHandle | None = None
        self._unwritten: list[tuple[_Connection, bytes, bytes, HttpResponse]] = []
        self._before_write = before_write
        self._closed = False
        self.buffer = memoryview(bytearray(READ_BYTES))
        """Takes what one connection reads; its protocol has used it when the call that announces the bytes returns."""

    async def send(
        self, url: str, method: str, path: str, headers: Mapping[str, str], body: bytes, *, name: str = ""
    ) -> HttpResponse:
        """Sends a request; `name` is the one that the certificate of an https:// URL must have.

        Raises ConnectError, and ValueError for a header that contains a line end.
        """
        values = "".join(headers.values())
        if "\r" in values or "\n" in values:
            raise ValueError("a header value must not hold a line end")
        lines = [f"{header}: {value}\r\n" for header, value in headers.items()]
        host = url.partition("//")[2]
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n{''.join(lines)}\r\n"
        loop = asyncio.get_running_loop()
        tls = _Tls(self._trust.context(), name) if url.startswith("https") else None
        connection = self._take(url, tls, loop.time()) or await self._connect(url, tls)
        response = HttpResponse(connection, loop, self.read_timeout_s, self._open)
        if self._checking is None:
            self._checking = loop.call_later(SWEEP_S, self._check_times)
        connection.expect(response)
        if not self._unwritten:
            loop.call_soon(self._write)
        self._unwritten.append((connection, head.encode("latin-1"), body, response))
        return response

    def _write(self) -> None:
        unwritten, self._unwritten = self._unwritten, []
        try:
            self._before_write()
        finally:
            for connection, head, body, response in unwritten:
                connection.send(head, body, response)

    def _check_times(self) -> None:
        loop = asyncio.get_running_loop()
        for response in list(self._open):
            response.check_time(loop.time())
        self._checking = loop.call_later(SWEEP_S, self._check_times) if self._open else None

    async def close(self) -> None:
        """Closes idle connections. Responses in progress are closed by their owners."""
        self._closed = True
        for timer in (self._sweeping, self._checking):
            if timer is not None:
                timer.cancel()
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
