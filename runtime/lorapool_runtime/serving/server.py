"""The runtime's HTTP routes (`lorapool_api.protocol`), the token check, and the mapping of errors to responses.

Every route but /healthz and /readyz requires the bearer token, or a poll its proof; one middleware turns every
exception into an OpenAI error body. An inference request is parsed here, admitted by `service` and answered by
`responses`. Nothing here decides about adapters or engines.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from lorapool_api.common import HEADER_ADAPTER, HEADER_PROCESSING_MS, HEADER_REQUEST_ID, AdapterKey
from lorapool_api.keep_alive import keep_alive
from lorapool_api.logs import audit
from lorapool_api.openai import (
    ApiError,
    InvalidRequestError,
    MethodNotAllowedError,
    ModelNotFoundError,
    PayloadTooLargeError,
    RouteNotFoundError,
    ServerError,
    UnauthenticatedError,
)
from lorapool_api.protocol import (
    LONG_POLL_MAX_S,
    ROUTE_ADAPTER,
    ROUTE_ATTEMPT,
    ROUTE_BASE_MODULES,
    ROUTE_CHAT,
    ROUTE_COMPLETIONS,
    ROUTE_CREDENTIALS,
    ROUTE_DETOKENIZE,
    ROUTE_EVENTS,
    ROUTE_HEALTH,
    ROUTE_METRICS,
    ROUTE_MODELS,
    ROUTE_READY,
    ROUTE_RESOLVE,
    ROUTE_RESPONSES,
    ROUTE_RUNTIME,
    ROUTE_TOKENIZE,
    AdapterDescriptor,
    NamespaceCredentials,
    PutAnswer,
    ResolveRequest,
)
from lorapool_api.trust.poll_proof import HEADER_PROOF, Challenge
from lorapool_api.usage_protocol import ROUTE_USAGE
from lorapool_runtime.openai.json_body import parse_json_object
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest, parse_chat, parse_completion
from lorapool_runtime.openai.responses_request import parse_responses, renamed
from lorapool_runtime.openai.tokenization import parse_detokenize, parse_tokenize
from lorapool_runtime.serving.caller import Caller, caller_of
from lorapool_runtime.serving.probes import exposition, health_response, name_no_software, readiness_response
from lorapool_runtime.serving.responses import REQUEST_ID, Responder, milliseconds
from lorapool_runtime.serving.service import Runtime
from lorapool_runtime.serving.tokenization import Tokenized, detokenize, tokenize

log = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:/+=-]{1,128}$")
_BOOT_ID = re.compile(r"^[A-Za-z0-9_-]{0,64}$")


def make_app(runtime: Runtime) -> web.Application:
    """The application with every route of the runtime protocol and of the OpenAI API."""
    server = _Server(runtime)
    app = web.Application(middlewares=[server.answer_errors, server.check_token])
    app.on_response_prepare.append(name_no_software)
    app.router.add_get(ROUTE_HEALTH, server.health)
    app.router.add_get(ROUTE_READY, server.readiness)
    app.router.add_get(ROUTE_METRICS, server.metrics)
    app.router.add_get(ROUTE_RUNTIME, server.snapshot)
    app.router.add_get(ROUTE_BASE_MODULES, server.base_modules)
    app.router.add_get(ROUTE_EVENTS, server.events)
    app.router.add_get(ROUTE_USAGE, server.usage)
    app.router.add_delete(ROUTE_USAGE, server.acknowledge_usage)
    app.router.add_put(ROUTE_ADAPTER, server.put_adapter)
    app.router.add_delete(ROUTE_ADAPTER, server.delete_adapter)
    app.router.add_post(ROUTE_RESOLVE, server.resolve)
    app.router.add_put(ROUTE_CREDENTIALS, server.put_credentials)
    app.router.add_delete(ROUTE_ATTEMPT, server.cancel)
    app.router.add_get(ROUTE_MODELS, server.models)
    app.router.add_get(ROUTE_MODELS + "/{model:.+}", server.model)
    app.router.add_post(ROUTE_CHAT, server.chat)
    app.router.add_post(ROUTE_COMPLETIONS, server.completions)
    app.router.add_post(ROUTE_RESPONSES, server.responses)
    app.router.add_post(ROUTE_TOKENIZE, server.tokenize)
    app.router.add_post(ROUTE_DETOKENIZE, server.detokenize)
    return app


class _Server:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._responder = Responder(
            runtime.clock,
            runtime.metrics,
            write_timeout_s=runtime.settings.write_timeout_s,
            draining=lambda: runtime.draining,
        )

    # --- around every route -------------------------------------------------------------

    @web.middleware
    async def answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns an exception into a response. The only place that does."""
        given = request.headers.get(HEADER_REQUEST_ID, "")
        request[REQUEST_ID] = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        started_s = self._runtime.clock.now_s()
        try:
            response = await handler(request)
        except asyncio.CancelledError:  # the client has left
            raise
        except ConnectionResetError:  # so has it here; aiohttp would log the exception as an error
            return web.Response()
        except Exception as error:
            api_error = _api_error(error)
            if api_error.status >= 500 and not isinstance(error, ApiError):
                log.exception("request failed", extra={"request_id": request[REQUEST_ID]})
            if api_error.code != "internal_error":
                self._runtime.metrics.rejected(api_error.code or "invalid_request")
            response = web.json_response(api_error.body(), status=api_error.status, headers=api_error.headers())
        if not response.prepared:
            response.headers[HEADER_REQUEST_ID] = request[REQUEST_ID]
            response.headers[HEADER_PROCESSING_MS] = milliseconds(self._runtime.clock.now_s() - started_s)
            if self._runtime.draining:
                response.force_close()  # the next request on this connection would come too late
        return response

    @web.middleware
    async def check_token(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses requests without the token, except to the probes. Checks the matched handler, not the URL."""
        is_probe = request.match_info.handler in (self.health, self.readiness)
        authorization = request.headers.get("Authorization", "")
        if not (
            is_probe or self._is_proven_poll(request, authorization) or self._runtime.tokens.accepts(authorization)
        ):
            audit("request refused", request_id=request[REQUEST_ID], remote=request.remote, code=401)
            raise UnauthenticatedError("Missing or wrong bearer token.")
        return await handler(request)

    def _is_proven_poll(self, request: web.Request, authorization: str) -> bool:
        challenge = Challenge.parse(authorization) if request.match_info.handler == self.snapshot else None
        return challenge is not None and self._runtime.tokens.accepts_poll(challenge)

    # --- health and state -----------------------------------------------------------------

    async def health(self, _request: web.Request) -> web.Response:
        return health_response(self._runtime)

    async def readiness(self, _request: web.Request) -> web.Response:
        return readiness_response(self._runtime)

    async def metrics(self, _request: web.Request) -> web.Response:
        return exposition(self._runtime.metrics.render() + self._runtime.metrics.render_gateway_names())

    async def snapshot(self, request: web.Request) -> web.Response:
        after, wait_s = _poll_params(request.query)
        body = await self._runtime.poll_snapshot(after, request.query.get("boot", ""), wait_s)
        challenge = Challenge.parse(request.headers.get("Authorization", ""))
        proof = self._runtime.tokens.answer(challenge, body) if challenge is not None else None
        headers = {HEADER_PROOF: proof} if proof is not None else None
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def base_modules(self, _request: web.Request) -> web.Response:
        return _json(self._runtime.base_modules)

    async def events(self, request: web.Request) -> web.Response:
        after, wait_s = _poll_params(request.query)
        await self._wait_while(lambda: after >= self._runtime.events.last_seq, wait_s)
        return _json(self._runtime.events.after(after))

    async def usage(self, request: web.Request) -> web.Response:
        after, wait_s = _poll_params(request.query)
        page = await self._runtime.accounting.poll(_boot_param(request.query), after, wait_s)
        return web.Response(body=page, content_type="application/json")

    async def acknowledge_usage(self, request: web.Request) -> web.Response:
        if "through" not in request.query or not (boot_id := _boot_param(request.query)):
            raise InvalidRequestError("`boot` and `through` say which records are acknowledged.", param="through")
        self._runtime.accounting.acknowledge(boot_id, _number_param(request.query, "through"))
        return web.Response(status=204)

    async def _wait_while(self, nothing_new: Callable[[], bool], wait_s: float) -> None:
        ends_s = self._runtime.clock.now_s() + wait_s
        while nothing_new() and (left_s := ends_s - self._runtime.clock.now_s()) > 0:
            await self._runtime.changes.wait(self._runtime.changes.seq, left_s)

    # --- adapters -----------------------------------------------------------------------

    async def put_adapter(self, request: web.Request) -> web.Response:
        key = _key_of_path(request.match_info)
        descriptor = _parse(AdapterDescriptor, await self._body(request))
        report = await self._runtime.adapters.register(key, descriptor)
        audit("adapter registered", adapter=report.display, digest=key.digest, remote=request.remote)
        return _json(PutAnswer(boot_id=self._runtime.boot_id, adapter=report))

    async def delete_adapter(self, request: web.Request) -> web.Response:
        key = _key_of_path(request.match_info)
        answer = await self._runtime.adapters.delete(key)
        audit("adapter removed", adapter=key.uid, digest=key.digest, remote=request.remote)
        return _json(answer)

    async def put_credentials(self, request: web.Request) -> web.Response:
        self._runtime.give_credentials(_parse(NamespaceCredentials, await self._body(request)))
        return web.Response(status=204)

    async def resolve(self, request: web.Request) -> web.Response:
        return _json(await self._runtime.resolve(_parse(ResolveRequest, await self._body(request))))

    # --- models -------------------------------------------------------------------------

    async def models(self, _request: web.Request) -> web.Response:
        names = [self._settings.base_name, *sorted(self._runtime.adapters.displays())]
        return web.json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        if name != self._settings.base_name and name not in self._runtime.adapters.displays():
            raise ModelNotFoundError(name)
        return web.json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        base = self._settings.base_name
        return {
            "id": name,
            "object": "model",
            "created": int(self._runtime.started_unix_s),
            "owned_by": "lorapool",
            "parent": None if name == base else base,
            "max_model_len": self._runtime.max_model_len,
        }

    # --- inference ----------------------------------------------------------------------

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, parse_chat(await self._body(request)))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, parse_completion(await self._body(request)))

    async def responses(self, request: web.Request) -> web.StreamResponse:
        parsed = parse_responses(await self._body(request))
        try:
            return await self._infer(request, parsed)
        except InvalidRequestError as error:
            raise renamed(error, parsed.names) from error

    async def tokenize(self, request: web.Request) -> web.Response:
        return _tokens(await tokenize(self._runtime, parse_tokenize(await self._body(request)), *_asked(request)))

    async def detokenize(self, request: web.Request) -> web.Response:
        return _tokens(await detokenize(self._runtime, parse_detokenize(await self._body(request)), *_asked(request)))

    async def _infer(self, request: web.Request, parsed: ChatRequest | CompletionRequest) -> web.StreamResponse:
        """When the client leaves, aiohttp cancels the handler, which cancels the generation."""
        started_s = self._runtime.clock.now_s()
        if request.transport is not None:
            keep_alive(request.transport.get_extra_info("socket"), self._settings.write_timeout_s)
        header, caller = _asked(request)
        admitted = await self._runtime.admit(parsed, header, caller)
        try:
            return await self._responder.respond(request, parsed, admitted, caller, started_s=started_s)
        finally:
            admitted.generation.cancel()

    async def cancel(self, request: web.Request) -> web.Response:
        """Ends a request, and answers what it has used. Raises RouteNotFoundError."""
        usage = await self._runtime.cancel(request.match_info["id"])
        if usage is None:
            raise RouteNotFoundError("There is no such attempt.")
        return _json(usage)

    async def _body(self, request: web.Request) -> bytes:
        """The body. `request.read` would keep it as long as the response takes."""
        body, bound = bytearray(), self._settings.body_max_bytes
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while part := await request.content.readany():
                    body += part
                    if len(body) > bound:
                        raise PayloadTooLargeError(f"The body must not be larger than {bound} bytes.")
        except TimeoutError as error:
            raise InvalidRequestError("The body did not arrive in time.", code="request_timeout") from error
        except web.RequestPayloadError as error:
            raise InvalidRequestError("The body is not valid HTTP/1.1.", code="invalid_body") from error
        return bytes(body)


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowedError(f"Method {error.method} is not allowed here.")
    if isinstance(error, web.HTTPException) and error.status < 500:
        return (
            RouteNotFoundError("There is no such route.") if error.status == 404 else InvalidRequestError(error.reason)
        )
    return ServerError("An internal error occurred; the runtime's log has the details.")


def _asked(request: web.Request) -> tuple[str | None, Caller]:
    """The weights that must answer, if the request says it, and who asks."""
    return request.headers.get(HEADER_ADAPTER), caller_of(request.headers, request[REQUEST_ID])


def _tokens(answer: Tokenized) -> web.Response:
    return web.json_response(answer.body, headers={HEADER_ADAPTER: answer.target})


def _json(model: BaseModel) -> web.Response:
    return web.Response(body=model.model_dump_json(by_alias=True).encode(), content_type="application/json")


def _parse(model: type[M], raw: bytes) -> M:
    try:
        return model.model_validate(parse_json_object(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(f"`{where}`: {first['msg']}", param=where) from error


def _key_of_path(match: Mapping[str, str]) -> AdapterKey:
    try:
        return AdapterKey.parse(f"{match['uid']}@{match['digest']}")
    except ValueError as error:
        raise InvalidRequestError(str(error), param="uid") from error


def _poll_params(query: Mapping[str, str]) -> tuple[int, float]:
    after, wait = _number_param(query, "after"), query.get("wait", "0")
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", wait, re.ASCII):
        raise InvalidRequestError("`wait` must be a number of seconds.", param="wait")
    return after, min(float(wait), LONG_POLL_MAX_S)


def _number_param(query: Mapping[str, str], name: str) -> int:
    value = query.get(name, "0")
    if not (value.isascii() and value.isdecimal() and len(value) <= 18):
        raise InvalidRequestError(f"`{name}` must be a whole number.", param=name)
    return int(value)


def _boot_param(query: Mapping[str, str]) -> str:
    value = query.get("boot", "")
    if not _BOOT_ID.match(value):
        raise InvalidRequestError("`boot` must be the identifier of a process.", param="boot")
    return value
