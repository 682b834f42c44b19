"""The loop between observation and effect: it yields, stays behind the fence, and one refusal stops nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from fakes_operator import FakeInspector, ScriptedRuntime, digest
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from pods import owner_objects, pod_object

from lorapool_api.common import AdapterKey
from lorapool_api.protocol import AdapterDescriptor, runtime_token
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_operator import slices
from lorapool_operator.assembly import Control, ControlSettings
from lorapool_operator.decisions.plan import KubeEvent
from lorapool_operator.decisions.pods import Manifest
from lorapool_operator.effects.cluster import Cluster, ClusterError, ObjectNotFoundError, Subject
from lorapool_operator.effects.fence import Fence, FencedError
from lorapool_operator.effects.rate_limit import RateLimit
from lorapool_operator.effects.runtime_polls import PollSettings
from lorapool_operator.metrics import Metrics
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, Key, ObjectKind
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile

MASTER_TOKEN = "m" * 64


class FakeTarget:
    """Takes all writes; statuses come back with the next version."""

    def __init__(self) -> None:
        self.statuses: list[tuple[str, Mapping[str, Any]]] = []
        self.raws: dict[tuple[str, str], dict[str, Any]] = {}
        self.version = 1000

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        raise ObjectNotFoundError("gone", 404)

    async def patch_status(self, item: BaseObject | AdapterObject, status: Mapping[str, Any]) -> dict[str, Any]:
        self.statuses.append((item.meta.name, status))
        self.version += 1
        raw = self.raws[item.meta.namespace, item.meta.name]
        raw["metadata"]["resourceVersion"] = str(self.version)
        raw["status"] = status
        return raw

    async def patch_raw_status(self, key: Key, version: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    async def scale(self, base: BaseObject, replicas: int) -> None: ...

    async def apply_child(self, manifest: Manifest) -> dict[str, Any]:
        return {}

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str) -> None: ...

    async def refused_pods(self, namespace: str, owner_uid: str) -> str:
        return ""

    async def post_event(self, subject: Subject, event: KubeEvent, now: float) -> None: ...

    async def annotate_pod(self, namespace: str, name: str, annotations: Mapping[str, str]) -> None: ...


class World:
    def __init__(self, *, fence: Fence | None = None) -> None:
        settings = ControlSettings(
            tokens=RuntimeTokens([MASTER_TOKEN]).of,
            images={"torch": RuntimeImage("image", "Never")},
            profiles={"default": RuntimeProfile()},
            inspections=4,
            inspection_timeout_s=10.0,
            counts_interval_s=0.1,
            usage_delay_s=0.1,
            polls=PollSettings(wait_s=1.0, pause_s=0.0, stale_s=1.0, timeout_s=5.0),
        )
        self.target = FakeTarget()
        self.control = Control(self.target, FakeInspector(), settings, Metrics(), fence=fence)
        self.version = 0

    def base(self, **spec: Any) -> None:
        self.control.intake.base(self._raw("tiny", "base-uid", {"source": {"uri": "hf://org/base"}, **spec}))

    def adapter(self, name: str, *, uid: str = "", deleted: bool = False, **spec: Any) -> None:
        body = {"baseModelRef": {"name": "tiny"}, "source": {"uri": f"hf://org/{name}"}, **spec}
        self.control.intake.adapter(self._raw(name, uid or f"{name}-uid", body), deleted=deleted)

    def pod(self, port: int) -> None:
        deployment, replica_set = owner_objects("team", base_uid="base-uid")
        self.control.intake.pod(pod_object(port, name="pod", namespace="team", base_uid="base-uid"))
        self.control.intake.replica_set(replica_set)
        self.control.intake.deployment(deployment)

    def _raw(self, name: str, uid: str, spec: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        meta = {"namespace": "team", "name": name, "uid": uid, "generation": 1, "resourceVersion": str(self.version)}
        self.target.raws["team", name] = {"metadata": meta, "spec": spec}
        return {"metadata": dict(meta), "spec": spec}

    def states(self) -> dict[str, str]:
        return {name: str(status.get("state")) for name, status in self.target.statuses}

    @asynccontextmanager
    async def working(self, workers: int = 4) -> AsyncIterator[None]:
        task = asyncio.create_task(self.control.reconciler.work(workers))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.control.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  what is waited for has no event of its own
            await asyncio.sleep(0.01)


async def test_other_tasks_run_between_the_keys_of_a_full_queue() -> None:
    world, turns = World(), 0
    for number in range(400):
        world.control.queue.add(Key(ObjectKind.ADAPTER, "team", f"a{number}"))  # a plan without any call

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    async with world.working(workers=4):
        await asyncio.sleep(0)
        while not world.control.queue.idle():  # noqa: ASYNC110  the turns are counted
            await asyncio.sleep(0)
    ticking.cancel()
    assert turns >= 100  # at most one key for each worker between two turns


async def test_workers_together_leave_the_loop_when_their_slice_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_S", -1.0)  # over at once: one key in each pass of the loop
    shared, passed = slices.Slices(), list[int]()

    async def worker(number: int) -> None:
        await shared.turn()
        passed.append(number)

    tasks = [asyncio.create_task(worker(number)) for number in range(5)]
    await asyncio.sleep(0)
    assert len(passed) == 1
    await asyncio.gather(*tasks)
    assert sorted(passed) == [0, 1, 2, 3, 4]


async def test_all_adapters_are_marked_over_the_interval_and_not_at_once() -> None:
    world = World()
    world.base()
    for number in range(100):
        world.adapter(f"a{number}")
    while world.control.queue.ready_depth():
        world.control.queue.done(await world.control.queue.get())
    world.control.mark_all(3600.0)
    assert world.control.queue.ready_depth() == 2  # the base and the first adapter


async def test_a_process_without_the_lease_sends_no_put_and_no_delete_to_a_runtime() -> None:
    leads = True
    world = World(fence=Fence(lambda: leads))
    async with ScriptedRuntime(token=runtime_token(MASTER_TOKEN, "base-uid")).running() as runtime:
        world.base()
        world.pod(runtime.port)
        key = AdapterKey("a-uid", digest("hf://org/a"))
        descriptor = AdapterDescriptor.model_validate({"display": "team/a", "source": {"uri": "hf://org/a"}})
        tracker = world.control.runtimes
        await until(lambda: tracker.polls > 0)
        await tracker.register("uid-pod", key, descriptor)
        leads = False
        with pytest.raises(FencedError):
            await tracker.register("uid-pod", AdapterKey("b-uid", key.digest), descriptor)
        with pytest.raises(FencedError):
            await tracker.unregister("uid-pod", key)
        assert list(runtime.adapters) == [key]
        await world.control.close()


class StubbornRuntime(ScriptedRuntime):
    """Refuses every DELETE."""

    async def _delete(self, request: Any) -> Any:
        self.deleted.append(AdapterKey(request.match_info["uid"], request.match_info["digest"]))
        return web.json_response({"error": {"message": "no"}}, status=500)


async def test_a_runtime_that_refuses_a_delete_does_not_hold_up_a_new_adapter_of_the_same_name() -> None:
    world = World()
    runtime = StubbornRuntime(token=runtime_token(MASTER_TOKEN, "base-uid"))
    async with runtime.running(), world.working():
        world.base()
        world.pod(runtime.port)
        world.adapter("a", uid="old")
        old = AdapterKey("old", digest("hf://org/a"))
        runtime.have(old, "team/a")
        await until(lambda: world.control.runtimes.holders_of("old"))
        world.adapter("a", uid="old", deleted=True)
        world.target.statuses.clear()
        world.adapter("a", uid="new")
        await until(lambda: world.states().get("a") == "Parked")
        await until(lambda: runtime.deleted.count(old) > 1)  # and it goes on trying
        assert world.control.intake.deleted_adapters(Key(ObjectKind.ADAPTER, "team", "a")) == ("old",)


async def test_a_runtime_that_begins_to_serve_makes_waiting_adapters_due_and_no_others() -> None:
    world = World()
    async with ScriptedRuntime(token=runtime_token(MASTER_TOKEN, "base-uid")).running() as runtime:
        runtime.ready = False
        async with world.working():
            world.base()
            world.adapter("volume", source={"uri": "pvc://claim/volume"})
            world.adapter("quiet")
            await until(lambda: world.states().get("quiet") == "Parked" and "volume" in world.states())
            world.pod(runtime.port)
            await until(lambda: world.control.runtimes.polls > 0 and world.control.queue.idle())
            planned = list[str]()
            world.control.queue.add = lambda key, delay_s=0.0: planned.append(key.name)  # type: ignore[method-assign]
            runtime.ready = True
            runtime.change()
            await until(lambda: "volume" in planned)
            assert "quiet" not in planned


async def test_nothing_is_said_of_a_base_in_a_namespace_that_was_never_listed() -> None:
    world = World()
    world.control.cache.unlisted = {"elsewhere"}
    async with world.working():
        world.adapter("guest", baseModelRef={"name": "tiny", "namespace": "elsewhere"})
        world.adapter("orphan")
        await until(lambda: world.states().get("orphan") == "BaseNotFound")
        assert "guest" not in world.states()


# --- the API server's wish for a pause


@asynccontextmanager
async def busy_server(status: int, headers: Mapping[str, str]) -> AsyncIterator[str]:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"message": "too many requests"}, status=status, headers=headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Pauses(RateLimit):
    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def pause(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.mark.parametrize(
    ("status", "headers", "wait_s"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (503, {"Retry-After": "3"}, 3.0),
        (503, {}, 0.0),
        (500, {"Retry-After": "7"}, 0.0),
        (429, {"Retry-After": "99999"}, 60.0),
        (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.0),
    ],
)
async def test_the_api_servers_retry_after_is_kept(status: int, headers: dict[str, str], wait_s: float) -> None:
    limit = Pauses()
    async with busy_server(status, headers) as url:
        configuration = Configuration(host=url)
        configuration.retries = None
        client = ApiClient(configuration=configuration)
        try:
            with pytest.raises(ClusterError) as caught:
                await Cluster(client, timeout_s=5.0, identity="i", rate_limit=limit).get("Pod", "team", "p")
        finally:
            await client.close()
    assert caught.value.retry_after_s == wait_s
    assert limit.seconds == [wait_s]


async def test_a_key_whose_write_was_refused_for_load_is_not_due_before_the_server_wants() -> None:
    world = World()

    async def overloaded(item: BaseObject | AdapterObject, status: Mapping[str, Any]) -> dict[str, Any]:
        world.target.statuses.append((item.meta.name, status))
        raise ClusterError("429", 429, retry_after_s=3600.0)

    world.target.patch_status = overloaded  # type: ignore[method-assign]
    async with world.working():
        world.adapter("a", suspend=True)
        await until(lambda: world.target.statuses)
        await until(lambda: not world.control.queue._working)
        due = world.control.queue._due[Key(ObjectKind.ADAPTER, "team", "a")]
        assert due - time.monotonic() > 3000.0
