"""A group of pods that fails while others of its base serve: it is started again after waits that grow.

The controller of LeaderWorkerSets replaces a group at once when the process of one of its pods ends, and has no
back-off. It removes groups from the last one down, so that a failing last group can be taken away; a failing one
before it cannot, and is left to the controller. Pure.
"""

from __future__ import annotations

from dataclasses import replace

from lorapool_api.basemodel import ScalingMode
from lorapool_operator.clock import iso
from lorapool_operator.decisions.plan import PlanSettings
from lorapool_operator.decisions.scaling.scale import ScaleDecision
from lorapool_operator.decisions.scaling.starts import PROCESS_FAILURES
from lorapool_operator.world.observed import FailingGroup, ObservedBase
from lorapool_operator.world.problems import reason_of


def without_failing_group(
    observed: ObservedBase, decision: ScaleDecision, current: int | None, now: float, settings: PlanSettings
) -> ScaleDecision:
    """Returns the decision without a last group that has just failed, or whose next start has to wait."""
    profile, known = observed.profile, observed.memory.failing
    external = observed.base.spec.scaling.mode is ScalingMode.EXTERNAL
    if profile is None or profile.nodes == 1 or external or not current or decision.replicas == 0:
        return decision
    serving = {pod.group for pod in observed.pods if pod.ready and not pod.terminating and pod.group is not None}
    if known is not None and known.index in serving:
        known = None
    last = current - 1
    failed_at = known.failed_unix_s if known is not None else 0.0
    failed = any(
        pod.group == last
        and pod.meta.created_unix_s > failed_at
        and reason_of(pod.last_crash or pod.problem) in PROCESS_FAILURES
        for pod in (*observed.pods, *observed.workers)
    )
    if failed and last not in serving and any(group < last for group in serving):
        failures = 1 + (known.failures if known is not None else 0)
        wait_s = min(settings.start_retry_max_s, settings.start_retry_min_s * 2.0 ** min(failures - 1, 20))
        known = FailingGroup(last, failures, now, now + wait_s)
    kept = replace(decision, memory=replace(decision.memory, failing=known))
    if known is None or now >= known.retry_unix_s or decision.replicas <= known.index:
        return kept
    reason = f"group {known.index} has failed {known.failures} times and is started again at {iso(known.retry_unix_s)}"
    due = [at for at in (decision.recheck_unix_s, known.retry_unix_s) if at is not None]
    return replace(kept, replicas=known.index, reason=reason, recheck_unix_s=min(due))
