"""A runtime pod dies while it serves: status is correct throughout, and no client gets another client's answer."""

import asyncio

import pytest
from e2e_world import BASE, Prober, World


def _truth(world: World, task: str) -> str:
    """The false claims of the status; empty if there are none."""
    adapter = world.get("lora", task)
    pods = {pod["metadata"]["uid"]: pod for pod in world.runtime_pods()}
    loaded = next((c["status"] for c in adapter["status"]["conditions"] if c["type"] == "Loaded"), "")
    for replica in adapter["status"].get("replicas", []):
        pod = pods.get(replica["podUID"])
        if pod is None:
            return f"on pod {replica['pod']} that does not exist"
        if "deletionTimestamp" in pod["metadata"]:
            return f"on pod {replica['pod']} that is ending"
    if loaded == "True" and not adapter["status"].get("replicas"):
        return "Loaded without a replica"
    return ""


# That a pod which ends with notice costs no request is tested by eviction as well.
@pytest.mark.parametrize("grace_s", [pytest.param(30, marks=pytest.mark.deep), 0], ids=["gracefully", "killed"])
async def test_a_deleted_runtime_pod_costs_no_wrong_answer(world: World, grace_s: int) -> None:
    tasks = world.tasks[:4]
    prober = Prober(world, tasks, pause_s=0.05)
    async with world.async_client() as client:
        for task in tasks:
            await prober.ask(client, task)
    probing = [asyncio.create_task(prober.run()) for _ in range(3)]
    await asyncio.sleep(3)
    before = {pod["metadata"]["uid"] for pod in world.runtime_pods()}
    pod = world.runtime_pods()[0]["metadata"]["name"]
    await asyncio.to_thread(world.kubectl, "delete", "pod", pod, f"--grace-period={grace_s}", "--wait=false")

    lies: list[str] = []
    seen_not_loaded = False
    for _ in range(120):
        lie = await asyncio.to_thread(_truth, world, tasks[0])
        lies += [lie] if lie else []
        status = (await asyncio.to_thread(world.condition, "lora", tasks[0], "Loaded"))[0]
        seen_not_loaded = seen_not_loaded or status != "True"
        now = {p["metadata"]["uid"] for p in await asyncio.to_thread(world.runtime_pods)}
        if seen_not_loaded and status == "True" and not (now & before):
            break
        await asyncio.sleep(0.5)
    prober.stop()
    await asyncio.gather(*probing)

    print(
        f"{grace_s=}: {prober.asked} asked, {prober.right} right, {prober.deferred=}, {prober.lost=}, lies {lies[:3]}"
    )
    assert prober.wrong == [], "an answer of another adapter or of the base"
    # The operator learns of a deletion slightly later than the API server: a claim may be stale for that long.
    assert len(lies) <= 4, lies
    assert seen_not_loaded
    if grace_s:
        assert prober.lost == []
        assert prober.deferred == []
    else:
        # After a kill, requests that had started on that pod may be lost: at most one per prober.
        assert len(prober.lost) + len(prober.deferred) <= 3, prober.lost + prober.deferred
    # Requests are answered as soon as the runtime says so; the kubelet, which Ready follows, asks it every second.
    await asyncio.to_thread(
        world.wait, "a ready base", lambda: world.condition("bm", BASE, "Ready")[0] == "True", timeout_s=30
    )
