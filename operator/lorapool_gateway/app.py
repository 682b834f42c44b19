"""The OpenAI-shaped HTTP surface: routes, limits, and the one place where an exception becomes a response.

Built by `__main__` and by tests from three small interfaces: where the route table comes from, where the keys
come from, and who wakes a base. It knows nothing of Kubernetes and asks nobody during a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from aiohttp import web

from lorapool_api.common import HEADER_ADAPTER, HEADER_COLD_START, HEADER_PROCESSING_MS, HEADER_REQUEST_ID
from lorapool_api.openai import (
    ApiError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    ServerError,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)
from lorapool_api.protocol import ROUTE_CHAT, ROUTE_COMPLETIONS, ROUTE_MODELS
from lorapool_gateway.auth import ApiKey, authenticate
from lorapool_gateway.dispatch import Dispatcher
from lorapool_gateway.forward import Passed
from lorapool_gateway.metrics import Metrics, RequestRecord
from lorapool_gateway.objects import AdapterRoute
from lorapool_gateway.relay import CODE_CLIENT_GONE, SSE, relay_stream, relay_whole
from lorapool_gateway.request import parse_request, request_id
from lorapool_gateway.routes import Entry
from lorapool_gateway.settings import Settings
from lorapool_gateway.store import KeySource, RouteSource

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ID: Final = web.RequestKey("request_id", str)
_RECORD: Final = web.RequestKey("record", RequestRecord)


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
        self.idle = asyncio.Event()
        """Set while no request is under way."""
        self.idle.set()
        self.draining = False
        """Set by `__main__` on SIGTERM: answers then ask clients to open their next connection elsewhere."""

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._outermost], client_max_size=self._settings.max_body_bytes)
        app.router.add_post(ROUTE_CHAT, self._infer)
        app.router.add_post(ROUTE_COMPLETIONS, self._infer)
        app.router.add_get(ROUTE_MODELS, self._list_models)
        app.router.add_get(ROUTE_MODELS + "/{id:.+}", self._get_model)
        return app

    # --- handlers

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        key = authenticate(self._keys.table, request.headers.get("Authorization"))
        with self._place(key):
            parsed = parse_request(request.path, await self._body(request))
            record = request[_RECORD]
            result = await self._dispatcher.dispatch(parsed, key, request[_ID], record)
            headers = self._headers(request)
            if isinstance(result, Passed):
                if result.retry_after is not None:
                    headers["Retry-After"] = result.retry_after
                record.code = result.status
                return web.Response(
                    status=result.status, body=result.body, content_type="application/json", headers=headers
                )
            try:
                if parsed.stream and result.answer.headers.get("content-type", "").startswith(SSE):
                    timeout_s = self._settings.write_timeout_s
                    return await relay_stream(request, result, record, headers, write_timeout_s=timeout_s)
                return await relay_whole(result, record, headers)
            finally:
                result.close()

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        key = authenticate(self._keys.table, request.headers.get("Authorization"))
        data = [_model(entry) for entry in self._routes.table.visible(key)]
        return web.json_response({"object": "list", "data": data}, headers=self._headers(request))

    async def _get_model(self, request: web.Request) -> web.StreamResponse:
        key = authenticate(self._keys.table, request.headers.get("Authorization"))
        entry = self._routes.table.find(request.match_info["id"], key)
        return web.json_response(_model(entry), headers=self._headers(request))

    # --- limits

    @contextmanager
    def _place(self, key: ApiKey) -> Iterator[None]:
        if self.in_flight > self._settings.max_requests:  # this one is counted already
            raise TooManyRequests("The gateway is full.", retry_after_s=1)
        if key.max_in_flight is not None and self._by_key[key.id] >= key.max_in_flight:
            raise TooManyRequests(
                f"This API key may have {key.max_in_flight} requests under way at one time.",
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

    async def _body(self, request: web.Request) -> bytes:
        bound = self._settings.max_body_bytes
        if request.content_length is not None and request.content_length > bound:
            raise _too_large(bound)
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise _too_large(bound) from None
        except TimeoutError:
            raise InvalidRequest("The request body was not sent in time.", code="body_timeout") from None
        except ValueError:
            raise InvalidRequest("The request body cannot be decoded.", code="invalid_body") from None

    # --- one place for all responses

    @web.middleware
    async def _outermost(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        record = RequestRecord(started_s=time.monotonic())
        request[_ID] = request_id(request.headers.get(HEADER_REQUEST_ID))
        request[_RECORD] = record
        metered = request.path in (ROUTE_CHAT, ROUTE_COMPLETIONS)
        self.in_flight += 1
        self.idle.clear()
        self._metrics.in_flight.set(self.in_flight)
        try:
            response = await self._answer(request, handler)
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
            self._metrics.in_flight.set(self.in_flight)
            if metered:
                self._metrics.finish(record, time.monotonic())

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Unauthenticated as error:
            # For the audit: that a key was refused, from where; nothing of what was sent.
            log.info("key refused", extra={"request_id": request[_ID], "remote": request.remote})
            return self._error(request, error)
        except ApiError as error:
            return self._error(request, error)
        except web.HTTPMethodNotAllowed as error:
            refusal = MethodNotAllowed(f"{request.method} is not allowed here; use {_allowed(error)}.")
            response = self._error(request, refusal)
            response.headers["Allow"] = _allowed(error)
            return response
        except web.HTTPNotFound:
            return self._error(request, NotFound(f"There is no {request.method} {request.path[:200]}."))
        except (asyncio.CancelledError, ConnectionError):
            raise  # the client is gone
        except Exception:
            log.exception("unexpected error", extra={"request_id": request[_ID]})
            return self._error(request, ServerError("The gateway made an error; its log has the request id."))

    def _error(self, request: web.Request, error: ApiError) -> web.Response:
        if error.status >= 500 and not isinstance(error, Unavailable):
            log.error("answered %d", error.status, extra={"request_id": request[_ID], "error": error.message})
        return web.json_response(
            error.body(), status=error.status, headers={**self._headers(request, failed=True), **error.headers()}
        )

    def _headers(self, request: web.Request, *, failed: bool = False) -> dict[str, str]:
        record = request[_RECORD]
        headers = {
            HEADER_REQUEST_ID: request[_ID],
            HEADER_PROCESSING_MS: str(round((time.monotonic() - record.started_s) * 1000)),
        }
        if record.identity is not None and not failed:
            headers[HEADER_ADAPTER] = record.identity
        if record.cold_ms is not None:
            headers[HEADER_COLD_START] = str(record.cold_ms)
        return headers


def _model(entry: Entry) -> dict[str, Any]:
    model: dict[str, Any] = {
        "id": str(entry.ref),
        "object": "model",
        "created": int(entry.created_unix_s),
        "owned_by": entry.ref.namespace,
    }
    if isinstance(entry, AdapterRoute):
        model["parent"] = str(entry.base_ref)
    return model


def _too_large(bound: int) -> ApiError:
    return PayloadTooLarge(f"The request body must not be larger than {bound} bytes.")


def _allowed(error: web.HTTPMethodNotAllowed) -> str:
    return ", ".join(sorted(error.allowed_methods - {"HEAD"}))
