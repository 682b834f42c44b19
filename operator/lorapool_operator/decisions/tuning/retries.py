"""When a job that failed for a transient reason is tried again."""

from __future__ import annotations

from lorapool_api.tuning.finetunejob_status import JobFailureStatus
from lorapool_api.tuning.states import JobFailure
from lorapool_operator.clock import retry_at_unix_s, unix
from lorapool_operator.decisions.tuning.values import TuningLimits


def retry_at(
    before: JobFailureStatus | None,
    reason: JobFailure,
    failed_at_unix_s: float | None,
    now: float,
    limits: TuningLimits,
) -> float:
    """Returns the time of the next attempt, in whole seconds, as the status has it.

    `before`: the failure in the status. `failed_at_unix_s`: when the attempt failed; None: not known, so that a time in
    the status is taken for the time of this very failure.
    """
    same = before is not None and before.reason == reason.value
    known = unix(before.retry_at) if before is not None and same else None
    if known is not None and (failed_at_unix_s is None or known > failed_at_unix_s):
        return known
    attempt = before.attempts + 1 if before is not None and same else 1
    since = now if failed_at_unix_s is None else failed_at_unix_s
    return float(int(retry_at_unix_s(since, attempt, 1.0, first_s=limits.retry_s, longest_s=limits.retry_max_s)))
