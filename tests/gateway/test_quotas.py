"""Quotas at the gateway and the leases of the ledger that they are admitted with."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes import FakeRuntime
from gateway_world import KEY, World, api_key, until, world

from lorapool_api.openai import QuotaExceededError, RequestRateError, TokenRateError, UnavailableError
from lorapool_api.protocol import Usage
from lorapool_api.quota_protocol import MONEY_MAX, LeaseAnswer, LeaseCall, Meter, TokenPrice
from lorapool_api.settings import SettingsError
from lorapool_api.usage_protocol import AttemptEnd
from lorapool_gateway.ledger.sender import LedgerError
from lorapool_gateway.quotas.admission import Quotas, Reservation
from lorapool_gateway.quotas.buckets import Bucket
from lorapool_gateway.quotas.estimate import DEFAULT_COMPLETION, tokens_of
from lorapool_gateway.quotas.leases import LeaseKeeper
from lorapool_gateway.quotas.limits import QuotaFile
from lorapool_gateway.routing.auth import ApiKey, ApiKeyError, KeyTable, parse_key
from lorapool_gateway.routing.objects import BaseRoute, base_route
from lorapool_ledger.quotas.accounts import Accounts

MONTH_MS = 1_793_491_200_000
"""2026-11-01 00:00 UTC."""
TOKENS_OF_ONE = 50


@dataclass
class Ledger:
    """The ledger's accounts, called as over HTTP, with a clock and sums of the test."""

    now_ms: int = MONTH_MS + 86_400_000
    away: bool = False
    lose_answers: int = 0
    sums: dict[str, int] = field(default_factory=dict)
    accounts: Accounts = field(default_factory=Accounts)
    calls: int = 0
    prices: dict[str, TokenPrice] = field(default_factory=dict)
    """By the full name of the model; in EUR."""

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> tuple[int, bytes]:
        await asyncio.sleep(0)
        self.calls += 1
        if self.away:
            raise LedgerError("away")
        call = LeaseCall.model_validate_json(body)
        for name in self.accounts.unknown(call.asks, self.now_ms):
            self.accounts.count(name, "2026-11", self.sums.get(name[0], 0))
        leases, gateways = self.accounts.lease(call, self.now_ms)
        if self.lose_answers:
            self.lose_answers -= 1
            raise LedgerError("lost")
        prices = [self.prices.get(item.model) for item in call.priced]
        answer = LeaseAnswer(leases=leases, gateways=gateways, prices=prices, currency="EUR")
        return 200, answer.model_dump_json(by_alias=True).encode()


@dataclass
class Clock:
    s: float = 1000.0

    def __call__(self) -> float:
        return self.s


def base() -> BaseRoute:
    return base_route(
        {"metadata": {"namespace": "demo", "name": "tiny", "uid": "u"}, "spec": {"source": {"uri": "hf://a/b"}}}
    )


def key_with(**quotas: int) -> ApiKey:
    meters = {
        "requests": Meter.REQUESTS_PER_MINUTE,
        "tokens": Meter.TOKENS_PER_MINUTE,
        "month": Meter.TOKENS_PER_MONTH,
        "money": Meter.MONEY_PER_MONTH,
    }
    found = tuple((meters[name], limit) for name, limit in quotas.items())
    return api_key(KEY, uid="uid-key", quotas=found, currency="EUR" if "money" in quotas else "")


def priced(prompt: str = "1", cached: str = "1", completion: str = "1", request: str = "0") -> dict[str, TokenPrice]:
    """The price of `base()`; at 1 per million, a token costs 1000 billionths."""
    amounts = [Decimal(text) for text in (prompt, cached, completion, request)]
    return {"demo/tiny": TokenPrice(prompt=amounts[0], cached=amounts[1], completion=amounts[2], request=amounts[3])}


def gateway_of(ledger: Ledger | None, name: str = "g", *, clock: Clock | None = None, **more: Any) -> Quotas:
    clock = clock or Clock()
    return Quotas(LeaseKeeper(ledger, name, clock=clock, **more), QuotaFile(None), clock=clock)


def body_of(tokens: int) -> bytes:
    """A request for which this many tokens are reserved."""
    bodies = [b'{"max_tokens":%d}' % completion for completion in range(max(1, tokens - 10), tokens)]
    return next(body for body in bodies if sum(tokens_of(body, None)) == tokens) if tokens > 7 else b"{}"


async def admit(quotas: Quotas, key: ApiKey, tokens: int = TOKENS_OF_ONE) -> Reservation:
    return await quotas.admit(key, base(), None, body_of(tokens))


def used(tokens: int) -> Usage:
    return Usage(prompt_tokens=0, completion_tokens=tokens)


def settle(reservation: Reservation, tokens: int, ended: AttemptEnd = AttemptEnd.COMPLETED) -> None:
    reservation.usage = lambda: used(tokens)
    reservation.settle(ended)


# --- what is declared ----------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "1.5", "1e3", str(2**63), str(2**53), "", "many", "٣"])
def test_a_quota_in_a_secret_that_is_no_quota_gives_no_access(value: str) -> None:
    data = {"keySha256": "a" * 64, "namespaces": "*", "tokensPerMonth": value}
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}
    with pytest.raises(ApiKeyError, match="tokensPerMonth"):
        parse_key({"metadata": {"name": "k"}, "data": encoded})


def test_the_quotas_of_a_secret() -> None:
    data = {"keySha256": "a" * 64, "namespaces": "*", "requestsPerMinute": "7", "tokensPerMonth": str(2**53 - 1)}
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}
    quotas = parse_key({"metadata": {"name": "k"}, "data": encoded}).quotas
    assert quotas == ((Meter.REQUESTS_PER_MINUTE, 7), (Meter.TOKENS_PER_MONTH, 2**53 - 1))


BAD_MONEY = [
    *("0 EUR", "0.00 EUR", "-1 EUR", "NaN EUR", "Infinity EUR", "1e3 EUR", f"{2**63} EUR", "1000000000 EUR"),
    *("1.0000000001 EUR", "25.50", "EUR", "25.50 XYZ", "25.50 eur", "25.50 EURO", "25,50 EUR", ".5 EUR", "٣ EUR"),
]


@pytest.mark.parametrize("value", [*BAD_MONEY, ""])
def test_a_budget_in_a_secret_that_is_no_amount_of_a_currency_gives_no_access(value: str) -> None:
    data = {"keySha256": "a" * 64, "namespaces": "*", "moneyPerMonth": value}
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}
    with pytest.raises(ApiKeyError, match="moneyPerMonth"):
        parse_key({"metadata": {"name": "k"}, "data": encoded})


@pytest.mark.parametrize(
    ("value", "billionths"),
    [("25.50 EUR", 25_500_000_000), ("0.000000001 EUR", 1), ("999999999.999999999 EUR", MONEY_MAX - 1)],
)
def test_a_budget_of_money_in_a_secret_and_in_the_file(tmp_path: Path, value: str, billionths: int) -> None:
    data = {"keySha256": "a" * 64, "namespaces": "*", "moneyPerMonth": value}
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}
    key = parse_key({"metadata": {"name": "k"}, "data": encoded})
    assert (key.quotas, key.currency) == (((Meter.MONEY_PER_MONTH, billionths),), "EUR")
    path = tmp_path / "quotas.json"
    path.write_text(
        json.dumps({"namespaces": {"*": {"moneyPerMonth": value}}, "models": {"a/x": {"tokensPerMonth": 6}}})
    )
    quotas = QuotaFile(path)
    assert quotas.of("a", "a/y") == [("project/a", ((Meter.MONEY_PER_MONTH, billionths),))]
    assert (quotas.currency("project/a"), quotas.currency("model/a/x")) == ("EUR", "")
    del encoded["moneyPerMonth"]
    assert parse_key({"metadata": {"name": "k"}, "data": encoded}).quotas == ()


@pytest.mark.parametrize("value", [*BAD_MONEY, 0, 25, 25.5, True])
def test_a_file_with_a_budget_that_is_none_stops_the_start_and_changes_nothing_later(
    tmp_path: Path, value: Any
) -> None:
    path = tmp_path / "quotas.json"
    path.write_text(json.dumps({"models": {"a/x": {"moneyPerMonth": value}}}))
    with pytest.raises(SettingsError, match=r"moneyPerMonth.*leave it out"):
        QuotaFile(path)
    path.write_text(json.dumps({"models": {"a/x": {"moneyPerMonth": "25.50 EUR"}}}))
    clock = Clock()
    quotas = QuotaFile(path, clock=clock)
    path.write_text(json.dumps({"models": {"a/x": {"moneyPerMonth": value}}, "namespaces": {}}))
    clock.s += 2
    assert quotas.of("a", "a/x") == [("model/a/x", ((Meter.MONEY_PER_MONTH, 25_500_000_000),))]
    assert quotas.currency("model/a/x") == "EUR"


@pytest.mark.parametrize("value", [0, -1, 1.5, 2**63, "7", True, "NaN"])
def test_a_file_with_a_quota_that_is_none_stops_the_start_and_changes_nothing_later(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "quotas.json"
    path.write_text(json.dumps({"namespaces": {"a": {"tokensPerMinute": value}}}))
    with pytest.raises(SettingsError, match=r"tokensPerMinute.*leave it out"):
        QuotaFile(path)
    clock = Clock()
    path.write_text(json.dumps({"namespaces": {"a": {"tokensPerMinute": 5}}, "models": {"a/x": {"tokensPerMonth": 6}}}))
    quotas = QuotaFile(path, clock=clock)
    assert [scope for scope, _ in quotas.of("a", "a/x")] == ["project/a", "model/a/x"]
    path.write_text(json.dumps({"namespaces": {"a": {"tokensPerMinute": value}}, "more": 1}))
    clock.s += 2
    assert quotas.of("a", "a/y") == [("project/a", ((Meter.TOKENS_PER_MINUTE, 5),))]
    path.write_text(json.dumps({"namespaces": {"*": {"requestsPerMinute": 9}}}))
    clock.s += 2
    assert quotas.of("b", "b/y") == [("project/b", ((Meter.REQUESTS_PER_MINUTE, 9),))]
    os.unlink(path)
    clock.s += 2
    assert quotas.of("b", "b/y")


@pytest.mark.parametrize("value", ["-1", "0", str(2**63), '"5"', "1.5", "null", "[]", "1e999"])
def test_a_maximum_that_the_runtime_refuses_is_estimated_as_absent(value: str) -> None:
    body = b'{"prompt":"x","max_tokens":%b}' % value.encode()
    prompt = len(body) // 3 + 1
    assert sum(tokens_of(body, 4096)) in (prompt + DEFAULT_COMPLETION, prompt + 4096)


def test_estimates() -> None:
    body = b'{"max_completion_tokens":100,"max_tokens":50,"n":3,"messages":[]}'
    assert tokens_of(body, None) == (len(body) // 3 + 1, 150)
    body = b'{"max_tokens":5,"prompt":["a","b","c"]}'
    assert tokens_of(body, None) == (len(body) // 3 + 1, 15)
    assert tokens_of(b'{"max_output_tokens":999999,"x":"%b"}' % (b"y" * 90_000), 1000) == (1000, 1000)


# --- rates ---------------------------------------------------------------------------------


async def test_a_rate_of_requests_is_refilled_and_says_when(tmp_path: Path) -> None:
    ledger = Ledger()
    quotas, key = gateway_of(ledger), key_with(requests=60)
    for _ in range(60):
        await admit(quotas, key)
    with pytest.raises(RequestRateError) as caught:
        await admit(quotas, key)
    headers = caught.value.headers()
    assert caught.value.body()["error"] | {"message": ""} == {
        "message": "", "type": "requests", "param": None, "code": "rate_limit_exceeded",
    }  # fmt: skip
    assert int(headers["retry-after-ms"]) == 1000
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("60", "0")
    ledger.now_ms += 1000
    await admit(quotas, key)
    with pytest.raises(RequestRateError):
        await admit(quotas, key)


async def test_a_rate_of_tokens_is_settled_with_what_was_computed() -> None:
    quotas, key = gateway_of(Ledger()), key_with(tokens=1000)
    large = await admit(quotas, key, 900)
    with pytest.raises(TokenRateError):
        await admit(quotas, key, 200)
    settle(large, 100, AttemptEnd.FAILED)
    settle(await admit(quotas, key, 800), 800)
    with pytest.raises(TokenRateError):
        await admit(quotas, key, 200)


async def test_a_request_that_no_rate_will_ever_permit_is_not_repeated() -> None:
    with pytest.raises(QuotaExceededError, match="max_tokens"):
        await admit(gateway_of(Ledger()), key_with(tokens=100), 101)


async def test_all_quotas_or_none_are_taken() -> None:
    quotas, key = gateway_of(Ledger()), key_with(requests=10, tokens=100)
    await admit(quotas, key, 90)
    for _ in range(20):
        with pytest.raises(TokenRateError):
            await admit(quotas, key, 50)
    for _ in range(9):
        settle(await admit(quotas, key, 10), 0)


async def test_the_headers_of_an_answer_show_the_nearest_limit() -> None:
    reservation = await admit(gateway_of(Ledger()), key_with(requests=10, tokens=1000), 100)
    headers = reservation.headers()
    assert headers["x-ratelimit-limit-requests"] == "10"
    assert headers["x-ratelimit-remaining-requests"] == "9"
    assert headers["x-ratelimit-reset-requests"] == "6.000s"
    assert headers["x-ratelimit-remaining-tokens"] == "900"


async def test_most_requests_of_a_large_rate_make_no_call() -> None:
    ledger, clock = Ledger(), Clock()
    quotas, key = gateway_of(ledger, clock=clock), key_with(requests=1_000_000, month=2**50)
    for _ in range(20):
        for _ in range(100):
            await admit(quotas, key)
        clock.s += 1
        ledger.now_ms += 1000
        await quotas._keeper._call(list(quotas._keeper._buckets.values()))
    assert ledger.calls < 45


# --- budgets -------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "of_token"), [("month", 1), ("money", 1000)])
async def test_three_gateways_and_five_hundred_requests_spend_a_budget_for_fifty_and_no_more(
    budget: str, of_token: int
) -> None:
    ledger = Ledger(prices=priced())
    gateways = [gateway_of(ledger, f"g{number}") for number in range(3)]
    key = key_with(**{budget: 50 * TOKENS_OF_ONE * of_token})
    outcomes: list[str] = []
    spent = 0

    async def ask(number: int) -> None:
        nonlocal spent
        try:
            reservation = await admit(gateways[number % 3], key)
        except (QuotaExceededError, TokenRateError) as error:
            outcomes.append(type(error).__name__)
            return
        await asyncio.sleep(0)
        spent += TOKENS_OF_ONE
        settle(reservation, TOKENS_OF_ONE)
        outcomes.append("admitted")

    await asyncio.gather(*(ask(number) for number in range(500)))
    assert outcomes.count("admitted") <= 50
    for _ in range(100):  # what was refused while all was reserved is admitted later, until the budget is used up
        for quotas in gateways:
            await quotas._keeper._call(list(quotas._keeper._buckets.values()))
        await ask(_)
    assert spent == 50 * TOKENS_OF_ONE
    with pytest.raises(QuotaExceededError) as caught:
        await admit(gateways[0], key)
    assert caught.value.headers()["x-should-retry"] == "false"


async def test_a_budget_counts_what_is_billed() -> None:
    ledger = Ledger(sums={"key/uid-key": 400})
    quotas, key = gateway_of(ledger), key_with(month=1000)
    settle(await admit(quotas, key, 500), 500, AttemptEnd.FAILED)
    settle(await admit(quotas, key, 500), 500, AttemptEnd.LOST)
    settle(await admit(quotas, key, 500), 300, AttemptEnd.CLIENT_LEFT)
    settle(await admit(quotas, key, 300), 300)
    with pytest.raises(QuotaExceededError, match="1000 tokens are used"):
        await admit(quotas, key, 1)


async def test_a_budget_begins_again_with_the_month() -> None:
    ledger = Ledger(sums={"key/uid-key": 1000})
    quotas, key = gateway_of(ledger), key_with(month=1000)
    with pytest.raises(QuotaExceededError):
        await admit(quotas, key)
    ledger.now_ms = MONTH_MS + 30 * 86_400_000
    ledger.accounts.count(("key/uid-key", Meter.TOKENS_PER_MONTH), "2026-12", 0)
    await admit(quotas, key)


async def test_an_answer_that_is_longer_than_assumed_is_reserved_while_it_runs_and_no_other_gets_it() -> None:
    quotas, key = gateway_of(Ledger()), key_with(month=1000)
    long = await admit(quotas, key, 100)
    long.usage = lambda: used(900)
    quotas._extend()
    with pytest.raises(TokenRateError):
        await admit(quotas, key, 100)
    settle(long, 950)
    with pytest.raises(QuotaExceededError):
        await admit(quotas, key, 100)
    await admit(quotas, key, 50)


async def test_lost_answers_of_the_ledger_change_no_sum() -> None:
    ledger, clock = Ledger(), Clock()
    quotas, key = gateway_of(ledger, clock=clock), key_with(month=1000)
    settle(await admit(quotas, key, 500), 500)
    ledger.lose_answers = 5
    for _ in range(6):
        clock.s += 1
        try:
            await quotas._keeper._call(list(quotas._keeper._buckets.values()))
        except Exception:  # the answer was lost
            continue
    settle(await admit(quotas, key, 500), 500)
    with pytest.raises(QuotaExceededError):
        await admit(quotas, key, 1)


async def test_after_a_restart_of_the_ledger_nothing_is_spent_twice_and_nothing_is_phantom() -> None:
    ledger, key = Ledger(), key_with(month=1000)
    quotas = gateway_of(ledger)
    ended, running = await admit(quotas, key, 300), await admit(quotas, key, 300)
    settle(ended, 300)
    await quotas._keeper._call(list(quotas._keeper._buckets.values()))
    noted = ledger.accounts.held()
    settle(await admit(quotas, key, 50), 50)  # while the ledger does not run
    ledger.accounts = Accounts()  # its sums lack the requests that have ended
    ledger.accounts.restore(noted, ledger.now_ms)
    with pytest.raises((QuotaExceededError, TokenRateError)):
        await admit(quotas, key, 500)
    ledger.accounts.count(("key/uid-key", Meter.TOKENS_PER_MONTH), "2026-11", 350)
    settle(running, 250)
    settle(await admit(quotas, key, 400), 400)
    with pytest.raises(QuotaExceededError):
        await admit(quotas, key, 1)


async def test_what_a_gateway_held_that_is_gone_comes_free() -> None:
    ledger, key = Ledger(), key_with(month=100)
    await admit(gateway_of(ledger, "gone"), key, 100)
    other = gateway_of(ledger, "other")
    with pytest.raises(TokenRateError):
        await admit(other, key, 100)
    ledger.now_ms += 11_000
    await admit(other, key, 100)


async def test_a_gateway_that_stops_gives_its_leases_back_at_once() -> None:
    ledger, key = Ledger(), key_with(month=1000)
    stopping, other = gateway_of(ledger, "stopping"), gateway_of(ledger, "other")
    settle(await admit(stopping, key, 50), 50)
    await stopping._keeper._call(list(stopping._keeper._buckets.values()))
    await stopping._keeper.end()
    ledger.now_ms += 5000  # no share is kept for it either
    await admit(other, key, 950)


# --- money ---------------------------------------------------------------------------------


async def test_a_budget_of_money_counts_each_token_at_its_price() -> None:
    ledger = Ledger(prices=priced("2", "0.5", "8", "0.0001"))
    quotas, key = gateway_of(ledger), key_with(money=1_000_000)  # 0.001 EUR
    first = await admit(quotas, key)
    first.usage = lambda: Usage(prompt_tokens=10, cached_tokens=6, completion_tokens=5)
    first.settle(AttemptEnd.COMPLETED)
    bucket = first_bucket(quotas)
    assert bucket.consumed == 4 * 2000 + 6 * 500 + 5 * 8000 + 100_000
    lost = await admit(quotas, key)
    settle(lost, 40, AttemptEnd.LOST)
    assert bucket.consumed == 151_000
    long = await admit(quotas, key)
    long.usage = lambda: used(80)
    quotas._extend()
    with pytest.raises((QuotaExceededError, TokenRateError)):
        await admit(quotas, key)  # the long answer is reserved at the price of completions
    settle(long, 80)
    assert bucket.consumed == 151_000 + 80 * 8000 + 100_000
    with pytest.raises(QuotaExceededError, match=r"0\.001 EUR .* 0\.00089 EUR are used") as caught:
        await admit(quotas, key)
    assert caught.value.code == "insufficient_quota"
    assert caught.value.headers()["x-should-retry"] == "false"


def first_bucket(quotas: Quotas) -> Bucket:
    return next(iter(quotas._keeper._buckets.values()))


async def test_a_model_without_a_price_is_refused_where_money_counts_until_it_has_one() -> None:
    ledger, clock, refused = Ledger(), Clock(), []
    keeper = LeaseKeeper(ledger, "g", clock=clock)
    quotas = Quotas(keeper, QuotaFile(None), unpriced=lambda: refused.append(1), clock=clock)
    key = key_with(money=1_000_000)
    for _ in range(3):
        with pytest.raises(QuotaExceededError, match="demo/tiny has no price") as caught:
            await admit(quotas, key)
        assert (caught.value.code, caught.value.headers()["x-should-retry"]) == ("price_missing", "false")
    assert (len(refused), ledger.calls) == (3, 1)
    await admit(quotas, key_with(month=1000))
    ledger.prices = priced("0", "0", "0")
    clock.s += 6
    for _ in range(100):
        settle(await admit(quotas, key), TOKENS_OF_ONE)  # a price of 0 is one
    assert len(refused) == 3


async def test_a_budget_in_another_currency_than_the_prices_is_refused() -> None:
    quotas, key = gateway_of(Ledger(prices=priced())), replace(key_with(money=1_000_000), currency="USD")
    with pytest.raises(QuotaExceededError, match="prices are in EUR") as caught:
        await admit(quotas, key)
    assert caught.value.code == "price_missing"


async def test_the_largest_amounts_stay_within_the_protocol() -> None:
    quotas, key = gateway_of(Ledger(prices=priced(completion=str(10**9)))), key_with(money=MONEY_MAX - 1)
    found = await asyncio.gather(*(admit(quotas, key, 100_000) for _ in range(30)), return_exceptions=True)
    assert sum(isinstance(item, Reservation) for item in found) in (9, 10)
    assert not [item for item in found if isinstance(item, UnavailableError)]


async def test_while_the_ledger_is_away_money_is_closed_after_the_grace_and_unknown_prices_at_once() -> None:
    ledger, clock = Ledger(prices=priced()), Clock()
    key = key_with(money=50 * TOKENS_OF_ONE * 1000)
    quotas, new = (gateway_of(ledger, name, clock=clock, grace_s=60) for name in ("g", "new"))
    settle(await admit(quotas, key), TOKENS_OF_ONE)
    ledger.away = True
    assert await spend(quotas, key, clock, tries=10) == 10
    with pytest.raises(UnavailableError):
        await admit(new, key)
    clock.s += 62
    with pytest.raises(UnavailableError) as caught:
        await admit(quotas, key)
    assert caught.value.code == "quota_unavailable"


# --- the ledger is away --------------------------------------------------------------------


async def spend(quotas: Quotas, key: ApiKey, clock: Clock, tries: int = 100) -> int:
    """How many requests are admitted."""
    admitted = 0
    for _ in range(tries):
        clock.s += 0.001
        try:
            settle(await admit(quotas, key), TOKENS_OF_ONE)
            admitted += 1
        except (QuotaExceededError, TokenRateError, RequestRateError, UnavailableError):
            pass
    return admitted


@pytest.mark.parametrize(("mode", "grace_s"), [("open-bounded", 0), ("closed", 60), ("closed", 0)])
async def test_while_the_ledger_is_away_a_budget_is_exceeded_by_the_leases_at_most(mode: Any, grace_s: float) -> None:
    ledger, clock = Ledger(), Clock()
    key = key_with(month=50 * TOKENS_OF_ONE)
    gateways = [gateway_of(ledger, f"g{number}", clock=clock, budgets=mode, grace_s=grace_s) for number in range(3)]
    for _ in range(2):
        for quotas in gateways:
            settle(await admit(quotas, key), TOKENS_OF_ONE)
    for quotas in gateways:
        await quotas._keeper._call(list(quotas._keeper._buckets.values()))
    leases = sum(bucket.unspent for quotas in gateways for bucket in quotas._keeper._buckets.values()) // TOKENS_OF_ONE
    assert leases <= 12
    ledger.away = True
    admitted = 6 + sum([await spend(quotas, key, clock) for quotas in gateways])
    if mode == "closed" and not grace_s:
        assert admitted == 6 + leases
    else:
        assert 40 <= admitted <= 50 + leases
    if mode == "closed" and grace_s:
        clock.s += grace_s + 1
        with pytest.raises(UnavailableError) as caught:
            await admit(gateways[0], key)
        assert caught.value.code == "quota_unavailable"
    ledger.away = False
    ledger.now_ms += 90_000
    clock.s += 2
    after = sum([await spend(quotas, key, clock) for quotas in gateways])
    assert admitted + after <= 50 + leases


@pytest.mark.parametrize("reached_before", [True, False])
async def test_while_the_ledger_is_away_each_gateway_keeps_to_its_share_of_a_rate(reached_before: bool) -> None:
    ledger, clock = Ledger(away=not reached_before), Clock()
    key = key_with(requests=60)
    gateways = [gateway_of(ledger, f"g{number}", clock=clock) for number in range(3)]
    if reached_before:
        for quotas in gateways * 2:
            await admit(quotas, key)
            await quotas._keeper._call(list(quotas._keeper._buckets.values()))
    ledger.away = True
    admitted = sum([await spend(quotas, key, clock) for quotas in gateways])
    assert admitted <= (60 if reached_before else 180)
    assert admitted >= 30
    clock.s += 60
    assert sum([await spend(quotas, key, clock) for quotas in gateways]) <= (63 if reached_before else 183)


async def test_closed_rates_refuse_while_the_ledger_is_away() -> None:
    with pytest.raises(UnavailableError):
        await admit(gateway_of(Ledger(away=True), rates="closed"), key_with(requests=60))


async def test_a_budget_that_was_never_read_is_not_spent_without_the_ledger() -> None:
    for ledger in (Ledger(away=True), None):
        with pytest.raises(UnavailableError):
            await admit(gateway_of(ledger, budgets="open-bounded"), key_with(month=1000))


async def test_without_a_ledger_each_gateway_keeps_rates_alone() -> None:
    clock = Clock()
    quotas, key = gateway_of(None, clock=clock), key_with(requests=60)
    assert await spend(quotas, key, clock) == 60
    clock.s += 30
    assert 29 <= await spend(quotas, key, clock) <= 31


# --- over HTTP -----------------------------------------------------------------------------


@asynccontextmanager
async def limited(**quotas: int) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(world())
        runtime = await stack.enter_async_context(FakeRuntime().running())
        here.base()
        here.replica(runtime)
        here.keys.publish(KeyTable.of([key_with(**quotas)]))
        here.gateway._quotas = gateway_of(Ledger())
        yield here


async def test_the_official_client_gets_headers_and_repeats_a_rate_but_no_budget() -> None:
    async with limited(requests=1) as here, here.client() as client:
        ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 6}
        raw = await client.chat.completions.with_raw_response.create(**ask)
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(**ask)
        assert (caught.value.type, caught.value.code) == ("requests", "rate_limit_exceeded")
        assert 0 < int(caught.value.response.headers["retry-after-ms"]) <= 60_000
    async with limited(month=10) as here, here.client() as client:
        repeating = client.with_options(max_retries=3)
        with pytest.raises(openai.RateLimitError) as caught:
            await repeating.chat.completions.create(**ask)
        assert (caught.value.type, caught.value.code) == ("insufficient_quota", "insufficient_quota")
        assert here.sample("requests_total", base="__unknown__", adapter="__unknown__", code="429") == 1


async def test_a_request_settles_with_the_runtimes_count_however_it_ends() -> None:
    async with limited(month=100_000, tokens=100_000) as here:
        await here.post(here.ask("tiny"))
        await here.post(here.ask("tiny", stream=True))
        await here.post(here.ask("tiny", max_tokens="5"))
        await here.post(here.ask("unknown"))
        await until(lambda: here.gateway.in_flight == 0)
        quotas = here.gateway._quotas
        assert quotas is not None
        month, tokens = quotas._keeper._buckets.values()
        counted = sum(
            here.sample("tokens_total", base="demo/tiny", adapter="base", type=kind)
            for kind in ("prompt", "completion")
        )
        assert month.consumed + tokens.consumed == 2 * counted
        assert (month.reserved, tokens.reserved, quotas._open) == (0, 0, set())


async def test_a_request_without_quotas_has_no_headers_and_no_cost() -> None:
    async with limited() as here:
        answer = await here.post(here.ask("tiny"))
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
