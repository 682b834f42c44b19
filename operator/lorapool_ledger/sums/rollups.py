"""Sums by hour and day, replaced whole from the facts of the hours that intake has marked.

An hour is summed in a reader's transaction and replaced in a short one of the writer. Its mark goes with it unless it
was marked again meanwhile. Nothing is ever added to a sum, so that no crash and no second run can count twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, select
from sqlalchemy.exc import DBAPIError

from lorapool_api.usage_protocol import AttemptEnd, Ended
from lorapool_ledger.billing.billed import GatewayHalf, Result, RuntimeHalf, result_of
from lorapool_ledger.intake.runtime_page import GONE
from lorapool_ledger.metrics import Metrics
from lorapool_ledger.store.database import Database, LedgerDatabaseError
from lorapool_ledger.store.tables import (
    SPAN_S,
    attempt_closed,
    attempt_opened,
    boot,
    dirty_hour,
    gateway,
    mark,
    minute_line,
    model_day,
    pod_day,
    pod_hour,
    pod_minute,
    runtime_request,
    span,
    usage_day,
    usage_hour,
)
from lorapool_ledger.store.writes import HOUR_S, report
from lorapool_ledger.sums.joined import GATEWAY_SIDE, closed_alone_in, ended_in, has_runtime_half
from lorapool_ledger.sums.spans import make_span, missing_spans

log = logging.getLogger("lorapool_ledger")

DAY_S = 24 * HOUR_S
INTERVAL_S = 2.0
SHARE = 5
"""The next pass waits for at least this many times the duration of the last one."""
OPEN_AFTER_S = 2 * HOUR_S
"""An attempt that its gateway has not closed after this long never will be: no request lasts as long."""
POD = "*"
"""`uid` of the row of a whole pod."""
FACTS_FROM = "facts_from"
"""Mark: hours before it have no facts any more; their sums are final."""
ROWS = 500
"""Rows of one INSERT."""

_KEY = ("project", "key_uid", "base", "uid", "model", "outcome")
_SUMS = (
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "gpu_ns",
    "billed_prompt_tokens",
    "billed_cached_tokens",
    "billed_completion_tokens",
    "delivered_tokens",
)


@dataclass(frozen=True, slots=True)
class HourSums:
    hour_unix_s: int
    marked: int
    """Value of the mark when the facts were read."""
    usage: list[dict[str, Any]]
    pods: list[dict[str, Any]]


def sums_of_hour(connection: Connection, hour_unix_s: int, now_s: int) -> HourSums:
    """Sums the facts of an hour. Changes nothing."""
    found = select(dirty_hour.c.marked).where(dirty_hour.c.hour_unix_s == hour_unix_s)
    marked = connection.execute(found).scalar() or 0
    sums: dict[tuple[str, ...], list[int]] = {}
    span = hour_unix_s, hour_unix_s + HOUR_S
    for account, requests, result in (*_of_runtimes(connection, *span), *_of_gateways(connection, *span)):
        _add(sums, account, requests, result)
    for account, requests in _never_closed(connection, *span, now_s):
        _add(sums, account, requests, result_of(None, None, runtime_gone=True))
    usage = [
        {"hour_unix_s": hour_unix_s, **dict(zip(_KEY, key, strict=True)), **dict(zip(_SUMS, values, strict=True))}
        for key, values in sums.items()
    ]
    return HourSums(hour_unix_s, marked, usage, _pods(connection, *span))


_Account = tuple[str, str, str, str, str]


def _add(sums: dict[tuple[str, ...], list[int]], account: _Account, requests: int, result: Result) -> None:
    values = (
        requests,
        result.prompt_tokens,
        result.cached_tokens,
        result.completion_tokens,
        result.gpu_ns,
        result.billed_prompt_tokens,
        result.billed_cached_tokens,
        result.billed_completion_tokens,
        result.delivered_tokens,
    )
    kept = sums.setdefault((*account, result.outcome.value), [0] * len(values))
    for index, value in enumerate(values):
        kept[index] += value


def _of_runtimes(connection: Connection, start_s: int, end_s: int) -> Iterable[tuple[_Account, int, Result]]:
    half = runtime_request.c
    account = (half.project, half.key_uid, boot.c.base, half.uid, half.model)
    joined = runtime_request.join(boot, boot.c.id == half.boot).outerjoin(
        attempt_closed, (attempt_closed.c.attempt == half.attempt) & (half.attempt != "")
    )
    found = (
        select(
            *account,
            half.outcome.label("ended"),
            attempt_closed.c.outcome.label("closed"),
            func.sum(half.requests),
            func.sum(half.prompt_tokens),
            func.sum(half.cached_tokens),
            func.sum(half.completion_tokens),
            func.sum(half.gpu_ns),
            func.sum(attempt_closed.c.completion_tokens),
        )
        .select_from(joined)
        .where(ended_in(start_s, end_s))
        .group_by(*account, half.outcome, attempt_closed.c.outcome)
    )
    for *names, ended, closed, requests, prompt, cached, completion, gpu_ns, delivered in connection.execute(found):
        runtime = RuntimeHalf(Ended(ended), int(prompt), int(cached), int(completion), int(gpu_ns))
        other = GatewayHalf(AttemptEnd(closed), completion_tokens=int(delivered or 0)) if closed is not None else None
        yield (names[0], names[1], names[2], names[3], names[4]), int(requests), result_of(runtime, other)


def _of_gateways(connection: Connection, start_s: int, end_s: int) -> Iterable[tuple[_Account, int, Result]]:
    opened, closed = attempt_opened.c, attempt_closed.c
    account = (opened.project, opened.key_uid, opened.base, opened.uid, opened.model)
    counted = closed.prompt_tokens.is_not(None) | closed.completion_tokens.is_not(None)
    gone = func.coalesce(boot.c.end == GONE, False)
    found = (
        select(
            *account,
            closed.outcome,
            counted,
            gone,
            func.count(),
            *(
                func.sum(func.coalesce(one, 0))
                for one in (closed.prompt_tokens, closed.cached_tokens, closed.completion_tokens)
            ),
        )
        .select_from(GATEWAY_SIDE)
        .where(closed_alone_in(start_s, end_s))
        .group_by(*account, closed.outcome, counted, gone)
    )
    for *names, outcome, has_counts, is_gone, requests, prompts, cacheds, completions in connection.execute(found):
        counts = (int(prompts), int(cacheds), int(completions)) if has_counts else (None, None, None)
        half = GatewayHalf(AttemptEnd(outcome), *counts)
        account_names = (names[0], names[1], names[2], names[3], names[4])
        yield account_names, int(requests), result_of(None, half, runtime_gone=bool(is_gone))


def _never_closed(connection: Connection, start_s: int, end_s: int, now_s: int) -> Iterable[tuple[_Account, int]]:
    """Attempts of which nothing is known: gateway and runtime are gone with their records."""
    opened = attempt_opened.c
    account = (opened.project, opened.key_uid, opened.base, opened.uid, opened.model)
    found = (
        select(*account, func.count())
        .select_from(
            attempt_opened.join(boot, boot.c.boot_id == opened.boot_id)
            .join(gateway, gateway.c.id == opened.gateway)
            .outerjoin(attempt_closed, attempt_closed.c.attempt == opened.attempt)
        )
        .where(
            opened.opened_unix_ms >= start_s * 1000,
            opened.opened_unix_ms < end_s * 1000,
            attempt_closed.c.attempt.is_(None),
            boot.c.end == GONE,
            gateway.c.ended | (opened.opened_unix_ms < (now_s - OPEN_AFTER_S) * 1000),
            ~has_runtime_half,
        )
        .group_by(*account)
    )
    for *names, requests in connection.execute(found):
        yield (names[0], names[1], names[2], names[3], names[4]), int(requests)


def _pods(connection: Connection, start_s: int, end_s: int) -> list[dict[str, Any]]:
    minute, line = pod_minute.c, minute_line.c
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    whole = (
        select(minute.boot, boot.c.base, func.sum(minute.uptime_ns), func.sum(minute.busy_ns))
        .join(boot, boot.c.id == minute.boot)
        .where(minute.minute_unix_s >= start_s, minute.minute_unix_s < end_s)
        .group_by(minute.boot, boot.c.base)
    )
    for boot_id, base, uptime, busy in connection.execute(whole):
        rows[boot_id, POD] = _pod_row(start_s, boot_id, POD, base, int(uptime), int(busy), 0)
    parts = select(line.boot, line.uid, line.model, line.gpu_ns, line.byte_ns).where(
        line.minute_unix_s >= start_s, line.minute_unix_s < end_s
    )
    for boot_id, uid, model, gpu_ns, byte_ns in connection.execute(parts):
        row = rows.setdefault((boot_id, uid), _pod_row(start_s, boot_id, uid, model, 0, 0, 0))
        row["model"] = max(row["model"], model)
        row["gpu_ns"] += gpu_ns
        row["byte_ns"] += int(byte_ns)
    for row in rows.values():
        row["byte_ns"] = str(row["byte_ns"])
    return list(rows.values())


def _pod_row(start_s: int, boot_id: int, uid: str, model: str, uptime: int, gpu: int, bytes_: int) -> dict[str, Any]:
    names = {"hour_unix_s": start_s, "boot": boot_id, "uid": uid, "model": model}
    return {**names, "uptime_ns": uptime, "gpu_ns": gpu, "byte_ns": bytes_}


def replace_hour(connection: Connection, sums: HourSums) -> None:
    """Makes these the sums of the hour. Its mark stays until its day is made, too."""
    hour = sums.hour_unix_s
    _replace(connection, usage_hour, "hour_unix_s", hour, sums.usage)
    _replace(connection, pod_hour, "hour_unix_s", hour, sums.pods)


def replace_day(connection: Connection, day_unix_s: int, hours_made: Mapping[int, int]) -> None:
    """Makes the sums of a day again from those of its hours.

    `hours_made`: by hour, the value of the mark when it was summed. The marks go, unless there are newer ones.
    """
    key = [usage_hour.c[name] for name in _KEY]
    sums = [func.sum(usage_hour.c[name]).label(name) for name in _SUMS]
    hours = (usage_hour.c.hour_unix_s >= day_unix_s) & (usage_hour.c.hour_unix_s < day_unix_s + DAY_S)
    by_key = [dict(row) for row in connection.execute(select(*key, *sums).where(hours).group_by(*key)).mappings()]
    _replace(connection, usage_day, "day_unix_s", day_unix_s, [_whole(row, day_unix_s) for row in by_key])
    by_model: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in by_key:
        names = {name: row[name] for name in _KEY if name != "key_uid"}
        kept = by_model.setdefault(tuple(names.values()), {**names, **dict.fromkeys(_SUMS, 0)})
        for name in _SUMS:
            kept[name] += int(row[name])
    _replace(connection, model_day, "day_unix_s", day_unix_s, [_whole(row, day_unix_s) for row in by_model.values()])
    pods: dict[tuple[int, str], dict[str, Any]] = {}
    of_day = (pod_hour.c.hour_unix_s >= day_unix_s) & (pod_hour.c.hour_unix_s < day_unix_s + DAY_S)
    for of_hour in connection.execute(select(pod_hour).where(of_day)).mappings():
        new = {"day_unix_s": day_unix_s, "boot": of_hour["boot"], "uid": of_hour["uid"], "model": of_hour["model"]}
        kept = pods.setdefault((of_hour["boot"], of_hour["uid"]), {**new, "uptime_ns": 0, "gpu_ns": 0, "byte_ns": 0})
        kept["model"] = max(kept["model"], of_hour["model"])
        for name in ("uptime_ns", "gpu_ns", "byte_ns"):
            kept[name] += int(of_hour[name])
    for (boot_id, uid), row in list(pods.items()):
        if uid not in ("", POD):
            whole = {**row, "uid": POD, "model": "", "uptime_ns": 0, "gpu_ns": 0, "byte_ns": 0}
            pods.setdefault((boot_id, POD), whole)["byte_ns"] += row["byte_ns"]
    _replace(
        connection,
        pod_day,
        "day_unix_s",
        day_unix_s,
        [{**row, "byte_ns": str(row["byte_ns"])} for row in pods.values()],
    )
    connection.execute(delete(span).where(span.c.day_unix_s == day_unix_s // SPAN_S * SPAN_S))
    for hour, marked in hours_made.items():
        connection.execute(delete(dirty_hour).where(dirty_hour.c.hour_unix_s == hour, dirty_hour.c.marked == marked))


def _whole(row: Mapping[str, Any], day_unix_s: int) -> dict[str, Any]:
    """The row of a day; PostgreSQL's sums are decimals."""
    return {"day_unix_s": day_unix_s, **row, **{name: int(row[name]) for name in _SUMS}}


def _replace(connection: Connection, table: Table, column: str, start: int, rows: Sequence[Mapping[str, Any]]) -> None:
    connection.execute(delete(table).where(table.c[column] == start))
    for first in range(0, len(rows), ROWS):
        connection.execute(insert(table), [dict(row) for row in rows[first : first + ROWS]])


class RollUps:
    def __init__(self, database: Database, metrics: Metrics, *, now_s: Callable[[], float] = time.time) -> None:
        self._database = database
        self._metrics = metrics
        self._now_s = now_s
        self._stale_since_s: float | None = None

    @property
    def lag_s(self) -> float:
        """For how long sums have been older than facts; 0 when they are not."""
        return 0.0 if self._stale_since_s is None else max(0.0, time.monotonic() - self._stale_since_s)

    async def run(self) -> None:
        """Makes sums until cancelled."""
        while True:
            began_s = time.monotonic()
            try:
                await self.catch_up()
            except (LedgerDatabaseError, DBAPIError) as error:
                log.warning("the sums were not made; tried again", extra={"error": str(error)[:300]})
            await asyncio.sleep(max(INTERVAL_S, SHARE * (time.monotonic() - began_s)))

    async def catch_up(self) -> int:
        """Makes the sums of all marked hours and of their days. Returns how many hours it made."""
        began_s, now_s = time.monotonic(), int(self._now_s())
        hours, facts_from, spans = await self._database.read(lambda connection: _waiting(connection, now_s))
        for start in spans:
            await self._database.write(lambda connection, start=start: make_span(connection, start))  # type: ignore[misc]
        self._metrics.dirty_hours.set(len(hours))
        if not hours:
            self._stale_since_s = None
            return 0
        self._stale_since_s = self._stale_since_s or began_s
        made: dict[int, dict[int, int]] = {}
        for hour in hours:
            if hour < facts_from:
                await self._database.write(lambda connection, hour=hour: _give_up(connection, hour, now_s))  # type: ignore[misc]
                continue
            sums = await self._database.read(lambda connection, hour=hour: sums_of_hour(connection, hour, now_s))  # type: ignore[misc]
            await self._database.write(lambda connection, sums=sums: replace_hour(connection, sums))  # type: ignore[misc]
            made.setdefault(hour // DAY_S * DAY_S, {})[hour] = sums.marked
        for day, marks in sorted(made.items()):
            await self._database.write(lambda connection, day=day, marks=marks: replace_day(connection, day, marks))  # type: ignore[misc]
        self._stale_since_s = began_s
        return len(hours)


def _waiting(connection: Connection, now_s: int) -> tuple[list[int], int, list[int]]:
    """The marked hours, from when on there are facts, and the spans to make."""
    hours = connection.execute(select(dirty_hour.c.hour_unix_s).order_by(dirty_hour.c.hour_unix_s)).scalars()
    facts_from = connection.execute(select(mark.c.value).where(mark.c.name == FACTS_FROM)).scalar()
    return list(hours), facts_from or 0, missing_spans(connection, now_s)


def _give_up(connection: Connection, hour_unix_s: int, now_s: int) -> None:
    connection.execute(delete(dirty_hour).where(dirty_hour.c.hour_unix_s == hour_unix_s))
    message = "facts arrived for an hour whose other facts were deleted after their retention: record a correction"
    report(connection, "late", f"hour/{hour_unix_s}", message, now_s)
