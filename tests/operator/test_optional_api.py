"""LeaderWorkerSets are an optional API: without it, or while it fails, all other objects are served."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from pods import group_objects, group_pods

from lorapool_operator.effects.cluster import Cluster, ClusterError, ObjectNotFoundError, Page
from lorapool_operator.resync import Resync
from lorapool_operator.world.cluster_cache import ClusterCache, Key, ObjectKind
from lorapool_operator.world.intake import Intake

BASE = Key(ObjectKind.BASE, "demo", "tiny")


class Here:
    """Caches that are filled from a cluster of which one API fails."""

    def __init__(self) -> None:
        self.cache, self.dirty, self.failure = ClusterCache(), [], ClusterError("429", 429)
        self.failing = "LeaderWorkerSet"
        self.intake = Intake(self.cache, lambda key, _: self.dirty.append(key), counts_interval_s=0.0)
        self.resync = Resync(self, self.cache, self.intake, self._turn)  # type: ignore[arg-type]

    async def _turn(self) -> None: ...

    async def pages(self, kind: str, namespace: str | None, **_: Any) -> AsyncIterator[Page]:
        if kind == self.failing:
            raise self.failure
        yield Page("7", [group_pods(1)[0]] if kind == "Pod" else [])


async def test_a_failing_optional_api_leaves_the_other_kinds_and_what_is_known_of_it() -> None:
    here = Here()
    here.intake.leader_worker_set(group_objects()[0])
    await here.resync.first("demo")
    assert [pod.meta.name for pod in here.cache.pods] == ["tiny-runtime-0"]
    assert "leaderworkersets" not in here.resync.versions("demo")  # a watch of it begins with its own listing
    await here.resync.again("demo")
    assert [item.meta.name for item in here.cache.leader_worker_sets] == ["tiny-runtime"]


async def test_an_api_that_is_needed_fails_the_listing() -> None:
    here = Here()
    here.failing = "Deployment"
    with pytest.raises(ClusterError):
        await here.resync.first("demo")


async def test_a_missing_optional_api_has_no_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(None, timeout_s=1.0, identity="test")  # type: ignore[arg-type]

    async def missing(*_: Any, **__: Any) -> dict[str, Any]:
        raise ObjectNotFoundError("404", 404)

    monkeypatch.setattr(cluster, "_call", missing)
    assert [page async for page in cluster.pages("LeaderWorkerSet", "demo")] == []
    with pytest.raises(ObjectNotFoundError):
        assert [page async for page in cluster.pages("Deployment", "demo")]


def test_the_end_of_its_stateful_set_shows_that_a_leader_worker_set_was_deleted() -> None:
    here = Here()
    groups, leaders, workers = group_objects()
    here.intake.leader_worker_set(groups)
    here.intake.stateful_set(leaders)
    here.intake.stateful_set(workers)
    here.intake.stateful_set(workers, deleted=True)  # a group is replaced
    assert len(here.cache.leader_worker_sets) == 1
    here.dirty.clear()
    here.intake.stateful_set(leaders, deleted=True)
    assert len(here.cache.leader_worker_sets) == 0
    assert BASE in here.dirty
    here.intake.leader_worker_set(groups)  # it was not, as the response to its next apply shows
    assert len(here.cache.leader_worker_sets) == 1
