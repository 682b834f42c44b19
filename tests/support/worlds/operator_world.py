"""The operator's tests against a real API server: a namespace for each test, and pods without a kubelet.

The test creates pods with the runtime's address in their status. The operator under test runs in the test's own event
loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from apiserver import ApiServer
from fakes_operator import FakeInspector

from lorapool_api.common import API_VERSION, GROUP, LABEL_BASE, LABEL_BASE_UID, LABEL_MANAGED_BY, VERSION
from lorapool_api.protocol import runtime_token
from lorapool_artifacts.settings import SourceSettings
from lorapool_operator.decisions.pods import MANAGED_BY
from lorapool_operator.effects.tuning import JobFiles
from lorapool_operator.process import Process
from lorapool_operator.settings import Settings

MASTER_TOKEN = "m" * 64
TLS_GOODBYE_S = 0.1
"""aiohttp closes a TLS connection a moment after close(); an event loop that ends before warns of a leak."""
PROFILES = "profiles:\n  default: {resources: {requests: {cpu: 100m}}}\n"
OURS = f"/apis/{GROUP}/{VERSION}"
ROOTS = {
    "basemodels": OURS,
    "loraadapters": OURS,
    "finetunejobs": OURS,
    "configmaps": "/api/v1",
    "deployments": "/apis/apps/v1",
    "replicasets": "/apis/apps/v1",
    "statefulsets": "/apis/apps/v1",
    "leaderworkersets": "/apis/leaderworkerset.x-k8s.io/v1",
    "persistentvolumeclaims": "/api/v1",
    "jobs": "/apis/batch/v1",
    "poddisruptionbudgets": "/apis/policy/v1",
    "pods": "/api/v1",
    "secrets": "/api/v1",
    "resourcequotas": "/api/v1",
    "serviceaccounts": "/api/v1",
    "services": "/api/v1",
    "events": "/api/v1",
    "leases": "/apis/coordination.k8s.io/v1",
}


class RefusedError(Exception):
    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"{status} {body.get('message')}")
        self.status = status
        self.message = str(body.get("message"))


class Api:
    """A small client with an administrator's rights."""

    def __init__(self, server: ApiServer, session: aiohttp.ClientSession, namespace: str) -> None:
        self.server = server
        self.namespace = namespace
        self._session = session

    async def call(
        self, method: str, path: str, body: Any = None, *, content: str = "application/json"
    ) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.server.token}", "Content-Type": content}
        async with self._session.request(method, self.server.url + path, json=body, headers=headers) as response:
            answer: dict[str, Any] = await response.json()
            if response.status >= 300:
                raise RefusedError(response.status, answer)
            return answer

    def path(self, plural: str, name: str = "", *, namespace: str | None = None, sub: str = "") -> str:
        end = (f"/{name}" if name else "") + (f"/{sub}" if sub else "")
        return f"{ROOTS[plural]}/namespaces/{namespace or self.namespace}/{plural}{end}"

    async def create(self, plural: str, body: dict[str, Any], *, namespace: str | None = None) -> dict[str, Any]:
        return await self.call("POST", self.path(plural, namespace=namespace), body)

    async def get(self, plural: str, name: str, *, namespace: str | None = None) -> dict[str, Any]:
        return await self.call("GET", self.path(plural, name, namespace=namespace))

    async def find(self, plural: str, name: str) -> dict[str, Any] | None:
        try:
            return await self.get(plural, name)
        except RefusedError as error:
            if error.status == 404:
                return None
            raise

    async def items(self, plural: str, *, namespace: str | None = None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.call("GET", self.path(plural, namespace=namespace)))["items"]
        return found

    async def patch(
        self, plural: str, name: str, body: dict[str, Any], *, sub: str = "", namespace: str | None = None
    ) -> dict[str, Any]:
        path = self.path(plural, name, sub=sub, namespace=namespace)
        return await self.call("PATCH", path, body, content="application/merge-patch+json")

    async def delete(self, plural: str, name: str, *, grace_s: int | None = 0) -> None:
        body = {"kind": "DeleteOptions", "apiVersion": "v1"} | (
            {} if grace_s is None else {"gracePeriodSeconds": grace_s}
        )
        await self.call("DELETE", self.path(plural, name), body)

    # --- Lorapool's objects

    async def base(self, name: str = "tiny", *, namespace: str | None = None, **spec: Any) -> dict[str, Any]:
        body = {
            "apiVersion": API_VERSION,
            "kind": "BaseModel",
            "metadata": {"name": name},
            "spec": {"source": {"uri": "hf://org/tiny"}, **spec},
        }
        return await self.create("basemodels", body, namespace=namespace)

    async def adapter(
        self,
        name: str,
        *,
        base: str = "tiny",
        base_namespace: str | None = None,
        namespace: str | None = None,
        **spec: Any,
    ) -> dict[str, Any]:
        ref = {"name": base} | ({"namespace": base_namespace} if base_namespace else {})
        body = {
            "apiVersion": API_VERSION,
            "kind": "LoraAdapter",
            "metadata": {"name": name},
            "spec": {"baseModelRef": ref, "source": {"uri": f"hf://org/{name}"}, **spec},
        }
        return await self.create("loraadapters", body, namespace=namespace)

    async def tuning(self, name: str, *, base: str = "tiny", **spec: Any) -> dict[str, Any]:
        """Creates a FineTuneJob, which measures with a tenth of its data unless `spec` says otherwise."""
        training = {"uri": f"store://{self.namespace}/files/file-1"}
        body = {
            "apiVersion": API_VERSION,
            "kind": "FineTuneJob",
            "metadata": {"name": name},
            "spec": {
                "baseModelRef": {"name": base},
                "data": {"training": training, "validationFraction": "0.1"},
                **spec,
            },
        }
        return await self.create("finetunejobs", body)

    async def runtime_pod(self, base: dict[str, Any], name: str, port: int) -> dict[str, Any]:
        """Creates a ready runtime pod of a base; its runtime listens on a port of this machine."""
        labels = labels_of(base)
        container = {"name": "runtime", "image": "none", "ports": [{"name": "http", "containerPort": port}]}
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels, **await self.owners(base)},
            "spec": {"containers": [container], "automountServiceAccountToken": False, "nodeName": "nowhere"},
        }
        made = await self.create("pods", body)
        await self.pod_ready(name)
        return made

    async def owners(self, base: dict[str, Any]) -> dict[str, Any]:
        """The `ownerReferences` of a base's pods. Creates what no controller creates here, a ReplicaSet each time."""
        name, labels = f"{base['metadata']['name']}-runtime", labels_of(base)
        deployment = await self.find("deployments", name)
        template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "runtime", "image": "none"}]}}
        spec = {"selector": {"matchLabels": labels}, "template": template}
        if deployment is None:
            owner = owned_by("BaseModel", base, API_VERSION)
            metadata = {"name": name, "labels": {**labels, LABEL_MANAGED_BY: MANAGED_BY}, **owner}
            try:
                deployment = await self.create("deployments", {"metadata": metadata, "spec": {"replicas": 1, **spec}})
            except RefusedError as error:
                if error.status != 409:
                    raise
                deployment = await self.get("deployments", name)  # the operator has just made it
        metadata = {"generateName": f"{name}-", "labels": labels, **owned_by("Deployment", deployment, "apps/v1")}
        replica_set = await self.create("replicasets", {"metadata": metadata, "spec": spec})
        return owned_by("ReplicaSet", replica_set, "apps/v1")

    async def pod_ready(self, name: str, ready: bool = True) -> None:
        status = {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "podIPs": [{"ip": "127.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        }
        await self.patch("pods", name, {"status": status}, sub="status")


def labels_of(base: dict[str, Any]) -> dict[str, str]:
    return {LABEL_BASE: base["metadata"]["name"], LABEL_BASE_UID: base["metadata"]["uid"]}


def owned_by(kind: str, owner: dict[str, Any], version: str) -> dict[str, Any]:
    """The part of an object's metadata that names its controller."""
    reference = {"apiVersion": version, "kind": kind, "controller": True}
    return {"ownerReferences": [{**reference, **{key: owner["metadata"][key] for key in ("name", "uid")}}]}


def token_of(base: dict[str, Any]) -> str:
    """Returns the bearer token of the runtimes of this base."""
    return runtime_token(MASTER_TOKEN, base["metadata"]["uid"])


def condition(item: dict[str, Any], kind: str) -> tuple[str, str]:
    """Returns (status, reason) of a condition; ("", "") if there is none."""
    for entry in (item.get("status") or {}).get("conditions") or ():
        if entry["type"] == kind:
            return entry["status"], entry["reason"]
    return "", ""


async def until(
    check: Callable[[], Awaitable[Any]], wanted: Any = True, *, within_s: float = 40.0, every_s: float = 0.1
) -> Any:
    """Waits until `check` returns `wanted` (or anything true). Fails with the last value after `within_s`."""
    end = time.monotonic() + within_s
    while True:
        answer = await check()
        if answer == wanted or (wanted is True and answer):
            return answer
        assert time.monotonic() < end, f"after {within_s} s: {answer!r}, wanted {wanted!r}"
        await asyncio.sleep(every_s)


@asynccontextmanager
async def namespace_of(server: ApiServer) -> AsyncIterator[Api]:
    """Creates a namespace, which stays after the test."""
    context = ssl.create_default_context(cafile=str(server.ca_file))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        api = Api(server, session, f"t-{uuid.uuid4().hex[:8]}")
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": api.namespace}}
        await api.call("POST", "/api/v1/namespaces", body)
        if await api.find("serviceaccounts", "default") is None:  # where no controller creates it
            with contextlib.suppress(RefusedError):
                await api.create("serviceaccounts", {"metadata": {"name": "default"}})
        yield api
    await asyncio.sleep(TLS_GOODBYE_S)


def operator_settings(api: Api, folder: Path, **changes: Any) -> Settings:
    profiles, token = folder / "profiles.yaml", folder / "token"
    profiles.write_text(PROFILES)
    token.write_text(MASTER_TOKEN)
    return Settings(
        **{
            "namespaces": frozenset({api.namespace}),
            "own_namespace": api.namespace,
            "identity": f"test-{uuid.uuid4().hex[:6]}",
            "kubeconfig": api.server.kubeconfig,
            "leader_election": False,
            "runtime_image": "registry.example/runtime:1",
            "profiles_file": profiles,
            "master_token_file": token,
            "metrics_host": "127.0.0.1",
            "metrics_port": 0,
            "resync_s": 5.0,
            "usage_interval_s": 1.0,
            "counts_interval_s": 0.3,
            "poll_wait_s": 1.0,
            "poll_pause_s": 0.05,
            "snapshot_stale_s": 1.0,
            "retry_min_s": 0.5,
            **changes,
        }
    )


@dataclass
class Program:
    """`python -m lorapool_operator` as a process; `log` and `code` are known after its end."""

    process: asyncio.subprocess.Process
    log: str = ""
    code: int | None = None


@asynccontextmanager
async def operator_program(api: Api, folder: Path, *, profiles: str = PROFILES, **own: str) -> AsyncIterator[Program]:
    """Runs the program until the end of the block, then ends it by a signal. `own`: its settings, in upper case."""
    (folder / "profiles.yaml").write_text(profiles)
    (folder / "token").write_text(MASTER_TOKEN)
    own = {
        "NAMESPACES": api.namespace,
        "OWN_NAMESPACE": api.namespace,
        "RUNTIME_IMAGE": "runtime:1",
        "PROFILES_FILE": str(folder / "profiles.yaml"),
        "MASTER_TOKEN_FILE": str(folder / "token"),
        "METRICS_HOST": "127.0.0.1",
        "METRICS_PORT": "0",
        "LOG_FORMAT": "json",
        **own,
    }
    environment = {**os.environ, **{f"LORAPOOL_OPERATOR_{name}": value for name, value in own.items()}}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "lorapool_operator", "--kubeconfig", str(api.server.kubeconfig),
        env=environment, cwd=folder, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    program = Program(process)
    assert process.stderr is not None
    reading = asyncio.create_task(process.stderr.read())
    try:
        yield program
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        program.log = (await reading).decode()
        program.code = await asyncio.wait_for(process.wait(), 20)


@asynccontextmanager
async def running_operator(
    api: Api,
    folder: Path,
    inspector: FakeInspector,
    *,
    sources: SourceSettings | None = None,
    job_files: JobFiles | None = None,
    **changes: Any,
) -> AsyncIterator[Process]:
    """The whole process, in this event loop."""
    settings = operator_settings(api, folder, **changes)
    process = Process(settings, sources=sources or SourceSettings(), inspector=inspector, job_files=job_files)
    task = asyncio.create_task(process.run())
    try:

        async def up() -> bool:
            if task.done():
                task.result()
            return process.synced or process.settings.leader_election

        await until(up, every_s=0.02)
        yield process
    finally:
        process.stop()
        await asyncio.wait_for(task, 20)
        await asyncio.sleep(TLS_GOODBYE_S)
