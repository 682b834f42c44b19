"""Requests to runtimes, directly to the IP of a pod: snapshots, and the calls that register and unregister adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TypeVar

import aiohttp
from pydantic import ValidationError

from lorapool_api.base_modules import BaseModules
from lorapool_api.common import AdapterKey
from lorapool_api.pod_address import ENCRYPTED, server_name, url_of
from lorapool_api.protocol import (
    ROUTE_ADAPTER,
    ROUTE_BASE_MODULES,
    ROUTE_CREDENTIALS,
    ROUTE_RESOLVE,
    ROUTE_RUNTIME,
    AdapterDescriptor,
    DeleteAnswer,
    NamespaceCredentials,
    PutAnswer,
    ResolveAnswer,
    ResolveRequest,
    token_sha256,
)
from lorapool_api.trust.poll_proof import HEADER_PROOF, Challenge
from lorapool_api.trust.tls import HANDSHAKE_TIMEOUT_S, ReleaseTrust
from lorapool_api.tuning.trainer_protocol import ROUTE_JOB, PutJobAnswer, TrainerJob
from lorapool_operator.effects.fence import Fence
from lorapool_operator.world.cluster_cache import PodObject

CONNECT_TIMEOUT_S = 2.0
MAX_SNAPSHOT_BYTES = 64 * 2**20


class RuntimeCallError(Exception):
    """A call to a runtime failed."""


class RuntimeGoneError(RuntimeCallError):
    """The runtime's pod is gone, or cannot be reached."""


class RuntimeTimeoutError(RuntimeGoneError):
    """The runtime did not respond in time."""


class RuntimeUntrustedError(RuntimeGoneError):
    """The runtime's certificate failed a check, which the message names together with the remedy."""


class RuntimeRefusedError(RuntimeCallError):
    """The runtime responded with an error status, or with a body that cannot be parsed."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RuntimeClient:
    """The requests over one session. Belongs to one event loop."""

    def __init__(
        self,
        tokens: Callable[[str], tuple[str, ...]],
        *,
        timeout_s: float,
        fence: Fence,
        trust: ReleaseTrust | None = None,
    ) -> None:
        """`tokens(base_uid)` are the bearer tokens of its runtimes, in the order in which to try them."""
        self._tokens = tokens
        self._trust = trust or ReleaseTrust()
        self._timeout_s = timeout_s
        self._fence = fence
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()

    async def snapshot(
        self, pod: PodObject, query: Mapping[str, str], *, timeout_s: float, route: str = ROUTE_RUNTIME
    ) -> bytes:
        """Returns the JSON of a RuntimeSnapshot, or of what a trainer answers at its route, by a poll that does not
        carry the token.

        Raises RuntimeGoneError, RuntimeRefusedError, and ProofError unless this pod itself answers.
        """
        *earlier, last = map(token_sha256, self._tokens(pod.base_uid))
        for digest in earlier:
            try:
                return await self._poll(digest, pod, query, timeout_s, route)
            except RuntimeRefusedError as error:
                if error.status != HTTPStatus.UNAUTHORIZED:
                    raise
        return await self._poll(last, pod, query, timeout_s, route)

    async def _poll(self, digest: str, pod: PodObject, query: Mapping[str, str], timeout_s: float, route: str) -> bytes:
        challenge = Challenge.new(digest, pod.meta.uid)
        raw, headers = await self._send(challenge.authorization, pod, "GET", route, query=query, timeout_s=timeout_s)
        challenge.check(digest, headers.get(HEADER_PROOF), raw)
        return raw

    async def register(self, pod: PodObject, adapter: AdapterKey, descriptor: AdapterDescriptor) -> PutAnswer:
        """Registers an adapter; idempotent. Raises FencedError, RuntimeGoneError, RuntimeRefusedError."""
        body = descriptor.model_dump_json(by_alias=True)
        return _parse(PutAnswer, await self._call(pod, "PUT", _route_of(adapter), body=body))

    async def unregister(self, pod: PodObject, adapter: AdapterKey) -> DeleteAnswer | None:
        """Unregisters an adapter. Returns None if it was not registered, or if the runtime still waits for requests.

        Raises FencedError, RuntimeGoneError, RuntimeRefusedError.
        """
        try:
            return _parse(DeleteAnswer, await self._call(pod, "DELETE", _route_of(adapter)))
        except RuntimeRefusedError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        except RuntimeTimeoutError:
            return None

    async def resolve(self, pod: PodObject, request: ResolveRequest, *, timeout_s: float) -> ResolveAnswer:
        """Inspects a source that only this runtime can read. Raises RuntimeGoneError, RuntimeRefusedError."""
        body = request.model_dump_json(by_alias=True)
        return _parse(ResolveAnswer, await self._call(pod, "POST", ROUTE_RESOLVE, body=body, timeout_s=timeout_s))

    async def base_modules(self, pod: PodObject) -> BaseModules:
        """Returns what adapters may name in the base. Raises RuntimeGoneError, RuntimeRefusedError."""
        return _parse(BaseModules, await self._call(pod, "GET", ROUTE_BASE_MODULES))

    async def give_credentials(self, pod: PodObject, credentials: NamespaceCredentials) -> None:
        """Gives a runtime the namespaces' credentials. Raises FencedError, RuntimeGoneError, RuntimeRefusedError."""
        await self._call(pod, "PUT", ROUTE_CREDENTIALS, body=credentials.model_dump_json(by_alias=True))

    async def put_job(self, pod: PodObject, uid: str, job: TrainerJob) -> PutJobAnswer:
        """Sends a job to a trainer; idempotent. Raises FencedError, RuntimeGoneError, RuntimeRefusedError."""
        body = job.model_dump_json(by_alias=True, exclude_none=True)
        return _parse(PutJobAnswer, await self._call(pod, "PUT", ROUTE_JOB.format(uid=uid), body=body))

    async def delete_job(self, pod: PodObject, uid: str) -> None:
        """Has a trainer forget a job. Raises FencedError, RuntimeGoneError, RuntimeRefusedError."""
        try:
            await self._call(pod, "DELETE", ROUTE_JOB.format(uid=uid))
        except RuntimeRefusedError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def _call(
        self, pod: PodObject, method: str, path: str, *, body: str | None = None, timeout_s: float | None = None
    ) -> bytes:
        *earlier, last = (f"Bearer {token}" for token in self._tokens(pod.base_uid))
        for token in earlier:
            try:
                return (await self._send(token, pod, method, path, body=body, timeout_s=timeout_s))[0]
            except RuntimeRefusedError as error:
                if error.status != HTTPStatus.UNAUTHORIZED:
                    raise
        return (await self._send(last, pod, method, path, body=body, timeout_s=timeout_s))[0]

    async def _send(
        self,
        authorization: str,
        pod: PodObject,
        method: str,
        path: str,
        *,
        body: str | None = None,
        query: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> tuple[bytes, Mapping[str, str]]:
        """Returns the body and the headers of the response. Raises RuntimeGoneError, RuntimeRefusedError."""
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=True)
        total_s = timeout_s if timeout_s is not None else self._timeout_s
        connect_s = CONNECT_TIMEOUT_S + (HANDSHAKE_TIMEOUT_S if pod.scheme == ENCRYPTED else 0)
        timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=connect_s)
        headers = {"Authorization": authorization}
        if body is not None:
            headers["Content-Type"] = "application/json"
        call = f"{method} {path.partition('?')[0]} at {pod.meta.name}"
        if method in ("PUT", "DELETE"):
            self._fence.check()
        try:
            async with self._session.request(
                method,
                url_of(pod.scheme, pod.ip, pod.port) + path,
                params=query,
                data=body,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
                ssl=self._trust.context(),
                server_hostname=server_name(pod.base_uid),
            ) as response:
                raw = await response.content.read(MAX_SNAPSHOT_BYTES)
                while not response.content.at_eof() and len(raw) < MAX_SNAPSHOT_BYTES:
                    raw += await response.content.read(MAX_SNAPSHOT_BYTES)
                if response.status >= 300:
                    raise RuntimeRefusedError(
                        f"{call}: {response.status} {raw[:200].decode(errors='replace')}", response.status
                    )
                return raw, response.headers
        except TimeoutError as error:
            raise RuntimeTimeoutError(f"{call}: no response within {total_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            if refusal := self._trust.refusal(error):
                raise RuntimeUntrustedError(refusal) from error
            raise RuntimeGoneError(f"{call}: {type(error).__name__} {error}") from error


def _route_of(adapter: AdapterKey) -> str:
    return ROUTE_ADAPTER.format(uid=adapter.uid, digest=adapter.digest)


RuntimeResponse = TypeVar("RuntimeResponse", PutAnswer, DeleteAnswer, ResolveAnswer, BaseModules, PutJobAnswer)


def _parse(kind: type[RuntimeResponse], raw: bytes) -> RuntimeResponse:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise RuntimeRefusedError(
            f"a runtime's response is not a valid {kind.__name__}: {error.error_count()} errors", 502
        ) from error
