"""Runtime profiles that contradict themselves: the chart refuses them, and the operator reports them."""

from __future__ import annotations

from typing import Any, NamedTuple

from lorapool_api.common import Reason


class Contradiction(NamedTuple):
    profile: dict[str, Any]
    reason: Reason
    words: str
    """A part of the message."""


def gpus(count: int | str, **more: Any) -> dict[str, Any]:
    """A profile of the engine vllm with so many GPUs in its limits."""
    return {"engine": "vllm", "resources": {"limits": {"nvidia.com/gpu": count}}, **more}


RWX = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "200Gi"}}}
RWO = {**RWX, "accessModes": ["ReadWriteOnce"]}


def two_nodes(**more: Any) -> dict[str, Any]:
    """A profile of two nodes with eight GPUs each, that share a claim."""
    shape = {"tensorParallel": 8, "pipelineParallel": 2, "nodes": 2, "shmSizeLimit": "32Gi"}
    return gpus(8, **{**shape, "adapterCache": {"pvc": RWX}, **more})


CONTRADICTIONS = {
    "torch on several GPUs": Contradiction(
        {"tensorParallel": 2}, Reason.INVALID_PROFILE, "nodes need the engine vllm, since the engine torch uses one GPU"
    ),
    "torch with more GPUs than it uses": Contradiction(
        {"resources": {"limits": {"nvidia.com/gpu": 2}}},
        Reason.GPU_COUNT_MISMATCH,
        "is 1 GPUs, but resources.limits has 2",
    ),
    "fewer GPUs than tensorParallel": Contradiction(
        gpus(4, tensorParallel=8, shmSizeLimit="16Gi"),
        Reason.GPU_COUNT_MISMATCH,
        "is 8 GPUs, but resources.limits has 4",
    ),
    "a number of GPUs that is a text": Contradiction(
        gpus("4", tensorParallel=2, pipelineParallel=4, shmSizeLimit="16Gi"),
        Reason.GPU_COUNT_MISMATCH,
        "tensorParallel 2 times pipelineParallel 4 is 8 GPUs, but resources.limits has 4",
    ),
    "no GPU at all": Contradiction(
        {"engine": "vllm", "tensorParallel": 2, "shmSizeLimit": "2Gi"},
        Reason.GPU_COUNT_MISMATCH,
        "is 2 GPUs, but resources.limits has 0",
    ),
    "no shared memory": Contradiction(
        gpus(2, tensorParallel=2),
        Reason.SHARED_MEMORY_TOO_SMALL,
        "shmSizeLimit is absent, but several GPUs exchange data",
    ),
    "too little shared memory": Contradiction(
        gpus(2, pipelineParallel=2, shmSizeLimit="1000Mi"),
        Reason.SHARED_MEMORY_TOO_SMALL,
        "shmSizeLimit is 1000Mi, but several GPUs exchange data in /dev/shm: set it to 1Gi or more",
    ),
    "too little time to start": Contradiction(
        gpus(1, startupTimeoutSeconds=900),
        Reason.INVALID_PROFILE,
        "startupTimeoutSeconds 900 is too short for the engine vllm",
    ),
    "torch on several nodes": Contradiction(
        {"nodes": 2}, Reason.INVALID_PROFILE, "tensorParallel, pipelineParallel and nodes need the engine vllm"
    ),
    "fewer parts than nodes": Contradiction(
        two_nodes(pipelineParallel=1),
        Reason.GPU_COUNT_MISMATCH,
        "with 2 nodes, pipelineParallel is the number of nodes and tensorParallel that of GPUs in resources.limits, "
        "but they are 1 and 8 for 8",
    ),
    "layers shared across nodes": Contradiction(
        two_nodes(tensorParallel=16), Reason.GPU_COUNT_MISMATCH, "but they are 2 and 16 for 8: make them equal"
    ),
    "nodes without shared memory": Contradiction(
        two_nodes(shmSizeLimit=""), Reason.SHARED_MEMORY_TOO_SMALL, "shmSizeLimit is absent"
    ),
    "nodes that share no volume": Contradiction(
        {name: value for name, value in two_nodes().items() if name != "adapterCache"},
        Reason.ADAPTERS_NOT_SHARED,
        "with 2 nodes, adapterCache must be a volume that all of them mount at the same time",
    ),
    "a volume for one node at a time": Contradiction(
        two_nodes(adapterCache={"pvc": RWO}), Reason.ADAPTERS_NOT_SHARED, "with accessModes [ReadWriteMany]"
    ),
    "a shared volume without a size": Contradiction(
        two_nodes(adapterCache={"pvc": {"accessModes": ["ReadWriteMany"]}}),
        Reason.INVALID_PROFILE,
        "adapterCache.pvc has no resources.requests.storage in whole bytes",
    ),
    "files of the base for one node at a time": Contradiction(
        two_nodes(cache={"pvc": RWO}), Reason.INVALID_PROFILE, "cache.pvc needs accessModes [ReadWriteMany]"
    ),
    "a shared volume for one node": Contradiction(
        gpus(1, adapterCache={"pvc": RWX}), Reason.INVALID_PROFILE, "adapterCache is only used with several nodes"
    ),
}
"""By what is wrong."""

CONSISTENT: dict[str, dict[str, Any]] = {
    "a CPU": {},
    "one GPU": {"resources": {"limits": {"nvidia.com/gpu": "1"}}},
    "one GPU of another maker": {"resources": {"limits": {"amd.com/gpu": 1}}},
    "a part of a GPU": {"resources": {"limits": {"nvidia.com/mig-1g.10gb": 1}}},
    "a claim, which decides the number": {"engine": "vllm", "resources": {"claims": [{"name": "gpus"}]}},
    "vLLM on one GPU": gpus(1),
    "vLLM without a GPU": {"engine": "vllm"},
    "vLLM on eight": gpus(8, tensorParallel=8, shmSizeLimit="1024Mi"),
    "two nodes": two_nodes(cache={"pvc": RWX}),
    "two nodes of a shared file system": two_nodes(
        adapterCache={"hostPath": {"path": "/lustre/adapters"}}, cache={"hostPath": {"path": "/lustre/models"}}
    ),
    "two nodes with one GPU each": gpus(
        1, pipelineParallel=2, nodes=2, adapterCache={"hostPath": {"path": "/lustre/adapters"}}
    ),
    "two nodes with claims": two_nodes(resources={"claims": [{"name": "gpus"}]}),
    "vLLM on four, in two parts": gpus(
        4, tensorParallel=2, pipelineParallel=2, shmSizeLimit="2Gi", startupTimeoutSeconds=3600
    ),
}
