"""How many tokens the jobs of a namespace trained in the present calendar month (UTC), each counted once.

A record outlives the jobs. It has the sum of the month, and of each job that can still train, up to which total it was
counted: sum and totals are written together, so what an operator counted before it died is not counted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict, Field

from lorapool_operator.clock import iso, unix
from lorapool_operator.world.tuning import TuningObject


class MonthRecord(BaseModel):
    """What is kept of one namespace, as JSON."""

    model_config = ConfigDict(frozen=True)

    month: str = ""
    """As in 2026-11."""
    tokens: int = Field(default=0, ge=0)
    """Trained in that month."""
    jobs: Mapping[str, int] = {}
    """By uid of a job: its tokens that were counted, in that month or before."""


def month_of(unix_s: float) -> str:
    """The calendar month of a time, in UTC."""
    return iso(unix_s)[:7]


def counted(
    record: MonthRecord, trained: Iterable[tuple[TuningObject, int]], unreadable: Iterable[str], now: float
) -> MonthRecord:
    """Adds what all jobs of the namespace trained since. `trained`: each with its tokens as they are known now.
    `unreadable`: uids of jobs of which nothing is known.

    A job that ended before this month adds nothing. Totals of a job may fall, when a lost trainer's work is computed
    again; that is not counted twice.
    """
    month = month_of(now)
    tokens = record.tokens if record.month == month else 0
    jobs = {uid: record.jobs[uid] for uid in unreadable if uid in record.jobs}
    for job, total in trained:
        ended = unix(job.status.finished_at) if job.ended else None
        if ended is not None and month_of(ended) != month:
            continue
        before = record.jobs.get(job.meta.uid, 0)
        tokens += max(0, total - before)
        if max(total, before):
            jobs[job.meta.uid] = max(total, before)
    return MonthRecord(month=month, tokens=tokens, jobs=jobs)
