"""A ledger's database on SQLite or on a real PostgreSQL, and builders of the records that gateways and runtimes send.

`python tests/support/ledger_kit.py "What changes"` writes the migration from the committed ones to `store/tables.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from sqlalchemy import Table, select

from lorapool_api.usage_protocol import (
    PAGE_RECORDS,
    ROUTE_USAGE,
    AttemptEnd,
    BootRecord,
    BootState,
    CheckpointRecord,
    ClosedRecord,
    Ended,
    EndRecord,
    GatewayBatch,
    GatewayRecord,
    MinuteLine,
    MinuteRecord,
    OpenedRecord,
    RequestRecord,
    RuntimeRecord,
    UsagePage,
)
from lorapool_ledger.store.database import MIGRATIONS, Database

HOUR_S = 3600
T0_S = 1_793_491_200
"""2026-11-01 00:00 UTC."""
T0_MS = T0_S * 1000


def sqlite_url(folder: Path) -> str:
    """The URL of a database in a file of this folder."""
    return f"sqlite:///{folder / 'ledger.db'}"


def attempt_id(number: int) -> str:
    """A UUID of version 7 with this number in its last digits."""
    return f"019a3d00-0000-7000-8000-{number:012d}"


# --- records; every argument may be replaced


def boot(seq: int = 1, **given: Any) -> BootRecord:
    fields = {"started_unix_ms": T0_MS, "device": "cpu", "slots": 4, "slot_bytes": 400, "device_bytes": 1000, **given}
    return BootRecord(seq=seq, **fields)


def request(seq: int, number: int, **given: Any) -> RequestRecord:
    """A request of project `acme` on its adapter `acme/tone`: 10 prompt tokens (4 cached), 5 generated, 1 s."""
    fields = {
        "attempt": attempt_id(number),
        "request_id": f"request-{number}",
        "key_uid": "key-1",
        "project": "acme",
        "uid": "adapter-1",
        "digest": "sha256:1",
        "model": "acme/tone",
        "outcome": Ended.COMPLETED,
        "started_unix_ms": T0_MS + 1000 * seq,
        "ended_unix_ms": T0_MS + 1000 * seq + 900,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "gpu_ns": 1_000_000_000,
        **given,
    }
    return RequestRecord(seq=seq, **fields)


def checkpoint(seq: int, requests: Iterable[RequestRecord], uid: str = "adapter-1", **given: Any) -> CheckpointRecord:
    """The totals of these requests' account."""
    of = [item for item in requests if item.uid == uid]
    fields = {
        "requests": len(of),
        "prompt_tokens": sum(item.prompt_tokens for item in of),
        "cached_tokens": sum(item.cached_tokens for item in of),
        "completion_tokens": sum(item.completion_tokens for item in of),
        "gpu_ns": sum(item.gpu_ns for item in of),
        **given,
    }
    return CheckpointRecord(seq=seq, uid=uid, **fields)


def minute(seq: int, start_s: int = T0_S, *, uptime_s: float = 60, lines: Iterable[MinuteLine] = ()) -> MinuteRecord:
    listed = list(lines)
    return MinuteRecord(
        seq=seq,
        minute_unix_s=start_s,
        uptime_ns=int(uptime_s * 10**9),
        busy_ns=sum(line.gpu_ns for line in listed),
        lines=listed,
    )


def end(seq: int, **given: Any) -> EndRecord:
    return EndRecord(seq=seq, **{"ended_unix_ms": T0_MS + 60_000, **given})


def opened(seq: int, number: int, **given: Any) -> OpenedRecord:
    fields = {
        "attempt": attempt_id(number),
        "request_id": f"request-{number}",
        "key_uid": "key-1",
        "key": "acme-key",
        "project": "acme",
        "model": "acme/tone",
        "uid": "adapter-1",
        "digest": "sha256:1",
        "base_uid": "base-1",
        "base": "acme/base",
        "pod_uid": "pod-1",
        "boot_id": "boot-1",
        "route": "/v1/chat/completions",
        "opened_unix_ms": T0_MS + 1000 * seq,
        **given,
    }
    return OpenedRecord(seq=seq, **fields)


def closed(seq: int, number: int, **given: Any) -> ClosedRecord:
    fields = {
        "attempt": attempt_id(number),
        "outcome": AttemptEnd.COMPLETED,
        "code": 200,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "closed_unix_ms": T0_MS + 1000 * seq + 950,
        **given,
    }
    return ClosedRecord(seq=seq, **fields)


def batch(records: Iterable[GatewayRecord], boot_id: str = "gateway-1", **given: Any) -> GatewayBatch:
    fields = {"gateway": "gateway-pod-1", "now_unix_ms": T0_MS + HOUR_S * 1000, **given}
    return GatewayBatch(boot_id=boot_id, records=list(records), **fields)


def boot_state(boot_id: str, kept: Sequence[RuntimeRecord]) -> BootState:
    """As a runtime that keeps these records reports the process."""
    return BootState(
        boot_id=boot_id,
        first_seq=kept[0].seq if kept else 1,
        last_seq=kept[-1].seq if kept else 0,
        ended=bool(kept) and isinstance(kept[-1], EndRecord),
    )


@dataclass
class FakeRuntime:
    """`GET` and `DELETE /v1/usage` of one pod, over a real socket. Its records are what a test puts into `boots`."""

    boots: dict[str, list[RuntimeRecord]] = field(default_factory=dict)
    token: str = "token"
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    fail_acknowledge: bool = False
    now_s: Callable[[], float] = lambda: T0_S + 60.0

    async def get(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        self.asked.append(("GET", dict(request.query)))
        boot_id, after = request.query.get("boot") or next(iter(self.boots)), int(request.query.get("after", 0))
        ends_s = time.monotonic() + min(1.0, float(request.query.get("wait", 0)))
        while not (found := [one for one in self.boots.get(boot_id, ()) if one.seq > after]):
            if time.monotonic() >= ends_s:
                break
            await asyncio.sleep(0.01)
        states = [boot_state(name, kept) for name, kept in self.boots.items()]
        now_ms = int(self.now_s() * 1000)
        page = UsagePage(boot_id=boot_id, boots=states, records=found[:PAGE_RECORDS], now_unix_ms=now_ms)
        return web.Response(body=page.model_dump_json(by_alias=True), content_type="application/json")

    async def delete(self, request: web.Request) -> web.Response:
        self.asked.append(("DELETE", dict(request.query)))
        if self.fail_acknowledge:
            return web.Response(status=500)
        boot_id, through = request.query["boot"], int(request.query["through"])
        if boot_id not in self.boots:
            return web.Response(status=204)
        self.boots[boot_id] = [one for one in self.boots.get(boot_id, ()) if one.seq > through]
        if not self.boots[boot_id] and boot_id != list(self.boots)[-1]:
            del self.boots[boot_id]
        return web.Response(status=204)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeRuntime]:
        app = web.Application()
        app.router.add_get(ROUTE_USAGE, self.get)
        app.router.add_delete(ROUTE_USAGE, self.delete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


async def until(true: Callable[[], Awaitable[bool]], timeout_s: float = 30.0) -> None:
    """Waits until it is true. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not await true():  # noqa: ASYNC110  what it waits for is in another process or thread
            await asyncio.sleep(0.02)


async def rows(database: Database, table: Table) -> list[dict[str, Any]]:
    """All rows of a table."""
    return await database.read(lambda connection: [dict(row) for row in connection.execute(select(table)).mappings()])


def write_migration(message: str) -> None:
    """Writes the difference between the committed migrations and `store/tables.py` as a new migration."""
    from alembic import command
    from alembic.config import Config

    with tempfile.TemporaryDirectory() as folder:
        database = Database.open(sqlite_url(Path(folder)))
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        number = max((int(file.name[:4]) for file in (MIGRATIONS / "versions").glob("[0-9]*.py")), default=0) + 1
        with database.engine.connect() as connection:
            config.attributes["connection"] = connection
            command.revision(config, message, autogenerate=True, rev_id=f"{number:04d}")


if __name__ == "__main__":
    write_migration(sys.argv[1])
