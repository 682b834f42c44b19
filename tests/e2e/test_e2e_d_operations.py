"""What is done to a running release costs no request: upgrades, an HPA, cluster scope, two operators, many stops."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e_world import BASE, Prober, World, copies_of_routing, upgrade, upgraded

from lorapool_api.pod_address import ENCRYPTED, PLAIN, runtime_port

pytestmark = pytest.mark.deep

TASKS = ["routing", "sentiment"]
RESYNC_S = 30
"""`operator.resyncSeconds` of the demo's values."""
TENANT = "tenant"
RUNTIMES, GATEWAYS, OPERATORS = (
    f"lorapool.dev/base={BASE}",
    "app.kubernetes.io/component=gateway",
    "app.kubernetes.io/component=operator",
)
INTERNAL = {"mode": "Internal", "minReplicas": 0, "maxReplicas": 1, "idleAfter": "10m", "scaleDownDelay": "2m"}


@contextmanager
def probed(world: World, *, probers: int = 3) -> Iterator[list[Prober]]:
    """Clients that ask throughout, on a thread. None of their requests may be lost, deferred or answered wrongly."""
    everyone = [Prober(world, TASKS, pause_s=0.1) for _ in range(probers)]

    async def ask() -> None:
        await asyncio.gather(*(prober.run() for prober in everyone))

    with ThreadPoolExecutor(1) as pool, asyncio.Runner() as runner:
        loop = runner.get_loop()
        asking = pool.submit(runner.run, ask())
        try:
            answered(world, everyone)
            yield everyone
            answered(world, everyone)
        finally:
            for prober in everyone:
                loop.call_soon_threadsafe(prober.stop)
            asking.result(300)
    print(f"{sum(p.asked for p in everyone)} asked, slowest {max(p.slowest_s for p in everyone):.1f} s")
    assert [text for p in everyone for text in (*p.wrong, *p.lost, *p.deferred)] == []


def answered(world: World, probers: list[Prober]) -> None:
    """Waits until each prober has had another answer."""
    before = [prober.right for prober in probers]
    world.wait(
        "answers", lambda: all(p.right > b for p, b in zip(probers, before, strict=True)) or "none", timeout_s=120
    )


def uids(world: World, *selectors: str) -> set[str]:
    return {pod["metadata"]["uid"] for selector in selectors for pod in world.get("pods", "-l", selector)["items"]}


def settled(world: World) -> object:
    """Whether the pods of the base have the newest template."""
    return world.condition("bm", BASE, "Progressing") == ("False", "Stable") or "rolling"


def audited(world: World, since_unix_s: float) -> list[dict[str, Any]]:
    """The requests that the API server answered since then."""
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since_unix_s))
    events = (json.loads(line) for line in Path(world.summary["audit_log"]).read_text().splitlines())
    return [e for e in events if e["stage"] == "ResponseComplete" and e["requestReceivedTimestamp"] >= since]


def writes(events: list[dict[str, Any]], account: str, *subresources: str) -> list[dict[str, Any]]:
    """Successful writes of a service account to these subresources of our objects."""
    return [
        event
        for event in events
        if event["user"]["username"].endswith(f":{account}")
        and event["verb"] in ("update", "patch")
        and event["objectRef"].get("subresource") in subresources
        and event["responseStatus"]["code"] < 300
    ]


# --- chart upgrade ---------------------------------------------------------------------------


def test_a_chart_upgrade_that_replaces_runtimes_and_gateways_costs_no_request(world: World) -> None:
    for task in TASKS:
        world.chat(task)
    world.wait("both loaded", lambda: all(loaded(world, task) for task in TASKS) or "not", timeout_s=60)
    with probed(world):
        before = uids(world, RUNTIMES, GATEWAYS)

        def replaced() -> object:
            return not before & uids(world, RUNTIMES, GATEWAYS) or "old pods"

        with upgraded(
            world, "gateway.podAnnotations.test=upgraded", "runtimeProfiles.default.podAnnotations.test=upgraded"
        ):
            world.wait("new pods", replaced, timeout_s=300)
            world.wait("the end of the rollout", lambda: settled(world), timeout_s=120)
            log = world.kubectl("logs", "-l", RUNTIMES, "--tail=-1").splitlines()
            line = json.loads(next(line for line in log if "adapters preloaded" in line))
            print(f"preloaded {line['loaded']} of {line['wanted']}")
            assert line["loaded"] == line["wanted"] >= len(TASKS)
        world.wait("the end of the rollback", lambda: settled(world), timeout_s=300)


def loaded(world: World, task: str) -> bool:
    return world.condition("lora", task, "Loaded")[0] == "True"


# --- TLS between the parts -------------------------------------------------------------------


def test_switching_internal_tls_off_and_on_again_costs_no_request(world: World) -> None:
    """Pods of both kinds serve while one kind replaces the other."""
    for task in TASKS:
        world.chat(task)
    assert schemes(world) == {ENCRYPTED}

    def all_serve(scheme: str) -> None:
        world.wait(f"only {scheme} pods", lambda: schemes(world) == {scheme} or " ".join(schemes(world)), timeout_s=300)
        world.wait("the end of the rollout", lambda: settled(world), timeout_s=120)
        assert world.chat(TASKS[0]) == (world.answer(TASKS[0]), world.header(TASKS[0]))

    with probed(world), upgraded(world, "internalTLS.enabled=false"):
        all_serve(PLAIN)
        upgrade(world, "internalTLS.enabled=true")
        all_serve(ENCRYPTED)


def schemes(world: World) -> set[str]:
    """How the base's pods serve."""
    return {runtime_port(pod["spec"])[0] for pod in world.runtime_pods()}


# --- a real HorizontalPodAutoscaler ----------------------------------------------------------


def hpa(world: World, lowest: int, highest: int) -> dict[str, Any]:
    """No metrics API is installed, so that the bounds are what makes it write a number."""
    target = {"apiVersion": "lorapool.dev/v1alpha1", "kind": "BaseModel", "name": BASE}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": BASE, "namespace": world.namespace},
        "spec": {"scaleTargetRef": target, "minReplicas": lowest, "maxReplicas": highest},
    }


def test_the_number_of_an_hpa_stays_with_external_scaling(world: World) -> None:
    world.chat(TASKS[0])
    world.patch("bm", BASE, {"scaling": {**INTERNAL, "mode": "External", "maxReplicas": 3, "scaleDownDelay": "5s"}})
    try:
        with probed(world, probers=1):
            world.apply(hpa(world, 2, 3))
            world.wait("two replicas", lambda: replicas(world, "readyReplicas") == 2 or "other", timeout_s=180)
            since, seen = time.time(), set()
            while time.time() < since + 5 * RESYNC_S:
                seen.add(replicas(world, None))
                time.sleep(1)
            mine = writes(audited(world, since), "lorapool-operator", "scale")
            print(f"spec.replicas in {5 * RESYNC_S} s: {seen}; writes of the operator: {len(mine)}")
            assert (seen, mine) == ({2}, [])
            world.apply(hpa(world, 1, 1))
            world.wait("one replica", lambda: replicas(world, None) == 1 or "other", timeout_s=60)
            world.wait("one pod", lambda: len(world.runtime_pods()) == 1 or "more", timeout_s=120)
        by_hpa = writes(audited(world, since - 300), "horizontal-pod-autoscaler", "scale")
        assert len(by_hpa) >= 2
    finally:
        world.kubectl("delete", "hpa", BASE, "--ignore-not-found")
        world.patch("bm", BASE, {"scaling": INTERNAL})


def replicas(world: World, field: str | None) -> int:
    """A number of the status, or that of the spec."""
    item = world.get("bm", BASE)
    return int(item["spec"].get("replicas", 0) if field is None else item["status"].get(field, 0))


# --- cluster scope ---------------------------------------------------------------------------


@pytest.fixture
def tenant(world: World) -> Iterator[None]:
    """A second namespace with a base and an adapter of its own, and no rights for Lorapool."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    world.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": TENANT, "labels": labels}})
    spec = world.get("bm", BASE)["spec"]
    base = {
        "apiVersion": "lorapool.dev/v1alpha1",
        "kind": "BaseModel",
        "metadata": {"name": BASE},
        "spec": {name: value for name, value in spec.items() if name not in ("replicas", "servedName")},
    }
    [adapter] = copies_of_routing(world, ["theirs"])
    del adapter["metadata"]["namespace"]
    for manifest in (base, adapter):
        world.kubectl("apply", "-n", TENANT, "--server-side", "-f", "-", stdin=json.dumps(manifest))
    yield
    world.kubectl("delete", "namespace", TENANT, "--timeout=180s", timeout_s=200)


def test_with_cluster_scope_one_operator_serves_two_namespaces_without_roles_in_them(
    world: World, tenant: None
) -> None:
    assert "status" not in world.get("-n", TENANT, "lora", "theirs")
    with upgraded(world, "scope=cluster"):
        assert world.get("-n", TENANT, "networkpolicies")["items"]
        names = {item["metadata"]["name"] for item in world.get("roles", "-A", "-l", OPERATORS)["items"]}
        assert names == {"lorapool-operator-lease"}
        assert world.get("-n", TENANT, "roles")["items"] == []
        question = {**world.question("routing"), "model": f"{TENANT}/theirs"}
        with world.client() as client:
            raw = client.chat.completions.with_raw_response.create(**question)
        said = (raw.parse().choices[0].message.content or "").strip()
        assert said == world.answer("routing")
        assert raw.headers["x-lorapool-adapter"].startswith(f"{TENANT}/theirs@sha256:")
        assert world.chat("routing") == (world.answer("routing"), world.header("routing"))
        ready = world.get("-n", TENANT, "lora", "theirs")["status"]["conditions"]
        assert next(c["status"] for c in ready if c["type"] == "Ready") == "True"
        print(world.kubectl("get", "bm,lora", "-A"))


# --- two operators ---------------------------------------------------------------------------


def holder(world: World) -> str:
    return str(world.get("lease", "lorapool-operator")["spec"]["holderIdentity"])


def test_when_the_leader_of_two_operators_is_deleted_the_other_acts_alone(world: World) -> None:
    with upgraded(world, "operator.replicas=2"), probed(world):
        world.wait("a leader", lambda: holder(world) in pods_of(world, OPERATORS) or holder(world), timeout_s=60)
        leader, since = holder(world), time.time()
        world.kubectl("delete", "pod", leader, "--wait=false")
        world.apply(*copies_of_routing(world, ["after-the-leader"]))
        world.wait(
            "another leader", lambda: holder(world) in pods_of(world, OPERATORS) - {leader} or "none", timeout_s=90
        )
        world.wait(
            "its adapter",
            lambda: world.condition("lora", "after-the-leader", "Ready")[0] == "True" or "not ready",
            timeout_s=90,
        )
        time.sleep(10)  # the window of observation: what a deposed leader would still write
        next_one = holder(world)
        written = writes(audited(world, since), "lorapool-operator", "status", "scale")
    world.kubectl("delete", "lora", "after-the-leader")
    by = [(event["requestReceivedTimestamp"], _pod(event), event["objectRef"]["name"]) for event in written]
    print(f"leader {leader}, then {next_one}; {len(by)} writes")
    first = min(at for at, pod, _ in by if pod == next_one)
    assert [write for write in by if write[0] >= first and write[1] != next_one] == []


def _pod(event: dict[str, Any]) -> str:
    return str(event["user"]["extra"]["authentication.kubernetes.io/pod-name"][0])


def pods_of(world: World, selector: str) -> set[str]:
    return {pod["metadata"]["name"] for pod in world.get("pods", "-l", selector)["items"]}


# --- the end of the last pod -----------------------------------------------------------------

OFFSETS_S = (-0.4, -0.2, 0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0)


def delete_pod(world: World) -> None:
    pod = world.runtime_pods()[0]["metadata"]["name"]
    world.kubectl("delete", "pod", pod, "--wait=false")


def scale_to_zero(world: World) -> None:
    world.kubectl("scale", "bm", BASE, "--replicas=0")


@pytest.mark.parametrize("stop", [delete_pod, scale_to_zero])
def test_no_request_around_the_end_of_the_last_pod_is_lost(world: World, stop: Callable[[World], None]) -> None:
    """Twenty stops; tests/serve/test_serve_stops.py has hundreds."""
    task, slowest_s = TASKS[0], 0.0
    with ThreadPoolExecutor(2) as pool:
        for offset_s in OFFSETS_S:
            assert world.chat(task) == (world.answer(task), world.header(task))
            began_s = time.monotonic() + 0.5
            stopping = pool.submit(_at, began_s, stop, world)
            answer = pool.submit(_at, began_s + offset_s, world.chat, task)
            stopping.result(60)
            assert answer.result(300) == (world.answer(task), world.header(task)), f"{stop.__name__} {offset_s:+.1f} s"
            slowest_s = max(slowest_s, time.monotonic() - began_s)
    print(f"{len(OFFSETS_S)} of {len(OFFSETS_S)} answered, slowest {slowest_s:.1f} s")


def _at(at_s: float, do: Callable[..., Any], *args: Any) -> Any:
    time.sleep(max(0.0, at_s - time.monotonic()))
    return do(*args)
