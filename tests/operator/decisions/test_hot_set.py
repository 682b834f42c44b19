"""What the new pods of a rollout load before they are ready: what the pods that they replace have loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from base_world import IMAGE, NOW, base, deployment, meta, pod, world

from lorapool_api.loraadapter import LoraAdapterSpec, LoraAdapterStatus
from lorapool_api.protocol import Preload, PreloadList
from lorapool_operator.decisions.plan import PlanSettings
from lorapool_operator.decisions.plan_base import plan_base
from lorapool_operator.decisions.scaling.hot_set import preload_of
from lorapool_operator.world.cluster_cache import AdapterObject
from lorapool_operator.world.observed import AdapterSummary, ObservedBase

DIGEST = "sha256:" + "d" * 64


def adapter(name: str, *, status: dict[str, Any] | None = None) -> AdapterObject:
    spec = {"baseModelRef": {"name": "tiny"}, "source": {"uri": f"hf://org/{name}"}, "idleAfter": "7s"}
    known = LoraAdapterStatus.model_validate({"digest": DIGEST, "revision": "rev", **(status or {})})
    return AdapterObject(meta(name, f"{name}-uid"), LoraAdapterSpec.model_validate(spec), known)


def loaded(name: str, *, last_used: str = "", k: int = 1) -> AdapterSummary:
    preload = preload_of(adapter(name), base())
    assert preload is not None
    return AdapterSummary(
        ready=True, loaded=True, failed=False, warm_replicas=0,
        display=f"team/{name}", preload=preload, preferred_replicas=k, last_used=last_used,
    )  # fmt: skip


def preloaded(of: ObservedBase, **settings: Any) -> list[str]:
    """The uids in the ConfigMap of the plan's children."""
    config = plan_base(of, NOW, PlanSettings(**settings)).children[0]
    assert config["kind"] == "ConfigMap"
    text = config["data"].get("preload.json", '{"adapters": []}')
    return [item.uid for item in PreloadList.model_validate_json(text).adapters]


@pytest.fixture
def rolling() -> ObservedBase:
    """A base whose running pod is about to be replaced."""
    idle = AdapterSummary(ready=True, loaded=False, failed=False, warm_replicas=0)
    return world(
        pods=(pod("a", template_hash="old"),),
        workload=replace(deployment(), template_hash="old"),
        adapters=(loaded("hot"), idle),
    )


def test_the_loaded_adapters_are_listed_when_a_rollout_begins_and_while_it_goes_on(rolling: ObservedBase) -> None:
    assert preloaded(rolling) == ["hot-uid"]
    made = plan_base(rolling, NOW, PlanSettings())
    template = made.children[1]["spec"]["template"]["metadata"]["annotations"]["lorapool.dev/template-hash"]
    assert preloaded(replace(rolling, workload=replace(deployment(), template_hash=template))) == ["hot-uid"]


def test_nothing_is_listed_without_a_rollout_or_while_it_waits(rolling: ObservedBase) -> None:
    assert preloaded(replace(rolling, pods=())) == []
    assert preloaded(replace(rolling, rolling_elsewhere=("team/other",)), max_concurrent_rollouts=1) == []


def test_one_adapter_a_slot_is_listed_spread_ones_and_the_last_used_first(rolling: ObservedBase) -> None:
    slots = rolling.base.spec.lora.slots
    many = [loaded(f"a{number:02}", last_used=f"2026-01-01T00:00:{number:02}Z") for number in range(slots + 2)]
    spread = loaded("spread", k=2)
    listed = preloaded(replace(rolling, adapters=(*many, spread)))
    assert listed == [*(f"a{number:02}-uid" for number in range(3, slots + 2)), "spread-uid"]


def test_the_served_files_are_preloaded_while_a_new_source_is_checked() -> None:
    changed = preload_of(adapter("hot", status={"sourceUri": "hf://org/before"}), base())
    assert isinstance(changed, Preload)
    source = changed.descriptor.source
    assert (source.uri, source.revision, changed.digest) == ("hf://org/before", "rev", DIGEST)
    assert (changed.descriptor.idle_after_s, changed.descriptor.load) == (7.0, True)
    assert preload_of(adapter("new", status={"digest": None}), base()) is None


def test_the_list_does_not_change_the_pods(rolling: ObservedBase) -> None:
    with_list, without = (
        plan_base(of, NOW, PlanSettings()).children[1]["spec"]["template"]
        for of in (rolling, replace(rolling, adapters=()))
    )
    assert json.dumps(with_list) == json.dumps(without)
    assert IMAGE.image in json.dumps(with_list)
