"""Whether the pods that a profile describes can run its engine: GPUs, shared memory, time to start. Pure.

The chart checks the same when it is rendered (`templates/_profile_checks.tpl`); a profile that reached the operator in
another way shows as a condition of the bases that use it.
"""

from __future__ import annotations

from typing import NamedTuple

from lorapool_api.common import Reason, quantity_bytes
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile, gpus

SHM_MIN = "1Gi"
"""NCCL's buffers and the queues between the processes of an engine take some hundred megabytes."""
VLLM_STARTUP_MIN_S = 1800


class ProfileProblem(NamedTuple):
    """Why a profile cannot be used."""

    reason: Reason
    message: str
    """What contradicts what, and the remedy."""


def profile_problem(profile: RuntimeProfile, image: RuntimeImage) -> ProfileProblem | None:
    """Returns the first contradiction in a profile whose pods have this image; None if there is none."""
    return _engine(profile, image) or _gpus(profile) or _shared_memory(profile)


def _engine(profile: RuntimeProfile, image: RuntimeImage) -> ProfileProblem | None:
    parallel = profile.tensor_parallel * profile.pipeline_parallel
    if profile.engine == "torch":
        if parallel == 1:
            return None
        return _invalid(
            "tensorParallel and pipelineParallel need the engine vllm, since the engine torch uses one GPU: set engine "
            "to vllm, or both to 1."
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
    if asked is None or asked == wanted or (asked, wanted) == (0, 1):
        return None
    return ProfileProblem(
        Reason.GPU_COUNT_MISMATCH,
        f"tensorParallel {profile.tensor_parallel} times pipelineParallel {profile.pipeline_parallel} is {wanted} "
        f"GPUs, but resources.limits has {asked}: make them equal.",
    )


def _shared_memory(profile: RuntimeProfile) -> ProfileProblem | None:
    if profile.tensor_parallel * profile.pipeline_parallel == 1:
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
