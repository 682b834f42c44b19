"""The journal of attempts: what it keeps, what it gives up, and how the ledger gets it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from gateway_world import parsed, until
from ledger_stub import TOKEN, StubLedger

from lorapool_api.common import ApiModel
from lorapool_api.settings import SettingsError
from lorapool_api.usage_protocol import (
    PAGE_RECORDS,
    ClosedRecord,
    GatewayRecord,
    OpenedRecord,
    RefusalsRecord,
)
from lorapool_gateway.ledger import records, segments
from lorapool_gateway.ledger.attempt_ids import AttemptIds
from lorapool_gateway.ledger.journal import Journal
from lorapool_gateway.ledger.segments import Reader
from lorapool_gateway.ledger.sender import LedgerClient, Sender


def closed(text: str = "a") -> records.Closed:
    return records.Closed(0, text, "completed", 1)


def content(path: Path) -> bytes:
    """What a segment has, without the space that it has not used."""
    return path.read_bytes().rstrip(b"\0")


def numbers(chunk: segments.Chunk) -> list[int]:
    return [record.seq for record in parsed(chunk)]


@asynccontextmanager
async def sending(journal: Journal, ledger: StubLedger, *tokens: str) -> AsyncIterator[Sender]:
    client = LedgerClient(f"http://127.0.0.1:{ledger.port}", lambda: tokens or (TOKEN,), lambda: None)
    sender = Sender(client, journal, interval_s=0.01, pause_s=0.01)
    task = asyncio.create_task(sender.run())
    try:
        yield sender
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


# --- identifiers and records ---------------------------------------------------------------


def test_identifiers_are_uuids_of_version_7_that_never_decrease_when_the_clock_jumps() -> None:
    now_ms = 1_700_000_000_000
    ids = AttemptIds()
    made = [ids.next(now_ms)]
    for step_ms in (0, 1, -3_600_000, 0, 3_600_001, -1, 86_400_000):
        now_ms += step_ms
        made += [ids.next(now_ms) for _ in range(5000)]
    assert made == sorted(set(made))
    assert {(uuid.UUID(item).version, uuid.UUID(item).variant) for item in made} == {(7, uuid.RFC_4122)}
    assert int(made[0][:8] + made[0][9:13], 16) == 1_700_000_000_000


def fields(kind: type[msgspec.Struct] | type[ApiModel]) -> set[str]:
    if issubclass(kind, msgspec.Struct):
        return set(kind.__struct_encode_fields__)
    return {item.alias or name for name, item in kind.model_fields.items()}


def test_the_structs_of_the_journal_are_the_models_of_the_protocol() -> None:
    for struct, model in ((records.Closed, ClosedRecord), (records.Refusals, RefusalsRecord)):
        assert fields(struct) | {"kind"} == fields(model)
    assert fields(records.Opened) - {"parties"} | fields(records.Parties) | {"kind"} == fields(OpenedRecord)
    assert not (fields(records.Opened) & fields(records.Parties))


# --- the file ------------------------------------------------------------------------------


def test_records_are_read_in_order_over_segments_and_cut_when_the_ledger_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapool_gateway.ledger.journal.SEGMENT_BYTES", 1000)
    monkeypatch.setattr("lorapool_gateway.ledger.journal.KEPT_BYTES", 0)
    journal = Journal(tmp_path, 2**20)
    assert all(journal.append(closed(str(number))) for number in range(100))
    reader, read = Reader(journal.folder), []
    while (chunk := reader.read(journal.seq, 500, 10)).bodies:
        assert not chunk.lost_before
        read += numbers(chunk)
    assert read == list(range(1, 101))
    files = len(segments.segments(journal.folder))
    journal.cut(50)
    assert 1 < len(segments.segments(journal.folder)) < files
    again = Reader(journal.folder, after=50)
    assert numbers(again.read(100, 2**20, 1000)) == list(range(51, 101))
    journal.cut(100)
    assert journal.size == 0
    [path] = segments.segments(journal.folder)
    assert content(path) == b""
    journal.close()
    assert path.stat().st_size == 0


def parties(name: str) -> bytes:
    given = dict.fromkeys(records.Parties.__struct_fields__, "x") | {"key_uid": name, "stream": False}
    return records.encode_parties(records.Parties(**given))


def opened(number: int, name: int = 1) -> records.Opened:
    return records.Opened(0, f"a{number}", f"r{number}", name, number)


@pytest.mark.parametrize("ledger_is_slow", [False, True])
@pytest.mark.parametrize("group", [1, 3, 250])
def test_the_parties_of_attempts_are_written_once_in_a_segment_and_sent_with_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ledger_is_slow: bool, group: int
) -> None:
    monkeypatch.setattr("lorapool_gateway.ledger.journal.SEGMENT_BYTES", 3000)
    if ledger_is_slow:
        monkeypatch.setattr("lorapool_gateway.ledger.journal.RECENT_BYTES", 0)
    journal = Journal(tmp_path, 2**20)
    reader, read = Reader(journal.folder), list[GatewayRecord]()
    given = [opened(number, 1 if number % 3 else 2) for number in range(1, 501)]
    both = {1: parties("one"), 2: parties("two"), 3: parties("unused")}
    while len(read) < 500:
        batch, given = given[:group], given[group:]
        assert not journal.write(batch, both)
        chunk = journal.recent(len(read), 100)
        if chunk is None:
            reader.seek(len(read))
            chunk = reader.read(journal.seq, 2**20, 100)
        assert len(parsed(chunk)) <= 100
        read += parsed(chunk)
        journal.cut(len(read) // 2)
    found = [item for item in read if isinstance(item, OpenedRecord)]
    assert [(item.seq, item.attempt, item.request_id) for item in found] == [
        (number, f"a{number}", f"r{number}") for number in range(1, 501)
    ]
    assert [item.key_uid for item in found] == ["one" if number % 3 else "two" for number in range(1, 501)]
    left = segments.segments(journal.folder)
    assert len(left) > 3
    for path in left:
        assert content(path).count(b"keyUid") <= 2
        assert b"unused" not in content(path)
    journal.close()


def test_an_attempt_whose_parties_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20)
    for number in range(3):
        journal.write([opened(number)], {1: parties("one")})
        journal.append(closed(f"a{number}"))
    journal.close()
    [path] = segments.segments(journal.folder)
    path.write_bytes(path.read_bytes().replace(b"parties", b"partiez", 1))
    reader = Reader(journal.folder)
    chunks = list(iter(lambda: reader.read(None, 2**20, 100), segments.Chunk()))
    assert [numbers(chunk) for chunk in chunks] == [[2], [4], [6]]
    assert [chunk.lost_before for chunk in chunks] == [2, 4, 6]
    assert reader.damaged == 3


def test_records_that_are_written_together_are_read_and_sent_from_any_number_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20)
    for size in (1, 2, 3, 150):
        assert not journal.write([closed() for _ in range(size)], {})
    for after in range(156):
        chunks, reader = list[segments.Chunk](), Reader(journal.folder, after=after)
        while (chunk := reader.read(journal.seq, 2**20, 7)).bodies:
            chunks.append(chunk)
        assert [number for chunk in chunks for number in numbers(chunk)] == list(range(after + 1, 157))
        assert {len(numbers(chunk)) for chunk in chunks[:-1]} <= {7}
    assert len(content(segments.segments(journal.folder)[0]).splitlines()) == 5
    assert [numbers(chunk) for chunk in (journal.recent(3, 60), journal.recent(6, 100)) if chunk is not None] == [
        [4, 5, 6], [*range(7, 107)],
    ]  # fmt: skip
    assert journal.recent(7, 1000) is None
    journal.close()


def test_more_records_than_a_segment_has_room_for_are_kept_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapool_gateway.ledger.journal.SEGMENT_BYTES", 1000)
    journal = Journal(tmp_path, 2**20)
    names = {number: parties(f"key {number}") for number in range(1, 41)}
    assert not journal.write([opened(number, number) for number in range(1, 41)], names)
    chunk = Reader(journal.folder).read(40, 2**20, 1000)
    assert [record.key_uid for record in parsed(chunk) if isinstance(record, OpenedRecord)] == [
        f"key {number}" for number in range(1, 41)
    ]
    assert len(segments.segments(journal.folder)) > 10
    journal.close()


def test_a_full_journal_gives_up_new_records_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    lost: list[str] = []
    journal = Journal(tmp_path, 1000, lost.append)
    kept = [journal.append(closed()) for _ in range(20)]
    assert 5 < sum(kept) < 20
    assert kept == sorted(kept, reverse=True)
    assert lost == ["full"] * kept.count(False)
    journal.max_bytes = 10_000
    assert journal.append(closed())
    assert numbers(Reader(journal.folder).read(None, 2**20, 100)) == list(range(1, sum(kept) + 2))
    journal.close()


def test_a_disk_that_is_full_costs_records_but_never_a_gap_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapool_gateway.ledger.journal.SEGMENT_BYTES", 250)
    lost: list[str] = []
    journal = Journal(tmp_path, 2**20, lost.append)
    allocate = os.posix_fallocate

    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorapool_gateway.ledger.journal.os.posix_fallocate", refuse)
    kept = [journal.append(closed()) for _ in range(5)]
    assert kept == [True, True, False, False, False]
    together = [opened(1), closed(), closed()]
    assert journal.write(together, {1: parties("one")}) == together
    assert len(segments.segments(journal.folder)) == 1
    monkeypatch.setattr("lorapool_gateway.ledger.journal.os.posix_fallocate", allocate)
    assert journal.append(closed())
    assert lost == ["disk"] * 6
    reader = Reader(journal.folder)
    assert numbers(reader.read(None, 2**20, 100)) == [1, 2, 3]
    assert (reader.damaged, reader.torn) == (0, 0)
    journal.close()


def test_a_folder_that_cannot_be_written_stops_the_start_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="LORAPOOL_GATEWAY_JOURNAL_DIR"):
        Journal(tmp_path / "file", 2**20)


@pytest.mark.parametrize("bit", [0, 3, 8, 70, 73 * 8])
def test_a_flipped_bit_costs_one_record_which_is_kept_aside(tmp_path: Path, bit: int) -> None:
    journal = Journal(tmp_path, 2**20)
    for _ in range(5):
        journal.append(closed())
    journal.close()
    [path] = segments.segments(journal.folder)
    flipped = bytearray(path.read_bytes())
    line = len(flipped) // 5
    flipped[line * 2 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    reader = Reader(journal.folder)
    first = reader.read(5, 2**20, 100)
    second = reader.read(5, 2**20, 100)
    assert (numbers(first), numbers(second), second.lost_before) == ([1, 2], [4, 5], 4)
    assert reader.damaged >= 1
    aside = (tmp_path / segments.DAMAGED / f"{journal.boot_id}.log").read_bytes()
    assert aside == bytes(flipped[line * 2 : line * 3])


@pytest.mark.parametrize("unused", [0, 5000])
def test_a_torn_last_line_is_kept_aside(tmp_path: Path, unused: int) -> None:
    journal = Journal(tmp_path, 2**20)
    for _ in range(3):
        journal.append(closed())
    journal.close()
    [path] = segments.segments(journal.folder)
    path.write_bytes(path.read_bytes()[:-7] + bytes(unused))
    reader = Reader(journal.folder)
    assert numbers(reader.read(None, 2**20, 100)) == [1, 2]
    assert reader.torn == 1


# --- sending -------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [1000, 50_000, 2**22])
async def test_batches_are_sent_and_the_journal_of_a_stopped_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment: int
) -> None:
    monkeypatch.setattr("lorapool_gateway.ledger.journal.SEGMENT_BYTES", segment)
    journal = Journal(tmp_path, 2**20)
    async with StubLedger().running() as ledger, sending(journal, ledger) as sender:
        for _ in range(2 * PAGE_RECORDS + 7):
            journal.append(closed())
        await until(lambda: journal.unsent == 0)
        assert ledger.numbers(journal) == list(range(1, 2 * PAGE_RECORDS + 8))
        assert journal.lag_s == 0.0
        journal.append(closed())
        await sender.send_last()
    assert journal.boot_id in ledger.ended
    assert len(ledger.numbers(journal)) == 2 * PAGE_RECORDS + 8
    journal.close()
    assert os.listdir(tmp_path) == []


async def test_what_the_ledger_does_not_answer_is_sent_again_and_committed_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20)
    async with StubLedger(status=503).running() as ledger, sending(journal, ledger):
        for _ in range(50):
            journal.append(closed())
        await until(lambda: ledger.calls > 2)
        assert journal.unsent == 50
        assert journal.lag_s >= 0.0
        ledger.lose_answers, ledger.status = 3, 200
        await until(lambda: journal.unsent == 0)
        assert ledger.numbers(journal) == list(range(1, 51))
    journal.close()


async def test_both_tokens_are_tried_during_a_rotation(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20)
    async with StubLedger().running() as ledger, sending(journal, ledger, "n" * 48, TOKEN):
        journal.append(closed())
        await until(lambda: journal.unsent == 0)
    journal.close()


async def test_a_ledger_that_was_restored_or_knows_more_is_followed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20)
    async with StubLedger().running() as ledger, sending(journal, ledger):
        for _ in range(10):
            journal.append(closed())
        await until(lambda: journal.unsent == 0)
        ledger.cursors[journal.boot_id] = 4  # restored from a backup
        del ledger.committed[journal.boot_id][4:]
        journal.append(closed())
        await until(lambda: journal.unsent == 0)
        assert ledger.numbers(journal) == list(range(1, 12))
        assert ledger.gaps == []
    journal.close()


async def test_records_that_cannot_be_sent_any_more_are_named_and_do_not_stop_the_rest(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20)
    for _ in range(10):
        journal.append(closed())
    journal.close()
    [path] = segments.segments(journal.folder)
    flipped = bytearray(path.read_bytes())
    flipped[40] ^= 1
    path.write_bytes(flipped)
    own = Journal(tmp_path, 2**20)
    async with StubLedger().running() as ledger, sending(own, ledger):
        await until(lambda: journal.boot_id in ledger.ended)
        assert (ledger.numbers(journal), ledger.gaps) == (list(range(2, 11)), [(1, 1)])
    own.close()


@pytest.mark.parametrize("hole", [0, 1, 300, 4096])
def test_what_a_crashed_machine_did_not_write_between_records_hides_none_that_it_did(tmp_path: Path, hole: int) -> None:
    journal = Journal(tmp_path, 2**20)
    for _ in range(5):
        journal.append(closed())
    journal.close()
    [path] = segments.segments(journal.folder)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + bytes(hole) + b"".join(lines[3:]) + bytes(5000))
    reader = Reader(journal.folder)
    first, second = reader.read(None, 2**20, 100), reader.read(None, 2**20, 100)
    assert (numbers(first), numbers(second), second.lost_before) == ([1, 2], [4, 5], 4)
    assert (reader.damaged, reader.torn) == (0, 0)


KILLED = """
import sys
from pathlib import Path
from lorapool_gateway.ledger.journal import Journal
from lorapool_gateway.ledger.records import Closed
journal = Journal(Path(sys.argv[1]), 2**28)
print(journal.boot_id, flush=True)
while True:
    journal.append(Closed(0, "x", "completed", 1))
    print(journal.seq, flush=True)
"""


async def test_a_successor_sends_all_that_a_killed_process_wrote(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    boot_id = (await process.stdout.readline()).decode().strip()
    said = [int(await process.stdout.readline()) for _ in range(1500)]
    alive = Journal(tmp_path, 2**28)
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    async with StubLedger().running() as ledger, sending(alive, ledger) as sender:
        await until(lambda: boot_id in ledger.ended and sender.older == 0)
        sent = [record.seq for record in ledger.committed[boot_id]]
        assert sent == list(range(1, len(sent) + 1))
        assert len(sent) >= said[-1]
        assert boot_id not in os.listdir(tmp_path)
    alive.close()


async def test_a_folder_of_others_is_left_alone_and_stops_nothing(tmp_path: Path) -> None:
    foreign = [tmp_path / "lost+found", tmp_path / uuid.uuid4().hex]
    for folder in foreign:
        folder.mkdir()
    (foreign[1] / "lock").mkdir()  # it cannot be opened
    journal = Journal(tmp_path, 2**20)
    journal.append(closed())
    async with StubLedger().running() as ledger, sending(journal, ledger):
        await until(lambda: not journal.unsent)
    journal.close()
    assert all(folder.is_dir() for folder in foreign)


async def test_the_journal_of_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    other, own = Journal(tmp_path, 2**20), Journal(tmp_path, 2**20)
    other.append(closed())
    async with StubLedger().running() as ledger, sending(own, ledger):
        own.append(closed())
        await until(lambda: own.unsent == 0)
        assert other.boot_id not in ledger.committed
    other.close()
    own.close()


async def test_the_disk_is_written_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("lorapool_gateway.ledger.journal.SYNC_S", 0.01)
    monkeypatch.setattr("lorapool_gateway.ledger.journal.os.fdatasync", synced.append)
    journal = Journal(tmp_path, 2**20)
    task = asyncio.create_task(journal.keep_synced())
    journal.append(closed())
    await until(lambda: synced)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    journal.close()
