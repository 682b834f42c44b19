"""Lorapool's engine in process, as an engine of W1: `python -m engines.own_engine BASE ADAPTERS DTYPE [--gpu]`.

Adapters are read once and copied into slots before the timer starts, as the layers above the engine do for warm ones.
"""

from __future__ import annotations

import os
import queue
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the runtime's process sets it

import torch
import transformers
from common.workloads import REQUESTS, Batch
from engines.process import serve

from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, HostAdapter, SamplingParams, TokenOutput
from lorapool_runtime.engines.torch.engine import EngineConfig, TorchEngine

MAX_RANK = 64
MAX_MODEL_LEN = 512


class OwnEngine:
    def __init__(self, base: str, adapters: Path, dtype: str) -> None:
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        config: dict[str, Any] = {"dtype": dtype, "max_rank": MAX_RANK, "slots": REQUESTS, "max_batch": REQUESTS}
        if "prefix_cache" in EngineConfig.__dataclass_fields__:
            config["prefix_cache"] = False  # cases share prompts; the baselines' caches are off too
        self._engine = TorchEngine(EngineConfig(base, max_model_len=MAX_MODEL_LEN, **config))
        self._engine.start()
        self._adapters = adapters
        self._host: dict[str, HostAdapter] = {}
        self._slots: dict[str, int] = {}

    def prepare(self, batch: Batch) -> None:
        """Loads the adapters of the batch; a base-only batch leaves the slots unchanged."""
        wanted = {name for name in batch.adapters if name is not None}
        if wanted <= set(self._slots):
            return
        self.unload()
        for slot, name in enumerate(sorted(wanted)):
            self._host[name] = self._host.get(name) or self._engine.read_adapter(
                str(self._adapters / name), max_rank=MAX_RANK
            )
            self._engine.load(slot, self._host[name]).result(60)
            self._slots[name] = slot

    def unload(self) -> None:
        for slot in self._slots.values():
            self._engine.unload(slot).result(60)
        self._slots = {}

    def generate(self, batch: Batch) -> list[list[int]]:
        greedy = SamplingParams(max_tokens=batch.new, temperature=0.0, ignore_eos=True)
        outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        tokens: dict[str, list[int]] = {str(row): [] for row in range(len(batch.prompts))}
        for row, (prompt, name) in enumerate(zip(batch.prompts, batch.adapters, strict=True)):
            slot = BASE_SLOT if name is None else self._slots[name]
            self._engine.submit(GenerationRequest(str(row), prompt, slot, name or "base", greedy), outputs.put)
        left = len(tokens)
        while left:
            output = outputs.get(timeout=300)
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.token_id is not None:
                tokens[output.request_id].append(output.token_id)
            left -= output.finish_reason is not None
        return list(tokens.values())

    def load(self, name: str) -> float:
        """Seconds from an adapter's files to its slot."""
        self.unload()
        began_s = time.perf_counter()
        self._engine.load(0, self._engine.read_adapter(str(self._adapters / name), max_rank=MAX_RANK)).result(60)
        seconds = time.perf_counter() - began_s
        self._slots[name] = 0
        return seconds


def _load(engine: OwnEngine, asked: Mapping[str, Any]) -> dict[str, Any]:
    return {"seconds": engine.load(asked["name"])}


def _unload(engine: OwnEngine, _asked: Mapping[str, Any]) -> dict[str, Any]:
    engine.unload()
    return {}


if __name__ == "__main__":
    serve(lambda: OwnEngine(sys.argv[1], Path(sys.argv[2]), sys.argv[3]), {"unload": _unload, "load": _load})
