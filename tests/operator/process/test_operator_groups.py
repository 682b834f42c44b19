"""Bases on several nodes, on a real API server with the real definition of LeaderWorkerSets.

Kubernetes' own controllers run, so that StatefulSets have pods and deleted objects take theirs with them. A stand-in
makes what the controller of LeaderWorkerSets makes of one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from apiserver import ApiServer, leader_worker_sets, running_apiserver
from fakes_operator import FakeInspector, ScriptedRuntime
from group_controller import group_controller
from operator_world import Api, RefusedError, condition, namespace_of, running_operator, token_of
from operator_world import until as until_within
from profile_kit import two_nodes

from lorapool_api.common import LABEL_WORKER_INDEX
from lorapool_operator.decisions.scaling import starts

pytestmark = pytest.mark.apiserver

CRDS = Path(__file__).resolve().parents[3] / "crds"
LEADER, WORKER = "tiny-runtime-0", "tiny-runtime-0-1"
ONE_NODE = {"resources": {"requests": {"cpu": "100m"}}}
until = functools.partial(until_within, within_s=120.0)
"""Three programs of Kubernetes share the machine with the operator, and each step passes through all of them."""
HOSTS = iter(f"127.{60 + os.getpid() % 90}.{number}.1" for number in range(1, 250))
"""Addresses of this machine alone; a runtime listens on the same port in each pod."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("groups"), controllers=True) as made:
        made.install_crds(*sorted(CRDS.glob("*.yaml")))
        yield made


@pytest.fixture
async def api(server: ApiServer) -> AsyncIterator[Api]:
    async with namespace_of(server) as made:
        yield made


def write_profile(folder: Path, **profile: Any) -> Path:
    """Makes the profile `fleet` what it says; a running operator reads it within two seconds."""
    file = folder / "fleet.yaml"
    text = json.dumps({"profiles": {"default": {}, "fleet": profile}})
    made = folder / "fleet.new"
    made.write_text(text)
    made.rename(file)
    return file


@asynccontextmanager
async def operating(api: Api, folder: Path, **settings: Any) -> AsyncIterator[None]:
    profiles = write_profile(folder, **two_nodes())
    image = {"runtime_vllm_image": "registry.example/vllm:1"}
    async with (
        group_controller(api),
        running_operator(
            api, folder, FakeInspector(), **{"profiles_file": profiles, "resync_s": 2.0, **image, **settings}
        ),
    ):
        yield


async def uid_of(api: Api, plural: str, name: str = "tiny-runtime") -> str:
    found = await api.find(plural, name)
    gone = found is None or "deletionTimestamp" in found["metadata"]
    return "" if found is None or gone else str(found["metadata"]["uid"])


async def replicas_of(api: Api) -> int:
    found = await api.find("leaderworkersets", "tiny-runtime")
    return int(found["spec"]["replicas"]) if found is not None else -1


async def pod_names(api: Api) -> list[str]:
    return sorted(pod["metadata"]["name"] for pod in await api.items("pods"))


async def set_up(api: Api, pod: str, ip: str, **container: Any) -> None:
    """Does what a kubelet does: the pod runs at this address, and is ready."""
    containers = [{"name": "runtime", "ready": True, "restartCount": 0, "image": "i", "imageID": "i", **container}]
    ready = "False" if container else "True"
    status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "containerStatuses": containers}
    body = {"status": {**status, "conditions": [{"type": "Ready", "status": ready}]}}
    await api.patch("pods", pod, body, sub="status")


async def base_condition(api: Api, kind: str = "Ready") -> tuple[str, str]:
    return condition(await api.get("basemodels", "tiny"), kind)


@asynccontextmanager
async def group_running(api: Api, base: dict[str, Any]) -> AsyncIterator[tuple[ScriptedRuntime, ScriptedRuntime]]:
    """A group whose pods run: the runtime of its leader, and what would answer at its worker's address."""
    at, elsewhere = next(HOSTS), next(HOSTS)
    leader, worker = ScriptedRuntime(token=token_of(base)), ScriptedRuntime(token=token_of(base))
    async with leader.running(8000, at), worker.running(8000, elsewhere):
        await until(lambda: pod_names(api), [LEADER, WORKER])
        await set_up(api, LEADER, at)
        await set_up(api, WORKER, elsewhere)
        yield leader, worker


def wanted(**spec: Any) -> dict[str, Any]:
    return {"runtimeProfile": "fleet", "scaling": {"idleAfter": "1h", **spec}}


async def test_a_cluster_without_leader_worker_sets_is_a_condition_that_ends_once_they_are_installed(
    api: Api, server: ApiServer, tmp_path: Path
) -> None:
    async with operating(api, tmp_path):
        await api.base(**wanted())
        await until(lambda: base_condition(api), ("False", "LeaderWorkerSetMissing"))
        found = await api.get("basemodels", "tiny")
        [message] = [item["message"] for item in found["status"]["conditions"] if item["type"] == "Ready"]
        assert "https://lws.sigs.k8s.io/docs/installation" in message
        assert await uid_of(api, "services")  # what can be made is
        server.install_crds(leader_worker_sets())
        await until(lambda: uid_of(api, "leaderworkersets"))  # by the operator that runs
        await until(lambda: base_condition(api), ("False", "Starting"))


@pytest.fixture
def with_groups(server: ApiServer) -> None:
    server.install_crds(leader_worker_sets())


@pytest.mark.usefixtures("with_groups")
async def test_a_group_is_made_upgraded_scaled_to_zero_and_back_and_deleted(api: Api, tmp_path: Path) -> None:
    async with operating(api, tmp_path):
        base = await api.base(**wanted())
        uid = await until(lambda: uid_of(api, "leaderworkersets"))
        async with group_running(api, base) as (leader, worker):
            await until(lambda: base_condition(api), ("True", "Ready"))
            status = (await api.get("basemodels", "tiny"))["status"]
            assert [pod["name"] for pod in status["pods"]] == [LEADER]
            assert (status["replicas"], status["readyReplicas"]) == (1, 1)
            assert (leader.polls > 0, worker.polls) == (True, 0)
            service = await api.get("services", "tiny-runtime")
            assert service["spec"]["selector"][LABEL_WORKER_INDEX] == "0"

            # an upgrade changes the same object
            write_profile(tmp_path, **two_nodes(image="registry.example/vllm:2"))

            async def images() -> set[str]:
                made = (await api.get("leaderworkersets", "tiny-runtime"))["spec"]["leaderWorkerTemplate"]
                parts = (made["leaderTemplate"], made["workerTemplate"])
                return {part["spec"]["containers"][0]["image"] for part in parts}

            await until(images, {"registry.example/vllm:2"})
            assert await uid_of(api, "leaderworkersets") == uid

        # to zero and back
        await api.patch("basemodels", "tiny", {"spec": {"replicas": 0}}, sub="scale")
        await until(lambda: replicas_of(api), 0)
        await until(lambda: pod_names(api), [])
        await until(lambda: base_condition(api), ("True", "ScaledToZero"))
        await api.patch("basemodels", "tiny", {"spec": {"replicas": 1}}, sub="scale")
        async with group_running(api, base):
            await until(lambda: base_condition(api), ("True", "Ready"))
            assert await uid_of(api, "leaderworkersets") == uid

        await api.delete("basemodels", "tiny")
        for plural in ("leaderworkersets", "statefulsets", "services", "poddisruptionbudgets", "configmaps"):
            await until(lambda kind=plural: uid_of(api, kind), "")
        await until(lambda: pod_names(api), [])


@pytest.mark.usefixtures("with_groups")
async def test_a_profile_that_changes_its_number_of_nodes_leaves_one_kind_of_pods(api: Api, tmp_path: Path) -> None:
    async with operating(api, tmp_path):
        base = await api.base(**wanted())
        async with group_running(api, base):
            await until(lambda: base_condition(api), ("True", "Ready"))
            write_profile(tmp_path, **ONE_NODE)
            await until(lambda: uid_of(api, "deployments"))
            await until(lambda: uid_of(api, "leaderworkersets"), "")
            await until(lambda: uid_of(api, "statefulsets"), "")
        service = await api.get("services", "tiny-runtime")
        assert LABEL_WORKER_INDEX not in service["spec"]["selector"]
        write_profile(tmp_path, **two_nodes())
        await until(lambda: uid_of(api, "leaderworkersets"))
        await until(lambda: uid_of(api, "deployments"), "")
        async with group_running(api, base):
            await until(lambda: base_condition(api), ("True", "Ready"))


@pytest.mark.usefixtures("with_groups")
async def test_a_leader_worker_set_that_someone_deletes_or_changes_is_restored(api: Api, tmp_path: Path) -> None:
    async with operating(api, tmp_path):
        await api.base(**wanted())
        uid = await until(lambda: uid_of(api, "leaderworkersets"))
        await until(lambda: pod_names(api), [LEADER, WORKER])
        await api.patch("leaderworkersets", "tiny-runtime", {"spec": {"leaderWorkerTemplate": {"size": 5}}})

        async def size() -> int:
            found = await api.get("leaderworkersets", "tiny-runtime")
            return int(found["spec"]["leaderWorkerTemplate"]["size"])

        await until(size, 2)
        await api.delete("leaderworkersets", "tiny-runtime")

        async def another() -> bool:
            return await uid_of(api, "leaderworkersets") not in ("", uid)

        await until(another)


WHY = {135: "SharedMemoryFull", 1: "CrashLooping"}
"""Reason of the condition by the code with which a process ends."""


async def stopped_by_failures(api: Api, exit_code: int) -> bool:
    """Lets the worker's process fail as often as its group starts. Returns True once no group is wanted."""
    if await replicas_of(api) == 0:
        return True
    ended = {"exitCode": exit_code, "reason": "Error", "finishedAt": _now(), "message": "NCCL error"}
    failed = {"ready": False, "restartCount": 1, "lastState": {"terminated": ended}}
    with contextlib.suppress(RefusedError):  # there is no pod at this moment
        await set_up(api, WORKER, "127.0.0.9", **failed)
    return False


@pytest.mark.usefixtures("with_groups")
async def test_a_group_that_fails_again_and_again_is_not_started_in_a_loop(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "CLOCK_TOLERANCE_S", 1.0)  # shorter than the waits here; both have one clock
    async with operating(api, tmp_path, start_retry_min_s=5.0, start_retry_max_s=20.0):
        await api.base(**wanted(minReplicas=1))
        reasons = []
        for exit_code in WHY:
            await until(lambda: replicas_of(api), 1)
            await until(functools.partial(stopped_by_failures, api, exit_code))
            await until(functools.partial(base_condition, api, "Stalled"), ("True", WHY[exit_code]))
            start = (await api.get("basemodels", "tiny"))["status"]["start"]
            reasons.append((start["failures"], start["reason"]))
            assert start["retryAt"] > start["failedAt"]
        assert reasons == [(1, "SharedMemoryFull"), (2, "CrashLooping")]
        await until(lambda: replicas_of(api), 1)  # minReplicas is honoured again after the wait


@pytest.mark.usefixtures("with_groups")
async def test_a_quota_that_refuses_a_worker_is_a_condition_until_it_is_raised(api: Api, tmp_path: Path) -> None:
    async with operating(api, tmp_path):
        await api.create("resourcequotas", {"metadata": {"name": "few"}, "spec": {"hard": {"pods": "1"}}})
        await api.base(**wanted())
        await until(lambda: pod_names(api), [LEADER])
        await until(lambda: base_condition(api), ("False", "QuotaExceeded"))
        found = await api.get("basemodels", "tiny")
        [message] = [item["message"] for item in found["status"]["conditions"] if item["type"] == "Ready"]
        assert "exceeded quota: few" in message
        await api.patch("resourcequotas", "few", {"spec": {"hard": {"pods": "9"}}})
        await until(lambda: pod_names(api), [LEADER, WORKER])


@pytest.mark.usefixtures("with_groups")
async def test_the_loss_of_a_workers_node_is_a_condition_with_a_remedy(api: Api, tmp_path: Path) -> None:
    async with operating(api, tmp_path):
        base = await api.base(**wanted())
        async with group_running(api, base) as (leader, _):
            await until(lambda: base_condition(api), ("True", "Ready"))
            lost = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
            lost["lastTransitionTime"] = _now()  # Kubernetes takes back one that is minutes old
            await api.patch("pods", WORKER, {"status": {"conditions": [lost]}}, sub="status")
            leader.load = {"ready": False}  # its engine has lost a part
            leader.change()
            await until(lambda: base_condition(api), ("False", "WorkerLost"))
            found = await api.get("basemodels", "tiny")
            [message] = [item["message"] for item in found["status"]["conditions"] if item["type"] == "Ready"]
            assert "delete the Node object" in message


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
