"""The settings of the torch engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorapool_runtime.engines.step_shares import EQUAL, StepWeights


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings of one engine, read-only. Raises ValueError for a value out of bounds."""

    model_dir: str
    """Local folder with config.json and *.safetensors of the base."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the type the files are stored in, but float32 on a CPU that could only emulate it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: int | None = None
    """Tokens of prompt and completion together; None: the model's own limit."""
    max_rank: int = 64
    slots: int = 8
    """Adapters on the device at one time."""
    max_batch: int = 32
    """Sequences computed in one step at most."""
    kv_bytes: int | None = None
    """Budget of the KV cache; None: a share of the memory that is free after loading the base."""
    max_batch_tokens: int = 512
    """Tokens computed in one step at most."""
    max_prefill_tokens: int | None = None
    """Prompt tokens computed in a step that also decodes, at most: bounds how long a long prompt delays the others.
    None: all of max_batch_tokens on a GPU, where they cost less than reading the weights; 128 on a CPU."""
    batching_window_s: float | None = None
    """How long an idle engine waits for another request before the first step; every arrival restarts the wait, up to
    a few times as long in all. Requests that arrive together then compute their prompts together. None: 4 ms on a CPU,
    where a step takes many times as long, and 0 on a GPU."""
    prefix_cache: bool = True
    """Requests on the same weights share the computed KV blocks of a common prompt prefix."""
    threads: int | None = None
    """CPU threads of torch; None: the cores this process may use (affinity and cgroup)."""
    kv_block_tokens: int = 16
    """Tokens per KV block, the unit in which the KV cache is allocated."""

    step_weights: StepWeights = EQUAL
    """By which the time of a step is divided among its rows."""

    def __post_init__(self) -> None:
        for name in ("max_rank", "slots", "max_batch", "max_batch_tokens", "kv_block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_prefill_tokens is not None and self.max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens must be at least 1, not {self.max_prefill_tokens}")
        if self.batching_window_s is not None and self.batching_window_s < 0:
            raise ValueError(f"batching_window_s must be at least 0, not {self.batching_window_s}")
        if self.max_batch > self.max_batch_tokens:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch ({self.max_batch})"
            )
