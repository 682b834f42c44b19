"""Sums are those of the facts, in any order of arrival; the reconciliation is green, and turns red for every fault."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import ledger_kit as kit
import pytest
from ledger_kit import T0_MS, T0_S, batch, closed, opened, request, rows
from sqlalchemy import Connection, event, select, text

from lorapool_api.usage_protocol import (
    AttemptEnd,
    Ended,
    GatewayRecord,
    MinuteLine,
    RemainderRecord,
    RuntimeRecord,
)
from lorapool_ledger.intake import gateway_batch, runtime_page
from lorapool_ledger.intake.runtime_page import Pod
from lorapool_ledger.metrics import Metrics
from lorapool_ledger.reports import lookups
from lorapool_ledger.reports.minutes import minutes
from lorapool_ledger.reports.periods import Period
from lorapool_ledger.reports.scope import Scope
from lorapool_ledger.store import tables
from lorapool_ledger.store.database import Database
from lorapool_ledger.sums.reconcile import Reconciler
from lorapool_ledger.sums.retention import Retention
from lorapool_ledger.sums.rollups import RollUps

POD = Pod("pod-1", "runtime-1", "base-1", "acme/base", "tiny")
LATER_S = T0_S + 4 * 3600
"""When everything of these tests has ended, and all graces have passed."""


class Ledger:
    """A database with the parts that sum and check it; `now_s` is their clock."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.metrics = Metrics()
        self.now_s = LATER_S
        self.roll_ups = RollUps(database, self.metrics, now_s=lambda: self.now_s)
        self.reconciler = Reconciler(database, self.metrics, now_s=lambda: self.now_s)

    async def gateway(self, records: list[GatewayRecord], boot_id: str = "gateway-1", **given: Any) -> None:
        sent = batch(records, boot_id, **{"now_unix_ms": self.now_s * 1000, **given})
        await self.database.write(lambda connection: gateway_batch.take(connection, sent, self.now_s))

    async def runtime(
        self, records: list[RuntimeRecord], boot_id: str = "boot-1", now_ms: int | None = None, pod: Pod = POD
    ) -> None:
        states = [kit.boot_state(boot_id, records)]
        await self.database.write(
            lambda connection: runtime_page.take(
                connection, pod, boot_id, records, states, self.now_s * 1000 if now_ms is None else now_ms, self.now_s
            )
        )

    async def gone(self, *boot_ids: str) -> None:
        await self.database.write(lambda connection: runtime_page.close_gone(connection, boot_ids, self.now_s))

    async def hours(self) -> dict[str, dict[str, Any]]:
        """Sums of the hours by outcome, after catching up."""
        await self.roll_ups.catch_up()
        return {row["outcome"]: row for row in await rows(self.database, tables.usage_hour)}

    async def checks(self) -> list[str]:
        """The checks with findings, after catching up."""
        await self.roll_ups.catch_up()
        return sorted({one.check for one in await self.reconciler.reconcile()})

    async def sql(self, statement: str) -> None:
        await self.database.write(lambda connection: connection.execute(text(statement)))

    def shown(self, check: str) -> float:
        value = self.metrics.registry.get_sample_value("lorapool_ledger_unreconciled_tokens", {"check": check})
        return value or 0.0


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return Ledger(database)


def runtime_records(count: int = 8) -> list[RuntimeRecord]:
    """A whole life of a process: 4 requests of the first tenant, 4 of a second, checkpoints, one minute."""
    requests = [
        request(seq, seq, **({} if seq % 2 else {"project": "zeta", "key_uid": "key-2", "uid": "adapter-2"}))
        for seq in range(2, 2 + count)
    ]
    last = requests[-1].seq
    lines = [
        MinuteLine(uid=f"adapter-{number}", model="m", gpu_ns=count // 2 * 10**9, byte_ns=2**70) for number in (1, 2)
    ]
    return [
        kit.boot(),
        *requests,
        kit.checkpoint(last + 1, requests),
        kit.checkpoint(last + 2, requests, uid="adapter-2"),
        kit.minute(last + 3, lines=lines),
        kit.end(last + 4),
    ]


def gateway_records(count: int = 8) -> list[GatewayRecord]:
    records: list[GatewayRecord] = []
    for number in range(2, 2 + count):
        whose = {} if number % 2 else {"project": "zeta", "key_uid": "key-2", "uid": "adapter-2"}
        records += [opened(2 * number - 3, number, **whose), closed(2 * number - 2, number)]
    return records


async def whole_life(ledger: Ledger) -> None:
    await ledger.gateway(gateway_records())
    await ledger.runtime(runtime_records())


# --- sums --------------------------------------------------------------------------------


async def test_halves_in_any_order_give_the_same_sums(ledger: Ledger) -> None:
    parts = [
        lambda: ledger.runtime(runtime_records()[:5]),
        lambda: ledger.runtime(runtime_records()),
        lambda: ledger.gateway(gateway_records()[:7]),
        lambda: ledger.gateway(gateway_records()),
        lambda: ledger.roll_ups.catch_up(),
    ]
    order = [parts[index] for index in random.Random(7).choices(range(5), k=12)]
    for part in (*order, parts[1], parts[3]):
        await part()
    await ledger.roll_ups.catch_up()
    sums = await rows(ledger.database, tables.usage_hour)
    assert {
        (row["project"], row["requests"], row["billed_prompt_tokens"], row["delivered_tokens"]) for row in sums
    } == {
        ("acme", 4, 24, 20),
        ("zeta", 4, 24, 20),
    }
    for table in (tables.usage_day, tables.model_day):
        days = await rows(ledger.database, table)
        assert sorted((row["day_unix_s"], row["completion_tokens"]) for row in days) == [(T0_S, 20), (T0_S, 20)]
    pods = {row["uid"]: row for row in await rows(ledger.database, tables.pod_hour)}
    assert (pods["*"]["uptime_ns"], pods["*"]["gpu_ns"]) == (60 * 10**9, 8 * 10**9)
    assert pods["adapter-1"]["byte_ns"] == str(2**70)
    assert {row["uid"] for row in await rows(ledger.database, tables.pod_day)} == set(pods)
    assert await rows(ledger.database, tables.dirty_hour) == []
    assert await ledger.roll_ups.catch_up() == 0


async def test_a_half_that_comes_late_changes_the_hour_it_belongs_to(ledger: Ledger) -> None:
    await ledger.runtime([kit.boot(), request(2, 1, outcome=Ended.CANCELLED)])
    assert set(await ledger.hours()) == {"client_left"}
    await ledger.gateway([opened(1, 1), closed(2, 1, outcome=AttemptEnd.TIMEOUT, closed_unix_ms=T0_MS + 9_000_000)])
    sums = await ledger.hours()
    assert {name: row["hour_unix_s"] for name, row in sums.items()} == {"failed": T0_S}
    assert sums["failed"]["billed_completion_tokens"] == 0
    assert sums["failed"]["completion_tokens"] == 5


async def test_an_attempt_that_was_lost_and_tried_again_is_billed_once(ledger: Ledger) -> None:
    lost = closed(2, 1, outcome=AttemptEnd.LOST, completion_tokens=2)
    await ledger.gateway([opened(1, 1), lost, opened(3, 2, boot_id="boot-2"), closed(4, 2)])
    await ledger.runtime([kit.boot(), request(2, 1, outcome=Ended.LOST, completion_tokens=3)])
    await ledger.runtime([kit.boot(), request(2, 2)], boot_id="boot-2")
    sums = await ledger.hours()
    assert (sums["lost"]["completion_tokens"], sums["lost"]["billed_completion_tokens"]) == (3, 0)
    assert (sums["completed"]["requests"], sums["completed"]["billed_completion_tokens"]) == (1, 5)


async def test_without_the_runtime_the_gateways_counts_are_taken_and_nothing_is_estimated(ledger: Ledger) -> None:
    silent = {"prompt_tokens": None, "cached_tokens": None, "completion_tokens": None}
    await ledger.runtime([kit.boot()])
    await ledger.gateway(
        [
            *(opened(2 * number - 1, number) for number in (1,)),
            closed(2, 1, outcome=AttemptEnd.CLIENT_LEFT, completion_tokens=3),
            opened(3, 2),
            closed(4, 2, outcome=AttemptEnd.LOST, **silent),
            opened(5, 3),
            closed(6, 3, outcome=AttemptEnd.REFUSED, **silent),
            opened(7, 4),
        ]
    )
    await ledger.gone("boot-1")
    sums = await ledger.hours()
    assert (sums["client_left"]["billed_completion_tokens"], sums["client_left"]["requests"]) == (3, 1)
    assert (sums["unknown"]["requests"], sums["unknown"]["completion_tokens"]) == (2, 0)
    assert sums["refused"]["requests"] == 1
    assert await ledger.checks() == []


async def test_a_remainder_has_the_counts_of_its_requests_and_not_their_gateway_halves_too(ledger: Ledger) -> None:
    await ledger.gateway(gateway_records(2))
    folded = RemainderRecord(
        seq=3, first_seq=2, hour_unix_s=T0_S, key_uid="key-1", project="acme", uid="adapter-1", model="acme/tone",
        outcome=Ended.COMPLETED, requests=1, prompt_tokens=10, cached_tokens=4, completion_tokens=5,
    )  # fmt: skip
    other = folded.model_copy(update={"key_uid": "key-2", "project": "zeta", "uid": "adapter-2", "seq": 2})
    await ledger.runtime([kit.boot(), other, folded])
    await ledger.roll_ups.catch_up()
    sums = await rows(ledger.database, tables.usage_hour)
    assert [(row["requests"], row["completion_tokens"]) for row in sums] == [(1, 5), (1, 5)]
    assert await ledger.checks() == []


async def test_a_mark_that_comes_while_an_hour_is_summed_is_not_lost(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ledger.runtime(runtime_records()[:4])
    true_read, reads = ledger.database.read, 0

    async def read(work: Any) -> Any:
        nonlocal reads
        found = await true_read(work)
        reads += 1
        if reads == 2:  # between the reading of the facts and the writing of the sums
            await ledger.runtime(runtime_records())
        return found

    monkeypatch.setattr(ledger.database, "read", read)
    await ledger.roll_ups.catch_up()
    monkeypatch.undo()
    assert len(await rows(ledger.database, tables.dirty_hour)) == 1
    assert sum(row["requests"] for row in (await ledger.hours()).values()) == 4
    assert sum(row["requests"] for row in await rows(ledger.database, tables.usage_hour)) == 8


# --- the checks have teeth ---------------------------------------------------------------


async def test_everything_that_adds_up_is_green(ledger: Ledger) -> None:
    await whole_life(ledger)
    assert await ledger.checks() == []
    assert await ledger.checks() == []
    (boot,) = await rows(ledger.database, tables.boot)
    assert boot["checked_seq"] == boot["cursor_seq"]
    assert [ledger.shown(check) for check in ("R1", "R2", "R3", "R4", "R5")] == [0] * 5


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("DELETE FROM runtime_request WHERE seq = 4", ["R1", "R2"]),
        ("UPDATE runtime_request SET cached_tokens = cached_tokens + 1 WHERE seq = 5", ["R1", "R4"]),
        ("UPDATE runtime_request SET completion_tokens = completion_tokens - 1 WHERE seq = 5", ["R1", "R4", "R5"]),
        ("UPDATE runtime_request SET project = 'zeta', key_uid = 'key-2' WHERE seq = 5", ["R2", "R4"]),
        ("UPDATE runtime_request SET uid = 'adapter-2' WHERE seq = 5", ["R1", "R2", "R4"]),
        ("UPDATE minute_line SET gpu_ns = gpu_ns + 1 WHERE uid = 'adapter-1'", ["R3"]),
        ("DELETE FROM pod_minute", ["R3"]),
        ("UPDATE pod_minute SET busy_ns = 1", ["R3"]),
        ("UPDATE usage_hour SET prompt_tokens = prompt_tokens + 1 WHERE project = 'acme'", ["R4"]),
        ("DELETE FROM usage_hour WHERE project = 'acme'", ["R4"]),
        ("DELETE FROM checkpoint WHERE uid = 'adapter-1'", []),
    ],
)
async def test_a_fault_turns_its_checks_red(ledger: Ledger, fault: str, expected: list[str]) -> None:
    await whole_life(ledger)
    await ledger.roll_ups.catch_up()
    await ledger.sql(fault)
    assert await ledger.checks() == expected
    assert await ledger.checks() == expected  # it stays, though the checks go on from where they were
    assert all(ledger.shown(check) > 0 for check in expected)
    names = {row["check"] for row in await rows(ledger.database, tables.finding)}
    assert names == set(expected)


async def test_two_tenants_that_are_swapped_turn_red(ledger: Ledger) -> None:
    await whole_life(ledger)
    await ledger.roll_ups.catch_up()
    await ledger.sql(
        "UPDATE runtime_request SET project = CASE project WHEN 'acme' THEN 'zeta' ELSE 'acme' END WHERE seq IN (4, 5)"
    )
    found = await ledger.checks()
    assert "R2" in found


async def test_a_replayed_batch_of_a_writer_that_claims_to_be_another_turns_red(ledger: Ledger) -> None:
    await whole_life(ledger)
    before = await ledger.hours()
    await ledger.runtime(runtime_records(), boot_id="boot-2")
    assert "R2" in await ledger.checks()
    assert await ledger.hours() == before, "it was billed twice"


@pytest.mark.parametrize("order", [*itertools.permutations(("sent", "right", "wrong"))], ids="-".join)
@pytest.mark.parametrize("wrong_pod", ["pod-1", "pod-2"])
async def test_of_two_runtimes_that_claim_an_attempt_the_one_it_was_sent_to_is_billed(
    ledger: Ledger, wrong_pod: str, order: tuple[str, ...]
) -> None:
    """The other one has more tokens and ended in another hour."""
    other = request(2, 1, completion_tokens=900, ended_unix_ms=T0_MS + 3_600_000)
    for step in order:
        if step == "sent":
            await ledger.gateway([opened(1, 1), closed(2, 1, closed_unix_ms=T0_MS + 7_200_000)])
        elif step == "right":
            await ledger.runtime([kit.boot(), request(2, 1)])
        else:
            await ledger.runtime([kit.boot(), other], boot_id="boot-0", pod=replace(POD, uid=wrong_pod, name="other"))
        await ledger.roll_ups.catch_up()
    (hour,) = await rows(ledger.database, tables.usage_hour)
    assert (hour["hour_unix_s"], hour["requests"], hour["billed_completion_tokens"]) == (T0_S, 1, 5)
    assert await ledger.checks() == ["R2"]
    texts = {row["check"]: row["message"] for row in await rows(ledger.database, tables.finding)}
    assert "process boot-0 of pod other" in texts["R2"]
    assert set(texts) == {"R2", "twice"}
    found = await ledger.database.read(lambda connection: lookups.find_request(connection, Scope(), "request-1"))
    assert [(one.pod, one.result.completion_tokens) for one in found] == [("runtime-1", 5)]
    of_minutes = minutes(Period(T0_S, T0_S + 3 * 3600))
    by_minute = await ledger.database.read(lambda connection: connection.execute(select(of_minutes)).all())
    assert [(row.requests, row.billed_completion_tokens) for row in by_minute] == [(1, 5)]


async def test_a_record_of_a_runtime_that_the_attempt_was_not_sent_to_is_never_billed(ledger: Ledger) -> None:
    await ledger.gateway([opened(1, 1), closed(2, 1)])
    other = request(2, 1, completion_tokens=900)
    await ledger.runtime([kit.boot(), other], boot_id="boot-2", pod=replace(POD, uid="pod-2"))
    hours = await ledger.hours()
    assert [row["billed_completion_tokens"] for row in hours.values()] == [5], "the gateway's counts"
    assert await ledger.checks() == ["R2"]


async def test_of_two_claims_without_a_gateways_half_the_first_one_is_billed(ledger: Ledger) -> None:
    await ledger.runtime([kit.boot(), request(2, 1), request(3, 1)])
    await ledger.runtime([kit.boot(), request(2, 1)], boot_id="boot-2", pod=replace(POD, uid="pod-2"))
    hours = await ledger.hours()
    assert [(row["requests"], row["billed_completion_tokens"]) for row in hours.values()] == [(1, 5)]
    assert [row["subject"] for row in await rows(ledger.database, tables.finding)] == [f"runtime/{kit.attempt_id(1)}"]


async def test_a_repaired_fault_turns_green_again(ledger: Ledger) -> None:
    await whole_life(ledger)
    await ledger.roll_ups.catch_up()
    await ledger.sql("UPDATE runtime_request SET cached_tokens = cached_tokens + 1 WHERE seq = 5")
    assert await ledger.checks() == ["R1", "R4"]
    await ledger.sql("UPDATE runtime_request SET cached_tokens = cached_tokens - 1 WHERE seq = 5")
    assert await ledger.checks() == []
    assert await rows(ledger.database, tables.finding) == []


async def test_a_runtimes_half_has_time_to_arrive(ledger: Ledger) -> None:
    ledger.now_s = T0_S + 30
    await ledger.runtime([kit.boot()])
    ledger.now_s = LATER_S
    await ledger.gateway(gateway_records())
    assert await ledger.checks() == []
    await ledger.runtime([])
    assert await ledger.checks() == ["R2"]
    await ledger.runtime(runtime_records())
    assert await ledger.checks() == []


async def test_checkpoints_between_requests_are_compared_too(ledger: Ledger) -> None:
    first, second = request(2, 1), request(4, 2)
    right = [kit.boot(), first, kit.checkpoint(3, [first]), second, kit.checkpoint(5, [first, second])]
    await ledger.runtime(right[:4])
    assert await ledger.checks() == []
    await ledger.runtime(right)
    assert await ledger.checks() == []
    wrong = kit.checkpoint(7, [first, second, request(6, 3)], cached_tokens=13)
    await ledger.runtime([request(6, 3), wrong])
    assert await ledger.checks() == ["R1"]
    assert ledger.shown("R1") == 1


# --- clocks ------------------------------------------------------------------------------

YEAR_S = 365 * 86_400


def shifted(records: list[Any], seconds: int) -> list[Any]:
    """As a writer whose clock is this much ahead records them."""
    spans = {"_unix_ms": 1000, "_unix_s": 1}
    return [
        one.model_copy(
            update={
                name: value + seconds * factor
                for name, value in one
                for suffix, factor in spans.items()
                if name.endswith(suffix)
            }
        )
        for one in records
    ]


@pytest.mark.parametrize("seconds", [3600, -3600, 30 * YEAR_S, -30 * YEAR_S])
async def test_a_runtime_whose_clock_is_wrong_bills_in_the_right_hour_and_is_named(
    ledger: Ledger, seconds: int
) -> None:
    await ledger.gateway(gateway_records())
    await ledger.runtime(shifted(runtime_records(), seconds), now_ms=(LATER_S + seconds) * 1000 + 7)
    assert await ledger.checks() == []
    hours = await rows(ledger.database, tables.usage_hour)
    assert {row["hour_unix_s"] for row in hours} == {T0_S}
    assert {row["hour_unix_s"] for row in await rows(ledger.database, tables.pod_hour)} == {T0_S}
    (found,) = await rows(ledger.database, tables.finding)
    side = "ahead of" if seconds > 0 else "behind"
    assert found["check"] == "clock"
    assert f"boot-1 (pod runtime-1) is {abs(seconds)} s {side} the ledger's" in found["message"]


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_gateway_whose_clock_is_wrong_bills_in_the_right_hour_and_is_named(
    ledger: Ledger, seconds: int
) -> None:
    await ledger.gateway(shifted(gateway_records(), seconds), now_unix_ms=(LATER_S + seconds) * 1000)
    await ledger.hours()
    assert {row["hour_unix_s"] for row in await rows(ledger.database, tables.usage_hour)} == {T0_S}
    (found,) = await rows(ledger.database, tables.finding)
    assert (found["check"], "(gateway-pod-1) is 3600 s" in found["message"]) == ("clock", True)


async def test_times_that_cannot_be_become_that_of_reception(ledger: Ledger) -> None:
    """The clock is right when the page is sent: these requests ended in the future and before their process began."""
    future = request(2, 1, started_unix_ms=T0_MS, ended_unix_ms=(LATER_S + YEAR_S) * 1000)
    past = request(3, 2, started_unix_ms=5, ended_unix_ms=6)
    folded = RemainderRecord(seq=4, first_seq=4, hour_unix_s=T0_S, outcome=Ended.COMPLETED, requests=2)
    records = [kit.boot(started_unix_ms=T0_MS + 1_800_000), future, past, folded]
    await ledger.runtime(records)
    await ledger.hours()
    by_hour: Counter[int] = Counter()
    for row in await rows(ledger.database, tables.usage_hour):
        by_hour[row["hour_unix_s"]] += row["requests"]
    assert by_hour == {LATER_S: 2, T0_S: 2}
    (found,) = await rows(ledger.database, tables.finding)
    assert (found["check"], "(pod runtime-1) has records of the future" in found["message"]) == ("clock", True)


# --- retention ---------------------------------------------------------------------------


async def test_old_facts_go_and_their_sums_stay(ledger: Ledger) -> None:
    await whole_life(ledger)
    before = await ledger.hours()
    early = Retention(ledger.database, 62, now_s=lambda: T0_S + 61 * 86_400)
    assert await early.delete_old() == 0
    assert await ledger.checks() == []
    later = T0_S + 63 * 86_400
    retention = Retention(ledger.database, 62, now_s=lambda: later)
    assert await retention.delete_old() == 1
    for table in (tables.runtime_request, tables.attempt_opened, tables.attempt_closed, tables.pod_minute):
        assert await rows(ledger.database, table) == []
    assert await ledger.hours() == before
    ledger.now_s = later
    assert await ledger.checks() == []
    await ledger.runtime([request(20, 99)])  # a pod that was away for months: never added to sums without facts
    assert await ledger.hours() == before
    assert {row["check"] for row in await rows(ledger.database, tables.finding)} == {"gap", "late"}


async def test_facts_that_are_not_reconciled_are_kept(ledger: Ledger) -> None:
    await whole_life(ledger)
    later = T0_S + 63 * 86_400
    retention = Retention(ledger.database, 62, now_s=lambda: later)
    assert await retention.delete_old() == 0  # its sums are not made
    await ledger.roll_ups.catch_up()
    assert await retention.delete_old() == 0  # it is not checked
    await ledger.sql("UPDATE runtime_request SET cached_tokens = cached_tokens + 1 WHERE seq = 5")
    assert await ledger.checks() == ["R1", "R4"]
    assert await retention.delete_old() == 0


async def test_the_last_records_of_a_killed_process_are_kept_until_they_are_checked(ledger: Ledger) -> None:
    done, last = request(2, 1), request(4, 2, outcome=Ended.LOST, uid="adapter-2", project="zeta", key_uid="key-2")
    await ledger.runtime([kit.boot(), done, kit.checkpoint(3, [done]), last, kit.end(5, killed=True)])
    await ledger.gateway([opened(1, 1), closed(2, 1)])
    later = T0_S + 63 * 86_400
    retention = Retention(ledger.database, 62, now_s=lambda: later)
    await ledger.roll_ups.catch_up()
    assert await retention.delete_old() == 0
    assert await ledger.checks() == []
    assert [row["checked_seq"] for row in await rows(ledger.database, tables.boot)] == [5]
    assert await retention.delete_old() == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_no_sum_and_no_check_reads_all_requests_of_a_process_for_each_attempt(ledger: Ledger) -> None:
    """SQLite plans without statistics; with them, PostgreSQL has the same indexes."""
    statements: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            statements.append((statement, parameters))

    event.listen(ledger.database.engine, "before_cursor_execute", note)
    await whole_life(ledger)
    assert await ledger.checks() == []
    event.remove(ledger.database.engine, "before_cursor_execute", note)

    def plans(connection: Connection) -> list[str]:
        found = []
        for statement, parameters in statements:
            steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            found += [f"{step.detail}: {statement}" for step in steps]
        return found

    steps = await ledger.database.read(plans)
    assert any("remainder" in step for step in steps)
    for step in steps:
        plan = step.split(": ")[0]
        assert not re.match("SCAN (attempt_|runtime_request|remainder|other|half|sent)", plan), step
        assert not (plan.endswith("(boot=?)") and "runtime_request" in plan), step
