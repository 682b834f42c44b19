"""A response of a runtime that is in progress, and the errors of a request to one.

HttpClientError
├── ConnectError           nothing was sent
├── ConnectionLostError    the connection was lost, or the response is not HTTP: the request may have begun
└── ReadTimeoutError       no byte for `read_timeout_s`
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final, Protocol

BUFFER_BYTES: Final = 256 * 1024
"""Unread bytes of a response's body; beyond this the connection is paused until they are read."""


class HttpClientError(Exception):
    pass


class ConnectError(HttpClientError):
    pass


class ConnectionLostError(HttpClientError):
    pass


class ReadTimeoutError(HttpClientError):
    pass


class Connection(Protocol):
    """What a response needs of its connection."""

    def resume(self) -> None:
        """Reads on after a pause."""

    def drop(self) -> None:
        """Cuts the connection."""


class HttpResponse:
    """A response in progress. Its owner awaits `head`, then calls `read` until it returns b"", and always closes it."""

    __slots__ = (
        "__weakref__", "_begun", "_body", "_buffered", "_complete", "_connection", "_error", "_last_s", "_loop",
        "_open", "_patient_until_s", "_timeout_s", "_waiter", "headers", "status", "take",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        loop: asyncio.AbstractEventLoop,
        read_timeout_s: float,
        open_responses: set[HttpResponse],
    ) -> None:
        """Stays in `open_responses` until it is complete, closed or failed."""
        self.status = 0
        self.headers: dict[str, str] = {}
        """Names are in lower case. Of a repeated name the first value is kept."""
        self.take: Callable[[bytes], bool] | None = None
        """Called with what arrives while a reader waits in `read`, before the reader is woken, which takes longer than
        all else that a short part costs. Returns whether it has taken it; the reader gets only what it has not."""
        self._connection: Connection | None = connection
        self._loop = loop
        self._body: list[bytes] = []
        self._buffered = 0
        self._begun = self._complete = False
        self._error: HttpClientError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timeout_s = read_timeout_s
        self._last_s = loop.time()
        self._patient_until_s = math.inf
        self._open = open_responses
        open_responses.add(self)

    @property
    def has_begun(self) -> bool:
        """Whether status and headers have arrived."""
        return self._begun

    @property
    def is_complete(self) -> bool:
        """Whether the end of the body has arrived: nothing follows what the last `read` returned."""
        return self._complete and not self._body

    async def head(self, patience_s: float | None = None) -> bool:
        """Waits for status and headers; False if `patience_s` passes first. Raises HttpClientError."""
        if self._begun:
            return True
        self._check()
        self._waiter = self._loop.create_future()
        if patience_s is not None:
            self._patient_until_s = self._loop.time() + patience_s
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._patient_until_s = math.inf
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
        data = b"".join(self._body)
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
        return b"".join(parts)

    def close(self) -> None:
        """Cuts the connection if the response is not complete, which ends the generation."""
        self._open.discard(self)
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

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    # --- events from the connection

    def begun(self, status: int) -> None:
        self.status, self._begun = status, True
        _wake(self._waiter)

    def arrived(self, parts: list[bytes]) -> bool:
        """Takes parts of the body; returns whether more may be read from the connection."""
        if self.take is not None and self._is_awaited() and self.take(b"".join(parts)):
            return True
        self._body += parts
        self._buffered += sum(map(len, parts))
        _wake(self._waiter)
        return self._buffered < BUFFER_BYTES

    def _is_awaited(self) -> bool:
        """Whether a reader waits and was not given anything yet."""
        return not self._body and self._waiter is not None and not self._waiter.done()

    def touched(self) -> None:
        self._last_s = self._loop.time()

    def completed(self, parts: list[bytes]) -> None:
        """Takes the last parts of the body."""
        self._body += parts
        self._complete, self._connection = True, None
        self._open.discard(self)
        _wake(self._waiter)

    def failed(self, error: HttpClientError) -> None:
        if self._error is None and not self._complete:
            self._error, self._connection = error, None
            self._open.discard(self)
            _wake(self._waiter)

    def check_time(self, now_s: float) -> None:
        """Ends a wait for the head that has lasted too long, and a response that has been silent for too long."""
        if self._patient_until_s <= now_s:
            _wake(self._waiter)
        if self._buffered >= BUFFER_BYTES:  # this process reads slowly; the runtime is not at fault
            self._last_s = now_s
        elif self._last_s + self._timeout_s <= now_s:
            self.end(ReadTimeoutError(f"no byte for {self._timeout_s:g} s"))


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
