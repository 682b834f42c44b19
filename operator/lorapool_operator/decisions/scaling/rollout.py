"""How and when the pods of a base are replaced after a change of their template.

A workload (Deployment or LeaderWorkerSet) whose rollout has to wait is paused: Kubernetes then still changes its number
of pods, with the template that runs, so that scaling never waits for a rollout. Where a changed profile asks for the
other kind of workload, the pods of the present one keep their number until then. At most `max_concurrent` bases of the
operator replace pods at the same time, so that an upgrade of the release does not take the whole fleet down with a bad
image.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.common import Reason
from lorapool_operator.decisions.plan import ConditionValue
from lorapool_operator.world.observed import ObservedBase

RECHECK_S = 5.0
"""A waiting rollout looks this often whether another has ended."""


@dataclass(frozen=True, slots=True)
class RolloutDecision:
    """Whether the new template may replace pods now."""

    paused: bool = False
    begins: bool = False
    """True when this plan starts to replace pods."""
    replaces: bool = False
    """True when this plan starts to replace pods or an earlier one has started and old pods are left."""
    progressing: ConditionValue | None = None
    """The condition Progressing while the rollout waits."""
    recheck_unix_s: float | None = None


def decide(observed: ObservedBase, template: str, max_concurrent: int, now: float) -> RolloutDecision:
    """Decides for the template of this hash. `max_concurrent` 0 is no bound. A base without old pods never waits."""
    old = [pod for pod in observed.pods if not pod.terminating and pod.template_hash != template]
    workload = observed.workload or observed.other_workload
    if not template or not old or workload is None:
        return RolloutDecision()
    if observed.base.spec.paused:
        message = f"spec.paused is true: {len(old)} pods keep running as they are."
        return RolloutDecision(paused=True, progressing=("False", Reason.PAUSED.value, message))
    if workload.template_hash == template and not workload.paused:
        return RolloutDecision(replaces=True)  # under way
    if max_concurrent and len(observed.rolling_elsewhere) >= max_concurrent:
        names = ", ".join(observed.rolling_elsewhere[:3])
        message = f"{len(old)} pods are to be replaced; waiting for the rollout of {names}."
        waiting = ("True", Reason.ROLLOUT_WAITING.value, message)
        return RolloutDecision(paused=True, progressing=waiting, recheck_unix_s=now + RECHECK_S)
    return RolloutDecision(begins=True, replaces=True)
