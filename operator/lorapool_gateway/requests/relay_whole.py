"""Relays an accepted whole answer to the client, and records its usage.

A short answer is sent when it is complete: that a runtime is lost before is an ordinary error. A long one is passed on
as it arrives, so that its size costs the gateway no memory; if it breaks off, so does the client's connection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web

from lorapool_api.common import HEADER_USAGE
from lorapool_api.openai import ServerError, UnavailableError
from lorapool_api.usage_protocol import AttemptEnd
from lorapool_gateway.ledger.attempts import end_of
from lorapool_gateway.metrics import RequestRecord
from lorapool_gateway.requests.attempt import Accepted
from lorapool_gateway.requests.ending import Ending
from lorapool_gateway.requests.http_response import HttpClientError
from lorapool_gateway.requests.refusal import Passed
from lorapool_gateway.requests.relay import CODE_BROKEN_STREAM, CODE_CLIENT_GONE, Streamed, lost, write
from lorapool_gateway.requests.sse import EventTooLongError, WholeAnswer, is_error, parse_usage

log = logging.getLogger(__name__)

SHORT_BYTES = 2**20
JSON_MAX_BYTES = 64 * 2**20


async def relay_whole(
    request: web.BaseRequest,
    accepted: Accepted,
    record: RequestRecord,
    headers: Callable[[], dict[str, str]],
    ending: Ending,
    deadline: float,
    *,
    write_timeout_s: float,
) -> bytes | Passed | web.StreamResponse:
    """The body of a short response, the error that the runtime reports in it, or the long response that was sent.

    Raises UnavailableError when the runtime is lost before anything was sent; the request is not sent again.
    """
    if not accepted.sends_events:
        return await _json_alone(accepted, record, ending, deadline)
    answer = WholeAnswer()
    record.live = answer.usage
    sent: web.StreamResponse | None = None
    complete = False
    try:
        try:
            with ending.bound(deadline):
                is_short = await _read_short(accepted, answer)
        except (HttpClientError, EventTooLongError):
            raise lost("was lost while it answered") from None
        if is_short:
            complete = True
        else:
            sent = Streamed(headers={**headers(), "Content-Type": "application/json"})
            complete = await _pass_on(request, sent, accepted, answer, record, ending, deadline, write_timeout_s)
    finally:
        if not complete:
            record.used(await accepted.cancel())
        record.used(answer.usage())
    if sent is not None:
        if not complete and request.transport is not None:
            request.transport.abort()  # it ends without the end of the body
        return sent
    body = answer.body()
    if body is None:
        raise lost("ended its answer early")
    if is_error(body):
        record.ended = AttemptEnd.FAILED
        return Passed(ServerError.status, body, None)
    return body


async def _read_short(accepted: Accepted, answer: WholeAnswer) -> bool:
    """Reads the answer to its end; False if it is longer than SHORT_BYTES."""
    while chunk := await accepted.response.read():
        answer.feed(chunk)
        if answer.size > SHORT_BYTES:
            return False
    return True


async def _pass_on(
    request: web.BaseRequest,
    out: web.StreamResponse,
    accepted: Accepted,
    answer: WholeAnswer,
    record: RequestRecord,
    ending: Ending,
    deadline: float,
    write_timeout_s: float,
) -> bool:
    """Sends what has arrived and what follows; returns whether the client has received all of it."""
    record.code = CODE_CLIENT_GONE  # until shown otherwise: this task is cancelled when the client disconnects
    try:
        await out.prepare(request)
        await write(request, out, answer.take(), write_timeout_s)
        with ending.bound(deadline):
            while chunk := await accepted.response.read():
                answer.feed(chunk)
                await write(request, out, answer.take(), write_timeout_s)
        if answer.body() is None:
            raise lost("ended its answer early")
        await out.write_eof()
    except ConnectionError:
        record.ended = AttemptEnd.CLIENT_LEFT
        return False
    except (HttpClientError, UnavailableError) as error:
        record.ended = end_of(error) if isinstance(error, UnavailableError) else AttemptEnd.LOST
        record.code = CODE_BROKEN_STREAM
        log.warning("answer was cut off", extra={"replica": accepted.replica.endpoint.pod_name, "error": str(error)})
        return False
    record.code, record.ended = 200, AttemptEnd.COMPLETED
    return True


async def _json_alone(accepted: Accepted, record: RequestRecord, ending: Ending, deadline: float) -> bytes:
    """The body of an answer that is no events: of tokens, or of a runtime of an earlier version."""
    response = accepted.response
    record.used(parse_usage(response.headers.get(HEADER_USAGE, "")))
    try:
        with ending.bound(deadline):
            body = await response.read_all(JSON_MAX_BYTES)
    except HttpClientError:
        raise lost("was lost while it answered") from None
    if body is None:
        raise lost("sent a response that is too long")
    return body
