"""Keeps the leases of this gateway: asks the ledger every second, and at once for requests that wait.

Requests that need the ledger at the same time share a call. While the ledger is away, leases run on, and then each
gateway goes on with its share of what was free, or refuses, as the settings say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, Protocol

from lorapool_api.quota_protocol import (
    MAX_ASKS,
    MAX_PRICED,
    ROUTE_LEASES,
    LeaseAnswer,
    LeaseCall,
    Meter,
    PricedModel,
    TokenPrice,
)
from lorapool_gateway.quotas.buckets import Bucket

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
TIMEOUT_S = 1.0
REPLICAS_TRIED = 3
"""Only one replica of the ledger leases; another one answers 503 and closes the connection."""
FORGET_S = 600.0
PRICE_S = 60.0
"""A price is read again after this long."""
NO_PRICE_S = 5.0
"""The lack of one is, too."""
WhenAway = Literal["open-bounded", "closed"]
Name = tuple[str, Meter]


class Poster(Protocol):
    """The ledger, as far as it is needed here."""

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> tuple[int, bytes]: ...


class LedgerAwayError(Exception):
    """The ledger does not answer."""


@dataclass(slots=True)
class _Priced:
    """What the ledger said of a model's price."""

    used_s: float
    answered_s: float | None = None
    price: TokenPrice | None = None

    def age_s(self, now_s: float) -> float:
        return float("inf") if self.answered_s is None else now_s - self.answered_s

    def is_due(self, now_s: float) -> bool:
        return self.age_s(now_s) >= (NO_PRICE_S if self.price is None else PRICE_S)


class LeaseKeeper:
    def __init__(
        self,
        ledger: Poster | None,
        boot_id: str,
        *,
        rates: WhenAway = "open-bounded",
        budgets: WhenAway = "closed",
        grace_s: float = 60.0,
        failed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rates`, `budgets`: what happens while the ledger is away; to budgets, after `grace_s`."""
        self._ledger = ledger
        self._boot_id = boot_id
        self._rates = rates
        self._budgets = budgets
        self._grace_s = grace_s
        self._failed = failed
        self._clock = clock
        self._buckets: dict[Name, Bucket] = {}
        self._prices: dict[PricedModel, _Priced] = {}
        self.currency = ""
        """Of the prices; empty while none is known."""
        self._next: asyncio.Task[None] | None = None
        """The call that requests which come now wait for; it has not begun."""
        self._calling = asyncio.Lock()
        self._gateways = 1
        self._away_since_s: float | None = None
        self._tried_s = -INTERVAL_S
        self.on_tick: Callable[[], None] = lambda: None
        """Called every second."""

    def bucket(self, scope: str, meter: Meter, limit: int) -> Bucket:
        found = self._buckets.get((scope, meter))
        if found is None:
            found = self._buckets[scope, meter] = Bucket(scope, meter, limit)
        found.limit = limit
        return found

    async def refill(self, needs: Sequence[tuple[Bucket, int]]) -> None:
        """Asks the ledger for what requests need that wait. Raises LedgerAwayError."""
        for bucket, amount in needs:
            bucket.need = max(1, amount)
            bucket.waiting += amount
        try:
            now_s = self._clock()
            if self._ledger is None or (self._away_since_s is not None and now_s - self._tried_s < INTERVAL_S):
                raise LedgerAwayError
            if self._next is None:
                self._next = asyncio.create_task(self._call_next(), name="lease")
                self._next.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(self._next)
        finally:
            for bucket, amount in needs:
                bucket.waiting -= amount

    async def price(self, model: PricedModel) -> TokenPrice | None:
        """What usage of a model costs; None: it has no price. Raises LedgerAwayError while that is not known."""
        found = self._prices.setdefault(model, _Priced(self._clock()))
        found.used_s = self._clock()
        if found.answered_s is None or (found.price is None and found.is_due(found.used_s)):
            await self.refill(())
        if found.answered_s is None:
            raise LedgerAwayError
        return found.price

    def end_leases(self, bucket: Bucket) -> None:
        """Drops what is unspent of a budget once the settings refuse it. The ledger gives it to others meanwhile."""
        if self._away_since_s is None or not bucket.meter.is_budget or self._budgets != "closed":
            return
        if self._clock() - self._away_since_s >= self._grace_s and bucket.unspent > 0:
            bucket.granted -= bucket.unspent

    def take_share(self, bucket: Bucket, amount: int) -> bool | None:
        """While the ledger is away: True: granted; False: the share is used up; None: nothing is granted at all."""
        away_s = self._clock() - (self._away_since_s if self._away_since_s is not None else self._clock())
        if bucket.meter.is_budget:
            if self._ledger is None or bucket.free is None:
                return None  # what is left of it is not known
            if self._budgets == "closed" and away_s >= self._grace_s:
                return None
        elif self._rates == "closed" and self._ledger is not None:
            return None
        return bucket.take_share(amount, self._gateways, self._clock())

    async def run(self) -> None:
        """Keeps the leases until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            self.on_tick()
            if self._buckets and self._ledger is not None:
                with contextlib.suppress(LedgerAwayError):
                    await self._call(list(self._buckets.values()))
            self._forget()

    async def end(self) -> None:
        """Reports the last counts of a process that stops, and gives its leases back."""
        with contextlib.suppress(LedgerAwayError):
            if self._buckets and self._ledger is not None and self._away_since_s is None:
                await self._call(list(self._buckets.values()), ended=True)

    async def _call_next(self) -> None:
        async with self._calling:
            self._next = None
            await self._post([bucket for bucket in self._buckets.values() if bucket.waiting])

    async def _call(self, buckets: list[Bucket], *, ended: bool = False) -> None:
        async with self._calling:
            for start in range(0, len(buckets), MAX_ASKS):
                await self._post(buckets[start : start + MAX_ASKS], ended=ended)

    async def _post(self, buckets: list[Bucket], *, ended: bool = False) -> None:
        assert self._ledger is not None
        now_s = self._tried_s = self._clock()
        due = sorted(
            (model for model, known in self._prices.items() if known.is_due(now_s)),
            key=lambda model: -self._prices[model].age_s(now_s),
        )[: 0 if ended else MAX_PRICED]
        call = LeaseCall(
            boot_id=self._boot_id,
            gateway=socket.gethostname()[:253],
            asks=[bucket.ask(now_s) for bucket in buckets[:MAX_ASKS]],
            ended=ended,
            priced=due,
        )
        try:
            sent = call.model_dump_json(by_alias=True).encode()
            for _ in range(REPLICAS_TRIED):
                status, body = await self._ledger.post(ROUTE_LEASES, sent, timeout_s=TIMEOUT_S)
                if status != HTTPStatus.SERVICE_UNAVAILABLE:
                    break
            if status != 200:
                raise ValueError(f"the ledger answers {status}: {body[:200].decode(errors='replace')}")
            answer = LeaseAnswer.model_validate_json(body)
            if len(answer.leases) != len(call.asks) or len(answer.prices) != len(due):
                raise ValueError("the ledger's answer is not of the protocol")
        except Exception as error:
            self._failed()
            if self._away_since_s is None:
                self._away_since_s = now_s
                log.warning("the ledger leases nothing; quotas go on without it", extra={"error": repr(error)[:300]})
            raise LedgerAwayError from error
        if self._away_since_s is not None:
            self._away_since_s = None
            log.info("the ledger leases again")
        self._gateways = answer.gateways
        for bucket, lease in zip(buckets, answer.leases, strict=False):
            bucket.answered(lease, answer.gateways, now_s)
        for model, price in zip(due, answer.prices, strict=True):
            if (known := self._prices.get(model)) is not None:
                known.answered_s, known.price = now_s, price
        if due:
            self.currency = answer.currency

    def _forget(self) -> None:
        now_s = self._clock()
        for name, bucket in list(self._buckets.items()):
            if bucket.is_idle and now_s - bucket.used_s > FORGET_S:
                del self._buckets[name]
        for model, known in list(self._prices.items()):
            if now_s - known.used_s > FORGET_S:
                del self._prices[model]
