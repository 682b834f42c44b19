"""The HTTP surface in the shape of OpenAI's API: routes, limits, and the one place that turns errors into responses.

It knows nothing of Kubernetes: the route table, the API keys and the dispatcher are passed in.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from lorapool_api.common import HEADER_ADAPTER, HEADER_COLD_START, HEADER_PROCESSING_MS, HEADER_REQUEST_ID
from lorapool_api.openai import (
    ApiError,
    InvalidRequestError,
    MethodNotAllowedError,
    PayloadTooLargeError,
    RouteNotFoundError,
    ServerError,
    TooManyRequestsError,
    UnauthenticatedError,
    UnavailableError,
)
from lorapool_api.protocol import ROUTE_CHAT, ROUTE_COMPLETIONS, ROUTE_MODELS
from lorapool_gateway.metrics import Metrics, RequestRecord
from lorapool_gateway.requests.attempt import Passed
from lorapool_gateway.requests.dispatch import Dispatcher
from lorapool_gateway.requests.ending import Ending
from lorapool_gateway.requests.relay import CODE_CLIENT_GONE, SSE, relay_stream, relay_whole
from lorapool_gateway.requests.request import parse_request, request_id
from lorapool_gateway.routing.auth import ApiKey, authenticate
from lorapool_gateway.routing.live_tables import KeySource, RouteSource
from lorapool_gateway.routing.objects import AdapterRoute
from lorapool_gateway.routing.routes import Entry
from lorapool_gateway.settings import Settings

log = logging.getLogger(__name__)

KEEPALIVE_S = 75.0
"""Longer than the idle timeout of common load balancers, so that they close the connection first."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(slots=True)
class _Exchange:
    """One client request with its id and its record for the metrics."""

    request: web.BaseRequest
    id: str
    record: RequestRecord

    def headers(self, *, failed: bool = False) -> dict[str, str]:
        """The headers of every response. The adapter header is left out of a failed one."""
        record = self.record
        headers = {
            HEADER_REQUEST_ID: self.id,
            HEADER_PROCESSING_MS: str(round((time.monotonic() - record.started_s) * 1000)),
        }
        if record.identity is not None and not failed:
            headers[HEADER_ADAPTER] = record.identity
        if record.cold_ms is not None:
            headers[HEADER_COLD_START] = str(record.cold_ms)
        return headers


Handler = Callable[[_Exchange], Awaitable[web.StreamResponse]]


class Gateway:
    def __init__(
        self, settings: Settings, routes: RouteSource, keys: KeySource, dispatcher: Dispatcher, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._routes = routes
        self._keys = keys
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._by_key: Counter[str] = Counter()
        self.in_flight = 0
        metrics.in_flight.set_function(lambda: self.in_flight)
        self.idle = asyncio.Event()
        """Set while no request is in flight."""
        self.idle.set()
        self.draining = False
        """True after SIGTERM: responses then ask clients to open their next connection elsewhere."""
        self._ending = Ending()

        self._routes_by_path: dict[str, dict[str, Handler]] = {
            ROUTE_CHAT: {"POST": self._infer},
            ROUTE_COMPLETIONS: {"POST": self._infer},
            ROUTE_MODELS: {"GET": self._list_models, "HEAD": self._list_models},
        }

    def server(self) -> web.Server:
        """aiohttp's server without its application object: four routes need no router and no signals."""

        def make(
            message: RawRequestMessage,
            payload: StreamReader,
            protocol: RequestHandler,
            writer: AbstractStreamWriter,
            task: asyncio.Task[None],
        ) -> web.BaseRequest:
            loop = asyncio.get_running_loop()
            bound = self._settings.max_body_bytes
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=bound)

        # handler_cancellation: a client that disconnects cancels its handler, which ends the wait and the generation.
        return web.Server(
            self.handle,
            request_factory=make,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEEPALIVE_S,
        )

    def end_requests(self) -> None:
        """Answers every request in flight with an error: a stream by its last event, others by 503."""
        self._ending.end()

    # --- handlers

    def _handler(self, request: web.BaseRequest) -> Handler:
        """The handler of this path and method. Raises RouteNotFoundError, MethodNotAllowedError."""
        path = request.path
        methods = self._routes_by_path.get(path)
        if methods is None:
            if not path.startswith(ROUTE_MODELS + "/") or path == ROUTE_MODELS + "/":
                raise RouteNotFoundError(f"There is no {request.method} {path[:200]}.")
            methods = {"GET": self._get_model, "HEAD": self._get_model}
        handler = methods.get(request.method)
        if handler is None:
            allowed = ", ".join(sorted(methods.keys() - {"HEAD"}))
            raise _MethodError(f"{request.method} is not allowed here; use {allowed}.", allowed)
        return handler

    async def _infer(self, exchange: _Exchange) -> web.StreamResponse:
        request, record = exchange.request, exchange.record
        key = authenticate(self._keys.table, request.headers.get("Authorization"))
        with self._admitted(key):
            async with self._ending.bound():
                parsed = parse_request(request.path, await self._body(request), key.tenant)
                result = await self._dispatcher.dispatch(parsed, key, exchange.id, record)
            headers = exchange.headers()
            if isinstance(result, Passed):
                if result.retry_after is not None:
                    headers["Retry-After"] = result.retry_after
                return _json(result.body, headers, result.status)
            try:
                if parsed.stream and result.response.headers.get("content-type", "").startswith(SSE):
                    timeout_s = self._settings.write_timeout_s
                    return await relay_stream(request, result, record, headers, self._ending, write_timeout_s=timeout_s)
                return _json(await relay_whole(result, record, self._ending), headers)
            finally:
                result.close()

    async def _list_models(self, exchange: _Exchange) -> web.StreamResponse:
        key = authenticate(self._keys.table, exchange.request.headers.get("Authorization"))
        table = self._routes.table
        data = [_model(entry, name) for entry in table.visible(key) for name in table.names_of(entry, key)]
        return _json(json.dumps({"object": "list", "data": data}).encode(), exchange.headers())

    async def _get_model(self, exchange: _Exchange) -> web.StreamResponse:
        key = authenticate(self._keys.table, exchange.request.headers.get("Authorization"))
        name = exchange.request.path.removeprefix(ROUTE_MODELS + "/")
        return _json(json.dumps(_model(self._routes.table.find(name, key), name)).encode(), exchange.headers())

    # --- limits

    @contextmanager
    def _admitted(self, key: ApiKey) -> Iterator[None]:
        """Counts the request against the limits of the process and of its key. Raises TooManyRequestsError."""
        if self.in_flight > self._settings.max_requests:  # this one is counted already
            raise TooManyRequestsError("The gateway is full.", retry_after_s=1)
        if key.max_in_flight is not None and self._by_key[key.id] >= key.max_in_flight:
            raise TooManyRequestsError(
                f"This API key may have {key.max_in_flight} requests in flight at one time.",
                code="key_in_flight_exceeded",
                retry_after_s=1,
            )
        self._by_key[key.id] += 1
        try:
            yield
        finally:
            self._by_key[key.id] -= 1
            if self._by_key[key.id] <= 0:
                del self._by_key[key.id]

    async def _body(self, request: web.BaseRequest) -> bytes:
        bound = self._settings.max_body_bytes
        if request.content_length is not None and request.content_length > bound:
            raise _too_large(bound)
        try:
            if request.content.is_eof() and "Content-Encoding" not in request.headers:
                body = request.content.read_nowait()  # a short body arrived together with its headers: no wait
                if len(body) > bound:
                    raise _too_large(bound)
                return body
            if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
                request.transport.write(CONTINUE)
            async with asyncio.timeout(self._settings.body_timeout_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise _too_large(bound) from None
        except TimeoutError:
            raise InvalidRequestError("The request body was not sent in time.", code="body_timeout") from None
        except ValueError:
            raise InvalidRequestError("The request body cannot be decoded.", code="invalid_body") from None

    # --- one place for all responses

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        record = RequestRecord(started_s=time.monotonic())
        exchange = _Exchange(request, request_id(request.headers.get(HEADER_REQUEST_ID)), record)
        self.in_flight += 1
        self.idle.clear()
        try:
            response = await self._answer(exchange)
            if not response.prepared:
                record.code = response.status
            if self.draining:
                response.force_close()
            return response
        except asyncio.CancelledError:
            record.code = CODE_CLIENT_GONE
            raise
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self.idle.set()
            if request.path in (ROUTE_CHAT, ROUTE_COMPLETIONS):
                self._metrics.finish(record, time.monotonic())

    async def _answer(self, exchange: _Exchange) -> web.StreamResponse:
        try:
            return await self._handler(exchange.request)(exchange)
        except ApiError as error:
            if isinstance(error, UnauthenticatedError):
                # For audits: a key was refused and where the request came from; nothing of the key itself.
                log.info("key refused", extra={"request_id": exchange.id, "remote": exchange.request.remote})
            return _error_response(exchange, error)
        except (asyncio.CancelledError, ConnectionError):
            raise  # the client has disconnected
        except Exception:
            log.exception("unexpected error", extra={"request_id": exchange.id})
            return _error_response(exchange, ServerError("The gateway made an error; its log has the request id."))


class _MethodError(MethodNotAllowedError):
    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "Allow": self.allowed}


def _error_response(exchange: _Exchange, error: ApiError) -> web.Response:
    if error.status >= 500 and not isinstance(error, UnavailableError):
        log.error("answered %d", error.status, extra={"request_id": exchange.id, "error": error.message})
    body = json.dumps(error.body()).encode()
    return _json(body, {**exchange.headers(failed=True), **error.headers()}, error.status)


def _json(body: bytes, headers: dict[str, str], status: int = 200) -> web.Response:
    headers["Content-Type"] = "application/json"
    return web.Response(body=body, status=status, headers=headers)


def _model(entry: Entry, name: str) -> dict[str, Any]:
    """The object under one of its names; `root` is the name that never changes its meaning."""
    model: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": int(entry.created_unix_s),
        "owned_by": entry.ref.namespace,
        "root": str(entry.ref),
    }
    if isinstance(entry, AdapterRoute):
        model["parent"] = str(entry.base_ref)
    return model


def _too_large(bound: int) -> ApiError:
    return PayloadTooLargeError(f"The request body must not be larger than {bound} bytes.")
