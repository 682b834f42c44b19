"""On the real cluster: an adapter is loaded, used and unloaded, its base goes to zero, a held request is answered."""

import asyncio
import time

import pytest
from e2e_world import BASE, Prober, World


def _device_bytes(world: World) -> int:
    """The device bytes that the runtime measured: base, KV pool, and the pages of each slot."""
    texts = world.scrape("runtime")
    lines = [x for text in texts for x in text.splitlines() if x.startswith("lorapool_runtime_device_bytes")]
    return int(float(lines[0].split()[-1]))


@pytest.fixture
def short_lives(world: World):  # type: ignore[no-untyped-def]
    """Sets idle times of seconds instead of minutes, for this file only."""
    for task in world.tasks:
        world.patch("lora", task, {"idleAfter": "8s"})
    yield
    world.patch("bm", BASE, {"scaling": {"minReplicas": 0, "maxReplicas": 1, "idleAfter": "10m"}})
    for task in world.tasks:
        world.patch("lora", task, {"idleAfter": "2m"})


def test_an_adapter_is_loaded_used_parked_and_its_base_goes_to_zero_and_back(world: World, short_lives: None) -> None:
    task = "routing"
    assert world.chat(task) == (world.answer(task), world.header(task))
    world.wait("Loaded", lambda: world.condition("lora", task, "Loaded")[0] == "True", timeout_s=15)
    replica = world.get("lora", task)["status"]["replicas"][0]
    assert replica["digest"] == world.header(task).split("@", 1)[1]
    assert replica["tier"] == "device"
    with_adapter = _device_bytes(world)

    world.wait("Parked", lambda: world.condition("lora", task, "Loaded") == ("False", "Parked"), timeout_s=40)
    assert world.condition("lora", task, "Ready")[0] == "True"
    assert "device" not in [r["tier"] for r in world.get("lora", task)["status"].get("replicas", [])]
    size = world.get("lora", task)["status"]["sizeBytes"]
    assert with_adapter - _device_bytes(world) >= size, "its memory was given back"

    world.patch("bm", BASE, {"scaling": {"minReplicas": 0, "maxReplicas": 1, "idleAfter": "12s"}})
    world.wait("zero pods", lambda: not world.runtime_pods() or "pods", timeout_s=120)
    assert world.condition("bm", BASE, "Ready") == ("True", "ScaledToZero")
    assert world.condition("lora", task, "Ready")[0] == "True"

    started = time.monotonic()
    assert world.chat(task) == (world.answer(task), world.header(task))
    print(f"held and answered from zero pods in {time.monotonic() - started:.1f} s")
    assert len(world.runtime_pods()) == 1


STEADY_S = 10.0
"""More than twice `idleAfter`: requests alone keep the base up."""
GAPS_S = (3.75, 4.5)
"""Gaps around `idleAfter`: whether the request or the decision to stop comes first varies."""
DRAINING_S, CLOSED_S = 0.4, 1.2
"""After the decision the pod answers `draining` for a second, then closes its socket; later it is gone, as above."""


@pytest.mark.parametrize(
    "after_decision_s",
    [(DRAINING_S, CLOSED_S), pytest.param((0.0, DRAINING_S, 0.8, CLOSED_S, 2.0), marks=pytest.mark.deep)],
    ids=["draining and closed", "sweep"],
)
async def test_a_prober_that_sends_throughout_loses_no_request(
    world: World, short_lives: None, after_decision_s: tuple[float, ...]
) -> None:
    """Requests are steady first; then their gaps sweep the moments at which the base stops."""
    world.patch("bm", BASE, {"scaling": {"minReplicas": 0, "maxReplicas": 1, "idleAfter": "4s"}})
    tasks = ("routing", "sentiment", "entities")
    prober = Prober(world, list(tasks[:2]), pause_s=0.2)
    steady = asyncio.create_task(prober.run())
    await asyncio.sleep(STEADY_S)
    prober.stop()
    await steady
    async with world.async_client() as client:
        for gap_s in GAPS_S:
            await asyncio.sleep(gap_s)
            await asyncio.gather(*(prober.ask(client, task) for task in tasks))
        for after_s in after_decision_s:
            await asyncio.to_thread(_wait_for_the_decision_to_stop, world)
            await asyncio.sleep(after_s)
            await asyncio.gather(*(prober.ask(client, task) for task in tasks))
    print(f"{prober.asked} asked, {prober.right} right, slowest {prober.slowest_s:.1f} s")
    assert prober.wrong == []
    assert prober.lost == []
    assert prober.deferred == []
    assert prober.right == prober.asked


def _wait_for_the_decision_to_stop(world: World) -> None:
    """Returns within a tenth of a second of the operator's write, before the pod is notified."""
    world.kubectl("wait", f"deploy/{BASE}-runtime", "--for=jsonpath={.spec.replicas}=0", "--timeout=60s")
