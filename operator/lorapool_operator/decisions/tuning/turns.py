"""Which jobs of a base are trained now, which wait for their turn, and how many are ahead in a namespace's quota."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorapool_api.tuning.states import JobReason, RunState
from lorapool_operator.decisions.tuning.tokens import month_of
from lorapool_operator.decisions.tuning.values import Waiting
from lorapool_operator.world.tuning import ObservedJob, TuningObject


@dataclass(frozen=True, slots=True)
class Turns:
    """Uids of the jobs that a trainer should have, and why each other one waits."""

    wanted: frozenset[str]
    waiting: Mapping[str, Waiting]

    def stops(self, uid: str) -> bool:
        """True if the trainer is to stop this job, if it has it."""
        found = self.waiting.get(uid)
        return found is not None and found.reason is JobReason.TOKEN_QUOTA


def take_turns(
    ready: Sequence[ObservedJob],
    *,
    registered: Iterable[str],
    max_jobs: int,
    active_jobs: int,
    active_elsewhere: Mapping[str, int],
    spent: Mapping[str, str],
) -> Turns:
    """Chooses at most `max_jobs` of the jobs that could be trained, and at most `active_jobs` of one namespace.

    A job that the trainer has stays there; then higher priorities come first, then older jobs. A paused job takes no
    place, nor does a job of a namespace whose tokens of the month are used up (`spent`, with what is said of it).
    """
    has = frozenset(registered)
    order = sorted(
        (item for item in ready if item.job.spec.run is RunState.RUN),
        key=lambda item: (
            item.job.meta.uid not in has,
            -item.job.spec.priority,
            item.job.meta.created_unix_s,
            item.job.meta.uid,
        ),
    )
    active = Counter(active_elsewhere)
    wanted: set[str] = set()
    waiting: dict[str, Waiting] = {}
    for item in order:
        uid, namespace = item.job.meta.uid, item.job.meta.namespace
        position = sum(each.position is not None for each in waiting.values()) + 1
        if namespace in spent:
            waiting[uid] = Waiting(JobReason.TOKEN_QUOTA, spent[namespace])
        elif active[namespace] >= active_jobs:
            message = f"Namespace {namespace} trains {active_jobs} jobs, as many as it may: it waits for one to end."
            waiting[uid] = Waiting(JobReason.NAMESPACE_LIMIT, message, position)
        elif len(wanted) >= max_jobs:
            message = (
                f"The base trains {max_jobs} jobs (spec.fineTuning.maxJobs): this one is number {position} in turn."
            )
            waiting[uid] = Waiting(JobReason.WAITING_FOR_TURN, message, position)
        else:
            wanted.add(uid)
            active[namespace] += 1
    return Turns(frozenset(wanted), waiting)


def spent_namespaces(trained: Mapping[str, int], limit: int | None, now: float) -> dict[str, str]:
    """Returns the namespaces that trained as many tokens this month as they may, with what is said of their jobs."""
    if limit is None:
        return {}
    month = month_of(now)
    return {
        namespace: f"Namespace {namespace} trained {tokens} tokens in {month}, and may train {limit} in a month (UTC): "
        "its jobs go on in the next one, or once the chart's value tuning.quotas.tokensPerMonth is raised."
        for namespace, tokens in trained.items()
        if tokens >= limit
    }


def counted_before(job: TuningObject, unfinished: Iterable[TuningObject]) -> int:
    """Returns how many other jobs of the namespace count before this one: the accepted ones and those made earlier.

    Times of creation are whole seconds: of jobs that were made in the same second the uid decides.
    """
    mine = (job.meta.created_unix_s, job.meta.uid)
    return sum(
        other.meta.namespace == job.meta.namespace
        and other.meta.uid != job.meta.uid
        and (other.status.state is not None or (other.meta.created_unix_s, other.meta.uid) < mine)
        for other in unfinished
    )
