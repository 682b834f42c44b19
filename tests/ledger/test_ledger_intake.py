"""Intake: double delivery is harmless, holes are never silent, facts and cursor are one transaction."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import ledger_kit as kit
import pytest
from aiohttp import web
from ledger_kit import T0_MS, T0_S, FakeRuntime, batch, closed, opened, request, rows, until
from pydantic import ValidationError
from sqlalchemy import Connection, text

from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_api.trust.tls import ReleaseTrust
from lorapool_api.usage_protocol import (
    ROUTE_ATTEMPTS,
    Ended,
    GatewayBatch,
    MinuteLine,
    RefusalsRecord,
    RemainderRecord,
    RuntimeRecord,
)
from lorapool_ledger.intake import gateway_batch, runtime_page
from lorapool_ledger.intake.attempts_api import AttemptsIntake
from lorapool_ledger.intake.pulls import PulledPod, Pulls
from lorapool_ledger.intake.runtime_page import Pod, holes
from lorapool_ledger.metrics import Metrics
from lorapool_ledger.store import tables
from lorapool_ledger.store.database import Database, DatabaseAwayError
from lorapool_ledger.sums.rollups import RollUps

POD = Pod("pod-1", "runtime-1", "base-1", "acme/base")
TOKEN = "t" * 40


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


async def send(database: Database, sent: GatewayBatch) -> gateway_batch.Taken:
    return await database.write(lambda connection: gateway_batch.take(connection, sent, sent.now_unix_ms // 1000))


async def page(database: Database, records: list[RuntimeRecord], boot_id: str = "boot-1") -> runtime_page.PageTaken:
    return await database.write(
        lambda connection: runtime_page.take(connection, POD, boot_id, records, [], T0_MS + 60_000, T0_S)
    )


# --- batches of gateways -----------------------------------------------------------------


def test_parties_that_a_batch_names_once_are_those_of_each_record_that_refers_to_them() -> None:
    sent = batch([opened(1, 1), opened(2, 2, project="zeta"), closed(3, 1), opened(4, 3)]).model_dump(by_alias=True)
    own = {"kind", "seq", "attempt", "requestId", "openedUnixMs"}
    short = sent | {"parties": {}, "records": []}
    for record in sent["records"]:
        if record["kind"] == "opened":
            number = {"acme": 7, "zeta": 12}[record["project"]]
            short["parties"][str(number)] = {name: value for name, value in record.items() if name not in own}
            record = {name: value for name, value in record.items() if name in own} | {"parties": number}
        short["records"].append(record)
    assert GatewayBatch.model_validate_json(json.dumps(short)) == GatewayBatch.model_validate(sent)
    assert GatewayBatch.model_validate_json(json.dumps(short | {"parties": {}, "records": []})).records == []


@pytest.mark.parametrize("parties", [{}, [], None, 1, {"1": 5}, {"1": {}}, {"1": {"project": "acme"}}, {"01": {}}])
def test_a_batch_whose_parties_are_not_there_is_refused(parties: Any) -> None:
    record = {"kind": "opened", "seq": 1, "attempt": "a", "requestId": "r", "parties": 1, "openedUnixMs": 5}
    given = {"bootId": "b", "gateway": "g", "nowUnixMs": 1, "parties": parties, "records": [record]}
    with pytest.raises(ValidationError):
        GatewayBatch.model_validate_json(json.dumps(given))


async def test_a_batch_that_is_sent_again_changes_nothing(database: Database) -> None:
    sent = batch([opened(1, 1), closed(2, 1), opened(3, 2)])
    for _ in range(3):
        assert (await send(database, sent)).through == 3
    longer = batch([*sent.records[1:], closed(4, 2)])
    assert (await send(database, longer)).through == 4
    assert len(await rows(database, tables.attempt_opened)) == len(await rows(database, tables.attempt_closed)) == 2
    assert await rows(database, tables.finding) == []


async def test_a_batch_ahead_of_the_cursor_is_refused_whole_and_the_lost_part_must_be_said(database: Database) -> None:
    await send(database, batch([opened(1, 1)]))
    refused = await send(database, batch([opened(3, 3)]))
    assert (refused.conflict, refused.through) == (True, 1)
    inner = await send(database, batch([opened(2, 2), opened(4, 4)]))
    assert (inner.conflict, inner.through) == (True, 1)
    assert len(await rows(database, tables.attempt_opened)) == 1
    taken = await send(database, batch([opened(3, 3)], lost_before=3))
    assert (taken.conflict, taken.through, len(taken.gaps)) == (False, 3, 1)
    (finding,) = await rows(database, tables.finding)
    assert (finding["check"], "records 2 to 2" in finding["message"]) == ("gap", True)


async def test_records_out_of_order_are_refused(database: Database) -> None:
    for numbers in ((2, 1), (1, 1), (0, 1), (1, 2**64)):
        with pytest.raises(gateway_batch.DisorderError):
            await send(database, batch([opened(seq, index) for index, seq in enumerate(numbers)]))


async def test_the_same_request_id_a_thousand_times_is_a_thousand_attempts(database: Database) -> None:
    sent = [opened(seq, seq, request_id="chosen by the client") for seq in range(1, 1001)]
    assert (await send(database, batch(sent))).through == 1000
    assert len(await rows(database, tables.attempt_opened)) == 1000


async def test_an_attempt_that_another_process_claims_counts_once_and_is_reported(database: Database) -> None:
    await send(database, batch([opened(1, 1, project="acme")]))
    await send(database, batch([opened(1, 1, project="evil")], boot_id="gateway-2"))
    assert [row["project"] for row in await rows(database, tables.attempt_opened)] == ["acme"]
    assert [row["check"] for row in await rows(database, tables.finding)] == ["twice"]


async def test_the_first_of_two_records_of_an_attempt_counts_and_the_second_is_reported(database: Database) -> None:
    sent = [opened(1, 1), closed(2, 1, completion_tokens=5), closed(3, 1, completion_tokens=9), opened(4, 1, key="b")]
    await send(database, batch([*sent, opened(5, 2, attempt="a\x00b"), opened(6, 3, attempt="ab")]))
    assert [row["completion_tokens"] for row in await rows(database, tables.attempt_closed)] == [5]
    assert sorted(row["seq"] for row in await rows(database, tables.attempt_opened)) == [1, 5]
    subjects = {row["subject"].split("/")[0] for row in await rows(database, tables.finding)}
    assert (subjects, len(await rows(database, tables.finding))) == ({"opened", "closed"}, 3)


async def test_a_transaction_that_fails_keeps_the_cursor(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("killed before the commit")

    with monkeypatch.context() as patch:
        patch.setattr(gateway_batch, "mark_dirty", fail)
        with pytest.raises(RuntimeError):
            await send(database, batch([opened(1, 1), closed(2, 1)]))
    assert await rows(database, tables.gateway) == await rows(database, tables.attempt_opened) == []
    assert (await send(database, batch([opened(1, 1), closed(2, 1)]))).new == 2


async def test_texts_and_counts_that_no_column_holds_do_not_stop_a_writer(database: Database) -> None:
    huge = closed(2, 1, completion_tokens=2**80, code=10**12, closed_unix_ms=2**70)
    await send(database, batch([opened(1, 1, request_id="a\x00b", owner="é" * 128), huge]))
    assert (await rows(database, tables.attempt_closed))[0]["completion_tokens"] == 2**40
    odd = request(1, 9, prompt_tokens=2**90, ended_unix_ms=-5, request_id="\x00")
    await page(database, [odd, kit.minute(2, lines=[MinuteLine(uid="x" * 99, byte_ns=10**50)])])
    assert (await rows(database, tables.runtime_request))[0]["prompt_tokens"] == 2**40
    folded = RemainderRecord(seq=3, first_seq=2**90, hour_unix_s=2**70, outcome=Ended.LOST, requests=2**80)
    twice = [MinuteLine(uid="x"), MinuteLine(uid="x")]
    await page(database, [folded, kit.minute(4, lines=twice), kit.end(5, ended_unix_ms=2**80, killed=True)])
    assert [row["cursor_seq"] for row in await rows(database, tables.boot)] == [5]


async def test_a_pod_cannot_write_records_of_another_ones_process(database: Database) -> None:
    await page(database, [kit.boot(), request(2, 1)])
    before = await rows(database, tables.boot)
    liar = Pod("pod-2", "runtime-2", "base-1", "acme/base")
    for boot_id, seq in (("boot-1", 3), ("boot-2", 0), ("boot-2", 2**63), ("boot/2", 1), ("", 1), ("b" * 65, 1)):
        records = [request(seq, 9)]
        with pytest.raises(runtime_page.PageError):
            await database.write(
                lambda connection, boot_id=boot_id, records=records: runtime_page.take(  # type: ignore[misc]
                    connection, liar, boot_id, records, [], T0_MS, T0_S
                )
            )
    assert await rows(database, tables.boot) == before
    assert (await page(database, [request(3, 2)])).new == 1  # nothing of the true process was skipped


async def test_no_lie_of_a_pod_stops_the_sums(database: Database) -> None:
    huge = {"prompt_tokens": 2**80, "cached_tokens": 2**80, "completion_tokens": 2**80, "gpu_ns": 2**80}
    requests = [request(seq, seq, **huge) for seq in range(2, 1002)]
    await page(database, [kit.boot(), *requests, request(1002, 1002, prompt_tokens=3, cached_tokens=7)])
    await RollUps(database, Metrics(), now_s=lambda: T0_S + 60).catch_up()
    (row,) = await rows(database, tables.usage_hour)
    assert (row["requests"], row["billed_prompt_tokens"]) == (1001, 0)


async def test_refusals_and_keys_are_kept(database: Database) -> None:
    refused = RefusalsRecord(seq=3, minute_unix_s=T0_S, code="rate_limit_exceeded", count=7)
    await send(database, batch([opened(1, 1), opened(2, 2), refused]))
    assert [row["count"] for row in await rows(database, tables.refusal_minute)] == [7]
    assert await rows(database, tables.api_key) == [{"key_uid": "key-1", "key": "acme-key", "owner": ""}]


# --- pages of runtimes -------------------------------------------------------------------


async def test_a_page_that_is_read_again_changes_nothing(database: Database) -> None:
    records = [kit.boot(), request(2, 1), kit.checkpoint(3, [request(2, 1)]), kit.minute(4), kit.end(5)]
    assert [(await page(database, records)).new for _ in range(3)] == [5, 0, 0]
    (boot,) = await rows(database, tables.boot)
    assert (boot["cursor_seq"], boot["end"], boot["device"]) == (5, "stopped", "cpu")


async def test_a_hole_in_the_numbers_is_a_finding(database: Database) -> None:
    taken = await page(database, [kit.boot(), request(2, 1), request(5, 2)])
    assert taken.gaps == ["records 3 to 4 of runtime process boot-1 never arrived"]
    assert [row["subject"] for row in await rows(database, tables.finding)] == ["runtime/boot-1/3"]


def test_numbers_that_were_folded_are_no_hole() -> None:
    remainder = RemainderRecord(seq=9, first_seq=2, hour_unix_s=T0_S, outcome=Ended.COMPLETED, requests=7)
    assert holes(0, [kit.boot(), remainder, request(10, 1)]) == []
    assert holes(0, [kit.boot(), kit.minute(9, uptime_s=300), request(10, 1)]) == []
    assert holes(0, [kit.boot(), remainder, request(12, 1)]) == [(10, 11)]
    assert holes(0, [kit.boot(), kit.minute(9), request(10, 1)]) == [(2, 8)]


async def test_each_half_marks_the_hours_in_which_the_sums_have_the_attempt(database: Database) -> None:
    late = T0_MS + 7 * 3_600_000
    await page(database, [kit.boot(), request(2, 1)])
    await database.write(lambda connection: connection.execute(text("DELETE FROM dirty_hour")))
    await send(database, batch([opened(1, 1), closed(2, 1, closed_unix_ms=late)], now_unix_ms=late))
    assert sorted(row["hour_unix_s"] for row in await rows(database, tables.dirty_hour)) == [T0_S, T0_S + 7 * 3600]


async def test_a_process_of_which_the_pod_keeps_nothing_is_closed_at_its_last_sign_of_life(database: Database) -> None:
    await page(database, [kit.boot(), request(2, 1)])
    await page(database, [kit.boot()], boot_id="boot-2")
    first, second = sorted(await rows(database, tables.boot), key=lambda row: row["boot_id"])
    assert (first["end"], second["end"]) == ("gone", "")


# --- over HTTP ---------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def served(intake: AttemptsIntake) -> AsyncIterator[Callable[..., Any]]:
    app = web.Application(client_max_size=2**24)
    intake.add_routes(app)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}{ROUTE_ATTEMPTS}"
    async with aiohttp.ClientSession() as session:

        async def post(body: str, token: str = TOKEN) -> tuple[int, dict[str, Any]]:
            headers = {"Authorization": f"Bearer {token}"}
            async with session.post(url, data=body, headers=headers) as response:
                return response.status, await response.json()

        yield post
    await runner.cleanup()


async def test_a_batch_over_http(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    intake = AttemptsIntake(database, MasterTokens([TOKEN]), metrics, now_s=lambda: T0_S)
    async with served(intake) as post:
        good = batch([opened(1, 1), closed(2, 1)]).model_dump_json(by_alias=True)
        assert await post(good) == (200, {"through": 2})
        assert (await post(good, "wrong"))[0] == 401
        ahead = batch([opened(9, 9)]).model_dump_json(by_alias=True)
        status, answer = await post(ahead)
        assert (status, answer["through"]) == (409, 2)
        assert "must have number 3" in answer["error"]["message"]
        assert (await post("{"))[0] == 400
        assert (await post(batch([opened(4, 1), opened(3, 2)]).model_dump_json(by_alias=True)))[0] == 400

        async def away(_: object) -> None:
            raise DatabaseAwayError("no answer")

        monkeypatch.setattr(database, "write", away)
        assert (await post(good))[0] == 503
    assert counted(metrics, "lorapool_ledger_records_total", writer="gateway") == 2


# --- pulls -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def pulling(database: Database, runtime: FakeRuntime, metrics: Metrics | None = None) -> AsyncIterator[Pulls]:
    async with runtime.serving(), aiohttp.ClientSession() as session:
        pulls = Pulls(
            session,
            database,
            lambda uid: ("older", "token"),
            ReleaseTrust(),
            metrics or Metrics(),
            now_s=lambda: T0_S,
            gone_after_s=0.0,
        )
        pulls.follow({POD.uid: PulledPod(POD, runtime.url)})
        try:
            yield pulls
        finally:
            await pulls.close()


async def committed(database: Database, boot_id: str, seq: int) -> None:
    """Waits until the process' records up to `seq` are committed."""

    async def true() -> bool:
        return any((row["boot_id"], row["cursor_seq"]) == (boot_id, seq) for row in await rows(database, tables.boot))

    await until(true)


async def test_all_processes_of_a_pod_are_read_and_acknowledged_after_the_commit(database: Database) -> None:
    first = [kit.boot(), *(request(seq, seq) for seq in range(2, 1500)), kit.end(1500, killed=True)]
    runtime = FakeRuntime({"boot-1": list(first), "boot-2": [kit.boot(), request(2, 9001)]})
    async with pulling(database, runtime):
        await committed(database, "boot-2", 2)
        runtime.boots["boot-2"].append(request(3, 9002))
        await committed(database, "boot-2", 3)

        async def forgotten() -> bool:
            return runtime.boots == {"boot-2": []}

        await until(forgotten)
    assert len(await rows(database, tables.runtime_request)) == 1500
    ends = {row["boot_id"]: row["end"] for row in await rows(database, tables.boot)}
    assert ends == {"boot-1": "killed", "boot-2": ""}


async def test_lost_acknowledgements_double_nothing(database: Database) -> None:
    runtime = FakeRuntime({"boot-1": [kit.boot(), request(2, 1), request(3, 2)]}, fail_acknowledge=True)

    async def thrice() -> bool:
        return sum(method == "DELETE" for method, _ in runtime.asked) >= 3

    async with pulling(database, runtime):
        await until(thrice)
    assert len(await rows(database, tables.runtime_request)) == 2


async def test_a_database_that_is_away_delays_and_loses_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, metrics, true_write, failures = (
        FakeRuntime({"boot-1": [kit.boot(), request(2, 1)]}),
        Metrics(),
        database.write,
        3,
    )

    async def write(work: Callable[[Connection], Any]) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise DatabaseAwayError("no answer")
        return await true_write(work)

    monkeypatch.setattr(database, "write", write)
    async with pulling(database, runtime, metrics):
        await committed(database, "boot-1", 2)
    assert counted(metrics, "lorapool_ledger_intake_failures_total", writer="runtime") == 3


async def test_a_response_of_any_length_is_not_read_to_its_end(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapool_ledger.intake.pulls.PAGE_MOST_BYTES", 10_000)
    runtime = FakeRuntime({"boot-1": [kit.boot(), *(request(seq, seq) for seq in range(2, 500))]})

    async def twice() -> bool:
        return len(runtime.asked) >= 2

    async with pulling(database, runtime):
        await until(twice)
    assert await rows(database, tables.boot) == []


async def test_the_processes_of_a_pod_that_is_gone_end_at_their_last_sign_of_life(database: Database) -> None:
    runtime = FakeRuntime({"boot-1": [kit.boot(), request(2, 1)]})
    async with pulling(database, runtime) as pulls:
        await committed(database, "boot-1", 2)
        assert await pulls.close_gone(frozenset({POD.uid})) == 0
        pulls.follow({})
        assert await pulls.close_gone(frozenset()) == 1
    (boot,) = await rows(database, tables.boot)
    assert (boot["end"], boot["ended_unix_ms"]) == ("gone", T0_MS + 60_000)
