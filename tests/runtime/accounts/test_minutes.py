"""Minutes add up to the life of the process, and their lines to the time of the steps, whatever the clocks do."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from accounts_kit import Accounts, minutes_of, requests_of
from fakes_runtime import FakeClock
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_api.protocol import EventType, Usage
from lorapool_api.usage_protocol import Ended, EndRecord
from lorapool_runtime.accounts.usage import Outcome
from lorapool_runtime.clock import Clock


@dataclass
class JumpingClock(FakeClock):
    """The wall clock may jump; the monotonic clock never does."""

    offset: float = 1_700_000_000.0

    def clock(self) -> Clock:
        return Clock(lambda: self.now, lambda: self.offset + self.now)


MOVES = st.one_of(
    st.tuples(st.just("pass"), st.floats(0.001, 200)),
    st.tuples(st.just("jump"), st.sampled_from([-3600.0, 3600.0, -0.4, 0.4, 86400.0, -7.0])),
    st.tuples(st.just("step"), st.floats(0.0001, 90)),
    st.tuples(st.just("begin"), st.integers(0, 2)),
    st.tuples(st.just("end"), st.just(0)),
    st.tuples(st.just("load"), st.integers(0, 2)),
    st.tuples(st.just("unload"), st.integers(0, 2)),
)


@settings(max_examples=200, deadline=None)
@given(moves=st.lists(MOVES, max_size=40))
def test_minutes_add_up_whatever_happens(moves: list[tuple[str, float]]) -> None:
    clock = JumpingClock()
    made = Accounts(None, clock)
    begun_ns = clock.clock().now_ns()
    live, resident, byte_ns, busy_ns = [], {}, 0, 0
    for move, value in moves:
        kind = "step" if move == "pass" and live else move  # an engine that has requests computes
        if kind == "pass":
            for _ in range(int(value) + 1):  # with a tick each second
                seconds = min(1.0, value)
                value -= seconds
                clock.pass_s(seconds)
                byte_ns += sum(resident.values()) * round(seconds * 1e9)
                made.accounting.tick()
        elif kind == "jump":
            clock.offset += value
        elif kind == "begin":
            live.append(made.begin(("uid-a", "uid-b", "")[int(value)]))
        elif kind == "end" and live:
            made.end(live.pop())
        elif kind == "step" and live:
            before = clock.clock().now_ns()
            made.step(live, round(value * 1e9 / len(live)))
            passed = clock.clock().now_ns() - before
            busy_ns += round(value * 1e9 / len(live)) * len(live)
            byte_ns += sum(resident.values()) * passed
        elif kind == "load":
            uid = f"uid-{int(value)}"
            resident[uid] = 1000
            made.event(EventType.LOADED, uid)
        elif kind == "unload" and (uid := f"uid-{int(value)}") in resident:
            del resident[uid]
            made.event(EventType.UNLOADED, uid)
    assert made.accounting._minutes is not None
    made.accounting._minutes.end(clock.clock().now_ns())
    minutes = minutes_of(made.records())
    slack = 50 * (len(moves) + 1)  # of the test's own rounding, in nanoseconds
    assert abs(sum(one.uptime_ns for one in minutes) - (clock.clock().now_ns() - begun_ns)) <= slack
    assert sum(one.busy_ns for one in minutes) == busy_ns
    assert abs(sum(line.byte_ns for one in minutes for line in one.lines) - byte_ns) <= 3000 * slack * 3
    for one in minutes:
        assert 0 <= one.busy_ns <= one.uptime_ns + slack
        assert sum(line.gpu_ns for line in one.lines) == one.busy_ns
        assert one.minute_unix_s % 60 == 0
    assert sum(one.gpu_ns for one in requests_of(made.records())) + sum(one.gpu_ns for one in live) == busy_ns


@pytest.mark.parametrize("begins", ["2028-02-28T23:58:30", "2026-12-31T23:58:30", "2026-11-30T23:58:30"])
def test_minutes_have_the_names_of_the_wall_clock_at_the_ends_of_months(begins: str) -> None:
    at = datetime.fromisoformat(begins).replace(tzinfo=UTC).timestamp()
    clock = JumpingClock(now=0.0, offset=at)
    made = Accounts(None, clock)
    for _ in range(180):
        clock.pass_s(1)
        made.accounting.tick()
    minutes = minutes_of(made.records())
    assert [one.minute_unix_s - int(at // 60 * 60) for one in minutes] == [0, 60, 120]
    assert [one.uptime_ns for one in minutes] == [30 * 10**9, 60 * 10**9, 60 * 10**9]


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_jump_of_the_wall_clock_neither_makes_nor_loses_time(jump_s: float) -> None:
    clock = JumpingClock(now=0.0, offset=1_700_000_040.0)
    made = Accounts(None, clock)
    for second in range(200):
        clock.pass_s(1)
        if second == 90:
            clock.offset += jump_s
        made.accounting.tick()
    minutes = minutes_of(made.records())
    assert all(0 < one.uptime_ns <= 60 * 10**9 for one in minutes)
    assert sum(one.uptime_ns for one in minutes) == 180 * 10**9


def test_a_step_belongs_to_the_minute_in_which_it_began_and_that_lasts_until_it_has_ended() -> None:
    clock = JumpingClock(now=0.0, offset=1_700_000_040.0)
    made = Accounts(None, clock)
    live = made.begin()
    clock.pass_s(59)
    made.step([live], 130 * 10**9)
    made.end(live)
    clock.pass_s(60)
    made.accounting.tick()
    minutes = minutes_of(made.records())
    assert [(one.uptime_ns, one.busy_ns) for one in minutes] == [
        (189 * 10**9, 130 * 10**9),
        (51 * 10**9, 0),
    ]


def test_more_accounts_than_a_minute_has_lines_end_it_early() -> None:
    clock = JumpingClock(now=0.0, offset=1_700_000_040.0)
    made = Accounts(None, clock)
    for number in range(1050):
        live = made.begin(f"uid-{number}")
        made.step([live], 1000)
        made.end(live)
    assert made.accounting._minutes is not None
    made.accounting._minutes.end(clock.clock().now_ns())
    minutes = minutes_of(made.records())
    assert len(minutes) == 2
    assert sum(line.gpu_ns for one in minutes for line in one.lines) == 1050 * 1000


async def test_a_process_that_is_stopped_ends_its_records(accounts: Accounts, clock: FakeClock) -> None:
    accounts.event(EventType.LOADED, "uid-a")
    accounts.ask()
    live = accounts.begin()
    live.count(0, 9, 0, 4)
    clock.pass_s(7.5)
    await accounts.accounting.close()
    accounts.accounting.end(live, Outcome.COMPLETED, Usage(prompt_tokens=9, completion_tokens=5))  # too late
    records = accounts.records()
    stuck = requests_of(records)[-1]  # its engine did not stop in time
    assert (stuck.outcome, stuck.prompt_tokens, stuck.completion_tokens) == (Ended.FAILED, 9, 4)
    [minute] = minutes_of(records)
    assert (minute.uptime_ns, [line.byte_ns for line in minute.lines]) == (7_500_000_000, [1000 * 7_500_000_000])
    end = records[-1]
    assert isinstance(end, EndRecord)
    assert not end.killed
    assert not list(accounts.folder.glob("*.running"))  # type: ignore[union-attr]
    after = accounts.successor()
    assert after.records("boot-1") == records
    after.kill()
