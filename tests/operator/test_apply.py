"""What the applier does when the API server refuses a child."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from base_world import NOW, base, plan, world

from lorapool_api.common import Reason
from lorapool_operator.effects.apply import Applier, refusal
from lorapool_operator.effects.cluster import ClusterError, ForeignObjectError
from lorapool_operator.world.cluster_cache import ClusterCache
from lorapool_operator.world.observed import BaseMemory

CHILD = {"kind": "Deployment", "metadata": {"name": "tiny-runtime"}}
QUOTA = 'deployments.apps "tiny-runtime" is forbidden: exceeded quota: none'


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ClusterError("x", 403, detail=QUOTA), Reason.QUOTA_EXCEEDED),
        (ClusterError("x", 403, detail='admission webhook "policy" denied the request'), Reason.APPLY_REFUSED),
        (ClusterError("x", 422, detail="spec.template: Invalid value"), Reason.INVALID_PROFILE),
        (ClusterError("x", 500, detail="failed to convert new object: quantities must match"), Reason.INVALID_PROFILE),
        (ClusterError("x", 500, detail="etcdserver: request timed out"), None),
        (ClusterError("x", 429, detail="too many requests"), None),
        (ClusterError("the API server cannot be reached"), None),
    ],
)
def test_only_what_a_person_has_to_cure_is_a_refusal(error: ClusterError, reason: Reason | None) -> None:
    found = refusal(CHILD, error)
    assert (found.reason if found is not None else None) == reason
    assert found is None or found.message == f"Deployment tiny-runtime: {error.detail}"


def test_an_object_of_others_is_a_name_conflict() -> None:
    found = refusal(CHILD, ForeignObjectError("Service team/x exists"))
    assert found is not None
    assert (found.reason, found.message) == (Reason.NAME_CONFLICT, "Service team/x exists")


class RefusingCluster:
    """Refuses children and records all calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuses = True

    async def apply_child(self, manifest: dict[str, Any]) -> None:
        self.calls.append(manifest["kind"])
        if self.refuses:
            raise ClusterError("PATCH …: 403", 403, detail=QUOTA)

    async def patch_status(self, item: Any, status: Any) -> Any:
        self.calls.append("status")
        raise AssertionError("a status that was decided without knowing the refusal is never written")


async def test_a_refusal_is_known_before_a_status_is_written_and_the_other_children_are_applied() -> None:
    cluster, memory, observed = RefusingCluster(), BaseMemory("base-uid", 1), world(base(replicas=1))
    applier = Applier(cluster, ClusterCache(), None, None, None)  # type: ignore[arg-type]  # parts that are not reached
    assert await applier.base(observed.base, plan(observed), memory)
    assert cluster.calls == ["ConfigMap", "Deployment", "Service", "PodDisruptionBudget"]
    assert memory.child_problem is not None
    assert memory.child_problem.reason is Reason.QUOTA_EXCEEDED
    assert memory.apply_retry_unix_s > NOW
    cluster.refuses = False
    again = replace(observed, child_problem=memory.child_problem, applied_hash=memory.applied_hash)
    assert await applier.base(observed.base, plan(again), memory)
    assert memory.child_problem is None
