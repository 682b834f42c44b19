"""What an API key permits, for how long, and how soon its end is noticed."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fakes import FakeRuntime
from gateway_world import KEY, OTHER_KEY, World, api_key, until, world

from lorapool_api.openai import UnauthenticatedError, UnavailableError
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.routing import watch
from lorapool_gateway.routing.auth import KeyTable, parse_key
from lorapool_gateway.routing.key_guard import KeyGuard
from lorapool_gateway.routing.live_tables import LiveKeys, LiveRoutes
from lorapool_gateway.routing.source import Kind, ObjectCache
from lorapool_gateway.routing.table_builder import TableBuilder
from lorapool_gateway.routing.watch import KubeSource

NOON = 1_801_396_800.0
"""2027-01-31T12:00:00Z."""


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        made.base()
        made.adapter("route")
        made.adapter("other")
        yield made


async def status(here: World, model: str, key: str = KEY) -> int:
    answer = await here.post(here.ask(model), headers={"Authorization": f"Bearer {key}"})
    return answer.status


def guard(clock: list[float], **fields: Any) -> KeyGuard:
    keys = LiveKeys(KeyTable.of([api_key(KEY, **fields)]))
    return KeyGuard(keys, now_unix_s=lambda: clock[0])


def test_all_fields_of_a_key_are_read_from_its_secret() -> None:
    data = {
        "keySha256": "a" * 64,
        "namespaces": "a,b",
        "defaultNamespace": "b",
        "models": "a/x, b/y.z",
        "notBefore": "2027-01-31T13:00:00+01:00",
        "expires": "2027-02-01T12:00:00Z",
        "owner": "support@example.com",
        "admin": "true",
    }
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}
    key = parse_key({"metadata": {"name": "k", "uid": "4f3c"}, "data": encoded})
    assert (key.uid, key.admin) == ("4f3c", True)
    assert (key.default_namespace, key.models, key.owner) == ("b", {"a/x", "b/y.z"}, "support@example.com")
    assert (key.not_before_unix_s, key.expires_unix_s) == (NOON, NOON + 86400)


def test_a_key_is_valid_from_its_first_to_its_last_moment() -> None:
    clock = [NOON - 1]
    guarded = guard(clock, not_before_unix_s=NOON, expires_unix_s=NOON + 10)
    for now, valid in ((NOON - 1, False), (NOON, True), (NOON + 9, True), (NOON + 10, False)):
        clock[0] = now
        if valid:
            key = guarded.authenticate(f"Bearer {KEY}")
            assert guarded.again(key) == key
        else:
            with pytest.raises(UnauthenticatedError):
                guarded.authenticate(f"Bearer {KEY}")
    with pytest.raises(UnauthenticatedError, match="expired"):
        guarded.again(key)


async def test_a_key_with_a_list_of_models_sees_no_other_one(here: World) -> None:
    async with FakeRuntime().running() as runtime:
        here.replica(runtime)
        runtime_key = here.adapter("route")
        runtime.have(runtime_key, "demo/route")
        here.keys.publish(KeyTable.of([api_key(KEY, models=frozenset({"demo/route"}))]))
        assert [await status(here, name) for name in ("route", "demo/route", "other", "demo/other", "tiny")] == [
            200, 200, 404, 404, 404,
        ]  # fmt: skip
        async with here.client() as client:
            assert [model.id async for model in client.models.list()] == ["demo/route"]


async def test_a_held_request_whose_key_is_revoked_meanwhile_is_not_sent(here: World) -> None:
    async with FakeRuntime().running() as runtime:
        asked = asyncio.create_task(status(here, "route"))
        await until(lambda: here.sample("held_requests", base="demo/tiny") == 1)
        here.keys.publish(KeyTable.of([]))
        here.replica(runtime)
        assert await asked == 401
    assert runtime.seen == []


async def test_a_held_request_is_sent_with_the_present_permissions_of_its_key(here: World) -> None:
    async with FakeRuntime().running() as runtime:
        asked = asyncio.create_task(status(here, "route"))
        await until(lambda: here.sample("held_requests", base="demo/tiny") == 1)
        here.keys.publish(KeyTable.of([api_key(KEY, "elsewhere")]))
        here.replica(runtime)
        assert await asked == 404
    assert runtime.seen == []


async def test_of_two_keys_of_one_tenant_each_works_until_it_is_deleted(here: World) -> None:
    first, second = api_key(KEY, "demo", owner="team"), api_key(OTHER_KEY, "demo", owner="team")
    async with FakeRuntime().running() as runtime:
        here.replica(runtime)
        for keys, expected in (([first], (200, 401)), ([first, second], (200, 200)), ([second], (401, 200))):
            here.keys.publish(KeyTable.of(keys))
            assert (await status(here, "demo/tiny", KEY), await status(here, "demo/tiny", OTHER_KEY)) == expected


@pytest.mark.parametrize(("max_age_s", "refused"), [(300.0, True), (None, False)])
def test_keys_that_were_not_confirmed_for_too_long_are_refused_or_stay_valid_as_the_administrator_chose(
    max_age_s: float | None, refused: bool
) -> None:
    clock, keys = [0.0], LiveKeys(KeyTable.of([api_key(KEY)]))
    keys.confirmed_s = lambda: 1000.0
    guarded = KeyGuard(keys, max_age_s=max_age_s, clock=lambda: clock[0])
    clock[0] = 1300.0
    key = guarded.authenticate(f"Bearer {KEY}")
    clock[0] = 1300.1
    if not refused:
        assert guarded.authenticate(f"Bearer {KEY}") == guarded.again(key) == key
        return
    for ask in (lambda: guarded.authenticate(f"Bearer {KEY}"), lambda: guarded.again(key)):
        with pytest.raises(UnavailableError) as caught:
            ask()
        assert caught.value.code == "keys_stale"


class Scripted:
    """An API whose watch of a kind sends these events and then ends, or stays silent."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, str], float]] = []

    async def get(self, path: str, params: Any = None) -> dict[str, Any]:
        return {"items": [], "metadata": {"resourceVersion": "1"}}

    async def watch(self, path: str, params: Any, inactivity_timeout_s: float) -> AsyncIterator[dict[str, Any]]:
        self.asked.append((dict(params), inactivity_timeout_s))
        for _ in ():
            yield {}

    async def create_event(self, event: Any) -> None: ...


async def test_a_watch_of_keys_is_so_short_that_a_dead_connection_delays_a_revocation_by_less_than_30_s() -> None:
    api = Scripted()
    source = KubeSource(api, None, "keys", lambda kind: None)
    [cache] = source.caches(Kind.API_KEYS, parse_key, lambda: None)
    assert cache.confirmed_s == float("-inf")
    task = asyncio.create_task(source.watches[0].run())
    await until(lambda: api.asked)
    task.cancel()
    params, silence_s = api.asked[0]
    assert int(params["timeoutSeconds"]) <= 20
    assert silence_s + max(watch.BACKOFF_S[:1]) * 1.3 < 30
    assert cache.confirmed_s > float("-inf")


async def test_the_metrics_show_when_each_key_was_used_last_and_forget_deleted_ones(here: World) -> None:
    here.metrics.sync_keys([api_key(KEY).id, "unused"])
    await status(here, "nothing")
    assert here.sample("key_last_used_timestamp_seconds", key=api_key(KEY).id) > NOON - 10**9
    assert here.sample("key_last_used_timestamp_seconds", key="unused") == 0
    here.metrics.sync_keys(["unused"])
    shown = here.metrics.registry.get_sample_value(
        "lorapool_gateway_key_last_used_timestamp_seconds", {"key": api_key(KEY).id}
    )
    assert shown is None


async def test_each_refused_request_has_an_audit_line_without_a_secret(
    here: World, caplog: pytest.LogCaptureFixture
) -> None:
    here.keys.publish(KeyTable.of([api_key(KEY, "demo", owner="team", max_in_flight=0)]))
    caplog.set_level(logging.WARNING)
    with caplog.at_level(logging.INFO, "lorapool.audit"):
        assert await status(here, "route", "lp-unknown-key") == 401
        assert await status(here, "route") == 429
        async with here.session.get(f"{here.url}/v1/models/demo/no", headers={"Authorization": f"Bearer {KEY}"}) as got:
            assert got.status == 404
    lines = [record.__dict__ for record in caplog.records if record.name == "lorapool.audit"]
    assert [(line["code"], line["reason"], line.get("owner")) for line in lines] == [
        (401, "invalid_api_key", None),
        (429, "key_in_flight_exceeded", "team"),
        (404, "model_not_found", "team"),
    ]
    assert all(line["remote"] == "127.0.0.1" and line["request_id"] for line in lines)
    assert "lp-unknown-key" not in json.dumps(lines, default=str)
    assert KEY not in json.dumps(lines, default=str)


async def test_each_change_of_a_key_has_an_audit_line(caplog: pytest.LogCaptureFixture) -> None:
    class Source:
        def caches(self, kind: Kind, parse: Any, on_change: Any) -> list[ObjectCache[Any]]:
            return []

        async def run(self) -> None: ...

    tables = TableBuilder(Source(), LiveRoutes(), LiveKeys(), Metrics())
    tables._publish_keys(KeyTable.of([api_key(KEY)]))  # those that are there at the start are not news
    tables.synced = True
    with caplog.at_level(logging.INFO, "lorapool.audit"):
        tables._publish_keys(KeyTable.of([api_key(KEY), api_key("second", owner="b")]))
        tables._publish_keys(KeyTable.of([api_key(KEY, "only"), api_key("second", owner="b")]))
        tables._publish_keys(KeyTable.of([api_key(KEY, "only")]))
    assert [(line.getMessage(), line.__dict__["api_key"], line.__dict__["owner"]) for line in caplog.records] == [
        ("API key added", "second", "b"),
        ("API key changed", api_key(KEY).id, ""),
        ("API key removed", "second", "b"),
    ]
