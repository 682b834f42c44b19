"""A LoraAdapter and everything that is known of it, in one literal: what the tests of its plans state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fakes_operator import digest

from lorapool_api.base_modules import BaseModules
from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.loraadapter import LoraAdapterSpec, LoraAdapterStatus, UsagePart
from lorapool_api.protocol import AdapterReport, AdapterState, BaseReport, RuntimeSnapshot, Tier
from lorapool_operator.decisions.plan import AdapterPlan, PlanSettings
from lorapool_operator.decisions.plan_adapter import plan_adapter
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, Meta
from lorapool_operator.world.observed import (
    AdapterOnReplica,
    InspectionResult,
    ObservedAdapter,
    RuntimeView,
    SourceFacts,
    SourceFailure,
    adapter_fingerprint,
)

NOW = 1_700_000_000.0
OLD, NEW = digest("old"), digest("new")
SETTINGS = PlanSettings()


def meta(name: str, uid: str, **more: Any) -> Meta:
    known = {"namespace": "team", "generation": 1, "resource_version": "1", "created_unix_s": 0.0, "deleting": False}
    return Meta(name=name, uid=uid, **{**known, "retry": None, **more})


def base(**spec: Any) -> BaseObject:
    """A base of which a runtime has run, so that its modules are known."""
    made = BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}, "replicas": 1, **spec})
    return BaseObject(meta("tiny", "base-uid"), made, BaseModelStatus(modules=BaseModules(modules=[])))


def adapter(status: LoraAdapterStatus | None = None, **spec: Any) -> AdapterObject:
    made = LoraAdapterSpec.model_validate({"baseModelRef": {"name": "tiny"}, "source": {"uri": "hf://org/a"}, **spec})
    return AdapterObject(meta("a", "a-uid"), made, status or LoraAdapterStatus())


def report(state: AdapterState = AdapterState.LOADED, of: str = OLD, **more: Any) -> AdapterReport:
    tier = Tier.DEVICE if state is AdapterState.LOADED else Tier.DISK
    known = {"uid": "a-uid", "digest": of, "display": "team/a", "state": state, "tier": tier, "since_unix_s": NOW - 9}
    return AdapterReport.model_validate({**known, "usage": UsagePart(boot_id="boot"), **more})


def replica(
    *reports: AdapterReport, pod: str = "pod-1", fresh: bool = True, terminating: bool = False
) -> AdapterOnReplica:
    snapshot = RuntimeSnapshot(
        seq=1, boot_id="boot", started_unix_s=0.0, base=BaseReport(served_name="t", max_model_len=64, dtype="f"),
        ready=True, slots_total=8, slots_used=0, max_rank=16, adapters=list(reports),
    )  # fmt: skip
    return AdapterOnReplica(
        RuntimeView(pod, f"{pod}-uid", not terminating, terminating, snapshot, fresh), tuple(reports)
    )


def inspected(
    outcome: SourceFacts | SourceFailure, of: AdapterObject, on: BaseObject, attempt: int = 1
) -> InspectionResult:
    return InspectionResult(adapter_fingerprint(of, on), attempt, outcome, NOW - 1, 0.5)


def good(of: str = OLD, rank: int = 8) -> SourceFacts:
    return SourceFacts(of, "rev", rank, ("q_proj",), 100)


def settled(of: AdapterObject, on: BaseObject, facts: SourceFacts | None = None) -> AdapterObject:
    """Returns the same adapter after a successful inspection was written to its status."""
    observed = ObservedAdapter(of, on, inspection=inspected(facts or good(), of, on))
    status = plan_adapter(observed, NOW - 100, SETTINGS).status
    assert status is not None
    return replace(of, status=status)


def plan(observed: ObservedAdapter, now: float = NOW) -> AdapterPlan:
    return plan_adapter(observed, now, SETTINGS)


def condition(made: AdapterPlan, kind: str) -> tuple[str, str]:
    assert made.status is not None
    return next((item.status, item.reason) for item in made.status.conditions if item.type == kind)


def text_of(made: AdapterPlan, kind: str) -> str:
    assert made.status is not None
    return next(item.message for item in made.status.conditions if item.type == kind)


def types(made: AdapterPlan) -> set[str]:
    assert made.status is not None
    return {item.type for item in made.status.conditions}
