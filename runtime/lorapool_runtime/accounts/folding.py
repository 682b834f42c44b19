"""Fewer records with the same sums, for a time in which the ledger does not collect them. Pure.

Requests become one remainder for each hour, key, project, account and outcome. The minutes of an hour become one.
Checkpoints among the requests of their account go, since their sums end within a remainder; the last one stays where
it follows them all. Loads and unloads stay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from pydantic import TypeAdapter

from lorapool_api.usage_protocol import (
    CheckpointRecord,
    MinuteLine,
    MinuteRecord,
    RemainderRecord,
    RequestRecord,
    RuntimeRecord,
)

RECORD: TypeAdapter[RuntimeRecord] = TypeAdapter(RuntimeRecord)

_HOUR_S = 3600


def fold(records: Sequence[RuntimeRecord], fences: Sequence[int]) -> list[RuntimeRecord]:
    """`records` in order, folded. `fences`: numbers, in order, that no remainder or minute may reach across.

    A reader that has committed everything up to a fence finds nothing of that again in what follows.
    """
    parts: dict[int, list[RuntimeRecord]] = {}
    for record in records:
        parts.setdefault(bisect_left(fences, record.seq), []).append(record)
    return [folded for part in parts.values() for folded in _fold(part)]


def _fold(records: list[RuntimeRecord]) -> list[RuntimeRecord]:
    requests: dict[tuple[int, str, str, str, str], RemainderRecord] = {}
    minutes: dict[int, MinuteRecord] = {}
    checkpoints: dict[str, CheckpointRecord] = {}
    last_seq: dict[str, int] = {}
    others: list[RuntimeRecord] = []
    for record in records:
        match record:
            case RequestRecord() | RemainderRecord():
                new = record if isinstance(record, RemainderRecord) else _remainder(record)
                key = (new.hour_unix_s, new.key_uid, new.project, new.uid, new.outcome.value)
                requests[key] = new if key not in requests else _sum(requests[key], new)
                last_seq[new.uid] = new.seq
            case MinuteRecord():
                hour = record.minute_unix_s // _HOUR_S
                minutes[hour] = record if hour not in minutes else _joined(minutes[hour], record)
            case CheckpointRecord():
                checkpoints[record.uid] = record
            case _:
                others.append(record)
    kept = [one for uid, one in checkpoints.items() if one.seq > last_seq.get(uid, 0)]
    return sorted([*requests.values(), *minutes.values(), *kept, *others], key=lambda record: record.seq)


def _remainder(record: RequestRecord) -> RemainderRecord:
    return RemainderRecord(
        seq=record.seq,
        first_seq=record.seq,
        hour_unix_s=record.ended_unix_ms // 1000 // _HOUR_S * _HOUR_S,
        key_uid=record.key_uid,
        project=record.project,
        uid=record.uid,
        model=record.model,
        outcome=record.outcome,
        requests=1,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.completion_tokens,
        gpu_ns=record.gpu_ns,
    )


def _sum(one: RemainderRecord, other: RemainderRecord) -> RemainderRecord:
    summed = {
        name: getattr(one, name) + getattr(other, name)
        for name in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "gpu_ns")
    }
    return other.model_copy(update={**summed, "first_seq": min(one.first_seq, other.first_seq)})


def _joined(one: MinuteRecord, other: MinuteRecord) -> MinuteRecord:
    return MinuteRecord(
        seq=other.seq,
        minute_unix_s=min(one.minute_unix_s, other.minute_unix_s),
        uptime_ns=one.uptime_ns + other.uptime_ns,
        busy_ns=one.busy_ns + other.busy_ns,
        lines=_lines([*one.lines, *other.lines]),
    )


def _lines(lines: Iterable[MinuteLine]) -> list[MinuteLine]:
    found: dict[str, MinuteLine] = {}
    for line in lines:
        if (before := found.get(line.uid)) is not None:
            summed = {"gpu_ns": before.gpu_ns + line.gpu_ns, "byte_ns": before.byte_ns + line.byte_ns}
            line = line.model_copy(update=summed)
        found[line.uid] = line
    return list(found.values())
