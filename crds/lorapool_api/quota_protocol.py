"""The quota protocol: how gateways lease parts of rates and budgets from the ledger, so that admission does no I/O.

A gateway asks about once a second for each scope that is in use, and at once when its lease does not suffice. What it
reports is cumulative or absolute, so that a call that is repeated, or whose answer is lost, changes nothing. The ledger
grants at most what is free: the limit, less what was consumed, less what all gateways hold. Amounts of money are whole
billionths of the currency; the ledger's answers have the prices with which a gateway computes them.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from lorapool_api.common import ApiModel
from lorapool_api.currency import is_currency

ROUTE_LEASES = "/v1/quota/leases"
"""Of the ledger. `POST` of a `LeaseCall` by a gateway returns a `LeaseAnswer`."""
MAX_ASKS = 1000
"""Asks of one call at most."""
MAX_PRICED = 1000
"""Models of one call at most."""
QUANTITY_MAX = 2**53
"""Limits of requests and tokens are below this."""
BILLIONTHS = 10**9
"""Amounts of money are counted in billionths of the currency."""
MONEY_MAX = 10**18
"""Amounts of money are below this: a billion of the currency."""
SCARCE_REQUESTS = 10
"""Below this many requests for each gateway, only requests that wait are granted anything: nothing is leased ahead."""
SILENT_MS = 3_000
"""A gateway that has not called for this long may be cut off, and use its share of what was free of a budget."""
SHARE_MS = 120_000
"""For this long, the share of a gateway that may be cut off is not given to others."""
HOLD_MS = 10_000
"""What a gateway holds counts for this long after its last call. One that is gone cannot consume more."""


class Meter(StrEnum):
    """What a quota counts."""

    REQUESTS_PER_MINUTE = "requests"
    TOKENS_PER_MINUTE = "tokens"
    TOKENS_PER_MONTH = "month_tokens"
    """Billed tokens of the calendar month, UTC."""
    MONEY_PER_MONTH = "month_money"
    """What the usage of the calendar month, UTC, is charged, in billionths of the currency."""

    @property
    def is_budget(self) -> bool:
        """Whether it is used up for a month. The others are refilled all the time."""
        return self in (Meter.TOKENS_PER_MONTH, Meter.MONEY_PER_MONTH)

    @property
    def is_money(self) -> bool:
        return self is Meter.MONEY_PER_MONTH


_MONEY = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,9}))? ([A-Z]{3})", re.ASCII)


def parse_money(text: str) -> tuple[int, str]:
    """Reads `25.50 EUR` as billionths and a currency. Raises ValueError with the remedy."""
    found = _MONEY.fullmatch(text)
    amount = int(found[1]) * BILLIONTHS + int((found[2] or "").ljust(9, "0")) if found else 0
    if found is None or not amount or not is_currency(found[3]):
        raise ValueError(
            "must be an amount above 0 and below a billion, with at most 9 decimals, and its currency by ISO 4217, "
            "such as 25.50 EUR; leave it out for no limit"
        )
    return amount, found[3]


def money_text(billionths: int, currency: str) -> str:
    """Such as `25.50 EUR`, without what rounds away below a hundred-thousandth."""
    amount = f"{Decimal(billionths) / BILLIONTHS:.5f}"
    whole, _, decimals = amount.partition(".")
    return f"{whole}.{decimals.rstrip('0').ljust(2, '0')} {currency}"


class LeaseAsk(ApiModel):
    """What a gateway needs of one quota."""

    scope: str = Field(max_length=400, pattern=r"^(key|project|model)/.+$")
    """`key/<uid>`, `project/<namespace>` or `model/<namespace>/<name>`."""
    meter: Meter
    """Which of its quotas."""
    limit: int = Field(ge=1, lt=MONEY_MAX)
    """The quota, as declared."""
    need: int = Field(default=0, ge=0, lt=MONEY_MAX)
    """Of one request: less is of no use."""
    waiting: int = Field(default=0, ge=0, lt=MONEY_MAX)
    """Of all requests that wait for this call. Where little is free, no more than this is granted."""
    want: int = Field(default=0, ge=0, lt=MONEY_MAX)
    """With what is likely used until the next call."""
    consumed: int = Field(default=0, ge=0)
    """By requests that have ended, since this process began."""
    held: int = Field(default=0, ge=0)
    """Reserved for requests that run, and leased and not used yet."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if self.meter is not Meter.MONEY_PER_MONTH and self.limit >= QUANTITY_MAX:
            raise ValueError(f"a limit of {self.meter} must be below 2^53")
        return self


class PricedModel(ApiModel):
    """A model whose price a gateway needs, with who pays."""

    project: str = Field(max_length=63)
    model: str = Field(max_length=320)
    """Full name of the adapter or the base."""
    base: str = Field(max_length=320)


class TokenPrice(ApiModel):
    """What usage of a model costs at present."""

    prompt: Decimal
    """A million prompt tokens that were not cached."""
    cached: Decimal
    """A million cached ones."""
    completion: Decimal
    """A million generated tokens."""
    request: Decimal
    """One request."""

    def cost(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        """Of one request, in billionths, rounded up. `prompt_tokens` include the cached ones."""
        cached_tokens = min(cached_tokens, prompt_tokens)
        tokens = (
            (prompt_tokens - cached_tokens) * self.prompt
            + cached_tokens * self.cached
            + completion_tokens * self.completion
        )
        return math.ceil(tokens * (BILLIONTHS // 10**6) + self.request * BILLIONTHS)


class LeaseCall(ApiModel):
    """Body of `POST /v1/quota/leases`."""

    boot_id: str = Field(max_length=64)
    """Identifier of the gateway's process."""
    gateway: str = Field(max_length=253)
    """Name of its pod."""
    asks: list[LeaseAsk] = Field(max_length=MAX_ASKS)
    """Each quota once."""
    ended: bool = False
    """Whether the process stops: what it held of all quotas is free."""
    priced: list[PricedModel] = Field(default_factory=list, max_length=MAX_PRICED)
    """The models whose prices it needs for budgets of money."""


class Lease(ApiModel):
    """Answer to one ask, in the same order."""

    granted: int = Field(ge=0)
    """Added to what the gateway holds. 0 where what is free does not reach `need`, although requests wait."""
    free: int
    """What remains after this, for all gateways."""
    used: int = Field(ge=0)
    """Consumed: of the month, or what has not been refilled yet."""
    reset_ms: int = Field(ge=0)
    """Until all of it is free again if nothing more is consumed; of a budget, until the month ends."""


class LeaseAnswer(ApiModel):
    """Response of `POST /v1/quota/leases`."""

    leases: list[Lease]
    """One for each ask."""
    gateways: int = Field(ge=1)
    """Gateways that have called lately. While the ledger is away, each may use its share of what was free."""
    prices: list[TokenPrice | None] = Field(default_factory=list)
    """One for each of `priced`; None: neither tokens nor requests of the model have a price."""
    currency: str = ""
    """Of the prices; empty when there are none."""
