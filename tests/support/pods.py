"""A runtime pod and its owners as the API server sends them: Deployment, ReplicaSet, Pod."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorapool_api.common import LABEL_GROUP_INDEX, LABEL_GROUP_SET, LABEL_WORKER_INDEX
from lorapool_operator.world.cluster_cache import ClusterCache, PodObject, ReplicaSetObject, WorkloadObject


def pod_object(
    port: int,
    *,
    name: str = "pod-1",
    namespace: str = "demo",
    base: str = "tiny",
    base_uid: str = "base-demo-tiny",
    owner: str | None = None,
    ip: str = "127.0.0.1",
    ready: bool = True,
    terminating: bool = False,
    scheme: str = "http",
) -> dict[str, Any]:
    """`owner`: uid of its ReplicaSet, by default that of `owner_objects`."""
    metadata = _metadata(name, namespace, f"uid-{name}", base, base_uid)
    metadata |= _controlled_by("ReplicaSet", f"rs-{base_uid}" if owner is None else owner)
    if terminating:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    ports = [{"name": "metrics", "containerPort": 9}, {"name": scheme, "containerPort": port}]
    status = {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": str(ready)}]}
    return {"metadata": metadata, "spec": {"containers": [{"ports": ports}]}, "status": status}


def owner_objects(
    namespace: str = "demo", base: str = "tiny", base_uid: str = "base-demo-tiny"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Deployment of a base and its ReplicaSet."""
    deployment = _metadata(f"{base}-runtime", namespace, f"deployment-{base_uid}", base, base_uid)
    replica_set = _metadata(f"{base}-runtime-1", namespace, f"rs-{base_uid}", base, base_uid)
    return (
        {"metadata": deployment | _controlled_by("BaseModel", base_uid)},
        {"metadata": replica_set | _controlled_by("Deployment", f"deployment-{base_uid}")},
    )


def group_objects(
    namespace: str = "demo", base: str = "tiny", base_uid: str = "base-demo-tiny"
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The LeaderWorkerSet of a base, the StatefulSet of its leaders, and that of the first leader's workers."""
    name = f"{base}-runtime"
    groups = _metadata(name, namespace, f"groups-{base_uid}", base, base_uid)
    leaders = _metadata(name, namespace, f"leaders-{base_uid}", base, base_uid)
    workers = _metadata(f"{name}-0", namespace, f"workers-{base_uid}", base, base_uid)
    leaders["labels"] = workers["labels"] = {LABEL_GROUP_SET: name}  # its controller copies no label of ours
    return (
        {"kind": "LeaderWorkerSet", "metadata": groups | _controlled_by("BaseModel", base_uid)},
        {"kind": "StatefulSet", "metadata": leaders | _controlled_by("LeaderWorkerSet", f"groups-{base_uid}")},
        {"kind": "StatefulSet", "metadata": workers | _controlled_by("Pod", f"leader-{base_uid}")},
    )


def group_pods(
    port: int, *, namespace: str = "demo", base: str = "tiny", base_uid: str = "base-demo-tiny"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leader and the one worker of the first group."""
    made = []
    for index, owner, uid in ((0, "leaders", f"leader-{base_uid}"), (1, "workers", f"worker-{base_uid}")):
        name = f"{base}-runtime-0" + f"-{index}" * bool(index)
        pod = pod_object(port, name=name, namespace=namespace, base=base, base_uid=base_uid)
        pod["metadata"] |= {"uid": uid, **_controlled_by("StatefulSet", f"{owner}-{base_uid}")}
        pod["metadata"]["labels"] |= {LABEL_GROUP_INDEX: "0", LABEL_WORKER_INDEX: str(index)}
        made.append(pod)
    return made[0], made[1]


def adopt(cache: ClusterCache, pod: PodObject) -> PodObject:
    """Puts a pod and its owners into the cache; its base must be there for the pod to count."""
    deployment, replica_set = owner_objects(pod.meta.namespace, pod.base.name, pod.base_uid)
    cache.deployments.put(WorkloadObject.parse(deployment))
    cache.replica_sets.put(ReplicaSetObject.parse(replica_set))
    made = replace(pod, owner_uid=f"rs-{pod.base_uid}")
    cache.pods.put(made)
    return made


def _metadata(name: str, namespace: str, uid: str, base: str, base_uid: str) -> dict[str, Any]:
    labels = {"lorapool.dev/base": base, "lorapool.dev/base-uid": base_uid}
    return {"name": name, "namespace": namespace, "uid": uid, "resourceVersion": "1", "labels": labels}


def _controlled_by(kind: str, uid: str) -> dict[str, Any]:
    return {"ownerReferences": [{"kind": kind, "uid": uid, "controller": True}]}
