"""Sinks: a real HTTP server that loses answers, fails, is slow or away; by its ids, its sum is exact (Show 9)."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import aiohttp
import pytest
from aiohttp import web
from ledger_kit import T0_MS, attempt_id
from sqlalchemy import Connection, insert, select

from lorapool_ledger.billing.invoice import Correction
from lorapool_ledger.metrics import Metrics
from lorapool_ledger.sinks.config import Meter, Sink, SinksError, SinkType, parse_sinks
from lorapool_ledger.sinks.feeder import GATEWAY_GRACE_MS, RUNTIME_GRACE_MS, feed
from lorapool_ledger.sinks.sender import REFUSED_RETRY_S, SinkAway, Sinks, SinkSender
from lorapool_ledger.sinks.shapes import Usage, correction_event, events_of
from lorapool_ledger.store.database import Database
from lorapool_ledger.store.tables import (
    attempt_closed,
    attempt_opened,
    boot,
    correction,
    gateway,
    outbox,
    runtime_request,
)

NOW_S = T0_MS // 1000 + 10_000


def writers(connection: Connection) -> None:
    """One runtime process and one gateway process."""
    fields = {"boot_id": "boot-1", "pod_uid": "pod-1", "pod": "p", "base_uid": "u", "base": "pool/base"}
    connection.execute(insert(boot).values(id=1, **fields, started_unix_ms=T0_MS, seen_unix_ms=T0_MS, cursor_seq=0))
    connection.execute(insert(gateway).values(id=1, boot_id="g-1", gateway="g", cursor_seq=0, seen_unix_ms=T0_MS))


def cursors(connection: Connection, boot_seq: int, gateway_seq: int) -> None:
    connection.execute(boot.update().values(cursor_seq=boot_seq))
    connection.execute(gateway.update().values(cursor_seq=gateway_seq))


def attempt(
    connection: Connection, number: int, *, runtime: str = "completed", closed: str = "completed", **counts: int
) -> None:
    """Both halves of an attempt with this number in each writer; an empty outcome leaves the half out."""
    given = {"prompt_tokens": 10 + number, "cached_tokens": 4, "completion_tokens": number, **counts}
    ended = NOW_S * 1000 - 1000
    shared = {"attempt": attempt_id(number), "request_id": "r", "key_uid": "key-1", "project": "acme", "uid": "u"}
    shared |= {"digest": "d", "model": "acme/tone"}
    if runtime:
        row = {**shared, "boot": 1, "seq": number, "first_seq": number, "outcome": runtime, "gpu_ns": 5, **given}
        connection.execute(insert(runtime_request).values(**row, started_unix_ms=ended - 9, ended_unix_ms=ended))
    if closed:
        row = {**shared, "gateway": 1, "seq": 2 * number, "key": "k", "owner": "", "base_uid": "u", "base": "pool/base"}
        row |= {"pod_uid": "pod-1", "boot_id": "boot-1", "route": "/v1/completions", "stream": False}
        connection.execute(insert(attempt_opened).values(**row, opened_unix_ms=ended - 10))
        row = {"attempt": attempt_id(number), "gateway": 1, "seq": 2 * number + 1, "outcome": closed, "code": 200}
        connection.execute(insert(attempt_closed).values(**row, closed_unix_ms=ended, **given))


@dataclass
class Receiver:
    """A sink of one type. It counts by id; `behave` decides what a request gets in place of success."""

    type: SinkType
    behave: Callable[[Receiver], str] = lambda _: ""
    values: dict[str, Any] = field(default_factory=dict)
    bodies: dict[str, set[str]] = field(default_factory=dict)
    requests: list[web.Request] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        text = (await request.read()).decode()
        self.requests.append(request)
        events = self._read(text)
        wanted = self.behave(self)
        if wanted == "fail":
            return web.Response(status=500)
        if wanted == "busy":
            return web.Response(status=429, headers={"Retry-After": "0"})
        if wanted == "slow":
            await asyncio.sleep(0.5)
        if "poison" in text:
            return web.Response(status=400, text="no such subject")
        if self.type is SinkType.LAGO and (known := [n for n, (one, _, _) in enumerate(events) if one in self.values]):
            details = {str(n): {"transaction_id": ["value_already_exist"]} for n in known}
            return web.json_response({"code": "validation_errors", "error_details": details}, status=422)
        for event_id, value, body in events:
            self.values.setdefault(event_id, value)
            self.bodies.setdefault(event_id, set()).add(body)
        if wanted == "lose":  # counted, and the acknowledgement never arrives
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=204)

    def _read(self, text: str) -> list[tuple[str, Any, str]]:
        if self.type is SinkType.STRIPE:
            one = dict(parse_qsl(text))
            return [(one["identifier"], int(one["payload[value]"]), text)]
        found = json.loads(text)
        if self.type is SinkType.LAGO:
            return [(one["transaction_id"], one["properties"]["value"], json.dumps(one)) for one in found["events"]]
        return [(one["id"], one["data"]["value"], json.dumps(one)) for one in found]


@asynccontextmanager
async def serving(receiver: Receiver) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/events", receiver.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/events"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def sending(database: Database, sink: Sink, secrets: Path, **given: Any) -> AsyncIterator[SinkSender]:
    async with aiohttp.ClientSession() as session:
        clock = given.pop("now_unix_s", lambda: NOW_S)
        yield SinkSender(sink, database, session, secrets, Metrics(), now_unix_s=clock, answer_s=0.2, **given)


async def drained(database: Database, sender: SinkSender) -> int:
    """Works until the outbox is empty; returns how often the sink was away."""
    away = 0
    for _ in range(2000):
        try:
            await sender.step()
        except SinkAway:
            away += 1
        if not await database.read(lambda c: c.execute(select(outbox.c.id).limit(1)).first()):
            return away
    raise AssertionError("the outbox was never empty")


def expected(numbers: range) -> dict[str, int]:
    found: dict[str, int] = {}
    for number in numbers:
        counts = {"prompt_tokens": 6 + number, "cached_tokens": 4, "completion_tokens": number, "requests": 1}
        found |= {f"{attempt_id(number)}-{meter}": value for meter, value in counts.items()}
    return found


@pytest.mark.parametrize("type", SinkType)
async def test_a_sink_that_loses_acknowledgements_and_fails_has_the_exact_sum(
    database: Database, tmp_path: Path, type: SinkType
) -> None:
    """Of four requests about one is counted without an answer, one fails, one is too many and one succeeds."""
    count = 12 if type is SinkType.STRIPE else 120
    chance = random.Random(15)
    receiver = Receiver(type, lambda _: chance.choice(["lose", "fail", "busy", ""]))

    def facts(connection: Connection) -> None:
        writers(connection)
        for number in range(1, count + 1):
            attempt(connection, number)
        cursors(connection, count, 2 * count + 1)

    async with serving(receiver) as url:
        sink = Sink("meter", type, url)
        await database.write(lambda c: feed(c, sink, NOW_S * 1000 - 2000))
        await database.write(facts)
        async with sending(database, sink, tmp_path) as sender:
            away = await drained(database, sender)
    assert away > 3
    assert receiver.values == expected(range(1, count + 1))
    assert all(len(bodies) == 1 for bodies in receiver.bodies.values()), "a resent event had other bytes"


async def test_a_slow_sink_gets_the_same_events_again_and_counts_them_once(database: Database, tmp_path: Path) -> None:
    receiver = Receiver(SinkType.CLOUDEVENTS, lambda r: "slow" if len(r.requests) < 3 else "")

    def facts(connection: Connection) -> None:
        writers(connection)
        attempt(connection, 1)
        cursors(connection, 1, 3)

    async with serving(receiver) as url:
        sink = Sink("meter", SinkType.CLOUDEVENTS, url)
        await database.write(lambda c: feed(c, sink, 0))
        await database.write(facts)
        async with sending(database, sink, tmp_path) as sender:
            assert await drained(database, sender) == 2
    assert receiver.values == expected(range(1, 2))


async def test_after_an_hour_away_everything_is_delivered(database: Database, tmp_path: Path) -> None:
    receiver, now = Receiver(SinkType.CLOUDEVENTS), [NOW_S]

    def facts(connection: Connection) -> None:
        writers(connection)
        attempt(connection, 1)
        cursors(connection, 1, 3)

    async with serving(receiver) as url:
        pass  # the port is free again
    sink = Sink("meter", SinkType.CLOUDEVENTS, url)
    await database.write(lambda c: feed(c, sink, 0))
    await database.write(facts)
    async with sending(database, sink, tmp_path, now_unix_s=lambda: now[0]) as sender:
        for _ in range(60):
            with pytest.raises(SinkAway, match="no answer"):
                await sender.step()
            now[0] += 60
        [row] = await database.read(lambda c: c.execute(select(outbox.c.tries).distinct()).all())
        assert row.tries == 60
    async with serving(receiver) as url:
        moved = Sink("meter", SinkType.CLOUDEVENTS, url)
        async with sending(database, moved, tmp_path, now_unix_s=lambda: now[0]) as sender:
            await drained(database, sender)
    assert receiver.values == expected(range(1, 2))


async def test_an_event_that_is_refused_is_put_off_and_stops_no_other(database: Database, tmp_path: Path) -> None:
    receiver, now = Receiver(SinkType.CLOUDEVENTS), [NOW_S]

    def facts(connection: Connection) -> None:
        writers(connection)
        for number in range(1, 6):
            attempt(connection, number)
        connection.execute(runtime_request.update().where(runtime_request.c.seq == 3).values(model="acme/poison"))
        cursors(connection, 5, 11)

    async with serving(receiver) as url:
        sink = Sink("meter", SinkType.CLOUDEVENTS, url, meters=(Meter.REQUESTS,))
        await database.write(lambda c: feed(c, sink, 0))
        await database.write(facts)
        async with sending(database, sink, tmp_path, now_unix_s=lambda: now[0]) as sender:
            await sender.step()
            assert len(receiver.values) == 4
            [row] = await database.read(lambda c: c.execute(select(outbox)).all())
            assert row.error == "refused: 400 no such subject"
            before = len(receiver.requests)
            await sender.step()
            assert len(receiver.requests) == before
            now[0] += REFUSED_RETRY_S
            await sender.step()
            assert len(receiver.requests) == before + 1


async def test_a_missing_right_or_address_is_no_refusal_of_events(database: Database, tmp_path: Path) -> None:
    def facts(connection: Connection) -> None:
        writers(connection)
        attempt(connection, 1)
        cursors(connection, 1, 3)

    receiver = Receiver(SinkType.CLOUDEVENTS)
    async with serving(receiver) as url:
        wrong = Sink("meter", SinkType.CLOUDEVENTS, url + "x")
        await database.write(lambda c: feed(c, wrong, 0))
        await database.write(facts)
        sink = Sink("meter", SinkType.CLOUDEVENTS, url, "t")
        for one, words in ((wrong, "answered 404"), (sink, "is not in the Secret")):
            async with sending(database, one, tmp_path) as sender:
                with pytest.raises(SinkAway, match=words):
                    await sender.step()
        (tmp_path / "t").write_text("secret\n")
        async with sending(database, sink, tmp_path) as sender:
            await drained(database, sender)
    assert receiver.requests[-1].headers["Authorization"] == "Bearer secret"
    assert len(receiver.values) == 4


async def fed(database: Database, now_ms: int = NOW_S * 1000) -> list[str]:
    """Events in the outbox after feeding, as numbers of attempts with the meters' initials."""
    await database.write(lambda c: feed(c, SINK, now_ms))
    rows = await database.read(lambda c: c.execute(select(outbox.c.event_id).order_by(outbox.c.id)).scalars().all())
    return [f"{int(one[24:36])}{one[37]}" if one.startswith("019a") else one for one in rows]


SINK = Sink("meter", SinkType.CLOUDEVENTS, "http://sink.example/")
USAGE_METERS = [meter for meter in Meter if meter is not Meter.CORRECTIONS]


async def test_only_what_is_billed_is_sent_and_each_attempt_once(database: Database) -> None:
    def facts(connection: Connection) -> None:
        writers(connection)
        attempt(connection, 1)
        attempt(connection, 2, runtime="cancelled", closed="client_left")
        attempt(connection, 3, runtime="failed", closed="failed")
        attempt(connection, 4, closed="withheld")
        attempt(connection, 5, runtime="lost", closed="lost")
        attempt(connection, 6, runtime="", closed="refused")
        cursors(connection, 6, 13)

    await database.write(lambda c: feed(c, SINK, 0))
    await database.write(facts)
    once = ["1p", "1c", "1c", "1r", "2p", "2c", "2c", "2r"]
    assert await fed(database) == once
    assert await fed(database) == once


async def test_an_attempt_waits_for_its_other_half_and_not_for_ever(database: Database) -> None:
    def facts(connection: Connection) -> None:
        writers(connection)
        attempt(connection, 1, closed="")
        attempt(connection, 2)
        cursors(connection, 2, 5)

    await database.write(lambda c: feed(c, SINK, 0))
    await database.write(facts)
    assert await fed(database) == []
    assert len(await fed(database, NOW_S * 1000 + GATEWAY_GRACE_MS)) == 8


@pytest.mark.parametrize("ended", [True, False])
async def test_what_a_lost_runtime_did_is_sent_as_the_gateway_saw_it(database: Database, ended: bool) -> None:
    def facts(connection: Connection) -> None:
        writers(connection)
        attempt(connection, 1, runtime="")
        cursors(connection, 0, 3)
        if ended:
            connection.execute(boot.update().values(ended_unix_ms=NOW_S * 1000, end="gone"))

    await database.write(lambda c: feed(c, SINK, 0))
    await database.write(facts)
    assert len(await fed(database)) == (4 if ended else 0)
    assert len(await fed(database, NOW_S * 1000 + RUNTIME_GRACE_MS)) == 4


async def test_a_remainder_is_sent_under_the_number_of_its_process(database: Database) -> None:
    def facts(connection: Connection) -> None:
        writers(connection)
        attempt(connection, 7, closed="")
        connection.execute(runtime_request.update().values(attempt="", requests=3, first_seq=5))
        cursors(connection, 7, 0)

    await database.write(lambda c: feed(c, SINK, 0))
    await database.write(facts)
    assert await fed(database) == [f"boot-1.7-{meter}" for meter in USAGE_METERS]


async def test_a_new_sink_begins_with_what_ends_after_it_was_listed(database: Database) -> None:
    def facts(connection: Connection) -> None:
        writers(connection)
        attempt(connection, 1)
        cursors(connection, 1, 3)

    await database.write(facts)
    assert await fed(database) == []


def corrected(connection: Connection, number: int, amount: str, **given: Any) -> None:
    """A correction with this number, recorded a second ago; a later number may be committed first."""
    row = {"correction_id": f"ticket-{number}", "recorded_unix_s": NOW_S - 1, "concerns_unix_s": T0_MS // 1000}
    row |= {"project": "acme", "model": "acme/tone", "prompt_tokens": -7, "amount": amount, "currency": "EUR"}
    row |= {"reason": "an outage", "author": "billing"}
    connection.execute(insert(correction).values(id=number, **row | given))


@pytest.mark.parametrize("type", SinkType)
async def test_a_correction_is_delivered_once_whatever_acknowledgements_are_lost(
    database: Database, tmp_path: Path, type: SinkType
) -> None:
    chance = random.Random(15)
    receiver = Receiver(type, lambda _: chance.choice(["lose", "fail", "busy", ""]))
    async with serving(receiver) as url:
        sink = Sink("meter", type, url)
        await database.write(lambda c: corrected(c, 1, "-1", recorded_unix_s=NOW_S - 9))  # before it was listed
        await database.write(lambda c: feed(c, sink, NOW_S * 1000 - 5000))
        async with sending(database, sink, tmp_path) as sender:
            for number, amount in ((9, "-12.50"), (8, "3"), (7, "0.000001")):
                await database.write(lambda c, number=number, amount=amount: corrected(c, number, amount))  # type: ignore[misc]
                await drained(database, sender)
            await drained(database, sender)
    amounts = {"correction-ticket-9": "-12.50", "correction-ticket-8": "3", "correction-ticket-7": "0.000001"}
    assert receiver.values == ({} if type is SinkType.STRIPE else amounts)
    assert all(len(bodies) == 1 for bodies in receiver.bodies.values()), "a resent event had other bytes"


async def test_a_sink_that_wants_no_corrections_gets_none(database: Database) -> None:
    sink = Sink("meter", SinkType.CLOUDEVENTS, "http://sink.example/", meters=(Meter.REQUESTS,))
    await database.write(lambda c: feed(c, sink, 0))
    await database.write(lambda c: corrected(c, 1, "-1"))
    await database.write(lambda c: feed(c, sink, NOW_S * 1000))
    assert await database.read(lambda c: c.execute(select(outbox.c.id)).all()) == []


USAGE = Usage("a-1", T0_MS + 5, "acme", "key", "acme/<b>", "completed", {Meter.COMPLETION_TOKENS: 7, Meter.REQUESTS: 0})


def test_the_shapes_are_those_of_the_specifications() -> None:
    [event] = events_of(Sink("a", SinkType.CLOUDEVENTS, "u", subjects=(("acme", "cus_1"),)), USAGE)
    assert json.loads(event.body) == {
        "specversion": "1.0",
        "id": "a-1-completion_tokens",
        "source": "lorapool/ledger",
        "type": "dev.lorapool.usage",
        "subject": "cus_1",
        "time": "2026-11-01T00:00:00.005Z",
        "datacontenttype": "application/json",
        "data": {
            "meter": "completion_tokens",
            "value": 7,
            "project": "acme",
            "model": "acme/<b>",
            "api_key_id": "key",
            "outcome": "completed",
        },
    }
    [event] = events_of(Sink("a", SinkType.LAGO, "u"), USAGE)
    assert json.loads(event.body) == {
        "transaction_id": "a-1-completion_tokens",
        "external_subscription_id": "acme",
        "code": "lorapool_completion_tokens",
        "timestamp": f"{T0_MS // 1000}.005",
        "properties": {"value": 7, "model": "acme/<b>", "api_key_id": "key"},
    }
    [event] = events_of(Sink("a", SinkType.STRIPE, "u"), USAGE)
    assert dict(parse_qsl(event.body)) == {
        "event_name": "lorapool_completion_tokens",
        "identifier": "a-1-completion_tokens",
        "timestamp": str(T0_MS // 1000),
        "payload[stripe_customer_id]": "acme",
        "payload[value]": "7",
    }


CORRECTION = Correction(
    "ticket-1", T0_MS // 1000, 0, "acme", "acme/<b>", -7, 0, 0, Decimal("-12.50"), "EUR", "an outage", "billing"
)


def test_the_shapes_of_corrections_carry_the_amount() -> None:
    event = correction_event(Sink("a", SinkType.CLOUDEVENTS, "u", subjects=(("acme", "cus_1"),)), CORRECTION, "key")
    assert event is not None
    assert json.loads(event.body) == {
        "specversion": "1.0",
        "id": "correction-ticket-1",
        "source": "lorapool/ledger",
        "type": "dev.lorapool.correction",
        "subject": "cus_1",
        "time": "2026-11-01T00:00:00.000Z",
        "datacontenttype": "application/json",
        "data": {
            "meter": "corrections",
            "value": "-12.50",
            "project": "acme",
            "currency": "EUR",
            "model": "acme/<b>",
            "api_key_id": "key",
            "reason": "an outage",
            "prompt_tokens": -7,
            "cached_tokens": 0,
            "completion_tokens": 0,
            "concerns": "1970-01-01T00:00:00.000Z",
        },
    }
    event = correction_event(Sink("a", SinkType.LAGO, "u"), CORRECTION, "")
    assert event is not None
    assert json.loads(event.body) == {
        "transaction_id": "correction-ticket-1",
        "external_subscription_id": "acme",
        "code": "lorapool_corrections",
        "timestamp": f"{T0_MS // 1000}.000",
        "properties": {
            "value": "-12.50",
            "currency": "EUR",
            "model": "acme/<b>",
            "api_key_id": "",
            "reason": "an outage",
        },
    }


GOOD = "{name: a, type: lago, url: 'https://lago.example/api/v1/events/batch'}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sinks: [", "is not YAML"),
        ("[]: 1", "mapping"),
        ("sink: []", "mapping with the list `sinks` alone"),
        ("sinks: [5]", "sinks[0] has to be a mapping"),
        ("sinks: [{name: A, type: lago, url: 'http://a'}]", "sinks[0].name 'A' has to be"),
        ("sinks: [{name: a, type: mqtt, url: 'http://a'}]", "sinks[0].type has to be one of cloudevents, lago, stripe"),
        ("sinks: [{name: a, type: lago, url: 'file:///etc/passwd'}]", "sinks[0].url has to be"),
        ("sinks: [{name: a, type: lago, url: 'http://u:p@a'}]", "without a user or password"),
        ("sinks: [{name: a, type: lago, url: 'http://a', tokenKey: ../x}]", "tokenKey '../x' has to be a key"),
        ("sinks: [{name: a, type: lago, url: 'http://a', tokenKey: ..}]", "has to be a key"),
        (
            "sinks: [{name: a, type: lago, url: 'http://a', meters: [bytes]}]",
            "meters has to be a list of prompt_tokens",
        ),
        (
            "sinks: [{name: a, type: stripe, url: 'http://a', meters: [corrections]}]",
            "Stripe has no event for corrections; enter them there as credit notes",
        ),
        ("sinks: [{name: a, type: lago, url: 'http://a', subjects: {x: 1}}]", "subjects has to map"),
        ("sinks: [{name: a, type: lago, url: 'http://a', token: t}]", "sinks[0].token is unknown"),
        (f"sinks: [{GOOD}, {GOOD}]", "two sinks have the same name"),
    ],
)
def test_a_list_of_sinks_that_cannot_be_used_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(SinksError) as raised:
        parse_sinks(text)
    assert words in str(raised.value)


async def test_the_list_is_followed_and_a_wrong_one_stops_no_sink(database: Database, tmp_path: Path) -> None:
    metrics = Metrics()

    def refused() -> float:
        return metrics.registry.get_sample_value("lorapool_ledger_configuration_refused", {"file": "sinks"}) or 0.0

    async with aiohttp.ClientSession() as session:
        sinks = Sinks(database, tmp_path, tmp_path, session, metrics)
        for text, names, wrong in (
            (None, [], 0),
            (f"sinks: [{GOOD}]", ["a"], 0),
            ("sinks: [", ["a"], 1),
            (f"sinks: [{GOOD.replace('name: a', 'name: b')}]", ["b"], 0),
        ):
            if text is not None:
                (tmp_path / "sinks.yaml").write_text(text)
            sinks._follow()
            assert [sink.name for sink in sinks._senders] == names
            assert refused() == wrong
        task = asyncio.create_task(sinks.run())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert sinks._senders == {}
