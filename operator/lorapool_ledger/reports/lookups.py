"""Single attempts: found by the id of their request, or the latest ones that did not complete."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, select

from lorapool_api.usage_protocol import AttemptEnd, Ended
from lorapool_ledger.billing.billed import BILLED, Billed, CountSource, GatewayHalf, Result, RuntimeHalf, result_of
from lorapool_ledger.reports.periods import Period
from lorapool_ledger.reports.scope import Scope
from lorapool_ledger.store.tables import attempt_closed, attempt_opened, boot, runtime_request
from lorapool_ledger.sums.joined import is_counted

MAX_FOUND = 50
"""A request id is chosen by the client and may be used any number of times: the newest attempts are shown."""

WHY = {
    Billed.COMPLETED: "the whole answer was delivered",
    Billed.CLIENT_LEFT: "the client ended it; the tokens that were computed are billed",
    Billed.FAILED: "the platform failed",
    Billed.LOST: "the runtime or the connection to it was lost",
    Billed.WITHHELD: "the answer was of other weights and was not delivered",
    Billed.REFUSED: "it was not admitted, so nothing was computed",
    Billed.UNKNOWN: "how it ended is not known",
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt with both halves joined. Times are milliseconds since 1970, 0 if unknown."""

    attempt: str
    request_id: str
    project: str
    key_uid: str
    model: str
    base: str
    pod: str
    """For the owner only."""
    route: str
    code: int
    opened_unix_ms: int
    ended_unix_ms: int
    cold_ms: int | None
    result: Result

    @property
    def billed(self) -> bool:
        return self.result.outcome in BILLED

    @property
    def why(self) -> str:
        """Why it is billed or not."""
        if self.result.source is CountSource.UNKNOWN and self.billed:
            return "its tokens are not known, so none are billed"
        return WHY[self.result.outcome]


def find_request(connection: Connection, scope: Scope, request_id: str) -> list[Attempt]:
    """The attempts of a request that the caller may see, newest first."""
    ids: set[str] = set()
    for table, at in (
        (attempt_opened, attempt_opened.c.opened_unix_ms),
        (runtime_request, runtime_request.c.ended_unix_ms),
    ):
        query = (
            select(table.c.attempt)
            .where(table.c.request_id == request_id, table.c.attempt != "", scope.where(table))
            .order_by(at.desc())
            .limit(MAX_FOUND)
        )
        ids.update(connection.execute(query).scalars())
    return attempts(connection, ids)[:MAX_FOUND]


def latest_incomplete(
    connection: Connection, scope: Scope, period: Period, ends: Sequence[AttemptEnd], limit: int = MAX_FOUND
) -> list[Attempt]:
    """The latest attempts that gateways closed in one of these ways, newest first."""
    closed = attempt_closed.c
    query = (
        select(closed.attempt)
        .join(attempt_opened, attempt_opened.c.attempt == closed.attempt)
        .where(
            closed.outcome.in_([end.value for end in ends]),
            closed.closed_unix_ms >= period.start_unix_s * 1000,
            closed.closed_unix_ms < period.end_unix_s * 1000,
            scope.where(attempt_opened),
        )
        .order_by(closed.closed_unix_ms.desc())
        .limit(limit)
    )
    return attempts(connection, connection.execute(query).scalars().all())


def attempts(connection: Connection, ids: Iterable[str]) -> list[Attempt]:
    """These attempts with what either half says of them, newest first."""
    wanted = sorted(set(ids))
    if not wanted:
        return []
    opened = _by_attempt(connection, select(attempt_opened).where(attempt_opened.c.attempt.in_(wanted)))
    closed = _by_attempt(connection, select(attempt_closed).where(attempt_closed.c.attempt.in_(wanted)))
    runtime = _by_attempt(
        connection,
        select(runtime_request, boot.c.pod, boot.c.base)
        .join(boot, boot.c.id == runtime_request.c.boot)
        .where(runtime_request.c.attempt.in_(wanted), is_counted),
    )
    found = [_joined(name, opened.get(name), closed.get(name), runtime.get(name)) for name in wanted]
    return sorted(found, key=lambda item: (item.ended_unix_ms or item.opened_unix_ms, item.attempt), reverse=True)


def _by_attempt(connection: Connection, query: Any) -> dict[str, Row[Any]]:
    return {row.attempt: row for row in connection.execute(query)}


def _joined(name: str, opened: Row[Any] | None, closed: Row[Any] | None, runtime: Row[Any] | None) -> Attempt:
    first: Any = opened if opened is not None else runtime
    gateway_half = (
        None
        if closed is None
        else GatewayHalf(
            AttemptEnd(closed.outcome), closed.prompt_tokens, closed.cached_tokens, closed.completion_tokens
        )
    )
    runtime_half = (
        None
        if runtime is None
        else RuntimeHalf(
            Ended(runtime.outcome),
            runtime.prompt_tokens,
            runtime.cached_tokens,
            runtime.completion_tokens,
            runtime.gpu_ns,
        )
    )
    return Attempt(
        attempt=name,
        request_id=first.request_id if first is not None else "",
        project=first.project if first is not None else "",
        key_uid=first.key_uid if first is not None else "",
        model=first.model if first is not None else "",
        base=first.base if first is not None else "",
        pod=runtime.pod if runtime is not None else "",
        route=opened.route if opened is not None else "",
        code=closed.code if closed is not None else 0,
        opened_unix_ms=opened.opened_unix_ms if opened is not None else runtime.started_unix_ms if runtime else 0,
        ended_unix_ms=(
            runtime.ended_unix_ms if runtime is not None else closed.closed_unix_ms if closed is not None else 0
        ),
        cold_ms=closed.cold_ms if closed is not None else None,
        result=result_of(runtime_half, gateway_half),
    )
