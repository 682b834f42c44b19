"""A base grows under load, a hot adapter spreads over its replicas while a cold one does not, and all goes to zero."""

import asyncio

import pytest
from e2e_world import BASE, Prober, World

HOT, COLD = "manual-qa", "routing"
CLIENTS = 12


@pytest.fixture
def three_replicas(world: World):  # type: ignore[no-untyped-def]
    """Lets the base have three replicas of two requests each."""
    scaling = {"minReplicas": 0, "maxReplicas": 3, "targetInFlight": 2, "idleAfter": "20s", "scaleDownDelay": "5s"}
    world.patch("bm", BASE, {"scaling": scaling})
    yield
    world.patch(
        "bm",
        BASE,
        {"scaling": {"maxReplicas": 1, "targetInFlight": 16, "idleAfter": "10m", "scaleDownDelay": "2m"}},
    )


def _loaded_on(world: World, task: str) -> int:
    replicas = world.get("lora", task)["status"].get("replicas", [])
    return sum(1 for replica in replicas if replica["tier"] == "device")


def _placed(world: World, task: str) -> int:
    """The number of preferred replicas that the status names; 1 where it names none."""
    return int(world.get("lora", task)["status"].get("placement", {}).get("k", 1))


async def test_a_loaded_base_grows_its_hot_adapter_spreads_and_all_goes_to_zero(
    world: World, three_replicas: None
) -> None:
    hot = [Prober(world, [HOT], pause_s=0.0) for _ in range(CLIENTS)]
    cold = Prober(world, [COLD], pause_s=3.0)
    probing = [asyncio.create_task(prober.run()) for prober in (*hot, cold)]

    def grown() -> object:
        return world.get("bm", BASE)["status"].get("readyReplicas", 0) == 3 or "replicas"

    await asyncio.to_thread(world.wait, "three replicas", grown, timeout_s=300)
    await asyncio.to_thread(world.wait, "spread", lambda: _placed(world, HOT) >= 2 or "one", timeout_s=60)
    await asyncio.to_thread(world.wait, "loaded twice", lambda: _loaded_on(world, HOT) >= 2 or "once", timeout_s=60)
    assert _placed(world, COLD) == 1
    for prober in (*hot, cold):
        prober.stop()
    await asyncio.gather(*probing)
    everyone = [*hot, cold]
    print(f"{sum(p.asked for p in everyone)} asked, slowest {max(p.slowest_s for p in everyone):.1f} s")
    assert [text for prober in everyone for text in (*prober.wrong, *prober.lost, *prober.deferred)] == []

    await asyncio.to_thread(world.wait, "zero pods", lambda: not world.runtime_pods() or "pods", timeout_s=180)
    assert world.condition("bm", BASE, "Ready") == ("True", "ScaledToZero")
    assert await asyncio.to_thread(world.chat, COLD) == (world.answer(COLD), world.header(COLD))


def _evict(world: World) -> None:
    pod = world.runtime_pods()[0]["metadata"]["name"]
    path = f"/api/v1/namespaces/{world.namespace}/pods/{pod}/eviction"
    body = (
        f'{{"apiVersion":"policy/v1","kind":"Eviction","metadata":{{"name":"{pod}","namespace":"{world.namespace}"}}}}'
    )
    world.kubectl("create", "--raw", path, "-f", "-", stdin=body)


def _restart(world: World) -> None:
    world.kubectl("rollout", "restart", f"deploy/{BASE}-runtime")


def _drain(world: World) -> None:
    node = world.runtime_pods()[0]["spec"]["nodeName"]
    world.kubectl("cordon", node)
    try:
        world.kubectl(
            "drain", node, f"--pod-selector=lorapool.dev/base={BASE}", "--delete-emptydir-data", "--timeout=90s"
        )
    finally:
        world.kubectl("uncordon", node)


DEEP = pytest.mark.deep


@pytest.mark.parametrize(
    "end",
    [_evict, pytest.param(_restart, marks=DEEP), pytest.param(_drain, marks=DEEP)],
    ids=["eviction", "rollout restart", "drain"],
)
async def test_a_pod_that_is_ended_with_notice_costs_no_request(world: World, end) -> None:  # type: ignore[no-untyped-def]
    world.chat(COLD)
    before = {pod["metadata"]["uid"] for pod in world.runtime_pods()}
    prober = Prober(world, [COLD, "sentiment"], pause_s=0.1)
    probing = asyncio.create_task(prober.run())
    await asyncio.to_thread(end, world)

    def replaced() -> object:
        pods = world.runtime_pods()
        ready = [p for p in pods if all(c["ready"] for c in p["status"].get("containerStatuses", [{"ready": False}]))]
        return (bool(ready) and not before & {p["metadata"]["uid"] for p in pods}) or "not replaced"

    await asyncio.to_thread(world.wait, "another pod", replaced, timeout_s=180)
    right = prober.right
    await asyncio.to_thread(world.wait, "answers of it", lambda: prober.right > right + 2 or "none", timeout_s=60)
    prober.stop()
    await probing
    print(f"{prober.asked} asked, slowest {prober.slowest_s:.1f} s")
    assert prober.wrong + prober.lost + prober.deferred == []
