"""`POST /v1/quota/leases`: leases rates and budgets to gateways, which present the ledger's own token.

Accounts are in memory. A process that begins counts each budget from the sums of the month, and adds what gateways held
when the process before it ended. A budget of money counts the month's charges for usage; corrections change no budget.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import partial
from typing import Any

from aiohttp import web
from pydantic import ValidationError
from sqlalchemy import Connection, delete, func, insert, select

from lorapool_api.quota_protocol import (
    BILLIONTHS,
    ROUTE_LEASES,
    LeaseAnswer,
    LeaseCall,
    Meter,
    PricedModel,
    TokenPrice,
)
from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_ledger.billing.prices import DAY_S, LineItem, PriceList
from lorapool_ledger.intake.attempts_api import error_response, presents_token
from lorapool_ledger.quotas.accounts import Accounts, Held, Name, Use, month_of, month_start_s
from lorapool_ledger.quotas.uses import note_uses, noted_uses
from lorapool_ledger.reports.charges import CORRECTION, Dimension, PriceBook, charges
from lorapool_ledger.reports.periods import month
from lorapool_ledger.reports.scope import Scope
from lorapool_ledger.store.database import Database, DatabaseAwayError, LedgerDatabaseError
from lorapool_ledger.store.tables import gateway, reservation, usage_hour
from lorapool_ledger.store.writes import chunks, insert_into

log = logging.getLogger("lorapool_ledger")

NOTE_S = 1.0
USES_MS = 3000
"""What changed of the use of quotas is noted for other replicas at most this often."""
COUNT_S = 60.0
"""The sums of the month are read this often."""
PRICES_S = 5.0
"""Prices are read at most this often."""
RETRY_S = 1
_COLUMNS = {"key": usage_hour.c.key_uid, "project": usage_hour.c.project, "model": usage_hour.c.model}


class Leases:
    def __init__(
        self,
        database: Database,
        masters: MasterTokens,
        leads: Callable[[], bool] = lambda: True,
        *,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`leads`: whether this replica leases; another one answers 503."""
        self._database = database
        self._masters = masters
        self._leads = leads
        self._now_s = now_s
        self._accounts = Accounts()
        self._book = PriceBook(PriceList())
        self._book_s: float | None = None
        self._restored = False
        self._beginning = asyncio.Lock()

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post(ROUTE_LEASES, self.handle)

    def uses(self) -> list[Use]:
        """The quotas that gateways have asked for; none where another replica leases."""
        return self._accounts.uses(self._now_ms())

    async def uses_anywhere(self) -> list[Use]:
        """The same, where another replica leases as that one last noted them. Raises LedgerDatabaseError."""
        await self._read_prices()
        if self._leads():
            return self.uses()
        return await self._database.read(partial(noted_uses, now_ms=self._now_ms()))

    @property
    def currency(self) -> str:
        """Of budgets of money."""
        return self._book.prices.currency

    async def run(self) -> None:
        """Notes what gateways hold and have used, and reads the sums, while this replica leases; until cancelled."""
        counted_s, last, noted_ms = self._now_s(), None, 1
        try:
            while True:
                await asyncio.sleep(NOTE_S)
                if not self._restored:
                    continue
                now_ms = self._now_ms()
                held = self._accounts.held()
                try:
                    if held != last:
                        await self._database.write(lambda connection, held=held: note(connection, held))  # type: ignore[misc]
                        last = held
                    if now_ms - noted_ms >= USES_MS and (uses := self._accounts.uses(now_ms, noted_ms)):
                        await self._database.write(partial(note_uses, uses=uses, now_ms=now_ms))
                        noted_ms = now_ms
                    if self._now_s() - counted_s >= COUNT_S:
                        counted_s = self._now_s()
                        await self._count(self._accounts.budgets(), now_ms)
                        self._accounts.forget(now_ms)
                except LedgerDatabaseError as error:
                    log.warning("what gateways hold of budgets was not noted", extra={"error": str(error)})
        finally:
            self._restored = False  # another replica leases; a later term begins with what that one noted
            self._accounts = Accounts()

    async def handle(self, request: web.Request) -> web.Response:
        if not presents_token(self._masters, request.headers.get("Authorization")):
            return error_response(401, "invalid_token", "Present the ledger's token: `Authorization: Bearer <token>`.")
        if not self._leads():
            response = _again("another replica of the ledger leases at present")
            response.force_close()  # the next connection may reach the other one
            return response
        try:
            call = LeaseCall.model_validate_json(await request.read())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            return error_response(400, "invalid_lease", f"The call is not of the protocol: {where}: {first['msg']}.")
        try:
            answer = await self.lease(call)
        except DatabaseAwayError as error:
            log.warning("budgets cannot be counted", extra={"error": str(error)})
            return _again("the database does not answer")
        return web.Response(body=answer.model_dump_json(by_alias=True), content_type="application/json")

    async def lease(self, call: LeaseCall) -> LeaseAnswer:
        """Raises LedgerDatabaseError where a budget must be counted first and cannot be."""
        async with self._beginning:
            if not self._restored:
                self._accounts.restore(await self._database.read(noted), self._now_ms())
                self._restored = True
            if names := self._accounts.unknown(call.asks, self._now_ms()):
                await self._count(names, self._now_ms())
            prices = await self._prices(call.priced) if call.priced else []
        leases, gateways = self._accounts.lease(call, self._now_ms())
        return LeaseAnswer(leases=leases, gateways=gateways, prices=prices, currency=self.currency)

    async def _read_prices(self) -> None:
        if self._book_s is None or self._now_s() - self._book_s >= PRICES_S:
            try:
                self._book = await self._database.read(PriceBook.read)
            except DatabaseAwayError:
                if self._book_s is None:
                    raise
            self._book_s = self._now_s()

    async def _prices(self, models: list[PricedModel]) -> list[TokenPrice | None]:
        await self._read_prices()
        day_s = int(self._now_s()) // DAY_S * DAY_S
        return [price_of(self._book, model, day_s) for model in models]

    async def _count(self, names: list[Name], now_ms: int) -> None:
        start_s = month_start_s(now_ms)
        known: dict[Name, int] = {}
        for meter, counted in ((Meter.TOKENS_PER_MONTH, billed_tokens), (Meter.MONEY_PER_MONTH, charged)):
            if scopes := [scope for scope, of_scope in names if of_scope is meter]:
                found = await self._database.read(partial(counted, scopes=scopes, since_s=start_s))
                known |= {(scope, meter): quantity for scope, quantity in found.items()}
        for name in names:
            self._accounts.count(name, month_of(now_ms), known.get(name, 0))

    def _now_ms(self) -> int:
        return int(self._now_s() * 1000)


def billed_tokens(connection: Connection, scopes: Iterable[str], since_s: int) -> dict[str, int]:
    """Billed tokens of these scopes, as `key/<uid>`, `project/<namespace>` or `model/<namespace>/<name>`."""
    tokens = func.sum(
        usage_hour.c.billed_prompt_tokens + usage_hour.c.billed_cached_tokens + usage_hour.c.billed_completion_tokens
    )
    found: dict[str, int] = {}
    for kind, of_kind in _by_kind(scopes).items():
        column = _COLUMNS[kind]
        for part in chunks(of_kind):
            query = select(column, tokens).where(usage_hour.c.hour_unix_s >= since_s, column.in_(part)).group_by(column)
            found |= {f"{kind}/{name}": int(total or 0) for name, total in connection.execute(query)}
    return found


def charged(connection: Connection, scopes: Iterable[str], since_s: int) -> dict[str, int]:
    """What usage of the month that begins then is charged, in billionths, rounded up, by scope as above."""
    period = month(month_of(since_s * 1000))
    assert period is not None
    found: dict[str, Decimal] = {}
    for kind, of_kind in _by_kind(scopes).items():
        dimension = Dimension("key_uid" if kind == "key" else kind)
        for part in chunks(of_kind):
            scope = Scope().narrowed(
                projects=part if kind == "project" else None,
                keys=part if kind == "key" else None,
                models=part if kind == "model" else None,
            )
            for charge in charges(connection, scope, period, (dimension, Dimension.ITEM)):
                if charge.item != CORRECTION:
                    name = f"{kind}/{getattr(charge, dimension.value)}"
                    found[name] = found.get(name, Decimal(0)) + charge.amount
    return {name: math.ceil(amount * BILLIONTHS) for name, amount in found.items()}


def price_of(book: PriceBook, model: PricedModel, at_unix_s: int) -> TokenPrice | None:
    """What usage of a model costs; None where neither all its tokens nor its requests have a price."""
    items = (LineItem.PROMPT, LineItem.CACHED, LineItem.COMPLETION, LineItem.REQUEST)
    prompt, cached, completion, request = (
        book.at(at_unix_s, item, project=model.project, base=model.base, model=model.model) for item in items
    )
    if request is None and (prompt is None or completion is None):
        return None
    amounts = [Decimal(0) if found is None else found.amount for found in (prompt, cached, completion, request)]
    return TokenPrice(prompt=amounts[0], cached=amounts[1], completion=amounts[2], request=amounts[3])


def _by_kind(scopes: Iterable[str]) -> dict[str, list[str]]:
    """The names of scopes by their kind: key, project, model."""
    names: dict[str, list[str]] = {}
    for scope in scopes:
        kind, _, name = scope.partition("/")
        names.setdefault(kind, []).append(name)
    return names


def note(connection: Connection, held: list[Held]) -> None:
    """Replaces what gateways hold."""
    connection.execute(delete(reservation))
    if not held:
        return
    boots = sorted({item.gateway for item in held})
    new = [{"boot_id": boot, "gateway": "", "cursor_seq": 0, "seen_unix_ms": 0, "ended": False} for boot in boots]
    connection.execute(insert_into(connection, gateway).on_conflict_do_nothing(), new)
    ids: dict[str, int] = {}
    for part in chunks(boots):
        rows = connection.execute(select(gateway.c.boot_id, gateway.c.id).where(gateway.c.boot_id.in_(part)))
        ids |= {boot: int(number) for boot, number in rows}
    rows_to_add: list[dict[str, Any]] = [
        {
            "gateway": ids[item.gateway],
            "scope": item.scope,
            "meter": item.meter.value,
            "leased": str(item.held),
            "consumed": item.consumed,
            "used": item.used,
            "until_unix_ms": item.until_ms,
        }
        for item in held
    ]
    connection.execute(insert(reservation), rows_to_add)


def noted(connection: Connection) -> list[Held]:
    """What gateways held when an earlier process ended."""
    columns = [gateway.c.boot_id, *(reservation.c[name] for name in ("scope", "meter", "leased", "consumed", "used"))]
    query = select(*columns, reservation.c.until_unix_ms).join(gateway, gateway.c.id == reservation.c.gateway)
    meters = {meter.value for meter in Meter}
    found: Iterable[Any] = connection.execute(query)
    return [
        Held(boot, scope, Meter(meter), int(leased), int(consumed), int(used), int(until_ms))
        for boot, scope, meter, leased, consumed, used, until_ms in found
        if meter in meters
    ]


def _again(why: str) -> web.Response:
    return error_response(503, "ledger_unavailable", f"Nothing was leased: {why}.", Retry_After=str(RETRY_S))
