"""R2 and R5: the two halves of each attempt against each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, case, false, select

from lorapool_api.usage_protocol import AttemptEnd
from lorapool_ledger.intake.runtime_page import GONE
from lorapool_ledger.store.tables import attempt_closed, attempt_opened, boot, gateway, runtime_request
from lorapool_ledger.store.writes import HOUR_MS, chunks
from lorapool_ledger.sums.findings import Finding
from lorapool_ledger.sums.joined import is_counted, is_in_remainder

GRACE_MS = 120_000
"""The other half of an attempt may arrive this much later."""
OPEN_MS = 2 * HOUR_MS
"""An attempt that its gateway has not closed after this long never will be."""
UNREAD_MS = HOUR_MS
"""A runtime's process of which nothing was read for this long counts as gone."""
MOST_ROWS = 100_000
"""Attempts that one run looks at; the next run goes on."""


@dataclass(frozen=True, slots=True)
class Attempts:
    findings: list[Finding] = field(default_factory=list)
    checked_until_ms: int = 0
    """All attempts that were opened before are settled, or are findings."""
    unknown_opened_ms: list[int] = field(default_factory=list)
    """When attempts were opened of which nothing will ever be known. The sums of those hours have them."""


def check_attempts(connection: Connection, checked_until_ms: int, earlier: set[str], now_s: int) -> Attempts:
    """Looks at the attempts that were opened since, and again at those of earlier findings.

    The next run starts at the first attempt that is not settled: one that may run still, or whose runtime was not read
    since.
    """
    now_ms = now_s * 1000
    opened = attempt_opened.c.opened_unix_ms
    rows = connection.execute(
        _select().where(opened >= checked_until_ms, opened < now_ms - GRACE_MS).order_by(opened).limit(MOST_ROWS)
    ).all()
    until_ms = rows[-1].opened_unix_ms if len(rows) == MOST_ROWS else max(checked_until_ms, now_ms - GRACE_MS)
    findings: dict[tuple[str, str], Finding] = {}
    unknown: list[int] = []
    for row in (*rows, *_again(connection, sorted(earlier - {row.attempt for row in rows}))):
        settled, found = _settle(row, now_ms)
        if found is not None:
            findings[found.check, found.subject] = found
        elif not settled:
            until_ms = min(until_ms, row.opened_unix_ms)
        elif _is_unknown(row):
            unknown.append(row.opened_unix_ms)
    return Attempts(list(findings.values()), until_ms, unknown)


def _select() -> Any:
    closed, half, half_boot = attempt_closed.c, runtime_request.c, boot.alias("half_boot")
    return select(
        attempt_opened,
        closed.outcome.label("closed"),
        closed.closed_unix_ms,
        closed.prompt_tokens.label("reported_prompt"),
        closed.completion_tokens.label("reported_completion"),
        half.seq.label("half"),
        is_counted.label("counted"),
        half_boot.c.boot_id.label("half_boot"),
        half_boot.c.pod.label("half_pod"),
        half.key_uid.label("half_key"),
        half.project.label("half_project"),
        half.uid.label("half_uid"),
        half.prompt_tokens,
        half.completion_tokens,
        boot.c.end,
        boot.c.seen_unix_ms,
        gateway.c.ended.label("gateway_ended"),
        case((half.seq.is_(None), is_in_remainder), else_=false()).label("folded"),
    ).select_from(
        attempt_opened.join(gateway, gateway.c.id == attempt_opened.c.gateway)
        .outerjoin(attempt_closed, closed.attempt == attempt_opened.c.attempt)
        .outerjoin(runtime_request, half.attempt == attempt_opened.c.attempt)
        .outerjoin(half_boot, half_boot.c.id == half.boot)
        .outerjoin(boot, boot.c.boot_id == attempt_opened.c.boot_id)
    )


def _again(connection: Connection, attempts: Sequence[str]) -> Iterable[Row[Any]]:
    for part in chunks(attempts):
        yield from connection.execute(_select().where(attempt_opened.c.attempt.in_(part)))


def _settle(row: Row[Any], now_ms: int) -> tuple[bool, Finding | None]:
    """Whether nothing more is to be expected, and what does not add up."""
    if row.half is not None:
        return _compare(row, now_ms)
    if row.closed is None:
        return now_ms - row.opened_unix_ms > OPEN_MS or bool(row.gateway_ended and row.end), None
    if row.closed == AttemptEnd.REFUSED or row.folded or row.end == GONE:
        return True, None
    reported = (row.reported_prompt or 0) + (row.reported_completion or 0)
    silent = row.reported_prompt is None and row.reported_completion is None
    if row.end is None:  # no process of this name was ever read
        return now_ms - row.closed_unix_ms > UNREAD_MS, None
    if row.end == "" and row.seen_unix_ms < row.closed_unix_ms + GRACE_MS:
        return False, None
    if silent and row.closed != AttemptEnd.COMPLETED:
        return True, None  # the runtime has a record of every request that it admitted
    text = (
        f"the gateway has attempt {row.attempt} as {row.closed} with {reported} tokens; its runtime {row.boot_id} has "
        "no record of it"
    )
    return True, Finding("R2", row.attempt, max(1, reported), text)


def _compare(row: Row[Any], now_ms: int) -> tuple[bool, Finding | None]:
    used = row.prompt_tokens + row.completion_tokens
    if not row.counted:
        text = (
            f"attempt {row.attempt} was sent to process {row.boot_id or '?'} of pod {row.pod_uid}; process "
            f"{row.half_boot} of pod {row.half_pod} has a record of it, too, which is not billed"
        )
        return True, Finding("R2", row.attempt, max(1, used), text)
    gateway_side = {"key": row.key_uid, "project": row.project, "adapter": row.uid}
    runtime_side = {"key": row.half_key, "project": row.half_project, "adapter": row.half_uid}
    if gateway_side != runtime_side:
        differ = ", ".join(
            f"{name} {runtime_side[name]!r} instead of {value!r}"
            for name, value in gateway_side.items()
            if runtime_side[name] != value
        )
        text = f"the runtime's half of attempt {row.attempt} has {differ}"
        return True, Finding("R2", row.attempt, max(1, used), text)
    over = (row.reported_completion or 0) - row.completion_tokens
    if over > 0:
        text = (
            f"attempt {row.attempt}: {row.reported_completion} tokens were reported of {row.completion_tokens} computed"
        )
        return True, Finding("R5", row.attempt, over, text)
    return row.closed is not None or bool(row.gateway_ended) or now_ms - row.opened_unix_ms > OPEN_MS, None


def _is_unknown(row: Row[Any]) -> bool:
    return row.half is None and row.closed is None and row.end == GONE
