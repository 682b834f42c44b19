"""Admits requests within the quotas of their key, their namespace and their model, and settles what they have used."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorapool_api.openai import (
    ApiError,
    QuotaExceededError,
    RateLimitError,
    RequestRateError,
    TokenRateError,
    UnavailableError,
)
from lorapool_api.protocol import Usage
from lorapool_api.quota_protocol import Meter, PricedModel, TokenPrice, money_text
from lorapool_api.usage_protocol import AttemptEnd
from lorapool_gateway.ledger.attempts import payer
from lorapool_gateway.quotas.buckets import Bucket
from lorapool_gateway.quotas.estimate import DEFAULT_COMPLETION, tokens_of
from lorapool_gateway.quotas.leases import LeaseKeeper, LedgerAwayError
from lorapool_gateway.quotas.limits import Limits, QuotaFile
from lorapool_gateway.routing.auth import ApiKey
from lorapool_gateway.routing.objects import BaseRoute
from lorapool_gateway.routing.routes import Entry

log = logging.getLogger(__name__)

BILLED = (AttemptEnd.COMPLETED, AttemptEnd.CLIENT_LEFT)
ROUNDS = 8
"""Calls of the ledger that one request waits for at most: others may take what it was granted."""
RETRY_S = 1.0
MOST_WARNINGS = 1000
"""Each missing price is logged once; more than these are counted only."""
_WHAT = {"key": "this API key", "project": "the namespace", "model": "the model"}


@dataclass(slots=True, eq=False)
class Reservation:
    """What one request has reserved. It must be settled."""

    parts: list[tuple[Bucket, int, int]]
    """Each with what was taken, and how much of that was not granted."""
    usage: Callable[[], Usage | None] = lambda: None
    """What the request has used so far, if that is known."""
    price: TokenPrice | None = None
    """Of its model, where it counts against a budget of money."""
    _open: set[Reservation] = field(default_factory=set)

    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*` of the rates that are nearest to their limits."""
        found: dict[str, str] = {}
        for meter in (Meter.REQUESTS_PER_MINUTE, Meter.TOKENS_PER_MINUTE):
            buckets = [bucket for bucket, _, _ in self.parts if bucket.meter is meter]
            if buckets:
                tight = min(buckets, key=lambda bucket: bucket.remaining / bucket.limit)
                found |= rate_headers(tight)
        return found

    def extend(self) -> None:
        """Reserves more for an answer that turns out longer than was assumed."""
        usage = self.usage()
        if usage is None:
            return
        for index, (bucket, amount, overdrawn) in enumerate(self.parts):
            if bucket.meter is not Meter.REQUESTS_PER_MINUTE and self._quantity(bucket, usage) > amount:
                more = self._quantity(bucket, usage, DEFAULT_COMPLETION // 2) - amount
                self.parts[index] = bucket, amount + more, overdrawn + bucket.overdraw(more)

    def settle(self, ended: AttemptEnd | None) -> None:
        """Counts what the request has used. A budget counts what is billed, a rate what was computed."""
        self._open.discard(self)
        parts, self.parts = self.parts, []
        usage = self.usage()
        for bucket, amount, overdrawn in parts:
            if bucket.meter is Meter.REQUESTS_PER_MINUTE:
                continue  # a request counts, however it ends
            if usage is None and ended is AttemptEnd.COMPLETED:
                bucket.settle(amount, amount, overdrawn)
            else:
                counts = usage is not None and (ended in BILLED or not bucket.meter.is_budget)
                bucket.settle(amount, self._quantity(bucket, usage) if usage and counts else 0, overdrawn)

    def _quantity(self, bucket: Bucket, usage: Usage, more: int = 0) -> int:
        """Tokens of this usage, or billionths of money. `more`: tokens of the answer that are added."""
        completion_tokens = usage.completion_tokens + more
        if bucket.meter.is_money:
            assert self.price is not None
            return self.price.cost(usage.prompt_tokens, usage.cached_tokens, completion_tokens)
        return usage.prompt_tokens + completion_tokens


NOTHING = Reservation([])


class Quotas:
    def __init__(
        self,
        keeper: LeaseKeeper,
        file: QuotaFile,
        *,
        unpriced: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`unpriced` is called for each request that is refused since a budget of money lacks its price."""
        self._unpriced = unpriced
        self._warned: set[str] = set()
        self._keeper = keeper
        self._file = file
        self._clock = clock
        self._open: set[Reservation] = set()
        keeper.on_tick = self._extend

    def concern(self, key: ApiKey) -> bool:
        """Whether a request with this key may have any quota."""
        return bool(key.quotas) or self._file.has_any

    async def admit(self, key: ApiKey, entry: Entry, context: int | None, body: bytes) -> Reservation:
        """Reserves what a request needs, of all quotas or of none.

        Raises RateLimitError, QuotaExceededError, and UnavailableError while the ledger is away.
        """
        project = payer(entry, key)
        limits = self._file.of(project, str(entry.ref))
        if key.quotas:
            limits.append((f"key/{key.uid}", key.quotas))
        if not limits:
            return NOTHING
        prompt, completion = tokens_of(body, context)
        price = await self._price(limits, key, project, entry)
        parts: list[tuple[Bucket, int]] = []
        for scope, of_scope in limits:
            for meter, limit in of_scope:
                bucket = self._keeper.bucket(scope, meter, limit)
                amount = 1 if meter is Meter.REQUESTS_PER_MINUTE else prompt + completion
                if meter.is_money and price is not None:
                    bucket.currency = self._keeper.currency
                    amount = max(price.cost(prompt, 0, completion), price.cost(prompt, prompt, completion))
                parts.append((bucket, amount))
        for bucket, amount in parts:
            if amount > bucket.limit:
                raise _never(bucket, amount)
        await self._fill(parts)
        for bucket, amount in parts:
            bucket.take(amount, self._clock())
        reservation = Reservation([(bucket, amount, 0) for bucket, amount in parts], price=price, _open=self._open)
        self._open.add(reservation)
        return reservation

    async def _price(
        self, limits: Sequence[tuple[str, Limits]], key: ApiKey, project: str, entry: Entry
    ) -> TokenPrice | None:
        """Of the entry; None where no budget of money counts. What cannot be counted is not served: it would be free.

        Raises UnavailableError while the price is not known, QuotaExceededError where there is none.
        """
        price: TokenPrice | None = None
        for scope, limit in [
            (scope, limit) for scope, of_scope in limits for meter, limit in of_scope if meter.is_money
        ]:
            base = entry.ref if isinstance(entry, BaseRoute) else entry.base_ref
            try:
                price = await self._keeper.price(PricedModel(project=project, model=str(entry.ref), base=str(base)))
            except LedgerAwayError:
                raise _away() from None
            currency = key.currency if scope.startswith("key/") else self._file.currency(scope)
            if price is None:
                raise self._unusable(scope, money_text(limit, currency), f"the model {entry.ref} has no price")
            if currency != self._keeper.currency:
                raise self._unusable(scope, money_text(limit, currency), f"prices are in {self._keeper.currency}")
        return price

    def _unusable(self, scope: str, budget: str, why: str) -> ApiError:
        self._unpriced()
        if (line := f"{scope}: {why}") not in self._warned and len(self._warned) < MOST_WARNINGS:
            self._warned.add(line)
            log.warning("requests are refused, since the budget of %s of %s cannot be used: %s", budget, scope, why)
        return QuotaExceededError(
            f"The budget of {budget} a month of {_named(scope)} cannot be used, since {why}. The administrator can "
            "add the price, or declare the budget in the currency of the prices.",
            code="price_missing",
        )

    async def _fill(self, parts: list[tuple[Bucket, int]]) -> None:
        """Returns when all parts can be taken, without a wait if that is so already."""
        for bucket, _ in parts:
            self._keeper.end_leases(bucket)
        for _ in range(ROUNDS):
            lacking = [(bucket, amount) for bucket, amount in parts if bucket.unspent < amount]
            if not lacking:
                return
            try:
                await self._keeper.refill(lacking)
            except LedgerAwayError:
                for bucket, amount in lacking:
                    if bucket.unspent >= amount:
                        continue
                    granted = self._keeper.take_share(bucket, amount)
                    if granted is None:
                        raise _away() from None
                    if not granted:
                        raise _exceeded(bucket, amount) from None
                continue
            for bucket, amount in lacking:
                if bucket.unspent < amount and (bucket.free or 0) + max(0, bucket.unspent) < amount:
                    raise _exceeded(bucket, amount)
            await asyncio.sleep(0)
        raise _exceeded(*next((part for part in parts if part[0].unspent < part[1]), parts[0]))

    def _extend(self) -> None:
        for reservation in self._open:
            reservation.extend()


def rate_headers(bucket: Bucket) -> dict[str, str]:
    """`x-ratelimit-*` of one rate."""
    unit = "requests" if bucket.meter is Meter.REQUESTS_PER_MINUTE else "tokens"
    remaining = bucket.remaining
    reset_s = 60 * (bucket.limit - remaining) / bucket.limit
    return {
        f"x-ratelimit-limit-{unit}": str(bucket.limit),
        f"x-ratelimit-remaining-{unit}": str(remaining),
        f"x-ratelimit-reset-{unit}": f"{reset_s:.3f}s",
    }


def _named(scope: str) -> str:
    kind, _, name = scope.partition("/")
    return _WHAT[kind] if kind == "key" else f"{_WHAT[kind]} {name}"


def _exceeded(bucket: Bucket, amount: int) -> ApiError:
    if bucket.meter.is_budget:

        def text(quantity: int) -> str:
            return money_text(quantity, bucket.currency) if bucket.currency else f"{quantity} tokens"

        if bucket.used + amount <= bucket.limit:  # it is reserved for requests that run, and may come free
            return TokenRateError(
                f"What is left of the {text(bucket.limit)} a month of {_named(bucket.scope)} is reserved by other "
                "requests.",
                retry_after_s=RETRY_S,
            )
        return QuotaExceededError(
            f"The month's {text(bucket.limit)} of {_named(bucket.scope)} are used up: "
            f"{text(bucket.used)} are used, and this request may take {text(amount)}. The budget begins "
            "again with the next month (UTC); the administrator can raise it."
        )
    missing = max(1, amount - bucket.remaining)
    retry_after_s = max(0.05, min(60.0, 60 * missing / bucket.limit))
    kind: type[RateLimitError] = TokenRateError
    unit, asked = "tokens", f", requested {amount}"
    if bucket.meter is Meter.REQUESTS_PER_MINUTE:
        kind, unit, asked = RequestRateError, "requests", ""
    return kind(
        f"Rate limit reached for {unit} per minute of {_named(bucket.scope)}: limit {bucket.limit}{asked}. "
        f"Please try again in {retry_after_s:.3f}s.",
        retry_after_s=retry_after_s,
        rate=rate_headers(bucket),
    )


def _never(bucket: Bucket, amount: int) -> ApiError:
    if bucket.meter.is_budget:
        return _exceeded(bucket, amount)
    return QuotaExceededError(
        f"The request may take {amount} tokens, more than the {bucket.limit} tokens per minute of "
        f"{_named(bucket.scope)}. Ask for fewer with `max_tokens`."
    )


def _away() -> ApiError:
    return UnavailableError(
        "The quotas of this request cannot be checked at present: the ledger is away. Try again.",
        code="quota_unavailable",
        retry_after_s=5,
    )
