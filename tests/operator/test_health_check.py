"""Argo CD's health check from the how-to, run by Lua on statuses that the operator's plans give."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from base_world import base, deployment, inspected, plan, pod, runtime, world
from lupa import LuaRuntime

from lorapool_api.common import FailureReason
from lorapool_operator.world.observed import SourceFailure

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "health-checks.md"


def lua_table(lua: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return lua.table_from({key: lua_table(lua, item) for key, item in value.items()})
    return lua.table_from([lua_table(lua, item) for item in value]) if isinstance(value, list) else value


def health(status: dict[str, Any] | None, generation: int = 1) -> tuple[str, str]:
    """What Argo CD shows of an object: (status, message)."""
    found = re.search(r"```lua\n(.*?)```", PAGE.read_text(), re.S)
    assert found is not None
    lua = LuaRuntime()
    check = lua.eval(f"function(obj)\n{found[1]}\nend")
    shown = check(
        lua_table(lua, {"metadata": {"generation": generation}} | ({} if status is None else {"status": status}))
    )
    return shown["status"], shown["message"]


def of(**facts: Any) -> dict[str, Any]:
    made = plan(world(**facts)).status
    assert made is not None
    return made.dump()


def conditions(*given: tuple[str, str, str]) -> dict[str, Any]:
    found = [{"type": kind, "status": status, "reason": reason, "message": "m"} for kind, status, reason in given]
    return {"observedGeneration": 1, "conditions": found}


def test_an_object_that_the_operator_has_not_seen_progresses() -> None:
    assert health(None)[0] == "Progressing"
    serving = of(of=base(replicas=1), pods=(pod(),), runtimes=(runtime(),), workload=deployment())
    assert health(serving)[0] == "Healthy"
    assert health(serving, generation=2)[0] == "Progressing"


def test_a_base_that_sleeps_is_healthy_and_one_that_starts_progresses() -> None:
    assert health(of(of=base(replicas=0)))[0] == "Healthy"
    assert health(of(of=base(replicas=1)))[0] == "Progressing"
    broken = pod(ready=False, problem="ImagePullBackOff: no such tag")
    shown = health(of(of=base(replicas=1), pods=(broken,), workload=deployment()))
    assert shown[0] == "Progressing"
    assert "no such tag" in shown[1]


def test_what_a_person_has_to_cure_is_degraded() -> None:
    refused = inspected(SourceFailure(FailureReason.TOO_LARGE, "300 GB; raise the bound."))
    status, message = health(of(inspection=refused))
    assert (status, message.partition(" It is")[0]) == ("Degraded", "TooLarge: 300 GB; raise the bound.")
    running = world(base(replicas=1), pods=(pod(),), runtimes=(runtime(),), workload=deployment())
    edited = plan(replace(running, profile=None)).status
    assert edited is not None
    assert health(edited.dump())[0] == "Degraded"


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (conditions(("Ready", "True", "Parked")), "Healthy"),
        (conditions(("Ready", "True", "Unverified")), "Healthy"),
        (conditions(("Ready", "False", "BaseNotReady")), "Progressing"),
        (conditions(("Ready", "False", "Suspended")), "Suspended"),
        (conditions(("Ready", "True", "Loaded"), ("Reconciling", "True", "Loading")), "Progressing"),
        (conditions(("Ready", "True", "Loaded"), ("Stalled", "True", "RolloutFailed")), "Degraded"),
    ],
)
def test_adapters_are_shown_as_they_are(status: dict[str, Any], shown: str) -> None:
    assert health(status)[0] == shown
