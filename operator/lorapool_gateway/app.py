"""The HTTP surface in the shape of OpenAI's API: routes, limits, and the one place that turns errors into responses.

It knows nothing of Kubernetes: the route table, the API keys and the dispatcher are passed in.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import web

from lorapool_api.common import (
    HEADER_ADAPTER,
    HEADER_COLD_START,
    HEADER_PROCESSING_MS,
    HEADER_RELAXED,
    HEADER_REQUEST_ID,
)
from lorapool_api.logs import audit
from lorapool_api.openai import (
    ApiError,
    MethodNotAllowedError,
    RouteNotFoundError,
    ServerError,
    TooManyRequestsError,
    UnavailableError,
)
from lorapool_api.protocol import (
    ALIVE_ROUTES,
    INFERENCE_ROUTES,
    ROUTE_MODELS,
    ROUTE_OPENAPI,
    ROUTE_RESPONSES,
    ROUTE_VERSION,
    TOKEN_ROUTES,
)
from lorapool_api.release import release
from lorapool_api.usage_protocol import AttemptEnd
from lorapool_gateway.connections import ConnectionLimits, Server
from lorapool_gateway.cors import Cors
from lorapool_gateway.ledger.attempts import Attempts, end_of, payer
from lorapool_gateway.ledger.forward import ROUTE_ORGANIZATION, Forwarder
from lorapool_gateway.metrics import Metrics, RequestRecord
from lorapool_gateway.quotas.admission import NOTHING, Quotas, Reservation
from lorapool_gateway.requests.attempt import Accepted
from lorapool_gateway.requests.body import BodyBudget, HeldBody, read_body
from lorapool_gateway.requests.dispatch import Dispatcher
from lorapool_gateway.requests.ending import Ending
from lorapool_gateway.requests.refusal import Passed
from lorapool_gateway.requests.relay import CODE_CLIENT_GONE, relay_stream
from lorapool_gateway.requests.relay_whole import relay_whole
from lorapool_gateway.requests.request import InferenceRequest, parse_request, request_id
from lorapool_gateway.routing.auth import ApiKey
from lorapool_gateway.routing.key_guard import KeyGuard
from lorapool_gateway.routing.live_tables import RouteSource
from lorapool_gateway.routing.model_lists import ModelLists, model_object
from lorapool_gateway.routing.objects import BaseRoute
from lorapool_gateway.settings import Settings
from lorapool_gateway.tuning.routes import Handler as TuningHandler
from lorapool_gateway.tuning.routes import Tuning, TuningCall, caller_for

log = logging.getLogger(__name__)

AUDITED = (401, 403, 404, 429)
"""Statuses of requests that a key, a permission or a limit forbids; a forbidden model looks like a missing one."""
OPENAPI = Path(__file__).with_name("openapi.json").read_bytes()
"""Written by `make generate`."""
ABSENT = {
    "/v1/embeddings": " The models of this server generate text; they have no embeddings.",
    "/v1/messages": " Put a proxy in front that speaks both APIs, such as LiteLLM's.",
    ROUTE_RESPONSES: " No answers are stored; `POST /v1/responses` makes one.",
    "/v1/files": " This release has no store for files; the chart's store.enabled makes one.",
    "/v1/fine_tuning": " This release has no store for files; the chart's store.enabled makes one.",
    "/v1/uploads": " Files are uploaded as a whole, with `POST /v1/files`.",
}
"""What an unknown path may look for, and what to do."""
KEY_SHARE = 8
"""A key has at most this many times as many requests in flight as there is room for, so that a part of the room, a
ninth while there is one key alone, is always left for keys that have none."""


@dataclass(slots=True)
class _Exchange:
    """One client request with its id and its record for the metrics."""

    request: web.BaseRequest
    id: str
    record: RequestRecord
    cors: dict[str, str]
    """Headers for a page of another origin."""
    key: ApiKey | None = None
    """None before the request is authenticated."""
    reserved: Reservation = NOTHING
    """What it has reserved of its quotas."""

    def headers(self, *, failed: bool = False) -> dict[str, str]:
        """The headers of every response. The adapter header is left out of a failed one."""
        record = self.record
        headers = {
            **self.cors,
            HEADER_REQUEST_ID: self.id,
            HEADER_PROCESSING_MS: str(round((time.monotonic() - record.started_s) * 1000)),
        }
        if self.reserved is not NOTHING:
            headers |= self.reserved.headers()
        if record.identity is not None and not failed:
            headers[HEADER_ADAPTER] = record.identity
        if record.cold_ms is not None:
            headers[HEADER_COLD_START] = str(record.cold_ms)
        if record.relaxed is not None:
            headers[HEADER_RELAXED] = record.relaxed
        return headers


Handler = Callable[[_Exchange], Awaitable[web.StreamResponse]]


class Gateway:
    def __init__(
        self,
        settings: Settings,
        routes: RouteSource,
        keys: KeyGuard,
        dispatcher: Dispatcher,
        metrics: Metrics,
        attempts: Attempts | None = None,
        forwarder: Forwarder | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self._settings = settings
        self._routes = routes
        self._keys = keys
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._attempts = attempts or Attempts()
        self._forwarder = forwarder or Forwarder(None)
        self._quotas = quotas
        self._tuning: Tuning | None = None
        self._by_key: Counter[str] = Counter()
        self._bodies = BodyBudget(settings.max_held_body_bytes, settings.max_held_body_bytes_per_key)
        self.in_flight = 0
        metrics.in_flight.set_function(lambda: self.in_flight)
        metrics.held_body_bytes.set_function(lambda: self._bodies.held)
        self.idle = asyncio.Event()
        """Set while no request is in flight."""
        self.idle.set()
        self.draining = False
        """True after SIGTERM: responses then ask clients to open their next connection elsewhere."""
        self._ending = Ending(settings.deadline_s)
        self._model_lists = ModelLists()
        self._cors = Cors(settings.cors_origins)

        self._routes_by_path: dict[str, dict[str, Handler]] = {
            **{route: {"POST": self._infer} for route in (*INFERENCE_ROUTES, *TOKEN_ROUTES)},
            ROUTE_MODELS: {"GET": self._list_models, "HEAD": self._list_models},
            ROUTE_OPENAPI: {"GET": self._openapi, "HEAD": self._openapi},
            ROUTE_VERSION: {"GET": self._version, "HEAD": self._version},
            **{route: {"GET": self._alive, "HEAD": self._alive} for route in ALIVE_ROUTES},
        }

    def server(self) -> Server:
        """aiohttp's server without its application object: four routes need no router and no signals."""
        settings = self._settings
        limits = ConnectionLimits(
            settings.max_connections, settings.max_connections_per_address, settings.head_timeout_s
        )
        return Server(self.handle, limits, self._metrics.connection_refused)

    def use_tuning(self, tuning: Tuning) -> None:
        """Serves files and fine-tuning jobs as well. Called before the first request."""
        self._tuning = tuning

    def end_requests(self) -> None:
        """Answers every request in flight with an error: a stream by its last event, others by 503."""
        self._ending.end()

    # --- handlers

    def _methods(self, path: str) -> dict[str, Handler]:
        """The handlers of a path by method. Raises RouteNotFoundError."""
        methods = self._routes_by_path.get(path)
        if methods is not None:
            return methods
        if path.startswith(ROUTE_MODELS + "/") and path != ROUTE_MODELS + "/":
            methods = {"GET": self._get_model, "HEAD": self._get_model}
            return methods if self._tuning is None else {**methods, "DELETE": self._delete_model}
        if path.startswith(ROUTE_ORGANIZATION):
            return {"GET": self._forward}
        if self._tuning is not None and (found := self._tuning.handlers(path)) is not None:
            return {method: partial(self._tune, handler) for method, handler in found.items()}
        why = next((why for absent, why in ABSENT.items() if path == absent or path.startswith(absent + "/")), "")
        raise RouteNotFoundError(f"There is no {path[:200]}.{why}")

    def _handler(self, request: web.BaseRequest) -> Handler:
        """The handler of this path and method. Raises RouteNotFoundError, MethodNotAllowedError."""
        methods = self._methods(request.path)
        handler = methods.get(request.method)
        if handler is not None:
            return handler
        permission = self._cors.preflight(request.headers, methods) if request.method == "OPTIONS" else None
        if permission is not None:
            return partial(_permit, permission)
        allowed = ", ".join(sorted(methods.keys() - {"HEAD"}))
        raise _MethodError(f"{request.method} is not allowed here; use {allowed}.", allowed)

    async def _infer(self, exchange: _Exchange) -> web.StreamResponse:
        request, record = exchange.request, exchange.record
        key = self._key(exchange)
        deadline = self._ending.deadline()
        self._admit(key)
        try:
            body = HeldBody(self._bodies, key.id)
            try:
                with self._ending.bound(deadline):
                    await self._read_body(request, body)
                    parsed = parse_request(request.path, body, key.tenant)
                    if self._quotas is not None:
                        await self._reserve(exchange, key, parsed)
                    result = await self._dispatcher.dispatch(parsed, key, exchange.id, record)
            finally:
                body.drop()
            if isinstance(result, Passed):
                return _passed(result, exchange.headers())
            try:
                answer = await self._relay(exchange, result, parsed.stream, deadline)
            finally:
                result.close()
        finally:
            self._leave(key)
        if isinstance(answer, Passed):
            return _passed(answer, exchange.headers())
        if not isinstance(answer, bytes):
            return answer
        record.ended = AttemptEnd.COMPLETED
        return _json(answer, exchange.headers())

    async def _reserve(self, exchange: _Exchange, key: ApiKey, parsed: InferenceRequest) -> None:
        """Raises ApiError where a quota does not permit the request."""
        if self._quotas is None or parsed.route not in INFERENCE_ROUTES or not self._quotas.concern(key):
            return
        table, record = self._routes.table, exchange.record
        entry = table.find(parsed.model, key)
        base = entry if isinstance(entry, BaseRoute) else table.bases.get(entry.base_ref)
        record.project = payer(entry, key)
        context = base.spec.max_model_len if base is not None else None
        exchange.reserved = await self._quotas.admit(key, entry, context, parsed.body)
        exchange.reserved.usage = record.usage_so_far

    async def _relay(
        self, exchange: _Exchange, accepted: Accepted, stream: bool, deadline: float
    ) -> web.StreamResponse | Passed | bytes:
        relay = relay_stream if stream and accepted.sends_events else relay_whole
        return await relay(
            exchange.request,
            accepted,
            exchange.record,
            exchange.headers,
            self._ending,
            deadline,
            write_timeout_s=self._settings.write_timeout_s,
        )

    def _key(self, exchange: _Exchange) -> ApiKey:
        exchange.key = self._keys.authenticate(exchange.request.headers.get("Authorization"))
        return exchange.key

    async def _list_models(self, exchange: _Exchange) -> web.StreamResponse:
        key = self._key(exchange)
        return _json(self._model_lists.body(self._routes.table, key), exchange.headers())

    async def _openapi(self, exchange: _Exchange) -> web.StreamResponse:
        self._key(exchange)
        return _json(OPENAPI, exchange.headers())

    async def _alive(self, exchange: _Exchange) -> web.StreamResponse:
        status = UnavailableError.status if self.draining else 200
        return _json(b"{}", exchange.headers(), status)

    async def _version(self, exchange: _Exchange) -> web.StreamResponse:
        self._key(exchange)
        return _json(json.dumps({"version": release()}).encode(), exchange.headers())

    async def _get_model(self, exchange: _Exchange) -> web.StreamResponse:
        key = self._key(exchange)
        name = exchange.request.path.removeprefix(ROUTE_MODELS + "/")
        table = self._routes.table
        return _json(json.dumps(model_object(table, table.find(name, key), name)).encode(), exchange.headers())

    async def _forward(self, exchange: _Exchange) -> web.StreamResponse:
        self._key(exchange)
        return await self._forwarder.forward(exchange.request, exchange.headers)

    async def _tune(self, handler: TuningHandler, exchange: _Exchange) -> web.StreamResponse:
        request, key = exchange.request, self._key(exchange)
        caller = caller_for(key, request)
        self._admit(key)
        try:
            body = HeldBody(self._bodies, key.id)

            async def read() -> bytes:
                await self._read_body(request, body)
                return body.data

            try:
                answer = await handler(TuningCall(request, caller, exchange.headers, read))
            finally:
                body.drop()
        finally:
            self._leave(key)
        return (
            answer if isinstance(answer, web.StreamResponse) else _json(json.dumps(answer).encode(), exchange.headers())
        )

    async def _delete_model(self, exchange: _Exchange) -> web.StreamResponse:
        assert self._tuning is not None  # or there is no such method
        name = exchange.request.path.removeprefix(ROUTE_MODELS + "/")
        return await self._tune(partial(self._tuning.delete_model, name), exchange)

    # --- limits

    async def _read_body(self, request: web.BaseRequest, body: HeldBody) -> None:
        settings = self._settings
        await read_body(request, body, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)

    def _admit(self, key: ApiKey) -> None:
        """Counts the request against the limits of the process and of its key, until `_leave`.

        Raises TooManyRequestsError.
        """
        if self.in_flight > self._settings.max_requests:  # this one is counted already
            raise TooManyRequestsError("The gateway is full.", retry_after_s=1)
        if self._by_key[key.id] > KEY_SHARE * (self._settings.max_requests - self.in_flight):
            raise TooManyRequestsError(
                "The gateway is nearly full, and this API key has too many of its requests in flight.",
                code="key_share_exceeded",
                retry_after_s=1,
            )
        if key.max_in_flight is not None and self._by_key[key.id] >= key.max_in_flight:
            raise TooManyRequestsError(
                f"This API key may have {key.max_in_flight} requests in flight at one time.",
                code="key_in_flight_exceeded",
                retry_after_s=1,
            )
        self._by_key[key.id] += 1

    def _leave(self, key: ApiKey) -> None:
        self._by_key[key.id] -= 1
        if self._by_key[key.id] <= 0:
            del self._by_key[key.id]

    # --- one place for all responses

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        record = RequestRecord(started_s=time.monotonic())
        own_id = request_id(request.headers.get(HEADER_REQUEST_ID))
        exchange = _Exchange(request, own_id, record, self._cors.headers(request.headers))
        self.in_flight += 1
        self.idle.clear()
        try:
            response = await self._answer(exchange)
            if not response.prepared:
                record.code = response.status
            if self.draining:
                response.force_close()
            return response
        except (asyncio.CancelledError, ConnectionError) as left:
            record.ended = record.ended or AttemptEnd.CLIENT_LEFT
            if isinstance(left, asyncio.CancelledError):
                record.code = CODE_CLIENT_GONE
            raise
        finally:
            self._close(exchange)
            self.in_flight -= 1
            if self.in_flight == 0:
                self.idle.set()
            if request.path in INFERENCE_ROUTES:
                self._metrics.finish(record, time.monotonic())

    def _close(self, exchange: _Exchange) -> None:
        """Records how the request's last attempt ended, or that it was refused without one."""
        record = exchange.record
        if exchange.reserved is not NOTHING:
            exchange.reserved.settle(record.ended)
        record.close_attempt(record.ended or AttemptEnd.FAILED, record.code)
        if not record.attempts and record.error is not None and exchange.request.path in INFERENCE_ROUTES:
            key_uid = exchange.key.uid if exchange.key is not None else ""
            self._attempts.refused(key_uid, record.project, record.error)

    async def _answer(self, exchange: _Exchange) -> web.StreamResponse:
        try:
            return await self._handler(exchange.request)(exchange)
        except ApiError as error:
            exchange.record.error = error.code or error.type
            exchange.record.ended = exchange.record.ended or end_of(error)
            if error.status in AUDITED:
                _audit_refusal(exchange, error)
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


async def _permit(permission: dict[str, str], exchange: _Exchange) -> web.StreamResponse:
    return web.Response(status=204, headers={**exchange.headers(), **permission})


def _audit_refusal(exchange: _Exchange, error: ApiError) -> None:
    """Logs who was refused what, and why; nothing of the key itself, or of the request's content."""
    known = {"api_key": exchange.key.id, "owner": exchange.key.owner} if exchange.key is not None else {}
    where = {"request_id": exchange.id, "remote": exchange.request.remote}
    audit("request refused", **where, **known, code=error.status, reason=error.code)


def _error_response(exchange: _Exchange, error: ApiError) -> web.Response:
    if error.status >= 500 and not isinstance(error, UnavailableError):
        log.error("answered %d", error.status, extra={"request_id": exchange.id, "error": error.message})
    body = json.dumps(error.body()).encode()
    return _json(body, {**exchange.headers(failed=True), **error.headers()}, error.status)


def _json(body: bytes, headers: dict[str, str], status: int = 200) -> web.Response:
    headers["Content-Type"] = "application/json"
    return web.Response(body=body, status=status, headers=headers)


def _passed(result: Passed, headers: dict[str, str]) -> web.Response:
    if result.retry_after is not None:
        headers["Retry-After"] = result.retry_after
    return _json(result.body, headers, result.status)
