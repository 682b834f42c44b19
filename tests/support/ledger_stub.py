"""A ledger in memory that follows the protocol of batches, with faults that a test switches on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from lorapool_api.usage_protocol import ROUTE_ATTEMPTS, BatchAnswer, GatewayBatch
from lorapool_gateway.ledger.journal import Journal

TOKEN = "l" * 48


@dataclass
class StubLedger:
    """Commits batches in memory by the rules of the protocol; a test makes it fail."""

    status: int = 200
    lose_answers: int = 0
    """Commits so many batches and cuts the connection."""
    committed: dict[str, list[Any]] = field(default_factory=dict)
    cursors: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    calls: int = 0
    port: int = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StubLedger]:
        app = web.Application(client_max_size=2**24)
        app.router.add_post(ROUTE_ATTEMPTS, self._post)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _post(self, request: web.Request) -> web.StreamResponse:
        self.calls += 1
        if request.headers["Authorization"] != f"Bearer {TOKEN}":
            return web.Response(status=401)
        if self.status != 200:
            return web.Response(status=self.status, text="no")
        batch = GatewayBatch.model_validate_json(await request.read())
        through = self.cursors.setdefault(batch.boot_id, 0)
        new = [record for record in batch.records if record.seq > through]
        if new and new[0].seq != through + 1:
            if batch.lost_before != new[0].seq:
                return web.json_response(BatchAnswer(through=through).dump(), status=409)
            self.gaps.append((through + 1, new[0].seq - 1))
        self.committed.setdefault(batch.boot_id, []).extend(new)
        self.cursors[batch.boot_id] = through = new[-1].seq if new else through
        if batch.ended:
            self.ended.add(batch.boot_id)
        if self.lose_answers:
            self.lose_answers -= 1
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(BatchAnswer(through=through).dump())

    def numbers(self, journal: Journal) -> list[int]:
        return [record.seq for record in self.committed.get(journal.boot_id, [])]
