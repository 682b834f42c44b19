"""Only a pod that a base owns, and that proves it, is polled, trusted and sent the base's token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from aiohttp import ClientSession, web
from fakes_operator import ScriptedRuntime, digest
from pods import adopt, group_objects, group_pods, owner_objects, pod_object

from lorapool_api.base_modules import BaseModules
from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.common import AdapterKey
from lorapool_api.loraadapter import LoraAdapterSpec, LoraAdapterStatus, UsagePart
from lorapool_api.protocol import AdapterDescriptor, runtime_token, token_sha256
from lorapool_api.trust.poll_proof import HEADER_PROOF
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeGoneError, RuntimeTracker
from lorapool_operator.world.cluster_cache import (
    AdapterObject,
    BaseObject,
    ClusterCache,
    Meta,
    PodObject,
    ReplicaSetObject,
    StatefulSetObject,
    WorkloadObject,
)
from lorapool_operator.world.observed import adapter_fingerprint

MASTER = "m" * 64
TOKEN = runtime_token(MASTER, "base-uid")
META = Meta("team", "tiny", "base-uid", 1, "1", 0.0, False, None)
FAST = PollSettings(wait_s=0.2, pause_s=0.0, stale_s=0.0, timeout_s=2.0)
KEY = AdapterKey("a-uid", digest("a"))
DESCRIPTOR = AdapterDescriptor.model_validate({"display": "team/a", "source": {"uri": "hf://org/a"}})


def base(name: str = "tiny", uid: str = "base-uid", namespace: str = "team") -> BaseObject:
    spec = BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}})
    return BaseObject(
        replace(META, name=name, uid=uid, namespace=namespace), spec, BaseModelStatus(modules=BaseModules(modules=[]))
    )


def adapter(name: str, on: str = "tiny", namespace: str = "team") -> AdapterObject:
    reference = {"name": on, "namespace": "team"}
    spec = LoraAdapterSpec.model_validate({"baseModelRef": reference, "source": {"uri": f"hf://org/{name}"}})
    return AdapterObject(replace(META, name=name, uid=f"{name}-uid", namespace=namespace), spec, LoraAdapterStatus())


def pod(port: int, on: BaseObject | None = None) -> PodObject:
    of = on or base()
    meta = replace(META, name="pod", uid="pod-uid", namespace=of.meta.namespace)
    return PodObject(meta, of.key, of.meta.uid, "127.0.0.1", port, True, False, "")


@dataclass
class Attacker:
    """A pod's own server: records what it is sent, and answers what the test wants."""

    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(path, credentials)."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    relay: str = ""
    """Sends each request on to this URL, with the response of which it answers."""

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append((request.path, request.headers.get("Authorization", "")))
        self.arrived.set()
        if not self.relay:
            return web.json_response(ScriptedRuntime().snapshot().dump())
        headers = {"Authorization": request.headers.get("Authorization", "")}
        async with ClientSession() as session, session.get(self.relay + request.path_qs, headers=headers) as answer:
            proof = {HEADER_PROOF: answer.headers.get(HEADER_PROOF, "")}
            return web.Response(status=answer.status, body=await answer.read(), headers=proof)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Attacker]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = int(runner.addresses[0][1])
        yield self
        await runner.cleanup()


@dataclass
class Polling:
    tracker: RuntimeTracker
    cache: ClusterCache

    async def until(self, true: Any) -> None:
        async with asyncio.timeout(10):
            while not true():  # noqa: ASYNC110  it has no event of its own
                await asyncio.sleep(0.005)


@asynccontextmanager
async def polling(*objects: BaseObject | AdapterObject) -> AsyncIterator[Polling]:
    cache = ClusterCache()
    for item in objects or (base(),):
        cache.bases.put(item) if isinstance(item, BaseObject) else cache.put_adapter(item)
    tokens = RuntimeTokens([MASTER]).of
    tracker = RuntimeTracker(cache, tokens=tokens, settings=FAST, changed=lambda *_, **__: None)
    yield Polling(tracker, cache)
    await tracker.close()


def forgeries() -> dict[str, tuple[dict[str, Any], ...]]:
    """Pods with the labels of the base `team/tiny`, and forged objects around them."""
    here, team = {"base_uid": "base-uid"}, {"namespace": "team", "base_uid": "base-uid"}
    deployment, replica_set = owner_objects("team", base_uid="base-uid")
    groups, leaders, workers = group_objects("team", base_uid="base-uid")
    owned_by_other = {"ownerReferences": group_pods(1, base_uid="other-uid")[0]["metadata"]["ownerReferences"]}
    return {
        "in another namespace, with the victim's uid": (pod_object(1, namespace="evil", **here),),
        "in another namespace, with owners copied from the victim": (
            *owner_objects("evil", base_uid="base-uid"),
            pod_object(1, namespace="evil", **here),
        ),
        "without an owner": (deployment, replica_set, pod_object(1, owner="", **team)),
        "of a ReplicaSet of no Deployment": (deployment, pod_object(1, **team)),
        "of a Deployment of another base": (
            *owner_objects("team", base="other", base_uid="other-uid"),
            pod_object(1, owner="rs-other-uid", **team),
        ),
        "of a StatefulSet of no LeaderWorkerSet": (leaders, group_pods(1, **team)[0]),
        "of a LeaderWorkerSet of another base": (
            *group_objects("team", base="other", base_uid="other-uid"),
            {**group_pods(1, **team)[0], "metadata": {**group_pods(1, **team)[0]["metadata"], **owned_by_other}},
        ),
        "the worker of a group without its leader": (groups, leaders, workers, group_pods(1, **team)[1]),
        "of a deleted base of the same name": (
            *owner_objects("team", base_uid="former-uid"),
            pod_object(1, namespace="team", base_uid="former-uid"),
        ),
    }


@pytest.mark.parametrize("which", forgeries())
async def test_a_pod_with_forged_labels_is_neither_polled_nor_counted(which: str) -> None:
    async with Attacker().running() as attacker, polling(base(), base("other", "other-uid")) as here:
        for raw in forgeries()[which]:
            if "spec" in raw:
                raw["spec"]["containers"][0]["ports"][1]["containerPort"] = attacker.port
                here.cache.pods.put(PodObject.parse(raw))
            elif raw.get("kind") == "LeaderWorkerSet":
                here.cache.leader_worker_sets.put(WorkloadObject.parse_groups(raw))
            elif raw.get("kind") == "StatefulSet":
                here.cache.stateful_sets.put(StatefulSetObject.parse(raw))
            elif raw["metadata"]["ownerReferences"][0]["kind"] == "BaseModel":
                here.cache.deployments.put(WorkloadObject.parse(raw))
            else:
                here.cache.replica_sets.put(ReplicaSetObject.parse(raw))
        here.tracker.follow_pods()
        async with asyncio.timeout(5):
            await here.tracker.answered(5.0)  # no poll is under way
        assert here.cache.pods_of(base()) == here.cache.pods_of(base("other", "other-uid")) == []
        assert here.tracker.views_of(base()) == []
    assert attacker.requests == []


async def test_the_leader_of_a_group_is_polled_and_its_workers_are_not() -> None:
    async with ScriptedRuntime(token=TOKEN, pod_uid="leader-base-uid").running() as runtime, polling() as here:
        groups, leaders, workers = group_objects("team", base_uid="base-uid")
        for raw in group_pods(runtime.port, namespace="team", base_uid="base-uid"):
            here.cache.pods.put(PodObject.parse(raw))
        here.cache.stateful_sets.put(StatefulSetObject.parse(leaders))
        here.cache.stateful_sets.put(StatefulSetObject.parse(workers))
        assert here.cache.pods_of(base()) == []
        here.cache.leader_worker_sets.put(WorkloadObject.parse_groups(groups))
        here.tracker.follow_pods()
        await here.tracker.answered(10.0)
        assert [view.pod for view in here.tracker.views_of(base()) if view.fresh] == ["tiny-runtime-0"]
        assert [pod.meta.name for pod in here.cache.pods_of(base())] == ["tiny-runtime-0"]
        assert [pod.meta.name for pod in here.cache.workers_of(base())] == ["tiny-runtime-0-1"]
        assert [pod.group for pod in here.cache.pods_of(base())] == [0]


async def test_an_owned_pod_that_proves_nothing_receives_no_token_and_is_no_runtime() -> None:
    async with Attacker().running() as attacker, polling(base(), adapter("a")) as here:
        adopt(here.cache, pod(attacker.port))
        here.tracker.follow_pods()
        await here.tracker.answered(10.0)
        assert here.tracker.poll_failures == 1
        with pytest.raises(RuntimeGoneError):
            await here.tracker.register("pod-uid", KEY, DESCRIPTOR)
        with pytest.raises(RuntimeGoneError):
            await here.tracker.unregister("pod-uid", KEY)
        assert not here.tracker.views_of(base())[0].fresh
    assert {path for path, _ in attacker.requests} == {"/v1/runtime"}
    assert not any(TOKEN in sent or token_sha256(TOKEN) in sent for _, sent in attacker.requests)


async def test_a_pod_that_passes_polls_on_to_a_true_runtime_does_not_become_one() -> None:
    async with ScriptedRuntime(token=TOKEN, pod_uid="true-pod-uid").running() as runtime:
        async with Attacker(relay=runtime.url).running() as attacker, polling() as here:
            adopt(here.cache, pod(attacker.port))
            here.tracker.follow_pods()
            await here.tracker.answered(10.0)
            assert (here.tracker.polls, here.tracker.poll_failures) == (0, 1)
        assert runtime.polls == 0  # refused before it answered


async def test_the_token_travels_with_calls_to_a_proven_pod_and_with_no_poll() -> None:
    async with ScriptedRuntime(token=TOKEN).running() as runtime, polling(base(), adapter("a")) as here:
        adopt(here.cache, pod(runtime.port))
        here.tracker.follow_pods()
        await here.tracker.answered(10.0)
        runtime.change()
        await here.until(lambda: here.tracker.polls > 1)
        polls, before = len(runtime.authorizations), list(runtime.authorizations)
        assert polls > 1
        assert not any(TOKEN in sent for sent in before)
        assert len(set(before)) == polls  # no nonce twice
        await here.tracker.register("pod-uid", KEY, DESCRIPTOR)
        assert f"Bearer {TOKEN}" in runtime.authorizations


async def test_a_pod_with_another_address_has_to_prove_itself_again() -> None:
    async with ScriptedRuntime(token=TOKEN).running() as runtime, Attacker().running() as attacker, polling() as here:
        known = adopt(here.cache, pod(runtime.port))
        here.tracker.follow_pods()
        await here.tracker.answered(10.0)
        moved = replace(known, port=attacker.port, meta=replace(known.meta, resource_version="2"))
        here.cache.pods.put(moved)
        here.tracker.follow_pods()
        with pytest.raises(RuntimeGoneError):
            await here.tracker.register("pod-uid", KEY, DESCRIPTOR)
        await here.tracker.answered(10.0)
        assert here.tracker.views_of(base())[0].snapshot is None


async def test_a_runtime_counts_nothing_for_an_adapter_of_another_base() -> None:
    own, victim = adapter("own", "other"), adapter("victim", "tiny")
    other = base("other", "other-uid")
    runtime = ScriptedRuntime(token=runtime_token(MASTER, "other-uid"))
    for item in (own, victim):
        key = AdapterKey(item.meta.uid, digest(item.meta.name))
        runtime.have(key, str(item.key))
        runtime.parts[item.meta.uid] = UsagePart(boot_id="boot-1", requests=1, completion_tokens=10**9)
    async with runtime.running(), polling(base(), other, own, victim) as here:
        adopt(here.cache, pod(runtime.port, other))
        here.tracker.follow_pods()
        await here.tracker.answered(10.0)
        runtime.adapters.clear()
        runtime.change()
        await here.until(lambda: here.tracker.lost_usage("own-uid"))
        assert here.tracker.lost_usage("own-uid")[0].completion_tokens == 10**9
        assert here.tracker.lost_usage("victim-uid") == ()
        await here.tracker.unregister("pod-uid", AdapterKey("victim-uid", digest("victim")))
        assert here.tracker.lost_usage("victim-uid") == ()


def test_the_status_of_an_adapter_does_not_contain_the_uid_of_its_base() -> None:
    item = adapter("a")
    recorded = adapter_fingerprint(item, base())
    assert "base-uid" not in recorded
    old = LoraAdapterStatus(judged=f"base-uid/{recorded.partition('/')[2]}")
    assert replace(item, status=old).recorded_fingerprint == recorded  # an older version's status stays valid


def test_a_recreated_base_of_the_same_name_is_another_one_for_the_fingerprint() -> None:
    assert adapter_fingerprint(adapter("a"), base()) != adapter_fingerprint(adapter("a"), base(uid="base-uid-2"))
