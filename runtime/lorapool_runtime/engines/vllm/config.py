"""The settings of the vLLM engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM reserves memory."""


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

    def __post_init__(self) -> None:
        for name in ("max_rank", "slots", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_rank > RANKS[-1]:
            raise ValueError(f"max_rank {self.max_rank} is above vLLM's limit of {RANKS[-1]}: lower spec.lora.maxRank")

    @property
    def reserved_rank(self) -> int:
        """The rank for which every slot has memory."""
        return next(rank for rank in RANKS if rank >= self.max_rank)
