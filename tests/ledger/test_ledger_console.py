"""The console over HTTP: who sees what, login and its limits, headers, hostile names, exports."""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from fakes import digest_of
from gateway_world import adapter_object, base_object
from ledger_kit import T0_S, sqlite_url
from usage_kit import (
    DAY,
    HOSTILE,
    NOW_S,
    RIGHT_TO_LEFT,
    SECRETS,
    SomeLive,
    console,
    fill_all,
    fill_finding,
    live_keys,
    serving,
    serving_all,
)

from lorapool_api.quota_protocol import Meter
from lorapool_gateway.routing.auth import KeyTable
from lorapool_gateway.routing.live_tables import LiveKeys, LiveRoutes
from lorapool_gateway.routing.objects import AdapterRoute, Endpoint, RuntimeState, adapter_route, base_route
from lorapool_gateway.routing.routes import RouteTable, RuntimeReplica
from lorapool_ledger.console.live import AdapterNow, LimitNow
from lorapool_ledger.console.live_objects import LiveObjects, job_now
from lorapool_ledger.console.render import amount_text, duration, visible
from lorapool_ledger.console.session import COOKIE, MAX_FAILURES
from lorapool_ledger.console.tables import guarded
from lorapool_ledger.reports.invoices import invoice_csv, invoice_html
from lorapool_ledger.reports.scope import Scope, scope_of
from lorapool_ledger.store.database import Database
from lorapool_ledger.sums.invoices import invoice_of

MONTH = "period=2026-11"


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database.open(sqlite_url(tmp_path_factory.mktemp("console")))
    asyncio.run(database.write(fill_all))
    yield database
    asyncio.run(database.close())


@pytest.fixture
async def url(month: Database) -> AsyncIterator[str]:
    async with serving_all(month, live=SomeLive()) as served:
        yield served


class Browser:
    """A client that keeps cookies and does not follow redirects."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))

    async def __aenter__(self) -> Browser:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def get(self, path: str) -> tuple[int, str]:
        answer = await self.session.get(f"{self.url}/console/{path}", allow_redirects=False)
        return answer.status, await answer.text()

    async def post(self, path: str, headers: dict[str, str] | None = None, **form: str) -> aiohttp.ClientResponse:
        return await self.session.post(f"{self.url}/console/{path}", data=form, headers=headers, allow_redirects=False)

    async def log_in(self, name: str) -> Browser:
        assert (await self.post("login", key=f"lp-{name}")).status == 303
        return self


def numbers(page: str) -> set[str]:
    """The exact values of the numbers that a page shows."""
    return set(re.findall(r'<data value="([^"]*)"', page))


OWNER_PAGES = [
    *("", "bases", "adapters", "adapter/acme/tone", "tenants", "project/acme", "bill", "bill/acme", "reconciliation"),
    *("failures", "quotas", "jobs", "requests", "requests?id=req-0001", "prices", "export"),
]
TENANT_PAGES = [
    *(
        "",
        "adapters",
        "adapter/acme/tone",
        "project/acme",
        "bill",
        "failures",
        "quotas",
        "jobs",
        "requests?id=req-0001",
    ),
    *("prices", "export"),
]


async def test_every_page_of_owner_and_tenant_is_served_and_none_without_a_login(url: str) -> None:
    async with Browser(url) as stranger, Browser(url) as owner, Browser(url) as tenant:
        await owner.log_in("owner")
        await tenant.log_in("acme")
        for path in OWNER_PAGES:
            mark = "&" if "?" in path else "?"
            assert (await owner.get(f"{path}{mark}{MONTH}"))[0] == 200, path
            status, page = await stranger.get(path)
            assert (status, page) == (303, ""), path
        for path in TENANT_PAGES:
            mark = "&" if "?" in path else "?"
            assert (await tenant.get(f"{path}{mark}{MONTH}"))[0] == 200, path


async def test_a_tenant_never_sees_idle_time_pods_costs_or_other_tenants(url: str) -> None:
    async with Browser(url) as tenant:
        await tenant.log_in("acme")
        for path in (*TENANT_PAGES, "usage.csv", "costs.csv", "requests?id=req-0004", "adapters?q=law", "prices"):
            mark = "&" if "?" in path else "?"
            _, page = await tenant.get(f"{path}{mark}{MONTH}")
            for secret in ("globex", "llama-0", "Idle", "idle", "Margin", "gateway-7c9f"):
                assert secret not in page.replace("?id=req-0004", ""), (path, secret)
        for path in ("bases", "tenants", "reconciliation", "project/globex", "bill/globex", "adapter/globex/law"):
            status, page = await tenant.get(path)
            unknown = (await tenant.get(path.replace("globex", "no-such")))[1].replace("no-such", "globex")
            assert (status, page) == (404, unknown), path


async def test_what_is_shown_is_what_the_api_and_the_export_have(url: str) -> None:
    for name in ("owner", "acme"):
        async with Browser(url) as browser:
            await browser.log_in(name)
            page = (await browser.get(f"?{MONTH}"))[1]
            usage = list(csv.DictReader(io.StringIO((await browser.get(f"usage.csv?{MONTH}"))[1])))
            costs = list(csv.DictReader(io.StringIO((await browser.get(f"costs.csv?{MONTH}"))[1])))
            query = f"start_time={T0_S}&end_time={T0_S + 30 * DAY}&limit=31"
            headers = {"Authorization": f"Bearer lp-{name}"}

            async def results(path: str, query: str = query, headers: Any = headers) -> list[Any]:
                async with aiohttp.ClientSession(headers=headers) as session:
                    answer = await (await session.get(f"{url}/v1/organization/{path}?{query}")).json()
                return [result for bucket in answer["data"] for result in bucket["results"]]

            of_usage, of_costs = await results("usage/completions"), await results("costs")
        money = sum(Decimal(row["amount"]) for row in costs)
        assert money == sum(Decimal(item["amount"]["value"]) for item in of_costs)
        assert str(money.normalize()) in numbers(page)
        for column, field in (
            ("input_tokens", "input_tokens"),
            ("output_tokens", "output_tokens"),
            ("requests", "num_model_requests"),
        ):
            total = sum(int(row[column]) for row in usage)
            assert total == sum(item[field] for item in of_usage)
            assert name == "owner" or str(total) in numbers(page)


async def test_a_bill_links_the_invoice_of_each_month_as_html_and_csv(url: str, month: Database) -> None:
    document = await month.read(lambda connection: invoice_of(connection, "acme", "2026-11"))
    for name in ("owner", "acme-admin", "acme"):
        async with Browser(url) as browser:
            await browser.log_in(name)
            page = (await browser.get(f"bill/acme?{MONTH}"))[1]
            links = re.findall(r'href="/console/(invoice/acme/[^"]*)"', page)
            assert links == ["invoice/acme/2026-11.html", "invoice/acme/2026-11.csv"]
            answer = await browser.session.get(f"{url}/console/{links[0]}")
            assert await answer.text() == invoice_html(document)
            assert "script" not in answer.headers["Content-Security-Policy"]
            answer = await browser.session.get(f"{url}/console/{links[1]}")
            assert (await answer.read()).decode() == invoice_csv(document)
            assert answer.headers["Content-Disposition"] == 'attachment; filename="invoice-acme-2026-11.csv"'
            assert len(re.findall("/console/invoice/acme/", (await browser.get("bill/acme?period=30d"))[1])) in (2, 4)


async def test_an_invoice_is_shown_only_to_who_may_see_the_whole_project(url: str) -> None:
    for name in ("acme-tone", "roaming", "globex"):
        async with Browser(url) as browser:
            await browser.log_in(name)
            assert (await browser.get("invoice/acme/2026-11.html"))[0] == 404
            assert "/console/invoice/acme/" not in (await browser.get(f"bill?{MONTH}"))[1]
    async with Browser(url) as owner:
        for path in ("acme/2026-11.csv", "acme/2026-11.html"):
            assert (await owner.get(f"invoice/{path}"))[0] == 303
        await owner.log_in("owner")
        for path in (
            "acme/2026-13.csv",
            "acme/2026-11.pdf",
            "acme/2026-11",
            "/2026-11.csv",
            "acme",
            "a%22b/2026-11.csv",
        ):
            assert (await owner.get(f"invoice/{path}"))[0] == 404, path


async def test_parts_of_the_overview_add_up_to_its_totals(url: str) -> None:
    async with Browser(url) as owner:
        await owner.log_in("owner")
        page = (await owner.get(f"?{MONTH}"))[1]
        tenants = (await owner.get(f"tenants?{MONTH}"))[1]
    cards = dict(re.findall(r'<dt>(\w+)</dt><dd><data value="([^"]*)"', page))
    assert Decimal(cards["Cost"]) == 720 * Decimal("2.40")
    assert Decimal(cards["Revenue"]) - Decimal(cards["Cost"]) == Decimal(cards["Margin"])
    rows = re.findall(r"<tr><th.*?</tr>", tenants, re.S)
    columns = [[Decimal(value) for value in re.findall(r'<data value="([^"]*)"', row)] for row in rows]
    sums = [sum(row[place] for row in columns if len(row) == 5) for place in range(5)]
    assert sums[2] == Decimal(cards["Revenue"])
    assert sums[3] + Decimal(cards["Idle"]) == Decimal(cards["Cost"])


# --- login


async def test_the_session_is_a_strict_cookie_that_scripts_cannot_read_and_that_ends(month: Database) -> None:
    now = [float(NOW_S)]
    keys = live_keys()
    app = console(month, keys, now_unix_s=lambda: now[0])
    async with serving(app.handle) as url, Browser(url) as browser:
        answer = await browser.post("login", key="lp-acme", headers={"X-Forwarded-Proto": "https"})
        cookie = answer.headers["Set-Cookie"]
        for part in ("HttpOnly", "SameSite=Strict", "Secure", "Path=/console", "Max-Age=3600"):
            assert part in cookie
        assert "lp-acme" not in cookie
        assert "Secure" not in (await browser.post("login", key="lp-acme")).headers["Set-Cookie"]
        assert (await browser.get(""))[0] == 200
        now[0] += 3000
        assert (await browser.get(""))[0] == 200, "and the cookie is renewed"
        now[0] += 3000
        assert (await browser.get(""))[0] == 200
        now[0] += 3601
        assert (await browser.get(""))[0] == 303


async def test_a_revoked_or_rotated_key_ends_its_sessions_at_once(month: Database) -> None:
    keys = live_keys()
    async with serving(console(month, keys).handle) as url, Browser(url) as browser:
        await browser.log_in("acme")
        keys.publish(KeyTable.of(item for item in keys.table if item.id != "acme"))
        assert (await browser.get(""))[0] == 303
        keys.publish(live_keys().table)
        assert (await browser.get(""))[0] == 200
        rotated = [replace(item, sha256="0" * 64) if item.id == "acme" else item for item in live_keys().table]
        keys.publish(KeyTable.of(rotated))
        assert (await browser.get(""))[0] == 303
        keys.publish(KeyTable.of(replace(item, expires_unix_s=NOW_S - 1) for item in live_keys().table))
        assert (await browser.get(""))[0] == 303


@pytest.mark.parametrize("cookie", ["", "a.b", "e30.e30", "x" * 9000, "eyJrZXkiOiJ1aWQtb3duZXIifQ.AAAA", "%00.%ff"])
async def test_a_made_up_cookie_is_no_session(url: str, cookie: str) -> None:
    async with aiohttp.ClientSession() as session:
        answer = await session.get(f"{url}/console/", headers={"Cookie": f"{COOKIE}={cookie}"}, allow_redirects=False)
        assert answer.status in (303, 400)


async def test_a_session_of_one_key_is_none_of_another(url: str) -> None:
    async with Browser(url) as browser:
        await browser.log_in("acme")
        (value,) = [item.value for item in browser.session.cookie_jar if item.key == COOKIE]
        head, _, mac = value.partition(".")
        body = json.loads(base64.urlsafe_b64decode(head + "=="))
        body["key"] = "uid-owner"
        forged = base64.urlsafe_b64encode(json.dumps(body, separators=(",", ":"), sort_keys=True).encode()).decode()
    async with aiohttp.ClientSession() as session:
        headers = {"Cookie": f"{COOKIE}={forged.rstrip('=')}.{mac}"}
        answer = await session.get(f"{url}/console/", headers=headers, allow_redirects=False)
        assert answer.status == 303


async def test_failed_logins_are_limited_and_say_why(month: Database) -> None:
    now = [float(NOW_S)]
    async with serving(console(month, now_unix_s=lambda: now[0]).handle) as url, Browser(url) as browser:
        for _ in range(MAX_FAILURES):
            answer = await browser.post("login", key="lp-wrong")
            assert answer.status == 401
            assert "not known or was revoked" in await answer.text()
        answer = await browser.post("login", key="lp-acme")
        assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (429, True)
        now[0] += 301
        assert (await browser.post("login", key="lp-acme")).status == 303


async def test_forms_of_other_sites_are_refused(url: str) -> None:
    async with Browser(url) as browser:
        await browser.log_in("acme")
        assert (await browser.post("logout", {"Origin": "https://evil.example"})).status == 403
        assert (await browser.post("logout", {"Sec-Fetch-Site": "cross-site"})).status == 403
        assert (await browser.post("logout", csrf="wrong")).status == 403
        assert (await browser.post("login", {"Origin": "https://evil.example"}, key="lp-globex")).status == 403
        page = (await browser.get(""))[1]
        csrf = re.search(r'name="csrf" value="([^"]+)"', page)
        assert csrf is not None
        assert (await browser.post("logout", csrf=csrf[1])).status == 303
        assert (await browser.get(""))[0] == 303


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example/", "/\\evil.example", "/v1/models", "javascript:1"]
)
async def test_a_login_leads_to_pages_of_the_console_alone(url: str, target: str) -> None:
    async with Browser(url) as browser:
        answer = await browser.post("login", key="lp-acme", next=target)
        assert answer.headers["Location"] == "/console/"
        answer = await browser.post("login", key="lp-acme", next="/console/bill?period=7d")
        assert answer.headers["Location"] == "/console/bill?period=7d"


async def test_a_form_that_is_too_long_is_refused(url: str) -> None:
    async with Browser(url) as browser:
        assert (await browser.post("login", key="x" * 100_000)).status == 413


# --- hostile names, headers


async def test_names_are_text_and_nothing_else(url: str) -> None:
    async with Browser(url) as owner:
        await owner.log_in("owner")
        page = (await owner.get(f"failures?{MONTH}"))[1]
        assert "&lt;script&gt;document.title" in page
        assert "abc[U+202E]gnp.exe" in page
        for path in (
            f"requests?id={HOSTILE}",
            f"adapters?q={HOSTILE}&{MONTH}",
            f"?next={HOSTILE}",
            f"adapter/{HOSTILE}",
        ):
            text = (await owner.get(path))[1]
            assert HOSTILE not in text
            assert "<script" not in text


async def test_pages_permit_no_script_no_frame_and_nothing_from_elsewhere(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        answer = await session.get(f"{url}/console/login")
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        page = await answer.text()
        assert not re.search(r"<script|style=|https?://|\son\w+=", page)
        style = await (await session.get(f"{url}/console/static/console.css")).text()
        assert not re.search(r"@import|url\(", style)


async def test_findings_are_shown_on_top(tmp_path: Any) -> None:
    database = Database.open(sqlite_url(tmp_path))
    await database.write(fill_all)
    await database.write(fill_finding)
    async with serving_all(database) as url, Browser(url) as owner:
        await owner.log_in("owner")
        for path in ("", "reconciliation"):
            page = (await owner.get(path))[1]
            assert "tokens do not add up" in page
            assert '<data value="12">' in page
    await database.close()


async def test_an_empty_ledger_has_pages_too(tmp_path: Any) -> None:
    database = Database.open(sqlite_url(tmp_path))
    async with serving_all(database) as url:
        for name in ("owner", "acme", "roaming"):
            async with Browser(url) as browser:
                await browser.log_in(name)
                for path in ("", "adapters", "bill", "failures", "quotas", "jobs", "requests?id=x", "prices", "export"):
                    assert (await browser.get(path))[0] == 200, (name, path)
    await database.close()


@pytest.mark.parametrize(
    ("cell", "written"),
    [("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"), ("\tx", "'\tx"), ("a=1", "a=1"), (-1, -1)],
)
def test_a_cell_is_never_a_formula(cell: object, written: object) -> None:
    assert guarded(cell) == written


def test_numbers_are_written_for_people() -> None:
    assert [amount_text(Decimal(text), "USD") for text in ("1234567.891", "0.00481234", "-0.5", "0")] == [
        *("1,234,567.89 USD", "0.00481 USD", "-0.500 USD", "0.00 USD"),
    ]
    assert [duration(value) for value in (0.35, 12.54, 200, 7500, 356400)] == [
        *("350 ms", "12.5 s", "3 min 20 s", "2 h 5 min", "4 d 3 h"),
    ]
    assert visible(RIGHT_TO_LEFT) == "abc[U+202E]gnp.exe"
    assert len(SECRETS) == 6


# --- the present


def test_limits_are_those_of_the_callers_keys_projects_and_models() -> None:
    table = KeyTable.of(
        replace(item, quotas=((Meter.TOKENS_PER_MINUTE, 1000),)) if item.id in ("acme", "globex") else item
        for item in live_keys().table
    )
    uses = [
        ("key/uid-acme", Meter.TOKENS_PER_MINUTE, 1000, 250),
        ("project/acme", Meter.TOKENS_PER_MONTH, 10**6, 900_000),
        ("project/globex", Meter.TOKENS_PER_MONTH, 10**6, 5),
        ("model/acme/short", Meter.REQUESTS_PER_MINUTE, 60, 1),
        ("model/acme/short", Meter.MONEY_PER_MONTH, 50 * 10**9, 0),
    ]

    async def used() -> list[tuple[str, Meter, int, int]]:
        return uses

    live = LiveObjects(LiveRoutes(), LiveKeys(table), used, currency=lambda: "EUR", now_unix_s=lambda: NOW_S)

    def seen(name: str) -> list[tuple[str, str, int]]:
        scope = scope_of(next(item for item in table if item.id == name))
        return [(item.subject, item.meter, int(item.used)) for item in asyncio.run(_list(live, scope))]

    assert seen("acme") == [
        ("project acme", "tokens per month", 900_000),
        ("key acme", "tokens per minute", 250),
        ("model acme/short", "requests per minute", 1),
        ("model acme/short", "money per month", 0),
    ]
    assert seen("globex") == [("project globex", "tokens per month", 5), ("key globex", "tokens per minute", 0)]
    assert ("model acme/short", "requests per minute", 1) not in seen("acme-tone")
    assert seen("roaming") == []
    assert len(seen("owner")) == 6
    owner = scope_of(next(item for item in table if item.id == "owner"))
    money = next(item for item in asyncio.run(_list(live, owner)) if item.meter == "money per month")
    assert (money.limit, money.unit, money.resets_unix_s is not None) == (50, "EUR", True)


async def none_used() -> list[tuple[str, Meter, int, int]]:
    return []


async def _list(live: LiveObjects, scope: Scope) -> list[LimitNow]:
    return list(await live.limits(scope))


def test_an_adapter_says_why_it_is_where_it_is() -> None:
    base = base_route(base_object())
    raw = adapter_object("tone", digest=digest_of("tone"))
    route = adapter_route(raw)
    state = RuntimeState("boot", True, False, 0, frozenset({(route.uid, route.digest or "")}))
    endpoint = Endpoint(base.ref, base.uid, "uid-pod", "tiny-0", "http://127.0.0.1:1", True, False)
    replicas = {base.ref: (RuntimeReplica(endpoint, state, proven=True),)}

    def now(route: AdapterRoute, loaded: bool = True) -> AdapterNow:
        table = RouteTable.of([base], [route], replicas if loaded else {})
        found = LiveObjects(LiveRoutes(table), live_keys(), none_used, now_unix_s=lambda: NOW_S).adapter(str(route.ref))
        assert found is not None
        return found

    assert (now(route).loaded_on, now(route).state) == (("tiny-0",), "Its requests go to one replica.")
    assert now(route, loaded=False).state == "It is on no device: the next request loads it."
    shared = now(replace(route, preferred_replicas=3))
    assert shared.state == "Its requests are shared by 3 replicas."
    suspended = replace(route, spec=route.spec.model_copy(update={"suspend": True}))
    assert now(suspended).state == "It is suspended: no request is served."
    assert LiveObjects(LiveRoutes(), live_keys(), none_used, now_unix_s=lambda: NOW_S).adapter("demo/none") is None


def test_a_job_is_shown_with_what_it_waits_for() -> None:
    raw = {
        "metadata": {"namespace": "acme", "name": "tone", "creationTimestamp": "2026-11-30T10:00:00Z"},
        "spec": {"baseModelRef": {"name": "llama", "namespace": "models"}},
        "status": {"state": "Queued", "queue": {"reason": "TokenQuota", "position": 2}},
    }
    job = job_now(raw)
    assert (job.base, job.phase, job.message) == ("models/llama", "Queued", "TokenQuota (place 2)")
    failed = {
        **raw,
        "status": {"state": "Failed", "failure": {"reason": "DataInvalid", "message": "Line 3 is no JSON."}},
    }
    assert job_now(failed).message == "Line 3 is no JSON."
