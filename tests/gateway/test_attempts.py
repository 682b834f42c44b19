"""Every ending of an attempt, as the gateway records it for the ledger. `world` checks that each is closed once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence

import aiohttp
import pytest
from fakes import FailsLate, FakeRuntime, Seen
from gateway_world import KEY, World, adapter_object, api_key, base_object, cut_after, key_of, until, world

from lorapool_api.openai import InvalidRequestError, TooManyRequestsError
from lorapool_api.protocol import Usage
from lorapool_api.usage_protocol import HEADER_KEY, HEADER_PROJECT, AttemptEnd, OpenedRecord, RefusalsRecord
from lorapool_gateway.ledger.attempts import payer
from lorapool_gateway.ledger.records import Opened, Record
from lorapool_gateway.routing.auth import KeyTable
from lorapool_gateway.routing.objects import adapter_route, base_route
from lorapool_gateway.routing.routes import Entry


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        made.base(coldStart={"maxWait": "2s"})
        made.adapter("route")
        made.keys.publish(KeyTable.of([api_key(KEY, uid="uid-key", owner="team", default_namespace="team-a")]))
        yield made


@pytest.fixture
async def runtime(here: World) -> AsyncIterator[FakeRuntime]:
    async with FakeRuntime().running() as made:
        here.replica(made)
        yield made


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_has_a_record_before_and_one_after_it(here: World, runtime: FakeRuntime, stream: bool) -> None:
    here.replica(runtime)
    answer = await here.post(here.ask("route", stream=stream), headers={"x-request-id": "mine"})
    assert answer.status == 200
    opened, closed = here.records()
    assert isinstance(opened, OpenedRecord)
    adapter = key_of("route")
    assert (opened.attempt, opened.request_id, opened.key_uid, opened.key, opened.owner) == (
        closed.attempt, "mine", "uid-key", KEY[:6], "team",
    )  # fmt: skip
    assert (opened.project, opened.model, opened.uid, opened.digest) == (
        "demo", "demo/route", adapter.uid, adapter.digest,
    )  # fmt: skip
    assert (opened.base, opened.base_uid, opened.pod_uid, opened.boot_id) == (
        "demo/tiny", "base-demo-tiny", "uid-pod-a", "boot-1",
    )  # fmt: skip
    assert (opened.route, opened.stream) == ("/v1/chat/completions", stream)
    assert (closed.outcome, closed.code, closed.completion_tokens) == ("completed", 200, 6)
    assert closed.prompt_tokens
    [seen] = [item for item in runtime.seen if item.completion_tokens]
    headers = {name.lower(): value for name, value in seen.headers.items()}
    assert (headers[HEADER_KEY], headers[HEADER_PROJECT]) == ("uid-key", "demo")
    assert headers["x-lorapool-attempt"] == opened.attempt


async def test_no_runtime_knows_an_attempt_before_the_journal_has_it(here: World, runtime: FakeRuntime) -> None:
    unknown, groups, write = list[str](), Counter[int](), here.journal.write

    def count(records: Sequence[Record], parties: Mapping[int, bytes]) -> list[Record]:
        groups[len(records)] += 1
        return write(records, parties)

    here.journal.write = count  # type: ignore[method-assign]

    class Watched(list[Seen]):
        def append(self, seen: Seen) -> None:
            opened = {record.attempt for record in here.written() if isinstance(record, OpenedRecord)}
            if seen.headers["x-lorapool-attempt"] not in opened:
                unknown.append(seen.target)
            super().append(seen)

    runtime.seen = Watched()
    for _ in range(3):
        await asyncio.gather(*(here.post(here.ask("route", stream=bool(number % 2))) for number in range(20)))
    assert len(runtime.seen) >= 60  # and those that found the adapter not registered
    assert unknown == []
    assert max(groups) > 1  # those of one turn of the event loop are written together


async def test_an_attempt_that_the_journal_gave_up_has_no_end_and_is_answered(
    here: World, runtime: FakeRuntime
) -> None:
    refused, write = 7, here.journal.write

    def refuse(records: Sequence[Record], parties: Mapping[int, bytes]) -> list[Record]:
        nonlocal refused
        if not refused or not any(isinstance(record, Opened) for record in records):
            return write(records, parties)
        refused -= 1
        return list(records)

    here.journal.write = refuse  # type: ignore[method-assign]
    answers = [await here.post(here.ask("route")) for _ in range(10)]
    assert [answer.status for answer in answers] == [200] * 10
    assert here.ends() == [("completed", 200)] * 3
    assert here.attempts._given_up == set()


async def test_a_request_whose_client_leaves_in_the_turn_in_which_it_would_be_sent_is_not_sent(
    here: World, runtime: FakeRuntime
) -> None:
    response = await here.http.send(runtime.url, "POST", "/v1/chat/completions", {}, b"{}")
    response.close()
    again = await here.http.send(runtime.url, "GET", "/healthz", {}, b"")
    assert await again.head()
    assert again.status == 200
    assert runtime.seen == []
    again.close()


async def test_what_a_client_sends_under_an_internal_name_is_neither_trusted_nor_forwarded(
    here: World, runtime: FakeRuntime
) -> None:
    forged = {
        f"{case(HEADER[:10])}{HEADER[10:]}": "forged"
        for HEADER in (HEADER_KEY, HEADER_PROJECT, "x-lorapool-attempt", "x-lorapool-tenant", "x-lorapool-adapter",
                       "x-lorapool-usage", "x-lorapool-new")
        for case in (str.lower, str.upper)
    }  # fmt: skip
    answer = await here.post(here.ask("route"), headers=forged)
    assert answer.status == 200
    for seen in runtime.seen:
        assert "forged" not in " ".join(seen.headers.values())
    assert all("forged" not in record.dump().values() for record in here.records())
    assert "forged" not in " ".join(answer.headers.values())


async def test_a_thousand_requests_of_one_request_id_are_a_thousand_attempts(here: World, runtime: FakeRuntime) -> None:
    async def ask() -> None:
        assert (await here.post(here.ask("tiny"), headers={"x-request-id": "same"})).status == 200

    for _ in range(10):
        await asyncio.gather(*(ask() for _ in range(100)))
    assert here.ends() == [("completed", 200)] * 1000


async def test_a_secret_that_is_made_again_while_a_request_is_held_is_the_key_that_pays(here: World) -> None:
    asking = asyncio.create_task(here.post(here.ask("tiny")))
    await until(lambda: here.sample("held_requests", base="demo/tiny") == 1)
    here.keys.publish(KeyTable.of([api_key(KEY, uid="uid-again", default_namespace="team-b")]))
    async with FakeRuntime().running() as runtime:
        here.replica(runtime)
        assert (await asking).status == 200
    opened = here.records()[0]
    assert isinstance(opened, OpenedRecord)
    assert (opened.key_uid, opened.project) == ("uid-again", "team-b")


async def test_an_adapter_that_is_deleted_while_it_answers_is_paid_by_its_namespace(
    here: World, runtime: FakeRuntime
) -> None:
    runtime.words, runtime.token_s = 50, 0.01
    asking = asyncio.create_task(here.post(here.ask("route", stream=True)))
    await until(lambda: runtime.seen and runtime.seen[-1].completion_tokens)
    del here.adapters["demo/route"]
    here.publish()
    assert (await asking).status == 200
    await until(lambda: here.gateway.in_flight == 0)
    opened, closed = here.records()[-2:]
    assert (opened.uid, opened.project, closed.outcome) == (key_of("route").uid, "demo", "completed")
    assert closed.completion_tokens == 50


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_one_and_its_tokens_are_those_computed(
    here: World, runtime: FakeRuntime, stream: bool
) -> None:
    runtime.words, runtime.token_s = 1000, 0.01
    with pytest.raises(TimeoutError):
        await here.post(here.ask("tiny", stream=stream), timeout=aiohttp.ClientTimeout(total=0.5))
    await until(lambda: here.gateway.in_flight == 0)
    assert here.ends() == [("client_left", 499)]
    counted = runtime.seen[0].completion_tokens  # the last one may have been counted and not yet sent
    assert here.records()[1].completion_tokens in (counted - 1, counted)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_lost_runtime_before_and_after_the_admission(here: World, runtime: FakeRuntime, stream: bool) -> None:
    runtime.faults.die_before_head = 1
    assert (await here.post(here.ask("tiny", stream=stream))).status == 200
    assert here.ends() == [("lost", 0), ("completed", 200)]
    runtime.words, runtime.token_s = 200, 0.002
    asking = asyncio.create_task(here.post(here.ask("tiny", stream=stream)))
    await cut_after(runtime, 120)
    await asking
    await until(lambda: here.gateway.in_flight == 0)
    assert here.ends()[2:] == [("lost", 502 if stream else 503)]
    assert here.records()[-1].completion_tokens


async def test_a_stream_without_an_end_is_lost(here: World, runtime: FakeRuntime) -> None:
    runtime.faults.end_early = True
    await here.post(here.ask("tiny", stream=True))
    await until(lambda: here.gateway.in_flight == 0)
    assert here.ends() == [("lost", 502)]


async def test_an_error_of_the_runtime_after_the_admission(here: World) -> None:
    async with FailsLate().running() as runtime:
        here.replica(runtime)
        await here.post(here.ask("tiny"))
    assert here.ends() == [("failed", 500)]


@pytest.mark.parametrize("error", [InvalidRequestError("no"), TooManyRequestsError("full")])
async def test_an_error_of_the_runtime_in_place_of_the_admission(
    here: World, runtime: FakeRuntime, error: Exception
) -> None:
    runtime.faults.load_failure = error  # type: ignore[assignment]
    answer = await here.post(here.ask("route"))
    assert here.ends()[-1] == ("refused", answer.status)


async def test_replicas_that_refuse_and_the_one_that_answers(here: World, runtime: FakeRuntime) -> None:
    async with FakeRuntime().running() as second:
        runtime.faults.draining = True
        here.replica(second, "pod-b")
        await asyncio.gather(*(here.post(here.ask("tiny")) for _ in range(8)))
    ends = here.ends()
    assert ends.count(("completed", 200)) == 8
    assert set(ends) <= {("completed", 200), ("refused", 0)}


async def test_an_answer_of_other_weights_is_withheld(here: World, runtime: FakeRuntime) -> None:
    runtime.faults.wrong_identity = "demo/other@sha256:0"
    await here.post(here.ask("tiny"))
    assert here.ends() == [("withheld", 500)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_ended_at_its_deadline(runtime: FakeRuntime, stream: bool) -> None:
    runtime.words, runtime.token_s = 1000, 0.01
    async with world(deadline_s=0.3) as short:
        short.base()
        short.replica(runtime)
        await short.post(short.ask("tiny", stream=stream))
        await until(lambda: short.gateway.in_flight == 0)
        assert short.ends() == [("timeout", 502 if stream else 503)]
        assert short.records()[1].completion_tokens


async def test_a_request_that_is_ended_since_the_process_stops(here: World, runtime: FakeRuntime) -> None:
    runtime.words, runtime.token_s = 1000, 0.01
    asking = asyncio.create_task(here.post(here.ask("tiny")))
    await until(lambda: runtime.seen)
    here.gateway.end_requests()
    assert (await asking).status == 503
    assert here.ends() == [("timeout", 503)]


async def test_a_load_that_takes_too_long(here: World, runtime: FakeRuntime) -> None:
    runtime.load_s = 60
    assert (await here.post(here.ask("route"), timeout=aiohttp.ClientTimeout(total=30))).status == 503
    assert here.ends()[-1] == ("timeout", 503)


async def test_usage_that_no_request_has_is_not_recorded(here: World, runtime: FakeRuntime) -> None:
    target = here.routes.table.resolve("tiny", api_key(KEY), 0)
    [replica] = here.routes.table.replicas_of(target.base)
    for usage in (Usage(prompt_tokens=2**63, completion_tokens=1), Usage(prompt_tokens=-1, completion_tokens=1)):
        opened = here.attempts.open(target, replica, api_key(KEY), "r", "/v1/completions", stream=False)  # type: ignore[arg-type]
        opened.close(AttemptEnd.COMPLETED, 200, usage, None)
        opened.close(AttemptEnd.FAILED, 200, usage, None)
        here.attempts.write()
        assert here.records()[-1].prompt_tokens is None


async def test_refusals_without_an_attempt_are_counted_by_minute_and_unknown_keys_in_one_row(here: World) -> None:
    clock = [6000.0]
    here.attempts._now_unix_s = lambda: clock[0]
    for number in range(5):
        await here.post(here.ask("tiny"), headers={"Authorization": f"Bearer lp-{number}"})
    await here.post(here.ask("unknown"))
    await here.post(b"{")
    here.bases["demo/tiny"]["status"]["start"] = {"reason": "X", "retryAt": "2099-01-01T00:00:00Z"}
    here.bases["demo/tiny"]["spec"]["replicas"] = 0
    here.publish()
    await here.post(here.ask("tiny"))
    clock[0] += 60
    here.attempts._flush_before(6060)
    rows = {
        (row.key_uid, row.project, row.code): (row.count, row.minute_unix_s)
        for row in here.records() if isinstance(row, RefusalsRecord)
    }  # fmt: skip
    assert rows == {
        ("", "", "invalid_api_key"): (5, 6000),
        ("uid-key", "", "model_not_found"): (1, 6000),
        ("uid-key", "", "invalid_json"): (1, 6000),
        ("uid-key", "team-a", "base_start_failed"): (1, 6000),
    }


async def test_calls_that_generate_nothing_are_not_recorded(here: World, runtime: FakeRuntime) -> None:
    await here.post({"model": "tiny", "prompt": "x"}, path="/tokenize")
    assert here.records() == []


def test_who_pays() -> None:
    base: Entry = base_route(base_object("tiny", "models"))
    adapter: Entry = adapter_route(adapter_object("x", "team-a", base_namespace="models"))
    every, one = api_key(KEY), api_key(KEY, "team-b")
    several = api_key(KEY, "team-b,models")
    default = api_key(KEY, "team-b,models", default_namespace="team-b")
    assert [payer(adapter, key) for key in (every, default)] == ["team-a"] * 2
    assert [payer(base, key) for key in (every, one, several, default)] == ["models", "team-b", "models", "team-b"]
