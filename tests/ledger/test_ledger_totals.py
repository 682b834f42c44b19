"""Sums that are read once for a page equal what the single reports say, whatever has a price of its own.

They are read from sums of spans of days, except where a price changes within one; what is listed by day is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from ledger_kit import T0_S, rows, sqlite_url
from sqlalchemy import Connection, insert
from usage_kit import DAY, MONTH, NOW_S, SCOPES, amounts, fill_all, fill_prices, rounded

from lorapool_ledger.metrics import Metrics
from lorapool_ledger.reports.charges import Dimension, PriceBook, charges, totals
from lorapool_ledger.reports.fleet import fleet_cost
from lorapool_ledger.reports.health import outcomes
from lorapool_ledger.reports.totals import Totals
from lorapool_ledger.reports.usage import By, usage
from lorapool_ledger.store.database import Database
from lorapool_ledger.store.tables import correction, span
from lorapool_ledger.sums.rollups import RollUps

OWNER = SCOPES["owner"]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def month(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    sqlite = request.param == "sqlite"
    url = sqlite_url(tmp_path_factory.mktemp("totals")) if sqlite else request.getfixturevalue("postgres").database()
    database = Database.open(url)
    asyncio.run(database.write(fill_all))
    own = [(0, "globex/", "residency", "0.004"), (0, "models/llama", "residency", "0.003")]
    own += [(0, "models/llama", "cached", "0.07"), (T0_S + 4 * DAY, "acme/tone", "residency", "0.001")]
    asyncio.run(database.write(lambda connection: fill_prices(connection, *own, (T0_S + 6 * DAY, "gpu", "pod", "3"))))
    values = {
        "correction_id": "c-1", "recorded_unix_s": T0_S + 3 * DAY, "concerns_unix_s": T0_S, "project": "acme",
        "model": "acme/tone", "amount": "-0.125", "currency": "USD", "reason": "r", "author": "a",
    }  # fmt: skip
    asyncio.run(database.write(lambda connection: connection.execute(insert(correction).values(values))))
    asyncio.run(RollUps(database, Metrics(), now_s=lambda: NOW_S).catch_up())
    assert len(asyncio.run(rows(database, span))) == 4
    yield database
    asyncio.run(database.close())


@pytest.mark.parametrize("name", SCOPES)
async def test_totals_are_those_of_charges_usage_and_outcomes(month: Database, name: str) -> None:
    scope = SCOPES[name]

    def compare(connection: Connection) -> None:
        read = Totals(connection, scope, MONTH, PriceBook.read(connection))
        assert read.outcomes == outcomes(connection, scope, MONTH)
        by = [Dimension.PROJECT, Dimension.MODEL]
        of_model, of_project = charges(connection, scope, MONTH, by), charges(connection, scope, MONTH, by[:1])
        for found, listed, column, dimension in (
            (read.models(), of_model, By.MODEL, "model"),
            (read.projects(), of_project, By.PROJECT, "project"),
        ):
            counts = {row.group[0]: row for row in usage(connection, scope, MONTH, None, [column])}
            assert {one: sum_.requests for one, sum_ in found.items() if sum_.requests} == {
                one: row.requests for one, row in counts.items()
            }
            assert {one: sum_.tokens for one, sum_ in found.items() if sum_.tokens} == {
                one: row.input_tokens + row.completion_tokens for one, row in counts.items()
            }
            assert rounded({one: sum_.amount for one, sum_ in found.items()}) == rounded(amounts(listed, dimension))
        wholes = [totals(charges(connection, scope, MONTH, by)) for by in ([], [Dimension.DAY], [Dimension.KEY])]
        assert all(rounded(whole) == rounded(totals(of_model)) for whole in wholes)

    await month.read(compare)


async def test_the_cost_of_pods_is_the_same_from_totals_and_for_some_pods_alone(month: Database) -> None:
    def compare(connection: Connection) -> None:
        book = PriceBook.read(connection)
        whole = fleet_cost(connection, MONTH, book.prices)
        assert whole.idle
        assert whole.models
        assert whole == fleet_cost(connection, MONTH, book.prices, rows=Totals(connection, OWNER, MONTH, book).held)
        held = Totals(connection, OWNER, MONTH, book).held
        for model in {row.model for row in held if row.uid}:
            boots = {row.boot for row in held if row.model == model}
            some = fleet_cost(connection, MONTH, book.prices, boots=boots)
            assert some.models[model] == whole.models[model]

    await month.read(compare)
