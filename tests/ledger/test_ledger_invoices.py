"""Invoices: lines, closing, corrections and late usage. A closed month's document stays byte-identical (Show 8)."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select

from lorapool_ledger import commands
from lorapool_ledger.billing.invoice import lines_in, month_bounds, sha256_of
from lorapool_ledger.billing.prices import GIB_HOUR_BYTE_NS, PriceListError, parse_prices
from lorapool_ledger.intake.corrections import CorrectionError, NewCorrection, record_correction
from lorapool_ledger.intake.price_list import PriceListKeeper, record_prices
from lorapool_ledger.reports.invoices import invoice_csv, invoice_html
from lorapool_ledger.settings import Settings
from lorapool_ledger.store.database import Database
from lorapool_ledger.store.tables import boot, dirty_hour, invoice, model_day, pod_day, price, usage_day
from lorapool_ledger.sums.invoices import InvoiceCloser, close_month, closed_months, due_months, invoice_of

LIST = """
prices:
  - {effectiveFrom: 2026-10-01, scope: "*", currency: EUR, promptPerMillion: 1, cachedPerMillion: 0.25,
     completionPerMillion: 4, residencyPerGiBHour: 0.02}
"""
DEARER = LIST + '  - {effectiveFrom: 2026-11-20, scope: "*", currency: EUR, completionPerMillion: 8}\n'


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


DECEMBER_5 = at("2026-12-05T10:00:00")


def used(connection: Connection, day: str, *, model: str = "acme/tone", project: str = "acme", **counts: int) -> None:
    given: dict[str, Any] = {"billed_prompt_tokens": 0, "billed_cached_tokens": 0, "billed_completion_tokens": 0}
    row = {
        **given,
        "day_unix_s": at(day),
        "project": project,
        "base": "pool/base",
        "uid": model,
        "model": model,
        "outcome": "completed",
        "requests": 1,
        "delivered_tokens": 0,
        **{"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "gpu_ns": 0},
        **counts,
    }
    connection.execute(insert(model_day), [row])
    connection.execute(insert(usage_day), [row | {"key_uid": "k"}])


@pytest.fixture
async def database(database: Database) -> Database:
    await database.write(lambda c: record_prices(c, parse_prices(LIST), at("2026-10-05")))
    return database


def november(connection: Connection) -> None:
    """3 million prompt tokens, 1 million cached and 2.5 million generated of acme; one of other."""
    used(connection, "2026-11-03", billed_prompt_tokens=2_000_000, billed_completion_tokens=2_000_000)
    used(connection, "2026-11-30", billed_prompt_tokens=1_000_000, billed_cached_tokens=1_000_000, requests=9)
    used(connection, "2026-11-30", model="acme/x", billed_completion_tokens=500_000)
    used(connection, "2026-11-30", model="other/y", project="other", billed_completion_tokens=1)
    used(connection, "2026-12-01", billed_completion_tokens=7)


async def test_an_invoice_has_a_line_for_each_model_and_item_and_adds_up(database: Database) -> None:
    await database.write(november)
    found = json.loads(await database.read(lambda c: invoice_of(c, "acme", "2026-11")))
    lines = [(x["model"], x["item"], x["quantity"], x["unit_price"], x["amount"]) for x in found["lines"]]
    assert lines == [
        ("acme/tone", "prompt", 3_000_000, "1", "3.00"),
        ("acme/tone", "cached", 1_000_000, "0.25", "0.25"),
        ("acme/tone", "completion", 2_000_000, "4", "8.00"),
        ("acme/x", "completion", 500_000, "4", "2.00"),
    ]
    assert (found["total"], found["currency"], found["closed_unix_s"]) == ("13.25", "EUR", None)


async def test_a_price_that_changes_within_a_month_is_two_lines(database: Database) -> None:
    await database.write(lambda c: record_prices(c, parse_prices(DEARER), at("2026-11-20T00:00:01")))
    await database.write(november)
    found = json.loads(await database.read(lambda c: invoice_of(c, "acme", "2026-11")))
    generated = [(x["unit_price"], x["amount"]) for x in found["lines"] if x["item"] == "completion"]
    assert generated == [("4", "8.00"), ("8", "4.00")]


async def test_rounding_is_once_a_line_and_never_a_day(database: Database) -> None:
    def month(connection: Connection) -> None:
        for day in range(1, 31):
            used(connection, f"2026-11-{day:02d}", billed_completion_tokens=1000)  # 0.004 EUR each

    await database.write(month)
    assert json.loads(await database.read(lambda c: invoice_of(c, "acme", "2026-11")))["total"] == "0.12"


async def test_memory_of_adapters_is_billed_to_their_namespace_by_the_gibibyte_hour(database: Database) -> None:
    def resident(connection: Connection) -> None:
        columns = {"boot_id": "b", "pod_uid": "p", "pod": "p", "base_uid": "u", "base": "pool/base"}
        key = connection.execute(insert(boot).values(**columns, started_unix_ms=0, seen_unix_ms=0)).inserted_primary_key
        assert key is not None
        for uid, model, hours in (("a", "acme/tone", 700), ("", "", 1), ("*", "", 9), ("z", "acmeother/tone", 1)):
            row = {
                "day_unix_s": at("2026-11-30"),
                "boot": key[0],
                "uid": uid,
                "model": model,
                "uptime_ns": 0,
                "gpu_ns": 0,
            }
            connection.execute(insert(pod_day).values(**row, byte_ns=str(hours * GIB_HOUR_BYTE_NS // 2)))

    await database.write(resident)
    text = await database.read(lambda c: invoice_of(c, "acme", "2026-11"))
    [line] = lines_in(text)
    assert (line.item, line.unit, line.amount) == ("residency", "gibibyte_hours", "7.00")
    assert "350.000000" in invoice_csv(text)


async def close(database: Database, month: str = "2026-11", now: int = DECEMBER_5) -> int:
    return await database.write(lambda c: close_month(c, month, now))


async def documents(database: Database) -> dict[tuple[str, str], str]:
    query = select(invoice.c.project, invoice.c.month, invoice.c.document)
    return {(p, m): text for p, m, text in await database.read(lambda c: c.execute(query).all())}


REFUND = NewCorrection(
    "ticket-1", "acme", at("2026-11-03"), "the adapter was broken", "ops@example.com", amount=Decimal("-5")
)


async def test_after_a_correction_and_a_price_change_a_closed_invoice_is_byte_identical(database: Database) -> None:
    await database.write(november)
    assert await close(database) == 2
    before = await documents(database)
    pages = {key: (invoice_html(text), invoice_csv(text)) for key, text in before.items()}

    def change(connection: Connection) -> None:
        record_correction(connection, REFUND, DECEMBER_5 + 1)
        record_prices(connection, parse_prices(DEARER.replace("2026-11-20", "2026-12-05")), DECEMBER_5 + 1)
        used(connection, "2026-12-06", model="acme/x", billed_completion_tokens=1_000_000)
        used(connection, "2026-11-29", model="acme/x", billed_completion_tokens=250_000)  # arrived late

    await database.write(change)
    assert await close(database, now=DECEMBER_5 + 9) == 2  # again: the stored documents win
    assert await documents(database) == before
    assert {key: (invoice_html(text), invoice_csv(text)) for key, text in before.items()} == pages
    months = await database.read(lambda c: closed_months(c, "acme"))
    assert months == [("2026-11", sha256_of(before["acme", "2026-11"]))]
    december = json.loads(await database.read(lambda c: invoice_of(c, "acme", "2026-12")))
    assert [(x["month"], x["model"], x["item"], x["unit_price"], x["amount"]) for x in december["lines"]] == [
        ("2026-12", "acme/tone", "completion", "4", "0.00"),
        ("2026-12", "acme/x", "completion", "8", "8.00"),
        ("2026-11", "acme/x", "completion", "4", "1.00"),  # late, at the price of its time
        ("2026-11", "", "correction", "", "-5.00"),
    ]
    assert december["total"] == "4.00"
    assert "late" not in before["acme", "2026-11"]


async def test_late_usage_is_invoiced_once(database: Database) -> None:
    await database.write(november)
    await close(database)
    await database.write(lambda c: used(c, "2026-11-29", model="acme/late", billed_completion_tokens=10**6))
    await close(database, "2026-12", at("2027-01-05"))
    found = {key: json.loads(text)["total"] for key, text in (await documents(database)).items()}
    assert found["acme", "2026-12"] == "4.00"
    january = json.loads(await database.read(lambda c: invoice_of(c, "acme", "2027-01")))
    assert january["lines"] == []


async def test_a_project_with_late_usage_alone_gets_an_invoice(database: Database) -> None:
    await close(database, "2026-11")
    await database.write(lambda c: used(c, "2026-11-29", model="new/a", project="new", billed_completion_tokens=10**6))
    await close(database, "2026-12", at("2027-01-05"))
    assert json.loads((await documents(database))["new", "2026-12"])["total"] == "4.00"


async def test_months_are_closed_in_order_after_their_days_of_grace_and_when_sums_are_made(database: Database) -> None:
    await database.write(november)

    def due(now: str) -> Any:
        return database.read(lambda c: due_months(c, at(now), 3))

    assert await due("2026-11-30T23:59:59") == await due("2026-12-03T23:59:59") == []
    assert await due("2026-12-04T00:00:00") == ["2026-11"]
    assert await due("2027-02-04T00:00:00") == ["2026-11", "2026-12", "2027-01"]
    await database.write(lambda c: c.execute(insert(dirty_hour).values(hour_unix_s=at("2026-12-10"), marked=1)))
    assert await due("2027-02-04T00:00:00") == ["2026-11"]
    closer = InvoiceCloser(database, 3, now_unix_s=lambda: at("2026-12-04T00:00:00"))
    assert [await closer.close_due(), await closer.close_due()] == [["2026-11"], []]
    assert ("acme", "2026-11") in await documents(database)


async def test_a_ledger_without_usage_closes_nothing(database: Database) -> None:
    assert await InvoiceCloser(database, 0).close_due() == []


@pytest.mark.parametrize(("month", "days"), [("2028-02", 29), ("2027-02", 28), ("2026-12", 31), ("2100-02", 28)])
def test_months_end_where_the_calendar_says(month: str, days: int) -> None:
    start, end = month_bounds(month)
    assert end - start == days * 86400


@pytest.mark.parametrize("month", ["2026-13", "2026-00", "0000-01", "9999-12", "2026-1", "now", "2026-11-01", ""])
def test_what_is_no_month_is_refused(month: str) -> None:
    with pytest.raises(ValueError, match=r"month|future"):
        month_bounds(month)


# --- corrections


async def test_a_correction_is_recorded_once_by_its_id(database: Database) -> None:
    await database.write(november)
    first = await database.write(lambda c: record_correction(c, REFUND, DECEMBER_5))
    again = await database.write(lambda c: record_correction(c, REFUND, DECEMBER_5 + 86400))
    assert first == again
    assert first.recorded_unix_s == DECEMBER_5
    with pytest.raises(CorrectionError, match="recorded with other values"):
        await database.write(lambda c: record_correction(c, replace(REFUND, amount=Decimal("-6")), DECEMBER_5))


async def test_corrected_tokens_have_the_price_of_the_time_that_is_corrected(database: Database) -> None:
    await database.write(november)
    tokens = replace(REFUND, amount=None, model="acme/tone", completion_tokens=-500_000, cached_tokens=-1_000_000)
    found = await database.write(lambda c: record_correction(c, tokens, DECEMBER_5))
    assert (found.amount, found.currency) == (Decimal("-2.25"), "EUR")
    [line] = [x for x in lines_in(await database.read(lambda c: invoice_of(c, "acme", "2026-12"))) if x.text]
    assert (line.quantity, line.amount, line.text) == (-1_500_000, "-2.25", "ticket-1: the adapter was broken")


async def test_a_correction_never_goes_into_a_closed_month(database: Database) -> None:
    await database.write(november)
    await close(database)
    late = await database.write(lambda c: record_correction(c, REFUND, at("2026-11-30T23:00:00")))  # a clock set back
    assert late.recorded_unix_s == at("2026-12-01")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"correction_id": ""}, "the id has to be"),
        ({"correction_id": "=1+1"}, "the id has to be"),
        ({"correction_id": "x" * 65}, "the id has to be"),
        ({"project": "Acme!"}, "name of a namespace"),
        ({"reason": "  "}, "the reason has to have"),
        ({"author": ""}, "the author has to have"),
        ({"concerns_unix_s": DECEMBER_5 + 1}, "has to be in the past"),
        ({"concerns_unix_s": -1}, "has to be in the past"),
        ({"amount": Decimal("NaN")}, "the amount has to be a decimal"),
        ({"amount": Decimal("Infinity")}, "the amount has to be a decimal"),
        ({"amount": Decimal("1e99")}, "the amount has to be a decimal"),
        ({"amount": Decimal(0)}, "changes nothing"),
        ({"amount": None}, "changes nothing"),
        ({"amount": None, "prompt_tokens": 2**63}, "at most"),
        ({"amount": None, "prompt_tokens": 5, "model": "acme/never"}, "has never used acme/never"),
        ({"amount": None, "prompt_tokens": 5, "model": "acme/tone", "concerns_unix_s": 5}, "in effect in 1970-01"),
    ],
)
async def test_a_bad_correction_is_refused_in_words(database: Database, change: dict[str, Any], words: str) -> None:
    await database.write(november)
    with pytest.raises(CorrectionError, match=words):
        await database.write(lambda c: record_correction(c, replace(REFUND, **change), DECEMBER_5))


# --- what people read

NAMES = ["acme/<script>alert(1)</script>", "acme/\u202egnp.exe", 'acme/"onload="x', "acme/{{ 7 * 7 }}"]


async def test_nothing_in_a_name_executes_in_the_page_and_no_cell_is_a_formula(database: Database) -> None:
    hostile = replace(REFUND, reason='=HYPERLINK("https://evil.example","x")<img src=x onerror=alert(1)>')

    def month(connection: Connection) -> None:
        for name in [*NAMES, "=cmd()", "+1", "-1", "@x"]:
            used(connection, "2026-12-02", model=name, billed_completion_tokens=1_000_000)
        record_correction(connection, hostile, DECEMBER_5)

    await database.write(month)
    text = await database.read(lambda c: invoice_of(c, "acme", "2026-12"))
    page = invoice_html(text)
    assert "<script" not in page
    assert "<img" not in page
    assert "<bdi>acme/&lt;script&gt;alert(1)&lt;/script&gt;</bdi>" in page
    assert "<bdi>acme/\u202egnp.exe</bdi>" in page
    assert "{{ 7 * 7 }}" in page
    rows = list(csv.DictReader(io.StringIO(invoice_csv(text), newline="")))
    assert {row["model"] for row in rows} >= {"'=cmd()", "'+1", "'-1", "'@x", "acme/tone", *NAMES} - {"acme/tone"}
    for row in rows:
        numeric = ("amount", "quantity")
        assert not any(str(cell)[:1] in "=+-@" for name, cell in row.items() if cell and name not in numeric)
    total = sum(Decimal(row["amount"]) for row in rows if row["item"] != "total")
    assert rows[-1]["amount"] == format(total, "f") == json.loads(text)["total"]


async def test_without_a_price_the_tokens_are_listed_and_cost_nothing(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path / 'empty.db'}")
    await database.write(november)
    text = await database.read(lambda c: invoice_of(c, "acme", "2026-11"))
    assert {(line.item, line.unit_price, line.amount) for line in lines_in(text)} == {
        ("prompt", "", "0"),
        ("cached", "", "0"),
        ("completion", "", "0"),
    }
    assert "no price" in invoice_html(text)
    assert "Nothing was used." in invoice_html(await database.read(lambda c: invoice_of(c, "acme", "2026-10")))
    await database.close()


# --- the mounted list


async def test_the_mounted_list_is_followed_and_a_refused_one_changes_nothing(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    refused: list[bool] = []
    now = [at("2026-11-15T12:00:00")]
    keeper = PriceListKeeper(database, tmp_path, refused=refused.append, now_unix_s=lambda: now[0])

    async def recorded() -> list[tuple[str, str]]:
        query = select(price.c.line_item, price.c.amount).order_by(price.c.effective_unix_s, price.c.line_item)
        return [(item, amount) for item, amount in await database.read(lambda c: c.execute(query).all())]

    await keeper.check()
    assert (keeper.problems, await recorded()) == ((), [])  # a missing file is an empty list
    file = tmp_path / "prices.yaml"
    file.write_text(LIST + DEARER.removeprefix(LIST).replace("2026-11-20", "2026-12-01"))
    await keeper.check()
    first = await recorded()
    assert first == [("cached", "0.25"), ("completion", "4"), ("prompt", "1"), ("residency", "0.02")]
    assert [str(one) for one in keeper.announced] == ["completion of * from 2026-12-01"]
    now[0] = at("2026-12-01T00:00:01")
    await keeper.check()
    assert await recorded() == [*first, ("completion", "8")]
    for wrong in (
        LIST.replace("completionPerMillion: 4", "completionPerMillion: 3"),
        "prices: [",
        "",
        LIST.replace("EUR", "XYZ"),
        LIST + "  - {}\n",
    ):
        file.write_text(wrong)
        await keeper.check()
        assert keeper.problems
        assert refused[-1] is True
        assert await recorded() == [*first, ("completion", "8")]
    file.write_bytes(b"\xff\xfe")
    await keeper.check()
    assert "cannot be read" in keeper.problems[0]
    file.write_text(DEARER.replace("2026-11-20", "2026-12-01"))
    await keeper.check()
    assert (keeper.problems, refused[-1]) == ((), False)
    await database.close()


async def test_prices_are_recorded_once_even_by_two_processes(database: Database) -> None:
    assert await database.write(lambda c: record_prices(c, parse_prices(LIST), at("2026-10-06"))) == ()
    with pytest.raises(PriceListError, match="is missing, although it is in effect"):
        await database.write(lambda c: record_prices(c, (), at("2026-10-06")))


# --- the commands


def test_an_operator_corrects_and_prints_invoices_in_the_ledgers_pod(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(database_url=f"sqlite:///{tmp_path / 'ledger.db'}", keys_namespace="keys")

    def command(*arguments: str) -> int:
        return commands.run(arguments, settings, now_unix_s=DECEMBER_5)

    correct: tuple[str, ...] = (
        "correct",
        "--id",
        "t-1",
        "--project",
        "acme",
        "--concerns",
        "2026-11-03",
        "--reason",
        "broken",
    )
    correct += ("--author", "ops", "--amount")
    assert command(*correct, "-2.50") == 1
    assert "no price list yet" in capsys.readouterr().err
    database = Database.open(settings.database_url)
    with database.engine.begin() as connection:
        record_prices(connection, parse_prices(LIST), DECEMBER_5)
    for _ in range(2):
        assert command(*correct, "-2.50") == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["amount"], found["currency"], found["recorded"]) == ("-2.50", "EUR", "2026-12-05T10:00:00+00:00")
    for arguments, words in (
        ((*correct, "-3"), "recorded with other values"),
        ((*correct, "much"), "'much' is no number"),
        (("correct", *correct[1:6], "2027-02-29", *correct[7:], "1"), "no day of the calendar"),
        (("invoice", "--project", "acme", "--month", "2026-13"), "is no month"),
    ):
        assert command(*arguments) == 1
        assert words in capsys.readouterr().err
    assert command("invoice", "--project", "acme", "--month", "2026-12") == 0
    assert "t-1: broken" in capsys.readouterr().out
    database.engine.dispose()
