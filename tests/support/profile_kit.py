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


CONTRADICTIONS = {
    "torch on several GPUs": Contradiction(
        {"tensorParallel": 2}, Reason.INVALID_PROFILE, "need the engine vllm, since the engine torch uses one GPU"
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
    "vLLM on four, in two parts": gpus(
        4, tensorParallel=2, pipelineParallel=2, shmSizeLimit="2Gi", startupTimeoutSeconds=3600
    ),
}
