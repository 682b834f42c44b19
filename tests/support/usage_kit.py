"""Fills the sums of a ledger's database with usage of several projects, and serves the ledger's API on a free port."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal, localcontext
from hashlib import sha256
from typing import Any

from aiohttp import web
from ledger_kit import T0_S
from sqlalchemy import Connection, insert, text

from lorapool_gateway.routing.auth import ApiKey, KeyTable
from lorapool_gateway.routing.key_guard import KeyGuard
from lorapool_gateway.routing.live_tables import LiveKeys
from lorapool_ledger.api.organization import OrganizationApi
from lorapool_ledger.api.signing import Signer
from lorapool_ledger.console.app import Console
from lorapool_ledger.console.live import AdapterNow, JobNow, LimitNow
from lorapool_ledger.reports.charges import PRECISION, Charge
from lorapool_ledger.reports.periods import Period
from lorapool_ledger.reports.scope import Scope, scope_of
from lorapool_ledger.store.database import Database
from lorapool_ledger.store.tables import (
    api_key,
    attempt_closed,
    attempt_opened,
    boot,
    finding,
    gateway,
    pod_hour,
    price,
    refusal_minute,
    residency,
    runtime_request,
    usage_hour,
)

HOUR, DAY = 3600, 86400
TOKENS = ("t" * 40,)
NOW_S = T0_S + 30 * DAY + 5 * HOUR + 7
"""2026-12-01 05:00:07 UTC: a new month has begun."""

SECRETS = {
    "owner": {"namespaces": None, "admin": True},
    "acme-admin": {"namespaces": {"acme"}, "admin": True},
    "acme": {"namespaces": {"acme"}},
    "acme-tone": {"namespaces": {"acme"}, "models": {"acme/tone"}},
    "globex": {"namespaces": {"globex"}},
    "roaming": {"namespaces": None},
}
"""Keys by name; a key's text is `lp-<name>` and its uid `uid-<name>`."""


def key(name: str, **given: Any) -> ApiKey:
    fields = {name: frozenset(value) if isinstance(value, set) else value for name, value in given.items()}
    return ApiKey(id=name, uid=f"uid-{name}", sha256=sha256(f"lp-{name}".encode()).hexdigest(), **fields)


def live_keys(secrets: Mapping[str, Mapping[str, Any]] = SECRETS) -> LiveKeys:
    return LiveKeys(KeyTable.of(key(name, **given) for name, given in secrets.items()))


MONTH = Period(T0_S, T0_S + 30 * DAY)
SCOPES = {name: scope_of(key(name, **given)) for name, given in SECRETS.items()} | {
    "two projects": Scope(projects=frozenset({"acme", "globex"}), owner=True),
    "no project": Scope(projects=frozenset()),
}


def amounts(found: list[Charge], dimension: str) -> dict[str, Decimal]:
    with localcontext(prec=PRECISION):
        sums: dict[str, Decimal] = defaultdict(Decimal)
        for one in found:
            sums[getattr(one, dimension)] += one.amount
        return sums


def rounded(found: dict[str, Decimal]) -> dict[str, Decimal]:
    """To what is exact: only a division by hours is not, in its last of 80 digits."""
    with localcontext(prec=PRECISION):
        return {name: part for name, amount in found.items() if (part := round(amount, 50))}


def usage_row(hour_unix_s: int, **given: Any) -> dict[str, Any]:
    """One request of `acme` on `acme/tone`, 10 prompt tokens (4 cached), 5 generated."""
    row = {
        "hour_unix_s": hour_unix_s,
        "project": "acme",
        "key_uid": "uid-acme",
        "base": "models/llama",
        "uid": "adapter-tone",
        "model": "acme/tone",
        "outcome": "completed",
        "requests": 1,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "gpu_ns": 10**9,
        "delivered_tokens": 5,
        **given,
    }
    billed = row["outcome"] in ("completed", "client_left")
    row.setdefault("billed_prompt_tokens", row["prompt_tokens"] - row["cached_tokens"] if billed else 0)
    row.setdefault("billed_cached_tokens", row["cached_tokens"] if billed else 0)
    row.setdefault("billed_completion_tokens", row["completion_tokens"] if billed else 0)
    return row


def some_usage(days: int = 30, *, seed: int = 1) -> list[dict[str, Any]]:
    """A month of two projects with two adapters each, several keys, and every outcome."""
    draw, rows = random.Random(seed), []
    models = {"acme": ("acme/tone", "acme/short"), "globex": ("globex/law", "globex/tone")}
    for day in range(days):
        if day % 7 == 5:
            continue  # a day without usage
        for project, key_uid in (
            ("acme", "uid-acme"),
            ("acme", "uid-acme-tone"),
            ("globex", "uid-globex"),
            ("globex", "uid-roaming"),
        ):
            for model in models[project]:
                for hour in draw.sample(range(24), 2):
                    for outcome in ("completed", draw.choice(["client_left", "failed", "lost", "refused"])):
                        prompt = draw.randrange(100_000, 5_000_000) if outcome != "refused" else 0
                        rows.append(
                            usage_row(
                                T0_S + day * DAY + hour * HOUR,
                                project=project,
                                key_uid=key_uid,
                                model=model,
                                uid=f"adapter-{model}",
                                outcome=outcome,
                                requests=draw.randrange(100, 9000),
                                prompt_tokens=prompt,
                                cached_tokens=draw.randrange(0, prompt) if prompt else 0,
                                completion_tokens=draw.randrange(10_000, 2_000_000) if prompt else 0,
                            )
                        )
    return rows


def fill(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Inserts hours and sums them to days."""
    connection.execute(insert(usage_hour), [dict(row) for row in rows])
    sums = ", ".join(
        f"sum({name})"
        for name in (
            *("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "gpu_ns"),
            *("billed_prompt_tokens", "billed_cached_tokens", "billed_completion_tokens", "delivered_tokens"),
        )
    )
    by = "project, key_uid, base, uid, model, outcome"
    day = "hour_unix_s - hour_unix_s % 86400"
    connection.execute(
        text(f"INSERT INTO usage_day SELECT {day} AS day, {by}, {sums} FROM usage_hour GROUP BY day, {by}")
    )
    by = by.replace("key_uid, ", "")
    connection.execute(
        text(f"INSERT INTO model_day SELECT day_unix_s, {by}, {sums} FROM usage_day GROUP BY day_unix_s, {by}")
    )


def fill_pods(connection: Connection, *, days: int = 30) -> None:
    """One pod of `models/llama` that is half busy, with two adapters resident all the time."""
    values = {
        "id": 1,
        "boot_id": "boot-1",
        "pod_uid": "pod-1",
        "pod": "llama-0",
        "base_uid": "base-1",
        "base": "models/llama",
    }
    connection.execute(
        insert(boot).values(
            **values,
            profile="gpu",
            device="H200",
            slots=4,
            slot_bytes=4 * 2**30,
            device_bytes=40 * 2**30,
            started_unix_ms=T0_S * 1000,
            cursor_seq=1,
            seen_unix_ms=NOW_S * 1000,
            end="",
        )
    )
    hour_ns = HOUR * 10**9
    rows: list[dict[str, Any]] = []
    for hour in range(days * 24):
        start = T0_S + hour * HOUR
        rows += [
            {
                "hour_unix_s": start,
                "boot": 1,
                "uid": "*",
                "model": "",
                "uptime_ns": hour_ns,
                "gpu_ns": hour_ns // 2,
                "byte_ns": "0",
            },
            {
                "hour_unix_s": start,
                "boot": 1,
                "uid": "",
                "model": "",
                "uptime_ns": 0,
                "gpu_ns": hour_ns // 8,
                "byte_ns": "0",
            },
        ]
        for model, share in (("acme/tone", 8), ("globex/law", 4)):
            rows.append(
                {
                    "hour_unix_s": start,
                    "boot": 1,
                    "uid": f"adapter-{model}",
                    "model": model,
                    "uptime_ns": 0,
                    "gpu_ns": hour_ns // share,
                    "byte_ns": str(2**30 * hour_ns),
                }
            )
    connection.execute(insert(pod_hour), rows)
    # The sums of a day exceed 64 bits and are whole multiples here, so that text needs no arithmetic.
    connection.execute(
        text(
            "INSERT INTO pod_day SELECT hour_unix_s - hour_unix_s % 86400 AS day, boot, uid, max(model), "
            "sum(uptime_ns), sum(gpu_ns), '0' FROM pod_hour GROUP BY day, boot, uid"
        )
    )
    for accounts, number in (("NOT IN ('', '*')", 1), ("= '*'", 2)):
        connection.execute(
            text(f"UPDATE pod_day SET byte_ns = :bytes WHERE uid {accounts}"),
            {"bytes": str(number * 2**30 * hour_ns * 24)},
        )


def fill_prices(connection: Connection, *rows: tuple[int, str, str, str], currency: str = "USD") -> None:
    """Rows of (effective_unix_s, scope, line_item, amount)."""
    connection.execute(
        insert(price),
        [
            {
                "effective_unix_s": at,
                "scope": scope,
                "line_item": item,
                "amount": amount,
                "currency": currency,
                "recorded_unix_s": at,
            }
            for at, scope, item, amount in rows
        ],
    )


DEFAULT_PRICES = (
    (0, "*", "prompt", "0.50"),
    (0, "*", "cached", "0.05"),
    (0, "*", "completion", "1.50"),
    (0, "*", "residency", "0.002"),
    (0, "*", "request", "0.0001"),
    (0, "globex/", "completion", "3"),
    (T0_S + 10 * DAY, "*", "prompt", "0.40"),
    (0, "acme/short", "prompt", "0.10"),
)
"""With one change within the month, a project's own price and a model's own price."""


def fill_names(connection: Connection) -> None:
    connection.execute(
        insert(api_key), [{"key_uid": f"uid-{name}", "key": name, "owner": f"{name}@example.com"} for name in SECRETS]
    )


@asynccontextmanager
async def serving(handle: Any) -> AsyncIterator[str]:
    """Serves a handler of requests on loopback; yields its URL."""
    runner = web.ServerRunner(web.Server(handle, access_log=None), shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def organization_api(database: Database, keys: LiveKeys | None = None, *, now_s: float = NOW_S) -> OrganizationApi:
    guard = KeyGuard(keys or live_keys(), now_unix_s=lambda: now_s)
    return OrganizationApi(database, guard, Signer("page", lambda: TOKENS), now_unix_s=lambda: now_s)


def console(
    database: Database,
    keys: LiveKeys | None = None,
    live: Any = None,
    *,
    now_unix_s: Callable[[], float] = lambda: NOW_S,
) -> Console:
    known = keys or live_keys()
    guard = KeyGuard(known, now_unix_s=now_unix_s)
    signer = Signer("session", lambda: TOKENS)
    return Console(database, known, guard, signer, live, now_unix_s=now_unix_s, clock=now_unix_s)


@asynccontextmanager
async def serving_all(database: Database, keys: LiveKeys | None = None, live: Any = None) -> AsyncIterator[str]:
    """Serves API and console of one ledger, as its process does."""
    api, pages = organization_api(database, keys), console(database, keys, live)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return await (pages if request.path.startswith("/console") else api).handle(request)

    async with serving(handle) as url:
        yield url


class SomeLive:
    """A present with an adapter, jobs and limits."""

    def adapter(self, model: str) -> AdapterNow | None:
        if model != "acme/tone":
            return None
        return AdapterNow(
            model, "models/llama", True, "It is loaded where its requests go.", "sha256:aa", ("llama-0",), 1
        )

    def jobs(self, projects: frozenset[str] | None) -> list[JobNow]:
        made = [
            JobNow("acme", "tone-v2", "models/llama", "Running", "Epoch 2 of 3, loss 1.21", NOW_S - 5000, 1_204_224),
            JobNow("globex", "law-long", "models/llama", "Queued", "Waits for its turn", NOW_S - 900, 0),
        ]
        return [job for job in made if projects is None or job.namespace in projects]

    async def limits(self, scope: Scope) -> list[LimitNow]:
        reset = T0_S + 30 * DAY
        made = [
            LimitNow("project acme", "tokens per month", Decimal(995_444_013), Decimal(1_080_000_000), "tokens", reset),
            LimitNow("key acme", "tokens per minute", Decimal(7400), Decimal(10000), "tokens", None),
            LimitNow("project globex", "tokens per month", Decimal(1_200_000), Decimal(40_000_000), "tokens", reset),
        ]
        return [item for item in made if scope.projects is None or item.subject.split()[1] in scope.projects]


HOSTILE = "<script>document.title='owned'</script>"
RIGHT_TO_LEFT = "abc\u202egnp.exe"


def fill_facts(connection: Connection) -> None:
    """Attempts of the last day with every outcome, some of them with hostile names; loads; refusals; a finding."""
    connection.execute(
        insert(gateway).values(
            id=1, boot_id="g", gateway="gateway-7c9f", seen_unix_ms=NOW_S * 1000, cursor_seq=9, ended=False
        )
    )
    ends = ["completed", "client_left", "failed", "lost", "withheld", "refused", "timeout"]
    ids = ["req-0001", HOSTILE, RIGHT_TO_LEFT, "=cmd|' /C calc'!A0", "req-0004", "req-0005", "req-0006"]
    for number, (end, request_id) in enumerate(zip(ends, ids, strict=True)):
        at = (NOW_S - 4000 + 500 * number) * 1000
        project = "globex" if number == 4 else "acme"
        names = {
            "request_id": request_id,
            "key_uid": "uid-acme",
            "project": project,
            "uid": "adapter-acme/tone",
            "digest": "sha256:" + "a" * 64,
            "model": f"{project}/tone",
        }
        connection.execute(
            insert(attempt_opened).values(
                **names,
                gateway=1,
                seq=number + 1,
                attempt=f"attempt-{number}",
                key="acme",
                owner=HOSTILE,
                base_uid="base-1",
                base="models/llama",
                pod_uid="pod-1",
                boot_id="boot-1",
                route="/v1/chat/completions",
                stream=True,
                opened_unix_ms=at,
            )
        )
        connection.execute(
            insert(attempt_closed).values(
                gateway=1,
                seq=number + 20,
                attempt=f"attempt-{number}",
                outcome=end,
                code=200 if number < 2 else 502,
                prompt_tokens=812,
                cached_tokens=640,
                completion_tokens=97,
                cold_ms=1840 if number == 1 else None,
                closed_unix_ms=at + 2100,
            )
        )
        if end in ("completed", "client_left", "withheld"):
            connection.execute(
                insert(runtime_request).values(
                    **names,
                    boot=1,
                    seq=number + 1,
                    first_seq=number + 1,
                    requests=1,
                    attempt=f"attempt-{number}",
                    sequences=1,
                    outcome="cancelled" if end == "client_left" else "completed",
                    started_unix_ms=at,
                    ended_unix_ms=at + 2000,
                    prompt_tokens=812,
                    cached_tokens=640,
                    completion_tokens=101,
                    gpu_ns=10**9,
                )
            )
    for seq, (kind, ago, reason) in enumerate(
        [("loaded", 90_000, ""), ("unloaded", 60_000, ""), ("failed", 50_000, "NoSlot"), ("loaded", 49_000, "")], 100
    ):
        connection.execute(
            insert(residency).values(
                boot=1,
                seq=seq,
                type=kind,
                uid="adapter-acme/tone",
                digest="sha256:" + "a" * 64,
                model="acme/tone",
                at_unix_ms=(NOW_S - ago) * 1000,
                device_bytes=2**30,
                took_ns=350_000_000,
                reason=reason,
            )
        )
    connection.execute(
        insert(refusal_minute).values(
            gateway=1,
            seq=90,
            minute_unix_s=(NOW_S - 600) // 60 * 60,
            key_uid="uid-acme",
            project="acme",
            code="rate_limit_exceeded",
            count=37,
        )
    )


def fill_finding(connection: Connection) -> None:
    connection.execute(
        insert(finding).values(
            check="R1",
            subject="boot boot-1, acme/tone",
            tokens=12,
            message=f"The records have 12 tokens less than the totals. {HOSTILE}",
            found_unix_s=NOW_S - 120,
        )
    )


def fill_all(connection: Connection) -> None:
    """A month with everything."""
    fill(connection, some_usage())
    fill_pods(connection)
    fill_prices(connection, *DEFAULT_PRICES, (0, "gpu", "pod", "2.40"))
    fill_names(connection)
    fill_facts(connection)
