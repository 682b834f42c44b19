"""A BaseModel and everything that is known of it, in one literal: what the tests of its plans state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fakes_operator import digest

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.protocol import BaseReport, RuntimeSnapshot
from lorapool_operator.decisions.plan import BasePlan, PlanSettings
from lorapool_operator.decisions.plan_base import plan_base
from lorapool_operator.world.cluster_cache import (
    LEADER_WORKER_SET,
    BaseObject,
    Key,
    Meta,
    ObjectKind,
    PodObject,
    WorkloadObject,
)
from lorapool_operator.world.observed import InspectionResult, ObservedBase, RuntimeView, SourceFacts, SourceFailure
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile

NOW = 1_700_000_000.0
SETTINGS = PlanSettings()
IMAGE = RuntimeImage("runtime:1", "IfNotPresent")
KEY = Key(ObjectKind.BASE, "team", "tiny")


def meta(name: str, uid: str, **more: Any) -> Meta:
    known = {"namespace": "team", "generation": 1, "resource_version": "1", "created_unix_s": NOW, "deleting": False}
    return Meta(name=name, uid=uid, **{**known, "retry": None, **more})


def base(status: BaseModelStatus | None = None, **spec: Any) -> BaseObject:
    made = BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}, **spec})
    return BaseObject(meta("tiny", "base-uid"), made, status or BaseModelStatus())


def pod(
    name: str = "pod", *, ready: bool = True, terminating: bool = False, problem: str = "", **more: Any
) -> PodObject:
    known = (meta(name, f"{name}-uid"), KEY, "base-uid", "10.0.0.1", 8000, ready, terminating, problem)
    return PodObject(*known, **more)


def runtime(name: str = "pod", *, fresh: bool = True, ready: bool = True, **more: Any) -> RuntimeView:
    snapshot = RuntimeSnapshot.model_validate(
        {
            "seq": 1, "boot_id": f"boot-{name}", "started_unix_s": NOW, "ready": ready, "slots_total": 8,
            "slots_used": 0, "max_rank": 16, "base": BaseReport(served_name="t", max_model_len=64, dtype="f"), **more,
        }
    )  # fmt: skip
    return RuntimeView(name, f"{name}-uid", True, False, snapshot, fresh)


def deployment(owner: str = "base-uid") -> WorkloadObject:
    return WorkloadObject(meta("tiny-runtime", "deployment-uid"), KEY, owner, "")


def groups(owner: str = "base-uid") -> WorkloadObject:
    """The LeaderWorkerSet of a base with groups of pods."""
    return replace(deployment(owner), meta=meta("tiny-runtime", "groups-uid"), kind=LEADER_WORKER_SET)


def inspected(outcome: SourceFacts | SourceFailure) -> InspectionResult:
    return InspectionResult("base-uid/", 1, outcome, NOW - 1, 0.5)


FOUND = inspected(SourceFacts(digest("base"), "rev", size_bytes=9))


def world(of: BaseObject | None = None, **more: Any) -> ObservedBase:
    known: dict[str, Any] = {
        "profile": RuntimeProfile(),
        "image": IMAGE,
        "token_sha256": ("ab" * 32,),
        "inspection": FOUND,
    }
    return ObservedBase(base=of or base(), **{**known, **more})


def plan(observed: ObservedBase, now: float = NOW) -> BasePlan:
    return plan_base(observed, now, SETTINGS)


def condition(made: BasePlan, kind: str) -> tuple[str, str]:
    assert made.status is not None
    return next((item.status, item.reason) for item in made.status.conditions if item.type == kind)


def message(made: BasePlan, kind: str) -> str:
    assert made.status is not None
    return next(item.message for item in made.status.conditions if item.type == kind)
