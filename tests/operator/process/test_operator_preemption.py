"""An idle base yields its GPU to a base that is being woken: the operator's process against a real API server.

The test acts as scheduler, kubelet and controllers: there is one node with two GPUs, and three bases want one each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes_operator import ScriptedRuntime
from operator_world import Api, condition, labels_of, operator_program, token_of, until

pytestmark = pytest.mark.apiserver

PROFILES = 'profiles:\n  default: {resources: {limits: {nvidia.com/gpu: "1"}}}\n'
UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
}


async def base_of(api: Api, name: str) -> dict[str, Any]:
    source, scaling = {"uri": f"pvc://models/{name}"}, {"minReplicas": 0, "idleAfter": "24h"}
    return await api.base(name, source=source, scaling=scaling, replicas=1)


async def pending_pod(api: Api, base: dict[str, Any], name: str) -> None:
    metadata = {"name": name, "labels": labels_of(base), **await api.owners(base)}
    container = {"name": "runtime", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    spec = {"containers": [container], "automountServiceAccountToken": False}
    await api.create("pods", {"metadata": metadata, "spec": spec})
    status = {"phase": "Pending", "conditions": [UNSCHEDULABLE]}
    await api.patch("pods", name, {"status": status}, sub="status")


async def replicas(api: Api, name: str) -> int | None:
    found: int | None = (await api.get("basemodels", name))["spec"].get("replicas")
    return found


async def ready(api: Api, name: str) -> tuple[str, str]:
    return condition(await api.get("basemodels", name), "Ready")


async def lacks_gpu(api: Api, name: str) -> bool:
    conditions = (await api.get("basemodels", name)).get("status", {}).get("conditions", ())
    return any("Insufficient nvidia.com/gpu" in item["message"] for item in conditions if item["type"] == "Ready")


async def test_an_idle_base_yields_its_gpu_to_a_base_that_is_being_woken(api: Api, tmp_path: Path) -> None:
    settings = {"POLL_WAIT_S": "1", "LEADER_ELECTION": "false"}
    async with operator_program(api, tmp_path, profiles=PROFILES, **settings) as program:
        idle, busy = await base_of(api, "idle"), await base_of(api, "busy")
        async with (
            ScriptedRuntime(token=token_of(idle)).running() as of_idle,
            ScriptedRuntime(token=token_of(busy), load={"in_flight": 1}).running() as of_busy,
        ):
            await api.runtime_pod(idle, "idle-0", of_idle.port)
            await api.runtime_pod(busy, "busy-0", of_busy.port)
            for name in ("idle", "busy"):
                await until(lambda name=name: ready(api, name), ("True", "Ready"))

            waking = await base_of(api, "waking")
            await pending_pod(api, waking, "waking-0")
            await until(lambda: lacks_gpu(api, "waking"))
            await until(lambda: replicas(api, "idle"), 0)
            await api.delete("pods", "idle-0")
            await until(lambda: ready(api, "idle"), ("True", "ScaledToZero"))

            await api.delete("pods", "waking-0")  # it would be bound to the node now; here another pod takes its part
            async with ScriptedRuntime(token=token_of(waking)).running() as of_waking:
                await api.runtime_pod(waking, "waking-1", of_waking.port)
                await until(lambda: ready(api, "waking"), ("True", "Ready"))
            assert await replicas(api, "busy") == 1
        events = [item for item in await api.items("events") if item["reason"] == "Preempted"]
        assert [(item["involvedObject"]["name"], item["message"]) for item in events] == [
            ("idle", f"From 1 to 0: preempted by the waking base {api.namespace}/waking.")
        ]
    assert program.code == 0, program.log
    assert "Traceback" not in program.log
