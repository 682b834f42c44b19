"""A reason and a remedy for what vLLM raises when it does not start. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorapool_api.common import Reason
from lorapool_runtime.engines.errors import EngineStartError

MAX_CHARS = 400

_MEMORY = "lower spec.lora.slots, spec.lora.maxRank or spec.maxModelLen, or use more or larger GPUs"
_CAUSES: tuple[tuple[str, Reason, str], ...] = (
    (r"larger than the (number of )?available GPUs|invalid device ordinal|local_rank.*out of bounds"
     r"|No (CUDA )?GPUs are available|Failed to infer device type",
     Reason.GPU_COUNT_MISMATCH,
     "make the GPUs in resources.limits of the profile equal to tensorParallel times pipelineParallel of a pod"),
    (r"No space left on device: '?/dev/shm|/dev/shm|unable to (open|write|mmap) (to )?(file|shared memory)|Bus error"
     r"|Failed core proc.*: -7\b",
     Reason.SHARED_MEMORY_TOO_SMALL,
     "set shmSizeLimit of the profile to 1Gi or more"),
    (r"out of memory|No available memory for the cache blocks|KV cache is needed|larger than the maximum number of "
     r"tokens that can be stored in KV cache",
     Reason.DEVICE_MEMORY_TOO_SMALL, _MEMORY),
    (r"Failed core proc.*: -9\b|DefaultCPUAllocator: can't allocate memory",
     Reason.OUT_OF_MEMORY, "raise resources.limits.memory of the profile"),
    (r"less than desired (GPU|CPU) memory utilization|Error in memory profiling",
     Reason.DEVICE_MEMORY_TOO_SMALL,
     "another process uses the memory of this device: give the pod a device of its own"),
    (r"quantization method .* is not supported for the current|[Mm]inimum capability",
     Reason.DEVICE_UNUSABLE,
     "this GPU cannot compute the base's quantization: use a newer GPU, or a base that is quantized in another way"),
    (r"[Bb]float16 is only supported on GPUs with compute capability",
     Reason.DEVICE_UNUSABLE, "set spec.dtype to float16, or use a newer GPU"),
    (r"no kernel image is available|compute capability|not supported on this GPU|capability .* (lower|less)",
     Reason.DEVICE_UNUSABLE, "use a GPU of compute capability 7.5 or later with a current driver"),
    (r"does not support LoRA|LoRA is not (yet )?supported|[Uu]nsupported LoRA|lora.* not supported",
     Reason.BASE_UNSUPPORTED, "serve this base with the torch engine"),
    (r"Model architectures .* are not supported|has no vLLM implementation|not supported for now|Unknown quantization",
     Reason.BASE_UNSUPPORTED, "serve this base with the torch engine"),
    (r"attention heads .* must be divisible|divisible by (the )?(tensor|pipeline)",
     Reason.GPU_COUNT_MISMATCH,
     "choose a tensorParallel that divides the attention heads of the base; pipelineParallel takes the other GPUs"),
    (r"NCCL|[Gg]loo|DistStoreError|DistNetworkError|TCPStore|Connection (refused|reset|closed)",
     Reason.ENGINE_REFUSED,
     "the GPUs or nodes do not reach each other: name the network of the pods in NCCL_SOCKET_IFNAME and "
     "GLOO_SOCKET_IFNAME of the profile's env, and permit traffic between them"),
)  # fmt: skip
_GENERIC = ("Engine core initialization failed", "WorkerProc initialization failed", "Worker failed with error")


def cause_of(failures: Sequence[tuple[str, str]]) -> EngineStartError:
    """The refusal for a start that failed with these (type, message), oldest first. One that is known comes first."""
    specific = [one for one in failures if not one[1].startswith(_GENERIC) and one[0] != "SystemExit"]
    for kind, message in [*specific, *failures]:
        text = f"{kind}: {message}"
        for pattern, reason, remedy in _CAUSES:
            if re.search(pattern, text):
                return EngineStartError(f"vLLM does not start ({_short(text)}): {remedy}.", reason)
    kind, message = (specific or list(failures) or [("RuntimeError", "its process ended without a reason")])[0]
    remedy = (
        "the log has the details; correct the settings of the profile or the base, or serve it with the torch engine"
    )
    return EngineStartError(f"vLLM does not start ({_short(f'{kind}: {message}')}): {remedy}.")


def _short(text: str) -> str:
    """The first line that says something, without the addresses that pydantic adds."""
    one = re.sub(r"\s*\[type=.*", "", " ".join(text.split()))
    return one if len(one) <= MAX_CHARS else one[: MAX_CHARS - 1] + "…"
