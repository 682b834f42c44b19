"""A stand-in for the controller of LeaderWorkerSets, on a real API server with Kubernetes' own controllers.

It makes what that controller makes, with its labels and owners: a StatefulSet of leaders, and one of workers for each
leader. Kubernetes' StatefulSet controller makes and removes the pods. There is no kubelet: a test sets their status.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from operator_world import Api, RefusedError, owned_by

from lorapool_api.common import LABEL_GROUP_INDEX, LABEL_GROUP_SET, LABEL_WORKER_INDEX

PAUSE_S = 0.2
TERMINATION_S = 3.0
"""Without a kubelet pods end at once; on a node, those of a group that is replaced are terminating for a while."""


@asynccontextmanager
async def group_controller(api: Api) -> AsyncIterator[None]:
    """Runs until the end of the block."""
    task = asyncio.create_task(_forever(api))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _forever(api: Api) -> None:
    while True:
        with contextlib.suppress(RefusedError, aiohttp.ClientError):  # something changed meanwhile, or there is no API
            await _once(api)
        await asyncio.sleep(PAUSE_S)


async def _once(api: Api) -> None:
    for groups in await api.items("leaderworkersets"):
        if "deletionTimestamp" not in groups["metadata"]:
            await _leaders(api, groups)


async def _leaders(api: Api, groups: dict[str, Any]) -> None:
    name, made = groups["metadata"]["name"], groups["spec"]["leaderWorkerTemplate"]
    labels = {LABEL_GROUP_SET: name, LABEL_WORKER_INDEX: "0"}
    owner = owned_by("LeaderWorkerSet", groups, "leaderworkerset.x-k8s.io/v1")
    await _stateful_set(api, name, owner, labels, made["leaderTemplate"], groups["spec"]["replicas"], start=0)
    pods = {pod["metadata"]["name"]: pod for pod in await api.items("pods")}
    for index in range(groups["spec"]["replicas"]):
        leader = pods.get(f"{name}-{index}")
        if leader is None:
            continue
        group = {LABEL_GROUP_INDEX: str(index)}
        if LABEL_GROUP_INDEX not in leader["metadata"]["labels"]:  # the controller's webhook sets it
            await api.patch("pods", leader["metadata"]["name"], {"metadata": {"labels": group}})
        workers = {LABEL_GROUP_SET: name, **group, "leaderworkerset.sigs.k8s.io/group-key": leader["metadata"]["uid"]}
        owner = owned_by("Pod", leader, "v1")
        size, template = made["size"] - 1, made["workerTemplate"]
        await _stateful_set(api, leader["metadata"]["name"], owner, workers, template, size, start=1)
        if any(map(_restarted, (pod for at, pod in pods.items() if at.startswith(leader["metadata"]["name"])))):
            await asyncio.sleep(TERMINATION_S)
            await api.delete("pods", leader["metadata"]["name"])  # and with it the group as a whole


async def _stateful_set(
    api: Api,
    name: str,
    owner: dict[str, Any],
    labels: dict[str, str],
    template: dict[str, Any],
    replicas: int,
    *,
    start: int,
) -> None:
    found = await api.find("statefulsets", name)
    metadata = {**template["metadata"], "labels": {**template["metadata"]["labels"], **labels}}
    template = {**template, "metadata": metadata}
    if found is None:
        spec = {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": template,
            "ordinals": {"start": start},
            "podManagementPolicy": "Parallel",
            "serviceName": name,
        }
        await api.create("statefulsets", {"metadata": {"name": name, "labels": labels, **owner}, "spec": spec})
    elif (found["spec"]["replicas"], _image(found["spec"]["template"])) != (replicas, _image(template)):
        await api.patch("statefulsets", name, {"spec": {"replicas": replicas, "template": template}})


def _image(template: dict[str, Any]) -> str:
    return str(template["spec"]["containers"][0]["image"])


def _restarted(pod: dict[str, Any]) -> bool:
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return any(item.get("restartCount") for item in statuses)
