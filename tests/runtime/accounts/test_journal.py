"""Records of usage: numbered, kept until acknowledged, also across processes, with exact sums beyond the bounds."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import accounts_witness
import pytest
from accounts_kit import COUNTS, Accounts, minutes_of, requests_of, sums
from fakes_runtime import FakeClock, until
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_api.protocol import EventType
from lorapool_api.usage_protocol import (
    CHECKPOINT_RECORDS,
    PAGE_RECORDS,
    CheckpointRecord,
    Ended,
    EndRecord,
    RemainderRecord,
    ResidencyRecord,
    RuntimeRecord,
    UsagePage,
)
from lorapool_runtime.accounts.folding import RECORD, fold
from lorapool_runtime.accounts.usage import Outcome


def checkpoints_agree(records: list[RuntimeRecord]) -> int:
    """Compares every checkpoint with the sum of the records before it; returns how many there are."""
    found = [record for record in records if isinstance(record, CheckpointRecord)]
    for one in found:
        expected = sums(records, up_to=one.seq)[one.uid]
        assert (one.requests, *(getattr(one, name) for name in COUNTS)) == (
            expected["requests"],
            *(expected[name] for name in COUNTS),
        )
    return len(found)


def test_a_reader_gets_every_record_once_in_pages_and_an_acknowledged_one_never_again(accounts: Accounts) -> None:
    for number in range(2 * PAGE_RECORDS):
        accounts.ask("uid-a" if number % 3 else "", completion_tokens=number)
    records = accounts.records()
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert [one.completion_tokens for one in requests_of(records)] == list(range(2 * PAGE_RECORDS))
    assert len(accounts.page().records) == PAGE_RECORDS
    accounts.accounting.acknowledge(accounts.boot_id, 700)
    accounts.accounting.acknowledge(accounts.boot_id, 300)  # a repeated or late one does nothing
    page = accounts.page()
    assert (page.boots[0].first_seq, page.records[0].seq) == (701, 701)
    accounts.accounting.acknowledge(accounts.boot_id, 10**9)
    assert (accounts.page().records, accounts.page().boots[0].first_seq) == ([], len(records) + 1)


def test_checkpoints_are_the_sums_of_the_records(accounts: Accounts) -> None:
    for number in range(CHECKPOINT_RECORDS + 10):
        accounts.ask(("uid-a", "uid-b", "")[number % 3], (Outcome.COMPLETED, Outcome.CANCELLED)[number % 2])
    accounts.clock.pass_s(61)
    accounts.accounting.tick()
    assert checkpoints_agree(accounts.records()) == 6


def test_a_request_whose_adapter_could_not_be_loaded_has_no_record_and_is_in_no_checkpoint(accounts: Accounts) -> None:
    accounts.tracker.of("uid-a", "demo/uid-a").count_failed_load()
    accounts.ask("uid-a")
    accounts.clock.pass_s(61)
    accounts.accounting.tick()
    assert checkpoints_agree(accounts.records()) == 1


def test_the_next_process_has_the_records_that_were_not_acknowledged(accounts: Accounts) -> None:
    for _ in range(10):
        accounts.ask()
    accounts.accounting.acknowledge(accounts.boot_id, 4)
    before = accounts.records()
    after = accounts.successor()
    assert after.records("boot-1")[: len(before)] == before
    assert [one.boot_id for one in after.page().boots] == ["boot-1", "boot-2"]
    after.accounting.acknowledge("boot-1", after.page().boots[0].last_seq)
    assert [one.boot_id for one in after.page().boots] == ["boot-2"]
    assert not list(after.folder.glob("*boot-1*"))  # type: ignore[union-attr]
    after.kill()


def test_an_acknowledgement_outlives_the_process(accounts: Accounts) -> None:
    for _ in range(10):
        accounts.ask()
    accounts.accounting.acknowledge(accounts.boot_id, 8)
    after = accounts.successor()
    assert [one.seq for one in requests_of(after.records("boot-1"))] == [9, 10, 11]
    after.accounting.acknowledge("boot-1", 10)
    third = after.successor("boot-3")
    assert [one.seq for one in requests_of(third.records("boot-1"))] == [11]
    third.kill()


def test_a_killed_process_is_ended_by_the_next_one_with_what_was_computed(accounts: Accounts, clock: FakeClock) -> None:
    accounts.event(EventType.LOADED, "uid-a", device_bytes=700)
    ended, running, base = accounts.begin(), accounts.begin(n=2), accounts.begin("")
    running.count(0, 8, 3, 1)
    running.count(1, 8, 3, 1)
    running.count(0, 8, 3, 2)
    accounts.step([ended, running, base], 1_000_000)
    accounts.end(ended)
    clock.pass_s(5)
    accounts.accounting.tick()
    clock.pass_s(3)  # of which nothing is known
    after = accounts.successor()
    records = after.records("boot-1")
    lost = [one for one in requests_of(records) if one.outcome is Ended.LOST]
    assert [(one.uid, one.prompt_tokens, one.cached_tokens, one.completion_tokens, one.gpu_ns) for one in lost] == [
        ("uid-a", 8, 3, 3, 1_000_000),
        ("", 0, 0, 0, 1_000_000),
    ]
    assert [one.sequences for one in lost] == [2, 1]
    [minute] = minutes_of(records)
    assert (minute.uptime_ns, minute.busy_ns) == (5_003_000_000, 3_000_000)
    assert {line.uid: (line.gpu_ns, line.byte_ns) for line in minute.lines} == {
        "uid-a": (2_000_000, 700 * 5_003_000_000),
        "": (1_000_000, 0),
    }
    end = records[-1]
    assert isinstance(end, EndRecord)
    assert end.killed
    assert end.ended_unix_ms == int((1_700_000_000.0 + clock.now - 3) * 1000)
    assert after.page("boot-1").boots[0].ended
    third = after.successor("boot-3")  # the same once more, since nothing was acknowledged
    assert third.records("boot-1") == records
    third.kill()


@pytest.mark.parametrize("written", [False, True])
def test_a_request_that_was_killed_while_it_was_recorded_is_recorded_once(accounts: Accounts, written: bool) -> None:
    accounts.ask()
    live = accounts.begin()
    forget = accounts.accounting._forget

    class Killed(Exception):
        pass

    def die(*_args: object) -> None:
        raise Killed

    if written:
        accounts.accounting._forget = die  # type: ignore[method-assign]
    else:
        accounts.accounting.journal.append = die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        accounts.end(live, Outcome.CANCELLED, completion_tokens=7)
    accounts.accounting._forget = forget  # type: ignore[method-assign]
    after = accounts.successor()
    found = requests_of(after.records("boot-1"))
    assert [(one.seq, one.outcome, one.completion_tokens) for one in found] == [
        (2, Ended.COMPLETED, 5),
        (3, Ended.CANCELLED, 7),
    ]
    after.kill()


@pytest.mark.parametrize("part", [0.1, 0.9])
def test_a_write_that_a_kill_cut_off_leaves_no_hole(accounts: Accounts, part: float) -> None:
    for uid in ("uid-a", "uid-b", ""):
        live = accounts.begin(uid)
        accounts.step([live], 1_000_000)
        accounts.end(live)
    before = accounts.records()
    file = accounts.accounting.journal._file
    assert file is not None

    class Killed(Exception):
        pass

    def die(lines: bytes) -> None:
        os.write(file._fd, lines[: int(len(lines) * part)])
        raise Killed

    file.append = die  # type: ignore[method-assign]
    accounts.clock.pass_s(61)
    with pytest.raises(Killed):
        accounts.accounting.tick()  # a minute and three checkpoints
    after = accounts.successor()
    records = after.records("boot-1")
    assert records[: len(before)] == before
    assert [one.seq for one in records] == list(range(1, len(records) + 1))
    assert sum(one.busy_ns for one in minutes_of(records)) == 3_000_000
    after.kill()


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty line", "garbage"])
def test_a_damaged_line_is_reported_and_the_others_are_kept(accounts: Accounts, damage: str) -> None:
    for _ in range(5):
        accounts.ask()
    accounts.kill()
    [path] = accounts.folder.glob("*.journal")  # type: ignore[union-attr]
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "torn":
        lines[-1] = lines[-1][:-20]
    elif damage == "flipped":
        at = lines[3].index(b'"completionTokens":5') + len(b'"completionTokens":')
        lines[3] = lines[3][:at] + b"9" + lines[3][at + 1 :]
    elif damage == "empty line":
        lines.insert(2, b"\n")
    else:
        lines.insert(2, b"\x00\xff not a record\n")
    path.write_bytes(b"".join(lines))
    after = accounts.successor()
    seqs = [one.seq for one in requests_of(after.records("boot-1"))]
    expected = {"torn": [2, 3, 4, 5], "flipped": [2, 3, 5, 6]}.get(damage, [2, 3, 4, 5, 6])
    assert seqs == expected
    assert after.accounting.journal.stats.damaged_lines == 1
    records = after.records("boot-1")
    if damage in ("torn", "flipped"):  # its number is used for nothing else
        assert ({"torn": 6, "flipped": 4}[damage]) not in {record.seq for record in records}
    assert isinstance(records[-1], EndRecord)
    third = after.successor("boot-3")
    assert third.records("boot-1") == records
    assert third.accounting.journal.stats.damaged_lines == 1
    third.kill()


def test_a_folder_that_another_process_uses_is_left_alone(accounts: Accounts, clock: FakeClock) -> None:
    accounts.ask()
    other = Accounts(accounts.folder, clock, "boot-2")
    assert [one.boot_id for one in other.page().boots] == ["boot-2"]
    assert not other.accounting.journal.stats.on_disk
    assert other.accounting.journal.stats.write_errors == 1


def test_a_folder_that_cannot_be_written_leaves_the_records_in_memory(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "file").write_text("")
    made = Accounts(tmp_path / "file" / "usage", clock)
    made.ask()
    assert len(requests_of(made.records())) == 1
    assert not made.accounting.journal.stats.on_disk


async def test_a_full_disk_leaves_the_records_in_memory_until_there_is_room(accounts: Accounts) -> None:
    accounts.ask()
    [path] = accounts.folder.glob("*.journal")  # type: ignore[union-attr]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
    try:
        for _ in range(5):
            accounts.ask()
        stats = accounts.accounting.journal.stats
        assert (stats.on_disk, stats.write_errors) == (False, 1)
        await accounts.accounting.journal.keep_on_disk()
        assert not stats.on_disk
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert len(requests_of(accounts.records())) == 6
    await accounts.accounting.journal.keep_on_disk()
    assert stats.on_disk
    accounts.ask()
    before_kill = accounts.records()
    after = accounts.successor()
    assert after.records("boot-1")[: len(before_kill)] == before_kill
    assert after.accounting.journal.stats.damaged_lines == 0
    after.kill()


async def test_a_file_is_written_anew_without_what_was_acknowledged(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapool_runtime.accounts.journal.COMPACT_BYTES", 1000)
    for _ in range(50):
        accounts.ask()
    [path] = accounts.folder.glob("*.journal")  # type: ignore[union-attr]
    size = path.stat().st_size
    accounts.accounting.acknowledge(accounts.boot_id, 45)
    await accounts.accounting.journal.keep_on_disk()
    assert path.stat().st_size < size / 5
    accounts.ask()
    expected = accounts.records()
    after = accounts.successor()
    assert after.records("boot-1")[: len(expected)] == expected
    after.kill()


async def test_beyond_the_bounds_the_oldest_are_summed_up_and_no_count_is_lost(
    folder: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapool_runtime.accounts.journal.FOLD_RECORDS", 100)
    made = Accounts(folder, clock, records=1000)
    expected: dict[str, Counter[str]] = {}
    for number in range(5000):
        uid = ("uid-a", "uid-b", "")[number % 3]
        made.ask(uid, completion_tokens=number)
        expected.setdefault(uid, Counter()).update(
            requests=1, prompt_tokens=10, cached_tokens=2, completion_tokens=number
        )
        if number % 50 == 0:
            clock.pass_s(10)
            made.accounting.tick()
            await made.accounting.journal.keep_on_disk()
    stats = made.accounting.journal.stats
    assert stats.records <= 1000
    assert stats.dropped_records == 0
    await made.accounting.journal.keep_on_disk()
    records = made.records()
    assert sums(records) == expected
    assert sum(isinstance(record, RemainderRecord) for record in records) > 3
    assert checkpoints_agree(records) > 0
    assert sum(minute.uptime_ns for minute in minutes_of(records)) == 16 * 60 * 10**9
    after = made.successor(records=1000)
    assert sums(after.records("boot-1")) == expected
    after.kill()


def test_a_reader_of_folded_records_while_the_disk_fails_goes_on_after_a_kill(
    folder: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapool_runtime.accounts.journal.FOLD_RECORDS", 100)
    monkeypatch.setattr("lorapool_runtime.accounts.journal.PAGE_RECORDS", 2)
    made = Accounts(folder, clock, records=1000)

    def ask(count: int) -> None:
        for number in range(count):
            made.ask(("uid-a", "uid-b", "")[number % 3], completion_tokens=number)

    ask(900)
    on_disk = sums(made.records())
    made.accounting.journal._fail(OSError("no space is left"))
    ask(200)
    read = made.page().records
    assert sum(isinstance(record, RemainderRecord) for record in read) > 2  # all of them, more than a page has
    after = made.successor(records=10_000)
    rest = after.records("boot-1", read[-1].seq)
    assert len(requests_of(rest)) > 100
    assert sums([*read, *rest]) == on_disk
    after.kill()


async def test_a_file_that_cannot_be_folded_is_tried_again(folder: Path, clock: FakeClock) -> None:
    made = Accounts(folder, clock)
    for _ in range(1500):
        made.ask()
    expected = sums(made.records())
    after = made.successor(records=1000)
    path = made.accounting.journal._path
    assert path is not None
    size = path.stat().st_size
    assert after.page("boot-1").records == []  # its file is not folded yet
    blocker = path.with_suffix(".new")
    blocker.mkdir()
    await after.accounting.journal.keep_on_disk()
    assert (path.stat().st_size, sums(after.records("boot-1"))) == (size, expected)
    blocker.rmdir()
    await after.accounting.journal.keep_on_disk()
    assert path.stat().st_size < size / 2
    assert sums(after.records("boot-1")) == expected
    after.kill()


def test_a_page_has_a_bounded_number_of_bytes_and_at_least_one_record(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(10):
        accounts.ask()
    expected = accounts.records()
    for most in (1, 1000):
        monkeypatch.setattr("lorapool_runtime.accounts.journal.PAGE_BYTES", most)
        assert len(accounts.page().records) == {1: 1, 1000: 3}[most]
        assert accounts.records() == expected


def test_without_a_folder_the_oldest_are_given_up(clock: FakeClock) -> None:
    made = Accounts(None, clock, records=1000)
    for number in range(3000):
        made.ask(completion_tokens=number)
    kept = requests_of(made.records())
    assert kept[-1].completion_tokens == 2999
    assert 900 < made.accounting.journal.stats.records <= 1000


KINDS = st.sampled_from(["request", "request", "request", "minute", "checkpoint", "load"])


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.tuples(KINDS, st.sampled_from(["a", "b", ""]), st.integers(0, 9)), min_size=1, max_size=40),
    fences=st.sets(st.integers(1, 60), max_size=4),
    cut=st.integers(0, 60),
)
def test_folding_keeps_sums_on_both_sides_of_every_fence(
    kinds: list[tuple[str, str, int]], fences: set[int], cut: int
) -> None:
    clock = FakeClock()
    made = Accounts(None, clock)
    for kind, uid, value in kinds:
        if kind == "request":
            made.ask(uid, completion_tokens=value)
        elif kind == "load":
            made.event(EventType.LOADED, uid or "c")
        elif kind == "minute":
            clock.pass_s(60 * value)
            made.accounting.tick()
    records = made.records()
    folded = fold(records, sorted(fences))
    assert [one.seq for one in folded] == sorted({one.seq for one in folded})
    assert checkpoints_agree(folded) <= checkpoints_agree(records)
    for fence in [*fences, None]:
        assert sums(folded, up_to=fence) == sums(records, up_to=fence)
        for name in ("uptime_ns", "busy_ns"):
            assert sum(getattr(one, name) for one in minutes_of(folded) if fence is None or one.seq <= fence) == sum(
                getattr(one, name) for one in minutes_of(records) if fence is None or one.seq <= fence
            )
    assert sum(isinstance(one, ResidencyRecord) for one in folded) == sum(
        isinstance(one, ResidencyRecord) for one in records
    )
    again = fold(folded, sorted(fences))
    assert sums(again) == sums(records)


def test_the_kernel_keeps_what_a_killed_process_stored(tmp_path: Path) -> None:
    """A real SIGKILL: the table and the journal are read by another process."""
    script = """
import os, signal, sys
from pathlib import Path
from accounts_kit import Accounts
from fakes_runtime import FakeClock, until
made = Accounts(Path(sys.argv[1]), FakeClock())
made.ask()
live = made.begin()
for number in range(1, 1000):
    live.count(0, 9, 0, number)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join(str(Path(one).resolve()) for one in sys.path if one)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}, check=False, timeout=300
    )
    assert done.returncode == -signal.SIGKILL
    after = Accounts(tmp_path, FakeClock(), "boot-2")
    found = requests_of(after.records("boot-1"))
    assert [(one.outcome, one.completion_tokens) for one in found] == [(Ended.COMPLETED, 5), (Ended.LOST, 999)]
    after.kill()


def test_without_room_for_the_running_table_requests_are_recorded_when_they_end(folder: Path, clock: FakeClock) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        made = Accounts(folder, clock)
        made.ask()
        made.begin()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(folder.glob("*.running"))
    after = made.successor()
    records = after.records("boot-1")
    assert [one.outcome for one in requests_of(records)] == [Ended.COMPLETED]
    end = records[-1]
    assert isinstance(end, EndRecord)
    assert end.killed
    after.kill()


def test_more_requests_than_the_table_has_rows_are_recorded_when_they_end(accounts: Accounts) -> None:
    lives = [accounts.begin() for _ in range(20)]  # it has 16
    for live in lives:
        live.count(0, 10, 2, 5)
        accounts.end(live)
    assert sums(accounts.records())["uid-a"]["completion_tokens"] == 100
    lives = [accounts.begin() for _ in range(16)]  # all rows are free again
    after = accounts.successor()
    assert sum(one.outcome is Ended.LOST for one in requests_of(after.records("boot-1"))) == 16
    after.kill()


async def test_a_process_that_stops_waits_until_its_reader_has_the_last_records(accounts: Accounts) -> None:
    accounts.ask()
    first = UsagePage.model_validate_json(await accounts.accounting.poll("", 0, 0.0))
    closing = asyncio.create_task(accounts.accounting.close())
    await until(lambda: accounts.page().boots[-1].ended)
    assert not closing.done()
    page = UsagePage.model_validate_json(await accounts.accounting.poll(accounts.boot_id, first.records[-1].seq, 5.0))
    assert isinstance(page.records[-1], EndRecord)
    accounts.accounting.acknowledge(accounts.boot_id, page.records[-1].seq)
    await closing


@pytest.mark.parametrize("point", accounts_witness.POINTS)
def test_a_kill_at_every_point_loses_and_doubles_no_token(tmp_path: Path, point: str) -> None:
    count = random.randrange(2, 12) if "minute" in point or "file" in point else random.randrange(20, 150)
    path = os.pathsep.join(str(Path(one).resolve()) for one in sys.path if one)
    command = [
        sys.executable,
        accounts_witness.__file__,
        str(tmp_path / "usage"),
        str(tmp_path / "file"),
        point,
        str(count),
    ]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    seen = Counter((tmp_path / "file").read_text().split())
    clock = FakeClock()
    after = Accounts(tmp_path / "usage", clock, "next")
    [boot, _own] = after.page().boots
    records = after.records(boot.boot_id)
    read = [RECORD.validate_json(line) for line in (tmp_path / "file.read").read_text().splitlines()]
    whole = {one.seq: one for one in [*read, *records]}
    everything = [whole[seq] for seq in sorted(whole)]
    assert [one.seq for one in everything] == list(range(1, boot.last_seq + 1)), (point, count)
    requests = requests_of(everything)
    assert len({one.attempt for one in requests}) == len(requests)
    assert Counter({one.attempt: one.completion_tokens for one in requests if one.completion_tokens}) == seen
    checkpoints_agree(everything)
    for minute in minutes_of(everything):
        assert minute.busy_ns == sum(line.gpu_ns for line in minute.lines) <= minute.uptime_ns
    gpu_ns = sum(minute.busy_ns for minute in minutes_of(everything)) - sum(one.gpu_ns for one in requests)
    assert abs(gpu_ns) <= 10**6  # the step in which it was killed may be in one of the two alone
    third = after.successor("third")
    assert third.records(boot.boot_id) == records
    third.kill()
