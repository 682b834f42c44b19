"""One attempt at one runtime: sends the request, registers the adapter if the runtime does not know it.

An attempt ends in `Accepted` (an open response that must be closed), in a `Refusal` that permits another replica, in
`Passed` (the runtime's own error response), or in an ApiError for the client. A runtime sends the head of its response
when it has admitted the request, so that no admitted request is sent again. A response for any other weights than the
pinned ones is withheld.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import quote

from lorapool_api.common import (
    HEADER_ADAPTER,
    HEADER_ATTEMPT,
    HEADER_COLD_START,
    HEADER_RELAXED,
    HEADER_REQUEST_ID,
    HEADER_USAGE,
    AdapterKey,
)
from lorapool_api.openai import ServerError, UnavailableError
from lorapool_api.protocol import HEADER_TENANT, ROUTE_ADAPTER, ROUTE_ATTEMPT, Usage
from lorapool_api.usage_protocol import HEADER_KEY, HEADER_PROJECT
from lorapool_gateway.ledger.attempts import Attempt
from lorapool_gateway.requests.http_client import HttpClient
from lorapool_gateway.requests.http_response import (
    ConnectError,
    ConnectionLostError,
    HttpClientError,
    HttpResponse,
    ReadTimeoutError,
)
from lorapool_gateway.requests.pod_watch import PodLostError, PodWatch
from lorapool_gateway.requests.refusal import Passed, Refusal, sort_error
from lorapool_gateway.requests.request import InferenceRequest
from lorapool_gateway.requests.sse import parse_usage
from lorapool_gateway.routing.objects import BaseRoute
from lorapool_gateway.routing.routes import RuntimeReplica, Target

log = logging.getLogger(__name__)

ERROR_BODY_MAX_BYTES = 64 * 1024
REGISTER_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 2.0
SSE = "text/event-stream"


@dataclass(slots=True)
class _Sent:
    """A request that was sent to a runtime; the attempt's id is unknown to any other caller."""

    replica: RuntimeReplica
    attempt: Attempt
    token: str
    cancelled: Callable[[Usage | None], None]
    """Receives what it has used if its client leaves before the response begins."""
    response: HttpResponse | None = None


@dataclass(slots=True)
class Accepted:
    """A response that has begun. Its owner must `close` it, which ends a generation that is not complete."""

    response: HttpResponse
    replica: RuntimeReplica
    runtime_cold_ms: int | None
    cancel: Callable[[], Awaitable[Usage | None]]
    """Ends the generation; returns what it has used, if the runtime says it."""
    _release: Callable[[], None]

    @property
    def relaxed(self) -> str | None:
        """The keywords of the request's schemas that the runtime does not enforce, as it lists them."""
        return self.response.headers.get(HEADER_RELAXED)

    @property
    def sends_events(self) -> bool:
        """False for an answer of JSON alone: of tokens, or of a runtime of an earlier version to a whole request."""
        return self.response.headers.get("content-type", "").startswith(SSE)

    def close(self) -> None:
        self.response.close()
        self._release()


class LoadTimeoutError(Exception):
    """The hold deadline passed while the runtime was still loading the adapter."""


class RuntimeClient:
    """Sends requests to runtimes and counts them by pod."""

    def __init__(
        self,
        http: HttpClient,
        tokens: Callable[[BaseRoute], tuple[str, ...]],
    ) -> None:
        """`tokens(base)` are the bearer tokens of its runtimes, in the order in which to try them."""
        self._http = http
        self._tokens = tokens
        self._registering: dict[tuple[str, AdapterKey], asyncio.Task[Refusal | Passed | None]] = {}
        self.pods = PodWatch(http.read_timeout_s)
        self.in_flight: Counter[str] = Counter()
        """Requests of this gateway by pod uid."""

    async def attempt(
        self,
        target: Target,
        replica: RuntimeReplica,
        request: InferenceRequest,
        attempt: Attempt,
        still_loading: Callable[[], bool],
        patience_s: float,
        cancelled: Callable[[Usage | None], None] = lambda usage: None,
    ) -> Accepted | Refusal | Passed:
        """Raises LoadTimeoutError if no response begins within `patience_s` while `still_loading()`, and ApiError.

        When it is cancelled, since the client has left, `cancelled` receives what the request has used.
        """
        pod = replica.endpoint.pod_uid
        self.in_flight[pod] += 1
        released = False

        def release() -> None:
            nonlocal released
            if not released:
                released = True
                self.in_flight[pod] -= 1
                if self.in_flight[pod] <= 0:
                    del self.in_flight[pod]

        try:
            result = await self._attempt(target, replica, request, attempt, still_loading, patience_s, cancelled)
            if isinstance(result, tuple):
                response, sent = result
                cold_ms = _whole(response.headers.get(HEADER_COLD_START))
                return Accepted(response, replica, cold_ms, lambda: self._cancel(sent), release)
        except BaseException:
            release()
            raise
        release()
        return result

    async def _attempt(
        self,
        target: Target,
        replica: RuntimeReplica,
        request: InferenceRequest,
        attempt: Attempt,
        still_loading: Callable[[], bool],
        patience_s: float,
        cancelled: Callable[[Usage | None], None],
    ) -> tuple[HttpResponse, _Sent] | Refusal | Passed:
        for token in self._tokens(target.base):
            sent = _Sent(replica, attempt, token, cancelled)
            result = await self._attempt_with(sent, target, request, still_loading, patience_s)
            if isinstance(result, HttpResponse):
                return result, sent
            if result is not Refusal.UNAUTHORIZED:
                return result
        log.error("runtime refuses the gateway's token", extra=_where(target, replica))
        return Refusal.UNAUTHORIZED

    async def _attempt_with(
        self,
        sent: _Sent,
        target: Target,
        request: InferenceRequest,
        still_loading: Callable[[], bool],
        patience_s: float,
    ) -> HttpResponse | Refusal | Passed:
        headers = {
            "Authorization": f"Bearer {sent.token}",
            "Content-Type": "application/json",
            "Accept": SSE,
            HEADER_ADAPTER: target.header,
            HEADER_ATTEMPT: sent.attempt.id,
            HEADER_KEY: sent.attempt.key_uid,
            HEADER_PROJECT: sent.attempt.project,
            HEADER_USAGE: "1",
            HEADER_REQUEST_ID: sent.attempt.request_id,
            HEADER_TENANT: request.tenant,
        }
        for registered in (False, True):
            response = await self._post(sent, request, headers, still_loading, patience_s)
            if isinstance(response, Refusal):
                return response
            result = await self._classify(response, target, sent.replica)
            if result is not Refusal.NOT_REGISTERED:
                return result
            if not registered and (obstacle := await self._register(sent.token, target, sent.replica)) is not None:
                return obstacle
        raise ServerError(f"A runtime of {target.base.ref} does not keep registrations.")

    async def _cancel(self, sent: _Sent) -> Usage | None:
        """Ends a request; returns its final usage. None: the runtime has not begun it, or does not answer in time."""
        if sent.response is not None:
            sent.response.close()  # first, so that a request which still waits is not admitted afterwards
        path, headers = ROUTE_ATTEMPT.format(id=sent.attempt.id), {"Authorization": f"Bearer {sent.token}"}
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                response = await self._send(sent.replica, "DELETE", path, headers)
                try:
                    await response.head()
                    body = await response.read_all(ERROR_BODY_MAX_BYTES) or b""
                    return parse_usage(body) if response.status == 200 else None
                finally:
                    response.close()
        except (HttpClientError, TimeoutError):
            return None

    async def _send(
        self, replica: RuntimeReplica, method: str, path: str, headers: dict[str, str], body: bytes = b""
    ) -> HttpResponse:
        pod = replica.endpoint
        return await self._http.send(pod.url, method, path, headers, body, name=pod.server_name)

    async def _post(
        self,
        sent: _Sent,
        request: InferenceRequest,
        headers: dict[str, str],
        still_loading: Callable[[], bool],
        patience_s: float,
    ) -> HttpResponse | Refusal:
        """A response whose status and headers have arrived."""
        try:
            response = await self._send(sent.replica, "POST", request.route, headers, request.body)
        except ConnectError:
            return Refusal.CONNECT
        sent.response = response
        self.pods.add(sent.replica, response)
        try:
            if not await response.head(max(0.0, patience_s)):
                if still_loading():
                    raise LoadTimeoutError
                await response.head()
        except ReadTimeoutError:
            if not self.pods.answers(sent.replica.endpoint.pod_uid):
                return Refusal.SILENT
            raise UnavailableError(
                "The runtime did not answer in time.", code="upstream_timeout", retry_after_s=5
            ) from None
        except PodLostError:
            return Refusal.SILENT
        except ConnectionLostError:
            return Refusal.LOST
        except asyncio.CancelledError:
            sent.cancelled(await self._cancel(sent))
            raise
        except BaseException:
            response.close()
            raise
        return response

    async def _classify(
        self, response: HttpResponse, target: Target, replica: RuntimeReplica
    ) -> HttpResponse | Refusal | Passed:
        """Sorts a response by status and error code. Raises ServerError for one that is not of the protocol."""
        if response.status == 200:
            self._check_identity(response, target, replica)
            return response
        try:
            body = await response.read_all(ERROR_BODY_MAX_BYTES) or b""
        except HttpClientError:
            return Refusal.LOST
        finally:
            response.close()
        result = sort_error(response.status, body, response.headers.get("retry-after"))
        if result is not None and (result is not Refusal.NOT_REGISTERED or target.adapter is not None):
            return result
        log.error("unexpected response of a runtime", extra={**_where(target, replica), "code": response.status})
        raise ServerError("The runtime gave a response that the gateway does not understand.", code="bad_upstream")

    def _check_identity(self, response: HttpResponse, target: Target, replica: RuntimeReplica) -> None:
        answered = response.headers.get(HEADER_ADAPTER)
        if answered == target.identity:
            return
        response.close()
        log.error(
            "runtime answered for other weights", extra={**_where(target, replica), "answered": (answered or "")[:200]}
        )
        raise ServerError("The runtime answered for another model; the answer was withheld.", code="wrong_adapter")

    async def _register(self, token: str, target: Target, replica: RuntimeReplica) -> Refusal | Passed | None:
        """One PUT for all concurrent requests that need this adapter on this replica. None: registered."""
        if target.key is None:
            return None
        pending = (replica.endpoint.pod_uid, target.key)
        task = self._registering.get(pending)
        if task is None:
            task = asyncio.create_task(self._put(token, target, replica), name=f"register {target.identity}")
            self._registering[pending] = task
            task.add_done_callback(lambda _: self._registering.pop(pending, None))
        return await asyncio.shield(task)  # a client that disconnects does not cancel it for the others

    async def _put(self, token: str, target: Target, replica: RuntimeReplica) -> Refusal | Passed | None:
        descriptor, key = target.descriptor(), target.key
        assert descriptor is not None
        assert key is not None
        path = ROUTE_ADAPTER.format(uid=quote(key.uid, safe=""), digest=quote(key.digest, safe=":"))
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        body = json.dumps(descriptor.dump()).encode()
        try:
            async with asyncio.timeout(REGISTER_TIMEOUT_S):
                response = await self._send(replica, "PUT", path, headers, body)
                try:
                    await response.head()
                    if response.status in (200, 201, 202):
                        await response.read_all(ERROR_BODY_MAX_BYTES)
                        return None
                    result = await self._classify(response, target, replica)
                    return result if isinstance(result, Refusal | Passed) else Refusal.LOST
                finally:
                    response.close()
        except (HttpClientError, TimeoutError):
            return Refusal.CONNECT  # idempotent, and no generation has begun


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _where(target: Target, replica: RuntimeReplica) -> dict[str, str]:
    return {"base": str(target.base.ref), "adapter": target.identity, "replica": replica.endpoint.pod_name}
