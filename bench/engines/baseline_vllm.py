"""vLLM's CPU build, as an engine of W1: `python -m engines.baseline_vllm BASE ADAPTERS DTYPE plain|lora|mixed`.

It runs in its own virtual environment (`make bench-baselines`). Both cores are bound explicitly: by default vLLM uses
one, which would be unfair to it. `plain` has LoRA switched off, which is vLLM's fastest base; `mixed` accepts ranks up
to 64. A command loads one adapter from disk and returns how long that took.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CORES = sorted(os.sched_getaffinity(0))
os.environ.update(
    VLLM_TARGET_DEVICE="cpu",
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_CPU_OMP_THREADS_BIND=f"{CORES[0]}-{CORES[-1]}",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

from common.workloads import REQUESTS, Batch, adapter_name, mixed_name  # noqa: E402
from engines.process import serve  # noqa: E402  the environment first


class Vllm:
    def __init__(self, base: str, adapters: Path, dtype: str, way: str) -> None:
        import torch
        import vllm
        from vllm.lora.request import LoRARequest

        self.versions = {"vllm-cpu": vllm.__version__, "vllm-cpu's torch": torch.__version__}
        lora: dict[str, Any] = {}
        if way != "plain":
            rank = 64 if way == "mixed" else 16
            lora = {"enable_lora": True, "max_loras": REQUESTS, "max_lora_rank": rank, "max_cpu_loras": REQUESTS * 2}
        self._llm = vllm.LLM(
            base,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=REQUESTS,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **lora,
        )
        names = [name(number) for name in (adapter_name, mixed_name) for number in range(REQUESTS)]
        self._requests = {
            name: LoRARequest(name, number + 1, str(adapters / name)) for number, name in enumerate(names)
        }
        self._sampling = vllm.SamplingParams
        self._fresh = len(names) + 1
        self._adapters = adapters
        self._lora_request = LoRARequest

    def prepare(self, batch: Batch) -> None:
        pass

    def generate(self, batch: Batch) -> list[list[int]]:
        options = self._sampling(temperature=0.0, max_tokens=batch.new, ignore_eos=True)
        prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt in batch.prompts]
        requests: Any = [None if name is None else self._requests[name] for name in batch.adapters]
        answers = self._llm.generate(
            prompts, options, lora_request=requests if any(batch.adapters) else None, use_tqdm=False
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def load(self, name: str) -> float:
        """Seconds from disk to ready, under a new adapter number; the adapter is removed afterwards."""
        engine = self._llm.llm_engine
        self._fresh += 1
        began_s = time.perf_counter()
        engine.add_lora(self._lora_request(f"fresh-{self._fresh}", self._fresh, str(self._adapters / name)))
        seconds = time.perf_counter() - began_s
        engine.remove_lora(self._fresh)
        return seconds


def _load(engine: Vllm, asked: Mapping[str, Any]) -> dict[str, Any]:
    return {"seconds": engine.load(asked["name"])}


if __name__ == "__main__":
    serve(lambda: Vllm(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]), {"load": _load})
