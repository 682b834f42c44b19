"""Faults of the API server and of runtimes, as the tables show them, and a process that receives SIGTERM."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes import FakeRuntime
from gateway_world import KEY, FakeKube, adapter_object, base_object, key_of, until, until_it
from pods import group_objects, group_pods, owner_objects, pod_object

from lorapool_api.protocol import runtime_token
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_gateway.metrics import Metrics
from lorapool_gateway.process import GatewayProcess, running
from lorapool_gateway.routing import watch
from lorapool_gateway.routing.kube import Kube
from lorapool_gateway.routing.live_tables import LiveKeys, LiveRoutes
from lorapool_gateway.routing.objects import ObjectRef
from lorapool_gateway.routing.runtime_polls import PolledPod, RuntimePolls
from lorapool_gateway.routing.table_builder import TableBuilder
from lorapool_gateway.routing.watch import KubeSource
from lorapool_gateway.settings import Settings

REF = ObjectRef("demo", "tiny")


def secret(name: str = "main", text: str = KEY) -> dict[str, Any]:
    data = {"keySha256": hashlib.sha256(text.encode()).hexdigest(), "namespaces": "*"}
    encoded = {field: base64.b64encode(value.encode()).decode() for field, value in data.items()}
    return {"metadata": {"name": name, "namespace": "lorapool"}, "data": encoded}


def put_pod(api: FakeKube, pod: dict[str, Any]) -> None:
    """Adds a pod of the base `demo/tiny` with its owners."""
    deployment, replica_set = owner_objects()
    api.put("deployments", deployment)
    api.put("replicasets", replica_set)
    api.put("pods", pod)


class Watching:
    """Tables built from a fake API server, with long-polls of runtimes."""

    def __init__(self, kube: Kube, session: aiohttp.ClientSession) -> None:
        self.routes, self.keys, self.metrics = LiveRoutes(), LiveKeys(), Metrics()
        self.source = KubeSource(kube, None, "lorapool", self.metrics.watch_failed)
        self.tables = TableBuilder(self.source, self.routes, self.keys, self.metrics)
        self.tables.polls = RuntimePolls(session, lambda uid: ("t" * 64,), self.tables.runtimes_changed)
        self.builds = 0
        publish = self.routes.publish

        def counted(table: Any) -> None:
            self.builds += 1
            publish(table)

        self.routes.publish = counted  # type: ignore[method-assign]

    @property
    def names(self) -> set[str]:
        return {ref.name for ref in self.routes.table.adapters}

    def replicas(self) -> list[Any]:
        return list(self.routes.table.replicas.get(REF, ()))

    def replica(self) -> Any:
        found = self.routes.table.replicas.get(REF, ())
        return found[0] if found else None


@pytest.fixture
async def api():
    async with FakeKube().running() as fake:
        fake.put("basemodels", base_object())
        fake.put("loraadapters", adapter_object("route"))
        fake.put("secrets", secret())
        yield fake


@asynccontextmanager
async def watching(api: FakeKube, folder: Path) -> AsyncIterator[Watching]:
    async with AsyncExitStack() as stack:
        kube = await Kube.connect(api.kubeconfig(folder))
        stack.push_async_callback(kube.close)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        made = Watching(kube, session)
        assert made.tables.polls is not None
        stack.push_async_callback(made.tables.polls.close)
        task = asyncio.create_task(made.tables.run())
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_cluster_without_leader_worker_sets_is_served_and_they_are_found_once_it_has_them(
    api: FakeKube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MISSING_API_PAUSE_S", 0.05)
    api.missing = {"leaderworkersets"}
    groups, *stateful_sets = group_objects()
    for raw in stateful_sets:
        api.put("statefulsets", raw)
    for raw in group_pods(9):
        api.put("pods", raw)
    async with watching(api, tmp_path) as made:
        await until(lambda: made.tables.synced)
        labels = {"kind": "leaderworkersets"}
        assert made.metrics.registry.get_sample_value("lorapool_gateway_watch_errors_total", labels) is None
        assert made.replicas() == []
        api.put("leaderworkersets", groups)
        api.missing.clear()
        await until(lambda: [item.endpoint.pod_name for item in made.replicas()] == ["tiny-runtime-0"])


async def test_an_expired_version_is_listed_again_and_nothing_is_missed(api: FakeKube, tmp_path: Path) -> None:
    async with watching(api, tmp_path) as made:
        await until(lambda: made.tables.synced and api.watches.count("loraadapters") == 1)
        api.silent = True  # no event is sent for these two changes
        api.put("loraadapters", adapter_object("late"))
        api.delete("loraadapters", "demo/route")
        api.silent = False
        api.expire("loraadapters")
        await until(lambda: made.names == {"late"})
        assert api.lists.count("loraadapters") == 2
        assert api.lists.count("basemodels") == 1


async def test_a_silent_connection_is_given_up_and_the_watch_goes_on_from_where_it_was(
    api: FakeKube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watching(api, tmp_path) as made:
        for item in made.source.watches:
            item.inactivity_timeout_s = 0.2
        await until(lambda: made.tables.synced)
        api.silent = True
        api.put("loraadapters", adapter_object("late"))
        api.silent = False
        await until(lambda: made.names == {"route", "late"})
        assert api.lists.count("loraadapters") == 1


async def test_while_the_api_server_refuses_everything_the_last_tables_stay_and_it_is_not_hammered(
    api: FakeKube, tmp_path: Path
) -> None:
    async with watching(api, tmp_path) as made:
        await until(lambda: made.tables.synced)
        api.refuse = 503
        for plural in ("basemodels", "loraadapters", "pods", "secrets"):
            api.expire(plural)
        await asyncio.sleep(1.0)
        assert made.names == {"route"}
        assert made.keys.table.find(KEY) is not None
        assert made.tables.synced
        errors = made.metrics.registry.get_sample_value("lorapool_gateway_watch_errors_total", {"kind": "loraadapters"})
        assert errors is not None
        assert 1 <= errors <= 5
        api.refuse = None
        api.put("loraadapters", adapter_object("late"))
        await until(lambda: made.names == {"route", "late"})


async def test_before_the_first_lists_are_in_nothing_is_ready(api: FakeKube, tmp_path: Path) -> None:
    api.refuse = 500
    async with watching(api, tmp_path) as made:
        await asyncio.sleep(0.3)
        assert not made.tables.synced
        api.refuse = None
        await until(lambda: made.tables.synced)


async def test_an_object_that_cannot_be_parsed_counts_as_absent_and_harms_no_other(
    api: FakeKube, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = adapter_object("broken")
    broken["spec"]["baseModelRef"] = None
    async with watching(api, tmp_path) as made:
        await until(lambda: made.tables.synced)
        bad = secret("bad")
        bad["data"]["namespaces"] = base64.b64encode(b"canary,../").decode()
        api.put("secrets", bad)
        api.put("loraadapters", broken)
        api.put("loraadapters", adapter_object("good"))
        await until(lambda: made.names == {"route", "good"})
    assert "canary" not in str([record.__dict__ for record in caplog.records])


async def test_5000_objects_are_read_in_pages_and_a_burst_of_changes_rebuilds_the_table_a_few_times(
    api: FakeKube, tmp_path: Path
) -> None:
    for number in range(2000):
        api.put("loraadapters", adapter_object(f"a{number}"))
    async with watching(api, tmp_path) as made:
        await until(lambda: made.tables.synced and len(made.names) == 2001, 60)
        assert api.lists.count("loraadapters") == 5
        before = made.builds
        for number in range(300):
            api.put("loraadapters", adapter_object(f"b{number}"))
        await until(lambda: len(made.names) == 2301, 60)
        assert made.builds - before < 60
        settled = made.builds
        for number in range(100):  # only usage changes
            raw = adapter_object(f"a{number}")
            raw["status"] = {**raw["status"], "usage": {"requests": number}}
            api.put("loraadapters", raw)
        api.put("loraadapters", adapter_object("last"))
        await until(lambda: "last" in made.names)
        assert made.builds - settled <= 2


async def test_a_revoked_key_is_gone_without_a_restart(api: FakeKube, tmp_path: Path) -> None:
    async with watching(api, tmp_path) as made:
        await until(lambda: made.keys.table.find(KEY) is not None)
        api.delete("secrets", "lorapool/main")
        await until(lambda: made.keys.table.find(KEY) is None)


async def test_a_runtimes_state_follows_its_long_poll_and_is_dropped_when_it_dies(
    api: FakeKube, tmp_path: Path
) -> None:
    runtime = FakeRuntime()
    async with watching(api, tmp_path) as made:
        async with runtime.running():
            put_pod(api, pod_object(runtime.port, ready=False))
            await until(lambda: made.replica() is not None and made.replica().usable)
            runtime.have(key_of("route"), "demo/route")
            await until(lambda: tuple(key_of("route")) in made.replica().state.loaded)
            assert runtime.polls < 10
        await until(lambda: made.replica().state is None)
        assert made.replica().poll_failed
        again = FakeRuntime(boot_id="boot-2")
        async with again.running(runtime.port):
            await until(lambda: made.replica().state is not None and made.replica().state.boot_id == "boot-2")
            assert made.replica().usable
            assert not made.replica().state.loaded
            put_pod(api, pod_object(runtime.port, terminating=True))
            await until(lambda: not made.replica().usable)


async def test_a_pod_that_does_not_prove_itself_gets_neither_a_request_nor_the_token(
    api: FakeKube, tmp_path: Path
) -> None:
    forged, true = FakeRuntime(token="x" * 64), FakeRuntime()
    async with watching(api, tmp_path) as made, forged.running(), true.running():
        put_pod(api, pod_object(forged.port, name="forged"))
        put_pod(api, pod_object(true.port, name="true"))
        await until(lambda: [item.proven for item in made.replicas()] == [False, True])
        assert [item.usable for item in made.replicas()] == [False, True]
        assert made.replicas()[0].endpoint.ready
        assert not any("t" * 64 in sent for sent in (*forged.authorizations, *true.authorizations))


async def test_a_pod_that_its_base_does_not_own_is_not_even_polled(api: FakeKube, tmp_path: Path) -> None:
    forged, true = FakeRuntime(), FakeRuntime()
    async with watching(api, tmp_path) as made, forged.running(), true.running():
        for number, raw in enumerate(
            (
                pod_object(forged.port, owner=""),
                pod_object(forged.port, namespace="evil"),
                pod_object(forged.port, owner="x"),
            )
        ):
            raw["metadata"] |= {"name": f"forged-{number}", "uid": f"uid-forged-{number}"}
            api.put("pods", raw)
        put_pod(api, pod_object(true.port, name="true"))
        await until(lambda: [item.usable for item in made.replicas()] == [True])
    assert forged.authorizations == []


async def test_a_runtime_that_drained_is_not_usable_after_its_end_until_another_process_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its pod may still be listed as ready, and each request that is sent there may be lost."""
    caplog.set_level(logging.INFO)
    runtime = FakeRuntime()
    async with aiohttp.ClientSession() as session:
        polls = RuntimePolls(session, lambda uid: ("t" * 64,), lambda: None)
        async with runtime.running():
            polls.follow({"pod": PolledPod(runtime.url, "uid")})
            await until(lambda: "pod" in polls.states)
            runtime.faults.draining = True
            runtime.change()
            await until(lambda: polls.states["pod"].draining)
        await until(lambda: "runtime does not answer" in caplog.text)
        assert polls.states["pod"].draining
        async with FakeRuntime(boot_id="boot-2").running(runtime.port):
            await until(lambda: not polls.states["pod"].draining)
        await polls.close()


async def test_runtimes_are_polled_with_the_previous_token_until_they_accept_the_current_one() -> None:
    changes = asyncio.Event()
    async with FakeRuntime(token="o" * 64).running() as runtime, aiohttp.ClientSession() as session:
        polls = RuntimePolls(session, lambda uid: ("n" * 64, "o" * 64), changes.set)
        polls.follow({"pod": PolledPod(runtime.url, "uid")})
        await until(lambda: "pod" in polls.states)
        runtime.token = "n" * 64
        runtime.change()
        polled = runtime.polls
        await until(lambda: runtime.polls > polled)
        assert "pod" in polls.states
        assert polls.failed == set()
        await polls.close()


@asynccontextmanager
async def process_of(api: FakeKube, tmp_path: Path, **changes: Any) -> AsyncIterator[GatewayProcess]:
    settings = Settings(keys_namespace="lorapool", listen_host="127.0.0.1", api_port=0, metrics_port=0, **changes)
    kube = await Kube.connect(api.kubeconfig(tmp_path))
    try:
        metrics = Metrics()
        source = KubeSource(kube, None, "lorapool", metrics.watch_failed)
        async with running(settings, RuntimeTokens(["m" * 64]), source, kube, metrics) as process:
            yield process
    finally:
        await kube.close()


async def test_a_ready_gateway_stays_ready_while_its_tables_change(api: FakeKube, tmp_path: Path) -> None:
    async with process_of(api, tmp_path) as process, aiohttp.ClientSession() as session:

        async def ready() -> bool:
            async with session.get(f"http://127.0.0.1:{process.metrics_port}/readyz") as response:
                return response.status == 200

        await until_it(ready)
        answers = []
        for number in range(50):
            api.put("loraadapters", adapter_object(f"a{number}"))
            process.tables.runtimes_changed()
            answers.append(await ready())
        assert all(answers), f"{answers.count(False)} of {len(answers)} probes failed"
        process.gateway.draining = True
        assert not await ready()


async def test_a_ready_gateway_stays_ready_while_a_new_pod_has_answered_no_poll(api: FakeKube, tmp_path: Path) -> None:
    async with watching(api, tmp_path) as made:
        await until(lambda: made.tables.synced)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            put_pod(api, pod_object(silent.getsockname()[1]))
            await until(lambda: made.replica() is not None)
            assert made.tables.polls is not None
            assert not made.tables.polls.polled_once
            assert made.tables.synced


def status_without_the_loop(process: GatewayProcess, path: str) -> int:
    """Asks while the calling thread, and with it the event loop, waits."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{process.metrics_port}{path}", timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


async def test_probes_and_metrics_are_answered_while_the_event_loop_is_busy(api: FakeKube, tmp_path: Path) -> None:
    async with process_of(api, tmp_path) as process:
        await until(lambda: process.tables.synced)
        paths = ("/healthz", "/readyz", "/metrics")
        assert [status_without_the_loop(process, path) for path in paths] == [200, 200, 200]


async def test_probes_fail_once_the_event_loop_has_not_run_for_its_bound(api: FakeKube, tmp_path: Path) -> None:
    async with process_of(api, tmp_path, loop_stuck_s=0.2) as process:
        await until(lambda: process.tables.synced)
        while status_without_the_loop(process, "/healthz") == 200:
            pass
        assert status_without_the_loop(process, "/readyz") == 503
        await until(lambda: status_without_the_loop(process, "/readyz") == 200)


async def test_on_sigterm_the_process_goes_unready_finishes_its_streams_and_leaves(
    api: FakeKube, tmp_path: Path
) -> None:
    master = tmp_path / "token"
    master.write_text("m" * 64)
    prefix = "LORAPOOL_GATEWAY_"
    values = {
        "KUBECONFIG": str(api.kubeconfig(tmp_path)),
        "KEYS_NAMESPACE": "lorapool",
        "MASTER_TOKEN_FILE": str(master),
        "LISTEN_HOST": "127.0.0.1",
        "API_PORT": "0",
        "METRICS_PORT": "0",
        "SHUTDOWN_DELAY_S": "0.5",
        "DRAIN_TIMEOUT_S": "20",
    }
    environment = {**os.environ, **{prefix + name: value for name, value in values.items()}}
    runtime = FakeRuntime(token=runtime_token("m" * 64, "base-demo-tiny"), words=200, token_s=0.01)
    async with runtime.running():
        put_pod(api, pod_object(runtime.port))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "lorapool_gateway", env=environment, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            line = (await asyncio.wait_for(process.stderr.readline(), 30)).decode()
            api_port, metrics_port = (
                int(word) for word in line.replace(",", " ").replace('"', " ").split() if word.isdigit()
            )
            await _sigterm(process, api_port, metrics_port)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        rest = (await process.stderr.read()).decode()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    assert KEY not in rest


async def _sigterm(process: asyncio.subprocess.Process, api_port: int, metrics_port: int) -> None:
    url, headers = f"http://127.0.0.1:{api_port}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    body = {"model": "route", "messages": [{"role": "user", "content": "hi"}]}
    async with aiohttp.ClientSession() as session:

        async def ready() -> bool:
            async with session.get(f"http://127.0.0.1:{metrics_port}/readyz") as response:
                return response.status == 200

        async def unready() -> bool:
            return not await ready()

        await until_it(ready, 10)
        async with session.post(url, json={**body, "stream": True}, headers=headers) as stream:
            await stream.content.readuntil(b"\n\n")
            process.send_signal(signal.SIGTERM)
            await until_it(unready)
            async with session.post(url, json={"model": "nope"}, headers=headers) as still:
                assert still.status == 404  # accepting, until load balancers have noticed
                assert still.headers["Connection"] == "close"
            rest = await stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
    await asyncio.wait_for(process.wait(), 10)
