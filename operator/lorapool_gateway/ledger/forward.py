"""Forwards the API of usage and costs to the ledger, which checks the key itself. Bodies are streamed, never held."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import aiohttp
from aiohttp import web

from lorapool_api.openai import RouteNotFoundError, UnavailableError
from lorapool_gateway.ledger.sender import LedgerClient

ROUTE_ORGANIZATION = "/v1/organization/"
SILENCE_S = 30.0
MAX_CALLS = 32
"""Calls at one time in this process."""
MAX_BYTES = 256 * 2**20
RETRY_AFTER_S = 5.0
_PATH = re.compile(r"/v1/organization(/[A-Za-z0-9_-]{1,128}){1,8}")
_KEPT = ("Content-Type", "Content-Disposition", "Retry-After", "x-should-retry")


class Forwarder:
    def __init__(self, ledger: LedgerClient | None) -> None:
        """`ledger`: None if the release has none."""
        self._ledger = ledger
        self._room = asyncio.Semaphore(MAX_CALLS)

    async def forward(self, request: web.BaseRequest, headers: Callable[[], dict[str, str]]) -> web.StreamResponse:
        """The ledger's response, with `headers()` added. Raises RouteNotFoundError, UnavailableError."""
        if self._ledger is None:
            raise UnavailableError(
                "This release has no ledger, which has the API for usage and costs. See the chart's ledger.enabled."
            )
        if not _PATH.fullmatch(request.rel_url.raw_path):
            raise RouteNotFoundError(f"There is no {request.path[:200]}.")
        if self._room.locked():
            raise UnavailableError("Too many calls for usage and costs run at the same time.", retry_after_s=1)
        path = request.rel_url.raw_path + (f"?{query}" if (query := request.rel_url.raw_query_string) else "")
        sent: web.StreamResponse | None = None
        async with self._room:
            try:
                authorization = {"Authorization": request.headers.get("Authorization", "")}
                async with self._ledger.call("GET", path, authorization, silence_s=SILENCE_S) as answer:
                    kept = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
                    sent = web.StreamResponse(status=answer.status, headers={**headers(), **kept})
                    await sent.prepare(request)
                    size = 0
                    async for part in answer.content.iter_any():
                        size += len(part)
                        if size > MAX_BYTES:
                            raise aiohttp.ClientPayloadError("the response is too long")
                        await sent.write(part)
                    await sent.write_eof()
            except (aiohttp.ClientError, TimeoutError) as error:
                if sent is None:
                    raise UnavailableError(
                        "The ledger cannot be reached. Try again.",
                        code="ledger_unavailable",
                        retry_after_s=RETRY_AFTER_S,
                    ) from error
                if request.transport is not None:
                    request.transport.abort()  # the response ends without its end
        assert sent is not None
        return sent
