"""The usage and costs API with OpenAI's unmodified client, against sums by SQL of the same database."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from ledger_kit import T0_MS, T0_S, sqlite_url
from openai import AsyncOpenAI
from sqlalchemy import Connection, insert, text
from usage_kit import (
    DAY,
    DEFAULT_PRICES,
    HOUR,
    NOW_S,
    fill,
    fill_pods,
    fill_prices,
    organization_api,
    serving,
    some_usage,
)

from lorapool_ledger.api.signing import Signer
from lorapool_ledger.store.database import Database
from lorapool_ledger.store.tables import attempt_closed, attempt_opened, boot, correction, gateway, runtime_request

MONTH = {"start_time": T0_S, "end_time": T0_S + 30 * DAY}


@dataclass
class Api:
    url: str
    database: Database

    def client(self, name: str) -> AsyncOpenAI:
        return AsyncOpenAI(admin_api_key=f"lp-{name}", api_key="unused", base_url=f"{self.url}/v1", max_retries=0)

    async def pages(self, name: str, call: str = "completions", **query: Any) -> list[Any]:
        """The buckets of all pages, as the official client reads them."""
        found: list[Any] = []
        async with self.client(name) as client:
            usage = client.admin.organization.usage
            page = await getattr(usage, call)(**query)
            found += page.data
            while page.has_more:
                page = await getattr(usage, call)(**query, page=page.next_page)
                found += page.data
        return found

    async def get(self, path: str, name: str = "owner") -> tuple[int, dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            answer = await session.get(self.url + path, headers={"Authorization": f"Bearer lp-{name}"})
            return answer.status, await answer.json()

    async def sql(self, query: str) -> list[Any]:
        return await self.database.read(lambda connection: list(connection.execute(text(query))))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def month(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A month of usage that the tests of this file read."""
    sqlite = request.param == "sqlite"
    url = sqlite_url(tmp_path_factory.mktemp("month")) if sqlite else request.getfixturevalue("postgres").database()
    database = Database.open(url)

    def filled(connection: Connection) -> None:
        fill(connection, some_usage())
        fill_pods(connection)
        fill_prices(connection, *DEFAULT_PRICES)

    asyncio.run(database.write(filled))
    yield database
    asyncio.run(database.close())


@pytest.fixture
async def api(month: Database) -> AsyncIterator[Api]:
    async with serving(organization_api(month).handle) as url:
        yield Api(url, month)


def results(buckets: list[Any]) -> list[Any]:
    return [result for bucket in buckets for result in bucket.results]


BILLED = "outcome IN ('completed', 'client_left')"
SUMS = (
    "sum(billed_prompt_tokens + billed_cached_tokens), sum(billed_completion_tokens), sum(billed_cached_tokens), "
    "sum(requests)"
)


def money(found: list[Any]) -> Decimal:
    """The sum of results of costs. The client makes numbers of the decimal texts; `str` gives the text again."""
    return sum((Decimal(str(item.amount.value)) for item in found), Decimal(0))


def counts(found: list[Any]) -> tuple[int, ...]:
    return (
        sum(item.input_tokens for item in found),
        sum(item.output_tokens for item in found),
        sum(item.input_cached_tokens for item in found),
        sum(item.num_model_requests for item in found),
    )


@pytest.mark.parametrize("width", ["1d", "1h"])
async def test_the_pages_of_the_official_client_add_up_to_one_sum_by_sql(api: Api, width: Any) -> None:
    buckets = await api.pages("owner", bucket_width=width, **MONTH, limit=7)
    assert [bucket.start_time for bucket in buckets] == list(
        range(T0_S, T0_S + 30 * DAY, DAY if width == "1d" else HOUR)
    ), "every bucket once, also the empty ones"
    (expected,) = await api.sql(f"SELECT {SUMS} FROM usage_hour WHERE {BILLED}")
    assert counts(results(buckets)) == tuple(expected)


COLUMNS = {"project_id": "project", "api_key_id": "key_uid", "model": "model"}


@pytest.mark.parametrize("names", [c for n in range(4) for c in itertools.combinations(COLUMNS, n)])
async def test_every_grouping_agrees_with_sql_group_by_group(api: Api, names: tuple[str, ...]) -> None:
    buckets = await api.pages("owner", **MONTH, limit=31, group_by=list(names))
    columns = "".join(f", {COLUMNS[name]}" for name in names)
    expected = await api.sql(
        f"SELECT hour_unix_s - hour_unix_s % 86400 AS day{columns}, {SUMS} FROM usage_hour WHERE {BILLED} "
        f"GROUP BY day{columns}"
    )
    found = [
        (bucket.start_time, *(getattr(result, name) for name in names), *counts([result]))
        for bucket in buckets
        for result in bucket.results
    ]
    assert sorted(found) == sorted(tuple(row) for row in expected)
    for result in results(buckets):
        assert all(getattr(result, name) is None for name in COLUMNS if name not in names)


async def test_groups_that_have_one_value_here_are_accepted(api: Api) -> None:
    buckets = await api.pages("owner", **MONTH, group_by=["user_id", "batch", "service_tier", "api_source"])
    first = results(buckets)[0]
    assert (first.user_id, first.batch, first.service_tier, first.api_source) == (None, False, "default", "unlabeled")
    assert results(await api.pages("owner", **MONTH, batch=True)) == []


async def test_two_tenants_never_see_each_other(api: Api) -> None:
    by: Any = ["project_id", "api_key_id", "model"]
    seen = {
        name: results(await api.pages(name, **MONTH, limit=31, group_by=by))
        for name in ("acme", "globex", "acme-tone", "acme-admin", "roaming", "owner")
    }
    assert {item.project_id for item in seen["acme"]} == {"acme"} == {item.project_id for item in seen["acme-admin"]}
    assert {item.project_id for item in seen["globex"]} == {"globex"}
    assert {item.model for item in seen["acme-tone"]} == {"acme/tone"}
    assert {item.api_key_id for item in seen["roaming"]} == {"uid-roaming"}
    assert len(seen["acme"]) + len(seen["globex"]) == len(seen["owner"])


@pytest.mark.parametrize("call", ["completions", "costs"])
async def test_another_tenants_project_looks_like_one_that_does_not_exist(api: Api, call: str) -> None:
    foreign = await api.pages("acme", call, **MONTH, project_ids=["globex"])
    unknown = await api.pages("acme", call, **MONTH, project_ids=["no-such-project"])
    assert [item.to_dict() for item in foreign] == [item.to_dict() for item in unknown]
    assert results(foreign) == []
    assert results(await api.pages("acme", call, **MONTH, project_ids=["acme"])) != []


async def test_filters_agree_with_sql(api: Api) -> None:
    found = await api.pages(
        "owner", **MONTH, api_key_ids=["uid-acme", "uid-globex"], models=["acme/tone", "globex/law"]
    )
    (expected,) = await api.sql(
        f"SELECT {SUMS} FROM usage_day WHERE {BILLED} AND key_uid IN ('uid-acme', 'uid-globex') "
        "AND model IN ('acme/tone', 'globex/law')"
    )
    assert counts(results(found)) == tuple(expected)


async def test_plain_and_bracketed_lists_mean_the_same(api: Api) -> None:
    path = f"/v1/organization/usage/completions?start_time={T0_S}&end_time={T0_S + DAY}"
    plain = await api.get(f"{path}&group_by=model&group_by=project_id&models=acme/tone")
    brackets = await api.get(f"{path}&group_by[]=model&group_by[]=project_id&models[]=acme/tone")
    assert plain == brackets
    assert plain[0] == 200
    assert plain[1]["data"][0]["results"]


# --- costs


def priced(row: Any) -> Decimal:
    """The price of one hour's row by DEFAULT_PRICES, written down again."""
    changed = row.hour_unix_s >= T0_S + 10 * DAY
    prompt = Decimal("0.10") if row.model == "acme/short" else Decimal("0.40") if changed else Decimal("0.50")
    completion = Decimal("3") if row.project == "globex" else Decimal("1.50")
    tokens = row.billed_prompt_tokens * prompt + row.billed_cached_tokens * Decimal("0.05")
    return (tokens + row.billed_completion_tokens * completion) / 1_000_000 + row.requests * Decimal("0.0001")


RESIDENCY = Decimal("0.002") * 24 * 30
"""Of one adapter of 1 GiB that is resident all month."""


async def test_costs_are_tokens_times_the_price_of_their_hour_plus_residency(api: Api) -> None:
    rows = await api.sql(f"SELECT * FROM usage_hour WHERE {BILLED}")
    for name, projects in (("owner", ("acme", "globex")), ("acme", ("acme",))):
        found = results(await api.pages(name, "costs", **MONTH, group_by=["project_id"]))
        for project in projects:
            expected = sum((priced(row) for row in rows if row.project == project), Decimal(0)) + RESIDENCY
            assert money([item for item in found if item.project_id == project]) == expected
        assert {item.project_id for item in found} == set(projects)


@pytest.mark.parametrize(
    "by", [["project_id"], ["api_key_id"], ["line_item"], ["project_id", "api_key_id", "line_item"]]
)
async def test_every_grouping_of_costs_has_the_same_total(api: Api, by: Any) -> None:
    total = results(await api.pages("owner", "costs", **MONTH))
    grouped = results(await api.pages("owner", "costs", **MONTH, limit=3, group_by=by))
    assert len(grouped) > len(total)
    assert money(grouped) == money(total)


async def test_line_items_name_the_model_what_was_counted_and_its_unit(api: Api) -> None:
    found = results(await api.pages("acme", "costs", **MONTH, limit=31, group_by=["line_item"]))
    assert {item.line_item for item in found} == {
        *(f"acme/{name}, {item}" for name in ("tone", "short") for item in ("input_tokens", "cached_input_tokens")),
        *(f"acme/{name}, {item}" for name in ("tone", "short") for item in ("output_tokens", "requests")),
        "acme/tone, residency",
    }
    residency = [item for item in found if item.line_item == "acme/tone, residency"]
    assert {(item.quantity, item.quantity_unit, item.amount.value) for item in residency} == {
        (24, "gibibyte_hours", 0.048)
    }
    wanted = ["acme/tone, residency", "acme/tone, output_tokens", "globex/law, residency"]
    some = results(await api.pages("acme", "costs", **MONTH, limit=31, line_items=wanted))
    assert money(some) == money([item for item in found if item.line_item in wanted])


async def test_a_correction_appears_on_the_day_on_which_it_was_recorded(database: Database) -> None:
    row = {
        "correction_id": "c1", "recorded_unix_s": T0_S + 5 * DAY + 3, "concerns_unix_s": T0_S, "project": "acme",
        "key_uid": "", "model": "acme/tone", "amount": "-1.25", "currency": "USD", "reason": "outage", "author": "ops",
        "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0,
    }  # fmt: skip
    await database.write(lambda connection: connection.execute(insert(correction), [row]))
    async with serving(organization_api(database).handle) as url:
        api = Api(url, database)
        for name, expected in (("acme", Decimal("-1.25")), ("globex", Decimal(0))):
            buckets = await api.pages(name, "costs", start_time=T0_S + 4 * DAY, end_time=T0_S + 7 * DAY)
            assert [money(bucket.results) for bucket in buckets] == [0, expected, 0]


# --- minutes, which come from the facts


async def test_minutes_join_the_halves_as_the_sums_do(database: Database) -> None:
    def facts(connection: Connection) -> None:
        connection.execute(
            insert(boot).values(
                id=1, boot_id="b", pod_uid="p", pod="p", base_uid="u", base="models/llama", started_unix_ms=0,
                seen_unix_ms=0, cursor_seq=9, end="", profile="", device="", slots=0, slot_bytes=0, device_bytes=0,
            )
        )  # fmt: skip
        connection.execute(
            insert(gateway).values(id=1, boot_id="g", gateway="g", seen_unix_ms=0, cursor_seq=9, ended=False)
        )
        runtime = {
            "boot": 1, "request_id": "", "key_uid": "uid-acme", "project": "acme", "uid": "a", "digest": "d",
            "model": "acme/tone", "started_unix_ms": 0, "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 5,
            "gpu_ns": 1, "requests": 1, "sequences": 1,
        }  # fmt: skip
        for seq, (attempt, outcome, second) in enumerate(
            [("one", "completed", 10), ("two", "cancelled", 70), ("three", "failed", 75), ("four", "completed", 80)], 1
        ):
            connection.execute(
                insert(runtime_request).values(
                    **runtime,
                    seq=seq,
                    first_seq=seq,
                    attempt=attempt,
                    outcome=outcome,
                    ended_unix_ms=T0_MS + second * 1000,
                )
            )
        opened = {
            "gateway": 1, "request_id": "", "key_uid": "uid-acme", "key": "acme", "owner": "", "project": "acme",
            "model": "acme/tone", "uid": "a", "digest": "d", "base_uid": "u", "base": "models/llama", "pod_uid": "p",
            "boot_id": "b", "route": "/v1/completions", "stream": False, "opened_unix_ms": T0_MS,
        }  # fmt: skip
        for seq, (attempt, outcome) in enumerate(
            [("four", "withheld"), ("five", "client_left"), ("six", "refused")], 1
        ):
            connection.execute(insert(attempt_opened).values(**opened, seq=seq, attempt=attempt))
            connection.execute(
                insert(attempt_closed).values(
                    gateway=1, seq=seq + 10, attempt=attempt, outcome=outcome, code=200,
                    prompt_tokens=7, cached_tokens=0, completion_tokens=3, closed_unix_ms=T0_MS + 130_000,
                )
            )  # fmt: skip

    await database.write(facts)
    async with serving(organization_api(database).handle) as url:
        api = Api(url, database)
        found = await api.pages("acme", start_time=T0_S, end_time=T0_S + 180, bucket_width="1m", limit=2)
    assert [[counts([result]) for result in bucket.results] for bucket in found] == [
        [(10, 5, 4, 1)],
        [(10, 5, 4, 1)],  # the cancelled one; neither the failed nor the withheld one
        [(7, 3, 0, 1)],  # the gateway's half alone
    ]


# --- bad input


BAD = {
    "start_time is missing": "",
    "end before start": f"start_time={T0_S}&end_time={T0_S - 1}",
    "end equals start": f"start_time={T0_S}&end_time={T0_S}",
    "year 9999": f"start_time={T0_S}&end_time=253402214400",
    "milliseconds": f"start_time={T0_S}000",
    "words": "start_time=yesterday",
    "negative": "start_time=-1",
    "in the future": f"start_time={NOW_S + 5 * DAY}",
    "limit 0": f"start_time={T0_S}&limit=0",
    "limit 10^9": f"start_time={T0_S}&limit=1000000000",
    "limit above the maximum of hours": f"start_time={T0_S}&bucket_width=1h&limit=169",
    "a width that there is not": f"start_time={T0_S}&bucket_width=1w",
    "a group that there is not": f"start_time={T0_S}&group_by=colour",
    "a parameter that there is not": f"start_time={T0_S}&project_id=acme",
    "twice": f"start_time={T0_S}&start_time={T0_S}",
    "users": f"start_time={T0_S}&user_ids=me",
    "a made-up cursor": f"start_time={T0_S}&page=abc.def",
    "an empty cursor": f"start_time={T0_S}&page=",
    "too many values": f"start_time={T0_S}" + "&models=m" * 101,
    "not UTF-8": f"start_time={T0_S}&page=%ff%fe",
}


@pytest.mark.parametrize("query", BAD.values(), ids=BAD)
async def test_bad_input_is_a_400_in_openais_form_that_names_the_parameter(api: Api, query: str) -> None:
    status, body = await api.get(f"/v1/organization/usage/completions?{query}")
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"]
    assert len(body["error"]["message"]) > 20


async def test_a_cursor_serves_its_own_call_of_its_own_key_alone(api: Api) -> None:
    path = f"/v1/organization/usage/completions?start_time={T0_S}&end_time={T0_S + 9 * DAY}&limit=2"
    cursor = (await api.get(path, "acme"))[1]["next_page"]
    assert (await api.get(f"{path}&page={cursor}", "acme"))[0] == 200
    assert (await api.get(f"{path.replace('limit=2', 'limit=5')}&page={cursor}", "acme"))[0] == 200
    half = len(cursor) // 2
    edited = cursor[:half] + ("A" if cursor[half] != "A" else "B") + cursor[half + 1 :]
    for other, name in (
        (f"{path}&page={cursor}", "globex"),
        (f"{path}&page={cursor}&group_by=model", "acme"),
        (f"{path.replace('usage/completions', 'costs')}&page={cursor}", "acme"),
        (f"{path}&page={edited}", "acme"),
        (f"{path}&page={Signer('page', lambda: ('u' * 40,)).sign({'next': 0, 'end': 9})}", "acme"),
    ):
        status, body = await api.get(other, name)
        assert (status, body["error"]["param"]) == (400, "page")


async def test_pages_that_are_read_later_are_of_the_same_period(database: Database) -> None:
    now = [float(NOW_S)]
    app = organization_api(database)
    app._now_unix_s = lambda: now[0]
    async with serving(app.handle) as url:
        api = Api(url, database)
        path = f"/v1/organization/usage/completions?start_time={T0_S}&limit=31"
        first = (await api.get(path))[1]
        assert not first["has_more"]
        path = path.replace("limit=31", "limit=20")
        first = (await api.get(path))[1]
        now[0] += 40 * DAY
        second = (await api.get(f"{path}&page={first['next_page']}"))[1]
    assert len(first["data"]) + len(second["data"]) == 31
    assert not second["has_more"]


async def test_errors_of_keys_paths_and_methods_have_openais_form(api: Api) -> None:
    path = f"/v1/organization/usage/completions?start_time={T0_S}"
    assert (await api.get(path, "unknown"))[0] == 401
    assert (await api.get("/v1/organization/usage/images"))[0] == 404
    async with aiohttp.ClientSession() as session:
        assert (await session.post(api.url + path, headers={"Authorization": "Bearer lp-owner"})).status == 405
        assert (await session.get(api.url + path)).status == 401


async def test_a_database_that_is_away_is_a_503_that_may_be_repeated(database: Database) -> None:
    from lorapool_ledger.store.database import DatabaseAwayError

    class Away:
        async def read(self, work: Any) -> Any:
            raise DatabaseAwayError("gone")

    away: Any = Away()
    async with serving(organization_api(away).handle) as url, aiohttp.ClientSession() as session:
        path = f"{url}/v1/organization/costs?start_time={T0_S}"
        answer = await session.get(path, headers={"Authorization": "Bearer lp-owner"})
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        assert (await answer.json())["error"]["code"] == "database_away"
