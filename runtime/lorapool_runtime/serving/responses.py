"""One inference request becomes one HTTP answer, whole or streamed, with the headers and usage of the internal hop.

`server` calls `Inference.answer` with a parsed request. When the client leaves, aiohttp cancels the handler and the
generation is ended; a client that takes nothing for too long is dropped. An error before the first byte is raised
for `server` to answer; after it the stream says so and closes without [DONE].
"""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from lorapool_api.common import HEADER_ADAPTER, HEADER_COLD_START, HEADER_REQUEST_ID, HEADER_USAGE
from lorapool_api.openai import ServerError
from lorapool_api.protocol import USAGE_COMMENT, Usage
from lorapool_runtime.engines.interface import FinishReason
from lorapool_runtime.openai.generation import Delta
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest
from lorapool_runtime.openai.response import DONE_EVENT, Answer, Head, data_event
from lorapool_runtime.serving.service import Running, Runtime

log = logging.getLogger(__name__)

NEVER_WAITS_BYTES = 16 * 1024
"""So little fits an empty write buffer (64 KiB before a write waits): its time need not be bounded."""
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
"""Set by `server` for every request."""


class Inference:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def answer(self, request: web.Request, parsed: ChatRequest | CompletionRequest) -> web.StreamResponse:
        started_s = self._runtime.clock.now_s()
        running = await self._runtime.begin(parsed, request.headers.get(HEADER_ADAPTER))
        try:
            pace = _Pace(self._runtime, started_s)
            answer = self._opened(parsed, running)
            if parsed.stream:
                return await self._stream(request, parsed, running, answer, pace)
            return await self._whole(request, running, answer, pace)
        finally:
            running.generation.cancel()

    def _opened(self, parsed: ChatRequest | CompletionRequest, running: Running) -> Answer:
        codec = self._runtime.codec
        head = Head(
            chat=isinstance(parsed, ChatRequest),
            model=parsed.model,
            created_unix_s=int(self._runtime.clock.unix_s()),
            fingerprint=running.fingerprint,
            include_usage=parsed.include_usage,
        )
        return Answer(
            head,
            choices=running.sequences,
            top_logprobs=parsed.sampling.top_logprobs,
            echo=running.echo,
            tools=codec.tool_format if isinstance(parsed, ChatRequest) and parsed.tools.active else None,
            token_text=codec.token_text,
            token_bytes=codec.token_bytes,
        )

    async def _whole(self, request: web.Request, running: Running, answer: Answer, pace: _Pace) -> web.Response:
        left = running.sequences
        usage = running.generation.usage()
        while left:
            delta = await running.generation.next()
            pace.note()
            _raise_if_failed(delta)
            answer.take(delta)
            usage = delta.usage
            left -= delta.finish is not None
        response = web.json_response(answer.whole(usage), headers=_headers(running))
        if _wants_usage(request):
            response.headers[HEADER_USAGE] = usage.model_dump_json()
        return response

    async def _stream(
        self,
        request: web.Request,
        parsed: ChatRequest | CompletionRequest,
        running: Running,
        answer: Answer,
        pace: _Pace,
    ) -> web.StreamResponse:
        delta = await running.generation.next()
        _raise_if_failed(delta)  # nothing is sent yet: an ordinary error
        response = web.StreamResponse(headers={**_headers(running), HEADER_REQUEST_ID: request[REQUEST_ID],
                                               "Content-Type": "text/event-stream; charset=utf-8",
                                               "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # fmt: skip
        await response.prepare(request)
        comment = _usage_comment if _wants_usage(request) else _no_comment
        left = running.sequences
        while True:
            pace.note()
            out = b""
            if delta.finish is FinishReason.ERROR:
                error = ServerError(delta.error or "The engine failed.")
                log.error("stream failed: %s", error.message, extra={"request_id": request[REQUEST_ID]})
                await self._send(request, response, comment(delta.usage) + data_event(error.body()))
                return response  # closed without [DONE]: nobody can take it for whole
            for event in answer.chunks(delta):
                out += comment(delta.usage) + event
            left -= delta.finish is not None
            if not left:
                break
            await self._send(request, response, out)
            delta = await running.generation.next()
        if parsed.include_usage:
            out += comment(delta.usage) + answer.usage_chunk(delta.usage)
        await self._send(request, response, out + comment(delta.usage) + DONE_EVENT)
        await response.write_eof()
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """Writes, unless the client takes nothing for too long; then its connection is closed."""
        try:
            transport = request.transport
            if transport is not None and not transport.get_write_buffer_size() and len(data) < NEVER_WAITS_BYTES:
                await response.write(data)
                return
            async with asyncio.timeout(self._runtime.settings.write_timeout_s):
                await response.write(data)
        except TimeoutError:
            log.warning("client reads too slowly, dropped", extra={"request_id": request[REQUEST_ID]})
            if request.transport is not None:
                request.transport.abort()
            raise


class _Pace:
    """Times between the pieces of one answer, for the histograms."""

    def __init__(self, runtime: Runtime, started_s: float) -> None:
        self._runtime = runtime
        self._last_s = started_s
        self._begun = False

    def note(self) -> None:
        now_s = self._runtime.clock.now_s()
        observe = self._runtime.metrics.next_token if self._begun else self._runtime.metrics.first_token
        observe(now_s - self._last_s)
        self._last_s, self._begun = now_s, True


def _raise_if_failed(delta: Delta) -> None:
    if delta.finish is FinishReason.ERROR:
        raise ServerError(delta.error or "The engine failed.")


def _headers(running: Running) -> dict[str, str]:
    headers = {HEADER_ADAPTER: running.target}
    if running.cold_start_s is not None:
        headers[HEADER_COLD_START] = milliseconds(running.cold_start_s)
    return headers


def milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


def _wants_usage(request: web.Request) -> bool:
    return request.headers.get(HEADER_USAGE) == "1"


def _usage_comment(usage: Usage) -> bytes:
    """Written by hand: it goes before every token."""
    counts = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
    return USAGE_COMMENT + b'{"prompt_tokens":%d,"completion_tokens":%d,"cached_tokens":%d}\n' % counts


def _no_comment(_usage: Usage) -> bytes:
    return b""
