"""The HTTP response of one admitted request, whole or streamed, with the headers and usage of the internal hop.

An error before the first byte is raised, for `server` to answer; after it the stream sends an error event and closes
without [DONE], or with it where the replica shuts down. A gateway is sent the head as soon as the request is admitted,
then the usage so far with each event, and the body of a whole response, or an error, as one event. A client that reads
nothing for too long is disconnected.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web

from lorapool_api.common import HEADER_ADAPTER, HEADER_COLD_START, HEADER_RELAXED, HEADER_REQUEST_ID, HEADER_USAGE
from lorapool_api.openai import ServerError
from lorapool_api.protocol import USAGE_COMMENT, Usage
from lorapool_runtime.clock import Clock
from lorapool_runtime.engines.interface import FinishReason
from lorapool_runtime.metrics import Metrics
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest
from lorapool_runtime.openai.response import DONE_EVENT, Delta, ResponseBuilder, ResponseHead, data_event
from lorapool_runtime.openai.responses_answer import ResponsesBuilder
from lorapool_runtime.openai.responses_request import ResponsesRequest
from lorapool_runtime.openai.tools.relaxation import header_value
from lorapool_runtime.openai.tools.tool_calls import ToolCallReader
from lorapool_runtime.serving.caller import SSE, Caller
from lorapool_runtime.serving.service import AdmittedRequest

log = logging.getLogger(__name__)

NEVER_WAITS_BYTES = 16 * 1024
"""A write of this size fits an empty write buffer (64 KiB before a write waits): it needs no timeout."""
REPORT_INTERVAL_S = 0.5
"""Between two reports of the usage of a whole response. One for each step would take a quarter of the interpreter's
time at 256 sequences, for counts that only matter if this process is killed."""
PIECE_BYTES = 256 * 1024
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
"""Set by `server` for every request."""


class Builder(Protocol):
    """Makes the body, or the events, of one API's response."""

    def add(self, delta: Delta) -> None: ...

    def body(self, usage: Usage) -> dict[str, Any]: ...

    def chunks(self, delta: Delta) -> list[bytes]: ...

    def closing(self, usage: Usage) -> list[bytes]: ...


class Responder:
    def __init__(self, clock: Clock, metrics: Metrics, *, write_timeout_s: float, draining: Callable[[], bool]) -> None:
        self._clock = clock
        self._metrics = metrics
        self._write_timeout_s = write_timeout_s
        self._draining = draining

    async def respond(
        self,
        request: web.Request,
        parsed: ChatRequest | CompletionRequest,
        admitted: AdmittedRequest,
        caller: Caller,
        *,
        started_s: float,
    ) -> web.StreamResponse:
        """Reads the generation to its end. Raises ServerError if it fails before the first byte is sent."""
        latency = _Latency(self._clock, self._metrics, started_s)
        builder = self._builder(parsed, admitted)
        if parsed.stream:
            return await self._stream(request, parsed, admitted, caller, builder, latency)
        if caller.wants_events:
            return await self._whole_as_events(request, admitted, caller, builder, latency)
        return await self._whole(admitted, caller, builder, latency)

    def _builder(self, parsed: ChatRequest | CompletionRequest, admitted: AdmittedRequest) -> Builder:
        encoded = admitted.encoded
        head = ResponseHead(
            chat=isinstance(parsed, ChatRequest),
            model=parsed.model,
            created_unix_s=int(self._clock.unix_s()),
            fingerprint=admitted.fingerprint,
            include_usage=parsed.include_usage,
            continuous_usage=parsed.continuous_usage,
        )
        tools = encoded.chat.shape.tools if isinstance(parsed, ChatRequest) and parsed.tools.active else None
        if isinstance(parsed, ResponsesRequest):
            reader = None if tools is None else ToolCallReader(tools)
            return ResponsesBuilder(
                head,
                parsed.given,
                reader,
                encoded.reasoning,
                encoded.decoder.token_text,
                encoded.decoder.token_bytes,
            )
        return ResponseBuilder(
            head,
            choices=admitted.sequences,
            top_logprobs=parsed.sampling.top_logprobs,
            echo=encoded.echo,
            tools=tools,
            reasoning=encoded.reasoning,
            token_text=encoded.decoder.token_text,
            token_bytes=encoded.decoder.token_bytes,
        )

    async def _whole(
        self, admitted: AdmittedRequest, caller: Caller, builder: Builder, latency: _Latency
    ) -> web.Response:
        unfinished = admitted.sequences
        usage = admitted.generation.usage()
        while unfinished:
            delta = await admitted.generation.next()
            latency.observe()
            _raise_if_failed(delta)
            builder.add(delta)
            usage = delta.usage
            unfinished -= delta.finish is not None
        response = web.json_response(builder.body(usage), headers=_headers(admitted))
        if caller.wants_usage:
            response.headers[HEADER_USAGE] = usage.model_dump_json()
        return response

    async def _whole_as_events(
        self,
        request: web.Request,
        admitted: AdmittedRequest,
        caller: Caller,
        builder: Builder,
        latency: _Latency,
    ) -> web.StreamResponse:
        response = await self._begin(request, admitted, caller)
        unfinished = admitted.sequences
        usage = admitted.generation.usage()
        reported_s = self._clock.now_s()
        while unfinished:
            for delta in await admitted.generation.next_all():
                usage = delta.usage
                if delta.finish is FinishReason.ERROR:
                    await self._fail(request, response, delta, _usage_comment(usage))
                    return response
                if delta.is_output:
                    latency.observe()
                    builder.add(delta)
                unfinished -= delta.finish is not None
            if unfinished and (now_s := self._clock.now_s()) - reported_s >= REPORT_INTERVAL_S:
                reported_s = now_s
                await self._send(request, response, _usage_comment(usage) + b"\n")
        body = _usage_comment(usage) + data_event(builder.body(usage))
        for start in range(0, len(body), PIECE_BYTES):  # each piece has the whole timeout
            end = start + PIECE_BYTES
            await self._send(request, response, body[start:end], last=end >= len(body))
        return response

    async def _begin(self, request: web.Request, admitted: AdmittedRequest, caller: Caller) -> web.StreamResponse:
        """A response of events whose head is sent."""
        response = web.StreamResponse(headers={**_headers(admitted), HEADER_REQUEST_ID: caller.request_id,
                                               "Content-Type": f"{SSE}; charset=utf-8",
                                               "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # fmt: skip
        await response.prepare(request)
        return response

    async def _fail(
        self, request: web.Request, response: web.StreamResponse, delta: Delta, comment: bytes, end: bytes = b""
    ) -> None:
        """Sends an error as the last event."""
        error = ServerError(delta.error or "The engine failed.")
        log.error("response failed: %s", error.message, extra={"request_id": request[REQUEST_ID]})
        await self._send(request, response, comment + data_event(error.body()) + end, last=True)

    async def _stream(
        self,
        request: web.Request,
        parsed: ChatRequest | CompletionRequest,
        admitted: AdmittedRequest,
        caller: Caller,
        builder: Builder,
        latency: _Latency,
    ) -> web.StreamResponse:
        if caller.wants_events:
            response = await self._begin(request, admitted, caller)
            delta = await admitted.generation.next()
        else:
            delta = await admitted.generation.next()
            _raise_if_failed(delta)  # nothing is sent yet: an ordinary error
            response = await self._begin(request, admitted, caller)
        comment = _usage_comment if caller.wants_usage else _no_comment
        unfinished = admitted.sequences
        while True:
            out = b""
            if delta.finish is FinishReason.ERROR:
                end = DONE_EVENT if self._draining() else b""
                await self._fail(request, response, delta, comment(delta.usage), end)
                return response
            if delta.is_output:
                latency.observe()
                for event in builder.chunks(delta):
                    out += comment(delta.usage) + event
            else:
                out = comment(delta.usage) + b"\n"
            unfinished -= delta.finish is not None
            if not unfinished:
                break
            await self._send(request, response, out)
            delta = await admitted.generation.next()
        for event in builder.closing(delta.usage):
            out += comment(delta.usage) + event
        await self._send(request, response, out, last=True)
        return response

    async def _send(
        self, request: web.Request, response: web.StreamResponse, data: bytes, *, last: bool = False
    ) -> None:
        """Writes `data`, the `last` together with the end of the response: one TLS record, and one read of the gateway.

        Closes the connection and raises TimeoutError if the client reads nothing for too long.
        """
        write = response.write_eof if last else response.write
        try:
            transport = request.transport
            if transport is not None and not transport.get_write_buffer_size() and len(data) < NEVER_WAITS_BYTES:
                await write(data)
                return
            async with asyncio.timeout(self._write_timeout_s):
                await write(data)
        except TimeoutError:
            log.warning("client reads too slowly, disconnected", extra={"request_id": request[REQUEST_ID]})
            if request.transport is not None:
                request.transport.abort()
            raise


class _Latency:
    """Observes the time to the first delta of one response, and the times between its deltas."""

    def __init__(self, clock: Clock, metrics: Metrics, started_s: float) -> None:
        self._clock = clock
        self._metrics = metrics
        self._last_s = started_s
        self._begun = False

    def observe(self) -> None:
        now_s = self._clock.now_s()
        observe = self._metrics.next_token if self._begun else self._metrics.first_token
        observe(now_s - self._last_s)
        self._last_s, self._begun = now_s, True


def _raise_if_failed(delta: Delta) -> None:
    if delta.finish is FinishReason.ERROR:
        raise ServerError(delta.error or "The engine failed.")


def _headers(admitted: AdmittedRequest) -> dict[str, str]:
    headers = {HEADER_ADAPTER: admitted.target}
    if admitted.cold_start_s is not None:
        headers[HEADER_COLD_START] = milliseconds(admitted.cold_start_s)
    if admitted.relaxed:
        headers[HEADER_RELAXED] = header_value(admitted.relaxed)
    return headers


def milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


def _usage_comment(usage: Usage) -> bytes:
    """Formatted by hand, because it precedes every token."""
    counts = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
    return USAGE_COMMENT + b'{"prompt_tokens":%d,"completion_tokens":%d,"cached_tokens":%d}\n' % counts


def _no_comment(_usage: Usage) -> bytes:
    return b""
