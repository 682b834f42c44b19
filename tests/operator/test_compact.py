"""Parsed objects share what they have in common, and are otherwise what they were."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lorapool_api.loraadapter import LoraAdapterStatus
from lorapool_api.protocol import AdapterReport
from lorapool_operator.world.cluster_cache import AdapterObject, ParseErrors, parse_error_text
from lorapool_operator.world.compact import compact_report

PARKED = {
    "type": "Ready",
    "status": "True",
    "reason": "Parked",
    "message": "Loads on the next request.",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
}


def raw_adapter(name: str, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "team", "name": name, "uid": f"{name}-uid", "resourceVersion": "1"},
        "spec": {"baseModelRef": {"name": "tiny"}, "source": {"uri": f"hf://org/{name}"}},
        "status": {"conditions": [PARKED], "state": "Parked", **status},
    }


def report(uid: str, **usage: int) -> AdapterReport:
    raw = {
        "uid": uid,
        "digest": f"sha256:{uid}",
        "display": f"team/{uid}",
        "state": "registered",
        "tier": "disk",
        "sinceUnixS": 1.0,
        "usage": {"bootID": "boot", **usage},
    }
    return AdapterReport.model_validate(raw)


def test_equal_conditions_of_two_adapters_are_one_object() -> None:
    first, second = AdapterObject.parse(raw_adapter("a")), AdapterObject.parse(raw_adapter("b"))
    assert first.status.conditions[0] is second.status.conditions[0]
    other = AdapterObject.parse(raw_adapter("c", conditions=[{**PARKED, "message": "Another."}]))
    assert other.status.conditions[0].message == "Another."


def test_a_compact_status_equals_dumps_and_copies_like_any_other() -> None:
    raw = raw_adapter("a", digest="sha256:1", loadedReplicas=1)
    status, plain = AdapterObject.parse(raw).status, LoraAdapterStatus.model_validate(raw["status"])
    assert status == plain
    assert status.dump() == plain.dump()
    changed = status.model_copy(update={"state": "Loaded"})
    assert (changed.state, status.state) == ("Loaded", "Parked")
    assert changed != status


@pytest.mark.parametrize("wrong", [{**PARKED, "status": "Perhaps"}, {**PARKED, "status": {"a": 1}}, "Ready"])
def test_the_error_of_a_wrong_condition_names_the_condition(wrong: Any) -> None:
    with pytest.raises(ParseErrors) as caught:
        AdapterObject.parse(raw_adapter("a", conditions=[wrong]))
    text = parse_error_text(caught.value)
    assert "status" in text or "conditions.0" in text


def test_adapters_of_one_base_share_its_name_their_modules_and_equal_digests() -> None:
    raw = [json.loads(json.dumps(raw_adapter(name, digest="sha256:1", targetModules=["q_proj"]))) for name in "ab"]
    first, second = AdapterObject.parse(raw[0]), AdapterObject.parse(raw[1])
    assert first.spec.base_model_ref.name is second.spec.base_model_ref.name
    assert first.status.target_modules is second.status.target_modules
    assert first.status.digest is second.status.digest
    assert first.status.target_modules == ["q_proj"]


def test_reports_of_one_adapter_share_names_and_the_counts_of_an_unused_one() -> None:
    first, second = compact_report(report("a")), compact_report(report("".join(["a"])))
    assert first.digest is second.digest
    assert first.usage is second.usage
    used = compact_report(report("a", requests=3))
    assert used.usage.requests == 3
    assert used == report("a", requests=3)


def test_thousands_of_parsed_reports_share_the_names_of_their_fields() -> None:
    """In a process of its own, as in the operator nothing is parsed before."""
    program = """
import json, sys
from lorapool_operator.world.compact import compact_report
from lorapool_api.protocol import AdapterReport
reports = [AdapterReport.model_validate_json(sys.argv[1]) for _ in range(2000)]
own = sys.getsizeof(reports[-1].__dict__)
print(own, max(sys.getsizeof(compact_report(report).__dict__) for report in reports))
"""
    raw = report("a").model_dump_json(by_alias=True)
    done = subprocess.run([sys.executable, "-c", program, raw], capture_output=True, text=True, check=True)
    own, shared = map(int, done.stdout.split())
    assert shared < 0.6 * own


def test_a_compact_report_has_its_fields_in_order() -> None:
    assert list(compact_report(report("a")).__dict__) == list(report("a").__dict__)
