"""Whether the pods that a profile describes can run its engine: GPUs, shared memory, time to start. Pure.

The chart checks the same when it is rendered (`templates/_profile_checks.tpl`); a profile that reached the operator in
another way shows as a condition of the bases that use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lorapool_api.common import Reason, quantity_bytes
from lorapool_operator.decisions.pods import claim_bytes
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile, gpus

SHM_MIN = "1Gi"
"""NCCL's buffers and the queues between the processes of an engine take some hundred megabytes."""
VLLM_STARTUP_MIN_S = 1800
GROUP_NAME_MAX = 40
"""A label of pods contains the name of their StatefulSet, `<base>-runtime-<group>`, and a hash."""


class ProfileProblem(NamedTuple):
    """Why a profile cannot be used."""

    reason: Reason
    message: str
    """What contradicts what, and the remedy."""


def profile_problem(profile: RuntimeProfile, image: RuntimeImage, base_name: str) -> ProfileProblem | None:
    """Returns why pods of this image cannot be made from a profile for a base; None if they can."""
    return _engine(profile, image) or _gpus(profile) or _shared_memory(profile) or _nodes(profile, base_name)


def _engine(profile: RuntimeProfile, image: RuntimeImage) -> ProfileProblem | None:
    parallel = profile.tensor_parallel * profile.pipeline_parallel * profile.nodes
    if profile.engine == "torch":
        if parallel == 1:
            return None
        return _invalid(
            "tensorParallel, pipelineParallel and nodes need the engine vllm, since the engine torch uses one GPU: set "
            "engine to vllm, or all three to 1."
        )
    if not (profile.image or image.image):
        return _invalid(
            "the release has no image for the engine vllm: set image.runtimeVllm.repository of the chart, or image of "
            "the profile."
        )
    if profile.startup_timeout_seconds < VLLM_STARTUP_MIN_S:
        return _invalid(
            f"startupTimeoutSeconds {profile.startup_timeout_seconds} is too short for the engine vllm, which compiles "
            f"kernels and captures graphs at its start: set it to {VLLM_STARTUP_MIN_S} or more, or remove it."
        )
    return None


def _gpus(profile: RuntimeProfile) -> ProfileProblem | None:
    asked, wanted = gpus(profile.resources), profile.tensor_parallel * profile.pipeline_parallel
    if profile.nodes > 1:
        return _gpus_of_nodes(profile, asked)
    if asked is None or asked == wanted or (asked, wanted) == (0, 1):
        return None
    return ProfileProblem(
        Reason.GPU_COUNT_MISMATCH,
        f"tensorParallel {profile.tensor_parallel} times pipelineParallel {profile.pipeline_parallel} is {wanted} "
        f"GPUs, but resources.limits has {asked}: make them equal.",
    )


def _gpus_of_nodes(profile: RuntimeProfile, asked: int | None) -> ProfileProblem | None:
    """Each layer is shared by the GPUs of one node, which are connected best, and the nodes share the layers."""
    each, nodes = profile.tensor_parallel, profile.pipeline_parallel
    if nodes == profile.nodes and asked in (None, each):
        return None
    return ProfileProblem(
        Reason.GPU_COUNT_MISMATCH,
        f"with {profile.nodes} nodes, pipelineParallel is the number of nodes and tensorParallel that of GPUs in "
        f"resources.limits, but they are {nodes} and {each} for {'claims' if asked is None else asked}: make them "
        "equal.",
    )


def _nodes(profile: RuntimeProfile, base_name: str) -> ProfileProblem | None:
    shared = profile.adapter_cache
    if profile.nodes == 1:
        return _invalid("adapterCache is only used with several nodes: remove it.") if shared is not None else None
    if shared is None or (shared.pvc is not None and not _shares(shared.pvc)):
        return ProfileProblem(
            Reason.ADAPTERS_NOT_SHARED,
            f"with {profile.nodes} nodes, adapterCache must be a volume that all of them mount at the same time: set "
            "adapterCache.pvc with accessModes [ReadWriteMany], or adapterCache.hostPath on a shared file system.",
        )
    if shared.pvc is not None and claim_bytes(shared.pvc) == 0:
        return _invalid("adapterCache.pvc has no resources.requests.storage in whole bytes, such as 200Gi: set it.")
    if profile.cache is not None and profile.cache.pvc is not None and not _shares(profile.cache.pvc):
        return _invalid(
            "with several nodes, cache.pvc needs accessModes [ReadWriteMany]: set it, or use another cache."
        )
    if len(base_name) > GROUP_NAME_MAX or not base_name.replace("-", "a").isalnum():
        return _invalid(
            f"with several nodes, the name of a BaseModel has {GROUP_NAME_MAX} characters at most and no dot, since "
            "the names of its pods begin with it: create the BaseModel with another name."
        )
    return None


def _shares(claim: Mapping[str, Any]) -> bool:
    return "ReadWriteMany" in (claim.get("accessModes") or ())


def _shared_memory(profile: RuntimeProfile) -> ProfileProblem | None:
    if profile.tensor_parallel * profile.pipeline_parallel // profile.nodes <= 1:
        return None
    if profile.shm_size_limit and quantity_bytes(profile.shm_size_limit) >= quantity_bytes(SHM_MIN):
        return None
    size = profile.shm_size_limit or "absent"
    return ProfileProblem(
        Reason.SHARED_MEMORY_TOO_SMALL,
        f"shmSizeLimit is {size}, but several GPUs exchange data in /dev/shm: set it to {SHM_MIN} or more.",
    )


def _invalid(message: str) -> ProfileProblem:
    return ProfileProblem(Reason.INVALID_PROFILE, message)
