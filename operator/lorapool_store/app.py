"""The store's HTTP API: tokens, names, ranges and bodies as they arrive. What is stored where, `objects` knows."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate

from aiohttp import web
from obstore.exceptions import BaseError

from lorapool_api.store_protocol import (
    HEADER_EXPIRES,
    MAX_LIST,
    ROUTE_OBJECTS,
    ROUTE_USAGE,
    StoreGrant,
    grant_of,
    is_key,
    is_namespace,
)
from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_store.errors import StoreError, not_permitted
from lorapool_store.metrics import Metrics
from lorapool_store.objects import Objects, Reading

log = logging.getLogger(__name__)

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})?")


class StoreApp:
    def __init__(
        self,
        objects: Objects,
        masters: MasterTokens,
        metrics: Metrics,
        *,
        body_timeout_s: float,
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._objects = objects
        self._masters = masters
        self._metrics = metrics
        self._body_timeout_s = body_timeout_s
        self._now_unix_s = now_unix_s

    def server(self) -> web.Server:
        """aiohttp's server; the paths are few, and names of objects are checked here."""
        return web.Server(self.handle, access_log=None)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request, with a JSON error where it is refused."""
        try:
            response = await self._answer(request)
            code = response.status
        except StoreError as error:
            response, code = web.json_response(error.body(), status=error.status), error.status
            if not request.content.is_eof():
                response.force_close()  # the rest of the body is not read
        except (BaseError, OSError) as error:
            if isinstance(error, ConnectionError):
                raise
            log.error("the storage failed", extra={"error": f"{type(error).__name__}: {error}"[:500]})
            body = StoreError(503, "storage_failed", "The storage failed; the store's log says how.").body()
            response, code = web.json_response(body, status=503), 503
        self._metrics.request(request.method, code)
        return response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        grant = self._grant(request)
        if request.path.startswith(ROUTE_USAGE) and request.method == "GET":
            namespace = request.path.removeprefix(ROUTE_USAGE)
            _check(grant, f"{namespace}/", write=False)
            return _json((await self._objects.usage(namespace)).model_dump(by_alias=True))
        if not request.path.startswith(ROUTE_OBJECTS):
            raise StoreError(404, "not_found", "There is no such path.")
        namespace, key = _name(request.path)
        name, whole = f"{namespace}/{key}", key == "" or key.endswith("/")
        _check(grant, name, write=request.method in ("PUT", "DELETE"))
        match request.method:
            case "PUT" if not whole:
                return await self._put(request, namespace, key)
            case "GET" if whole:
                return await self._list(request, namespace, key)
            case "GET" | "HEAD" if not whole:
                return await self._get(request, namespace, key)
            case "DELETE":
                await self._objects.delete(namespace, key)
                return web.Response(status=204)
        raise StoreError(405, "method_not_allowed", f"{request.method} is not allowed here.")

    def _grant(self, request: web.BaseRequest) -> StoreGrant:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        grant = grant_of(self._masters.current(), token.strip(), self._now_unix_s()) if scheme == "Bearer" else None
        if grant is None:
            raise StoreError(401, "invalid_token", "The token is missing, expired or not of this store.")
        return grant

    async def _put(self, request: web.BaseRequest, namespace: str, key: str) -> web.StreamResponse:
        stored = await self._objects.put(
            namespace,
            key,
            self._body(request),
            create=request.headers.get("If-None-Match") == "*",
            expires_unix_s=_expiry(request.headers.get(HEADER_EXPIRES)),
        )
        return _json(stored.model_dump(by_alias=True), 201)

    async def _body(self, request: web.BaseRequest) -> AsyncIterator[bytes]:
        """The body as it arrives. One that ends before its declared length is an error, and nothing is stored."""
        while True:
            try:
                async with asyncio.timeout(self._body_timeout_s):
                    chunk = await request.content.readany()
            except TimeoutError:
                raise StoreError(408, "body_timeout", "The body stopped arriving.") from None
            except web.RequestPayloadError:
                raise StoreError(400, "invalid_body", "The body is not complete.") from None
            if not chunk:
                return
            yield chunk

    async def _list(self, request: web.BaseRequest, namespace: str, prefix: str) -> web.StreamResponse:
        limit = request.query.get("limit", str(MAX_LIST))
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= MAX_LIST:
            raise StoreError(400, "invalid_limit", f"limit is a number from 1 to {MAX_LIST}.")
        after = request.query.get("after", "")
        found = await self._objects.listing(namespace, prefix, after=after, limit=int(limit))
        return _json(found.model_dump(by_alias=True, exclude_none=True))

    async def _get(self, request: web.BaseRequest, namespace: str, key: str) -> web.StreamResponse:
        if request.method == "HEAD":
            item = await self._objects.head(namespace, key)
            headers = _headers(item.etag, item.modified_unix_s) | {"Content-Length": str(item.size)}
            return web.Response(headers=headers)
        start, end = _range(request.headers.get("Range"))
        reading = await self._objects.get(namespace, key, start=start, end=end, etag=request.headers.get("If-Match"))
        if start and start >= reading.size:
            raise StoreError(416, "range_not_satisfiable", f"The object has {reading.size} bytes.")
        return await self._send(request, reading)

    async def _send(self, request: web.BaseRequest, reading: Reading) -> web.StreamResponse:
        partial = (reading.start, reading.end) != (0, reading.size)
        response = web.StreamResponse(
            status=206 if partial else 200, headers=_headers(reading.etag, reading.modified_unix_s)
        )
        response.content_length = reading.end - reading.start
        if partial:
            response.headers["Content-Range"] = f"bytes {reading.start}-{reading.end - 1}/{reading.size}"
        await response.prepare(request)
        if reading.end > reading.start:
            async for chunk in reading.chunks():
                await response.write(chunk)
        await response.write_eof()
        return response


def _name(path: str) -> tuple[str, str]:
    """The namespace and the key of a decoded path. Raises StoreError."""
    namespace, slash, key = path.removeprefix(ROUTE_OBJECTS).partition("/")
    if not slash or not is_namespace(namespace) or (key and not is_key(key.removesuffix("/"))):
        raise StoreError(400, "invalid_key", "A name is <namespace>/<key>, with parts of letters, digits and ._-")
    return namespace, key


def _check(grant: StoreGrant, name: str, *, write: bool) -> None:
    if not grant.permits(name, write=write):
        raise not_permitted()


def _range(header: str | None) -> tuple[int, int | None]:
    """The first byte and the one behind the last. Anything but one simple range stands for the whole object."""
    found = _RANGE.fullmatch(header or "")
    if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
        return 0, None
    return int(found[1]), None if found[2] is None else int(found[2]) + 1


def _expiry(header: str | None) -> int | None:
    if header is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", header):
        raise StoreError(400, "invalid_expiry", f"{HEADER_EXPIRES} is a Unix time in seconds.")
    return int(header)


def _headers(etag: str, modified_unix_s: float) -> dict[str, str]:
    return {
        "ETag": etag,
        "Last-Modified": formatdate(modified_unix_s, usegmt=True),
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }


def _json(body: object, status: int = 200) -> web.Response:
    return web.json_response(body, status=status)
