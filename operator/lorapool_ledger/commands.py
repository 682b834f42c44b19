"""What an operator does to the ledger by hand, in its pod: `python -m lorapool_ledger correct …`, `invoice`, `export`.

Everyone who may run a command in the pod may correct bills; there is no such call in any API.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path

from lorapool_ledger.intake.corrections import CorrectionError, NewCorrection, record_correction
from lorapool_ledger.reports.invoices import invoice_csv, invoice_html
from lorapool_ledger.settings import Settings
from lorapool_ledger.store.database import Database
from lorapool_ledger.sums.export import export
from lorapool_ledger.sums.invoices import invoice_of

FORMATS: dict[str, Callable[[str], str]] = {"json": str, "csv": invoice_csv, "html": invoice_html}


def run(arguments: Sequence[str], settings: Settings, *, now_unix_s: float | None = None) -> int:
    """Runs a command and returns the exit status: 0 done, 1 refused. Raises LedgerDatabaseError."""
    parser = argparse.ArgumentParser(prog="lorapool-ledger", description="Without a command: serves the ledger.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_correct(commands.add_parser("correct", help="add to or take off a project's bill, once by its id"))
    _add_invoice(commands.add_parser("invoice", help="print a project's invoice of a month"))
    _add_export(commands.add_parser("export", help="write the requests of a period to files"))
    given = parser.parse_args(arguments)
    now_s = time.time() if now_unix_s is None else now_unix_s
    try:
        match given.command:
            case "correct":
                text = _correct(given, settings, now_s)
            case "invoice":
                text = _invoice(given, settings)
            case _:
                text = _export(given, settings)
    except ValueError as error:
        print(f"lorapool-ledger: {error}", file=sys.stderr)
        return 1
    sys.stdout.write(text)
    return 0


def _add_correct(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id", required=True, help="chosen by you; the same id a second time changes nothing")
    parser.add_argument("--project", required=True, help="the namespace that pays")
    parser.add_argument("--concerns", required=True, help="the day that is corrected, such as 2026-11-03")
    parser.add_argument("--reason", required=True, help="the tenant reads it on the invoice")
    parser.add_argument("--author", required=True, help="who corrects")
    parser.add_argument(
        "--amount", help="in the currency of the prices; negative for a refund. Absent: tokens are priced"
    )
    parser.add_argument("--model", default="", help="namespace/name of the adapter or base")
    for kind in ("prompt", "cached", "completion"):
        parser.add_argument(f"--{kind}-tokens", type=int, default=0, help="negative takes off")


def _add_invoice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--project", required=True, help="the namespace that pays")
    parser.add_argument("--month", required=True, help="such as 2026-11")
    parser.add_argument("--format", choices=sorted(FORMATS), default="csv")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the files, which must not be there yet")
    for name, help_ in (("--from", "first day (UTC), such as 2026-11-01"), ("--to", "the day after the last one")):
        parser.add_argument(name, dest=name.strip("-") + "_", type=_day, required=True, help=help_)


def _day(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def _correct(given: argparse.Namespace, settings: Settings, now_s: float) -> str:
    try:
        concerns = datetime.fromisoformat(given.concerns)
    except ValueError as error:
        raise CorrectionError(f"--concerns {given.concerns!r} is no day of the calendar ({error})") from None
    try:
        amount = None if given.amount is None else Decimal(given.amount)
    except InvalidOperation:
        raise CorrectionError(f"--amount {given.amount!r} is no number; write a decimal such as -12.50") from None
    new = NewCorrection(
        given.id,
        given.project,
        int((concerns if concerns.tzinfo else concerns.replace(tzinfo=UTC)).timestamp()),
        given.reason,
        given.author,
        model=given.model,
        prompt_tokens=given.prompt_tokens,
        cached_tokens=given.cached_tokens,
        completion_tokens=given.completion_tokens,
        amount=amount,
    )

    async def record(database: Database) -> str:
        done = await database.write(lambda connection: record_correction(connection, new, now_s))
        recorded = datetime.fromtimestamp(done.recorded_unix_s, UTC).isoformat()
        found = {"id": done.correction_id, "amount": format(done.amount, "f"), "currency": done.currency}
        return json.dumps(found | {"recorded": recorded}) + "\n"

    return asyncio.run(_with_database(settings, record))


def _invoice(given: argparse.Namespace, settings: Settings) -> str:
    async def read(database: Database) -> str:
        return await database.read(lambda connection: invoice_of(connection, given.project, given.month))

    return FORMATS[given.format](asyncio.run(_with_database(settings, read)))


def _export(given: argparse.Namespace, settings: Settings) -> str:
    if given.from_ >= given.to_:
        raise ValueError("--from must be before --to")

    async def write(database: Database) -> str:
        done = await database.read(lambda connection: export(connection, given.out, given.from_, given.to_))
        return f"{given.out}: {done.rows} lines, {done.sums['requests']} requests\n"

    try:
        return asyncio.run(_with_database(settings, write))
    except OSError as error:
        raise ValueError(f"the files cannot be written ({error}): name an empty folder with --out") from None


async def _with_database(settings: Settings, work: Callable[[Database], Awaitable[str]]) -> str:
    database = await asyncio.to_thread(Database.open, settings.database_url)
    try:
        return await work(database)
    finally:
        await database.close()
