"""Reports that read sums of spans of days say what those of the days say, whatever changes within a span."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import ledger_kit as kit
import pytest
from ledger_kit import T0_S, request, rows
from sqlalchemy import Connection, delete, insert, select, text, update
from usage_kit import DAY, MONTH, NOW_S, SCOPES, amounts, fill_all, fill_prices, rounded

from lorapool_ledger.intake import runtime_page
from lorapool_ledger.intake.runtime_page import Pod
from lorapool_ledger.metrics import Metrics
from lorapool_ledger.reports.adapters import residency
from lorapool_ledger.reports.charges import Dimension, PriceBook, charges
from lorapool_ledger.reports.fleet import fleet_cost, pods
from lorapool_ledger.reports.health import outcomes
from lorapool_ledger.reports.periods import Period
from lorapool_ledger.reports.totals import Totals
from lorapool_ledger.reports.usage import By, usage
from lorapool_ledger.store import tables
from lorapool_ledger.store.database import Database
from lorapool_ledger.store.tables import SPAN_S, pod_day, pod_span, span
from lorapool_ledger.store.writes import HOUR_S
from lorapool_ledger.sums.check_hours import check_hours
from lorapool_ledger.sums.retention import Retention
from lorapool_ledger.sums.rollups import RollUps

FIRST_S = -(-T0_S // SPAN_S) * SPAN_S
"""The first whole span of the month: from its third day to its tenth."""
SPANS = [FIRST_S + number * SPAN_S for number in range(-1, 3)]
"""All that are made: the first one began before there was any usage."""
INSIDE_S = FIRST_S + 3 * DAY
PERIODS = (
    MONTH,
    Period(T0_S + DAY, T0_S + 25 * DAY),
    Period(FIRST_S, FIRST_S + 2 * SPAN_S),
    Period(INSIDE_S, T0_S + 29 * DAY),
)
POD = Pod("pod-9", "late-0", "base-1", "models/llama", "gpu")


@pytest.fixture
async def month(database: Database) -> Database:
    """A month whose spans are made. Prices change within the first one and where it ends."""
    await database.write(fill_all)
    prices = [(INSIDE_S, "*", "residency", "0.007"), (INSIDE_S + DAY, "acme/", "cached", "0.01")]
    await database.write(lambda connection: fill_prices(connection, *prices, (INSIDE_S, "gpu", "pod", "3")))
    if database.dialect == "postgresql":  # the boot of `fill_all` took the number 1 by itself
        setval = text("SELECT setval(pg_get_serial_sequence('boot', 'id'), 100)")
        await database.write(lambda connection: connection.execute(setval).scalar())
    await catch_up(database)
    assert await made(database) == SPANS
    return database


async def catch_up(database: Database, now_s: int = NOW_S) -> None:
    await RollUps(database, Metrics(), now_s=lambda: now_s).catch_up()


async def made(database: Database) -> list[int]:
    return sorted(row["day_unix_s"] for row in await rows(database, span))


async def reports(database: Database) -> list[Any]:
    """What all reports say. Compares them with what they say when no span is made."""

    def read(connection: Connection) -> list[Any]:
        found: list[Any] = []
        book = PriceBook.read(connection)
        for period in PERIODS:
            for scope in (SCOPES["owner"], SCOPES["two projects"], SCOPES["acme-tone"]):
                totals = Totals(connection, scope, period, book)
                amounts_of = {name: one.amount for name, one in totals.models().items()}
                found += [totals.outcomes, rounded(amounts_of), outcomes(connection, scope, period)]
                found += [{name: one[:2] for name, one in totals.projects().items()}]
                found += [usage(connection, scope, period, None, [By.PROJECT, By.MODEL])]
                for by in ([], [Dimension.PROJECT], [Dimension.MODEL, Dimension.ITEM]):
                    listed = charges(connection, scope, period, by)
                    found += [rounded(amounts(listed, "project")), rounded(amounts(listed, "model"))]
                    found += [rounded({str(n): one.quantity for n, one in enumerate(listed)})]
            found += [fleet_cost(connection, period, book.prices), pods(connection, period)]
            found += [residency(connection, "acme/tone", period)]
        return found

    def without(connection: Connection) -> list[Any]:
        connection.execute(delete(span))
        return read(connection)

    with_spans = await database.read(read)
    kept = await rows(database, span)
    without_spans = await database.write(without)
    if kept:
        await database.write(lambda connection: connection.execute(insert(span), kept))
    assert with_spans == without_spans
    return with_spans


async def test_a_price_that_changes_within_a_span_is_read_by_days(month: Database) -> None:
    await reports(month)
    changed = update(tables.model_span).values(requests=0)
    await month.write(lambda connection: connection.execute(changed))  # a proof that spans are read at all
    with pytest.raises(AssertionError):
        await reports(month)


async def test_a_late_record_changes_a_day_of_a_span(month: Database) -> None:
    before = await reports(month)
    ended = (INSIDE_S + 5 * HOUR_S) * 1000
    late = [kit.boot(), request(2, 2, started_unix_ms=ended - 900, ended_unix_ms=ended, prompt_tokens=10**12)]

    def take(connection: Connection) -> None:
        state = kit.boot_state("boot-9", late)
        runtime_page.take(connection, POD, "boot-9", late, [state], NOW_S * 1000, NOW_S)

    await month.write(take)
    await catch_up(month)
    assert await made(month) == [SPANS[0], *SPANS[2:]]
    after = await reports(month)
    assert after != before
    await catch_up(month)
    assert await made(month) == SPANS
    assert await reports(month) == after


async def test_retention_leaves_spans_as_they_are(month: Database) -> None:
    before = await reports(month)
    later = NOW_S + 90 * DAY
    assert await Retention(month, 62, now_s=lambda: later).delete_old() > 0
    assert await reports(month) == before


async def test_a_correction_counts_once(month: Database) -> None:
    values = {
        "correction_id": "c-1", "recorded_unix_s": INSIDE_S + 5, "concerns_unix_s": T0_S, "project": "acme",
        "model": "acme/tone", "amount": "-0.000000000125", "currency": "USD", "reason": "r", "author": "a",
    }  # fmt: skip

    def whole(connection: Connection) -> Decimal:
        return rounded(amounts(charges(connection, SCOPES["owner"], MONTH), "currency"))["USD"]

    before = await month.read(whole)
    await month.write(lambda connection: connection.execute(insert(tables.correction).values(values)))
    await reports(month)
    assert await month.read(whole) - before == Decimal("-0.000000000125")


async def test_a_span_waits_for_its_end_and_its_hours(month: Database) -> None:
    await month.write(lambda connection: connection.execute(delete(span)))
    mark = {"hour_unix_s": FIRST_S + SPAN_S + 7 * HOUR_S, "marked": 1}
    await month.write(lambda connection: connection.execute(insert(tables.dirty_hour).values(mark)))
    await catch_up(month, FIRST_S + 3 * SPAN_S + DAY - 1)
    assert await made(month) == SPANS[:2]
    await catch_up(month, FIRST_S + 3 * SPAN_S + DAY)
    assert await made(month) == SPANS


@pytest.mark.parametrize(("table", "column"), [("model_span", "billed_cached_tokens"), ("pod_span", "byte_ns")])
async def test_a_wrong_sum_of_a_span_is_found(month: Database, table: str, column: str) -> None:
    def found(connection: Connection, earlier: set[str]) -> set[str]:
        turns = range(T0_S, T0_S + 4 * HOUR_S, HOUR_S)
        listed = [one for at in turns for one in check_hours(connection, at, earlier, NOW_S)[0]]
        return {one.subject for one in listed if one.subject.count("/") == 2}

    assert await month.read(lambda connection: found(connection, set())) == set()
    wrong = tables.metadata.tables[table]
    change = update(wrong).where(wrong.c.day_unix_s == FIRST_S + SPAN_S, wrong.c.model.like("acme/tone"))
    await month.write(lambda connection: connection.execute(change.values({column: "3"})))
    subject = f"{FIRST_S + SPAN_S}/{'project/acme' if table == 'model_span' else 'boot/1'}"
    assert await month.read(lambda connection: found(connection, set())) == {subject}
    for_again = await month.read(lambda connection: check_hours(connection, T0_S, {subject}, NOW_S)[0])
    assert subject in {one.subject for one in for_again}


async def test_the_row_of_a_pod_has_the_bytes_of_its_adapters(month: Database) -> None:
    """Also that of a day which is made again from its hours."""
    await month.write(
        lambda connection: connection.execute(insert(tables.dirty_hour).values(hour_unix_s=INSIDE_S, marked=1))
    )
    await catch_up(month)
    await catch_up(month)
    for table in (pod_day, pod_span):
        for start in await month.read(lambda c, t=table: list(c.execute(select(t.c.day_unix_s).distinct()).scalars())):
            bytes_: dict[bool, int] = {True: 0, False: 0}
            for row in await rows(month, table):
                if row["day_unix_s"] == start and row["uid"]:
                    bytes_[row["uid"] == "*"] += int(row["byte_ns"])
            assert bytes_[True] == bytes_[False] > 0
