"""The settings of the vLLM engine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Literal

from lorapool_api.release import release
from lorapool_runtime.engines.step_shares import EQUAL, StepWeights

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM reserves memory."""


@dataclass(frozen=True, slots=True)
class Group:
    """The place of this process among those that compute one base together, one on each node."""

    size: int
    index: int
    """0: the leader, which alone takes requests."""
    leader: str
    """Host name or address of the leader."""
    port: int
    """Port of the leader at which vLLM's processes meet. At the next one the group's runtimes do."""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.size:
            raise ValueError(f"the index {self.index} is not below the size of the group, {self.size}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings of one engine, read-only. Raises ValueError for a value out of bounds."""

    model_dir: str
    """Local folder with config.json and *.safetensors of the base."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    """Tokens of prompt and completion together; None: the model's own limit."""
    max_rank: int = 64
    slots: int = 8
    """Adapters on the device at one time."""
    max_batch: int = 32
    """Sequences computed in one step at most."""
    max_batch_tokens: int | None = None
    """Tokens computed in one step at most; None: vLLM's default for the device."""
    kv_bytes: int | None = None
    """Size of the KV cache; None: nine tenths of the GPU's memory, less what the model takes."""
    prefix_cache: bool = True
    """Requests on the same weights share the computed KV blocks of a common prompt prefix."""
    kv_block_tokens: int | None = None
    """Tokens per KV block; None: vLLM's default for the device."""
    tensor_parallel: int = 1
    """GPUs that share each layer."""
    pipeline_parallel: int = 1
    """Parts into which the layers are divided, each on `tensor_parallel` GPUs."""
    threads: int | None = None
    """CPU threads of a build without a GPU; None: the cores this process may use."""
    group: Group | None = None
    """None: all GPUs are of this node."""

    step_weights: StepWeights = EQUAL
    """By which time is divided among the requests that got tokens."""

    def __post_init__(self) -> None:
        for name in ("max_rank", "slots", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_rank > RANKS[-1]:
            raise ValueError(f"max_rank {self.max_rank} is above vLLM's limit of {RANKS[-1]}: lower spec.lora.maxRank")
        if self.group is not None and (self.tensor_parallel * self.pipeline_parallel) % self.group.size:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} times pipeline_parallel {self.pipeline_parallel} cannot be "
                f"divided among {self.group.size} nodes: set pipelineParallel to the number of nodes"
            )

    @property
    def reserved_rank(self) -> int:
        """The rank for which every slot has memory."""
        return next(rank for rank in RANKS if rank >= self.max_rank)

    def identity(self, version: str) -> str:
        """What all pods of a group have in common: this release, the version of vLLM, and these settings."""
        own = [getattr(self, one.name) for one in fields(self) if one.name not in ("model_dir", "group")]
        return f"lorapool {release()} with vllm {version} and settings {sha256(repr(own).encode()).hexdigest()[:8]}"

    @property
    def local_devices(self) -> int:
        """GPUs of this node."""
        return self.tensor_parallel * self.pipeline_parallel // (1 if self.group is None else self.group.size)
