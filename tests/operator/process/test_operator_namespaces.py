"""A namespace that cannot be listed or watched is reported and tried again alone; the others go on."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fakes_operator import FakeInspector
from operator_world import Api, condition, operator_settings, running_operator, until

from lorapool_artifacts.settings import SourceSettings
from lorapool_operator import namespaces, slices, watching
from lorapool_operator.decisions.plan import KubeEvent
from lorapool_operator.effects.cluster import ClusterError, Subject
from lorapool_operator.effects.namespace_reports import NamespaceReports
from lorapool_operator.handlers import pinned_settings
from lorapool_operator.metrics import Metrics
from lorapool_operator.namespaces import Namespaces
from lorapool_operator.process import Process
from lorapool_operator.resync import Resync
from lorapool_operator.watching import Inbox, WatchError, continue_from
from lorapool_operator.world.cluster_cache import ClusterCache

LEASE = Subject("Lease", "own", "lorapool-operator")


class FakeResync:
    """Lists what is not in `refused`, and counts."""

    def __init__(self) -> None:
        self.refused: set[str | None] = set()
        self.first_of: list[str | None] = []
        self.again_of: list[str | None] = []

    async def first(self, namespace: str | None) -> None:
        self._check(namespace)
        self.first_of.append(namespace)

    async def again(self, namespace: str | None) -> int:
        self._check(namespace)
        self.again_of.append(namespace)
        return 0

    def _check(self, namespace: str | None) -> None:
        if namespace in self.refused:
            raise ClusterError(f"GET pods in {namespace}: 403 forbidden", 403)


class FakeEvents:
    def __init__(self) -> None:
        self.posted: list[tuple[str, str]] = []

    async def refused_pods(self, namespace: str, owner_uid: str) -> str:
        return ""

    async def post_event(self, subject: Subject, event: KubeEvent, now: float) -> None:
        self.posted.append((subject.kind, event.message))


class World:
    def __init__(self, *watched: str) -> None:
        self.resync, self.events, self.cache = FakeResync(), FakeEvents(), ClusterCache()
        self.reports = NamespaceReports(self.events, LEASE, watched)  # type: ignore[arg-type]
        self.watching: dict[str | None, asyncio.Future[None]] = {}
        self.namespaces = Namespaces(
            watched,
            self.resync,  # type: ignore[arg-type]
            self.reports,
            self.cache,
            Metrics(),
            watch=self._watch,
            resync_s=0.05,
        )

    async def _watch(self, namespace: str | None) -> None:
        self.watching[namespace] = asyncio.get_running_loop().create_future()
        await self.watching[namespace]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.namespaces.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "BACKOFF_S", (0.02, 0.05))


async def eventually(check: Any) -> None:
    async with asyncio.timeout(20):
        while not check():  # noqa: ASYNC110  what is waited for has no event of its own
            await asyncio.sleep(0.01)


async def test_a_namespace_that_cannot_be_listed_holds_up_no_other_and_is_tried_again() -> None:
    world = World("gone", "team-b", "team-c")
    world.resync.refused = {"gone"}
    async with world.running():
        async with asyncio.timeout(10):
            await world.namespaces.listed()
        assert set(world.resync.first_of) == {"team-b", "team-c"}
        assert world.cache.unlisted == {"gone"}
        await eventually(lambda: world.reports.failures["gone"] > 2)
        assert (world.reports.failures["team-b"], set(world.reports.failing)) == (0, {"gone"})
        assert [kind for kind, _ in world.events.posted] == ["Lease"]  # once, however often it fails
        assert "403" in world.events.posted[0][1]
        world.resync.refused = set()
        await eventually(lambda: not world.reports.failing)
        assert world.cache.unlisted == set()
        assert world.resync.first_of.count("gone") == 1


async def test_work_begins_only_when_one_namespace_could_be_listed() -> None:
    world = World("a", "b")
    world.resync.refused = {"a", "b"}
    async with world.running():
        await eventually(lambda: min(world.reports.failures.values()) > 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await world.namespaces.listed()
        world.resync.refused = {"a"}
        async with asyncio.timeout(10):
            await world.namespaces.listed()


async def test_watches_that_end_are_started_again_after_a_comparison() -> None:
    world = World("a", "b")
    async with world.running():
        await eventually(lambda: {"a", "b"} <= world.watching.keys())
        ended, other = world.watching["a"], world.watching["b"]
        world.resync.again_of.clear()
        ended.set_exception(WatchError("403 forbidden"))
        await eventually(lambda: world.watching["a"] is not ended)
        assert "a" in world.resync.again_of
        assert world.watching["b"] is other
        assert world.reports.failures == {"a": 1, "b": 0}
        await eventually(lambda: not world.reports.failing)


async def test_a_failed_comparison_leaves_the_watches_alone() -> None:
    world = World("a")
    async with world.running():
        await eventually(lambda: "a" in world.watching)
        watch = world.watching["a"]
        world.resync.refused = {"a"}
        await eventually(lambda: world.reports.failures["a"] > 1)
        world.resync.refused = set()
        await eventually(lambda: not world.reports.failing)
        assert world.watching["a"] is watch


async def test_the_inbox_lets_other_tasks_run_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_S", -1.0)  # over at once: one event in each pass of the loop
    inbox, turns, fed = Inbox(slices.Slices().turn), list[int](), list[int]()

    def feed(raw: Any, *, deleted: bool = False) -> None:
        fed.append(raw["n"])

    for number in range(50):
        inbox.put(feed, {"n": number}, False)
    emptying = asyncio.create_task(inbox.empty_forever())
    while len(fed) < 50:
        turns.append(len(fed))
        await asyncio.sleep(0)
    emptying.cancel()
    assert fed == list(range(50))
    assert len(turns) >= 40


async def test_kopfs_first_listing_of_each_kind_is_empty_and_of_the_version_that_was_listed_before() -> None:
    asked: list[dict[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    middleware = continue_from({"loraadapters": "7", "pods": "8"})
    async with TestClient(TestServer(app), middlewares=(middleware,)) as client:
        for path in ("/apis", "/x/loraadapters?watch=true", "/x/loraadapters?limit=5", "/x/pods", "/x/loraadapters"):
            await client.get(path)
    nothing = {"fieldSelector": "metadata.name=none", "resourceVersionMatch": "Exact"}
    assert asked == [
        {},
        {"watch": "true"},
        {"limit": "5", "resourceVersion": "7", **nothing},
        {"resourceVersion": "8", **nothing},
        {},  # the server has forgotten the version: kopf lists
    ]


# --- with a real API server


@pytest.mark.apiserver
async def test_kopf_lists_no_object_again_and_misses_no_change_since_the_operators_listing(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await api.base()
    for number in range(5):
        await api.adapter(f"a-{number}")
    first = Resync.first

    async def first_and_then_a_change(self: Resync, namespace: str | None) -> None:
        await first(self, namespace)
        await api.patch("loraadapters", "a-3", {"spec": {"suspend": True}})

    monkeypatch.setattr(Resync, "first", first_and_then_a_change)
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=600.0):

        async def suspended() -> bool:
            return condition(await api.get("loraadapters", "a-3"), "Ready") == ("False", "Suspended")

        await until(suspended)
    listings = [
        event["requestURI"]
        for event in map(json.loads, api.server.audit_log.read_text().splitlines())
        if event["verb"] == "list" and "kopf" in event.get("userAgent", "") and api.namespace in event["requestURI"]
    ]
    assert len(listings) == len({uri.partition("?")[0] for uri in listings}) == 6  # each kind that it has, once
    assert all("resourceVersionMatch=Exact" in uri and "fieldSelector=metadata.name" in uri for uri in listings)


@pytest.mark.apiserver
async def test_a_namespace_whose_role_is_removed_neither_ends_the_operator_nor_prevents_its_start(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = f"{api.namespace}-gone"
    await api.call("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": gone}})
    await api.create("serviceaccounts", {"metadata": {"name": "op"}})
    for namespace in (api.namespace, gone):
        await grant(api, namespace)

    def short() -> Any:
        made = pinned_settings()
        made.watching.inactivity_timeout = 2
        made.networking.error_backoffs = (0.1,)
        return made

    monkeypatch.setattr(watching, "pinned_settings", short)
    settings = operator_settings(
        api,
        tmp_path,
        kubeconfig=kubeconfig_of(api, tmp_path),
        namespaces=frozenset({api.namespace, gone}),
        resync_s=1.0,
    )

    async def ready(name: str) -> tuple[str, str]:
        return condition(await api.get("loraadapters", name), "Ready")

    await api.base()
    for start in ("first", "second"):  # the second process begins while the rights are missing
        process = Process(settings, sources=SourceSettings(), inspector=FakeInspector())
        running = asyncio.create_task(process.run())
        try:
            await until(lambda made=process: synced(made))
            if start == "first":
                await api.call("DELETE", f"/apis/rbac.authorization.k8s.io/v1/namespaces/{gone}/rolebindings/op")
            await until(lambda made=process: failing(made, gone))
            await api.adapter(start)
            await until(lambda name=start: ready(name), ("True", "Parked"))
            assert not running.done()
            assert api.namespace not in process.reports.failing
        finally:
            process.stop()
            await asyncio.wait_for(running, 30)
    events = [item for item in await api.items("events") if item["reason"] == "WatchFailed"]
    assert len(events) == 2  # one for each process
    assert all(item["involvedObject"]["kind"] == "Lease" and gone in item["message"] for item in events)
    gc.collect()  # the tasks of kopf's failed watches
    lines = [record for record in caplog.records if "give the operator its Role" in record.getMessage()]
    assert len(lines) == 2
    traces = [record.getMessage() for record in caplog.records if record.exc_info]
    # kopf 1.45 cancels a request that still waits for its head in a callback, which asserts that it runs in a task.
    assert [trace for trace in traces if "request_cancel_callback" not in trace] == []


async def synced(process: Process) -> bool:
    return process.synced


async def failing(process: Process, namespace: str) -> bool:
    return namespace in process.reports.failing


async def grant(api: Api, namespace: str) -> None:
    """Gives the service account all rights in one namespace."""
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    everything = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
    await api.call("POST", f"{rbac}/roles", {"metadata": {"name": "op"}, "rules": everything})
    binding = {
        "metadata": {"name": "op"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "op"},
        "subjects": [{"kind": "ServiceAccount", "name": "op", "namespace": api.namespace}],
    }
    await api.call("POST", f"{rbac}/rolebindings", binding)


def kubeconfig_of(api: Api, folder: Path) -> Path:
    """A kubeconfig with the service account's rights only."""
    token = api.server.kubectl("create", "token", "op", "-n", api.namespace).strip()
    cluster = {"server": api.server.url, "certificate-authority": str(api.server.ca_file)}
    path = folder / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": cluster}],
                "users": [{"name": "u", "user": {"token": token}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return path
