"""How long each page of the console takes with 10 million requests, 10,000 adapters and 100,000 keys.

    PYTHONPATH=bench:tests/support:tests/support/worlds python bench/ledger_pages.py --folder /tmp/ledger-pages

The database is SQLite in a file of the folder, or with `--postgres` a PostgreSQL 15 that has its data there. The time
that PostgreSQL's own processes work is not in `processor`.

The requests are spread over 30 days. Each key uses one adapter of its project and was used on half of the days, so the
daily sums by key have about 1.5 million rows and those of adapters 300,000. Facts of single requests are made for the
last day, which is what pages read of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, CookieJar
from postgres_kit import Postgres
from sqlalchemy import Table
from usage_kit import DAY, DEFAULT_PRICES, NOW_S, fill_prices, live_keys, serving_all

from lorapool_ledger.metrics import Metrics
from lorapool_ledger.store import tables
from lorapool_ledger.store.database import Database
from lorapool_ledger.sums.rollups import RollUps

REQUESTS, ADAPTERS, KEYS, PROJECTS, DAYS, PODS = 10_000_000, 10_000, 100_000, 1_000, 30, 20
START_S = (NOW_S // DAY - DAYS + 1) * DAY
LIMIT_S = 1.0
OWNER = (
    *("", "bases", "adapters", "adapters?q=project-7/", "adapter/project-7/adapter-7", "tenants", "project/project-7"),
    *("bill/project-7", "bill", "reconciliation", "failures", "quotas", "jobs", "requests?id=request-77", "prices"),
)
TENANT = ("", "adapters", "adapter/acme/adapter-0", "bill", "failures", "requests?id=request-77", "prices", "usage.csv")


def project(number: int) -> str:
    """Projects 0 to 999; the first one is that of the tenant's key."""
    return "acme" if number == 0 else f"project-{number}"


def fill(database: Database) -> None:
    """Inserts everything with plain statements of the driver, some minutes' work otherwise."""
    connection = database.engine.raw_connection()
    write = connection.cursor()

    def insert(table: Table, rows: Iterable[tuple[Any, ...]]) -> None:
        if database.dialect == "sqlite":
            write.executemany(f"INSERT INTO {table.name} VALUES ({','.join('?' * len(table.c))})", rows)
            return
        with write.copy(f"COPY {table.name} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)

    if database.dialect == "sqlite":
        write.execute("PRAGMA synchronous = OFF")
        write.execute("BEGIN")
    insert(tables.usage_day, _days())
    sums = ", ".join(f"sum({column.name})" for column in list(tables.usage_day.c)[7:])
    by = "day_unix_s, project, base, uid, model, outcome"
    write.execute(f"INSERT INTO model_day SELECT {by}, {sums} FROM usage_day GROUP BY {by}")
    insert(tables.boot, _boots())
    insert(tables.pod_day, _pods())
    insert(tables.api_key, ((f"key-{n}", f"key-{n}", "") for n in range(KEYS)))
    known = {"id": 1, "boot_id": "g", "gateway": "gateway-1", "cursor_seq": 9, "seen_unix_ms": NOW_S * 1000}
    insert(tables.gateway, [_row(tables.gateway, known)])
    opened, closed, runtime = _facts()
    insert(tables.attempt_opened, opened)
    insert(tables.attempt_closed, closed)
    insert(tables.runtime_request, runtime)
    write.execute("COMMIT")
    write.execute("ANALYZE")
    connection.commit()
    connection.close()


@contextlib.contextmanager
def database_in(folder: Path, *, postgres: bool) -> Iterator[tuple[str, bool]]:
    """The URL of the database in the folder, and whether it is new."""
    folder.mkdir(parents=True, exist_ok=True)
    if not postgres:
        file = folder.absolute() / "ledger.db"
        yield f"sqlite:///{file}", not file.exists()
        return
    data = folder.absolute() / "postgres"
    is_new = not data.exists()
    data.mkdir(exist_ok=True)
    server = Postgres(data).start()
    try:
        yield server.database() if is_new else server.url("test0"), is_new
    finally:
        server.stop(signal.SIGINT)


def _days() -> Iterator[tuple[Any, ...]]:
    each = REQUESTS // (KEYS * DAYS // 2)
    for day in range(DAYS):
        for number in range(KEYS):
            if (number + day) % 2:
                continue
            adapter = number % ADAPTERS
            name = project(adapter % PROJECTS)
            outcome = "client_left" if number % 10 == 3 else "failed" if number % 100 == 7 else "completed"
            billed = outcome != "failed"
            counts = (812 * each, 640 * each, 97 * each, 10**9 * each)
            charged = (172 * each, 640 * each, 97 * each) if billed else (0, 0, 0)
            yield (
                *(START_S + day * DAY, name, f"key-{number}", f"models/base-{adapter % 5}", f"uid-{adapter}"),
                *(f"{name}/adapter-{adapter}", outcome, each, *counts, *charged, 97 * each),
            )


def _pods() -> Iterator[tuple[Any, ...]]:
    day_ns = DAY * 10**9
    for day in range(DAYS):
        at = START_S + day * DAY
        for pod in range(PODS):
            yield at, pod + 1, "*", "", day_ns, day_ns // 2, str(ADAPTERS // PODS * 2**28 * day_ns)
            for adapter in range(pod, ADAPTERS, PODS):
                name = project(adapter % PROJECTS)
                yield at, pod + 1, f"uid-{adapter}", f"{name}/adapter-{adapter}", 0, day_ns // 1200, str(2**28 * day_ns)


def _boots() -> Iterator[tuple[Any, ...]]:
    for pod in range(PODS):
        values = {
            "id": pod + 1, "boot_id": f"boot-{pod}", "pod_uid": f"pod-{pod}", "pod": f"base-{pod % 5}-{pod}",
            "base_uid": f"base-{pod % 5}", "base": f"models/base-{pod % 5}", "profile": "gpu", "device": "H200",
            "slots": 512, "slot_bytes": 2**37, "device_bytes": 2**37, "started_unix_ms": START_S * 1000,
            "cursor_seq": 9, "seen_unix_ms": NOW_S * 1000, "end": "",
        }  # fmt: skip
        yield _row(tables.boot, values)


def _row(table: Table, values: dict[str, Any]) -> tuple[Any, ...]:
    """The values of a row, with 0 for columns that pages do not read."""
    return tuple(values.get(column.name, None if column.nullable else 0) for column in table.c)


def _facts() -> tuple[list[Any], list[Any], list[Any]]:
    """Both halves of the requests of the last day."""
    draw, opened, closed, runtime = random.Random(1), [], [], []
    count = REQUESTS // DAYS
    for number in range(count):
        adapter = draw.randrange(ADAPTERS)
        name, key = project(adapter % PROJECTS), draw.randrange(KEYS)
        at = (NOW_S - DAY) * 1000 + number * DAY * 1000 // count
        outcome = "client_left" if number % 10 == 3 else "lost" if number % 100 == 7 else "completed"
        given = {
            "attempt": f"attempt-{number:09d}", "gateway": 1, "seq": number + 1, "request_id": f"request-{number}",
            "key_uid": f"key-{key}", "key": f"key-{key}", "owner": "", "project": name,
            "model": f"{name}/adapter-{adapter}", "uid": f"uid-{adapter}", "digest": "d", "base_uid": "b",
            "base": "models/base-0",
            "pod_uid": "pod-0", "boot_id": "boot-0", "route": "/v1/completions", "stream": 0,
            "opened_unix_ms": at, "outcome": outcome,
            "code": 200, "prompt_tokens": 812, "cached_tokens": 640, "completion_tokens": 97, "gpu_ns": 10**9,
            "cold_ms": 900 if number % 50 == 0 else None, "closed_unix_ms": at + 900, "boot": 1,
            "first_seq": number + 1, "requests": 1, "sequences": 1, "started_unix_ms": at, "ended_unix_ms": at + 890,
        }  # fmt: skip
        opened.append(_row(tables.attempt_opened, given))
        closed.append(_row(tables.attempt_closed, given))
        ended = "cancelled" if outcome == "client_left" else "completed"
        runtime.append(_row(tables.runtime_request, given | {"outcome": ended}))
    return opened, closed, runtime


async def measure(url: str, name: str, paths: tuple[str, ...], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The seconds of each page, and how many of them the processor worked, in every round."""
    found: dict[str, list[tuple[float, float]]] = {}
    async with ClientSession(cookie_jar=CookieJar(unsafe=True)) as browser:
        await browser.post(f"{url}/console/login", data={"key": f"lp-{name}"})
        for path in paths:
            for _ in range(rounds):
                began, worked = time.perf_counter(), time.process_time()
                mark = "&" if "?" in path else "?"
                async with browser.get(f"{url}/console/{path}{mark}period=30d") as answer:
                    body = await answer.read()
                    assert answer.status == 200, (path, answer.status, body[-300:])
                took = time.perf_counter() - began, time.process_time() - worked
                found.setdefault(f"{name} /{path}", []).append(took)
    return found


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=Path, help="write the seconds of each page as JSON")
    parser.add_argument("--postgres", action="store_true", help="measure PostgreSQL instead of SQLite")
    given = parser.parse_args()
    with database_in(given.folder, postgres=given.postgres) as (database_url, is_new):
        database = Database.open(database_url)
        if is_new:
            fill(database)
            await database.write(lambda connection: fill_prices(connection, *DEFAULT_PRICES, (0, "gpu", "pod", "2.40")))
        await RollUps(database, Metrics(), now_s=lambda: NOW_S).catch_up()
        async with serving_all(database, live_keys()) as url:
            found = await measure(url, "owner", OWNER, given.rounds) | await measure(url, "acme", TENANT, given.rounds)
        await database.close()
    for page, rounds in found.items():
        times, worked = zip(*rounds, strict=True)
        wall, cpu = statistics.median(times), statistics.median(worked)
        slow = "  above the target" if wall >= LIMIT_S else ""
        print(f"{page:<44} {wall:6.3f} s  (first {times[0]:.3f}, processor {cpu:.3f}){slow}")
    if given.records:
        given.records.write_text(
            json.dumps({page: [[round(one, 4) for one in took] for took in rounds] for page, rounds in found.items()})
        )


if __name__ == "__main__":
    asyncio.run(main())
