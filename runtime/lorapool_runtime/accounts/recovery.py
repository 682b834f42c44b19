"""What earlier processes of this pod have left in the folder: their records, and what they were doing when killed.

For a killed process the last records are made here, from its running table: its requests with what was computed for
them, the minute that was open, and the end. They are the same however often this is done.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lorapool_api.usage_protocol import (
    Ended,
    EndRecord,
    MinuteLine,
    MinuteRecord,
    RequestRecord,
    RuntimeRecord,
)
from lorapool_runtime.accounts import journal_file
from lorapool_runtime.accounts.boot_records import BootRecords
from lorapool_runtime.accounts.running_table import FoundRow, FoundTable, read_table

log = logging.getLogger(__name__)

OUTCOMES = (Ended.LOST, Ended.COMPLETED, Ended.FAILED, Ended.CANCELLED)
"""By their number in the running table."""


@dataclass(frozen=True, slots=True)
class Recovered:
    path: Path | None
    """The file for this process's records; None where the folder cannot be used."""
    earlier: list[tuple[BootRecords, Path]] = field(default_factory=list)
    damaged: int = 0
    """Lines and rows that cannot be read."""
    error: str = ""
    """Why the folder cannot be used."""


def recover(folder: Path | None, boot_id: str) -> Recovered:
    """Takes the folder for this process. Raises nothing: a folder that cannot be used is not used."""
    if folder is None:
        return Recovered(None)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _lock(folder)
        found = journal_file.journals(folder)
        number = max((one[0] for one in found), default=0) + 1
        earlier: list[tuple[BootRecords, Path]] = []
        damaged = 0
        for _number, old_id, path in found:
            boot, bad = _read(old_id, path)
            damaged += bad
            if boot is None:
                journal_file.remove(path)
            else:
                earlier.append((boot, path))
        _probe(folder)
        return Recovered(journal_file.journal_path(folder, number, boot_id), earlier, damaged)
    except OSError as error:
        return Recovered(None, error=str(error))


def _lock(folder: Path) -> None:
    """Until this process ends. Raises OSError where another process has the folder."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise BlockingIOError(f"another process uses {folder}") from None


def _probe(folder: Path) -> None:
    """Raises OSError where no file can be made."""
    path = folder / "probe"
    path.write_bytes(b"")
    path.unlink()


def _read(boot_id: str, path: Path) -> tuple[BootRecords | None, int]:
    """The records of a process that has ended, None where nothing is left of it, and how much cannot be read."""
    boot, damaged = BootRecords(boot_id, ended=True), 0
    has_end, acknowledged = False, 0
    for line in journal_file.read_lines(path):
        try:
            found = json.loads(line or b"")
            if "kind" in found:
                boot.add(int(found["seq"]), line or b"")
                has_end = has_end or found["kind"] == "end"
            else:
                acknowledged = max(acknowledged, int(found.get("acknowledged", 0)))
                for fence in found.get("fences", ()):
                    if int(fence) not in boot.fences:
                        insort(boot.fences, int(fence))
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        log.error("%d lines of usage records are damaged and left out", damaged, extra={"folder": str(path)})
    if not has_end:
        damaged += _close(boot, path)
    boot.acknowledge(acknowledged)
    if not boot.lines:
        return None, damaged
    return boot, damaged


def _close(boot: BootRecords, path: Path) -> int:
    """Adds the last records of a killed process, in memory and to its file. Returns how much cannot be read."""
    table_path = journal_file.table_path(path)
    table = read_table(table_path) if table_path.exists() else None
    if table is not None and table.boot_id != boot.boot_id:
        table = None
    known = set(boot.seqs)
    new: list[bytes] = []
    for record in _last_records(boot, table, known):
        if record.seq not in known:
            line = record.model_dump_json(by_alias=True).encode()
            new.append(line)
            boot.add(record.seq, line)
    try:
        with path.open("ab", buffering=0) as file:
            cut = b"" if journal_file.ends_with_a_line(path) else b"\n"
            data = cut + b"".join(map(journal_file.line_of, new))
            if file.write(data) != len(data):
                raise OSError("the disk is full")
        table_path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the end of a killed process cannot be written", extra={"error": str(error)})
    return 0 if table is None else table.damaged


def _last_records(boot: BootRecords, table: FoundTable | None, known: set[int]) -> Iterator[RuntimeRecord]:
    if not boot.last_seq and (table is None or not table.last_seq):
        return
    if table is None:
        ended_ms = _last_time(boot)
        yield EndRecord(seq=boot.last_seq + 1, ended_unix_ms=ended_ms, killed=True)
        return
    seq = max(table.last_seq, boot.last_seq, table.span_seq, *(row.ended_seq for row in table.rows))
    for row in sorted(table.rows, key=lambda row: (row.started_unix_ms, row.texts)):
        if row.ended_seq and row.ended_seq in known:
            continue
        if not row.ended_seq:
            seq += 1
        yield _lost(row, row.ended_seq or seq, table.sign_unix_ms)
    if not (table.span_seq and table.span_seq in known):
        lines = [
            MinuteLine(uid=line.texts[0], model=line.texts[1], gpu_ns=line.gpu_ns, byte_ns=line.byte_ns)
            for line in table.lines
            if line.gpu_ns or line.byte_ns
        ]
        busy_ns = sum(line.gpu_ns for line in lines)
        if not table.span_seq:
            seq += 1
        yield MinuteRecord(
            seq=table.span_seq or seq,
            minute_unix_s=table.span_minute_unix_s,
            uptime_ns=max(table.sign_ns - table.span_ns, busy_ns),
            busy_ns=busy_ns,
            lines=lines,
        )
    yield EndRecord(seq=seq + 1, ended_unix_ms=table.sign_unix_ms, killed=True)


def _lost(row: FoundRow, seq: int, sign_unix_ms: int) -> RequestRecord:
    attempt, request_id, key_uid, project, uid, digest, model = row.texts
    return RequestRecord(
        seq=seq,
        attempt=attempt,
        request_id=request_id,
        key_uid=key_uid,
        project=project,
        uid=uid,
        digest=digest,
        model=model,
        sequences=row.sequences,
        outcome=OUTCOMES[row.outcome if row.ended_seq else 0],
        started_unix_ms=row.started_unix_ms,
        ended_unix_ms=max(sign_unix_ms, row.started_unix_ms),
        prompt_tokens=row.prompt_tokens,
        cached_tokens=row.cached_tokens,
        completion_tokens=row.completion_tokens,
        gpu_ns=row.gpu_ns,
    )


def _last_time(boot: BootRecords) -> int:
    """The last time that the records of a process name."""
    times = [0]
    for line in boot.lines:
        found = json.loads(line)
        times += [found.get("startedUnixMs", 0), found.get("endedUnixMs", 0), found.get("minuteUnixS", 0) * 1000]
    return max(times)
