"""Reads the price list, and records each price once it is in effect. A list that breaks a rule is refused as a whole.

The list is a mounted file. Until a mistake is corrected, the recorded prices stay valid. Only the replica that collects
records prices; all read them from the database.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from sqlalchemy import Connection, select

from lorapool_ledger.billing.prices import (
    DAY_S,
    LineItem,
    Price,
    PriceList,
    PriceListError,
    newly_effective,
    parse_prices,
)
from lorapool_ledger.store.database import Database, DatabaseAwayError
from lorapool_ledger.store.tables import price
from lorapool_ledger.store.writes import insert_new

log = logging.getLogger("lorapool_ledger")

FILE = "prices.yaml"
CHECK_S = 2.0
"""How often the file is looked at for a change."""


def read_prices(connection: Connection) -> PriceList:
    """The recorded prices."""
    columns = (price.c.effective_unix_s, price.c.scope, price.c.line_item, price.c.amount, price.c.currency)
    return PriceList(
        Price(effective, scope, LineItem(item), Decimal(amount), currency)
        for effective, scope, item, amount, currency in connection.execute(select(*columns))
    )


def record_prices(connection: Connection, listed: tuple[Price, ...], now_unix_s: float) -> tuple[Price, ...]:
    """Records the prices of a list that have come into effect and returns them. Raises PriceListError."""
    found = newly_effective(read_prices(connection).prices, listed, now_unix_s)
    rows = [
        {
            "effective_unix_s": one.effective_unix_s,
            "scope": one.scope,
            "line_item": one.item.value,
            "amount": format(one.amount, "f"),
            "currency": one.currency,
            "recorded_unix_s": int(now_unix_s),
        }
        for one in found
    ]
    insert_new(connection, price, rows)
    return found


class PriceListKeeper:
    """Follows the file. `problems` are the sentences for which the present list is refused; empty while it is used."""

    def __init__(
        self,
        database: Database,
        folder: Path,
        *,
        refused: Callable[[bool], None] = lambda _: None,
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._file = folder / FILE
        self._refused = refused
        self._now_unix_s = now_unix_s
        self._done: tuple[str, int] | None = None
        self.problems: tuple[str, ...] = ()
        self.announced: tuple[Price, ...] = ()
        """Prices of days to come, as the present list has them."""

    async def run(self) -> None:
        """Looks at the file for ever."""
        while True:
            try:
                await self.check()
            except DatabaseAwayError as error:
                log.warning("the price list cannot be recorded; tried again", extra={"error": str(error)})
            await asyncio.sleep(CHECK_S)

    async def check(self) -> None:
        """Records what has come into effect, once for each text and day. Raises DatabaseAwayError."""
        now_s = self._now_unix_s()
        try:
            text = self._file.read_text()
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            self._refuse((f"the list cannot be read: {error}",))
            return
        if (text, int(now_s) // DAY_S) == self._done:
            return
        try:
            listed = parse_prices(text)
            found = await self._database.write(lambda connection: record_prices(connection, listed, now_s))
        except PriceListError as error:
            self._refuse(error.lines)
        else:
            if found:
                log.info("recorded %d prices that are in effect", len(found))
            self.announced = tuple(one for one in listed if one.effective_unix_s > now_s)
            self.problems = ()
            self._refused(False)
        self._done = text, int(now_s) // DAY_S

    def _refuse(self, problems: tuple[str, ...]) -> None:
        if problems != self.problems:
            log.error("the price list is refused, the recorded prices stay valid: %s", "; ".join(problems))
        self.problems = problems
        self._refused(True)
