"""Runs Deployments as processes of this machine, as a kubelet runs them as pods.

Each has one process at most, whatever its number of replicas: two copies of a base on one machine would only compete
for its cores and memory. A process that ends is started again, with a growing pause. A Pod shows its state to operator
and gateway; a ReplicaSet links the pod to its Deployment, as in Kubernetes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import aiohttp

from lorapool_api.pod_address import PLAIN
from lorapool_api.protocol import ENV_TOKEN_SHA256_FILE, ROUTE_READY
from lorapool_gateway.routing.objects import ObjectRef
from lorapool_gateway.routing.source import ref_of
from lorapool_operator.decisions.pods import CHAT_FILE, ENV_CHAT_FILE, ENV_POD_UID, TOKEN_HASHES_FILE
from lorapool_serve.objects import CONFIG_MAP, DEPLOYMENT, POD, REPLICA_SET, Objects, Raw, object_of

HOST = "127.0.0.1"
COMMAND = (sys.executable, "-m", "lorapool_runtime")
STOP_TIMEOUT_S = 8.0
"""After SIGTERM; longer than a runtime lets its running requests finish."""
PROBE_INTERVAL_S = 0.1
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
PROBLEM_CHARS = 300
LEFT_OUT = (
    "LORAPOOL_RUNTIME_METRICS_PORT",
    "LORAPOOL_RUNTIME_PRELOAD_FILE",
    "LORAPOOL_RUNTIME_SOURCE_RULES_FILE",
)
"""A process takes the place of the one before it, so that there is nothing to preload from. All files are of the user
of this machine, so that the controller's rules are enough."""
PR_SET_PDEATHSIG = 1


@dataclass
class _Running:
    environ: Mapping[str, str]
    task: asyncio.Task[None]


@dataclass
class _Pod:
    """One process and the state that is shown of it."""

    ref: ObjectRef
    labels: dict[str, str]
    deployment_uid: str
    log: Path
    port: int = 0
    ready: bool = False
    problem: str = ""
    terminating: bool = False
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))


class Node:
    def __init__(
        self,
        objects: Objects,
        folder: Path,
        settings: Mapping[str, str],
        local_bases: Mapping[str, Path],
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Logs and caches go to `folder`; `settings` override the LORAPOOL_ variables of a Deployment's container."""
        self._objects = objects
        self._folder = folder
        self._settings = settings
        self._local_bases = local_bases
        self._command = command
        self._running: dict[ObjectRef, _Running] = {}

    def start(self) -> None:
        """Runs every Deployment from now on."""
        self._objects.listen(DEPLOYMENT, self._changed)
        self._objects.listen(CONFIG_MAP, self._remount)

    async def close(self) -> None:
        """Ends all processes."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _changed(self, raw: Raw, deleted: bool) -> None:
        ref, wanted = ref_of(raw), not deleted and raw["spec"]["replicas"] > 0
        environ = self._environ(raw) if wanted else {}
        before = self._running.get(ref)
        if before is not None and before.environ == environ:
            return
        pod = _Pod(
            ref=ObjectRef(ref.namespace, f"{ref.name}-{uuid.uuid4().hex[:5]}"),
            labels=raw["spec"]["template"]["metadata"]["labels"],
            deployment_uid=raw["metadata"]["uid"],
            log=self._folder / f"{ref.namespace}-{ref.name}.log",
        )
        previous = before.task if before is not None else None
        task = asyncio.create_task(self._replace(previous, pod, environ), name=f"run {ref}")
        self._running[ref] = _Running(environ, task)

    def _environ(self, raw: Raw) -> dict[str, str]:
        """The container's own settings, with those of this machine in place of a pod's paths and ports."""
        ref, [container] = ref_of(raw), raw["spec"]["template"]["spec"]["containers"]
        given = {
            item["name"]: item.get("value", "") for item in container["env"] if item["name"].startswith("LORAPOOL_")
        }
        for name in LEFT_OUT:
            given.pop(name, None)
        model = given["LORAPOOL_RUNTIME_MODEL"]
        given["LORAPOOL_RUNTIME_MODEL"] = str(self._local_bases.get(model, model))
        given["LORAPOOL_RUNTIME_CACHE_DIR"] = str(self._folder / "cache" / f"{ref.namespace}-{ref.name}")
        given[ENV_TOKEN_SHA256_FILE] = str(self._mounted(ref, TOKEN_HASHES_FILE))
        given[ENV_CHAT_FILE] = str(self._mounted(ref, CHAT_FILE))
        return {**given, **self._settings}

    def _remount(self, raw: Raw, deleted: bool) -> None:
        """Runtimes read these files again when they change."""
        if not deleted and ref_of(raw) in self._running:
            for name in (TOKEN_HASHES_FILE, CHAT_FILE):
                self._mounted(ref_of(raw), name)

    def _mounted(self, ref: ObjectRef, name: str) -> Path:
        """Writes a file that a pod would mount; one without content is not there."""
        file = self._folder / f"{ref.namespace}-{ref.name}.{name}"
        mounted = (raw["data"] for raw in self._objects.of(CONFIG_MAP) if ref_of(raw) == ref)
        if text := "".join(data.get(name, "") for data in mounted):
            file.write_text(text)
        else:
            file.unlink(missing_ok=True)
        return file

    async def _replace(self, previous: asyncio.Task[None] | None, pod: _Pod, environ: Mapping[str, str]) -> None:
        if previous is not None:
            previous.cancel()
            await asyncio.gather(previous, return_exceptions=True)
        if not environ:
            return
        self._show(pod)
        try:
            for attempt in range(sys.maxsize):
                await self._run(pod, environ)
                self._show(pod)
                await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
        finally:
            self._objects.delete_object(POD, pod.ref)
            self._objects.delete_object(REPLICA_SET, pod.ref)

    async def _run(self, pod: _Pod, environ: Mapping[str, str]) -> None:
        """Starts the process, shows it when it is ready, and returns when it has ended."""
        pod.port = free_port()
        address = {"LORAPOOL_RUNTIME_LISTEN_HOST": HOST, "LORAPOOL_RUNTIME_LISTEN_PORT": str(pod.port)}
        here = {**address, ENV_POD_UID: pod.uid}
        with pod.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                env={**os.environ, **environ, **here},
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        ended = asyncio.create_task(process.wait())
        try:
            await self._until_ready(pod, ended)
            if not ended.done():
                pod.ready, pod.problem = True, ""
                self._show(pod)
            code = await ended
            pod.problem = f"exit code {code}: {_last_line(pod.log)} (log: {pod.log})"
        finally:
            pod.ready = False
            if process.returncode is None:
                pod.terminating = True
                self._show(pod)
                await _stop(process)

    async def _until_ready(self, pod: _Pod, ended: asyncio.Task[int]) -> None:
        async with aiohttp.ClientSession() as session:
            while not ended.done():
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with session.get(f"http://{HOST}:{pod.port}{ROUTE_READY}") as response:
                        if response.status == 200:
                            return
                await asyncio.wait({ended}, timeout=PROBE_INTERVAL_S)

    def _show(self, pod: _Pod) -> None:
        """Writes Pod and ReplicaSet."""
        port = {"name": PLAIN, "containerPort": pod.port}
        crashed = {"waiting": {"reason": "CrashLoopBackOff", "message": pod.problem}} if pod.problem else {}
        status = {
            "phase": "Running",
            "podIP": HOST if pod.port else "",
            "conditions": [{"type": "Ready", "status": str(pod.ready)}],
            "containerStatuses": [{"name": "runtime", "state": crashed}],
        }
        owned: Raw = {"uid": f"{pod.uid}-owner", "labels": pod.labels, **_controlled_by(DEPLOYMENT, pod.deployment_uid)}
        self._objects.put(object_of(REPLICA_SET, pod.ref, metadata=owned))
        metadata: Raw = {"uid": pod.uid, "labels": pod.labels, **_controlled_by(REPLICA_SET, f"{pod.uid}-owner")}
        if pod.terminating:
            metadata["deletionTimestamp"] = datetime.now(UTC).isoformat()
        spec = {"containers": [{"ports": [port]}]}
        self._objects.put(object_of(POD, pod.ref, metadata=metadata, spec=spec, status=status))


def _controlled_by(kind: str, uid: str) -> Raw:
    return {"ownerReferences": [{"kind": kind, "uid": uid, "controller": True}]}


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Ends the process by SIGTERM, or by SIGKILL when that takes too long or the wait is cancelled."""
    try:
        process.terminate()
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except (ProcessLookupError, TimeoutError):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def _end_with_parent() -> None:
    """Runs in the child: it receives SIGTERM when this process dies, also by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:PROBLEM_CHARS] if lines else ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])
