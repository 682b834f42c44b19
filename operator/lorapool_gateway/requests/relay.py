"""Relays an accepted response to the client, whole or as a stream, and records its usage.

Backpressure is passed on: no more is read from the runtime than the client takes. When the runtime is lost in the
middle of a stream, or this process ends first, the client receives one error event and no [DONE]. When the client
disconnects, the connection to the runtime is closed at once, which ends the generation. Tokens are counted in every
case.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from aiohttp import web

from lorapool_api.common import HEADER_USAGE
from lorapool_api.openai import ApiError, UnavailableError
from lorapool_gateway.metrics import RequestRecord
from lorapool_gateway.requests.attempt import Accepted
from lorapool_gateway.requests.ending import Ending
from lorapool_gateway.requests.http_client import HttpClientError
from lorapool_gateway.requests.sse import EventFilter, EventTooLongError, error_event, parse_usage

log = logging.getLogger(__name__)

RESPONSE_MAX_BYTES = 64 * 2**20
NEVER_WAITS_BYTES = 16 * 1024
"""A shorter write always fits into an empty write buffer (64 KiB) and so needs no timeout."""
CODE_CLIENT_GONE = 499
CODE_BROKEN_STREAM = 502
SSE = "text/event-stream"


async def relay_whole(accepted: Accepted, record: RequestRecord, ending: Ending) -> bytes:
    """The body of the response. Raises UnavailableError when the runtime is lost; the request is not sent again."""
    response = accepted.response
    record.used(parse_usage(response.headers.get(HEADER_USAGE, "")))
    try:
        async with ending.bound():
            body = await response.read_all(RESPONSE_MAX_BYTES)
    except HttpClientError:
        raise _lost("was lost while it answered") from None
    if body is None:
        raise _lost("sent a response that is too long")
    return body


async def relay_stream(
    request: web.BaseRequest,
    accepted: Accepted,
    record: RequestRecord,
    headers: dict[str, str],
    ending: Ending,
    *,
    write_timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> web.StreamResponse:
    events = EventFilter()
    out = web.StreamResponse(status=200, headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    out.content_type = SSE
    out.charset = "utf-8"
    broken: ApiError | None = None
    record.code = CODE_CLIENT_GONE  # until shown otherwise: this task is cancelled when the client disconnects
    try:
        await out.prepare(request)
        try:
            async with ending.bound():
                while chunk := await accepted.response.read():
                    if data := events.feed(chunk):
                        if record.first_token_s is None:
                            record.first_token_s = clock()
                        await _write(request, out, data, write_timeout_s)
            if not events.done and not events.failed:
                broken = _lost("ended its answer early")
        except (HttpClientError, EventTooLongError) as error:
            broken = _lost(f"was lost mid-answer ({type(error).__name__})")
        except UnavailableError as error:
            broken = error
        if broken is not None:
            await _write(request, out, error_event(broken), write_timeout_s)
        await out.write_eof()
        record.code = CODE_BROKEN_STREAM if broken is not None or events.failed else 200
    except ConnectionError:
        record.used(await accepted.cancel())  # the client has disconnected
    except asyncio.CancelledError:
        record.used(await accepted.cancel())
        raise
    finally:
        record.used(events.usage())
        accepted.close()
    if broken is not None:
        log.warning(
            "stream was cut off",
            extra={"replica": accepted.replica.endpoint.pod_name, "error": broken.message},
        )
    return out


async def _write(request: web.BaseRequest, out: web.StreamResponse, data: bytes, timeout_s: float) -> None:
    """Raises ConnectionError when the client has disconnected or reads too slowly."""
    transport = request.transport
    try:
        if transport is not None and not transport.get_write_buffer_size() and len(data) < NEVER_WAITS_BYTES:
            await out.write(data)
            return
        async with asyncio.timeout(timeout_s):
            await out.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionAbortedError("the client reads too slowly") from None


def _lost(what: str) -> ApiError:
    return UnavailableError(f"The runtime {what}.", code="upstream_lost", retry_after_s=1)
