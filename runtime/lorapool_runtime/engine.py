"""The engine: one thread that owns torch, a queue of commands to it, and the step loop.

`adapters` and `server` call it from the event loop through `interface.Engine`; they never touch torch.
Work in progress: the constructor and its configuration are settled, the body follows.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from lorapool_runtime.interface import EngineStats, GenerationRequest, HostAdapter, LoadOutcome, ModelFacts, TokenSink


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All an engine needs to know before it starts."""

    model_dir: str
    """Local folder with config.json and *.safetensors of the base."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: int | None = None
    """Tokens of prompt and completion together; None: what the model was made for."""
    max_rank: int = 64
    slots: int = 8
    """Adapters on the device at one time."""
    max_batch: int = 32
    """Sequences computed in one step at most."""
    kv_bytes: int | None = None
    """Budget of the KV cache; None: a share of the memory that is free after loading the base."""
    max_batch_tokens: int = 512
    """Tokens computed in one step at most: bounds how long a long prompt delays the others."""
    threads: int | None = None
    """CPU threads of torch; None: the cores this process may use (affinity and cgroup)."""


class TorchEngine:
    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    @property
    def facts(self) -> ModelFacts:
        raise NotImplementedError

    def start(self) -> None:
        """Starts the engine thread and returns when the base is loaded; raises what loading it raised."""
        raise NotImplementedError

    def stop(self, timeout_s: float) -> None:
        raise NotImplementedError

    def read_adapter(self, folder: str, *, max_rank: int) -> HostAdapter:
        raise NotImplementedError

    def load(self, slot: int, adapter: HostAdapter) -> Future[LoadOutcome]:
        raise NotImplementedError

    def unload(self, slot: int) -> Future[int]:
        raise NotImplementedError

    def submit(self, request: GenerationRequest, sink: TokenSink) -> None:
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        raise NotImplementedError

    def observe(self) -> EngineStats:
        raise NotImplementedError
