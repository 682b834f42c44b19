"""What this gateway holds of one quota. Pure.

What is granted is consumed by requests that have ended, reserved for those that run, or unspent. A request may turn out
larger than was reserved for it; then less than nothing is unspent, and the next one waits for the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.quota_protocol import SCARCE_REQUESTS, Lease, LeaseAsk, Meter

IDLE_S = 10.0
"""A bucket that was not used for this long gives back what is unspent."""
AHEAD = 2
"""A lease is for this many times what was taken since the last one."""


@dataclass(slots=True)
class Bucket:
    scope: str
    meter: Meter
    limit: int
    currency: str = ""
    """Of a budget of money, which is counted in billionths."""
    granted: int = 0
    consumed: int = 0
    reserved: int = 0
    taken: int = 0
    """Since the last ask."""
    need: int = 1
    """Of the last request."""
    waiting: int = 0
    """Of requests that wait for the ledger."""
    used_s: float = 0.0
    """When a request last took of it."""
    free: int | None = None
    """As the ledger last said; None: it was never asked."""
    used: int = 0
    reset_ms: int = 0
    share: float = 0.0
    """What this gateway may still use of what was free when the ledger was last reached."""
    share_s: float = 0.0
    """When the share of a rate was last refilled."""

    @property
    def unspent(self) -> int:
        return self.granted - self.consumed - self.reserved

    @property
    def remaining(self) -> int:
        """For the caller: about what is left for all gateways."""
        return max(0, min(self.limit, (self.free if self.free is not None else self.limit) + max(0, self.unspent)))

    def take(self, amount: int, now_s: float) -> None:
        """Takes a part of what is unspent: reserves it of a budget, consumes it of a rate, which refills meanwhile."""
        if self.meter.is_budget:
            self.reserved += amount
        else:
            self.consumed += amount
        self.taken += amount
        self.need, self.used_s = max(1, amount), now_s

    def overdraw(self, amount: int) -> int:
        """Takes more for an answer that is longer than was assumed; returns how much of it was not granted.

        The ledger counts that as held.
        """
        missing = amount - min(amount, max(0, self.unspent))
        self.granted += missing
        if self.meter.is_budget:
            self.reserved += amount
        else:
            self.consumed += amount
        return missing

    def settle(self, taken: int, consumed: int, overdrawn: int = 0) -> None:
        """Replaces what was taken, a part of it beyond what was granted, by what was in fact consumed."""
        self.granted -= min(overdrawn, max(0, taken - consumed))
        if self.meter.is_budget:
            self.reserved -= taken
            self.consumed += consumed
        else:
            self.consumed += consumed - taken

    def ask(self, now_s: float) -> LeaseAsk:
        """The next ask. What is unspent beyond what will be needed soon is given back with it."""
        idle = now_s - self.used_s > IDLE_S
        scarce = self.free is not None and self.free < SCARCE_REQUESTS * self.need
        ahead = 0 if not self.waiting and (idle or scarce) else max(self.need, AHEAD * self.taken)
        if self.unspent < 0:
            self.granted -= self.unspent  # it is in what is reported as consumed or reserved
        elif self.unspent > ahead:
            self.granted -= self.unspent - ahead
        self.taken = 0
        waiting = min(self.limit, max(0, self.waiting - self.unspent))
        return LeaseAsk(
            scope=self.scope,
            meter=self.meter,
            limit=self.limit,
            need=max(1, self.need - self.unspent) if waiting else self.need,
            waiting=waiting,
            want=min(self.limit, waiting + max(0, ahead - self.unspent)),
            consumed=self.consumed,
            held=self.reserved + self.unspent,
        )

    def answered(self, lease: Lease, gateways: int, now_s: float) -> None:
        self.granted += lease.granted
        self.free, self.used, self.reset_ms = lease.free, lease.used, lease.reset_ms
        self.share, self.share_s = lease.free / gateways, now_s

    def take_share(self, amount: int, gateways: int, now_s: float) -> bool:
        """Grants an amount of this gateway's share without the ledger."""
        if not self.meter.is_budget:
            whole = self.limit / gateways
            begin = self.share if self.free is not None else whole
            since_s = self.share_s or now_s
            self.share = min(whole, begin + whole * (now_s - since_s) / 60)
            self.share_s = now_s
            self.free = int(self.share)
        if amount > self.share:
            return False
        self.share -= amount
        self.granted += amount
        return True

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost with it but counts that the ledger has."""
        return not self.reserved and not self.unspent and not self.waiting
