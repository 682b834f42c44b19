"""Quotas and usage through gateways: the ledger's endpoint on both databases, and all parts as real processes."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import hashlib
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from fakes import FakeRuntime
from gateway_process import GatewayProcess
from gateway_world import KEY, FakeKube, base_object
from ledger_kit import T0_S, sqlite_url, until
from ledger_process import RUNTIME_MASTER, TOKEN, LedgerProcess
from pods import owner_objects, pod_object
from sqlalchemy import insert, select

from lorapool_api.protocol import runtime_token
from lorapool_api.quota_protocol import (
    BILLIONTHS,
    ROUTE_LEASES,
    LeaseAnswer,
    LeaseAsk,
    LeaseCall,
    Meter,
    PricedModel,
    TokenPrice,
)
from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_ledger.billing.prices import parse_prices
from lorapool_ledger.intake.price_list import record_prices
from lorapool_ledger.metrics import MOST_QUOTAS, Metrics
from lorapool_ledger.quotas.leases import Leases
from lorapool_ledger.store import tables
from lorapool_ledger.store.database import Database

BASE_UID = "base-demo-tiny"
DAY_S = 86_400


def ask(**given: Any) -> LeaseAsk:
    fields = {"scope": "key/k", "meter": Meter.TOKENS_PER_MONTH, "limit": 1000, "need": 100, "waiting": 100}
    return LeaseAsk(**{**fields, "want": 100, **given})


def call(*asks: LeaseAsk, boot_id: str = "g") -> LeaseCall:
    return LeaseCall(boot_id=boot_id, gateway="gateway", asks=list(asks))


async def used(database: Database, hour_s: int, tokens: int, **given: str) -> None:
    """Adds to the sums of an hour."""
    row = {
        "hour_unix_s": hour_s, "project": "p", "key_uid": "k", "base": "b/b", "uid": "", "model": "b/b",
        "outcome": "completed", "requests": 1, "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": tokens,
        "gpu_ns": 0, "billed_prompt_tokens": 0, "billed_cached_tokens": 0, "billed_completion_tokens": tokens,
        "delivered_tokens": tokens, **given,
    }  # fmt: skip
    await database.write(lambda connection: connection.execute(insert(tables.usage_hour), row))


async def test_a_budget_counts_the_sums_of_the_month_of_its_scope_alone(database: Database) -> None:
    await used(database, T0_S - 3600, 500)
    await used(database, T0_S, 300)
    await used(database, T0_S + DAY_S, 200)
    await used(database, T0_S, 5000, key_uid="other", project="p2", model="p2/x")
    leases = Leases(database, MasterTokens([TOKEN]), now_s=lambda: T0_S + 2 * DAY_S)
    asks = [ask(scope=scope, limit=10_000) for scope in ("key/k", "project/p", "model/b/b", "model/p2/x", "key/new")]
    answer = await leases.lease(call(*asks))
    assert [lease.used for lease in answer.leases] == [500, 500, 500, 5000, 0]
    assert answer.leases[0].reset_ms == 28 * DAY_S * 1000


PRICES = """
prices:
  - effectiveFrom: 2026-01-01
    scope: "*"
    currency: EUR
    promptPerMillion: 2
    cachedPerMillion: 0.5
    completionPerMillion: 8
  - {effectiveFrom: 2026-11-02, scope: "*", currency: EUR, completionPerMillion: 10}
  - {effectiveFrom: 2026-01-01, scope: p2/, currency: EUR, requestEach: 0.25}
"""


async def used_on(database: Database, day_s: int, **given: Any) -> None:
    """Adds to the sums of a day."""
    row = {
        "day_unix_s": day_s, "project": "p", "base": "b/b", "uid": "", "model": "b/b", "outcome": "completed",
        "requests": 4, "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "gpu_ns": 0,
        "billed_prompt_tokens": 1000, "billed_cached_tokens": 2000, "billed_completion_tokens": 3000,
        "delivered_tokens": 0, **given,
    }  # fmt: skip
    await database.write(lambda connection: connection.execute(insert(tables.usage_day), {"key_uid": "k", **row}))
    row.pop("key_uid", None)
    await database.write(lambda connection: connection.execute(insert(tables.model_day), row))


async def test_a_budget_of_money_counts_the_charges_of_the_month_of_its_scope_alone(database: Database) -> None:
    await database.write(lambda connection: record_prices(connection, parse_prices(PRICES), T0_S + 2 * DAY_S))
    await used_on(database, T0_S - DAY_S, billed_prompt_tokens=10**9)
    await used_on(database, T0_S)
    await used_on(database, T0_S + DAY_S)
    await used_on(database, T0_S, project="p2", model="p2/x", key_uid="other")
    await used_on(database, T0_S, outcome="failed")
    leases = Leases(database, MasterTokens([TOKEN]), now_s=lambda: T0_S + 2 * DAY_S)
    scopes = ("key/k", "project/p", "model/b/b", "project/p2", "model/p2/x", "key/other", "key/new")
    money = Meter.MONEY_PER_MONTH
    asked = call(*(ask(scope=scope, meter=money, limit=100 * BILLIONTHS) for scope in scopes))
    priced = [PricedModel(project=project, model=f"{project}/x", base="b/b") for project in ("p", "p2")]
    answer = await leases.lease(asked.model_copy(update={"priced": priced}))
    first, second = 2000 + 1000 + 24_000, 2000 + 1000 + 30_000
    of_p, of_p2 = (first + second) * 1000, first * 1000 + BILLIONTHS
    assert [lease.used for lease in answer.leases] == [of_p, of_p, of_p, of_p2, of_p2, of_p2, 0]
    assert answer.currency == leases.currency == "EUR"
    assert answer.prices[0] == TokenPrice(prompt=2, cached="0.5", completion=10, request=0)
    assert answer.prices[1] is not None
    assert answer.prices[1].request == answer.prices[1].cost(0, 0, 0) / 10**9 == 0.25
    assert ("key/k", money, 100 * BILLIONTHS, of_p) in leases.uses()


async def test_a_model_has_a_price_if_its_requests_do_or_both_prompts_and_completions(database: Database) -> None:
    lists = {"a": "promptPerMillion: 1", "b": "requestEach: 1", "c": "promptPerMillion: 0, completionPerMillion: 0"}
    entries = [
        f"  - {{effectiveFrom: 2026-01-01, scope: {name}/, currency: EUR, {text}}}" for name, text in lists.items()
    ]
    models = [PricedModel(project=name, model=f"{name}/x", base="b/b") for name in "abcd"]
    leases = Leases(database, MasterTokens([TOKEN]), now_s=lambda: T0_S)
    none = await leases.lease(call().model_copy(update={"priced": models}))
    assert (none.prices, none.currency) == ([None] * 4, "")
    listed = parse_prices("prices:\n" + "\n".join(entries))
    await database.write(lambda connection: record_prices(connection, listed, T0_S))
    later = Leases(database, MasterTokens([TOKEN]), now_s=lambda: T0_S)
    answer = await later.lease(call().model_copy(update={"priced": models}))
    assert [price is not None for price in answer.prices] == [False, True, True, False]


def test_the_fullest_quotas_have_a_series_and_no_others() -> None:
    metrics = Metrics()
    uses = [(f"key/{number}", Meter.TOKENS_PER_MONTH, 1000, number) for number in range(300)]
    metrics.follow_quotas(lambda: [*uses, ("project/p", Meter.MONEY_PER_MONTH, 200, 190)])
    name = "lorapool_ledger_quota_used_ratio"
    found = {
        (sample.labels["scope"], sample.labels["meter"]): sample.value
        for family in metrics.registry.collect()
        if family.name == name
        for sample in family.samples
    }
    assert len(found) == MOST_QUOTAS + 1
    assert found["key/299", "month_tokens"] == 0.299
    assert found["project/p", "month_money"] == 0.95
    assert ("key/279", "month_tokens") not in found


async def test_what_gateways_held_is_noted_and_the_next_process_waits_for_them(database: Database) -> None:
    clock = [float(T0_S + DAY_S)]
    first = Leases(database, MasterTokens([TOKEN]), now_s=lambda: clock[0])
    running = asyncio.create_task(first.run())
    answer = await first.lease(call(ask(need=400, waiting=400, want=400)))
    assert answer.leases[0].granted == 400
    async with asyncio.timeout(20):
        while not await database.read(lambda connection: connection.execute(select(tables.reservation)).all()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    clock[0] += 5
    second = Leases(database, MasterTokens([TOKEN]), now_s=lambda: clock[0])
    assert (await second.lease(call(ask(), boot_id="other"))).leases[0].granted == 0  # g may have used more meanwhile
    await second.lease(call(ask(need=1, waiting=0, want=0, consumed=400, held=0)))
    clock[0] += 4
    await second.lease(call(ask(need=1, waiting=0, want=0, consumed=400, held=0)))
    lease = (await second.lease(call(ask(need=600, waiting=600, want=600), boot_id="other"))).leases[0]
    assert (lease.granted, lease.free) == (600, 0)


async def test_a_replica_that_does_not_lease_shows_the_quotas_of_the_one_that_does(database: Database) -> None:
    clock = [float(T0_S + DAY_S)]
    leads = Leases(database, MasterTokens([TOKEN]), now_s=lambda: clock[0])
    follows = Leases(database, MasterTokens([TOKEN]), lambda: False, now_s=lambda: clock[0])
    await database.write(lambda connection: record_prices(connection, parse_prices(PRICES), T0_S))
    assert await follows.uses_anywhere() == []
    assert (follows.currency, follows.uses()) == ("EUR", [])

    async def report(consumed: int) -> None:
        given = {"need": 0, "waiting": 0, "want": 0, "consumed": consumed}
        await leads.lease(call(ask(**given), ask(meter=Meter.TOKENS_PER_MINUTE, limit=600, **given)))

    async def shown(budget: int, rate: int) -> None:
        expected = {("month_tokens", 1000, budget), ("tokens", 600, rate)}

        async def true() -> bool:
            found = await follows.uses_anywhere()
            return {(meter.value, limit, used) for _, meter, limit, used in found} == expected

        await until(true)
        assert sorted(await follows.uses_anywhere()) == sorted(await leads.uses_anywhere())

    running = asyncio.create_task(leads.run())
    try:
        await report(0)
        await report(300)
        await shown(300, 300)
        clock[0] += 15
        await shown(300, 150)
        await report(400)
        await shown(400, 250)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    clock[0] = T0_S + 40 * DAY_S
    assert {meter for _, meter, _, _ in await follows.uses_anywhere()} == {Meter.TOKENS_PER_MINUTE}


@contextlib.asynccontextmanager
async def served(leases: Leases) -> AsyncIterator[str]:
    app = web.Application()
    leases.add_routes(app)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}{ROUTE_LEASES}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("limit", [0, -1, 2**53, 2**63, 1.5, "many", None])
async def test_bad_calls_and_callers_change_nothing(tmp_path: Path, limit: Any) -> None:
    database = Database.open(sqlite_url(tmp_path))
    leads = [True]
    leases = Leases(database, MasterTokens([TOKEN]), lambda: leads[0])
    good = call(ask()).model_dump(by_alias=True, mode="json")
    authorized = {"Authorization": f"Bearer {TOKEN}"}
    async with served(leases) as url, aiohttp.ClientSession() as http:

        async def status(body: Any, headers: dict[str, str]) -> int:
            async with http.post(url, json=body, headers=headers) as response:
                await response.read()
                return response.status

        bad = {**good, "asks": [{**good["asks"][0], "limit": limit}]}
        assert await status(bad, authorized) == 400
        assert await status(good, {"Authorization": f"Bearer {KEY}"}) == 401
        leads[0] = False
        assert await status(good, authorized) == 503
        leads[0] = True
        async with http.post(url, json=good, headers=authorized) as response:
            assert LeaseAnswer.model_validate_json(await response.read()).leases[0].granted == 100
    await database.close()


# --- real processes ------------------------------------------------------------------------

PROMPT, ANSWER, GATEWAYS = "a b c d", 6, 3
TOKENS_OF_ONE = 4 + ANSWER
BUDGET = 50 * TOKENS_OF_ONE


IN_TOKENS = {"tokensPerMonth": str(BUDGET)}
IN_MONEY = {"moneyPerMonth": f"{BUDGET}.00 EUR"}
"""At 1 EUR per token."""
PRICE_OF_TOKENS = """
prices:
  - {effectiveFrom: 2026-01-01, scope: "*", currency: EUR, promptPerMillion: 1000000, completionPerMillion: 1000000}
"""


def key_secret(budget: dict[str, str]) -> dict[str, Any]:
    data = {"keySha256": hashlib.sha256(KEY.encode()).hexdigest(), "namespaces": "*", **budget}
    data["admin"] = "true"
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}
    metadata = {"name": "key", "namespace": "lorapool", "uid": "uid-key", "labels": {"lorapool.dev/api-key": "true"}}
    return {"metadata": metadata, "data": encoded}


@contextlib.asynccontextmanager
async def release(
    folder: Path, budget: dict[str, str] = IN_TOKENS, **settings: str
) -> AsyncIterator[tuple[LedgerProcess, list[GatewayProcess], FakeRuntime]]:
    """A ledger, three gateways and a runtime that counts what it computes."""
    runtime = FakeRuntime(token=runtime_token(RUNTIME_MASTER, BASE_UID), pod_uid="uid-pod-1", words=ANSWER)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(runtime.running())
        kube = await stack.enter_async_context(FakeKube().running())
        kube.put("basemodels", base_object())
        deployment, replica_set = owner_objects()
        kube.put("deployments", deployment)
        kube.put("replicasets", replica_set)
        kube.put("pods", pod_object(runtime.port))
        kube.put("secrets", key_secret(budget))
        kubeconfig = kube.kubeconfig(folder)
        (folder / "prices.yaml").write_text(PRICE_OF_TOKENS)
        ledger = LedgerProcess(folder, sqlite_url(folder), kubeconfig, {"LORAPOOL_LEDGER_BILL_DIR": str(folder)})
        await asyncio.to_thread(ledger.start)
        stack.callback(ledger.stop, signal.SIGKILL)
        gateways = [
            GatewayProcess(
                folder / f"gateway-{number}", kubeconfig, RUNTIME_MASTER,
                {"LORAPOOL_GATEWAY_LEDGER_URL": ledger.url,
                 "LORAPOOL_GATEWAY_LEDGER_TOKEN_FILE": str(folder / "ledger-token"), **settings},
            )
            for number in range(GATEWAYS)
        ]  # fmt: skip
        for gateway in gateways:
            stack.push_async_callback(gateway.stop, signal.SIGKILL)
        await asyncio.gather(*(gateway.start() for gateway in gateways))
        yield ledger, gateways, runtime


class Clients:
    """Count what they ask and get."""

    def __init__(self, gateways: list[GatewayProcess], http: aiohttp.ClientSession) -> None:
        self._gateways = gateways
        self._http = http
        self.answers: collections.Counter[str] = collections.Counter()

    async def ask(self, number: int) -> str:
        body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": ANSWER}
        url = f"{self._gateways[number % GATEWAYS].url}/v1/chat/completions"
        async with self._http.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"}) as response:
            answer = await response.json()
        outcome = "answered" if response.status == 200 else str(answer["error"]["code"])
        self.answers[outcome] += 1
        return outcome

    async def ask_at_once(self, requests: int) -> collections.Counter[str]:
        return collections.Counter(await asyncio.gather(*(self.ask(number) for number in range(requests))))

    async def ask_until(self, code: str, *, most_s: float = 60.0) -> None:
        """Asks at each gateway again and again until each answers with this code."""
        async with asyncio.timeout(most_s):
            while {await self.ask(number) for number in range(GATEWAYS)} != {code}:  # noqa: ASYNC110
                await asyncio.sleep(0.1)


def computed(runtime: FakeRuntime) -> int:
    """Tokens as the runtime counted them."""
    return sum(4 + seen.completion_tokens for seen in runtime.seen if seen.completion_tokens)


@pytest.mark.parametrize("budget", [IN_TOKENS, IN_MONEY], ids=["tokens", "money"])
async def test_three_gateways_and_five_hundred_requests_at_once_spend_a_budget_for_fifty(
    tmp_path: Path, budget: dict[str, str]
) -> None:
    async with release(tmp_path, budget) as (_, gateways, runtime), aiohttp.ClientSession() as http:
        clients = Clients(gateways, http)
        if budget is IN_MONEY:  # the ledger reads its price list
            await clients.ask_until("answered")
            clients.answers.pop("price_missing", None)
        at_once = await clients.ask_at_once(500)
        assert at_once["answered"] <= 50
        assert set(at_once) <= {"answered", "rate_limit_exceeded", "insufficient_quota"}
        await clients.ask_until("insufficient_quota")
        assert clients.answers["answered"] * TOKENS_OF_ONE == computed(runtime)
        # A request reserves more than it uses, so the last ones of the budget are not permitted, and none beyond it.
        assert BUDGET - 5 * TOKENS_OF_ONE <= computed(runtime) <= BUDGET


@pytest.mark.parametrize("mode", ["open-bounded", "closed"])
async def test_a_killed_ledger_lets_a_budget_be_exceeded_by_no_more_than_the_leases(tmp_path: Path, mode: str) -> None:
    settings = {"LORAPOOL_GATEWAY_QUOTA_BUDGETS_WHEN_AWAY": mode, "LORAPOOL_GATEWAY_QUOTA_GRACE_S": "2"}
    async with release(tmp_path, **settings) as (ledger, gateways, runtime), aiohttp.ClientSession() as http:
        clients = Clients(gateways, http)
        await clients.ask_at_once(9)
        await asyncio.sleep(2.5)  # each gateway has called since, so that no lease but of a last second is left
        ledger.stop(signal.SIGKILL)
        at_once = await clients.ask_at_once(500)
        assert at_once["answered"] > 0
        assert computed(runtime) <= BUDGET
        await asyncio.sleep(3)
        before = computed(runtime)
        after_grace = await clients.ask_at_once(30)
        assert set(after_grace) <= {"answered", "quota_unavailable", "insufficient_quota", "rate_limit_exceeded"}
        if mode == "closed":
            assert set(after_grace) == {"quota_unavailable"}
            assert computed(runtime) == before
        await asyncio.to_thread(ledger.start)
        await clients.ask_until("insufficient_quota", most_s=150)
        # Nothing beyond the budget, and after the restart nothing is missing that was not spent.
        assert BUDGET - 5 * TOKENS_OF_ONE <= computed(runtime) <= BUDGET


async def usage(gateway: GatewayProcess) -> tuple[int, int]:
    """Requests and tokens of today, as the official client reads them through the gateway."""
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key=KEY, admin_api_key=KEY, max_retries=5
    ) as client:
        start = int(time.time()) // DAY_S * DAY_S
        page = await client.admin.organization.usage.completions(start_time=start, bucket_width="1d", limit=2)
    results = [result for bucket in page.data for result in bucket.results]
    requests = sum(getattr(result, "num_model_requests", 0) for result in results)
    return requests, sum(getattr(item, "input_tokens", 0) + getattr(item, "output_tokens", 0) for item in results)


async def test_what_gateways_wrote_before_they_and_the_ledger_were_killed_is_read_by_the_official_client(
    tmp_path: Path,
) -> None:
    async with release(tmp_path) as (ledger, gateways, runtime), aiohttp.ClientSession() as http:
        clients = Clients(gateways, http)
        await clients.ask_at_once(9)
        ledger.stop(signal.SIGKILL)
        await clients.ask_at_once(9)
        assert clients.answers == {"answered": 18}
        for gateway in gateways[:2]:
            await gateway.stop(signal.SIGKILL)
        await asyncio.to_thread(ledger.start)
        await asyncio.gather(*(gateway.start() for gateway in gateways[:2]))
        expected = (18, computed(runtime))
        async with asyncio.timeout(90):
            while (found := await usage(gateways[0])) != expected:
                assert found <= expected
                await asyncio.sleep(0.5)
