"""The release's store, as the gateway uses it: bodies are streamed, never held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp

from lorapool_api.openai import TooManyRequestsError, UnavailableError
from lorapool_api.store_protocol import (
    HEADER_EXPIRES,
    STORE_SERVER_NAME,
    StoredObject,
    StoreGrant,
    StoreListing,
    mint,
    object_path,
)
from lorapool_api.trust.tls import ReleaseTrust

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 90.0
"""The store itself gives an upload up that sends nothing for a minute."""
EVERYTHING = StoreGrant(write=("",))
"""What the gateway may use: files of all namespaces. Each call below names its namespace."""


class ObjectNotFoundError(Exception):
    """There is no such object."""


class StoreClient:
    """All methods may raise UnavailableError, and those that write TooManyRequestsError for a full namespace."""

    def __init__(self, url: str, masters: Callable[[], tuple[str, ...]], trust: ReleaseTrust) -> None:
        self._url = url.rstrip("/")
        self._masters = masters
        self._trust = trust
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S, total=None),
            headers={"Accept-Encoding": "identity", "User-Agent": "lorapool-gateway"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        await self._session.close()

    async def put(
        self, namespace: str, key: str, body: bytes | AsyncIterator[bytes], *, expires_unix_s: int | None = None
    ) -> StoredObject:
        """Stores a whole body. What `body` raises is raised here, and nothing is stored."""
        headers = {} if expires_unix_s is None else {HEADER_EXPIRES: str(expires_unix_s)}
        failed: list[Exception] = []
        data = body if isinstance(body, bytes) else _recorded(body, failed)
        try:
            async with self._call("PUT", namespace, key, data=data, headers=headers) as response:
                return StoredObject.model_validate_json(await response.read())
        except UnavailableError:
            if failed:  # aiohttp reports what a body raises as a lost connection
                raise failed[0] from None
            raise

    async def get(self, namespace: str, key: str) -> bytes:
        """A small object. Raises ObjectNotFoundError."""
        async with self._call("GET", namespace, key) as response:
            return await response.read()

    @asynccontextmanager
    async def open(self, namespace: str, key: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """An object whose `content` is then read. Raises ObjectNotFoundError."""
        async with self._call("GET", namespace, key) as response:
            yield response

    async def head(self, namespace: str, key: str) -> StoredObject:
        """Size and version of an object. Raises ObjectNotFoundError."""
        async with self._call("HEAD", namespace, key) as response:
            headers = response.headers
            return StoredObject(key=key, size=int(headers["Content-Length"]), etag=headers["ETag"])

    async def list(self, namespace: str, prefix: str) -> list[StoredObject]:
        """All objects below a prefix that ends in a slash, sorted by key."""
        found: list[StoredObject] = []
        more = True
        while more:
            query = {"after": found[-1].key} if found else {}
            async with self._call("GET", namespace, prefix, params=query) as response:
                page = StoreListing.model_validate_json(await response.read())
            found += page.objects
            more = page.has_more and bool(page.objects)
        return found

    async def delete(self, namespace: str, key: str) -> None:
        """Deletes an object, or all below a key that ends in a slash. It need not exist."""
        async with self._call("DELETE", namespace, key):
            pass

    @asynccontextmanager
    async def _call(
        self, method: str, namespace: str, key: str, *, headers: dict[str, str] | None = None, **more: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        token = mint(self._masters()[0], EVERYTHING)
        secure = self._url.startswith("https:")
        try:
            async with self._session.request(
                method,
                self._url + object_path(namespace, key),
                headers={**(headers or {}), "Authorization": f"Bearer {token}"},
                ssl=self._trust.context() if secure else False,
                server_hostname=STORE_SERVER_NAME if secure else None,
                allow_redirects=False,
                **more,
            ) as response:
                _check(response)
                yield response
        except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            raise UnavailableError("The store cannot be reached. Try again.", retry_after_s=5) from error


async def _recorded(body: AsyncIterator[bytes], failed: list[Exception]) -> AsyncIterator[bytes]:
    """The body; what it raises is kept in `failed`."""
    try:
        async for chunk in body:
            yield chunk
    except Exception as error:
        failed.append(error)
        raise


def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == HTTPStatus.NOT_FOUND:
        raise ObjectNotFoundError
    if response.status == HTTPStatus.INSUFFICIENT_STORAGE:
        raise TooManyRequestsError(
            "The organization's files have as many bytes as they may. Delete some.", code="storage_limit_exceeded"
        )
    if response.status >= HTTPStatus.BAD_REQUEST:
        raise UnavailableError("The store refuses the call. Try again.", retry_after_s=5)
