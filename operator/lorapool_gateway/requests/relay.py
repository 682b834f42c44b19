"""Relays an accepted stream to the client, and records its usage.

Backpressure is passed on: no more is read from the runtime than the client takes. When the runtime is lost in the
middle of a stream, the client receives one error event and no [DONE]; when this process ends it, one error event and
[DONE]. When the client disconnects, the generation is ended at once. Tokens are counted in every case: an answer that
does not end by itself is cancelled at the runtime, which responds with its final usage; if the runtime is lost, the
last usage it sent counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from aiohttp import hdrs, web

from lorapool_api.openai import ApiError, ServerError, UnavailableError
from lorapool_api.usage_protocol import AttemptEnd
from lorapool_gateway.ledger.attempts import end_of
from lorapool_gateway.metrics import RequestRecord
from lorapool_gateway.requests.attempt import SSE, Accepted
from lorapool_gateway.requests.ending import Ending
from lorapool_gateway.requests.http_response import HttpClientError
from lorapool_gateway.requests.refusal import Passed
from lorapool_gateway.requests.sse import (
    DONE_EVENT,
    EventFilter,
    EventTooLongError,
    error_event,
    error_in,
)

log = logging.getLogger(__name__)

NEVER_WAITS_BYTES = 16 * 1024
"""A shorter write always fits into an empty write buffer (64 KiB) and so needs no timeout."""
CODE_CLIENT_GONE = 499
CODE_BROKEN_STREAM = 502


class Streamed(web.StreamResponse):
    """A response whose head is sent together with its first part: each write is a call of the system."""

    _send_headers_immediately = False


async def relay_stream(
    request: web.BaseRequest,
    accepted: Accepted,
    record: RequestRecord,
    headers: Callable[[], dict[str, str]],
    ending: Ending,
    deadline: float,
    *,
    write_timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> web.StreamResponse | Passed:
    """Streams the events to the client, whose response begins with the first one.

    Before that, an error is an ordinary one: returned where the runtime reports it, raised as UnavailableError where
    the runtime is lost.
    """
    events = EventFilter()
    record.live = events.usage
    try:
        first = await _first_events(accepted, events, ending, deadline)
        if (error := error_in(first)) is not None:
            record.ended = AttemptEnd.FAILED
            return Passed(ServerError.status, error, None)
        record.first_token_s = clock()
        out = Streamed(headers={**headers(), "Content-Type": f"{SSE}; charset=utf-8",
                                "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # fmt: skip
        record.code = CODE_CLIENT_GONE  # until shown otherwise: this task is cancelled when the client disconnects
        await out.prepare(request)
        broken = await _pass_on(request, out, accepted, events, first, ending, deadline, write_timeout_s)
        if broken is not None:
            end = b"" if broken.code == "upstream_lost" else DONE_EVENT  # a lost answer must not look complete
            await write(request, out, error_event(broken) + end, write_timeout_s)
        await out.write_eof()
        record.code = CODE_BROKEN_STREAM if broken is not None or events.failed else 200
        if broken is not None:
            record.ended = end_of(broken)
        else:
            record.ended = AttemptEnd.FAILED if events.failed else AttemptEnd.COMPLETED
    except ConnectionError:
        record.ended = AttemptEnd.CLIENT_LEFT
        return out  # the client has disconnected
    finally:
        if not (events.done or events.failed):
            record.used(await accepted.cancel())
        record.used(events.usage())
        accepted.close()
    if broken is not None:
        log.warning(
            "stream was cut off",
            extra={"replica": accepted.replica.endpoint.pod_name, "error": broken.message},
        )
    return out


async def _first_events(accepted: Accepted, events: EventFilter, ending: Ending, deadline: float) -> bytes:
    try:
        with ending.bound(deadline):
            while chunk := await accepted.response.read():
                if data := events.feed(chunk):
                    return data
    except (HttpClientError, EventTooLongError):
        raise lost("was lost before it answered") from None
    raise lost("ended its answer early")


async def _pass_on(
    request: web.BaseRequest,
    out: web.StreamResponse,
    accepted: Accepted,
    events: EventFilter,
    first: bytes,
    ending: Ending,
    deadline: float,
    write_timeout_s: float,
) -> ApiError | None:
    """Passes on the first events and all others; returns why they broke off, None if they are complete."""
    if _is_end(accepted, events):
        await write(request, out, first, write_timeout_s, last=True)
        return None
    await write(request, out, first, write_timeout_s)
    if out.headers.get(hdrs.TRANSFER_ENCODING) == "chunked":
        accepted.response.take = partial(_send_at_once, request, events)
    try:
        with ending.bound(deadline):
            while chunk := await accepted.response.read():
                if data := events.feed(chunk):
                    await write(request, out, data, write_timeout_s, last=_is_end(accepted, events))
    except (HttpClientError, EventTooLongError) as error:
        return lost(f"was lost mid-answer ({type(error).__name__})")
    except UnavailableError as error:
        return error
    return None if events.done or events.failed else lost("ended its answer early")


def _send_at_once(request: web.BaseRequest, events: EventFilter, data: bytes) -> bool:
    """Sends whole events that a client takes without a wait; returns False if anything is to be waited for."""
    transport = request.transport
    if (
        transport is None
        or transport.is_closing()
        or transport.get_write_buffer_size()
        or len(data) >= NEVER_WAITS_BYTES
        or not events.is_whole(data)
    ):
        return False
    if kept := events.feed(data):
        transport.write(b"%x\r\n%b\r\n" % (len(kept), kept))
    return True


def _is_end(accepted: Accepted, events: EventFilter) -> bool:
    return accepted.response.is_complete and (events.done or events.failed)


async def write(
    request: web.BaseRequest, out: web.StreamResponse, data: bytes, timeout_s: float, *, last: bool = False
) -> None:
    """Writes a part of the response, the `last` one together with the end of the response.

    Raises ConnectionError when the client has disconnected or reads too slowly.
    """
    transport = request.transport
    send = out.write_eof if last else out.write
    try:
        if transport is not None and not transport.get_write_buffer_size() and len(data) < NEVER_WAITS_BYTES:
            await send(data)
            return
        async with asyncio.timeout(timeout_s):
            await send(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionAbortedError("the client reads too slowly") from None


def lost(what: str) -> ApiError:
    return UnavailableError(f"The runtime {what}.", code="upstream_lost", retry_after_s=1)
