"""Which facts count: those of an hour, one runtime half of each attempt, and attempts without one."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, case, exists, or_, select

from lorapool_ledger.store.tables import attempt_closed, attempt_opened, boot, runtime_request
from lorapool_ledger.store.writes import HOUR_MS

BOUNDARY_MS = 60_000
"""A gateway ends an attempt at most this long after the runtime: assumed for remainders, which name no attempts."""


def _is_counted() -> ColumnElement[bool]:
    other, own_boot, other_boot = runtime_request.alias("other"), boot.alias("own_boot"), boot.alias("other_boot")
    sent = attempt_opened.alias("sent")
    half, second, own, others = runtime_request.c, other.c, own_boot.c, other_boot.c
    elsewhere = (
        select(own.id)
        .join_from(own_boot, sent, sent.c.attempt == half.attempt)
        .where(own.id == half.boot, sent.c.pod_uid != "", own.pod_uid != sent.c.pod_uid)
    )
    own_rank, rank = (case((one.boot_id == sent.c.boot_id, 0), else_=1) for one in (own, others))
    earlier = or_(second.boot < half.boot, (second.boot == half.boot) & (second.seq < half.seq))
    better = (
        select(second.seq)
        .join_from(other, other_boot, others.id == second.boot)
        .join(own_boot, own.id == half.boot)
        .outerjoin(sent, sent.c.attempt == second.attempt)
        .where(
            second.attempt == half.attempt,
            (second.boot != half.boot) | (second.seq != half.seq),
            sent.c.attempt.is_(None) | (sent.c.pod_uid == "") | (others.pod_uid == sent.c.pod_uid),
            (rank < own_rank) | ((rank == own_rank) & earlier),
        )
    )
    none = (~exists(query.correlate(runtime_request)) for query in (elsewhere, better))
    return or_(half.attempt == "", and_(*none))


is_counted: ColumnElement[bool] = _is_counted()
"""Whether a row of `runtime_request` is the runtime's half of its attempt. At most one row of an attempt is.

It is a record of the pod that the gateway sent the attempt to; of several, that of the process which the gateway named,
then the first one. A record of any other pod is a finding and is never billed. Where the gateway's record was lost with
its pod, the first one counts.
"""

has_runtime_half: ColumnElement[bool] = exists(
    select(runtime_request.c.seq).where(runtime_request.c.attempt == attempt_opened.c.attempt, is_counted)
)

_of_remainder = runtime_request.alias("remainder")
is_in_remainder: ColumnElement[bool] = exists(
    select(_of_remainder.c.seq).where(
        _of_remainder.c.attempt == "",
        _of_remainder.c.boot + 0 == boot.c.id,  # the few without an attempt are looked up, not all of the process
        _of_remainder.c.key_uid == attempt_opened.c.key_uid,
        _of_remainder.c.uid == attempt_opened.c.uid,
        _of_remainder.c.ended_unix_ms <= attempt_closed.c.closed_unix_ms,
        _of_remainder.c.ended_unix_ms > attempt_closed.c.closed_unix_ms - HOUR_MS - BOUNDARY_MS,
    )
)
"""Whether the runtime folded the requests of this account and key at that time: their counts are in the remainder."""

GATEWAY_SIDE = attempt_opened.join(attempt_closed, attempt_closed.c.attempt == attempt_opened.c.attempt).outerjoin(
    boot, boot.c.boot_id == attempt_opened.c.boot_id
)
"""Attempts that a gateway has closed, with the runtime's process."""


def ended_in(start_s: int, end_s: int) -> ColumnElement[bool]:
    """The runtime's half that counts ended in these seconds since 1970, the end excluded."""
    ended = runtime_request.c.ended_unix_ms
    return and_(ended >= start_s * 1000, ended < end_s * 1000, is_counted)


def closed_alone_in(start_s: int, end_s: int) -> ColumnElement[bool]:
    """The gateway closed it in these seconds, and no runtime has it."""
    return and_(
        attempt_closed.c.closed_unix_ms >= start_s * 1000,
        attempt_closed.c.closed_unix_ms < end_s * 1000,
        ~has_runtime_half,
        ~is_in_remainder,
    )
