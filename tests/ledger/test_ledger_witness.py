"""The ledger against witnesses: under kills of every process, what it has is what the engines computed, per attempt."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import kill_points
import pytest
from ledger_kit import rows, sqlite_url, until
from postgres_kit import running_postgres
from witness_kit import Deployment, deployment

from lorapool_ledger.metrics import Metrics
from lorapool_ledger.store import tables
from lorapool_ledger.store.database import Database
from lorapool_ledger.sums.reconcile import Reconciler
from lorapool_ledger.sums.rollups import RollUps

MOST_S = 600.0
"""Of the deep test's requests; starting, the kills at the end and the comparison come to that."""
SETTLED_S = 600
"""The checks look from so much later, so that no half is waited for any more."""


async def check(here: Deployment, url: str) -> str:
    """Compares the ledger with the witnesses. Returns what was compared, as text."""
    for program in here.gateways:
        await program.kill(signal.SIGTERM)  # it sends what is left
        await program.start()  # and what an earlier process left
    database = Database.open(url)
    computed = here.computed()

    async def complete() -> bool:
        halves = {row["attempt"] for row in await rows(database, tables.runtime_request)}
        opened = {row["attempt"] for row in await rows(database, tables.attempt_opened)}
        return computed.keys() <= halves and halves <= opened

    try:
        await until(complete, 120)
        await asyncio.to_thread(here.ledger.stop)
        halves = {row["attempt"]: row for row in await rows(database, tables.runtime_request)}
        opened = {row["attempt"]: row for row in await rows(database, tables.attempt_opened)}
        closed = {row["attempt"]: row for row in await rows(database, tables.attempt_closed)}
        assert len(halves) == len(await rows(database, tables.runtime_request))  # none is doubled
        wrong = {
            attempt: (computed.get(attempt), row["outcome"], counts)
            for attempt, row in halves.items()
            if not _agree(computed.get(attempt, (0, 0, 0)), counts := _counts(row), row["outcome"])
        }
        assert wrong == {}
        # A gateway that is killed in the turn in which it sends the last byte writes no end: the runtime's half bills.
        ends = {attempt: row["outcome"] for attempt, row in (halves | closed).items()}
        billed = Counter(opened[attempt]["request_id"] for attempt, end in ends.items() if end == "completed")
        whole = [answer for answer in here.answers if answer.whole]
        assert {answer.request_id for answer in whole} <= billed.keys()
        of_request: dict[str, list[tuple[int, int]]] = {}
        for attempt, end in ends.items():
            if end == "completed":
                counts = _counts(halves[attempt])
                of_request.setdefault(opened[attempt]["request_id"], []).append((counts[0], counts[2]))
        for answer in whole:
            assert (answer.prompt_tokens, answer.completion_tokens) in of_request[answer.request_id], answer
        later_s = time.time() + SETTLED_S
        await RollUps(database, Metrics(), now_s=lambda: later_s).catch_up()
        sums = await rows(database, tables.usage_hour)
        assert sum(row["completion_tokens"] for row in sums) == sum(_counts(row)[2] for row in halves.values())
        findings = await Reconciler(database, Metrics(), now_s=lambda: later_s).reconcile()
        assert findings == []
        assert await rows(database, tables.finding) == []
        outcomes = Counter(row["outcome"] for row in halves.values())
        return f"{len(here.answers)} requests, {len(halves)} attempts with tokens, {dict(outcomes)}"
    finally:
        await database.close()


def _counts(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]


def _agree(witness: tuple[int, int, int], ledger: tuple[int, int, int], outcome: str) -> bool:
    """Equal; a kill between the witness's line and the runtime's count of the same step leaves a lost one short."""
    if outcome != "lost":
        return witness == ledger
    return witness == ledger or (ledger[2] <= witness[2] <= ledger[2] + 2 and ledger[0] in (0, witness[0]))


async def run(
    folder: Path, url: str, requests: int, kills: int, seed: int, *, at_once: int = 8, most_s: float = math.inf
) -> str:
    """Compares what was sent in any case, and fails afterwards if that was too little."""
    async with deployment(folder, url) as here:
        began_s = time.monotonic()
        killing = asyncio.create_task(here.kill_at_random(requests, kills, seed))
        await here.load(requests, at_once=at_once, seed=seed, most_s=most_s)
        killed, took_s = await killing, time.monotonic() - began_s
        ended = Counter("whole" if one.whole else "left" if one.left else str(one.status) for one in here.answers)
        text = f"{await check(here, url)}; clients {dict(ended)}; killed {dict(killed)}; seed {seed}, {took_s:.0f} s"
        assert len(here.answers) >= requests, text
        assert sum(killed.values()) == kills, text
        assert ended["whole"] > requests // 2, text
        return text


async def test_the_ledger_has_what_the_engines_computed(tmp_path: Path) -> None:
    print(await run(tmp_path, sqlite_url(tmp_path), requests=300, kills=5, seed=int(time.time())))


async def test_a_kill_at_each_point_of_gateway_and_ledger_loses_and_doubles_nothing(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path)
    async with deployment(tmp_path, url, gateways=1, runtimes=1) as here:
        reached = await here.kill_at_points()
        assert reached == [*kill_points.GATEWAY, *kill_points.LEDGER]
        print(await check(here, url))


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_ten_thousand_requests_under_kills(tmp_path: Path, kind: str) -> None:
    """Takes about ten minutes on two cores. LORAPOOL_WITNESS_REQUESTS=100 tries it with fewer, and with fewer kills."""
    requests = int(os.environ.get("LORAPOOL_WITNESS_REQUESTS", "10000"))
    kills, seed = min(40, max(2, requests // 50)), int(time.time())
    with running_postgres() if kind == "postgresql" else contextlib.nullcontext() as server:
        url = sqlite_url(tmp_path) if server is None else server.database()
        print(await run(tmp_path, url, requests, kills, seed, at_once=16, most_s=MOST_S))


@pytest.mark.deep
async def test_a_ledger_that_is_away_for_ten_minutes_costs_requests_nothing_and_catches_up_exactly(
    tmp_path: Path,
) -> None:
    """Prints the median duration of a request before, during and after. LORAPOOL_WITNESS_AWAY_S=20 tries it shorter."""
    away_s, url = float(os.environ.get("LORAPOOL_WITNESS_AWAY_S", "600")), sqlite_url(tmp_path)
    async with deployment(tmp_path, url) as here:
        medians, first = {}, 0

        async def phase(name: str, seconds: float) -> None:
            nonlocal first
            began = len(here.answers)
            await here.load(10**6, at_once=2, seed=7, first=first, most_s=seconds)
            answers = here.answers[began:]
            assert all(answer.whole or answer.left for answer in answers)
            medians[name] = statistics.median(answer.took_s for answer in answers if answer.whole)
            first += 10**6

        await phase("warm-up", away_s / 20)
        await phase("before", away_s / 10)
        await asyncio.to_thread(here.ledger.stop, signal.SIGKILL)
        for part in range(1, 6):
            await phase(f"away, part {part} of 5", away_s / 5)
        await asyncio.to_thread(here.ledger.start)
        await phase("after", away_s / 10)
        print({name: f"{median * 1000:.1f} ms" for name, median in medians.items()}, await check(here, url))
