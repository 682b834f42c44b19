"""What is free of each rate and budget, and what each gateway holds of it. Pure.

A rate is a bucket that holds at most one minute's worth and is refilled all the time. A budget is used up in a month.
Of both, what is free is what is left, less what gateways hold: their leases and what running requests have reserved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from lorapool_api.quota_protocol import HOLD_MS, SCARCE_REQUESTS, SHARE_MS, SILENT_MS, Lease, LeaseAsk, LeaseCall, Meter

MINUTE_MS = 60_000
FORGET_MS = 3_600_000
"""An account that no gateway has asked for is forgotten after this long, full as it then is."""
Name = tuple[str, Meter]
Use = tuple[str, Meter, int, int]
"""Scope, meter, limit, used."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one gateway holds of one quota."""

    gateway: str
    scope: str
    meter: Meter
    held: int
    """Leased, and reserved for requests that run."""
    consumed: int
    """By requests of this gateway that have ended, as it last reported."""
    used: int
    """Of the budget, by all gateways, at that time."""
    until_ms: int
    """When the next call is due; `until_ms` also tells the month in which this was noted."""


@dataclass(slots=True)
class _Holder:
    consumed: int
    held: int
    until_ms: int
    share: int = 0
    """Of a budget: what it may use without the ledger, as of its last call."""
    called_ms: int = 0
    """When it called last; 0: not yet, it held something when an earlier process ended."""


@dataclass(slots=True)
class _Account:
    limit: int
    at_ms: int
    level: float
    """Of a rate: what is left now."""
    month: str = ""
    counted: int = 0
    """Of a budget: consumed in this month as far as the sums of the ledger know."""
    reported: int = 0
    """Of a budget: what the sums knew first, and what gateways have reported since."""
    noted: int = 0
    """Of a budget: what an earlier process knew of this month."""
    holders: dict[str, _Holder] = field(default_factory=dict)
    asked_ms: int = 0

    @property
    def used(self) -> int:
        """Of a budget, in this month. Both only lag behind, so the larger number counts."""
        return max(self.counted, self.reported)


def month_of(now_ms: int) -> str:
    return datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%Y-%m")


def month_start_s(now_ms: int) -> int:
    now = datetime.fromtimestamp(now_ms / 1000, UTC)
    return int(now.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp())


def month_end_ms(now_ms: int) -> int:
    now = datetime.fromtimestamp(now_ms / 1000, UTC)
    year, month = (now.year, now.month + 1) if now.month < 12 else (now.year + 1, 1)
    return int(datetime(year, month, 1, tzinfo=UTC).timestamp() * 1000)


class Accounts:
    def __init__(self) -> None:
        self._accounts: dict[Name, _Account] = {}
        self._begun_ms: int | None = None
        """When the first gateway called."""
        self._gateways: dict[str, int] = {}
        """When each called last."""

    def unknown(self, asks: Iterable[LeaseAsk], now_ms: int) -> list[Name]:
        """The budgets whose consumption in this month is not known yet."""
        month = month_of(now_ms)
        return [
            (ask.scope, ask.meter)
            for ask in asks
            if ask.meter.is_budget
            and ((account := self._accounts.get((ask.scope, ask.meter))) is None or account.month != month)
        ]

    def budgets(self) -> list[Name]:
        """All budgets that are in use."""
        return [name for name in self._accounts if name[1].is_budget]

    def count(self, name: Name, month: str, quantity: int) -> None:
        """Sets what the sums of the ledger know of a month. They never fall within it."""
        account = self._accounts.setdefault(name, _Account(1, 0, 0.0))
        if account.month != month:
            account.month, account.counted, account.reported = month, quantity, max(quantity, account.noted)
            account.noted = 0
        account.counted = max(account.counted, quantity)

    def restore(self, held: Iterable[Held], now_ms: int) -> None:
        """Begins with what gateways held and had consumed when an earlier process ended."""
        for item in held:
            account = self._accounts.setdefault((item.scope, item.meter), _Account(1, 0, 0.0))
            account.holders[item.gateway] = _Holder(item.consumed, item.held, item.until_ms)
            if month_of(item.until_ms - HOLD_MS) == month_of(now_ms):
                account.noted = max(account.noted, item.used)

    def lease(self, call: LeaseCall, now_ms: int) -> tuple[list[Lease], int]:
        """The answers to a call, and the number of gateways. Budgets have been counted before."""
        if self._begun_ms is None:
            self._begun_ms = now_ms
        if call.ended:
            return [self._leave(call.boot_id, ask, now_ms) for ask in call.asks], max(1, len(self._gateways))
        self._gateways[call.boot_id] = now_ms
        self._gateways = {name: at for name, at in self._gateways.items() if now_ms - at < HOLD_MS}
        return [self._lease(call.boot_id, ask, now_ms) for ask in call.asks], len(self._gateways)

    def held(self) -> list[Held]:
        """What gateways hold of budgets, for a process that continues after this one."""
        return [
            Held(gateway, scope, meter, holder.held, holder.consumed, account.used, holder.until_ms)
            for (scope, meter), account in self._accounts.items()
            if meter.is_budget
            for gateway, holder in account.holders.items()
        ]

    def uses(self, now_ms: int, since_ms: int = 1) -> list[Use]:
        """The quotas that gateways have asked for, since then."""
        found = []
        for (scope, meter), account in list(self._accounts.items()):  # metrics read this in a thread of their own
            if account.asked_ms < since_ms or (meter.is_budget and account.month != month_of(now_ms)):
                continue
            if meter.is_budget:
                used = max(account.counted, account.reported)
            else:
                refilled = account.level + account.limit * (now_ms - account.at_ms) / MINUTE_MS
                used = account.limit - int(min(float(account.limit), refilled))
            found.append((scope, meter, account.limit, used))
        return found

    def forget(self, now_ms: int) -> None:
        """Drops accounts that were not asked for lately."""
        for name, account in list(self._accounts.items()):
            if now_ms - account.asked_ms > FORGET_MS and not account.holders:
                del self._accounts[name]

    def _lease(self, gateway: str, ask: LeaseAsk, now_ms: int) -> Lease:
        account = self._accounts.setdefault((ask.scope, ask.meter), _Account(ask.limit, now_ms, float(ask.limit)))
        if account.asked_ms == 0 and not ask.meter.is_budget:
            account.level, account.at_ms = float(ask.limit), now_ms
        account.limit, account.asked_ms = ask.limit, now_ms
        self._expire(account, now_ms)
        holder = account.holders.get(gateway)
        if holder is None:  # what it consumed before any process of the ledger knew it is in the sums
            holder = account.holders[gateway] = _Holder(ask.consumed, 0, 0)
        consumed = ask.consumed - holder.consumed  # below zero: a rate was charged too much before
        holder.consumed, holder.held, holder.share = ask.consumed, ask.held, 0
        holder.called_ms, holder.until_ms = now_ms, now_ms + HOLD_MS
        left = self._left(account, ask, consumed, now_ms)
        free = max(0, int(left) - sum(_held(item, now_ms) for item in account.holders.values()))
        if ask.meter.is_budget and self._is_waiting(account, now_ms):
            free = 0
        share = free // max(1, len(self._gateways))
        is_scarce = share < SCARCE_REQUESTS * max(1, ask.need)
        granted = min(free, ask.waiting) if is_scarce else min(share, ask.want)
        if granted < ask.need and ask.waiting:
            granted = 0
        holder.held += granted
        if ask.meter.is_budget:
            holder.share = (free - granted) // max(1, len(self._gateways))
        used = max(0, ask.limit - int(left))
        reset_ms = month_end_ms(now_ms) - now_ms if ask.meter.is_budget else int(used * MINUTE_MS / ask.limit)
        return Lease(granted=granted, free=free - granted, used=used, reset_ms=reset_ms)

    def _is_waiting(self, account: _Account, now_ms: int) -> bool:
        """Whether gateways have yet to report what they consumed while the ledger was away."""
        assert self._begun_ms is not None
        return now_ms - self._begun_ms < SILENT_MS and any(not item.called_ms for item in account.holders.values())

    def _leave(self, gateway: str, ask: LeaseAsk, now_ms: int) -> Lease:
        """Takes the last report of a gateway that stops."""
        lease = self._lease(gateway, ask.model_copy(update={"want": 0, "waiting": 0}), now_ms)
        holder = self._accounts[ask.scope, ask.meter].holders[gateway]
        holder.held = holder.share = 0
        self._gateways.pop(gateway, None)
        return lease

    @staticmethod
    def _left(account: _Account, ask: LeaseAsk, consumed: int, now_ms: int) -> float:
        if ask.meter.is_budget:
            account.reported += max(0, consumed)
            return account.limit - account.used
        refilled = account.level + ask.limit * (now_ms - account.at_ms) / MINUTE_MS
        account.level = min(float(ask.limit), min(float(ask.limit), refilled) - consumed)
        account.at_ms = now_ms
        return account.level

    def _expire(self, account: _Account, now_ms: int) -> None:
        """Frees what gateways held that have not called for too long; forgets them later."""
        assert self._begun_ms is not None
        for gateway, holder in list(account.holders.items()):
            if holder.until_ms <= now_ms:
                holder.held = 0
                if now_ms - (holder.called_ms or self._begun_ms) > FORGET_MS:
                    del account.holders[gateway]


def _held(holder: _Holder, now_ms: int) -> int:
    share = holder.share if SILENT_MS < now_ms - holder.called_ms < SHARE_MS else 0
    return holder.held + share
