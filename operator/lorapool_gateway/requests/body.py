"""Request bodies in memory: read within bounds, counted against a budget, dropped when no attempt needs them again."""

from __future__ import annotations

import asyncio
from collections import Counter

from aiohttp import web

from lorapool_api.openai import (
    InvalidRequestError,
    PayloadTooLargeError,
    TooManyRequestsError,
    UnsupportedMediaTypeError,
)

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
RETRY_AFTER_S = 1.0
_WAIT = "Send this one again when a runtime has accepted others."


class BodyBudget:
    """Bytes of request bodies that the process holds, in all and by API key."""

    def __init__(self, in_all: int, per_key: int) -> None:
        self._in_all = in_all
        self._per_key = per_key
        self._by_key: Counter[str] = Counter()
        self.held = 0

    def take(self, key: str, size: int) -> None:
        """Raises TooManyRequestsError beyond either bound."""
        if self._by_key[key] + size > self._per_key:
            raise TooManyRequestsError(
                f"The requests of one API key may hold {self._per_key} bytes of bodies at one time. {_WAIT}",
                code="key_bodies_exceeded",
                retry_after_s=RETRY_AFTER_S,
            )
        if self.held + size > self._in_all:
            raise TooManyRequestsError(
                f"The gateway holds {self._in_all} bytes of request bodies at most. {_WAIT}",
                code="bodies_exceeded",
                retry_after_s=RETRY_AFTER_S,
            )
        self._by_key[key] += size
        self.held += size

    def give_back(self, key: str, size: int) -> None:
        self._by_key[key] -= size
        self.held -= size
        if self._by_key[key] <= 0:
            del self._by_key[key]


class HeldBody:
    """A body that counts against a budget until it is dropped."""

    def __init__(self, budget: BodyBudget, key: str) -> None:
        self._budget = budget
        self._key = key
        self._size = 0
        self.data = b""

    def reserve(self, size: int) -> None:
        """Raises TooManyRequestsError."""
        self._budget.take(self._key, size)
        self._size += size

    def drop(self) -> None:
        """Frees the bytes: the request is not sent again. May be called twice."""
        self._budget.give_back(self._key, self._size)
        self._size, self.data = 0, b""


async def read_body(request: web.BaseRequest, body: HeldBody, *, max_bytes: int, timeout_s: float) -> None:
    """Fills `body`. What the client declares is reserved before anything is read.

    Raises UnsupportedMediaTypeError, PayloadTooLargeError, TooManyRequestsError, and InvalidRequestError for a body
    that is malformed or late.
    """
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaTypeError("Compressed bodies are not supported. Send it without `Content-Encoding`.")
    declared = request.content_length
    if declared is not None:
        _check(declared, max_bytes)
        body.reserve(declared)
    try:
        if declared is not None and request.content.is_eof():
            body.data = request.content.read_nowait()  # a short body arrived together with its headers: no wait
            return
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(CONTINUE)
        async with asyncio.timeout(timeout_s):
            body.data = await _read(request, body, max_bytes, known=declared is not None)
    except TimeoutError:
        raise InvalidRequestError("The request body was not sent in time.", code="body_timeout") from None
    except web.RequestPayloadError:
        raise InvalidRequestError("The request body is not valid HTTP/1.1.", code="invalid_body") from None


async def _read(request: web.BaseRequest, body: HeldBody, max_bytes: int, *, known: bool) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := await request.content.readany():
        size += len(part)
        _check(size, max_bytes)
        if not known:
            body.reserve(len(part))
        parts.append(part)
    return b"".join(parts)


def _check(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise PayloadTooLargeError(f"The request body must not be larger than {max_bytes} bytes.")
